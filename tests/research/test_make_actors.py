"""Reading conversations and their voices from the archive of a game, without the game."""

from __future__ import annotations

import csv
import importlib
import struct
from pathlib import Path

import pytest
from test_make_sample import archive, mp3

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "research"


@pytest.fixture
def make_actors(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("make_actors")
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
