"""`U` in few bits: whole numbers, with four bits from -8 to 7, and a scale for each block of 32 weights of a row.

With four bits, blocks hold the numbers of Q4_0 in GGUF. Neighbours of a row follow each other without gaps, from
the lowest bits of the first byte on. What the rounding of a column does to the outputs is made up for by the
columns after it, as in GPTQ (https://arxiv.org/abs/2210.17323, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 4  # where nothing else is asked for
FEWEST, MOST = 2, 8
BLOCK = 32  # weights with one scale
# Of the scale that takes the largest weight of a block to the lowest number. Smaller ones cut it off and make finer
# steps, and negative ones take it towards the highest.
CANDIDATES = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, -1.0, -0.9, -0.8)


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """(out_features, in_features), in the dtype of `scale`.

    Args:
        packed: (out_features, in_features * bits / 8), uint8.
        scale: (out_features, in_features / BLOCK).
    """
    bits = packed.shape[1] * 8 // (scale.shape[1] * BLOCK)
    places = _places(bits)
    numbers = packed.unflatten(1, (-1, len(places) * bits // 8))
    values = scale.new_empty(*numbers.shape[:2], len(places))
    for index, (byte, shift) in enumerate(places):
        code = numbers[..., byte]
        if shift:
            code = code >> shift
        if shift + bits > 8:
            code = code | numbers[..., byte + 1] << 8 - shift
        if shift + bits != 8:
            code = code & 2**bits - 1
        values[..., index] = code
    return values.view(*scale.shape, BLOCK).add_(lowest(bits)).mul_(scale.unsqueeze(-1)).flatten(1)


def lowest(bits: int) -> int:
    """Of the numbers that so many bits hold; the highest is one less from zero."""
    return -(2 ** (bits - 1))


def quantize(weight: Tensor, covariance: Tensor | None = None, bits: int = BITS) -> tuple[Tensor, Tensor]:
    """`packed` and `scale` as `dequantize` takes them. Scales are such that float16 holds them exactly.

    Args:
        weight: (out_features, in_features), the latter a multiple of BLOCK.
        covariance: of the inputs, (in_features, in_features) and positive definite, so that outputs are kept; without
            it, weights are rounded one by one.
        bits: from FEWEST to MOST.
    """
    weight = weight.double().clone()
    matter = torch.ones_like(weight[0]) if covariance is None else covariance.diagonal()
    onward = None  # column j: how later columns make up for what j lacks
    if covariance is not None:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        onward = torch.linalg.cholesky(inverse, upper=True)
    values, scales = torch.empty_like(weight), []
    for start in range(0, weight.shape[1], BLOCK):
        end = start + BLOCK
        scale = _scale(weight[:, start:end], matter[start:end], bits)
        lacking = torch.zeros_like(weight[:, start:end])
        for column in range(start, end):
            wanted = weight[:, column]
            values[:, column] = _round(wanted, scale, bits)
            if onward is not None:
                missing = (wanted - values[:, column] * scale) / onward[column, column]
                lacking[:, column - start] = missing
                weight[:, column + 1 : end] -= torch.outer(missing, onward[column, column + 1 : end])
        if onward is not None:
            weight[:, end:] -= lacking @ onward[start:end, end:]
        scales.append(scale)
    return _pack((values - lowest(bits)).to(torch.uint8), bits), torch.stack(scales, dim=1)


def _places(bits: int) -> list[tuple[int, int]]:
    """Byte and shift of each number, as many as end with a byte; what is beyond a byte begins the next."""
    return [divmod(bits * index, 8) for index in range(8 // math.gcd(bits, 8))]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(out_features, in_features) to (out_features, in_features * bits / 8)."""
    places = _places(bits)
    numbers = codes.unflatten(1, (-1, len(places)))
    packed = numbers.new_zeros(*numbers.shape[:2], len(places) * bits // 8)
    for index, (byte, shift) in enumerate(places):
        packed[..., byte] |= numbers[..., index] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= numbers[..., index] >> 8 - shift
    return packed.flatten(1)


def _round(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (values / scale).round().clamp(lowest(bits), -lowest(bits) - 1)


def _scale(block: Tensor, matter: Tensor, bits: int) -> Tensor:
    """Of `CANDIDATES`, for each row of (out_features, BLOCK), the one that leaves the least squares, weighted by how
    much columns `matter`, (BLOCK,).
    """
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))
    scales = largest / lowest(bits) * block.new_tensor(CANDIDATES)  # (out_features, candidates)
    scales = scales.half().to(block)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    rounded = _round(block.unsqueeze(1), scales.unsqueeze(2), bits) * scales.unsqueeze(2)
    errors = ((rounded - block.unsqueeze(1)).square() * matter).sum(2)
    return scales.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
