"""Four bits for what the layers of a trained encoder share, after training (round by round as in GPTQ)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.classes import config_class_of, dense_names, model_classes_of
from hf_residual_transformer.configuration import RESIDUAL_FIELDS
from hf_residual_transformer.families import family_of
from hf_residual_transformer.layers import ChannelsFirst, SharedLinear
from hf_residual_transformer.modeling import residual_linears
from hf_residual_transformer.quantization import quantize
from hf_residual_transformer.reporting import size_report

BITS = 4
DAMPING = 0.03  # of the covariances' mean variance


@torch.no_grad()
def with_four_bits(model: Any, heard: Sequence[dict[str, Tensor]], scale_bits: int = 16) -> tuple[Any, int]:
    """A copy whose `U` is in four bits, and the bytes of its encoder. A dense model's matrices are a `U` each.

    Args:
        model: dense or residual.
        heard: batches of speech as the encoder reads it; the rounding keeps what comes out for it.
        scale_bits: the bits of each scale, 16 or 8.
    """
    source = model.eval() if hasattr(model.config, "residual_config") else _one_matrix_a_layer(model.eval())
    covariances = _covariances(source, heard)
    config = replace(source.config.residual_config, shared_bits=BITS, scale_bits=scale_bits)
    small = _residual(source, config)
    weights = dict(source.state_dict())
    for path, module in source.named_modules():
        if isinstance(module, SharedLinear):
            covariance = covariances[id(module)]
            covariance.diagonal().add_(DAMPING * covariance.diagonal().mean())
            del weights[f"{path}.weight"]
            rounded = quantize(module.weight, covariance, BITS, scale_bits=scale_bits)
            small.get_submodule(path).write(rounded)
    absent, unknown = small.load_state_dict(weights, strict=False)
    assert not unknown and all(".weight_" in name for name in absent)  # which were written above
    small.generation_config = source.generation_config
    return small.eval(), size_report(small).encoder_bytes.unique


def _residual(source: Any, residual: ResidualConfig) -> Any:
    """A new model with the sizes of `source`, on its device."""
    family = family_of(source)
    values = source.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", *RESIDUAL_FIELDS):
        values.pop(key, None)
    classes = {name: model_classes_of(family)[auto] for auto, name in dense_names(family).items()}
    model_class: Any = classes.get(type(source).__name__, type(source))
    model = model_class(config_class_of(family)(**values, residual_config=residual))
    return model.to(source.device)


def _one_matrix_a_layer(dense: Any) -> Any:
    """The dense model as a residual one that shares nothing, with the same outputs."""
    model = _residual(dense, ResidualConfig(group_size=1, rank=0, diagonal="none"))
    family = family_of(dense)
    encoder = family.find_encoder(dense)
    place = next(path for path, module in dense.named_modules() if module is encoder)
    weights = dict(dense.state_dict())
    for path in family.encoder.of_layer(encoder.layers[0]).modules:
        for index in range(len(encoder.layers)):
            weight = weights.pop(f"{place}.layers.{index}.{path}.weight")
            bank = f"{place}.shared.{path.replace('.', '_')}"
            weights[f"{bank}.{index}.weight"] = weight.flatten(
                1
            )  # a point-wise convolution has one more axis
    model.load_state_dict(weights)
    model.generation_config = dense.generation_config
    return model.eval()


def _covariances(model: Any, heard: Sequence[dict[str, Tensor]]) -> dict[int, Tensor]:
    """Second moments of the inputs that each shared matrix reads, in all of its layers, by the id of its module."""
    found: dict[int, Any] = defaultdict(int)

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        frames = args[0].transpose(1, 2) if isinstance(module, ChannelsFirst) else args[0]
        rows = frames.flatten(0, -2).double()
        found[id(module.shared)] += rows.T @ rows / len(rows)

    hooks = [linear.register_forward_pre_hook(keep) for _, linear in residual_linears(model)]
    for batch in heard:
        family_of(model).find_encoder(model)(
            **{name: values.to(model.device) for name, values in batch.items()}
        )
    for hook in hooks:
        hook.remove()
    return found
