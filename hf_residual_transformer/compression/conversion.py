"""Dense to residual: all steps in order, from trained dense weights to `U`, `B A`, `D` and biases of every group.

There are two starts. "svd" takes the mean of a group's weights and the truncated SVD of the rest of each layer, as in
Relaxed Recursive Transformers (https://arxiv.org/abs/2410.20672, section 2.2). "calibrated" takes the components that,
over real inputs, change the encoder's final states least, matrix by matrix: they minimise `sum_l tr(G E_l C_l E_lᵀ)`
for the errors `E_l = W_l - Ŵ_l`, all components of a group together, and the bias absorbs the mean. `C_l` and `G` are
those of `statistics.MatrixStatistics`. Layers of trained speech encoders are uncorrelated weight by weight, so only the
second start gives a model that a short distillation can repair.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel

from ..configuration import ResidualConfig
from ..families import LayerStack
from ..modeling import ResidualMixin
from ..quantization import BITS
from ..reporting import ConversionReport, ModuleError
from .alignment import match_neurons, reorder_neurons
from .allocation import Options, allocate, curves_of, open_options, size_without_ranks
from .fitting import ITERATIONS, fit_group
from .inputs import Batch, as_batches, frozen_view, refuse_adapter
from .refinement import Streams
from .statistics import Group, Statistics, collect, groups_with, metric_of, runs_of_layers

STARTS = ("calibrated", "svd")
AUTO = "auto"
COMPONENT_NAMES = ("lora_A", "lora_B", "diagonal")  # parameters of a `ResidualLinear` that no dense model has
# The default budget by `shared_bits`: bytes relative to dense with a `U` of four bits, otherwise parameters.
BUDGETS: dict[int | None, float] = {BITS: 0.34, None: 0.7}


@dataclass(frozen=True)
class Request:
    """The checked options of `convert`."""

    residual_config: ResidualConfig | None
    batches: list[Batch]
    start: str
    budget: float | None
    shared_bits: int | None
    iterations: int
    progress: bool


def convert(
    cls: type[ResidualMixin],
    dense: PreTrainedModel | str,
    residual_config: ResidualConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    start: str = "calibrated",
    budget: float | None = None,
    shared_bits: int | str | None = AUTO,
    iterations: int = ITERATIONS,
    progress: bool = True,
) -> Any:
    """A residual model of class `cls` from a trained dense one, which stays as it is.

    Everything is computed in float32 or more, whatever the dtype of the dense model. Calibration streams one batch at a
    time, forward and backward, and holds the statistics of as many layers as `statistics.HELD_BYTES` have room for;
    further layers take further passes. It also holds, for all of the calibration, the hidden states of both models and
    the outputs of one layer's matrices: 0.5 GB for 16 windows and whisper-base.

    Args:
        cls: the residual class; `from_dense` passes its own.
        dense: a model of `cls.dense_class()`, or the id or folder of one.
        residual_config: which matrices share, and ranks. By default `budget` chooses it, or with the "svd" start it is
            `ResidualConfig()`.
        calibration: batches of the model's inputs, `{"input_features": ...}` or
            `{"input_values": ..., "attention_mask": ...}`, of tens of recordings of the kind that the model
            will hear. Masked frames do not count. The "svd" start uses them for its report alone.
        start: "calibrated" or "svd".
        budget: size of the encoder's layers relative to dense, above 0 and at most 1. By default it is that of
            `BUDGETS` where there is no `residual_config`. The rank of each matrix is then chosen by the effect of its
            error on the encoder's final states, and replaces that of `residual_config`. Without `residual_config`,
            group sizes and bits are chosen as well: for each kind of matrix a low rank for each layer alone, or a `U`
            for each layer or for each two, whichever pays. The model's config has the choice. The size is in bytes,
            with 16 bits for every parameter that is not quantised.
        shared_bits: the most bits that a `U` has where `budget` chooses all settings. "auto" is 4. None keeps `U` in
            floating point, to be trained and exported as any matrix. A `residual_config` states its own bits, so it
            must be "auto" beside one.
        iterations: rounds of alternation for groups without a closed form.
        progress: whether to show progress bars.

    Returns:
        The model in eval mode, in the dtype of the dense model, with the relative output error of every matrix in
        `conversion_report`.

    Raises:
        ValueError: for a model that is not the dense class's, is quantised, adapted or residual already, or has
            weights that are not finite; for a calibrated start without calibration inputs, or with empty or
            non-finite ones; for options that contradict each other.
    """
    request = _checked(residual_config, calibration, start, budget, shared_bits, iterations, progress)
    loaded = _load_dense(cls, dense)
    view = frozen_view(loaded)
    with torch.no_grad():
        model, errors = _convert(cls, view, request)
    model = model.to(loaded.dtype).eval()
    model.conversion_report = ConversionReport(start, "outputs" if request.batches else "weights", errors)
    return model


def _checked(
    residual_config: Any,
    calibration: Any,
    start: str,
    budget: float | None,
    shared_bits: Any,
    iterations: int,
    progress: bool,
) -> Request:
    if start not in STARTS:
        raise ValueError(f"`start` must be one of {', '.join(STARTS)}, got {start!r}")
    if residual_config is not None and not isinstance(residual_config, ResidualConfig):
        raise ValueError(f"`residual_config` must be a ResidualConfig, got {residual_config!r}")
    batches = as_batches(calibration)
    if start == "calibrated" and not batches:
        raise ValueError(
            '`calibration` must hold batches of model inputs for the start "calibrated", got none; pass inputs of real '
            'recordings (hf_residual_transformer.speech.windows.calibration_batches makes them), or start="svd", '
            "which needs none and is much worse"
        )
    if budget is not None and not (start == "calibrated" and 0 < budget <= 1):
        raise ValueError(f"`budget` must be above 0, at most 1, and with a calibrated start, got {budget!r}")
    if isinstance(shared_bits, dict):
        raise ValueError(
            f"`shared_bits` must be one number, the most that is tried, or None, got {shared_bits!r}; a "
            "`residual_config` may have a number for each module"
        )
    if residual_config is not None and shared_bits not in (AUTO, residual_config.shared_bits):
        raise ValueError(
            f"`shared_bits` must be left out beside a `residual_config`, which has its own "
            f"({residual_config.shared_bits!r}), got {shared_bits!r}"
        )
    bits = BITS if shared_bits == AUTO else shared_bits
    ResidualConfig(shared_bits=bits)  # refuses a number of bits that cannot be
    if residual_config is None and start == "calibrated" and budget is None:
        budget = BUDGETS[bits and BITS]
    return Request(residual_config, batches, start, budget, bits, iterations, progress)


def _convert(cls: type[ResidualMixin], dense: Any, request: Request) -> tuple[Any, list[ModuleError]]:
    """The residual model and the error of each matrix, from a `frozen_view` of the dense model."""
    source = LayerStack(cls.family.encoder, dense)
    residual_config, options = request.residual_config, _options(source, request)
    groups = _groups(options, len(source))
    runs = runs_of_layers(source, groups) if request.batches else [groups]

    def observe(run_idx: int) -> Statistics:
        if not request.batches:
            return {}
        statistics = collect(source, dense, runs[run_idx], request.batches, progress=request.progress)
        if request.start == "calibrated":
            reorder_neurons(source, statistics, match_neurons(source, runs[run_idx], statistics))
        return statistics

    if len(runs) == 1:  # everything fits into memory, and is collected once
        observe = functools.cache(observe)
    if request.budget is not None:
        curves = [
            pair
            for run_idx, run in enumerate(runs)
            for pair in curves_of(source, run, observe(run_idx), options)
        ]
        residual_config = allocate(source, _unranked(request), options, curves, request.budget)
    residual_config = residual_config or ResidualConfig()
    model = residual_like(cls, dense, residual_config)
    target = LayerStack(cls.family.encoder, model)
    chosen = _groups(options_of(source, residual_config), len(source))
    streams = Streams(source, target, (dense, model), request.batches)
    errors: list[ModuleError] = []
    with tqdm(total=len(source), desc="converting", unit="layer", disable=not request.progress) as bar:
        for run_idx, run in enumerate(runs):
            layers = sorted({layer for group in run for layer in group.layers})
            of_run = [group for group in chosen if group.layers[0] in layers]
            errors += _fit_run(source, target, streams, of_run, observe(run_idx), request, bar)
    return model, errors


def _fit_run(
    source: LayerStack,
    target: LayerStack,
    streams: Streams,
    groups: Sequence[Group],
    statistics: Statistics,
    request: Request,
    bar: Any,
) -> list[ModuleError]:
    """Writes the components of a run of layers; the error of each of its matrices."""
    # A matrix that belongs to one layer alone is fitted by `Streams`, which keeps nothing of a first fit.
    first = [group for group in groups if request.start == "svd" or len(group.layers) > 1]
    of_weights = [
        error for group in first for error in _fit_group(source, target, group, statistics, request)
    ]
    errors: list[ModuleError] = []
    for layer in sorted({layer for group in groups for layer in group.layers}):
        if statistics:
            errors += streams.advance(layer, statistics, request.start == "calibrated", request.iterations)
        else:
            errors += [error for error in of_weights if error.layer == layer]
        bar.update()
    return errors


def _fit_group(
    source: LayerStack, target: LayerStack, group: Group, statistics: Statistics, request: Request
) -> list[ModuleError]:
    """Fits one group to inputs of the dense model, and writes it; the relative errors of its weights."""
    path, calibrated = group.module_path, request.start == "calibrated"
    sources = [source.linear(layer, path) for layer in group.layers]
    targets = [target.linear(layer, path) for layer in group.layers]
    weights = [linear.weight.double() for linear in sources]
    covariances, importance = metric_of(group, statistics) if calibrated else (None, None)
    shared = targets[0].shared
    fits = fit_group(
        weights,
        covariances,
        [linear.rank for linear in targets],
        importance=importance,
        diagonal=targets[0].diagonal is not None,
        shared=shared is not None,
        bits=None if shared is None else shared.bits,
        iterations=request.iterations if calibrated else 0,
    )
    biases, errors = [], []
    for index, (layer, weight, fit) in enumerate(zip(group.layers, weights, fits)):
        fit.write(targets[index])
        difference = weight - fit.weight()
        if sources[index].bias is not None:
            bias = sources[index].bias.double()
            if calibrated:
                bias = bias + difference @ statistics[layer, path].mean
            biases.append(bias)
            if targets[index].own_bias is not None:
                targets[index].own_bias.copy_(bias)
        error = (difference.norm() / weight.norm()).square().item()
        errors.append(ModuleError(layer, source.stack.role_of(path), targets[index].rank, error))
    if shared is not None and shared.bias is not None:
        shared.bias.copy_(torch.stack(biases).mean(0))
    return errors


def residual_like(cls: type[ResidualMixin], dense: Any, residual_config: ResidualConfig) -> Any:
    """A model of class `cls` in eval mode with everything that a dense one has, and components still to be written.

    Raises:
        ValueError: when the dense model has a weight that the residual one has no place for, or lacks one.
    """
    residual_class: Any = cls
    model = residual_class(cls.config_class.from_dense_config(dense.config, residual_config))
    model = model.to(device=dense.device, dtype=dense.dtype).eval()
    stack = LayerStack(cls.family.encoder, dense)
    prefix = next(name for name, module in dense.named_modules() if module is stack.owner)
    replaced = {
        f"{prefix}.layers.{layer}.{path}.{name}".lstrip(".")
        for layer in range(len(stack))
        for path in stack.stack.modules
        for name in ("weight", "bias")
    }
    weights, own = dense.state_dict(), set(model.state_dict())
    bank = f"{prefix}.shared.".lstrip(".")
    unused = [key for key in weights if key not in own and key not in replaced]
    missing = [
        key
        for key in own
        if key not in weights and not key.startswith(bank) and key.rpartition(".")[2] not in COMPONENT_NAMES
    ]
    for problem, keys in (("has no use for", unused), ("needs", missing)):
        if keys:
            raise ValueError(
                f"`dense` must be a plain {cls.dense_class().__name__}, but {cls.__name__} {problem} the weight "
                f"{sorted(keys)[0]!r} ({len(keys)} such weights); if `dense` carries an adapter, merge it first, as "
                "with merge_and_unload()"
            )
    model.load_state_dict({key: value for key, value in weights.items() if key in own}, strict=False)
    if dense.can_generate():
        model.generation_config = copy.deepcopy(dense.generation_config)
    return model


def options_of(source: LayerStack, residual_config: ResidualConfig) -> Options:
    """The one group size and number of bits that `residual_config` has for each module path that it compresses."""
    roles = {role: path for role, path in source.stack.roles.items() if residual_config.is_target(role)}
    return {
        path: [(residual_config.group_size_of(role), residual_config.bits_of(role))]
        for role, path in roles.items()
    }


def _options(source: LayerStack, request: Request) -> Options:
    """Group sizes and bits to choose from."""
    if request.residual_config is not None or request.budget is None:
        return options_of(source, request.residual_config or ResidualConfig())
    scarce = size_without_ranks(source, request.shared_bits) > request.budget
    return dict.fromkeys(source.stack.modules, open_options(request.shared_bits, scarce))


def _unranked(request: Request) -> ResidualConfig:
    """The settings that `allocate` gives ranks."""
    if request.residual_config is None:
        return ResidualConfig(group_size=1, rank=0, diagonal="none", shared_bits=request.shared_bits)
    return replace(request.residual_config, rank=1, rank_pattern={})


def _groups(options: Options, num_layers: int) -> list[Group]:
    """All groups that the options make."""
    sizes = {path: list(dict.fromkeys(size for size, _ in sharings)) for path, sharings in options.items()}
    return groups_with(sizes, num_layers)


def _load_dense(cls: type[ResidualMixin], dense: Any) -> Any:
    """The dense model, loaded in float32 where an id or a folder is given, and checked."""
    dense_class = cls.dense_class()
    refuse_adapter(dense)
    if isinstance(dense, (str, Path)):
        model_type = AutoConfig.from_pretrained(dense).to_dict()["model_type"]
        if model_type != cls.family.name:
            raise ValueError(
                f"`dense` must be a {cls.family.name} model for {cls.__name__}, {dense!r} is {model_type!r}"
            )
        dense = dense_class.from_pretrained(dense, dtype=torch.float32)
    if isinstance(dense, ResidualMixin):
        raise ValueError(f"`dense` must be a dense model, got a {type(dense).__name__}; merge() it first")
    if not isinstance(dense, dense_class):
        raise ValueError(
            f"`dense` must be a {dense_class.__name__} for {cls.__name__}, got {type(dense).__name__}"
        )
    source = LayerStack(cls.family.encoder, dense)
    for layer in range(len(source)):
        for path in source.stack.modules:
            linear = source.linear(layer, path)
            if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
                raise ValueError(
                    f"`dense` must have plain floating-point nn.Linear modules, but its {path} is "
                    f"{type(linear).__name__}; load it without quantisation or adapters (dequantize() or "
                    "merge_and_unload() may help)"
                )
            if not torch.isfinite(linear.weight).all():
                raise ValueError(
                    f"`dense` must have finite weights, but layers.{layer}.{path}.weight has NaN or infinite values"
                )
    return dense
