"""Turns a dense transformers class into its residual one: `ResidualMixin` swaps the linear modules of its layers, and
its token embedding, after the dense class has built itself, so that no modelling code is copied.

The layer is in `layers.py`, the way from trained dense weights in `conversion.py`.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations import PeftAdapterMixin
from transformers.utils import find_adapter_config_file

from .configuration import MEAN_FORMAT, ResidualConfig, key_of
from .families import Family, Stack, groups_of
from .folders import save_processor, shards_of
from .kernels import FEW_SEQUENCES, suits
from .layers import (
    OLD_NAMES,
    SHARED,
    ChannelsFirst,
    LowRankLinear,
    MixedEmbedding,
    PointwiseLowRank,
    PointwiseResidual,
    QuantizedEmbedding,
    QuantizedSharedLinear,
    QuantizedWeight,
    ResidualLinear,
    SharedLinear,
    TiedOutput,
    as_linear,
    unpacked_weights,
)
from .quantization import check_blocks

if TYPE_CHECKING:
    DenseModel = PreTrainedModel
else:
    DenseModel = object


MOST_LAYERS = 1000  # a broken config must not build layers until the memory ends
LARGEST = 1e15  # no trained weight is near it, and float32 cannot hold the squares of much larger ones
# The dtypes of weights, as torch and as safetensors call them.
PACKED = {"torch.uint8": "U8"}
INTEGERS = {"torch.int8": "I8"}
COUNTS = {"torch.int64": "I64"}
# By the end of a weight's name. The last is what a batch norm counts.
OTHER_DTYPES = {"weight_packed": PACKED, "weight_levels": INTEGERS, "num_batches_tracked": COUNTS}
FLOATS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}

HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")  # of `push_to_hub`


class ResidualMixin(DenseModel):
    """Makes a residual class of a dense one; it stands before the dense class in the bases.

    `U` of every group is registered on the encoder, as `encoder.shared.<module>.<group>`, or likewise on the decoder,
    and everything else keeps the name that it has in the dense model.
    """

    family: ClassVar[Family]
    config_class: Any
    processor: Any = None  # set by `hrt.compress`, and saved by `save_pretrained`
    # These classes average their losses themselves, whatever `**kwargs` their forward takes: Trainer must
    # divide by the number of accumulated steps.
    accepts_loss_kwargs = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(config, "residual_config"):
            raise ValueError(
                f"`config` must be a {self.config_class.__name__}, got {type(config).__name__}; to keep a "
                f"dense model's weights, use {type(self).__name__}.from_dense(...)"
            )
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"`config` must be a {self.config_class.__name__}, got {type(config).__name__}; load the checkpoint "
                "with the class of its own family, or with an Auto class"
            )
        for name in ("encoder_layers", "decoder_layers", "num_hidden_layers"):
            if not getattr(config, name, 0) <= MOST_LAYERS:
                raise ValueError(
                    f"`{name}` must be at most {MOST_LAYERS}, got {getattr(config, name)}; correct config.json, or "
                    "fetch it again"
                )
        for name in ("encoder_attention_heads", "decoder_attention_heads", "num_attention_heads"):
            heads = getattr(config, name, 1)
            if isinstance(heads, int) and heads < 1:
                raise ValueError(
                    f"`{name}` must be at least 1, got {heads}; correct config.json, or fetch it again"
                )
        super().__init__(config, *args, **kwargs)
        if self.family.adapt is not None:
            self.family.adapt(self)
        for stack in self.family.stacks:
            residual = config.residual_config_of(stack.name)
            if residual is None or not stack.is_in(self):
                continue
            owner = stack.find(self)
            _share_layers(owner, self.family, stack.of_layer(owner.layers[0]), residual)
            # A group's layers may not be separated from its U by a `device_map` or an FSDP wrap policy.
            self._no_split_modules = {type(owner).__name__, *(self._no_split_modules or ())}
        if (
            getattr(config, "embedding_bits", None)
            and self.family.decoder
            and self.family.decoder.is_in(self)
        ):
            self._quantize_embedding(config.embedding_bits, *config.embedding_blocks)
        self.post_init()

    def _quantize_embedding(self, bits: int | list[list[int]], block_size: int, scale_bits: int) -> None:
        """Puts few bits in the place of the token embedding, and of the output that is tied to it."""
        embedding: Any = self.get_input_embeddings()
        output = self.get_output_embeddings()
        if output is not None and not self.config.tie_word_embeddings:
            raise ValueError(
                "`embedding_bits` must be None for a model whose output is not tied to its embedding"
            )
        check_blocks("the token embedding", embedding.embedding_dim, block_size)
        if isinstance(bits, int):
            self.set_input_embeddings(QuantizedEmbedding(embedding, bits, block_size, scale_bits))
        else:
            if bits[-1][0] != embedding.num_embeddings:
                raise ValueError(
                    f"`embedding_bits` must end at {embedding.num_embeddings}, the number of tokens, got {bits}"
                )
            self.set_input_embeddings(MixedEmbedding(embedding, bits, block_size, scale_bits))
        if output is not None:
            self.set_output_embeddings(TiedOutput(self))
            self._tied_weights_keys = {}  # the output has no weight that could be tied

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: initialisation uses `transformers.initialization` throughout, which leaves loaded weights
        alone. Where this is true, transformers skips modules without parameters of their own, and with
        them Whisper's sinusoidal positions and wav2vec2's feature projection.
        """
        return False

    def initialize_weights(self) -> None:
        """Initialises the residual components, wherever they are, and all else as the dense class does."""
        for module in self.modules():
            is_new = not getattr(module, "_is_hf_initialized", False)
            if is_new and isinstance(module, (ResidualLinear, QuantizedWeight)):
                module.reset_parameters()
        super().initialize_weights()

    @classmethod
    def dense_class(cls) -> type[PreTrainedModel]:
        """The class of transformers that this one is the residual form of."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not fit the model is an error. Only the weights of a head that
        the checkpoint's own class does not have may be missing; they are random, as in transformers.

        Raises:
            ValueError: when the checkpoint is dense, does not fit its `residual_config`, lacks weights, is truncated,
                or has weights that are NaN, infinite or of a magnitude that none has.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["key_mapping"] = {
            **{rf"\.{old}$": f".{new}" for old, new in OLD_NAMES.items()},
            **(kwargs.get("key_mapping") or {}),
        }
        checkpoint = f"the checkpoint {str(pretrained_model_name_or_path)!r}"
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        for index in folder.glob("*.safetensors.index.json"):
            if not (
                folder / index.name.removesuffix(".index.json")
            ).is_file():  # which transformers reads instead
                shards_of(index)  # else a file elsewhere would be read, or a device without an end
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"{checkpoint} cannot be read, it may be truncated: {error}") from error
        except (ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "ignore_mismatched_sizes" in str(error):
                raise ValueError(
                    f"{checkpoint} does not fit {cls.__name__}: some weights do not have the shapes that its "
                    "config.json (`residual_config`, sizes, labels) says; the report logged above lists them"
                ) from error
            names = "`", str(pretrained_model_name_or_path)  # of a field, or of the checkpoint
            is_clear = type(error) is ValueError and any(name in str(error) for name in names)
            if is_clear or isinstance(error, OSError):
                raise
            raise ValueError(
                f"{checkpoint} cannot be loaded, its config.json, index or weights may be damaged: "
                f"{type(error).__name__}: {error}"
            ) from error
        model, info = loaded
        recorded = _recorded(pretrained_model_name_or_path, kwargs)
        missing_keys = info["missing_keys"]
        if recorded.get("residual_format", 1) < MEAN_FORMAT:  # the means of older files are 0
            missing_keys = {key for key in missing_keys if not key.endswith(".weight_mean")}
        owners = [stack.find(model) for stack in cls.family.stacks if stack.is_in(model)]
        paths = [path for path, module in model.named_modules() if module in owners]
        # A checkpoint of the model without its head has shorter paths.
        places = "|".join({rf"(^|\.){path.rpartition('.')[2]}\." if path else "^" for path in paths})
        of_layers_or_table = re.compile(rf"({places})(layers|shared|embed_tokens)\.|\bproj_out\.")
        for problem, keys in (
            ("lacks", missing_keys),
            ("has the wrong shape for", {key for key, *_ in info["mismatched_keys"]}),
            ("has no use for its", info["unexpected_keys"]),
        ):
            of_layers = sorted(key for key in keys if of_layers_or_table.search(key))
            if of_layers:
                raise ValueError(
                    f"{checkpoint} does not fit {cls.__name__}: it {problem} {of_layers[0]!r} "
                    f"({len(of_layers)} such weights). Convert a dense checkpoint with {cls.__name__}."
                    "from_dense(...); of a residual one, check `residual_config` in its config.json"
                )
        missing = sorted(key for key in missing_keys if not _is_of_new_head(model, key))
        if missing:
            raise ValueError(
                f"{checkpoint} does not fit {cls.__name__}: it lacks {missing[0]!r} ({len(missing)} such weights), "
                "which would be random; save or fetch the checkpoint again"
            )
        _check_sharing(checkpoint, model, recorded.get("residual_sharing"))
        _check_rotations(checkpoint, model, recorded.get("residual_rotations"))
        for name, value in model.named_parameters():
            _check_finite(checkpoint, name, value)
        for module in model.modules():
            if isinstance(module, QuantizedWeight) and not module.weight_packed.is_meta:
                # They are not cast to another dtype, so that without a copy they would keep the whole file mapped.
                for buffer_name, buffer in module.named_buffers(recurse=False):
                    setattr(module, buffer_name, buffer.clone())
        return loaded if wants_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Checks the dtypes of weights before transformers casts them to the model's."""
        _check_dtypes(state_dict, checkpoint_files)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @classmethod
    def from_dense(
        cls,
        dense: PreTrainedModel | str,
        residual_config: ResidualConfig | None = None,
        calibration: Iterable[Any] | None = None,
        **options: Any,
    ) -> Any:
        """A residual model from a trained dense one; see `compression.conversion.convert`, whose options it takes."""
        compression = _of_package("compression.conversion")
        return compression.convert(cls, dense, residual_config, calibration, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing: transformers calls it for a class of remote code, and saves other files than `with_code`."""

    def save_pretrained(
        self, save_directory: Any, *args: Any, with_code: bool | None = None, **kwargs: Any
    ) -> None:
        """As in transformers; a `processor` that the model carries is saved with it, so that `pipeline` can open it.

        Args:
            save_directory: the folder.
            args: as in transformers.
            with_code: whether the folder gets the code of the model too, so that `trust_remote_code=True` opens it
                where this package is not installed. By default it does where the model came from such a folder.
            kwargs: as in transformers.

        Raises:
            ValueError: if `with_code` is true for a model with an adapter, of which only the adapter is saved, or for
                one of a class that this package does not have.
        """
        if not hasattr(self, "peft_config") and any(
            hasattr(module, "base_layer") for module in self.modules()
        ):
            raise ValueError(
                "the model has layers of PEFT without an adapter, as after one that was refused, and could not be "
                "loaded if it were saved; load it again from where it came"
            )
        if with_code is not None:
            self._carry_code(with_code)
        pushes = kwargs.pop("push_to_hub", False) and kwargs.get("is_main_process", True)
        of_hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        # Names as here: those of checkpoints that came before transformers do not fit the compact parts.
        kwargs.setdefault("save_original_format", False)
        if not hasattr(self, "peft_config"):  # with an adapter, only this is saved
            self.config.residual_sharing = sharing_of(self)
            self.config.residual_rotations = rotations_of(self)
            _note_ranks(self)
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.processor is not None:
            save_processor(self.processor, Path(save_directory))
        if pushes:  # here, so that the processor and a card go with it
            self.push_to_hub(of_hub.pop("repo_id", Path(save_directory).name), **of_hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Uploads the model with its processor, its card and, `with_code=True`, its code in one commit.

        Args:
            repo_id: such as "name/model".
            options: those of transformers, and `with_code` and `card`; see `hf_residual_transformer.hub.push`.
        """
        return _of_package("hub").push(self, repo_id, **options)

    def _carry_code(self, carries: bool) -> None:
        if carries and hasattr(self, "peft_config"):
            raise ValueError(
                "`with_code` must be False for a model with an adapter, of which only the adapter is saved; merge it"
            )
        own = [cls.__name__ for cls in type(self).__mro__ if cls.__module__ == f"{__package__}.classes"]
        if carries and type(self).__name__.removeprefix("FSDP") not in own:
            raise ValueError(
                f"`with_code` must be False for a {type(self).__name__}, a class outside of this package, whose code "
                f"would not be saved: the folder would be opened as a {own[0] if own else 'dense model'}"
            )
        self.config.carry_code(carries)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """As in transformers, where adapters reach the matrices of residual layers too."""
        super().add_adapter(_of_package("adapters").reaching(adapter_config, self), adapter_name)

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, where adapters reach the matrices of residual layers too."""
        of_peft = {"peft_config", "load_config"} & set(kwargs)
        options = kwargs.get("adapter_kwargs") or {}
        # The languages of wav2vec2, which have adapters of their own, are neither folders nor ids.
        is_name = Path(str(peft_model_id)).is_dir() or "/" in str(peft_model_id)
        if not of_peft and not (is_name and find_adapter_config_file(str(peft_model_id), **options)):
            return super().load_adapter(peft_model_id, *args, **kwargs)
        config = kwargs.pop("peft_config", None)
        if config is None:
            config = importlib.import_module("peft").PeftConfig.from_pretrained(peft_model_id, **options)
            if "load_config" not in kwargs:  # beside a config, `adapter_kwargs` do nothing
                kwargs.setdefault("download_kwargs", dict(options))
        config = _of_package("adapters").reaching(config, self)
        load: Any = PeftAdapterMixin.load_adapter
        return load(self, peft_model_id, *args, peft_config=config, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: for another number of tokens where their table is in few bits.
        """
        table = self.get_input_embeddings()
        known = getattr(table, "num_embeddings", None)
        if new_num_tokens not in (None, known) and isinstance(table, (QuantizedEmbedding, MixedEmbedding)):
            raise ValueError(
                f"`new_num_tokens` must be {known} where the table of tokens is in few bits, got {new_num_tokens}; add "
                "tokens to the dense model before it is compressed, or to merge()"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """The plain dense model with the same outputs, for use where this package is not installed.

        Every matrix becomes `U + B A + D`, so it has the dense model's size again. The weights are copies.

        Raises:
            ValueError: for a model with an adapter, and for one whose weights are offloaded.
        """
        if any(hasattr(module, "base_layer") for module in self.modules()):
            raise ValueError(
                f"`merge` must be of a {type(self).__name__} without an adapter, got one with layers of PEFT; call "
                "merge_and_unload() of PEFT's model first, or load the model without the adapter"
            )
        hooked = any(hasattr(module, "_hf_hook") for module in self.modules())  # by Accelerate
        offloaded = [key for key, value in self.state_dict().items() if value.is_meta]
        if hooked and offloaded:  # without hooks, a model may have shapes alone
            raise ValueError(
                f"`merge` must be of a {type(self).__name__} whose weights are all loaded, got {offloaded[0]!r} "
                f"offloaded ({len(offloaded)} such weights); load the model without a `device_map` that offloads"
            )
        own = {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, (ResidualLinear, *SHARED, QuantizedWeight))
            for name in module.state_dict()
        }
        weights = {key: value.clone() for key, value in self.state_dict().items() if key not in own}
        for path, linear in residual_linears(self):
            weight = linear.weight.unsqueeze(-1) if isinstance(linear, ChannelsFirst) else linear.weight
            weights[f"{path}.weight"] = weight.clone()
            bias = linear.bias
            if bias is not None:
                weights[f"{path}.bias"] = bias.clone()
        for path, module in self.named_modules():
            # Those in the ranges of a `MixedEmbedding` have names that no dense model has.
            if isinstance(module, (QuantizedEmbedding, MixedEmbedding, TiedOutput)) and ".parts." not in path:
                weights[f"{path}.weight"] = module.weight.clone()
        with init.no_init_weights():
            dense = self.dense_class()(self.config.to_dense_config())
        dense.load_state_dict(weights, assign=True)
        dense.tie_weights()
        # Buffers that are not saved, such as sinusoids, were made anew, in float32 on the CPU.
        buffers = dict(self.named_buffers())
        for path, _ in list(dense.named_buffers()):
            if path not in weights:
                owner, _, name = path.rpartition(".")
                setattr(dense.get_submodule(owner), name, buffers[path].clone())
        if self.can_generate():
            dense.generation_config = copy.deepcopy(self.generation_config)
        return dense.train(self.training)


class ResidualGenerationMixin(ResidualMixin):
    """A `ResidualMixin` for dense classes that generate."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Each token uses the decoder's weights again, so they are unpacked once and kept
        meanwhile, in the memory of a dense decoder. Where a kernel multiplies by few bits (`kernels.py`), they stay
        packed for a few sequences.
        """
        decoder = self.family.decoder
        inputs = args[0] if args else kwargs.get(self.main_input_name)
        config = kwargs.get("generation_config") or self.generation_config
        wanted = [
            kwargs.get(name) or getattr(config, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        ]
        number = max(wanted) * len(inputs) if isinstance(inputs, Tensor) else 0
        packed = number <= FEW_SEQUENCES and suits(self.dtype, self.device, number)
        part = decoder.find(self) if decoder and decoder.is_in(self) and not packed else None
        with nullcontext() if part is None else unpacked_weights(part):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def _is_of_new_head(model: Any, key: str) -> bool:
    """Whether a missing weight belongs to a head that the class which saved the checkpoint does not have."""
    dense_class = model.dense_class()
    saved_by = model.config.architectures or ()
    if {type(model).__name__, dense_class.__name__} & set(saved_by):
        return False
    if dense_class is AutoModel._model_mapping.get(model.config_class.dense_class(), None):
        return False
    body = {model.base_model_prefix, *(stack.name for stack in model.family.stacks)}
    return key.partition(".")[0] not in body


def _check_finite(checkpoint: str, name: str, value: Tensor) -> None:
    largest = 0.0 if value.is_meta or not value.numel() else value.detach().abs().max().item()
    if not largest < LARGEST:
        found = f"a value of magnitude {largest:.0e}" if math.isfinite(largest) else "NaN or infinity"
        raise ValueError(
            f"{checkpoint} has {found} in {name!r}, so that its outputs would be wrong; fetch it again, or train again "
            "from a checkpoint whose weights are finite"
        )


def _check_dtypes(state_dict: Any, checkpoint_files: Any) -> None:
    """Raises ValueError for packed weights that are not bytes, and others that are not floating-point numbers of at
    least 16 bits; of files, only the headers are read.
    """
    dtypes = {key: str(value.dtype) for key, value in (state_dict or {}).items()}
    for path in checkpoint_files or ():
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as tensors:
                dtypes |= {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    for key, dtype in dtypes.items():
        names = next((names for end, names in OTHER_DTYPES.items() if key.endswith(end)), FLOATS)
        if dtype not in {*names, *names.values()}:
            wanted = " or ".join(name.removeprefix("torch.") for name in names)
            raise ValueError(
                f"{key!r} of the checkpoint must be of dtype {wanted}, got {dtype}; fetch it again"
            )


def sharing_of(model: Any) -> dict[str, dict[str, list[Any]]]:
    """By stack and module, the sizes of the groups of adjacent layers that share a matrix, or the layers of each group
    where they lie apart.
    """
    found = {}
    for stack in model.family.stacks:
        owner: Any = stack.find(model) if stack.is_in(model) else None
        if owner is not None and hasattr(owner, "shared"):
            found[stack.name] = {
                role: _sizes_or_layers(_linears_at(owner, path))
                for role, path in stack.of_layer(owner.layers[0]).roles.items()
                if path.replace(".", "_") in owner.shared
            }
    return found


def _sizes_or_layers(linears: Iterable[ResidualLinear]) -> list[Any]:
    groups = defaultdict(list)
    for layer_idx, linear in enumerate(linears):
        groups[linear.group_idx].append(layer_idx)
    are_adjacent = all(group[-1] - group[0] == len(group) - 1 for group in groups.values())
    return [len(group) for group in groups.values()] if are_adjacent else list(groups.values())


def _linears_at(owner: Any, path: str) -> Iterator[ResidualLinear]:
    found = (layer.get_submodule(path) for layer in owner.layers)
    return (getattr(module, "base_layer", module) for module in found)  # under an adapter of PEFT


def rotations_of(model: Any) -> list[int]:
    """The numbers of columns that are rotated together in matrices of the model, each once, in ascending order."""
    return sorted({module.rotation for module in model.modules() if isinstance(module, QuantizedWeight)})


def _recorded(folder_or_id: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What the config file of a checkpoint says; nothing where there is none."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    known = {name: options[name] for name in names if name in options}
    try:
        values, _ = PreTrainedConfig.get_config_dict(folder_or_id, **known)
    except (OSError, TypeError):  # weights without a config, such as a state dict
        return {}
    return dict(values)


def _check_rotations(checkpoint: str, model: Any, recorded: Any) -> None:
    """Raises ValueError where matrices would be rotated otherwise than they were."""
    if recorded is not None and not (
        isinstance(recorded, list) and all(isinstance(number, int) for number in recorded)
    ):
        raise ValueError(
            f"{checkpoint} has a wrong config: `residual_rotations` must be a list of numbers, got {recorded!r}; "
            "correct config.json, or fetch it again"
        )
    if recorded is not None and not set(rotations_of(model)) <= set(recorded):  # a part may have fewer
        raise ValueError(
            f"{checkpoint} does not fit {type(model).__name__}: its matrices have rotations of {recorded}, but the "
            f"config says {rotations_of(model)}; `rotation` of `residual_config` must be as it was when the checkpoint "
            "was saved"
        )


def _check_sharing(checkpoint: str, model: Any, recorded: Any) -> None:
    """Raises ValueError where layers would use a `U` that they do not share."""
    if recorded and not (isinstance(recorded, dict) and all(isinstance(v, dict) for v in recorded.values())):
        raise ValueError(
            f"{checkpoint} has a wrong config: `residual_sharing` must be a dict of dicts, got {recorded!r}; correct "
            "config.json, or fetch it again"
        )
    actual = sharing_of(model) if recorded else {}
    for stack, roles in (recorded or {}).items():
        for role in () if stack not in actual else {**roles, **actual.get(stack, {})}:
            saved, claimed = roles.get(role), actual.get(stack, {}).get(role)
            if saved != claimed:
                raise ValueError(
                    f"{checkpoint} does not fit {type(model).__name__}: its layers share {role!r} of the {stack} in "
                    f"groups of {saved} layers, but the config says {claimed}; `group_size` and `cyclic` of "
                    "`residual_config` must be as they were when the checkpoint was saved"
                )


def _of_package(name: str) -> Any:
    """A module that does not travel with a checkpoint's code.

    Raises:
        ImportError: where this file is a part of such code.
    """
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith(f"{__package__}."):
            raise
        raise ImportError(
            "the code that travels with a checkpoint loads, runs, trains and saves it; this needs the package: pip "
            "install hf-residual-transformer"
        ) from error


def configs_with_ranks(model: Any, ranks: dict[str, int]) -> dict[str, ResidualConfig]:
    """The settings of each stack of a model, by their name in its config, with the rank of each layer by its path."""
    configs = {}
    for stack in model.family.stacks:
        config = model.config.residual_config_of(stack.name)
        if config is None or not stack.is_in(model):
            continue
        owner = stack.find(model)
        place = "".join(f"{name}." for name, module in model.named_modules() if module is owner and name)
        of_stack = {
            path.removeprefix(place): rank
            for path, rank in ranks.items()
            if path.startswith(f"{place}layers.")
        }
        if any(config.rank_of(path) != rank for path, rank in of_stack.items()):
            config = replace(config, rank_pattern=of_stack)
        configs["residual_config" if stack.name == "encoder" else "decoder_residual_config"] = config
    return configs


def _note_ranks(model: Any) -> None:
    """Writes into the config what ranks the layers have, which grow where an adapter is merged into them."""
    ranks = {path: linear.rank for path, linear in residual_linears(model)}
    for name, config in configs_with_ranks(model, ranks).items():
        setattr(model.config, name, config)


def residual_linears(model: nn.Module) -> Iterator[tuple[str, ResidualLinear]]:
    """Path and module of every `ResidualLinear` in `model`, in the order of the layers."""
    for path, module in model.named_modules():
        if isinstance(module, ResidualLinear):
            yield path, module


def _share_layers(owner: Any, family: Family, stack: Stack, config: ResidualConfig) -> None:
    """Replaces the targeted `nn.Linear`s of every layer of a stack, and registers their shared weights on its owner."""
    roles, place = stack.roles, f"{family.name} {stack.name} layer"
    for field, names in config.names().items():
        for name in names:
            if name not in roles:
                raise ValueError(
                    f"`{field}` must name modules of a {place} ({', '.join(roles)}), got {name!r}"
                )
    used: dict[str, set[str | None]] = {"rank_pattern": set(), "bits_pattern": set()}
    owner.shared = nn.ModuleDict()
    for role, module_path in roles.items():
        if not config.is_target(role):
            continue
        group_size = config.group_size_of(role)
        bank = nn.ModuleList()
        if group_size is not None:
            owner.shared[module_path.replace(".", "_")] = bank
        for group_idx, group in enumerate(groups_of(len(owner.layers), group_size or 1, config.cyclic)):
            convolves = isinstance(owner.layers[group[0]].get_submodule(module_path), nn.Conv1d)
            dense = as_linear(owner.layers[group[0]].get_submodule(module_path))
            has_bias = dense.bias is not None
            shares_bias = has_bias and config.share_biases and group_size is not None
            if group_size is not None:
                first = f"layers.{group[0]}.{module_path}"
                used["bits_pattern"].add(key_of(config.bits_pattern, first))
                bits, rotation = config.bits_of(role, first), config.rotation_of(role)
                bank.append(_shared_like(dense, config, bits, rotation, shares_bias, module_path))
            for layer_idx in group:
                path = f"layers.{layer_idx}.{module_path}"
                used["rank_pattern"].add(key_of(config.rank_pattern, path))
                rank = _checked_rank(config, path, dense.weight.shape, least=int(group_size is None))
                own = {
                    "diagonal": config.has_diagonal(*dense.weight.shape),
                    "bias": has_bias and not shares_bias,
                }
                linear: ResidualLinear
                if group_size is None:
                    low_rank = PointwiseLowRank if convolves else LowRankLinear
                    linear = low_rank(dense.weight, layer_idx, rank, **own)
                else:
                    residual = PointwiseResidual if convolves else ResidualLinear
                    linear = residual(bank, group_idx, rank, **own)
                owner.layers[layer_idx].set_submodule(module_path, linear)
    for field, keys in used.items():
        for key in getattr(config, field):
            if key not in keys:
                raise ValueError(
                    f"`{field}` must name modules of the {stack.name} ({', '.join(roles)}, or paths that end so) "
                    f"that no earlier key names, got {key!r}"
                )


def _shared_like(
    dense: nn.Linear, config: ResidualConfig, bits: int | None, rotation: int, bias: bool, module_path: str
) -> SharedLinear | QuantizedSharedLinear:
    """The module for the `U` of a group of matrices like `dense`."""
    weight = dense.weight
    shape = (dense.in_features, dense.out_features, bias, weight.device, weight.dtype)
    if bits is None:
        return SharedLinear(*shape)
    check_blocks(module_path, dense.in_features, config.block_size)
    return QuantizedSharedLinear(*shape, bits, config.block_size, config.scale_bits, rotation)


def _checked_rank(config: ResidualConfig, path: str, shape: Sequence[int], least: int) -> int:
    rank, (out_features, in_features) = config.rank_of(path), shape
    most = min(out_features, in_features)
    if not least <= rank <= most:
        field = "rank" if key_of(config.rank_pattern, path) is None else "rank_pattern"
        bounds = f"at most {most}" if rank > most else f"at least {least} where nothing is shared"
        raise ValueError(
            f"`{field}` must be {bounds} for {path} of shape ({out_features}, {in_features}), got {rank}"
        )
    return rank


@contextmanager
def forward_as(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of `model`, or of what wraps it, is a call of `forward`."""
    own = model.__dict__.get("forward")
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.forward = own  # type: ignore[method-assign]
