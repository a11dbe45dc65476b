"""Dense to residual: all steps in order, from trained dense weights to the compact form of every part.

The parts are the encoder's layers, the token embedding, and the decoder's layers. They are fitted in this order, each
to what the compact parts before it produce.

There are two starts. "svd" takes the mean of a group's weights and the truncated SVD of the rest of each layer, as in
Relaxed Recursive Transformers (https://arxiv.org/abs/2410.20672, section 2.2). "calibrated" takes the components that,
over real inputs, change the objective least, matrix by matrix: they minimise `sum_l tr(G E_l C_l E_lᵀ)`
for the errors `E_l = W_l - Ŵ_l`, all components of a group together, and the bias absorbs the mean. `C_l` and `G` are
those of `statistics.MatrixStatistics`. The objective is the distribution of the decoder's tokens over the model's own
transcripts, or where there is no decoder, the encoder's final states. Layers of trained speech encoders are
uncorrelated weight by weight, so only the second start gives a model that a short distillation can repair.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel

from ..configuration import EmbeddingBits, ResidualConfig, checked_embedding_bits
from ..families import Family, LayerStack
from ..layers import QuantizedWeight, as_linear, is_linear, is_of_torchao
from ..modeling import ResidualMixin
from ..quantization import BITS, BLOCK, FEWEST, MOST, ROTATION, check_blocks
from ..reporting import ConversionReport, ModuleError, saved_tensors
from ..speech.collators import check_has_frames
from .alignment import match_neurons, reorder_neurons
from .allocation import (
    EMBEDDING,
    Curve,
    Lacking,
    Search,
    choose,
    config_of,
    curves_of,
    embedding_curves,
    path_of,
    token_ranges,
    unranked_parameters,
)
from .fitting import ITERATIONS, fit_group, naming, quantize_for
from .inputs import (
    Batch,
    as_batches,
    frozen_view,
    lend_weights,
    main_input,
    refuse_adapter,
    with_labels,
    without_memory,
)
from .measurement import (
    CHECK_WINDOWS,
    Divergence,
    Keeps,
    PlainRounding,
    replaced,
    round_plainly,
)
from .processes import Processes
from .refinement import Streams
from .statistics import (
    EmbeddingStatistics,
    Group,
    LogitsObjective,
    Objective,
    StatesObjective,
    Statistics,
    collect,
    metric_of,
    runs_of_layers,
)

STARTS = ("calibrated", "svd")
AUTO = "auto"
ENCODER, DECODER = "encoder", "decoder"
PARTS = (ENCODER, DECODER, EMBEDDING)
# Beside a decoder, so many windows are enough for an encoder: a window has 1,500 frames, but only tens of tokens.
ENCODER_WINDOWS = 16
CHOSEN_SCALE_BITS = 8  # of the scales where `budget` chooses all settings
# Parameters of a `ResidualLinear` that no dense model has.
COMPONENT_NAMES = ("residual_A", "residual_B", "diagonal")
# The default budget by `shared_bits`: bytes relative to dense with matrices of few bits, otherwise parameters.
BUDGETS: dict[Any, float] = {BITS: 0.31, None: 0.7}


@dataclass(frozen=True)
class Plan:
    """What each part becomes.

    Args:
        configs: settings by the name of the stack; stacks that are not there stay dense.
        embedding_bits: of the token embedding, as in the config; None where it stays dense.
    """

    configs: dict[str, ResidualConfig]
    embedding_bits: EmbeddingBits = None


@dataclass(frozen=True)
class Request:
    """The checked options of `convert`."""

    plan: Plan | None
    parts: tuple[str, ...] | None
    batches: list[Batch]
    start: str
    budgets: tuple[float, ...] | None
    numbers: tuple[int, ...] | None
    block_size: int
    rotation: int
    iterations: int
    saves_memory: bool
    progress: bool
    processes: Processes


def convert(
    cls: type[ResidualMixin],
    dense: PreTrainedModel | str,
    residual_config: ResidualConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    decoder_residual_config: ResidualConfig | None = None,
    embedding_bits: EmbeddingBits = None,
    parts: Sequence[str] | None = None,
    start: str = "calibrated",
    budget: float | Sequence[float] | None = None,
    shared_bits: int | Sequence[int] | str | None = AUTO,
    block_size: int | None = None,
    rotation: int | None = None,
    iterations: int = ITERATIONS,
    device: str | torch.device | None = None,
    distributed: bool = False,
    progress: bool = True,
) -> Any:
    """A residual model of class `cls` from a trained dense one, which stays as it is.

    Everything is computed in float32 or more, whatever the dtype of the dense model. Calibration streams one batch at a
    time, forward and backward, and holds the statistics of as many layers as `statistics.HELD_BYTES` have room for;
    further layers take further passes. It also holds, for all of the calibration, the hidden states of both models and
    the outputs of one layer's matrices and branches: 0.5 GB for 16 windows and whisper-base.

    Args:
        cls: the residual class; `from_dense` passes its own.
        dense: a model of `cls.dense_class()`, or the id or folder of one.
        residual_config: what the encoder's layers share, and their ranks. By default `budget` chooses it, or with the
            "svd" start it is `ResidualConfig()`. With it, the other parts stay dense unless the next two say otherwise.
        calibration: batches of the model's inputs, `{"input_features": ...}` or
            `{"input_values": ..., "attention_mask": ...}`, of tens of recordings of the kind that the model
            will hear. Masked frames do not count. The "svd" start uses them for its report alone. A decoder also reads
            token ids of transcripts, `labels`; by default the dense model transcribes the recordings.
        decoder_residual_config: the same for the decoder's layers.
        embedding_bits: bits of the token embedding, or of ranges of tokens, as in the config.
        parts: those of "encoder", "decoder" and "embed_tokens" that become compact, where `budget` chooses everything.
            By default all that the model has, or the encoder alone with `shared_bits=None`, which leaves the embedding
            dense.
        start: "calibrated" or "svd".
        budget: bytes of the whole saved model relative to dense in 16 bits, above 0 and at most 1. With
            `parts=("encoder",)`, or a `residual_config` alone, it is relative to the encoder's layers, as in the paper.
            By default it is that of `BUDGETS` where there is no `residual_config`. The rank of each matrix is then
            chosen by the effect of its error on the objective, and replaces that of `residual_config`. Where no
            settings are given, group sizes and bits are chosen as well. Several budgets give a list of models, for
            which this effect is measured once.
        shared_bits: the most bits that a `U` has where `budget` chooses all settings, or all numbers of bits that it
            may have, such as (4, 8). "auto" is 8. None keeps `U` in floating point, to be trained and exported as any
            matrix. A `residual_config` states its own bits, so it must be "auto" beside one.
        block_size: the number of weights of a quantised `U` that have one scale, where `budget` chooses all settings;
            by default 32.
        rotation: how many inputs of a quantised `U` are rotated together, likewise; by default 128.
        iterations: rounds of alternation for groups without a closed form.
        device: where to compute, if memory is short. The matrices of the dense model's layers then stay where they are,
            in their own precision, and each is copied to `device` in float32 while it runs. The result is there, too,
            in float32. By default everything is computed where the dense model is, of which weights of fewer than 32
            bits are copied at once.
        distributed: whether all processes of `torch.distributed` convert together, each of which runs the model on
            its share of the calibration. All call this with the same arguments, and all get the same model.
        progress: whether to show progress bars.

    Returns:
        The model in eval mode, in the dtype of the dense model (float32 with `device`), with the relative output error
        of every matrix in `conversion_report`. A list of models for a list of budgets.

    Raises:
        ValueError: for a model that is not the dense class's, is quantised, adapted or residual already, or has
            weights that are not finite; for a calibrated start without calibration inputs, or with empty,
            non-finite or too short ones; for options that contradict each other; where processes that convert together
            have other inputs.
        OtherProcessError: when another process has failed.
    """
    processes = Processes(distributed)
    with processes.failing_together():
        plan = _given_plan(residual_config, decoder_residual_config, embedding_bits)
        request = _checked(
            plan,
            parts,
            calibration,
            start,
            budget,
            shared_bits,
            block_size,
            rotation,
            iterations,
            device is not None,
            progress and processes.index == 0,
            processes,
        )
        loaded = _load_dense(cls, dense, dtype=torch.float32 if device is None else "auto")
        for index, batch in enumerate(request.batches):
            if "input_values" in batch:
                check_has_frames(loaded, batch["input_values"].shape[-1], f"`calibration[{index}]`")
        processes.check_same(request.batches)
        lent = [] if device is None else [*_matrices(cls.family, loaded)]
        view = frozen_view(loaded, device, [layer.get_submodule(path) for layer, path in lent])
        _make_linear(view, cls.family)
        for layer, path in _matrices(cls.family, view) if lent else ():
            lend_weights(layer.get_submodule(path), view.device)
        with torch.no_grad():
            models = []
            for model, own_errors in _Conversion(cls, view, request).run():
                # Processors of different kinds may round differently.
                processes.copy_from_first(model.state_dict().values())
                errors = processes.from_first(own_errors)
                model = (model if device is not None else model.to(loaded.dtype)).eval()
                measured = "outputs" if request.batches else "weights"
                windows = sum(len(main_input(batch)) for batch in request.batches)
                model.conversion_report = ConversionReport(start, measured, errors, windows)
                models.append(model)
    return models if isinstance(budget, (list, tuple)) else models[0]


def _given_plan(
    residual_config: Any, decoder_residual_config: Any, embedding_bits: EmbeddingBits
) -> Plan | None:
    """The settings that the user gives; None where `budget` chooses all."""
    configs = {}
    for name, value in ((ENCODER, residual_config), (DECODER, decoder_residual_config)):
        field_name = "residual_config" if name == ENCODER else "decoder_residual_config"
        if value is not None and not isinstance(value, ResidualConfig):
            raise ValueError(f"`{field_name}` must be a ResidualConfig, got {value!r}")
        if value is not None:
            configs[name] = value
    if ENCODER not in configs and (configs or embedding_bits):
        raise ValueError(
            "`residual_config`, which is that of the encoder, must be given beside `decoder_residual_config` or "
            "`embedding_bits`, got None"
        )
    if embedding_bits is not None:
        embedding_bits = checked_embedding_bits(embedding_bits)
    return Plan(configs, embedding_bits) if configs else None


def _checked(
    plan: Plan | None,
    parts: Sequence[str] | None,
    calibration: Any,
    start: str,
    budget: float | Sequence[float] | None,
    shared_bits: Any,
    block_size: int | None,
    rotation: int | None,
    iterations: int,
    saves_memory: bool,
    progress: bool,
    processes: Processes,
) -> Request:
    if start not in STARTS:
        raise ValueError(f"`start` must be one of {', '.join(STARTS)}, got {start!r}")
    batches = as_batches(calibration)
    if start == "calibrated" and not batches:
        raise ValueError(
            '`calibration` must hold batches of model inputs for the start "calibrated", got none; pass inputs of real '
            'recordings (hf_residual_transformer.speech.windows.calibration_batches makes them), or start="svd", '
            "which needs none and is much worse"
        )
    budgets = None if budget is None else tuple(budget) if isinstance(budget, (list, tuple)) else (budget,)
    if budgets is not None and not (
        start == "calibrated" and budgets and all(isinstance(b, (int, float)) and 0 < b <= 1 for b in budgets)
    ):
        raise ValueError(f"`budget` must be above 0, at most 1, and with a calibrated start, got {budget!r}")
    if budgets is not None and len(set(budgets)) < len(budgets):
        raise ValueError(f"`budget` must have each size once, got {budget!r}")
    if isinstance(shared_bits, dict):
        raise ValueError(
            f"`shared_bits` must be the most bits that are tried, a list of all that are tried, or None, got "
            f"{shared_bits!r}; a `residual_config` may have a number for each module"
        )
    if plan is None and start == "svd":
        plan = Plan({ENCODER: ResidualConfig()})
    rounding = {"shared_bits": None if shared_bits == AUTO else shared_bits}
    rounding |= {"block_size": block_size, "rotation": rotation}
    for name, value in rounding.items():
        if plan is not None and value not in (None, getattr(plan.configs[ENCODER], name)):
            raise ValueError(
                f"`{name}` must be left out beside a `residual_config`, which has its own "
                f'({getattr(plan.configs[ENCODER], name)!r}), and with the start "svd", got {value!r}'
            )
    block_size = BLOCK if block_size is None else block_size
    rotation = ROTATION if rotation is None else rotation
    numbers = _numbers(MOST if shared_bits == AUTO else shared_bits)
    for bits in numbers or (None,):  # a config refuses numbers that cannot be
        ResidualConfig(shared_bits=bits, block_size=block_size, rotation=rotation)
    if parts is not None:
        parts = (parts,) if isinstance(parts, str) else tuple(parts)
        unknown = [part for part in parts if part not in PARTS]
        if unknown or ENCODER not in parts or plan is not None:
            raise ValueError(
                f"`parts` must be of {', '.join(PARTS)}, with the encoder, where `budget` chooses all settings, "
                f"got {parts!r}"
            )
        if numbers is None and EMBEDDING in parts:
            raise ValueError(
                "`parts` must be without embed_tokens where `shared_bits` is None, since it takes few bits"
            )
    if plan is None and budgets is None:
        budgets = (BUDGETS[None if numbers is None else BITS],)
    return Request(
        plan,
        parts,
        batches,
        start,
        budgets,
        numbers,
        block_size,
        rotation,
        iterations,
        saves_memory,
        progress,
        processes,
    )


def _numbers(shared_bits: Any) -> tuple[int, ...] | None:
    """All numbers of bits that may be chosen; None for floating point."""
    if shared_bits is None:
        return None
    if isinstance(shared_bits, (list, tuple, set)) and shared_bits:
        return tuple(sorted(shared_bits))
    ResidualConfig(shared_bits=shared_bits)  # refuses numbers that cannot be
    return tuple(range(FEWEST, shared_bits + 1))


@dataclass
class _Part:
    """One stack on its way.

    Args:
        search: the dense stack, and what may be chosen for it.
        objective: makes the objective of one pass over the calibration.
        runs: all groups that may be chosen, in runs of layers whose statistics are held together.
        observe: the statistics of a run.
    """

    search: Search
    objective: Callable[[], Objective]
    runs: list[list[Group]]
    observe: Callable[[int], Statistics] = lambda run_idx: {}


class _Conversion:
    """The steps of one conversion, which share the dense model and the request.

    Args:
        cls: the residual class.
        dense: a `frozen_view` of the dense model.
        request: the checked options.
    """

    def __init__(self, cls: type[ResidualMixin], dense: Any, request: Request) -> None:
        self.cls, self.dense, self.request = cls, dense, request
        # Settings by hand may be for a runtime that has blocks alone, and no mean of the token vectors.
        self.centres_table = request.plan is None
        family = cls.family
        self.stacks = {s.name: LayerStack(s, dense) for s in family.stacks if s.is_in(dense)}
        self.names = names = self._part_names()
        self.parts = {name: self._part(name) for name in self.stacks if name in names}
        self._check_blocks()
        self.batches = {ENCODER: request.batches, DECODER: request.batches}
        self.encoder_places = list(range(len(request.batches)))
        self.check_places: list[int] = []
        with_decoder = bool(request.batches) and len(names) > 1
        if with_decoder:
            sizes = [len(main_input(batch)) for batch in request.batches]
            self.encoder_places = _spread(sizes, ENCODER_WINDOWS)
            self.check_places = _spread(sizes, CHECK_WINDOWS)
        # Each process gets equal numbers of the batches that are used most.
        places = [*self.check_places, *self.encoder_places, *range(len(request.batches))]
        own = request.processes.share(list(dict.fromkeys(places)))
        if with_decoder:
            labelled = with_labels(
                dense,
                self.stacks[ENCODER].owner,
                request.batches,
                request.progress,
                own=own,
                gather=request.processes.gather,
            )
            of_encoder = [without_memory(labelled[place]) for place in self.encoder_places]
            self.batches = {ENCODER: of_encoder, DECODER: labelled}
        of_encoder_own = {index for index, place in enumerate(self.encoder_places) if place in own}
        self.own = {ENCODER: of_encoder_own, DECODER: own}  # indices of the batches that this process runs
        self.embedding: EmbeddingStatistics | None = None
        if EMBEDDING in names and request.batches:
            table = dense.get_input_embeddings().weight
            self.embedding = EmbeddingStatistics(table.shape[0], table.shape[1], table.device)
        self.memory_gradients: list[torch.Tensor] | None = None

    @property
    def _chooses_everything(self) -> bool:
        """Whether the budget is of the whole model, of which nobody gave settings or parts."""
        request = self.request
        return request.plan is None and request.parts is None and request.numbers is not None

    def _part_names(self) -> tuple[str, ...]:
        """The parts that become compact."""
        plan, request = self.request.plan, self.request
        output = self.dense.get_output_embeddings()
        is_tied = output is None or output.weight is self.dense.get_input_embeddings().weight
        has = (*self.stacks, *([EMBEDDING] if DECODER in self.stacks and is_tied else []))
        if plan is not None:
            names: tuple[str, ...] = tuple(plan.configs) + ((EMBEDDING,) if plan.embedding_bits else ())
        elif request.parts is not None:
            names = request.parts
        else:
            return has if self._chooses_everything else (ENCODER,)
        missing = [name for name in names if name not in has]
        if missing:
            raise ValueError(
                f"`parts` must be of those that a {type(self.dense).__name__} has ({', '.join(has)}), "
                f"got {missing[0]!r}"
            )
        return names

    def _part(self, name: str) -> _Part:
        request, source = self.request, self.stacks[name]
        if request.plan is not None:
            search = Search(source, request.plan.configs[name])
            if request.budgets is not None:
                search = replace(search, config=replace(search.config, rank=1, rank_pattern={}))
        else:
            config = ResidualConfig(
                group_size=1,
                rank=0,
                diagonal="none",
                shared_bits=None if request.numbers is None else request.numbers[-1],
                block_size=request.block_size,
                scale_bits=CHOSEN_SCALE_BITS,
                rotation=_rotation(request, source),
            )
            search = Search(source, config, request.numbers, is_open=True)
        groups = search.groups()
        runs = runs_of_layers(source, groups) if request.batches else [groups]
        part = _Part(search, functools.partial(self._objective, name), runs)
        observe = functools.partial(self._observe, part)
        # Where everything fits into memory, it is collected once.
        part.observe = functools.cache(observe) if len(part.runs) == 1 else observe
        return part

    def _dense_decoder(self) -> _Part:
        """A decoder of which nothing becomes compact. Its first layer is observed, and so the token embedding is."""
        source = self.stacks[DECODER]
        search = Search(source, ResidualConfig(group_size=1, rank=0, diagonal="none"))
        first = [group for group in search.groups() if group.layers == (0,)]
        return _Part(search, functools.partial(self._objective, DECODER), [first])

    def _check_blocks(self) -> None:
        """Checks, before anything is computed, that blocks with one scale divide all rows that may get few bits."""
        for part in self.parts.values():
            search = part.search
            for group in search.groups():
                inputs = search.source.linear(group.layers[0], group.module_path).in_features
                if any(bits is not None for bits in search.bits(group)):
                    check_blocks(group.module_path, inputs, search.config.block_size)
        if EMBEDDING in self.names:
            table = self.dense.get_input_embeddings().weight
            check_blocks(EMBEDDING, table.shape[1], self._embedding_blocks.block_size)

    @property
    def _embedding_blocks(self) -> ResidualConfig:
        """The config whose blocks the token embedding has, as `embedding_blocks` of the model's config will say."""
        return self.parts.get(DECODER, self.parts[ENCODER]).search.config

    def _objective(self, name: str) -> Objective:
        if name == DECODER:
            return LogitsObjective(self.stacks[DECODER], self.stacks[ENCODER], self.embedding)
        gradients = self.memory_gradients
        if gradients is not None:
            by_place = dict(zip(sorted(self.own[DECODER]), gradients))
            gradients = [by_place[place] for place in self.encoder_places if place in by_place]
        return StatesObjective(self.stacks[ENCODER], gradients)

    def _observe(self, part: _Part, run_idx: int) -> Statistics:
        source, groups, objective = part.search.source, part.runs[run_idx], part.objective()
        batches = self.batches[source.stack.name]
        if not batches:
            return {}
        statistics = collect(
            source,
            self.dense,
            groups,
            batches,
            objective,
            memory_places=self.encoder_places,
            own=self.own[source.stack.name],
            processes=self.request.processes,
            progress=self.request.progress,
        )
        if isinstance(objective, LogitsObjective):
            if self.memory_gradients is None:  # later layers alone do not see all that the states do
                self.memory_gradients = objective.memory_gradients
            if self.embedding is not None:
                self.embedding.unite(self.request.processes)
            self.embedding = None  # it has seen all batches once
        if self.request.start == "calibrated":
            reorder_neurons(source, statistics, match_neurons(source, groups, statistics))
        return statistics

    def run(self) -> Iterator[tuple[Any, list[ModuleError]]]:
        """The residual model of each budget, and the error of each of its matrices."""
        embedding = self.embedding
        if len(self.names) > 1 and self.request.batches:
            if self.dense.get_output_embeddings() is None:
                raise ValueError(
                    f'`parts` must be ("encoder",) for a {type(self.dense).__name__}, which has no logits, got '
                    f"{self.names}"
                )
            # The decoder says which of the encoder's frames and which tokens matter, also where it stays dense.
            if DECODER in self.parts:
                self.parts[DECODER].observe(0)
            else:
                self._observe(self._dense_decoder(), 0)
        plans = [self.request.plan]
        if self.request.budgets is not None:
            plans = self.request.processes.from_first(self._allocate(embedding, self.request.budgets))
        for plan in plans:
            assert plan is not None
            yield self._made(plan, embedding)

    def _made(self, plan: Plan, embedding: EmbeddingStatistics | None) -> tuple[Any, list[ModuleError]]:
        """The residual model of a plan, and the error of each of its matrices."""
        model = residual_like(self.cls, self.dense, plan)
        errors: list[ModuleError] = []
        if ENCODER in self.parts:
            errors += self._fit(self.parts[ENCODER], model, plan)
        if plan.embedding_bits:
            self._fit_embedding(embedding, model.get_input_embeddings())
        if DECODER in self.parts:
            errors += self._fit(self.parts[DECODER], model, plan)
        return model, errors

    def _fit_embedding(self, statistics: EmbeddingStatistics | None, embedding: Any) -> None:
        """Writes the token vectors in few bits."""
        table = self.dense.get_input_embeddings().weight
        for start, part in embedding.ranges:
            end = start + part.num_embeddings
            metric = (
                torch.eye(table.shape[1], dtype=torch.float64, device=table.device)
                if statistics is None
                else statistics.metric(start, end)
            )
            rows = table[start:end]
            if self.centres_table:
                mean = rows.mean(0).to(part.weight_mean)
                part.weight_mean.copy_(mean)
                rows = rows - mean
            with naming(EMBEDDING):
                part.write(quantize_for(rows, metric, **part.rounding))

    def _allocate(self, embedding: EmbeddingStatistics | None, budgets: Sequence[float]) -> list[Plan]:
        """The plan for each budget. What it is chosen by is measured once."""
        curves: list[Curve] = []
        divergence = self._divergence(self.check_places)
        for name, part in self.parts.items():
            read_memory = {path for block in part.search.source.stack.blocks for path in block.memory}
            by_path = _curves_by_path(part, divergence is not None, self.request.progress)
            for path, (found, plain) in _progress(
                by_path.items(), f"measuring {name}", "kind of matrix", self.request.progress
            ):
                of_decoder = Keeps.STATES if path in read_memory else Keeps.KEYS
                curves += _scaled(found, plain, divergence, of_decoder if name == DECODER else Keeps.NOTHING)
        layers = [part.search.source.layers for part in self.parts.values()]
        of_layers = sum(parameter.numel() for stack in layers for parameter in stack.parameters())
        # The settings of an encoder alone, whether given or asked for, are counted as in the paper.
        is_whole = self.names != (ENCODER,) or self._chooses_everything
        dense = sum(tensor.numel() for tensor in saved_tensors(self.dense)) if is_whole else of_layers
        fixed = dense - of_layers + sum(unranked_parameters(part.search) for part in self.parts.values())
        if EMBEDDING in self.names:
            assert embedding is not None
            table = self.dense.get_input_embeddings().weight
            ranges = self._token_ranges(len(table))
            blocks = self._embedding_blocks
            of_table = self._divergence(self.encoder_places)
            ends = (self.dense.get_input_embeddings(), self.dense.get_output_embeddings())

            def measure(weight: torch.Tensor) -> float:
                assert of_table is not None
                with replaced([(end, weight, None) for end in ends if end is not None]):
                    return of_table(Keeps.KEYS)

            curves += embedding_curves(
                table,
                embedding,
                _progress(ranges, f"measuring {EMBEDDING}", "range of tokens", self.request.progress),
                blocks.block_size,
                None if of_table is None else measure,
                blocks.scale_bits,
                self.centres_table,
            )
            fixed -= table.numel()
        return [self._plan(curves, budget, dense, fixed) for budget in budgets]

    def _plan(self, curves: Sequence[Curve], budget: float, dense: float, fixed: float) -> Plan:
        """What fits into a part of `dense` parameters, of which `fixed` are spent."""
        try:
            choices = choose(curves, budget * dense - fixed)
        except Lacking as lacking:
            raise ValueError(
                f"`budget` must be at least {budget + lacking.parameters / dense:.3f} with these settings, whose "
                f"shared and dense matrices take that much, got {budget}; share among more layers, use fewer bits or "
                "larger blocks, or set group sizes to None"
            ) from lacking
        by_stack: dict[str, list[Any]] = {}
        for choice in choices:
            by_stack.setdefault(choice.group.stack, []).append(choice)
        configs = {name: config_of(part.search, by_stack[name]) for name, part in self.parts.items()}
        chosen = sorted((choice.group.layers[0], choice.bits) for choice in by_stack.get(EMBEDDING, []))
        if len({bits for _, bits in chosen}) < 2:
            return Plan(configs, chosen[0][1] if chosen else None)
        return Plan(configs, checked_embedding_bits(chosen))

    def _token_ranges(self, num_tokens: int) -> list[tuple[int, Sequence[int]]]:
        """The ends of ranges of tokens, and the bits that each may have."""
        given = None if self.request.plan is None else self.request.plan.embedding_bits
        if isinstance(given, int):
            return [(num_tokens, (given,))]
        if given is not None:
            return [(end, (bits,)) for end, bits in given]
        end_token = self.dense.config.eos_token_id
        ends = token_ranges(num_tokens, end_token if isinstance(end_token, int) else None)
        return [(end, self.request.numbers or ()) for end in ends]

    def _divergence(self, places: Sequence[int]) -> Divergence | None:
        """Measures on some of the windows; None where one part alone is compressed, or has no logits."""
        if len(self.names) == 1 or self.dense.get_output_embeddings() is None:
            return None
        own = [self.batches[DECODER][place] for place in places if place in self.own[DECODER]]
        return Divergence(self.dense, own, self.request.processes)

    def _fit(self, part: _Part, model: Any, plan: Plan) -> list[ModuleError]:
        """Fits all groups of one stack, whose parts before are fitted."""
        source, name = part.search.source, part.search.source.stack.name
        target = LayerStack(source.stack, model)
        chosen = Search(source, plan.configs[name]).groups()
        own = [self.batches[name][index] for index in sorted(self.own[name])]
        streams = Streams(
            source,
            target,
            (self.dense, model),
            own,
            self.request.processes,
            unpacks=not self.request.saves_memory,
        )
        errors: list[ModuleError] = []
        with tqdm(
            total=len(source), desc=f"converting {name}", unit="layer", disable=not self.request.progress
        ) as bar:
            for run_idx, run in enumerate(part.runs):
                layers = sorted({layer for group in run for layer in group.layers})
                of_run = [group for group in chosen if group.layers[0] in layers]
                errors += _fit_run(source, target, streams, of_run, part.observe(run_idx), self.request, bar)
        return errors


