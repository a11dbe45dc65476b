"""Step 1: statistics of real inputs to each matrix of the dense model, and of how much errors in its outputs matter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from ..families import LayerStack
from ..layers import at_least_float32, rows_last
from ..modeling import forward_as
from ..quantization import ROWS
from .inputs import MEMORY, Batch, decoder_ids, is_token, main_input, mask_of, output_of, to_model
from .processes import ALONE, Processes

DAMPING = 3e-2  # of the inputs' mean variance; less is nearer on speakers who were heard, more on others
# Where few vectors stand for many features, a covariance is damped by so much of the features for each vector.
SHRINKAGE = 0.2
IMPORTANCE_DAMPING = 1e-2  # of the mean importance of the outputs
HELD_BYTES = (
    1e9  # most bytes of statistics at a time; layers beyond it take another pass over the calibration
)
GRAM_BLOCK = 256
TINY = torch.finfo(torch.float32).tiny
ROUNDING = 1e-13  # relative to squares, some times the rounding of differences in float32
# Of inputs that are always zero, as of a pruned matrix. With less, float32 would round to zero.
LEAST_SCALE = 1e-20


class Weights:
    """The weights of the vectors of one batch.

    Args:
        weights: none negative, (number,).
    """

    def __init__(self, weights: Tensor) -> None:
        weights = weights.double()
        self.sum, self.squares = weights.sum(), weights.square().sum()
        # Roots are relative to that of the largest weight, so that float32 holds the products of any gradients.
        self.scale = torch.cat([weights, weights.new_tensor([TINY])]).max()
        self.weights, self.roots = weights, (weights / self.scale).sqrt()

    def about_mean(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For vectors, (number, features): these about their mean, times the root of the weight relative to `scale`;
        their weighted sum, (features,), and their mean, (features,), in float64.
        """
        vectors = at_least_float32(vectors)
        total = self.weights @ vectors.double()
        mean = total / self.sum.clamp_min(TINY)
        return (vectors - mean.to(vectors)) * self.roots.to(vectors)[:, None], total, mean


class WeightedMoments:
    """First and second moments of vectors.

    Products within a batch are computed in the dtype of its vectors, or float32 if that is finer, about the batch's
    mean: far from the mean, float32 would lose positive definiteness. The sums over batches are in float64. But for
    rounding, they do not depend on how the vectors are divided into batches.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.weight, self.sum, self.products = zeros(()), zeros(features), zeros(features, features)
        self.squared_weight = zeros(())

    def add(self, vectors: Tensor, weights: Tensor) -> None:
        """Adds vectors, (number, features), each with its weight, (number,)."""
        self._add(vectors, Weights(weights))

    def _add(self, vectors: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Adds vectors. Returns them about their mean, as `Weights.about_mean` does, and this mean."""
        self.weight += weights.sum
        self.squared_weight += weights.squares
        found, total, mean = weights.about_mean(vectors)
        self.sum += total
        add_gram(self.products, found, weights.scale)
        self.products.addr_(total, mean)
        return found, mean

    def sums(self) -> list[Tensor]:
        """Everything that is summed over vectors."""
        return [self.weight, self.squared_weight, self.sum, self.products]

    def damped(self, covariance: Tensor, least: float = DAMPING) -> Tensor:
        """A covariance of these vectors, damped by `least`, or more where their effective number is small.

        Some tokens of a decoder matter so much more than others that thousands weigh as a hundred. Without this, errors
        are pushed into directions that only other recordings have.
        """
        number = self.weight.square() / self.squared_weight.clamp_min(TINY)
        return damp(covariance, max(least, SHRINKAGE * len(covariance) / max(number.item(), 1.0)))

    @property
    def mean(self) -> Tensor:
        """The weighted mean, (features,)."""
        return self.sum / self.weight.clamp_min(TINY)

    def covariance(self) -> Tensor:
        """The covariance times the sum of the weights, (features, features)."""
        found = self.products - torch.outer(self.sum, self.mean)
        constant = self.constant()
        found[constant] = found[:, constant] = 0.0  # what is left is rounding, and may be negative
        return found

    def constant(self) -> Tensor:
        """Which features never vary, (features,), as after a normalisation whose weights are zero."""
        squares = self.products.diagonal()
        return squares - self.sum * self.mean <= ROUNDING * squares


