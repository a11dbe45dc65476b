"""Adapters of PEFT: the low rank of a residual model becomes one and is made from one, and others train on top of it.

A residual layer is `U + B A + D`, and a LoRA layer is `W + (alpha / r) B A` (https://arxiv.org/abs/2106.09685, section
4.1). With `W = U + D` and `alpha = r` they are the same. PEFT is imported when one of these functions is called.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .classes import model_classes_of
from .configuration import ResidualConfig
from .families import FAMILIES
from .layers import (
    NOTHING_TO_COPY,
    ChannelsFirst,
    MixedEmbedding,
    QuantizedEmbedding,
    ResidualLinear,
    TiedOutput,
    as_linear,
)
from .modeling import ResidualMixin, configs_with_ranks, residual_linears

BANKS = r"(.*\.)?shared\..*"  # paths of the modules with shared matrices
PREFIX = "base_model.model."  # of the keys of an adapter's file
WEIGHTS = "adapter_model.safetensors"


def reach(config: Any, model: Any = None) -> Any:
    """A `LoraConfig` for `get_peft_model(model, reach(config))`, whose `target_modules` also reach the matrices of
    residual layers. It is changed in place. With the model too, what its layers cannot have is refused before PEFT has
    changed any of them. `add_adapter`, `load_adapter` and the Auto classes need no such call.

    Raises:
        ValueError: for a `task_type`, with which `get_peft_model` would pass `input_ids` to the model.
    """
    if config.task_type is not None:
        raise ValueError(
            "`task_type` must be None for a speech model, since PEFT would pass `input_ids` to it, got "
            f"{config.task_type!r}"
        )
    return reaching(config, model)


def reaching(config: Any, model: Any = None) -> Any:
    """The same where no model of PEFT is made, so that a `task_type` does nothing."""
    from .lora import ResidualLora

    # Only a LoRA has the method. PEFT refuses residual layers to all other adapters.
    if hasattr(config, "_register_custom_module"):
        config._register_custom_module({ResidualLinear: ResidualLora})
        _leave_out_banks(config)
        if model is not None:
            _check_fits(config, model)
    return config


def _leave_out_banks(config: Any) -> None:
    """Excludes the modules with the shared matrices, of which some are called like those of the layers, such as fc1."""
    from peft.tuners.tuners_utils import check_target_module_exists

    stacks = [stack for family in FAMILIES.values() for stack in family.stacks]
    banks = {path.replace(".", "_") for stack in stacks for path in stack.modules}
    if config.target_modules in (None, "all-linear") or not any(
        check_target_module_exists(config, f"model.encoder.shared.{bank}") for bank in banks
    ):
        return
    known = config.exclude_modules
    if not known or isinstance(known, str):
        config.exclude_modules = f"(?:{known})|{BANKS}" if known else BANKS
    else:
        config.exclude_modules = {*known, *(f"shared.{bank}" for bank in banks)}


def _check_fits(config: Any, model: Any) -> None:
    """Raises ValueError for an adapter that the model cannot have."""
    from peft.tuners.tuners_utils import check_target_module_exists

    from .lora import changes_base, refusal

    if changes_base(config):
        for path, _ in residual_linears(model):
            if config.target_modules is None or check_target_module_exists(config, path):
                raise refusal(config)
    saved = config.modules_to_save or ()
    for path, module in model.named_modules():
        if config.trainable_token_indices and isinstance(module, QuantizedEmbedding | MixedEmbedding):
            raise ValueError(
                "`trainable_token_indices` must be left out where the table of tokens is in few bits, of which no row "
                f"learns alone, got {config.trainable_token_indices!r}"
            )
        if isinstance(module, TiedOutput) and any(f".{path}".endswith(f".{name}") for name in saved):
            raise ValueError(NOTHING_TO_COPY)


def add_lora(model: Any, rank: int, **options: Any) -> Any:
    """A model of PEFT that trains low-rank adapters alone, over a dense or residual model.

    Args:
        model: the model, which is changed.
        rank: of the adapters, their `r`.
        options: further ones of `LoraConfig`, such as `target_modules`, by default queries and values. A `task_type`
            would make PEFT pass arguments that speech models do not take.

    Raises:
        ValueError: for a `task_type`.
    """
    from peft import LoraConfig, get_peft_model

    family = FAMILIES.get(model.config.model_type)
    if "target_modules" not in options and family is not None:
        readers = [block.readers for block in family.encoder.blocks if len(block.readers) == 3]
        options["target_modules"] = [path.rpartition(".")[2] for path in (readers[0][0], readers[0][2])]
    return get_peft_model(model, reach(LoraConfig(r=rank, **options), model))


def without_low_rank(model: ResidualMixin) -> Any:
    """A copy of a residual model without every `B A`: what an adapter of them stands on. Its `merge()` is dense.

    Raises:
        ValueError: where a matrix has no `U`, and so nothing without its low rank.
    """
    configs = {}
    for name in ("residual_config", "decoder_residual_config"):
        config = getattr(model.config, name, None)
        if config is not None:
            configs[name] = replace(config, rank=0, rank_pattern={})
    return _rebuilt(model, configs)


def to_lora(model: ResidualMixin) -> tuple[Any, dict[str, Tensor]]:
    """The low rank of every residual layer as a `LoraConfig` and the tensors of its file."""
    from peft import LoraConfig

    ranks = {path: linear.rank for path, linear in residual_linears(model) if linear.rank}
    if not ranks:
        raise ValueError("`model` must have a low rank to make an adapter of, got rank 0 everywhere")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(path): rank for path, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(ranks),
        inference_mode=True,
    )
    tensors = {}
    for path, linear in residual_linears(model):
        if linear.rank:
            factors: Any = (("lora_A", linear.residual_A), ("lora_B", linear.residual_B))
            for name, factor in factors:
                value = factor.detach().cpu().clone()
                value = value.unsqueeze(-1) if isinstance(linear, ChannelsFirst) else value
                tensors[f"{PREFIX}{path}.{name}.weight"] = value.contiguous()
    return config, tensors


def save_adapter(model: ResidualMixin, folder: str | Path, base: str | Path) -> Path:
    """Writes the low rank of a residual model as an adapter that plain PEFT loads, and returns its folder.

    Args:
        model: the residual model.
        folder: of the adapter.
        base: name or folder of what the adapter stands on, as it is written into its config: `without_low_rank(model)`,
            or the `merge()` of it. Neither is written here.
    """
    config, tensors = to_lora(model)
    config.base_model_name_or_path = str(base)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def from_lora(base: Any, adapter: str | Path) -> Any:
    """A residual model of a model and a LoRA adapter for it, whose layers become `U + B A`.

    Args:
        base: a dense model, each of whose adapted matrices becomes the `U` of one layer; or a residual model, whose low
            rank grows by the adapter's.
        adapter: folder of the adapter.

    Returns:
        A new model; `base` stays as it is.

    Raises:
        ValueError: for an adapter that is not a plain LoRA of matrices that a residual layer can have.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(adapter))
    _check_plain(config)
    factors = _factors(load_file(Path(adapter) / WEIGHTS), config)
    model = base if isinstance(base, ResidualMixin) else _as_residual(base, set(factors))
    linears = dict(residual_linears(model))
    unknown = sorted(set(factors) - set(linears))
    if unknown:
        raise ValueError(
            f"`adapter` must be for matrices that are residual ({', '.join(sorted(linears)[:3])}, ...), got "
            f"{unknown[0]!r}"
        )
    ranks = {path: linear.rank for path, linear in linears.items()}
    with torch.no_grad():
        factors = {path: linears[path].joined(*new) for path, new in factors.items()}
    ranks |= {path: len(first) for path, (first, _) in factors.items()}
    grown = _rebuilt(model, configs_with_ranks(model, ranks))
    with torch.no_grad():
        for path, (first, second) in factors.items():
            linear = grown.get_submodule(path)
            linear.residual_A.copy_(first)
            linear.residual_B.copy_(second)
    return grown


