"""Checks output folders before the work, fills them at once, saves processors and code into them, and counts the bytes
of weights.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

logger = logging.get_logger(__name__)
UNFINISHED = ".unfinished"  # the end of the name of a folder that is being filled
REPLACED = "replaced.unfinished"  # in such a folder, the old files while the new ones take their places
PROBE = "_probe-"  # a file that is made to see whether a folder can be written; other processes may see it
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
    """Refuses a folder that holds files unless `overwrite` or `resume` is true, and one that cannot be written into.
    The folder need not exist.

    It makes and deletes nothing, so that a run which fails leaves no empty folder. Files that are saved later replace
    files of the same name, and all others stay. A warning names what an earlier run left that did not come to its end.

    Raises:
        FileExistsError: if the folder holds files and neither flag is set, or if `path` is a file.
        FileNotFoundError: if `resume` is set and the folder does not exist.
        OSError: if no file can be made in the folder, or in the nearest parent that exists.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output folder {folder} is a file; name another")
    if resume and not folder.is_dir():
        raise FileNotFoundError(f"there is nothing to resume from: the output folder {folder} does not exist")
    left = unfinished(folder)
    passing = (left.name, PROBE, ".nfs")  # the last are deleted files of a network's disk
    holds_files = folder.is_dir() and any(not path.name.startswith(passing) for path in folder.iterdir())
    if holds_files and not (overwrite or resume):
        raise FileExistsError(
            f"the output folder {folder} already holds files; name another, or pass --overwrite"
        )
    _require_writable(folder)
    if left.is_dir():
        logger.warning(
            f"{left} holds what an earlier run wrote before it was stopped, and may hold files that were to be "
            f"replaced; the next model that is written to {folder} deletes it, so move out what you want to keep"
        )
    return folder


def _require_writable(folder: Path) -> None:
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place, prefix=PROBE):
            pass
    except OSError as error:
        raise OSError(
            f"the output folder {folder} cannot be written, since {place} takes no new files ({error}); name "
            "another, or change the permissions"
        ) from error


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest of its parents that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def unfinished(folder: Path) -> Path:
    """The folder that is filled first: beside `folder`, which then appears by one renaming, or in `folder` where that
    exists, since it may be mounted, and nothing may be written beside it.

    Its name is one that nobody chooses, since a killed run leaves it, and the next run deletes it. Uploads to the Hub
    leave out names with a leading "_".
    """
    folder = folder.resolve()
    if folder.is_dir():
        return folder / f"_result{UNFINISHED}"
    return folder.with_name(f".{folder.name}{UNFINISHED}")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder, and gives its files to `folder` when all are written.

    A folder that is not there yet is the new one under its final name: whenever the process is killed, it is either
    whole or not there. Where `folder` exists, files of the new one replace files of the same name, as in `adopt`.
    """
    new = unfinished(folder)
    if new.is_dir():
        shutil.rmtree(new)  # of an earlier run, as `prepare_output_dir` said
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
    """Gives the files of the finished folder `new` to `folder`, and removes `new`.

    Files that are replaced stay in `new` until all others are in place, and go back if one of them cannot be moved.

    Raises:
        OSError: naming the file that cannot be moved. `new` keeps the whole result, and `folder` its old files.
    """
    _flush(new)
    if not folder.exists():
        os.replace(new, folder.resolve())
        return
    names = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    # Without its config, nothing loads a folder that is half old and half new: it goes first and comes last.
    names.sort(key=lambda name: (name.name == "config.json", name))
    old = [name for name in reversed(names) if (folder / name).is_file()]
    moves = [(folder / name, new / REPLACED / name) for name in old]
    moves += [(new / name, folder / name) for name in names]
    done = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append((source, target))
    except BaseException as error:
        for source, target in reversed(done):
            os.replace(target, source)
        if isinstance(error, OSError):
            raise OSError(
                f"{source} cannot be moved to {target} ({error}); {folder} is as it was, and the whole result is in "
                f"{new}: move it from there before the next run, which deletes it"
            ) from error
        raise
    shutil.rmtree(new, ignore_errors=True)  # a network's disk keeps old files that are still open


def _flush(folder: Path) -> None:
    """Waits until the files are on the disk, so that no name outlives its contents."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:  # Windows flushes no file that is open for reading alone
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
    """Renames the checkpoints of an earlier run, so that "last" cannot mean one of them, and no upload has them."""
    old = [path for path in sorted(folder.glob(CHECKPOINTS)) if path.is_dir()]
    if not old:
        return
    aside = folder / next(
        f"_earlier-run-{n}" for n in range(1, 10**6) if not (folder / f"_earlier-run-{n}").exists()
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
    free = shutil.disk_usage(_existing(folder)).free
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