class MatrixStatistics(WeightedMoments):
    """Statistics, over frames, of a linear module's inputs `x` and of the gradients `g` at its outputs.

    An error `E` in the matrix changes the objective (the logits, or an encoder's final states) by about
    `tr(G E C Eᵀ)`. `C` is the covariance of the inputs, in which each frame has the weight `|g|²`, and `G` is the
    second moment of the gradients, of trace 1.
    This is the Kronecker-factored Gauss-Newton approximation (K-FAC, https://arxiv.org/abs/1503.05671, section 3)
    with the norms of the gradients kept beside the inputs, so that important frames count more.

    Args:
        out_features: number of outputs.
        in_features: number of inputs.
        device: where the sums are kept.
        centred: whether something absorbs a constant error of the outputs, such as a bias. If not, `C` is the second
            moment about zero.
    """

    def __init__(
        self, out_features: int, in_features: int, device: torch.device, *, centred: bool = True
    ) -> None:
        super().__init__(in_features, device)
        self.centred = centred
        self.gradients = torch.zeros(out_features, out_features, dtype=torch.float64, device=device)
        self.frame_weights: list[Tensor] = []  # for each batch, (num_frames,)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.gradients]

    @property
    def nbytes(self) -> int:
        """Bytes held by the two matrices."""
        return self.products.nbytes + self.gradients.nbytes

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds frames, (num_frames, in_features), with the gradients at them, (num_frames, out_features)."""
        self.frame_weights.append(gradients.double().square().sum(1))
        weights = Weights(self.frame_weights[-1])
        self._add(inputs, weights)
        gradients = at_least_float32(gradients)
        add_gram(self.gradients, gradients / weights.scale.sqrt().to(gradients), weights.scale)

    def metric(self) -> Tensor:
        """`C` times the sum of the weights, damped to be positive definite, (in_features, in_features)."""
        return self.damped(self.covariance() if self.centred else self.products)

    def reorder_inputs(self, order: Tensor) -> None:
        """Gives the statistics that the inputs would have in this order, (in_features,)."""
        self.sum, self.products = self.sum[order], self.products[order][:, order]

    def reorder_outputs(self, order: Tensor) -> None:
        """Gives the statistics that the outputs would have in this order, (out_features,)."""
        self.gradients = self.gradients[order][:, order]


def add_gram(total: Tensor, vectors: Tensor, scale: Tensor) -> None:
    """Adds `scale Xᵀ X` of vectors, (number, features), to `total`, (features, features), which is symmetric.

    Each pair of mirrored blocks is computed once.
    """
    for start in range(0, len(total), GRAM_BLOCK):
        end = start + GRAM_BLOCK
        total[start:end, start:] += (vectors[:, start:end].T @ vectors[:, start:]).double() * scale
        total[end:, start:end] = total[start:end, end:].T


def damp(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """A positive definite matrix also where inputs never vary, or where there are fewer frames than features."""
    scale = covariance.diagonal().mean().clamp_min(LEAST_SCALE)
    return covariance + damping * scale * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )


def parallel_sum(first: Tensor, second: Tensor) -> Tensor:
    """`(C_1⁻¹ + C_2⁻¹)⁻¹`, the metric in which two layers that share a matrix differ: see `fitting._fit_pair`."""
    parallel = first @ torch.linalg.solve(first + second, second)
    return (parallel + parallel.T) / 2


Statistics = dict[tuple[int, str], MatrixStatistics]  # by layer and module path


@dataclass(frozen=True)
class Group:
    """Layers of a stack that share the `U` of the module at `module_path`, in order; with size None, a layer without
    `U`.
    """

    module_path: str
    size: int | None
    layers: tuple[int, ...]
    stack: str = "encoder"


def metric_of(group: Group, statistics: Statistics) -> tuple[list[Tensor], Tensor]:
    """The damped `C_l` of each layer of a group, and the damped `G` of the whole group."""
    entries = [statistics[layer, group.module_path] for layer in group.layers]
    return [entry.metric() for entry in entries], importance_of(entries)


def importance_of(entries: list[MatrixStatistics]) -> Tensor:
    """The damped `G` over all frames of these matrices, (out_features, out_features)."""
    gradients = torch.stack([entry.gradients for entry in entries]).sum(0)
    weight = torch.stack([entry.weight for entry in entries]).sum()
    return damp(gradients / weight.clamp_min(TINY), IMPORTANCE_DAMPING)


def runs_of_layers(source: LayerStack, groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in runs of adjacent layers whose statistics take at most `HELD_BYTES`.

    A group is never divided, so a run may be larger where a single group is.
    """
    inner = {layer for group in groups for layer in range(group.layers[0] + 1, group.layers[-1] + 1)}
    size = [0.0] * len(source)
    for layer, path in {(layer, group.module_path) for group in groups for layer in group.layers}:
        size[layer] += _new(source, layer, path, torch.device("meta")).nbytes
    starts, held, last = [0], 0.0, 0  # `last` is the newest layer at which a run may begin
    for layer in range(len(source)):
        if layer not in inner:
            last = layer
        held += size[layer]
        if held > HELD_BYTES and last > starts[-1]:
            starts.append(last)
            held = sum(size[last : layer + 1])
    ends = [*starts[1:], len(source)]
    return [[g for g in groups if start <= g.layers[0] < end] for start, end in zip(starts, ends)]


