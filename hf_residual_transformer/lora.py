"""The layer with which PEFT trains a LoRA over a residual layer. `adapters.reach` tells PEFT of it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge

from .layers import ChannelsFirst


def changes_base(config: Any) -> bool:
    """Whether a `LoraConfig` has an initialisation that subtracts the first low rank from the matrix below it."""
    return str(config.init_lora_weights).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def refusal(config: Any) -> ValueError:
    """What is said of such an initialisation over a residual layer, whose matrix is computed from several parts."""
    return ValueError(
        "`init_lora_weights` must not change the matrices of a residual layer, such as True or 'orthogonal', got "
        f"{config.init_lora_weights!r}; use it on model.merge()"
    )


class ResidualLora(Linear):
    """A LoRA whose merge joins its factors to those of the residual layer, so that `U` stays shared.

    The rank of the layer grows by that of the adapter, to at most that of the matrix.
    """

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
        layer = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
        if isinstance(layer, ChannelsFirst):
            raise ValueError(
                "`target_modules` must leave out point-wise convolutions of a residual model, got one; name the other "
                "matrices"
            )
        # By adapter, what its merge did: the ranks that it added, or the factors that it computed anew.
        self._added: dict[str, int] = {}
        self._before: dict[str, tuple[Any, Any]] = {}
        super().__init__(base_layer, *args, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT.

        Raises:
            ValueError: for an initialisation that changes the matrix below.
        """
        config = next(value for value in (*args, *kwargs.values()) if hasattr(value, "init_lora_weights"))
        if changes_base(config):
            raise refusal(config)
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Joins the active adapters to the layer.

        Raises:
            ValueError: for an adapter whose effect has no low rank, such as a DoRA, for one with a bias, and for values
                that are not finite, if `safe_merge` is true or the factors are to be computed anew.
        """
        layer: Any = self.get_base_layer()
        most = min(layer.in_features, layer.out_features)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise ValueError(
                    f"the adapter {name!r} must be a plain LoRA without a bias to be merged into a residual layer, "
                    "whose matrix it would change beyond a low rank; keep it as an adapter, or put it on model.merge()"
                )
            factors: Any = self.lora_A[name].weight, self.lora_B[name].weight
            first, second = (factor.detach() for factor in factors)
            second = second * self.scaling[name]
            is_long = layer.rank + len(first) > most
            if (safe_merge or is_long) and not (torch.isfinite(first).all() and torch.isfinite(second).all()):
                raise ValueError(
                    f"the adapter {name!r} must be finite to be merged, but it has NaN or infinity"
                )
            if is_long:
                self._before[name] = layer.residual_A, layer.residual_B
            self._added[name] = len(first)
            layer.join(first, second)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes the adapters that were merged last away again."""
        layer: Any = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            added, before = self._added.pop(name), self._before.pop(name, None)
            if before is None:
                layer.cut(added)
            elif before[0] is None:
                layer.cut(layer.rank)
            else:  # wherever the layer has been moved meanwhile
                like = layer.residual_A
                layer.set_factors(*(factor.detach().to(like.device, like.dtype) for factor in before))
