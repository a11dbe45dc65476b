"""Packs clips into windows, for calibration and for batches of label-free training."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from .collators import arrays_of, batched, extract, feature_extractor_of

logger = logging.getLogger(__name__)


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
    """Makes model inputs for `from_dense(..., calibration=...)` from the first rows of `dataset`.

    All windows stay in memory: 30 seconds take 1 MB for Whisper (80 mel bins) and 2 MB for wav2vec2. All have the same
    length, so that the result does not depend on `batch_size`.

    Args:
        dataset: rows as from `load_speech_dataset`, in random order; they need no text. They should be of many
            speakers, because low ranks that are calibrated on one speaker fail on another (docs/comparison.md).
        processor: the model's processor, or its feature extractor alone.
        num_windows: the number of windows; there are fewer if the data set ends first, which a warning says.
        batch_size: the number of windows in a batch.
        pack: the fraction of the windows that are filled with as many whole clips as fit. The other windows come first
            and hold one clip each, as in use. For Whisper these are mostly padding, which calibration must see too.
        window_seconds: the length of a window, by default 30 for Whisper and 20 for other models. Longer clips are cut
            into equal parts.
        silence_seconds: the length of the zeros between two packed clips.

    Raises:
        ValueError: if the data set has no rows or is silent, a clip does not have the model's rate, or an argument is
            out of range.
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
        raise ValueError("the calibration data has no rows; it must have at least one clip")
    if not any(np.ptp(window) > 0 for window in windows):
        raise ValueError(
            f"the calibration data is silent: all samples of {len(windows)} windows are the same; choose recordings "
            "with speech"
        )
    if len(windows) < num_windows:
        seconds = sum(map(len, windows)) / rate
        logger.warning(
            f"the recordings fill {len(windows)} of {num_windows} windows, {seconds:.0f} seconds in all; with more, "
            "of other speakers, the result would fit other recordings better"
        )
    length = longest or max(map(len, windows))
    return [extract(group, extractor, length) for group in batched(windows, batch_size)]


def split_windows(clips: Iterable[np.ndarray], window: int, silence: int, pack: bool) -> Iterator[np.ndarray]:
    """Yields arrays of at most `window` samples, after cutting longer clips into equal parts.

    Args:
        clips: samples of shape (num_samples,).
        window: the number of samples in a window.
        silence: the number of zeros between two clips in one window.
        pack: whether a window holds as many clips as fit, rather than one.
    """
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
    """Packs rows into label-free batches of windows, which have little padding.

    A window holds as many whole clips as fit, half a second apart, and longer clips are cut into equal parts. A batch
    may therefore have fewer windows than rows, or more.

    Args:
        processor: the model's processor, or its feature extractor alone.
        seconds: the length of a window, at most 30 for Whisper. The cost is proportional to it.

    Raises:
        ValueError: if the model does not take windows of that length, or a clip does not have the model's rate.
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
        # One position of Whisper takes two mel frames of 10 ms each.
        length = max(1, round(self.seconds * 50)) * rate // 50
        clips = arrays_of(rows, self.extractor)
        return extract(list(split_windows(clips, length, rate // 2, pack=True)), self.extractor, length)


@dataclass
class PaddedWindowCollator(WindowCollator):
    """Packs rows into windows of one length for each batch, and pads them to `seconds`, as in use.

    Lengths are from `SHORTEST` seconds on, the short ones more often, and follow from the rows, so that an evaluation
    has the same ones each time. A batch has at most as many windows as rows.
    """

    SHORTEST: ClassVar[float] = 1.0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        clips, rate = arrays_of(rows, self.extractor), self.extractor.sampling_rate
        shortest = min(self.SHORTEST, self.seconds)
        random = np.random.default_rng(zlib.crc32(clips[0].tobytes())).random()
        length = int(rate * shortest * (self.seconds / shortest) ** random)
        pieces = list(split_windows(clips, length, rate // 2, pack=True))
        return extract(pieces[: len(rows)], self.extractor, int(self.seconds * rate))
