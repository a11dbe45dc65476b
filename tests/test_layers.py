"""One group of residual layers against the explicit matrices `U + B A + D`, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Alone, randomize_
from torch import nn
from torch.nn import functional as F
from transformers import WavLMConfig, WavLMModel

from hf_residual_transformer.layers import LowRankLinear, ResidualLinear, SharedLinear, compose

SHAPES = {"square": (12, 12), "tall": (20, 12), "wide": (12, 20)}


def group(shape, rank, diagonal=True, bias="own", size=3) -> nn.ModuleDict:
    """`size` layers over one `U` of `shape` (out, in); `bias` is "own", "shared" or "none"."""
    out_features, in_features = shape
    shared = SharedLinear(in_features, out_features, bias=bias == "shared")
    bank = nn.ModuleList([SharedLinear(in_features, out_features, bias=False), shared])
    layers = nn.ModuleList([ResidualLinear(bank, 1, rank, diagonal, bias == "own") for _ in range(size)])
    for layer in layers:
        layer.reset_parameters()
    return randomize_(nn.ModuleDict({"shared": bank, "layers": layers}))


def explicit(module: nn.ModuleDict, layer: ResidualLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one layer, entry by entry, from its tensors alone."""
    weight = module["shared"][1].weight.detach().clone()
    out_features, in_features = weight.shape
    for i in range(out_features):
        for j in range(in_features):
            if layer.residual_A is not None:
                weight[i, j] += sum(
                    layer.residual_B[i, r] * layer.residual_A[r, j] for r in range(layer.residual_A.shape[0])
                )
            if layer.diagonal is not None and i == j:
                weight[i, j] += layer.diagonal[i]
    bias = module["shared"][1].bias if layer.bias is None else layer.bias
    return weight.detach(), None if bias is None else bias.detach()


@pytest.mark.parametrize("bias", ["own", "shared", "none"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3, 12])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_equal_those_of_the_explicit_matrices(shape, rank, diagonal, bias):
    module = group(shape, rank, diagonal, bias)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 5, shape[1], generator=generator, requires_grad=True) for _ in module["layers"]]
    cotangents = [torch.randn(2, 5, shape[0], generator=generator) for _ in module["layers"]]
    d_shared, d_shared_bias = torch.zeros(shape), torch.zeros(shape[0])
    dense = []
    for layer, x, cotangent in zip(module["layers"], inputs, cotangents, strict=True):
        weight, bias_value = explicit(module, layer)
        weight.requires_grad_()
        x_dense = x.detach().clone().requires_grad_()
        y = F.linear(x_dense, weight, bias_value)
        torch.testing.assert_close(layer(x), y)
        y.backward(cotangent)
        layer(x).backward(cotangent)
        dense.append((weight.grad, x_dense.grad, cotangent.sum((0, 1))))
        d_shared += weight.grad
        d_shared_bias += cotangent.sum((0, 1))
    torch.testing.assert_close(module["shared"][1].weight.grad, d_shared)
    if bias == "shared":
        torch.testing.assert_close(module["shared"][1].bias.grad, d_shared_bias)
    for layer, x, (d_weight, d_x, d_bias) in zip(module["layers"], inputs, dense, strict=True):
        torch.testing.assert_close(x.grad, d_x)
        if rank:
            torch.testing.assert_close(layer.residual_A.grad, layer.residual_B.detach().T @ d_weight)
            torch.testing.assert_close(layer.residual_B.grad, d_weight @ layer.residual_A.detach().T)
        if diagonal:
            torch.testing.assert_close(layer.diagonal.grad, d_weight.diagonal())
        if bias == "own":
            torch.testing.assert_close(layer.bias.grad, d_bias)
    assert module["shared"][0].weight.grad is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_low_rank_alone_equals_the_explicit_matrix(shape, rank, diagonal, bias):
    layer = LowRankLinear(torch.empty(shape), 0, rank, diagonal, bias)
    layer.reset_parameters()
    randomize_(layer)
    weight = layer.residual_B.detach() @ layer.residual_A.detach()
    for i in range(min(shape) if diagonal else 0):
        weight[i, i] += layer.diagonal.detach()[i]
    torch.testing.assert_close(layer.weight.detach(), weight)
    weight.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, shape[1], generator=generator, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    cotangent = torch.randn(2, 5, shape[0], generator=generator)
    y = F.linear(x_dense, weight, layer.bias)
    torch.testing.assert_close(layer(x), y)
    (d_weight, d_x) = torch.autograd.grad(y, (weight, x_dense), cotangent)
    layer(x).backward(cotangent)
    torch.testing.assert_close(x.grad, d_x)
    torch.testing.assert_close(layer.residual_A.grad, layer.residual_B.detach().T @ d_weight)
    torch.testing.assert_close(layer.residual_B.grad, d_weight @ layer.residual_A.detach().T)
    if diagonal:
        torch.testing.assert_close(layer.diagonal.grad, d_weight.diagonal())
    if bias:
        torch.testing.assert_close(layer.bias.grad, cotangent.sum((0, 1)))
    assert sum(p.numel() for p in layer.parameters()) == (
        rank * sum(shape) + diagonal * min(shape) + bias * shape[0]
    )


