"""Dense to residual: computes `U`, `B A`, `D` and biases of every group from trained dense weights.

Two starts. "svd": the mean of a group's weights and the truncated SVD of what each layer lacks, as in Relaxed
Recursive Transformers (https://arxiv.org/abs/2410.20672, section 2.2). "calibrated": the components that, over
real inputs, change the encoder's final states least, matrix by matrix: `sum_l tr(G E_l C_l E_lᵀ)` for the errors
`E_l = W_l - Ŵ_l`, all components of a group together; the bias absorbs the mean. `C_l` and `G` are those of
`calibration.MatrixStatistics`. Layers of trained speech encoders are uncorrelated weight by weight, and only the
second leaves something that a short distillation can repair.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from .budget import GROUP_SIZES, spend
from .calibration import (
    Group,
    GroupSizes,
    Statistics,
    Sweep,
    as_batches,
    groups_with,
    metric_of,
    parallel_sum,
)
from .configuration import ResidualConfig
from .families import Family, role_of
from .layers import ResidualLinear
from .modeling import ResidualMixin
from .reporting import ConversionReport, ModuleError

STARTS = ("calibrated", "svd")
ITERATIONS = 30


@dataclass
class Components:
    """What one layer gets: `U` is the group's, (out, in) or None; `low_rank` is `B A` as its factors
    (out, rank) and (rank, in); the diagonal has min(out, in) entries or is None.
    """

    shared: Tensor | None
    lora_B: Tensor
    lora_A: Tensor
    diagonal: Tensor | None

    def weight(self) -> Tensor:
        """`U + B A + D`, (out, in)."""
        weight = self.lora_B @ self.lora_A
        if self.shared is not None:
            weight = weight + self.shared
        if self.diagonal is not None:
            weight.diagonal().add_(self.diagonal)
        return weight

    def write(self, linear: ResidualLinear) -> None:
        """Puts what `linear` has a parameter for into it; `U`, where there is one, into its group's."""
        for owner, name, value in (
            (linear.shared, "weight", self.shared),
            (linear, "lora_A", self.lora_A),
            (linear, "lora_B", self.lora_B),
            (linear, "diagonal", self.diagonal),
        ):
            parameter = getattr(owner, name, None)
            if parameter is not None and value is not None:
                parameter.copy_(value)

    def balance(self) -> None:
        """Gives both factors of each component the same norm, so that one learning rate suits both."""
        tiny = torch.finfo(self.lora_A.dtype).tiny
        scale = (self.lora_A.norm(dim=1).clamp_min(tiny) / self.lora_B.norm(dim=0).clamp_min(tiny)).sqrt()
        scale = torch.where((scale > 1e-6) & (scale < 1e6), scale, torch.ones_like(scale))
        self.lora_B, self.lora_A = self.lora_B * scale, self.lora_A / scale[:, None]


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (out, rank), (rank, in) of the nearest matrix of that rank, by the eigenvectors of the smaller
    Gram matrix, which is many times faster than an SVD.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, left = truncate(matrix.T, rank)
        return left.T, right.T
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    return matrix @ vectors, vectors.T


