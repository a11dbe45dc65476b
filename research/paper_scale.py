"""What every run of a grid of `paper.py` has in common, from a YAML file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paper_cells import check_sizes, make_cells
from paper_checks import check_scale
from paper_models import ARCHITECTURES, Architecture
from transformers import Seq2SeqTrainingArguments

from hf_residual_transformer.training.arguments import read_options
from hf_residual_transformer.training.scratch import check_average


@dataclass(frozen=True)
class Scale:
    """What every run of a grid has in common, from a YAML file.

    Args:
        name: of the file.
        data: of each task: `words: {...}` for synthetic words, `sentences: {...}` for synthetic sentences, with
            arguments of `SpokenSentences` and the sizes of validation and test, or the options of
            `TrainingDataArguments`.
        model: what is trained, a key of `ARCHITECTURES`.
        sizes: of the dense model, as `ModelSizes` or `ParakeetSizes`; `sizes_of` has what differs by task.
        recipe: options of the Trainer.
        vocab_size, ctc_weight, average_checkpoints: as in `scripts/train_asr.py`; a Parakeet has no CTC.
        runs: cells and seeds by task, in the order in which they run.
    """

    name: str
    data: dict[str, dict[str, Any]]
    sizes: dict[str, Any]
    recipe: dict[str, Any]
    runs: list[dict[str, Any]]
    sizes_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: str = "whisper"
    vocab_size: int = 1024
    ctc_weight: float = 0.3
    average_checkpoints: int = 1

    @classmethod
    def read(cls, path: Path) -> Scale:
        """Reads a YAML file.

        Raises:
            ValueError: naming the field, for one that is missing, that a scale may not have, or that cannot be; most of
                `recipe` is up to `training_arguments`, since some of it depends on the machine.
        """
        try:
            scale = cls(name=path.stem, **read_options(path))
        except TypeError as error:
            raise ValueError(f"{path} must hold the fields of a scale: {error}") from error
        if scale.model not in [*ARCHITECTURES]:  # YAML may hold what cannot be a key
            raise ValueError(f"`model` must be one of {', '.join(ARCHITECTURES)}, got {scale.model!r}")
        check_scale(scale)
        return scale

    @property
    def architecture(self) -> Architecture:
        """What is trained."""
        return ARCHITECTURES[self.model]

    def sizes_for(self, task: str) -> Any:
        """The sizes of the dense model of a task."""
        return self.architecture.sizes_class(**self.sizes | self.sizes_of.get(task, {}))

    def settings(self, task: str) -> dict[str, Any]:
        """What makes the runs of a task beside cell and seed, as plain values. The sizes are of the dense model."""
        return {
            "model": self.model,
            "data": self.data[task],
            "sizes": asdict(self.sizes_for(task)),
            "vocab_size": self.vocab_size,
            "ctc_weight": self.ctc_weight,
            "average_checkpoints": self.average_checkpoints,
            "recipe": self.recipe,
        }

    def items_to_train_on(self) -> int:
        """How many synthetic clips a run reads, in all processes, so that none comes twice."""
        clips = self.recipe["max_steps"] * self.recipe["per_device_train_batch_size"]
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return int(clips * self.recipe.get("gradient_accumulation_steps", 1) * processes)

    def training_arguments(
        self, folder: Path, seed: int = 0, max_tokens: int | None = None
    ) -> Seq2SeqTrainingArguments:
        """The arguments of the Trainer of one run.

        Raises:
            ValueError: for an option in `recipe` that cannot be, or for `average_checkpoints` that it does not keep.
        """
        try:
            args = Seq2SeqTrainingArguments(
                output_dir=str(folder),
                seed=seed,
                remove_unused_columns=False,
                predict_with_generate=True,
                generation_max_length=max_tokens,
                report_to=[],
                **self.recipe,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"`recipe` must hold options of the Trainer: {error}") from error
        check_average(self.average_checkpoints, args)
        return args

    def all_runs(self) -> Iterator[tuple[str, str, int]]:
        """Task, cell and seed of each run, in order.

        Raises:
            ValueError: for a task or cell that does not exist, or whose sizes cannot be.
        """
        found = {task: make_cells(self.sizes_for(task)) for task in self.data}
        checked = set()
        for run in self.runs:
            if run["task"] not in [*found]:
                raise ValueError(f"`task` must be one of {', '.join(found)}, got {run['task']!r}")
            cells = found[run["task"]]
            for seed in run["seeds"]:
                for cell in run["cells"]:
                    if cell not in [*cells]:
                        raise ValueError(f"`cells` must be of {', '.join(cells)}, got {cell!r}")
                    if (run["task"], cell) not in checked:
                        checked.add((run["task"], cell))
                        check_sizes(cell, cells[cell], self.sizes_for(run["task"]))
                    yield run["task"], cell, seed
