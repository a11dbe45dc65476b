"""Methods that make a Whisper encoder smaller and are settings of `ResidualConfig`: ours, and published ones.

All are functions as `baselines.Method` describes them; `baselines.METHODS` has their names and sources.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from baseline_parts import (
    Calibration,
    Unreachable,
    check_size,
    encoder_parameters,
    fixed_parameters,
    linears_of,
    with_ranks,
)

import hf_residual_transformer as hrt
from hf_residual_transformer.compression.conversion import ENCODER, Plan, residual_like
from hf_residual_transformer.compression.fitting import Components, quantize_for, truncate
from hf_residual_transformer.families import WHISPER, groups_of
from hf_residual_transformer.quantization import BITS


def _from_dense(dense: Any, config: hrt.ResidualConfig | None, **options: Any) -> Any:
    return hrt.ResidualWhisperForConditionalGeneration.from_dense(dense, config, progress=False, **options)


def ours(dense: Any, calibration: Calibration, budget: float) -> Any:
    """Lets `from_dense` choose ranks and groups."""
    return _from_dense(dense, None, calibration=calibration.batches, budget=budget, shared_bits=None)


def ours_in_four_bits(dense: Any, calibration: Calibration, budget: float) -> Any:
    """Lets `from_dense` choose, with at most four bits for `U` and 16 for everything else in the encoder's layers."""
    options: dict[str, Any] = {"shared_bits": BITS, "parts": (ENCODER,)}
    model = _from_dense(dense, None, calibration=calibration.batches, budget=budget, **options)
    return _in_16_bits(model)


@torch.no_grad()
def rounded(dense: Any, calibration: Calibration, budget: float, *, bits: int, fitted: bool) -> Any:
    """Gives each layer only a `U` of few bits: each matrix is rounded to the nearest values, or as in GPTQ."""
    config = hrt.ResidualConfig(group_size=1, rank=0, diagonal="none", shared_bits=bits)
    model = _from_dense(dense, config, start="svd")
    check_size(encoder_parameters(model), dense, budget)
    if fitted:
        for (layer, path), linear in linears_of(dense).items():
            products = calibration.moments[layer, path].products
            shared = model.get_encoder().layers[layer].get_submodule(path).shared
            shared.write(quantize_for(linear.weight.detach(), products, bits, sweeps=0))
    return _in_16_bits(model)


def _in_16_bits(model: Any) -> Any:
    """Rounds the values of the encoder's layers to those of float16, and changes nothing else."""
    encoder = model.get_encoder()
    for part in (encoder.layers, encoder.shared):
        part.half().float()
    return model


def pairs(dense: Any, calibration: Calibration, budget: float) -> Any:
    """Shares every matrix between two layers; `from_dense` chooses the ranks."""
    config = hrt.ResidualConfig(group_size=2, diagonal="none")
    with_ranks(dense, config, budget)  # says at once where the budget is too small
    return _from_dense(dense, config, calibration=calibration.batches, budget=budget)


def paper(dense: Any, calibration: Calibration, budget: float, *, group_size: int) -> Any:
    """Shares as ResidualTransformer does, with equal ranks, from a calibrated start."""
    config = with_ranks(dense, hrt.ResidualConfig.paper(group_size, 0), budget)
    return _from_dense(dense, config, calibration=calibration.batches)


def svd(dense: Any, calibration: Calibration, budget: float) -> Any:
    """Replaces each matrix by the nearest one of low rank, with one ratio for all matrices."""
    config = hrt.ResidualConfig(group_size=None, diagonal="none")
    return _from_dense(dense, with_ranks(dense, config, budget, same_ratio=True), start="svd")


def _group_sizes(num_layers: int) -> dict[int, int]:
    """The smallest group size for each possible number of groups."""
    return {math.ceil(num_layers / size): size for size in range(num_layers, 0, -1)}


@torch.no_grad()
def tied(dense: Any, calibration: Calibration, budget: float, *, start: str, looped: bool = False) -> Any:
    """Takes the `U` of a group from the weights of its layers, and adds the truncated SVD of what each layer lacks.

    All ranks are equal. Of the group sizes that the budget allows, it uses the one with the smallest squared error of
    the weights.
    """
    num_layers = len(dense.get_encoder().layers)
    models: list[tuple[float, Any]] = []
    for num_groups, size in _group_sizes(num_layers).items():  # from a single group on
        if size == 1:
            break
        groups: list[Sequence[int]] = list(groups_of(num_layers, size))
        if looped:
            groups = [range(first, num_layers, num_groups) for first in range(num_groups)]
        try:
            config = with_ranks(dense, hrt.ResidualConfig(size, diagonal="none"), budget)
        except Unreachable:
            if not models:
                raise
            break
        models.append(_tie(dense, config, groups, start))
    return min(models, key=lambda found: found[0])[1]


def _tie(
    dense: Any, config: hrt.ResidualConfig, groups: list[Sequence[int]], start: str
) -> tuple[float, Any]:
    """Returns the squared error of the weights, and the model."""
    linears, model, left = (
        linears_of(dense),
        residual_like(hrt.ResidualWhisperForConditionalGeneration, dense, Plan({ENCODER: config})),
        0.0,
    )
    last = len(dense.get_encoder().layers) - 1
    for path in WHISPER.modules:
        for index, group in enumerate(groups):
            source = group[0] if start == "first" else round(index * last / max(1, len(groups) - 1))
            weights = [linears[layer, path].weight.double() for layer in group]
            mean = torch.stack(weights).mean(0)
            shared = mean if start == "average" else linears[source, path].weight.double()
            for layer, weight in zip(group, weights):
                linear: Any = model.get_encoder().layers[layer].get_submodule(path)
                linear.group_idx = index
                fit = Components(shared, *truncate(weight - shared, linear.rank), None)
                fit.balance()
                fit.write(linear)
                left += (weight - fit.weight()).square().sum().item()
    return left, model


def sharing(dense: Any, calibration: Calibration, budget: float, *, calibrated: bool) -> Any:
    """Shares matrices without ranks. Each kind of matrix has a group size of its own.

    The group sizes are those that together come nearest to the budget; of equally near ones, the most alike are used.
    """
    matrices = {
        WHISPER.encoder.role_of(path): linear.weight.numel()
        for (i, path), linear in linears_of(dense).items()
        if i == 0
    }
    sizes, fixed = _group_sizes(len(dense.get_encoder().layers)), fixed_parameters(dense)

    def parameters(numbers: Sequence[int]) -> int:
        return fixed + sum(n * size for n, size in zip(numbers, matrices.values()))

    wanted = budget * encoder_parameters(dense)
    numbers = min(
        itertools.product(sizes, repeat=len(matrices)),
        key=lambda numbers: (abs(parameters(numbers) - wanted), max(numbers) - min(numbers)),
    )
    check_size(parameters(numbers), dense, budget)
    groups: dict[str, int | None] = {role: sizes[number] for role, number in zip(matrices, numbers)}
    config = hrt.ResidualConfig(group_size=groups, rank=0, diagonal="none")
    options: dict[str, Any] = {"calibration": calibration.batches} if calibrated else {"start": "svd"}
    return _from_dense(dense, config, **options)
