"""Commands that are killed at random moments and then run again give exactly what an uninterrupted one gives.

A warm process is forked for each run, so that nothing is imported anew. By default each command is killed once. `make
fuzz` kills 52 times, and writes what the kills hit into the file that HRT_FUZZ_KILL_RESULTS names.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from fuzz_counts import SEED, Counts, write_results
from test_runs import table

import hrt_cli

LIMIT = 300  # seconds, after which a run counts as one that hangs
EACH = 13  # kills of each command behind the marker
TRAINING = (
    "--use_cpu --max_steps 4 --save_steps 1 --logging_steps 1 --per_device_train_batch_size 2 --learning_rate 1e-3",
    "--disable_tqdm true --report_to none",
)
# Files that hold times or paths, or that are no part of the result.
OTHERS = (
    "compression.json",
    "trainer_state.json",
    "training_args.bin",
    "train_results.json",
    "all_results.json",
)


@dataclass
class Command:
    """A command without its output folder, and what an uninterrupted run of it made."""

    words: list[str]
    trains: bool
    out: Path
    seconds: float = 0.0

    def run(self, out: Path, *more: str, kill_after: float | None = None) -> tuple[int, str]:
        """The exit status, -9 where it was killed, and what was printed."""
        log = out.with_name(f"{out.name}.log")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setsid()
                torch.set_num_threads(
                    1
                )  # the parent's other threads are not in a fork, which would wait for them
                sys.stdout = sys.stderr = log.open("w", buffering=1)
                status = hrt_cli.main([*self.words, "--out", str(out), *more])
            finally:
                os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # a finished one waits for `waitpid`, so that the id is its own
        end = time.monotonic() + LIMIT
        found, ended = os.waitpid(pid, os.WNOHANG)
        while not found:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            found, ended = os.waitpid(pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(ended), log.read_text(errors="replace") if log.exists() else ""


def files_of(folder: Path) -> dict[str, bytes]:
    """The result in a folder, without checkpoints."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in OTHERS and not name.startswith(("checkpoint-", "_saving.")):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def commands(dense_whisper, dense_wav2vec2, tmp_path_factory) -> dict[str, Command]:
    """Four commands, each with the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("kill")
    clips = str(table(folder / "clips", ["abc", "bad", "cab", "face"]))
    student = str(folder / "compress")
    words = {
        "compress": f"compress {dense_whisper} --audio {clips} --rank 2 --iterations 1 --num-windows 2 --device cpu",
        "distill": f"distill {student} --teacher {dense_whisper} --audio {clips} --keep always --window-seconds 1",
        "finetune": f"finetune {dense_wav2vec2} --audio {clips}",
        "export": f"export {student}",
    }
    found = {}
    for name, line in words.items():
        trains = name in ("distill", "finetune")
        command = Command(
            [*line.split(), *(" ".join(TRAINING).split() if trains else [])], trains, folder / name
        )
        command.run(folder / f"{name}-first")  # what a first run alone does is done
        start = time.perf_counter()
        status, said = command.run(command.out)
        assert status == 0, said
        command.seconds = time.perf_counter() - start
        found[name] = command
    return found


def kill_and_run_again(name: str, command: Command, random_: random.Random, out: Path) -> str:
    """What the kill hit; AssertionError where the second run does not give what an uninterrupted one gives."""
    status, said = command.run(out, kill_after=random_.uniform(0, command.seconds))
    assert status in (0, -signal.SIGKILL), said
    expected = files_of(command.out)
    if status == 0:
        hit = "finished before"
    elif not out.exists():
        hit = "no folder yet"
    elif command.trains:
        hit = "training"
    else:
        hit = "whole folder"
        assert files_of(out) == expected, f"{name} left half a folder"
    again = ["--resume_from_checkpoint", "last"] if command.trains and out.exists() else ["--overwrite"]
    status, said = command.run(out, *again)
    if status == 2 and "start anew with --overwrite" in said:
        hit = "no checkpoint yet"
        status, said = command.run(out, "--overwrite")
    assert status == 0, said
    made = files_of(out)
    assert made.keys() == expected.keys(), f"{name}: other files after {hit}"
    for file, content in expected.items():
        assert made[file] == content, f"{name}: another {file} after {hit}"
    assert not [*out.parent.glob(f".{out.name}*.unfinished"), *out.glob("*.unfinished")]
    return hit


@pytest.mark.parametrize("name", ["compress", "distill", "finetune", "export"])
def test_a_command_that_is_killed_and_run_again_gives_what_an_uninterrupted_one_gives(
    name, commands, tmp_path
):
    kill_and_run_again(name, commands[name], random.Random(f"{SEED} {name}"), tmp_path / "out")


def kill_often(name: str, command: Command, folder: Path) -> Counts:
    found, random_ = Counts(), random.Random(f"kills {SEED} {name}")
    for number in range(EACH):
        start, fault = time.process_time(), False
        try:
            outcome = kill_and_run_again(name, command, random_, folder / f"{name}-{number}")
        except AssertionError as error:
            outcome, fault = f"fault: {str(error)[-500:]}", True
        found.note(outcome, f"kill {number} of {name}", time.process_time() - start, fault=fault)
    return found


@pytest.mark.fuzz
def test_dozens_of_kills_change_no_result(commands, tmp_path):
    with get_context("fork").Pool(len(commands)) as pool:
        counts = pool.starmap(kill_often, [(name, command, tmp_path) for name, command in commands.items()])
    write_results("HRT_FUZZ_KILL_RESULTS", dict(zip(commands, counts, strict=True)))
