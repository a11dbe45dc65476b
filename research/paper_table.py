"""The table and the curves of `research/paper.py`, from the JSON files of its runs."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000
METRICS = {"recognition": ("wer", "cer"), "translation": ("bleu", "chrf", "wer")}
PERCENT = ("wer", "cer")


def write_table(folder: Path) -> str:
    """Writes `table.md`, and a figure of the curves for each task, beside the JSON files; returns the table."""
    runs = read_runs(folder)
    parts = []
    for task in METRICS:
        own = {cell: found for (kind, cell), found in runs.items() if kind == task}
        if own:
            parts.append(f"## {task.capitalize()}\n\n" + "\n".join(_rows(task, own)))
            parts.append("\n".join(_comparisons(own)))
            plot(own, folder / f"{task}.png")
    text = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


def read_runs(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The runs of each task and cell, by seed."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        found[values["task"], values["cell"]].append(values)
    return found


def _rows(task: str, cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    metrics = METRICS[task]
    names = [f"{m.upper()} %" if m in PERCENT else {"bleu": "BLEU", "chrf": "chrF"}[m] for m in metrics]
    head = [
        "encoder",
        "seeds",
        "parameters",
        "encoder %",
        *names,
        "least to most",
        *(["95 %, clips"] if task == "translation" else []),
        "WER / dense",
        "95 %, clips",
    ]
    head += ["95 %, clips and seeds"]
    head += ["4-bit bytes %", "4-bit WER %", "CPU s a step"]
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
    order = sorted(
        cells.values(), key=lambda runs: (runs[0]["cell"] != "dense", -runs[0]["encoder"]["ratio"])
    )
    for runs in order:
        first = runs[0]
        spread = [run["test"][metrics[0]] for run in runs]
        row = [first["title"], str(len(runs)), f"{first['encoder']['parameters']:,}"]
        row += [f"{100 * first['encoder']['ratio']:.1f}"]
        row += [_written(metric, float(np.mean([run["test"][metric] for run in runs]))) for metric in metrics]
        row += [f"{_written(metrics[0], min(spread))} to {_written(metrics[0], max(spread))}"]
        row += [interval_of_bleu(runs)] if task == "translation" else []
        row += ratio_of_errors(runs, cells.get("dense", []))
        bits = [run["four_bits"] for run in runs if "four_bits" in run]
        row += [f"{100 * bits[0]['ratio']:.1f}"] if bits else ["-"]
        row += [_written("wer", float(np.mean([entry["test"]["wer"] for entry in bits])))] if bits else ["-"]
        seconds = [run["cpu_seconds_per_step"] for run in runs if run["cpu_seconds_per_step"] is not None]
        row += [f"{np.mean(seconds):.3f}"] if seconds else ["-"]
        lines.append(" | ".join(row))
    return [f"| {line} |" for line in lines]


def _written(metric: str, value: float) -> str:
    return f"{100 * value:.2f}" if metric in PERCENT else f"{value:.1f}"


def _comparisons(cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    """K=3, R=2 beside dense, and beside the encoders of its own size that decide what sharing is worth."""
    ours = cells.get("k3-r2", [])
    lines = [
        "WER of K=3, R=2 over that of | seeds | ratio | 95 %, clips | 95 %, clips and seeds | ratio of each seed",
        "---|---:|---:|---:|---:|---",
    ]
    for name in ("dense", "shallow", "narrow", "low-rank", "k3-r2-cyclic"):
        theirs = cells.get(name, [])
        seeds = sorted({run["seed"] for run in ours} & {run["seed"] for run in theirs})
        if seeds:
            by_seed = [
                ratio_of_errors([run for run in ours if run["seed"] == seed], theirs)[0] for seed in seeds
            ]
            row = [theirs[0]["title"], str(len(seeds)), *ratio_of_errors(ours, theirs), ", ".join(by_seed)]
            lines.append(" | ".join(row))
    return [f"| {line} |" for line in lines]


def ratio_of_errors(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """The ratio of the word errors to those of other runs of the same seeds, and two intervals with 95 % of the
    bootstrap's draws: of test clips alone, and of test clips and of the seeds of either side. The latter is rough for
    few seeds, and "-" for one.
    """
    seeds = sorted({run["seed"] for run in runs} & {run["seed"] for run in others})
    if not seeds:
        return ["-", "-", "-"]
    ours, theirs = (
        np.array([word_errors(run) for seed in seeds for run in group if run["seed"] == seed])
        for group in (runs, others)
    )
    if not theirs.sum():
        return ["-", "-", "-"]
    rng = np.random.default_rng(0)
    draws = rng.integers(ours.shape[1], size=(RESAMPLES, ours.shape[1]))
    by_seed = [np.stack([errors[draws].sum(1) for errors in side], 1) for side in (ours, theirs)]
    of_clips = by_seed[0].sum(1) / np.maximum(by_seed[1].sum(1), 1)
    drawn = [
        np.take_along_axis(side, rng.integers(len(seeds), size=side.shape), 1).sum(1) for side in by_seed
    ]
    of_both = drawn[0] / np.maximum(drawn[1], 1)
    intervals = [_interval(of_clips), _interval(of_both) if len(seeds) > 1 else "-"]
    return [f"{ours.sum() / theirs.sum():.2f}", *intervals]


def _interval(values: np.ndarray, digits: int = 2) -> str:
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{low:.{digits}f} to {high:.{digits}f}"


def interval_of_bleu(runs: list[dict[str, Any]]) -> str:
    """95 % of the bootstrap's draws of test clips, for the mean BLEU of the seeds. It is "-" for older runs, which do
    not have the counts of each clip.
    """
    if any("bleu_of_clips" not in run["test"] for run in runs):
        return "-"
    counts = np.array([bleu_counts(run) for run in runs])
    num_clips = counts.shape[1]
    draws = np.random.default_rng(0).integers(num_clips, size=(RESAMPLES, num_clips))
    times = np.stack([np.bincount(draw, minlength=num_clips) for draw in draws])
    return _interval(np.mean([[bleu(sums) for sums in times @ of_seed] for of_seed in counts], 0), digits=1)


def bleu_counts(run: dict[str, Any]) -> np.ndarray:
    """What the BLEU of some test clips is made of, once it is added up over them: the matches of one to four words, how
    many there could be, and the lengths of prediction and reference. Shape (num_clips, 10).
    """
    stored = [clip.split(",") for clip in run["test"]["bleu_of_clips"].split()]
    matches, lengths = np.split(np.array(stored, dtype=int), [4], axis=1)
    possible = np.maximum(lengths[:, :1] - np.arange(4), 0)
    return np.concatenate([matches, possible, lengths], 1)


def bleu(sums: np.ndarray) -> float:
    """BLEU from sums of `bleu_counts`, (10,), as `sacrebleu.corpus_bleu` computes it."""
    from sacrebleu import BLEU

    *counts, length, reference_length = sums.tolist()
    return BLEU.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method="exp").score


def word_errors(run: dict[str, Any]) -> np.ndarray:
    """Word errors of each test clip."""
    return np.array([int(number) for number in run["test"]["word_errors_of_clips"].split()])


def plot(cells: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss, and WER on the validation strings, over the steps; means over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for runs in cells.values():
        for axes, key, column in ((left, "losses", 1), (right, "validation", 2)):
            steps = [point[0] for point in runs[0][key]]
            values = np.mean([[point[column] for point in run[key]] for run in runs], axis=0)
            axes.plot(steps, values, label=runs[0]["title"], linewidth=1.2)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="step", ylabel="WER on validation strings", ylim=(0, 1.05))
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
