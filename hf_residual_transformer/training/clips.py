"""Finds clips that a loss on transcripts cannot learn from, before the training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..families import num_frames_of
from ..speech.collators import SpeechCollator, check_has_frames, extract, feature_extractor_of
from ..speech.datasets import refuse_long_clips

MIN_SPECTROGRAM = 2


def ctc_frames(labels: Sequence[int]) -> int:
    """The fewest frames that CTC needs: one for each label, and one more between two that are equal."""
    return len(labels) + sum(one == other for one, other in pairwise(labels))


def refuse_unfit_clips(model: Any, collator: SpeechCollator, rows: Iterable[Mapping[str, Any]]) -> None:
    """Checks that clips make frames, and that transcripts fit them, or the `max_target_positions` of Whisper's decoder.
    Where they do not, CTC's loss is infinite, and a transducer cannot write them.

    Raises:
        ValueError: naming the first clip that is too short, or whose transcript is too long or has unknown characters.
    """
    is_transducer = hasattr(model, "max_symbols_per_step")
    has_decoder = model.config.is_encoder_decoder and not is_transducer
    extractor = feature_extractor_of(collator.processor)
    if has_decoder and isinstance(rows, Dataset) and "text" in rows.column_names:
        rows = rows.remove_columns([name for name in ("audio",) if name in rows.column_names])
    for number, row in enumerate(rows):
        audio = row.get("audio") or {}
        place = "a row of the stream" if isinstance(rows, list | tuple) else f"row {number}"
        clip = f"{audio['path']} ({place})" if audio.get("path") else f"the clip of {place}"
        try:
            labels = collator.encode([row])[0]
        except ValueError as error:
            raise ValueError(f"{clip} has a transcript that cannot be used: {error}") from error
        if has_decoder:
            needed, found, unit = len(labels), model.config.max_target_positions, "tokens"
        else:
            found, unit = _frames_of(model, extractor, len(audio["array"]), clip), "frames"
            # A transducer may write many tokens at one frame.
            needed = (
                math.ceil(len(labels) / model.max_symbols_per_step) if is_transducer else ctc_frames(labels)
            )
        if needed > found:
            raise ValueError(
                f"{clip} cannot be learnt from: its transcript needs {needed} {unit}, and the model has {found} for "
                f"it; check it against the recording, cut it, or leave it out. It begins with {row['text'][:60]!r}"
            )


def _frames_of(model: Any, extractor: Any, num_samples: int, clip: str) -> int:
    """The encoder frames of a clip.

    Raises:
        ValueError: if there are none, or if a spectrogram has a single frame, whose variance is not defined.
    """
    check_has_frames(model, num_samples, clip)
    length = num_samples
    if model.main_input_name != "input_values":
        batch = extract([np.zeros(num_samples, np.float32)], extractor)
        features = batch[model.main_input_name]
        length = int(batch["attention_mask"].sum()) if "attention_mask" in batch else features.shape[1]
        if length < MIN_SPECTROGRAM:
            raise ValueError(
                f"{clip} must be long enough for {MIN_SPECTROGRAM} frames of a spectrogram, got {num_samples} samples, "
                f"which make {length}; remove it from the data"
            )
    return int(num_frames_of(model, torch.tensor([length])))


@dataclass
class CheckingCollator:
    """Makes batches as `collator` does, and checks each clip of a stream when it comes."""

    model: Any
    collator: SpeechCollator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        refuse_unfit_clips(self.model, self.collator, rows)
        return self.collator(rows)


def checked(model: Any, collator: SpeechCollator, *datasets: Any) -> Any:
    """The collator for data sets whose clips fit; those of a stream are checked batch by batch."""
    streams = False
    for rows in datasets:
        if isinstance(rows, Dataset):
            extractor = feature_extractor_of(collator.processor)
            if hasattr(extractor, "n_samples"):
                refuse_long_clips(rows, extractor.n_samples / extractor.sampling_rate)
            refuse_unfit_clips(model, collator, rows)
        streams = streams or not (rows is None or isinstance(rows, Dataset))
    return CheckingCollator(model, collator) if streams else collator
