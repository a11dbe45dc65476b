"""One call puts model, processor, card and code on the Hub, and the Auto classes load them from there by id."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fresh_process, speech
from fake_hub import USER, metadata_errors, running_hub
from huggingface_hub import ModelCard, RepoCard
from test_remote_code import ABSENT, CODE_FILES, recognizer
from transformers import pipeline

import hf_residual_transformer as hrt
import hrt_cli
from hf_residual_transformer.hub import push

PUSH = """
import sys
import hf_residual_transformer as hrt
folder, repo_id = sys.argv[1:]
model = hrt.ResidualWhisperForConditionalGeneration.from_pretrained(folder)
from transformers import AutoProcessor
model.processor = AutoProcessor.from_pretrained(folder)
for revision in (None, "second"):
    info = model.push_to_hub(
        repo_id,
        with_code=True,
        private=True,
        revision=revision,
        about={"base_model": "openai/whisper-base", "license": "mit", "language": ["en"]},
    )
    model.model.encoder.layer_norm.bias.data.add_(1)
print(info.oid)
"""
LOAD = (
    ABSENT
    + """
import json, torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
repo_id, wave, *revisions = sys.argv[1:]
found = []
for revision in revisions:
    known = {"revision": revision, "trust_remote_code": True}
    model = AutoModelForSpeechSeq2Seq.from_pretrained(repo_id, **known)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    AutoProcessor.from_pretrained(repo_id, **known)
    recognise = pipeline("automatic-speech-recognition", model=repo_id, **known)
    audio = {"raw": torch.load(wave).numpy(), "sampling_rate": 16000}
    found.append([float(model.model.encoder.layer_norm.bias.detach().sum()), recognise(audio)["text"]])
