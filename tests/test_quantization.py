"""`U` in few bits: rounding, storage, the layer that computes with it, and models that have it."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import Alone, randomize_, tiny_wav2vec2_config, tiny_whisper_config
from test_conversion import dense_whisper, whisper_inputs
from torch import nn
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq

import hf_residual_transformer as hrt
from hf_residual_transformer.compression import conversion
from hf_residual_transformer.layers import QuantizedSharedLinear, ResidualLinear, SharedLinear
from hf_residual_transformer.modeling import residual_linears
from hf_residual_transformer.quantization import (
    BLOCK,
    BLOCKS,
    FEWEST,
    LEVELS,
    MOST,
    ROTATION,
    ROTATIONS,
    SCALE_BITS,
    dequantize,
    levels_of,
    quantize,
    rotate,
    rotation_of,
)

EACH = hrt.ResidualConfig(group_size=1, rank=2, diagonal="none", shared_bits=4)


def matrix(out_features=24, in_features=64, seed=0):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def correlated(features=64):
    factor = matrix(features, 4 * features, seed=1)
    factor[::2] += 5 * factor[1::2]
    return (factor @ factor.T / (4 * features)).double()


def nearest(weight):
    """Q4_0 as GGUF has it: the largest weight of a block becomes -8."""
    blocks = weight.unflatten(1, (-1, BLOCK))
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scale = (largest / -8).half().float()
    return ((blocks / scale).round().clamp(-8, 7) * scale).flatten(1)


def test_two_weights_are_a_byte_and_blocks_have_a_scale_each():
    packed = torch.arange(64, dtype=torch.uint8).reshape(2, 32)
    scale = torch.tensor([[1.0, 0.5], [-1.0, 2.0]])
    weight = dequantize(packed, scale, 4)
    for row in range(2):
        for column in range(64):
            byte = packed[row, column // 2].item()
            code = byte // 16 if column % 2 else byte % 16
            assert weight[row, column] == (code - 8) * scale[row, column // BLOCK]


@pytest.mark.parametrize("bits", range(FEWEST, MOST + 1))
def test_weights_that_so_many_bits_can_hold_come_back_exactly(bits):
    low = -(2 ** (bits - 1))
    weight = torch.randint(low, -low, (24, 64), generator=torch.Generator().manual_seed(0)).float()
    weight[:, ::BLOCK] = low
    weight = weight * torch.tensor([0.5, -0.25]).repeat_interleave(BLOCK)
    for covariance in (None, correlated()):
        found = quantize(weight, covariance, bits)
        assert found.packed.shape == (24, 64 * bits // 8) and found.packed.dtype == torch.uint8
        torch.testing.assert_close(found.weight().float(), weight, rtol=0, atol=0)


def test_every_bit_more_leaves_a_third_of_the_error_or_less():
    weight = matrix()
    errors = [
        (quantize(weight, correlated(), bits).weight() - weight).square().sum()
        for bits in range(FEWEST, MOST + 1)
    ]
    assert all(following < 0.34 * error for error, following in pairwise(errors))


def test_rounding_is_nearer_than_that_of_q4_0_and_scales_are_exact_in_16_bits():
    weight = matrix()
    packed, scale, bits, *_ = quantize(weight)
    error = (dequantize(packed, scale, bits) - weight).square().sum()
    assert error < 0.97 * (nearest(weight) - weight).square().sum()
    assert packed.shape == (24, 32) and packed.dtype == torch.uint8 and scale.shape == (24, 2)
    assert torch.equal(scale.half().to(scale.dtype), scale)


def test_a_covariance_keeps_outputs_rather_than_weights():
    weight, covariance = matrix().double(), correlated()
    plain, fitted = (quantize(weight, given).weight() - weight for given in (None, covariance))
    assert ((fitted @ covariance) * fitted).sum() < 0.6 * ((plain @ covariance) * plain).sum()
    assert fitted.square().sum() > plain.square().sum()


def test_a_parameter_that_learns_is_rounded_like_its_values():
    weight = matrix()
    found, expected = (quantize(given, correlated()) for given in (torch.nn.Parameter(weight), weight))
    assert torch.equal(found.packed, expected.packed) and torch.equal(found.scale, expected.scale)


def test_what_is_zero_stays_so():
    weight = matrix()
    weight[3] = 0
    weight[:, :BLOCK] = 0
    found = quantize(weight, correlated()).weight()
    assert not found[:, :BLOCK].any() and torch.isfinite(found).all()
    assert not quantize(torch.zeros(4, 32)).weight().any()


def spread(features=64):
    """A matrix of which some blocks and rows are many times as large as others."""
    weight = matrix(48, features, seed=3)
    of_blocks = 10 ** torch.rand(48, features // BLOCK, generator=torch.Generator().manual_seed(4))
    return weight * of_blocks.repeat_interleave(BLOCK, 1) * torch.logspace(-3, 0, 48)[:, None]


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_in_8_bits_are_integers_beside_one_float16_for_each_row(bits, block_size):
    weight = spread(256)
    weight[5, :block_size] = 0
    weight[6] = 0
    weight[7, block_size:] /= 1e4  # smaller than the smallest scale beside that of the row
    for covariance in (None, correlated(256)):
        found = quantize(weight, covariance, bits, block_size, scale_bits=8)
        assert found.scale.shape == (48, 256 // block_size) and found.row_scale.shape == (48, 1)
        assert torch.equal(found.row_scale.half().double(), found.row_scale)
        levels = levels_of(found.scale, found.row_scale)
        assert torch.equal(levels.to(torch.int8) * (found.row_scale / LEVELS), found.scale)
        assert levels.abs().min() >= 1 and levels.abs().max() <= 127
        assert not found.weight()[6].any() and torch.isfinite(found.weight()).all()
        if covariance is None:
            assert not found.weight()[5, :block_size].any()


@pytest.mark.parametrize("make", [matrix, spread])
@pytest.mark.parametrize(("bits", "most"), [(2, 1.02), (3, 1.02), (4, 1.03)])
def test_scales_in_8_bits_add_little_to_the_error_of_rounding(bits, most, make):
    weight = torch.cat([make(), -make()]) if make is spread else make(96)
    errors = []
    for covariance in (None, correlated()):
        for scale_bits in SCALE_BITS:
            found = quantize(weight, covariance, bits, scale_bits=scale_bits).weight() - weight
            found = found / weight.norm(dim=1, keepdim=True)  # so that all rows count
            errors.append((found.square() if covariance is None else (found @ covariance) * found).sum())
    assert errors[1] < most * errors[0] and errors[3] < most * errors[2]


@pytest.mark.parametrize("size", ROTATIONS)
def test_a_rotation_keeps_lengths_and_is_its_own_inverse(size):
    values = matrix(5, 512).double()
    rotated = rotate(values, size)
    torch.testing.assert_close(rotated.norm(dim=1), values.norm(dim=1))
    torch.testing.assert_close(rotate(rotated, size), values)
    assert torch.equal(rotated, values) == (size == 1)
    # Each group of columns by itself.
    torch.testing.assert_close(rotated[:, :size], rotate(values[:, :size], size))


@pytest.mark.parametrize(
    ("features", "wanted", "found"), [(384, 256, 128), (512, 64, 64), (96, 128, 32), (512, 1, 1)]
)
def test_a_rotation_divides_the_columns(features, wanted, found):
    assert rotation_of(features, wanted) == found
    assert quantize(matrix(4, features), None, rotation=wanted).rotation == found


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_rotation_loses_less_where_inputs_vary_much_more_than_others(bits):
    weight, covariance = matrix(48, 256).double(), matrix(1, 256, seed=3)[0].double().mul(2).exp().diag()
    errors = []
    for rotation in (1, 64):
        difference = quantize(weight, covariance, bits, rotation=rotation).weight() - weight
        errors.append(((difference @ covariance) * difference).sum())
    assert errors[1] < 0.7 * errors[0]


def test_what_the_bits_can_hold_in_the_rotated_columns_comes_back_exactly():
    numbers = matrix(8, 256, seed=4).mul(2).round().clamp(-8, 7).double()
    numbers[:, ::BLOCK] = -8
    weight = rotate(numbers, 64)
    torch.testing.assert_close(quantize(weight, bits=4, rotation=64).weight(), weight)


def twins(bias, rank, diagonal, bits=4, scale_bits=16, rotation=1):
    """Two layers over a quantised `U`, and the same over a plain one of equal weight."""
    torch.manual_seed(0)
    groups = []
    for quantised in (True, False):
        options = (64, 24, bias == "shared", torch.device("cpu"), torch.float32)
        shared = (
            QuantizedSharedLinear(*options, bits, BLOCK, scale_bits, rotation)
            if quantised
            else SharedLinear(*options)
        )
        layers = [ResidualLinear(nn.ModuleList([shared]), 0, rank, diagonal, bias == "own") for _ in range(2)]
        for module in (shared, *layers):
            module.reset_parameters()
        groups.append(randomize_(nn.ModuleDict({"shared": shared, "layers": nn.ModuleList(layers)})))
    state = {name: tensor for name, tensor in groups[0].state_dict().items() if ".weight_" not in name}
    groups[1].load_state_dict(state | {"shared.weight": groups[0]["shared"].weight})
    return groups


@pytest.mark.parametrize(
    ("bias", "rank", "diagonal", "bits"), [("own", 3, True, 4), ("shared", 0, False, 4), ("own", 3, False, 3)]
)
@pytest.mark.parametrize(("scale_bits", "rotation"), [(16, 1), (8, 1), (8, 32)])
@pytest.mark.parametrize("frames", [3, 200])
def test_outputs_and_gradients_are_those_over_the_same_plain_weight(
    frames, scale_bits, rotation, bias, rank, diagonal, bits
):
    found, groups = [], twins(bias, rank, diagonal, bits, scale_bits, rotation)
    for group in groups:
        inputs = matrix(2 * frames, 64, seed=2).reshape(2, frames, 64).requires_grad_()
        outputs = [layer(inputs) for layer in group["layers"]]
        sum((output * output.detach().cos()).sum() for output in outputs).backward()
        gradients = {n: p.grad for n, p in group.named_parameters() if not n.startswith("shared.weight")}
        found.append((*outputs, inputs.grad, gradients))
    # The sums of a rotation are rounded in another order than those of its matrix.
    rounding = {} if rotation == 1 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(found[0], found[1], **rounding)
    quantised, plain = (group["shared"] for group in groups)
    numbers = dequantize(quantised.weight_packed, torch.ones_like(quantised.scale()), bits)
    of_scale = (rotate(plain.weight.grad, rotation) * numbers).unflatten(1, (-1, BLOCK)).sum(2)
    if scale_bits == 8:
        of_scale = (of_scale * quantised.weight_levels / LEVELS).sum(1, keepdim=True)
    torch.testing.assert_close(quantised.weight_scale.grad, of_scale, rtol=1e-4, atol=1e-3)


def test_backward_keeps_no_full_weight():
    group, _ = twins("own", 3, True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        group["layers"][0](matrix(200, 64))
    assert all(tuple(tensor.shape) != (24, 64) for tensor in kept)
    assert any(tensor.dtype == torch.uint8 for tensor in kept)


@pytest.mark.parametrize(("bits", "scale_bits", "rotation"), [(3, 16, 1), (4, 16, 32), (3, 8, 64)])
def test_an_exported_layer_takes_any_length_and_keeps_few_bits(bits, scale_bits, rotation):
    group, _ = twins("own", 3, False, bits, scale_bits, rotation)
    network = Alone(group["shared"], group["layers"][0])
    frames = torch.export.Dim("frames", min=2, max=4096)
    exported = torch.export.export(network, (matrix(50, 64)[None],), dynamic_shapes=({1: frames},))
    for length in (2, 700):
        x = matrix(length, 64)[None]
        torch.testing.assert_close(exported.module()(x), group["layers"][0](x), rtol=1e-4, atol=1e-5)
    kept = [*exported.state_dict.values(), *exported.constants.values()]
    assert sum(tensor.nbytes for tensor in kept) == sum(t.nbytes for t in network.state_dict().values())


@pytest.mark.parametrize(("bits", "scale_bits", "rotation"), [(3, 16, 1), (4, 16, 32), (3, 8, 64)])
def test_a_compiled_layer_is_one_graph(bits, scale_bits, rotation):
    group, _ = twins("own", 3, False, bits, scale_bits, rotation)
    torch.compiler.reset()  # what other tests compile counts towards the limit of recompilations
    compiled = torch.compile(group["layers"][0], fullgraph=True, backend="aot_eager")
    for frames in (3, 700):
        torch.testing.assert_close(compiled(matrix(frames, 64)), group["layers"][0](matrix(frames, 64)))


@pytest.mark.parametrize(("scale_bits", "rotation"), [(16, 1), (8, 1), (8, 32)])
@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_models_are_saved_loaded_halved_and_merged(family, scale_bits, rotation, tmp_path):
    each = replace(EACH, scale_bits=scale_bits, rotation=rotation)
    if family == "whisper":
        model = hrt.ResidualWhisperForConditionalGeneration(tiny_whisper_config(residual_config=each))
        inputs = {"input_features": whisper_inputs()[:2], "labels": torch.tensor([[72, 73], [80, 81]])}
        auto = AutoModelForSpeechSeq2Seq
    else:
        model = hrt.ResidualWav2Vec2ForCTC(tiny_wav2vec2_config(residual_config=each))
        inputs = {"input_values": matrix(2, 800), "labels": torch.tensor([[5, 6], [8, 9]])}
        auto = AutoModelForCTC
    randomize_(model)
    expected = model(**inputs).logits
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path / "float32")
    loaded = auto.from_pretrained(tmp_path / "float32")
    assert torch.equal(loaded(**inputs).logits, expected)
    torch.testing.assert_close(model.merge()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(model).half()
    half.save_pretrained(tmp_path / "float16")
    loaded = auto.from_pretrained(tmp_path / "float16", dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, half.state_dict()[name].to(tensor.dtype))
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("float32", "float16")
    ]
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_initialising_again_leaves_loaded_codes_alone(scale_bits, tmp_path):
    config = tiny_whisper_config(residual_config=replace(EACH, scale_bits=scale_bits))
    model = randomize_(hrt.ResidualWhisperForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    loaded.init_weights()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_checkpoint_that_is_not_quantised_does_not_fit(tmp_path):
    plain = hrt.ResidualConfig(group_size=1, rank=2, diagonal="none")
    hrt.ResidualWhisperForConditionalGeneration(tiny_whisper_config(residual_config=plain)).save_pretrained(
        tmp_path
    )
    config = hrt.ResidualWhisperConfig.from_pretrained(tmp_path, residual_config=EACH)
    with pytest.raises(ValueError, match=r"lacks '.*shared.*weight_packed'"):
        hrt.ResidualWhisperForConditionalGeneration.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_a_checkpoint_with_scales_in_other_bits_does_not_fit(scale_bits, tmp_path):
    configs = [tiny_whisper_config(residual_config=replace(EACH, scale_bits=bits)) for bits in SCALE_BITS]
    other = configs.pop(SCALE_BITS.index(scale_bits))
    hrt.ResidualWhisperForConditionalGeneration(configs[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit .*residual_config"):
        hrt.ResidualWhisperForConditionalGeneration.from_pretrained(tmp_path, config=other)


def states_error(model, dense, inputs):
    with torch.no_grad():
        states = [m.get_encoder()(inputs).last_hidden_state for m in (dense, model)]
    return (states[1] - states[0]).square().sum().item()


def numbers_of(model):
    """All numbers of bits that the model's matrices have."""
    return {linear.shared.bits for _, linear in residual_linears(model)}


