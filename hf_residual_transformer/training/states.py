"""The states of an encoder, recorded while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class EncoderStates:
    """Outputs of the layers, and of the encoder as a list of one, each (batch_size, seq_len, hidden_size)."""

    layers: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)


@contextmanager
def record_states(encoder: Any) -> Iterator[EncoderStates]:
    """Inside, a call of `encoder`, on its own or as part of a model, leaves its states in what is yielded.

    Unlike `output_hidden_states` it keeps no decoder states, and it gives the last layer's output before the
    encoder's final norm, and the encoder's after it, whatever the family.
    """
    states = EncoderStates()

    def keep_in(kept: list[Tensor]) -> Callable[..., None]:
        return lambda module, args, output: kept.append(output if isinstance(output, Tensor) else output[0])

    hooks = [layer.register_forward_hook(keep_in(states.layers)) for layer in encoder.layers]
    hooks.append(encoder.register_forward_hook(keep_in(states.last)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
