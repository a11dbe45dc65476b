"""Quantises a matrix: each weight becomes an integer of a few bits, and each block of weights in a row has one scale.

Integers of four bits range from -8 to 7, and blocks of 32 then hold the same numbers as Q4_0 in GGUF. The integers of a
row are packed without gaps, from the lowest bits of the first byte on. Columns are rounded one after another, and later
columns compensate for the error that rounding a column makes in the outputs, as in GPTQ
(https://arxiv.org/abs/2210.17323, section 3). Then scales and integers are improved in turns.

A scale has 16 bits of its own, or 8: it is then a signed integer, and each row has one scale in float16, of which the
scales of its blocks are multiples of the 128th part. The k-quants of llama.cpp have two levels of scales, too.

A matrix may be rotated before it is rounded, with the inputs that it multiplies: `W x = (W H) (H x)` for an orthogonal
`H` that is its own inverse. Where some inputs vary much more than others, as they do from head to head, each rotated
column then counts as much as any other, and the columns that are rounded last can compensate for more. QuIP#
rotates for a similar reason (https://arxiv.org/abs/2402.04396, section 3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BITS = 4  # by default
FEWEST, MOST = 2, 8
BLOCK = 32  # the number of weights that have one scale, by default
SWEEPS = 4
ROWS = 4096  # rounded at a time, since a token embedding takes many times its memory otherwise
BLOCKS = (32, 64, 128)  # those that MatMulNBits of ONNX Runtime also has
ROTATIONS = (1, 16, 32, 64, 128, 256)  # numbers of columns that are rotated together; 1 rotates nothing
ROTATION = 128  # by default, where a budget chooses all settings
SCALE_BITS = (16, 8)  # of the scale of a block; the first is that of configs which say nothing
# The 8-bit scale of a block is an integer from -127 to 127 times the scale of its row divided by this.
LEVELS = 128
# The scale of a row beside the largest plain scale of its blocks, since scales that are improved may become larger.
HEADROOM = 1.1
# Candidate scales, relative to the scale that maps the weight of the largest magnitude to the lowest integer. Smaller
# scales clip that weight and make finer steps; negative scales map it to the highest integer.
CANDIDATES = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, -1.0, -0.9, -0.8)


class Quantized(NamedTuple):
    """A matrix of shape (out_features, in_features) in few bits.

    Args:
        packed: the packed integers as uint8, of shape (out_features, in_features * bits / 8).
        scale: the scale of each block, of shape (out_features, in_features / block_size).
        bits: the bits of each weight.
        row_scale: the scale of each row, of shape (out_features, 1), if the scales of blocks have 8 bits; `scale` then
            has whole multiples of `row_scale / LEVELS`.
        rotation: the number of columns that were rotated together before.
    """

    packed: Tensor
    scale: Tensor
    bits: int
    row_scale: Tensor | None = None
    rotation: int = 1

    def weight(self) -> Tensor:
        """The matrix, of shape (out_features, in_features), in the dtype of `scale`."""
        return rotate(dequantize(self.packed, self.scale, self.bits), self.rotation)


def rotate(values: Tensor, size: int) -> Tensor:
    """Values times a Hadamard matrix for each `size` of their features, which is its own inverse, (..., features).

    Args:
        values: (..., features), for inputs or for rows of a matrix.
        size: a power of two that divides the number of features; 1 changes nothing.
    """
    if size == 1:
        return values
    return (values.unflatten(-1, (-1, size)) @ hadamard(size, values)).flatten(-2)


HADAMARD: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def hadamard(size: int, like: Tensor) -> Tensor:
    """The orthogonal Hadamard matrix (size, size), by Sylvester's construction, with the dtype and device of `like`.

    It is made once, since a decoder asks for it at each token.
    """
    key = (size, like.dtype, like.device)
    if not torch.compiler.is_compiling() and key in HADAMARD:
        return HADAMARD[key]
    with torch.inference_mode(False):
        found = torch.full((1, 1), size**-0.5, dtype=like.dtype, device=like.device)
        while len(found) < size:
            found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    if not torch.compiler.is_compiling() and type(found) is Tensor:  # and not of a tracer
        HADAMARD[key] = found
    return found


def dequantize(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The matrix of these integers and scales, still rotated if it was, in the dtype of `scale`."""
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
    return values.view(*scale.shape, -1).add_(lowest(bits)).mul_(scale.unsqueeze(-1)).flatten(1)


def lowest(bits: int) -> int:
    """The lowest signed integer of `bits` bits; the highest is `-lowest(bits) - 1`."""
    return -(2 ** (bits - 1))


