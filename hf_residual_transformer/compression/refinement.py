"""Step 5: layer by layer, the components are fitted again, to the inputs that the compressed stack really produces.

`fitting.fit_group` fits every matrix to inputs of the dense model. In the compressed one, inputs carry the errors of
all matrices before. Here hidden states of both models go through the stack side by side, and each matrix is fitted to
give the dense model's outputs from the compressed model's inputs. A matrix that writes to the residual stream also
corrects the error that the stream has by then. `U` is fitted again at the first layer of its group, and then stays.
GPTQ (https://arxiv.org/abs/2210.17323) and SVD-LLM (https://arxiv.org/abs/2403.07378, section 3.3) also fit on inputs
of the compressed model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Block, LayerStack, Stage
from ..layers import QuantizedWeight, ResidualLinear, at_least_float32, rows_last, unpacked_weights
from ..modeling import forward_as
from ..reporting import ModuleError
from .fitting import fit_group, naming
from .inputs import Batch, Context, Reached, calls_of, inputs_of, run_until_reached, without_memory
from .processes import ALONE, Processes
from .statistics import ROUNDING, TINY, MatrixStatistics, Statistics, WeightedMoments, Weights, importance_of

RIDGE = 0.1  # of the mean variance of the inputs, towards the dense weight
# Inputs and outputs of each module of a layer, by path. A module at which the layer ends has no output.
Calls = dict[str, tuple[Tensor, Any]]
# By path of a branch's module: its output, and the call of its writer. Such a branch need not run again.
Finished = dict[str, tuple[Any, Calls]]


class CrossMoments(WeightedMoments):
    """Moments of inputs `x` together with the outputs `y` that are wanted for them."""

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.wanted_sum = torch.zeros(out_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(out_features, in_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add_pairs(self, inputs: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Adds (number, in_features) with (number, out_features), each with its weight, (number,)."""
        of_batch = Weights(weights)
        inputs, mean = self._add(inputs, of_batch)
        self.squares += of_batch.weights @ at_least_float32(wanted).square().sum(1, dtype=torch.float64)
        wanted, total, _ = of_batch.about_mean(wanted)
        self.wanted_sum += total
        self.cross += (wanted.T @ inputs.to(wanted)).double() * of_batch.scale
        self.cross.addr_(total, mean)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.wanted_sum, self.cross, self.squares]

    @property
    def wanted_mean(self) -> Tensor:
        """(out_features,)."""
        return self.wanted_sum / self.weight.clamp_min(TINY)

    def about(self, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """`Σ (y - offset) xᵀ` and `Σ x xᵀ`; without an offset, the same of `y` and `x` about their means."""
        if offset is not None:
            return self.cross - torch.outer(offset, self.sum), self.products
        cross = self.cross - torch.outer(self.wanted_sum, self.mean)
        cross[:, self.constant()] = 0.0
        return cross, self.covariance()

    def relative_error(self, weight: Tensor, *, centred: bool) -> float:
        """Squared error of `W x` relative to the squares of `y`; both about their means if `centred`."""
        cross, products = (self.cross, self.products) if not centred else self.about(None)
        total = self.squares - (self.wanted_sum @ self.wanted_mean if centred else 0.0)
        if total <= ROUNDING * self.squares:
            return 0.0  # there is no relative error of outputs that never vary, as of a pruned matrix
        left = total - 2 * (weight * cross).sum() + ((weight @ products) * weight).sum()
        return (left.clamp_min(0) / total.clamp_min(TINY)).item()


class Streams:
    """Hidden states of the dense and of the residual model over the calibration, at the layer that comes next.

    Args:
        dense: the dense stack.
        residual: the same stack of the residual model, in which everything that comes before the stack is fitted.
        models: both models, in this order.
        batches: inputs of both that this process runs.
        processes: those that run the others.
        unpacks: whether there is memory for the matrices of the residual model's encoder in full, which is faster.
    """

    def __init__(
        self,
        dense: LayerStack,
        residual: LayerStack,
        models: tuple[Any, Any],
        batches: Sequence[Batch],
        processes: Processes = ALONE,
        *,
        unpacks: bool = True,
    ) -> None:
        self.source, self.target, self.processes = dense, residual, processes
        same = dense.stack.same_arguments
        # The batches of a decoder go through the whole encoder. Those of an encoder end before its layers.
        encoder = models[1].family.find_encoder(models[1])
        with nullcontext() if encoder is residual.owner or not unpacks else unpacked_weights(encoder):
            first = [
                [
                    calls_of(model, list(stack.layers), inputs_of(model, batch), same_arguments=same)
                    for batch in inputs
                ]
                for stack, model, inputs in (
                    (dense, models[0], batches),
                    (residual, models[1], [without_memory(batch) for batch in batches]),
                )
            ]
        # By batch and layer. A decoder's contexts hold the final states of its own model's encoder.
        self.dense_contexts, self.residual_contexts = ([context for _, context in calls] for calls in first)
        self.dense_states, self.residual_states = ([states for states, _ in calls] for calls in first)

    def advance(
        self, layer_idx: int, statistics: Statistics, fit: bool, iterations: int
    ) -> list[ModuleError]:
        """Takes both models through a layer, and returns the errors of the outputs of its matrices.

        Args:
            layer_idx: index of the layer; layers follow one after the other.
            statistics: of the matrices of this layer in the dense model.
            fit: whether to fit the layer's components.
            iterations: rounds of alternation between `B A` and `D`.
        """
        source, target = self.source.layers[layer_idx], self.target.layers[layer_idx]
        modules = self.source.stack.modules
        given = [
            _calls(source, states, contexts[layer_idx], modules)
            for states, contexts in zip(self.dense_states, self.dense_contexts)
        ]
        errors = []
        finished: list[Finished] = [{} for _ in self.residual_states]
        for stage in self.source.stack.stages:
            paths = [path for path in stage.paths if isinstance(target.get_submodule(path), ResidualLinear)]
            if not paths:
                continue
            entries = {path: statistics[layer_idx, path] for path in paths}
            with unpacked_weights(target):  # once for all batches
                moments = self._moments(layer_idx, stage, entries, [calls for calls, _ in given], finished)
            for path, found in moments.items():
                linear: Any = target.get_submodule(path)
                if fit:
                    with naming(f"{self.source.stack.name} layers.{layer_idx}.{path}"):
                        self._fit(layer_idx, path, found, statistics, iterations)
                error = found.relative_error(linear.weight.double(), centred=entries[path].centred)
                stack = self.source.stack
                errors.append(ModuleError(layer_idx, stack.role_of(path), linear.rank, error, stack.name))
        self.dense_states = [output for _, output in given]
        if layer_idx + 1 < len(self.source):
            with unpacked_weights(target):
                self.residual_states = [
                    _calls(target, states, contexts[layer_idx], (), finished=of_batch)[1]
                    for states, contexts, of_batch in zip(
                        self.residual_states, self.residual_contexts, finished
                    )
                ]
        return errors

    def _moments(
        self,
        layer_idx: int,
        stage: Stage,
        entries: dict[str, MatrixStatistics],
        given: list[Calls],
        finished: list[Finished],
    ) -> dict[str, CrossMoments]:
        """For the matrices of a stage: the inputs that the residual layer gives them, and the outputs they should
        give. Branches before that of the stage are fitted; they run once, and become `finished`.
        """
        moments = {}
        for path, entry in entries.items():
            out_features, in_features = len(entry.gradients), len(entry.sum)
            moments[path] = CrossMoments(out_features, in_features, entry.sum.device)
        modules = self.source.stack.modules
        upto = modules[: modules.index(stage.paths[-1]) + 1]
        blocks, target = self.source.stack.blocks, self.target.layers[layer_idx]
        block, before = blocks[stage.block_idx], blocks[: stage.block_idx]
        for batch_idx, (states, contexts) in enumerate(zip(self.residual_states, self.residual_contexts)):
            found, _ = _calls(
                target,
                states,
                contexts[layer_idx],
                upto,
                whole=False,
                finished=finished[batch_idx],
                finishes=[other for other in before if other.module],
            )
            lacking: Tensor | float = 0.0
            if stage.writes:
                stream = self._stream(stage, self.dense_states[batch_idx], given[batch_idx]).float()
                lacking = (stream - self._stream(stage, states, found).float()) * block.keep / block.scale
            for path, entry in entries.items():
                wanted = given[batch_idx][path][1] + lacking
                weights = entry.frame_weights[batch_idx]
                if weights.any():  # or else these frames were not observed
                    moments[path].add_pairs(found[path][0].flatten(0, -2), wanted.flatten(0, -2), weights)
        self.processes.total(total for entry in moments.values() for total in entry.sums())
        return moments

    def _fit(
        self, layer_idx: int, path: str, found: CrossMoments, statistics: Statistics, iterations: int
    ) -> None:
        """Fits the components and the bias of one matrix.

        The best matrix without a limit of rank comes first, by ridge regression around the dense weight; it is then
        fitted as any matrix is. The first layer of a group fits `U` again, together with the layers that follow, whose
        inputs are still those of the dense model. These keep `U` when it is their turn.
        """
        linear = self.target.linear(layer_idx, path)
        own_bias = linear.own_bias
        offset = None  # of the outputs, which the matrix cannot change
        if own_bias is None and not statistics[layer_idx, path].centred:
            offset = torch.zeros_like(found.wanted_sum)
        elif own_bias is None and linear.bias is not None:
            offset = linear.bias.double()
        cross, products = found.about(offset)
        weight = self.source.weight(layer_idx, path)
        missing = cross - weight @ products
        root = torch.linalg.cholesky(found.damped(products, RIDGE))
        weight = weight + torch.cholesky_solve(missing.T, root).T
        shared, members = linear.shared, [layer_idx]
        others = [self.target.linear(index, path).shared for index in range(len(self.target))]
        begins = shared is not None and others.index(shared) == layer_idx
        if begins:
            members = [index for index, other in enumerate(others) if other is shared]
        elif shared is not None:
            weight = weight - shared.weight.double()
        following = members[1:]
        fits = fit_group(
            [weight, *(self.source.weight(index, path) for index in following)],
            [found.damped(products), *(statistics[index, path].metric() for index in following)],
            [self.target.linear(index, path).rank for index in members],
            importance=importance_of([statistics[index, path] for index in members]),
            diagonal=linear.diagonal is not None,
            shared=begins,
            iterations=iterations,
            **(shared.rounding if begins and isinstance(shared, QuantizedWeight) else {}),
        )
        for index, fitted in zip(members, fits):
            fitted.write(self.target.linear(index, path))
        if own_bias is not None:
            own_bias.copy_(found.wanted_mean - linear.weight.double() @ found.mean)

    def _stream(self, stage: Stage, hidden_states: Tensor, calls: Calls) -> Tensor:
        """The residual stream that a stage adds its output to, in a layer that gets `hidden_states`."""
        blocks = self.source.stack.blocks
        if stage.block_idx == 0:
            return hidden_states
        if self.source.is_post_norm:
            return calls[blocks[stage.block_idx].readers[0]][0]
        for block in blocks[: stage.block_idx]:
            hidden_states = block.keep * hidden_states + block.scale * calls[block.writer][1]
        return hidden_states


def _calls(
    layer: nn.Module,
    hidden_states: Tensor,
    context: Context,
    paths: tuple[str, ...],
    *,
    whole: bool = True,
    finished: Finished | None = None,
    finishes: Sequence[Block] = (),
) -> tuple[Calls, Tensor]:
    """Inputs and outputs of the modules at `paths`, and the output of the layer.

    Args:
        layer: the layer that runs.
        hidden_states: what it gets.
        context: its other arguments.
        paths: the modules that are watched. In a branch that is finished, only the writer is.
        whole: whether the layer runs to its end, and not only up to the last of these modules, which then does not run.
            If not, the output is `hidden_states`.
        finished: branches that do not run, since their outputs are known.
        finishes: branches that become finished by this run.
    """
    finished = {} if finished is None else finished
    calls: Calls = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls[path] = rows_last(module, args[0]), rows_last(module, output)

        return hook

    def end(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[paths[-1]] = rows_last(module, args[0]), None
        raise Reached

    def given(output: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: output

    def finish(block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            finished[block.module] = output, {block.writer: calls[block.writer]}

        return hook

    args, kwargs = context
    known = dict(finished)
    watched = paths if whole else paths[:-1]
    handles = [layer.get_submodule(path).register_forward_hook(watch(path)) for path in watched]
    if not whole:
        handles.append(layer.get_submodule(paths[-1]).register_forward_pre_hook(end))
    for block in finishes:
        if block.module not in known:
            handles.append(layer.get_submodule(block.module).register_forward_hook(finish(block)))
    with ExitStack() as skipped:
        for path, (output, of_writer) in known.items():
            skipped.enter_context(forward_as(layer.get_submodule(path), given(output)))
            calls |= of_writer
        result = run_until_reached(lambda: layer(hidden_states, *args, **kwargs), handles)
    if result is None:
        return calls, hidden_states
    return calls, result[0] if isinstance(result, tuple) else result
