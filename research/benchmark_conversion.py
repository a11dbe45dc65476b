r"""Measures the memory that a conversion takes, over the model's depth and the number of calibration windows.

    python research/benchmark_conversion.py --size large-v3 --layers 2 4 8 --windows 1 4 16 \
        --output results/conversion-memory.json

Its encoder alone is converted; `--decoder_layers 4` gives large-v3-turbo's decoder and token embedding too:

    python research/benchmark_conversion.py --size large-v3 --decoder_layers 4 --layers 2 4 --windows 1 \
        --output results/conversion-memory-turbo.json

With `--low_memory`, the dense model is in float16 and its layers stay so, as `hrt compress --low-memory` has them.

This shorter run takes about a minute on a CPU:

    python research/benchmark_conversion.py --size tiny --layers 2 4 --windows 1 2 \
        --output outputs/conversion-memory.json

Weights and inputs are random, because memory does not depend on them. `from_dense(..., budget=...)` converts a model of
each depth with the fewest windows, and the shallowest model with each number of windows. Each conversion is a fresh
process. The C library returns freed
memory at once (MALLOC_MMAP_THRESHOLD_), because the memory that it keeps otherwise differs from run to run. "beside the
models" is the peak memory of the process minus the weights of the dense and of the converted encoder. The script writes
the file at `--output` and a table beside it (.md) after each result.
The first argument may instead be a JSON or YAML file with options by name.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmark_model import ENCODERS, SIZES, PeakMemory, random_inputs, resident, unique_bytes
from common import environment_with_fixed_malloc, json_of_fresh_process
from tqdm.auto import tqdm
from transformers.utils import logging

import hf_residual_transformer as hrt
from hf_residual_transformer.compression.conversion import BUDGETS
from hf_residual_transformer.provenance import provenance
from hf_residual_transformer.quantization import BITS
from hf_residual_transformer.training.arguments import parse_args

Result = dict[str, float]


@dataclass
class ConversionArguments:
    """The settings of the measurement."""

    size: str = field(default="large-v3", metadata={"help": f"Shape of the model: {', '.join(SIZES)}."})
    layers: list[int] = field(
        default_factory=lambda: [2, 4, 8], metadata={"help": "Numbers of encoder layers to measure."}
    )
    windows: list[int] = field(
        default_factory=lambda: [1, 4, 16], metadata={"help": "Numbers of windows of 30 seconds to measure."}
    )
    decoder_layers: int = field(
        default=0,
        metadata={"help": "Decoder layers of a whole Whisper; 0 measures an encoder alone."},
    )
    low_memory: bool = field(
        default=False,
        metadata={"help": "The dense model is in float16; one matrix at a time is copied to float32."},
    )
    tokens: int = field(default=60, metadata={"help": "Tokens of a window's transcript, for a decoder."})
    budget: float = field(default=BUDGETS[BITS], metadata={"help": "As --size of `hrt compress`."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch's choice."})
    output: str = field(
        default="results/conversion-memory.json",
        metadata={"help": "File for all figures; replaced if there."},
    )
    alone: bool = field(
        default=False,
        metadata={
            "help": "Measure the one depth and number of windows given, in this process, and print JSON."
        },
    )

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {self.size!r}")
        for name in ("layers", "windows"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"`{name}` must be numbers of at least 1, got {values}")
        if self.decoder_layers < 0 or (self.decoder_layers and SIZES[self.size].family != "whisper"):
            raise ValueError(f"`decoder_layers` must be 0, or more for a Whisper, got {self.decoder_layers}")
        if self.alone and (len(self.layers) > 1 or len(self.windows) > 1):
            raise ValueError(
                f"`alone` must come with one depth, got {self.layers} layers, {self.windows} windows"
            )
        if Path(self.output).suffix != ".json":
            raise ValueError(f"`output` must be a .json file, got {self.output!r}")

    def points(self) -> list[tuple[int, int]]:
        """The numbers of layers and windows of each measurement."""
        shallowest, fewest = min(self.layers), min(self.windows)
        depths = [(layers, fewest) for layers in sorted(set(self.layers))]
        return depths + [(shallowest, windows) for windows in sorted(set(self.windows) - {fewest})]


def measure(args: ConversionArguments, layers: int, windows: int) -> Result:
    """Measures the bytes and seconds of one conversion in this process."""
    shape = replace(SIZES[args.size], layers=layers)
    residual_class = ENCODERS[shape.family]
    values = shape.config_values()
    if shape.family == "whisper":
        values["decoder_layers"] = args.decoder_layers or 1
    if args.decoder_layers:
        residual_class = hrt.ResidualWhisperForConditionalGeneration
    config = residual_class.config_class(**values).to_dense_config()
    dense = (
        residual_class.dense_class()(config).eval().to(torch.float16 if args.low_memory else torch.float32)
    )
    name = "input_features" if shape.family == "whisper" else "input_values"
    inputs = [{name: random_inputs(dense, 30.0, 1)} for _ in range(windows)]
    if args.decoder_layers:
        for batch in inputs:
            batch["labels"] = torch.randint(0, 1000, (1, args.tokens))
    before, start = resident()["RSS"], time.perf_counter()
    with PeakMemory() as peak:
        device = "cpu" if args.low_memory else None
        model = residual_class.from_dense(
            dense, calibration=inputs, budget=args.budget, device=device, progress=False
        )
    own = unique_bytes(model.state_dict().values())
    return {
        "layers": layers,
        "windows": windows,
        "dense model": unique_bytes(dense.parameters()),
        "converted model": own,
        "beside the models": peak.bytes - before - own,
        "peak": peak.bytes,
        "seconds": time.perf_counter() - start,
    }


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    names = list(results[0])
    lines = [[name if name in ("layers", "windows", "seconds") else f"{name}, GB" for name in names]]
    lines.append(["---:"] * len(names))
    for result in results:
        lines.append(
            [
                f"{value / 1e9:.2f}" if title.endswith("GB") else f"{value:.0f}"
                for title, value in zip(lines[0], result.values())
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(args: ConversionArguments, results: list[Result]) -> None:
    """Writes the results so far, and their table beside the file."""
    output = Path(args.output)
    settings = {name: value for name, value in asdict(args).items() if name not in ("output", "alone")}
    contents: dict[str, Any] = {"settings": settings, "results": results, **provenance()}
    output.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    what = f"Whispers with {args.decoder_layers} decoder layers" if args.decoder_layers else "encoders"
    stored = "float16, one matrix at a time in float32" if args.low_memory else "float32"
    title = f"Conversion to a budget of {args.budget}, {what} of the width of {args.size}, {stored}"
    output.with_suffix(".md").write_text(f"{title}\n\n{table(results)}\n", encoding="utf-8")


def main() -> None:
    (args,) = parse_args(ConversionArguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.alone:
        print(json.dumps(measure(args, args.layers[0], args.windows[0])))
        return
    output = Path(args.output)
    if output.exists():
        print(f"note: replaces what an earlier run left in {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    options = [f"--size={args.size}", f"--budget={args.budget}", "--alone"]
    options += [f"--decoder_layers={args.decoder_layers}", f"--tokens={args.tokens}"]
    options += [f"--threads={args.threads}"] if args.threads else []
    options += ["--low_memory"] if args.low_memory else []
    for layers, windows in tqdm(args.points(), unit="conversion"):
        command = [__file__, *options, f"--layers={layers}", f"--windows={windows}"]
        what = f"the conversion of {layers} layers with {windows} windows"
        results.append(json_of_fresh_process(command, environment_with_fixed_malloc(), what))
        save(args, results)
    print(f"{table(results)}\n\nall figures are in {output}")


if __name__ == "__main__":
    main()
