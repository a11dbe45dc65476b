"""Step 3, before the choice: what an estimated error really does, measured once for each kind of matrix.

The estimates of `statistics.py` compare the same matrix of different layers well. Between others they do not: an error
of a matrix that reads the sound is alike in all frames, so that its effects add up in a decoder, while the estimate
takes frames for independent. For the keys and values of cross-attention the estimate is some twenty times too low
beside the decoder's other matrices. Therefore the matrices at each module path are rounded plainly, without the
others, and the divergence of the model's tokens is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..configuration import ResidualConfig
from ..families import LayerStack
from ..layers import at_least_float32
from ..quantization import Quantized, quantize
from .inputs import Batch, inputs_of, is_token, set_frozen, without_memory
from .processes import ALONE, Processes
from .statistics import TINY, MatrixStatistics

CHECK_BITS = 4
CHECK_WINDOWS = 6
CACHE_BYTES = 1e9  # of keys and values that are kept, about
# A linear module, its rounded weight, and its bias to go with it.
Rounding = tuple[Any, Tensor, Tensor | None]


@dataclass(frozen=True)
class PlainRounding:
    """A matrix in `CHECK_BITS` bits, each weight rounded on its own.

    Args:
        linear: the module, with the weight of the dense model.
        rounded: the weight, packed, on the device of the module's own.
        bias: what goes with the rounded weight.
        estimate: the estimated error.
    """

    linear: Any
    rounded: Quantized
    bias: Tensor | None
    estimate: float

    def replacement(self) -> Rounding:
        """The module with its rounded weight."""
        return self.linear, self.rounded.weight(), self.bias


def round_plainly(
    source: LayerStack,
    statistics: dict[tuple[int, str], MatrixStatistics],
    config: ResidualConfig,
) -> dict[str, list[PlainRounding]]:
    """The plain rounding of each matrix of a run of layers, by module path."""
    found: dict[str, list[PlainRounding]] = {}
    for (layer, path), entry in statistics.items():
        linear, weight, bias = (
            source.linear(layer, path),
            source.weight(layer, path),
            source.bias(layer, path),
        )
        rotation = config.rotation_of(source.stack.role_of(path))
        rounded = quantize(weight, None, CHECK_BITS, config.block_size, rotation=rotation)
        difference = rounded.weight() - weight
        if bias is not None:
            moved = bias - difference @ entry.mean if entry.centred else bias
            bias = moved.to(at_least_float32(linear.bias))
        rounded = rounded._replace(
            packed=rounded.packed.to(linear.weight.device),
            scale=rounded.scale.to(at_least_float32(linear.weight)),
        )
        covariance = entry.covariance() if entry.centred else entry.products
        error = difference @ covariance @ difference.T
        estimate = ((entry.gradients * error).sum() / entry.weight.clamp_min(TINY)).item()
        found.setdefault(path, []).append(PlainRounding(linear, rounded, bias, estimate))
    return found


@contextmanager
def replaced(roundings: Sequence[Rounding]) -> Iterator[None]:
    """Inside this context, the modules have these weights and biases."""
    kept = [(linear, linear.weight, getattr(linear, "bias", None)) for linear, _, _ in roundings]
    try:
        for linear, weight, bias in roundings:
            set_frozen(linear, "weight", weight)
            if bias is not None:
                set_frozen(linear, "bias", bias)
        yield
    finally:
        for linear, weight, bias in kept:
            linear.weight = weight
            if bias is not None:
                linear.bias = bias


def logits_of(model: Any, batch: Batch, keys: Cache | None = None) -> Tensor:
    """The logits of every token at each token of the labels that is no padding, (number, vocabulary).

    Args:
        model: with a decoder.
        batch: inputs with labels.
        keys: what `cross_keys` has given for the batch.
    """
    inputs = inputs_of(model, batch)
    if keys is not None:
        inputs |= {"past_key_values": EncoderDecoderCache(DynamicCache(), keys), "use_cache": True}
    logits: Tensor = model(**inputs).logits
    return logits[is_token(batch).to(logits.device)]


def divergence_of(reference: Tensor, found: Tensor) -> Tensor:
    """`KL(reference || found)` of the probabilities that logits give, in nats for each row, of shape (number,).

    It is of second order in differences that cancel to first order, so that the mean difference is taken away first.

    Args:
        reference: logits of shape (number, vocabulary).
        found: other logits of the same shape.
    """
    chances = reference.softmax(-1)
    moved = found - reference
    moved -= (chances * moved).sum(-1, keepdim=True)
    moved.clamp_(max=80)  # whose exponential float32 has
    return (chances * (moved.expm1() - moved)).sum(-1).log1p()


def cross_keys(model: Any, batch: Batch) -> Cache | None:
    """Keys and values of the cross-attention over what a batch holds; None for a model that keeps them otherwise."""
    inputs = inputs_of(model, batch) | {"use_cache": True}
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :1]
    cache = model(**inputs).past_key_values
    return cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else None


class Keeps(Enum):
    """What a change of the model leaves as it is, so that it need not be computed again."""

    NOTHING = 0
    STATES = 1  # of the encoder
    KEYS = 2  # and values of the cross-attention over these states


class Divergence:
    """Measures how far the token distributions of a model are from what they are now, in nats for each token.

    Keys and values of the cross-attention, which take most of the time of a short transcript, are kept for as many
    batches as `CACHE_BYTES` have room for.

    Args:
        model: a dense model with a decoder.
        batches: inputs with labels that this process runs.
        processes: those that run the others.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], processes: Processes = ALONE) -> None:
        self.model, self.batches, self.processes = model, batches, processes
        self.reference = [logits_of(model, batch) for batch in batches]
        self.keys: list[Cache | None] = []
        self.kept_bytes = 0
        for batch in batches:
            keys = cross_keys(model, batch) if self.kept_bytes < CACHE_BYTES else None
            self.keys.append(keys)
            layers: Any = keys.layers if keys is not None else ()
            self.kept_bytes += sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def __call__(self, keeps: Keeps) -> float:
        """The mean over all tokens of the labels, with a change of the model that keeps this."""
        total = 0.0
        for batch, reference, keys in zip(self.batches, self.reference, self.keys):
            batch = without_memory(batch) if keeps is Keeps.NOTHING else batch
            found = logits_of(self.model, batch, keys if keeps is Keeps.KEYS else None)
            total += divergence_of(reference, found).sum().item()
        counts = [total, sum(map(len, self.reference))]
        sums = torch.tensor(counts, dtype=torch.float64, device=self.model.device)
        self.processes.total([sums])
        return (sums[0] / sums[1]).item()
