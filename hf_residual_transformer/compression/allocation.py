"""Step 3: ranks, group sizes and bits for a budget, spent where a byte keeps the encoder's final states best.

The error that a rank leaves follows from the statistics of `statistics.py`, without fitting anything.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..configuration import ResidualConfig
from ..families import LayerStack
from ..quantization import BLOCK, FEWEST
from ..reporting import quantized_size
from .fitting import rounded
from .statistics import TINY, Group, Statistics, metric_of, parallel_sum

STEP = 4  # ranks are multiples of it, or the most that makes sense
# The second fit, in `refinement.py`, removes more of the error of a matrix that belongs to one layer than of a shared
# one. So when group sizes are compared, errors of shared matrices count more; docs/LOG.md has the measurements.
SHARED_COST = 2.5
HALVINGS = 50  # in the search for the price of a parameter

Sharing = tuple[int | None, int | None]  # group size and bits of `U`
Options = dict[str, list[Sharing]]  # to choose from, by module path


def open_options(shared_bits: int | None, scarce: bool) -> list[Sharing]:
    """Group sizes and bits to try for each module where the user leaves them open.

    Args:
        shared_bits: the most bits of a `U`; None for floating point. A quantised `U` for each single layer may pay.
        scarce: whether the bytes are too few for a `U` of that many bits for each layer, so that fewer are tried.
    """
    if shared_bits is None:
        return [(None, None), (2, None)]
    fewest = FEWEST if scarce else shared_bits
    return [(None, None), *((1, bits) for bits in range(fewest, shared_bits + 1)), (2, shared_bits)]


@dataclass
class Curve:
    """The error of a group as a function of its rank.

    Args:
        group: the layers, which all get the same rank.
        errors: `errors[R]` is the error at rank R, from 0 up to the largest rank that is worth its parameters.
        cost: parameters that one more rank takes in all layers of the group.
        fixed: parameters of the group's `U`; where it is quantised, its bytes in parameters of 16 bits.
        rank: the rank that is chosen so far.
    """

    group: Group
    errors: list[float]
    cost: int
    fixed: float
    rank: int = 0

    @property
    def least(self) -> int:
        """The smallest rank: without `U`, a matrix needs one."""
        return 0 if self.group.size else 1

    @property
    def weight(self) -> float:
        """How much its errors count."""
        return SHARED_COST if len(self.group.layers) > 1 else 1.0

    def at_price(self, price: float) -> tuple[float, float]:
        """The least cost of weighted error and parameters over all ranks, and the number of these parameters."""
        errors, sizes = self._by_rank
        costs = errors + price * sizes
        best = int(costs.argmin())
        return costs[best].item(), sizes[best].item()

    @cached_property
    def _by_rank(self) -> tuple[Tensor, Tensor]:
        errors = self.weight * torch.tensor(self.errors, dtype=torch.float64)
        sizes = self.fixed + self.cost * torch.arange(len(errors), dtype=torch.float64)
        return errors[self.least :], sizes[self.least :]

    def next_rank(self) -> int:
        """The rank after one step."""
        return min(self.rank + STEP, len(self.errors) - 1)

    def gain(self) -> float:
        """The error that the next step removes, for each parameter that it takes."""
        following = self.next_rank()
        if following == self.rank:
            return 0.0
        return (self.errors[self.rank] - self.errors[following]) / (self.cost * (following - self.rank))


def allocate(
    source: LayerStack,
    residual_config: ResidualConfig,
    options: Options,
    curves: Iterable[tuple[Sharing, Curve]],
    budget: float,
) -> ResidualConfig:
    """`residual_config` with the ranks, group sizes and bits of `options` that leave the smallest estimated error.

    Args:
        source: the dense stack.
        residual_config: settings whose ranks are replaced, and where `options` leave a choice, also the others.
        options: group sizes and bits to choose from, by module path.
        curves: errors by rank, of every group that `options` make, see `curves_of`.
        budget: bytes of the layers relative to those of the dense layers in 16 bits. Without a quantised `U` it is
            also the ratio of their parameters.

    Raises:
        ValueError: when the budget is below the size of everything that does not depend on ranks.
    """
    by_path: dict[str, dict[Sharing, list[Curve]]] = {
        path: {sharing: [] for sharing in sharings} for path, sharings in options.items()
    }
    for sharing, curve in curves:
        by_path[curve.group.module_path][sharing].append(curve)
    dense = sum(parameter.numel() for parameter in source.layers.parameters())
    left = budget * dense - unranked_parameters(source, residual_config, options)
    (lacking, _), ranks, plan = _best_plan(by_path, left)
    if lacking > 0:
        raise ValueError(
            f"`budget` must be at least {budget + lacking / dense:.3f} with this `residual_config`, "
            f"whose shared and dense matrices take that much, got {budget}; share among more layers, or set group "
            "sizes to None"
        )
    chosen = residual_config
    if any(len(sharings) > 1 for sharings in options.values()):
        role_of = source.stack.role_of
        group_size = {role_of(path): size for path, (size, _) in plan.items()}
        by_role = {role_of(path): bits for path, (_, bits) in plan.items() if bits is not None}
        shared_bits = by_role if len(set(by_role.values())) > 1 else next(iter(by_role.values()), None)
        chosen = replace(chosen, group_size=group_size, shared_bits=shared_bits)
    return replace(chosen, rank_pattern=rank_pattern_of(ranks))


def unranked_parameters(source: LayerStack, residual_config: ResidualConfig, options: Options) -> int:
    """Parameters of the layers of a residual model, without every `U` and every `B A`.

    Args:
        source: the dense stack.
        residual_config: says which matrices have a diagonal, and whether groups share biases.
        options: the module paths that are compressed.
    """
    total = sum(parameter.numel() for parameter in source.layers.parameters())
    for path in options:
        size = residual_config.group_size_of(source.stack.role_of(path))
        for layer in range(len(source)):
            linear = source.linear(layer, path)
            total -= linear.weight.numel()
            if residual_config.has_diagonal(*linear.weight.shape):
                total += min(linear.weight.shape)
            is_first = size is None or layer % size == 0
            if residual_config.share_biases and linear.bias is not None and not is_first:
                total -= linear.bias.numel()
    return total


def size_without_ranks(source: LayerStack, bits: int | None) -> float:
    """Bytes of the layers relative to dense, with a `U` of so many bits for each layer and nothing beside it."""
    total = sum(parameter.numel() for parameter in source.layers.parameters())
    matrices = sum(
        source.linear(layer, path).weight.numel()
        for layer in range(len(source))
        for path in source.stack.modules
    )
    return 1.0 if bits is None else (total - matrices + quantized_parameters(matrices, bits)) / total


def quantized_parameters(number: int, bits: int) -> float:
    """Size of so many weights of a quantised `U`, scales included, in parameters of 16 bits."""
    return quantized_size({bits: number}) + number / BLOCK


def rank_pattern_of(ranks: dict[tuple[int, str], int]) -> dict[str, int]:
    """A `rank_pattern` that gives each matrix, by layer and module path, its rank."""
    return {re.escape(f"layers.{layer}.{path}"): rank for (layer, path), rank in ranks.items()}


def _best_plan(
    curves: dict[str, dict[Sharing, list[Curve]]], left: float
) -> tuple[tuple[float, float], dict[tuple[int, str], int], dict[str, Sharing]]:
    """The best plan that the search finds: its outcome as `_allocate` gives it, its ranks, and a sharing for each path.

    The search gives a parameter a price, and looks for the lowest price at which the best plan costs at most `left`
    parameters. Then it changes one module at a time as long as that helps.
    """

    def outcome(plan: dict[str, Sharing]) -> Any:
        return *_allocate([curve for path in plan for curve in curves[path][plan[path]]], left), plan

    def at_price(price: float) -> tuple[dict[str, Sharing], float]:
        plan, size = {}, 0.0
        for path, sharings in curves.items():
            costs = {}
            for sharing, found in sharings.items():
                points = [curve.at_price(price) for curve in found]
                costs[sharing] = sum(cost for cost, _ in points), sum(size for _, size in points)
            plan[path] = min(costs, key=costs.__getitem__)
            size += costs[plan[path]][1]
        return plan, size

    most = max(
        curve.errors[0] for sharings in curves.values() for found in sharings.values() for curve in found
    )
    low, high = math.log(TINY), math.log(max(most, TINY))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if at_price(math.exp(middle))[1] <= left else (middle, high)
    best = outcome(at_price(math.exp(high))[0])
    while True:
        plan = best[-1]
        tried = [
            outcome({**plan, path: sharing})
            for path, sharings in curves.items()
            for sharing in sharings
            if sharing != plan[path]
        ]
        better = min(tried, key=lambda found: found[0], default=best)
        if better[0] >= best[0]:
            return best
        best = better


def _allocate(curves: list[Curve], left: float) -> tuple[tuple[float, float], dict[tuple[int, str], int]]:
    """Spends `left` parameters on ranks, the largest gain first.

    Returns:
        The number of parameters that are missing for the least ranks, with the weighted error that remains; and the
        rank of each matrix, by layer and module path.
    """
    for curve in curves:
        curve.rank = curve.least
        left -= curve.fixed + curve.rank * curve.cost
    lacking = max(0.0, -left)
    queue = [(-curve.gain(), index) for index, curve in enumerate(curves)]
    heapq.heapify(queue)
    while queue:
        gain, index = heapq.heappop(queue)
        curve = curves[index]
        price = curve.cost * (curve.next_rank() - curve.rank)
        if gain < 0 and price <= left:
            curve.rank, left = curve.next_rank(), left - price
            heapq.heappush(queue, (-curve.gain(), index))
    ranks = {
        (layer, curve.group.module_path): curve.rank
        for curve in sorted(curves, key=lambda curve: curve.group.layers)
        for layer in curve.group.layers
    }
    return (lacking, sum(curve.weight * curve.errors[curve.rank] for curve in curves)), ranks


def curves_of(
    source: LayerStack, groups: Iterable[Group], statistics: Statistics, options: Options
) -> list[tuple[Sharing, Curve]]:
    """The error of each group as a function of its rank, for each sharing that `options` allow it."""
    found: list[tuple[Sharing, Curve]] = []
    for group in groups:
        sharings = [sharing for sharing in options[group.module_path] if sharing[0] == group.size]
        curves = _curves(source, group, statistics, [bits for _, bits in sharings])
        found += zip(sharings, curves, strict=True)
    return found


def _curves(
    source: LayerStack, group: Group, statistics: Statistics, numbers: list[int | None]
) -> list[Curve]:
    """One curve of a group for each number of bits.

    The error after the first fit is exact for a layer alone and, with equal ranks, for a pair without diagonals. For
    larger groups it is the error with the best `U` of rank 0, which more rounds would improve. Where layers share a
    quantised `U`, the error of its rounding is added, since nothing makes up for it.
    """
    weights = [source.linear(layer, group.module_path).weight.double() for layer in group.layers]
    covariances, importance = metric_of(group, statistics)
    root = torch.linalg.cholesky(importance).T
    out_features, in_features = weights[0].shape
    shared = 0 if group.size is None else out_features * in_features
    inputs = torch.stack(covariances).sum(0)
    mean = weights[0]
    if group.size is None:
        errors = _tails(root @ mean, inputs)[: out_features * in_features // (out_features + in_features) + 1]
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
    curves = []
    for bits in numbers:
        left, fixed = errors, float(shared)
        if bits is not None:
            fixed = quantized_parameters(shared, bits)
            missing = root @ (mean - rounded(mean, inputs, bits))
            alone = len(weights) == 1
            left = _tails(missing, inputs) if alone else errors + ((missing @ inputs) * missing).sum()
        curves.append(Curve(group, left.tolist(), cost, fixed))
    return curves


def _tails(matrix: Tensor, covariance: Tensor) -> Tensor:
    """Squared output error of the best approximation of each rank from 0 on, (min(out_features, in_features) + 1,)."""
    if matrix.shape[0] <= matrix.shape[1]:
        gram = matrix @ covariance @ matrix.T
    else:
        root = torch.linalg.cholesky(covariance)
        gram = root.T @ (matrix.T @ matrix) @ root
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)])
