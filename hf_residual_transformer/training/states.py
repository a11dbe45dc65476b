"""Records the hidden states of an encoder while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class EncoderStates:
    """The recorded states, each of shape (batch_size, seq_len, hidden_size).

    Args:
        layers: the output of each layer, in their order.
        last: the output of the encoder, as a list of one tensor.
    """

    layers: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)


@contextmanager
def record_states(encoder: Any) -> Iterator[EncoderStates]:
    """Inside this context, a call of `encoder`, alone or within a model, appends to the `EncoderStates` it yields.

    Unlike `output_hidden_states`, it keeps no states of a decoder. In every family, the output of the last layer is
    recorded before the encoder's final norm, and the output of the encoder after it.
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
