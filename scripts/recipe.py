"""The recipe of a short distillation: the default of `distill.py`, in the demo, and given to all methods that are
compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from hf_residual_transformer.data import WindowCollator
from hf_residual_transformer.distillation import Seq2SeqDistillationTrainer

WINDOW_SECONDS = 10.0


@dataclass
class RecipeArguments(Seq2SeqTrainingArguments):
    """Of the Trainer, with the recipe's own defaults."""

    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of linear warm-up, or below 1 their part of all steps."}
    )
    # The collator reads columns that no model does.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false here."})


def short_distillation(
    student: Any,
    teacher: Any,
    processor: Any,
    rows: Any,
    folder: Path,
    *,
    window_seconds: float = WINDOW_SECONDS,
    **options: Any,
) -> list[dict[str, Any]]:
    """Distils a Whisper without labels.

    Args:
        rows: a list or data set of clips.
        folder: for what the Trainer leaves.
        options: of `RecipeArguments`.

    Returns:
        The Trainer's log.
    """
    trainer = Seq2SeqDistillationTrainer(
        model=student,
        teacher=teacher,
        args=RecipeArguments(output_dir=str(folder), save_strategy="no", **options),
        train_dataset=rows,
        data_collator=WindowCollator(processor, window_seconds),
    )
    trainer.train()
    return trainer.state.log_history
