"""The order of feed-forward neurons: layers that share a matrix get the one in which they agree most.

An order `P` takes `W_2 f(W_1 x + b_1)` to `(W_2 Pᵀ) f(P W_1 x + P b_1)`, the same function with other matrices. That
neurons are to be matched before weights are averaged is known from Git Re-Basin (https://arxiv.org/abs/2209.04836,
section 3.2), for models that were trained apart; here it is layers of one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..families import Family
from .statistics import TINY, Group, Prepare, Statistics, damp, importance_of, parallel_sum


@contextmanager
def aligned_neurons(family: Family, dense: Any) -> Iterator[Prepare]:
    """Inside, what is yielded puts neurons of `dense`, and of statistics that it is given, into an order; afterwards
    the model is as it was. Layers whose order is found already keep it, and a layer keeps its own where the matrices
    before and after the neurons are not both to be converted.
    """
    layers = family.find_encoder(dense).layers
    (reader, *_), (writer,) = family.stages[2:]
    orders: dict[int, Tensor] = {}

    def align(groups: list[Group], statistics: Statistics) -> None:
        for group in groups:
            first, *others = group.layers
            for layer in others:
                known = layer in orders or (layer, reader) not in statistics
                if group.module_path == writer and not known:
                    orders[layer] = _order(layers, first, layer, reader, writer, statistics)
                    _reorder(layers[layer], reader, writer, orders[layer])
                    statistics[layer, reader].reorder_outputs(orders[layer])
                    statistics[layer, writer].reorder_inputs(orders[layer])

    try:
        yield align
    finally:
        for layer, order in orders.items():
            _reorder(layers[layer], reader, writer, order.argsort())


def _order(layers: Any, first: int, layer: int, reader: str, writer: str, statistics: Statistics) -> Tensor:
    """Of the neurons of `layer`, (num_neurons,), one for each of `first`: that with which sharing both matrices leaves
    least, by the estimate of `MatrixStatistics` with each neuron on its own.
    """

    def entries_of(path: str) -> list[tuple[Tensor, Any]]:
        return [(layers[i].get_submodule(path).weight.double(), statistics[i, path]) for i in (first, layer)]

    (weights, entries) = zip(*entries_of(reader))
    root = torch.linalg.cholesky(parallel_sum(*(damp(entry.covariance()) for entry in entries)))
    matter = [entry.gradients.diagonal() / entry.weight.clamp_min(TINY) for entry in entries]
    cost = torch.cdist(*(weight @ root for weight in weights)).square()
    cost *= (matter[0][:, None] + matter[1]) / 2
    (weights, entries) = zip(*entries_of(writer))
    root = torch.linalg.cholesky(importance_of(list(entries))).T
    one, other = (damp(entry.covariance()).diagonal() for entry in entries)
    parallel = one[:, None] * other / (one[:, None] + other)
    cost += torch.cdist(*((root @ weight).T for weight in weights)).square() * parallel
    _, order = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(order, device=cost.device)


@torch.no_grad()
def _reorder(layer: nn.Module, reader: str, writer: str, order: Tensor) -> None:
    before: Any = layer.get_submodule(reader)
    after: Any = layer.get_submodule(writer)
    before.weight.copy_(before.weight[order])
    if before.bias is not None:
        before.bias.copy_(before.bias[order])
    after.weight.copy_(after.weight[:, order])
