"""Step 3: group sizes, bits and ranks for a budget, spent where a byte keeps the objective best.

The error that a rank leaves follows from the statistics of `statistics.py`, without fitting anything. All parts of a
model have the same unit of error, so that one search serves encoder, decoder and embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..configuration import ResidualConfig
from ..families import LayerStack, groups_of
from ..quantization import BLOCK, SCALE_BITS, quantize
from ..reporting import quantized_size
from .fitting import naming, quantize_for
from .statistics import TINY, EmbeddingStatistics, Group, Statistics, metric_of, parallel_sum

STEP = 4  # ranks are multiples of it, or the most that makes sense
# The second fit, in `refinement.py`, removes more of the error of a matrix that belongs to one layer than of a shared
# one. So when group sizes are compared, errors of shared matrices count more; docs/LOG.md has the measurements.
SHARED_COST = 2.5
HALVINGS = 50  # in the search for the price of a parameter
REFERENCE_BITS = 3  # errors with other bits are estimated from those with this number
SAMPLED_ROWS = 8  # every eighth row of a matrix is enough to compare numbers of bits
EMBEDDING = "embed_tokens"
TOKEN_RANGES = (1024, 4096, 16384)
MOST_MEASURED_BITS = 4  # of ranges of tokens; more bits do what the ratios of rounding errors say


@dataclass(frozen=True)
class Search:
    """What may be chosen for one stack.

    Args:
        source: the dense stack.
        config: settings that are given, or whose ranks, sizes and bits are to be chosen.
        numbers: the numbers of bits that a `U` may have where everything is open, None for floating point. Without
            `is_open` they do not count.
        is_open: whether group sizes and bits are to be chosen too.
    """

    source: LayerStack
    config: ResidualConfig
    numbers: tuple[int, ...] | None = None
    is_open: bool = False

    def sizes(self, path: str) -> list[int | None]:
        """Group sizes of the matrices at a module path; none where they stay dense."""
        if self.is_open:
            # Few bits cost so little that a low rank alone is worth less, and how little it is worth is hard to know:
            # its errors are far greater than those that are measured.
            return [None, 2] if self.numbers is None else [1]
        role = self.source.stack.role_of(path)
        return [self.config.group_size_of(role)] if self.config.is_target(role) else []

    def bits(self, group: Group) -> list[int | None]:
        """Numbers of bits that the `U` of a group may have."""
        if group.size is None:
            return [None]
        if self.is_open:
            return [None] if self.numbers is None else list(self.numbers)
        return [self.config.bits_of(self.source.stack.role_of(group.module_path), path_of(group))]

    def groups(self) -> list[Group]:
        """All groups that may be chosen."""
        stack = self.source.stack
        return [
            Group(path, size, tuple(layers), stack.name)
            for path in stack.modules
            for size in self.sizes(path)
            for layers in groups_of(len(self.source), size or 1, self.config.cyclic)
        ]


def path_of(group: Group) -> str:
    """Path of the first matrix of a group, as `rank_pattern` and `bits_pattern` know it."""
    return f"layers.{group.layers[0]}.{group.module_path}"


@dataclass
class Curve:
    """The error of a group as a function of its rank, with one number of bits.

    Args:
        group: the layers, which all get the same rank.
        bits: of the group's `U`.
        errors: `errors[R]` is the error at rank R, from 0 up to the largest rank that is worth its parameters.
        cost: parameters that one more rank takes in all layers of the group.
        fixed: parameters of the group's `U`; where it is quantised, its bytes in parameters of 16 bits.
    """

    group: Group
    bits: int | None
    errors: np.ndarray
    cost: int
    fixed: float

    def ranks(self) -> list[int]:
        """Ranks to choose from. Without `U`, a matrix needs a rank of at least one."""
        most, least = len(self.errors) - 1, 0 if self.group.size else 1
        return sorted({least, *range(STEP, most, STEP), most} - {0} | {least})


@dataclass(frozen=True)
class Choice:
    """What a group gets."""

    group: Group
    bits: int | None
    rank: int


class _Menu:
    """All that one group may get: sizes in parameters, and errors."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.choices = [(curve, rank) for curve in curves for rank in curve.ranks()]
        self.sizes = np.array([curve.fixed + curve.cost * rank for curve, rank in self.choices])
        count = SHARED_COST if len(curves[0].group.layers) > 1 else 1.0
        self.errors = count * np.array([curve.errors[rank] for curve, rank in self.choices])

    def at_price(self, price: float) -> int:
        """The index with the least cost of error and size."""
        return int((self.errors + price * self.sizes).argmin())

    def upgrade(self, index: int, left: float) -> tuple[float, int]:
        """The largest gain of error for each parameter, and the index that has it, with `left` more parameters."""
        more = self.sizes - self.sizes[index]
        gains = np.where((more > 0) & (more <= left), self.errors[index] - self.errors, 0.0) / np.maximum(
            more, TINY
        )
        best = int(gains.argmax())
        return gains[best].item(), best

    def choice(self, index: int) -> Choice:
        """The choice at an index."""
        curve, rank = self.choices[index]
        return Choice(curve.group, curve.bits, rank)


