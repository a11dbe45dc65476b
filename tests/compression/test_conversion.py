"""Dense to residual: the closed forms, the statistics they use, what the converted model does, and bad input."""

import copy
import gc
import math
import weakref
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import add_adapter_or_skip, randomize_, tiny_wav2vec2_config, tiny_whisper_config
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Wav2Vec2ForCTC, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

import hf_residual_transformer as hrt
from hf_residual_transformer.compression import alignment as symmetry_module
from hf_residual_transformer.compression import allocation as budget_module
from hf_residual_transformer.compression import refinement as sequential
from hf_residual_transformer.compression import statistics as calibration_module
from hf_residual_transformer.compression.allocation import Search, unranked_parameters
from hf_residual_transformer.compression.conversion import ENCODER, Plan, residual_like
from hf_residual_transformer.compression.fitting import fit_group, quantize_for, truncate
from hf_residual_transformer.compression.inputs import frozen_view, output_of
from hf_residual_transformer.compression.statistics import (
    Group,
    MatrixStatistics,
    StatesObjective,
    collect,
    damp,
    runs_of_layers,
)
from hf_residual_transformer.families import WHISPER, LayerStack

LOW_RANK = {"q_proj": None, "k_proj": None, "v_proj": None, "out_proj": 2, "fc1": None, "fc2": 2}


def groups_with(size, paths, num_layers):
    """All groups of that size at these paths."""
    step = size or 1
    starts = range(0, num_layers, step)
    return [Group(path, size, tuple(range(i, min(i + step, num_layers)))) for path in paths for i in starts]


def random_problem(num_layers, out_features, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(out_features, in_features, generator=generator).double() for _ in range(num_layers)
    ]
    covariances = []
    for _ in range(num_layers):
        inputs = torch.randn(4 * in_features, in_features, generator=generator).double()
        inputs = (
            inputs
            * torch.logspace(0, -1.5, in_features)
            @ torch.linalg.qr(torch.randn(in_features, in_features, generator=generator).double())[0]
        )
        covariances.append(inputs.T @ inputs / len(inputs))
    return weights, covariances


def random_importance(features, seed=7):
    rows = torch.randn(2 * features, features, generator=torch.Generator().manual_seed(seed)).double()
    return rows.T @ rows * torch.outer(*[torch.logspace(0, -0.5, features).double()] * 2)


def loss(weights, covariances, fits, importance=None):
    G = torch.eye(len(weights[0])).double() if importance is None else importance
    return sum(
        torch.trace(G @ (w - f.weight()) @ c @ (w - f.weight()).T).item()
        for w, c, f in zip(weights, covariances, fits)
    )


def whisper_inputs(num_windows=4, seed=0):
    config = tiny_whisper_config()
    generator = torch.Generator().manual_seed(seed)
    frames = 2 * config.max_source_positions
    return torch.randn(num_windows, config.num_mel_bins, frames, generator=generator)


def dense_whisper(**changes):
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(tiny_whisper_config(**changes)).eval()
    randomize_(model, 0)
    return model


def converted(dense, calibration=None, **options):
    start = options.pop("start", "calibrated")
    return hrt.ResidualWhisperForConditionalGeneration.from_dense(
        dense, hrt.ResidualConfig(**options), calibration=calibration, start=start, progress=False
    )


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_truncation_is_that_of_the_singular_value_decomposition(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    left, right = truncate(matrix, rank)
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    assert left.shape == (shape[0], rank)
    torch.testing.assert_close(left @ right, U[:, :rank] * S[:rank] @ V[:rank])


@pytest.mark.parametrize("importance", [None, random_importance(12)])
def test_a_pair_of_layers_is_fitted_in_one_step_at_least_as_well_as_by_long_alternation(importance):
    weights, covariances = random_problem(2, 12, 10)
    options = {"importance": importance}
    closed = loss(weights, covariances, fit_group(weights, covariances, [2, 3], **options), importance)
    # A negligible third layer takes the general way.
    third = [torch.zeros_like(weights[0])], [1e-12 * covariances[0]]
    alternated = fit_group(weights + third[0], covariances + third[1], [2, 3, 0], iterations=1000, **options)
    alternated_loss = loss(weights, covariances, alternated[:2], importance)
    assert closed <= alternated_loss * (1 + 1e-6)
    assert closed == pytest.approx(alternated_loss, rel=0.02)


@pytest.mark.parametrize("importance", [None, random_importance(9)])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("num_layers", [2, 3])
def test_more_rounds_never_make_a_fit_worse(num_layers, diagonal, importance):
    weights, covariances = random_problem(num_layers, 9, 9)
    options = {"diagonal": diagonal, "importance": importance}
    losses = [
        loss(
            weights,
            covariances,
            fit_group(weights, covariances, [2] * num_layers, iterations=n, **options),
            importance,
        )
        for n in (0, 1, 3, 10, 30)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))


