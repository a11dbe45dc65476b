"""torchao's weight-only quantisation on top of a residual model, whose shared matrices it reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_contract import build, encoder_of, inputs_of
from torch import nn

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.layers import is_of_torchao

pytest.importorskip("torchao", reason="torchao is not installed for this torch", exc_type=ImportError)
from torchao import quantization

SHARED = ResidualConfig(group_size=2, rank=2, diagonal="all")
FORMS = {
    "int8": quantization.Int8WeightOnlyConfig,
    "int4": lambda: quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(32)
    ),
    "int4 in tiles": lambda: quantization.Int4WeightOnlyConfig(group_size=32),
}


def is_reached(module: Any, name: str) -> bool:
    """Matrices whose rows are whole groups of four bits. A Whisper's output is its embedding, and stays tied to it."""
    return isinstance(module, nn.Linear) and name != "proj_out" and module.in_features % 32 == 0


def logits_of(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(family)).logits


def quantized(model: Any, form: str, family: str) -> Any:
    """The model in torchao's form; the test is skipped where even the dense model cannot have it here."""
    dense = model.merge()
    try:
        quantization.quantize_(dense, FORMS[form](), filter_fn=is_reached)
        logits_of(dense, family)
    except Exception as error:
        pytest.skip(f"a dense model has no {form} here: {type(error).__name__} {error}")
    quantization.quantize_(model, FORMS[form](), filter_fn=is_reached)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_a_residual_model_computes_with_the_numbers_that_torchao_keeps(family, form):
    plain, found = build(family, SHARED), quantized(build(family, SHARED), form, family)
    banks = [module for bank in encoder_of(found).shared.values() for module in bank]
    assert banks and all(is_of_torchao(module.weight) for module in banks)
    weights = {
        key: value.dequantize() if is_of_torchao(value) else value
        for key, value in found.state_dict().items()
    }
    assert any(not torch.equal(value, weights[key]) for key, value in plain.state_dict().items())
    plain.load_state_dict(weights)
    expected = logits_of(plain, family)
    torch.testing.assert_close(logits_of(found, family), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits_of(found.merge(), family), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_low_rank_trains_beside_it(form):
    model = quantized(build("whisper", SHARED), form, "whisper")
    trained = {name: p for name, p in model.named_parameters() if "residual_" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model(**inputs_of("whisper")).loss.backward()
    assert trained and all(parameter.grad.any() for parameter in trained.values())


def test_a_dense_model_in_this_form_is_refused_by_a_conversion():
    dense = build("whisper", SHARED).merge()
    quantization.quantize_(dense, FORMS["int8"]())
    with pytest.raises(ValueError, match=r"`dense` must have plain floating-point nn\.Linear modules"):
        type(build("whisper", SHARED)).from_dense(dense, SHARED, start="svd", progress=False)
