"""The comparison of runtimes: blocks by hand, disagreement and intervals on made-up texts, and a continued run."""

from __future__ import annotations

import importlib
import io
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    randomize_,
    speech,
    tiny_whisper_config,
    whisper_generation_config,
    whisper_processor,
)
from ggml_reader import read_ggml
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperForConditionalGeneration

import hf_residual_transformer as hrt
from hf_residual_transformer.exporting.ggml import ordinary_tokens

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "research"
NAMES = ("ggml_blocks", "ggml_writer", "runtimes", "runtimes_report", "compare_runtimes")


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


def one_block(*values):
    return np.array([[*values, *[0.0] * (32 - len(values))]], dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "values", "scale", "minimum", "integers", "rounded"),
    [
        # -4 is greatest, so the scale is -4 / -8; 0 is integer 8.
        ("q4_0", [-4, 1.3, 3.9, 0.25], 0.5, None, [0, 11, 15, 9, 8], [-4, 1.5, 3.5, 0.5, 0]),
        # +4 is greatest, so the scale is negative, and -4 would need the integer 16.
        ("q4_0", [4, -3.9, 1.3], -0.5, None, [0, 15, 5, 8], [4, -3.5, 1.5, 0]),
        ("q5_0", [-8, 7.9, 1.3], 0.5, None, [0, 31, 19, 16], [-8, 7.5, 1.5, 0]),
        ("q5_1", [-3.0, 12.5, 1.3], 0.5, -3, [0, 31, 9, 6], [-3, 12.5, 1.5, 0]),
        ("q8_0", [-63.5, 10.3, 0.75, -0.75], 0.5, None, [-127, 21, 2, -2, 0], [-63.5, 10.5, 1, -1, 0]),
    ],
)
def test_a_block_has_the_numbers_computed_by_hand(name, values, scale, minimum, integers, rounded, scripts):
    blocks = scripts.ggml_blocks.round_to_blocks(one_block(*values), name)
    assert blocks.scales.dtype == np.float16 and blocks.scales.item() == scale
    assert minimum is None or blocks.minima.item() == minimum
    assert blocks.integers[0, : len(integers)].tolist() == integers
    assert blocks.weights()[0, : len(rounded)].tolist() == rounded


def test_the_bytes_of_a_block_have_first_and_second_half_in_one_byte(scripts):
    values = np.zeros((1, 32), dtype=np.float32)
    values[0, [0, 1, 17]] = -4, 1.5, 3.5  # integers 0, 11, 15, the others 8
    found = scripts.ggml_blocks.round_to_blocks(values, "q4_0").to_bytes()
    assert found == struct.pack("<e", 0.5) + bytes([0 | 8 << 4, 11 | 15 << 4, *[0x88] * 14])
    values[0, [0, 1, 17]] = -8, 1.5, 7.5  # integers 0, 19, 31, the others 16
    found = scripts.ggml_blocks.round_to_blocks(values, "q5_0").to_bytes()
    assert found == struct.pack("<eI", 0.5, 0xFFFFFFFE) + bytes([0, 3 | 15 << 4, *[0] * 14])
    assert len(found) == 32 * scripts.ggml_blocks.FORMATS["q5_0"].bits_a_weight / 8


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q5_1", "q8_0"])
def test_more_bits_leave_less_error_and_zeros_stay_zero(name, scripts):
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    blocks = scripts.ggml_blocks.round_to_blocks(weight, name)
    step = {"q4_0": 1 / 8, "q5_0": 1 / 16, "q5_1": 1 / 16, "q8_0": 1 / 127}[name]
    error = np.abs(blocks.weights() - weight).reshape(-1, 32).max(axis=1)
    assert (error <= 1.05 * step * np.abs(weight).reshape(-1, 32).max(axis=1)).all() and error.max() > 0
    assert not scripts.ggml_blocks.round_to_blocks(np.zeros((2, 32)), name).weights().any()


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q5_1", "q8_0"])
def test_the_bytes_are_those_of_the_gguf_package(name, scripts):
    gguf = pytest.importorskip("gguf", reason="the package of ggml's formats is not installed")
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    blocks = scripts.ggml_blocks.round_to_blocks(weight, name)
    kind = gguf.GGMLQuantizationType(scripts.ggml_blocks.FORMATS[name].tensor_type)
    assert blocks.to_bytes() == gguf.quants.quantize(weight, kind).tobytes()


def test_rows_of_other_lengths_are_refused(scripts):
    with pytest.raises(ValueError, match="a multiple of 32 long for q4_0, got 40"):
        scripts.ggml_blocks.round_to_blocks(np.zeros((2, 40)), "q4_0")