@pytest.mark.parametrize("shape", [(9, 9), (12, 8), (8, 12)])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_error_falls_as_the_rank_grows_and_full_rank_leaves_none(shape, diagonal, num_layers):
    weights, covariances = random_problem(num_layers, *shape)
    losses = [
        loss(weights, covariances, fit_group(weights, covariances, [rank] * num_layers, diagonal=diagonal))
        for rank in (0, 1, 2, 4, min(shape))
    ]
    scale = sum(torch.trace(w @ c @ w.T).item() for w, c in zip(weights, covariances))
    assert all(after <= before + 1e-12 * scale for before, after in pairwise(losses))
    assert losses[-1] < 1e-12 * scale
    if num_layers == 1:
        assert losses[0] < 1e-12 * scale


def test_a_diagonal_lowers_the_error_of_a_group_that_has_one():
    weights, covariances = random_problem(3, 9, 9)
    weights = [w + torch.diag(torch.full((9,), 5.0 * i).double()) for i, w in enumerate(weights)]
    without = loss(weights, covariances, fit_group(weights, covariances, [1] * 3))
    assert loss(weights, covariances, fit_group(weights, covariances, [1] * 3, diagonal=True)) < 0.7 * without


@pytest.mark.parametrize(
    ("num_layers", "shared", "diagonal"), [(1, False, False), (1, False, True), (2, True, False)]
)
def test_a_fit_for_the_importance_of_outputs_beats_others_by_its_own_measure(num_layers, shared, diagonal):
    weights, covariances = random_problem(num_layers, 9, 9)
    importance = random_importance(9)
    blind, aware = (
        fit_group(weights, covariances, [3] * num_layers, importance=g, shared=shared, diagonal=diagonal)
        for g in (None, importance)
    )
    assert loss(weights, covariances, aware, importance) < 0.98 * loss(
        weights, covariances, blind, importance
    )
    assert loss(weights, covariances, blind) < 0.98 * loss(weights, covariances, aware)


def test_without_statistics_or_rounds_the_start_is_the_mean_and_the_truncated_svd_of_the_rest():
    weights, _ = random_problem(3, 7, 9)
    fits = fit_group(weights, None, [2, 2, 2], iterations=0)
    mean = sum(weights) / 3
    for weight, fit in zip(weights, fits):
        torch.testing.assert_close(fit.shared, mean)
        left, right = truncate(weight - mean, 2)
        torch.testing.assert_close(fit.residual_B @ fit.residual_A, left @ right)


def test_statistics_are_weighted_and_do_not_depend_on_how_frames_are_divided():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(60, 5, generator=generator) * 3 + 100
    gradients = torch.randn(60, 4, generator=generator)
    whole, parts = (MatrixStatistics(4, 5, torch.device("cpu")) for _ in range(2))
    whole.update(frames, gradients)
    for part in zip(frames.split(7), gradients.split(7)):
        parts.update(*part)
    torch.testing.assert_close(whole.covariance(), parts.covariance(), rtol=1e-6, atol=1e-3)
    weights = gradients.double().square().sum(1)
    expected = torch.cov(frames.double().T, correction=0, aweights=weights)
    torch.testing.assert_close(whole.covariance() / weights.sum(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.mean, weights @ frames.double() / weights.sum())
    products = gradients.T.double() @ gradients.double()
    torch.testing.assert_close(parts.gradients, products, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 4, None, LOW_RANK])
def test_full_rank_reproduces_the_dense_model(group_size):
    dense = dense_whisper()
    rank = dense.config.d_model
    model = converted(dense, whisper_inputs(), group_size=group_size, rank=rank, diagonal="none")
    features = whisper_inputs(2, seed=1)
    tokens = torch.tensor([[1, 2, 3]] * 2)
    with torch.no_grad():
        expected = dense(input_features=features, decoder_input_ids=tokens).logits
        torch.testing.assert_close(
            model(input_features=features, decoder_input_ids=tokens).logits, expected, rtol=1e-3, atol=1e-4
        )
    assert (
        model.conversion_report.mean_error < 1e-7
    )  # of the squares, whose sums are in float32 within a batch


def test_the_calibrated_start_keeps_the_outputs_better_than_the_svd_on_the_same_inputs():
    dense, inputs = dense_whisper(), whisper_inputs()
    errors = {
        start: converted(dense, inputs, start=start, group_size=2, rank=2).conversion_report
        for start in ("svd", "calibrated")
    }
    assert errors["svd"].measured_on == errors["calibrated"].measured_on == "outputs"
    pairs = zip(errors["svd"].errors, errors["calibrated"].errors)
    assert all(calibrated.error < svd.error for svd, calibrated in pairs)


