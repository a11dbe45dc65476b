"""Families as data: roles, stages, and views of a model's stack."""

import pytest
import torch
from conftest import tiny_wav2vec2_config, tiny_whisper_config
from torch import nn
from transformers import HubertConfig, HubertModel, Wav2Vec2Model, WhisperModel

from hf_residual_transformer.families import (
    FAMILIES,
    WHISPER,
    Block,
    LayerStack,
    Stack,
    frame_mask,
    shortest_suffixes,
)

WAV2VEC2 = FAMILIES["wav2vec2"]


def test_a_role_is_the_shortest_ending_that_no_other_path_has():
    paths = (
        "self_attn.q_proj",
        "encoder_attn.q_proj",
        "feed_forward1.linear1",
        "feed_forward2.linear1",
        "fc1",
        "proj",
    )
    assert shortest_suffixes(paths) == [*paths[:4], "fc1", "proj"]
    assert shortest_suffixes(("a.b.c", "x.b.c", "b.c")) == ["a.b.c", "x.b.c", "b.c"]
    assert list(WHISPER.encoder.roles) == ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    assert WAV2VEC2.encoder.roles["output_dense"] == "feed_forward.output_dense"
    assert WAV2VEC2.encoder.role_of("attention.k_proj") == "k_proj"


def test_two_feed_forwards_of_one_layer_keep_their_matrices_apart():
    blocks = tuple(
        Block(readers=(f"ff{i}.linear1",), writer=f"ff{i}.linear2", scale=0.5, pointwise=True) for i in (1, 2)
    )
    stack = Stack(name="encoder", classes=("Identity",), blocks=blocks)
    assert stack.modules == ("ff1.linear1", "ff1.linear2", "ff2.linear1", "ff2.linear2")
    assert stack.roles == {path: path for path in stack.modules}
    assert [(stage.block_idx, stage.writes) for stage in stack.stages] == [
        (0, False),
        (0, True),
        (1, False),
        (1, True),
    ]


def test_keys_and_values_from_another_stack_belong_to_the_stage_that_reads():
    block = Block(readers=("q",), memory=("k", "v"), writer="o", keys=("k",))
    stack = Stack(name="decoder", classes=("Identity",), blocks=(block,))
    assert stack.stages[0].paths == ("q", "k", "v") and stack.keys == {"k"}


def test_the_view_finds_layers_and_says_which_biases_absorb_a_mean():
    whisper = LayerStack(WHISPER.encoder, WhisperModel(tiny_whisper_config()))
    assert len(whisper) == 4 and not whisper.is_post_norm
    assert whisper.linear(0, "self_attn.k_proj").bias is None
    assert whisper.bias_absorbs_mean(0, "self_attn.k_proj")  # softmax does
    whisper.linear(0, "fc1").bias = None
    assert not whisper.bias_absorbs_mean(0, "fc1")
    wav2vec2 = Wav2Vec2Model(tiny_wav2vec2_config(do_stable_layer_norm=False))
    assert LayerStack(WAV2VEC2.encoder, wav2vec2).is_post_norm
    with pytest.raises(ValueError, match="Linear has no encoder"):
        LayerStack(WHISPER.encoder, nn.Linear(2, 2))


def test_frame_masks_work_for_families_without_adapters():
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 200:] = 0
    values = {name: value for name, value in tiny_wav2vec2_config().to_dict().items() if name != "model_type"}
    kept = {
        name: values[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "conv_dim")
    }
    kept |= {
        name: values[name]
        for name in ("conv_kernel", "conv_stride", "num_attention_heads", "feat_extract_norm")
    }
    hubert = HubertModel(HubertConfig(**kept, num_feat_extract_layers=2))
    wav2vec2 = Wav2Vec2Model(tiny_wav2vec2_config())
    frames = wav2vec2._get_feat_extract_output_lengths(torch.tensor([400, 200]))
    for model in (hubert, wav2vec2):
        found = frame_mask(model, int(frames[0]), mask)
        assert found.dtype == torch.bool and found.sum(1).tolist() == frames.tolist()
