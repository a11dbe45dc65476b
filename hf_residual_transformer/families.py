"""Where each family of speech models keeps its layers and matrices, as data; a further family is one more row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Encoder, Wav2Vec2EncoderStableLayerNorm
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder


@dataclass(frozen=True)
class Block:
    """One branch of a layer, which reads the residual stream and adds its output to it.

    Args:
        readers: paths, inside a layer, of the linear modules that read the residual stream, in the order in which
            they are computed.
        writer: path of the linear module whose output is added to the residual stream.
        memory: paths of the linear modules that read the output of another stack, such as the keys and values of
            cross-attention.
        scale: factor of the branch's output; a Conformer's feed-forwards have 0.5.
        keys: path of the key projection of an attention. A constant that is added to all keys changes no attention
            weight, since softmax ignores it.
        pointwise: whether each output of the readers reaches one input of the writer and no other, as in a
            feed-forward. Such neurons can be put into any order.
    """

    readers: tuple[str, ...]
    writer: str
    memory: tuple[str, ...] = ()
    scale: float = 1.0
    keys: str | None = None
    pointwise: bool = False


@dataclass(frozen=True)
class Stage:
    """Linear modules of a layer that are computed from the same inputs, before any of them is used.

    Args:
        block_idx: index of their block in the stack's `blocks`.
        paths: their paths inside a layer.
        writes: whether they write to the residual stream.
    """

    block_idx: int
    paths: tuple[str, ...]
    writes: bool


@dataclass(frozen=True)
class Stack:
    """A sequence of layers of one shape.

    Args:
        name: "encoder" or "decoder".
        classes: classes of the module that owns the `layers`; the shared weights are registered on it.
        blocks: branches of one layer, in the order in which they run.
        post_norm: those of `classes` whose layers normalise the residual stream itself, after each addition.
    """

    name: str
    classes: tuple[type[nn.Module], ...]
    blocks: tuple[Block, ...]
    post_norm: tuple[type[nn.Module], ...] = ()

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of a layer, in the order in which they run."""
        found = []
        for index, block in enumerate(self.blocks):
            found.append(Stage(index, block.readers + block.memory, writes=False))
            found.append(Stage(index, (block.writer,), writes=True))
        return tuple(found)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of the linear modules of a layer, in the order in which they run."""
        return tuple(path for stage in self.stages for path in stage.paths)

    @cached_property
    def keys(self) -> frozenset[str]:
        """Paths of the key projections."""
        return frozenset(block.keys for block in self.blocks if block.keys is not None)

    @cached_property
    def roles(self) -> dict[str, str]:
        """Path of each linear module by its role, the name that `ResidualConfig` knows it by."""
        return dict(zip(shortest_suffixes(self.modules), self.modules, strict=True))

    def role_of(self, path: str) -> str:
        """Role of the module at `path`: `self_attn.q_proj` is called `q_proj`."""
        return next(role for role, other in self.roles.items() if other == path)

    def find(self, model: nn.Module) -> Any:
        """The module inside `model` that owns the layers; `model` may be this module itself.

        Raises:
            ValueError: when there is none.
        """
        for module in model.modules():
            if isinstance(module, self.classes):
                return module
        names = " or ".join(cls.__name__ for cls in self.classes)
        raise ValueError(f"{type(model).__name__} has no {self.name} ({names})")

    def is_in(self, model: nn.Module) -> bool:
        """Whether `model` has such layers; a classifier over an encoder has no decoder."""
        return any(isinstance(module, self.classes) for module in model.modules())


@dataclass(frozen=True)
class Family:
    """A family of dense models.

    Args:
        name: the dense `model_type`.
        stacks: its stacks, in the order in which they run; the first is the encoder.
    """

    name: str
    stacks: tuple[Stack, ...]

    @property
    def encoder(self) -> Stack:
        """The stack that hears the recording."""
        return self.stacks[0]

    @property
    def decoder(self) -> Stack | None:
        """The stack that writes the text, if the family has one. Its owner has the `embed_tokens` for look-up and,
        tied, for logits.
        """
        return self.stacks[1] if len(self.stacks) > 1 else None

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the linear modules of an encoder layer."""
        return self.encoder.modules

    def find_encoder(self, model: nn.Module) -> Any:
        """The encoder inside `model`, which may itself be one."""
        return self.encoder.find(model)


