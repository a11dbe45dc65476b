"""Counts words that differ, with bootstrap intervals over clips, and writes the table and plot of a comparison.

`compare_runtimes.py` makes the transcripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from plots import label_points

DENSE = "torch-dense"
SAMPLES = 2000
INTERVAL = (0.025, 0.975)
MB = 1e6
TIMED = {  # columns by figure, with their digits
    "real_time_factor": ("real-time factor", 3),
    "real_time_factor_encoder": ("of the encoder", 3),
    "load_seconds": ("load, s", 1),
    "peak_uss_mb": ("peak memory, MB", 0),
}


@dataclass(frozen=True)
class Clips:
    """The ids and references of clips, in the order of the systems' texts."""

    ids: list[str]
    references: list[str]


@dataclass(frozen=True)
class Counts:
    """The words of each clip's reference, and the errors in each clip's hypothesis; both of shape (num_clips,)."""

    errors: np.ndarray
    words: np.ndarray

    def rate(self) -> float:
        """The word error rate over all clips."""
        return float(self.errors.sum() / self.words.sum())

    def rates(self, samples: np.ndarray) -> np.ndarray:
        """The word error rates of samples of clips, where `samples` has indices, (num_samples, num_clips)."""
        words = self.words[samples].sum(axis=1)
        return _divide(self.errors[samples].sum(axis=1), words)


def count_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Counts words and word errors, clip by clip, in normalised texts.

    Raises:
        ValueError: the references hold no word, or there is not one hypothesis for each.
    """
    outputs = [
        jiwer.process_words(reference.strip(), hypothesis.strip())
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    words = np.array([o.hits + o.substitutions + o.deletions for o in outputs])
    if not words.sum():
        raise ValueError(f"the {len(words)} references hold no word, so there is no error rate")
    return Counts(np.array([o.substitutions + o.deletions + o.insertions for o in outputs]), words)


def bootstrap_samples(num_clips: int, num_samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Indices of clips drawn with replacement, of shape (num_samples, num_clips)."""
    return np.random.default_rng(seed).integers(num_clips, size=(num_samples, num_clips))


def _divide(numbers: np.ndarray, divisors: np.ndarray) -> np.ndarray:
    """The quotients, NaN where the divisor is 0."""
    return np.divide(numbers, divisors, out=np.full(len(numbers), np.nan), where=divisors != 0)


def _factor(seconds: float | None, audio_seconds: float) -> float | None:
    return None if seconds is None else seconds / audio_seconds


def with_interval(value: float, sampled: np.ndarray) -> dict[str, float]:
    """A figure with the interval of its bootstrap samples, of those in which it has a value."""
    low, high = np.nanquantile(sampled, INTERVAL).tolist()
    return {"value": value, "low": low, "high": high}