def test_every_matrix_is_rounded_and_all_else_has_16_bits(scripts):
    torch.manual_seed(0)
    model = randomize_(WhisperForConditionalGeneration(tiny_whisper_config()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scripts.runtimes.round_model_(model, "q4_0")
    assert model.proj_out.weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        half = before[name].half().float()
        if parameter.dim() == 2 and "embed_positions" not in name:
            expected = scripts.ggml_blocks.round_to_blocks(half.numpy(), "q4_0").weights()
            assert torch.equal(parameter, torch.from_numpy(expected)), name
            assert not torch.equal(parameter, half)
        else:
            assert torch.equal(parameter, half), name


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("whisper", "a system must be one of torch-dense, ours, q4_0-rounded"),
        ("ours", "ours takes a colon and a path after its name, got 'ours'"),
        ("torch-dense:x", "torch-dense takes no path after its name"),
        ("whisper.cpp:none.bin", "has no weights in none.bin"),
        ("ours:none", "has no weights in none"),
    ],
)
def test_a_system_that_cannot_run_is_refused_before_the_first_run(system, message, scripts):
    with pytest.raises(ValueError, match=message):
        scripts.runtimes.create(system, "none")


def test_a_system_is_named_without_folders_of_this_machine(scripts, tmp_path):
    (tmp_path / "base-q4_0.bin").write_bytes(b"1234")
    found = scripts.runtimes.create(f"whisper.cpp:{tmp_path}/base-q4_0.bin", "none")
    assert (found.name, found.file_bytes()) == ("whisper.cpp:base-q4_0", 4)


@pytest.mark.parametrize("form", ["f16", "q4_0"])
def test_a_ggml_file_holds_every_tensor_once_under_openais_names(form, scripts):
    torch.manual_seed(0)
    model = randomize_(WhisperForConditionalGeneration(tiny_whisper_config()))
    processor, config = whisper_processor(), model.config
    file = io.BytesIO()
    scripts.ggml_writer.write_ggml(model, processor, form, file)
    file.seek(0)
    header, filters, tokens, tensors = read_ggml(file)
    assert header[0] == 0x67676D6C and header[-1] == {"f16": 1, "q4_0": 2002}[form]
    assert header[1:4] == (config.vocab_size, config.max_source_positions, config.d_model)
    assert filters.shape[0] == header[-2] == config.num_mel_bins
    np.testing.assert_allclose(filters, processor.feature_extractor.mel_filters.T, rtol=1e-6)
    assert len(tokens) == processor.tokenizer.eos_token_id
    assert len(tensors) == len(model.model.state_dict())

    state = model.model.state_dict()
    pairs = {
        "encoder.blocks.1.attn.query.weight": "encoder.layers.1.self_attn.q_proj.weight",
        "decoder.blocks.0.cross_attn.out.weight": "decoder.layers.0.encoder_attn.out_proj.weight",
        "decoder.blocks.1.mlp.2.weight": "decoder.layers.1.fc2.weight",
        "decoder.token_embedding.weight": "decoder.embed_tokens.weight",
    }
    for name, own in pairs.items():
        weight = state[own].half()
        rounded = scripts.ggml_blocks.round_to_blocks(weight.float().numpy(), "q4_0").to_bytes()
        assert tensors[name][0] == tuple(reversed(weight.shape))
        assert tensors[name][2] == (rounded if form == "q4_0" else weight.numpy().tobytes()), name
    vectors = {
        "encoder.blocks.0.attn_ln.bias": "encoder.layers.0.self_attn_layer_norm.bias",
        "decoder.blocks.0.mlp_ln.weight": "decoder.layers.0.final_layer_norm.weight",
        "encoder.ln_post.weight": "encoder.layer_norm.weight",
        "decoder.ln.bias": "decoder.layer_norm.bias",
        "encoder.conv1.bias": "encoder.conv1.bias",
        "decoder.positional_embedding": "decoder.embed_positions.weight",
    }
    for name, own in vectors.items():
        assert tensors[name][1:] == (0, state[own].numpy().tobytes()), name
    assert tensors["encoder.conv1.bias"][0] == (1, config.d_model)
    assert tensors["encoder.conv2.weight"][1:] == (1, state["encoder.conv2.weight"].half().numpy().tobytes())


def test_tokens_are_written_as_the_bytes_that_they_stand_for(scripts):
    tokenizer = SimpleNamespace(
        eos_token_id=3, convert_ids_to_tokens=lambda _: ["\u0120the", "\u00c3\u00a9", "!"]
    )
    assert ordinary_tokens(tokenizer) == [b" the", "\u00e9".encode(), b"!"]


