"""The common parts of the methods in `baselines.py`: input statistics, counts of parameters, and ranks for a budget."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import hf_residual_transformer as hrt
from hf_residual_transformer.compression.allocation import Search, rank_pattern_of, unranked_parameters
from hf_residual_transformer.compression.statistics import WeightedMoments
from hf_residual_transformer.families import WHISPER, LayerStack
from hf_residual_transformer.layers import quantized_weights
from hf_residual_transformer.reporting import quantized_size

K = TypeVar("K", bound=Hashable)
Key = tuple[int, str]  # a layer and the path of a linear module in it
TOLERANCE = 0.005  # of the dense size, within which a budget counts as met


class Unreachable(ValueError):
    """A method has no model of the requested size; the message says why."""


class Calibration:
    """Batches of model inputs, and the statistics of one pass of the dense model over them.

    The statistics are computed at their first use: `moments` of the inputs of every matrix, and the block `influence`
    of every layer. `seconds` is the time that this took.
    """

    def __init__(self, dense: Any, batches: list[dict[str, Tensor]]) -> None:
        self.dense, self.batches, self.seconds = dense, batches, 0.0

    @property
    def moments(self) -> dict[Key, WeightedMoments]:
        """The moments of the inputs of each matrix, by layer and module."""
        return self.statistics[0]

    @property
    def influence(self) -> list[float]:
        """The block influence of each layer as in ShortGPT: 1 - mean cosine similarity of input and output."""
        return self.statistics[1]

    @cached_property
    @torch.no_grad()
    def statistics(self) -> tuple[dict[Key, WeightedMoments], list[float]]:
        """The moments and the influences."""
        start = time.perf_counter()
        encoder = self.dense.get_encoder()
        moments = {
            key: WeightedMoments(linear.in_features, linear.weight.device)
            for key, linear in linears_of(self.dense).items()
        }
        cosines: list[list[Tensor]] = [[] for _ in encoder.layers]

        def compare(index: int, _module: nn.Module, args: Any, output: Tensor) -> None:
            cosines[index].append(functional.cosine_similarity(args[0], output, dim=-1).flatten())

        def watch(entry: WeightedMoments, _module: nn.Module, args: Any) -> None:
            frames = args[0].flatten(0, -2).double()  # the covariance of outputs is factored without damping
            entry.add(frames, frames.new_ones(len(frames)))

        handles = [
            layer.register_forward_hook(partial(compare, index)) for index, layer in enumerate(encoder.layers)
        ]
        handles += [
            linear.register_forward_pre_hook(partial(watch, moments[key]))
            for key, linear in linears_of(self.dense).items()
        ]
        try:
            for batch in self.batches:
                encoder(batch["input_features"].to(self.dense.device, self.dense.dtype))
        finally:
            for handle in handles:
                handle.remove()
        self.seconds = time.perf_counter() - start
        return moments, [1 - torch.cat(values).mean().item() for values in cosines]


def encoder_parameters(model: Any) -> int:
    """The number of parameters of the encoder's layers and of what they share, biases and norms included.

    Each tensor counts once. A quantised weight counts for its bits divided by 16.
    """
    encoder = model.get_encoder()
    parts = nn.ModuleList([encoder.layers, *([encoder.shared] if hasattr(encoder, "shared") else [])])
    plain = sum(parameter.numel() for parameter in parts.parameters())
    return plain + round(quantized_size(quantized_weights(parts, scales=True)))


def check_size(parameters: float, dense: Any, budget: float) -> None:
    """Raises Unreachable if `parameters`, relative to the dense number, differ from `budget` by more than TOLERANCE."""
    ratio = parameters / encoder_parameters(dense)
    if abs(ratio - budget) > TOLERANCE:
        raise Unreachable(f"the nearest size that it has is {ratio:.1%} of the encoder's layers")


def require_size(parameters: float, dense: Any, budget: float) -> None:
    """Raises Unreachable if `parameters`, the fewest that a method can have, exceed the budget."""
    ratio = parameters / encoder_parameters(dense)
    if ratio > budget:
        raise Unreachable(f"it needs at least {ratio:.1%} of the encoder's layers")


def linears_of(model: Any) -> dict[Key, nn.Linear]:
    """The linear modules of the encoder's layers, which the methods make smaller."""
    layers = model.get_encoder().layers
    return {(i, path): layers[i].get_submodule(path) for i in range(len(layers)) for path in WHISPER.modules}


def fixed_parameters(dense: Any) -> int:
    """The number of parameters in the layers outside of their matrices: biases and norms."""
    return encoder_parameters(dense) - sum(linear.weight.numel() for linear in linears_of(dense).values())


def share_ranks(
    left: float, costs: dict[K, int], weights: dict[K, float], limits: dict[K, int], least: int = 0
) -> dict[K, int]:
    """Divides parameters among matrices as ranks that are, to within one, in proportion to `weights`.

    Args:
        left: the number of parameters that the ranks may cost.
        costs: the number of parameters that one rank costs, by matrix.
        weights: the proportion of ranks, by matrix.
        limits: the highest rank, by matrix.
        least: the lowest rank.
    """

    def ranks(scale: float) -> dict[K, int]:
        return {key: min(limits[key], max(least, int(scale * weights[key]))) for key in costs}

    def total(chosen: dict[K, int]) -> int:
        return sum(costs[key] * rank for key, rank in chosen.items())

    low, high = 0.0, (max(limits.values()) + 1) / min(weights.values())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(ranks(middle)) <= left else (low, middle)
    chosen = ranks(low)
    left -= total(chosen)
    for key, cost in costs.items():
        if chosen[key] < limits[key] and cost <= left:
            chosen[key] += 1
            left -= cost
    return chosen


def parameters_without_ranks(dense: Any, config: hrt.ResidualConfig) -> int:
    """The number of parameters of the encoder's layers with `config`, without ranks. Every `U` is in floating point."""
    source = LayerStack(WHISPER.encoder, dense)
    search = Search(source, config)
    shared = [
        source.linear(group.layers[0], group.module_path).weight.numel()
        for group in search.groups()
        if group.size is not None
    ]
    return unranked_parameters(search) + sum(shared)


def with_ranks(
    dense: Any, config: hrt.ResidualConfig, budget: float, *, same_ratio: bool = False
) -> hrt.ResidualConfig:
    """Adds ranks to `config` that spend the rest of the budget.

    Args:
        dense: the dense model.
        config: the settings, whose rank is replaced.
        budget: the encoder's parameters relative to dense.
        same_ratio: whether ranks are the same fraction of each matrix's size, rather than equal.

    Raises:
        Unreachable: the budget is too small for any rank.
    """
    shapes = {key: linear.weight.shape for key, linear in linears_of(dense).items()}
    costs = {key: sum(shape) for key, shape in shapes.items()}
    weights = {key: shape.numel() / sum(shape) if same_ratio else 1.0 for key, shape in shapes.items()}
    least = int(config.group_size is None)
    unranked = parameters_without_ranks(dense, config)
    require_size(unranked + least * sum(costs.values()), dense, budget)
    left = budget * encoder_parameters(dense) - unranked
    limits = {key: min(shape) for key, shape in shapes.items()}
    ranks = share_ranks(left, costs, weights, limits, least)
    return replace(config, rank_pattern=rank_pattern_of(ranks))