def _rotation(request: Request, source: LayerStack) -> int | dict[str, int]:
    """The rotations where a budget chooses all settings.

    In an encoder, which computes many frames at once, a matrix with more inputs than outputs is not rotated: its inputs
    take the most time, and it gains the least.
    """
    if request.numbers is None or request.rotation == 1:
        return 1
    if source.stack.name == DECODER:
        return request.rotation
    shapes = {
        role: source.linear(0, path).weight.shape
        for role, path in source.stack.of_layer(source.layers[0]).roles.items()
    }
    return {role: request.rotation for role, (outputs, inputs) in shapes.items() if inputs <= outputs}


def _progress(items: Collection[Any], name: str, unit: str, shows: bool) -> Iterable[Any]:
    return tqdm(items, desc=name, unit=unit, disable=not shows)


def _curves_by_path(
    part: _Part, rounds: bool, progress: bool
) -> dict[str, tuple[list[Curve], list[PlainRounding]]]:
    """The curves of a part by module path, and if `rounds` the plain rounding of the same matrices."""
    found: dict[str, tuple[list[Curve], list[PlainRounding]]] = {}
    for run_idx in range(len(part.runs)):
        curves, roundings = _curves_of_run(part, run_idx, rounds, progress)
        for curve in curves:
            found.setdefault(curve.group.module_path, ([], []))[0].append(curve)
        for path, rounding in roundings.items():
            found[path][1].extend(rounding)
    return found