def test_adjacent_clips_of_a_folder_are_joined_as_long_as_they_fit(scripts):
    def clip(path, seconds, value):
        return path, path, np.full(int(seconds * 16_000), value, np.float32)

    clips = [
        clip("a/1", 2, 0.1),
        clip("a/2", 3, 0.2),
        clip("a/3", 1, 0.3),
        clip("b/1", 1, 0.4),
        clip("b/2", 9, 0.5),
    ]
    found = list(scripts.compare_runtimes.joined(clips, 5.5))
    assert [path for path, _, _ in found] == ["a/1", "a/3", "b/1", "b/2"]
    assert [text for _, text, _ in found] == ["a/1 a/2", "a/3", "b/1", "b/2"]
    assert [len(samples) / 16_000 for _, _, samples in found] == [5.5, 1, 1, 9]
    first = found[0][2]
    assert first[0] == np.float32(0.1) and not first[32_000:40_000].any() and first[40_000] == np.float32(0.2)
    assert list(scripts.compare_runtimes.joined([], 5)) == []


REFERENCES = ["one two three four", "five six", ""]
TEXTS = {
    "torch-dense": ["One two three", "five six", ""],  # one word of six is wrong
    "ours:a": ["one, two three four", "five seven", "eh"],  # two of six; against dense three of five
}


def results_of(texts):
    own = {
        "seconds": 2.0,
        "encoder_seconds": 1.0,
        "load_seconds": 1.0,
        "peak_uss": 3e6,
        "file_bytes": 5e6,
        "weights": "w",
    }
    return [{"system": s, "texts": t, "rounded": s.endswith("-rounded"), **own} for s, t in texts.items()]


def normalize(text):
    return text.lower().replace(",", "")


def test_word_errors_and_disagreement_are_those_counted_by_hand(scripts):
    report = scripts.runtimes_report
    clips = report.Clips(["a", "b", "c"], REFERENCES)
    dense, ours = report.figures_of(results_of(TEXTS), clips, normalize, audio_seconds=8)
    assert dense["disagreement"] == {"value": 0, "low": 0, "high": 0}
    assert dense["wer_ratio"] == {"value": 1, "low": 1, "high": 1}
    assert dense["wer"]["value"] == pytest.approx(1 / 6)
    assert ours["wer"]["value"] == pytest.approx(2 / 6)
    assert ours["wer_ratio"]["value"] == pytest.approx(2)
    assert ours["disagreement"]["value"] == pytest.approx(3 / 5)
    assert (ours["real_time_factor"], ours["file_mb"], ours["words"]) == (0.25, 5, 6)


def test_an_interval_is_that_of_the_binomial_and_shrinks_with_more_clips(scripts):
    report = scripts.runtimes_report
    widths = []
    for clips in (100, 400):
        errors = np.arange(clips) % 5 == 0  # one clip of five, each of one word
        counts = report.Counts(errors.astype(int), np.ones(clips, dtype=int))
        found = report.with_interval(counts.rate(), counts.rates(report.bootstrap_samples(clips)))
        assert found["value"] == pytest.approx(0.2)
        assert found["low"] < found["value"] < found["high"]
        widths.append(found["high"] - found["low"])
        assert widths[-1] == pytest.approx(2 * 1.96 * (0.2 * 0.8 / clips) ** 0.5, rel=0.1)
    assert widths[1] < 0.6 * widths[0]


def test_ratios_to_dense_are_paired(scripts):
    """Twice the errors in every clip is twice the rate in every sample."""
    report = scripts.runtimes_report
    references = ["a b c d e f g h"] * 20
    once = ["x b c d e f g h" if i % 3 else references[i] for i in range(20)]
    twice = [text.replace("x b", "x y") for text in once]
    texts = {"torch-dense": once, "ours:a": twice}
    clips = report.Clips([""] * 20, references)
    _, ours = report.figures_of(results_of(texts), clips, normalize, 1)
    assert ours["wer_ratio"] == {"value": pytest.approx(2), "low": pytest.approx(2), "high": pytest.approx(2)}
    assert ours["wer"]["low"] < ours["wer"]["value"]


