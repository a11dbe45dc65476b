"""Compares ways to run a Whisper: bytes, memory, speed, word error rate, and disagreement with the dense model.

The same clips go to each system, in a fresh process each. `runtimes.py` says which systems there are, and how they
decode. Disagreement is the word error rate of a system's transcripts against those of the dense model in PyTorch. Both
texts are normalised first. Intervals are 95 % of bootstrap samples of the clips; the same samples serve all systems, so
ratios to dense are paired. With `--join`, adjacent recordings of one folder, as of one speaker, become one clip of so
many seconds at most, so that thousands of words take little time. Memory is the greatest unique set size of the
process, read ten times a second, libraries included.

    python research/compare_runtimes.py --model openai/whisper-base --data /tmp/queen --join 28 \\
        --systems torch-dense q4_0-rounded ours:outputs/base-31 faster-whisper:/tmp/int8 whisper.cpp:/tmp/q4_0.bin \\
        --python faster-whisper=/tmp/peers/bin/python whisper.cpp=/tmp/peers/bin/python \\
        --output results/runtimes-base.json

A minute on a CPU: `--data sample --split validation --max_clips 4 --systems torch-dense q4_0-rounded --output
outputs/runtimes.json`. A system whose result is in the JSON file, with the same weights and settings, is not run again.
With `--rounds 2`, all systems run in turns until each has two measurements of time and memory, of which the median is
reported, with the least and the most real-time factor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from pretrained import resolve_pretrained
from runtimes import KINDS, SAMPLING_RATE, Runtime, create
from runtimes_report import DENSE, Clips, write_report
from transformers import AutoProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from hf_residual_transformer.provenance import portable, provenance
from hf_residual_transformer.speech.datasets import load_speech_dataset

Result = dict[str, Any]
SECONDS_BETWEEN_READINGS = 0.1
PAUSE_SECONDS = 0.5
MEASURED = ("seconds", "encoder_seconds", "load_seconds", "peak_uss")  # in every round


def read_clips(
    folder: str,
    split: str,
    language: str,
    max_clips: int | None,
    max_seconds: float,
    join_seconds: float | None = None,
) -> tuple[Clips, list[np.ndarray]]:
    """The ids and references of so many clips, evenly spread over the split, and their samples."""
    rows: Any = load_speech_dataset(folder, split, language=language, max_seconds=max_seconds)
    found = [(portable(row["audio"]["path"] or ""), row["text"], row["audio"]["array"]) for row in rows]
    if join_seconds is not None:
        found = list(joined(found, join_seconds))
    number = min(max_clips or len(found), len(found))
    found = [found[index * len(found) // number] for index in range(number)]
    ids, texts, samples = map(list, zip(*found))
    return Clips(ids, texts), samples


Clip = tuple[str, str, np.ndarray]  # path, text, samples


def joined(clips: Iterable[Clip], seconds: float) -> Iterator[Clip]:
    """Joins adjacent clips of one folder as long as they fit, with a pause between them.

    The path of a joined clip is that of its first.
    """
    pause = np.zeros(int(PAUSE_SECONDS * SAMPLING_RATE), np.float32)
    before: Clip | None = None
    for path, text, samples in clips:
        if before is not None:
            longer = np.concatenate([before[2], pause, samples])
            if Path(before[0]).parent == Path(path).parent and len(longer) <= seconds * SAMPLING_RATE:
                before = before[0], f"{before[1]} {text}", longer
                continue
            yield before
        before = path, text, samples
    if before is not None:
        yield before


def normalizer_for(model: str, language: str) -> Any:
    """Whisper's normaliser. Diacritics count only in English, because transcripts in the sample lack them."""
    if language != "en":
        return BasicTextNormalizer(remove_diacritics=True)
    spellings = AutoProcessor.from_pretrained(model).tokenizer.english_spelling_normalizer
    return EnglishTextNormalizer(spellings or {})


