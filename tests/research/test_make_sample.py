"""Reading speech from the archive of a game, without the game."""

from __future__ import annotations

import csv
import io
import struct

import numpy as np
import pytest
import soundfile


@pytest.fixture
def make_sample(research):
    return research("make_sample")


def mp3(seconds: float) -> bytes:
    buffer = io.BytesIO()
    samples = 0.1 * np.random.default_rng(0).standard_normal(int(11_025 * seconds))
    soundfile.write(buffer, samples, 11_025, format="MP3", subtype="MPEG_LAYER_III")
    return buffer.getvalue()


def archive(entries: dict[str, bytes], compression: int = 1) -> bytes:
    header = struct.pack(">4s6s2sBH", b"QTBL", b"CEM10", b"", compression, len(entries))
    table, offset = b"", len(header) + 21 * len(entries)
    for name, data in entries.items():
        table += struct.pack(">12sBII", name.encode(), 1, offset, len(data))
        offset += len(data)
    return header + table + b"".join(entries.values())


@pytest.fixture
def adventure(make_sample, tmp_path, monkeypatch):
    path = tmp_path / "queen.1c"
    monkeypatch.setattr(make_sample, "ADVENTURE", path)
    return path


def test_lines_are_written_as_they_are_and_a_dialogue_is_in_one_split(make_sample, adventure, tmp_path):
    lines = {f"{number:02}0001P{part}.SB": mp3(2 + 0.1 * number) for number in range(12) for part in (1, 2)}
    others = {"SHORT.SB": mp3(0.5), "99SSSS.SB": mp3(3), "ROOM.PCX": b"picture"}
    adventure.write_bytes(archive(lines | others))
    clips = make_sample.write_adventure(tmp_path / "out")
    assert {f"{clip.name}.SB" for clip in clips} == lines.keys()
    with open(tmp_path / "out" / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(
        (tmp_path / "out" / r["file_name"]).read_bytes() == lines[f"{r['file_name'][6:-4]}.SB"] for r in rows
    )
    splits = {(row["speaker"], row["split"]) for row in rows}
    assert len(splits) == 12
    assert {split for _, split in splits} == {"train", "validation"}
    with pytest.raises(FileExistsError, match="delete it to build it anew"):
        make_sample.write_adventure(tmp_path / "out")


def test_a_game_that_is_missing_or_of_another_kind_is_named_and_nothing_is_left(
    make_sample, adventure, tmp_path
):
    with pytest.raises(FileNotFoundError, match="apt-get install flight-of-the-amazon-queen"):
        make_sample.write_adventure(tmp_path / "out")
    adventure.write_bytes(archive({"A.SB": b"x"}, compression=2))
    with pytest.raises(ValueError, match=r"queen\.1c is not an archive with speech as MP3"):
        make_sample.write_adventure(tmp_path / "out")
    assert not (tmp_path / "out").exists()