@torch.no_grad()
def quantize(
    weight: Tensor,
    covariance: Tensor | None = None,
    bits: int = BITS,
    block_size: int = BLOCK,
    sweeps: int = SWEEPS,
    scale_bits: int = SCALE_BITS[0],
    rotation: int = 1,
) -> Quantized:
    """Quantises a matrix. float16 holds the scales, or with `scale_bits=8` those of the rows, exactly.

    Args:
        weight: a matrix of shape (out_features, in_features); `in_features` must be a multiple of `block_size`.
        covariance: the covariance of the inputs, positive definite, of shape (in_features, in_features). With it, the
            error of the outputs is kept small; without it, each weight is rounded on its own.
        bits: the bits of each weight, from FEWEST to MOST.
        block_size: the number of weights that have one scale.
        sweeps: with a covariance, how often all scales and then all integers are improved, after the first rounding.
        scale_bits: the bits of each scale, 16 or 8. The integers are rounded with the scales that are stored.
        rotation: how many columns are rotated together, a power of two. Where it does not divide the number of columns,
            it is the largest power of two that does.
    """
    rotation = rotation_of(weight.shape[1], rotation)
    root, dtype = None, torch.float64
    if covariance is not None:
        covariance = rotate(rotate(covariance, rotation).T, rotation)
        # Upper triangular, with `root root.T` as the covariance.
        root = torch.linalg.cholesky(covariance.flip(0, 1)).flip(0, 1)
        # Errors in float32 are small beside those of rounding, and it takes half the time.
        dtype = torch.float32
        covariance = covariance.to(dtype)
    packed, found, of_rows = [], [], []
    for rows in weight.split(ROWS):  # which are independent of one another
        rows = rotate(rows.to(dtype), rotation)
        row_scale = _row_scale(rows, bits) if scale_bits == 8 else None
        codes, scales = _round_onward(rows, root, bits, block_size, row_scale)
        if covariance is not None:
            for _ in range(sweeps):
                scales = _best_scales(rows, codes, scales, covariance, row_scale)
                codes = _best_codes(rows, codes, scales, covariance, bits)
        packed.append(_pack((codes - lowest(bits)).to(torch.uint8), bits))
        found.append(scales.double())
        if row_scale is not None:
            of_rows.append(row_scale.double())
    row_scales = torch.cat(of_rows) if of_rows else None
    return Quantized(torch.cat(packed), torch.cat(found), bits, row_scales, rotation)


def check_blocks(name: str, in_features: int, block_size: int) -> None:
    """Checks that blocks of weights with one scale fill the rows of a matrix.

    Raises:
        ValueError: naming the matrix, if they do not.
    """
    if in_features % block_size:
        raise ValueError(
            f"`block_size` must divide the {in_features} inputs of {name}, which is to have few bits, got "
            f"{block_size}; take another block size, or no bits for this matrix"
        )


def rotation_of(in_features: int, wanted: int) -> int:
    """The largest power of two that divides `in_features` and is at most `wanted`, a power of two."""
    return math.gcd(in_features, wanted)


def levels_of(scale: Tensor, row_scale: Tensor) -> Tensor:
    """The integers, (out_features, num_blocks), that stand for the nearest scales; none is 0, which would lose a block.

    Args:
        scale: the scale of each block, of shape (out_features, num_blocks).
        row_scale: the scale of each row, of shape (out_features, 1).
    """
    levels = (scale / row_scale * LEVELS).round().clamp(1 - LEVELS, LEVELS - 1)
    return torch.where(levels == 0, torch.where(scale < 0, -1.0, 1.0).to(levels), levels)


def _row_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale of each row, which float16 holds exactly, of shape (out_features, 1)."""
    largest = weight.abs().amax(1, keepdim=True) / -lowest(bits)
    found = (HEADROOM * largest).half().to(weight)
    return torch.where(found == 0, torch.ones_like(found), found)


def _storable(scales: Tensor, row_scale: Tensor | None) -> Tensor:
    """The nearest scales that can be stored: in float16, or beside the scale of a row in 8 bits."""
    if row_scale is None:
        return scales.half().to(scales)
    return levels_of(scales, row_scale) * (row_scale / LEVELS)


def _round_onward(
    weight: Tensor, root: Tensor | None, bits: int, block_size: int, row_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Integers, (out_features, in_features), and scales, by rounding one column after another, as in GPTQ.

    Later columns compensate for the errors of those before. `root`, (in_features, in_features), says how: it is upper
    triangular, and `root root.T` is the covariance of the inputs.
    """
    codes, scales = torch.empty_like(weight), []
    if root is None:
        matter = torch.ones_like(weight[0])
        for start in range(0, weight.shape[1], block_size):
            columns = slice(start, start + block_size)
            scales.append(_scale(weight[:, columns], matter[columns], bits, row_scale))
            codes[:, columns] = _round(weight[:, columns], scales[-1].unsqueeze(1), bits)
        return codes, torch.stack(scales, dim=1)
    matter, lowest_code = root.square().sum(1).to(weight), lowest(bits)
    inverses = torch.linalg.inv(
        torch.stack([root[i : i + block_size, i : i + block_size] for i in range(0, len(root), block_size)])
    ).to(weight)
    root = root.to(weight)
    pull = torch.zeros_like(weight)  # the errors of all columns before, times `root`
    for start, onward in zip(range(0, weight.shape[1], block_size), inverses):
        columns = slice(start, start + block_size)
        wanted = weight[:, columns] + pull[:, columns] @ onward
        scale = _scale(wanted, matter[columns], bits, row_scale)
        scales.append(scale)
        # Transposed, so that a column of the matrix is contiguous in memory.
        wanted, found = wanted.T.contiguous(), codes.new_empty(block_size, len(codes))
        for place, code in enumerate(found):
            torch.div(wanted[place], scale, out=code).round_().clamp_(lowest_code, -lowest_code - 1)
            missing = torch.addcmul(wanted[place], code, scale, value=-1).div_(onward[place, place])
            wanted[place + 1 :].addr_(onward[place, place + 1 :], missing, alpha=-1)
        codes[:, columns] = found.T
        error = weight[:, columns] - codes[:, columns] * scale.unsqueeze(1)
        pull[:, columns.stop :].addmm_(error, root[columns, columns.stop :])
    return codes, torch.stack(scales, dim=1)


