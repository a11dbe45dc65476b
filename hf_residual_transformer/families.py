"""Where each family of speech encoders keeps its layers and matrices; a further family is one more row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Encoder, Wav2Vec2EncoderStableLayerNorm
from transformers.models.whisper.modeling_whisper import WhisperEncoder


@dataclass(frozen=True)
class Family:
    """How to find what is shared.

    Args:
        name: the dense `model_type`.
        encoders: the classes of the module that owns `layers`; the shared weights are registered on it.
        stages: paths of the linear modules inside one layer, in the order in which they are computed: what reads
            from the residual stream for the attention, what writes to it, and the same for the feed-forward.
            The last part of a path is the role, the name that `ResidualConfig` knows it by.
        post_norm: those of `encoders` whose layers normalise the residual stream itself, after each addition.
    """

    name: str
    encoders: tuple[type[nn.Module], ...]
    stages: tuple[tuple[str, ...], tuple[str], tuple[str, ...], tuple[str]]
    post_norm: tuple[type[nn.Module], ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of all stages."""
        return tuple(path for stage in self.stages for path in stage)

    def find_encoder(self, model: nn.Module) -> Any:
        """The encoder inside `model`, which may itself be one."""
        for module in model.modules():
            if isinstance(module, self.encoders):
                return module
        raise ValueError(f"{type(model).__name__} has no {self.name} encoder")


WHISPER = Family(
    name="whisper",
    encoders=(WhisperEncoder,),
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
)

WAV2VEC2 = Family(
    name="wav2vec2",
    encoders=(Wav2Vec2Encoder, Wav2Vec2EncoderStableLayerNorm),
    stages=(
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("attention.out_proj",),
        ("feed_forward.intermediate_dense",),
        ("feed_forward.output_dense",),
    ),
    post_norm=(Wav2Vec2Encoder,),
)


def role_of(path: str) -> str:
    """`self_attn.q_proj` is called `q_proj`."""
    return path.rpartition(".")[2]


def groups_of(num_layers: int, group_size: int) -> Iterator[range]:
    """Adjacent layers, `group_size` at a time; the last group has what is left."""
    for start in range(0, num_layers, group_size):
        yield range(start, min(start + group_size, num_layers))
