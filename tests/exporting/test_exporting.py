"""Exported Whispers, dense and compact, beside PyTorch: numbers, sizes, files, and what is refused."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import (
    WHISPER_VOCAB,
    randomize_,
    tiny_whisper_config,
    whisper_generation_config,
    whisper_processor,
)
from ggml_reader import read_ggml
from peft import LoraConfig, inject_adapter_in_model
from sessions import Runtime
from transformers import (
    AutoModelForSpeechSeq2Seq,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

import hf_residual_transformer as hrt
import hrt_cli
from hf_residual_transformer import ResidualConfig, ResidualWhisperForConditionalGeneration
from hf_residual_transformer.exporting.ggml import openai_name
from hf_residual_transformer.exporting.graph import operator_bits, repacked
from hf_residual_transformer.layers import QuantizedWeight
from hf_residual_transformer.quantization import dequantize

TASKS_AND_LANGUAGES = {"<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>"}
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "float U": {"residual_config": ResidualConfig(group_size=3, rank=4, share_biases=True)},
    "low rank alone": {"residual_config": ResidualConfig(group_size=None, rank=5, diagonal="all")},
    "shared few bits": {
        "residual_config": ResidualConfig(group_size=2, rank=4, shared_bits=3, diagonal="all")
    },
    "everything": {
        "residual_config": ResidualConfig(
            group_size=1, rank=2, shared_bits=4, diagonal="none", bits_pattern={"fc1": 2, "fc2": 8}
        ),
        "decoder_residual_config": ResidualConfig(group_size=2, rank=3, shared_bits=5, diagonal="none"),
        "embedding_bits": 4,
    },
    "scales in 8 bits": {
        "residual_config": ResidualConfig(group_size=2, rank=2, shared_bits=3, diagonal="none", scale_bits=8),
        "decoder_residual_config": ResidualConfig(
            group_size=1, rank=0, shared_bits=4, diagonal="none", scale_bits=8
        ),
        "embedding_bits": [[40, 5], [len(WHISPER_VOCAB), 3]],
    },
    "rotated": {
        "residual_config": ResidualConfig(
            group_size=2,
            rank=2,
            shared_bits=4,
            diagonal="all",
            scale_bits=8,
            rotation={"fc1": 16, "q_proj": 32},
        ),
        "decoder_residual_config": ResidualConfig(
            group_size=1, rank=2, shared_bits=2, diagonal="none", scale_bits=8, rotation=32
        ),
        "embedding_bits": [[40, 4], [len(WHISPER_VOCAB), 2]],
    },
    "embedding of six bits": {"residual_config": ResidualConfig(group_size=1), "embedding_bits": 6},
    "embedding in ranges": {
        "residual_config": ResidualConfig(group_size=1),
        "embedding_bits": [[40, 5], [200, 3], [len(WHISPER_VOCAB), 4]],
    },
}


def whisper(form: str) -> Any:
    config = tiny_whisper_config(**FORMS[form])
    cls = ResidualWhisperForConditionalGeneration if FORMS[form] else WhisperForConditionalGeneration
    torch.manual_seed(0)
    model = randomize_(cls(config))
    model.generation_config = whisper_generation_config()
    return model


def exported(model: Any, folder: Path, **options: Any) -> Path:
    if options.get("format") != "ggml":
        options = {"floats": "float32", "accuracy_level": 0} | options
    return hrt.export(model, folder / "out", processor=whisper_processor(), **options)


def inputs(frames: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 16, frames, generator=generator),
        torch.randint(0, len(WHISPER_VOCAB), (2, 7), generator=generator),
    )


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_states_and_logits_are_those_of_pytorch(form, tmp_path):
    model, (features, ids) = whisper(form), inputs()
    runtime = Runtime(exported(model, tmp_path))
    states = runtime.encode(features)
    wanted = model(input_features=features, decoder_input_ids=ids)
    torch.testing.assert_close(
        torch.from_numpy(states), wanted.encoder_last_hidden_state, rtol=1e-5, atol=1e-5
    )
    found = torch.from_numpy(runtime.logits(ids, states, 4, runtime.empty_cache(2)))
    torch.testing.assert_close(found, wanted.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch_size", "length"), [(0, 0), (2, 1)], ids=["onnx-asr", "optimum"])
@torch.no_grad()
def test_what_stands_for_an_empty_cache_does_not_count(batch_size, length, tmp_path):
    model, (features, ids) = whisper("everything"), inputs()
    runtime = Runtime(exported(model, tmp_path))
    states = runtime.encode(features)
    found = runtime.logits(ids, states, 3, runtime.empty_cache(batch_size, length))
    wanted = runtime.logits(ids, states, ids.shape[1], runtime.empty_cache(2))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_encoder_takes_fewer_frames(tmp_path):
    model, (features, _) = whisper("everything"), inputs(frames=60)
    states = Runtime(exported(model, tmp_path)).encode(features)
    encoder = model.get_encoder()
    positions = encoder.embed_positions
    shorter = torch.nn.Embedding.from_pretrained(positions.weight[:30])
    encoder.embed_positions, encoder.config.max_source_positions = shorter, 30
    torch.testing.assert_close(
        torch.from_numpy(states), encoder(features).last_hidden_state, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_rounded_activations_and_floats_in_16_bits_change_logits_little(tmp_path):
    model, (features, ids) = whisper("everything"), inputs()
    folder = exported(model, tmp_path, floats="float16", accuracy_level=4)
    runtime = Runtime(folder)
    found = torch.from_numpy(runtime.logits(ids, runtime.encode(features), 4, runtime.empty_cache(2)))
    wanted = model(input_features=features, decoder_input_ids=ids).logits
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < 0.15


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_that_no_operator_has_keep_their_numbers_in_the_next(bits):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (6, 64 * bits // 8), dtype=torch.uint8, generator=generator)
    scale = torch.randn(6, 2, generator=generator)
    wider = operator_bits(bits)
    assert wider == {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}[bits]
    assert torch.equal(
        dequantize(repacked(packed, bits, wider), scale, wider), dequantize(packed, scale, bits)
    )


def test_wider_bits_are_said(tmp_path, caplog):
    exported(whisper("everything"), tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert any("decoder_model_merged: " in line and "10 of 5 bits in 8" in line for line in said)


def test_a_shared_matrix_and_a_tied_embedding_are_stored_once(tmp_path):
    model = whisper("everything")
    folder = exported(model, tmp_path, floats="float16")
    packed = []
    for name in ("encoder_model", "decoder_model_merged"):
        graph = onnx.load(folder / "onnx" / f"{name}.onnx").graph
        packed += [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8 and t.dims]
    held = [path for path, module in model.named_modules() if isinstance(module, QuantizedWeight)]
    assert sorted(packed) == sorted(f"{path}.weight_packed" for path in held)


def test_scales_in_8_bits_are_multiplied_when_a_runtime_loads_the_file(tmp_path):
    folder = exported(whisper("scales in 8 bits"), tmp_path, floats="float16")
    for name in ("encoder_model", "decoder_model_merged"):
        graph = onnx.load(folder / "onnx" / f"{name}.onnx").graph
        assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in graph.initializer)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", options)
        optimised = onnx.load(tmp_path / "optimised.onnx").graph
        held = {tensor.name for tensor in optimised.initializer}
        products = [node for node in nodes_of(optimised) if node.op_type == "MatMulNBits"]
        assert len(products) >= 2 and all(node.input[2] in held for node in products)
        assert not [tensor for tensor in optimised.initializer if tensor.name.endswith("weight_levels")]


def nodes_of(graph: Any) -> Any:
    """All nodes, also those of branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_the_file_is_as_small_as_the_tensors(scale_bits, tmp_path):
    few = ResidualConfig(group_size=1, rank=0, shared_bits=4, diagonal="none", scale_bits=scale_bits)
    config = tiny_whisper_config(
        d_model=128,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        residual_config=few,
        decoder_residual_config=few,
        embedding_bits=4,
    )
    model = randomize_(ResidualWhisperForConditionalGeneration(config))
    folder = exported(model, tmp_path, floats="float16")
    weights = sum(
        tensor.numel() * (2 if tensor.is_floating_point() else 1) for tensor in model.state_dict().values()
    )
    files = sum(path.stat().st_size for path in (folder / "onnx").iterdir())
    nodes = (
        130_000 if scale_bits == 16 else 190_000
    )  # names and attributes, which do not grow with the matrices
    assert weights < files < weights + nodes