def test_a_budget_is_one_of_bytes_and_what_layers_add_makes_up_for_rounding():
    dense, inputs = dense_whisper(), whisper_inputs()
    from_dense = hrt.ResidualWhisperForConditionalGeneration.from_dense
    given = {"calibration": inputs, "progress": False}
    options = given | {"parts": ("encoder",), "shared_bits": 4}
    model = from_dense(dense, budget=0.6, **options)
    chosen = model.config.residual_config
    assert {2, 3, 4} >= set(chosen.bits_pattern.values()) and 1 in chosen.group_size.values()
    assert chosen.scale_bits == 8
    square = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert chosen.rotation == dict.fromkeys((*square, "fc1"), ROTATION)
    assert from_dense(dense, budget=0.6, rotation=1, **options).config.residual_config.rotation == 1
    report = hrt.size_report(model)
    assert 0.57 < report.encoder_bytes.ratio <= 0.6
    encoder = model.half().model.encoder
    kept = [*encoder.layers.state_dict().values(), *encoder.shared.state_dict().values()]
    assert report.encoder_bytes.unique == sum(tensor.nbytes for tensor in kept)
    model.float()
    bare = from_dense(dense, hrt.ResidualConfig(1, 0, diagonal="none", shared_bits=4, scale_bits=8), **given)
    by_rank = from_dense(dense, budget=0.6, shared_bits=None, **given)
    assert states_error(model, dense, inputs) < 0.5 * states_error(bare, dense, inputs)
    assert states_error(model, dense, inputs) < states_error(by_rank, dense, inputs)
    least = hrt.size_report(bare).encoder_bytes.ratio
    tight = from_dense(dense, budget=least + 1e-4, **options | {"shared_bits": [4]})
    assert numbers_of(tight) == {4}  # fewer are not tried
    default = from_dense(dense, **options)
    assert hrt.size_report(default).encoder_bytes.ratio <= 0.31


