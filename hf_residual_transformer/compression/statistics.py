"""Real inputs through the dense encoder: statistics of what each matrix gets, and how much its outputs matter.

What is computed from them is in `conversion.py` and `budget.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ..families import Family, groups_of
from ..modeling import forward_as

INPUT_NAMES = ("input_features", "input_values")
DAMPING = 3e-2  # of the inputs' mean variance; less is nearer on speakers who were heard, more on others
IMPORTANCE_DAMPING = 1e-2  # of the mean importance of the outputs
HELD_BYTES = 1e9  # of statistics at a time; more layers than have room take another pass over the calibration
GRAM_BLOCK = 256
TINY = torch.finfo(torch.float32).tiny


class WeightedMoments:
    """First and second moments of vectors, summed in float64: float32 loses positive definiteness. How they are
    divided into batches does not matter.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.weight, self.sum, self.products = zeros(()), zeros(features), zeros(features, features)

    def add(self, vectors: Tensor, weights: Tensor) -> None:
        """Adds (number, features), each with its weight, (number,)."""
        roots = weights.double().sqrt()[:, None]
        vectors = vectors.double() * roots
        self.weight += weights.double().sum()
        self.sum += (vectors * roots).sum(0)
        add_gram(self.products, vectors)

    @property
    def mean(self) -> Tensor:
        """(features,)."""
        return self.sum / self.weight.clamp_min(TINY)

    def covariance(self) -> Tensor:
        """(features, features), not divided by the sum of the weights."""
        return self.products - torch.outer(self.sum, self.mean)


class MatrixStatistics(WeightedMoments):
    """Of a linear module's inputs `x` and of the gradients `g` at its outputs, over frames.

    What an error `E` in the matrix does to the encoder's final states is estimated as `tr(G E C Eᵀ)`: `C` is
    the covariance of the inputs, each frame weighted by `|g|²`, and `G` the second moment of the gradients,
    of trace 1. It is the Kronecker-factored Gauss-Newton approximation (K-FAC, https://arxiv.org/abs/1503.05671,
    section 3) with the norms of the gradients kept beside the inputs, so that frames count as they matter.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.gradients = torch.zeros(out_features, out_features, dtype=torch.float64, device=device)
        self.frame_weights: list[Tensor] = []  # of each batch, (num_frames,)

    @property
    def nbytes(self) -> int:
        """That it takes."""
        return self.products.nbytes + self.gradients.nbytes

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds frames, (num_frames, in_features), with the gradients at them, (num_frames, out_features)."""
        gradients = gradients.double()
        self.frame_weights.append(gradients.square().sum(1))
        self.add(inputs, self.frame_weights[-1])
        add_gram(self.gradients, gradients)

    def reorder_inputs(self, order: Tensor) -> None:
        """As if the inputs came in this order, (in_features,)."""
        self.sum, self.products = self.sum[order], self.products[order][:, order]

    def reorder_outputs(self, order: Tensor) -> None:
        """As if the outputs came in this order, (out_features,)."""
        self.gradients = self.gradients[order][:, order]


def add_gram(total: Tensor, vectors: Tensor) -> None:
    """Adds `Xᵀ X` of (number, features) to (features, features), in blocks, each of which and its mirror image are
    computed once.
    """
    for start in range(0, len(total), GRAM_BLOCK):
        end = start + GRAM_BLOCK
        total[start:end, start:].addmm_(vectors[:, start:end].T, vectors[:, start:])
        total[end:, start:end] = total[start:end, end:].T


def damp(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """Positive definite also where inputs never vary, and with fewer frames than features."""
    scale = covariance.diagonal().mean().clamp_min(TINY)
    return covariance + damping * scale * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )


