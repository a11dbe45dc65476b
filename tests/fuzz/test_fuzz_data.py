"""Broken tables and audio files from a generator with a seed: each gives a clear error or what the whole one gives.

By default a few cases run. `python -m pytest -m fuzz tests/fuzz/test_fuzz_data.py` runs thousands, and with
HRT_FUZZ_RESULTS=results/fuzz-data.json it writes their counts. HRT_FUZZ_SEED chooses other cases.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import random
import re
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from fuzz_counts import MANY, SEED, Counts, changed, write_results

from hf_residual_transformer.speech.audio import decode_audio
from hf_residual_transformer.speech.datasets import load_speech_dataset

RATE = 16_000
FEW = 25
TEXTS = ["one", "two, three", 'four "five"', "sechs ä", "हिन्दी", "null"]
NAMES = ("file_name", "text", "language", "split")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def speech(seconds: float = 0.5) -> np.ndarray:
    """Noise with an envelope, which no codec makes to nothing."""
    generator = np.random.default_rng(SEED)
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.2 * generator.standard_normal(len(time)) * (1 + np.sin(20 * time)) / 2).astype(np.float32)


@functools.cache
def container(format: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    rate = 8000 if subtype == "GSM610" else RATE
    soundfile.write(buffer, speech(), rate, format=format, subtype=subtype)
    return buffer.getvalue()


CONTAINERS = [
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "GSM610"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24")),
    *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")),
    *(("AU", "PCM_16"), ("RF64", "PCM_16")),
]
WIDTHS = {
    "PCM_S8": 1,
    "PCM_U8": 1,
    "PCM_16": 2,
    "PCM_24": 3,
    "PCM_32": 4,
    "FLOAT": 4,
    "DOUBLE": 8,
    "ULAW": 1,
    "ALAW": 1,
}
# Plain samples have no checksum, so that nothing tells a changed one from a recorded one.
HEADERS = {"WAV": 44, "WAVEX": 80, "AIFF": 54, "AU": 24, "RF64": 104}


class Warned(logging.Handler):
    """Whether the package said something."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = False

    def emit(self, record: logging.LogRecord) -> None:
        self.said = True

    def __enter__(self) -> Warned:
        logging.getLogger("hf_residual_transformer").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("hf_residual_transformer").removeHandler(self)


def fuzz_audio(number: int, counts: dict[str, Counts], folder: Path) -> None:
    random_ = random.Random(f"audio {SEED} {number}")
    format, subtype = CONTAINERS[number % len(CONTAINERS)]
    content = container(format, subtype)
    kind, broken = changed(random_, content, HEADERS.get(format))
    case = f"audio {number}, {format} {subtype}, {kind}"
    found = counts.setdefault(f"{format} {subtype}", Counts())
    path = folder / "clip.bin"
    path.write_bytes(broken)
    start = time.process_time()
    with Warned() as warned:
        try:
            samples = decode_audio(path, RATE)
        except Exception as error:
            clear = type(error) is ValueError and "clip.bin" in str(error)
            outcome = "clear error" if clear else f"{type(error).__name__}: {error}"
            found.note(outcome, case, time.process_time() - start, fault=not clear)
            return
    seconds = time.process_time() - start
    whole = decode_audio(content, RATE)
    if samples.shape == whole.shape and np.abs(samples - whole).max() <= 1e-3:
        found.note("equal output", case, seconds)
    elif warned.said:
        found.note("said", case, seconds)
    elif consistent(format, content, broken, samples, whole):
        found.note("another right file", case, seconds)
    else:
        found.note(f"silently {len(samples)} samples of {len(whole)}", case, seconds, fault=True)


def consistent(format: str, content: bytes, broken: bytes, samples: np.ndarray, whole: np.ndarray) -> bool:
    """Whether a changed file is one that somebody could have written, so that no reader can tell.

    All samples are read, but the header has another rate, number of channels or codec. MP3 has no checksums, so that
    only its length can be compared.
    """
    if format == "MP3":
        first = content.find(
            content[:3], 3
        )  # the first frame says how many samples are left out at both ends
        padding = 2 * 4095 if broken[first:] == content[first:] else 0
        return abs(len(samples) - len(whole)) <= max(padding, 1152)  # one frame
    if format not in HEADERS or len(broken) < len(content):
        return False
    if broken[HEADERS[format] : len(content)] != content[HEADERS[format] :]:
        return False
    with soundfile.SoundFile(io.BytesIO(broken)) as file:
        width = WIDTHS.get(file.subtype)
        read = file.frames * file.channels * (width or 0)
    return width is None or abs(read - (len(content) - HEADERS[format])) < 64 + file.channels * width


