"""The options of the scripts that train, as dataclasses, and how a command line is read."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.utils import logging

from ..speech.datasets import load_speech_dataset
from .losses import is_number

logger = logging.get_logger(__name__)
VALIDATION = "validation"
VALIDATION_CLIPS = 48
Keep = Literal["better", "always"]
LOSSES = ("hidden", "final", "logits", "labels")
LEARNING_RATES = ("shared", "lora", "diagonal", "rest")


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
    outside_files: bool = field(
        default=False,
        metadata={"help": "Let a table that you trust name URLs and files outside of its folder."},
    )

    def load(self, split: str, sampling_rate: int, *, with_text: bool = True) -> Dataset | IterableDataset:
        """One split, with the columns of `load_speech_dataset`; without text for label-free training."""
        return load_speech_dataset(
            self.dataset,
            split,
            config_name=self.dataset_config,
            revision=self.dataset_revision,
            streaming=self.streaming,
            outside_files=self.outside_files,
            audio_column=self.audio_column,
            text_column=self.text_column if with_text else None,
            language_column=self.language_column,
            language=self.language,
            sampling_rate=sampling_rate,
            source_sampling_rate=self.source_sampling_rate,
            max_seconds=self.max_seconds,
            max_samples=self.max_samples,
        )


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
        return train, self.load_eval_split(rate, with_text)

    def load_eval_split(self, sampling_rate: int, with_text: bool) -> Any:
        """The data to evaluate on, None without `eval_split`."""
        return self.eval_split and self.load(self.eval_split, sampling_rate, with_text=with_text)


@dataclass
class ScratchArguments:
    """What every script that trains from scratch takes, beside data, sizes and the Trainer's options."""

    residual: str | None = field(
        default=None,
        metadata={"help": "Fields of `ResidualConfig` as JSON; without it, the model is dense."},
    )
    average_checkpoints: int = field(
        default=1, metadata={"help": "The model is the mean of the last so many checkpoints."}
    )
    divide_shared_rate: bool = field(
        default=False,
        metadata={
            "help": "Divide the learning rate of what n layers share by the root of n; where a deep encoder stops "
            "learning, try it, a lower rate, or a longer warm-up."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that already holds files."})


@dataclass
class FrameScratchArguments(ScratchArguments):
    """The same for models that write a text along their frames, whose transcripts may be respelt."""

    text_case: Literal["keep", "upper", "lower"] = field(
        default="keep", metadata={"help": "Case that transcripts are changed to."}
    )
    remove: str = field(
        default="", metadata={"help": "Regular expression of what is then removed from transcripts."}
    )


@dataclass
class DistillationDataArguments(TrainingDataArguments):
    """Which recordings to train on, and which to decide on whether the result is kept."""

    eval_split: str | None = field(
        default="auto",
        metadata={
            "help": "Split whose loss decides whether the result is kept, or 'none'. 'auto' is up to "
            f"{VALIDATION_CLIPS} clips of the split 'validation' if there is one."
        },
    )

    def load_eval_split(self, sampling_rate: int, with_text: bool) -> Any:
        """The data to decide on; None where nothing decides, and where "auto" finds no clips, which it says."""
        if self.eval_split == "none":
            return None
        if self.eval_split != "auto":
            return super().load_eval_split(sampling_rate, with_text)
        try:
            if self.train_split == "all" or VALIDATION in self.train_split:
                raise ValueError(f"the split {self.train_split!r} is trained on")
            clips = self.load(VALIDATION, sampling_rate, with_text=with_text)
            if isinstance(clips, IterableDataset):
                clips = clips.take(VALIDATION_CLIPS)
                next(iter(clips))
                return clips
        except (ValueError, StopIteration) as problem:
            logger.warning(
                "the distilled weights are saved whether they are better or not, since there are no validation clips "
                f"to decide on: {str(problem) or 'the split is empty'}"
            )
            return None
        number = min(VALIDATION_CLIPS, len(clips))
        return clips.select([index * len(clips) // number for index in range(number)])


@dataclass
class DistillationArguments:
    """What the student's loss is made of. A weight of 0 leaves a loss out, and what only it needs is not run. The
    defaults are what a short distillation gains most by: docs/LOG.md has the measurements.

    Raises:
        ValueError: naming the field, what it must be, and what it was.
    """

    hidden_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the squared error of every encoder layer's output, relative to the variance "
            "of the teacher's, mean over layers. Needs no labels."
        },
    )
    final_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the same error of the encoder's last output alone. Needs no labels."},
    )
    logits_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the divergence from the teacher's probabilities. With Whisper they are those "
            "of transcripts, or without labels_weight, of what the teacher makes of the audio."
        },
    )
    labels_weight: float = field(
        default=0.0, metadata={"help": "Weight of the model's own loss on the transcripts."}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Softens the probabilities that logits_weight is about; 1 does not. By default 2, or 1 where the "
            "decoder learns alone, as it does without labels where all parts of the student have few bits."
        },
    )
    learning_rates: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Learning rates that differ from --learning_rate, as JSON, such as '{\"shared\": 1e-5}': "
            "for 'shared' (U, or its scales), 'lora' (A and B), 'diagonal' (D, and the biases of shared matrices), "
            "'rest'."
        },
    )

    def __post_init__(self) -> None:
        names = [f"{name}_weight" for name in LOSSES]
        for name in names:
            if not is_number(getattr(self, name)):
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)!r}")
        if not self.weights:
            raise ValueError(f"one of {', '.join(names)} must be above 0, got 0 for all")
        if self.temperature is not None and (not is_number(self.temperature) or self.temperature == 0):
            raise ValueError(f"`temperature` must be a number above 0, got {self.temperature!r}")
        if isinstance(self.learning_rates, str):
            try:
                self.learning_rates = json.loads(self.learning_rates)
            except json.JSONDecodeError as error:
                raise ValueError(f"`learning_rates` must be JSON, got {self.learning_rates!r}") from error
        rates = {} if self.learning_rates is None else self.learning_rates
        if not isinstance(rates, dict) or not all(
            name in LEARNING_RATES and is_number(rate) for name, rate in rates.items()
        ):
            raise ValueError(
                f"`learning_rates` must be numbers of at least 0, by {', '.join(LEARNING_RATES)}, got {rates}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weights above 0, by "hidden", "final", "logits" and "labels"."""
        return {name: weight for name in LOSSES if (weight := getattr(self, f"{name}_weight")) > 0}


@dataclass
class RecipeArguments(Seq2SeqTrainingArguments):
    """The Trainer's arguments, with the recipe's own defaults."""

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Peak learning rate; by default what suits a few hundred steps for the size of the student's "
            "encoder relative to the teacher's, 1e-5 at 0.7, 3.6e-5 at 0.5, 1e-4 at 0.34, or for its bits, "
            "3e-6 with four, 1e-5 with three."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of linear warm-up, or below 1 their part of all steps."}
    )

    keep: Keep = field(
        default="better",
        metadata={
            "help": "What is kept where there are clips to evaluate on: with 'better', the trained weights only if "
            "the loss on these clips falls, otherwise those from before; with 'always', the trained weights."
        },
    )

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise ValueError(f"`keep` must be one of {', '.join(get_args(Keep))}, got {self.keep!r}")
        super().__post_init__()
        self.remove_unused_columns = False  # the collator reads columns that no model does


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
            words = _as_words(read_options(Path(words[0]))) + words[1:]
        except (OSError, ValueError) as error:
            parser.error(str(error))
    *instances, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"there is no option {unknown[0]}; --help lists them all")
    return tuple(instances)


def read_options(path: Path) -> dict[str, Any]:
    """The options by name that a JSON or YAML file holds.

    Raises:
        ValueError: for a file of another kind, one that cannot be parsed, or one that holds something else.
    """
    import yaml

    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(
            f"options start with '--', and a file of options ends in .json, .yaml or .yml; got {path}"
        )
    text = path.read_text(encoding="utf-8")
    try:
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as options: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options by name, got {type(options).__name__}")
    return options


def _as_words(options: dict[str, Any]) -> list[str]:
    """Options by name as words of a command line."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def warn_of_slow_bfloat16(args: Any) -> None:
    """Says so where `TrainingArguments` ask for bfloat16 on a processor that has no fast products in it.

    On an x86 processor with AVX2 alone, PyTorch takes about ten times as long for them as in float32 (docs/LOG.md).
    """
    if args.bf16 and args.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning(
            "`bf16` makes this training several times slower, since the processor has AVX2 and no fast products in "
            "bfloat16: leave `--bf16` out"
        )


def read_json(name: str, text: str) -> Any:
    """What an option holds.

    Raises:
        ValueError: naming the option, for what is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON, got {text!r}") from error
