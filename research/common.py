"""The common parts of the research scripts: the sample's folder, rows of it, and processes whose memory is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# glibc keeps what is freed in pieces below a threshold that grows; fixed, it gives them back, as a device must.
FIXED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
SAMPLE = Path(__file__).resolve().parent.parent / "sample"


def environment_with_fixed_malloc() -> dict[str, str]:
    """The environment of this process, with a setting that makes the C library return freed memory at once."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return own | FIXED_MALLOC


def json_of_fresh_process(
    command: Sequence[str], environment: Mapping[str, str], what: str
) -> dict[str, Any]:
    """Runs a script in a fresh process, and returns the JSON in the last line that it prints.

    Args:
        command: the script and its arguments.
        environment: the environment variables of the process.
        what: the name of the measurement for the error message.
    """
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{what} in a fresh process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(rows: Any, number: int) -> Any:
    """So many of the rows, evenly spread."""
    number = min(number, len(rows))
    return rows.select([index * len(rows) // number for index in range(number)])