def fit_group(
    weights: list[Tensor],
    covariances: list[Tensor] | None,
    ranks: list[int],
    *,
    importance: Tensor | None = None,
    diagonal: bool = False,
    shared: bool = True,
    iterations: int = ITERATIONS,
) -> list[Components]:
    """Minimises `sum_l tr(G E_l C_l E_lᵀ)`, `E_l = W_l - U - B_l A_l - D_l`, by alternating closed forms.

    With `C_l = S_l S_lᵀ` and `G = Rᵀ R`: the best `B_l A_l` is the truncated SVD of `R (W_l - U - D_l) S_l`, with
    `R⁻¹` from the left and `S_l⁻¹` from the right; the best `U` solves `U ΣC_l = Σ(W_l - B_l A_l - D_l) C_l`; the
    diagonal `d` of the best `D_l` solves `(G ∘ C_l) d = diag(G E C_l)`, `E` being what the others leave. Two layers
    start from the minimum that `_fit_pair` knows.

    Args:
        weights: `W_l`, each (out, in), float64 for full precision.
        covariances: `C_l`, each (in, in) and positive definite; None for identities, for which the first
            round is the mean and the truncated SVD.
        ranks: R of each layer.
        importance: `G`, (out, out), positive definite, the group's; None for the identity.
        diagonal: whether there are `D_l`.
        shared: whether there is a `U`; without one, every layer is fitted on its own.
        iterations: rounds after the first.
    """
    out_features, in_features = weights[0].shape
    size = min(out_features, in_features)
    identity = torch.eye(in_features, dtype=weights[0].dtype, device=weights[0].device)
    C = covariances or [identity] * len(weights)
    roots = [torch.linalg.cholesky(c) for c in C] if covariances else C
    total = torch.linalg.cholesky(torch.stack(C).sum(0))
    G = torch.eye(out_features, dtype=weights[0].dtype, device=weights[0].device)
    G = G if importance is None else importance
    R = torch.linalg.cholesky(G).T
    shape = (out_features - size, in_features - size)

    def embed(values: Tensor | None) -> Tensor | float:
        return 0.0 if values is None else functional.pad(torch.diag(values), (0, shape[1], 0, shape[0]))

    fits = [
        Components(None, w.new_zeros(out_features, r), w.new_zeros(r, in_features), None)
        for w, r in zip(weights, ranks)
    ]
    if shared and covariances and len(weights) == 2:
        for fit, factors in zip(fits, _fit_pair(weights, C, ranks, R)):
            fit.lora_B, fit.lora_A = factors
    if (shared and len(weights) == 1) or (not diagonal and (not shared or len(weights) == 2)):
        iterations = 0  # the first round is the minimum
    for _ in range(iterations + 1):
        if shared:
            rest = [(w - f.lora_B @ f.lora_A - embed(f.diagonal)) @ c for w, f, c in zip(weights, fits, C)]
            U = torch.cholesky_solve(torch.stack(rest).sum(0).T, total).T
        for w, fit, c, root in zip(weights, fits, C, roots):
            fit.shared = U if shared else None
            own = w - U if shared else w
            fit.lora_B, fit.lora_A = _truncate_between(R, own - embed(fit.diagonal), root, len(fit.lora_A))
            if diagonal:
                wanted = (G @ (own - fit.lora_B @ fit.lora_A) @ c).diagonal()[:size]
                fit.diagonal = torch.linalg.solve((G[:size, :size] * c[:size, :size]), wanted)
    for fit in fits:
        fit.balance()
    return fits