def test_a_budget_chooses_bits_by_what_they_leave():
    dense, inputs = dense_whisper(), whisper_inputs()
    from_dense = hrt.ResidualWhisperForConditionalGeneration.from_dense
    options = {"calibration": inputs, "progress": False, "parts": ("encoder",)}
    model = from_dense(dense, budget=0.29, **options)
    config = model.config.residual_config
    bits = {
        path: linear.shared.bits
        for path, linear in model.model.encoder.named_modules()
        if isinstance(linear, ResidualLinear) and linear.shared is not None
    }
    assert len(set(bits.values())) > 1
    assert {path: config.bits_of(path.rpartition(".")[2], path) for path in bits} == bits
    report = hrt.size_report(model)
    assert 0.27 < report.encoder_bytes.ratio <= 0.29
    encoder = model.half().model.encoder
    kept = [*encoder.layers.state_dict().values(), *encoder.shared.state_dict().values()]
    assert report.encoder_bytes.unique == sum(tensor.nbytes for tensor in kept)
    two = from_dense(dense, budget=0.29, shared_bits=2, **options)
    assert numbers_of(two) == {2}
    assert states_error(model.float(), dense, inputs) < states_error(two, dense, inputs)


def test_statistics_that_fit_into_memory_are_collected_once(monkeypatch):
    passes, collect = [], conversion.collect
    monkeypatch.setattr(
        conversion, "collect", lambda *given, **more: passes.append(given) or collect(*given, **more)
    )
    hrt.ResidualWhisperForConditionalGeneration.from_dense(
        dense_whisper(), calibration=whisper_inputs(), budget=0.31, progress=False
    )
    assert len(passes) == 2  # one for the encoder and one for the decoder


