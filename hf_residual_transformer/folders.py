"""Checks output folders before the work, fills them at once, saves processors and code into them, and counts the bytes
of weights.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

logger = logging.get_logger(__name__)
UNFINISHED = ".unfinished"  # the end of the name of a folder that is being filled
CHECKPOINTS = "checkpoint-*"
CODE = Path(__file__).with_name("remote.py")  # what opens a checkpoint that carries its code


def save_processor(processor: Any, folder: Path) -> None:
    """Saves the processor, and Whisper's table of English spellings, which transformers reads but does not save."""
    processor.save_pretrained(folder)
    spellings = getattr(getattr(processor, "tokenizer", None), "english_spelling_normalizer", None)
    if spellings:
        (folder / "normalizer.json").write_text(json.dumps(spellings, indent=2) + "\n", encoding="utf-8")


def save_code(folder: Path) -> None:
    """Copies the files that define the model into one flat folder, as `trust_remote_code` needs them."""
    for path in (CODE, *map(Path, get_relative_import_files(CODE))):
        shutil.copyfile(path, folder / path.name)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, whenever the process is killed."""
    new = path.with_name(path.name + UNFINISHED)
    with new.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def prepare_output_dir(path: str | Path, overwrite: bool, resume: bool = False) -> Path:
    """Refuses a folder that holds files unless `overwrite` or `resume` is true. The folder need not exist.

    It makes and deletes nothing, so that a run which fails leaves no empty folder. Files that are saved later replace
    files of the same name, and all others stay.

    Raises:
        FileExistsError: if the folder holds files and neither flag is set, or if `path` is a file.
        FileNotFoundError: if `resume` is set and the folder does not exist.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output folder {folder} is a file; name another")
    if resume and not folder.is_dir():
        raise FileNotFoundError(f"there is nothing to resume from: the output folder {folder} does not exist")
    if folder.is_dir() and next(folder.iterdir(), None) is not None and not (overwrite or resume):
        raise FileExistsError(
            f"the output folder {folder} already holds files; name another, or pass --overwrite"
        )
    return folder


def unfinished(folder: Path) -> Path:
    """The folder beside `folder` that is filled first.

    Its name is one that nobody chooses, since a killed run leaves it, and the next run deletes it.
    """
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}{UNFINISHED}")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`, and gives its files to `folder` when all are written.

    A folder that is not there yet, or is empty, is the new one under its final name: whenever the process is killed, it
    is either whole or not there. Where `folder` holds files, those of the new one replace files of the same name.
    """
    new = unfinished(folder)
    if new.is_dir():
        shutil.rmtree(new)  # of a run that was killed
    made = [parent for parent in new.parents if not parent.exists()]
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):  # where another process uses a parent by now
            for parent in made:
                parent.rmdir()
        raise
    adopt(new, folder)


def adopt(new: Path, folder: Path) -> None:
    """Gives the files of the finished folder `new` to `folder`, and removes `new`."""
    _flush(new)
    if not folder.is_dir() or next(folder.iterdir(), None) is None:
        os.replace(new, folder)
        return
    # Without its config, nothing loads a folder that is half old and half new.
    if (new / "config.json").is_file():
        (folder / "config.json").unlink(missing_ok=True)
    for path in sorted(new.rglob("*"), key=lambda path: (path.name == "config.json", path)):
        target = folder / path.relative_to(new)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)
    shutil.rmtree(new)


def _flush(folder: Path) -> None:
    """Waits until the files are on the disk, so that no name outlives its contents."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index of shards lists, which are beside it.

    Raises:
        ValueError: naming the index, if it cannot be read, or lists something else.
    """
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of shards ({error!r}); save or fetch the checkpoint again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(
                f"{index} must list files beside it, got {name!r}; save or fetch the checkpoint again"
            )
    return sorted(set(names))


def set_checkpoints_aside(folder: Path) -> None:
    """Renames the checkpoints of an earlier run, so that "last" cannot mean one of them."""
    old = [path for path in sorted(folder.glob(CHECKPOINTS)) if path.is_dir()]
    if not old:
        return
    aside = folder / next(
        f"earlier-run-{n}" for n in range(1, 10**6) if not (folder / f"earlier-run-{n}").exists()
    )
    aside.mkdir()
    for path in old:
        os.replace(path, aside / path.name)
    logger.warning(f"the {len(old)} checkpoints of an earlier run in {folder} are now in {aside}")


def require_space(folder: Path, num_bytes: int) -> None:
    """Checks before hours of work that the disk has room for the result.

    Raises:
        OSError: if the disk of `folder`, which need not exist, has fewer than `num_bytes` free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < max(num_bytes, 1):
        raise OSError(
            f"there are {free // 10**6:,} MB free for the output folder {folder}, and up to "
            f"{math.ceil(num_bytes / 1e6):,} MB will be written; make room, or name a folder on another disk"
        )


def file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a model's folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def model_bytes(model: Any) -> int:
    """Bytes of a model's weights in their present dtype, where tied weights count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
