"""Three tables over all grids of `paper.py`: the word errors of encoders of about a third of the size, over those of
dense and over those of fewer dense layers; those of the paper's other rows, over those of K=3, R=2; and what the voice
of the test that is hardest for dense has of its errors. Writes `results/paper/summary.md` from the JSON files of the
runs.

    python research/paper_summary.py

`--seeds 3 4 5 6` only prints the tables, of these seeds alone, such as those that were added after a look at the
others. `--without_voices iven2 klatt5 steph3` only prints the tables, too, as if these voices were in no test.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from paper_table import of_units, own_voices, ratio_of_errors, read_runs, word_errors, words_of, written_ratio

# The folder of a grid, a task of it, and its runs by task and cell.
Grid = tuple[Path, str, dict[tuple[str, str], list[dict[str, Any]]]]
RESULTS = Path(__file__).resolve().parent.parent / "results" / "paper"
COLUMNS = {
    "K=3, R=2": ("k3-r2", "dense"),
    "the same, divided rate": ("k3-r2-divided", "dense"),
    "K=3, R=2, cyclic": ("k3-r2-cyclic", "dense"),
    "fewer layers": ("shallow", "dense"),
    "low rank": ("low-rank", "dense"),
    "cyclic over fewer layers": ("k3-r2-cyclic", "shallow"),
    "cyclic over adjacent": ("k3-r2-cyclic", "k3-r2"),
}
ORDER = {
    "K=3, R=16": ("k3-r16", "k3-r2"),
    "K=6, R=16": ("k6-r16", "k3-r2"),
    "K=9, R=16": ("k9-r16", "k3-r2"),
    "K=9, R=2": ("k9-r2", "k3-r2"),
    "K=3, R=2, no diagonal": ("k3-r2-none", "k3-r2"),
    "K=3, R=2, diagonal on all": ("k3-r2-all", "k3-r2"),
    "K=3, R=0": ("k3-r0", "k3-r2"),
    "pure sharing": ("k3-r0-none", "k3-r2"),
}


def summary(results: Path, seeds: Collection[int] | None = None, without_voices: Collection[str] = ()) -> str:
    """The tables, of all seeds or some, and of all voices or all but some.

    Raises:
        ValueError: for a voice that is in no test, in the tests of some seeds alone, or the last of one.
    """
    _check_voices(results, without_voices)
    grids = list(_grids(results, seeds, without_voices))
    return "\n".join([_table(grids, COLUMNS), _table(grids, ORDER), _voices(grids)])


def _voices(grids: list[Grid]) -> str:
    """The hardest voice of each test: its share of dense's word errors, and the WER with it and with the others."""
    rows = [["grid", "task", "hardest test voice", "its share of dense's errors, %"]]
    rows[0] += [
        f"{name}, WER % {who}" for name in ("dense", "K=3, R=2") for who in ("with it", "with the others")
    ]
    rows.append(["---"] * 3 + ["---:"] * (len(rows[0]) - 3))
    for folder, task, runs in grids:
        dense, shared = (runs.get((task, cell), []) for cell in ("dense", "k3-r2"))
        if not dense or "voices" not in dense[0]["test"] or own_voices(dense):
            continue
        errors = np.sum([of_units(run, word_errors(run)) for run in dense], 0)
        worst = int(errors.argmax())
        row = [
            f"`{folder.name}`",
            task,
            dense[0]["test"]["voices"][worst],
            f"{100 * errors[worst] / errors.sum():.0f}",
        ]
        for found in (dense, shared):
            row += [f"{100 * rate:.1f}" for rate in _wer_with(found, worst)] if found else ["-", "-"]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _wer_with(runs: list[dict[str, Any]], voice: int) -> tuple[float, float]:
    """The WER of the strings of one voice, and that of the others."""
    errors, words = (
        np.sum([of_units(run, of_clips(run)) for run in runs], 0) for of_clips in (word_errors, words_of)
    )
    return errors[voice] / words[voice], np.delete(errors, voice).sum() / np.delete(words, voice).sum()


def _grids(results: Path, seeds: Collection[int] | None, without_voices: Collection[str]) -> Iterator[Grid]:
    """The folder of each grid, each of its tasks, and its runs."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        runs = {
            key: [
                _without_voices(run, without_voices) for run in found if seeds is None or run["seed"] in seeds
            ]
            for key, found in read_runs(folder).items()
        }
        for task in sorted({task for task, _ in runs}):
            yield folder, task, runs


def _check_voices(results: Path, names: Collection[str]) -> None:
    unknown, left_out = set(names), set(names)
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        for task, runs in itertools.groupby(sorted(read_runs(folder).items()), key=lambda entry: entry[0][0]):
            tests = {frozenset(run["test"].get("voices", ())) for _, own in runs for run in own}
            speakers = frozenset().union(*tests)
            unknown -= speakers
            if len(tests) > 1 and left_out & speakers:
                raise ValueError(
                    f"`without_voices` must be of tests that all seeds have, and those of {folder.name}, {task}, differ"
                )
            if any(voices and voices <= left_out for voices in tests):
                raise ValueError(f"`without_voices` must leave a voice in the test of {folder.name}, {task}")
    if unknown:
        raise ValueError(f"`without_voices` must name voices of the tests, got {', '.join(sorted(unknown))}")


def _without_voices(run: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A run whose test is without the clips of some voices."""
    test = run["test"]
    if not set(names) & set(test.get("voices", ())):
        return run
    clips = [int(number) for number in test["voices_of_clips"].split()]
    kept = [place for place, number in enumerate(clips) if test["voices"][number] not in names]
    voices = [name for name in test["voices"] if name not in names]
    values: dict[str, Any] = {"voices": voices}
    values["voices_of_clips"] = " ".join(str(voices.index(test["voices"][clips[place]])) for place in kept)
    for name in ("word_errors_of_clips", "words_of_clips"):
        counts = test[name].split()
        values[name] = " ".join(counts[place] for place in kept)
    return run | {"test": test | values}


def _table(grids: list[Grid], columns: dict[str, tuple[str, str]]) -> str:
    """A row for each grid and task that has any of the ratios. A cell has the ratio of the word errors, and the
    interval with 95 % of the draws of the test's voices and of seeds; of one seed, it has the interval of voices
    alone, and says so.
    """
    head = ["grid", "task", *columns]
    rows = [head, ["---", "---", *["---:"] * len(columns)]]
    for folder, task, runs in grids:
        cells = [
            _cell(runs.get((task, own), []), runs.get((task, other), [])) for own, other in columns.values()
        ]
        if set(cells) != {"-"}:
            rows.append([f"`{folder.name}`", task, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cell(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    ratio, of_voices, of_both = written_ratio(ratio_of_errors(runs, others))
    if ratio == "-":
        return "-"
    return f"{ratio} ({of_voices}, one seed)" if of_both == "-" else f"{ratio} ({of_both})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with a folder for each scale")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="prints the tables of these seeds, and writes nothing"
    )
    parser.add_argument(
        "--without_voices", nargs="+", default=[], help="prints the tables without these, and writes nothing"
    )
    args = parser.parse_args()
    text = summary(args.results, args.seeds, args.without_voices)
    if args.seeds is None and not args.without_voices:
        (args.results / "summary.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
