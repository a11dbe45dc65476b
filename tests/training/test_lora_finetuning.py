"""`--lora_rank`: adapters learn alone, and are merged into the model at the end."""

import pytest
import torch
from conftest import CLIPS, SAMPLE, TRAINING
from safetensors.torch import load_file

import hrt_cli
from hf_residual_transformer import ResidualWav2Vec2ForCTC, ResidualWhisperForConditionalGeneration
from hf_residual_transformer.modeling import residual_linears

CLASSES = {"whisper": ResidualWhisperForConditionalGeneration, "wav2vec2": ResidualWav2Vec2ForCTC}
OWN = {"whisper": [], "wav2vec2": ["--text-case", "lower", "--remove", "[^a-z ]"]}


@pytest.mark.parametrize("family", CLASSES)
def test_a_lora_learns_alone_and_the_saved_model_has_a_higher_rank(family, compressed, tmp_path):
    before = compressed[family]
    words = ["finetune", before, "--audio", SAMPLE, *CLIPS, *TRAINING, "--lora_rank", 2]
    words += [*OWN[family], "--out", tmp_path / "out"]
    assert hrt_cli.main([str(word) for word in words]) == 0
    model = CLASSES[family].from_pretrained(tmp_path / "out")
    old, new = load_file(before / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    grown = {name for name in old if old[name].shape != new[name].shape}
    assert grown and all(name.rpartition(".")[2].startswith("residual_") for name in grown)
    assert {name.split(".")[-2] for name in grown} == {"q_proj", "v_proj"}
    changed = {
        name for name in old if name not in grown and not torch.equal(old[name].float(), new[name].float())
    }
    # The adapters of a dense decoder are merged into its matrices.
    assert {name.split(".")[-2] for name in changed} == ({"q_proj", "v_proj"} if changed else set())
    assert all(".decoder." in name for name in changed) and bool(changed) == (family == "whisper")
    assert any(linear.rank == 6 for _, linear in residual_linears(model))


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_a_frozen_stack_gets_no_adapter(frozen, compressed, tmp_path):
    before = compressed["whisper"]
    words = ["finetune", before, "--audio", SAMPLE, *CLIPS, *TRAINING, "--lora_rank", 2, "--freeze", frozen]
    assert hrt_cli.main([str(word) for word in [*words, "--out", tmp_path / "out"]]) == 0
    old, new = load_file(before / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {
        name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])
    }
    assert changed and not any(f".{frozen}." in name for name in changed)
