"""Sentences for the grid, without espeak-ng and WordNet: their grammar, their splits, and what is written."""

from __future__ import annotations

import csv
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

VARIANTS = """Pty Language       Age/Gender VoiceName          File                 Other Languages
 5  variant         --/M      Adam               !v/adam
 5  variant         --/M      Mr serious         !v/Mr serious
 5  variant         --/M      Storm              !v/Storm             (en-us 5)
 5  variant         --/F      whisper            !v/whisper
"""


@pytest.fixture
def make_sentences(research):
    return research("make_sentences")


@pytest.fixture
def spanish(research):
    return research("spanish")


def test_adjectives_and_verbs_agree_and_adjectives_change_places(spanish):
    rng = np.random.default_rng(0)
    seen = {said: text for said, text, _ in (spanish.spanish_sentence(rng) for _ in range(4000))}
    assert len(seen) > 3990
    words = {word for said in seen for word in said.split()}
    assert {"rojo", "roja", "rojos", "rojas", "azul", "azules", "grande", "grandes", "abre", "abren"} <= words
    for said, text in seen.items():
        first = said.split()[0]
        several = first in ("los", "las", *spanish.NUMBERS)
        verb = next(word for word in said.split() if any(word in forms[:2] for forms in spanish.VERBS))
        assert verb.endswith("n") == several, said
        assert len(set(text.split()) & {forms[3 if several else 2] for forms in spanish.VERBS}) == 1, text
        assert " de el " not in said
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text), text
    nouns = {noun: english for noun, _, _, english, _ in spanish.NOUNS}
    adjectives = {form: forms[2] for forms in spanish.ADJECTIVES for form in forms[:2]}
    phrases = [(said, text) for said, text in seen.items() if said.split()[2] in adjectives]
    assert len(phrases) > 300
    for said, text in phrases:
        _, noun, adjective, *_ = said.split()
        assert text.split()[1:3] == [adjectives[adjective], nouns[noun]]


def test_no_pair_of_noun_and_adjective_of_the_test_is_in_training(make_sentences, spanish):
    sentences = list(itertools.islice(make_sentences.spanish_sentences(), 3000))
    assert len({sentence.said for sentence in sentences}) == 3000
    stems = {form: forms[0] for forms in spanish.ADJECTIVES for form in forms[:2]}
    stems |= {form + ("s" if form[-1] in "aeo" else "es"): stem for form, stem in stems.items()}
    singular = {form: forms[0] for forms in spanish.NOUNS for form in forms[:2]}

    def pairs(split):
        found = set()
        for sentence in sentences:
            words = sentence.said.split() if sentence.split in split else []
            found |= {(singular[a], stems[b]) for a, b in itertools.pairwise(words) if b in stems}
        return found

    new = pairs(("test", "validation")) - pairs(("train",))
    for sentence in sentences:
        if sentence.split != "train":
            words = sentence.said.split()
            own = {(singular[a], stems[b]) for a, b in itertools.pairwise(words) if b in stems}
            assert own & new, sentence
            assert len(words) > 3  # phrases are for training alone
    assert sum(len(sentence.said.split()) <= 3 for sentence in sentences) > 500


