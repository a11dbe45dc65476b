"""The benchmark: its arithmetic by numbers computed by hand, and runs on toy shapes; no timing is asserted on."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hf_residual_transformer as hrt

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "research"
TOY = ["--size", "tiny", "--layers", "3", "--width", "64", "--group_size", "2", "--rank", "4"]
TOY += ["--seconds", "0.2", "--chunk_seconds", "0.1", "--repeats", "2", "--few_repeats", "2"]
TOY += ["--new_tokens", "2"]
SCALING = {"layers": [1, 2], "width": [64, 128], "rank": [0, 4], "seconds": [0.1]}


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(SCRIPTS))
        names = ("benchmark", "benchmark_model", "benchmark_results")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def comparison(scripts):
    """A comparison of given ratios with a goal."""

    def make(ratios, limit=1.02, strict=False):
        goal = scripts.benchmark_results.Goal(limit, strict)
        return scripts.benchmark_results.Comparison(
            "part", "what", [2.0] * len(ratios), [2 * r for r in ratios], goal
        )

    return make


@pytest.fixture
def in_this_process(scripts, monkeypatch):
    """What is measured in fresh processes is measured here, which takes less time."""

    def measure(args, measurement, folder, environment):
        model = scripts.benchmark_model
        options = model.ModelArguments(measurement, str(folder), args.longest, args.batch_size)
        return model.MEASUREMENTS[measurement](options, folder)

    monkeypatch.setattr(scripts.benchmark, "in_fresh_process", measure)


def run(scripts, monkeypatch, folder: Path, *options: str) -> dict[tuple[str, str], dict]:
    """The results by part and by what was measured."""
    output = folder / "toy.json"
    words = [*TOY, "--output", str(output), "--plots", str(folder / "plots"), *options]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    monkeypatch.setattr(scripts.benchmark, "REPEAT_SECONDS", 0.0)
    scripts.benchmark.main()
    contents = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert contents["residual_config"]["rank"] == 4
    return {(result["part"], result["what"]): result for result in contents["results"]}


def test_a_ratio_is_the_median_of_the_pairs_and_its_spread_their_quartiles(scripts):
    result = scripts.benchmark_results.Comparison("part", "what", [1.0, 2.0, 4.0, 5.0], [1.1, 1.8, 4.8, 5.0])
    # The pairs' ratios are 1.1, 0.9, 1.2 and 1.0. The ratio of the medians would be 3.3 / 3.
    assert result.ratios == pytest.approx([0.9, 0.975, 1.05, 1.125, 1.2])
    values = result.to_dict()
    assert values["ratio"]["median"] == pytest.approx(1.05)
    assert (values["repeats"], values["dense"]) == (4, [1.0, 2.0, 4.0, 5.0])
    assert (values["goal"], values["verdict"]) == (None, "no goal")


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.99, 1.00, 1.01], "met"),
        ([1.05, 1.06, 1.07], "not met"),
        ([0.99, 1.01, 1.02], "undecided"),
        ([1.00, 1.04, 1.08], "undecided"),
        ([1.02], "met"),
    ],
)
def test_a_verdict_needs_a_spread_below_the_distance_from_the_goal(comparison, ratios, verdict):
    assert comparison(ratios).verdict == verdict


def test_a_strict_goal_is_missed_by_what_equals_it(comparison):
    assert comparison([1.0], limit=1.0).verdict == "met"
    assert comparison([1.0], limit=1.0, strict=True).verdict == "not met"
    assert str(comparison([1.0], limit=1.0, strict=True).goal) == "< 1.00"


def test_memory_that_did_not_grow_has_no_ratio(scripts):
    result = scripts.benchmark_results.Comparison("memory", "what", [0], [1e6], unit="bytes")
    json.dumps(result.to_dict(), allow_nan=False)
    assert result.to_dict()["ratio"]["median"] is None
    assert result.cells()[2:4] == ["0 MB", "1 MB"]


def test_the_table_has_a_row_for_each_result_and_says_where_the_spread_is_too_large(scripts, comparison):
    lines = scripts.benchmark_results.table([comparison([0.9, 1.01, 1.3]), comparison([1.5])]).splitlines()
    assert [len(line) for line in lines] == [len(lines[0])] * 4
    assert lines[2].split("|")[-2].strip() == "undecided"
    assert "0.900 to 1.300" in lines[2]
    assert lines[3].split("|")[-2].strip() == "not met"


def test_pairs_are_interleaved_and_their_order_alternates_after_a_warm_up(scripts, monkeypatch):
    monkeypatch.setattr(scripts.benchmark, "REPEAT_SECONDS", 0.0)
    called = []
    calls = {name: (lambda name=name: called.append(name[0])) for name in ("dense", "residual")}
    seconds = scripts.benchmark.interleave("cpu", calls, 3, "what")
    assert "".join(called) == "drdr" + "dr" + "rd" + "dr"
    assert [len(seconds["dense"]), len(seconds["residual"])] == [3, 3]


def test_short_calls_are_timed_several_at_once(scripts, monkeypatch):
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(scripts.benchmark, "REPEAT_SECONDS", 20.0)
    monkeypatch.setattr(scripts.benchmark.time, "perf_counter", lambda: next(clock))
    called = []
    calls = {name: (lambda name=name: called.append(name)) for name in ("dense", "residual")}
    # Each timing takes 4 seconds by this clock, so five calls make 20.
    assert scripts.benchmark.interleave("cpu", calls, 2, "what") == {
        "dense": [0.8, 0.8],
        "residual": [0.8, 0.8],
    }
    assert called.count("dense") == 2 + 2 * 5


def test_what_layers_share_is_counted_once(scripts):
    config = hrt.ResidualWhisperConfig(
        d_model=64,
        encoder_layers=3,
        encoder_ffn_dim=256,
        encoder_attention_heads=1,
        residual_config=hrt.ResidualConfig(group_size=3, rank=4),
    )
    model = hrt.ResidualWhisperForAudioClassification(config)
    unique_bytes = scripts.benchmark_model.unique_bytes
    assert unique_bytes(model.parameters()) == 4 * hrt.size_report(model).model.unique
    shared = [layer.fc1.shared.weight for layer in model.encoder.layers]
    assert unique_bytes(shared) == 4 * 64 * 256
    assert unique_bytes([shared[0], shared[0][:8].T]) == 4 * 64 * 256


def test_what_is_kept_for_backward_leaves_out_parameters(scripts, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    monkeypatch.setattr(scripts.benchmark_model, "run_encoder", lambda model, inputs: model(inputs))
    # The inputs of the two linear modules; the second is also what ReLU keeps.
    assert scripts.benchmark_model.kept_for_backward(model, torch.ones(5, 8)) == 4 * 5 * (8 + 16)


def test_wav2vec2_runs_by_the_same_functions(scripts):
    args = scripts.benchmark.BenchmarkArguments(
        size="wav2vec2-large", layers=2, width=64, group_size="2", rank=2
    )
    assert "generate" not in args.what
    models = scripts.benchmark.build(args, args.shape, args.residual)
    assert isinstance(models["residual"], hrt.ResidualWav2Vec2Model)
    inputs = scripts.benchmark_model.random_inputs(models["dense"], 0.1, 1)
    assert inputs.shape == (1, 1600)
    for model in models.values():
        assert scripts.benchmark_model.run_encoder(model, inputs).shape == (1, 4, 64)


def test_the_next_token_is_computed_again_each_time_with_all_parts_in_few_bits(scripts, monkeypatch):
    args = scripts.benchmark.BenchmarkArguments(
        size="tiny",
        layers=1,
        width=64,
        residual_config='{"group_size": 1, "rank": 2, "diagonal": "none", "shared_bits": 4}',
        dtype="bfloat16",
        dense_dtype="float32",
        repeats=2,
    )
    monkeypatch.setattr(scripts.benchmark, "REPEAT_SECONDS", 0.0)
    seen = {}

    def compared(_args, part, _what, calls):
        for kind, call in calls.items():
            first, second = call(), call()
            assert torch.equal(first, second) and first.shape[:2] == (1, 1)
            seen[kind] = first.dtype
        return part

    monkeypatch.setattr(scripts.benchmark, "compare", compared)
    built = []
    build = scripts.benchmark.build
    monkeypatch.setattr(
        scripts.benchmark, "build", lambda *a, **fields: built.append(build(*a, **fields)) or built[0]
    )
    assert list(scripts.benchmark.measure_token(args)) == ["token"]
    assert seen == {"dense": torch.float32, "residual": torch.bfloat16}
    assert hrt.size_report(built[0]["residual"]).model_bytes.ratio < 0.35
    assert "bfloat16, dense float32" in args.title


def test_a_run_leaves_every_figure_with_its_settings_a_table_and_plots(
    scripts, monkeypatch, tmp_path, capsys, in_this_process
):
    # Compiling takes too long for a test; what calls the compiler is as in a real run.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    parts = [part for part in scripts.benchmark.PARTS if part != "memory"]
    found = run(scripts, monkeypatch, tmp_path, "--scaling", json.dumps(SCALING), "--what", *parts)
    assert {part for part, _ in found} == set(parts)
    for result in found.values():
        assert result["verdict"] in ("met", "not met", "undecided")
        assert len(result["dense"]) == len(result["residual"]) == result["repeats"] == 2
    scaled = [(r["axis"], r["at"]) for (part, _), r in found.items() if part == "scaling"]
    assert scaled == [(axis, value) for axis, values in SCALING.items() for value in values]
    table = (tmp_path / "toy.md").read_text()
    assert table.splitlines()[-1] in capsys.readouterr().out
    assert len(table.splitlines()) == len(found) + 4
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["toy-ratio.png"]


def test_memory_of_a_training_step_is_exact(scripts, monkeypatch, tmp_path, in_this_process, capsys):
    (tmp_path / "toy.json").write_text("{}")
    found = run(scripts, monkeypatch, tmp_path, "--what", "memory", "--batch_size", "3")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["toy-memory.png"]
    assert "replaces" in capsys.readouterr().out
    # By hand: 3 layers in groups of 2 and 1; matrices 64 x 64 (4), 256 x 64 and 64 x 256.
    matrices, norms, biases = 4 * 64 * 64 + 2 * 256 * 64, 4 * 64, 3 * 64 + 256 + 64
    own = 4 * 4 * (64 + 64) + 2 * 4 * (256 + 64) + 4 * 64
    dense, residual = 3 * (matrices + norms + biases), 2 * matrices + 3 * (own + norms + biases)
    weights = found["training memory", "weights of the layers"]
    assert (weights["dense"], weights["residual"]) == ([4 * dense], [4 * residual])
    state = found["training memory", "optimiser state of the layers"]
    tensors = 3 * 15
    # Two averages, and a step of four bytes for each parameter.
    assert state["dense"] == [2 * 4 * dense + 4 * tensors]
    assert found["training memory", "gradients of the layers"]["residual"] == [4 * residual]
    assert found["training memory", "activations"]["dense"][0] > 0
    file = found["memory", "file, against its weights"]
    assert 1.0 < file["ratio"]["median"] < 1.2


def test_a_fresh_process_measures_a_saved_model(scripts):
    args = scripts.benchmark.BenchmarkArguments(size="tiny", layers=2, width=64, rank=2, seconds=[0.2])
    with scripts.benchmark.saved_models(args) as folders:
        found = scripts.benchmark.in_fresh_process(args, "resident", folders["residual"], {})
        assert {name.partition(",")[0] for name in found} == {
            "loaded",
            "after a forward pass",
            "peak while loading",
        }


def test_a_fresh_process_that_fails_is_reported(scripts, monkeypatch, tmp_path):
    args = scripts.benchmark.BenchmarkArguments()
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="measuring load in a fresh process failed"):
        scripts.benchmark.in_fresh_process(args, "load", tmp_path, {})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"size": "huge"}, "`size` must be one of tiny"),
        ({"width": 100}, "`width` must be a multiple of 64, got 100"),
        ({"layers": 0}, "`layers` must be at least 1"),
        ({"what": ["speed"]}, "`what` must be of encoder"),
        ({"size": "wav2vec2-base", "what": ["generate"]}, "for wav2vec2-base, got 'generate'"),
        ({"seconds": [31.0]}, r"`seconds` must be from 0.1 to 30.0, got 31.0"),
        ({"chunk_seconds": [2.0]}, "`chunk_seconds` must be from 0.1 to 1.0"),
        ({"repeats": 1}, "`repeats` must be at least 2"),
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"group_size": "three"}, "`group_size` must be JSON"),
        ({"residual_config": '{"ranks": 2}'}, "`residual_config` must have only the fields"),
        ({"scaling": '{"heads": [1]}'}, "`scaling` must be lists of values by layers"),
        ({"scaling": '{"rank": 1}'}, "`scaling` must be lists of values by layers"),
    ],
)
def test_what_cannot_be_measured_is_refused(scripts, options, problem):
    with pytest.raises(ValueError, match=problem):
        scripts.benchmark.BenchmarkArguments(**options)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(scripts, device):
    with pytest.raises(ValueError, match=f"`device` must be one that is there, got {device}"):
        scripts.benchmark.check_device(device, torch.float32)


def test_a_dtype_that_the_device_lacks_is_refused(scripts):
    # Eight-bit floats have no matrix product on a CPU.
    with pytest.raises(ValueError, match="`dtype` must be one that cpu computes in"):
        scripts.benchmark.check_device("cpu", torch.float8_e4m3fn)


def test_the_demos_form_can_be_measured(scripts):
    form = {"group_size": {"fc1": None, "fc2": 2}, "diagonal": "none", "rank": 8}
    args = scripts.benchmark.BenchmarkArguments(residual_config=json.dumps(form))
    assert args.residual == hrt.ResidualConfig.from_dict(form)
    assert "fc2" in args.title
