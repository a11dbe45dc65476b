"""The environment without PyTorch, and what the demo makes of its transcripts, without installing anything."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_residual_transformer.speech.metrics import ErrorRates, EvaluationResult, Prediction

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "research"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(
            demo=importlib.import_module("demo"), without_torch=importlib.import_module("without_torch")
        )


def test_an_environment_is_installed_once_and_again_when_its_packages_change(scripts, tmp_path, monkeypatch):
    monkeypatch.setenv("HRT_CACHE", str(tmp_path))
    made = []

    def install(folder):
        (folder / "package").touch()
        made.append(folder)

    one = [scripts.without_torch.installed_once("runtime", "1.0", install) for _ in range(2)]
    other = scripts.without_torch.installed_once("runtime", "1.1", install)
    assert one == [made[0]] * 2 and made == [one[0], other] and one[0] != other
    assert (other / "package").is_file()


def test_an_environment_that_cannot_be_installed_leaves_nothing(scripts, tmp_path, monkeypatch):
    monkeypatch.setenv("HRT_CACHE", str(tmp_path))

    def install(folder):
        (folder / "half").touch()
        command = [sys.executable, "-c", "raise SystemExit('no such package')"]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with pytest.raises(RuntimeError, match="the environment runtime cannot be installed: no such package"):
        scripts.without_torch.installed_once("runtime", "1.0", install)
    assert list((tmp_path / "runtimes").iterdir()) == []


def test_transcripts_of_another_runtime_are_counted_as_those_of_pytorch(scripts):
    said = ["a red bed", "hello"]
    predictions = [Prediction(name, "en", text, "A bed.", text, "a bed", 1) for name, text in zip("xy", said)]
    rates = ErrorRates(0.5, 0.5, 2, 4, 14, 0)
    like = EvaluationResult(rates, {"en": rates}, {"en": "E"}, 3.0, 9.0, predictions)
    tokenizer = SimpleNamespace(normalize=lambda text: text.lower().strip(".") + " ")
    found = {"texts": {"000": "A red bad.", "001": "Hello."}, "seconds": 2.0}
    result = scripts.demo.result_of_texts(like, found, tokenizer)
    assert result.wer == 1 / 4 and result.seconds == 2.0
    assert [p.word_errors for p in result.predictions] == [1, 0]
    assert [p.normalized_prediction for p in result.predictions] == ["a red bad", "hello"]
    assert scripts.demo.disagreement_with(result, like) == 1.0
    assert like.predictions[0].prediction == "A bed."
