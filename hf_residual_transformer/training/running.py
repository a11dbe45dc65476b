"""A run of a Trainer, and what it leaves in the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..folders import model_bytes, require_space, save_processor


def train_and_save(trainer: Any) -> None:
    """Trains, or goes on from `resume_from_checkpoint` ("last" is the newest in its folder), and leaves the
    model, its processor, the trainer's log and the results in the output folder.
    """
    # A checkpoint has the weights and two moments of the optimizer for each.
    copies = 1 if trainer.args.save_strategy == "no" else 4
    require_space(Path(trainer.args.output_dir), copies * model_bytes(trainer.model))
    checkpoint = trainer.args.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=True if checkpoint == "last" else checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        save_processor(trainer.processing_class, Path(trainer.args.output_dir))
