"""Four bits for what the layers of a trained encoder share, after training (round by round as in GPTQ)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_residual_transformer import (
    ResidualConfig,
    ResidualWhisperConfig,
    ResidualWhisperForConditionalGeneration,
)
from hf_residual_transformer.configuration import RESIDUAL_FIELDS
from hf_residual_transformer.families import WHISPER
from hf_residual_transformer.layers import SharedLinear
from hf_residual_transformer.modeling import residual_linears
from hf_residual_transformer.quantization import quantize
from hf_residual_transformer.reporting import size_report

BITS = 4
DAMPING = 0.03  # of the covariances' mean variance


@torch.no_grad()
def with_four_bits(model: Any, input_features: Tensor, scale_bits: int = 16) -> tuple[Any, int]:
    """A copy whose `U` is in four bits, and the bytes of its encoder. A dense model's matrices are a `U` each.

    Args:
        model: a Whisper, dense or residual.
        input_features: speech, (batch_size, num_mel_bins, num_frames); the rounding keeps what comes out for it.
        scale_bits: the bits of each scale, 16 or 8.
    """
    source = model.eval() if hasattr(model.config, "residual_config") else _one_matrix_a_layer(model.eval())
    covariances = _covariances(source, input_features)
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
    values = source.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", *RESIDUAL_FIELDS):
        values.pop(key, None)
    model: Any = ResidualWhisperForConditionalGeneration(
        ResidualWhisperConfig(**values, residual_config=residual)
    )
    return model.to(source.device)


def _one_matrix_a_layer(dense: Any) -> Any:
    """The dense model as a residual one that shares nothing, with the same outputs."""
    model = _residual(dense, ResidualConfig(group_size=1, rank=0, diagonal="none"))
    weights = dict(dense.state_dict())
    for role, path in WHISPER.encoder.roles.items():
        for index in range(dense.config.encoder_layers):
            weight = weights.pop(f"model.encoder.layers.{index}.{path}.weight")
            assert role
            weights[f"model.encoder.shared.{path.replace('.', '_')}.{index}.weight"] = weight
    model.load_state_dict(weights)
    model.generation_config = dense.generation_config
    return model.eval()


def _covariances(model: Any, input_features: Tensor) -> dict[int, Tensor]:
    """Second moments of the inputs that each shared matrix reads, in all of its layers, by the id of its module."""
    found: dict[int, Any] = defaultdict(int)

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).double()
        found[id(module.shared)] += rows.T @ rows / len(rows)

    hooks = [linear.register_forward_pre_hook(keep) for _, linear in residual_linears(model)]
    model.get_encoder()(input_features.to(model.device))
    for hook in hooks:
        hook.remove()
    return found