class EmbeddingStatistics(WeightedMoments):
    """Statistics of a token embedding that is tied to the output: the states `h` that become logits, how much the logit
    of each token matters, and the gradients at the vectors that are looked up.

    An error `E` of the table changes the logits by `E h`. To second order, the divergence of the token distributions
    grows by half of `sum_v p_v (1 - p_v) (E_v h)²` for independent errors, `p` being the distribution.

    Args:
        num_tokens: rows of the table.
        hidden_size: its columns.
        device: where the sums are kept.
    """

    def __init__(self, num_tokens: int, hidden_size: int, device: torch.device) -> None:
        super().__init__(hidden_size, device)
        self.use = torch.zeros(num_tokens, dtype=torch.float64, device=device)
        self.looked_up: list[
            tuple[Tensor, Tensor]
        ] = []  # ids, (number,), and gradients, (number, hidden_size)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.use]

    def unite(self, processes: Processes) -> None:
        """Makes these the statistics of the batches of all processes."""
        processes.total(self.sums())
        if processes.count > 1:
            shares = processes.gather([(ids.cpu(), found.cpu()) for ids, found in self.looked_up])
            self.looked_up = [
                (ids.to(self.use.device), found.to(self.use.device))
                for share in shares
                for ids, found in share
            ]

    def add_logits(self, states: Tensor, probabilities: Tensor) -> None:
        """Adds states, (number, hidden_size), and the distributions that they give, (number, num_tokens)."""
        self.add(states, torch.ones_like(states[:, 0]))
        self.use += (probabilities * (1 - probabilities)).sum(0).double()

    def add_lookup(self, ids: Tensor, gradients: Tensor) -> None:
        """Adds tokens, (number,), with the gradients at their vectors, (number, hidden_size)."""
        self.looked_up.append((ids, gradients.double()))

    def metric(self, start: int, end: int) -> Tensor:
        """The metric of an average row of a range of tokens, positive definite, (hidden_size, hidden_size)."""
        found = self.products / self.weight.clamp_min(TINY) * self._smooth_use()[start:end].sum()
        for ids, gradients in self.looked_up:
            of_range = gradients[(ids >= start) & (ids < end)]
            found = found + of_range.T @ of_range
        return damp(found)

    def errors(self, difference: Tensor) -> Tensor:
        """The estimated effect of the error of each row of the table, (num_tokens,), in the unit of `MatrixStatistics`.

        Args:
            difference: the error, (num_tokens, hidden_size).
        """
        covariance = self.products / self.weight.clamp_min(TINY)
        squares = [((rows @ covariance) * rows).sum(1) for rows in map(Tensor.double, difference.split(ROWS))]
        found = self._smooth_use() * torch.cat(squares)
        for ids, gradients in self.looked_up:
            found.index_add_(0, ids, (difference[ids] * gradients).sum(1).square())
        return found

    def _smooth_use(self) -> Tensor:
        """Tokens that were not heard matter too."""
        return 0.9 * self.use + 0.1 * self.use.mean()


