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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..families import LayerStack
from ..quantization import quantize
from .inputs import Batch, inputs_of, is_token, set_frozen, without_memory
from .processes import ALONE, Processes
from .statistics import TINY, MatrixStatistics

CHECK_BITS = 4
CHECK_WINDOWS = 6
# A linear module, its rounded weight, and its bias to go with it.
Rounding = tuple[Any, Tensor, Tensor | None]


@dataclass
class PlainRounding:
    """Matrices in `CHECK_BITS` bits, each weight rounded on its own.

    Args:
        roundings: the matrices.
        estimate: the estimated error that they make together.
    """

    roundings: list[Rounding] = field(default_factory=list)
    estimate: float = 0.0

    def add(self, other: PlainRounding) -> None:
        """Adds further matrices."""
        self.roundings = self.roundings + other.roundings
        self.estimate += other.estimate


def round_plainly(
    source: LayerStack, statistics: dict[tuple[int, str], MatrixStatistics], block_size: int
) -> dict[str, PlainRounding]:
    """The plain rounding of the matrices of a run of layers, by module path."""
    found: dict[str, PlainRounding] = {}
    for (layer, path), entry in statistics.items():
        linear = source.linear(layer, path)
        weight = linear.weight.double()
        difference = quantize(weight, None, CHECK_BITS, block_size).weight() - weight
        bias = linear.bias
        if entry.centred and bias is not None:
            bias = (bias - difference @ entry.mean).to(bias)
        covariance = entry.covariance() if entry.centred else entry.products
        moved = difference @ covariance @ difference.T
        of_path = found.setdefault(path, PlainRounding())
        of_path.estimate += ((entry.gradients * moved).sum() / entry.weight.clamp_min(TINY)).item()
        of_path.roundings.append((linear, (weight + difference).to(linear.weight), bias))
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


def log_chances(model: Any, batch: Batch) -> Tensor:
    """Log-probabilities of every token at each token of the labels that is no padding, (number, vocabulary).

    They are in float64, since a divergence is of second order in differences that cancel to first order.
    """
    logits: Tensor = model(**inputs_of(model, batch)).logits
    return logits[is_token(batch).to(logits.device)].double().log_softmax(-1)


class Divergence:
    """Measures how far the token distributions of a model are from what they are now, in nats for each token.

    Args:
        model: a dense model with a decoder.
        batches: inputs with labels that this process runs.
        processes: those that run the others.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], processes: Processes = ALONE) -> None:
        self.model, self.batches, self.processes = model, batches, processes
        self.reference = [log_chances(model, batch) for batch in batches]

    def __call__(self, of_encoder: bool) -> float:
        """The mean over all tokens of the labels; the encoder runs again only if the change is one `of_encoder`."""
        batches = [without_memory(batch) for batch in self.batches] if of_encoder else self.batches
        total = sum(
            (reference.exp() * (reference - log_chances(self.model, batch))).sum().item()
            for reference, batch in zip(self.reference, batches)
        )
        counts = [total, sum(map(len, self.reference))]
        sums = torch.tensor(counts, dtype=torch.float64, device=self.model.device)
        self.processes.total([sums])
        return (sums[0] / sums[1]).item()
