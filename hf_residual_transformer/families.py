"""Where each family of speech models keeps its layers and matrices, as data; a further family is one more row."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .wavlm import call_projections
from .whisper import choose_windows


@dataclass(frozen=True)
class Block:
    """One branch of a layer, which reads the residual stream and adds its output to it.

    Args:
        readers: paths, inside a layer, of the linear modules that read the residual stream, in the order in which
            they are computed.
        writer: path of the linear module whose output is added to the residual stream.
        memory: paths of the linear modules that read the output of another stack, such as the keys and values of
            cross-attention.
        positions: paths of the linear modules that read relative positions, and no sound. Layers without them are
            known too, since a setting of the model may leave them out.
        scale: factor of the branch's output; a Conformer's feed-forwards have 0.5.
        keep: factor of the residual stream that the output is added to.
        keys: paths of the key projections of an attention. A constant that is added to all keys changes no attention
            weight, since softmax ignores it. Rotary positions turn the keys afterwards, so that such an attention has
            none.
        pointwise: whether each output of the readers reaches one input of the writer and no other, as in a
            feed-forward. Such neurons can be put into any order.
    """

    readers: tuple[str, ...]
    writer: str
    memory: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    scale: float = 1.0
    keep: float = 1.0
    keys: tuple[str, ...] = ()
    pointwise: bool = False

    @property
    def module(self) -> str:
        """Path of the module that holds all of the branch; empty where the layer itself does."""
        return self.writer.rpartition(".")[0]


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
        classes: names of the classes of the module that owns the `layers`; the shared weights are registered on it.
        blocks: branches of one layer, in the order in which they run.
        post_norm: those of `classes` whose layers normalise the residual stream itself, after each addition.
        same_arguments: whether all layers get the same arguments beside their hidden states.
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[Block, ...]
    post_norm: tuple[str, ...] = ()
    same_arguments: bool = True

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of a layer, in the order in which they run."""
        found = []
        for index, block in enumerate(self.blocks):
            found.append(Stage(index, block.readers + block.memory + block.positions, writes=False))
            found.append(Stage(index, (block.writer,), writes=True))
        return tuple(found)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of the linear modules of a layer, in the order in which they run."""
        return tuple(path for stage in self.stages for path in stage.paths)

    @cached_property
    def keys(self) -> frozenset[str]:
        """Paths of the key projections."""
        return frozenset(path for block in self.blocks for path in block.keys)

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
            if is_one_of(module, self.classes):
                return module
        raise ValueError(f"{type(model).__name__} has no {self.name} ({' or '.join(self.classes)})")

    def is_in(self, model: nn.Module) -> bool:
        """Whether `model` has such layers; a classifier over an encoder has no decoder."""
        return any(is_one_of(module, self.classes) for module in model.modules())

    def of_layer(self, layer: nn.Module) -> Stack:
        """The stack without the matrices of positions that this layer does not have."""
        there = dict(layer.named_modules())
        blocks = tuple(
            replace(block, positions=tuple(path for path in block.positions if path in there))
            for block in self.blocks
        )
        return self if blocks == self.blocks else replace(self, blocks=blocks)


@dataclass(frozen=True)
class Family:
    """A family of dense models.

    Args:
        name: the dense `model_type`.
        stacks: its stacks, in the order in which they run; the first is the encoder.
        adapt: changes a model of the dense class so that each matrix of a layer is called as a module, or as its config
            says.
    """

    name: str
    stacks: tuple[Stack, ...]
    adapt: Callable[[nn.Module], None] | None = None

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
        self.owner: Any = stack.find(model)
        self.model: Any = model
        self.stack = stack.of_layer(self.owner.layers[0])
        self.is_post_norm = is_one_of(self.owner, stack.post_norm)

    @property
    def layers(self) -> nn.ModuleList:
        """All layers, in order."""
        return self.owner.layers

    def __len__(self) -> int:
        return len(self.layers)

    def linear(self, layer_idx: int, path: str) -> Any:
        """The linear module at `path` of a layer: an `nn.Linear`, or a `ResidualLinear` in a residual model."""
        return self.layers[layer_idx].get_submodule(path)

    def weight(self, layer_idx: int, path: str) -> Tensor:
        """The weight of a linear module in float64, on the device of the model, (out_features, in_features)."""
        return self.linear(layer_idx, path).weight.to(self.model.device, torch.float64)

    def bias(self, layer_idx: int, path: str) -> Tensor | None:
        """The bias of a linear module, likewise, (out_features,); None where it has none."""
        bias = self.linear(layer_idx, path).bias
        return None if bias is None else bias.to(self.model.device, torch.float64)

    def bias_absorbs_mean(self, layer_idx: int, path: str) -> bool:
        """Whether a constant error of a matrix's outputs does no harm: its bias takes it up, or softmax ignores it."""
        return path in self.stack.keys or self.linear(layer_idx, path).bias is not None


