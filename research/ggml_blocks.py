"""Rounds matrices to the block formats of ggml, the library under whisper.cpp.

A format splits each row into blocks of 32 weights. A block has a scale in 16 bits, in q5_1 also a minimum, and an
integer for each weight:

    q4_0, q5_0, q8_0:  weight = scale * (integer - offset)
    q5_1:              weight = scale * integer + minimum

In q4_0 and q5_0 the weight of greatest magnitude gets the integer 0, hence its sign is part of the scale. It is the
plain rounding of whisper.cpp's `quantize` tool: no calibration, and the scale is not searched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 32


@dataclass(frozen=True)
class BlockFormat:
    """A format of blocks.

    Args:
        bits: the bits of an integer.
        tensor_type: the number of the format in the header of a tensor.
        file_type: the number of the format in the header of a file.
        has_minimum: whether a block has a minimum.
    """

    bits: int
    tensor_type: int
    file_type: int
    has_minimum: bool = False

    @property
    def bits_a_weight(self) -> float:
        """The bits of an integer and of its part of the scale and the minimum."""
        return self.bits + (32 if self.has_minimum else 16) / BLOCK


FORMATS = {
    "q4_0": BlockFormat(4, tensor_type=2, file_type=2),
    "q5_0": BlockFormat(5, tensor_type=6, file_type=8),
    "q5_1": BlockFormat(5, tensor_type=7, file_type=9, has_minimum=True),
    "q8_0": BlockFormat(8, tensor_type=8, file_type=7),
}


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks.

    Args:
        name: a key of `FORMATS`.
        shape: the shape of the matrix.
        scales: one for each block, float16, of shape (num_blocks, 1).
        minima: one for each block, float16, of shape (num_blocks, 1); None if the format has none.
        integers: one for each weight, of shape (num_blocks, 32); signed in q8_0.
    """

    name: str
    shape: tuple[int, ...]
    scales: np.ndarray
    minima: np.ndarray | None
    integers: np.ndarray

    def weights(self) -> np.ndarray:
        """The rounded matrix in float32."""
        scales, integers = self.scales.astype(np.float32), self.integers.astype(np.float32)
        if self.minima is not None:
            return (scales * integers + self.minima.astype(np.float32)).reshape(self.shape)
        offset = 0 if self.name == "q8_0" else 2 ** (FORMATS[self.name].bits - 1)
        return (scales * (integers - offset)).reshape(self.shape)

    def to_bytes(self) -> bytes:
        """The matrix as it lies in a file, block after block.

        A block has the scale, the minimum, and the integers. Of integers in five bits, the fifth bits of all come
        first. A byte then holds the lower four bits of one integer of the block's first half and one of its second
        half.
        """
        parts = [part.view(np.uint8) for part in (self.scales, self.minima) if part is not None]
        bits = FORMATS[self.name].bits
        if bits == 8:
            return np.hstack([*parts, self.integers.view(np.uint8)]).tobytes()
        if bits == 5:
            parts.append(np.packbits(self.integers >> 4, axis=1, bitorder="little"))
        low = self.integers & 15
        return np.hstack([*parts, low[:, : BLOCK // 2] | (low[:, BLOCK // 2 :] << 4)]).tobytes()


def round_to_blocks(weight: np.ndarray, name: str) -> Blocks:
    """Rounds a matrix to the nearest integers of each block.

    Args:
        weight: of shape (out_features, in_features).
        name: a key of `FORMATS`.

    Raises:
        ValueError: the format does not exist, or the rows have no whole number of blocks.
    """
    if name not in FORMATS:
        raise ValueError(f"`name` must be one of {', '.join(FORMATS)}, got {name!r}")
    if weight.shape[-1] % BLOCK:
        raise ValueError(
            f"the rows of `weight` must be a multiple of {BLOCK} long for {name}, got {weight.shape[-1]}; leave this "
            "matrix in 16 bits"
        )
    levels = 2 ** FORMATS[name].bits
    blocks = weight.astype(np.float32).reshape(-1, BLOCK)
    if FORMATS[name].has_minimum:
        minima = blocks.min(axis=1, keepdims=True)
        scales = (blocks.max(axis=1, keepdims=True) - minima) / np.float32(levels - 1)
        integers = ((blocks - minima) * _inverse(scales) + np.float32(0.5)).astype(np.uint8)
        half = minima.astype(np.float16)
        return Blocks(name, weight.shape, scales.astype(np.float16), half, integers.clip(0, levels - 1))
    if name == "q8_0":
        scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        scaled = blocks * _inverse(scales)
        integers = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
        return Blocks(name, weight.shape, scales.astype(np.float16), None, integers)
    greatest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scales = greatest / np.float32(-levels // 2)
    integers = (blocks * _inverse(scales) + np.float32(levels // 2 + 0.5)).astype(np.uint8)
    return Blocks(name, weight.shape, scales.astype(np.float16), None, integers.clip(0, levels - 1))


def _inverse(scales: np.ndarray) -> np.ndarray:
    """The inverse of each scale before its rounding to 16 bits; 0 where the scale is 0."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
