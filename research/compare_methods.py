r"""Compares ways to make a Whisper encoder smaller, ours and published ones, at equal numbers of parameters.

    python research/compare_methods.py --model openai/whisper-base --budgets 0.25 0.34 0.43 0.5 0.6 0.7 \
        --distill_steps 60 --seeds 0 1 2 --output results/compare-base.json

This shorter run takes a few minutes on two cores:

    python research/compare_methods.py --model openai/whisper-tiny.en --budgets 0.5 --methods ours svd pca --no_wer \
        --max_test_clips 8 --max_validation_clips 8 --calibration_windows 4 --output outputs/compare-short.json

`baselines.py` describes the methods. All get the same dense model, the same calibration and, with --distill_steps, the
same distillation. Several numbers of steps give a distillation for each number, and plots over the steps. A budget is
the number of parameters of the encoder's layers relative to dense, or of bytes if some weights are quantised and all
others have 16 bits. A method meets it within 0.5 percentage points, or the results say why it does not.

The recordings are those in `sample/`. A multilingual model is tested on English and, on the test split, on Spanish,
which neither calibration nor distillation uses. With --train_data, both use that data set and none of the sample's
speakers. The word error rate says most, but it is coarse on a few hundred words. Therefore the script also measures the
divergence (KL) of the decoder's token distributions from the dense model's, given the transcript.

The script writes the file at `--output` after each result. If the file exists, the script does not compute results with
the same method, budget, seed and settings again, unless --redo names the method. At the end, it writes tables (.md) and
plots beside the file.
The first argument may instead be a JSON or YAML file with options by name.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from baseline_parts import Calibration, Unreachable, check_size, encoder_parameters
from baselines import METHODS
from common import SAMPLE
from compare_metrics import (
    CLIPS_AT_ONCE,
    Outputs,
    Row,
    deviation,
    encoding_once,
    outputs,
    word_errors,
)
from compare_results import DENSE, Result, ResultsFile, write_report
from pretrained import resolve_pretrained
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    WhisperForConditionalGeneration,
    set_seed,
)
from transformers.utils import logging

from hf_residual_transformer.folders import model_bytes
from hf_residual_transformer.provenance import portable
from hf_residual_transformer.speech.collators import batched, is_multilingual
from hf_residual_transformer.speech.datasets import load_speech_dataset
from hf_residual_transformer.speech.windows import WindowCollator, calibration_batches
from hf_residual_transformer.training.arguments import parse_args
from hf_residual_transformer.training.recipe import (
    WINDOW_SECONDS,
    TranscribingCollator,
    learning_rate_for,
    mean_bits,
    relative_size,
    short_distillation,
)

HEARD = ["en", "fr", "it", "ru"]  # in calibration and distillation; Spanish is for testing alone
MEASUREMENT = ("calibration_windows", "test_split", "max_test_clips", "max_validation_clips", "no_wer")
DISTILLATION = ("batch_size", "window_seconds")


@dataclass
class CompareArguments:
    """The settings of the comparison."""

    model: str = field(default="openai/whisper-base", metadata={"help": "Id or folder of a dense Whisper."})
    budgets: list[float] = field(
        default_factory=lambda: [0.25, 0.34, 0.43, 0.5, 0.6, 0.7],
        metadata={"help": "Parameters of the encoder's layers, relative to dense."},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}."}
    )
    distill_steps: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Steps of label-free distillation, for each number a run with a schedule of its own; by default "
            "the comparison is without training alone."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of the distillation's order of clips."}
    )
    batch_size: int = field(default=6, metadata={"help": "Clips a step, packed into windows."})
    window_seconds: float = field(
        default=WINDOW_SECONDS, metadata={"help": "Length of a window in distillation."}
    )
    calibration_windows: int = field(
        default=16,
        metadata={"help": "Windows to calibrate on, three of four full, the others with one clip."},
    )
    train_data: str | None = field(
        default=None,
        metadata={
            "help": "Data set whose split 'train' is calibrated and distilled on, in place of the sample's; "
            "transcripts are not read. Results are told apart by the last part of its name."
        },
    )
    test_split: list[str] = field(
        default_factory=lambda: ["test"],
        metadata={
            "help": "Splits to measure on: 'test_other' has a speaker that no other split has; choose settings on "
            "'validation'. Neither has Spanish."
        },
    )
    max_test_clips: int = field(
        default=73, metadata={"help": "Test on so many clips of each language, evenly spread."}
    )
    max_validation_clips: int = field(
        default=32, metadata={"help": "Validation clips for the error of the encoder's final states."}
    )
    no_wer: bool = field(default=False, metadata={"help": "Leave out transcription, which takes longest."})
    output: str = field(
        default="results/compare-base.json", metadata={"help": "File for the results; continued if there."}
    )
    redo: list[str] = field(
        default_factory=list,
        metadata={"help": "Methods whose results in the file are out of date, to be computed again."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Start the file anew."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to compute."}
    )

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.methods, *self.redo) if name not in METHODS]
        if unknown or not self.methods:
            raise ValueError(
                f"`methods` and `redo` must be of {', '.join(METHODS)}, got {' '.join(unknown) or 'none'}"
            )
        if not self.budgets or not all(0 < budget <= 1 for budget in self.budgets):
            raise ValueError(f"`budgets` must be above 0 and at most 1, got {self.budgets}")
        if not all(steps > 0 for steps in self.distill_steps) or (self.distill_steps and not self.seeds):
            raise ValueError(
                f"`distill_steps` must be at least 1 and with `seeds`, got {self.distill_steps} with {self.seeds}"
            )
        if not self.test_split or len(set(self.test_split)) < len(self.test_split):
            raise ValueError(f"`test_split` must be one or more different splits, got {self.test_split}")
        for name in ("max_test_clips", "max_validation_clips", "calibration_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if Path(self.output).suffix != ".json":
            raise ValueError(f"`output` must be a .json file, got {self.output!r}")

    def settings(self, steps: int = 0) -> dict[str, Any]:
        """The settings that a result depends on besides method, budget and seed.

        Those of distillation are left out if there is no training.
        """
        names = (*MEASUREMENT, *DISTILLATION) if steps else MEASUREMENT
        values = {name: value for name, value in asdict(self).items() if name in names}
        values["test_split"] = " ".join(self.test_split)
        if self.train_data:
            values["train_data"] = portable(self.train_data)
        return {"model": portable(self.model), **values} | ({"distill_steps": steps} if steps else {})


def spread(rows: Any, number: int) -> list[Row]:
    """Selects and decodes `number` rows, evenly spread."""
    number = min(number, len(rows))
    return list(rows.select([index * len(rows) // number for index in range(number)]))


class Comparison:
    """The data that all methods share: the dense model, the clips, and values that are computed from them once."""

    def __init__(self, args: CompareArguments) -> None:
        model_id = resolve_pretrained(args.model)
        self.args = args
        self.dense: Any = AutoModelForSpeechSeq2Seq.from_pretrained(model_id, dtype=torch.float32)
        model_class = type(self.dense)
        if model_class is not WhisperForConditionalGeneration:
            raise ValueError(f"`model` must be a dense Whisper, got a {model_class.__name__}")
        self.dense = self.dense.to(args.device).eval()
        self.teacher = copy.deepcopy(self.dense)  # which training freezes
        self.processor = AutoProcessor.from_pretrained(model_id)
        multilingual = is_multilingual(self.dense)
        languages = [None] if args.train_data else HEARD if multilingual else ["en"]
        source = {"data": args.train_data or SAMPLE, "text_column": None}
        self.heard = [row for language in languages for row in self.load("train", language, **source)]
        self.clips = {"validation": spread(self.load("validation", "en"), args.max_validation_clips)}
        for split in args.test_split:
            for language in ["en", "es"] if multilingual and split == "test" else ["en"]:
                rows = spread(self.load(split, language), args.max_test_clips)
                self.clips[f"{split}_{language}"] = rows
        shuffled = random.Random(0).sample(self.heard, len(self.heard))
        windows = calibration_batches(
            shuffled, self.processor, num_windows=args.calibration_windows, batch_size=1
        )
        self.calibration = Calibration(self.dense, windows)
        self.collator = TranscribingCollator(
            self.teacher, WindowCollator(self.processor, args.window_seconds)
        )

    def load(self, split: str, language: str | None, data: Any = SAMPLE, **options: Any) -> Any:
        """Loads the clips that fit into the model's window."""
        longest = self.processor.feature_extractor.chunk_length
        return load_speech_dataset(data, split, language=language, max_seconds=longest, **options)

    @cached_property
    def expected(self) -> dict[str, list[Outputs]]:
        """The dense model's outputs for all clips, by batch."""
        return {
            name: [outputs(self.dense, self.processor, batch) for batch in batched(rows, CLIPS_AT_ONCE)]
            for name, rows in self.clips.items()
        }

    def build(self, method: str, budget: float) -> tuple[Any, dict[str, float]]:
        """Builds a method's model, and returns it with the seconds that this took.

        Raises:
            Unreachable: the method has no model of that size.
        """
        chosen, seconds = METHODS[method], {"statistics": 0.0, "distillation": 0.0}
        if chosen.statistics:
            _ = self.calibration.statistics
            seconds["statistics"] = self.calibration.seconds
        set_seed(0)
        start = time.perf_counter()
        model = chosen.build(self.dense, self.calibration, budget).eval()
        check_size(encoder_parameters(model), self.dense, budget)
        return model, seconds | {"conversion": time.perf_counter() - start}

    def distil(self, student: Any, budget: float, steps: int, seed: int) -> None:
        """Distils a model in the same way for all methods."""
        args, bits = self.args, mean_bits(student)
        # Where nothing is quantised, `budget` exactly, so that the rate is the same for all.
        size = budget if bits is None else relative_size(student.get_encoder(), self.dense.get_encoder())
        with TemporaryDirectory() as folder:
            short_distillation(
                student,
                self.teacher,
                self.heard,
                Path(folder),
                collator=self.collator,
                per_device_train_batch_size=args.batch_size,
                max_steps=steps,
                learning_rate=learning_rate_for(size, bits),
                seed=seed,
                disable_tqdm=True,
                use_cpu=args.device == "cpu",
            )

    def evaluate(self, model: Any) -> Result:
        """The metrics on each set of clips, the number of parameters, and the bytes."""
        metrics: dict[str, dict[str, float]] = {}
        model.eval()
        for name, rows in self.clips.items():
            with encoding_once(model):
                found = deviation(model, self.processor, rows, self.expected[name])
                if name != "validation" and not self.args.no_wer:
                    found |= word_errors(model, self.processor, rows)
            metrics[name] = {"clips": len(rows), **found}
        unique, dense = encoder_parameters(model), encoder_parameters(self.dense)
        encoder = {"unique": unique, "dense": dense, "ratio": unique / dense}
        return {"encoder": encoder, "bytes": model_bytes(model), "metrics": metrics}


