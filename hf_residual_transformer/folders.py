"""Checks output folders before the work, saves processors into them, and counts the bytes of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def save_processor(processor: Any, folder: Path) -> None:
    """Saves the processor, and Whisper's table of English spellings, which transformers reads but does not save."""
    processor.save_pretrained(folder)
    spellings = getattr(getattr(processor, "tokenizer", None), "english_spelling_normalizer", None)
    if spellings:
        (folder / "normalizer.json").write_text(json.dumps(spellings, indent=2) + "\n", encoding="utf-8")


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


def require_space(folder: Path, num_bytes: int) -> None:
    """Checks before hours of work that the disk has room for the result.

    Raises:
        OSError: if the disk of `folder`, which need not exist, has fewer than `num_bytes` free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            f"there are {free / 1e6:,.0f} MB free for the output folder {folder}, and up to "
            f"{num_bytes / 1e6:,.0f} MB will be written; make room, or name a folder on another disk"
        )


def file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a model's folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def model_bytes(model: Any) -> int:
    """Bytes of a model's weights in their present dtype, where tied weights count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
