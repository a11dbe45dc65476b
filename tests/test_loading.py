"""A checkpoint that lacks or spoils a weight is refused by that weight's name; nothing comes up random."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import randomize_, tiny_wav2vec2_config, tiny_whisper_config
from safetensors.torch import load_file, save_file

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

    def retype(tensors):
        tensors[key] = tensors[key].to(dtype)

    change(tmp_path, retype)
    with pytest.raises(ValueError, match=f"'{key}' of the checkpoint must be of dtype uint8, got"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["layers.1.fc2.residual_A", "shared.fc1.0.weight_scale", "layers.0.self_attn.q_proj.diagonal"]
)
def test_weights_of_compressed_modules_that_are_not_finite_are_named(name, value, tmp_path):
    model_class = saved(tmp_path, "whisper")

    def spoil(tensors):
        tensors[f"model.encoder.{name}"].view(-1)[3] = value

    change(tmp_path, spoil)
    with pytest.raises(ValueError, match=f"has NaN or infinity in 'model.encoder.{name}'"):
        model_class.from_pretrained(tmp_path)


def test_a_config_of_wav2vec2_is_not_loaded_by_a_class_of_whisper(tmp_path):
    saved(tmp_path, "wav2vec2")
    with pytest.raises(ValueError, match=r"residual_wav2vec2|ResidualWav2Vec2Config"):
        hrt.ResidualWhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "residual_wav2vec2"
