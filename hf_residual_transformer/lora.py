"""The layer with which PEFT trains a LoRA over a residual layer. `adapters.reach` tells PEFT of it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge

from .layers import ChannelsFirst


class ResidualLora(Linear):
    """A LoRA whose merge joins its factors to those of the residual layer, so that `U` stays shared.

    The rank of the layer grows by that of the adapter.
    """

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
        layer = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
        if isinstance(layer, ChannelsFirst):
            raise ValueError(
                "`target_modules` must leave out point-wise convolutions of a residual model, got one; name the other "
                "matrices"
            )
        super().__init__(base_layer, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Joins the active adapters to the layer.

        Raises:
            ValueError: for an adapter whose effect has no low rank, such as a DoRA, for one with a bias, and if
                `safe_merge` is true for values that are not finite.
        """
        layer: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise ValueError(
                    f"the adapter {name!r} must be a plain LoRA without a bias to be merged into a residual layer, "
                    "whose matrix it would change beyond a low rank; keep it as an adapter, or put it on model.merge()"
                )
            first: Any = self.lora_A[name].weight
            second: Any = self.lora_B[name].weight
            second = second * self.scaling[name]
            if safe_merge and not (torch.isfinite(first).all() and torch.isfinite(second).all()):
                raise ValueError(
                    f"the adapter {name!r} must be finite to be merged, but it has NaN or infinity"
                )
            layer.join(first.detach(), second.detach())
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes the adapters that were merged last away again."""
        layer: Any = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            layer.cut(self.r[name])
