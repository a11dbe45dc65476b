"""Writes a Whisper of Transformers as a ggml file, which whisper.cpp reads.

    python research/ggml_writer.py --model openai/whisper-base --format q4_0 --out /tmp/base-q4_0.bin

Matrices of encoder and decoder and the token embedding are rounded to the format, convolutions are in float16, and
vectors and positions in float32, as in a file that whisper.cpp's `quantize` tool writes. `hrt export --format ggml`
writes matrices that are such blocks already.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from ggml_blocks import FORMATS, round_to_blocks
from pretrained import resolve_pretrained
from transformers import AutoProcessor, WhisperForConditionalGeneration

from hf_residual_transformer.exporting import ggml

F16_FILE = 1
QUANTIZATION_VERSION = 2000  # added to the format of a file with blocks


def write_ggml(model: Any, processor: Any, form: str, file: BinaryIO) -> None:
    """Writes a model.

    Args:
        model: a dense Whisper for generation.
        processor: its processor.
        form: "f16", or a key of `ggml_blocks.FORMATS`.
        file: a binary file that is open for writing.

    Raises:
        ValueError: the format does not exist.
    """
    if form != "f16" and form not in FORMATS:
        raise ValueError(f"`form` must be f16 or one of {', '.join(FORMATS)}, got {form!r}")

    def encode(name: str, values: torch.Tensor) -> tuple[int, bytes]:
        number, data = ggml.encode_float(name, values)
        if number == ggml.FLOAT16 and values.dim() == 2 and form in FORMATS:
            rounded = round_to_blocks(values.half().float().numpy().astype(np.float32), form)
            return FORMATS[form].tensor_type, rounded.to_bytes()
        return number, data

    kind = F16_FILE if form == "f16" else QUANTIZATION_VERSION + FORMATS[form].file_type
    ggml.write_ggml(model.config, processor, kind, model.model.state_dict().items(), encode, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="openai/whisper-base", help="id or folder of a dense Whisper")
    parser.add_argument("--format", choices=["f16", *FORMATS], default="f16", help="format of the matrices")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    folder = resolve_pretrained(args.model)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    with args.out.open("wb") as file:
        write_ggml(model, AutoProcessor.from_pretrained(folder), args.format, file)


if __name__ == "__main__":
    main()
