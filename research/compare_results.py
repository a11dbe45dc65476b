"""Keeps the results of `compare_methods.py` in a JSON file that grows with each result, and makes tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines import METHODS

from hf_residual_transformer.provenance import provenance

KEY = ("method", "budget", "seed", "settings")
Result = dict[str, Any]  # of one KEY, where the seed is None without training; "run" is where it is from
DENSE = "dense"
MARKERS = "os^vD<>pPX*hd8H"


class ResultsFile:
    """The JSON file at `path`, with "results" and the provenance of the "runs" that produced them, by index.

    Raises:
        ValueError: `path` is a file of another kind.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path
        self.results: list[Result] = []
        self.runs: list[dict[str, Any]] = []
        if path.exists() and not overwrite:
            try:
                contents = json.loads(path.read_text(encoding="utf-8"))
                self.results, self.runs = contents["results"], contents["runs"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"`output` must be new or a file that this script wrote, got {path}; name another, or pass "
                    "--overwrite"
                ) from error
        self.runs.append(provenance())

    def find(self, **wanted: Any) -> list[Result]:
        """The results that have these values."""
        return [r for r in self.results if all(r[name] == value for name, value in wanted.items())]

    def add(self, result: Result) -> None:
        """Adds a result, or replaces the one with the same KEY.

        The file is replaced as a whole, so that an interruption leaves the earlier contents.
        """
        old = self.find(**{name: result[name] for name in KEY})
        self.results = [other for other in self.results if other not in old]
        self.results.append({**result, "run": len(self.runs) - 1})
        self.runs[-1] = provenance()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        contents = json.dumps({"runs": self.runs, "results": self.results}, indent=2, ensure_ascii=False)
        beside.write_text(contents + "\n", encoding="utf-8")
        beside.replace(self.path)


@dataclass(frozen=True)
class Column:
    """A metric on one set of clips, with its factor, its decimals, and the highest value that a plot shows."""

    metric: str
    clips: str
    title: str
    scale: float
    digits: int
    most: float

    def of(self, result: Result) -> float:
        """The value of the column in a result."""
        return self.scale * result["metrics"][self.clips][self.metric]

    def cell(self, results: Sequence[Result]) -> str:
        """The mean over seeds, and the range if there are several seeds."""
        values = [self.of(result) for result in results]
        text = f"{sum(values) / len(values):.{self.digits}f}"
        if len(values) == 1:
            return text
        return f"{text} ({min(values):.{self.digits}f} to {max(values):.{self.digits}f})"


def columns_of(dense: Result) -> list[Column]:
    """The columns: WER and KL on the test clips, and the error of the final states on validation clips."""
    found = []
    for metric, title, scale, digits, most in (
        ("wer", "WER {}, %", 100.0, 1, 100.0),
        ("kl", "KL {}", 1.0, 3, 2.0),
        ("final_error", "final states' error", 1.0, 4, 1.0),
    ):
        for clips, values in dense["metrics"].items():
            if metric in values and (clips == "validation") == (metric == "final_error"):
                name = clips.replace("_", " ")
                found.append(Column(metric, clips, title.format(name), scale, digits, most))
    return found


def _grouped(results: Iterable[Result]) -> dict[tuple[float, str], list[Result]]:
    """Groups the results that differ only in their seed."""
    groups: dict[tuple[float, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["budget"], result["method"]), []).append(result)
    return groups


def table(dense: Result, results: Iterable[Result]) -> str:
    """The results as a Markdown table, sorted by budget and then by the first metric."""
    columns = columns_of(dense)
    head = ["budget", "method", "encoder", "parameters", "model, MB", "minutes", *(c.title for c in columns)]

    def order(group: tuple[tuple[float, str], list[Result]]) -> tuple[float, float]:
        (budget, _), seeds = group
        if "unreachable" in seeds[0]:
            return budget, math.inf
        return budget, sum(map(columns[0].of, seeds)) / len(seeds)

    rows = []
    for (budget, method), seeds in [((1.0, DENSE), [dense]), *sorted(_grouped(results).items(), key=order)]:
        row = [f"{budget:.4g}", method]
        if "unreachable" in seeds[0]:
            row += [f"not reached: {seeds[0]['unreachable']}", *[""] * (len(head) - 3)]
        else:
            encoder, minutes = seeds[0]["encoder"], sum(map(_minutes, seeds)) / len(seeds)
            row += [f"{encoder['ratio']:.1%}", f"{encoder['unique']:,}", f"{seeds[0]['bytes'] / 1e6:.1f}"]
            row += [f"{minutes:.1f}", *(column.cell(seeds) for column in columns)]
        rows.append(row)
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _minutes(result: Result) -> float:
    return sum(result["seconds"][name] for name in ("statistics", "conversion", "distillation")) / 60


