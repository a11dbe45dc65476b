"""A checkpoint that lacks or spoils a weight is refused by that weight's name; nothing comes up random."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import randomize_, tiny_wav2vec2_config, tiny_whisper_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import hf_residual_transformer as hrt

BITS = hrt.ResidualConfig(group_size=2, rank=2, shared_bits=4)
FAMILIES = {
    "whisper": (hrt.ResidualWhisperForConditionalGeneration, tiny_whisper_config),
    "wav2vec2": (hrt.ResidualWav2Vec2ForCTC, tiny_wav2vec2_config),
}


def saved(folder, family):
    model_class, config = FAMILIES[family]
    randomize_(model_class(config(residual_config=BITS))).save_pretrained(folder)
    return model_class


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def retype(folder, key, dtype):
    change(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_that_is_missing_outside_of_the_layers_is_named_and_not_random(family, tmp_path):
    model_class = saved(tmp_path, family)
    part, head = {"whisper": (".conv1.", None), "wav2vec2": ("feature_extractor", "lm_head")}[family]
    gone = []
    change(
        tmp_path,
        lambda tensors: (
            gone.extend([key for key in tensors if part in key]) or [tensors.pop(key) for key in gone]
        ),
    )
    with pytest.raises(ValueError, match=rf"it lacks '{sorted(gone)[0]}' \({len(gone)} such"):
        model_class.from_pretrained(tmp_path)
    if head is not None:
        saved(tmp_path, family)
        change(tmp_path, lambda tensors: tensors.pop(f"{head}.weight"))
        with pytest.raises(ValueError, match=f"it lacks '{head}.weight'"):
            model_class.from_pretrained(tmp_path)


def test_a_head_that_the_saved_class_does_not_have_may_be_missing_but_its_body_may_not(tmp_path):
    config = tiny_wav2vec2_config(residual_config=BITS)
    hrt.ResidualWav2Vec2Model(config).save_pretrained(tmp_path)
    _, info = hrt.ResidualWav2Vec2ForCTC.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight", "lm_head.bias"}
    change(tmp_path, lambda tensors: tensors.pop("feature_projection.projection.weight"))
    with pytest.raises(ValueError, match=r"it lacks 'wav2vec2.feature_projection.projection.weight'"):
        hrt.ResidualWav2Vec2ForCTC.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int8])
def test_packed_weights_of_another_dtype_are_refused_and_not_cast_to_bytes(dtype, tmp_path):
    model_class = saved(tmp_path, "whisper")
    key = "model.encoder.shared.fc1.0.weight_packed"

    retype(tmp_path, key, dtype)
    with pytest.raises(ValueError, match=f"'{key}' of the checkpoint must be of dtype uint8, got"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_scales_in_8_bits_of_another_dtype_are_refused_and_not_cast(dtype, tmp_path):
    few = hrt.ResidualConfig(group_size=2, rank=2, shared_bits=4, scale_bits=8)
    hrt.ResidualWhisperModel(tiny_whisper_config(residual_config=few)).save_pretrained(tmp_path)
    key = "encoder.shared.fc1.0.weight_levels"
    retype(tmp_path, key, dtype)
    with pytest.raises(ValueError, match=f"'{key}' of the checkpoint must be of dtype int8, got"):
        hrt.ResidualWhisperModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_other_weights_of_a_dtype_that_they_do_not_have_are_refused_and_not_cast(dtype, tmp_path):
    model_class = saved(tmp_path, "whisper")
    key = "model.encoder.layer_norm.weight"

    retype(tmp_path, key, dtype)
    with pytest.raises(ValueError, match=f"'{key}' of the checkpoint must be of dtype float32 or float16"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "field"),
    [("whisper", "encoder_layers"), ("whisper", "decoder_layers"), ("wav2vec2", "num_hidden_layers")],
)
def test_a_config_of_a_billion_layers_is_refused_at_once(family, field, tmp_path):
    model_class = saved(tmp_path, family)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 10**9}))
    with pytest.raises(ValueError, match=f"`{field}` must be at most 1000, got 1000000000"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [AutoConfig, hrt.ResidualWhisperConfig])
@pytest.mark.parametrize(
    ("field", "value"),
    [("d_model", "x"), ("encoder_layers", {"a": 1}), ("dropout", None), ("residual_config", 5)],
)
def test_a_field_of_a_wrong_type_is_named(load, field, value, tmp_path):
    saved(tmp_path, "whisper")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=field):
        load.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["/dev/zero", "../model.safetensors", "none.safetensors", ".", "", 5, None])
def test_an_index_of_shards_lists_only_files_beside_it(name, tmp_path):
    model_class = saved(tmp_path, "whisper")
    model_class.from_pretrained(tmp_path).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.encoder.conv1.bias"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json must list files beside it, got"):
        model_class.from_pretrained(tmp_path / "shards")


def test_a_folder_that_is_saved_again_in_one_file_opens(tmp_path):
    model_class = saved(tmp_path, "whisper")
    model = model_class.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()  # transformers leaves it there
    again = model_class.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "\ud800"])
def test_a_broken_index_of_shards_is_named(content, tmp_path):
    model_class = saved(tmp_path, "whisper")
    model_class.from_pretrained(tmp_path).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises((ValueError, OSError), match="shards"):
        model_class.from_pretrained(tmp_path / "shards")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -3e37])
@pytest.mark.parametrize(
    "name",
    [
        "layers.1.fc2.residual_A",
        "shared.fc1.0.weight_scale",
        "layers.0.self_attn.q_proj.diagonal",
        "conv1.bias",
    ],
)
def test_weights_that_are_not_finite_or_too_large_are_named(name, value, tmp_path):
    model_class = saved(tmp_path, "whisper")

    def spoil(tensors):
        tensors[f"model.encoder.{name}"].view(-1)[3] = value

    change(tmp_path, spoil)
    what = "a value of magnitude 3e" if value == -3e37 else "NaN or infinity"
    with pytest.raises(ValueError, match=f"has {what}.* in 'model.encoder.{name}'"):
        model_class.from_pretrained(tmp_path)


def test_a_config_of_wav2vec2_is_not_loaded_by_a_class_of_whisper(tmp_path):
    saved(tmp_path, "wav2vec2")
    with pytest.raises(ValueError, match=r"residual_wav2vec2|ResidualWav2Vec2Config"):
        hrt.ResidualWhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "residual_wav2vec2"
