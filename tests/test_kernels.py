"""The product of PyTorch's CPU kernel against the dequantised matrix."""

import copy

import pytest
import torch
from conftest import randomize_, tiny_whisper_config
from torch import nn
from torch.nn import functional as F

import hf_residual_transformer as hrt
from hf_residual_transformer import layers, modeling
from hf_residual_transformer.kernels import MOST_ROWS, is_fast, kernel_weight
from hf_residual_transformer.layers import MixedEmbedding, QuantizedEmbedding, QuantizedSharedLinear
from hf_residual_transformer.quantization import FEWEST, quantize
from hf_residual_transformer.quantization import MOST as MOST_BITS

MOST = MOST_ROWS.get(torch.backends.cpu.get_cpu_capability(), 0)
pytestmark = pytest.mark.skipif(not MOST, reason="the CPU has no such kernel")


def linear(bits, block_size=32, scale_bits=8, rotation=1, shape=(40, 256), bias=True):
    torch.manual_seed(0)
    form = {"bits": bits, "block_size": block_size, "scale_bits": scale_bits, "rotation": rotation}
    made = QuantizedSharedLinear(shape[1], shape[0], bias, torch.device("cpu"), torch.float16, *form.values())
    made.write(quantize(torch.randn(shape, dtype=torch.float64), **form))
    if bias:
        nn.init.normal_(made.bias)
    return made.bfloat16()


def used(monkeypatch):
    """The numbers of rows that the kernel gets."""
    found = []
    product = layers.KernelWeight.product

    def recorded(self, rows):
        found.append(len(rows))
        return product(self, rows)

    monkeypatch.setattr(layers.KernelWeight, "product", recorded)
    return found


@pytest.mark.parametrize("bits", range(FEWEST, MOST_BITS + 1))
@pytest.mark.parametrize(("block_size", "scale_bits", "rotation"), [(32, 16, 1), (64, 8, 128), (128, 8, 1)])
def test_the_kernel_multiplies_by_the_same_matrix(bits, block_size, scale_bits, rotation, monkeypatch):
    rows = used(monkeypatch)
    made = linear(bits, block_size, scale_bits, rotation)
    inputs = torch.randn(2, 3, 256).bfloat16()
    with torch.no_grad():
        found = made(inputs).float()
    assert rows == [6]
    exact = copy.deepcopy(made).double()
    exact.weight_scale.data = made.weight_scale.double()
    # All factors of a product are rounded to bfloat16, which has 8 digits.
    expected = exact(inputs.double())
    error = (found - expected).norm() / expected.norm()
    assert error < 2**-7
    off = copy.deepcopy(exact)
    off.weight_packed[:, ::7] ^= 1
    assert (off(inputs.double()) - expected).norm() / expected.norm() > 2 * error  # the bound is not too wide


def test_one_row_of_the_matrix_is_what_one_input_gives():
    made = linear(8, bias=False)
    with torch.no_grad():
        columns = torch.cat([made(one) for one in torch.eye(256).bfloat16().split(MOST)])
    # In bfloat16 a scale has 8 digits, and the halves of a number of 8 bits are added up in float32.
    assert torch.allclose(columns.T.float(), made.weight.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda x: x.float(), 1),
        (lambda x: x.repeat(MOST + 1, 1), MOST + 1),
        (lambda x: x[:0], 0),
    ],
)
def test_other_inputs_use_the_reference(change, rows, monkeypatch):
    found = used(monkeypatch)
    made = linear(4, shape=(256, 256))
    inputs = change(torch.randn(1, 256).bfloat16())
    with torch.no_grad():
        assert made.to(inputs.dtype)(inputs).shape == (rows, 256)
    assert not found and not is_fast(inputs)


def test_gradients_use_the_reference(monkeypatch):
    found = used(monkeypatch)
    made = linear(4, shape=(256, 256))
    made(torch.randn(1, 256).bfloat16()).sum().backward()
    assert made.weight_scale.grad.abs().sum() > 0 and not found