def test_examples_of_wordnet_are_in_one_split_each(make_sentences, tmp_path, monkeypatch):
    lines = [
        'x | a gloss; "He opened the door."; "too short"; "It\'s fine, isn\'t it?"',
        'y | "he opened the door"; "numbers like 3 are left out"',
        *(f'z | "example with the word {"abcdefghij"[n // 10]}{"abcdefghij"[n % 10]}"' for n in range(100)),
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    monkeypatch.setattr(make_sentences, "WORDNET", tmp_path)
    sentences = list(make_sentences.english_sentences())
    texts = [sentence.text for sentence in sentences]
    assert len(texts) == len(set(texts)) == 101
    assert "he opened the door" in texts and all(one.said == one.text for one in sentences)
    assert {sentence.split for sentence in sentences} == {"train", "validation", "test"}
    monkeypatch.setattr(make_sentences, "WORDNET", tmp_path / "none")
    with pytest.raises(ValueError, match="got no examples there; install `wordnet-base`"):
        list(make_sentences.english_sentences())


def fake_espeak(calls):
    def run(command, **options):
        calls.append(command)
        if "--voices=variant" in command:
            return type("Done", (), {"stdout": VARIANTS})
        folder = calls.folder
        loudness = 0.0 if command[-1] == "unsaid" else 0.5
        soundfile.write(folder / "spoken.wav", np.full(22_050, loudness), 22_050)
        return type("Done", (), {"stdout": (folder / "spoken.wav").read_bytes()})

    return run


class Calls(list):
    folder: Path


def test_a_stopped_run_goes_on_and_another_sentence_is_spoken_anew(make_sentences, tmp_path, monkeypatch):
    calls = Calls()
    calls.folder = tmp_path
    monkeypatch.setattr(make_sentences.subprocess, "run", fake_espeak(calls))
    monkeypatch.setattr(make_sentences.os, "cpu_count", lambda: 1)
    assert [*map(make_sentences.voices_of, ("train", "validation", "test"))] == [["Storm", "adam"], [], []]
    monkeypatch.setattr(make_sentences, "voices_of", lambda split: [f"{split}-voice"])
    sizes = {"train": 2, "validation": 1, "test": 1}

    def sentences():
        yield make_sentences.Sentence("hola", "hello", "train")
        yield make_sentences.Sentence("adios", "bye", "train")
        yield make_sentences.Sentence("more than are wanted", "more", "train")
        yield make_sentences.Sentence("uno", "one", "validation")
        yield make_sentences.Sentence("dos", "two", "test")

    make_sentences.write_task(tmp_path, "translation", sentences(), sizes, spoken_table="spanish")
    rows, said = (
        list(csv.DictReader((tmp_path / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
        for name in ("translation", "spanish")
    )
    assert [row.pop("text") for row in said] == ["hola", "adios", "uno", "dos"]
    assert said == [{name: row[name] for name in row if name != "text"} for row in rows]
    assert [(row["text"], row["split"], row["voice"], row["duration"]) for row in rows] == [
        ("hello", "train", "train-voice", "1.00"),
        ("bye", "train", "train-voice", "1.00"),
        ("one", "validation", "validation-voice", "1.00"),
        ("two", "test", "test-voice", "1.00"),
    ]
    audio, rate = soundfile.read(tmp_path / rows[0]["file_name"])
    assert (len(audio), rate) == (16_000, 16_000)
    spoken = len(calls)
    (tmp_path / rows[3]["file_name"]).unlink()
    make_sentences.write_task(tmp_path, "translation", sentences(), sizes)
    assert [command[-1] for command in calls[spoken:]] == ["dos"]
    spoken = len(calls)
    others = [replace(one, said="tres") if one.said == "dos" else one for one in sentences()]
    make_sentences.write_task(tmp_path, "translation", iter(others), sizes)
    assert [command[-1] for command in calls[spoken:]] == ["tres"]
    others = [replace(one, said="unsaid") if one.said == "dos" else one for one in sentences()]
    with pytest.raises(ValueError, match=r"must say 'unsaid', got silence for -v es.*\+test-voice -s"):
        make_sentences.write_task(tmp_path, "translation", iter(others), sizes)
    spoken = len(calls)
    monkeypatch.setattr(make_sentences, "voices_of", lambda split: [f"other-{split}-voice"])
    make_sentences.write_task(tmp_path, "translation", sentences(), sizes)
    assert [command[-1] for command in calls[spoken:]] == ["hola", "adios", "uno", "dos"]
    with pytest.raises(ValueError, match="translation must have 3 sentences of 'test', got 1"):
        make_sentences.write_task(tmp_path, "translation", sentences(), sizes | {"test": 3})


def test_a_machine_without_espeak_is_told(make_sentences, monkeypatch):
    def run(*args, **options):
        raise FileNotFoundError("espeak-ng")

    monkeypatch.setattr(make_sentences.subprocess, "run", run)
    with pytest.raises(ValueError, match="espeak-ng must be installed, and cannot be run: espeak-ng"):
        make_sentences.voices_of("test")
