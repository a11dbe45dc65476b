"""`U` in four bits: whole numbers from -8 to 7, and a scale for each block of 32 weights of a row.

Blocks hold the numbers of Q4_0 in GGUF. Two neighbours of a row are a byte, the first in the lower bits. What the
rounding of a column does to the outputs is made up for by the columns after it, as in GPTQ
(https://arxiv.org/abs/2210.17323, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 4
BLOCK = 32  # weights with one scale
SCALE_BITS = 16
LOWEST, HIGHEST = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
# Of the scale that takes the largest weight of a block to `LOWEST`. Smaller ones cut it off and make finer steps, and
# negative ones take it towards `HIGHEST`.
CANDIDATES = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, -1.0, -0.9, -0.8)


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """(out_features, in_features), in the dtype of `scale`.

    Args:
        packed: (out_features, in_features / 2), uint8.
        scale: (out_features, in_features / BLOCK).
    """
    codes = torch.stack((packed & 15, packed >> BITS), dim=-1).view(*scale.shape, BLOCK)
    return codes.to(scale.dtype).add_(LOWEST).mul_(scale.unsqueeze(-1)).flatten(1)


def quantize(weight: Tensor, covariance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`packed` and `scale` as `dequantize` takes them. Scales are such that float16 holds them exactly.

    Args:
        weight: (out_features, in_features), the latter a multiple of BLOCK.
        covariance: of the inputs, (in_features, in_features) and positive definite, so that outputs are kept; without
            it, weights are rounded one by one.
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
        scale = _scale(weight[:, start:end], matter[start:end])
        lacking = torch.zeros_like(weight[:, start:end])
        for column in range(start, end):
            wanted = weight[:, column]
            values[:, column] = _round(wanted, scale)
            if onward is not None:
                missing = (wanted - values[:, column] * scale) / onward[column, column]
                lacking[:, column - start] = missing
                weight[:, column + 1 : end] -= torch.outer(missing, onward[column, column + 1 : end])
        if onward is not None:
            weight[:, end:] -= lacking @ onward[start:end, end:]
        scales.append(scale)
    codes = (values - LOWEST).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << BITS, torch.stack(scales, dim=1)


def _round(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).round().clamp(LOWEST, HIGHEST)


def _scale(block: Tensor, matter: Tensor) -> Tensor:
    """Of `CANDIDATES`, for each row of (out_features, BLOCK), the one that leaves the least squares, weighted by how
    much columns `matter`, (BLOCK,).
    """
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))
    scales = largest / LOWEST * block.new_tensor(CANDIDATES)  # (out_features, candidates)
    scales = scales.half().to(block)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    rounded = _round(block.unsqueeze(1), scales.unsqueeze(2)) * scales.unsqueeze(2)
    errors = ((rounded - block.unsqueeze(1)).square() * matter).sum(2)
    return scales.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