print(json.dumps(found))
"""
)
COMMANDS = """
import json, sys
import hrt_cli
print(json.dumps([hrt_cli.main(words) for words in json.loads(sys.argv[1])]))
"""
LOAD_WITH_PACKAGE = """
import sys
import hf_residual_transformer
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
model = AutoModelForSpeechSeq2Seq.from_pretrained(sys.argv[1])
AutoProcessor.from_pretrained(sys.argv[1])
assert type(model).__module__ == "hf_residual_transformer.classes"
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
"""


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


def start(hub, tmp_path, command, **environment):
    """A finished process for which the server is the Hub; its caches are new."""
    homes = {"HF_HOME": str(tmp_path / "home")}
    return fresh_process(command, tmp_path, **{**hub.environment, **homes, **environment})


def succeed(*args, **environment):
    done = start(*args, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "compact"
    recognizer("whisper", tmp_path).save_pretrained(path)
    return path


of_any_endpoint = pytest.mark.skipif(
    "huggingface.co/api" in inspect.getsource(RepoCard.validate),
    reason="this huggingface_hub checks cards at one fixed address, whatever HF_ENDPOINT says",
)


@of_any_endpoint
def test_one_call_pushes_all_and_the_auto_classes_load_it_by_id(hub, folder, tmp_path):
    repo_id = f"{USER}/tiny"
    succeed(hub, tmp_path, ["-c", PUSH, folder, repo_id])
    first, second = hub.branches[repo_id]["main"], hub.branches[repo_id]["second"]
    assert repo_id in hub.private
    names = set(hub.files(repo_id))
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors", *CODE_FILES}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "processor_config.json"}
    # One commit each; the weights went as large files; the card was checked before there was a repository.
    assert [call for call in hub.asked if "/commit/" in call] == [
        f"POST /api/models/{repo_id}/commit/{name}" for name in ("main", "second")
    ]
    assert [call.partition(" ")[0] for call in hub.asked if "/large/" in call] == ["PUT", "PUT"]
    assert hub.asked.index("POST /api/validate-yaml") < hub.asked.index("POST /api/repos/create")
    card = ModelCard(hub.files(repo_id)["README.md"].decode())
    assert card.data.base_model == "openai/whisper-base" and card.data.base_model_relation == "quantized"
    assert f'model="{repo_id}", trust_remote_code=True' in card.text

    wave = 10 * speech(0.9)
    torch.save(wave, tmp_path / "wave.pt")
    bias, processor = (
        hrt.ResidualWhisperForConditionalGeneration.from_pretrained(folder),
        recognizer("whisper", tmp_path).processor,
    )
    expected = []
    for _ in range(2):
        recognise = pipeline(
            "automatic-speech-recognition",
            model=bias,
            tokenizer=processor.tokenizer,
            feature_extractor=processor.feature_extractor,
        )
        text = recognise({"raw": wave.numpy(), "sampling_rate": 16_000})["text"]
        expected.append([pytest.approx(float(bias.model.encoder.layer_norm.bias.detach().sum())), text])
        bias.model.encoder.layer_norm.bias.data.add_(1)
    command = ["-c", LOAD, repo_id, tmp_path / "wave.pt", "main", "second", first]
    printed = succeed(hub, tmp_path, command)
    assert json.loads(printed.splitlines()[-1]) == [*expected, expected[0]]
    assert second != first
    succeed(hub, tmp_path, ["-c", LOAD_WITH_PACKAGE, repo_id])


@of_any_endpoint
def test_the_command_pushes_a_folder_with_a_card_that_it_makes_or_refuses_it(hub, folder, tmp_path):
    report = {
        "model": "openai/whisper-tiny",
        "data": {"dataset": "my-recordings", "split": "train", "language": None},
        "command": "hrt compress openai/whisper-tiny",
        "versions": {"hf_residual_transformer": "0.2.0", "transformers": "5", "torch": "2"},
        "hardware": {"cpu": "a CPU", "threads": 1},
    }
    (folder / "compression.json").write_text(json.dumps(report))
    (folder / "predictions.jsonl").write_text("what people said")
    evaluation = tmp_path / "evaluation.json"
    rates = {"wer": 0.0531, "cer": 0.0211, "clips": 48, "stopped_by": None}
    data = {"dataset": "google/fleurs", "split": "test", "language": "en"}
    evaluation.write_text(json.dumps({**report, **rates, "model": "compact", "data": data}))
    own = shutil.copytree(folder, tmp_path / "own")  # with a card of its own
    (own / "README.md").write_text("---\nlicense: mit\n---\nMine\n")
    commands = [
        [folder, "tiny", "--license", "mit", "--language", "en", "--evaluation", evaluation],
        [folder, "tiny", "--create-pr"],
        [own, "tiny", "--with-code"],
        [own, "tiny", "--license", "mit"],
        [folder, "refused", "--license", "my own"],
    ]
    done = start(
        hub, tmp_path, ["-c", COMMANDS, json.dumps([["push", *map(str, words)] for words in commands])]
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, 0, 2, 2], done.stderr
    assert "--license must not be given where" in done.stderr
    # A card that the Hub refuses makes no repository.
    assert "`card` must have metadata that the Hub accepts" in done.stderr
    assert "must be one of the known licenses" in done.stderr
    assert f"{USER}/refused" not in hub.branches
    repo_id = f"{USER}/tiny"
    assert f"{hub.endpoint}/{repo_id}" in done.stdout
    _, files, _, last = hub.commits.values()
    assert not set(files) & {"predictions.jsonl", *CODE_FILES}
    assert json.loads(files["compression.json"]) == report
    card = ModelCard(files["README.md"].decode())
    assert not metadata_errors(str(card))
    assert card.data.base_model == "openai/whisper-tiny"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("wer", 5.31, "google/fleurs")
    for said in ("recordings of my-recordings, split train", "48 clips of google/fleurs", "`hrt compress"):
        assert said in card.text
    # Without options, the repository's card stays; a README.md in the folder is one.
    assert hub.files(repo_id, "refs/pr/1")["README.md"] == files["README.md"]
    assert hub.files(repo_id) == last
    assert b"Mine" in last["README.md"] and set(last) >= CODE_FILES
    for path in (folder, own):  # the folders stay as they were
        assert "auto_map" not in json.loads((path / "config.json").read_text())


def test_who_is_not_logged_in_is_told_so(hub, folder, tmp_path):
    done = start(hub, tmp_path, ["-m", "hrt_cli", "push", folder, f"{USER}/tiny"], HF_TOKEN="")
    assert done.returncode == 2
    assert "log in with `hf auth login`, or set HF_TOKEN" in done.stderr
    assert not hub.asked


@pytest.mark.parametrize("repo_id", ["a/b/c", "my model", "-x", "", "../evil"])
def test_a_malformed_id_is_refused_before_anything_is_saved(repo_id, monkeypatch, tmp_path):
    model = recognizer("whisper", tmp_path)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_, **__: pytest.fail("it was saved"))
    with pytest.raises(ValueError, match="`repo_id` must be an id on the Hub such as 'name/repository', got"):
        push(model, repo_id, token="hf_any")


def test_a_dense_model_is_not_pushed(dense_whisper, capsys):
    assert hrt_cli.main(["push", str(dense_whisper), f"{USER}/tiny"]) == 2
    assert "`model` must be a compact model" in capsys.readouterr().err


def test_saving_with_push_to_hub_pushes_once_all_is_saved(monkeypatch, tmp_path):
    model = recognizer("whisper", tmp_path)
    pushed = []

    def record(model, repo_id, **options):
        assert (tmp_path / "compact" / "tokenizer.json").is_file()
        pushed.append((repo_id, options))

    monkeypatch.setattr("hf_residual_transformer.hub.push", record)
    model.save_pretrained(tmp_path / "compact", push_to_hub=True, private=True)
    model.save_pretrained(
        Path(tmp_path, "compact"), push_to_hub=True, repo_id="me/other", is_main_process=False
    )
    assert pushed == [("compact", {"private": True})]
