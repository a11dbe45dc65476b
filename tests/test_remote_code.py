"""A checkpoint that carries its code opens where the package is not installed, and runs none of it where it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import (
    SAMPLING_RATE,
    add_adapter_or_skip,
    fresh_process,
    randomize_,
    speech,
    tiny_whisper_config,
    wav2vec2_processor,
    whisper_generation_config,
    whisper_processor,
)
from test_family_contract import NAMES, case, decoder_inputs, outputs_of, residual
from transformers import AutoConfig, AutoModel, pipeline

import hf_residual_transformer as hrt
from hf_residual_transformer import ResidualConfig, classes
from hf_residual_transformer.families import FAMILIES
from hf_residual_transformer.folders import CODE

CODE_FILES = {
    f"{name}.py"
    for name in (
        "classes",
        "configuration",
        "families",
        "folders",
        "kernels",
        "layers",
        "modeling",
        "quantization",
        "remote",
        "wavlm",
        "whisper",
    )
}
# Python finds the package neither as a folder nor as an installed distribution, as if it were not there.
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hf_residual_transformer", "hrt_cli"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import hf_residual_transformer
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is there")
"""


def run_python(code: str, tmp_path: Path, *words: object) -> str:
    """What a fresh process prints, whose code of remote models is in a new folder."""
    done = fresh_process(["-c", code, *words], tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def auto_of(name: str) -> str:
    """Name of the Auto class of the family's recogniser, or of its encoder."""
    autos = classes.dense_names(FAMILIES[name])
    auto = next(auto for auto in (*classes.RECOGNIZERS, AutoModel) if auto in autos)
    return auto.__name__


def recognizer(name: str, folder: Path):
    """A model and its processor, as `hrt.compress` gives them."""
    torch.manual_seed(5)  # of its integers; with some of them it says nothing
    if name == "whisper":
        config = tiny_whisper_config(
            residual_config=ResidualConfig(group_size=1, rank=2, shared_bits=4, diagonal="all"),
            decoder_residual_config=ResidualConfig(group_size=1, rank=2, shared_bits=3, scale_bits=8),
            embedding_bits=4,
        )
        model = randomize_(hrt.ResidualWhisperForConditionalGeneration(config))
        model.generation_config = whisper_generation_config()
        model.processor = whisper_processor()
    else:
        model = copy.deepcopy(residual(name))
        model.processor = wav2vec2_processor(folder)
    return model


@pytest.fixture
def with_code(tmp_path):
    """The folder of a Whisper with its processor and its code."""
    recognizer("whisper", tmp_path).save_pretrained(tmp_path / "compact", with_code=True)
    return tmp_path / "compact"


LOAD_ALL = (
    ABSENT
    + """
import torch, transformers
folder, *pairs = sys.argv[1:]
for pair in pairs:
    name, auto = pair.split(":")
    model, info = getattr(transformers, auto).from_pretrained(
        f"{folder}/{name}", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert isinstance(model.config, model.config_class)
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/{name}.pt"))[0], f"{folder}/{name}.out")
"""
)


def test_every_family_loads_where_the_package_is_not_installed(tmp_path):
    pairs = []
    for name in NAMES:
        copy.deepcopy(residual(name)).save_pretrained(tmp_path / name, with_code=True)
        torch.save({**case(name).inputs, **decoder_inputs(name)}, tmp_path / f"{name}.pt")
        pairs.append(f"{name}:{auto_of(name)}")
    run_python(LOAD_ALL, tmp_path, tmp_path, *pairs)
    for name in NAMES:
        torch.testing.assert_close(
            torch.load(tmp_path / f"{name}.out"), outputs_of(residual(name), name), rtol=0, atol=0
        )


TRANSCRIBE = (
    ABSENT
    + """
import json, torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
folder, wave, again = sys.argv[1:]
trusted = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trusted)
assert type(config).__module__.startswith("transformers_modules."), type(config)
processor = AutoProcessor.from_pretrained(folder, **trusted)
recognise = pipeline("automatic-speech-recognition", model=folder, **trusted)
assert type(recognise.model).__module__.startswith("transformers_modules."), type(recognise.model)
audio = {"raw": torch.load(wave).numpy(), "sampling_rate": 16000}
texts = [recognise(dict(audio))["text"]]
recognise.model.save_pretrained(again)  # with its code, as it came
processor.save_pretrained(again)
texts.append(pipeline("automatic-speech-recognition", model=again, **trusted)(dict(audio))["text"])
dense = recognise.model.merge()
assert type(dense).__module__.startswith("transformers.models."), type(dense)
assert type(AutoModel.from_pretrained(folder, **trusted)).__name__ == sys.argv[1].split("-")[-1]
for needs_package in (lambda: type(recognise.model).from_dense(dense), lambda: recognise.model.add_adapter(None)):
    try:
        needs_package()
    except ImportError as error:
        assert "pip install hf-residual-transformer" in str(error), error
    else:
        raise SystemExit("it needs the package")
print(json.dumps(texts))
"""
)


@pytest.mark.parametrize(
    ("name", "base"),
    [("whisper", "ResidualWhisperModel"), ("wavlm", "ResidualWavLMModel")],
)
def test_the_pipeline_transcribes_and_saving_again_keeps_the_code(name, base, tmp_path):
    folder, again = tmp_path / f"compact-{base}", tmp_path / "again"
    model = recognizer(name, tmp_path)
    model.save_pretrained(folder, with_code=True)
    audio = {"raw": (10 * speech(0.9)).numpy(), "sampling_rate": SAMPLING_RATE}
    torch.save(10 * speech(0.9), tmp_path / "wave.pt")
    expected = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=model.processor.tokenizer,
        feature_extractor=model.processor.feature_extractor,
    )(audio)["text"]
    printed = run_python(TRANSCRIBE, tmp_path, folder, tmp_path / "wave.pt", again)
    assert json.loads(printed.splitlines()[-1]) == [expected, expected]
    assert expected
    for path in (folder, again):
        assert {file.name for file in path.glob("*.py")} == CODE_FILES
    files = [json.loads((path / "config.json").read_text())["auto_map"] for path in (folder, again)]
    assert files[0] == files[1]
    assert set(files[0].values()) <= {f"remote.{cls}" for cls in dir(classes)}


