"""Checkpoints of a run: which are complete, which run they belong to, and how many bytes they will take."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from ..folders import CHECKPOINTS, shards_of

logger = logging.get_logger(__name__)
RUN_FILE = "run.json"
ALWAYS = ("optimizer.pt", "scheduler.pt")
# How long a run is: a longer one may go on from a checkpoint.
LENGTHS = ("options.max_steps", "options.num_train_epochs")
# The Trainer's options that change what a run computes; others, such as how often it logs, may differ in a resumed run.
OPTIONS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


def run_of(trainer: Any) -> dict[str, Any]:
    """What a checkpoint remembers of its run, as plain values: the student before its first step and how many of its
    parameters learn, its teacher, data and options.
    """
    data, teacher = trainer.train_dataset, getattr(trainer, "teacher", None)
    run = {
        "student": _digest(trainer.model),
        "teacher": None if teacher is None else _digest(teacher),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "data": {"clips": len(data) if hasattr(data, "__len__") else None, **(trainer.run_data or {})},
        "losses": trainer.run_settings(),
        "options": {name: getattr(trainer.args, name, None) for name in OPTIONS},
    }
    plain: dict[str, Any] = json.loads(json.dumps(run, default=str))
    return plain


def _digest(model: Any) -> str:
    """What tells apart models by their weights; of tensors in the form of another library, names and shapes count."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        is_plain: bool = type(value) is torch.Tensor and not value.is_quantized
        if is_plain:
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(str(getattr(value, "shape", None)).encode())
    return digest.hexdigest()


def check_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Refuses the checkpoint of another run. A run that becomes longer or shorter is the same, which a warning says.

    Raises:
        ValueError: naming the first thing that differs.
    """
    path = checkpoint / RUN_FILE
    if not path.is_file():
        logger.warning(
            f"{checkpoint} does not say which run it belongs to, so that nobody can tell if it is this one"
        )
        return
    theirs, ours = flat(json.loads(path.read_text(encoding="utf-8"))), flat(run)
    for name in {**theirs, **ours}:
        if theirs.get(name) == ours.get(name):
            continue
        if name in LENGTHS:
            logger.warning(
                f"{checkpoint} is of a run whose {name} was {theirs.get(name)!r}, and now is {ours.get(name)!r}: the "
                "learning rate follows the new length from here on, so that the result is not that of one run of this "
                "length"
            )
        else:
            raise ValueError(
                f"{checkpoint} belongs to another run: its {name} is {theirs.get(name)!r}, and that of this run is "
                f"{ours.get(name)!r}; give the same student, teacher, data and options, or start anew with --overwrite "
                "and without --resume_from_checkpoint"
            )


def check_steps(checkpoint: Path, max_steps: int) -> None:
    """Refuses a checkpoint that is further than a run is to go.

    Raises:
        ValueError: naming both numbers of steps.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if 0 < max_steps < state["global_step"]:
        raise ValueError(
            f"`max_steps` must be at least {state['global_step']}, the steps of {checkpoint}, got {max_steps}; name an "
            "earlier checkpoint, or more steps"
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts, each by the path to it, as in "options.seed"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints of a run, complete or not, the oldest first."""
    found = [
        path for path in folder.glob(CHECKPOINTS) if path.name.rpartition("-")[2].isdigit() and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint in `folder`; a half one that is newer is named and skipped.

    Raises:
        ValueError: if there is none.
    """
    for path in reversed(checkpoints_in(folder)):
        problem = fault_of(path)
        if problem is None:
            return path
        logger.warning(f"{path} is not complete, and is skipped: {problem}")
    raise ValueError(
        f"`resume_from_checkpoint` must not be set, since no checkpoint in {folder} is complete; start anew with "
        "--overwrite and without --resume_from_checkpoint"
    )


def fault_of(checkpoint: Path, weights_alone: bool = False) -> str | None:
    """What a checkpoint lacks to go on from, or with `weights_alone` to be loaded; None if it is complete."""
    try:
        _check_weights(checkpoint)
        if not weights_alone:
            _check_state(checkpoint)
    except FileNotFoundError as error:
        return f"a file is missing ({error})"
    except Exception as error:  # damage can break anything in the readers
        return f"a file is cut or broken ({error})"
    return None


def _check_weights(checkpoint: Path) -> None:
    names = [path.name for path in checkpoint.glob("*.safetensors")]
    for index in checkpoint.glob("*.safetensors.index.json"):
        names += shards_of(index)
    for name in sorted(set(names)) or ["model.safetensors"]:
        with safe_open(checkpoint / name, framework="pt") as tensors:
            tensors.keys()


def _check_state(checkpoint: Path) -> None:
    step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    named = checkpoint.name.rpartition("-")[2]
    if named.isdigit() and step != int(named):
        raise ValueError(f"{TRAINER_STATE_NAME} is of step {step!r}")
    run = checkpoint / RUN_FILE
    if run.exists() and not isinstance(json.loads(run.read_text(encoding="utf-8")), dict):
        raise ValueError(f"{RUN_FILE} is of no run")
    needed = set() if _has_sharded_state(checkpoint) else {checkpoint / name for name in ALWAYS}
    for path in {*needed, *checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")}:
        with zipfile.ZipFile(path) as archive:  # in which torch saves, with a checksum for each tensor
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path.name} does not have its checksum at {damaged!r}")
        with safe_globals():
            torch.load(path, map_location="meta", weights_only=True)  # reads all but the tensors


def _has_sharded_state(checkpoint: Path) -> bool:
    """Whether FSDP or DeepSpeed saved the optimizer in folders of its own."""
    return any(path.is_dir() for path in checkpoint.iterdir())


def bytes_to_write(trainer: Any, weights: int) -> int:
    """The most bytes that a run has on the disk at once: its result, and its checkpoints with two moments of the
    optimizer for each trained weight.
    """
    args = trainer.args
    trained = sum(value.nbytes for value in trainer.model.parameters() if value.requires_grad)
    each = weights if args.save_only_model else weights + 2 * trained
    return weights + _checkpoints_at_once(trainer) * each


def _checkpoints_at_once(trainer: Any) -> int:
    args = trainer.args
    steps, epochs = args.max_steps, math.ceil(args.num_train_epochs)
    if hasattr(trainer.train_dataset, "__len__"):
        batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        in_epoch = max(1, math.ceil(len(trainer.train_dataset) / batch))
        epochs = math.ceil(steps / in_epoch) if steps > 0 else epochs
        steps = steps if steps > 0 else math.ceil(args.num_train_epochs * in_epoch)
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no" or steps <= 0:
        return 0 if strategy == "no" else 1
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    saves = {"steps": math.ceil(steps / every), "epoch": epochs}.get(strategy, 1)
    # A new one is complete before the oldest goes.
    limit = args.save_total_limit
    return int(min(saves, limit + 1) if limit and limit > 0 else saves)