def test_blocks_that_the_kernel_lacks_use_the_reference(monkeypatch):
    found = used(monkeypatch)
    made = linear(4, block_size=16)
    with torch.no_grad():
        assert made(torch.randn(1, 256).bfloat16()).isfinite().all()
    assert not found and made.kernel() is None


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_levels"])
@pytest.mark.parametrize("way", ["in place", "data", "replaced"])
def test_changed_tensors_are_seen(name, way, scale_bits):
    made = linear(4, scale_bits=scale_bits)
    tensor = getattr(made, name)
    if tensor is None:
        return
    inputs = torch.randn(2, 256).bfloat16()
    with torch.no_grad():
        before = made(inputs)
        changed = tensor.flip(0)
        if way == "in place":
            tensor.copy_(changed)
        elif way == "data" and name == "weight_scale":
            tensor.data.copy_(changed)
        else:
            tensor.data = changed
        after = made(inputs)
    assert not torch.equal(before, after)
    fresh = copy.deepcopy(made)
    fresh._kernel = (None, [])
    with torch.no_grad():
        assert torch.equal(after, fresh(inputs))


def test_the_form_is_made_once(monkeypatch):
    calls = []
    monkeypatch.setattr(layers, "kernel_weight", lambda *args: calls.append(1) or kernel_weight(*args))
    made = linear(4)
    with torch.inference_mode():
        for _ in range(3):
            made(torch.randn(1, 256).bfloat16())
    assert len(calls) == 1
    assert made._kernel[1]
    assert made.float()._kernel == (None, [])
    assert "_kernel" not in str(made.state_dict().keys())


@pytest.mark.parametrize("bits", [2, 8])
def test_logits_use_the_kernel_too(bits, monkeypatch):
    rows = used(monkeypatch)
    dense = nn.Embedding(50, 64)
    torch.manual_seed(0)
    for table in (QuantizedEmbedding(dense, bits), MixedEmbedding(dense, [[17, 8], [50, bits]])):
        for _, part in table.ranges:
            part.write(quantize(torch.randn(part.num_embeddings, 64), **part.rounding))
            nn.init.normal_(part.weight_mean)
        table.bfloat16()
        states = torch.randn(2, 1, 64).bfloat16()
        with torch.no_grad():
            found = table.logits(states)
            expected = F.linear(states.double(), table.double().weight)
        assert found.shape == (2, 1, 50)
        assert (found - expected).norm() / expected.norm() < 2**-6
    assert rows == [2, 2, 2]


def test_a_matrix_that_is_unpacked_is_used_as_it_is(monkeypatch):
    rows = used(monkeypatch)
    made = linear(4, shape=(256, 256))
    inputs = torch.randn(1, 256).bfloat16()
    with torch.no_grad(), layers.unpacked_weights(made):
        found = made(inputs)
    assert not rows and found.shape == (1, 256)


@pytest.mark.parametrize(
    ("number", "dtype", "beams"),
    [(1, torch.bfloat16, 1), (9, torch.bfloat16, 1), (3, torch.bfloat16, 3), (1, torch.float32, 1)],
)
def test_a_few_sequences_are_generated_from_packed_weights(number, dtype, beams, monkeypatch):
    rows = used(monkeypatch)
    four = hrt.ResidualConfig(group_size=1, rank=0, diagonal="none", shared_bits=4)
    fields = {"residual_config": four, "decoder_residual_config": four, "embedding_bits": 4}
    model = randomize_(hrt.ResidualWhisperForConditionalGeneration(tiny_whisper_config(**fields))).to(dtype)
    unpacked = []
    real = modeling.unpacked_weights
    monkeypatch.setattr(modeling, "unpacked_weights", lambda part: unpacked.append(part) or real(part))
    features = torch.randn(number, 16, 100).to(dtype)
    model.eval().generate(features, max_new_tokens=3, min_new_tokens=3, num_beams=beams)
    few = number == 1 and dtype == torch.bfloat16
    assert bool(unpacked) != few
    assert (1 in rows) == few