def is_one_of(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module is of a class with one of these names, or of one that extends it."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def attention(
    place: str,
    names: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    writer: str = "out_proj",
    *,
    positions: str | None = None,
    rotary: bool = False,
) -> Block:
    """Self-attention at a path of a layer; `names` are those of its queries, keys and values."""
    queries, keys, values = (f"{place}.{name}" for name in names)
    of_positions = () if positions is None else (f"{place}.{positions}",)
    return Block(
        readers=(queries, keys, values),
        positions=of_positions,
        writer=f"{place}.{writer}",
        keys=() if rotary else (keys, *of_positions),
    )


def cross_attention(place: str, writer: str = "out_proj") -> Block:
    """Attention of a decoder to the encoder's output."""
    return Block(
        readers=(f"{place}.q_proj",),
        memory=(f"{place}.k_proj", f"{place}.v_proj"),
        writer=f"{place}.{writer}",
        keys=(f"{place}.k_proj",),
    )


def feed_forward(reader: str, writer: str, *, scale: float = 1.0, keep: float = 1.0) -> Block:
    """A feed-forward whose neurons can be put into any order."""
    return Block(readers=(reader,), writer=writer, pointwise=True, scale=scale, keep=keep)


def convolution(place: str, *, keep: float = 1.0) -> Block:
    """The convolution of a Conformer, between two that look at one frame each, and so are linear.

    The first gives gates beside values, and the convolution between them is one for each channel, so that the order of
    the channels is fixed.
    """
    return Block(readers=(f"{place}.pointwise_conv1",), writer=f"{place}.pointwise_conv2", keep=keep)


# Whisper's encoder and decoder have these alike, and so has Speech2Text.
WHISPER_SELF_ATTENTION = attention("self_attn")
WHISPER_FEED_FORWARD = feed_forward("fc1", "fc2")


def whisper_like(name: str, prefix: str, *, adapt: Callable[[nn.Module], None] | None = None) -> Family:
    """A family with the layers of Whisper."""
    return Family(
        name=name,
        stacks=(
            Stack(
                name="encoder",
                classes=(f"{prefix}Encoder",),
                blocks=(WHISPER_SELF_ATTENTION, WHISPER_FEED_FORWARD),
            ),
            Stack(
                name="decoder",
                classes=(f"{prefix}Decoder",),
                blocks=(WHISPER_SELF_ATTENTION, cross_attention("encoder_attn"), WHISPER_FEED_FORWARD),
            ),
        ),
        adapt=adapt,
    )


def wav2vec2_like(
    name: str, prefix: str, *, same_arguments: bool = True, adapt: Callable[[nn.Module], None] | None = None
) -> Family:
    """A family with the layers of wav2vec 2.0, whose norms come after the additions or, "stable", before them."""
    return Family(
        name=name,
        stacks=(
            Stack(
                name="encoder",
                classes=(f"{prefix}Encoder", f"{prefix}EncoderStableLayerNorm"),
                blocks=(
                    attention("attention"),
                    feed_forward("feed_forward.intermediate_dense", "feed_forward.output_dense"),
                ),
                post_norm=(f"{prefix}Encoder",),
                same_arguments=same_arguments,
            ),
        ),
        adapt=adapt,
    )