def test_a_dense_model_without_errors_has_no_ratio(scripts):
    report = scripts.runtimes_report
    texts = {"torch-dense": ["a b"], "ours:a": ["a c"]}
    found = report.figures_of(results_of(texts), report.Clips([""], ["a b"]), normalize, 1)
    assert [figure["wer_ratio"] for figure in found] == [None, None]
    assert found[1]["wer"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert "nan" not in report.table(found)


def test_texts_of_another_number_of_clips_are_refused(scripts):
    with pytest.raises(ValueError):
        scripts.runtimes_report.count_errors(["a", "b"], ["a"])


def test_the_table_leaves_out_speed_and_memory_of_rounded_systems(scripts):
    report = scripts.runtimes_report
    texts = {**TEXTS, "q4_0-rounded": TEXTS["ours:a"]}
    found = report.figures_of(results_of(texts), report.Clips([""] * 3, REFERENCES), normalize, 8)
    lines = report.table(found).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = {row[1]: row[2:-1] for row in ([c.strip() for c in line.split("|")] for line in lines[2:])}
    assert cells["ours:a"][:2] == ["5.0", "33.3"] and cells["ours:a"][-4:] == ["0.250", "0.125", "1.0", "3"]
    assert cells["q4_0-rounded"][-4:] == [""] * 4 and cells["q4_0-rounded"][5] == "60.0"


def test_a_run_for_words_alone_has_no_columns_of_speed_and_memory(scripts):
    report = scripts.runtimes_report
    untimed = [
        {name: r[name] for name in ("system", "texts", "rounded", "file_bytes")} for r in results_of(TEXTS)
    ]
    found = report.figures_of(untimed, report.Clips([""] * 3, REFERENCES), normalize, 8)
    assert all(figure["real_time_factor"] is figure["peak_uss_mb"] is None for figure in found)
    assert "memory" not in report.table(found) and "disagreement" in report.table(found)


@pytest.fixture
def dense_folder(tmp_path):
    torch.manual_seed(0)
    model = randomize_(WhisperForConditionalGeneration(tiny_whisper_config(max_target_positions=448)))
    model.generation_config = whisper_generation_config()
    model.save_pretrained(tmp_path / "dense")
    whisper_processor().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def speech_folder(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    lines = ["file_name,text,language,split"]
    for index in range(5):
        noise = 0.1 * np.random.default_rng(index).standard_normal(8000)
        soundfile.write(folder / f"{index}.wav", noise, 16_000)
        lines.append(f"{index}.wav,one two,en,test")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_onnx_runtime_writes_the_words_that_pytorch_writes(dense_folder, scripts, tmp_path, monkeypatch):
    """The features come from Transformers here, since faster-whisper is not among the packages of the tests."""

    class FeatureExtractor:
        def __init__(self, feature_size):
            self.own = whisper_processor().feature_extractor

        def __call__(self, samples, padding):
            return self.own(samples, sampling_rate=16_000)["input_features"][0]

    module = SimpleNamespace(FeatureExtractor=FeatureExtractor)
    monkeypatch.setattr(scripts.runtimes, "module_alone", lambda package, name: module)
    monkeypatch.setattr(scripts.runtimes, "MAX_NEW_TOKENS", 8)
    hrt.export(str(dense_folder), tmp_path / "onnx", floats="float32")
    clips = {str(index): speech(0.7, seed=index).numpy() for index in range(2)}
    np.savez(tmp_path / "clips.npz", **clips)
    systems = ("torch-dense", f"onnxruntime:{tmp_path}/onnx")
    wanted, found = (
        scripts.runtimes.measure(
            scripts.runtimes.create(system, dense_folder, threads=1), tmp_path / "clips.npz"
        )["texts"]
        for system in systems
    )
    assert found == wanted and all(wanted)
    with pytest.raises(ValueError, match="has no weights"):
        scripts.runtimes.create(f"onnxruntime:{tmp_path}/onnx@_int8", dense_folder)


@pytest.mark.slow
def test_a_run_that_is_continued_adds_the_new_systems_and_keeps_the_old_results(
    dense_folder, speech_folder, scripts, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "results" / "runtimes.json"

    def run(*systems, **changes):
        options = {"model": dense_folder, "data": speech_folder, "max_clips": 2, "output": output, **changes}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["compare_runtimes.py", *words, "--systems", *systems])
        scripts.compare_runtimes.main()
        return json.loads(output.read_text(encoding="utf-8"))

    first = run("torch-dense")
    assert [len(result["texts"]) for result in first["results"]] == [2]
    assert first["results"][0]["peak_uss"] > 10e6
    second = run("torch-dense", "q4_0-rounded")
    assert "torch-dense is in" in capsys.readouterr().out
    assert second["results"][0] == first["results"][0]
    assert [figure["system"] for figure in second["figures"]] == ["torch-dense", "q4_0-rounded"]
    assert second["results"][1]["file_bytes"] < second["results"][0]["file_bytes"]
    assert output.with_suffix(".md").read_text(encoding="utf-8").count("q4_0-rounded") == 1
    assert output.with_suffix(".png").stat().st_size > 0
    with pytest.raises(ValueError, match="results of the same settings"):
        run("torch-dense", max_clips=3)
    assert json.loads(output.read_text(encoding="utf-8")) == second


def test_further_rounds_give_medians_and_keep_the_texts(scripts, tmp_path):
    results = scripts.compare_runtimes.Results(tmp_path / "a.json", {})
    measured = [
        {"seconds": 4.0, "peak_uss": 9},
        {"seconds": 2.0, "peak_uss": 7},
        {"seconds": 7.0, "peak_uss": 8},
    ]
    for index, figures in enumerate(measured):
        about = {"system": "a", "weights": "w", "texts": [f"said in round {index}"]}
        assert results.rounds("a", "w") == index
        results.add({**about, **figures})
    (found,) = results.results
    assert (found["seconds"], found["peak_uss"], found["texts"]) == (4.0, 8, ["said in round 0"])
    assert found["rounds"] == [{**figures, "run": 0} for figures in measured]
    results.add({"system": "a", "weights": "other", "texts": ["new"], "seconds": 1.0})
    (found,) = results.results
    assert (found["seconds"], found["texts"], results.rounds("a", "other")) == (1.0, ["new"], 1)


def test_the_table_has_the_least_and_most_of_rounds(scripts):
    report = scripts.runtimes_report
    dense, ours = results_of(TEXTS)
    ours["rounds"] = [{"seconds": 1.0}, {"seconds": 3.0}]
    found = report.figures_of([dense, ours], report.Clips([""] * 3, REFERENCES), normalize, 8)
    lines = [[cell.strip() for cell in line.split("|")] for line in report.table(found).splitlines()]
    cells = {line[1]: line[-2] for line in lines}
    assert (cells["system"], cells["torch-dense"], cells["ours:a"]) == ("least to most", "", "0.125 to 0.375")


def test_tokens_become_the_text_that_the_tokenizer_writes(scripts):
    text = "Ärger, naïve 你好 ½ \n\t don't…"
    found = "".join(piece for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(text))
    assert bytes(map(scripts.runtimes.BYTES.__getitem__, found)).decode() == text
    assert sorted(scripts.runtimes.BYTES.values()) == list(range(256))


def test_a_module_loads_without_its_package(scripts, tmp_path, monkeypatch):
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("raise SystemExit('the package is loaded')")
    (tmp_path / "heavy" / "light.py").write_text("ANSWER = 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert scripts.runtimes.module_alone("heavy", "light").ANSWER == 42
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        scripts.runtimes.module_alone("no_such_package", "light")


def test_a_process_gets_the_variables_of_its_system(scripts):
    command = [sys.executable, "-c", "import json, os; print(json.dumps({'found': os.environ['GIVEN']}))"]
    found = scripts.compare_runtimes.run_in_fresh_process(command, 1, variables={"GIVEN": "here"})
    assert found["found"] == "here"


def test_a_file_of_another_kind_is_refused_and_stays(scripts, tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="must be new or a file of this script"):
        scripts.compare_runtimes.Results(path, {})
    assert path.read_text(encoding="utf-8") == "[1]"


def test_a_process_that_fails_is_reported_with_what_it_said(scripts):
    with pytest.raises(RuntimeError, match="no such luck"):
        scripts.compare_runtimes.run_in_fresh_process(
            [sys.executable, "-c", "raise SystemExit('no such luck')"], 1
        )


def test_names_of_points_lie_over_no_other_name_or_point_and_inside(research):
    from matplotlib.figure import Figure

    plots = research("plots")
    axes = Figure(figsize=(4, 3)).subplots()
    points = [
        ("one", 1.0, 1.0),
        ("two", 1.02, 1.0),
        ("two", 1.0, 1.02),
        ("at the edge", 10.0, 9.9),
        ("last", 9.9, 9.9),
    ]
    axes.plot(*zip(*(point[1:] for point in points)), "o")
    axes.set(xlim=(1, 10), ylim=(0, 10))
    plots.label_points(axes, points)
    assert sorted(text.get_text() for text in axes.texts) == sorted(point[0] for point in points)
    boxes = [text.get_window_extent() for text in axes.texts]
    for index, box in enumerate(boxes):
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[:index])
        for x, y in axes.transData.transform([point[1:] for point in points]):
            assert not box.contains(x, y)