def calls_of(encoder, inputs, hook=lambda key, output: None):
    """By layer and module path, what it got and gave; the path of a layer itself is ""."""
    calls = {}

    def watch(key, _module, args, output):
        calls[key] = args[0].detach(), (output[0] if isinstance(output, tuple) else output).detach()
        hook(key, output)

    handles = [
        layer.get_submodule(path).register_forward_hook(partial(watch, (layer_idx, path)))
        for layer_idx, layer in enumerate(encoder.layers)
        for path in ("", *WHISPER.modules)
    ]
    final = encoder(inputs).last_hidden_state
    for handle in handles:
        handle.remove()
    return calls, final


@pytest.mark.parametrize("group_size", [2, 3, LOW_RANK])
def test_the_report_is_how_outputs_of_the_residual_encoder_differ(group_size, neurons_in_order):
    dense, inputs = dense_whisper(), whisper_inputs()
    model = converted(dense, inputs, group_size=group_size, rank=2)
    entries = {(entry.layer, entry.module): entry.error for entry in model.conversion_report.errors}
    frame_weights = {}

    def watch_gradient(key, output):
        if key[1]:
            output.register_hook(
                lambda g: frame_weights.__setitem__(key, g.square().sum(-1).flatten()[:, None])
            )

    expected, final = calls_of(dense.model.encoder, inputs, watch_gradient)
    generator = torch.Generator().manual_seed(0)
    probes = torch.stack([torch.randn(final.shape[1:], generator=generator) for _ in final])
    (final * probes).sum().backward()
    with torch.no_grad():
        found, _ = calls_of(model.model.encoder, inputs)
    assert len(entries) == len(frame_weights)
    for (layer_idx, path), weights in frame_weights.items():
        wanted, got = expected[layer_idx, path][1], found[layer_idx, path][1]
        streams = [calls[layer_idx, ""][0] for calls in (expected, found)]
        if path == "fc2":
            attention = layer_idx, "self_attn.out_proj"
            streams = [s + calls[attention][1] for s, calls in zip(streams, (expected, found))]
        if path in ("self_attn.out_proj", "fc2"):  # which also give what the residual stream lacks
            wanted = wanted + streams[0] - streams[1]
        wanted, got = wanted.flatten(0, 1), got.flatten(0, 1)
        weights = weights / weights.sum()
        lacking = wanted - got
        error = (weights * (lacking - (weights * lacking).sum(0)).square()).sum() / (
            weights * (wanted - (weights * wanted).sum(0)).square()
        ).sum()
        assert entries[layer_idx, path.rpartition(".")[2]] == pytest.approx(error.item(), rel=1e-3)
        if "k_proj" not in path:  # which has no bias: softmax does not see a constant added to all keys
            means = [(weights * outputs).sum(0) for outputs in (got, wanted)]
            torch.testing.assert_close(*means, rtol=1e-3, atol=1e-4)


def test_the_result_does_not_depend_on_the_batch_size():
    dense, inputs = dense_whisper(), whisper_inputs(6)
    models = [
        converted(dense, [{"input_features": part} for part in inputs.split(size)], group_size=3, rank=2)
        for size in (1, 4, 6)
    ]
    for model in models[1:]:
        assert_same_function(models[0], model)


@pytest.fixture
def neurons_in_order(monkeypatch):
    """Neurons stay as they are."""
    order = torch.arange(64).numpy()
    monkeypatch.setattr(symmetry_module, "linear_sum_assignment", lambda cost: (order, order))


def assert_same_function(first, second):
    """Factors of one product may differ by a rotation."""
    others = second.merge().state_dict()
    for key, value in first.merge().state_dict().items():
        torch.testing.assert_close(value, others[key], rtol=1e-3, atol=3e-4)


def test_statistics_of_few_layers_are_held_at_a_time_and_give_the_same_model(monkeypatch):
    dense, inputs = dense_whisper(), whisper_inputs()
    num_layers = dense.config.encoder_layers
    groups = groups_with(2, WHISPER.modules, num_layers)
    source = LayerStack(WHISPER.encoder, dense)
    config = hrt.ResidualConfig(group_size=2)
    options = {"calibration": inputs, "budget": 0.8, "progress": False}
    from_dense = hrt.ResidualWhisperForConditionalGeneration.from_dense
    at_once = from_dense(dense, config, **options)
    assert runs_of_layers(source, groups) == [groups]
    own, held = calibration_module.collect, []
    for held_bytes in (1, 3e5):
        monkeypatch.setattr(calibration_module, "HELD_BYTES", held_bytes)
        runs = runs_of_layers(source, groups)
        assert [{layer for group in run for layer in group.layers} for run in runs] == [
            set(range(i, min(i + 2, num_layers))) for i in range(0, num_layers, 2)
        ]

        def collect_few(*args, **kwargs):
            gc.collect()
            assert not [
                reference for reference in held if reference() is not None
            ]  # those of the last run are freed
            found = own(*args, **kwargs)
            held[:] = [weakref.ref(entry) for entry in found.values()]
            return found

        monkeypatch.setattr("hf_residual_transformer.compression.conversion.collect", collect_few)
        assert_same_function(at_once, from_dense(dense, config, **options))
        held.clear()