LOCAL = """
import sys
{imports}
from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
folder, again = sys.argv[1:]
for trusts in {trusts}:
    trusted = {{"trust_remote_code": trusts}}
    AutoConfig.from_pretrained(folder, **trusted)
    AutoProcessor.from_pretrained(folder, **trusted)
    for auto in (AutoModel, AutoModelForSpeechSeq2Seq):
        assert type(auto.from_pretrained(folder, **trusted)).__module__ == "hf_residual_transformer.classes", trusts
    model = pipeline("automatic-speech-recognition", model=folder, **trusted).model
    assert type(model).__module__ == "hf_residual_transformer.classes", (trusts, type(model))
    model.save_pretrained(f"{{again}}-{{trusts}}")
print(*[name for name in sys.modules if name.startswith("transformers_modules") and name.count(".") > 1])
"""


def test_nothing_remote_runs_where_the_package_is_imported(with_code, tmp_path):
    # A file that fails where it runs, so that an import could not hide.
    for path in with_code.glob("*.py"):
        path.write_text("raise SystemExit('the code of the checkpoint ran')")
    trusts = (True, None, False)
    code = LOCAL.format(imports="import hf_residual_transformer", trusts=trusts)
    assert run_python(code, tmp_path, with_code, tmp_path / "again").strip() == ""
    # The folder gets the package's code, since it came from one that carries code.
    for trust in trusts:
        assert (tmp_path / f"again-{trust}" / CODE.name).read_text() == CODE.read_text()


def test_where_the_package_is_installed_but_not_imported_the_code_hands_over_to_it(with_code, tmp_path):
    for path in with_code.glob("*.py"):
        if path.name != CODE.name:
            path.write_text("raise SystemExit('the code of the checkpoint ran')")
    printed = run_python(LOCAL.format(imports="", trusts=(True,)), tmp_path, with_code, tmp_path / "again")
    assert all(name.endswith(".remote") for name in printed.split()) and printed.split()


UNTRUSTED = (
    ABSENT
    + """
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, pipeline
(folder,) = sys.argv[1:]
for option in ({}, {"trust_remote_code": False}):
    for load in (
        AutoConfig.from_pretrained,
        AutoModelForSpeechSeq2Seq.from_pretrained,
        lambda folder, **option: pipeline("automatic-speech-recognition", model=folder, **option),
    ):
        try:
            load(folder, **option)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise SystemExit(f"it loaded with {option}")
"""
)


def test_code_runs_only_where_the_user_asks(with_code, tmp_path):
    for path in with_code.glob("*.py"):
        path.write_text("raise SystemExit('the code of the checkpoint ran')")
    run_python(UNTRUSTED, tmp_path, with_code)


def test_without_being_asked_no_code_is_saved_and_false_takes_it_away(with_code, tmp_path):
    plain = tmp_path / "plain"
    recognizer("whisper", tmp_path).save_pretrained(plain)
    loaded = hrt.ResidualWhisperForConditionalGeneration.from_pretrained(with_code)
    loaded.save_pretrained(tmp_path / "kept")
    loaded.save_pretrained(tmp_path / "taken", with_code=False)
    assert {path.name for path in (tmp_path / "kept").glob("*.py")} == CODE_FILES
    for folder in (plain, tmp_path / "taken"):
        assert not [*folder.glob("*.py")]
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_another_repositorys_code_is_not_named_again(with_code, tmp_path):
    """An `auto_map` of a downloaded config may name another repository; what is saved names its own files."""
    path = with_code / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"auto_map": {"AutoConfig": "someone/else--evil.Config"}}))
    AutoConfig.from_pretrained(with_code).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == values["auto_map"]
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == CODE_FILES


def test_the_dense_forms_name_no_code(with_code, tmp_path):
    model = hrt.ResidualWhisperForConditionalGeneration.from_pretrained(with_code)
    model.merge().save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "auto_map" not in config and not [*(tmp_path / "dense").glob("*.py")]
    custom = tiny_whisper_config()
    custom.auto_map = {"AutoConfig": "theirs.Config"}
    converted = hrt.ResidualWhisperConfig.from_dense_config(custom, ResidualConfig(rank=2))
    assert not converted.carries_code


def test_the_code_of_a_class_from_elsewhere_is_refused(tmp_path):
    class Mine(hrt.ResidualWhisperForConditionalGeneration):
        pass

    model = Mine(tiny_whisper_config(residual_config=ResidualConfig(rank=2)))
    with pytest.raises(ValueError, match=r"`with_code` must be False for a Mine, a class outside of this"):
        model.save_pretrained(tmp_path / "mine", with_code=True)
    assert not (tmp_path / "mine").exists()
    model.save_pretrained(tmp_path / "mine")


def test_an_adapter_has_no_code(tmp_path):
    peft = pytest.importorskip("peft")
    model = recognizer("whisper", tmp_path)
    add_adapter_or_skip(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`with_code` must be False for a model with an adapter"):
        model.save_pretrained(tmp_path / "adapter", with_code=True)
