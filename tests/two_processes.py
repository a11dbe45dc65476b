"""Runs a function in two processes of torch.distributed on the CPU, as a launcher would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

COUNT = 2
SECONDS = 600  # after which a process that has not ended counts as hanging


def run_together(function: Callable[..., Any], *args: Any, joined: bool = True) -> list[Any]:
    """What `function(*args)` returns in each of two processes. It must be at the top level of a module.

    Unless `joined`, the processes know of each other by their environment alone, as those that a launcher starts.

    Raises:
        AssertionError: with what both processes said, if one failed or did not end.
    """
    # The server imports the libraries once; its children are forked before any thread exists.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "hf_residual_transformer"])
    with socket.socket() as free, tempfile.TemporaryDirectory() as name:
        free.bind(("127.0.0.1", 0))
        port, folder = free.getsockname()[1], Path(name)
        free.close()
        processes = [
            context.Process(target=_run, args=(index, port, folder, function, args, joined))
            for index in range(COUNT)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(SECONDS)
            said = [path.read_text() for path in sorted(folder.glob("*.txt"))]
            assert all(process.exitcode == 0 for process in processes), "\n".join(said) or "a process hangs"
            return [torch.load(folder / f"{index}.pt", weights_only=False) for index in range(COUNT)]
        finally:
            for process in processes:
                process.kill()


def _run(
    index: int,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    joined: bool,
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(COUNT)}
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}
    torch.set_num_threads(1)
    try:
        if joined:
            distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS / 2))
        torch.save(function(*args), folder / f"{index}.pt")
        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
    except BaseException:
        (folder / f"{index}.txt").write_text(f"process {index}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
