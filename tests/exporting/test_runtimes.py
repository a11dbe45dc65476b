"""Exported real weights in the runtimes of others, on real speech, beside the same compact model in PyTorch.

The model is whisper-base with every matrix rounded plainly and a low rank of what that leaves, in the bits that the
operators have and in some that they lack. Scales have 16 bits in the encoder, and 8 bits in the decoder. What is tested
is that runtimes compute what PyTorch computes.

The runtimes are installed once, into the cache that has the weights. Where one cannot be had, its tests are skipped, or
fail with `HRT_ALL_RUNTIMES=1`, which says that this machine should have all of them.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import jiwer
import numpy as np
import onnx
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import SAMPLE
from PIL import Image
from sessions import Runtime
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration

import hf_residual_transformer as hrt
from hf_residual_transformer import ResidualConfig, ResidualWhisperConfig
from hf_residual_transformer.exporting import folder as exporting_folder
from hf_residual_transformer.exporting.graph import OPERATOR_BITS, save
from hf_residual_transformer.modeling import residual_linears
from hf_residual_transformer.quantization import quantize
from hf_residual_transformer.speech.audio import decode_audio

pytestmark = pytest.mark.pretrained
ROOT = SAMPLE.parent
PAGE = ROOT / "examples" / "browser"
# Clips of the test split, by language.
CLIPS = {
    "en": ["agent-incorrect"],
    "es": ["confbridge-dec-talk-vol-in"],
}
UNLIKE = 0.05  # Runtimes compute their own mel features: so many of the words may differ from PyTorch's.


def lacking(reason: str) -> NoReturn:
    """Ends a test whose runtime is not here."""
    if os.environ.get("HRT_ALL_RUNTIMES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    names = ("pretrained", "without_torch", "ggml_writer")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(ROOT / "research"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def settings(rank: int, scale_bits: int, rotation: Any = 1, **bits: int) -> ResidualConfig:
    options = {"shared_bits": 4, "diagonal": "none", "bits_pattern": bits, "scale_bits": scale_bits}
    return ResidualConfig(group_size=1, rank=rank, rotation=rotation, **options)


def rounded(dense: Any, encoder: ResidualConfig, decoder: ResidualConfig, embedding_bits: Any = 4) -> Any:
    """The compact form of a dense Whisper whose matrices are rounded plainly."""
    config = ResidualWhisperConfig.from_dense_config(
        dense.config, encoder, decoder_residual_config=decoder, embedding_bits=embedding_bits
    )
    model = hrt.ResidualWhisperForConditionalGeneration(config).eval()
    source, own = dense.state_dict(), model.state_dict()
    with torch.no_grad():
        for name in own.keys() & source.keys():
            own[name].copy_(source[name])
        for path, linear in residual_linears(model):
            weight = source[f"{path}.weight"]
            shared = linear.shared
            few = quantize(weight, **shared.rounding)
            shared.write(few)
            if linear.residual_A is not None and linear.residual_B is not None:
                left = weight - few.weight().float()
                u, s, v = torch.svd_lowrank(left, len(linear.residual_A), niter=1)
                linear.residual_B.copy_(u * s), linear.residual_A.copy_(v.T)
        table = dense.get_input_embeddings().weight
        for start, part in model.get_input_embeddings().ranges:
            few = quantize(table[start : start + part.num_embeddings], **part.rounding)
            part.write(few)
    model.generation_config = dense.generation_config
    return model


@pytest.fixture(scope="module")
def dense(scripts) -> Any:
    source = scripts.pretrained.resolve_pretrained("openai/whisper-base")
    model = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    model.processor = AutoProcessor.from_pretrained(source)
    return model


@pytest.fixture(scope="module")
def compact(dense, tmp_path_factory) -> Path:
    """The folder of the compact model, in 16 bits."""
    torch.manual_seed(0)
    rotated = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj", "fc1"), 128)
    encoder = settings(8, 16, rotated, fc1=5, q_proj=8, **{"layers.3.self_attn.v_proj": 2})
    decoder = settings(4, 8, 128, fc2=3, **{"layers.2.self_attn.q_proj": 2})
    model = rounded(dense, encoder, decoder, [[1024, 8], [32768, 5], [50257, 2], [51865, 4]])
    model.processor = dense.processor
    folder = tmp_path_factory.mktemp("compact")
    model.half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(compact, tmp_path_factory) -> Path:
    return hrt.export(compact, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def clips() -> dict[str, dict[str, np.ndarray]]:
    """Samples at 16 kHz by language and name."""
    return {
        language: {name: decode_audio({"path": str(clip_path(language, name))}, 16_000) for name in names}
        for language, names in CLIPS.items()
    }


def clip_path(language: str, name: str) -> Path:
    return SAMPLE / "audio" / "test" / language / f"{name}.ogg"


@pytest.fixture(scope="module")
def in_pytorch(compact, clips) -> dict[str, dict[str, Any]]:
    """By language and name of the clip: features, encoder states, token ids of the transcript, logits, and the text."""
    processor = AutoProcessor.from_pretrained(compact)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(compact, dtype=torch.float32)
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for language, recordings in clips.items():
            for name, samples in recordings.items():
                features, _, text = transcript(model, processor, samples, language)
                processor.tokenizer.set_prefix_tokens(language, "transcribe", predict_timestamps=False)
                ids = torch.tensor([processor.tokenizer(text).input_ids])
                output = model(input_features=features, decoder_input_ids=ids)
                found.setdefault(language, {})[name] = SimpleNamespace(
                    features=features,
                    states=output.encoder_last_hidden_state,
                    ids=ids,
                    logits=output.logits,
                    text=text.strip(),
                )
    return found


def transcript(model: Any, processor: Any, samples: np.ndarray, language: str) -> tuple[Any, Any, str]:
    """Features of a clip, and the token ids and the text that the model writes in PyTorch."""
    features = processor(samples, sampling_rate=16_000, return_tensors="pt").input_features
    tokens = model.generate(features, language=language, max_new_tokens=128)
    return features, tokens, processor.batch_decode(tokens, skip_special_tokens=True)[0]


def assert_alike(texts: dict[str, str], wanted: dict[str, Any]) -> None:
    assert texts.keys() == wanted.keys()
    for name, text in texts.items():
        words = [" ".join(re.findall(r"\w+", said.lower())) for said in (wanted[name].text, text)]
        assert jiwer.wer(*words) <= UNLIKE, (text, wanted[name].text)


def test_the_exported_model_has_all_numbers_of_bits_that_the_runtime_knows(exported):
    products = [
        node
        for path in (exported / "onnx").iterdir()
        for node in onnx.load(path).graph.node
        if node.op_type == "MatMulNBits"
    ]
    bits = {attribute.i for node in products for attribute in node.attribute if attribute.name == "bits"}
    assert bits == set(OPERATOR_BITS)


@pytest.mark.parametrize(("accuracy_level", "tolerance"), [(0, 1e-4), (None, 0.05), (4, 0.05)])
def test_logits_of_real_speech_are_those_of_pytorch(
    accuracy_level, tolerance, compact, exported, in_pytorch, tmp_path
):
    folder = exported
    if accuracy_level is not None:
        folder = hrt.export(compact, tmp_path / "model", accuracy_level=accuracy_level)
    runtime = Runtime(folder)
    for spoken in (spoken for recordings in in_pytorch.values() for spoken in recordings.values()):
        states = runtime.encode(spoken.features)
        logits = runtime.logits(spoken.ids, states, 4, runtime.empty_cache(1))
        for found, wanted in ((states, spoken.states), (logits, spoken.logits)):
            assert np.linalg.norm(found - wanted.numpy()) <= tolerance * wanted.norm()
        if accuracy_level == 0:
            assert (logits.argmax(-1) == spoken.logits.argmax(-1).numpy()).all()


@pytest.mark.parametrize("language", CLIPS)
def test_onnx_asr_transcribes_without_pytorch(language, exported, clips, in_pytorch, scripts):
    try:
        scripts.without_torch.python_without_torch()
    except RuntimeError as error:
        lacking(str(error))
    found = scripts.without_torch.transcribe_without_torch(exported, clips[language], language)
    assert found["present"] == [] and "torch" not in found["versions"]
    assert_alike(found["texts"], in_pytorch[language])


SHERPA = """
import sherpa_onnx, numpy, sys
folder, language, *clips = sys.argv[1:]
paths = {name: f"{folder}/{name}.onnx" for name in ("encoder", "decoder")} | {"tokens": f"{folder}/tokens.txt"}
recognizer = sherpa_onnx.OfflineRecognizer.from_whisper(**paths, language=language, num_threads=2)
for clip in clips:
    stream = recognizer.create_stream()
    stream.accept_waveform(16_000, numpy.fromfile(clip, numpy.float32))
    recognizer.decode_stream(stream)
    print(stream.result.text)
