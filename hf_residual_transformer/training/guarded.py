"""The Trainer that all others here extend: its checkpoints are whole and know their run, and it stops at values that
are not finite.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..folders import UNFINISHED, adopt
from ..speech.collators import LABEL_PADDING
from ..speech.datasets import clip_samples
from .checkpoints import RUN_FILE, check_run, check_steps, fault_of, last_checkpoint, run_of
from .rates import divide_shared_rates

BY_LENGTH = ("group_by_length", "batch_rebalance")  # sampling strategies of Trainer


class GuardedTrainer(Trainer):
    """A `Trainer` whose runs can be interrupted at any moment.

    Args:
        run_data: plain values that say which data the run reads. Its checkpoints remember them, and a run with others
            does not resume from these.
        divide_shared_rate: whether the learning rate of what `n` layers share is divided by the root of `n`; see
            `divide_shared_rates`.
        kwargs: the arguments of `Trainer`.

    Raises:
        ValueError: for several GPUs in one process, over which the losses here are no means, and for a divided rate
            beside an optimizer in `optimizers`.
    """

    args: Any
    model: Any

    def __init__(
        self,
        *args: Any,
        run_data: dict[str, Any] | None = None,
        divide_shared_rate: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"each process must use one GPU, got {self.args.n_gpu}; start one process for each GPU with "
                "`accelerate launch`, or name one GPU in CUDA_VISIBLE_DEVICES"
            )
        self.run_data = run_data
        if divide_shared_rate and self.optimizer is not None:
            raise ValueError("`divide_shared_rate` must be false beside an optimizer of one's own, got true")
        self.divide_shared_rate = divide_shared_rate
        self._remembered: dict[str, Any] = {}
        self._staging: Path | None = None

    def run_settings(self) -> dict[str, Any]:
        """What changes the result of a run beside its student, its data and the options of `Trainer`."""
        return {"divide_shared_rate": True} if self.divide_shared_rate else {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer as `Trainer` does, with smaller rates for what layers share if they are divided."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self.divide_shared_rate:
            try:
                divide_shared_rates(optimizer, self.model if model is None else model)
            except ValueError:
                self.optimizer = None
                raise
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as `Trainer` does. `resume_from_checkpoint` may be "last", the newest complete checkpoint.

        Raises:
            ValueError: for a checkpoint that is not complete or is another run's, and for a loss or gradient that is
                not finite, naming the step.
        """
        kwargs["resume_from_checkpoint"] = self._checked_checkpoint(
            kwargs.get("resume_from_checkpoint", args[0] if args else None)
        )
        return super().train(*args[1:], **kwargs)

    def _checked_checkpoint(self, checkpoint: Any) -> str | None:
        """The checkpoint to go on from, True or "last" being the newest complete one; another run's is refused."""
        self._remembered = run_of(self)
        if not checkpoint:
            return None
        folder = Path(str(self.args.output_dir))
        path = last_checkpoint(folder) if checkpoint in (True, "last") else Path(checkpoint)
        problem = fault_of(path)
        if problem is not None:
            raise ValueError(f"`resume_from_checkpoint` must be a complete checkpoint, got {path}: {problem}")
        check_run(path, self._remembered)
        check_steps(path, self.args.max_steps)
        return str(path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = self.lr_scheduler
        if checkpoint is not None and hasattr(scheduler, "lr_lambdas"):
            # The rate in the checkpoint is of its own length, and 0 at its end.
            rates = (
                base * rate(scheduler.last_epoch)
                for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)
            )
            optimizer: Any = self.optimizer
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves as `Trainer` does, into a folder that gets the checkpoint's name when it is complete. Only then is it
        pushed.
        """
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == name or (folder / best).is_dir()):
            self.state.best_model_checkpoint = str(folder / best)
        known_best = self.state.best_model_checkpoint
        self._staging = folder / f"_saving{UNFINISHED}"  # uploads leave out names with a leading "_"
        if self.args.should_save and self._staging.is_dir():
            shutil.rmtree(self._staging)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                new = self._staging / name
                self.state.best_model_checkpoint = known_best
                self.state.save_to_json(str(new / TRAINER_STATE_NAME))
                (new / RUN_FILE).write_text(json.dumps(self._remembered, indent=2) + "\n", encoding="utf-8")
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                adopt(new, folder / name)
                self._staging.rmdir()
                rotate_checkpoints(
                    output_dir=str(folder),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=known_best,
                )
        finally:
            self._staging = None
            self.state.best_model_checkpoint = known_best
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes as `Trainer` does, which asks for it before the checkpoint is complete, and then in vain."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The sampler that `Trainer` makes, which gets the number of samples where it asks for a clip's length."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy in BY_LENGTH and isinstance(dataset, (Dataset, list)):
            column = self.args.length_column_name
            names = dataset.column_names if isinstance(dataset, Dataset) else list(dataset[0])
            if "audio" in names and column not in names:
                dataset = Dataset.from_dict({column: clip_samples(dataset)})
        return super()._get_train_sampler(dataset)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Makes a step as `Trainer` does; a loss that is not finite is an error that names the batch."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite().all():
            self._stop("loss", loss.item(), self._texts_of(inputs))
        return loss

    def _texts_of(self, inputs: dict[str, Any]) -> list[str] | None:
        """The texts of a batch, to name it in an error; None where it has no labels, or where nothing decodes them."""
        labels, tokenizer = inputs.get("labels"), getattr(self.processing_class, "tokenizer", None)
        if labels is None or tokenizer is None:
            return None
        ids = labels.masked_fill(labels == LABEL_PADDING, tokenizer.pad_token_id)
        # Tokenizers for CTC would take equal neighbours, such as the two letters in "look", for one.
        texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True, group_tokens=False)
        return texts

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # With float16, the scaler leaves out a step whose gradients overflow, and lowers its scale.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            self._stop("gradient", float(norm))
        return norm

    def _stop(self, name: str, value: float, texts: list[str] | None = None) -> NoReturn:
        clips = f"{self.args.train_batch_size} clips" if texts is None else f"clips with the texts {texts}"
        raise ValueError(
            f"the {name} must be finite, got {value} in the batch of step {self.state.global_step + 1} ({clips}); the "
            "weights of this step are not saved. Lower the learning rate, look at these clips, and go on from the last "
            "checkpoint"
        )
