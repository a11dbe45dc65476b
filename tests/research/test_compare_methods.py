"""The comparison: each method by what it must keep and cost, on tiny random models, and a run that is continued."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    WHISPER_VOCAB,
    randomize_,
    tiny_whisper_config,
    whisper_generation_config,
    whisper_processor,
)
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

import hf_residual_transformer as hrt
from hf_residual_transformer.compression.fitting import fit_group
from hf_residual_transformer.compression.statistics import DAMPING, damp
from hf_residual_transformer.families import WHISPER
from hf_residual_transformer.layers import ResidualLinear
from hf_residual_transformer.speech.windows import calibration_batches
from hf_residual_transformer.training import recipe

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "research"
NAMES = ("baseline_parts", "baselines", "compare_methods", "compare_metrics", "compare_results")
# Of a layer of tiny_whisper_config: biases of q, v, out, fc1 and fc2, two norms, and six matrices.
FIXED, MATRICES = 3 * 32 + 64 + 32 + 2 * 64, 4 * 32 * 32 + 2 * 32 * 64
DENSE = 4 * (FIXED + MATRICES)
# The least budget at which nothing is lost; above 1 where full ranks take more than the dense matrices.
EXACT = {
    "svd": 3,
    "pca": 1,
    "pca-damped": 1,
    "sharing-mean": 1,
    "sharing-calibrated": 1,
    "drop-layers": 1,
    "prune-neurons": 1,
}
EXACT |= dict.fromkeys(("tied-average", "tied-first", "basis-2", "basis-3"), 3)
EXACT |= dict.fromkeys(("looped-average", "looped-stepwise", "looped-lower"), 3)


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


def dense_whisper(**changes):
    torch.manual_seed(0)
    return randomize_(WhisperForConditionalGeneration(tiny_whisper_config(**changes)))


def features():
    return torch.randn(4, 16, 100, generator=torch.Generator().manual_seed(0))


def test_the_rate_of_distillation_goes_by_parameters_or_where_matrices_are_quantised_by_bits(scripts):
    rate, bits = recipe.learning_rate_for, recipe.mean_bits
    assert rate(0.7, bits(dense_whisper())) == pytest.approx(1e-5)
    assert rate(0.34, None) == pytest.approx(1e-4)
    config = tiny_whisper_config(
        residual_config=hrt.ResidualConfig(1, 0, diagonal="none", shared_bits={"fc1": 2, "fc2": 4})
    )
    assert bits(hrt.ResidualWhisperModel(config)) == 3  # fc1 and fc2 have equally many weights
    assert rate(1.0, 3.0) == pytest.approx(1e-5) and rate(1.0, 2.0) == pytest.approx(3e-5)
    assert rate(0.34, 4.0) == pytest.approx(1e-4)  # shared as well, and so further from dense
    model = hrt.ResidualWhisperModel(config)
    assert recipe.relative_size(model.encoder, model.merge().encoder) == pytest.approx(1.0, abs=0.1)


@pytest.fixture
def build(scripts):
    """A method's model of a dense one, and the calibration that it saw."""

    def make(method, budget, dense):
        calibration = scripts.baseline_parts.Calibration(dense, [{"input_features": features()}])
        return scripts.baselines.METHODS[method].build(dense, calibration, budget).eval(), calibration

    return make


@torch.no_grad()
def final_states(model):
    return model.get_encoder()(features()).last_hidden_state


def modules(model):
    layers = model.get_encoder().layers
    return {(i, path): layers[i].get_submodule(path) for i in range(len(layers)) for path in WHISPER.modules}


def weight_of(module):
    return module.weight.detach().double()


def output_errors(model, dense, calibration, damping=0.0):
    """Unweighted, relative, of each matrix."""
    errors = {}
    for key, source in modules(dense).items():
        weight, covariance = weight_of(source), damp(calibration.moments[key].covariance(), damping)
        lacking = weight - weight_of(modules(model)[key])
        errors[key] = (
            torch.trace(lacking @ covariance @ lacking.T) / torch.trace(weight @ covariance @ weight.T)
        ).item()
    return errors