def _check_plain(config: Any) -> None:
    from .lora import changes_base

    used = {"use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
    problems = [name for name, plain in used.items() if getattr(config, name, plain) not in (plain, [])]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        problems.append("peft_type")
    if problems:
        raise ValueError(
            f"`adapter` must be a plain LoRA to become the low rank of layers, got {problems[0]} "
            f"{getattr(config, problems[0])!r}"
        )
    if changes_base(config):
        raise ValueError(
            f"`adapter` must be a plain LoRA, got one with `init_lora_weights` {config.init_lora_weights!r}, which "
            "stands on a changed base; save it with `path_initial_model_for_weight_conversion` of PEFT, and it is plain"
        )


def _factors(tensors: Mapping[str, Tensor], config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """`A` and the scaled `B` of each matrix, by its path.

    Raises:
        ValueError: for a tensor that is neither, such as a bias, or a part of an adapter of an embedding.
    """
    from peft.utils.other import get_pattern_key

    other = sorted(key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight")))
    if other:
        raise ValueError(
            "`adapter` must have the low ranks of linear matrices alone (`lora_A.weight` and `lora_B.weight`), got "
            f"{other[0]!r} ({len(other)} such weights); train it without biases, and without adapters of embeddings or "
            "tokens"
        )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key, first in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        second = tensors[key.replace(".lora_A.", ".lora_B.")]
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
        rank = len(first)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        found[path] = first.flatten(1), scale * second.flatten(1)
    return found


def _as_residual(dense: Any, paths: set[str]) -> Any:
    """A residual model whose matrices at these paths have a `U` of their own, with equal outputs."""
    family = FAMILIES.get(getattr(getattr(dense, "config", None), "model_type", ""))
    classes = {} if family is None else {cls.dense_class(): cls for cls in model_classes_of(family).values()}
    if type(dense) not in classes or family is None:
        raise ValueError(f"`base` must be a dense model with a residual form, got {type(dense).__name__}")
    cls: Any = classes[type(dense)]
    names = {module: name for name, module in dense.named_modules()}
    configs = {}
    for stack in family.stacks:
        if not stack.is_in(dense):
            continue
        owner = stack.find(dense)
        roles = stack.of_layer(owner.layers[0]).roles
        place = f"{names[owner]}.layers.".lstrip(".")
        used = [
            role
            for role, path in roles.items()
            if any(p.startswith(place) and p.endswith(f".{path}") for p in paths)
        ]
        if used or stack is family.encoder:
            chosen = used or list(roles)[:1]
            configs[stack.name] = ResidualConfig(dict.fromkeys(chosen, 1), rank=0, diagonal="none")
    fields = {"decoder_residual_config": configs["decoder"]} if "decoder" in configs else {}
    model = cls(cls.config_class.from_dense_config(dense.config, configs["encoder"], **fields))
    model = model.to(device=dense.device, dtype=dense.dtype).train(dense.training)
    weights = dict(dense.state_dict())
    with torch.no_grad():
        for path, linear in residual_linears(model):
            linear.shared.weight.copy_(as_linear(dense.get_submodule(path)).weight)
            del weights[f"{path}.weight"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(".shared." in f".{key}" for key in missing), (missing, unexpected)
    if dense.can_generate():
        model.generation_config = deepcopy(dense.generation_config)
    return model


def _rebuilt(model: Any, configs: dict[str, ResidualConfig]) -> Any:
    """A copy of a residual model with these settings, and the same values wherever the shapes are the same."""
    copy: Any = type(model)(type(model.config)(**{**model.config.to_dict(), **configs}))
    copy = copy.to(device=model.device, dtype=model.dtype).train(model.training)
    own = copy.state_dict()
    same = {
        key: value
        for key, value in model.state_dict().items()
        if key in own and own[key].shape == value.shape
    }
    copy.load_state_dict(same, strict=False)
    if model.can_generate():
        copy.generation_config = deepcopy(model.generation_config)
    copy.processor = model.processor
    return copy
