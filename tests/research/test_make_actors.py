"""Reading conversations and their voices from the archive of a game, without the game."""

from __future__ import annotations

import csv
import importlib
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE
from test_make_sample import archive, mp3


@pytest.fixture
def make_actors(research, monkeypatch, tmp_path):
    module = research("make_actors")
    monkeypatch.setattr(module.make_sample, "ADVENTURE", tmp_path / "queen.1c")
    return module


def dialogue(key: int, hero: dict[int, str], person: dict[int, str], greetings=("0", "0")) -> bytes:
    """A conversation of one level as the game stores it."""

    def string(text: str, alignment: int, start: int, head: bytes = b"") -> bytes:
        data = head + bytes([len(text)]) + text.encode("cp850")
        return data + bytes(-(start + len(data)) % alignment)

    strings, offsets = b"", []
    for texts in (hero, person):
        offsets.append(128 + len(strings))
        for identity, text in texts.items():
            strings += string(text, 4, 128 + len(strings), struct.pack(">HH", 0, identity))
    offsets.append(128 + len(strings))
    for text in greetings:
        strings += string(text, 2, 128 + len(strings))
    header = struct.pack(">5h", -1, 0, key, len(hero), len(person)) + bytes(12)
    header += struct.pack(">3h", offsets[1], 0, offsets[2])
    return b"AmBk" + bytes(16) + header.ljust(128, b"\0") + strings


def test_turns_have_the_names_of_their_audio_and_greetings_too(make_actors):
    data = dialogue(
        7, {0: "Hi, Bob!*03", 6: "É ça?"}, {0xA4: "*FLNot now...*02Go away."}, ("Again?", "Hello.*02")
    )
    assert list(make_actors.read_turns(data)) == [
        ("07SSSSJ", "Hi, Bob!*03"),
        ("070006J", "É ça?"),
        ("0700A4P", "*FLNot now...*02Go away."),
        ("07XXXXP", "Again?"),
        ("07XXXXJ", "Hello.*02"),
    ]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("Hello.*02", {1: "Hello."}),
        ("*FLHello.*02Bye.", {2: "Hello.", 3: "Bye."}),
        ("*XY00(128,112)*FLIt's you.", {3: "It's you."}),
        ("One*GD two*GM three", {1: "One*GD two*GM three"}),
    ],
)
def test_a_command_ends_a_segment(make_actors, text, segments):
    assert make_actors.segments_of(text) == segments


def test_shouted_words_are_in_lower_case_and_names_are_not(make_actors):
    assert make_actors.clean_line("I DON'T take  Orders^_...") == "I don't take Orders"