def conformer(name: str, owner: str) -> Family:
    """A family with Conformer layers (https://arxiv.org/abs/2005.08100) and wav2vec 2.0's names."""
    names = ("linear_q", "linear_k", "linear_v")
    return Family(
        name=name,
        stacks=(
            Stack(
                name="encoder",
                classes=(owner,),
                blocks=(
                    feed_forward("ffn1.intermediate_dense", "ffn1.output_dense", scale=0.5),
                    attention("self_attn", names, "linear_out", positions="linear_pos"),
                    convolution("conv_module"),
                    feed_forward("ffn2.intermediate_dense", "ffn2.output_dense", scale=0.5),
                ),
            ),
        ),
    )


def fast_conformer(
    name: str, owner: str = "ParakeetEncoder", *, rotary: bool = False, keep: tuple[float, float] = (1.0, 1.0)
) -> Family:
    """A family over Fast Conformer layers (https://arxiv.org/abs/2305.05084) as Parakeet has them.

    Args:
        name: the dense `model_type`.
        owner: name of the class of the encoder.
        rotary: whether positions are rotary, and not relative.
        keep: factors of the residual stream before a feed-forward and before the convolution is added.
    """
    positions = None if rotary else "relative_k_proj"
    return Family(
        name=name,
        stacks=(
            Stack(
                name="encoder",
                classes=(owner,),
                blocks=(
                    feed_forward("feed_forward1.linear1", "feed_forward1.linear2", scale=0.5, keep=keep[0]),
                    attention("self_attn", writer="o_proj", positions=positions, rotary=rotary),
                    convolution("conv", keep=keep[1]),
                    feed_forward("feed_forward2.linear1", "feed_forward2.linear2", scale=0.5, keep=keep[0]),
                ),
            ),
        ),
    )


def moonshine_like(name: str, prefix: str, *, rotary: bool, same_arguments: bool) -> Family:
    """A family with the layers of Moonshine, whose decoder has gates in its feed-forward."""
    return Family(
        name=name,
        stacks=(
            Stack(
                name="encoder",
                classes=(f"{prefix}Encoder",),
                blocks=(
                    attention("self_attn", writer="o_proj", rotary=rotary),
                    feed_forward("mlp.fc1", "mlp.fc2"),
                ),
                same_arguments=same_arguments,
            ),
            Stack(
                name="decoder",
                classes=(f"{prefix}Decoder",),
                blocks=(
                    attention("self_attn", writer="o_proj", rotary=True),
                    cross_attention("encoder_attn", writer="o_proj"),
                    Block(readers=("mlp.fc1",), writer="mlp.fc2"),
                ),
            ),
        ),
    )


