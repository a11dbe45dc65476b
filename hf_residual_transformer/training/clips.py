"""Finds clips that a loss on transcripts cannot learn from, before the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from datasets import Dataset
from torch import Tensor

from ..speech.collators import SpeechCollator, check_has_frames, feature_extractor_of
from ..speech.datasets import refuse_long_clips


def ctc_frames(labels: Sequence[int]) -> int:
    """The fewest frames that CTC needs: one for each label, and one more between two that are equal."""
    return len(labels) + sum(one == other for one, other in pairwise(labels))


def refuse_unfit_clips(model: Any, collator: SpeechCollator, rows: Iterable[Mapping[str, Any]]) -> None:
    """Checks that clips make frames, and that transcripts fit them, without which CTC's loss is infinite, or the
    `max_target_positions` of Whisper's decoder.

    Raises:
        ValueError: naming the first clip that is too short, or whose transcript is too long.
    """
    if model.config.is_encoder_decoder and isinstance(rows, Dataset) and "text" in rows.column_names:
        rows = rows.remove_columns([name for name in ("audio",) if name in rows.column_names])
    for number, row in enumerate(rows):
        labels = collator.encode([row])[0]
        audio = row.get("audio") or {}
        place = f"row {number}" if isinstance(rows, Dataset) else "a row of the stream"
        clip = f"{audio['path']} ({place})" if audio.get("path") else f"the clip of {place}"
        if model.config.is_encoder_decoder:
            needed, found, unit = len(labels), model.config.max_target_positions, "tokens"
        else:
            check_has_frames(model, len(audio["array"]), clip)
            needed = ctc_frames(labels)
            found, unit = int(model._get_feat_extract_output_lengths(len(audio["array"]))), "frames"
        if needed > found:
            raise ValueError(
                f"{clip} cannot be learnt from: its transcript needs {needed} {unit}, and the model has {found} for "
                f"it; check it against the recording, cut it, or leave it out. It begins with {row['text'][:60]!r}"
            )


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