def test_no_character_scene_or_text_is_in_two_splits(make_actors, tmp_path):
    files = {}
    for number, name in enumerate(f"{letter}{letter}" for letter in "ABCDEFGHIJKLMNOPQRST"):
        lines = {identity: f"{word} {name} said so" for identity, word in ((6, "one"), (7, "two"))}
        hero = {6: f"why {name} why now", 7: "the same in every scene", 8: "short one"}
        files[f"{name}1.DOG"] = dialogue(number, hero, lines | {8: "the same for all"})
        for turn in ("0006J", "0007J", "0008J", "0006P", "0007P", "0008P"):
            files[f"{number:02}{turn}1.SB"] = mp3(2)
    (tmp_path / "queen.1c").write_bytes(archive(files))
    clips, faults = make_actors.write_actors(tmp_path / "out")
    with open(tmp_path / "out" / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(clips)
    assert not faults
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    for column in ("speaker", "text"):
        splits = {(row[column], row["split"]) for row in rows}
        assert len(splits) == len({row[column] for row in rows})
    scenes = {(Path(row["file_name"]).stem[:2], row["split"]) for row in rows}
    assert len(scenes) == len({scene for scene, _ in scenes}) == 20
    assert {row["split"] for row in rows if row["speaker"] == "joe"} == {"train"}
    assert not any(row["text"] == "short one" for row in rows)
    with pytest.raises(FileExistsError, match="delete it to build it anew"):
        make_actors.write_actors(tmp_path / "out")


def test_a_turn_is_its_segments_with_a_pause(make_actors):
    samples, rate = make_actors.join([mp3(1), mp3(2)])
    assert rate == 11_025
    assert len(samples) / rate == pytest.approx(3 + make_actors.PAUSE_SECONDS, abs=0.15)


def test_the_sample_takes_about_equal_seconds_of_each_training_character(make_actors, tmp_path):
    files, voice = {}, {seconds: mp3(seconds) for seconds in range(1, 15)}
    for number, name in enumerate(f"{letter}{letter}" for letter in "ABCDEFGHIJ"):
        lines = {identity: f"line {identity} {name} said so" for identity in voice}
        files[f"{name}1.DOG"] = dialogue(number, {}, lines)
        files |= {f"{number:02}{identity:04X}P1.SB": audio for identity, audio in voice.items()}
    (tmp_path / "queen.1c").write_bytes(archive(files))
    clips = make_actors.make_sample.read_actors(tmp_path / "out")
    train = {f"{letter}{letter}" for letter in "abcdefghij"}
    train = {f"queen_{name}" for name in train if make_actors.split_of(name) == "train"}
    seconds = Counter()
    for clip in clips:
        assert 2 <= clip.duration <= 12
        assert clip.name.startswith(f"{clip.speaker}_")
        seconds[clip.speaker] += clip.duration
    assert seconds.keys() == train
    assert all(20 < total <= 30 for total in seconds.values())
    assert clips[0].source.is_file()
    again = make_actors.make_sample.read_actors(tmp_path / "again")
    assert [clip.name for clip in again] == [clip.name for clip in clips]


def test_a_build_of_the_sample_adds_audio_and_keeps_what_is_there(make_actors, tmp_path, monkeypatch):
    make_sample = make_actors.make_sample
    monkeypatch.setattr(make_sample, "decode", lambda source: np.zeros(32_000, np.int16))
    clips = [
        make_actors.Clip(Path("x"), name, "one", "en", "someone", 2.0, split="train") for name in ("a", "b")
    ]
    make_sample.write_clips(clips[:1], tmp_path, make_sample.COLUMNS, make_sample.OPUS)
    first = tmp_path / "audio" / "train" / "en" / "a.ogg"
    before = first.read_bytes()
    make_sample.write_clips(clips, tmp_path, make_sample.COLUMNS, make_sample.OPUS)
    assert first.read_bytes() == before
    assert [row["file_name"] for row in rows_of(tmp_path)] == [f"audio/train/en/{x}.ogg" for x in "ab"]
    soundfile.write(first, np.zeros(16_000), 16_000, format="OGG", subtype="OPUS")
    with pytest.raises(RuntimeError, match=r"a\.ogg has 1\.00 s, x 2\.00 s"):
        make_sample.write_clips(clips, tmp_path, make_sample.COLUMNS, make_sample.OPUS)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_sample_is_calibrated_on_many_voices_and_on_none_that_research_measures_with(make_actors):
    rows = rows_of(SAMPLE)
    files = {path.relative_to(SAMPLE).as_posix() for path in (SAMPLE / "audio").rglob("*.ogg")}
    assert {row["file_name"] for row in rows} == files
    english = {row["speaker"] for row in rows if (row["split"], row["language"]) == ("train", "en")}
    assert len(english) >= 10
    acted = {row["speaker"].removeprefix("queen_") for row in rows if row["speaker"].startswith("queen_")}
    assert len(acted) == len(english) - 1
    assert {make_actors.split_of(character) for character in acted - {make_actors.HERO}} == {"train"}
    assert {row["split"] for row in rows if row["speaker"].startswith("queen_")} == {"train"}


def test_the_demo_says_what_the_sample_has(make_actors):
    said = importlib.import_module("demo").CALIBRATED_ON
    train = [row for row in rows_of(SAMPLE) if row["split"] == "train"]
    minutes = sum(float(row["duration"]) for row in train) / 60
    characters = {row["speaker"] for row in train if row["speaker"].startswith("queen_")}
    languages = {row["language"] for row in train}
    assert f"{minutes:.0f} minutes" in said
    assert f"{len(languages)} languages" in said
    assert f"{len(characters)} characters" in said