# LASR's factors of the residual stream are settings of its config, of which every published model has these.
LASR_KEEP = (1.5, 2.0)
WHISPER = whisper_like("whisper", "Whisper", adapt=choose_windows)
NEMOTRON_ENCODER = "NemotronAsrStreamingEncoder"
FAMILIES = {
    family.name: family
    for family in (
        WHISPER,
        wav2vec2_like("wav2vec2", "Wav2Vec2"),
        wav2vec2_like("hubert", "Hubert"),
        # The first layer makes the relative positions, and gives them to the next.
        wav2vec2_like("wavlm", "WavLM", same_arguments=False, adapt=call_projections),
        wav2vec2_like("data2vec-audio", "Data2VecAudio"),
        wav2vec2_like("unispeech", "UniSpeech"),
        wav2vec2_like("unispeech-sat", "UniSpeechSat"),
        wav2vec2_like("sew", "SEW"),
        conformer("wav2vec2-conformer", "Wav2Vec2ConformerEncoder"),
        conformer("wav2vec2-bert", "Wav2Vec2BertEncoder"),
        whisper_like("speech_to_text", "Speech2Text"),
        moonshine_like("moonshine", "Moonshine", rotary=True, same_arguments=True),
        # Each layer has its own window of frames.
        moonshine_like("moonshine_streaming", "MoonshineStreaming", rotary=False, same_arguments=False),
        fast_conformer("parakeet_encoder"),
        fast_conformer("parakeet_ctc"),
        fast_conformer("parakeet_rnnt"),
        fast_conformer("parakeet_tdt"),
        fast_conformer("canary"),
        fast_conformer("cohere_asr"),
        fast_conformer("lasr_encoder", "LasrEncoder", rotary=True, keep=LASR_KEEP),
        fast_conformer("lasr_ctc", "LasrEncoder", rotary=True, keep=LASR_KEEP),
        fast_conformer("nemotron_asr_streaming_encoder", NEMOTRON_ENCODER),
        fast_conformer("nemotron_asr_streaming", NEMOTRON_ENCODER),
        fast_conformer("nemotron3_5_asr", NEMOTRON_ENCODER),
    )
}
IN_LANGUAGE_MODEL = "its encoder is a small part of a language model, which would stay dense"
# Families of speech models that have no residual form, by `model_type`, and why.
REFUSED = {
    "sew-d": "its attention uses the same matrices for positions and for sound",
    "speecht5": "one encoder reads both speech and text, through different modules before it",
    "granite_speech5_ctc": "some of its layers halve the number of frames",
    "granite_speech5_encoder": "some of its layers halve the number of frames",
    "kyutai_speech_to_text": "it is a language model over codes of sound, without an encoder",
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), "its speech encoder is a part of a translator"),
    **dict.fromkeys(
        (
            "audioflamingo3",
            "fun_asr_nano",
            "glmasr",
            "granite_speech",
            "granite_speech_plus",
            "moss_transcribe_diarize",
            "musicflamingo",
            "phi4_multimodal",
            "qwen2_audio",
            "qwen3_asr",
            "vibevoice_asr",
            "voxtral",
            "voxtral_realtime",
        ),
        IN_LANGUAGE_MODEL,
    ),
}


def family_of(model: Any) -> Family:
    """The family of a model, dense or residual.

    Raises:
        ValueError: when there is none.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"`model` must be of {', '.join(FAMILIES)}, got a {model_type}")
    return FAMILIES[model_type]


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


def groups_of(num_layers: int, group_size: int, cyclic: bool = False) -> Iterator[range]:
    """The layers of each group.

    Adjacent layers, `group_size` at a time, of which the last group has those that are left; or, if `cyclic`, as many
    groups, of which layer `l` is in the group `l` modulo their number.
    """
    num_groups = math.ceil(num_layers / group_size)
    for group_idx in range(num_groups):
        if cyclic:
            yield range(group_idx, num_layers, num_groups)
        else:
            yield range(group_idx * group_size, min((group_idx + 1) * group_size, num_layers))


# How classes of transformers say which frames an attention mask leaves.
OF_FEATURE_VECTORS, OF_OUTPUT = "_get_feature_vector_attention_mask", "_get_output_attention_mask"


def takes_mask(model: Any) -> bool:
    """Whether a model's attention mask says which of the encoder's frames are padding."""
    return hasattr(model, OF_FEATURE_VECTORS) or hasattr(model, OF_OUTPUT)


def frame_mask(model: Any, num_frames: int, attention_mask: Tensor, *, adapter: bool = False) -> Tensor:
    """Which encoder frames are speech and not padding, (batch_size, num_frames), boolean.

    Args:
        model: a model of a family that takes an `attention_mask`, over samples as wav2vec2, or over mel features.
        num_frames: number of frames that the encoder gives.
        attention_mask: (batch_size, num_samples).
        adapter: whether the frames are those after the model's adapter layers. Families without such layers have
            no such choice.
    """
    if not hasattr(model, OF_FEATURE_VECTORS):
        of_features: Tensor = getattr(model, OF_OUTPUT)(attention_mask, target_length=num_frames)
        return of_features.bool()
    compute = getattr(model, OF_FEATURE_VECTORS)
    takes_adapter = "add_adapter" in inspect.signature(compute).parameters
    options = {"add_adapter": False} if takes_adapter and not adapter else {}
    return compute(num_frames, attention_mask, **options).bool()


def num_frames_of(model: Any, lengths: Tensor) -> Tensor:
    """The number of encoder frames, after the model's adapter, for recordings of these lengths, (batch_size,)."""
    names = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
    compute = next(getattr(model, name) for name in names if hasattr(model, name))
    frames: Tensor = compute(lengths)
    return frames