def naive(layer: ResidualLinear, x: torch.Tensor) -> torch.Tensor:
    """`U x + B (A x) + D x + b`, one product at a time, as the equation has it."""
    y = torch.zeros(*x.shape[:-1], layer.out_features, dtype=x.dtype)
    if layer.shared is not None:
        y = y + F.linear(x, layer.shared.weight)
    if layer.residual_A is not None:
        y = y + F.linear(F.linear(x, layer.residual_A), layer.residual_B)
    if layer.diagonal is not None:
        size = len(layer.diagonal)
        y = y + F.pad(layer.diagonal * x[..., :size], (0, layer.out_features - size))
    bias = layer.bias
    return y if bias is None else y + bias


def one_layer(kind: str, shape: tuple[int, int], rank: int, diagonal: bool) -> nn.ModuleDict:
    """A layer over a shared `U`, or one of low rank alone."""
    if kind == "shared":
        return group(shape, rank, diagonal, size=1)
    layer = LowRankLinear(torch.empty(shape), 0, rank, diagonal, bias=True)
    layer.reset_parameters()
    return randomize_(nn.ModuleDict({"layers": nn.ModuleList([layer])}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("frames", [1, 3, 600], ids="{}_frames".format)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["shared", "low_rank"])
def test_few_and_many_frames_give_the_outputs_and_gradients_of_the_equation(
    kind, shape, diagonal, frames, dtype, tolerance
):
    module = one_layer(kind, shape, 3, diagonal).to(dtype)
    # The reference computes with the same values, but without their rounding.
    reference = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, frames, shape[1], generator=generator).to(dtype).requires_grad_()
    x_reference = x.detach().double().requires_grad_()
    cotangent = torch.randn(2, frames, shape[0], generator=generator).to(dtype)
    y, expected = module["layers"][0](x), naive(reference["layers"][0], x_reference)
    y.backward(cotangent)
    expected.backward(cotangent.double())
    pairs = {"outputs": (y, expected), "inputs": (x.grad, x_reference.grad)}
    for (name, parameter), other in zip(module.named_parameters(), reference.parameters(), strict=True):
        if not name.startswith("shared.0"):
            pairs[name] = (parameter.grad, other.grad)
    for name, (found, exact) in pairs.items():
        assert found.dtype == dtype, name
        assert (found.double() - exact).norm() < tolerance * exact.norm(), name