class LayerStack:
    """A view of one stack in one model: its layers, and their linear modules.

    Args:
        stack: how the family keeps them.
        model: a model that contains the stack.
    """

    def __init__(self, stack: Stack, model: nn.Module) -> None:
        self.stack = stack
        self.owner: Any = stack.find(model)
        self.is_post_norm = isinstance(self.owner, stack.post_norm)

    @property
    def layers(self) -> nn.ModuleList:
        """All layers, in order."""
        return self.owner.layers

    def __len__(self) -> int:
        return len(self.layers)

    def linear(self, layer_idx: int, path: str) -> Any:
        """The linear module at `path` of a layer: an `nn.Linear`, or a `ResidualLinear` in a residual model."""
        return self.layers[layer_idx].get_submodule(path)

    def bias_absorbs_mean(self, layer_idx: int, path: str) -> bool:
        """Whether a constant error of a matrix's outputs does no harm: its bias takes it up, or softmax ignores it."""
        return path in self.stack.keys or self.linear(layer_idx, path).bias is not None


# Layers of the encoder and of the decoder have these alike.
WHISPER_SELF_ATTENTION = Block(
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    writer="self_attn.out_proj",
    keys="self_attn.k_proj",
)
WHISPER_FEED_FORWARD = Block(readers=("fc1",), writer="fc2", pointwise=True)
WHISPER = Family(
    name="whisper",
    stacks=(
        Stack(
            name="encoder",
            classes=(WhisperEncoder,),
            blocks=(
                WHISPER_SELF_ATTENTION,
                WHISPER_FEED_FORWARD,
            ),
        ),
        Stack(
            name="decoder",
            classes=(WhisperDecoder,),
            blocks=(
                WHISPER_SELF_ATTENTION,
                Block(
                    readers=("encoder_attn.q_proj",),
                    memory=("encoder_attn.k_proj", "encoder_attn.v_proj"),
                    writer="encoder_attn.out_proj",
                    keys="encoder_attn.k_proj",
                ),
                WHISPER_FEED_FORWARD,
            ),
        ),
    ),
)

WAV2VEC2 = Family(
    name="wav2vec2",
    stacks=(
        Stack(
            name="encoder",
            classes=(Wav2Vec2Encoder, Wav2Vec2EncoderStableLayerNorm),
            blocks=(
                Block(
                    readers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                    writer="attention.out_proj",
                    keys="attention.k_proj",
                ),
                Block(
                    readers=("feed_forward.intermediate_dense",),
                    writer="feed_forward.output_dense",
                    pointwise=True,
                ),
            ),
            post_norm=(Wav2Vec2Encoder,),
        ),
    ),
)


def shortest_suffixes(paths: Sequence[str]) -> list[str]:
    """For each path, its shortest ending of whole names that no other path has.

    `self_attn.q_proj` and `encoder_attn.q_proj` keep both names, `fc1` needs one.
    """
    found = []
    for path in paths:
        names = path.split(".")
        endings = [".".join(names[-number:]) for number in range(1, len(names))]
        alone = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in paths) == 1)
        found.append(next(alone, path))
    return found


def groups_of(num_layers: int, group_size: int) -> Iterator[range]:
    """Adjacent layers, `group_size` at a time; the last group has the layers that are left."""
    for start in range(0, num_layers, group_size):
        yield range(start, min(start + group_size, num_layers))


def frame_mask(model: Any, num_frames: int, attention_mask: Tensor, *, adapter: bool = False) -> Tensor:
    """Which encoder frames are speech and not padding, (batch_size, num_frames), boolean.

    Args:
        model: a model of a family that takes an `attention_mask` over samples, such as wav2vec2.
        num_frames: number of frames that the encoder gives.
        attention_mask: (batch_size, num_samples).
        adapter: whether the frames are those after the model's adapter layers. Families without such layers have
            no such choice.
    """
    compute = model._get_feature_vector_attention_mask
    takes_adapter = "add_adapter" in inspect.signature(compute).parameters
    options = {"add_adapter": False} if takes_adapter and not adapter else {}
    return compute(num_frames, attention_mask, **options).bool()