def _best_scales(
    weight: Tensor, codes: Tensor, scales: Tensor, covariance: Tensor, row_scale: Tensor | None
) -> Tensor:
    """The scales that leave the smallest error of the outputs with these integers, by least squares for each row.

    They are rounded to what can be stored. A scale that float16 cannot hold, or that would vanish, stays as it was.
    """
    blocks = codes.unflatten(1, (scales.shape[1], -1))  # (out_features, num_blocks, block_size)
    rows = covariance.unflatten(0, (scales.shape[1], -1))  # (num_blocks, block_size, in_features)
    gram = codes.new_empty(len(codes), scales.shape[1], scales.shape[1])
    for index in range(scales.shape[1]):
        product = blocks[:, index] @ rows[index]
        gram[:, index] = (product.unflatten(1, (scales.shape[1], -1)) * blocks).sum(2)
    wanted = ((weight @ covariance).unflatten(1, (scales.shape[1], -1)) * blocks).sum(2)
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    found = _storable(torch.linalg.solve(gram.double(), wanted.double()).to(scales), row_scale)
    return torch.where(found.isfinite() & (found != 0), found, scales)


def _best_codes(weight: Tensor, codes: Tensor, scales: Tensor, covariance: Tensor, bits: int) -> Tensor:
    """The integers after one sweep of coordinate descent over the columns, as in QuantEase
    (https://arxiv.org/abs/2309.01885): each integer becomes the best one, given all others of its row.
    """
    codes, block_size = codes.clone(), weight.shape[1] // scales.shape[1]
    # The gradient of the error, negated and halved.
    pull = (weight - codes * scales.repeat_interleave(block_size, dim=1)) @ covariance
    for index, step in enumerate(scales.T.contiguous()):
        columns = slice(index * block_size, (index + 1) * block_size)
        own, after = covariance[columns, columns], covariance[columns, columns.stop :]
        # Transposed, so that a column of the matrix is contiguous in memory.
        inside, block = pull[:, columns].T.contiguous(), codes[:, columns].T.contiguous()
        moved = torch.empty_like(inside)
        per_step = 1 / (own.diagonal()[:, None] * step)  # (block_size, out_features)
        for place in range(block_size):
            found = _clamp(torch.addcmul(block[place], inside[place], per_step[place]).round_(), bits)
            torch.sub(found, block[place], out=moved[place]).mul_(step)
            block[place] = found
            inside[place + 1 :].addr_(own[place, place + 1 :], moved[place], alpha=-1)
        codes[:, columns] = block.T
        pull[:, columns.stop :].addmm_(moved.T, after, alpha=-1)
    return codes


PLACES = {
    bits: [divmod(bits * index, 8) for index in range(8 // math.gcd(bits, 8))]
    for bits in range(FEWEST, MOST + 1)
}


def _places(bits: int) -> list[tuple[int, int]]:
    """Byte and shift of each integer in the shortest run that ends with a byte; one may continue in the next byte."""
    for (
        known,
        places,
    ) in PLACES.items():  # torch.compile may know the number only as a symbol, which is no key
        if known == bits:
            return places
    raise ValueError(f"`bits` must be from {FEWEST} to {MOST}, got {bits!r}")


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
    return _clamp((values / scale).round(), bits)


def _clamp(codes: Tensor, bits: int) -> Tensor:
    return codes.clamp(lowest(bits), -lowest(bits) - 1)


def _scale(block: Tensor, matter: Tensor, bits: int, row_scale: Tensor | None) -> Tensor:
    """The candidate scale with the smallest squared error for each row, of shape (out_features,).

    Args:
        block: the weights of one block, of shape (out_features, block_size).
        matter: the weight of each column in the error, of shape (block_size,).
        bits: the bits of each weight.
        row_scale: the scale of each row, of shape (out_features, 1), if those of blocks have 8 bits.
    """
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))
    scales = largest / lowest(bits) * block.new_tensor(CANDIDATES)  # (out_features, candidates)
    scales = _storable(scales, row_scale)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    errors = torch.empty_like(scales)
    for index, scale in enumerate(
        scales.T.unsqueeze(2)
    ):  # few numbers at a time, which stay in the processor's cache
        rounded = torch.div(block, scale).round_().clamp_(lowest(bits), -lowest(bits) - 1).mul_(scale)
        errors[:, index] = rounded.sub_(block).square_() @ matter
    return scales.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
