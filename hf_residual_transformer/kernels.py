"""Multiplies by a matrix in few bits without undoing them, with the kernel that PyTorch has for CPUs.

The kernel (`torch.ops.aten._weight_int4pack_mm_for_cpu`) reads weights of four bits with a scale and an offset for each
block. Fewer bits fit into four. Weights of five to eight bits are taken apart into a high and a low half, which stand
side by side and multiply the inputs twice. The weights are the same numbers in each case.

It is fast in bfloat16 alone, and for a few rows: docs/LOG.md has the measurements. In other dtypes, for many rows, and
where gradients are needed, the matrix is dequantised, which is the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .quantization import dequantize

KERNEL_BITS = 4
MOST_ROWS = {"AVX512": 64, "AVX2": 8}  # by what the CPU can do (docs/LOG.md)
# Generated together: an unpacked matrix is faster for 16 rows, and slower for one (docs/LOG.md).
FEW_SEQUENCES = 8
ROW_MULTIPLE = 16  # the kernel's number of output features is a multiple of it
BLOCKS = (32, 64, 128, 256)


class KernelWeight(NamedTuple):
    """A matrix as the kernel reads it.

    Args:
        numbers: the integers, in the kernel's own order.
        scales_and_offsets: in bfloat16, of shape (num_blocks, rows, 2).
        block_size: the number of weights that have one scale.
        out_features: the rows that are not padding.
        halves: 2 where high and low halves of the weights stand side by side, otherwise 1.
    """

    numbers: Tensor
    scales_and_offsets: Tensor
    block_size: int
    out_features: int
    halves: int

    def product(self, rows: Tensor) -> Tensor:
        """(num_rows, in_features) in bfloat16 to (num_rows, out_features)."""
        rows = torch.cat([rows] * self.halves, 1) if self.halves > 1 else rows.contiguous()
        output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.numbers, self.block_size, self.scales_and_offsets
        )
        return output[:, : self.out_features]


def is_fast(rows: Tensor) -> bool:
    """Whether the kernel is faster for `rows`, (num_rows, in_features), than dequantising the matrix."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return suits(rows.dtype, rows.device, len(rows))


def suits(dtype: torch.dtype, device: torch.device, num_rows: int) -> bool:
    """Whether the kernel is faster than dequantising a matrix for so many rows of this dtype."""
    most = MOST_ROWS.get(torch.backends.cpu.get_cpu_capability(), 0)
    return dtype == torch.bfloat16 and device.type == "cpu" and 0 < num_rows <= most


def kernel_weight(packed: Tensor, scale: Tensor, bits: int) -> KernelWeight | None:
    """The same matrix in the kernel's form; None where the kernel does not have this block size.

    Args:
        packed: as in `Quantized`.
        scale: the scale of each block, of shape (out_features, num_blocks).
        bits: of each weight.
    """
    numbers = dequantize(packed, torch.ones_like(scale, dtype=torch.float32), bits).int()
    block_size = numbers.shape[1] // scale.shape[1]
    if block_size not in BLOCKS:
        return None
    scales, offsets = scale, torch.zeros_like(scale)
    base = 2**KERNEL_BITS
    if bits > KERNEL_BITS:
        # 16 times the high half, and the low half, whose offset makes up for the 8 that the kernel takes away.
        high, low = numbers.div(base, rounding_mode="floor") + base // 2, numbers.remainder(base)
        numbers = torch.cat([high, low], 1)
        scales, offsets = torch.cat([base * scale, scale], 1), torch.cat([offsets, base // 2 * scale], 1)
    else:
        numbers = numbers + base // 2
    padding = (0, 0, 0, -len(numbers) % ROW_MULTIPLE)
    both = torch.stack([F.pad(values, padding) for values in (scales, offsets)], -1)
    return KernelWeight(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(numbers, padding), 1),
        both.transpose(0, 1).to(torch.bfloat16).contiguous(),
        block_size,
        len(packed),
        1 + (bits > KERNEL_BITS),
    )
