"""`ResidualConfig` says which weights encoder layers share; the config of a model has it as `residual_config`.

Equation and published settings: Wang & Li, ICASSP 2024, section 2 (https://arxiv.org/abs/2310.02489).
`families.py` lists the modules of each family. Shapes are checked when the model is built.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .folders import save_code
from .quantization import BLOCK, BLOCKS, FEWEST, MOST, ROTATIONS, SCALE_BITS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as DenseConfig
else:
    DenseConfig = object

RESIDUAL_FIELDS = ("residual_config", "decoder_residual_config", "embedding_bits", "short_windows")
# 1 is that of version 0.1.0, which wrote no number. 2 has decoders, embeddings, numbers of bits, and what is shared.
# 3 has scales in 8 bits. 4 has rotations, and the mean of the token vectors.
FORMAT = 4
MEAN_FORMAT = 4  # the first in which a token table has a mean
# What only the file of a config has, beside its fields: the format, by stack and module the sizes of its groups, and
# the rotations of its matrices. No shape of a tensor would tell if these were wrong.
FILE_FIELDS = ("residual_format", "residual_sharing", "residual_rotations")
# The first of these fields that a dense config class checks is a text in the file. So the dense classes refuse the
# checkpoint, whose compact matrices they would leave random. `PreTrainedConfig` itself checks none of them: the Trainer
# reads the file as that class when it resumes.
GUARD_FIELDS = ("init_std", "initializer_range", "hidden_size")
# A family that has none of these has one of the next, and each is a text in its file, null where it has no such field,
# since the classes of its siblings, which have other heads on the same encoder, read the file too.
HEAD_GUARD_FIELDS = ("decoder_hidden_size", "ctc_zero_infinity", "durations")
GUARD = " (this checkpoint is compact: import hf_residual_transformer, and load it with an Auto class)"
# A number of bits for all tokens, or for each range of tokens the id at which it ends, exclusive, and its bits.
EmbeddingBits = int | list[list[int]] | None
DIAGONALS = ("none", "square", "all")


def _is_int(value: Any, minimum: int, maximum: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


# Names, parts of paths, `*`, `|` and sets such as `[0-3]`: what `fnmatch` matches without going back and forth.
PATTERN_KEY = re.compile(r"(?:[\w.*|-]|\[[\w-]+\])+")


def _checked_pattern(name: str, pattern: Any, least: int, most: float) -> dict[str, int]:
    """A copy of a dict from module names, or patterns of them, to integers, with its keys in today's form."""
    if not isinstance(pattern, dict):
        raise ValueError(f"`{name}` must be a dict of integers by module name, got {pattern!r}")
    bounds = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
    checked: dict[str, int] = {}
    for key, value in pattern.items():
        if not _is_int(value, least, most):
            raise ValueError(f"`{name}[{key!r}]` must be an integer {bounds}, got {value!r}")
        # Version 0.1.0 wrote regular expressions, of which these two forms mean the same here.
        plain = key.replace(r"\.", ".").replace(".*", "*") if isinstance(key, str) else ""
        if not PATTERN_KEY.fullmatch(plain):
            raise ValueError(
                f"`{name}` keys must be module names or the ends of module paths, in which `*` stands for any "
                f"characters, `[0-3]` for one of a set, and `|` separates alternatives, got {key!r}; write such as "
                "'fc1|fc2' or 'layers.[0-3].fc1'"
            )
        if plain in checked:
            raise ValueError(f"`{name}` keys must differ, got {plain!r} twice")
        checked[plain] = value
    return checked


def _is_end_of(pattern: str, path: str) -> bool:
    """Whether a part of a key between `|` is `path` or its end after a dot."""
    if "*" in pattern or "[" in pattern:
        return fnmatchcase(f".{path}", f"*.{pattern}")
    return f".{path}".endswith(f".{pattern}")


def values_of(setting: Any) -> list[Any]:
    """The values of a setting, which is one value for all modules or a dict by module name."""
    return list(setting.values()) if isinstance(setting, dict) else [setting]


