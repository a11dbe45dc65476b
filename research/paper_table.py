"""The table and the figures of `research/paper.py`, from the JSON files of its runs."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000
METRICS = {"recognition": ("wer", "cer"), "translation": ("bleu", "chrf", "wer")}
PERCENT = ("wer", "cer")


def write_table(folder: Path) -> str:
    """Writes `table.md`, and for each task a figure of the curves and one of the ratios to dense, beside the JSON
    files; returns the table.
    """
    runs = read_runs(folder)
    parts = []
    for task in METRICS:
        own = {cell: found for (kind, cell), found in runs.items() if kind == task}
        if own:
            parts.append(f"## {task.capitalize()}\n\n" + "\n".join(_rows(task, own)))
            parts.append("\n".join(_comparisons(own)))
            if nats := _nats(own):
                parts.append("\n".join(nats))
            plot(own, folder / f"{task}.png")
            plot_ratios(own, folder / f"{task}-ratios.png")
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
        *(["95 %, voices"] if task == "translation" else []),
        "WER / dense",
        "95 %, voices",
    ]
    head += ["95 %, voices and seeds"]
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
        row += written_ratio(ratio_of_errors(runs, cells.get("dense", [])))
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
    """K=3, R=2, at the rate of the others and at a divided one, beside dense, and beside the encoders of its own size
    that decide what sharing is worth. A row has the seeds that both have.
    """
    lines = [
        "WER of | over that of | seeds | ratio | 95 %, voices | 95 %, voices and seeds | ratio of each seed",
        "---|---|---:|---:|---:|---:|---",
    ]
    others = ("dense", "shallow", "narrow", "low-rank", "k3-r2-cyclic", "k3-r2")
    for name, other in product(("k3-r2", "k3-r2-divided"), others):
        ours, theirs = cells.get(name, []), cells.get(other, [])
        seeds = _seeds_of_both(ours, theirs)
        if seeds and name != other:
            by_seed = [
                written_ratio(ratio_of_errors([run for run in ours if run["seed"] == seed], theirs))[0]
                for seed in seeds
            ]
            ratio = written_ratio(ratio_of_errors(ours, theirs))
            row = [ours[0]["title"], theirs[0]["title"], str(len(seeds)), *ratio]
            lines.append(" | ".join([*row, ", ".join(by_seed)]))
    return [f"| {line} |" for line in lines]


def _nats(cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The cross-entropy of the test's references beside that of dense and of fewer layers, of the seeds of dense; none
    for older runs, which did not measure it.
    """
    measured = {
        cell: [run for run in runs if "nats_per_token" in run["test"]] for cell, runs in cells.items()
    }
    seeds = {run["seed"] for run in measured.get("dense", [])}  # the same for all rows
    measured = {cell: [run for run in runs if run["seed"] in seeds] for cell, runs in measured.items()}
    measured = {cell: runs for cell, runs in measured.items() if runs}
    if not measured:
        return []
    head = ["encoder", "seeds", "nats a token"]
    for other in ("dense", "fewer layers"):
        head += [f"minus {other}", "95 %, voices and seeds"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for cell in sorted(measured, key=[*cells].index):
        runs = measured[cell]
        row = [
            runs[0]["title"],
            str(len(runs)),
            f"{np.mean([run['test']['nats_per_token'] for run in runs]):.3f}",
        ]
        for other in ("dense", "shallow"):
            row += ["-", "-"] if other == cell else difference_in_nats(runs, measured.get(other, []))
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def difference_in_nats(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """The mean of the cross-entropy, in nats a token, less that of other runs of the same seeds, and its interval of
    95 %; "-" for one seed.

    Where each seed has its own test voices, it is that of Student's t over the seeds. Else voices are drawn, and the
    seeds of either side, as in `ratio_of_errors`.
    """
    theirs = {run["seed"]: run for run in others}
    pairs = [(run, theirs[run["seed"]]) for run in runs if run["seed"] in theirs]
    if not pairs:
        return ["-", "-"]
    differences = np.array(
        [run["test"]["nats_per_token"] - other["test"]["nats_per_token"] for run, other in pairs]
    )
    mean = f"{differences.mean():+.3f}"
    if len(pairs) == 1:
        return [mean, "-"]
    if own_voices(runs):
        from scipy.stats import t

        half = t.ppf(0.975, len(pairs) - 1) * differences.std(ddof=1) / np.sqrt(len(pairs))
        return [mean, f"{differences.mean() - half:+.3f} to {differences.mean() + half:+.3f}"]
    rng = np.random.default_rng(0)
    sides = [np.array([of_units(run, nats_of(run)) for run in side]) for side in zip(*pairs, strict=True)]
    voices = _times_drawn(rng, sides[0].shape[1])
    drawn = []
    for side in sides:  # (seeds, voices, 2)
        nats, tokens = np.einsum("ds,svn,dv->nd", _times_drawn(rng, len(pairs)), side, voices)
        drawn.append(nats / tokens)
    low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
    return [mean, f"{low:+.3f} to {high:+.3f}"]


def nats_of(run: dict[str, Any]) -> np.ndarray:
    """The nats of each test clip, and its tokens, (num_clips, 2)."""
    test = run["test"]
    return np.array([test[f"{name}_of_clips"].split() for name in ("nats", "tokens")], float).T


@dataclass(frozen=True)
class Ratio:
    """The ratio of the word errors of some runs to those of others, and its intervals with 95 % of the bootstrap's
    draws: of the test's voices alone, and of voices and seeds. None stands for one that the runs do not give.
    """

    value: float
    of_voices: tuple[float, float] | None
    of_voices_and_seeds: tuple[float, float] | None


def ratio_of_errors(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> Ratio | None:
    """The ratio of the word errors to those of other runs of the same seeds. Without such seeds, or errors of the
    others, there is none.

    The strings of a voice are alike: a model that knows it knows most of them. So voices are drawn, with all of their
    strings, and where speakers are not known, clips are; in the second interval the seeds of either side are drawn,
    too, which needs two of them. Where each seed has its own test voices, there is no first interval, and seeds are
    drawn, the same for both sides. There are few voices and seeds, for which drawing `n` of `n` gives intervals that
    are too narrow; drawing `n - 1` gives the right variance (Rao and Wu 1988,
    https://doi.org/10.1080/01621459.1988.10478591). Half an error is added to both sides of each draw, so that draws
    with none have a ratio, too.
    """
    seeds = _seeds_of_both(runs, others)
    if not seeds:
        return None
    sides = [[run for seed in seeds for run in group if run["seed"] == seed] for group in (runs, others)]
    errors = [np.array([of_units(run, word_errors(run)) for run in side]) for side in sides]
    if not errors[1].sum():
        return None
    ratio = errors[0].sum() / errors[1].sum()
    rng = np.random.default_rng(0)
    voices = _times_drawn(rng, errors[0].shape[1])
    all_of = np.ones((RESAMPLES, len(seeds)))
    of_voices = _interval_of_ratio(errors, [all_of, all_of], voices)
    if len(seeds) == 1:
        return Ratio(ratio, of_voices, None)
    if own_voices(sides[0]):
        together = _times_drawn(rng, len(seeds))
        return Ratio(ratio, None, _interval_of_ratio(errors, [together, together], np.ones_like(voices)))
    drawn = [_times_drawn(rng, len(seeds)) for _ in range(2)]
    return Ratio(ratio, of_voices, _interval_of_ratio(errors, drawn, voices))


def _seeds_of_both(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[int]:
    return sorted({run["seed"] for run in runs} & {run["seed"] for run in others})


def written_ratio(ratio: Ratio | None) -> list[str]:
    """The ratio and its two intervals; "-" for what there is not."""
    if ratio is None:
        return ["-", "-", "-"]
    intervals = (ratio.of_voices, ratio.of_voices_and_seeds)
    return [f"{ratio.value:.2f}", *(_written_interval(*ends) if ends else "-" for ends in intervals)]


def _interval_of_ratio(
    errors: list[np.ndarray], of_seeds: list[np.ndarray], of_voices: np.ndarray
) -> tuple[float, float]:
    """The interval of the ratio of the errors of two sides, (seeds, voices), each seed and voice drawn so often."""
    sums = [
        np.einsum("ds,sv,dv->d", times, side, of_voices) + 0.5
        for times, side in zip(of_seeds, errors, strict=True)
    ]
    return _interval(sums[0] / sums[1])


def _times_drawn(rng: np.random.Generator, number: int) -> np.ndarray:
    """How often each of `number` units is in each of the draws of `number - 1`, (RESAMPLES, number)."""
    draws = rng.integers(number, size=(RESAMPLES, max(number - 1, 1)))
    return np.stack([np.bincount(draw, minlength=number) for draw in draws])


def own_voices(runs: list[dict[str, Any]]) -> bool:
    """Whether the seeds have different test voices."""
    return len({tuple(run["test"].get("voices", ())) for run in runs}) > 1


def of_units(run: dict[str, Any], of_clips: np.ndarray) -> np.ndarray:
    """Numbers of clips added up over those of each voice, (num_voices, ...); as they are if speakers are not known."""
    if "voices" not in run["test"]:
        return of_clips
    sums = np.zeros((len(run["test"]["voices"]), *of_clips.shape[1:]), of_clips.dtype)
    np.add.at(sums, np.array(run["test"]["voices_of_clips"].split(), int), of_clips)
    return sums


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _written_interval(low: float, high: float, digits: int = 2) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}"


def interval_of_bleu(runs: list[dict[str, Any]]) -> str:
    """95 % of the bootstrap's draws of the test's voices, as in `ratio_of_errors`, for the mean BLEU of the seeds.

    It is "-" for older runs, which do not have the counts of each clip, and where each seed has its own test voices.
    """
    if any("bleu_of_clips" not in run["test"] for run in runs) or own_voices(runs):
        return "-"
    counts = np.array([of_units(run, bleu_counts(run)) for run in runs])
    times = _times_drawn(np.random.default_rng(0), counts.shape[1])
    drawn = np.mean([[bleu(sums) for sums in times @ of_seed] for of_seed in counts], 0)
    return _written_interval(*_interval(drawn), digits=1)


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


def words_of(run: dict[str, Any]) -> np.ndarray:
    """The number of words of each test clip."""
    return np.array([int(number) for number in run["test"]["words_of_clips"].split()])


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


def plot_ratios(cells: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Writes the figure of `draw_ratios`, unless no row has a ratio."""
    figure = draw_ratios(cells)
    if figure is not None:
        figure.savefig(path, dpi=110)


def draw_ratios(cells: dict[str, list[dict[str, Any]]]) -> Any:
    """A matplotlib figure of the word errors of each row over those of dense. A thick line has 95 % of the draws of
    voices and seeds, a thin one of voices alone, for one seed. None where no row has a ratio.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatter

    ratios = {
        cell: ratio_of_errors(runs, cells.get("dense", [])) for cell, runs in cells.items() if cell != "dense"
    }
    found = sorted(
        ((cell, ratio) for cell, ratio in ratios.items() if ratio), key=lambda entry: -entry[1].value
    )
    if not found:
        return None
    figure = Figure(figsize=(8, 1.6 + 0.34 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, (cell, ratio) in enumerate(found):
        ends = ratio.of_voices_and_seeds or ratio.of_voices
        assert ends  # a ratio has one of both
        residual = cells[cell][0]["residual_config"]
        colour = "tab:blue" if residual and residual["group_size"] else "tab:orange"
        axes.plot(ends, [place, place], color=colour, linewidth=2.5 if ratio.of_voices_and_seeds else 0.9)
        # A ratio of 0 has no place on a logarithmic axis, and half an error is added to each draw.
        axes.plot(max(ratio.value, ends[0]), place, "o", color=colour, markersize=5)
    names = [
        f"{runs[0]['title']}, {100 * runs[0]['encoder']['ratio']:.0f} %, {_written_seeds(runs, cells['dense'])}"
        for runs in (cells[cell] for cell, _ in found)
    ]
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(1.02, color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="word errors over those of dense")
    low, high = axes.get_xlim()
    within_a_decade = high / low < 10  # beyond, the labels of minor ticks would lie on one another
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}" if within_a_decade else LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.tick_params(axis="x", which="both", labelsize=8)
    lines = [
        Line2D([], [], color="tab:blue", label="shares matrices"),
        Line2D([], [], color="tab:orange", label="shares none"),
        Line2D([], [], color="gray", linewidth=2.5, label="95 %, voices and seeds"),
        Line2D([], [], color="gray", linewidth=0.9, label="95 %, voices of one seed"),
        Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="1.02, as in the paper"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _written_seeds(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    number = len(_seeds_of_both(runs, others))
    return "1 seed" if number == 1 else f"{number} seeds"
