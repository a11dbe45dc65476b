"""Writes the acted dialogue of an adventure game with its transcripts: speakers that nothing here has heard.

    apt-get install ffmpeg flight-of-the-amazon-queen
    python research/make_actors.py --out /tmp/queen

A clip is one turn of one character. A scene is one conversation of the hero with one character. Each character is in
one split with all scenes, by a hash of the name: train is to calibrate and distil on, validation to choose settings,
test to measure. The hero, who speaks in every scene, is in train alone, with the lines of the scenes of train. No text
is in two splits. Cut scenes are left out, because the game does not say who speaks in them; so are animals. An actor
may have lent the voice to several characters, which the game does not say either.

The texts are as the game shows them, without the marks of unfinished sentences, and with shouted words in lower case.
"""

from __future__ import annotations

import argparse
import io
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import make_sample
import numpy as np
import soundfile
from make_sample import Clip, clean, find_fault, hash_of

HERO = "joe"
ANIMALS = {"APE", "DOG", "WEDGE"}  # names of conversations
HEADER_BYTES = 20
MIN_WORDS, PAUSE_SECONDS = 3, 0.25
# A command ends a segment, but for two. The one that moves the text has a position of 11 characters.
COMMAND = re.compile(r"\*(?:XY.{11}|(?!GD|GM)..)")
SPLITS = (
    ("test", 30),
    ("validation", 50),
    ("train", 100),
)  # each with the characters whose hash is below, in per cent


def read_archive(path: Path) -> dict[str, bytes]:
    """The files of the archive whose header `make_sample.read_adventure` describes, by name."""
    archive = path.read_bytes()
    (number,) = struct.unpack_from(">H", archive, 13)
    files = {}
    for index in range(number):
        name, _, offset, size = struct.unpack_from(">12sBII", archive, 15 + 21 * index)
        files[name.rstrip(b"\0").decode("ascii")] = archive[offset : offset + size]
    return files


def read_turns(dialogue: bytes) -> Iterator[tuple[str, str]]:
    """Yields the turns of a conversation: the start of the names of their audio, and the text with its commands.

    After 20 bytes there are, as big-endian 16-bit numbers: levels at 0, key at 4, the number of the hero's strings at 6
    and of the other person's at 8, the offset of the latter at 22, and that of the greetings for a second meeting at
    26. The hero's strings follow the tree, which has 96 bytes for each level. A string has two bytes, a number, a
    length byte and text of code page 850, and is aligned to 4; a greeting has no number and is aligned to 2.
    """
    data = dialogue[HEADER_BYTES:]
    levels, _, key, number_hero, number_person = struct.unpack_from(">5h", data)
    offset_person, _, greetings = struct.unpack_from(">3h", data, 22)
    for who, start, number in (
        ("J", 32 + 96 * abs(levels), number_hero),
        ("P", offset_person, number_person),
    ):
        for _ in range(number):
            (identity,) = struct.unpack_from(">H", data, start + 2)
            text, start = read_string(data, start + 4, 4)
            yield f"{key:02}{f'{identity:04X}' if identity else 'SSSS'}{who}", text
    for who in "PJ":
        text, greetings = read_string(data, greetings, 2)
        yield f"{key:02}XXXX{who}", text


def read_string(data: bytes, start: int, alignment: int) -> tuple[str, int]:
    """The text whose length byte is at `start`, and where the next begins."""
    end = start + 1 + data[start]
    return data[start + 1 : end].decode("cp850"), -(-end // alignment) * alignment


def segments_of(text: str) -> dict[int, str]:
    """The parts of a turn that are spoken, by their number from 1."""
    parts = enumerate(COMMAND.split(text), 1)
    return {number: part.strip() for number, part in parts if part.strip()}


def clean_line(text: str) -> str:
    """The text without the sign of a trade mark, with shouted words in lower case, and cleaned as prompts are."""
    text = re.sub(r"\b[A-Z]{2,}(?:'[A-Z]+)?\b", lambda shouted: shouted[0].lower(), text.replace("^_", ""))
    return clean(text)


def read_clips(files: dict[str, bytes]) -> dict[str, tuple[Clip, list[bytes]]]:
    """The turns by name, each with the MP3 data of its segments. Turns that have two texts are left out."""
    clips: dict[str, tuple[Clip, list[bytes]]] = {}
    ambiguous = set()
    for scene in sorted(name[:-4] for name in files if name.endswith(".DOG")):
        character = re.sub(r"\d", "", scene).lower()
        for name, text in read_turns(files[f"{scene}.DOG"]):
            segments = segments_of(text)
            audio = [files.get(f"{name}{number:X}.SB") for number in segments]
            if not audio or None in audio or scene in ANIMALS:
                continue
            if name in clips:
                ambiguous.add(name)
            speaker = HERO if name.endswith("J") else character
            line = clean_line(" ".join(segments.values()))
            clip = Clip(Path(f"{scene}/{name}"), name, line, "en", speaker, 0.0, split=split_of(character))
            clips[name] = clip, [data for data in audio if data is not None]
    return {name: turn for name, turn in clips.items() if name not in ambiguous}


def split_of(character: str) -> str:
    draw = hash_of(character) % 100
    return next(split for split, limit in SPLITS if draw < limit)


def select_clips(clips: list[Clip]) -> list[Clip]:
    """The clips of three words and more, the hero's of train alone, and each text once: in test, if it is there."""
    order = [split for split, _ in SPLITS]
    selected: dict[str, Clip] = {}
    for clip in sorted(clips, key=lambda clip: (order.index(clip.split), clip.name)):
        if len(clip.spoken.split()) >= MIN_WORDS and (clip.speaker != HERO or clip.split == "train"):
            selected.setdefault(clip.spoken, clip)
    return list(selected.values())


def join(segments: list[bytes]) -> tuple[np.ndarray, int]:
    """The samples of the segments with a pause between them, as the game plays them, and their rate in Hz."""
    pieces: list[np.ndarray] = []
    rate = 0
    for segment in segments:
        samples, rate = soundfile.read(io.BytesIO(segment), dtype="float32")
        pieces += [samples, np.zeros(int(PAUSE_SECONDS * rate), np.float32)]
    return np.concatenate(pieces[:-1]), rate


def write_actors(out: Path) -> tuple[list[Clip], Counter[str]]:
    """Writes the audio as FLAC and `metadata.csv`, and counts the faults for which clips are left out.

    Raises:
        FileExistsError: the folder has audio already.
    """
    make_sample.refuse_audio(out)
    make_sample.read_adventure()  # it says what to install, and that the archive has MP3
    turns = read_clips(read_archive(make_sample.ADVENTURE))
    written: list[Clip] = []
    faults: Counter[str] = Counter()
    for clip in select_clips([clip for clip, _ in turns.values()]):
        samples, rate = join(turns[clip.name][1])
        clip.duration = len(samples) / rate
        if fault := find_fault(clip):
            faults[fault] += 1
            continue
        clip.source = out / "audio" / clip.split / clip.speaker / f"{clip.name}.flac"
        clip.source.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(clip.source, samples, rate)
        written.append(clip)
    make_sample.write_table(written, out, make_sample.COLUMNS)
    return written, faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, without audio yet")
    clips, faults = write_actors(parser.parse_args().out)
    print(make_sample.count_table(clips))
    speakers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        speakers[clip.split][clip.speaker] += len(clip.spoken.split())
    for split, words in speakers.items():
        print(f"{split}: {sum(words.values())} words, {dict(words.most_common())}")
    print("\n".join(f"left out: {count}, {fault}" for fault, count in faults.most_common()))


if __name__ == "__main__":
    main()
