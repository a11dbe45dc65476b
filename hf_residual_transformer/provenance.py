"""Records where a figure comes from: the command, versions and hardware, for the JSON file that holds it."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .version import __version__

LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "jiwer", "soundfile", "numpy")


def provenance() -> dict[str, Any]:
    """The command line of this process, versions of Python and libraries, the hardware and the present time (UTC)."""
    versions = {name: _version(name) for name in LIBRARIES}
    return {
        "command": " ".join(shlex.quote(portable(word)) for word in sys.argv),
        "versions": {
            "python": platform.python_version(),
            "hf_residual_transformer": __version__,
            **{name: version for name, version in versions.items() if version is not None},
        },
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def portable(word: str) -> str:
    """Removes this machine's folders from a word of a command line.

    An absolute path, also one after `--option=` or `kind:`, becomes relative to the working directory. A path outside
    of the working directory becomes its last part. Addresses such as https://host/name stay.
    """
    before, value = re.fullmatch(r"(.*[=:])?(.*)", word, re.DOTALL).groups("")  # type: ignore[union-attr]
    path = Path(value)
    if not path.is_absolute() or value.startswith("//"):
        return word
    is_inside = path.is_relative_to(Path.cwd()) and path != Path.cwd()
    relative = path.relative_to(Path.cwd()) if is_inside else Path(path.name)
    return f"{before}{relative}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The name of the CPU, from /proc/cpuinfo on Linux and from `platform` on other systems."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()