def kept_for_backward(layer: nn.Module, frames: int) -> int:
    """Numbers, parameters aside, that a forward pass on inputs (2, frames, in_features) keeps for backward."""
    shared = getattr(layer, "shared", None)
    owners = (layer,) if shared is None else (layer, shared)
    parameters = {p.untyped_storage().data_ptr() for owner in owners for p in owner.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor.detach()

    # Not a leaf, as inside a network.
    x = torch.randn(2, frames, layer.in_features, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("frames", [2, 600])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["shared", "low_rank"])
def test_backward_keeps_no_activation_that_a_dense_layer_does_not_but_those_of_rank_r(
    kind, shape, diagonal, frames
):
    rank = 3
    layer = one_layer(kind, shape, rank, diagonal)["layers"][0]
    dense = nn.Linear(shape[1], shape[0])

    # Of what is kept, the part that grows with the frames; the rest are weights.
    def growth(module: nn.Module) -> int:
        return kept_for_backward(module, 2 * frames) - kept_for_backward(module, frames)

    assert growth(dense) == 2 * frames * shape[1]
    assert growth(layer) <= growth(dense) + 2 * frames * rank
    # And no weight beside the parameters: many frames are where one is composed.
    thin = 0 if kind == "shared" and frames == 600 else 2 * frames * rank
    assert kept_for_backward(layer, frames) == kept_for_backward(dense, frames) + thin


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_merged_weight_is_the_explicit_one_and_leaves_the_components_as_they_were(rank, diagonal):
    module = group((20, 12), rank, diagonal)
    before = copy.deepcopy(module.state_dict())
    for layer in module["layers"]:
        weight, bias = explicit(module, layer)
        torch.testing.assert_close(layer.weight.detach(), weight)
        torch.testing.assert_close(layer.bias.detach(), bias)
        layer(torch.ones(1, 12))
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_full_rank_reaches_any_matrix(shape):
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    target, shared = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    u, s, v = torch.linalg.svd(target - shared, full_matrices=False)
    assert len(s) == min(out_features, in_features)
    torch.testing.assert_close(compose(shared, residual_A=v, residual_B=u * s), target, rtol=1e-4, atol=1e-4)


def test_a_parameter_that_is_replaced_in_the_bank_is_the_one_that_is_used():
    module = group((12, 12), 3)
    x = torch.randn(4, 12)
    before = module["layers"][0](x)
    module["shared"][1].weight = nn.Parameter(module["shared"][1].weight + 1.0)
    torch.testing.assert_close(module["layers"][0](x), before + x.sum(-1, keepdim=True))


def test_the_shared_weight_appears_once_in_the_state_dict():
    module = group((12, 12), 3, bias="own", size=2)
    per_layer = [
        f"layers.{i}.{name}" for i in range(2) for name in ("residual_A", "residual_B", "diagonal", "bias")
    ]
    assert sorted(module.state_dict()) == sorted(["shared.0.weight", "shared.1.weight", *per_layer])


def test_from_scratch_a_layer_is_its_shared_weight_and_gradients_reach_lora_b():
    bank = nn.ModuleList([SharedLinear(12, 20, bias=False)])
    layer = ResidualLinear(bank, 0, rank=3, diagonal=True, bias=True)
    layer.reset_parameters()
    x = torch.randn(4, 12)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, bank[0].weight), rtol=0, atol=0)
    y.pow(2).sum().backward()
    assert layer.residual_B.grad.abs().min() > 0
    assert layer.residual_A.detach().abs().max() <= 12**-0.5
    assert layer.residual_A.detach().std() > 0


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_outputs_and_the_float32_gradients_of_a_dense_layer(dtype, rank):
    module = group((12, 12), rank, size=1)
    layer = module["layers"][0]
    weight, bias = explicit(module, layer)
    dense = nn.Linear(12, 12)
    dense.load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(4, 12)
    with torch.autocast("cpu", dtype):
        y, expected = layer(x), dense(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    y.float().sum().backward()
    expected.float().sum().backward()
    grad = module["shared"][1].weight.grad
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, dense.weight.grad, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("diagonal", [False, True])
def test_an_exported_layer_takes_any_length_and_never_composes_a_weight(diagonal):
    module = group((12, 20), 3, diagonal)
    network = Alone(module["shared"], module["layers"][0])
    frames = torch.export.Dim("frames", min=2, max=4096)
    exported = torch.export.export(network, (torch.randn(2, 50, 20),), dynamic_shapes=({1: frames},))
    for length in (2, 700):
        x = torch.randn(2, length, 20)
        torch.testing.assert_close(exported.module()(x), network(x), rtol=1e-4, atol=1e-5)
    made = [node.meta["val"] for node in exported.graph.nodes if node.op == "call_function"]
    shapes = [tuple(value.shape) for value in made if isinstance(value, torch.Tensor)]
    assert shapes and (12, 20) not in shapes and (20, 12) not in shapes


def test_a_compiled_layer_takes_few_and_many_frames():
    module = group((12, 20), 3)
    layer = module["layers"][0]
    torch.compiler.reset()  # what other tests compile counts towards the limit of recompilations
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for frames in (1, 3, 50, 700):
        x = torch.randn(2, frames, 20, requires_grad=True)
        expected, found = layer(x), compiled(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(y.sum(), (x, layer.residual_A))[0] for y in (expected, found)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share_bias", [False, True])
def test_an_attention_that_reads_weights_instead_of_calling_its_layers_gets_the_right_ones(share_bias):
    """WavLM's passes `q_proj.weight`, `q_proj.bias`, ... to a function of torch."""
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
        conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    dense = randomize_(WavLMModel(config))
    model = copy.deepcopy(dense)
    paths = ("q_proj", "k_proj", "v_proj", "out_proj")
    banks = {}
    for path in paths:
        bank = nn.ModuleList([SharedLinear(16, 16, bias=share_bias)])
        banks[path] = randomize_(bank)
        for index, layer in enumerate(model.encoder.layers):
            linear = ResidualLinear(bank, 0, rank=2, diagonal=True, bias=not share_bias)
            for parameter in linear.parameters():
                nn.init.normal_(parameter)
            setattr(layer.attention, path, linear)
            twin = getattr(dense.encoder.layers[index].attention, path)
            twin.weight.data.copy_(linear.weight)
            twin.bias.data.copy_(linear.bias)
    values = torch.randn(2, 100)
    found, expected = model(values).last_hidden_state, dense(values).last_hidden_state
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for path in paths:
        twins = [getattr(layer.attention, path) for layer in dense.encoder.layers]
        torch.testing.assert_close(banks[path][0].weight.grad, sum(twin.weight.grad for twin in twins))
        for layer, twin in zip(model.encoder.layers, twins, strict=True):
            torch.testing.assert_close(
                getattr(layer.attention, path).diagonal.grad, twin.weight.grad.diagonal()
            )