def as_batches(calibration: Any) -> list[dict[str, Tensor]]:
    """Checked batches of model inputs; one batch may come without a list around it."""
    if calibration is None:
        return []
    if isinstance(calibration, (Mapping, Tensor)):
        calibration = [calibration]
    batches = []
    for index, batch in enumerate(calibration):
        batch = {"input_features": batch} if isinstance(batch, Tensor) and batch.dim() == 3 else batch
        batch = {"input_values": batch} if isinstance(batch, Tensor) else batch
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"`calibration[{index}]` must be a dict of model inputs, got {type(batch).__name__}"
            )
        batch = {key: batch[key] for key in (*INPUT_NAMES, "attention_mask") if batch.get(key) is not None}
        inputs = [batch[name] for name in INPUT_NAMES if name in batch]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise ValueError(
                f"`calibration[{index}]` must have a tensor {' or '.join(INPUT_NAMES)}, got {sorted(batch)}"
            )
        if not inputs[0].numel():
            raise ValueError(f"`calibration[{index}]` must not be empty, got shape {tuple(inputs[0].shape)}")
        if not torch.isfinite(inputs[0]).all():
            raise ValueError(f"`calibration[{index}]` must be finite, but it has NaN or infinite values")
        batches.append(batch)
    return batches


def parallel_sum(first: Tensor, second: Tensor) -> Tensor:
    """`(C_1⁻¹ + C_2⁻¹)⁻¹`, the metric in which two layers that share a matrix differ: see `fitting._fit_pair`."""
    parallel = first @ torch.linalg.solve(first + second, second)
    return (parallel + parallel.T) / 2


Statistics = dict[tuple[int, str], MatrixStatistics]  # by layer and module path


GroupSizes = dict[str, list[int | None]]  # to choose from, by module path


@dataclass(frozen=True)
class Group:
    """The layers that share the `U` of the module at `module_path`, in order; or, with size None, a single layer
    without `U`.
    """

    module_path: str
    size: int | None
    layers: tuple[int, ...]


def groups_with(sizes: GroupSizes, num_layers: int) -> list[Group]:
    """All groups that the sizes make."""
    return [
        Group(path, size, tuple(layers))
        for path, options in sizes.items()
        for size in options
        for layers in groups_of(num_layers, size or 1)
    ]


def metric_of(group: Group, statistics: Statistics) -> tuple[list[Tensor], Tensor]:
    """Damped: `C_l` of each layer, and the `G` of all."""
    entries = [statistics[layer, group.module_path] for layer in group.layers]
    return [damp(entry.covariance()) for entry in entries], importance_of(entries)


def importance_of(entries: list[MatrixStatistics]) -> Tensor:
    """Damped `G`, (out_features, out_features), over all frames of these matrices."""
    gradients = torch.stack([entry.gradients for entry in entries]).sum(0)
    weight = torch.stack([entry.weight for entry in entries]).sum()
    return damp(gradients / weight.clamp_min(TINY), IMPORTANCE_DAMPING)


Prepare = Callable[[list[Group], Statistics], None]