def test_of_layers_that_follow_only_inputs_are_kept_for_backward():
    model, inputs = frozen_view(dense_whisper()), whisper_inputs()
    source = LayerStack(WHISPER.encoder, model)
    groups = groups_with(None, WHISPER.modules, len(source))
    kept, wide, width = [], [], model.config.encoder_ffn_dim
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        for layer in range(len(source)):
            run = [group for group in groups if group.layers == (layer,)]
            batches, objective = [{"input_features": inputs}], StatesObjective(source)
            statistics = collect(source, model, run, batches, objective, progress=False)
            assert all(entry.weight > 0 for entry in statistics.values())
            wide.append(sum(tensor.shape[-1] == width for tensor in kept))
            kept.clear()
    assert len(wide) == len(source) and set(wide) == {wide[-1]} and wide[-1] > 0
    assert not any("forward" in layer.__dict__ for layer in source.layers)


def test_what_is_not_shared_is_taken_over_and_the_dense_model_stays_as_it_was():
    dense = dense_whisper().train()
    dense.generation_config.max_length = 77
    before = copy.deepcopy(dense.state_dict())
    model = converted(dense, whisper_inputs(), group_size=2, rank=2)
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    assert dense.training and not model.training
    assert model.generation_config.max_length == 77
    for key, value in model.state_dict().items():
        if key in before and ".encoder.layers." not in key:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("stable", [False, True])
def test_masked_frames_of_wav2vec2_do_not_count(stable):
    torch.manual_seed(0)
    dense = Wav2Vec2ForCTC(
        tiny_wav2vec2_config(do_stable_layer_norm=stable, feat_extract_norm="layer")
    ).eval()
    randomize_(dense, 0)
    speech = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([speech, torch.zeros(1, 900)], dim=1)
    mask = torch.tensor([[1] * 8000 + [0] * 900])
    config = hrt.ResidualConfig(group_size=2, rank=2)
    models = [
        hrt.ResidualWav2Vec2ForCTC.from_dense(dense, config, calibration=[batch], progress=False)
        for batch in (
            {"input_values": speech, "attention_mask": torch.ones_like(speech, dtype=torch.long)},
            {"input_values": padded, "attention_mask": mask},
        )
    ]
    assert_same_function(*models)


@pytest.mark.parametrize(
    "config",
    [
        hrt.ResidualConfig(group_size=None, rank=4),
        hrt.ResidualConfig(group_size=2, rank=2),
        hrt.ResidualConfig.paper(group_size=3, rank=2),
    ],
    ids=["low rank", "pairs", "shared biases"],
)
@pytest.mark.parametrize("stable", [None, False, True], ids=["whisper", "post-norm", "pre-norm"])
def test_fitting_to_what_the_residual_encoder_produces_brings_final_states_nearer(
    config, stable, monkeypatch
):
    torch.manual_seed(0)
    if stable is None:
        dense, cls = dense_whisper(), hrt.ResidualWhisperForConditionalGeneration
        inputs = {"input_features": whisper_inputs()}
    else:
        dense, cls = (
            Wav2Vec2ForCTC(tiny_wav2vec2_config(do_stable_layer_norm=stable)).eval(),
            hrt.ResidualWav2Vec2ForCTC,
        )
        randomize_(dense, 0)
        inputs = {"input_values": torch.randn(4, 8000, generator=torch.Generator().manual_seed(0))}

    def error():
        model = cls.from_dense(dense, config, calibration=[inputs], progress=False)
        encoders = [cls.family.find_encoder(one) for one in (dense, model)]
        with torch.no_grad():
            states = [output_of(*pair, inputs)[0] for pair in zip((dense, model), encoders)]
        shared = [weight.clone() for weight in encoders[1].shared.parameters()]
        return (states[1] - states[0]).square().mean() / states[0].var(), shared

    fitted, shared = error()
    monkeypatch.setattr(sequential.Streams, "_fit", lambda *_: None)
    without, before = error()
    assert fitted < 0.95 * without
    assert all(not torch.equal(*pair) for pair in zip(shared, before) if pair[0].dim() == 2)


@pytest.mark.parametrize("start", ["svd", "calibrated"])
def test_cyclic_groups_lose_nothing_where_layers_that_lie_apart_agree(start):
    dense = dense_whisper()
    layers = dense.model.encoder.layers
    num_groups = math.ceil(len(layers) / 2)
    for index, layer in enumerate(layers):
        layer.load_state_dict(layers[index % num_groups].state_dict())
    inputs = whisper_inputs() if start == "calibrated" else None
    lost = []
    for cyclic in (True, False):
        model = converted(dense, inputs, start=start, group_size=2, rank=1, diagonal="none", cyclic=cyclic)
        report = model.conversion_report
        lost.append(max(entry.error for entry in report.errors))
        assert model.model.encoder.layers[0].fc1.shared is (
            model.model.encoder.layers[num_groups if cyclic else 1].fc1.shared
        )
    assert lost[0] < 1e-6
    assert lost[1] > 1e-3


