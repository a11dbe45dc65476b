"""What the research scripts share: the sample, and processes whose memory is measured."""

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
    """This process's, where the C library is told to give back what is freed, not to keep it for speed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return own | FIXED_MALLOC


def json_of_fresh_process(
    command: Sequence[str], environment: Mapping[str, str], what: str
) -> dict[str, Any]:
    """The JSON in the last line that a script prints.

    Args:
        environment: the variables that it gets.
        what: the error says of a script that failed.
    """
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{what} in a fresh process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