@dataclass
class Sweep:
    """Iterates over the groups, with the statistics of their matrices in the dense model, by layer and module
    path, as many layers at a time as `HELD_BYTES` have room for, but whole groups.

    Without batches there are no statistics. What fits at once is kept for the next iteration; of several runs of
    layers, each one's statistics are emptied when the next are asked for.

    Args:
        groups: what the layers share.
        batches: inputs of the dense model.
        seed: of the probes.
        prepare: what is done to each run's statistics before they are seen.
    """

    family: Family
    dense: Any
    groups: list[Group]
    batches: list[dict[str, Tensor]]
    progress: bool = True
    seed: int = 0
    prepare: Prepare | None = None
    _kept: list[tuple[Statistics, list[Group]]] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[tuple[Statistics, list[Group]]]:
        if self._kept or not self.batches:
            yield from self._kept or [({}, self.groups)]
            return
        runs = list(self._runs())
        bar = tqdm(
            total=len(runs) * len(self.batches), desc="calibrating", unit="batch", disable=not self.progress
        )
        with bar:
            for run in runs:
                groups = [group for group in self.groups if group.layers[0] in run]
                statistics = self._collect(run, groups, bar)
                if self.prepare is not None:
                    self.prepare(groups, statistics)
                if len(runs) == 1:
                    self._kept.append((statistics, groups))
                yield statistics, groups
                if len(runs) > 1:
                    statistics.clear()  # whoever iterates still has them while the next are collected

    def over(self, groups: list[Group]) -> Sweep:
        """The same over other groups of the same matrices, with what this one has kept."""
        sweep = replace(self, groups=groups)
        sweep._kept = [(statistics, groups) for statistics, _ in self._kept]
        return sweep

    def _runs(self) -> Iterator[range]:
        """Runs of layers that no group straddles."""
        num_layers = len(self.family.find_encoder(self.dense).layers)
        inner = {layer for group in self.groups for layer in group.layers[1:]}
        size = [0.0] * num_layers
        for layer, path in {(layer, group.module_path) for group in self.groups for layer in group.layers}:
            size[layer] += self._new(layer, path, torch.device("meta")).nbytes
        start, held, last = 0, 0.0, 0  # `last`: where the newest run that no group straddles starts
        for layer in range(num_layers):
            if layer not in inner:
                last = layer
            held += size[layer]
            if held > HELD_BYTES and last > start:
                yield range(start, last)
                start, held = last, sum(size[last : layer + 1])
        yield range(start, num_layers)

    def _new(self, layer: int, path: str, device: torch.device) -> MatrixStatistics:
        linear = self.family.find_encoder(self.dense).layers[layer].get_submodule(path)
        return MatrixStatistics(linear.out_features, linear.in_features, device)

    def _collect(self, run: range, groups: list[Group], bar: Any) -> Statistics:
        """One pass over the batches, with a probe at the final states of each window."""
        encoder = self.family.find_encoder(self.dense)
        statistics = {
            (layer, group.module_path): self._new(layer, group.module_path, self.dense.device)
            for group in groups
            for layer in group.layers
        }
        generator = torch.Generator().manual_seed(self.seed)
        for batch in self.batches:
            batch = to_model(self.dense, batch)
            with _watching(encoder, run, statistics) as watched:
                final = _final_states(self.dense, encoder, batch)
                # One window at a time, so that the batch size changes nothing.
                probe = torch.stack([torch.randn(final.shape[1:], generator=generator) for _ in final]).to(
                    final
                )
                mask = frame_mask(self.dense, final, batch)
                if mask is not None:
                    probe = probe * mask.unsqueeze(-1)
                torch.autograd.grad((final * probe).sum(), watched)
            bar.update()
        return statistics


@contextmanager
def _watching(encoder: Any, run: range, statistics: Statistics) -> Iterator[list[Tensor]]:
    """Inside, a forward and a backward pass add to `statistics`. The list gets the input of the run's first layer,
    where the backward pass may end. Of each layer after the run, which may be many, its input alone is kept, and the
    rest computed again.
    """
    start: list[Tensor] = []

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        torch.set_grad_enabled(True)  # from here on, until the context below ends
        hidden_states = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        start.append(hidden_states)
        return (
            ((hidden_states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden_states})
        )

    def watch(entry: MatrixStatistics) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = args[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: entry.update(inputs, gradient.flatten(0, -2)))

        return hook

    handles = [encoder.layers[run[0]].register_forward_pre_hook(begin, with_kwargs=True)]
    for (layer, path), entry in statistics.items():
        handles.append(encoder.layers[layer].get_submodule(path).register_forward_hook(watch(entry)))
    try:
        with torch.no_grad(), ExitStack() as stack:
            for layer in encoder.layers[run[-1] + 1 :]:
                again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
                stack.enter_context(forward_as(layer, again))
            yield start
    finally:
        for handle in handles:
            handle.remove()


def to_model(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch where the model is, in its dtype."""
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.items()
    }


class Reached(Exception):
    """Ends a forward pass where all that is wanted is known."""


def _final_states(dense: Any, encoder: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The encoder's output for a batch, (batch_size, frames, hidden_size); what comes after it is not run."""
    states: list[Tensor] = []

    def catch(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(output[0])
        raise Reached

    handle = encoder.register_forward_hook(catch)
    try:
        dense(**batch)
    except Reached:
        pass
    finally:
        handle.remove()
    return states[0]


def frame_mask(dense: Any, hidden_states: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    """(batch, frames), False where frames are padding; None where the family does not mask."""
    if "attention_mask" not in batch or not hasattr(dense, "_get_feature_vector_attention_mask"):
        return None
    mask = dense._get_feature_vector_attention_mask(
        hidden_states.shape[1], batch["attention_mask"], add_adapter=False
    )
    return mask.bool()