def test_shared_biases_are_the_mean_of_the_layers():
    dense = dense_whisper()
    model = converted(dense, start="svd", group_size=2, rank=2, share_biases=True)
    layers = dense.model.encoder.layers
    expected = (layers[0].fc1.bias + layers[1].fc1.bias) / 2
    torch.testing.assert_close(model.model.encoder.shared["fc1"][0].bias, expected)


def test_the_svd_start_needs_no_inputs_and_reports_on_weights():
    dense = dense_whisper()
    model = converted(dense, start="svd", group_size=2, rank=2, diagonal="none")
    assert model.conversion_report.measured_on == "weights"
    entry = model.conversion_report.errors[0]
    weight = dense.model.encoder.layers[0].self_attn.q_proj.weight
    left = weight - model.model.encoder.layers[0].self_attn.q_proj.weight
    assert entry.error == pytest.approx((left.norm() / weight.norm()).square().item(), rel=1e-4)


def test_the_heat_map_is_drawn_and_the_table_printed(tmp_path):
    report = converted(dense_whisper(), whisper_inputs(), group_size=2, rank=2).conversion_report
    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"
    assert "out_proj" in str(report)
    assert len(report.to_dict()["errors"]) == 6 * dense_whisper().config.encoder_layers


@pytest.mark.parametrize("group_size", [2, 3, None, LOW_RANK])
def test_a_budget_is_met_and_spent_better_than_equal_ranks_spend_it(group_size):
    dense, inputs = dense_whisper(), whisper_inputs()
    config = hrt.ResidualConfig(group_size=group_size, rank=7, diagonal="none")
    from_dense = hrt.ResidualWhisperForConditionalGeneration.from_dense
    equal = from_dense(dense, config, calibration=inputs, progress=False)
    budget = hrt.size_report(equal).encoder.ratio
    chosen = from_dense(dense, config, calibration=inputs, budget=budget, progress=False)
    ratio = hrt.size_report(chosen).encoder.ratio
    assert budget - 0.02 < ratio <= budget
    with torch.no_grad():
        states = [model.get_encoder()(inputs).last_hidden_state for model in (dense, equal, chosen)]
    assert (states[2] - states[0]).square().sum() < (states[1] - states[0]).square().sum()
    assert chosen.config.residual_config.rank_pattern


@pytest.mark.parametrize(("bits", "budget"), [(None, 0.7), (4, 0.31)])
def test_without_settings_a_budget_chooses_them(bits, budget):
    from_dense = hrt.ResidualWhisperForConditionalGeneration.from_dense
    options = {"calibration": whisper_inputs(), "progress": False, "shared_bits": bits, "parts": ("encoder",)}
    model = from_dense(dense_whisper(), **options)
    assert budget - 0.03 < hrt.size_report(model).encoder_bytes.ratio <= budget
    assert_same_function(model, from_dense(dense_whisper(), budget=budget, **options))
    options |= {"start": "svd", "parts": None, "shared_bits": "auto"}
    assert from_dense(dense_whisper(), **options).config.residual_config == hrt.ResidualConfig()


def test_the_error_estimate_is_what_a_small_change_does_to_the_final_states():
    dense, inputs = dense_whisper(), whisper_inputs(64)
    encoder = dense.model.encoder
    groups = groups_with(None, WHISPER.modules, dense.config.encoder_layers)
    view = frozen_view(dense)
    source, batches = LayerStack(WHISPER.encoder, view), [{"input_features": inputs}]
    statistics = collect(source, view, groups, batches, StatesObjective(source), progress=False)
    with torch.no_grad():
        before = encoder(inputs).last_hidden_state
        for key in ((0, "fc1"), (2, "self_attn.out_proj"), (3, "fc2")):
            entry = statistics[key]
            linear = encoder.layers[key[0]].get_submodule(key[1])
            noise = 1e-3 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1))
            linear.weight += noise
            linear.bias -= noise @ entry.mean.float()
            moved = (encoder(inputs).last_hidden_state - before).square().sum().item()
            linear.weight -= noise
            linear.bias += noise @ entry.mean.float()
            error = noise.double() @ entry.covariance() @ noise.double().T
            estimate = torch.trace(entry.gradients @ error).item() / entry.weight.item()
            assert estimate == pytest.approx(moved, rel=0.5)


