r"""Measures the time and memory that a residual model takes to run, train and load, against a dense model of its shape.

    python research/benchmark.py --size base --group_size 3 --rank 16 --threads 2 --output results/benchmark.json

This shorter run takes about a minute on a CPU:

    python research/benchmark.py --size tiny --seconds 10 --repeats 5 --few_repeats 3 \
        --what encoder streaming training memory --output outputs/benchmark-short.json

Weights are random, because speed does not depend on them. Both models take turns in one process. A ratio is the median
over the pairs of neighbouring runs, and its spread is their interquartile range. A result is "undecided" if the spread
exceeds the distance from the goal. Memory and loading are measured in fresh processes that hold only the encoder. The
script writes the file at `--output` and a table beside it (.md) after each result, and plots at the end. The first
argument may instead be a JSON or YAML file with options by name.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from benchmark_model import (
    ENCODERS,
    PEAK,
    SIZES,
    STATE,
    WEIGHTS,
    Shape,
    encoder_of,
    random_inputs,
    run_encoder,
    training_step,
)
from benchmark_results import SCALING, Comparison, Goal, plot_memory, plot_ratios, table
from common import FIXED_MALLOC, json_of_fresh_process
from tqdm.auto import tqdm
from transformers.utils import logging

import hf_residual_transformer as hrt
from hf_residual_transformer.folders import file_bytes
from hf_residual_transformer.provenance import provenance
from hf_residual_transformer.training.arguments import parse_args, read_json

OF_DECODER = ("generate", "token")
PROMPT = 8  # tokens
REPEAT_SECONDS = 0.1  # Shorter calls are timed several at once.
ALLOCATORS = {"": {}, ", fixed malloc threshold": FIXED_MALLOC}
Calls = Mapping[str, Callable[[], Any]]
Pair = dict[str, Any]  # What is passed on as `dense` and `residual`.


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    size: str = field(default="base", metadata={"help": f"Shape of the model: {', '.join(SIZES)}."})
    layers: int | None = field(default=None, metadata={"help": "Other number of layers than the size has."})
    width: int | None = field(default=None, metadata={"help": "Other width than the size has."})
    group_size: str = field(
        default="3", metadata={"help": "As in `hrt compress`: layers a group (K), 'null', or JSON by module."}
    )
    rank: int = field(default=16, metadata={"help": "Rank of what each layer adds (R)."})
    diagonal: Literal["none", "square", "all"] = field(
        default="square", metadata={"help": "Which matrices also get a diagonal of their own."}
    )
    residual_config: str | None = field(
        default=None, metadata={"help": "All settings, as JSON; the three options before then do not count."}
    )
    device: str = field(default="cpu", metadata={"help": "Where to compute, such as 'cpu' or 'cuda'."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of weights and inputs."}
    )
    dense_dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "Of the dense model, where it is another than --dtype."}
    )
    batch_size: int = field(default=1, metadata={"help": "Recordings at a time; streamed chunks come alone."})
    seconds: list[float] = field(
        default_factory=lambda: [30.0],
        metadata={"help": "Lengths of the recordings to encode. The longest is what everything else takes."},
    )
    chunk_seconds: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Lengths of streamed chunks, at most 1."}
    )
    new_tokens: int = field(default=32, metadata={"help": "Tokens to generate."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch's choice."})
    repeats: int = field(default=15, metadata={"help": "Pairs of runs for each ratio."})
    few_repeats: int = field(default=5, metadata={"help": "The same for scaling, and for loading."})
    what: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts to measure: encoder, streaming, training, generate and token (Whisper), memory, loading, "
            "scaling, compile; by default all that there are."
        },
    )
    scaling: str = field(
        default=json.dumps(SCALING),
        metadata={"help": "What varies, one at a time, and the values that it takes, as JSON."},
    )
    output: str = field(default="results/benchmark.json", metadata={"help": "File for all figures."})
    plots: str = field(default="results", metadata={"help": "Folder for the plots, named like the output."})

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {self.size!r}")
        shape = SIZES[self.size]
        others: dict[str, Any] = {"layers": self.layers, "width": self.width}
        self.shape = replace(shape, **{name: value for name, value in others.items() if value is not None})
        known = [part for part in PARTS if part not in OF_DECODER or shape.family == "whisper"]
        self.what = known if self.what is None else self.what
        for part in self.what:
            if part not in known:
                raise ValueError(f"`what` must be of {', '.join(known)} for {self.size}, got {part!r}")
        self.residual = (
            hrt.ResidualConfig.from_dict(read_json("residual_config", self.residual_config))
            if self.residual_config
            else hrt.ResidualConfig(
                read_json("group_size", self.group_size), self.rank, diagonal=self.diagonal
            )
        )
        self.varied = read_json("scaling", self.scaling)
        is_known = isinstance(self.varied, dict) and self.varied.keys() <= SCALING.keys()
        if not is_known or not all(isinstance(values, list) for values in self.varied.values()):
            raise ValueError(f"`scaling` must be lists of values by {', '.join(SCALING)}, got {self.scaling}")
        most = {"seconds": 30.0 if shape.family == "whisper" else float("inf"), "chunk_seconds": 1.0}
        for name, limit in most.items():
            for length in getattr(self, name):
                if not 0.1 <= length <= limit:
                    raise ValueError(f"`{name}` must be from 0.1 to {limit}, got {length}")
        least = {"batch_size": 1, "new_tokens": 1, "threads": 1, "repeats": 2, "few_repeats": 2}
        for name, limit in least.items():
            if getattr(self, name) is not None and getattr(self, name) < limit:
                raise ValueError(f"`{name}` must be at least {limit}, got {getattr(self, name)}")

    @property
    def longest(self) -> float:
        """The length of the recordings, in seconds, for all parts without lengths of their own."""
        return max(self.seconds)

    @property
    def title(self) -> str:
        """Describes the compared models, for the table and the plots."""
        residual = self.residual
        rank = "by matrix" if residual.rank_pattern else residual.rank
        settings = f"K={json.dumps(residual.group_size)}, R={rank}, diagonal {residual.diagonal}"
        size = self.size if self.shape == SIZES[self.size] else f"{self.shape.layers} x {self.shape.width}"
        dtypes = (
            self.dtype
            if self.dense_dtype in (None, self.dtype)
            else f"{self.dtype}, dense {self.dense_dtype}"
        )
        return f"{size}, {settings}; {self.device}, {dtypes}, batch {self.batch_size}"


GOALS = {
    "encoder": Goal(1.02),
    "training": Goal(1.05),
    "streaming": Goal(1.00, strict=True),
    "generate": Goal(1.01),
    "token": Goal(0.70),
    "compile": Goal(1.02),
    "scaling": Goal(1.02),
    "state": Goal(0.40),
    "file": Goal(1.01),
    "loading": Goal(0.60),
    "copies": Goal(2.00, strict=True),
}


def build(
    args: BenchmarkArguments,
    shape: Shape,
    residual: hrt.ResidualConfig,
    residual_class: Any = None,
    **fields: Any,
) -> dict[str, Any]:
    """Builds the dense and the residual model with random weights, in evaluation mode.

    `fields` are further ones of the residual model's config.
    """
    residual_class = residual_class or ENCODERS[shape.family]
    config = residual_class.config_class(**shape.config_values(), residual_config=residual, **fields)
    dense = residual_class.dense_class()(config.to_dense_config())
    models = {"dense": dense, "residual": residual_class(config)}
    dtypes = {"dense": args.dense_dtype or args.dtype, "residual": args.dtype}
    return {
        kind: model.to(args.device, getattr(torch, dtypes[kind])).eval() for kind, model in models.items()
    }


def forwards(models: dict[str, Any], seconds: float, batch_size: int) -> Calls:
    """Returns a forward pass of each model on the same inputs."""
    inputs = random_inputs(models["dense"], seconds, batch_size)
    return {
        kind: partial(torch.no_grad()(run_encoder), model, inputs.to(model.dtype))
        for kind, model in models.items()
    }


def interleave(device: str, calls: Calls, repeats: int, what: str) -> Pair:
    """Measures the seconds of the two calls in pairs whose order alternates, after two warm-up calls of each."""
    synchronize = getattr(torch, torch.device(device).type).synchronize

    def timed(call: Callable[[], Any], times: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        synchronize()
        return (time.perf_counter() - start) / times

    for call in calls.values():
        call()
    times = max(1, round(REPEAT_SECONDS / min(timed(call, 1) for call in calls.values())))
    seconds: Pair = {kind: [] for kind in calls}
    for repeat in tqdm(range(repeats), desc=what, leave=False):
        for kind in in_turn(calls, repeat):
            seconds[kind].append(timed(calls[kind], times))
    return seconds


def in_turn(kinds: Iterable[str], repeat: int) -> list[str]:
    """Yields the two in alternating order: dense first, then residual first, and so on."""
    return list(kinds)[:: -1 if repeat % 2 else 1]


def compare(
    args: BenchmarkArguments, part: str, what: str, calls: Calls, repeats: int | None = None, **point: Any
) -> Comparison:
    """Times the two calls; `point` holds further fields of the `Comparison`."""
    seconds = interleave(args.device, calls, repeats or args.repeats, what)
    return Comparison(part, what, **seconds, goal=GOALS[part], **point)


def measure_encoder(args: BenchmarkArguments) -> Iterator[Comparison]:
    models = build(args, args.shape, args.residual)
    for length in args.seconds:
        calls = forwards(models, length, args.batch_size)
        yield compare(args, "encoder", f"forward, {length:g} s", calls, axis="seconds", at=length)


def measure_streaming(args: BenchmarkArguments) -> Iterator[Comparison]:
    models = build(args, args.shape, args.residual)
    for length in args.chunk_seconds:
        calls = forwards(models, length, 1)
        yield compare(args, "streaming", f"chunk of {length:g} s", calls, axis="seconds", at=length)


def measure_training(args: BenchmarkArguments) -> Iterator[Comparison]:
    models = build(args, args.shape, args.residual)
    inputs = random_inputs(models["dense"], args.longest, args.batch_size)
    calls = {kind: training_step(model.train(), inputs.to(model.dtype)) for kind, model in models.items()}
    yield compare(args, "training", f"step, {args.longest:g} s", calls)


def measure_generate(args: BenchmarkArguments) -> Iterator[Comparison]:
    """Measures `generate` on 30 seconds, the length that it requires. The text cannot end early."""
    models = build(args, args.shape, args.residual, hrt.ResidualWhisperForConditionalGeneration)
    inputs = random_inputs(models["dense"], 30.0, args.batch_size)
    length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    calls = {
        kind: partial(model.generate, inputs.to(model.dtype), **length) for kind, model in models.items()
    }
    yield compare(args, "generate", f"{args.new_tokens} tokens, 30 s", calls)


def measure_token(args: BenchmarkArguments) -> Iterator[Comparison]:
    """Measures one token of a decoder that has read 30 seconds and a few tokens; decoder and token table are compact,
    too.
    """
    of_decoder = args.residual
    if isinstance(of_decoder.rotation, dict):  # by the names of an encoder's matrices
        of_decoder = replace(of_decoder, rotation=max(of_decoder.rotation.values()))
    fields = {"decoder_residual_config": of_decoder, "embedding_bits": of_decoder.shared_bits}
    models = build(args, args.shape, args.residual, hrt.ResidualWhisperForConditionalGeneration, **fields)
    calls = {kind: next_token(model) for kind, model in models.items()}
    yield compare(args, "token", f"after 30 s and {PROMPT} tokens", calls)


@torch.no_grad()
def next_token(model: Any) -> Callable[[], Any]:
    """Returns a function that computes the logits of the same token each time."""
    config = model.config
    states = torch.randn(1, config.max_source_positions, config.d_model).to(model.device, model.dtype)
    prompt = torch.full((1, PROMPT), config.decoder_start_token_id, device=model.device)
    read = model(encoder_outputs=(states,), decoder_input_ids=prompt, use_cache=True).past_key_values

    @torch.no_grad()
    def call() -> Any:
        token = prompt[:, :1]
        logits = model(encoder_outputs=(states,), decoder_input_ids=token, past_key_values=read).logits
        read.crop(-1)
        return logits

    return call


def measure_compile(args: BenchmarkArguments) -> Iterator[Comparison]:
    models = build(args, args.shape, args.residual)
    for model in models.values():
        encoder_of(model).compile()
    calls = forwards(models, args.longest, args.batch_size)
    yield compare(args, "compile", f"compiled forward, {args.longest:g} s", calls)


def measure_scaling(args: BenchmarkArguments) -> Iterator[Comparison]:
    points = [(axis, value) for axis, values in args.varied.items() for value in values]
    for axis, value in tqdm(points, desc="scaling"):
        shape = replace(args.shape, **{axis: value}) if axis in ("layers", "width") else args.shape
        residual = replace(args.residual, rank=value, rank_pattern={}) if axis == "rank" else args.residual
        length = value if axis == "seconds" else args.longest
        calls = forwards(build(args, shape, residual), length, args.batch_size)
        what = f"forward, {axis} {value:g}"
        yield compare(args, "scaling", what, calls, args.few_repeats, axis=axis, at=value)


@contextmanager
def saved_models(args: BenchmarkArguments) -> Iterator[dict[str, Path]]:
    """Saves the dense and the residual encoder into folders, each with a small model in `warm-up`."""
    with TemporaryDirectory() as work:
        folders = {kind: Path(work, kind) for kind in ("dense", "residual")}
        for inner, shape, residual in (
            (".", args.shape, args.residual),
            ("warm-up", replace(args.shape, layers=2, width=64), hrt.ResidualConfig(group_size=2, rank=1)),
        ):
            for kind, model in build(args, shape, residual).items():
                model.save_pretrained(folders[kind] / inner)
        yield folders


def in_fresh_process(
    args: BenchmarkArguments, measurement: str, folder: Path, environment: Mapping[str, str]
) -> dict[str, float]:
    """Runs a measurement of `benchmark_model.py` on one of the `saved_models`."""
    options = {"measurement": measurement, "folder": folder, "seconds": args.longest}
    options |= {name: getattr(args, name) for name in ("batch_size", "device", "dtype", "threads")}
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    command = [str(Path(__file__).with_name("benchmark_model.py")), *words]
    return json_of_fresh_process(command, os.environ | environment, f"measuring {measurement}")


def compare_processes(
    args: BenchmarkArguments,
    measurement: str,
    folders: dict[str, Path],
    repeats: int = 1,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Pair]:
    """Returns the figures of fresh processes for the dense and the residual model, by measurement."""
    found: dict[str, Pair] = {}
    for repeat in tqdm(range(repeats), desc=measurement, leave=False):
        for kind in in_turn(folders, repeat):
            for what, value in in_fresh_process(args, measurement, folders[kind], environment or {}).items():
                found.setdefault(what, {"dense": [], "residual": []})[kind].append(value)
    return found


def measure_memory(args: BenchmarkArguments) -> Iterator[Comparison]:
    with saved_models(args) as folders:
        step = compare_processes(args, "step", folders)
        weights = step.pop(WEIGHTS)["residual"]
        for what, pair in step.items():
            goal = GOALS["state"] if what.startswith(STATE) else None
            yield Comparison("training memory", what, **pair, goal=goal, unit="bytes")
        file = [file_bytes(folders["residual"])]
        yield Comparison("memory", "file, against its weights", weights, file, GOALS["file"], "bytes")
        for setting, environment in ALLOCATORS.items():
            found = compare_processes(args, "resident", folders, environment=environment)
            for what, pair in found.items():
                yield Comparison("memory", what + setting, **pair, unit="bytes")
            what = f"{PEAK}{setting}, against its weights"
            yield Comparison("memory", what, weights, found[PEAK]["residual"], GOALS["copies"], "bytes")


def measure_loading(args: BenchmarkArguments) -> Iterator[Comparison]:
    with saved_models(args) as folders:
        for what, pair in compare_processes(args, "load", folders, args.few_repeats).items():
            yield Comparison("loading", what, **pair, goal=GOALS["loading"])


PARTS: dict[str, Callable[[BenchmarkArguments], Iterator[Comparison]]] = {
    "encoder": measure_encoder,
    "streaming": measure_streaming,
    "training": measure_training,
    "generate": measure_generate,
    "token": measure_token,
    "memory": measure_memory,
    "loading": measure_loading,
    "scaling": measure_scaling,
    "compile": measure_compile,
}


def check_device(device: str, dtype: torch.dtype) -> None:
    """Raises ValueError if `device` does not exist or cannot compute in `dtype`."""
    for name, wanted in (("device", torch.float32), ("dtype", dtype)):
        try:
            probe = torch.ones(2, 2, device=device, dtype=wanted)
            (probe @ probe).sum().item()
        except (RuntimeError, AssertionError, TypeError) as error:
            expected = "one that is there" if name == "device" else f"one that {device} computes in"
            got = device if name == "device" else dtype
            raise ValueError(f"`{name}` must be {expected}, got {got}: {error}") from error


def save(args: BenchmarkArguments, comparisons: list[Comparison]) -> None:
    """Writes the results so far, and their table beside the file."""
    output = Path(args.output)
    contents = {
        "title": args.title,
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output", "plots")},
        "residual_config": args.residual.to_dict(),
        "results": [comparison.to_dict() for comparison in comparisons],
        **provenance(),
    }
    output.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(f"{args.title}\n\n{table(comparisons)}\n", encoding="utf-8")


def main() -> None:
    (args,) = parse_args(BenchmarkArguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_device(args.device, getattr(torch, args.dtype))
    if args.threads:
        torch.set_num_threads(args.threads)
    output, plots = Path(args.output), Path(args.plots)
    if output.exists():
        print(f"note: replaces what an earlier run left in {output}")
    for folder in (output.parent, plots):
        folder.mkdir(parents=True, exist_ok=True)
    comparisons: list[Comparison] = []
    for part in args.what:
        print(f"== {part}", flush=True)
        for comparison in PARTS[part](args):
            comparisons.append(comparison)
            save(args, comparisons)
    print(f"\n{args.title}\n\n{table(comparisons)}\n")
    if any(comparison.axis for comparison in comparisons):
        plot_ratios(comparisons, args.title, plots / f"{output.stem}-ratio.png")
    if "memory" in args.what:
        plot_memory(comparisons, args.title, plots / f"{output.stem}-memory.png")
    print(f"all figures are in {output}, plots in {plots}")


if __name__ == "__main__":
    main()