@dataclass(frozen=True)
class ResidualConfig:
    r"""How the encoder layers share weights: `W_l = U_g + B_l A_l + D_l`.

    A config is validated when it is made and cannot change afterwards; `dataclasses.replace` makes a changed copy.

    Args:
        group_size: the number of layers that share one full-rank `U` (the paper's K), adjacent ones unless `cyclic`.
            The last group may be shorter. A dict gives a size by module name, and modules that it does not name stay
            dense: with `{"fc1": 3, "fc2": 3}` only the feed-forward weights are shared. None, for all modules or as a
            value of the dict, leaves out `U`, so that each layer has only its own `B_l A_l + D_l`.
        rank: the rank of `B_l A_l` (the paper's R). 0 leaves `B_l A_l` out. A rank above the smaller side of a matrix
            is an error when the model is built.
        rank_pattern: ranks that differ from `rank`. A key is a module name or the end of a module path:
            `{"fc2": 64, "layers.0.fc1": 128}`. In a key, `*` stands for any characters, `[0-3]` for one character of a
            set, and `|` separates alternatives. The first key that matches counts; a key that never counts is an error
            when the model is built. Of the regular expressions of version 0.1.0, `\.` and `.*` are read as well.
        bits_pattern: bits of `U` that differ from `shared_bits`, in the same form. A group has the bits of its first
            layer.
        block_size: the number of weights in a row of a quantised `U` that have one scale: 32, 64 or 128.
        scale_bits: the bits of each of these scales: 16, or 8, beside which each row has one scale in the model's
            dtype. A compression whose `size` or `budget` chooses all settings takes 8.
        rotation: how many inputs of a quantised `U` are rotated together by a Hadamard matrix, so that rounding loses
            less: 16, 32, 64, 128 or 256, or 1 for none. Where this does not divide the number of inputs, it is the
            largest power of two that does. A dict gives a number by module name, and modules that it does not name are
            not rotated. A compression whose `size` or `budget` chooses all settings takes 128, but in the encoder only
            for matrices with no more inputs than outputs.
        diagonal: the matrices that have a `D_l`: "none", "square" or "all". In a rectangular matrix, `D_l` has
            one entry for each position of the main diagonal.
        share_biases: whether the layers of a group share one bias, rather than having one each.
        shared_bits: the number of bits, from 2 to 8, of each weight of `U`; None keeps `U` in the model's dtype.
            Training moves only the scales of a quantised `U`, or with a `scale_bits` of 8 those of its rows, and
            `B_l A_l + D_l` compensates for a part of the rounding, which is its only use with a `group_size` of 1. A
            dict gives a number by module name; modules that it does not name keep `U` in the model's dtype.
        target_modules: names of the modules that are shared; the others stay dense. By default, these are the modules
            that `group_size` names, or else all linear modules of an encoder layer.
        cyclic: whether layers that lie apart share, rather than adjacent ones. There are as many groups, and layer `l`
            is in the group `l` modulo their number: with 6 layers and a `group_size` of 3, the layers 0, 2 and 4 share,
            and 1, 3 and 5. A compression then holds the statistics of all layers at once, which for a large model takes
            many gigabytes.

    Raises:
        ValueError: if a field is invalid; the message names the field, what it must be, and what it was.
    """

    group_size: int | dict[str, int | None] | None = 2
    rank: int = 32
    rank_pattern: dict[str, int] = field(default_factory=dict)
    diagonal: str = "square"
    share_biases: bool = False
    target_modules: tuple[str, ...] | None = None
    shared_bits: int | dict[str, int] | None = None
    bits_pattern: dict[str, int] = field(default_factory=dict)
    block_size: int = BLOCK
    scale_bits: int = SCALE_BITS[0]
    rotation: int | dict[str, int] = 1
    cyclic: bool = False

    def __post_init__(self) -> None:
        sizes = values_of(self.group_size)
        if not sizes or not all(size is None or _is_int(size, 1) for size in sizes):
            raise ValueError(
                "`group_size` must be an integer of at least 1, None, or a dict of such values by module "
                f"name, got {self.group_size!r}"
            )
        if not _is_int(self.rank, 0):
            raise ValueError(f"`rank` must be an integer of at least 0, got {self.rank!r}")
        for name, least, most in (("rank_pattern", 0, math.inf), ("bits_pattern", FEWEST, MOST)):
            object.__setattr__(self, name, _checked_pattern(name, getattr(self, name), least, most))
        for name, choices in (("block_size", BLOCKS), ("scale_bits", SCALE_BITS), ("rotation", ROTATIONS)):
            values = values_of(self.rotation) if name == "rotation" else [getattr(self, name)]
            if not all(_is_int(value, 1) and value in choices for value in values):
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}"
                )
        if self.diagonal not in DIAGONALS:
            raise ValueError(f"`diagonal` must be one of {', '.join(DIAGONALS)}, got {self.diagonal!r}")
        for name in ("share_biases", "cyclic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}")
        if self.shared_bits is not None and not all(
            _is_int(bits, FEWEST, MOST) for bits in values_of(self.shared_bits)
        ):
            raise ValueError(
                f"`shared_bits` must be from {FEWEST} to {MOST}, None, or a dict of such numbers by module name, got "
                f"{self.shared_bits!r}"
            )
        if isinstance(self.shared_bits, dict) and isinstance(self.group_size, dict):
            sizes = [self.group_size.get(name) for name in self.shared_bits]
        if self.shared_bits and (
            None in sizes if isinstance(self.shared_bits, dict) else set(sizes) == {None}
        ):
            raise ValueError(
                f"`shared_bits` must be None where `group_size` leaves out `U`, got {self.shared_bits!r}; a "
                "`group_size` of 1 gives each layer a `U` of its own"
            )
        for name in ("group_size", "shared_bits", "rotation"):
            if isinstance(getattr(self, name), dict):
                object.__setattr__(self, name, dict(getattr(self, name)))
        names = self.target_modules
        if names is not None:
            if (
                not isinstance(names, (list, tuple, set))
                or not names
                or not all(isinstance(name, str) for name in names)
            ):
                raise ValueError(f"`target_modules` must be a list of module names or null, got {names!r}")
            if isinstance(self.group_size, dict) and set(names) != set(self.group_size):
                raise ValueError(
                    "`target_modules` must be null or name what `group_size` names "
                    f"({', '.join(self.group_size)}), got {names!r}"
                )
            object.__setattr__(self, "target_modules", tuple(names))

    @classmethod
    def paper(cls, group_size: int = 3, rank: int = 2) -> ResidualConfig:
        """The form of sharing in the paper: shared biases, and diagonals on square matrices.

        The paper does not state which biases and LayerNorms it shares. With biases shared in the group and a LayerNorm
        per layer, the sizes of an encoder with 18 layers, hidden size 512 and inner size 2048 match the four that it
        publishes: 34.0, 38.1, 21.5 and 15.9 % for (K, R) = (3, 2), (3, 16), (6, 16) and (9, 16).
        """
        return cls(group_size=group_size, rank=rank, diagonal="square", share_biases=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ResidualConfig:
        """Makes a config from plain values; the inverse of `to_dict`.

        Raises:
            ValueError: if a field does not exist or a value is invalid.
        """
        if not isinstance(values, dict):
            raise ValueError(f"`residual_config` must be a ResidualConfig or a dict, got {values!r}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"`residual_config` must have only the fields {', '.join(known)}, got {unknown[0]!r}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        if self.target_modules is not None:
            values["target_modules"] = list(self.target_modules)
        return values

    def names(self) -> dict[str, Iterable[str]]:
        """The module names in each field that can hold module names."""
        sizes, bits, rotations = (
            value if isinstance(value, dict) else ()
            for value in (self.group_size, self.shared_bits, self.rotation)
        )
        return {
            "group_size": sizes,
            "target_modules": self.target_modules or (),
            "shared_bits": bits,
            "rotation": rotations,
        }

    def is_target(self, role: str) -> bool:
        """Whether the modules called `role` are replaced; all others stay dense."""
        names = self.names()
        chosen = [*names["group_size"], *names["target_modules"]]
        return not chosen or role in chosen

    def group_size_of(self, role: str) -> int | None:
        """The number of layers that share a `U` of the modules called `role`; None if they have no `U`."""
        return self.group_size[role] if isinstance(self.group_size, dict) else self.group_size

    def bits_of(self, role: str, path: str | None = None) -> int | None:
        """The bits of each weight of `U`; None if `U` has floats or there is no `U`.

        Args:
            role: name of the module.
            path: path of the matrix in the first layer of its group, such as `layers.3.self_attn.q_proj`. Without it,
                `bits_pattern` does not count.
        """
        if self.group_size_of(role) is None:
            return None
        key = None if path is None else key_of(self.bits_pattern, path)
        if key is not None:
            return self.bits_pattern[key]
        return self.shared_bits.get(role) if isinstance(self.shared_bits, dict) else self.shared_bits

    def rotation_of(self, role: str) -> int:
        """How many inputs of the modules called `role` are rotated together where their `U` has few bits."""
        return self.rotation.get(role, 1) if isinstance(self.rotation, dict) else self.rotation

    def rank_of(self, path: str) -> int:
        """The rank of the matrix at `path`, such as `layers.3.self_attn.q_proj`."""
        key = key_of(self.rank_pattern, path)
        return self.rank if key is None else self.rank_pattern[key]

    def has_diagonal(self, out_features: int, in_features: int) -> bool:
        """Whether a matrix of this shape has a `D_l`."""
        return self.diagonal == "all" or (self.diagonal == "square" and out_features == in_features)


def key_of(pattern: dict[str, int], path: str) -> str | None:
    """The first key of a `rank_pattern` or `bits_pattern` that matches the matrix at `path`; None if no key matches."""
    return next((key for key in pattern if any(_is_end_of(part, path) for part in key.split("|"))), None)


class ResidualConfigMixin(DenseConfig):
    """Adds `residual_config`, that of the encoder, to a dense config class. It comes before that class in the bases.

    Classes with a decoder have two fields more. `decoder_residual_config` is the decoder's, or None where its layers
    stay dense. `embedding_bits` is the number of bits of each weight of the token embedding, or None where it stays
    dense, or such pairs as `[[4096, 5], [51865, 3]]`: tokens below 4096 have five bits, and those from there to 51865
    have three. Its blocks have the `block_size` and `scale_bits` of the decoder, or else of the encoder.

    Whisper's has `short_windows`: whether the encoder leaves out the padding of short recordings, which a model must be
    trained for; see `hrt.distill`.

    A config with an `auto_map`, whatever it says, is saved with the code that opens it; see `carry_code`.

    Each class has a `model_type` of its own, which is saved and by which the Auto classes find it. Instances have the
    dense `model_type`, by which the generation and the ASR pipeline of transformers recognise a Whisper.
    """

    residual_config: Any
    decoder_residual_config: Any
    embedding_bits: EmbeddingBits
    # By Auto class, the module and class that open a checkpoint which carries its code.
    code_map: ClassVar[dict[str, str]]

    def __post_init__(self, **kwargs: Any) -> None:
        known = (type(self).model_type, self.dense_class().model_type)
        model_type = kwargs.pop("model_type", known[0])
        _check_format(kwargs.pop("residual_format", 1))
        if model_type not in known:
            raise ValueError(
                f"`model_type` must be {known[0]!r}, got {model_type!r}; load the checkpoint with "
                "the class of its own family"
            )
        super().__post_init__(**kwargs)
        self.model_type = known[1]  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, from what `to_diff_dict` gives; whatever is wrong in a config is a ValueError.

        Raises:
            ValueError: naming the field.
        """
        # First of all, since a newer format may have fields that this version does not know.
        _check_format(config_dict.get("residual_format", 1))
        try:
            plain = {
                name: json.loads(value.removesuffix(GUARD))
                if isinstance(value, str) and value.endswith(GUARD)
                else value
                for name, value in config_dict.items()
                if value != f"null{GUARD}"
            }
            if plain.get("embedding_bits") and "residual_sharing" in plain:
                # Of a saved model. Before 0.2, merging an adapter of PEFT into it wrote false.
                plain["tie_word_embeddings"] = True
            return super().from_dict(plain, **kwargs)
        except (ValueError, ImportError):
            raise
        except Exception as error:  # of any class, by what the code makes of a wrong value
            raise ValueError(
                f"the config of a `{cls.model_type}` must have the fields of a whole one, got a wrong one: "
                f"{' '.join(str(error).split())}; correct config.json, or fetch it again"
            ) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "residual_config" and not isinstance(value, ResidualConfig):
            value = ResidualConfig() if value is None else ResidualConfig.from_dict(value)
        if name == "decoder_residual_config" and value is not None and not isinstance(value, ResidualConfig):
            value = ResidualConfig.from_dict(value)
        if name == "embedding_bits" and value is not None:
            value = checked_embedding_bits(value)
        if name == "tie_word_embeddings" and not value and self._has_tied_table():
            # PEFT, which compares the addresses of weights, sets it when it merges an adapter, and lets this error be.
            raise AttributeError(
                "`tie_word_embeddings` must be true where the table of tokens is in few bits, which gives the logits "
                f"too, got {value!r}"
            )
        if name == "short_windows" and not isinstance(value, bool):
            raise ValueError(f"`short_windows` must be true or false, got {value!r}")
        super().__setattr__(name, value)

    def _has_tied_table(self) -> bool:
        """Whether the table of tokens is in few bits and tied, so far as the values are set."""
        return bool(getattr(self, "embedding_bits", None)) and self.__dict__.get("tie_word_embeddings", False)

    def to_dict(self) -> dict[str, Any]:
        """The plain values of the dense config, and the residual ones as dicts."""
        values = super().to_dict() | {"residual_config": self.residual_config.to_dict()}
        decoder = getattr(self, "decoder_residual_config", None)
        return values if decoder is None else values | {"decoder_residual_config": decoder.to_dict()}

    def carry_code(self, carries: bool) -> None:
        """Says whether this config is saved with the code that opens it; one from such a folder is unless told so."""
        if carries:
            self.auto_map = dict(self.code_map)
        elif self.carries_code:
            del self.auto_map

    @property
    def carries_code(self) -> bool:
        """Whether this config is saved with the code that opens it."""
        return bool(getattr(self, "auto_map", None))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: transformers calls it for a class of remote code, and saves other files than `carry_code`."""

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, with the code that opens it where `carry_code` says so."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if self.carries_code:
            save_code(Path(save_directory))

    def to_diff_dict(self) -> dict[str, Any]:
        """What the file of the config has."""
        checked = vars(self.dense_class()).get("__annotations__", {})
        names = next(((name,) for name in GUARD_FIELDS if name in checked), HEAD_GUARD_FIELDS)
        guarded = {name: f"{json.dumps(getattr(self, name, None))}{GUARD}" for name in names}
        values = super().to_diff_dict() | {"residual_format": FORMAT} | guarded
        return values | {"auto_map": dict(self.code_map)} if self.carries_code else values

    def residual_config_of(self, stack_name: str) -> ResidualConfig | None:
        """The settings of the "encoder" or of the "decoder"; None for a stack that stays dense."""
        name = "residual_config" if stack_name == "encoder" else "decoder_residual_config"
        found: ResidualConfig | None = getattr(self, name, None)
        return found

    @property
    def embedding_blocks(self) -> tuple[int, int]:
        """The number of weights of the token embedding that have one scale, and the bits of a scale."""
        config = self.residual_config_of("decoder") or self.residual_config
        return config.block_size, config.scale_bits

    @classmethod
    def dense_class(cls) -> type[DenseConfig]:
        """The config class of transformers that this class extends."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))

    @classmethod
    def from_dense_config(cls, config: DenseConfig, residual: ResidualConfig, **fields: Any) -> Any:
        """Makes a residual config that has every value of a dense model's config; `fields` are those of a decoder."""
        return cls(**_portable(config), residual_config=residual, **fields)

    def to_dense_config(self) -> DenseConfig:
        """Makes a dense config that has every value of this one."""
        values = _portable(self)
        for name in RESIDUAL_FIELDS:
            values.pop(name, None)
        return self.dense_class()(**values)


def _check_format(found: Any) -> None:
    if not _is_int(found, 1, FORMAT):
        raise ValueError(
            f"`residual_format` must be from 1 to {FORMAT}, got {found!r}: a newer version of "
            "hf-residual-transformer wrote this checkpoint; update the package"
        )


def checked_embedding_bits(value: Any) -> int | list[list[int]]:
    """`embedding_bits` as a config keeps it. Neighbouring ranges with the same bits become one.

    Raises:
        ValueError: for anything but a number of bits, or ascending ends with numbers of bits.
    """
    if isinstance(value, (list, tuple)):
        merged: list[list[int]] = []
        for pair in value:
            last = merged[-1][0] if merged else 0
            if not (
                isinstance(pair, (list, tuple))
                and len(pair) == 2
                and _is_int(pair[0], last + 1)
                and _is_int(pair[1], FEWEST, MOST)
            ):
                raise ValueError(
                    "`embedding_bits` must have pairs of an id at which a range of tokens ends, each greater than the "
                    f"last, and of bits from {FEWEST} to {MOST}, got {pair!r}"
                )
            if merged and merged[-1][1] == pair[1]:
                merged.pop()
            merged.append(list(pair))
        if merged:
            return merged
    elif _is_int(value, FEWEST, MOST):
        return value  # type: ignore[no-any-return]
    raise ValueError(
        f"`embedding_bits` must be from {FEWEST} to {MOST}, or ranges of tokens, or None, got {value!r}"
    )


def _portable(config: DenseConfig) -> dict[str, Any]:
    """The values that can be copied to the config of another class of model."""
    values = config.to_dict() | {"attn_implementation": config._attn_implementation}
    for key in ("model_type", "architectures", "transformers_version", "auto_map", *FILE_FIELDS):
        values.pop(key, None)
    return values