"""


def test_sherpa_onnx_transcribes(compact, clips, in_pytorch, peers, tmp_path):
    language = "es"
    folder = hrt.export(compact, tmp_path / "model", format="sherpa-onnx")
    paths = [tmp_path / f"{name}.f32" for name in clips[language]]
    for path, samples in zip(paths, clips[language].values()):
        samples.astype(np.float32).tofile(path)
    command = [peers / "bin" / "python", "-c", SHERPA, folder, language, *paths]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.strip() for line in done.stdout.splitlines()]
    assert_alike(dict(zip(clips[language], found)), in_pytorch[language])


@pytest.fixture(scope="module")
def node_modules(scripts) -> Path:
    """The folder of transformers.js, in the version of the page in `examples/`."""
    if shutil.which("npm") is None:
        lacking("npm is not installed")
    wanted = (PAGE / "package.json").read_text()

    def install(folder: Path) -> None:
        (folder / "package.json").write_text(wanted)
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)

    try:
        return scripts.without_torch.installed_once("transformers.js", wanted, install) / "node_modules"
    except RuntimeError as error:
        lacking(str(error))


def test_transformers_js_transcribes_in_node_from_graphs_with_second_files(
    compact, clips, in_pytorch, node_modules, tmp_path, monkeypatch
):
    language = "es"
    # As if the graphs were too large for one file. The page below has graphs of one file.
    monkeypatch.setattr(exporting_folder, "save", functools.partial(save, most=10**6))
    exported = hrt.export(compact, tmp_path / "model")
    assert (exported / "onnx" / "encoder_model.onnx").stat().st_size < 10**6
    paths = [tmp_path / f"{name}.f32" for name in clips[language]]
    for path, samples in zip(paths, clips[language].values()):
        samples.astype(np.float32).tofile(path)
    library = node_modules / "@huggingface" / "transformers" / "dist" / "transformers.node.mjs"
    script = Path(__file__).with_name("transcribe.mjs")
    command = ["node", script, library, exported.parent, exported.name, language, *paths]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["texts"]
    assert_alike(dict(zip(clips[language], found)), in_pytorch[language])


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A local server of a folder's files: its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def page(exported, node_modules, tmp_path) -> Iterator[tuple[Browser, str, list[str]]]:
    """The page of `examples/browser` with the exported model, opened, with its address and what was asked of it."""
    if CHROMIUM is None:
        lacking("no Chromium is installed")
    site = tmp_path / "site"
    shutil.copytree(PAGE, site, ignore=shutil.ignore_patterns("node_modules", "model"))
    (site / "node_modules").symlink_to(node_modules)
    (site / "model").symlink_to(exported)
    with served(site) as (address, asked):
        browser = Browser(tmp_path / "profile")
        try:
            browser.call("Page.navigate", url=f"{address}/index.html")
            browser.wait_for("document.documentElement?.dataset.state === 'ready'")
            yield browser, address, asked
        finally:
            browser.close()


LOOKS = {
    "light": ((1000, 900), False),
    "dark": ((1000, 900), True),
    "phone": ((390, 844), False),
}
SCREENSHOTS = ROOT / "docs" / "assets"


def test_a_page_transcribes_in_the_browser_looks_as_it_should_and_contacts_no_other_server(
    page, in_pytorch, tmp_path
):
    browser, address, asked = page
    name = "agent-incorrect"
    browser.choose_file("#file", clip_path("en", name))
    browser.wait_for("!document.getElementById('start').disabled")
    browser.evaluate("document.getElementById('language').value = 'en'")
    browser.evaluate("document.getElementById('start').click()")
    done = "!document.getElementById('copy').hidden || document.documentElement?.dataset.failed"
    browser.wait_for(done, seconds=600)
    assert_alike(
        {name: browser.evaluate("document.getElementById('transcript').textContent")},
        {name: in_pytorch["en"][name]},
    )
    assert {"/model/onnx/encoder_model.onnx", "/model/onnx/decoder_model_merged.onnx"} <= set(asked)

    for look, (size, dark) in LOOKS.items():
        browser.look(size, dark)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), look
        taken = tmp_path / f"browser-{look}.png"
        browser.screenshot(taken)
        if os.environ.get("UPDATE_SCREENSHOTS"):
            shutil.copy(taken, SCREENSHOTS)
        assert unlike(taken, SCREENSHOTS / taken.name) < 0.03, f"see {taken}"

    urls = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert urls and all(url.startswith((address, "blob:", "data:")) for url in urls)
    # Nor could it, if the library wanted to.
    with served(tmp_path) as (other, asked_of_other):
        attempt = f"fetch('{other}/', {{mode: 'no-cors'}}).then(() => 'sent', () => 'refused')"
        assert browser.workers
        for session in (None, *browser.workers):
            assert browser.evaluate(attempt, session) == "refused"
    assert asked_of_other == []


def unlike(found: Path, wanted: Path) -> float:
    """The mean difference of two pictures from 0 to 1, of areas so large that fonts do not count."""
    small = [
        np.asarray(Image.open(path).convert("L").resize((40, 36)), dtype=float) for path in (found, wanted)
    ]
    return float(np.abs(small[0] - small[1]).mean() / 255)


@pytest.fixture(scope="module")
def merged(compact, scripts, tmp_path_factory) -> Path:
    """The folder of the dense form."""
    folder = tmp_path_factory.mktemp("merged")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(compact, dtype=torch.float32)
    model.merge().half().save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(compact)
    processor.save_pretrained(folder)
    processor.feature_extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peers(scripts) -> Path:
    """The folder of an environment with faster-whisper and whisper.cpp."""
    requirements = ROOT / "research" / "runtimes_requirements.txt"

    def install(folder: Path) -> None:
        python = folder / "bin" / "python"
        pip = [python, "-m", "pip", "install", "--quiet", "--requirement", requirements]
        for command in ([sys.executable, "-m", "venv", folder], pip):
            subprocess.run(command, check=True, capture_output=True, text=True)

    wanted = f"{sys.version_info[:2]} {requirements.read_text()}"
    try:
        return scripts.without_torch.installed_once("peers", wanted, install)
    except RuntimeError as error:
        lacking(str(error))


def transcribed_by(
    system: str, peers: Path, clips: dict[str, np.ndarray], folder: Path, language: str
) -> Any:
    """Texts by the names of the clips, from a system of research/runtimes.py."""
    np.savez(folder / "clips.npz", **clips)
    command = [peers / "bin" / "python", ROOT / "research" / "runtimes.py", "--system", system]
    command += ["--model", folder, "--clips", folder / "clips.npz", "--language", language]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(sorted(clips), json.loads(done.stdout.splitlines()[-1])["texts"]))


def test_the_merged_model_runs_in_faster_whisper(merged, peers, clips, in_pytorch, tmp_path):
    # The converter needs torch and transformers, which its own environment lacks.
    (tmp_path / "path").mkdir()
    packages = next(peers.glob("lib/python*/site-packages"))
    for name in ("ctranslate2", "ctranslate2.libs"):
        (tmp_path / "path" / name).symlink_to(packages / name)
    command = [sys.executable, "-m", "ctranslate2.converters.transformers", "--model", merged]
    command += ["--output_dir", tmp_path / "ct2", "--quantization", "float16"]
    command += ["--copy_files", "tokenizer.json", "preprocessor_config.json"]
    own = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    # Long enough for more than 64 tokens, where transcripts were cut once, and with some padding.
    names = sorted(path.stem for path in clip_path("en", CLIPS["en"][0]).parent.glob("conf*.ogg"))
    read = [decode_audio({"path": str(clip_path("en", name))}, 16_000) for name in names]
    long = np.concatenate(read)[: 28 * 16_000]
    processor = AutoProcessor.from_pretrained(merged)
    model = WhisperForConditionalGeneration.from_pretrained(merged, dtype=torch.float32)
    _, tokens, text = transcript(model, processor, long, "en")
    assert tokens.shape[1] > 64
    samples = clips["en"] | {"long": long}
    found = transcribed_by(f"faster-whisper:{tmp_path / 'ct2'}", peers, samples, tmp_path, "en")
    assert_alike(found, in_pytorch["en"] | {"long": SimpleNamespace(text=text)})


def test_the_merged_model_runs_in_whisper_cpp(merged, peers, clips, in_pytorch, scripts, tmp_path):
    model = WhisperForConditionalGeneration.from_pretrained(merged, dtype=torch.float32)
    with (tmp_path / "merged.bin").open("wb") as file:
        scripts.ggml_writer.write_ggml(model, AutoProcessor.from_pretrained(merged), "f16", file)
    found = transcribed_by(f"whisper.cpp:{tmp_path / 'merged.bin'}", peers, clips["en"], tmp_path, "en")
    assert_alike(found, in_pytorch["en"])


def test_blocks_alone_run_in_whisper_cpp(dense, peers, clips, tmp_path):
    blocks = settings(0, 16)
    model = rounded(dense, blocks, blocks)
    folder = hrt.export(model, tmp_path / "model", format="ggml", processor=dense.processor)
    (path,) = folder.iterdir()
    assert path.stat().st_size < 47e6
    found = transcribed_by(f"whisper.cpp:{path}", peers, clips["en"], tmp_path, "en")
    for name, samples in clips["en"].items():
        *_, text = transcript(model, dense.processor, samples, "en")
        assert_alike({name: found[name]}, {name: SimpleNamespace(text=text)})