def test_bits_may_be_given_by_module():
    config = hrt.ResidualConfig(group_size=2, rank=2, shared_bits={"fc1": 3, "fc2": 5})
    assert hrt.ResidualConfig.from_dict(config.to_dict()) == config
    assert [config.bits_of(role) for role in ("fc1", "fc2", "q_proj")] == [3, 5, None]
    shared = hrt.ResidualWhisperModel(tiny_whisper_config(residual_config=config)).encoder.shared
    assert [shared[path][0].bits for path in ("fc1", "fc2", "self_attn_q_proj")] == [3, 5, None]
    assert isinstance(shared["self_attn_q_proj"][0], SharedLinear)


def test_layers_may_share_a_quantised_u():
    dense, inputs = dense_whisper(), whisper_inputs()
    config = hrt.ResidualConfig(group_size=2, rank=32, shared_bits=4)
    model = hrt.ResidualWhisperForConditionalGeneration.from_dense(dense, config, inputs, progress=False)
    assert isinstance(model.model.encoder.shared["fc1"][0], QuantizedSharedLinear)
    full_rank = states_error(model, dense, inputs)
    model = hrt.ResidualWhisperForConditionalGeneration.from_dense(
        dense, hrt.ResidualConfig(group_size=2, rank=4, shared_bits=4), inputs, progress=False
    )
    assert full_rank < 1e-3 * states_error(model, dense, inputs)


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_training_moves_what_layers_have_of_their_own_and_of_u_the_scales_alone(scale_bits):
    config = tiny_whisper_config(residual_config=replace(EACH, scale_bits=scale_bits))
    model = randomize_(hrt.ResidualWhisperForConditionalGeneration(config))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_features=whisper_inputs()[:2], labels=torch.tensor([[72, 73], [80, 81]])).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in moved if ".shared." in name} == {"weight_scale"}
    assert (
        "model.encoder.layers.3.fc1.residual_A" in moved and "model.encoder.layers.0.fc2.residual_B" in moved
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hrt.ResidualConfig(shared_bits=9), "`shared_bits` must be from 2 to 8, None, or .* got 9"),
        (lambda: hrt.ResidualConfig(scale_bits=4), "`scale_bits` must be one of 16, 8, got 4"),
        (lambda: hrt.ResidualConfig(scale_bits="8"), "`scale_bits` must be one of 16, 8, got '8'"),
        (
            lambda: hrt.ResidualConfig(rotation=48),
            "`rotation` must be one of 1, 16, 32, 64, 128, 256, got 48",
        ),
        (lambda: hrt.ResidualConfig(rotation={"fc1": 3}), "`rotation` must be one of 1, .*'fc1': 3"),
        (
            lambda: hrt.ResidualWhisperModel(
                tiny_whisper_config(residual_config=replace(EACH, rotation={"fc3": 16}))
            ),
            "`rotation` must name modules of a whisper encoder layer .* got 'fc3'",
        ),
        (lambda: hrt.ResidualConfig(rotation=True), "`rotation` must be one of 1, .*, got True"),
        (lambda: hrt.ResidualConfig(shared_bits=True), "`shared_bits` must be from 2 to 8, .* got True"),
        (lambda: hrt.ResidualConfig(shared_bits={"fc1": 1}), "`shared_bits` must be from 2 to 8, .*'fc1': 1"),
        (
            lambda: hrt.ResidualConfig(group_size={"fc1": 2}, shared_bits={"fc2": 4}),
            "`shared_bits` must be None where",
        ),
        (
            lambda: hrt.ResidualWhisperModel(
                tiny_whisper_config(residual_config=hrt.ResidualConfig(shared_bits={"fc3": 4}))
            ),
            "`shared_bits` must name modules of a whisper encoder layer .* got 'fc3'",
        ),
        (lambda: hrt.ResidualConfig(group_size=None, shared_bits=4), "`shared_bits` must be None where"),
        (
            lambda: hrt.ResidualWhisperModel(
                tiny_whisper_config(residual_config=EACH, d_model=48, encoder_ffn_dim=64)
            ),
            "`block_size` must divide the 48 inputs of self_attn.q_proj, which is to have few bits, got 32",
        ),
        (
            lambda: hrt.ResidualWhisperForConditionalGeneration.from_dense(
                dense_whisper(), calibration=whisper_inputs(), block_size=128
            ),
            "`block_size` must divide the 32 inputs of self_attn.q_proj, which is to have few bits, got 128",
        ),
        (
            lambda: hrt.ResidualWhisperForConditionalGeneration.from_dense(
                dense_whisper(), calibration=whisper_inputs(), shared_bits=1
            ),
            "`shared_bits` must be from 2 to 8, None, or .* got 1",
        ),
        (
            lambda: hrt.ResidualWhisperForConditionalGeneration.from_dense(
                dense_whisper(), calibration=whisper_inputs(), shared_bits={"fc1": 4}
            ),
            "`shared_bits` must be the most bits .* got {'fc1': 4}",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rows", [4, 64])
def test_a_call_dequantises_u_once(rows, monkeypatch):
    shared = QuantizedSharedLinear(32, 32, False, torch.device("cpu"), torch.float32, 4, 32)
    shared.reset_parameters()
    calls = []
    monkeypatch.setattr(
        "hf_residual_transformer.layers.dequantize", lambda *given: calls.append(given) or dequantize(*given)
    )
    with torch.no_grad():
        shared(torch.randn(rows, 32))
    assert len(calls) == 1