def test_the_folder_is_a_plain_whisper_for_other_runtimes(tmp_path):
    model = whisper("everything")
    model.config.carry_code(True)
    folder = exported(model, tmp_path)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        "onnx/encoder_model.onnx",
        "onnx/decoder_model_merged.onnx",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "added_tokens.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "whisper"
    assert config["architectures"] == ["WhisperForConditionalGeneration"]
    assert not {"residual_config", "decoder_residual_config", "embedding_bits", "auto_map"} & set(config)
    # Other readers find numbers where a compact checkpoint has the text that makes plain classes refuse it.
    plain = WhisperConfig().to_dict()
    numbers = [name for name, value in plain.items() if type(value) in (int, float) and name in config]
    assert "init_std" in numbers
    assert all(isinstance(config[name], int | float) for name in numbers)
    tokens = [json.loads((folder / name).read_text()) for name in ("vocab.json", "added_tokens.json")]
    assert tokens[0] | tokens[1] == WHISPER_VOCAB


def test_a_generation_config_without_languages_gets_those_of_the_tokenizer(tmp_path, caplog):
    model = whisper("dense")
    wanted = model.generation_config.to_dict()
    for name in ("lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual"):
        delattr(model.generation_config, name)
    folder = exported(model, tmp_path)
    found = json.loads((folder / "generation_config.json").read_text())
    for name in ("lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual"):
        assert found[name] == wanted[name]
    assert any("lang_to_id" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("format", ["onnx", "sherpa-onnx"])
def test_a_tokenizer_without_languages_and_tasks_is_refused_where_they_are_needed(tmp_path, format):
    model, processor = whisper("dense"), whisper_processor()
    model.generation_config.lang_to_id = {}  # as if it were not there
    vocab = {token: index for token, index in WHISPER_VOCAB.items() if token not in TASKS_AND_LANGUAGES}
    processor.tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    wanted = (
        "0 languages and 0 tasks"
        if format == "onnx"
        else r"the tokens <\|transcribe\|>, <\|translate\|> for sherpa-onnx"
    )
    with pytest.raises(ValueError, match=wanted):
        hrt.export(model, tmp_path / "a" / "out", processor=processor, format=format)
    assert list(tmp_path.iterdir()) == []


def test_empty_languages_are_those_of_the_tokenizer(tmp_path):
    model = whisper("dense")
    wanted, model.generation_config.lang_to_id = model.generation_config.lang_to_id, {}
    folder = exported(model, tmp_path)
    assert json.loads((folder / "generation_config.json").read_text())["lang_to_id"] == wanted
    assert model.generation_config.lang_to_id == {}  # the model itself stays as it is


def test_an_export_that_knows_english_alone_says_which_runtimes_ask_it_rightly(tmp_path, caplog):
    model = whisper("dense")
    model.generation_config.is_multilingual = False
    exported(model, tmp_path)
    assert any("onnx-asr asks every Whisper for a language" in r.getMessage() for r in caplog.records)


def test_a_folder_with_files_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds files"):
        exported(whisper("dense"), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    exported(whisper("dense"), tmp_path, overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "out" / "onnx" / "encoder_model.onnx").exists()


def test_the_folder_of_a_checkpoint_is_refused_and_stays_as_it_is(tmp_path):
    model, folder = whisper("everything"), tmp_path / "compact"
    model.save_pretrained(folder)
    whisper_processor().save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for given in (str(folder), model):
        with pytest.raises(FileExistsError, match=r"holds a checkpoint, model\.safetensors"):
            hrt.export(given, folder, processor=whisper_processor(), overwrite=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_runtime_that_cannot_load_the_result_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    def too_old(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(onnxruntime, "InferenceSession", too_old)
    with pytest.raises(ValueError, match=f"onnxruntime {onnxruntime.__version__}.*no such operator"):
        exported(whisper("everything"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_exported_form_is_refused(dense_wav2vec2, tmp_path):
    with pytest.raises(ValueError, match="`model` must be a Whisper for transcription"):
        hrt.export(dense_wav2vec2, tmp_path / "out")
    with pytest.raises(ValueError, match="`format` must be one of onnx, sherpa-onnx, ggml, got 'tflite'"):
        exported(whisper("dense"), tmp_path, format="tflite")
    for options in ({"floats": "float32"}, {"accuracy_level": 0}):
        with pytest.raises(
            ValueError, match="`floats` and `accuracy_level` must be left out for the format ggml"
        ):
            exported(whisper("dense"), tmp_path, format="ggml", **options)
    model = whisper("dense")
    model.config.activation_function = "silu"
    with pytest.raises(ValueError, match="`activation_function` must be one of gelu, relu, got 'silu'"):
        exported(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_modules_that_compute_something_else_are_refused_and_nothing_is_written(tmp_path):
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    for name, path in (("q_proj", "layers.1.self_attn.q_proj"), ("fc2", "layers.1.fc2")):
        model = whisper("everything")
        layer = model.get_decoder().layers[1]
        (layer if name == "fc2" else layer.self_attn).__setattr__(name, Doubled(32, 32))
        with pytest.raises(
            ValueError, match=rf"plain or residual modules, got a .*Doubled at .*{path}, which no"
        ):
            exported(model, tmp_path)
    model = whisper("dense")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match=r"got a peft.*Linear at .*q_proj, .*merge_and_unload\(\) of PEFT"):
        exported(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def blocks_alone(**options: Any) -> Any:
    """A model whose matrices are blocks and nothing else, of several widths, with scales in 16 bits."""
    config = {"group_size": 1, "rank": 0, "shared_bits": 4, "diagonal": "none", "block_size": 32}
    stack = ResidualConfig(**{**config, **options})
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    config = tiny_whisper_config(
        residual_config=stack, decoder_residual_config=stack, embedding_bits=4, **sizes
    )
    model = randomize_(ResidualWhisperForConditionalGeneration(config)).half().float()
    model.get_input_embeddings().weight_mean.data.zero_()
    return model


@pytest.mark.parametrize("options", [{}, {"bits_pattern": {"fc1": 2, "q_proj": 3}}, {"block_size": 64}])
def test_blocks_alone_are_written_for_whisper_cpp_without_rounding_again(options, tmp_path):
    model = blocks_alone(**options)
    folder = exported(model, tmp_path, format="ggml")
    assert [path.name for path in folder.iterdir()] == ["ggml-model-q4_0.bin"]
    with (folder / "ggml-model-q4_0.bin").open("rb") as file:
        header, _, _, tensors = read_ggml(file)
    assert header[-1] == 2002
    wanted = model.merge().model.state_dict()
    assert len(tensors) == len(wanted)
    matrices = 0
    for name, values in wanted.items():
        shape, kind, data = tensors[openai_name(name)]
        if kind == 2:
            blocks = np.frombuffer(data, np.uint8).reshape(-1, 18)
            integers = np.hstack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4]).astype(np.float32) - 8
            found = (blocks[:, :2].copy().view(np.float16) * integers).reshape(shape[::-1])
            matrices += 1
        else:
            found = np.frombuffer(data, np.float16 if kind else np.float32).reshape(shape[::-1])
        np.testing.assert_array_equal(found.squeeze(), values.numpy().squeeze())
    assert matrices == 4 * 6 + 2 * 10 + 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rank": 3}, "has a low rank of 3"),
        ({"shared_bits": 5}, "has 5 bits"),
        ({"scale_bits": 8}, "has scales in 8 bits"),
        ({"diagonal": "all"}, "has a diagonal"),
        ({"rotation": 16}, "is rotated, 16 inputs together"),
        ({"shared_bits": None}, "is in floating point"),
    ],
)
def test_what_is_more_than_blocks_is_refused_for_whisper_cpp(options, problem, tmp_path):
    with pytest.raises(ValueError, match=f"`format` must be onnx for this model, got ggml.*{problem}"):
        exported(blocks_alone(**options), tmp_path, format="ggml")
    assert list(tmp_path.iterdir()) == []


def test_a_mean_of_the_tokens_is_refused_for_whisper_cpp(tmp_path):
    model = blocks_alone()
    model.get_input_embeddings().weight_mean.data[3] = 1
    with pytest.raises(ValueError, match="embed_tokens keeps what its tokens have in common apart"):
        exported(model, tmp_path, format="ggml")


def test_ranges_of_tokens_are_refused_for_whisper_cpp(tmp_path):
    model = blocks_alone()
    config = copy.deepcopy(model.config)
    config.embedding_bits = [[40, 4], [len(WHISPER_VOCAB), 3]]
    model = randomize_(type(model)(config))
    with pytest.raises(ValueError, match="embed_tokens has more bits for some tokens than for others"):
        exported(model, tmp_path, format="ggml")


def test_a_failed_export_leaves_a_folder_that_held_files_as_it_was(tmp_path, monkeypatch):
    folder = exported(whisper("everything"), tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_: Any) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr("hf_residual_transformer.exporting.folder._save_processor", full)
    with pytest.raises(OSError, match="no space left"):
        exported(whisper("dense"), tmp_path, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@torch.no_grad()
def test_the_command_writes_what_a_compact_folder_computes(compressed, tmp_path, capsys):
    words = ["export", compressed["whisper"], "--out", tmp_path / "out", "--accuracy-level", 0]
    assert hrt_cli.main([*map(str, words)]) == 0
    assert "encoder_model.onnx" in capsys.readouterr().out
    model = AutoModelForSpeechSeq2Seq.from_pretrained(compressed["whisper"], dtype=torch.float32)
    features, ids = inputs()
    runtime = Runtime(tmp_path / "out")
    found = runtime.logits(ids, runtime.encode(features), 4, runtime.empty_cache(2))
    wanted = model(input_features=features, decoder_input_ids=ids).logits
    assert (found.argmax(-1) == wanted.argmax(-1).numpy()).all()


def dense_form_of_sherpa(folder: Path) -> tuple[Any, Any, dict[str, str]]:
    sessions = [onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder")]
    return *sessions, sessions[0].get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("form", ["dense", "everything"])
@torch.no_grad()
def test_the_form_of_sherpa_onnx_computes_the_same_logits(form, tmp_path):
    model, (features, ids) = whisper(form), inputs()
    folder = exported(model, tmp_path, format="sherpa-onnx")
    encoder, decoder, said = dense_form_of_sherpa(folder)
    crossed = encoder.run(["n_layer_cross_k", "n_layer_cross_v"], {"mel": features.numpy()})
    room = (int(said["n_text_layer"]), 2, int(said["n_text_ctx"]), int(said["n_text_state"]))
    caches, parts = [np.full(room, 7.0, np.float32) for _ in range(2)], []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
        names = ("in_n_layer_self_k_cache", "in_n_layer_self_v_cache", "n_layer_cross_k", "n_layer_cross_v")
        feed = dict(zip(names, (*caches, *crossed))) | {"tokens": ids[:, start:end].numpy()}
        logits, *caches = decoder.run(None, feed | {"offset": np.array([start])})
        parts.append(logits)
    wanted = model(input_features=features, decoder_input_ids=ids).logits
    found = torch.from_numpy(np.concatenate(parts, axis=1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_sherpa_onnx_gets_the_tokens_and_their_numbers(tmp_path):
    folder = exported(whisper("dense"), tmp_path, format="sherpa-onnx")
    assert {path.name for path in folder.iterdir()} == {"encoder.onnx", "decoder.onnx", "tokens.txt"}
    _, _, said = dense_form_of_sherpa(folder)
    assert said["is_multilingual"] == "1" and said["all_language_codes"] == "en,de"
    start = [WHISPER_VOCAB[token] for token in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>")]
    assert said["sot_sequence"] == ",".join(map(str, start))
    lines = [line.split() for line in (folder / "tokens.txt").read_text().splitlines()]
    assert [int(index) for _, index in lines] == list(range(WHISPER_VOCAB["<|endoftext|>"]))
    assert base64.b64decode(lines[WHISPER_VOCAB["a"]][0]) == b"a"