@pytest.mark.parametrize("method", EXACT)
def test_a_budget_for_everything_keeps_everything(method, build):
    dense = dense_whisper()
    model, _ = build(method, EXACT[method], dense)
    torch.testing.assert_close(final_states(model), final_states(dense), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["ours", "ours-4bit", "ours-pairs", "paper-k2", "paper-k3", *EXACT])
def test_the_dense_model_stays_as_it_was_and_its_copy_can_be_trained(method, build):
    dense = dense_whisper()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    model, _ = build(method, 0.75 if "sharing" not in method else 0.5188, dense)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    model(input_features=features(), labels=torch.ones(4, 3, dtype=torch.long)).loss.backward()
    trained = list(model.get_encoder().layers.parameters())
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize(
    ("method", "budget", "expected"),
    [
        ("sharing-mean", 0.519, 4 * FIXED + 2 * MATRICES),
        ("sharing-calibrated", 0.278, 4 * FIXED + MATRICES),
        ("drop-layers", 0.5, DENSE // 2),
        ("prune-neurons", 0.75, DENSE - 131 * (32 + 1 + 32)),
        ("rounded-4bit", 0.308, 4 * FIXED + 4 * MATRICES * 4.5 / 16),
        ("gptq-4bit", 0.308, 4 * FIXED + 4 * MATRICES * 4.5 / 16),
        ("gptq-3bit", 0.247, 4 * FIXED + 4 * MATRICES * 3.5 / 16),
        ("paper-k2", 0.524, 2 * MATRICES + 2 * (FIXED - 128) + 4 * 128 + 4 * 4 * 32),
    ],
)
def test_the_parameters_are_those_counted_by_hand(method, budget, expected, scripts, build):
    model, _ = build(method, budget, dense_whisper())
    assert scripts.baseline_parts.encoder_parameters(model) == expected
    assert expected / DENSE == pytest.approx(budget, abs=0.005)


@pytest.mark.parametrize(
    "config",
    [
        hrt.ResidualConfig.paper(2, 0),
        hrt.ResidualConfig.paper(3, 0),
        hrt.ResidualConfig(3, rank=0, diagonal="all"),
        hrt.ResidualConfig({"fc1": 4, "fc2": None, "q_proj": 2}, rank=1, diagonal="none", share_biases=True),
        hrt.ResidualConfig(None, rank=1, diagonal="none"),
    ],
)
def test_parameters_without_ranks_are_those_of_a_model_without_its_ranks(config, scripts):
    dense = dense_whisper()
    model = hrt.ResidualWhisperForConditionalGeneration(
        hrt.ResidualWhisperConfig.from_dense_config(dense.config, config)
    )
    ranks = sum(p.numel() for name, p in model.get_encoder().layers.named_parameters() if "residual_" in name)
    expected = scripts.baseline_parts.encoder_parameters(model) - ranks
    assert scripts.baseline_parts.parameters_without_ranks(dense, config) == expected


def test_a_basis_that_layers_share_is_counted_once(scripts, build):
    model, _ = build("basis-2", 0.5, dense_whisper())
    linears, expected = modules(model), 4 * FIXED
    for (layer, path), linear in linears.items():
        shares = path not in scripts.baselines.WRITERS and layer % 2
        assert (linear.residual_A is linears[layer - layer % 2, path].residual_A) == (shares or not layer % 2)
        expected += linear.residual_B.numel() + (0 if shares else linear.residual_A.numel())
    assert scripts.baseline_parts.encoder_parameters(model) == expected


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        *(
            (method, budget)
            for method in ("svd", "pca", "tied-average", "looped-lower", "basis-2", "basis-3")
            for budget in (0.33, 0.6)
        ),
        ("paper-k2", 0.6),
        ("paper-k3", 0.6),
        ("ours-4bit", 0.4),
        ("ours-4bit", 0.27),
    ],
)
def test_a_budget_is_met_within_half_a_point_and_not_exceeded(method, budget, scripts, build):
    model, _ = build(method, budget, dense_whisper())
    unique = scripts.baseline_parts.encoder_parameters(model)
    assert budget - scripts.baseline_parts.TOLERANCE <= unique / DENSE <= budget
    if isinstance(model, hrt.ResidualWhisperForConditionalGeneration):
        assert 2 * unique == hrt.size_report(model).encoder_bytes.unique


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("drop-layers", 0.43, r"the nearest size that it has is 50\.0%"),
        ("sharing-mean", 0.25, r"the nearest size that it has is 27\.8%"),
        ("prune-neurons", 0.3, r"it needs at least 51\.3%"),
        ("paper-k2", 0.3, r"it needs at least 52\.\d%"),
        ("ours-pairs", 0.5, r"it needs at least 51\.9%"),
        ("gptq-4bit", 0.34, r"the nearest size that it has is 30\.\d%"),
        ("tied-average", 0.2, r"it needs at least 27\.8%"),
    ],
)
def test_a_size_that_a_method_does_not_have_is_refused_with_the_nearest(
    method, budget, message, scripts, build
):
    with pytest.raises(scripts.baseline_parts.Unreachable, match=message):
        build(method, budget, dense_whisper())