def digest(paths: Sequence[Path]) -> str:
    """A hash of the contents of files, by which a result stays tied to its weights."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:16]


def run_in_fresh_process(
    command: Sequence[str], threads: int, watch: bool = True, variables: Mapping[str, str] | None = None
) -> Result:
    """Runs a command, and returns the JSON in its last line, with the `peak_uss` of the process if `watch`.

    Args:
        command: the program and its arguments.
        threads: the number of threads.
        watch: whether to measure the memory.
        variables: further environment variables.

    Raises:
        RuntimeError: the command failed; the message has the end of what it said.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), **(variables or {})}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, stdout=said, stderr=complaints, env=environment)
        peak, watched = 0, psutil.Process(process.pid)
        try:
            if not watch:
                process.wait()
            while process.poll() is None:
                try:
                    peak = max(peak, watched.memory_full_info().uss)
                except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    process.wait()
                time.sleep(SECONDS_BETWEEN_READINGS)
        finally:
            process.kill()  # or else it would go on, and slow what is measured next
        if process.returncode:
            complaints.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{complaints.read()[-2000:]}")
        said.seek(0)
        return {**json.loads(said.read().splitlines()[-1]), "peak_uss": peak}


class Results:
    """The JSON file of all systems' results.

    Raises:
        ValueError: `path` has results of other settings, or is another kind of file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.contents: dict[str, Any] = {"settings": dict(settings), "runs": [], "results": []}
        if path.exists():
            try:
                self.contents = json.loads(path.read_text(encoding="utf-8"))
                known = self.contents["settings"]
                assert isinstance(self.contents["results"], list)
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                raise ValueError(f"`output` must be new or a file of this script, got {path}") from error
            if known != dict(settings):
                raise ValueError(
                    f"`output` must have results of the same settings, {dict(settings)}, but {path} has {known}; "
                    "name another file"
                )
        self.contents["runs"].append(provenance())

    @property
    def results(self) -> list[Result]:
        """One for each system."""
        found: list[Result] = self.contents["results"]
        return found

    def has(self, system: str, weights: str) -> bool:
        """Whether the system has a result with these weights."""
        return self.rounds(system, weights) > 0

    def rounds(self, system: str, weights: str) -> int:
        """How often the system has been measured with these weights."""
        return len(self._measured(system, weights))

    def _measured(self, system: str, weights: str) -> list[Result]:
        """What each round measured."""
        for result in self.results:
            if (result["system"], result["weights"]) == (system, weights):
                found: list[Result] = result.get("rounds", [_measurements(result)])
                return found
        return []

    def add(self, result: Result) -> None:
        """Adds a result in place of the system's older one, and saves all.

        With the same weights, it is a further round: times and memory become the medians of all, and the texts stay.
        """
        result = {**result, "run": len(self.contents["runs"]) - 1}
        kept = [other for other in self.results if other["system"] != result["system"]]
        if before := self._measured(result["system"], result["weights"]):
            (old,) = (other for other in self.results if other["system"] == result["system"])
            rounds = [*before, _measurements(result)]
            medians = {
                name: median(found[name] for found in rounds) for name in MEASURED if name in rounds[0]
            }
            result = {**old, **medians, "rounds": rounds}
        self.contents["results"] = [*kept, result]
        self.save()

    def save(self) -> None:
        """Replaces the file as a whole, so that an interruption leaves the earlier contents."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(self.path)


def _measurements(result: Result) -> Result:
    """What one round measured, and in which run."""
    return {name: result[name] for name in (*MEASURED, "run") if result.get(name) is not None}


def interpreters_of(values: Sequence[str]) -> dict[str, str]:
    """The interpreter of each kind of system, from words such as `whisper.cpp=/tmp/peers/bin/python`."""
    found = {}
    for value in values:
        kind, _, path = value.partition("=")
        if kind not in KINDS or not Path(path).is_file():
            raise ValueError(f"`python` must be a kind of system, '=' and an interpreter, got {value!r}")
        found[kind] = path
    return found


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every comparison has: the dense model, the clips, threads, and the file of results."""
    parser.add_argument("--model", default="openai/whisper-base", help="id or folder of the dense Whisper")
    parser.add_argument("--data", required=True, help="folder with recordings and transcripts")
    parser.add_argument("--split", default="test", help="split of the data")
    parser.add_argument("--max_clips", type=int, help="so many clips, evenly spread; by default all")
    parser.add_argument("--max_seconds", type=float, default=30.0, help="leaves out longer clips; at most 30")
    parser.add_argument(
        "--join",
        type=float,
        metavar="SECONDS",
        help="joins adjacent clips of a folder up to this length; at most 30",
    )
    parser.add_argument("--language", default="en", help="language of the clips")
    parser.add_argument("--threads", type=int, default=2, help="threads of each system")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; table and plot lie beside it")


def check_clip_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where an option of the clips cannot be."""
    if not 0 < args.max_seconds <= 30:
        parser.error(
            f"--max_seconds must be above 0 and at most 30, Whisper's window, got {args.max_seconds:g}"
        )
    if args.join is not None and not 0 < args.join <= 30:
        parser.error(f"--join must be above 0 and at most 30, Whisper's window, got {args.join:g}")
    if args.max_clips is not None and args.max_clips < 1:
        parser.error(f"--max_clips must be at least 1, got {args.max_clips}")