def with_the_same_neurons(order):
    """A dense model whose second layer has the feed-forward of the first, its neurons in this order."""
    dense = dense_whisper()
    first, second = dense.model.encoder.layers[:2]
    with torch.no_grad():
        second.fc1.weight.copy_(first.fc1.weight[order])
        second.fc1.bias.copy_(first.fc1.bias[order])
        second.fc2.weight.copy_(first.fc2.weight[:, order])
        second.fc2.bias.copy_(first.fc2.bias)
    return dense


def test_neurons_of_layers_that_share_are_put_into_the_order_in_which_they_agree():
    dense, inputs = with_the_same_neurons(torch.randperm(64)), whisper_inputs()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    config = hrt.ResidualConfig(group_size=2, rank=0, diagonal="none", target_modules=("fc1", "fc2"))
    model = hrt.ResidualWhisperForConditionalGeneration.from_dense(
        dense, config, calibration=inputs, progress=False
    )
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    errors = {error.layer: error.error for error in model.conversion_report.errors if error.module == "fc2"}
    assert errors[1] < 1e-3 < errors[3]


def test_a_matrix_whose_neurons_cannot_be_matched_is_named(monkeypatch):
    dense, inputs = with_the_same_neurons(torch.randperm(64)), whisper_inputs()

    def fail(*_):
        raise torch.linalg.LinAlgError("not positive-definite")

    monkeypatch.setattr(symmetry_module, "parallel_sum", fail)
    with pytest.raises(
        ValueError, match=r"the weights of encoder layers\.0\.fc1 and layers\.1\.fc1, or what"
    ):
        hrt.ResidualWhisperForConditionalGeneration.from_dense(
            dense, hrt.ResidualConfig(group_size=2, rank=1), calibration=inputs, progress=False
        )


def test_neurons_keep_their_order_where_only_one_of_their_matrices_is_shared():
    dense, inputs = with_the_same_neurons(torch.randperm(64)), whisper_inputs()
    config = hrt.ResidualConfig(group_size=2, rank=32, diagonal="none", target_modules=("fc2",))
    model = hrt.ResidualWhisperForConditionalGeneration.from_dense(
        dense, config, calibration=inputs, progress=False
    )
    assert torch.equal(model.model.encoder.layers[1].fc1.weight, dense.model.encoder.layers[1].fc1.weight)
    with torch.no_grad():
        states = [m.get_encoder()(inputs).last_hidden_state for m in (dense, model)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-3)


def test_group_sizes_that_are_left_open_are_chosen_by_what_they_leave(neurons_in_order):
    dense, inputs = dense_whisper(), whisper_inputs()
    layers = dense.model.encoder.layers
    with torch.no_grad():  # equal weights call for sharing, and low rank for low rank
        for layer in layers:
            layer.fc1.weight.copy_(layers[0].fc1.weight)
            layer.fc2.weight.copy_(torch.outer(layer.fc2.weight[:, 0], layer.fc2.weight[0]))
    model = hrt.ResidualWhisperForConditionalGeneration.from_dense(
        dense, calibration=inputs, budget=0.6, shared_bits=None, progress=False
    )
    chosen = model.config.residual_config
    assert chosen.group_size["fc1"] == 2
    assert chosen.group_size["fc2"] is None
    assert chosen.diagonal == "none"
    assert 0.58 < hrt.size_report(model).encoder.ratio <= 0.6
    ranks = {linear.rank for layer in model.model.encoder.layers for linear in (layer.fc1, layer.fc2)}
    assert ranks == {0, 1}  # nothing is spent where nothing is lacking


@pytest.mark.parametrize(("cost", "expected"), [(1e-9, 2), (1e9, None)])
def test_group_sizes_depend_on_what_the_error_of_sharing_counts(cost, expected, monkeypatch):
    """With this budget no pair can share without an error, which would cost nothing however much it counts."""
    monkeypatch.setattr(budget_module, "SHARED_COST", cost)
    model = hrt.ResidualWhisperForConditionalGeneration.from_dense(
        dense_whisper(), calibration=whisper_inputs(), budget=0.56, shared_bits=None, progress=False
    )
    assert set(model.config.residual_config.group_size.values()) == {expected}


@pytest.mark.parametrize("budget", [0, 1.5, -1])
def test_a_budget_that_is_no_fraction_is_refused(budget):
    with pytest.raises(ValueError, match="`budget` must be above 0, at most 1"):
        from_budget(budget)


def test_a_budget_below_what_is_shared_is_refused_with_the_least_possible():
    with pytest.raises(ValueError, match=r"`budget` must be at least 0\.5"):
        from_budget(0.3)


def from_budget(budget):
    return hrt.ResidualWhisperForConditionalGeneration.from_dense(
        dense_whisper(), hrt.ResidualConfig(), calibration=whisper_inputs(), budget=budget, progress=False
    )


