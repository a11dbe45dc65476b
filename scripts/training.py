"""What the scripts that train have in common: the splits that they read, the run, and what it leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import DataArguments, model_bytes, require_space


@dataclass
class TrainingDataArguments(DataArguments):
    """Which recordings to train on, and which to compute the loss on."""

    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to compute the loss on at the end, and when --eval_strategy says so."},
    )
    shuffle_buffer: int = field(
        default=200, metadata={"help": "Clips among which the next is drawn when the data is streamed."}
    )

    def load_splits(self, processor: Any, seed: int, *, with_text: bool = True) -> tuple[Any, Any]:
        """The data to train on and to evaluate on, the latter None without `eval_split`."""
        rate = processor.feature_extractor.sampling_rate
        train = self.load(self.train_split, rate, with_text=with_text)
        if self.streaming:
            train = train.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        return train, self.eval_split and self.load(self.eval_split, rate, with_text=with_text)


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


def save_processor(processor: Any, folder: Path) -> None:
    """With Whisper's table of English spellings, which transformers reads, but does not save."""
    processor.save_pretrained(folder)
    spellings = getattr(getattr(processor, "tokenizer", None), "english_spelling_normalizer", None)
    if spellings:
        (folder / "normalizer.json").write_text(json.dumps(spellings, indent=2) + "\n", encoding="utf-8")


def read_json(name: str, text: str) -> Any:
    """What an option holds.

    Raises:
        ValueError: naming the option, for what is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON, got {text!r}") from error