def clips_of(args: argparse.Namespace) -> tuple[Clips, list[np.ndarray]]:
    """The clips that the options name, as `read_clips` gives them."""
    return read_clips(args.data, args.split, args.language, args.max_clips, args.max_seconds, args.join)


def settings_of(args: argparse.Namespace, clips: Clips, samples: Sequence[np.ndarray]) -> dict[str, Any]:
    """What a file of results says of the dense model and the clips."""
    return {
        "model": portable(args.model),
        "data": Path(args.data).name,
        "split": args.split,
        "language": args.language,
        "clips": len(samples),
        "max_seconds": args.max_seconds,
        "join_seconds": args.join,
        "audio_seconds": round(sum(map(len, samples)) / SAMPLING_RATE, 2),
        "transcripts": hashlib.sha256("\n".join(clips.references).encode()).hexdigest()[:16],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument(
        "--words_only", action="store_true", help="leaves out speed and memory, as when other jobs run beside"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="measurements of each system, in turns (default: 1)"
    )
    parser.add_argument("--systems", nargs="+", default=[], help="see research/runtimes.py")
    parser.add_argument("--python", nargs="+", default=[], metavar="KIND=PATH", help="interpreter of a kind")
    args = parser.parse_args()
    check_clip_options(parser, args)
    if args.rounds < 1 or (args.rounds > 1 and args.words_only):
        parser.error(f"--rounds must be at least 1, and 1 with --words_only, got {args.rounds}")

    model = resolve_pretrained(args.model)
    pythons = interpreters_of(args.python)
    systems: dict[str, Runtime] = {
        system: create(system, model, args.language, args.threads) for system in args.systems
    }
    clips, samples = clips_of(args)
    settings = {**settings_of(args, clips, samples), "threads": args.threads, "timed": not args.words_only}
    results = Results(args.output, settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clips.npz"
        arrays: dict[str, Any] = {f"{index:05d}": array for index, array in enumerate(samples)}
        np.savez(path, **arrays)
        weights_of = {system: digest(runtime.files) for system, runtime in systems.items()}
        for index, (system, runtime) in product(range(args.rounds), systems.items()):
            weights = weights_of[system]
            if results.rounds(runtime.name, weights) > index:
                print(f"{runtime.name} is in {args.output}", flush=True)
                continue
            command = [
                pythons.get(runtime.kind, sys.executable),
                str(Path(__file__).with_name("runtimes.py")),
            ]
            command += ["--system", system, "--model", model, "--clips", str(path)]
            command += ["--language", args.language, "--threads", str(args.threads)]
            measured = run_in_fresh_process(
                command, args.threads, watch=not args.words_only, variables=runtime.environment
            )
            print(f"{runtime.name}: {measured['seconds']:.0f} s", flush=True)
            about = {"system": runtime.name, "kind": runtime.kind, "rounded": runtime.rounded}
            if args.words_only:
                measured = {"texts": measured["texts"]}
            results.add({**about, "weights": weights, "file_bytes": runtime.file_bytes(), **measured})
    if not results.has(DENSE, digest(create(DENSE, model).files)):
        parser.error(f"disagreement is with {DENSE}, which {args.output} lacks; add it to --systems")
    normalize = normalizer_for(model, args.language)
    results.contents["runs"][-1] = provenance()
    results.contents["figures"] = write_report(args.output, settings, results.results, clips, normalize)
    results.save()


if __name__ == "__main__":
    # So that a process which is told to end ends the system that it runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
