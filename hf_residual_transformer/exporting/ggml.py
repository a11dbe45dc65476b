"""Writes a Whisper as a ggml file, which whisper.cpp reads.

The file has, in little endian: a magic number; eleven numbers, of which the last is the format; the mel filters; the
vocabulary without special tokens, which whisper.cpp adds itself; and the tensors under OpenAI's names.

Blocks of 32 weights in four bits with scales in 16 bits are the numbers of ggml's q4_0, `scale * (integer - 8)`, in
another order. Hence a compact model whose matrices are such blocks and nothing else is written without rounding again,
for whisper.cpp to run.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..layers import MixedEmbedding, QuantizedEmbedding, QuantizedWeight
from ..modeling import residual_linears
from .graph import repacked

MAGIC = 0x67676D6C
FLOAT32, FLOAT16, Q4_0 = 0, 1, 2  # numbers of tensor types
Q4_0_FILE = 2002  # the format of a file whose matrices are q4_0, in the second version of the blocks
BLOCK = 32
Encode = Callable[[str, Tensor], tuple[int, bytes]]

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


def encode_float(name: str, values: Tensor) -> tuple[int, bytes]:
    """Vectors and positions in float32, all else in float16."""
    if values.dim() < 2 or name.endswith(("bias", "positional_embedding")):
        return FLOAT32, values.float().cpu().numpy().astype("<f4").tobytes()
    return FLOAT16, values.float().cpu().numpy().astype("<f2").tobytes()


def write_ggml(
    config: Any,
    processor: Any,
    kind: int,
    tensors: Iterable[tuple[str, Tensor]],
    encode: Encode,
    file: BinaryIO,
) -> None:
    """Writes a file.

    Args:
        config: of the Whisper.
        processor: its processor.
        kind: the number of the file's format.
        tensors: by their names in Transformers without the leading `model.`, each once.
        encode: the number of a tensor's type and its data, from its name in the file and its values.
        file: a binary file that is open for writing.
    """
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
    for path, values in tensors:
        if re.fullmatch(r"encoder\.conv\d\.bias", path):
            values = values[:, None]  # a column
        name = openai_name(path)
        number, data = encode(name, values)
        label = name.encode()
        file.write(struct.pack("<3i", values.dim(), len(label), number))
        file.write(struct.pack(f"<{values.dim()}i", *reversed(values.shape)) + label + data)


def save_q4_0(model: Any, processor: Any, path: Path) -> None:
    """Saves a compact Whisper whose matrices are few-bit integers in blocks and nothing else.

    Integers of fewer than four bits and larger blocks are stored as four bits and blocks of 32, and keep their numbers.

    Raises:
        ValueError: naming the first matrix that is something else.
    """
    held = _plain_blocks(model)
    dense = model.merge().model.state_dict()
    blocks = {openai_name(f"{place}.weight"): weight for place, weight in held.items()}

    def encode(name: str, values: Tensor) -> tuple[int, bytes]:
        return (Q4_0, q4_0_bytes(blocks[name])) if name in blocks else encode_float(name, values)

    with path.open("wb") as file:
        write_ggml(model.config, processor, Q4_0_FILE, dense.items(), encode, file)


def _plain_blocks(model: Any) -> dict[str, QuantizedWeight]:
    """Every matrix by its path without the leading `model.`."""
    found: dict[str, QuantizedWeight] = {}
    for path, linear in _matrices(model):
        weight = getattr(linear, "shared", linear)
        problem = None
        if isinstance(weight, MixedEmbedding):
            problem = "has more bits for some tokens than for others"
        elif not isinstance(weight, QuantizedWeight):
            problem = "is in floating point"
        elif weight.bits > 4:
            problem = f"has {weight.bits} bits"
        elif weight.scale_bits != 16:
            problem = f"has scales in {weight.scale_bits} bits, which float16 would round"
        elif isinstance(weight, QuantizedEmbedding) and weight.weight_mean.any():
            problem = "keeps what its tokens have in common apart"
        elif weight.rotation != 1:
            problem = f"is rotated, {weight.rotation} inputs together"
        elif getattr(linear, "residual_A", None) is not None and linear.residual_A.shape[0]:
            problem = f"has a low rank of {linear.residual_A.shape[0]}"
        elif getattr(linear, "diagonal", None) is not None:
            problem = "has a diagonal"
        if problem is not None:
            raise ValueError(
                f"`format` must be onnx for this model, got ggml, whose q4_0 is blocks of four bits alone: {path} "
                f"{problem}. Compress with rank=0, shared_bits=4, scale_bits=16 and embedding_bits=4 in the encoder "
                "and the decoder, or merge() the model for whisper.cpp's own tools"
            )
        found[path.removeprefix("model.")] = weight
    return found


def _matrices(model: Any) -> Iterator[tuple[str, Any]]:
    residual = dict(residual_linears(model))
    embedding = model.get_input_embeddings()
    for path, module in model.named_modules():
        if path in residual or type(module) is torch.nn.Linear or module is embedding:
            yield path, module


def q4_0_bytes(weight: QuantizedWeight) -> bytes:
    """The matrix as it lies in a file, block after block: the scale in 16 bits, and 16 bytes.

    A byte holds the integers of one weight of the block's first half and of one of its second half.
    """
    packed = repacked(weight.weight_packed.cpu(), weight.bits, 4).numpy()
    integers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, BLOCK)
    scales = weight.scale().detach().float().cpu().repeat_interleave(weight.block_size // BLOCK, dim=1)
    halves = scales.reshape(-1, 1).numpy().astype("<f2").view(np.uint8)
    return np.hstack([halves, integers[:, : BLOCK // 2] | (integers[:, BLOCK // 2 :] << 4)]).tobytes()
