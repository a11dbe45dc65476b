"""Learning rates that are smaller for what several layers share."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn

from ..modeling import residual_linears


def divide_shared_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Divides the rate of each parameter that `n` layers share by the root of `n`.

    A step of such a parameter moves `n` layers at once. Its gradient is the sum of theirs, which Adam scales to the
    same step as that of one layer. So a rate that suits the matrices of one layer is too high for it: a deep encoder
    that shares may then stop learning, as docs/paper.md shows.

    Args:
        optimizer: whose groups are split, before its first step and before a schedule reads their rates.
        model: whose parameters it has.
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
        groups += [{**group, "params": params, "lr": group["lr"] / n**0.5} for n, params in parts.items()]
    optimizer.param_groups = groups