def compare(comparison: Comparison, results: ResultsFile, method: str, budget: float) -> None:
    """Computes the results of one method and budget that are not in the file yet."""
    args = comparison.args
    keys: list[dict[str, Any]] = [
        {"method": method, "budget": budget, "seed": seed, "settings": args.settings(steps)}
        for steps, seed in [(0, None), *product(args.distill_steps, args.seeds)]
    ]
    missing = [key for key in keys if method in args.redo or not results.find(**key)]
    if len(missing) < len(keys):
        tqdm.write(f"{method} at {budget:g}: {len(keys) - len(missing)} of {len(keys)} results are there")
    if not missing:
        return
    try:
        model, seconds = comparison.build(method, budget)
    except Unreachable as error:
        tqdm.write(f"{method} at {budget:g}: not reached, {error}")
        for key in missing:
            results.add(key | {"unreachable": str(error)})
        return
    for key in missing:
        student, took = model, dict(seconds)
        if key["seed"] is not None:
            student, start = copy.deepcopy(model), time.perf_counter()
            comparison.distil(student, budget, key["settings"]["distill_steps"], key["seed"])
            took["distillation"] = time.perf_counter() - start
        found = comparison.evaluate(student)
        results.add(key | found | {"seconds": took})
        steps = key["settings"].get("distill_steps", 0)
        tqdm.write(f"{method} at {budget:g}, {steps} steps, seed {key['seed']}: {found['metrics']}")


def main() -> None:
    (args,) = parse_args(CompareArguments)
    logging.set_verbosity_error()
    results = ResultsFile(Path(args.output), args.overwrite)
    comparison = Comparison(args)
    dense_key = {"method": DENSE, "budget": 1.0, "seed": None, "settings": args.settings()}
    if not results.find(**dense_key):
        none = dict.fromkeys(("statistics", "conversion", "distillation"), 0.0)
        results.add(dense_key | comparison.evaluate(comparison.dense) | {"seconds": none})
    (dense,) = results.find(**dense_key)
    print(f"dense: {dense['metrics']}")
    with tqdm(list(product(args.budgets, args.methods)), unit="model") as bar:
        for budget, method in bar:
            bar.set_description(f"{method} at {budget:g}")
            compare(comparison, results, method, budget)
    stages = {
        steps: [result for result in results.find(settings=args.settings(steps)) if result["method"] != DENSE]
        for steps in (0, *sorted(args.distill_steps))
    }
    write_report(results.path, f"{portable(args.model)}: methods at equal size", dense, stages)
    print(f"results in {results.path}, tables and plots beside it")


if __name__ == "__main__":
    main()
