"""What only a GPU can show: run with `pytest -m gpu -n 0` where there is one."""

from __future__ import annotations

import pytest
import torch
from conftest import whisper_generation_config
from test_contract import FAMILIES, build, encoder_of, inputs_of
from test_conversion import dense_whisper, whisper_inputs

import hf_residual_transformer as hrt
from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.exporting.ggml import encode_float

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SHARED = ResidualConfig(group_size=2, rank=2, diagonal="all")
BITS = ResidualConfig(group_size=2, rank=2, diagonal="all", shared_bits=4)


def on_gpu(inputs):
    return {key: value.cuda() for key, value in inputs.items()}


@pytest.mark.parametrize("residual", [SHARED, BITS], ids=["float", "four bits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_cpu(family, residual):
    model = build(family, residual)
    expected = model(**inputs_of(family))
    expected.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    twin = build(family, residual).cuda()
    found = twin(**on_gpu(inputs_of(family)))
    found.loss.backward()
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
    for name, parameter in twin.named_parameters():
        if name in gradients:
            size = float(gradients[name].abs().max())
            torch.testing.assert_close(parameter.grad.cpu(), gradients[name], rtol=1e-2, atol=1e-2 * size)


@pytest.mark.parametrize("residual", [SHARED, BITS], ids=["float", "four bits"])
def test_a_step_in_bfloat16_lowers_the_loss(residual):
    model = build("whisper", residual).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**on_gpu(inputs_of("whisper"))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_weights_on_the_gpu_are_written_for_whisper_cpp(shape):
    values = torch.rand(shape)
    assert encode_float("weight", values.cuda()) == encode_float("weight", values)


def test_the_encoder_compiles_with_the_default_backend():
    torch.compiler.reset()
    encoder = encoder_of(build("whisper", SHARED)).cuda()
    features = inputs_of("whisper")["input_features"].cuda()
    with torch.no_grad():
        expected = encoder(features).last_hidden_state
        found = torch.compile(encoder, fullgraph=True)(features).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_conversion_gives_the_model_of_the_cpu():
    batches = [{"input_features": window[None]} for window in whisper_inputs(4)]
    logits, ratios = [], []
    for device, lent in (("cpu", False), ("cuda", False), ("cuda", True)):
        dense = dense_whisper().to("cpu" if lent else device)
        dense.generation_config = whisper_generation_config()
        model = hrt.ResidualWhisperForConditionalGeneration.from_dense(
            dense, None, batches, budget=0.6, progress=False, device=device if lent else None
        )
        assert model.device.type == device
        ratios.append(hrt.size_report(model).model_bytes.ratio)
        with torch.no_grad():
            inputs = {
                "input_features": batches[0]["input_features"],
                "decoder_input_ids": torch.tensor([[1, 72]]),
            }
            logits.append(model(**{key: value.to(device) for key, value in inputs.items()}).logits.cpu())
            tokens = model.generate(inputs["input_features"].to(device), max_new_tokens=3)
            assert tokens.device.type == device
    for found, ratio in zip(logits[1:], ratios[1:]):
        assert ratio == pytest.approx(ratios[0], rel=0.02)
        torch.testing.assert_close(found, logits[0], rtol=0.05, atol=0.05 * float(logits[0].abs().max()))
