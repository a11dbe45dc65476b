"""The short distillation that the demo shows, and the comparison gives to all methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from hf_residual_transformer.data import WindowCollator
from hf_residual_transformer.distillation import DistillationArguments, Seq2SeqDistillationTrainer


def short_distillation(
    student: Any,
    teacher: Any,
    processor: Any,
    rows: Any,
    folder: Path,
    *,
    window_seconds: float,
    hidden_weight: float = 1.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """The label-free distillation of a Whisper that the demo shows and the comparison gives to all methods.

    Args:
        rows: a list or data set of clips.
        folder: for what the Trainer leaves.
        hidden_weight: 0 where the student's layers are not the teacher's.
        options: of `Seq2SeqTrainingArguments`.

    Returns:
        The Trainer's log.
    """
    trainer = Seq2SeqDistillationTrainer(
        model=student,
        teacher=teacher,
        distillation=DistillationArguments(hidden_weight=hidden_weight, final_weight=1.0),
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder),
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            save_strategy="no",
            remove_unused_columns=False,
            **options,
        ),
        train_dataset=rows,
        data_collator=WindowCollator(processor, window_seconds),
    )
    trainer.train()
    return trainer.state.log_history
