r"""Writes sentences that espeak-ng speaks, for the grids of `research/paper.py` that need many of them: English ones to
recognise, and Spanish ones to translate into English, or to recognise.

    apt-get install espeak-ng wordnet-base
    python research/make_sentences.py --out outputs/sentences

The English sentences are the examples of WordNet, of three to eight words. The Spanish ones are random
(`research/spanish.py`), and are in two tables: `translation.csv` has them with English text, `spanish.csv` as they are
said. Each is spoken once, by a variant of espeak-ng's voice with an accent, a pitch and a speed at random. No variant
is in two splits, and no sentence; a fifth of the pairs of noun and adjective are in no Spanish sentence for training,
and in each for validation and test. This is **synthetic speech**, and simpler than that of people: espeak-ng makes it
from formants. Its variants are more alike than people are, and some are near twins: `iven2`, `klatt5` and `steph3` of
the test are close to variants for training that have the same name with another number.

A sentence that is there already is not spoken again, so that a run which was stopped goes on. All of it takes about six
minutes of two cores, and 1.4 gigabytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from spanish import spanish_phrase, spanish_sentence
from tqdm import tqdm
from words import SAMPLING_RATE, SPLITS

WORDNET = Path("/usr/share/wordnet")
ACCENTS = {
    "recognition": ("en-us", "en-gb", "en-gb-scotland", "en-029", "en-gb-x-gbcwmd", "en-gb-x-rp"),
    "translation": ("es", "es-419"),
}
# These are more effect than voice.
NOT_VOICES = re.compile(r"whisper|robo|fast|serious|demonic|croak|tweaky", re.IGNORECASE)
WORDS_A_MINUTE, PITCHES = (150, 210), (25, 75)
# Of the Spanish sentences that are drawn. Many phrases come twice, so that a fifth of those for training are phrases.
PHRASES = 1 / 3
SIZES = {"train": 16_000, "validation": 400, "test": 1_200}
COLUMNS = ["file_name", "text", "split", "voice", "duration"]


@dataclass(frozen=True)
class Sentence:
    """What is said, what is to be written, and in which split."""

    said: str
    text: str
    split: str


def english_sentences() -> Iterator[Sentence]:
    """The examples of WordNet in lower case, in an order that has no meaning; a tenth each is for validation and test.

    Raises:
        ValueError: if WordNet is not installed.
    """
    found: set[str] = set()
    for path in sorted(WORDNET.glob("data.*")):
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
            for example in re.findall(r'"([^"]+)"', line.partition("|")[2]):
                text = example.strip().lower().rstrip(".!?;,")
                if re.fullmatch(r"[a-z' ]+", text) and 3 <= len(text.split()) <= 8:
                    found.add(" ".join(text.split()))
    if not found:
        raise ValueError(f"WordNet must be in {WORDNET}, got no examples there; install `wordnet-base`")
    for text in sorted(found, key=lambda text: zlib.crc32(text.encode())):
        yield Sentence(text, text, _split(text, {"validation": 10, "test": 20}))


def spanish_sentences() -> Iterator[Sentence]:
    """Random sentences without end. None comes twice, and one with a new pair of noun and adjective is not for
    training. Some of those for training are phrases, by which a model learns the words first.
    """
    rng = np.random.default_rng(0)
    found: set[str] = set()
    while True:
        is_phrase = rng.random() < PHRASES
        said, text, is_new = (spanish_phrase if is_phrase else spanish_sentence)(rng)
        if said in found or (is_phrase and is_new):
            continue
        found.add(said)
        yield Sentence(said, text, _split(said, {"validation": 25, "test": 100}) if is_new else "train")


def _split(name: str, shares: dict[str, int]) -> str:
    """The split of a name by its hash; `shares` are sums of parts in a hundred, and the rest is for training."""
    place = zlib.crc32(name.encode()) % 100
    return next((split for split, share in shares.items() if place < share), "train")


def voices_of(split: str) -> list[str]:
    """The variants of espeak-ng that speak in a split: an eighth in validation, a fifth in the test.

    Raises:
        ValueError: if espeak-ng is not installed.
    """
    try:
        listed = subprocess.run(
            ["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError as error:
        raise ValueError(f"espeak-ng must be installed, and cannot be run: {error}") from error
    names = sorted(set(re.findall(r"!v/(.+?)(?:\s{2,}|$)", listed, re.MULTILINE)))
    shares = {"validation": 12, "test": 32}
    return [name for name in names if not NOT_VOICES.search(name) and _split(name, shares) == split]


def speak(sentence: Sentence, task: str, voices: list[str], number: int, folder: Path) -> dict[str, str]:
    """Writes one sentence, and returns its row of the table.

    Raises:
        ValueError: if espeak-ng does not say it.
    """
    rng = np.random.default_rng([number, SPLITS.index(sentence.split), [*ACCENTS].index(task)])
    voice, accent = (str(rng.choice(names)) for names in (voices, ACCENTS[task]))
    speed, pitch = (int(rng.integers(low, high + 1)) for low, high in (WORDS_A_MINUTE, PITCHES))
    manner = ["-v", f"{accent}+{voice}", "-s", str(speed), "-p", str(pitch)]
    # A file of another sentence, or of another manner, is not taken for this one.
    name = f"{number}-{zlib.crc32(' '.join([*manner, sentence.said]).encode()):08x}.flac"
    path = folder / task / sentence.split / name
    if not path.is_file():
        spoken = subprocess.run(
            ["espeak-ng", *manner, "--stdout", sentence.said], capture_output=True, check=True
        ).stdout
        samples, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
        if not samples.any():  # espeak-ng writes silence for what it cannot say
            raise ValueError(f"espeak-ng must say {sentence.said!r}, got silence for {' '.join(manner)}")
        samples = resample_poly(samples, SAMPLING_RATE, rate)
        unfinished = path.with_suffix(".part")
        soundfile.write(unfinished, samples, SAMPLING_RATE, format="FLAC")
        unfinished.rename(path)
    seconds = soundfile.info(path).duration
    values = [path.relative_to(folder).as_posix(), sentence.text, sentence.split, voice, f"{seconds:.2f}"]
    return dict(zip(COLUMNS, values, strict=True))


def write_task(
    folder: Path,
    task: str,
    sentences: Iterator[Sentence],
    sizes: dict[str, int],
    spoken_table: str | None = None,
) -> None:
    """Writes the sentences of a task and then its table. Where `spoken_table` is given, a second table of that name has
    what is said as its texts.

    Raises:
        ValueError: if there are too few of a split.
    """
    voices = {split: voices_of(split) for split in SPLITS}
    chosen: dict[str, list[Sentence]] = {split: [] for split in SPLITS}
    for sentence in sentences:
        own = chosen[sentence.split]
        if len(own) < sizes[sentence.split]:
            own.append(sentence)
        if all(len(chosen[split]) == sizes[split] for split in SPLITS):
            break
    for split, own in chosen.items():
        if len(own) < sizes[split]:
            raise ValueError(f"{task} must have {sizes[split]} sentences of {split!r}, got {len(own)}")
        (folder / task / split).mkdir(parents=True, exist_ok=True)
    numbered = [(number, sentence) for own in chosen.values() for number, sentence in enumerate(own)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(lambda pair: speak(pair[1], task, voices[pair[1].split], pair[0], folder), numbered)
        found = list(tqdm(rows, task, len(numbered), unit="sentence"))
    _write_table(folder / f"{task}.csv", found)
    if spoken_table:
        rows_as_said = [
            row | {"text": sentence.said} for row, (_, sentence) in zip(found, numbered, strict=True)
        ]
        _write_table(folder / f"{spoken_table}.csv", rows_as_said)
    hours = sum(float(row["duration"]) for row in found) / 3600
    print(f"{task}: {len(found)} sentences, {hours:.1f} h, {[len(voices[split]) for split in SPLITS]} voices")


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    for split, size in SIZES.items():
        parser.add_argument(
            f"--{split}", type=int, default=size, help=f"sentences of each task; {size} by default"
        )
    args = parser.parse_args()
    sizes = {split: getattr(args, split) for split in SIZES}
    write_task(args.out, "recognition", english_sentences(), sizes)
    write_task(args.out, "translation", spanish_sentences(), sizes, spoken_table="spanish")


if __name__ == "__main__":
    main()
