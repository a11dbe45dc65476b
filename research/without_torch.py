"""Transcribes clips with onnx-asr, in an environment that has ONNX Runtime and NumPy but not PyTorch.

    python research/without_torch.py --model compact-onnx --clips clips.npz --language en

The environment is made once, beside the cache of pretrained weights. The folder is one that `hrt export` wrote, and the
`.npz` file has an array of samples at 16 kHz for each clip. It prints a line of JSON: the texts by the names of the
clips, the seconds, the private memory that loading and transcribing added, which of the modules that it must do without
are there, and the versions of all packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).with_name("without_torch_requirements.txt")
SAMPLING_RATE = 16_000
ABSENT = ("torch", "transformers", "hf_residual_transformer")  # what the environment must do without


def cache_folder() -> Path:
    """The folder that keeps environments of other runtimes: `runtimes` in `HRT_CACHE`, else in `.cache`."""
    cache = os.environ.get("HRT_CACHE") or Path(__file__).resolve().parent.parent / ".cache"
    return Path(cache) / "runtimes"


def installed_once(name: str, wanted: str, install: Any) -> Path:
    """The folder of an environment, which `install(folder)` fills where it is not there yet.

    Args:
        name: of the environment.
        wanted: what is installed, which is part of the folder's name, so that a change makes a new one.
        install: fills a new, empty folder; it may raise `subprocess.CalledProcessError`.

    Raises:
        RuntimeError: if the packages cannot be had.
    """
    folder = cache_folder() / f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    done = folder / ".installed"
    if done.is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        install(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder)
        detail = getattr(error, "stderr", None) or str(error)
        raise RuntimeError(f"the environment {name} cannot be installed: {detail.strip()[-1000:]}") from error
    done.touch()
    return folder


def python_without_torch() -> Path:
    """The interpreter of the environment without PyTorch.

    Raises:
        RuntimeError: if its packages cannot be had.
    """

    def install(folder: Path) -> None:
        commands: list[list[str | Path]] = [
            [sys.executable, "-m", "venv", folder],
            [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS],
        ]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)

    wanted = f"{sys.version_info[:2]} {REQUIREMENTS.read_text()}"
    return installed_once("onnx-asr", wanted, install) / "bin" / "python"


def transcribe_without_torch(
    folder: str | Path, clips: Mapping[str, Any], language: str = "en", threads: int = 2
) -> dict[str, Any]:
    """Transcribes in a fresh process of that environment.

    Args:
        folder: an exported model.
        clips: samples at 16 kHz, (num_samples,), by name.
        language: of all clips.
        threads: of ONNX Runtime.

    Returns:
        What the process prints, see above.

    Raises:
        RuntimeError: if the packages cannot be had, or the process fails.
    """
    import numpy as np

    python = python_without_torch()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "clips.npz"
        np.savez(path, **clips)
        options = ["--model", folder, "--clips", path, "--language", language, "--threads", threads]
        # Of this environment, the other must see nothing.
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [python, __file__, *map(str, options)], capture_output=True, text=True, check=False, env=own
        )
    if done.returncode:
        raise RuntimeError(f"transcribing without PyTorch failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def private_bytes() -> int:
    """Bytes that this process shares with no other, in pages that were written to; 0 where the system does not say."""
    path = Path("/proc/self/smaps_rollup")
    found = re.search(r"Private_Dirty:\s+(\d+) kB", path.read_text()) if path.is_file() else None
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of an exported model")
    parser.add_argument("--clips", required=True, help="an .npz file with an array for each clip")
    parser.add_argument("--language", default="en", help="language of all clips")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime")
    args = parser.parse_args()
    if find_spec("onnx_asr") is None:
        clips = read_clips(args.clips)
        print(json.dumps(transcribe_without_torch(args.model, clips, args.language, args.threads)))
        return

    import onnx_asr
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.enable_cpu_mem_arena = False
    before, start = private_bytes(), time.perf_counter()
    model = onnx_asr.load_model("whisper", args.model, sess_options=options)
    loaded, weights = time.perf_counter(), private_bytes()
    texts = {
        name: model.recognize(samples, sample_rate=SAMPLING_RATE, language=args.language).strip()
        for name, samples in read_clips(args.clips).items()
    }
    result = {
        "texts": texts,
        "load_seconds": loaded - start,
        "seconds": time.perf_counter() - loaded,
        "memory": {"weights": weights - before, "after_transcribing": private_bytes() - before},
        "present": [name for name in ABSENT if name in sys.modules or find_spec(name) is not None],
        "versions": {found.name: found.version for found in distributions()},
    }
    print(json.dumps(result), flush=True)


def read_clips(path: str | Path) -> dict[str, Any]:
    """The arrays of an `.npz` file by their names."""
    import numpy as np

    with np.load(path) as arrays:
        return {name: arrays[name].astype(np.float32) for name in arrays.files}


if __name__ == "__main__":
    main()
