"""Writes a model, compact or dense, for runtimes that need no PyTorch:

    hrt export compact --out compact-onnx

The folder has the layout of optimum and onnx-community, and onnx-asr, transformers.js and optimum read it. Matrices in
few bits stay in few bits, as the block-quantised operators of ONNX Runtime.
"""

from __future__ import annotations

import argparse

from .options import add_output_arguments

HELP = "write a model for ONNX Runtime, sherpa-onnx or whisper.cpp"
USAGE = "hrt export MODEL --out DIR [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument(
        "model", metavar="MODEL", help="folder or id of a Whisper with its processor, compact or dense"
    )
    add_output_arguments(what, "folder for the exported model; it must be empty or new")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--format",
        choices=("onnx", "sherpa-onnx", "ggml"),
        default="onnx",
        help="for ONNX Runtime, for sherpa-onnx, or for whisper.cpp (default: onnx)",
    )
    how.add_argument(
        "--floats",
        choices=("float16", "float32"),
        default="float16",
        help="how weights that are not quantised are stored; products are in float32 (default: float16)",
    )
    how.add_argument(
        "--accuracy-level",
        type=int,
        choices=(0, 4),
        help="4 rounds inputs of matrices in few bits to 8 bits, 0 does not (default: 4 in the decoder, where it is "
        "several times as fast, and 0 in the encoder)",
    )


def run(args: argparse.Namespace) -> None:
    from hf_residual_transformer.api import export
    from hf_residual_transformer.reporting import format_bytes

    folder = export(
        args.model,
        args.output_dir,
        format=args.format,
        floats=args.floats,
        accuracy_level=args.accuracy_level,
        overwrite=args.overwrite,
    )
    for path in sorted([*folder.rglob("*.onnx*"), *folder.glob("*.bin")]):
        print(f"{path.name:<30}{format_bytes(path.stat().st_size):>12}")
    print(f"the exported model is in {folder}")
