"""Ranks and group sizes for a budget: where a parameter of the encoder's layers keeps its final states best.

What error a rank leaves is known from the statistics of `calibration.py` without fitting anything.
"""

from __future__ import annotations

import heapq
import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .calibration import Group, GroupSizes, Statistics, Sweep, metric_of, parallel_sum
from .configuration import ResidualConfig
from .families import Family, role_of
from .fitting import rounded
from .reporting import QUANTIZED_SIZE, parameter_report

STEP = 4  # ranks are multiples of it, or the most that makes sense
# What is tried for each module where the user leaves it open; with a quantised `U`, one for each layer may pay as well.
GROUP_SIZES = (None, 2)
QUANTIZED_GROUP_SIZES = (None, 1, 2)
# The second fit, in `sequential.py`, takes away more of the error where a layer's matrix is all its own than where
# layers share one. So when group sizes are compared, what sharing leaves counts more: docs/LOG.md has the measurements.
SHARED_COST = 2.5


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
    sizes: GroupSizes,
    sweep: Sweep,
    budget: float,
) -> ResidualConfig:
    """`residual_config` with the ranks, and of `sizes` the group sizes, that leave the smallest error.

    Args:
        model: a residual model of `residual_config`, for the parameters that do not depend on either.
        sizes: the group sizes to choose from, by module path.
        sweep: the calibration, over all groups that they make.
        budget: unique / dense parameters of the encoder's layers, as `parameter_report` counts; with a quantised `U`,
            their bytes.

    Raises:
        ValueError: when the parameters that do not depend on ranks alone are more.
    """
    report = parameter_report(model)
    by_rank = sum(report.components[name].unique for name in ("lora", "shared"))
    left = budget * report.encoder.dense - (report.encoder.unique - by_rank)
    layers = family.find_encoder(dense).layers
    curves: dict[tuple[str, int | None], list[Curve]] = {}
    for statistics, groups in sweep:
        for group in groups:
            curves.setdefault((group.module_path, group.size), []).append(
                _curve(layers, group, statistics, residual_config.shared_bits is not None)
            )
    options = [[(path, size) for size in sizes[path]] for path in sizes]
    plans = [
        (*_allocate([curve for key in plan for curve in curves[key]], left), plan)
        for plan in itertools.product(*options)
    ]
    lacking, _, ranks, plan = min(plans, key=lambda plan: plan[:2])
    if lacking > 0:
        raise ValueError(
            f"`budget` must be at least {budget + lacking / report.encoder.dense:.3f} with this `residual_config`, "
            f"whose shared and dense matrices take that much, got {budget}; share among more layers, or set group "
            "sizes to None"
        )
    chosen = residual_config
    if len(plans) > 1:
        group_size = {role_of(path): size for path, size in plan}
        bits = None if set(group_size.values()) == {None} else chosen.shared_bits
        chosen = replace(chosen, group_size=group_size, shared_bits=bits)
    return replace(chosen, rank_pattern=rank_pattern_of(ranks))


def rank_pattern_of(ranks: dict[tuple[int, str], int]) -> dict[str, int]:
    """A `rank_pattern` that gives each matrix, by layer and module path, its rank."""
    return {re.escape(f"layers.{layer}.{path}"): rank for (layer, path), rank in ranks.items()}


def _allocate(curves: list[Curve], left: float) -> tuple[float, float, dict[tuple[int, str], int]]:
    """Spends `left` parameters, largest gain first: the parameters that are lacking for the least ranks, the cost of
    the error that remains, and the rank of each matrix, by layer and module path.
    """
    for curve in curves:
        curve.rank = 0 if curve.group.size else 1  # without `U`, a matrix needs one
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
    costs = (SHARED_COST if len(curve.group.layers) > 1 else 1.0 for curve in curves)
    return lacking, sum(cost * curve.errors[curve.rank] for cost, curve in zip(costs, curves)), ranks


def _curve(layers: Any, group: Group, statistics: Statistics, quantized: bool) -> Curve:
    """Of one group. What the first fit leaves is exact for a layer alone and, with equal ranks, for a pair without
    diagonals; for larger groups, it is the error with the best `U` of rank 0, which more rounds would improve. Where
    layers share a quantised `U`, nothing makes up for its rounding.
    """
    weights = [layers[layer].get_submodule(group.module_path).weight.double() for layer in group.layers]
    covariances, importance = metric_of(group, statistics)
    root = torch.linalg.cholesky(importance).T
    out_features, in_features = weights[0].shape
    cost = len(weights) * (out_features + in_features)
    if group.size is None:
        errors = _tails(root @ weights[0], covariances[0])
        errors = errors[: out_features * in_features // (out_features + in_features) + 1]
    elif len(weights) == 1 and not quantized:
        errors = torch.zeros(1)
    elif len(weights) == 1:
        errors = _tails(root @ (weights[0] - rounded(weights[0], covariances[0])), covariances[0])
    else:
        total = torch.stack([w @ c for w, c in zip(weights, covariances)]).sum(0)
        summed = torch.stack(covariances).sum(0)
        mean = torch.linalg.solve(summed, total.T).T
        if len(weights) == 2:
            errors = _tails(root @ (weights[0] - weights[1]), parallel_sum(*covariances))[::2]
        else:
            errors = torch.stack([_tails(root @ (w - mean), c) for w, c in zip(weights, covariances)]).sum(0)
        if quantized:
            missing = root @ (mean - rounded(mean, summed))
            errors = errors + ((missing @ summed) * missing).sum()
    fixed = 0 if group.size is None else out_features * in_features * (QUANTIZED_SIZE if quantized else 1)
    return Curve(group, errors.tolist(), cost, fixed)


def _tails(matrix: Tensor, covariance: Tensor) -> Tensor:
    """Squared output error that the best approximation of each rank, from 0, leaves: (min(out, in) + 1,)."""
    if matrix.shape[0] <= matrix.shape[1]:
        gram = matrix @ covariance @ matrix.T
    else:
        root = torch.linalg.cholesky(covariance)
        gram = root.T @ (matrix.T @ matrix) @ root
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)])
