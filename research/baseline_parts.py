"""What the methods in `baselines.py` have in common: statistics of the dense model's inputs, counts of parameters, and
ranks for what a budget leaves.
"""

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
from hf_residual_transformer.compression.allocation import rank_pattern_of
from hf_residual_transformer.compression.statistics import WeightedMoments
from hf_residual_transformer.families import WHISPER
from hf_residual_transformer.layers import quantized_weights
from hf_residual_transformer.reporting import quantized_size

K = TypeVar("K", bound=Hashable)
Key = tuple[int, str]  # a layer and the path of a linear module in it
TOLERANCE = 0.005  # of the dense size, within which a budget counts as met


class Unreachable(ValueError):
    """A method has no model of the size wanted; the message says why."""


class Calibration:
    """Batches of model inputs, and what one pass of the dense model over them shows, which is computed when first
    asked for and takes `seconds`: `moments` of every matrix's inputs, and the block `influence` of every layer.
    """

    def __init__(self, dense: Any, batches: list[dict[str, Tensor]]) -> None:
        self.dense, self.batches, self.seconds = dense, batches, 0.0

    @property
    def moments(self) -> dict[Key, WeightedMoments]:
        """By layer and module."""
        return self.statistics[0]

    @property
    def influence(self) -> list[float]:
        """1 - mean cosine similarity of a layer's input and output over the frames, as in ShortGPT."""
        return self.statistics[1]

    @cached_property
    @torch.no_grad()
    def statistics(self) -> tuple[dict[Key, WeightedMoments], list[float]]:
        """Both."""
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
            frames = args[0].flatten(0, -2)
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
    """Of the encoder's layers and of what they share, biases and norms included, each tensor counted once; a weight of
    a quantised `U` for what its bytes are of those of 16 bits.
    """
    encoder = model.get_encoder()
    parts = nn.ModuleList([encoder.layers, *([encoder.shared] if hasattr(encoder, "shared") else [])])
    plain = sum(parameter.numel() for parameter in parts.parameters())
    return plain + round(quantized_size(quantized_weights(parts)))


def check_size(parameters: float, dense: Any, budget: float) -> None:
    """Raises Unreachable where `parameters` are not what `budget` is of the dense model's, within TOLERANCE."""
    ratio = parameters / encoder_parameters(dense)
    if abs(ratio - budget) > TOLERANCE:
        raise Unreachable(f"the nearest size that it has is {ratio:.1%} of the encoder's layers")


def require_size(parameters: float, dense: Any, budget: float) -> None:
    """Raises Unreachable where the fewest possible `parameters` are above the budget."""
    ratio = parameters / encoder_parameters(dense)
    if ratio > budget:
        raise Unreachable(f"it needs at least {ratio:.1%} of the encoder's layers")


def linears_of(model: Any) -> dict[Key, nn.Linear]:
    """The matrices that the methods make smaller."""
    layers = model.get_encoder().layers
    return {(i, path): layers[i].get_submodule(path) for i in range(len(layers)) for path in WHISPER.modules}


def fixed_parameters(dense: Any) -> int:
    """Parameters of the layers outside of their matrices: biases and norms."""
    return encoder_parameters(dense) - sum(linear.weight.numel() for linear in linears_of(dense).values())


def share_ranks(
    left: float, costs: dict[K, int], weights: dict[K, float], limits: dict[K, int], least: int = 0
) -> dict[K, int]:
    """Ranks in proportion to `weights`, to within one, from `least` up to `limits`, that cost at most `left`."""

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


def with_ranks(
    dense: Any, config: hrt.ResidualConfig, budget: float, *, same_ratio: bool = False
) -> hrt.ResidualConfig:
    """`config` with what the budget leaves spent on equal ranks, or on equal parts of each matrix's size."""
    shapes = {key: linear.weight.shape for key, linear in linears_of(dense).items()}
    costs = {key: sum(shape) for key, shape in shapes.items()}
    weights = {key: shape.numel() / sum(shape) if same_ratio else 1.0 for key, shape in shapes.items()}
    least = int(config.group_size is None)
    with torch.device("meta"):
        meta: Any = hrt.ResidualWhisperForConditionalGeneration(
            hrt.ResidualWhisperConfig.from_dense_config(dense.config, replace(config, rank=least))
        )
    fewest = encoder_parameters(meta)
    require_size(fewest, dense, budget)
    left = budget * encoder_parameters(dense) - fewest + least * sum(costs.values())
    limits = {key: min(shape) for key, shape in shapes.items()}
    ranks = share_ranks(left, costs, weights, limits, least)
    return replace(config, rank_pattern=rank_pattern_of(ranks))
