"""Learning rates that are smaller for what several layers share."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn

from ..modeling import residual_linears


def divide_shared_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Divides the rate of each parameter that `n` layers share by the root of `n`.

    A step of such a parameter moves `n` layers at once, and Adam makes it as large as a step of one layer's. At a high
    rate a deep encoder may stop learning; docs/paper.md has a run in which this let one that shares go on. AdamW
    scales its weight decay by the rate, so that this becomes smaller too.

    Args:
        optimizer: whose groups are split, before its first step and before a schedule reads their rates.
        model: whose parameters it has.

    Raises:
        ValueError: if none of them is shared by several layers, as in a dense model.
    """
    num_layers = Counter(
        id(parameter)
        for _, module in residual_linears(model)
        if module.shared is not None
        for parameter in module.shared.parameters()
    )
    groups = []
    for group in optimizer.param_groups:
        parts = defaultdict(list)
        for parameter in group["params"]:
            parts[num_layers.get(id(parameter), 1)].append(parameter)
        groups += [
            (n, {**group, "params": params, "lr": group["lr"] / n**0.5}) for n, params in parts.items()
        ]
    if all(n == 1 for n, _ in groups):
        raise ValueError(
            "`divide_shared_rate` must be false for a model whose trained parameters are of one layer each, got true"
        )
    optimizer.param_groups = [group for _, group in groups]
