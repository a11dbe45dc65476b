"""The recipe of a short distillation, which `distill.py`, the demo and the comparison of methods use."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from ..layers import quantized_weights
from ..speech.transcription import transcribe
from ..speech.windows import WindowCollator
from .arguments import RecipeArguments
from .trainers import Seq2SeqDistillationTrainer

WINDOW_SECONDS = 10.0


def learning_rate_for(size: float, bits: float | None) -> float:
    """The peak learning rate for a distillation of a few hundred steps.

    The nearer the student starts to the dense model, the lower the best rate is (measured in docs/LOG.md).

    Args:
        size: the number of the encoder's parameters, quantised weights included, divided by the dense number.
        bits: the mean number of bits of the quantised weights; None if no weight is quantised. Each further bit divides
            the rate by three, down to the rate that follows from `size`.
    """
    by_size = 1e-5 * 10 ** ((0.7 - size) / 0.36)
    return by_size if bits is None else max(by_size, 1e-5 * 3 ** (3 - bits))


def mean_bits(model: Any) -> float | None:
    """The mean number of bits of the quantised weights in `model`; None if no weight is quantised."""
    weights = quantized_weights(model)
    return sum(bits * number for bits, number in weights.items()) / weights.total() if weights else None


def relative_size(student: Any, teacher: Any) -> float:
    """The number of parameters of a student's encoder divided by that of its teacher, for `learning_rate_for`."""
    sizes = [
        quantized_weights(encoder).total() + sum(parameter.numel() for parameter in encoder.parameters())
        for encoder in (student, teacher)
    ]
    return sizes[0] / sizes[1]


class TranscribingCollator:
    """Makes batches whose labels are the teacher's transcripts.

    Each batch is transcribed once, which saves time if several students see the same batches.

    Args:
        teacher: a Whisper for generation.
        collator: makes the batches without labels.
    """

    def __init__(self, teacher: Any, collator: WindowCollator) -> None:
        self.teacher, self.collator = teacher, collator
        self.labels: dict[bytes, Tensor] = {}

    def __call__(self, rows: Any) -> dict[str, Tensor]:
        batch = self.collator(rows)
        features = batch["input_features"]
        key = hashlib.sha256(features.numpy().tobytes()).digest()
        if key not in self.labels:
            self.labels[key] = transcribe(self.teacher, features.to(self.teacher.device)).cpu()
        return {**batch, "labels": self.labels[key]}


def short_distillation(
    student: Any,
    teacher: Any,
    rows: Any,
    folder: Path,
    *,
    collator: Any,
    **options: Any,
) -> list[dict[str, Any]]:
    """Distils a Whisper without labels.

    Args:
        student: the residual model, which is trained in place.
        teacher: the dense model.
        rows: a list or data set of clips.
        folder: the Trainer's output folder; no checkpoint is saved.
        collator: makes batches of the rows.
        options: further options of `RecipeArguments`.

    Returns:
        The Trainer's log.
    """
    trainer = Seq2SeqDistillationTrainer(
        model=student,
        teacher=teacher,
        args=RecipeArguments(output_dir=str(folder), save_strategy="no", **options),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    return trainer.state.log_history