Menus = dict[tuple[str, str], dict[int | None, list[_Menu]]]  # by stack and path, and by group size


def choose(curves: Sequence[Curve], left: float) -> list[Choice]:
    """The choice for each group that together leave the smallest estimated error.

    All groups at one place, a stack and a module path, have the same size. The search gives a parameter a price, and
    looks for the lowest price at which the best choices take at most `left` parameters. It spends the rest one by one.
    Then it changes the group size of one place at a time as long as that helps.

    Raises:
        Lacking: when even the smallest choices take more than `left`.
    """
    by_group: dict[Group, list[Curve]] = {}
    for curve in curves:
        by_group.setdefault(curve.group, []).append(curve)
    menus: Menus = {}
    for group, found in by_group.items():
        place = menus.setdefault((group.stack, group.module_path), {})
        place.setdefault(group.size, []).append(_Menu(found))
    error, best = _solve(menus, left)
    alternatives = [(key, size) for key, sizes in menus.items() for size in sizes if len(sizes) > 1]
    improved = True
    while improved:
        improved = False
        for key, size in alternatives:
            if size != best[key][0]:
                fixed = {other: {found[0]: menus[other][found[0]]} for other, found in best.items()}
                try:
                    tried_error, tried = _solve({**fixed, key: {size: menus[key][size]}}, left)
                except Lacking:
                    continue
                if tried_error < error:
                    error, best, improved = tried_error, tried, True
    return [
        menu.choice(index)
        for place, (size, indices) in best.items()
        for menu, index in zip(menus[place][size], indices)
    ]


class Lacking(ValueError):
    """A budget is too small.

    Args:
        parameters: how many parameters it lacks.
    """

    def __init__(self, parameters: float) -> None:
        super().__init__(f"{parameters:.0f} parameters are lacking")
        self.parameters = parameters


Picks = dict[
    tuple[str, str], tuple[int | None, list[int]]
]  # by place: group size, and an index for each menu


def _solve(menus: Menus, left: float) -> tuple[float, Picks]:
    """The estimated error, and the picks."""

    def at_price(price: float) -> tuple[Picks, float]:
        picks, total = {}, 0.0
        for place, sizes in menus.items():
            costs = {}
            for size, found in sizes.items():
                indices = [menu.at_price(price) for menu in found]
                error = sum(menu.errors[index] for menu, index in zip(found, indices))
                taken = sum(menu.sizes[index] for menu, index in zip(found, indices))
                costs[size] = error + price * taken, taken, indices
            best = min(costs, key=lambda size: costs[size][0])
            picks[place] = best, costs[best][2]
            total += costs[best][1]
        return picks, total

    most = max(menu.errors.max() for sizes in menus.values() for found in sizes.values() for menu in found)
    low, high = math.log(TINY), math.log(max(most, TINY)) + 1
    picks, size = at_price(math.exp(high))
    if size > left:
        raise Lacking(size - left)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found, taken = at_price(math.exp(middle))
        if taken <= left:
            high, picks, size = middle, found, taken
        else:
            low = middle
    chosen = [menu for place, (group_size, _) in picks.items() for menu in menus[place][group_size]]
    indices = [index for _, found in picks.values() for index in found]
    left -= size
    while True:
        gains = [menu.upgrade(index, left) for menu, index in zip(chosen, indices)]
        best = max(range(len(gains)), key=lambda position: gains[position][0])
        if gains[best][0] <= 0:
            break
        left -= chosen[best].sizes[gains[best][1]] - chosen[best].sizes[indices[best]]
        indices[best] = gains[best][1]
    rest = iter(indices)
    picks = {place: (size, [next(rest) for _ in found]) for place, (size, found) in picks.items()}
    return sum(menu.errors[index] for menu, index in zip(chosen, indices)), picks