@pytest.mark.parametrize(("weights", "left"), [({"a": 1.0, "b": 1.0}, 70), ({"a": 1.0, "b": 3.0}, 75)])
def test_ranks_keep_their_proportion_to_within_one(weights, left, scripts):
    ranks = scripts.baseline_parts.share_ranks(left, {"a": 4, "b": 6}, weights, {"a": 50, "b": 50})
    assert left - 6 < 4 * ranks["a"] + 6 * ranks["b"] <= left
    assert abs(ranks["b"] / weights["b"] - ranks["a"]) <= 1


def test_in_four_bits_gptq_keeps_outputs_better_than_the_nearest_numbers_and_ours_final_states_best(build):
    dense = dense_whisper()
    errors, states = [], []
    for method, budget in (("rounded-4bit", 0.308), ("gptq-4bit", 0.308), ("ours-4bit", 0.4)):
        model, calibration = build(method, budget, dense)
        assert all(torch.equal(p, p.half().float()) for p in model.get_encoder().layers.parameters())
        errors.append(sum(output_errors(model, dense, calibration).values()))
        states.append((final_states(model) - final_states(dense)).square().mean().item())
    assert errors[1] < 0.9 * errors[0]
    assert states[2] < 0.9 * min(states[:2])


def test_pca_leaves_less_output_error_than_svd(build):
    dense = dense_whisper()
    models = {method: build(method, 0.5, dense) for method in ("pca", "svd")}
    calibration = models["pca"][1]
    errors = {method: output_errors(model, dense, calibration) for method, (model, _) in models.items()}
    assert sum(errors["pca"].values()) < sum(errors["svd"].values())


@pytest.mark.parametrize(("method", "damping"), [("pca", 0.0), ("pca-damped", DAMPING)])
def test_pca_leaves_the_least_output_error_of_its_ranks(method, damping, build):
    dense = dense_whisper()
    model, calibration = build(method, 0.5, dense)
    errors = output_errors(model, dense, calibration, damping)
    low_rank = {key: m for key, m in modules(model).items() if isinstance(m, ResidualLinear)}
    assert low_rank
    for key, linear in low_rank.items():
        weight, entry = weight_of(modules(dense)[key]), calibration.moments[key]
        energies = torch.linalg.eigvalsh(weight @ damp(entry.covariance(), damping) @ weight.T).flip(0)
        assert errors[key] == pytest.approx((energies[linear.rank :].sum() / energies.sum()).item(), rel=1e-3)
        if linear.bias is not None:
            means = [weight_of(m) @ entry.mean + m.bias for m in (linear, modules(dense)[key])]
            torch.testing.assert_close(*means, rtol=1e-3, atol=1e-4)


