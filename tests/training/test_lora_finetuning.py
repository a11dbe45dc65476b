"""`--lora_rank`: adapters learn alone, and are merged into the model at the end."""

import torch
from conftest import CLIPS, SAMPLE, TRAINING
from safetensors.torch import load_file

import hrt_cli
from hf_residual_transformer import ResidualWav2Vec2ForCTC
from hf_residual_transformer.modeling import residual_linears


def test_a_lora_learns_alone_and_the_saved_model_has_a_higher_rank(compressed, tmp_path):
    before = compressed["wav2vec2"]
    words = [
        "finetune",
        before,
        "--audio",
        SAMPLE,
        *CLIPS,
        *TRAINING,
        "--lora_rank",
        2,
        "--text-case",
        "lower",
    ]
    words += ["--remove", "[^a-z ]", "--out", tmp_path / "out"]
    assert hrt_cli.main([str(word) for word in words]) == 0
    model = ResidualWav2Vec2ForCTC.from_pretrained(tmp_path / "out")
    old, new = load_file(before / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    grown = {name for name in old if old[name].shape != new[name].shape}
    assert grown and all(name.rpartition(".")[2].startswith("residual_") for name in grown)
    assert {name.split(".")[-2] for name in grown} == {"q_proj", "v_proj"}
    assert all(torch.equal(old[name], new[name]) for name in old if name not in grown)
    assert any(linear.rank == 6 for _, linear in residual_linears(model))