class StatesObjective:
    """The objective of an encoder: its final states, each frame with the weight that the decoder gives it.

    Args:
        source: the encoder.
        memory_gradients: for each batch, gradients of a decoder's objective at the final states, of shape (batch_size,
            num_frames, hidden_size); None where there is no decoder, so that all frames count alike.
        seed: of the random directions.
    """

    def __init__(
        self, source: LayerStack, memory_gradients: Sequence[Tensor] | None = None, seed: int = 0
    ) -> None:
        self.source, self.memory_gradients = source, memory_gradients
        self.generator = torch.Generator().manual_seed(seed)
        self.batch_idx = 0
        self._shapes: dict[torch.Size, torch.Size] = {}  # of the final states, by the shape of what is heard

    def __call__(self, model: Any, batch: Batch, _leaves: list[Tensor]) -> Tensor:
        """A scalar of one batch. Its gradients are samples of how much errors matter."""
        output = output_of(model, self.source.owner, batch)
        final = output[0]
        self._shapes[main_input(batch).shape] = final.shape
        probe = torch.stack(list(self._draw(final.shape))).to(final)
        mask = mask_of(model, output, batch)
        if mask is not None:
            probe = probe * mask.unsqueeze(-1)
        if self.memory_gradients is not None:
            gradients = self.memory_gradients[self.batch_idx]
            probe = probe * gradients.square().mean(-1, keepdim=True).sqrt()
        self.batch_idx += 1
        return (final * probe).sum()

    def skip(self, model: Any, batch: Batch) -> None:
        """Draws the random numbers of a batch that another process has, so that later batches get their own."""
        heard = main_input(batch).shape
        if heard not in self._shapes:
            self._shapes[heard] = output_of(model, self.source.owner, batch)[0].shape
        for _ in self._draw(self._shapes[heard]):
            pass

    def _draw(self, shape: torch.Size) -> Iterator[Tensor]:
        """Random numbers for final states, one window at a time, so that the batch size changes nothing."""
        return (torch.randn(shape[1:], generator=self.generator) for _ in range(shape[0]))


