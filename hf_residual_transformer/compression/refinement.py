"""Layer by layer: what each layer has of its own, fitted again to what the compressed encoder really produces.

`conversion.fit_group` fits every matrix to inputs of the dense encoder. In the compressed one, inputs carry the errors
of all matrices before. Here hidden states of both go through the encoder side by side, and each matrix is fitted to
give the dense one's outputs from the compressed one's inputs; what writes to the residual stream also takes back what
the stream lacks by then. `U` is fitted again where a group begins, and then stays. Fitting on inputs of the compressed
model is known from GPTQ (https://arxiv.org/abs/2210.17323) and SVD-LLM (https://arxiv.org/abs/2403.07378, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, role_of
from ..layers import ResidualLinear
from ..reporting import ModuleError
from .fitting import fit_group
from .statistics import (
    TINY,
    MatrixStatistics,
    Reached,
    Statistics,
    WeightedMoments,
    damp,
    importance_of,
    to_model,
)

RIDGE = 0.1  # of the mean variance of the inputs, towards the dense weight
Calls = dict[str, tuple[Tensor, Tensor]]  # what each module of a layer got and gave, by path
Context = tuple[tuple[Any, ...], dict[str, Any]]  # what layers get beside hidden states


class CrossMoments(WeightedMoments):
    """Of inputs `x`, and of the outputs `y` that are wanted for them."""

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.wanted_sum = torch.zeros(out_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(out_features, in_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add_pairs(self, inputs: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Adds (number, in_features) with (number, out_features), each with its weight, (number,)."""
        self.add(inputs, weights)
        wanted = wanted.double()
        weighted = wanted * weights[:, None]
        self.wanted_sum += weighted.sum(0)
        self.cross.addmm_(weighted.T, inputs.double())
        self.squares += (weighted * wanted).sum()

    @property
    def wanted_mean(self) -> Tensor:
        """(out_features,)."""
        return self.wanted_sum / self.weight.clamp_min(TINY)

    def about(self, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """`Σ y xᵀ` and `Σ x xᵀ`, for `y` with `offset` taken away, or with both about their means."""
        if offset is not None:
            return self.cross - torch.outer(offset, self.sum), self.products
        return self.cross - torch.outer(self.wanted_sum, self.mean), self.covariance()

    def relative_error(self, weight: Tensor) -> float:
        """Variance of `y - W x` relative to that of `y`."""
        cross, covariance = self.about(None)
        variance = self.squares - self.wanted_sum @ self.wanted_mean
        left = variance - 2 * (weight * cross).sum() + ((weight @ covariance) * weight).sum()
        return (left.clamp_min(0) / variance.clamp_min(TINY)).item()


class Streams:
    """Hidden states of the dense and the residual encoder over the calibration, at the layer that is next.

    Args:
        model: the residual model, with all that the dense one has before its first encoder layer.
        batches: inputs of both.
    """

    def __init__(self, family: Family, dense: Any, model: Any, batches: list[dict[str, Tensor]]) -> None:
        self.family = family
        self.layers = list(zip(family.find_encoder(dense).layers, family.find_encoder(model).layers))
        self.post_norm = isinstance(family.find_encoder(dense), family.post_norm)
        first = [_first_call(dense, self.layers[0][0], to_model(dense, batch)) for batch in batches]
        self.contexts = [context for _, context in first]
        self.dense = [hidden_states for hidden_states, _ in first]
        self.residual = list(self.dense)

    def advance(
        self, layer_idx: int, statistics: Statistics, fit: bool, iterations: int
    ) -> list[ModuleError]:
        """Takes both through a layer, and returns the errors of its matrices' outputs.

        Args:
            layer_idx: the layer, one after the other.
            statistics: of this layer's matrices in the dense model.
            fit: whether to fit what the layer has of its own.
            iterations: rounds of alternation between `B A` and `D`.
        """
        source, target = self.layers[layer_idx]
        modules = self.family.modules
        given = [
            _calls(source, states, context, modules) for states, context in zip(self.dense, self.contexts)
        ]
        errors = []
        for index, stage in enumerate(self.family.stages):
            paths = [path for path in stage if isinstance(target.get_submodule(path), ResidualLinear)]
            if not paths:
                continue
            entries = {path: statistics[layer_idx, path] for path in paths}
            moments = self._moments(target, index, entries, [calls for calls, _ in given])
            for path, found in moments.items():
                linear: Any = target.get_submodule(path)
                if fit:
                    self._fit(layer_idx, path, found, statistics, iterations)
                error = found.relative_error(linear.merged_weight().double())
                errors.append(ModuleError(layer_idx, role_of(path), linear.rank, error))
        self.dense = [output for _, output in given]
        if layer_idx + 1 < len(self.layers):
            self.residual = [
                _calls(target, states, context, ())[1]
                for states, context in zip(self.residual, self.contexts)
            ]
        return errors

    def _moments(
        self, target: nn.Module, index: int, entries: dict[str, MatrixStatistics], given: list[Calls]
    ) -> dict[str, CrossMoments]:
        """Of a stage's matrices: what the residual layer gives them now, and what they should give."""
        moments = {}
        for path, entry in entries.items():
            out_features, in_features = len(entry.gradients), len(entry.sum)
            moments[path] = CrossMoments(out_features, in_features, entry.sum.device)
        upto = self.family.modules[: self.family.modules.index(self.family.stages[index][-1]) + 1]
        for batch_idx, (states, context) in enumerate(zip(self.residual, self.contexts)):
            found, _ = _calls(target, states, context, upto, whole=False)
            lacking: Tensor | float = 0.0
            if index % 2:  # it writes to the residual stream
                stream = self._stream(index, self.dense[batch_idx], given[batch_idx]).float()
                lacking = stream - self._stream(index, states, found).float()
            for path, entry in entries.items():
                wanted = given[batch_idx][path][1] + lacking
                weights = entry.frame_weights[batch_idx]
                moments[path].add_pairs(found[path][0].flatten(0, -2), wanted.flatten(0, -2), weights)
        return moments

    def _fit(
        self, layer_idx: int, path: str, found: CrossMoments, statistics: Statistics, iterations: int
    ) -> None:
        """The best components and bias of one matrix: first without limit of rank, by ridge regression around the dense
        weight, and from that as any matrix is fitted. The first layer of a group fits `U` again, together with those
        that follow, whose inputs are still the dense encoder's; these keep it when it is their turn.
        """
        source, linear = (layer.get_submodule(path) for layer in self.layers[layer_idx])
        shared_bias = linear.merged_bias() if linear.bias is None else None
        cross, products = found.about(None if shared_bias is None else shared_bias.double())
        weight = source.weight.double()
        missing = cross - weight @ products
        weight = weight + torch.linalg.solve(damp(products, RIDGE), missing.T).T
        shared, members = linear.shared, [layer_idx]
        others = [target.get_submodule(path).shared for _, target in self.layers]
        begins = shared is not None and others.index(shared) == layer_idx
        if begins:
            members = [index for index, other in enumerate(others) if other is shared]
        elif shared is not None:
            weight = weight - shared.weight.double()
        following = members[1:]
        fits = fit_group(
            [weight, *(self.layers[index][0].get_submodule(path).weight.double() for index in following)],
            [damp(products), *(damp(statistics[index, path].covariance()) for index in following)],
            [self.layers[index][1].get_submodule(path).rank for index in members],
            importance=importance_of([statistics[index, path] for index in members]),
            diagonal=linear.diagonal is not None,
            shared=begins,
            bits=shared.bits if begins else None,
            iterations=iterations,
        )
        for index, fitted in zip(members, fits):
            fitted.write(self.layers[index][1].get_submodule(path))
        if linear.bias is not None:
            linear.bias.copy_(found.wanted_mean - linear.merged_weight().double() @ found.mean)

    def _stream(self, index: int, hidden_states: Tensor, calls: Calls) -> Tensor:
        """What the outputs of a stage that writes are added to, in a layer that gets `hidden_states`."""
        _, (attention,), (reader, *_), _ = self.family.stages
        if index == 1:
            return hidden_states
        return calls[reader][0] if self.post_norm else hidden_states + calls[attention][1]


def _first_call(model: Any, layer: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Context]:
    """What `layer` gets for a batch: hidden states, and the rest. What comes after it is not run."""
    seen: list[tuple[Tensor, Context]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            seen.append((args[0], (args[1:], kwargs)))
        else:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            seen.append((kwargs["hidden_states"], ((), rest)))
        raise Reached

    _run_until_reached(lambda: model(**batch), [layer.register_forward_pre_hook(catch, with_kwargs=True)])
    return seen[0]


def _calls(
    layer: nn.Module, hidden_states: Tensor, context: Context, paths: tuple[str, ...], whole: bool = True
) -> tuple[Calls, Tensor]:
    """What the modules at `paths` got and gave, and the output of the layer; unless `whole`, it runs up to the last
    of them, and the output is the hidden states that it got.
    """
    calls: Calls = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls[path] = args[0], output
            if not whole and path == paths[-1]:
                raise Reached

        return hook

    args, kwargs = context
    handles = [layer.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    output = _run_until_reached(lambda: layer(hidden_states, *args, **kwargs), handles)
    if output is None:
        return calls, hidden_states
    return calls, output[0] if isinstance(output, tuple) else output


def _run_until_reached(run: Callable[[], Any], handles: list[Any]) -> Any:
    """What `run` returns, or None where a hook ended it; removes the hooks."""
    try:
        return run()
    except Reached:
        return None
    finally:
        for handle in handles:
            handle.remove()