def _curves_of_run(
    part: _Part, run_idx: int, rounds: bool, progress: bool
) -> tuple[list[Curve], dict[str, list[PlainRounding]]]:
    """The same of a run of layers, whose statistics are not kept."""
    source, config, statistics = part.search.source, part.search.config, part.observe(run_idx)
    groups = _progress(part.runs[run_idx], f"errors of {source.stack.name}", "matrix", progress)
    curves = curves_of(part.search, groups, statistics)
    return curves, round_plainly(source, statistics, config) if rounds else {}


def _scaled(
    curves: list[Curve], plain: Sequence[PlainRounding], divergence: Divergence | None, keeps: Keeps
) -> list[Curve]:
    """The curves of some matrices, in the unit of a measured divergence."""
    estimate = sum(rounding.estimate for rounding in plain)
    if divergence is None or estimate <= 0:
        return curves
    with replaced([rounding.replacement() for rounding in plain]):
        scale = divergence(keeps) / estimate
    return [replace(curve, errors=curve.errors * max(scale, 0.0)) for curve in curves]


def _spread(sizes: Sequence[int], windows: int) -> list[int]:
    """Places of evenly spread batches, of these sizes, that have about so many windows in all, or of all batches."""
    number = min(len(sizes), max(1, round(windows * len(sizes) / sum(sizes))))
    return [index * len(sizes) // number for index in range(number)]


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
    of_weights = []
    for group in first:
        with naming(f"{source.stack.name} {path_of(group)}"):
            of_weights += _fit_group(source, target, group, statistics, request)
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
    targets = [target.linear(layer, path) for layer in group.layers]
    weights = [source.weight(layer, path) for layer in group.layers]
    covariances, importance = metric_of(group, statistics) if calibrated else (None, None)
    shared = targets[0].shared
    fits = fit_group(
        weights,
        covariances,
        [linear.rank for linear in targets],
        importance=importance,
        diagonal=targets[0].diagonal is not None,
        shared=shared is not None,
        iterations=request.iterations if calibrated else 0,
        **(shared.rounding if isinstance(shared, QuantizedWeight) else {}),
    )
    biases, errors = [], []
    for index, (layer, weight, fit) in enumerate(zip(group.layers, weights, fits)):
        fit.write(targets[index])
        difference = weight - fit.weight()
        bias = source.bias(layer, path)
        if bias is not None:
            if calibrated:
                bias = bias + difference @ statistics[layer, path].mean
            biases.append(bias)
            if targets[index].own_bias is not None:
                targets[index].own_bias.copy_(bias)
        error = (difference.norm() / weight.norm()).square().item() if weight.any() else 0.0
        stack = source.stack
        errors.append(ModuleError(layer, stack.role_of(path), targets[index].rank, error, stack.name))
    if shared is not None and shared.bias is not None:
        shared.bias.copy_(torch.stack(biases).mean(0))
    return errors


def _matrices(family: Family, model: Any) -> Iterator[tuple[nn.Module, str]]:
    """What may become compact: each layer of all stacks of a model, with the path of each of its matrices."""
    for stack in family.stacks:
        for layer in stack.find(model).layers if stack.is_in(model) else ():
            yield from ((layer, path) for path in stack.of_layer(layer).modules)


def _make_linear(view: Any, family: Family) -> None:
    """Makes all matrices of the layers of a `frozen_view` linear modules, which are called."""
    if family.adapt is not None:
        family.adapt(view)
    for layer, path in _matrices(family, view):
        layer.set_submodule(path, as_linear(layer.get_submodule(path)))


def residual_like(cls: type[ResidualMixin], dense: Any, plan: Plan) -> Any:
    """A model of class `cls` in eval mode with everything that a dense one has, and components still to be written.

    Raises:
        ValueError: when the dense model has a weight that the residual one has no place for, or lacks one.
    """
    residual_class: Any = cls
    fields: dict[str, Any] = {}
    if DECODER in plan.configs:
        fields["decoder_residual_config"] = plan.configs[DECODER]
    if plan.embedding_bits:
        fields["embedding_bits"] = plan.embedding_bits
    model = residual_class(cls.config_class.from_dense_config(dense.config, plan.configs[ENCODER], **fields))
    model = model.to(device=dense.device, dtype=dense.dtype).eval()
    names = {module: name for name, module in dense.named_modules()}
    replaced, banks = set(), []
    for stack in cls.family.stacks:
        if stack.name not in plan.configs:
            continue
        view = LayerStack(stack, dense)
        prefix = names[view.owner]
        banks.append(f"{prefix}.shared.".lstrip("."))
        replaced |= {
            f"{prefix}.layers.{layer}.{path}.{name}".lstrip(".")
            for layer in range(len(view))
            for path in view.stack.modules
            for name in ("weight", "bias")
        }
    weights, own = dense.state_dict(), model.state_dict()
    if plan.embedding_bits:
        tables = [dense.get_input_embeddings(), dense.get_output_embeddings()]
        replaced |= {f"{names[table]}.weight" for table in tables if table is not None}
        path = names[tables[0]]
        banks.append(f"{path}.")
    unused = [key for key in weights if key not in own and key not in replaced]
    missing = [
        key
        for key in own
        if key not in weights
        and not key.startswith(tuple(banks))
        and key.rpartition(".")[2] not in COMPONENT_NAMES
    ]
    for problem, keys in (("has no use for", unused), ("needs", missing)):
        if keys:
            raise ValueError(
                f"`dense` must be a plain {cls.dense_class().__name__}, but {cls.__name__} {problem} the weight "
                f"{sorted(keys)[0]!r} ({len(keys)} such weights); if `dense` carries an adapter, merge it first, as "
                "with merge_and_unload()"
            )
    # A point-wise convolution that stays dense has a dimension more than the matrix that stands for it in `dense`.
    kept = {key: value.view_as(own[key]) for key, value in weights.items() if key in own}
    model.load_state_dict(kept, strict=False)
    if dense.can_generate():
        model.generation_config = copy.deepcopy(dense.generation_config)
    return model


def _load_dense(cls: type[ResidualMixin], dense: Any, dtype: Any) -> Any:
    """The dense model, loaded in this dtype where an id or a folder is given, and checked."""
    dense_class = cls.dense_class()
    refuse_adapter(dense)
    if isinstance(dense, (str, Path)):
        model_type = AutoConfig.from_pretrained(dense).to_dict()["model_type"]
        if model_type != cls.family.name:
            raise ValueError(
                f"`dense` must be a {cls.family.name} model for {cls.__name__}, {dense!r} is {model_type!r}"
            )
        dense = dense_class.from_pretrained(dense, dtype=dtype)
    if isinstance(dense, ResidualMixin):
        raise ValueError(f"`dense` must be a dense model, got a {type(dense).__name__}; merge() it first")
    if not isinstance(dense, dense_class):
        raise ValueError(
            f"`dense` must be a {dense_class.__name__} for {cls.__name__}, got {type(dense).__name__}"
        )
    stacks = [LayerStack(stack, dense) for stack in cls.family.stacks if stack.is_in(dense)]
    for source, layer in [(stack, layer) for stack in stacks for layer in range(len(stack))]:
        for path in source.stack.modules:
            linear = source.linear(layer, path)
            weight = linear.weight
            if not is_linear(linear) or not weight.is_floating_point() or is_of_torchao(weight):
                raise ValueError(
                    f"`dense` must have plain floating-point nn.Linear modules, but its {path} is "
                    f"{type(linear).__name__} with a {type(weight).__name__}; load it without quantisation or adapters "
                    "(dequantize() or merge_and_unload() may help)"
                )
            if not torch.isfinite(linear.weight).all():
                raise ValueError(
                    f"`dense` must have finite weights, but layers.{layer}.{path}.weight has NaN or infinite values"
                )
    return dense