def quantised():
    class Quantised(nn.Linear):
        pass

    dense = dense_whisper()
    linear = dense.model.encoder.layers[0].fc1
    dense.model.encoder.layers[0].fc1 = Quantised(linear.in_features, linear.out_features)
    return dense


@pytest.mark.parametrize(
    ("dense", "calibration", "message"),
    [
        (dense_whisper, None, "`calibration` must hold batches"),
        (dense_whisper, [], "`calibration` must hold batches"),
        (dense_whisper, lambda: whisper_inputs() * torch.nan, "must be finite"),
        (dense_whisper, lambda: whisper_inputs()[:0], "must not be empty"),
        (dense_whisper, ["speech.wav"], "must be a dict of model inputs, got str"),
        (dense_whisper, [{"labels": torch.ones(2)}], "must have a tensor input_features or input_values"),
        (quantised, whisper_inputs, "without quantisation"),
        (lambda: converted(dense_whisper(), start="svd"), whisper_inputs, "must be a dense model"),
        (
            lambda: WhisperModel(tiny_whisper_config()),
            whisper_inputs,
            "must be a WhisperForConditionalGeneration",
        ),
        (
            lambda: Wav2Vec2ForCTC(tiny_wav2vec2_config()),
            whisper_inputs,
            "must be a WhisperForConditionalGeneration",
        ),
    ],
)
def test_bad_input_is_refused_with_its_reason(dense, calibration, message):
    calibration = calibration() if callable(calibration) else calibration
    with pytest.raises(ValueError, match=message):
        converted(dense(), calibration)


