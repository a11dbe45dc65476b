"""What the command-line scripts share: reading options, guarding output folders, loading the data they name.

Losses, metrics and models are the package's business; a script parses, loads, calls the package and saves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser

from hf_residual_transformer.data import load_speech_dataset

# glibc keeps what is freed in pieces below a threshold that grows; fixed, it gives them back, as a device must.
FIXED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
SAMPLE = Path(__file__).resolve().parent.parent / "sample"


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows each option's default, and the script's docstring as it is written."""


@dataclass
class DataArguments:
    """Which recordings to read, and which of their columns. Splits are the script's own options."""

    dataset: str = field(
        default="sample",
        metadata={
            "help": "A Hub data set id, a local folder with metadata.csv (the audiofolder layout), a .csv, "
            ".jsonl or .parquet file, or 'sample' for the recordings in this repository."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set, such as 'en_us' of google/fleurs."}
    )
    dataset_revision: str | None = field(
        default=None,
        metadata={"help": "Revision of a Hub data set; 'refs/convert/parquet' for one of loose audio files."},
    )
    audio_column: str = field(
        default="audio",
        metadata={"help": "Column with the audio; in a table of files, 'file_name' is tried as well."},
    )
    text_column: str = field(
        default="text", metadata={"help": "Column with the transcripts, such as 'sentence' in Common Voice."}
    )
    language_column: str | None = field(
        default=None, metadata={"help": "Column with each clip's language; 'language' if there is one."}
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "Language as the data writes it, such as 'en'. Keeps only its clips where there is a "
            "language column, else says what all clips are in."
        },
    )
    source_sampling_rate: int | None = field(
        default=None,
        metadata={
            "help": "Sampling rate of the data in Hz. Needed only where rows hold bare arrays; files know "
            "theirs, and one that differs is an error. All is resampled to the model's rate."
        },
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "Leave out longer clips. Whisper reads 30 seconds at most."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Read only the first so many clips of a split."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read a data set while it downloads, keeping nothing on disk."}
    )

    def load(self, split: str, sampling_rate: int, *, with_text: bool = True) -> Dataset | IterableDataset:
        """One split, with the columns of `load_speech_dataset`; without text for label-free training."""
        return load_speech_dataset(
            SAMPLE if self.dataset == "sample" else self.dataset,
            split,
            config_name=self.dataset_config,
            revision=self.dataset_revision,
            streaming=self.streaming,
            audio_column=self.audio_column,
            text_column=self.text_column if with_text else None,
            language_column=self.language_column,
            language=self.language,
            sampling_rate=sampling_rate,
            source_sampling_rate=self.source_sampling_rate,
            max_seconds=self.max_seconds,
            max_samples=self.max_samples,
        )


def parse_args(*dataclass_types: Any, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One instance of each dataclass, from the command line (or `args`), with the script's docstring as help.

    The first argument may be a JSON or YAML file that holds options by name; options after it win. Values are
    read as on the command line, so that YAML's `1e-4`, which is a string, becomes a float.
    """
    parser = HfArgumentParser(
        list(dataclass_types),
        usage="%(prog)s [options.json | options.yaml] [--option value ...]",
        description=sys.modules["__main__"].__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    words = list(sys.argv[1:] if args is None else args)
    if words and not words[0].startswith("-"):
        try:
            words = _read_options(Path(words[0])) + words[1:]
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(str(error))
    *instances, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"there is no option {unknown[0]}; --help lists them all")
    return tuple(instances)


def _read_options(path: Path) -> list[str]:
    """The options in a JSON or YAML file as words of a command line."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(
            f"options start with '--', and a file of options ends in .json, .yaml or .yml; got {path}"
        )
    text = path.read_text(encoding="utf-8")
    options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options by name, got {type(options).__name__}")
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def prepare_output_dir(path: str | Path, overwrite: bool, resume: bool = False) -> Path:
    """Makes the folder `path`; one that holds files is refused unless `overwrite` or `resume` is true.

    Nothing is ever deleted: under `overwrite`, files of the same name are replaced, and others stay.

    Raises:
        FileExistsError: the folder holds files and neither flag is set, or `path` is a file.
        FileNotFoundError: `resume` is set, and there is no such folder.
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
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_space(folder: Path, num_bytes: int) -> None:
    """Finds a full disk before hours of work do.

    Raises:
        OSError: `folder` is on a disk with less than `num_bytes` free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"there are {free / 1e6:,.0f} MB free for the output folder {folder}, and up to "
            f"{num_bytes / 1e6:,.0f} MB will be written; make room, or name a folder on another disk"
        )


def environment_with_fixed_malloc() -> dict[str, str]:
    """This process's, where the C library is told to give back what is freed, not to keep it for speed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return own | FIXED_MALLOC


def json_of_fresh_process(
    command: Sequence[str], environment: Mapping[str, str], what: str
) -> dict[str, Any]:
    """The JSON in the last line that a script prints.

    Args:
        environment: the variables that it gets.
        what: the error says of a script that failed.
    """
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{what} in a fresh process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def file_bytes(folder: Path) -> int:
    """Of the weights in a model's folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def model_bytes(model: Any) -> int:
    """Of its weights in a file."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
