"""Spoken sentences as `research/make_sentences.py` writes them, in noise that is drawn for each item.

An item depends on the arguments of its split and on its index alone, so that every cell of a grid reads the same, and a
run that was stopped goes on with what it would have read. A sentence that comes again has other noise.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch.utils.data import Dataset
from words import NOISE_DECIBELS, SAMPLING_RATE, SPLITS, in_noise, noises

EARLY = 0.2  # the part of the training sentences, from the first on, that are short: aligning is learnt later
SHORTEST = 0.3  # what part of all sentences these are drawn from
POOL = 32  # batches, in which sentences are sorted by length, so that little of a batch is padding


class SpokenSentences(Dataset):
    """The sentences of one split, by voices that no other split has, though some are near twins.

    Args:
        folder: as `make_sentences.py` writes it.
        table: "recognition" or "translation", or "spanish", which has the audio of "translation" with the Spanish text.
        split: one of `SPLITS`.
        size: number of items. A split for training begins with short ones, and is read as often as that needs; of the
            others, the first sentences are read once, from short to long.
        seed: of the order and of the noise.
        batch_size: items in a row that are about as long as one another.
        decibels: the least and the most by which the speech is louder than the noise.

    Raises:
        ValueError: for a folder without the table, a split without sentences, or a test with fewer than `size`.
    """

    def __init__(
        self,
        folder: Path,
        table: str,
        split: str,
        size: int,
        seed: int = 0,
        batch_size: int = 1,
        decibels: Sequence[float] = NOISE_DECIBELS,
    ) -> None:
        path = folder / f"{table}.csv"
        if not path.is_file():
            raise ValueError(
                f"`folder` must have the table {path.name}, as research/make_sentences.py writes it, got {folder}"
            )
        with open(path, encoding="utf-8", newline="") as lines:
            self.rows = [row for row in csv.DictReader(lines) if row["split"] == split]
        if not self.rows or (split != "train" and len(self.rows) < size):
            raise ValueError(f"{path} must have {size} sentences of {split!r}, got {len(self.rows)}")
        self.folder, self.split, self.size, self.seed = folder, split, size, seed
        self.noises, self.decibels = noises(SPLITS.index(split)), decibels
        durations = np.array([float(row["duration"]) for row in self.rows])
        self.order = (
            _order(durations, size, batch_size, np.random.default_rng(seed))
            if split == "train"
            else np.argsort(durations[:size], kind="stable")
        )

    def __len__(self) -> int:
        return self.size

    def check_longest(self, seconds: float) -> None:
        """Checks that every sentence fits a window of `seconds`.

        Raises:
            ValueError: naming the longest.
        """
        longest = max((self.rows[place] for place in self.order), key=lambda row: float(row["duration"]))
        if float(longest["duration"]) > seconds:
            raise ValueError(
                f"`window_seconds` must hold every sentence, got {seconds}, and {longest['file_name']} has "
                f"{longest['duration']} s"
            )

    @property
    def voices(self) -> list[str]:
        """The names of those who speak."""
        return sorted({row["voice"] for row in self.rows[: self.size]})

    def voice(self, index: int) -> str:
        """The voice that speaks an item."""
        return self.rows[self.order[index]]["voice"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[self.order[index]]
        speech, _ = soundfile.read(self.folder / row["file_name"], dtype="float32")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        array = in_noise(rng, speech, speech, self.noises, self.decibels)
        audio = {"array": array, "sampling_rate": SAMPLING_RATE, "path": row["file_name"]}
        return {"audio": audio, "text": row["text"]}


def _order(durations: np.ndarray, size: int, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Which row each item is. The first are short ones, and then all rows come once before any comes again. Those of a
    batch are about as long as one another.
    """
    by_length = np.argsort(durations, kind="stable")
    short = by_length[: max(1, int(SHORTEST * len(by_length)))]
    num_early = int(EARLY * size) // batch_size * batch_size
    batches: list[np.ndarray] = []
    for rows, number in ((short, num_early), (by_length, size - num_early)):
        if not number:
            continue
        order = np.concatenate([rng.permutation(rows) for _ in range(-(-number // len(rows)))])[:number]
        for start in range(0, number, POOL * batch_size):
            pool = order[start : start + POOL * batch_size]
            pool = pool[np.argsort(durations[pool], kind="stable")]
            own = [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
            batches += [own[place] for place in rng.permutation(len(own))]
    return np.concatenate(batches)
