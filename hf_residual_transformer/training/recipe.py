"""The recipe of a short distillation, which `distill.py`, the demo and the comparison of methods use."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..families import WHISPER, family_of
from ..layers import quantized_weights
from ..modeling import ResidualMixin
from ..speech.collators import feature_extractor_of
from ..speech.transcription import transcribe
from ..speech.windows import PaddedWindowCollator, WindowCollator
from ..whisper import choose_windows, has_short_windows
from .arguments import DistillationArguments, RecipeArguments
from .trainers import (
    CTCDistillationTrainer,
    DistillationOutcome,
    DistillationTrainer,
    Seq2SeqDistillationTrainer,
    learns_decoder_alone,
)

WINDOW_SECONDS = 10.0
# Short windows start far from the teacher. Scales of few bits bear less than the rest (measured in docs/LOG.md).
SHORT_WINDOWS_RATE, SCALES_PART = 6e-5, 0.3
DECODER_RATE = 5e-5  # where the decoder learns alone (docs/LOG.md)
# Values of a config with which a student runs as its teacher does; the first three are Whisper's names.
WITHOUT_NOISE: dict[str, Any] = {
    "dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
}


def without_noise(config: Any) -> dict[str, Any]:
    """Those of `WITHOUT_NOISE` that a config has."""
    return {name: value for name, value in WITHOUT_NOISE.items() if hasattr(config, name)}


def is_whisper(config: Any) -> bool:
    """Whether a model to be trained is a Whisper, and not an encoder with CTC.

    Raises:
        ValueError: for other models.
    """
    if config.is_encoder_decoder and config.model_type != WHISPER.name:
        raise ValueError(
            f"`model` must be a Whisper or an encoder with CTC to be trained here, got a {config.model_type}; Trainer "
            "itself trains it as any model"
        )
    return bool(config.is_encoder_decoder)


def trainer_class_for(model: Any) -> type[DistillationTrainer]:
    """The Trainer that distils `model`, a Whisper or an encoder with CTC.

    Raises:
        ValueError: for other models.
    """
    return Seq2SeqDistillationTrainer if is_whisper(model.config) else CTCDistillationTrainer


def check_student(student: Any) -> None:
    """Checks that a model which is to be distilled is compact, or wraps one that is.

    Raises:
        ValueError: if it is not.
    """
    if not any(isinstance(module, ResidualMixin) for module in student.modules()):
        raise ValueError(
            f"`student` must be a compact model as from `hrt compress`, got a {type(student).__name__}"
        )


def default_learning_rate(student: Any, teacher: Any) -> float:
    """`learning_rate_for` the encoders of `student` and `teacher`; at least `SHORT_WINDOWS_RATE` for short windows, and
    `DECODER_RATE` where the decoder learns alone.
    """
    if learns_decoder_alone(student):
        return DECODER_RATE
    encoders = [family_of(student).find_encoder(model) for model in (student, teacher)]
    rate = learning_rate_for(relative_size(*encoders), mean_bits(student))
    return max(rate, SHORT_WINDOWS_RATE) if has_short_windows(student.config) else rate


def rates_for_short_windows(student: Any, learning_rate: float) -> dict[str, float] | None:
    """`learning_rates` of a student with short windows and weights in few bits; None for others."""
    if not has_short_windows(student.config) or mean_bits(student) is None:
        return None
    return {"shared": SCALES_PART * learning_rate}


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


def prepare_windows(
    student: Any, processor: Any, window_seconds: float | None, short_windows: bool
) -> WindowCollator:
    """The collator of a label-free distillation; with `short_windows`, the student gets an encoder that has them.

    Args:
        student: the model that learns.
        processor: its processor.
        window_seconds: length of the windows, by default `WINDOW_SECONDS`, or all that the model hears where its
            decoder learns alone.
        short_windows: whether the student is to have short windows. One that has them keeps them in any case.

    Raises:
        ValueError: if `short_windows` is true for a model that cannot have them, or beside `window_seconds`.
    """
    longest = getattr(feature_extractor_of(processor), "chunk_length", math.inf)
    if short_windows:
        if not hasattr(student.config, "short_windows"):
            raise ValueError(
                f"`short_windows` must be False for a {type(student).__name__}; a compact Whisper may have them"
            )
        student.config.short_windows = True
        choose_windows(student)
    if not has_short_windows(student.config):
        if window_seconds is None:
            window_seconds = longest if learns_decoder_alone(student) else min(WINDOW_SECONDS, longest)
        return WindowCollator(processor, window_seconds)
    if window_seconds is not None:
        raise ValueError(
            f"`window_seconds` must be None beside `short_windows`, which trains on all lengths, got {window_seconds}"
        )
    return PaddedWindowCollator(processor, longest)


def restore_windows(student: Any, outcome: DistillationOutcome, short_windows: bool) -> None:
    """Takes short windows from a student whose training is not kept, unless it had `short_windows` before."""
    if not outcome.is_kept and not short_windows and has_short_windows(student.config):
        student.config.short_windows = False
        choose_windows(student)


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
    validation: Any = None,
    **options: Any,
) -> DistillationOutcome:
    """Distils a model without labels. Where the loss on `validation` does not fall, the student stays as it was, unless
    `keep` is "always".

    Args:
        student: the model that learns.
        teacher: the dense model.
        rows: a list or data set of clips.
        folder: the folder for the Trainer's files.
        collator: makes batches of the clips.
        validation: clips that are not trained on, to decide whether the result is kept; None keeps it in any case.
        options: of `RecipeArguments`. No checkpoints are saved unless `save_strategy` is among them.
    """
    args = RecipeArguments(output_dir=str(folder), **{"save_strategy": "no", **options})
    rates = None if args.learning_rate is None else rates_for_short_windows(student, args.learning_rate)
    trainer = trainer_class_for(student)(
        model=student,
        teacher=teacher,
        args=args,
        distillation=DistillationArguments(learning_rates=rates),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collator,
    )
    trainer.train()
    return trainer.outcome