def table_of(suffix: str) -> bytes:
    rows = [
        {"file_name": f"{n}.wav", "text": text, "language": "en", "split": "train"}
        for n, text in enumerate(TEXTS)
    ]
    if suffix == ".parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    text = io.StringIO(newline="")
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if suffix == ".tsv" else {}
    writer = csv.DictWriter(text, NAMES, lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def fuzz_table(number: int, counts: dict[str, Counts], folder: Path) -> None:
    random_ = random.Random(f"table {SEED} {number}")
    suffix = (".csv", ".tsv", ".jsonl", ".parquet")[number % 4]
    content = table_of(suffix)
    kind, broken = changed(random_, content)
    if suffix != ".parquet" and random_.random() < 0.2:
        kind, broken = random_.choice(
            (
                ("UTF-16", content.decode().encode("utf-16")),
                ("UTF-8 with a mark", b"\xef\xbb\xbf" + content),
                ("line ends of Windows", content.replace(b"\n", b"\r\n")),
                ("a quote more", splice_in(content, random_.randrange(len(content)), b'"')),
                ("a line twice", content + content.splitlines(keepends=True)[-1]),
                ("a line less", b"".join(content.splitlines(keepends=True)[:-1])),
            )
        )
    case = f"table {number}, {suffix}, {kind}"
    found = counts.setdefault(suffix[1:], Counts())
    table = folder / f"table{suffix}"
    table.write_bytes(broken)
    start = time.process_time()
    with Warned() as warned:
        try:
            rows = load_speech_dataset(table)
            texts = [(row["audio"]["path"], row["text"]) for row in rows]
        except Exception as error:
            named = any(
                word in str(error)
                for word in (table.name, str(folder), ".wav", "_column`", "`split`", "column '")
            )
            clear = type(error) is ValueError and named
            outcome = "clear error" if clear else f"{type(error).__name__}: {error}"
            found.note(outcome, case, time.process_time() - start, fault=not clear)
            return
        finally:
            for cached in (folder / "cache").rglob("*.arrow"):
                cached.unlink()
    seconds = time.process_time() - start
    expected = [(f"{n}.wav", text) for n, text in enumerate(TEXTS)]
    if texts == expected:
        found.note("equal output", case, seconds)
    elif warned.said:
        found.note("said", case, seconds)
    elif written(suffix, broken, texts):
        found.note("another right file", case, seconds)
    else:
        found.note(f"silently {texts}", case, seconds, fault=True)


def splice_in(content: bytes, position: int, new: bytes) -> bytes:
    return content[:position] + new + content[position:]


def written(suffix: str, broken: bytes, texts: list[tuple[str, str]]) -> bool:
    """Whether what was read is what stands in a changed table, so that no reader can tell.

    There is a row for each line that ends in "train", and names and texts stand in them in the same order. Parquet has
    no checksums here, so that only the number of rows can be compared.
    """
    if suffix == ".parquet":
        return len(texts) == len(TEXTS)
    content = broken.decode("utf-8-sig").replace("\r\n", "\n")
    lines = [line for line in content.split("\n") if line.strip()]
    if suffix == ".jsonl":
        found = [json.loads(line) for line in lines]
        splits = any("split" in row for row in found)
        return texts == [
            (row["file_name"], row["text"]) for row in found if not splits or row["split"] == "train"
        ]
    if "split" in lines[0]:
        train = re.compile(r"[,\t]train$" if suffix == ".tsv" else r'[,\t]("train"|train)$')
        lines = [lines[0], *(line for line in lines[1:] if train.search(line))]
    quote = '"' if suffix == ".csv" else ""
    content, position = content.replace(quote, ""), 0
    for part in (part for row in texts for value in row for part in value.replace(quote, "").split("\n")):
        position = content.find(part, position)
        if position < 0:
            return False
    return len(lines) - 1 == len(texts)


def run(fuzz, number: int, folder: Path) -> dict[str, Counts]:
    for clip in range(len(TEXTS)):
        soundfile.write(folder / f"{clip}.wav", speech(0.01), RATE)
    counts: dict[str, Counts] = {}
    for case in range(number):
        fuzz(case, counts, folder)
    return counts


@pytest.mark.parametrize("fuzz", [fuzz_audio, fuzz_table])
def test_a_broken_input_gives_a_clear_error_or_what_the_whole_one_gives(tmp_path, fuzz):
    counts = run(fuzz, FEW, tmp_path)
    assert [fault for found in counts.values() for fault in found.faults] == []
    assert sum(found.outcomes["clear error"] for found in counts.values()) > FEW // 4


@pytest.mark.fuzz
def test_thousands_of_broken_inputs_give_a_clear_error_or_what_the_whole_one_gives(tmp_path):
    counts = {**run(fuzz_audio, MANY, tmp_path), **run(fuzz_table, MANY, tmp_path)}
    write_results("HRT_FUZZ_RESULTS", counts)
