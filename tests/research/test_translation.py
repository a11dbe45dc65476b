"""Translations of a dense and a compact model side by side, on tiny models and noise."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import speech

pytest.importorskip("sacrebleu", reason="the extra `research` has it")
RESEARCH = Path(__file__).resolve().parent.parent.parent / "research"


@pytest.fixture
def translation(research):
    return research("translation")


@pytest.fixture
def data(tmp_path):
    rows = [("file_name", "text", "language", "split", "duration", "translation")]
    for number in range(5):
        split = "train" if number == 4 else "test"
        soundfile.write(tmp_path / f"{number}.flac", speech(0.5, seed=number).numpy(), 16_000)
        rows.append(
            (f"{number}.flac", f"das ist {number}", "de", split, "0.50", f"this is really number {number}")
        )
    rows.append(("5.flac", "ja", "de", "test", "0.50", "yes"))
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def test_models_are_compared_on_the_same_clips_and_run_once(
    translation, data, dense_whisper, compressed, monkeypatch
):
    out = data / "out.json"
    words = ["translation.py", "--data", data, "--dense", dense_whisper, "--models", compressed["whisper"]]
    words += ["--languages", "de", "--window_seconds", 1, "--batch_size", 3, "--output", out]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    translation.main()
    values = json.loads(out.read_text())
    dense, compact = values["models"]
    assert values["clips"] == {"all": 4, "de": 4}
    assert values["models"][compact]["bytes"] < values["models"][dense]["bytes"]
    row = values["results"]["de"][compact]
    assert row["wer"] > 0
    assert row["wer_95"][0] <= row["wer"] <= row["wer_95"][1]
    assert row["chrF_95"][0] <= row["chrF"] <= row["chrF_95"][1]
    assert row["BLEU_minus_dense_95"][0] <= row["BLEU_minus_dense_95"][1]
    assert "BLEU_minus_dense_95" not in values["results"]["de"][dense]
    texts = [json.loads(line) for line in out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(texts[0]["translate"]) == sorted([dense, compact])
    assert out.with_suffix(".md").read_text().count("\n") == 2 + 2 * 2

    monkeypatch.setattr(translation, "run_model", None)
    translation.main()
    assert json.loads(out.read_text())["results"] == values["results"]

    # The texts alone give the same, and the file still says which run made them.
    out.write_text(json.dumps(values | {"results": {}, "clips": {}}))
    monkeypatch.setattr(sys, "argv", ["translation.py", "--table", "--output", str(out)])
    monkeypatch.setattr(translation, "choose_clips", None)
    translation.main()
    assert json.loads(out.read_text()) == values


def test_exact_translations_have_the_highest_scores_and_worse_ones_an_interval_below(translation):
    clips = [translation.Clip(str(i), "de", f"eins zwei {i}", f"one two three four {i}") for i in range(20)]
    for clip in clips:
        clip.transcribe |= {"good": clip.text.upper() + "!", "bad": "eins"}
        clip.translate |= {"good": clip.translation, "bad": "one two three five six"}
    found = translation.measure(clips, ["good", "bad"])
    assert found["good"]["wer"] == 0
    assert found["bad"]["wer"] == pytest.approx(2 / 3)
    assert found["bad"]["wer_minus_dense_95"][0] > 0
    assert found["good"]["BLEU"] == pytest.approx(100)
    assert found["bad"]["BLEU"] < 60
    assert found["bad"]["BLEU_minus_dense_95"][1] < 0
    assert found["bad"]["chrF_minus_dense_95"][1] < 0


@pytest.mark.parametrize("title", ["BLEU", "chrF"])
def test_intervals_of_translations_are_of_the_samples_that_those_of_wer_have(title, translation, monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefg"), 8)) for _ in range(20)]
    clips = [translation.Clip(str(number), "de", text, text) for number, text in enumerate(texts)]
    spoken = {"dense": [text[:-2] for text in texts], "compact": [text[4:] + " h" for text in texts]}
    for name, own in spoken.items():
        for clip, text in zip(clips, own):
            clip.transcribe[name] = clip.translate[name] = text
    draws = rng.integers(20, size=(9, 20))
    monkeypatch.setattr(translation, "bootstrap_samples", lambda number: draws)
    found = translation.measure(clips, list(spoken))["compact"]
    metric = importlib.import_module("sacrebleu.metrics").__dict__[title.upper()]()
    dense, compact = (
        [metric.corpus_score([own[i] for i in draw], [[texts[i] for i in draw]]).score for draw in draws]
        for own in spoken.values()
    )
    differences = np.subtract(compact, dense)
    assert found[f"{title}_minus_dense_95"] == pytest.approx(np.quantile(differences, (0.025, 0.975)))
    assert found[f"{title}_95"] == pytest.approx(np.quantile(compact, (0.025, 0.975)))
    assert found[title] == pytest.approx(metric.corpus_score(spoken["compact"], [texts]).score)


def test_the_published_figures_are_those_of_the_published_texts(translation, tmp_path, monkeypatch):
    results = RESEARCH.parent / "results"
    for kind in ("json", "jsonl"):
        shutil.copy(results / f"translation-base.{kind}", tmp_path)
    out = tmp_path / "translation-base.json"
    monkeypatch.setattr(sys, "argv", ["translation.py", "--table", "--output", str(out)])
    translation.main()
    table = out.with_suffix(".md").read_text()
    assert table == (results / "translation-base.md").read_text()
    page = RESEARCH.parent / "docs" / "paper.md"
    if page.is_file():
        assert table in page.read_text()


def test_a_language_without_clips_is_named(translation, data):
    with pytest.raises(ValueError, match=r"`languages` must be of .*, which has no translated clips of 'es'"):
        translation.choose_clips(data, ["es"], 3, 10)