Line = list[tuple[float, list[Result]]]  # points from left to right: where, and the results of all seeds


def plot(dense: Result, lines: dict[str, Line], axis: str, title: str, path: Path) -> None:
    """Plots each metric over `axis`, with one line for each label. A label begins with a method.

    Values above `most` are cut off.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns, methods = columns_of(dense), list(METHODS)
    across = math.ceil((len(columns) + 1) / 2)  # in two rows, with the legend as the last
    figure = Figure(figsize=(5 * across, 8), layout="constrained")
    panels = figure.subplots(2, across, squeeze=False).flatten()
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    for panel, column in zip(panels, columns):
        for number, (label, line) in enumerate(lines.items()):
            places = [place for place, _ in line]
            values = [[column.of(result) for result in seeds] for _, seeds in line]
            index = methods.index(label) if label in METHODS else number
            color, marker = colormaps["tab20"](index % 20), MARKERS[index % len(MARKERS)]
            panel.vlines(places, [min(v) for v in values], [max(v) for v in values], color=color)
            panel.plot(places, [sum(v) / len(v) for v in values], marker=marker, color=color, label=label)
        panel.axhline(column.of(dense), color="black", linestyle=":", label=DENSE)
        panel.set_ylim(0, min(panel.get_ylim()[1], column.most))
        panel.set_xlabel(axis)
        panel.set_title(column.title)
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", ncols=2, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def lines_by_size(results: Iterable[Result]) -> dict[str, Line]:
    """One line for each method, over the encoder's size in percent of dense."""
    groups = _grouped(result for result in results if "unreachable" not in result)
    lines = {}
    for method in METHODS:
        found = [seeds for (_, name), seeds in groups.items() if name == method]
        if found:
            points = [(100 * seeds[0]["encoder"]["ratio"], seeds) for seeds in found]
            lines[method] = sorted(points, key=lambda point: point[0])
    return lines


def lines_by_steps(stages: dict[int, list[Result]]) -> dict[str, Line]:
    """One line for each method and budget that was distilled for several numbers of steps, over these and 0."""
    lines: dict[str, Line] = {}
    for steps, results in sorted(stages.items()):
        groups = _grouped(result for result in results if "unreachable" not in result)
        for (budget, method), seeds in sorted(groups.items()):
            lines.setdefault(f"{method}, {budget:.0%}", []).append((steps, seeds))
    return {label: line for label, line in lines.items() if len(line) > 2}


def write_report(path: Path, title: str, dense: Result, stages: dict[int, list[Result]]) -> None:
    """Writes tables and plots by the steps of distillation, beside the JSON file at `path`."""
    parts = [f"# {title}"]
    for steps, results in stages.items():
        if results:
            stage = f"after {steps} steps of distillation" if steps else "without training"
            image = path.with_name(f"{path.stem}-{steps}.png")
            lines, axis = lines_by_size(results), "parameters of the encoder's layers, % of dense"
            plot(dense, lines, axis, f"{title}, {stage}", image)
            parts += [f"## {stage.capitalize()}", table(dense, results), f"![{stage}]({image.name})"]
    by_steps = lines_by_steps(stages)
    if by_steps:
        image = path.with_name(f"{path.stem}-steps.png")
        plot(dense, by_steps, "steps of distillation", title, image)
        parts += ["## More steps", f"![errors over the steps of distillation]({image.name})"]
    tried = {result["method"] for results in stages.values() for result in results}
    about = [f"- {name}: {method.about}." for name, method in METHODS.items() if name in tried]
    notes = (
        "A weight in four bits, with its part of a scale, counts as 4.5 / 16 of a parameter, in fewer accordingly:"
        " sizes are those in bytes with 16 bits for all else. Minutes are those of the conversion, its pass over "
        "the calibration included, and of the distillation, but for the transcriptions by the teacher, which are "
        "made once for all; several runs shared the machine, so they compare nothing. KL is the mean divergence of"
        " the decoder's token distributions from the dense model's, in nats, with the transcript given. The final "
        "states' error is relative to their variance, over frames of speech. Several seeds: mean "
        f"(range). All figures: [{path.name}]({path.name})."
    )
    text = "\n\n".join([*parts, "## Methods", "\n".join(about), notes])
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