def test_the_folder_of_another_family_is_refused(tmp_path):
    Wav2Vec2ForCTC(tiny_wav2vec2_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be a whisper model .* is 'wav2vec2'"):
        converted(str(tmp_path), whisper_inputs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "zero"}, "`start` must be one of calibrated, svd, got 'zero'"),
        ({"group_size": 2, "rank": 10_000}, "`rank` must be at most"),
        ({"group_size": None, "rank": 0}, "`rank` must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        converted(dense_whisper(), whisper_inputs(), **options)


def test_the_dense_model_is_left_alone_also_after_an_error(monkeypatch):
    dense = dense_whisper().train()
    flags = [parameter.requires_grad for parameter in dense.parameters()]
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    options = {"calibration": whisper_inputs(), "budget": 0.8, "progress": False}
    from_dense = hrt.ResidualWhisperForConditionalGeneration.from_dense
    from_dense(dense, hrt.ResidualConfig(group_size=2), **options)

    def broken(*_args, **_kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(sequential.Streams, "_fit", broken)
    with pytest.raises(RuntimeError, match="broken"):
        from_dense(dense, hrt.ResidualConfig(group_size=2), **options)
    assert dense.training and all(module.training for module in dense.modules())
    assert [parameter.requires_grad for parameter in dense.parameters()] == flags
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    assert torch.is_grad_enabled()


def test_a_half_precision_model_is_converted_in_float32_and_keeps_its_dtype():
    dense, inputs = dense_whisper(), whisper_inputs()
    half = copy.deepcopy(dense).half()
    options = {"calibration": inputs, "group_size": 2, "rank": 8}
    of_half, exact = converted(half, **options), converted(half.float(), **options)
    assert of_half.dtype == torch.float16
    for key, value in of_half.state_dict().items():
        torch.testing.assert_close(value, exact.state_dict()[key].half(), msg=key)


def test_bits_beside_settings_that_have_their_own_are_refused():
    config = hrt.ResidualConfig(group_size=1, rank=2, shared_bits=3)
    make = partial(
        hrt.ResidualWhisperForConditionalGeneration.from_dense,
        dense_whisper(),
        config,
        calibration=whisper_inputs(),
        progress=False,
    )
    with pytest.raises(ValueError, match=r"`shared_bits` must be left out .* \(3\), .*got 4"):
        make(shared_bits=4)
    assert make(shared_bits=3).config.residual_config.shared_bits == 3


def test_a_matrix_without_a_bias_keeps_the_mean_of_its_outputs(monkeypatch):
    """On inputs with a large mean, a fit of the centred inputs alone would lose it."""
    build = WhisperEncoderLayer.__init__

    def without_bias(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.fc2.bias = None

    monkeypatch.setattr(WhisperEncoderLayer, "__init__", without_bias)
    dense = dense_whisper()
    for layer in dense.model.encoder.layers:
        layer.self_attn_layer_norm.bias.data += (
            3.0  # the inputs of fc2 have a mean by ReLU's kin; those of q_proj by this
        )
    calibrated = converted(dense, whisper_inputs(), group_size={"fc2": None}, rank=8)
    errors = {(entry.layer, entry.module): entry.error for entry in calibrated.conversion_report.errors}
    view = frozen_view(dense)
    source = LayerStack(WHISPER.encoder, view)
    groups = groups_with(None, ["fc2"], len(source))
    batches, objective = [{"input_features": whisper_inputs()}], StatesObjective(source)
    statistics = collect(source, view, groups, batches, objective, progress=False)
    entry = statistics[0, "fc2"]
    assert not entry.centred and entry.mean.norm() > 0
    weight = source.linear(0, "fc2").weight.double()

    def output_error(metric):
        (fit,) = fit_group([weight], [metric], [8], shared=False)
        missing = weight - fit.weight()
        return ((missing @ entry.products) * missing).sum() / ((weight @ entry.products) * weight).sum()

    about_zero, centred = output_error(entry.metric()), output_error(damp(entry.covariance()))
    assert about_zero < 0.2 * centred
    assert errors[0, "fc2"] < 1.2 * about_zero


@pytest.mark.parametrize("targets", [["q_proj"], r".*decoder.*fc1"])
def test_what_an_adapter_adds_is_refused(targets):
    from_dense = partial(
        hrt.ResidualWhisperForConditionalGeneration.from_dense, calibration=whisper_inputs(), progress=False
    )
    adapted = dense_whisper()
    add_adapter_or_skip(adapted, LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        from_dense(adapted)
    del adapted.peft_config  # as if another library had wrapped its layers
    with pytest.raises(ValueError, match=r"plain floating-point nn\.Linear|has no use for the weight"):
        from_dense(adapted)


def test_an_adapter_around_a_model_is_refused_and_never_lost(tmp_path):
    from_dense = partial(
        hrt.ResidualWhisperForConditionalGeneration.from_dense, calibration=whisper_inputs(), progress=False
    )
    wrapped = get_peft_model(dense_whisper(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got a PeftModel with an adapter: merge the adapter first"):
        from_dense(wrapped)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without an adapter, got .*: merge the adapter first"):
        from_dense(str(tmp_path))
    for model in (wrapped, str(tmp_path)):
        with pytest.raises(ValueError, match=r"merge the adapter first"):
            hrt.compress(model, [], processor=object())


def test_a_model_without_a_bias_that_its_class_has_is_refused():
    dense = dense_whisper()
    dense.model.encoder.layers[0].fc1.bias = None
    with pytest.raises(ValueError, match=r"needs the weight 'model\.encoder\.layers\.0\.fc1\.bias'"):
        converted(dense, start="svd")


def test_weights_that_are_not_finite_are_refused_by_name():
    dense = dense_whisper()
    dense.model.encoder.layers[1].fc1.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.fc1\.weight has NaN"):
        converted(dense, start="svd")


@pytest.mark.parametrize("diagonal", ["none", "square", "all"])
@pytest.mark.parametrize("share_biases", [False, True])
def test_parameters_without_ranks_are_counted_as_the_report_counts_them(diagonal, share_biases):
    dense = dense_whisper()
    config = hrt.ResidualConfig(group_size=3, rank=2, diagonal=diagonal, share_biases=share_biases)
    source = LayerStack(WHISPER.encoder, dense)
    plan = Plan({ENCODER: config})
    report = hrt.size_report(residual_like(hrt.ResidualWhisperForConditionalGeneration, dense, plan))
    ranked = sum(report.components[name].unique for name in ("lora", "shared"))
    assert unranked_parameters(Search(source, config)) == report.encoder.unique - ranked


def test_a_covariance_is_damped_by_the_effective_number_of_its_vectors():
    moments = calibration_module.WeightedMoments(40, torch.device("cpu"))
    vectors = torch.randn(4000, 40, generator=torch.Generator().manual_seed(0))
    moments.add(vectors, torch.ones(4000))
    many = moments.covariance()
    torch.testing.assert_close(moments.damped(many), damp(many))  # 4,000 vectors for 40 features
    few = calibration_module.WeightedMoments(40, torch.device("cpu"))
    weights = torch.cat([torch.ones(16), torch.full((3984,), 1e-9)])  # which count as 16
    few.add(vectors, weights)
    wanted = damp(few.covariance(), calibration_module.SHRINKAGE * 40 / 16)
    torch.testing.assert_close(few.damped(few.covariance()), wanted, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_is_rounded_for_few_vectors_also_serves_others():
    """Eight vectors say nothing of most of 64 directions, in which plain damping lets errors grow."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator).double()
    mixing = torch.randn(64, 64, generator=generator)
    heard = torch.randn(8, 64, generator=generator) @ mixing
    others = (torch.randn(1000, 64, generator=generator) @ mixing).double()
    moments = calibration_module.WeightedMoments(64, torch.device("cpu"))
    moments.add(heard, torch.ones(8))

    def error_on_others(metric):
        return ((quantize_for(weight, metric, 3).weight() - weight) @ others.T).square().sum().item()

    assert error_on_others(moments.damped(moments.products)) < 0.9 * error_on_others(damp(moments.products))
