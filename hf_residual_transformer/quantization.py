"""Quantises `U`: each weight becomes an integer of a few bits, and each block of 32 weights in a row has one scale.

Integers of four bits range from -8 to 7, and blocks then hold the same numbers as Q4_0 in GGUF. The integers of a row
are packed without gaps, from the lowest bits of the first byte on. Columns are rounded one after another, and later
columns compensate for the error that rounding a column makes in the outputs, as in GPTQ
(https://arxiv.org/abs/2210.17323, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 4  # by default
FEWEST, MOST = 2, 8
BLOCK = 32  # the number of weights that have one scale
# Candidate scales, relative to the scale that maps the weight of the largest magnitude to the lowest integer. Smaller
# scales clip that weight and make finer steps; negative scales map it to the highest integer.
CANDIDATES = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, -1.0, -0.9, -0.8)


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """The weight, of shape (out_features, in_features), in the dtype of `scale`.

    Args:
        packed: the packed integers as uint8, of shape (out_features, in_features * bits / 8).
        scale: the scale of each block, of shape (out_features, in_features / BLOCK).
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
    """The lowest signed integer of `bits` bits; the highest is `-lowest(bits) - 1`."""
    return -(2 ** (bits - 1))


def quantize(weight: Tensor, covariance: Tensor | None = None, bits: int = BITS) -> tuple[Tensor, Tensor]:
    """Quantises a matrix, and returns `packed` and `scale` for `dequantize`. float16 holds the scales exactly.

    Args:
        weight: a matrix of shape (out_features, in_features); `in_features` must be a multiple of BLOCK.
        covariance: the covariance of the inputs, positive definite, of shape (in_features, in_features). With it, the
            error of the outputs is kept small; without it, each weight is rounded on its own.
        bits: the bits of each weight, from FEWEST to MOST.
    """
    weight = weight.double().clone()
    matter = torch.ones_like(weight[0]) if covariance is None else covariance.diagonal()
    onward = None  # row j: how later columns compensate for the error of column j
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
    """Byte and shift of each integer in the shortest run that ends with a byte; one may continue in the next byte."""
    return [divmod(bits * index, 8) for index in range(8 // math.gcd(bits, 8))]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of shape (out_features, in_features) into bytes, (out_features, in_features * bits / 8)."""
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
    """The candidate scale with the smallest squared error for each row, of shape (out_features,).

    Args:
        block: the weights of one block, of shape (out_features, BLOCK).
        matter: the weight of each column in the error, of shape (BLOCK,).
        bits: the bits of each weight.
    """
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))
    scales = largest / lowest(bits) * block.new_tensor(CANDIDATES)  # (out_features, candidates)
    scales = scales.half().to(block)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    rounded = _round(block.unsqueeze(1), scales.unsqueeze(2), bits) * scales.unsqueeze(2)
    errors = ((rounded - block.unsqueeze(1)).square() * matter).sum(2)
    return scales.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
