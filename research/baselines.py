"""Methods that make a Whisper encoder smaller, ours and published ones, given a dense model and a calibration.

`METHODS` lists them with their sources and simplifications. In all methods, the two factors of a product have equal
norms (`Components.balance`), so that one learning rate suits all, and each layer has its own biases and norms unless
the description says otherwise. `sharing_methods.py` holds the methods that are settings of `ResidualConfig`. Looped
models, and the low-rank models that are made here, are for measurements only: they cannot be loaded again once they
are saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from baseline_parts import (
    Calibration,
    Key,
    check_size,
    encoder_parameters,
    fixed_parameters,
    linears_of,
    require_size,
    share_ranks,
)
from sharing_methods import ours, ours_in_four_bits, pairs, paper, rounded, sharing, svd, tied
from torch import Tensor, nn

from hf_residual_transformer.compression.fitting import Components, truncate
from hf_residual_transformer.compression.statistics import DAMPING, damp
from hf_residual_transformer.families import WHISPER, groups_of
from hf_residual_transformer.layers import LowRankLinear

WRITERS = ("self_attn.out_proj", "fc2")  # into the residual stream; the others read from it
LEAST_DAMPING = 1e-8  # of the mean variance: enough for a Cholesky root, too little to change a result


def _put_low_rank(model: Any, key: Key, fit: Components, bias: Tensor | None) -> LowRankLinear:
    """Replaces a dense module by `B A` and a bias."""
    layer = model.get_encoder().layers[key[0]]
    weight = layer.get_submodule(key[1]).weight
    linear = LowRankLinear(weight, key[0], len(fit.residual_A), diagonal=False, bias=bias is not None)
    fit.write(linear)
    if linear.bias is not None and bias is not None:
        linear.bias.copy_(bias)
    layer.set_submodule(key[1], linear)
    return linear


@torch.no_grad()
def pca(dense: Any, calibration: Calibration, budget: float, *, damping: float = LEAST_DAMPING) -> Any:
    """Projects the outputs of each matrix onto their first principal components.

    `W x + b` becomes `V Vᵀ (W x + b - m) + m`, where `V` are the components and `m` is the mean of the outputs. In all
    matrices, the components explain the same fraction of the variance. A matrix that would not become smaller stays
    dense.
    """
    linears, parts = linears_of(dense), {}
    for key, linear in linears.items():
        root = torch.linalg.cholesky(damp(calibration.moments[key].covariance(), damping))
        vectors, values, _ = torch.linalg.svd(linear.weight.double() @ root, full_matrices=False)
        parts[key] = vectors, values.square().cumsum(0) / values.square().sum()

    def ranks(part: float) -> dict[Key, int]:
        found = {key: int(torch.searchsorted(explained, part)) for key, (_, explained) in parts.items()}
        return {key: min(rank + 1, len(parts[key][1])) for key, rank in found.items()}

    def size(part: float) -> int:
        matrices = [(linears[key].weight, rank) for key, rank in ranks(part).items()]
        return fixed_parameters(dense) + sum(min(rank * sum(w.shape), w.numel()) for w, rank in matrices)

    require_size(size(0.0), dense, budget)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= budget * encoder_parameters(dense) else (low, middle)
    model = copy.deepcopy(dense)
    for key, rank in ranks(low).items():
        weight, bias = linears[key].weight.double(), linears[key].bias
        if rank * sum(weight.shape) < weight.numel():
            basis = parts[key][0][:, :rank]
            fit = Components(None, basis, basis.T @ weight, None)
            missing = (weight - fit.weight()) @ calibration.moments[key].mean
            fit.balance()
            _put_low_rank(model, key, fit, None if bias is None else bias + missing)
    return model


@torch.no_grad()
def basis_sharing(dense: Any, calibration: Calibration, budget: float, *, group_size: int) -> Any:
    """Shares one `A` (the basis) in a group of layers; each layer has its own `B` (the coefficients).

    They are the truncated SVD of `[W_1; W_2; ...] S`, where `S Sᵀ` is the sum of the second moments of the inputs of
    the layers. The ratio is the same in all matrices.
    """
    linears, num_layers = linears_of(dense), len(dense.get_encoder().layers)
    groups = [
        (path, tuple(group))
        for path in WHISPER.modules
        for group in groups_of(num_layers, 1 if path in WRITERS else group_size)
    ]
    shapes = {(path, group): linears[group[0], path].weight.shape for path, group in groups}
    costs = {key: shape[1] + len(key[1]) * shape[0] for key, shape in shapes.items()}
    weights = {key: len(key[1]) * shape.numel() / costs[key] for key, shape in shapes.items()}
    require_size(fixed_parameters(dense) + sum(costs.values()), dense, budget)
    left = budget * encoder_parameters(dense) - fixed_parameters(dense)
    limits = {key: min(shape) for key, shape in shapes.items()}
    ranks = share_ranks(left, costs, weights, limits, least=1)
    model = copy.deepcopy(dense)
    for path, group in groups:
        moments = [calibration.moments[layer, path] for layer in group]
        root = torch.linalg.cholesky(damp(torch.stack([m.products for m in moments]).sum(0), LEAST_DAMPING))
        weight = torch.cat([linears[layer, path].weight.double() for layer in group])
        residual_B, residual_A = truncate(weight @ root, ranks[path, group])
        residual_A = torch.linalg.solve_triangular(root, residual_A, upper=False, left=False)
        fit = Components(None, residual_B, residual_A, None)
        fit.balance()
        tied = [
            _put_low_rank(
                model, (layer, path), Components(None, own, fit.residual_A, None), linears[layer, path].bias
            )
            for layer, own in zip(group, fit.residual_B.chunk(len(group)))
        ]
        for linear in tied:
            linear.residual_A = tied[0].residual_A
    return model


def drop_layers(dense: Any, calibration: Calibration, budget: float) -> Any:
    """Keeps the layers with the largest block influence."""
    num_layers = len(dense.get_encoder().layers)
    number = max(1, round(budget * num_layers))
    check_size(number / num_layers * encoder_parameters(dense), dense, budget)
    order = sorted(range(num_layers), key=lambda layer: calibration.influence[layer], reverse=True)
    model = copy.deepcopy(dense)
    encoder = model.get_encoder()
    encoder.layers = nn.ModuleList(encoder.layers[layer] for layer in sorted(order[:number]))
    model.config.encoder_layers = number
    return model


@torch.no_grad()
def prune_neurons(dense: Any, calibration: Calibration, budget: float) -> Any:
    """Removes the feed-forward neurons that matter least.

    The score of a neuron is its variance times the squared norm of its outgoing weights, standardised in each layer.
    The mean contribution of removed neurons is added to the bias.
    """
    model = copy.deepcopy(dense)
    layers = model.get_encoder().layers
    cost = 2 * layers[0].fc1.in_features + 1
    total = len(layers) * layers[0].fc1.out_features
    fewest = encoder_parameters(dense) - (total - 1) * cost
    require_size(fewest, dense, budget)
    number = min(total, 1 + int((budget * encoder_parameters(dense) - fewest) / cost))
    moments = [calibration.moments[index, "fc2"] for index in range(len(layers))]
    scores = torch.stack(
        [m.covariance().diagonal() * layer.fc2.weight.square().sum(0) for m, layer in zip(moments, layers)]
    )
    scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    kept = torch.zeros(total, dtype=torch.bool, device=scores.device)
    kept[scores.flatten().topk(number).indices] = True
    for layer, entry, keep in zip(layers, moments, kept.view_as(scores)):
        layer.fc2.bias += layer.fc2.weight[:, ~keep] @ entry.mean[~keep].to(layer.fc2.weight)
        layer.fc1.weight, layer.fc1.bias = (
            nn.Parameter(layer.fc1.weight[keep]),
            nn.Parameter(layer.fc1.bias[keep]),
        )
        layer.fc2.weight = nn.Parameter(layer.fc2.weight[:, keep])
        layer.fc1.out_features = layer.fc2.in_features = int(keep.sum())
    return model


@dataclass(frozen=True)
class Method:
    """A method that makes an encoder smaller.

    Args:
        build: makes a model from the dense model, the calibration and a budget (the number of parameters of the
            encoder's layers relative to dense, biases and norms included). The model is not larger than the budget; if
            a method has few sizes, it is the nearest one. It can be trained under the method's own constraint. Raises
            Unreachable.
        about: describes the method, its source and our simplifications.
        statistics: whether the method needs the statistics of the calibration, whose time then counts as its own.
    """

    build: Callable[[Any, Calibration, float], Any]
    about: str
    statistics: bool = False


_PAPER = "shared as the paper does (arXiv 2310.02489), {} adjacent layers, equal ranks; our calibrated start"
_TIED = (
    "{} and the truncated SVD of what each layer lacks, equal ranks, as in Relaxed Recursive Transformers (arXiv "
    "2410.20672); the group size with the smallest error of the weights; biases and norms of each layer's own"
)
_SHARING = (
    "no rank, as ALBERT (arXiv 1909.11942), in groups, of a number of its own for each kind of matrix; biases and "
    "norms of each layer's own; {}"
)
_BASIS = (
    "Basis Sharing (arXiv 2410.03765), groups of {} for what reads from the residual stream, out_proj and fc2 alone; "
    "one ratio for all; coefficients not fitted again afterwards"
)
METHODS = {
    "ours": Method(
        ours, "`from_dense(budget=...)`: ranks and groups chosen by their effect on the final states"
    ),
    "ours-4bit": Method(
        ours_in_four_bits,
        "the same with `shared_bits=4`: a `U` of at most four bits, one for each layer or two, and a rank in 16 bits",
    ),
    "ours-pairs": Method(pairs, "the same, but every matrix shared by two layers"),
    "paper-k2": Method(partial(paper, group_size=2), _PAPER.format("two")),
    "paper-k3": Method(partial(paper, group_size=3), _PAPER.format("three")),
    "svd": Method(svd, "truncated SVD of each matrix, one ratio for all"),
    "pca": Method(
        pca,
        "PCA of each matrix's outputs as in LiteASR (arXiv 2502.20583); one explained variance for all matrices "
        "instead of two, and ranks that are no multiples of 16; its attention kernel changes no result",
        statistics=True,
    ),
    "pca-damped": Method(
        partial(pca, damping=DAMPING),
        "as pca, with the inputs' covariances damped as ours are, which LiteASR does not do",
        statistics=True,
    ),
    "tied-average": Method(partial(tied, start="average"), _TIED.format("the mean of adjacent layers")),
    "tied-first": Method(partial(tied, start="first"), _TIED.format("the first of adjacent layers")),
    "looped-average": Method(
        partial(tied, start="average", looped=True), _TIED.format("the mean of every n-th layer")
    ),
    "looped-stepwise": Method(
        partial(tied, start="stepwise", looped=True),
        "as looped-average, but for the mean, layers at even steps from the first to the last",
    ),
    "looped-lower": Method(
        partial(tied, start="first", looped=True), "as looped-average, but for the mean, the first n layers"
    ),
    "sharing-mean": Method(partial(sharing, calibrated=False), _SHARING.format("the mean")),
    "sharing-calibrated": Method(partial(sharing, calibrated=True), _SHARING.format("our calibrated start")),
    "basis-2": Method(partial(basis_sharing, group_size=2), _BASIS.format("two"), statistics=True),
    "basis-3": Method(partial(basis_sharing, group_size=3), _BASIS.format("three"), statistics=True),
    **{
        f"rounded-{bits}bit": Method(
            partial(rounded, bits=bits, fitted=False),
            f"each matrix in {bits} bits, a scale for 32 weights, rounded to the nearest; of the size that this has",
        )
        for bits in (4, 3, 2)
    },
    **{
        f"gptq-{bits}bit": Method(
            partial(rounded, bits=bits, fitted=True),
            f"each matrix in {bits} bits, rounded as in GPTQ (arXiv 2210.17323), on inputs of the dense model; biases "
            "as they were",
            statistics=True,
        )
        for bits in (4, 3, 2)
    },
    "drop-layers": Method(
        drop_layers,
        "layers of the least block influence left out, as in ShortGPT (arXiv 2403.03853); after that only the "
        "encoder's final states are distilled",
        statistics=True,
    ),
    "prune-neurons": Method(
        prune_neurons,
        "a narrower feed-forward by fluctuation and a compensating bias, as in FLAP (arXiv 2312.11983); attention "
        "is left alone, so small budgets are out of reach",
        statistics=True,
    ),
}
