"""Ranks, group sizes and bits for a budget: where a byte of the encoder's layers keeps its final states best.

What error a rank leaves is known from the statistics of `calibration.py` without fitting anything.
"""

from __future__ import annotations

import heapq
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..configuration import ResidualConfig
from ..families import Family, role_of
from ..quantization import BLOCK, FEWEST
from ..reporting import quantized_size, size_report
from .fitting import rounded
from .statistics import TINY, Group, Statistics, Sweep, metric_of, parallel_sum

STEP = 4  # ranks are multiples of it, or the most that makes sense
# The second fit, in `sequential.py`, takes away more of the error where a layer's matrix is all its own than where
# layers share one. So when group sizes are compared, what sharing leaves counts more: docs/LOG.md has the measurements.
SHARED_COST = 2.5
HALVINGS = 50  # in the search for the price of a parameter

Sharing = tuple[int | None, int | None]  # group size and bits of `U`
Options = dict[str, list[Sharing]]  # to choose from, by module path


def open_options(shared_bits: int | None, scarce: bool) -> list[Sharing]:
    """What is tried for each module where the user leaves it open, with a `U` of at most so many bits. Where it is
    quantised, one for each layer may pay as well, and where bytes are too `scarce` for that, one of fewer bits.
    """
    if shared_bits is None:
        return [(None, None), (2, None)]
    fewest = FEWEST if scarce else shared_bits
    return [(None, None), *((1, bits) for bits in range(fewest, shared_bits + 1)), (2, shared_bits)]


@dataclass
class Curve:
    """What a rank leaves: `errors[R]` for R of every layer in the group, 0 up to the largest that is worth its
    parameters; `cost` is the number of parameters of one more rank in all layers of the group, and `fixed` that
    of its `U`, of 16 bits each where `U` is quantised.
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
        """Of its errors."""
        return SHARED_COST if len(self.group.layers) > 1 else 1.0

    def at_price(self, price: float) -> tuple[float, float]:
        """The least that weighted error and parameters cost, at any rank, and these parameters."""
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
        """Error that the next step takes away, a parameter."""
        following = self.next_rank()
        if following == self.rank:
            return 0.0
        return (self.errors[self.rank] - self.errors[following]) / (self.cost * (following - self.rank))


def spend(
    family: Family,
    dense: Any,
    model: Any,
    residual_config: ResidualConfig,
    options: Options,
    sweep: Sweep,
    budget: float,
) -> ResidualConfig:
    """`residual_config` with the ranks, and of `options` the group sizes and bits, that leave the smallest error.

    Args:
        model: a residual model of `residual_config`, for the parameters that do not depend on either.
        options: group sizes and bits to choose from, by module path.
        sweep: the calibration, over all groups that they make.
        budget: unique / dense parameters of the encoder's layers, as `size_report` counts; with a quantised `U`,
            their bytes.

    Raises:
        ValueError: when the parameters that do not depend on ranks alone are more.
    """
    report = size_report(model)
    by_rank = sum(report.components[name].unique for name in ("lora", "shared"))
    left = budget * report.encoder.dense - (report.encoder.unique - by_rank)
    layers = family.find_encoder(dense).layers
    curves: dict[str, dict[Sharing, list[Curve]]] = {
        path: {sharing: [] for sharing in sharings} for path, sharings in options.items()
    }
    for statistics, groups in sweep:
        for group in groups:
            numbers = [bits for size, bits in options[group.module_path] if size == group.size]
            for bits, curve in zip(numbers, _curves(layers, group, statistics, numbers)):
                curves[group.module_path][group.size, bits].append(curve)
    (lacking, _), ranks, plan = _best_plan(curves, left)
    if lacking > 0:
        raise ValueError(
            f"`budget` must be at least {budget + lacking / report.encoder.dense:.3f} with this `residual_config`, "
            f"whose shared and dense matrices take that much, got {budget}; share among more layers, or set group "
            "sizes to None"
        )
    chosen = residual_config
    if any(len(sharings) > 1 for sharings in options.values()):
        group_size = {role_of(path): size for path, (size, _) in plan.items()}
        by_role = {role_of(path): bits for path, (_, bits) in plan.items() if bits is not None}
        shared_bits = by_role if len(set(by_role.values())) > 1 else next(iter(by_role.values()), None)
        chosen = replace(chosen, group_size=group_size, shared_bits=shared_bits)
    return replace(chosen, rank_pattern=rank_pattern_of(ranks))


def rank_pattern_of(ranks: dict[tuple[int, str], int]) -> dict[str, int]:
    """A `rank_pattern` that gives each matrix, by layer and module path, its rank."""
    return {re.escape(f"layers.{layer}.{path}"): rank for (layer, path), rank in ranks.items()}


def _best_plan(
    curves: dict[str, dict[Sharing, list[Curve]]], left: float
) -> tuple[tuple[float, float], dict[tuple[int, str], int], dict[str, Sharing]]:
    """What `_allocate` says of the best plan that is found, its ranks, and the plan, a sharing for each module.

    The search begins with the plan that is best where a parameter has a price, the lowest for which it is within
    `left`; then it changes one module at a time while that helps.
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
    """Spends `left` parameters, largest gain first: the parameters that are lacking for the least ranks and the cost
    of the error that remains, and the rank of each matrix, by layer and module path.
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


def _curves(layers: Any, group: Group, statistics: Statistics, numbers: list[int | None]) -> list[Curve]:
    """Of one group, for each number of bits. What the first fit leaves is exact for a layer alone and, with equal
    ranks, for a pair without diagonals; for larger groups, it is the error with the best `U` of rank 0, which more
    rounds would improve. Where layers share a quantised `U`, nothing makes up for its rounding.
    """
    weights = [layers[layer].get_submodule(group.module_path).weight.double() for layer in group.layers]
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
            fixed = quantized_size({bits: shared}) + shared / BLOCK
            missing = root @ (mean - rounded(mean, inputs, bits))
            alone = len(weights) == 1
            left = _tails(missing, inputs) if alone else errors + ((missing @ inputs) * missing).sum()
        curves.append(Curve(group, left.tolist(), cost, fixed))
    return curves


def _tails(matrix: Tensor, covariance: Tensor) -> Tensor:
    """Squared output error that the best approximation of each rank, from 0, leaves: (min(out, in) + 1,)."""
    if matrix.shape[0] <= matrix.shape[1]:
        gram = matrix @ covariance @ matrix.T
    else:
        root = torch.linalg.cholesky(covariance)
        gram = root.T @ (matrix.T @ matrix) @ root
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)])
