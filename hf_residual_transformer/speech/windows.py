"""Clips packed into windows: inputs for calibration, and label-free batches for training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from .collators import arrays_of, batched, extract, feature_extractor_of


def calibration_batches(
    dataset: Iterable[Mapping[str, Any]],
    processor: Any,
    *,
    num_windows: int = 64,
    batch_size: int = 8,
    pack: float = 0.75,
    window_seconds: float | None = None,
    silence_seconds: float = 0.5,
) -> list[dict[str, Tensor]]:
    """Model inputs for `from_dense(..., calibration=...)`, from the first rows of `dataset`.

    They are kept in memory: of 30 seconds, Whisper's features take 1 MB (80 mel bins), wav2vec2's 2 MB.
    All are padded to one length, so that nothing depends on `batch_size`.

    Args:
        dataset: rows as from `load_speech_dataset`, in random order; text is not needed. Of many speakers: low ranks
            that are calibrated on one fail on another (docs/comparison.md).
        processor: the model's, or its feature extractor alone.
        num_windows: model inputs wanted; fewer if the data set ends before.
        pack: part of the windows that are filled with as many whole clips as fit. The others, which come first, are
            one clip each, as the model hears it in use: for Whisper mostly padding, of which it must see some.
        window_seconds: length of a window, by default 30 for Whisper, else 20. Longer clips are cut in equal
            parts.
        silence_seconds: zeros between two packed clips.

    Raises:
        ValueError: for a data set without rows, audio of another rate, or an argument out of range.
    """
    extractor = feature_extractor_of(processor)
    rate = extractor.sampling_rate
    longest = getattr(extractor, "n_samples", None)
    window = longest or 20 * rate
    if window_seconds is not None:
        window = int(window_seconds * rate)
    if not 0 < window <= (longest or window):
        limit = f" and at most {longest / rate:g}" if longest else ""
        raise ValueError(f"`window_seconds` must be above 0{limit}, got {window_seconds}")
    for name, value in (("num_windows", num_windows), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if not 0 <= pack <= 1:
        raise ValueError(f"`pack` must be from 0 to 1, got {pack}")
    clips = (array for row in dataset for array in arrays_of([row], extractor))
    packed, silence = round(num_windows * pack), int(silence_seconds * rate)
    windows = list(islice(split_windows(clips, window, silence, pack=False), num_windows - packed))
    windows += islice(split_windows(clips, window, silence, pack=True), packed)
    if not windows:
        raise ValueError("the calibration data has no rows")
    length = longest or max(map(len, windows))
    return [extract(group, extractor, length) for group in batched(windows, batch_size)]


def split_windows(clips: Iterable[np.ndarray], window: int, silence: int, pack: bool) -> Iterator[np.ndarray]:
    """Arrays of at most `window` samples, made of whole clips; of equal parts where a clip is longer."""
    pieces = (piece for clip in clips for piece in np.array_split(clip, math.ceil(len(clip) / window)))
    if not pack:
        yield from pieces
        return
    packed: list[np.ndarray] = []
    for piece in pieces:
        if packed and sum(map(len, packed)) + silence + len(piece) > window:
            yield np.concatenate(packed)
            packed = []
        packed += [np.zeros(silence, np.float32), piece] if packed else [piece]
    if packed:
        yield np.concatenate(packed)


@dataclass
class WindowCollator:
    """Rows to label-free batches of windows that hold as many whole clips as fit, half a second apart; longer
    clips are cut in equal parts. So a batch has fewer windows than rows, or more, and little padding.

    Args:
        processor: the model's, or its feature extractor alone.
        seconds: length of a window; Whisper takes at most 30, and shorter ones are as much cheaper.

    Raises:
        ValueError: for a length that the model does not take, or audio of another rate than the model's.
    """

    processor: Any
    seconds: float = 10.0

    def __post_init__(self) -> None:
        self.extractor = feature_extractor_of(self.processor)
        limit = getattr(self.extractor, "chunk_length", math.inf)
        if not 0 < self.seconds <= limit:
            raise ValueError(f"`seconds` must be above 0 and at most {limit}, got {self.seconds}")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rate = self.extractor.sampling_rate
        # Two mel frames, of 10 ms each, are one position of Whisper.
        length = max(1, round(self.seconds * 50)) * rate // 50
        clips = arrays_of(rows, self.extractor)
        return extract(list(split_windows(clips, length, rate // 2, pack=True)), self.extractor, length)
