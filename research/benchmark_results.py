"""Ratios of paired measurements, their verdicts on goals, and their tables and plots.

`benchmark.py` makes the measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_model import ACTIVATIONS, KEPT, STATE

# What varies, one at a time, and the values that it takes.
SCALING = {
    "layers": [6, 12, 24, 32],
    "width": [384, 512, 768, 1024, 1280],
    "rank": [0, 4, 16, 64, 256],
    "seconds": [0.5, 1, 3, 10, 30],
}


@dataclass(frozen=True)
class Goal:
    """The limit of a ratio. With `strict`, the ratio must be below the limit."""

    limit: float
    strict: bool = False

    def __str__(self) -> str:
        return f"{'<' if self.strict else '<='} {self.limit:.2f}"


@dataclass(frozen=True)
class Comparison:
    """Paired measurements of two models, and the ratio of each pair.

    Args:
        part: the part of the benchmark.
        what: the quantity that was measured.
        dense: seconds or bytes of the dense model, or of the other model that `what` names.
        residual: seconds or bytes of the residual model, one for each of `dense`.
        goal: the goal for the ratio, if there is one.
        unit: "s" or "bytes".
        axis: the name of the axis if the comparison is a point of a curve, such as "rank".
        at: the position on that axis.
    """

    part: str
    what: str
    dense: Sequence[float]
    residual: Sequence[float]
    goal: Goal | None = None
    unit: str = "s"
    axis: str | None = None
    at: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """Minimum, lower quartile, median, upper quartile and maximum; NaN if a growth is not above 0."""
        if min(self.dense) <= 0:
            return [float("nan")] * 5
        pairs = np.asarray(self.residual) / np.asarray(self.dense)
        return np.quantile(pairs, [0, 0.25, 0.5, 0.75, 1]).tolist()

    @property
    def verdict(self) -> str:
        """Whether the goal is "met", "not met" or "undecided".

        It is undecided if the interquartile range exceeds the distance of the median from the goal.
        """
        if self.goal is None:
            return "no goal"
        _, lower, ratio, upper, _ = self.ratios
        if upper - lower > abs(ratio - self.goal.limit):
            return "undecided"
        met = ratio < self.goal.limit or (ratio == self.goal.limit and not self.goal.strict)
        return "met" if met else "not met"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("min", "lower_quartile", "median", "upper_quartile", "max")
        ratio = {name: None if np.isnan(value) else value for name, value in zip(names, self.ratios)}
        found = {"ratio": ratio, "repeats": len(self.dense), "verdict": self.verdict}
        return {**asdict(self), **found, "goal": self.goal and str(self.goal)}

    def cells(self) -> list[str]:
        """The cells of the comparison's row in the table."""
        scale, unit = (1e3, "ms") if self.unit == "s" else (1e-6, "MB")
        values = [f"{scale * float(np.median(values)):.4g} {unit}" for values in (self.dense, self.residual)]
        least, lower, ratio, upper, most = (f"{ratio:.3f}" for ratio in self.ratios)
        once = len(self.dense) == 1
        spread = ["", ""] if once else [f"{lower} to {upper}", f"{least} to {most}"]
        return [self.part, self.what, *values, ratio, *spread, str(self.goal or ""), self.verdict]


def table(comparisons: Iterable[Comparison]) -> str:
    """The comparisons as a Markdown table whose columns line up."""
    head = ["part", "measured", "dense", "residual", "ratio", "quartiles", "range", "goal", "verdict"]
    rows = [head, *(comparison.cells() for comparison in comparisons)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def plot_ratios(comparisons: Iterable[Comparison], title: str, path: Path) -> None:
    """Plots the ratio over each axis, with the quartiles as bars, and the goals."""
    from matplotlib.figure import Figure

    points = [comparison for comparison in comparisons if comparison.axis]
    axes_names = [name for name in SCALING if any(point.axis == name for point in points)]
    figure = Figure(figsize=(1 + 4 * len(axes_names), 4), layout="constrained")
    panels = figure.subplots(1, len(axes_names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, axes_names):
        places = sorted({point.at for point in points if point.axis == name})
        for part in dict.fromkeys(point.part for point in points if point.axis == name):
            curve = sorted((p for p in points if (p.part, p.axis) == (part, name)), key=lambda p: p.at)
            _, lower, ratio, upper, _ = np.array([point.ratios for point in curve]).T
            x = [places.index(point.at) for point in curve]
            bars = [ratio - lower, upper - ratio]
            drawn = panel.errorbar(x, ratio, yerr=bars, marker="o", capsize=3, label=part)
            if curve[0].goal:
                color = drawn.lines[0].get_color()
                panel.axhline(curve[0].goal.limit, color=color, linestyle=":", label=f"goal {curve[0].goal}")
        panel.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        panel.set_xlabel(name)
        panel.legend()
    panels[0].set_ylabel("time of a forward pass, residual / dense")
    figure.suptitle(title, wrap=True)
    figure.savefig(path, dpi=120)


def plot_memory(comparisons: Iterable[Comparison], title: str, path: Path) -> None:
    """Plots the memory of a training step as stacked bars, and that of a process that has loaded the encoder."""
    from matplotlib.figure import Figure

    found = {c.what: (c.dense[0] / 1e6, c.residual[0] / 1e6) for c in comparisons if c.unit == "bytes"}
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    held = {what: np.array(found[what]) for what in (*STATE, ACTIVATIONS)}
    held["kept whatever the batch"] = np.array(found[KEPT]) - held[ACTIVATIONS]
    below = np.zeros(2)
    for what, values in held.items():
        left.bar(["dense", "residual"], values, bottom=below, label=what)
        below += values
    left.set_title("training step")
    own = {what.replace(", USS", ""): values for what, values in found.items() if ", USS" in what}
    for offset, kind in enumerate(("dense", "residual")):
        y = np.arange(len(own)) + 0.4 * offset
        right.barh(y, [values[offset] for values in own.values()], height=0.4, label=kind)
    right.set_yticks(np.arange(len(own)) + 0.2, list(own))
    right.set_title("a process of its own (USS)")
    for panel in (left, right):
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    left.set_ylabel("MB")
    right.set_xlabel("MB")
    figure.suptitle(title, wrap=True)
    figure.savefig(path, dpi=120)
