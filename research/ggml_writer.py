"""Writes a Whisper of Transformers as a ggml file, which whisper.cpp reads.

    python research/ggml_writer.py --model openai/whisper-base --format q4_0 --out /tmp/base-q4_0.bin

The file has, in little endian: a magic number; eleven numbers, of which the last is the format; the mel filters; the
vocabulary without special tokens, which whisper.cpp adds itself; and the tensors under OpenAI's names. Matrices of
encoder and decoder and the token embedding are in the format, convolutions in float16, and vectors and positions in
float32, as in a file that whisper.cpp's `quantize` tool writes.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ggml_blocks import FORMATS, round_to_blocks
from pretrained import resolve_pretrained
from transformers import AutoProcessor, WhisperForConditionalGeneration

MAGIC = 0x67676D6C
FLOAT32, FLOAT16 = 0, 1  # numbers of tensor types
F16_FILE = 1
QUANTIZATION_VERSION = 2000  # added to the format of a file with blocks

# Of Transformers on the left, of OpenAI on the right.
MODULES = {
    "layers": "blocks",
    "self_attn": "attn",
    "encoder_attn": "cross_attn",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "final_layer_norm": "mlp_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "embed_tokens": "token_embedding",
}


def openai_name(name: str) -> str:
    """The name of a tensor in OpenAI's checkpoints, from that of Transformers without the leading `model.`."""
    if name.endswith("embed_positions.weight"):
        return name.replace("embed_positions.weight", "positional_embedding")
    stack, _, rest = name.partition(".")
    if rest.startswith("layer_norm."):
        return f"{stack}.{'ln_post' if stack == 'encoder' else 'ln'}.{rest.removeprefix('layer_norm.')}"
    return ".".join(MODULES.get(part, part) for part in name.split("."))


def ordinary_tokens(tokenizer: Any) -> list[bytes]:
    """The bytes of the tokens before the first special one, which is the end of the text, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens = tokenizer.convert_ids_to_tokens(list(range(tokenizer.eos_token_id)))
    return [bytes(byte_of[sign] for sign in token) for token in tokens]


def tensors_of(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors under OpenAI's names, the tied embedding once; biases of convolutions as columns."""
    for name, tensor in model.model.state_dict().items():
        values = tensor.float().numpy()
        column = re.fullmatch(r"encoder\.conv\d\.bias", name)
        yield openai_name(name), values[:, None] if column else values


def encode(name: str, values: np.ndarray, form: str) -> tuple[int, bytes]:
    """The number of a tensor's type, and its data."""
    if values.ndim < 2 or name.endswith(("bias", "positional_embedding")):
        return FLOAT32, values.astype("<f4").tobytes()
    if values.ndim == 2 and form in FORMATS:
        rounded = round_to_blocks(values.astype(np.float16).astype(np.float32), form)
        return FORMATS[form].tensor_type, rounded.to_bytes()
    return FLOAT16, values.astype("<f2").tobytes()


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
    config = model.config
    kind = F16_FILE if form == "f16" else QUANTIZATION_VERSION + FORMATS[form].file_type
    sizes = [config.vocab_size, config.max_source_positions, config.d_model, config.encoder_attention_heads]
    sizes += [config.encoder_layers, config.max_target_positions, config.d_model]
    sizes += [config.decoder_attention_heads, config.decoder_layers, config.num_mel_bins, kind]
    file.write(struct.pack("<I11i", MAGIC, *sizes))
    filters = np.ascontiguousarray(processor.feature_extractor.mel_filters.T, dtype="<f4")
    file.write(struct.pack("<2i", *filters.shape) + filters.tobytes())
    tokens = ordinary_tokens(processor.tokenizer)
    file.write(struct.pack("<i", len(tokens)))
    for token in tokens:
        file.write(struct.pack("<I", len(token)) + token)
    for name, values in tensors_of(model):
        number, data = encode(name, values, form)
        label = name.encode()
        file.write(struct.pack("<3i", values.ndim, len(label), number))
        file.write(struct.pack(f"<{values.ndim}i", *reversed(values.shape)) + label + data)


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
