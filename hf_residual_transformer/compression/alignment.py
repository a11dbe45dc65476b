"""Step 2: the order of feed-forward neurons. Layers that share a matrix get the order in which they agree most.

An order `P` turns `W_2 f(W_1 x + b_1)` into `(W_2 Pᵀ) f(P W_1 x + P b_1)`, the same function with other matrices. Git
Re-Basin (https://arxiv.org/abs/2209.04836, section 3.2) matches the neurons of models that were trained apart before it
averages their weights; here they are those of layers of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..families import Block, LayerStack
from .fitting import naming
from .inputs import set_frozen
from .statistics import TINY, Group, Statistics, importance_of, parallel_sum

Orders = dict[
    tuple[int, Block], Tensor
]  # an order of neurons, (num_neurons,), by layer and feed-forward block


def match_neurons(source: LayerStack, groups: Sequence[Group], statistics: Statistics) -> Orders:
    """The order of the neurons of each layer in which it agrees most with the first layer of its group.

    A layer keeps its order where the matrices before and after its neurons are not both compressed.
    """
    orders: Orders = {}
    for block in source.stack.blocks:
        if not block.pointwise:
            continue
        for group in groups:
            first, *others = group.layers
            for layer in others if group.module_path == block.writer else ():
                if (layer, block) not in orders and all(
                    (layer, path) in statistics for path in block.readers
                ):
                    orders[layer, block] = _order(source, first, layer, block, statistics)
    return orders


def reorder_neurons(source: LayerStack, statistics: Statistics, orders: Orders) -> None:
    """Puts the neurons of the stack, and of its statistics, into these orders. Weights are replaced, not changed."""
    for (layer, block), order in orders.items():
        for path in block.readers:
            reader = source.linear(layer, path)
            set_frozen(reader, "weight", reader.weight[order])
            if reader.bias is not None:
                set_frozen(reader, "bias", reader.bias[order])
            statistics[layer, path].reorder_outputs(order)
        writer = source.linear(layer, block.writer)
        set_frozen(writer, "weight", writer.weight[:, order])
        statistics[layer, block.writer].reorder_inputs(order)


def _order(source: LayerStack, first: int, layer: int, block: Block, statistics: Statistics) -> Tensor:
    """For each neuron of `first`, the index of its best match in `layer`, (num_neurons,), on the CPU, from where it
    indexes tensors of any device.

    The best match is the one with which sharing the block's matrices leaves the least error, by the estimate of
    `MatrixStatistics` with each neuron on its own.
    """
    cost: Any = 0.0
    for path in block.readers:
        weights, entries = _pair(source, first, layer, path, statistics)
        with naming(f"{source.stack.name} layers.{first}.{path} and layers.{layer}.{path}"):
            root = torch.linalg.cholesky(parallel_sum(*(entry.metric() for entry in entries)))
        importance = [entry.gradients.diagonal() / entry.weight.clamp_min(TINY) for entry in entries]
        distance = torch.cdist(*(weight @ root for weight in weights)).square()
        cost = cost + distance * ((importance[0][:, None] + importance[1]) / 2)
    weights, entries = _pair(source, first, layer, block.writer, statistics)
    with naming(f"{source.stack.name} layers.{first}.{block.writer} and layers.{layer}.{block.writer}"):
        root = torch.linalg.cholesky(importance_of(entries)).T
    one, other = (entry.metric().diagonal() for entry in entries)
    parallel = one[:, None] * other / (one[:, None] + other)
    cost = cost + torch.cdist(*((root @ weight).T for weight in weights)).square() * parallel
    _, order = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(order)


def _pair(
    source: LayerStack, first: int, layer: int, path: str, statistics: Statistics
) -> tuple[list[Tensor], list[Any]]:
    weights = [source.weight(index, path) for index in (first, layer)]
    return weights, [statistics[index, path] for index in (first, layer)]
