"""Measures how far a smaller Whisper's distributions of tokens are from the dense model's, on its own transcripts.

    python research/measure_divergence.py --data queen --split test --join 28 --max_clips 56 \\
        --systems q4_0-rounded q5_1-rounded ours:outputs/base-31 --output results/divergence-base.json

Words tell sizes apart only with hours of speech, and one endless repetition moves them by percents. Here the dense
model transcribes each clip once, greedily, and every system predicts that transcript token by token. This gives two
figures, each with the interval of bootstrap samples of clips: the divergence `KL(dense || system)` in nats for each
token, and the share of tokens at which the system's first choice is not the dense model's. The systems are those of
`runtimes.py` that run in PyTorch. Results are kept after each system, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_runtimes import (
    Results,
    add_common_options,
    check_clip_options,
    clips_of,
    digest,
    settings_of,
)
from plots import label_points
from pretrained import resolve_pretrained
from runtimes import SAMPLING_RATE, TorchRuntime, create
from runtimes_report import DENSE, MB, SAMPLES, bootstrap_samples, with_interval
from tqdm.auto import tqdm

from hf_residual_transformer.compression.inputs import Batch, with_labels, without_memory
from hf_residual_transformer.compression.measurement import divergence_of, logits_of
from hf_residual_transformer.layers import unpacked_weights
from hf_residual_transformer.provenance import provenance


def transcripts(dense: TorchRuntime, samples: Sequence[np.ndarray]) -> list[Batch]:
    """Model inputs of each clip, with the dense model's encoder states and transcript as `with_labels` gives them."""
    batches: list[Batch] = []
    for clip in samples:
        inputs = dense.processor(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        batches.append({"input_features": inputs.input_features})
    return with_labels(dense.model, dense.model.get_encoder(), batches, True)


def compare(dense: Any, model: Any, batches: Sequence[Batch], name: str) -> dict[str, list[float]]:
    """For each clip, the sum of the divergence in nats, the number of other first choices, and the tokens."""
    found: dict[str, list[float]] = {"divergence": [], "differ": [], "tokens": []}
    with unpacked_weights(model):
        for batch in tqdm(batches, desc=name, unit="clip"):
            wanted, own = logits_of(dense, batch), logits_of(model, without_memory(batch))
            found["divergence"].append(divergence_of(wanted, own).sum().item())
            found["differ"].append((wanted.argmax(-1) != own.argmax(-1)).sum().item())
            found["tokens"].append(len(wanted))
    return found


def figures_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each system, by file size, with intervals."""
    samples = bootstrap_samples(len(results[0]["tokens"]))
    figures = []
    for result in sorted(results, key=lambda r: -r["file_bytes"]):
        tokens = np.array(result["tokens"])
        figure = {
            "system": result["system"],
            "file_mb": result["file_bytes"] / MB,
            "tokens": int(tokens.sum()),
        }
        for name in ("divergence", "differ"):
            sums = np.array(result[name])
            sampled = sums[samples].sum(1) / tokens[samples].sum(1)
            figure[name] = with_interval(float(sums.sum() / tokens.sum()), sampled)
        figures.append(figure)
    return figures


def write_report(path: Path, settings: Mapping[str, Any], figures: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table and a plot beside the JSON file."""
    from matplotlib.figure import Figure

    title = f"{settings['model']} on {settings['data']}, split {settings['split']}"
    lines = [
        f"# {title}",
        "",
        "| system | file, MB | divergence, nats a token | 95 % interval | other first choice, % | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for f in figures:
        nats, share = f["divergence"], f["differ"]
        lines.append(
            f"| {f['system']} | {f['file_mb']:.1f} | {nats['value']:.4f} | {nats['low']:.4f} to {nats['high']:.4f} | "
            f"{100 * share['value']:.1f} | {100 * share['low']:.1f} to {100 * share['high']:.1f} |"
        )
    lines += [
        "",
        f"![divergence over file size]({path.with_suffix('.png').name})",
        "",
        f"{settings['clips']} clips, {settings['audio_seconds'] / 60:.1f} minutes, {figures[0]['tokens']} tokens of "
        f"the dense model's own transcripts. Intervals are over {SAMPLES} bootstrap samples of clips, the same for all "
        f"systems. The dense file is in 16 bits and has {settings['dense_mb']:.1f} MB. All figures: "
        f"[{path.name}]({path.name}).",
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for label, ours in (("ours", True), ("rounded as whisper.cpp", False)):
        points = [f for f in figures if f["system"].startswith("ours") == ours]
        if not points:
            continue
        y, low, high = (np.array([f["divergence"][n] for f in points]) for n in ("value", "low", "high"))
        x = [f["file_mb"] for f in points]
        axes.errorbar(x, y, yerr=[y - low, high - y], fmt="o", capsize=3, label=label)
    axes.margins(x=0.12)  # for the names
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    axes.set_xlabel("file, MB")
    axes.set_ylabel("divergence from dense, nats for each token")
    axes.set_title(title)
    axes.legend(frameon=False)
    names = [f["system"].removeprefix("ours:").removesuffix("-rounded") for f in figures]
    label_points(
        axes, [(name, f["file_mb"], f["divergence"]["value"]) for name, f in zip(names, figures, strict=True)]
    )
    figure.savefig(path.with_suffix(".png"), dpi=120)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument(
        "--systems", nargs="+", required=True, help="`ours:FOLDER`, `q4_0-rounded` and others"
    )
    args = parser.parse_args()
    check_clip_options(parser, args)
    model = resolve_pretrained(args.model)
    runtimes: list[TorchRuntime] = []
    for system in args.systems:
        runtime = create(system, model, args.language, args.threads)
        if not isinstance(runtime, TorchRuntime):
            parser.error(f"--systems must run in PyTorch, got {runtime.name!r}, which gives no probabilities")
        runtimes.append(runtime)
    clips, samples = clips_of(args)
    dense: Any = create(DENSE, model, args.language, args.threads)
    settings = {**settings_of(args, clips, samples), "dense_mb": dense.file_bytes() / MB}
    results = Results(args.output, settings)
    dense.load()
    known: list[Batch] = []
    for runtime in runtimes:
        weights = digest(runtime.files)
        if results.has(runtime.name, weights):
            print(f"{runtime.name} is in {args.output}", flush=True)
            continue
        known = known or transcripts(dense, samples)
        runtime.load()
        found = compare(dense.model, runtime.model, known, runtime.name)
        about = {"system": runtime.name, "weights": weights, "file_bytes": runtime.file_bytes()}
        results.add({**about, **found})
        runtime.model = None
    results.contents["runs"][-1] = provenance()
    figures = figures_of(results.results)
    results.contents["figures"] = figures
    results.save()
    write_report(args.output, settings, figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