class LogitsObjective:
    """The objective of a decoder: the log-probability of tokens that are drawn from the model's own distributions over
    its transcripts. The second moment of its gradients is the Fisher information, which says how fast the distributions
    diverge.

    Args:
        source: the decoder.
        encoder: the stack whose final states it reads.
        embedding: statistics to add to, or None.
        seed: of the drawn tokens.
    """

    def __init__(
        self,
        source: LayerStack,
        encoder: LayerStack,
        embedding: EmbeddingStatistics | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.encoder, self.embedding = source, encoder, embedding
        self.generator = torch.Generator().manual_seed(seed)
        self.memory_gradients: list[Tensor] = []

    def __call__(self, model: Any, batch: Batch, leaves: list[Tensor]) -> Tensor:
        """A scalar of one batch. Its gradients are samples of how much errors matter."""
        if MEMORY in batch:
            encoded = BaseModelOutput(batch[MEMORY])
        else:
            with torch.no_grad():
                encoded = output_of(model, self.encoder.owner, batch)
        memory = encoded[0].detach().requires_grad_()
        encoded["last_hidden_state"] = memory.clone()  # since a decoder may change it
        leaves.append(memory)
        memory.register_hook(lambda gradient: self.memory_gradients.append(gradient.detach()))
        ids, counts = decoder_ids(model, batch), is_token(batch)
        inputs = {"encoder_outputs": encoded, "decoder_input_ids": ids, "use_cache": False}
        if "attention_mask" in batch:
            inputs["attention_mask"] = batch["attention_mask"]
        states = output_of(model, self.source.owner, inputs)[0][counts]
        logits = model.get_output_embeddings()(states)
        chances = logits.detach().softmax(-1)
        # One window at a time, so that the batch size changes nothing.
        windows = chances.cpu().split(counts.sum(1).tolist())
        draws = [torch.multinomial(window, 1, generator=self.generator) for window in windows]
        drawn = torch.cat(draws).to(chances.device)
        if self.embedding is not None:
            self.embedding.add_logits(states.detach(), chances)
            embedding, scale = self.embedding, getattr(self.source.owner, "embed_scale", None) or 1.0
            leaves[-1].register_hook(lambda found: embedding.add_lookup(ids[counts], scale * found[counts]))
        return logits.log_softmax(-1).gather(1, drawn).sum()

    def skip(self, model: Any, batch: Batch) -> None:
        """Draws the random numbers of a batch that another process has, so that later batches get their own."""
        num_tokens = len(model.get_output_embeddings().weight)
        for number in is_token(batch).sum(1).tolist():
            torch.multinomial(torch.ones(number, num_tokens), 1, generator=self.generator)


Objective = StatesObjective | LogitsObjective


def collect(
    source: LayerStack,
    model: Any,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    objective: Objective,
    *,
    memory_places: Collection[int] | None = None,
    own: Collection[int] | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Statistics:
    """Statistics of the matrices of a run of layers, by layer and module path, from one pass over the batches.

    Args:
        source: the stack of `model`.
        model: a dense model whose parameters need no gradients, see `inputs.frozen_view`.
        groups: the groups of layers to collect for.
        batches: inputs of the model.
        objective: what errors should not change.
        memory_places: indices of the batches over which matrices that read the states of another stack are observed,
            since each has as many frames as the encoder; None for all. In other batches their frames have no weight.
        own: indices of the batches that this process runs; None for all.
        processes: those that run the other batches. The sums are over the batches of all of them, and `frame_weights`
            are of the batches that this one runs.
        progress: shows a progress bar.
    """
    matrices = {(layer, group.module_path) for group in groups for layer in group.layers}
    run = sorted({layer for layer, _ in matrices})
    statistics = {key: _new(source, *key, model.device) for key in sorted(matrices)}
    name = f"calibrating {source.stack.name} layers {run[0]} to {run[-1]}"
    of_memory = {path for block in source.stack.blocks for path in block.memory}
    for place, batch in enumerate(tqdm(batches, desc=name, unit="batch", disable=not progress)):
        if own is not None and place not in own:
            objective.skip(model, to_model(model, batch))
            continue
        skipped = of_memory if memory_places is not None and place not in memory_places else set()
        with torch.enable_grad(), _watching(source, run, statistics, skipped) as leaves:
            scalar = objective(model, to_model(model, batch), leaves)
            torch.autograd.grad(scalar, leaves)
    processes.total(total for entry in statistics.values() for total in entry.sums())
    return statistics


def _new(source: LayerStack, layer_idx: int, path: str, device: torch.device) -> MatrixStatistics:
    linear = source.linear(layer_idx, path)
    centred = source.bias_absorbs_mean(layer_idx, path)
    return MatrixStatistics(linear.out_features, linear.in_features, device, centred=centred)


@contextmanager
def _watching(
    source: LayerStack, run: Sequence[int], statistics: Statistics, skipped: Collection[str]
) -> Iterator[list[Tensor]]:
    """Inside, a forward and a backward pass add to `statistics`, but for the module paths that are skipped.

    The list gets the input of the run's first layer, at which the graph begins and the backward pass may end. An
    objective may append further leaves of the graph. Layers after the run may be many: only their inputs are kept, and
    the rest is computed again in the backward pass.
    """
    start: list[Tensor] = []

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden_states = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        start.append(hidden_states)
        return (
            ((hidden_states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden_states})
        )

    def watch(entry: MatrixStatistics, is_skipped: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = rows_last(module, args[0]).detach().flatten(0, -2)
            if is_skipped:
                entry.frame_weights.append(entry.sum.new_zeros(len(inputs)))
                return
            if not output.requires_grad:  # nothing before relative positions has a gradient
                start.append(output.requires_grad_())
            output.register_hook(
                lambda gradient: entry.update(inputs, rows_last(module, gradient).flatten(0, -2))
            )

        return hook

    handles = [source.layers[run[0]].register_forward_pre_hook(begin, with_kwargs=True)]
    for (layer, path), entry in statistics.items():
        handles.append(source.linear(layer, path).register_forward_hook(watch(entry, path in skipped)))
    try:
        with ExitStack() as stack:
            for layer_after in source.layers[run[-1] + 1 :]:
                again = partial(
                    checkpoint, layer_after.forward, use_reentrant=False, preserve_rng_state=False
                )
                stack.enter_context(forward_as(layer_after, again))
            yield start
    finally:
        for handle in handles:
            handle.remove()
