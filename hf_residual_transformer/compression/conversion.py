"""Dense to residual: computes `U`, `B A`, `D` and biases of every group from trained dense weights.

Two starts. "svd": the mean of a group's weights and the truncated SVD of what each layer lacks, as in Relaxed
Recursive Transformers (https://arxiv.org/abs/2410.20672, section 2.2). "calibrated": the components that, over
real inputs, change the encoder's final states least, matrix by matrix: `sum_l tr(G E_l C_l E_lᵀ)` for the errors
`E_l = W_l - Ŵ_l`, all components of a group together; the bias absorbs the mean. `C_l` and `G` are those of
`calibration.MatrixStatistics`. Layers of trained speech encoders are uncorrelated weight by weight, and only the
second leaves something that a short distillation can repair. Before it, `symmetry.py` puts the neurons of layers that
share into an order in which they agree; after it, `sequential.py` fits what each layer has of its own again, to what
the compressed encoder produces.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel

from ..configuration import ResidualConfig
from ..families import Family, role_of
from ..modeling import ResidualMixin
from ..quantization import BITS
from ..reporting import ConversionReport, ModuleError, size_report
from .alignment import aligned_neurons
from .allocation import Options, open_options, spend
from .fitting import ITERATIONS, fit_group
from .refinement import Streams
from .statistics import Group, Statistics, Sweep, as_batches, groups_with, metric_of

STARTS = ("calibrated", "svd")
# Where nothing else is asked for, by `shared_bits`: of the dense bytes with a `U` of four bits, else of the parameters.
BUDGETS: dict[int | None, float] = {BITS: 0.34, None: 0.7}


def convert(
    cls: type[ResidualMixin],
    dense: PreTrainedModel | str,
    residual_config: ResidualConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    start: str = "calibrated",
    budget: float | None = None,
    shared_bits: int | None = BITS,
    iterations: int = ITERATIONS,
    progress: bool = True,
) -> Any:
    """A residual model of class `cls` from a trained dense one.

    Calibration streams a batch at a time, forward and backward, and holds the statistics of as many layers as
    `calibration.HELD_BYTES` have room for; further layers take further passes. Beside them it holds, for all of
    the calibration, hidden states of both encoders and the outputs of a layer's matrices: 0.5 GB for 16 windows and
    whisper-base.

    Args:
        cls: the residual class; `from_dense` passes its own.
        dense: a model of `cls.dense_class()`, or the id or folder of one.
        residual_config: what to share; by default what `budget` chooses, or with the "svd" start `ResidualConfig()`.
        calibration: batches of the model's inputs, `{"input_features": ...}` or
            `{"input_values": ..., "attention_mask": ...}`, of tens of recordings of the kind that the model
            will hear; masked frames do not count. The "svd" start uses them for its report alone.
        start: "calibrated" or "svd".
        budget: size that the encoder's layers may have, unique / dense, above 0 and at most 1, by default that of
            `BUDGETS` where there is no `residual_config`. The rank of each matrix is then chosen by what its error does
            to the encoder's final states, and replaces that of `residual_config`. Without `residual_config`, group
            sizes and bits are chosen as well: for each kind of matrix a low rank for each layer alone, or a `U` for
            each layer or for each two, whichever pays. The model's config has the choice. The size is in bytes, with
            16 bits for every parameter that is not quantised; without a quantised `U`, that is to count parameters.
        shared_bits: where `budget` chooses all settings, the most bits that a `U` has: 4, or None for a `U` that can be
            trained and exported as any matrix. A `residual_config` has its own.
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
    if isinstance(shared_bits, dict):
        raise ValueError(
            f"`shared_bits` must be one number, the most that is tried, or None, got {shared_bits!r}; a "
            "`residual_config` may have a number for each module"
        )
    ResidualConfig(shared_bits=shared_bits)  # refuses what it cannot be
    if residual_config is None and start == "calibrated" and budget is None:
        budget = BUDGETS[shared_bits and BITS]
    dense = _load_dense(cls, dense)
    num_layers = len(cls.family.find_encoder(dense).layers)
    was_training = dense.training
    dense.eval()
    with aligned_neurons(cls.family, dense) as align:
        prepare = align if start == "calibrated" else None
        sweep = Sweep(cls.family, dense, [], batches, progress, prepare=prepare)
        if budget is not None:
            residual_config, sweep = _within_budget(cls, dense, residual_config, shared_bits, sweep, budget)
        residual_config = residual_config or ResidualConfig()
        model = residual_like(cls, dense, residual_config)
        sweep = sweep.over(_groups(_options(cls.family, residual_config), num_layers))
        errors = _convert_layers(cls.family, dense, model, sweep, start, iterations)
    dense.train(was_training)
    model.conversion_report = ConversionReport(start, "outputs" if batches else "weights", errors)
    return model