def _truncate_between(left: Tensor, matrix: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the `X` of that rank for which `left X right` is nearest to `left matrix right`; `left` is
    upper triangular, `right` lower.
    """
    lora_B, lora_A = truncate(left @ matrix @ right, rank)
    return (
        torch.linalg.solve_triangular(left, lora_B, upper=True),
        torch.linalg.solve_triangular(right, lora_A, upper=False, left=False),
    )


def _fit_pair(
    weights: list[Tensor], covariances: list[Tensor], ranks: list[int], R: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The best `B_l A_l` of a group of two layers without diagonals, in one step.

    With the best `U` put in, what is left depends on `L = B_1 A_1 - B_2 A_2` alone, of rank R_1 + R_2, and is
    `tr(G (W_1 - W_2 - L) P (W_1 - W_2 - L)ᵀ)` with the parallel sum `P = (C_1⁻¹ + C_2⁻¹)⁻¹`.
    """
    root = torch.linalg.cholesky(parallel_sum(*covariances))
    rank = min(sum(ranks), *weights[0].shape)
    lora_B, lora_A = _truncate_between(R, weights[0] - weights[1], root, rank)
    factors = []
    for sign, start, r in ((1, 0, ranks[0]), (-1, ranks[0], ranks[1])):
        B, A = sign * lora_B[:, start : start + r], lora_A[start : start + r]
        missing = r - len(A)
        factors.append((functional.pad(B, (0, missing)), functional.pad(A, (0, 0, 0, missing))))
    return factors


def convert(
    cls: type[ResidualMixin],
    dense: PreTrainedModel | str,
    residual_config: ResidualConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    start: str = "calibrated",
    budget: float | None = None,
    iterations: int = ITERATIONS,
    progress: bool = True,
) -> Any:
    """A residual model of class `cls` from a trained dense one.

    Calibration streams a batch at a time, forward and backward, and holds the statistics of as many layers as
    `calibration.HELD_BYTES` have room for; further layers take further passes.

    Args:
        cls: the residual class; `from_dense` passes its own.
        dense: a model of `cls.dense_class()`, or the id or folder of one.
        residual_config: what to share; by default what `budget` chooses, or else `ResidualConfig()`.
        calibration: batches of the model's inputs, `{"input_features": ...}` or
            `{"input_values": ..., "attention_mask": ...}`, of tens of recordings of the kind that the model
            will hear; masked frames do not count. The "svd" start uses them for its report alone.
        start: "calibrated" or "svd".
        budget: unique / dense parameters that the encoder's layers may have, above 0 and at most 1. The rank of
            each matrix is then chosen by what its error does to the encoder's final states, and replaces that of
            `residual_config`. Without `residual_config`, group sizes are chosen as well, a low rank for each layer
            alone or a `U` for each two, whichever leaves the smaller error. The model's config has the choice.
        iterations: rounds of alternation for groups without a closed form.
        progress: whether to show progress bars.

    Returns:
        The model in eval mode, with the relative output error of every matrix in `conversion_report`.

    Raises:
        ValueError: for a model that is not the dense class's, is quantised or residual already; for a
            calibrated start without calibration inputs, or with empty or non-finite ones.
    """
    if start not in STARTS:
        raise ValueError(f"`start` must be one of {', '.join(STARTS)}, got {start!r}")
    if residual_config is not None and not isinstance(residual_config, ResidualConfig):
        raise ValueError(f"`residual_config` must be a ResidualConfig, got {residual_config!r}")
    batches = as_batches(calibration)
    if start == "calibrated" and not batches:
        raise ValueError(
            '`calibration` must hold batches of model inputs for the start "calibrated", got none; pass inputs of real '
            'recordings (hf_residual_transformer.data.calibration_batches makes them), or start="svd", which needs '
            "none and is much worse"
        )
    if budget is not None and not (start == "calibrated" and 0 < budget <= 1):
        raise ValueError(f"`budget` must be above 0, at most 1, and with a calibrated start, got {budget!r}")
    dense = _load_dense(cls, dense)
    num_layers = len(cls.family.find_encoder(dense).layers)
    was_training = dense.training
    dense.eval()
    kept: Sweep | None = None
    if budget is None:
        residual_config = residual_config or ResidualConfig()
    else:
        sizes = _group_sizes(cls.family, residual_config)
        kept = Sweep(cls.family, dense, groups_with(sizes, num_layers), batches, progress)
        residual_config = _within_budget(cls, dense, residual_config, sizes, kept, budget)
    model = residual_like(cls, dense, residual_config)
    layers = list(zip(cls.family.find_encoder(dense).layers, cls.family.find_encoder(model).layers))
    groups = groups_with(_group_sizes(cls.family, residual_config), num_layers)
    sweep = Sweep(cls.family, dense, groups, batches, progress) if kept is None else kept.over(groups)
    errors: list[ModuleError] = []
    with torch.no_grad():
        for statistics, block in sweep:
            for group in block:
                errors += _convert_group(layers, group, statistics, start, iterations)
    dense.train(was_training)
    model.conversion_report = ConversionReport(start, "outputs" if batches else "weights", errors)
    return model


def residual_like(cls: type[ResidualMixin], dense: Any, residual_config: ResidualConfig) -> Any:
    """A model of class `cls` in eval mode with all that a dense one has, and components still to be written."""
    residual_class: Any = cls
    model = residual_class(cls.config_class.from_dense_config(dense.config, residual_config))
    model = model.to(device=dense.device, dtype=dense.dtype).eval()
    names = model.state_dict().keys()
    model.load_state_dict(
        {name: value for name, value in dense.state_dict().items() if name in names}, strict=False
    )
    if dense.can_generate():
        model.generation_config = copy.deepcopy(dense.generation_config)
    return model


def _group_sizes(family: Family, residual_config: ResidualConfig | None) -> GroupSizes:
    """Those that `residual_config` has, or may have where it is left open."""
    return {
        path: list(GROUP_SIZES) if residual_config is None else [residual_config.group_size_of(role_of(path))]
        for path in family.modules
        if residual_config is None or residual_config.is_target(role_of(path))
    }


def _within_budget(
    cls: type[ResidualMixin],
    dense: Any,
    residual_config: ResidualConfig | None,
    sizes: GroupSizes,
    sweep: Sweep,
    budget: float,
) -> ResidualConfig:
    """`residual_config` with the ranks that `budget` buys; without one, also with the group sizes."""
    unranked = ResidualConfig(group_size=None, rank=1, diagonal="none")
    if residual_config is not None:
        unranked = replace(residual_config, rank=1, rank_pattern={})
    residual_class: Any = cls
    with torch.device("meta"):
        model = residual_class(cls.config_class.from_dense_config(dense.config, unranked))
    with torch.no_grad():
        return spend(cls.family, dense, model, unranked, sizes, sweep, budget)


def _load_dense(cls: type[ResidualMixin], dense: PreTrainedModel | str) -> PreTrainedModel:
    dense_class = cls.dense_class()
    if not isinstance(dense, PreTrainedModel):
        model_type = AutoConfig.from_pretrained(dense).to_dict()["model_type"]
        if model_type != cls.family.name:
            raise ValueError(
                f"`dense` must be a {cls.family.name} model for {cls.__name__}, {dense!r} is {model_type!r}"
            )
        dense = dense_class.from_pretrained(dense)
    if isinstance(dense, ResidualMixin):
        raise ValueError(f"`dense` must be a dense model, got a {type(dense).__name__}; merge() it first")
    if not isinstance(dense, dense_class):
        raise ValueError(
            f"`dense` must be a {dense_class.__name__} for {cls.__name__}, got {type(dense).__name__}"
        )
    encoder = cls.family.find_encoder(dense)
    for path in cls.family.modules:
        linear = encoder.layers[0].get_submodule(path)
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise ValueError(
                f"`dense` must have plain floating-point nn.Linear modules, but its {path} is {type(linear).__name__}; "
                "load it without quantisation or adapters (dequantize() or merge_and_unload() may help)"
            )
    return dense


def _convert_group(
    layers: list[tuple[nn.Module, nn.Module]],
    group: Group,
    statistics: Statistics,
    start: str,
    iterations: int,
) -> list[ModuleError]:
    """Fits one group, writes it into the residual ones of the (dense, residual) `layers`, and measures what is left."""
    sources: list[Any] = [layers[i][0].get_submodule(group.module_path) for i in group.layers]
    targets: list[Any] = [layers[i][1].get_submodule(group.module_path) for i in group.layers]
    weights = [source.weight.double() for source in sources]
    entries = [statistics[i, group.module_path] for i in group.layers] if statistics else []
    covariances, importance = None, None
    if start == "calibrated":
        covariances, importance = metric_of(group, statistics)
    fits = fit_group(
        weights,
        covariances,
        [target.rank for target in targets],
        importance=importance,
        diagonal=targets[0].diagonal is not None,
        shared=targets[0].shared is not None,
        iterations=iterations if start == "calibrated" else 0,
    )
    biases, errors = [], []
    for index, (source, target, weight, fit) in enumerate(zip(sources, targets, weights, fits)):
        fit.write(target)
        difference = weight - fit.weight()
        if source.bias is not None:
            bias = source.bias.double()
            biases.append(bias + difference @ entries[index].mean if start == "calibrated" else bias)
            if target.bias is not None:
                target.bias.copy_(biases[-1])
        metric = entries[index].covariance() if entries else torch.eye(weight.shape[1], dtype=weight.dtype)
        left = torch.einsum("oi,ij,oj->", difference, metric, difference)
        error = left / torch.einsum("oi,ij,oj->", weight, metric, weight)
        errors.append(ModuleError(group.layers[index], role_of(group.module_path), target.rank, error.item()))
    shared = targets[0].shared
    if shared is not None and shared.bias is not None:
        shared.bias.copy_(torch.stack(biases).mean(0))
    return errors
