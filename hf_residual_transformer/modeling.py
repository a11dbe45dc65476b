"""Turns a dense transformers class into its residual one: `ResidualMixin` swaps the encoder's linear modules
after the dense class has built itself, so that no modelling code is copied.

The layer is in `layers.py`, the way from trained dense weights in `conversion.py`.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration import ResidualConfig
from .families import Family, groups_of
from .folders import save_processor
from .layers import SHARED, LowRankLinear, QuantizedSharedLinear, ResidualLinear, SharedLinear
from .quantization import BLOCK

if TYPE_CHECKING:
    DenseModel = PreTrainedModel
else:
    DenseModel = object


class ResidualMixin(DenseModel):
    """Makes a residual class of a dense one; it stands before the dense class in the bases.

    `U` of every group is registered on the encoder, as `encoder.shared.<module>.<group>`, and everything
    else keeps the name that it has in the dense model.
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
        super().__init__(config, *args, **kwargs)
        encoder = self.family.find_encoder(self)
        _share_layers(encoder, self.family, config.residual_config)
        # A group's layers may not be separated from its U by a `device_map` or an FSDP wrap policy.
        self._no_split_modules = {type(encoder).__name__, *(self._no_split_modules or ())}
        self.post_init()

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
            if is_new and isinstance(module, (ResidualLinear, QuantizedSharedLinear)):
                module.reset_parameters()
        super().initialize_weights()

    @classmethod
    def dense_class(cls) -> type[PreTrainedModel]:
        """The class of transformers that this one is the residual form of."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not fit the encoder's layers is an error.

        Raises:
            ValueError: when the checkpoint is dense, does not fit its `residual_config`, or is truncated.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        checkpoint = f"the checkpoint {str(pretrained_model_name_or_path)!r}"
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"{checkpoint} cannot be read, it may be truncated: {error}") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"{checkpoint} does not fit {cls.__name__}: some weights do not have the shapes that its "
                "config.json (`residual_config`, sizes, labels) says; the report logged above lists them"
            ) from error
        model, info = loaded
        encoder = cls.family.find_encoder(model)
        encoder_name = next(
            path.rpartition(".")[2] for path, module in model.named_modules() if module is encoder
        )
        for problem, keys in (
            ("lacks", info["missing_keys"]),
            ("has the wrong shape for", {key for key, *_ in info["mismatched_keys"]}),
            ("has no use for its", info["unexpected_keys"]),
        ):
            of_layers = sorted(key for key in keys if re.search(rf"\b{encoder_name}\.(layers|shared)\.", key))
            if of_layers:
                raise ValueError(
                    f"{checkpoint} does not fit {cls.__name__}: it {problem} {of_layers[0]!r} "
                    f"({len(of_layers)} such weights). Convert a dense checkpoint with {cls.__name__}."
                    "from_dense(...); of a residual one, check `residual_config` in its config.json"
                )
        for module in model.modules():
            if isinstance(module, QuantizedSharedLinear) and not module.weight_packed.is_meta:
                # It is not cast to another dtype, so that without a copy it would keep the whole file mapped.
                module.weight_packed = module.weight_packed.clone()
        return loaded if wants_info else model

    @classmethod
    def from_dense(
        cls,
        dense: PreTrainedModel | str,
        residual_config: ResidualConfig | None = None,
        calibration: Iterable[Any] | None = None,
        **options: Any,
    ) -> Any:
        """A residual model from a trained dense one; see `compression.conversion.convert`, whose options it takes."""
        # The model's own files may travel with a checkpoint without the rest of the package.
        compression = importlib.import_module(f"{__package__}.compression.conversion")
        return compression.convert(cls, dense, residual_config, calibration, **options)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; a `processor` that the model carries is saved with it, so that `pipeline` can open it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.processor is not None:
            save_processor(self.processor, Path(save_directory))

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """The plain dense model with the same outputs, for use where this package is not installed.

        Every matrix becomes `U + B A + D`, so it has the dense model's size again. The weights are copies.
        """
        own = {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, (ResidualLinear, *SHARED))
            for name in module.state_dict()
        }
        weights = {key: value.clone() for key, value in self.state_dict().items() if key not in own}
        for path, linear in residual_linears(self):
            weights[f"{path}.weight"] = linear.weight.clone()
            bias = linear.bias
            if bias is not None:
                weights[f"{path}.bias"] = bias.clone()
        with init.no_init_weights():
            dense = self.dense_class()(self.config.to_dense_config())
        dense.load_state_dict(weights, assign=True)
        dense.tie_weights()
        if self.can_generate():
            dense.generation_config = copy.deepcopy(self.generation_config)
        return dense.train(self.training)


def residual_linears(model: nn.Module) -> Iterator[tuple[str, ResidualLinear]]:
    """Path and module of every `ResidualLinear` in `model`, in the order of the layers."""
    for path, module in model.named_modules():
        if isinstance(module, ResidualLinear):
            yield path, module


def _share_layers(encoder: Any, family: Family, config: ResidualConfig) -> None:
    """Replaces the targeted `nn.Linear`s of every layer, and registers their shared weights on `encoder`."""
    roles = family.encoder.roles
    for field, names in config.names().items():
        for name in names:
            if name not in roles:
                raise ValueError(
                    f"`{field}` must name modules of a {family.name} encoder layer ({', '.join(roles)}), "
                    f"got {name!r}"
                )
    used_patterns = set()
    encoder.shared = nn.ModuleDict()
    for role, module_path in roles.items():
        if not config.is_target(role):
            continue
        group_size = config.group_size_of(role)
        bank = nn.ModuleList()
        if group_size is not None:
            encoder.shared[module_path.replace(".", "_")] = bank
        for group_idx, group in enumerate(groups_of(len(encoder.layers), group_size or 1)):
            dense = encoder.layers[group[0]].get_submodule(module_path)
            out_features, in_features = dense.weight.shape
            has_bias = dense.bias is not None
            shares_bias = has_bias and config.share_biases and group_size is not None
            if group_size is not None:
                bits = config.bits_of(role)
                if bits and in_features % BLOCK:
                    raise ValueError(
                        f"`shared_bits` must be None for {module_path}, whose {in_features} inputs are no multiple of "
                        f"{BLOCK}, got {bits}"
                    )
                weight = dense.weight
                shape = (in_features, out_features, shares_bias, weight.device, weight.dtype)
                bank.append(QuantizedSharedLinear(*shape, bits) if bits else SharedLinear(*shape))
            for layer_idx in group:
                path = f"layers.{layer_idx}.{module_path}"
                used_patterns.add(config.pattern_of(path))
                rank = _checked_rank(config, path, out_features, in_features, least=int(group_size is None))
                own = {
                    "diagonal": config.has_diagonal(out_features, in_features),
                    "bias": has_bias and not shares_bias,
                }
                linear = (
                    LowRankLinear(dense.weight, layer_idx, rank, **own)
                    if group_size is None
                    else ResidualLinear(bank, group_idx, rank, **own)
                )
                encoder.layers[layer_idx].set_submodule(module_path, linear)
    for key in config.rank_pattern:
        if key not in used_patterns:
            raise ValueError(
                f"`rank_pattern` must name modules of the encoder ({', '.join(roles)}, or paths that end so) "
                f"that no earlier key names, got {key!r}"
            )


def _checked_rank(config: ResidualConfig, path: str, out_features: int, in_features: int, least: int) -> int:
    rank = config.rank_of(path)
    most = min(out_features, in_features)
    if not least <= rank <= most:
        field = "rank" if config.pattern_of(path) is None else "rank_pattern"
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