def test_a_basis_of_one_layer_is_the_low_rank_that_knows_the_inputs(scripts):
    dense = dense_whisper()
    calibration = scripts.baseline_parts.Calibration(dense, [{"input_features": features()}])
    model = scripts.baselines.basis_sharing(dense, calibration, 0.5, group_size=1)
    for key, linear in modules(model).items():
        moments = damp(calibration.moments[key].products, scripts.baselines.LEAST_DAMPING)
        (fit,) = fit_group([weight_of(modules(dense)[key])], [moments], [linear.rank], shared=False)
        torch.testing.assert_close(weight_of(linear), fit.weight(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["looped-average", "looped-stepwise", "looped-lower", "tied-average", "tied-first"]
)
def test_layers_are_tied_to_the_weights_that_the_start_names(method, build):
    dense = dense_whisper()
    model, _ = build(method, 0.6, dense)
    layers, encoder = dense.get_encoder().layers, model.get_encoder()
    bank = encoder.shared["fc1"]
    groups = [[i for i in range(4) if encoder.layers[i].fc1.group_idx == g] for g in range(len(bank))]
    size = 4 // len(bank)
    looped = [list(range(g, 4, len(bank))) for g in range(len(bank))]
    assert groups == (
        looped if "looped" in method else [[*range(g * size, g * size + size)] for g in range(len(bank))]
    )
    for index, (group, shared) in enumerate(zip(groups, bank)):
        expected = {
            "average": torch.stack([layers[i].fc1.weight for i in group]).mean(0),
            "stepwise": layers[round(index * 3 / max(1, len(bank) - 1))].fc1.weight,
        }.get(method.partition("-")[2], layers[group[0]].fc1.weight)
        torch.testing.assert_close(shared.weight, expected)


def test_a_layer_that_does_nothing_is_the_first_to_be_dropped(build):
    dense = dense_whisper()
    with torch.no_grad():
        for name in ("self_attn.out_proj", "fc2"):
            for parameter in dense.get_encoder().layers[2].get_submodule(name).parameters():
                parameter.zero_()
    model, calibration = build("drop-layers", 0.75, dense)
    assert calibration.influence[2] == pytest.approx(0, abs=1e-6)
    assert len(model.get_encoder().layers) == model.config.encoder_layers == 3
    torch.testing.assert_close(final_states(model), final_states(dense))


def test_neurons_that_never_vary_go_first_and_the_bias_stands_in_for_them(build):
    dense = dense_whisper()
    with torch.no_grad():
        for layer in dense.get_encoder().layers:
            layer.fc1.weight[::2] = 0
    model, _ = build("prune-neurons", (DENSE - 8 * 65) / DENSE, dense)
    assert sum(layer.fc1.out_features for layer in model.get_encoder().layers) == 4 * 64 - 8
    torch.testing.assert_close(final_states(model), final_states(dense), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model that hears three seconds and knows Spanish."""
    path = tmp_path_factory.mktemp("whisper")
    model = dense_whisper(max_source_positions=150, max_target_positions=448)
    model.generation_config = whisper_generation_config()
    model.generation_config.lang_to_id["<|es|>"] = WHISPER_VOCAB["<|en|>"] + 3
    model.save_pretrained(path)
    processor = whisper_processor()
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=3)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def compare(scripts, monkeypatch, folder, tmp_path):
    """Runs the script on few clips, and gives the results."""

    def run(*options):
        output = tmp_path / "toy.json"
        words = [
            "--model",
            folder,
            "--max_test_clips",
            3,
            "--max_validation_clips",
            3,
            "--calibration_windows",
            2,
        ]
        words += ["--window_seconds", 1, "--batch_size", 2, "--device", "cpu", "--output", output, *options]
        monkeypatch.setattr(sys, "argv", ["compare_methods.py", *map(str, words)])
        monkeypatch.setattr(scripts.compare_methods, "HEARD", ["it"])
        monkeypatch.setattr(scripts.compare_metrics, "MAX_NEW_TOKENS", 4)
        scripts.compare_methods.main()
        return json.loads(output.read_text())["results"]

    return run


def test_a_run_measures_distils_draws_and_is_continued(scripts, monkeypatch, compare, tmp_path):
    options = ["--methods", "svd", "drop-layers", "--distill_steps", 2, 3, "--seeds", 0, 1]
    results = compare(*options, "--budgets", 0.5)
    assert [(r["method"], r["seed"]) for r in results] == [
        ("dense", None),
        *(("svd", seed) for seed in (None, 0, 1, 0, 1)),
        *(("drop-layers", seed) for seed in (None, 0, 1, 0, 1)),
    ]
    dense, svd = results[0]["metrics"], [r["metrics"]["validation"]["final_error"] for r in results[1:6]]
    assert dense.keys() == {"validation", "test_en", "test_es"}
    assert all(values["kl"] == pytest.approx(0, abs=1e-5) for values in dense.values())
    assert len(set(svd)) == 5
    assert [r["settings"].get("distill_steps") for r in results[1:6]] == [None, 2, 2, 3, 3]
    assert all("wer" in r["metrics"]["test_es"] and r["metrics"]["test_en"]["kl"] > 0 for r in results[1:])
    text = (tmp_path / "toy.md").read_text()
    assert "## Without training" in text
    assert "## After 3 steps of distillation" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"toy-{part}.png" for part in (0, 2, 3, "steps")
    }
    assert (tmp_path / "toy-steps.png").read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr(scripts.compare_methods.Comparison, "evaluate", None)
    again = compare(*options, "--budgets", 0.5)
    assert again == results


def test_the_encoder_runs_once_for_the_same_features_and_then_as_before(scripts):
    encoder, runs = (model := dense_whisper()).get_encoder(), []
    encoder.conv1.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), scripts.compare_metrics.encoding_once(model):
        one, again, other = (encoder(inputs)[0] for inputs in (features(), features(), 2 * features()))
    assert len(runs) == 2
    assert torch.equal(one, again) and not torch.equal(one, other)
    final_states(model)
    assert len(runs) == 3


def test_what_is_out_of_reach_is_said_and_other_settings_are_measured_anew(compare, tmp_path):
    options = ["--methods", "drop-layers", "--budgets", 0.43, "--no_wer"]
    results = compare(*options)
    assert results[1]["unreachable"] == "the nearest size that it has is 50.0% of the encoder's layers"
    assert "not reached: the nearest size" in (tmp_path / "toy.md").read_text()
    assert "wer" not in results[0]["metrics"]["test_en"]
    redone = compare(*options, "--redo", "drop-layers")
    assert [r["run"] for r in redone] == [0, 1]
    both = compare(*options, "--test_split", "validation", "test_other")
    assert [r["settings"]["test_split"] for r in both[2:]] == ["validation test_other"] * 2
    assert both[2]["metrics"].keys() == {"validation", "validation_en", "test_other_en"}
    assert len(compare(*options, "--overwrite")) == 2


def test_another_data_set_is_calibrated_on_without_transcripts_and_results_say_so(
    compare, scripts, tmp_path, monkeypatch
):
    samples = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    soundfile.write(tmp_path / "own.wav", samples, 16_000)
    (tmp_path / "metadata.csv").write_text("file_name\nown.wav\n")
    heard = []
    monkeypatch.setattr(
        scripts.compare_methods,
        "calibration_batches",
        lambda rows, *args, **options: heard.extend(rows) or calibration_batches(rows, *args, **options),
    )
    distil = scripts.compare_methods.short_distillation
    monkeypatch.setattr(
        scripts.compare_methods,
        "short_distillation",
        lambda student, teacher, rows, *args, **options: (
            heard.extend(rows) or distil(student, teacher, rows, *args, **options)
        ),
    )
    options = ["--methods", "drop-layers", "--budgets", 0.5, "--no_wer", "--train_data", tmp_path]
    results = compare(*options, "--distill_steps", 1, "--batch_size", 1)
    assert [len(row["audio"]["array"]) for row in heard] == [16_000] * 2
    assert [r["settings"]["train_data"] for r in results] == [tmp_path.name] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["svd", "magic"]}, "`methods` and `redo` must be of ours, .*got magic"),
        ({"budgets": [0.5, 1.5]}, r"`budgets` must be above 0 and at most 1, got \[0.5, 1.5\]"),
        ({"distill_steps": [0]}, "`distill_steps` must be at least 1"),
        ({"distill_steps": [5], "seeds": []}, "`seeds`"),
        ({"test_split": ["test", "test"]}, "`test_split` must be one or more different splits"),
        ({"max_test_clips": 0}, "`max_test_clips` must be at least 1, got 0"),
        ({"output": "results"}, "`output` must be a .json file, got 'results'"),
    ],
)
def test_bad_options_are_refused_with_their_reason(options, message, scripts):
    with pytest.raises(ValueError, match=message):
        scripts.compare_methods.CompareArguments(**options)


def test_a_file_of_another_kind_is_not_written_into(scripts, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"wer": 0.5}')
    with pytest.raises(ValueError, match="`output` must be new or a file that this script wrote"):
        scripts.compare_results.ResultsFile(path, overwrite=False)
    assert scripts.compare_results.ResultsFile(path, overwrite=True).results == []
