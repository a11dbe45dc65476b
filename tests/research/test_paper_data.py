"""The tables of human speech for the grid, from clips without the packages."""

from __future__ import annotations

import csv

import pytest
import soundfile


@pytest.fixture
def make_paper_data(research):
    return research("make_paper_data")


def clip(module, folder, name, text, language, translation="", split="train"):
    return module.Clip(folder / "prompts" / name, name, text, language, "a", 1.0, translation, split)


def test_english_is_recognised_and_all_else_is_translated(make_paper_data, tmp_path):
    clips = [
        clip(
            make_paper_data, tmp_path, "a.flac", "It\N{RIGHT SINGLE QUOTATION MARK}s \u201cHere\u201d!", "en"
        ),
        clip(make_paper_data, tmp_path, "b.flac", "¿Dónde?", "es", "Where?", "test"),
        clip(make_paper_data, tmp_path, "c.flac", "¿Dónde?", "es"),
    ]
    assert make_paper_data.write_tasks(tmp_path, clips) == {"recognition": 1, "translation": 1}
    rows = {}
    for task in ("recognition", "translation"):
        with open(tmp_path / f"{task}.csv", encoding="utf-8") as file:
            rows[task] = list(csv.DictReader(file))
    assert rows["recognition"] == [
        {"file_name": "prompts/a.flac", "text": "it's here", "split": "train", "duration": "1.00"}
    ]
    assert [(row["text"], row["split"]) for row in rows["translation"]] == [("where", "test")]


def test_synthetic_speech_is_added_for_training_alone(make_paper_data, tmp_path):
    clips = list(make_paper_data.write_synthetic(tmp_path / "synthetic", 3))
    assert make_paper_data.write_tasks(tmp_path, clips) == {"recognition": 3, "translation": 3}
    for task in ("recognition", "translation"):
        with open(tmp_path / f"{task}.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert {row["split"] for row in rows} == {"train"}
        assert all(row["text"].isascii() and row["text"] for row in rows)
        for row in rows:
            audio, rate = soundfile.read(tmp_path / row["file_name"])
            assert len(audio) / rate == float(row["duration"])
    assert len({clip.source for clip in clips}) == 6


def test_sentences_that_are_there_are_added_for_training_alone(make_paper_data, tmp_path):
    folder = tmp_path / "sentences"
    assert list(make_paper_data.read_sentences(folder)) == []
    folder.mkdir()
    for task, text in (("recognition", "an example"), ("translation", "the old dog")):
        rows = [f"{task}/a.flac,{text},train,adam,1.50", f"{task}/b.flac,another,test,rob,1.00"]
        (folder / f"{task}.csv").write_text("\n".join(["file_name,text,split,voice,duration", *rows]))
    clips = list(make_paper_data.read_sentences(folder))
    assert make_paper_data.write_tasks(tmp_path, clips) == {"recognition": 1, "translation": 1}
    with open(tmp_path / "translation.csv", encoding="utf-8") as file:
        row = {"file_name": "sentences/translation/a.flac", "text": "the old dog", "split": "train"}
        assert list(csv.DictReader(file)) == [row | {"duration": "1.50"}]


def test_a_task_without_clips_is_refused(make_paper_data, tmp_path):
    with pytest.raises(ValueError, match="translation must have clips, got none"):
        make_paper_data.write_tasks(tmp_path, [clip(make_paper_data, tmp_path, "a.flac", "Hello", "en")])
