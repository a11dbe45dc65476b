"""What commands share: options of data and training, files of options, and one line for what went wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

OPTION_FILES = (".json", ".yaml", ".yml")
# The models that research/pretrained.py makes from pinned packages.
PACKAGED_MODELS = ("openai/whisper-base", "openai/whisper-tiny.en")
TRAINER_OPTIONS = (
    "Trainer options: any option of transformers TrainingArguments may follow, e.g. --bf16; "
    "`--help-trainer` lists them"
)
# Options that hold JSON, of which null is a value and a list is one.
JSON_OPTIONS = ("bits", "group_size")
# Options of `load_speech_dataset` by the names that they have on the command line.
DATA_OPTIONS = {
    "config": "config_name",
    "revision": "revision",
    "streaming": "streaming",
    "audio_column": "audio_column",
    "language_column": "language_column",
    "source_sampling_rate": "source_sampling_rate",
    "max_seconds": "max_seconds",
    "max_samples": "max_samples",
    "outside_files": "outside_files",
}


def add_data_arguments(
    parser: argparse.ArgumentParser, *, split: str, texts: str | None = None, required: bool = True
) -> Any:
    """The group of options that say which recordings are read; `texts` says what transcripts are for."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--audio", required=required, metavar="DATA", help="folder or table of recordings, or data set id"
    )
    group.add_argument("--split", default=split, help=f"split of the data (default: {split})")
    group.add_argument("--language", help="such as en; other clips are left out")
    if texts is not None:
        group.add_argument("--text-column", default="text", metavar="NAME", help=texts)
    group.add_argument("--config", metavar="NAME", help="configuration of a data set on the Hub")
    group.add_argument("--revision", metavar="NAME", help="revision of a data set on the Hub")
    group.add_argument("--audio-column", metavar="NAME", help="column with the audio (default: audio)")
    group.add_argument("--language-column", metavar="NAME", help="column with each clip's language")
    group.add_argument(
        "--source-sampling-rate", type=int, metavar="HZ", help="sampling rate of rows with bare arrays"
    )
    group.add_argument("--max-seconds", type=float, metavar="S", help="leave out longer clips")
    group.add_argument("--max-samples", type=int, metavar="N", help="read only the first N clips")
    group.add_argument("--streaming", action="store_true", help="read while downloading, keeping nothing")
    group.add_argument(
        "--outside-files",
        action="store_true",
        help="let a table that you trust name URLs and files outside of its folder",
    )
    return group


def add_output_arguments(group: Any, what: str, *, required: bool = True) -> None:
    """Where the results go. Spelt as in TrainingArguments too, whose `output_dir` it stands for."""
    group.add_argument(
        "--out", "--output-dir", dest="output_dir", required=required, metavar="DIR", help=what
    )
    group.add_argument("--overwrite", action="store_true", help="write into a folder that holds files")


def was_given(value: Any) -> bool:
    """Whether an option was given, be it 0, which equals False."""
    return value is not None and value is not False


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `load_speech_dataset` that were given."""
    given = {keyword: getattr(args, name) for name, keyword in DATA_OPTIONS.items()}
    return {keyword: value for keyword, value in given.items() if was_given(value)}


def described_data(args: argparse.Namespace, portable: Any) -> dict[str, Any]:
    """The data as it is written beside a figure."""
    return {
        "dataset": portable(args.audio),
        "dataset_is_path": Path(args.audio).exists(),
        "split": args.split,
        "language": args.language,
        **data_options(args),
    }


def training_data(args: argparse.Namespace, arguments: Any) -> Any:
    """`arguments`, a class such as `TrainingDataArguments`, with the options that were given."""
    options = data_options(args)
    if "config_name" in options:
        options["dataset_config"] = options.pop("config_name")
    if "revision" in options:
        options["dataset_revision"] = options.pop("revision")
    for name in ("eval_split", "shuffle_buffer"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return arguments(
        dataset=args.audio,
        train_split=args.split,
        language=args.language,
        text_column=args.text_column,
        **options,
    )


def expand(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words of a command line with options spelt by hyphens, and a leading file of options read."""
    words = list(words)
    if words and words[0].endswith(OPTION_FILES):
        words = _words_of_file(parser, Path(words[0])) + words[1:]
    return [_hyphenated(word) for word in words]


def _hyphenated(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _words_of_file(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The options in a JSON or YAML file as words; what has no `--` on the command line comes first."""
    from hf_residual_transformer.training.arguments import read_options

    positional, words = [], []
    for name, value in read_options(path).items():
        if name in ("model", "student"):
            positional.append(str(value))
        elif name.replace("-", "_") in JSON_OPTIONS and not isinstance(value, str):
            words.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, bool) and parser.get_default(name.replace("-", "_")) is False:
            words += [f"--{name}"] if value else []
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return positional + words


def parse(command: ModuleType, parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """What was given; for a command that trains, with the Trainer's options as `training_args`."""
    trains = getattr(command, "TRAINS", False)
    if not trains or "-h" in words or "--help" in words:
        return parser.parse_args(words)
    from hf_residual_transformer.api import require_extra

    require_extra("train")
    from transformers import HfArgumentParser

    both = HfArgumentParser(
        command.trainer_arguments(),
        prog=parser.prog,
        usage=f"{parser.usage} [Trainer options]",
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    if "--help-trainer" in words:
        both.print_help()
        raise SystemExit(0)
    command.add_arguments(both)
    training_args, *rest, unknown = both.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        both.error(f"there is no option {unknown[0]}; --help and --help-trainer list them all")
    (args,) = rest
    args.training_args = training_args
    return args


@contextmanager
def no_empty_folder(args: argparse.Namespace) -> Iterator[None]:
    """Around a command: if it fails before it has written a file, the folders that it made are removed again. A Trainer
    makes its folder early.
    """
    output_dir = getattr(getattr(args, "training_args", args), "output_dir", None)
    folders = [] if output_dir is None else [Path(output_dir), *Path(output_dir).parents]
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def explain(error: Exception, words: Sequence[str]) -> str:
    """One line for an error, and the way without a hub where there is one."""
    text = " ".join(str(error).split())
    if "Repo id must" in text:
        return f"there is no such folder, and no model or data set on the Hub can have this name: {text}"
    if isinstance(error, OSError) and "huggingface.co" in text:
        for name in PACKAGED_MODELS:
            if any(name in word for word in words):
                return (
                    f"{name} cannot be loaded from the Hub. Without a hub, `python research/pretrained.py {name}` in "
                    "a clone of the repository prints a folder with the same weights from pinned packages; name that "
                    "folder instead"
                )
        return f"a model or data set cannot be loaded from the Hub: {text}"
    return text