def config_of(search: Search, choices: Sequence[Choice]) -> ResidualConfig:
    """The settings of one stack with the choices for its groups."""
    ranks = {
        (layer, choice.group.module_path): choice.rank for choice in choices for layer in choice.group.layers
    }
    config = replace(search.config, rank_pattern=rank_pattern_of(ranks))
    if not search.is_open:
        return config
    role_of = search.source.stack.role_of
    sizes = {role_of(choice.group.module_path): choice.group.size for choice in choices}
    bits = {path_of(choice.group): choice.bits for choice in choices if choice.bits is not None}
    numbers = set(bits.values())
    if len(numbers) <= 1 and None not in sizes.values():
        return replace(config, group_size=sizes, shared_bits=next(iter(numbers), None), bits_pattern={})
    return replace(config, group_size=sizes, shared_bits=None, bits_pattern=bits)


def unranked_parameters(search: Search) -> int:
    """Parameters of the layers of a residual model, without every `U` and every `B A`."""
    source, config = search.source, search.config
    total = sum(parameter.numel() for parameter in source.layers.parameters())
    for path in source.stack.modules:
        if not search.sizes(path):
            continue
        size = config.group_size_of(source.stack.role_of(path)) if not search.is_open else 1
        for layer in range(len(source)):
            linear = source.linear(layer, path)
            total -= linear.weight.numel()
            if config.has_diagonal(*linear.weight.shape):
                total += min(linear.weight.shape)
            is_first = size is None or layer % size == 0
            if config.share_biases and linear.bias is not None and not is_first:
                total -= linear.bias.numel()
    return total