def figures_of(
    results: Sequence[Mapping[str, Any]], clips: Clips, normalize: Callable[[str], str], audio_seconds: float
) -> list[dict[str, Any]]:
    """The figures of each system, by file size.

    `wer_ratio` and `wer_difference` are to the dense model's word error rate, with the same samples of clips. There is
    no ratio where the dense model makes no error.
    """
    texts = {r["system"]: [normalize(text).strip() for text in r["texts"]] for r in results}
    references = [normalize(text).strip() for text in clips.references]
    samples = bootstrap_samples(len(references))
    dense = count_errors(references, texts[DENSE])
    sampled = dense.rates(samples)
    figures = []
    for result in sorted(results, key=lambda r: -r["file_bytes"]):
        own = count_errors(references, texts[result["system"]])
        changed = count_errors(texts[DENSE], texts[result["system"]])
        rates = own.rates(samples)
        timed = None if result["rounded"] or "seconds" not in result else result
        figures.append(
            {
                "system": result["system"],
                "file_mb": result["file_bytes"] / MB,
                "wer": with_interval(own.rate(), rates),
                "wer_ratio": with_interval(own.rate() / dense.rate(), _divide(rates, sampled))
                if dense.errors.any()
                else None,
                "wer_difference": with_interval(own.rate() - dense.rate(), rates - sampled),
                "disagreement": with_interval(changed.rate(), changed.rates(samples)),
                "words": int(own.words.sum()),
                "real_time_factor": timed and timed["seconds"] / audio_seconds,
                "real_time_factor_of_rounds": timed
                and [found["seconds"] / audio_seconds for found in timed.get("rounds", [timed])],
                "real_time_factor_encoder": timed and _factor(timed.get("encoder_seconds"), audio_seconds),
                "load_seconds": timed and timed["load_seconds"],
                "peak_uss_mb": timed and timed["peak_uss"] / MB,
            }
        )
    return figures


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a Markdown table whose columns line up."""
    head = ["system", "file, MB", "WER, %", "95 % interval", "WER / dense", "95 % interval"]
    head += ["disagreement, %", "95 % interval"]
    timed = TIMED if any(f["real_time_factor"] is not None for f in figures) else {}
    head += [title for title, _ in timed.values()]
    has_rounds = any(len(f.get("real_time_factor_of_rounds") or []) > 1 for f in figures)
    head += ["least to most"] * has_rounds

    def interval(figure: Mapping[str, float] | None, scale: float, places: int) -> list[str]:
        if figure is None:
            return ["", ""]
        value, low, high = (f"{scale * figure[name]:.{places}f}" for name in ("value", "low", "high"))
        return [value, f"{low} to {high}"]

    rows = [head]
    for f in figures:
        cells = [f["system"], f"{f['file_mb']:.1f}", *interval(f["wer"], 100, 1)]
        cells += [*interval(f["wer_ratio"], 1, 2), *interval(f["disagreement"], 100, 1)]
        for name, (_, places) in timed.items():
            cells.append("" if f.get(name) is None else f"{f[name]:.{places}f}")
        if has_rounds:
            factors = f.get("real_time_factor_of_rounds") or []
            cells.append(f"{min(factors):.3f} to {max(factors):.3f}" if len(factors) > 1 else "")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = [" | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    rule = " | ".join("-" * (width - bool(index)) + ":" * bool(index) for index, width in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (aligned[0], rule, *aligned[1:]))


def plot(figures: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plots the disagreement over the file's size, with intervals, in a colour for each runtime."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(_kind(f) for f in figures):
        points = [f for f in figures if _kind(f) == kind]
        x = [f["file_mb"] for f in points]
        y, low, high = (
            100 * np.array([f["disagreement"][name] for f in points]) for name in ("value", "low", "high")
        )
        axes.errorbar(x, y, yerr=[y - low, high - y], fmt="o", capsize=3, label=kind)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("file, MB")
    axes.set_ylabel("words that differ from the dense transcript, %")
    axes.set_title(title)
    axes.legend(frameon=False)
    label_points(axes, [(_label_of(f), f["file_mb"], 100 * f["disagreement"]["value"]) for f in figures])
    figure.savefig(path, dpi=120)


def _label_of(figure: Mapping[str, Any]) -> str:
    return (figure["system"].partition(":")[2] or figure["system"]).removesuffix("-rounded")


def _kind(figure: Mapping[str, Any]) -> str:
    """The runtime that a colour of the plot stands for; compact models have one of their own."""
    system = figure["system"]
    if system.endswith("-rounded"):
        return "rounded as whisper.cpp, in PyTorch"
    runtime, _, name = system.partition(":")
    return f"ours, {runtime}" if name.startswith("ours") else runtime


def write_report(
    path: Path,
    settings: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    clips: Clips,
    normalize: Callable[[str], str],
) -> list[dict[str, Any]]:
    """Writes the table and the plot beside the JSON file at `path`, and returns the figures."""
    figures = figures_of(results, clips, normalize, settings["audio_seconds"])
    title = f"{settings['model']} on {settings['data']}, split {settings['split']}"
    image = path.with_suffix(".png")
    plot(figures, title, image)
    notes = (
        f"{settings['clips']} clips, {settings['audio_seconds'] / 60:.1f} minutes, {figures[0]['words']} words in "
        f"{settings['language']}. Greedy, {settings['threads']} threads, a fresh process for each system. Disagreement "
        "is the word error rate against the dense model's own transcripts; texts are normalised. Intervals are over "
        f"{SAMPLES} bootstrap samples of clips, the same for all systems. A system named `-rounded` runs in PyTorch "
        "with the matrices rounded as whisper.cpp's format of that name; its words and bytes count, its speed and "
        "memory would be PyTorch's and are left out. The dense file is in 16 bits. A whisper.cpp file holds the "
        "vocabulary too. "
    )
    if settings["timed"]:
        notes += (
            "Peak memory is the unique set size, libraries included. Loading includes imports. The real-time factor is "
            "of whole transcriptions; what the encoder leaves of it is the decoder's and the features'. "
        )
    if settings["join_seconds"] is not None:
        notes += f"Adjacent recordings of one folder are joined up to {settings['join_seconds']:g} seconds. "
    notes += f"All figures: [{path.name}]({path.name})."
    text = "\n\n".join([f"# {title}", table(figures), f"![disagreement over file size]({image.name})", notes])
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return figures