@torch.no_grad()
def _convert_layers(
    family: Family, dense: Any, model: Any, sweep: Sweep, start: str, iterations: int
) -> list[ModuleError]:
    """Writes all components of `model`, groups in the order of `sweep`; the errors of every matrix."""
    layers = list(zip(family.find_encoder(dense).layers, family.find_encoder(model).layers))
    errors: list[ModuleError] = []
    streams = Streams(family, dense, model, sweep.batches)
    bar = tqdm(total=len(layers), desc="converting", unit="layer", disable=not sweep.progress)
    for statistics, block in sweep:
        # What a layer has for itself alone, `Streams` fits anew, with nothing kept.
        first = [group for group in block if start == "svd" or len(group.layers) > 1]
        of_weights = [
            error for group in first for error in _convert_group(layers, group, statistics, start, iterations)
        ]
        for layer in sorted({layer for group in block for layer in group.layers}):
            if statistics:
                errors += streams.advance(layer, statistics, start == "calibrated", iterations)
            else:
                errors += [error for error in of_weights if error.layer == layer]
            bar.update()
    bar.close()
    return errors


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


def _options(family: Family, residual_config: ResidualConfig) -> Options:
    """What `residual_config` has."""
    roles = {path: role_of(path) for path in family.modules if residual_config.is_target(role_of(path))}
    return {
        path: [(residual_config.group_size_of(role), residual_config.bits_of(role))]
        for path, role in roles.items()
    }


def _groups(options: Options, num_layers: int) -> list[Group]:
    """All groups that the options make."""
    sizes = {path: list(dict.fromkeys(size for size, _ in sharings)) for path, sharings in options.items()}
    return groups_with(sizes, num_layers)


def _within_budget(
    cls: type[ResidualMixin],
    dense: Any,
    residual_config: ResidualConfig | None,
    shared_bits: int | None,
    sweep: Sweep,
    budget: float,
) -> tuple[ResidualConfig, Sweep]:
    """`residual_config` with the ranks that `budget` buys, or without it, what that buys of groups, bits and ranks; and
    the sweep, with what it has kept.
    """
    if residual_config is None:  # with a `U` for each layer and nothing beside it
        unranked = ResidualConfig(group_size=1, rank=0, diagonal="none", shared_bits=shared_bits)
    else:
        unranked = replace(residual_config, rank=1, rank_pattern={})
    residual_class: Any = cls
    with torch.device("meta"):
        model = residual_class(cls.config_class.from_dense_config(dense.config, unranked))
    if residual_config is None:
        scarce = size_report(model).encoder_bytes.ratio > budget
        options = dict.fromkeys(cls.family.modules, open_options(shared_bits, scarce))
    else:
        options = _options(cls.family, residual_config)
    sweep = sweep.over(_groups(options, len(cls.family.find_encoder(dense).layers)))
    with torch.no_grad():
        return spend(cls.family, dense, model, unranked, options, sweep, budget), sweep


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
    """Fits one group, writes it into the residual ones of the (dense, residual) `layers`; the errors of the weights."""
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
        bits=None if targets[0].shared is None else targets[0].shared.bits,
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
        error = (difference.norm() / weight.norm()).square().item()
        errors.append(ModuleError(group.layers[index], role_of(group.module_path), target.rank, error))
    shared = targets[0].shared
    if shared is not None and shared.bias is not None:
        shared.bias.copy_(torch.stack(biases).mean(0))
    return errors