def quantized_parameters(
    shape: Sequence[int], bits: int, block_size: int = BLOCK, scale_bits: int = SCALE_BITS[0]
) -> float:
    """Size of a quantised `U` of this shape, scales included, in parameters of 16 bits."""
    number = math.prod(shape)
    of_blocks = quantized_size({scale_bits: number // block_size})
    return quantized_size({bits: number}) + of_blocks + (shape[0] if scale_bits == 8 else 0)


def rank_pattern_of(ranks: dict[tuple[int, str], int]) -> dict[str, int]:
    """A `rank_pattern` that gives each matrix, by layer and module path, its rank."""
    ordered = sorted(ranks, key=lambda key: key[0])
    return {f"layers.{layer}.{path}": ranks[layer, path] for layer, path in ordered}


def curves_of(search: Search, groups: Iterable[Group], statistics: Statistics) -> list[Curve]:
    """The error of each group as a function of its rank, for each number of bits that it may have.

    The error after the first fit is exact for a layer alone in floating point and, with equal ranks, for a pair without
    diagonals. For larger groups it is the error with the best `U` of rank 0, which more rounds would improve. Where
    layers share a quantised `U`, the error of its rounding is added, since nothing makes up for it.
    """
    found = []
    for group in groups:
        with naming(f"{group.stack} {path_of(group)}"):
            found += _curves_of_group(search, group, statistics)
    return found


def _curves_of_group(search: Search, group: Group, statistics: Statistics) -> list[Curve]:
    """One for each number of bits."""
    weights = [search.source.weight(layer, group.module_path) for layer in group.layers]
    covariances, importance = metric_of(group, statistics)
    root = torch.linalg.cholesky(importance).T
    out_features, in_features = weights[0].shape
    inputs = torch.stack(covariances).sum(0)
    mean = weights[0]
    if group.size is None:
        most = max(1, out_features * in_features // (out_features + in_features))
        errors = _tails(root @ mean, inputs)[: most + 1]
    elif len(weights) == 1:
        errors = torch.zeros(1)
    else:
        total = torch.stack([w @ c for w, c in zip(weights, covariances)]).sum(0)
        mean = torch.linalg.solve(inputs, total.T).T
        if len(weights) == 2:
            errors = _tails(root @ (weights[0] - weights[1]), parallel_sum(*covariances))[::2]
        else:
            errors = torch.stack([_tails(root @ (w - mean), c) for w, c in zip(weights, covariances)]).sum(0)
    cost = len(weights) * (out_features + in_features)
    numbers = search.bits(group)
    block_size = search.config.block_size
    rotation = search.config.rotation_of(search.source.stack.role_of(group.module_path))
    floating = [bits for bits in numbers if bits is None]
    number = 0 if group.size is None else mean.numel()
    found = [Curve(group, None, errors.cpu().numpy(), cost, float(number)) for _ in floating]
    few = [bits for bits in numbers if bits is not None]
    if not few:
        return found
    reference = REFERENCE_BITS if REFERENCE_BITS in few else few[0]
    quantized = quantize_for(mean, inputs, reference, block_size, sweeps=0, rotation=rotation)
    missing = root @ (mean - quantized.weight())
    alone = len(weights) == 1
    left = _tails(missing, inputs) if alone else ((missing @ inputs) * missing).sum()
    ratios = rounding_ratios(mean, inputs.diagonal(), few, reference, block_size, rotation)
    for bits, ratio in ratios.items():
        of_bits = (ratio * left if alone else errors + ratio * left).cpu().numpy()
        size = quantized_parameters(mean.shape, bits, block_size, search.config.scale_bits)
        found.append(Curve(group, bits, of_bits, cost, size))
    return found


def token_ranges(num_tokens: int, end_token: int | None) -> list[int]:
    """Ends of the ranges of tokens whose numbers of bits are chosen apart.

    Byte-pair encodings number tokens in the order in which they were merged, so that low ids are frequent. The token
    that ends a text and those after it, of tasks, languages and times, are a range where they come last.
    """
    ends = {*TOKEN_RANGES, end_token or 0}
    return [*sorted(end for end in ends if min(TOKEN_RANGES) <= end < num_tokens), num_tokens]


def embedding_curves(
    table: Tensor,
    statistics: EmbeddingStatistics,
    ranges: Iterable[tuple[int, Sequence[int]]],
    block_size: int,
    measure: Callable[[Tensor], float] | None = None,
    scale_bits: int = SCALE_BITS[0],
    centred: bool = True,
) -> list[Curve]:
    """The errors of ranges of tokens for each number of bits. The end of a range is the layer of its group.

    Errors of logits count by their exponentials, so that those of two or three bits do several times what statistics
    of second order say. They are measured.

    Args:
        table: the vectors of all tokens, (num_tokens, hidden_size).
        statistics: of the table.
        ranges: for each range of tokens, its end and the bits that it may have, in ascending order.
        block_size: the number of weights that have one scale.
        measure: gives the effect of another table; by default it is estimated.
        scale_bits: the bits of each scale, 16 or 8.
        centred: whether each range keeps the mean of its vectors apart.
    """
    found, start = [], 0
    for end, numbers in ranges:
        metric = statistics.metric(start, end)
        mean = table[start:end].mean(0) if centred else table.new_zeros(table.shape[1])
        rows = table[start:end] - mean
        errors: dict[int, float] = {}
        for bits in [number for number in numbers if number <= MOST_MEASURED_BITS] or numbers[:1]:
            rounded = table.clone()
            with naming(EMBEDDING):
                rounding = quantize_for(rows, metric, bits, block_size, sweeps=0)
            rounded[start:end] = rounding.weight() + mean
            errors[bits] = measure(rounded) if measure else statistics.errors(rounded - table).sum().item()
        last = max(errors)
        others = [last, *(bits for bits in numbers if bits not in errors)]
        for bits, ratio in rounding_ratios(rows, metric.diagonal(), others, last, block_size).items():
            errors[bits] = ratio * errors[last]
        for bits, error in errors.items():
            size = quantized_parameters(rows.shape, bits, block_size, scale_bits) + len(mean)
            found.append(
                Curve(Group(EMBEDDING, 1, (end,), EMBEDDING), bits, np.array([max(error, 0.0)]), 0, size)
            )
        start = end
    return found


def rounding_ratios(
    weight: Tensor,
    variances: Tensor,
    numbers: Sequence[int],
    reference: int,
    block_size: int,
    rotation: int = 1,
) -> dict[int, float]:
    """By number of bits, the error of rounding relative to that with `reference` bits, from some of the rows."""
    sample = weight[::SAMPLED_ROWS].double()

    def error(bits: int) -> float:
        difference = quantize(sample, None, bits, block_size, rotation=rotation).weight() - sample
        return (difference.square() @ variances).sum().item()

    base = error(reference) if len(numbers) > 1 else 1.0
    return {bits: 1.0 if bits == reference else error(bits) / max(base, TINY) for bits in numbers}


def _tails(matrix: Tensor, covariance: Tensor) -> Tensor:
    """Squared output error of the best approximation of each rank from 0 on, (min(out_features, in_features) + 1,)."""
    if matrix.shape[0] <= matrix.shape[1]:
        gram = matrix @ covariance @ matrix.T
    else:
        root = torch.linalg.cholesky(covariance)
        gram = root.T @ (matrix.T @ matrix) @ root
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)])
