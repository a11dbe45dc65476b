"""Compression, distillation and fine-tuning in two processes, as `accelerate launch` and torchrun start them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from conftest import SAMPLE, logged
from safetensors.torch import load_file
from two_processes import run_together

import hrt_cli

CLIPS = ["--audio", SAMPLE, "--language", "en", "--max-seconds", 1, "--max-samples", 8]
TRAINING = ["--use_cpu", "--max_steps", 2, "--logging_steps", 1, "--learning_rate", 0.02, "--optim", "sgd"]
TRAINING += ["--lr_scheduler_type", "constant", "--max_grad_norm", 1e6, "--save_strategy", "no"]
TRAINING += ["--disable_tqdm", "true"]
TWO = ["--per_device_train_batch_size", 2, "--ddp_backend", "gloo"]  # the batches of 4 in two processes
# Sums over all letters have large gradients, which a large step would turn into chaos.
SPELLING = ["--text-case", "lower", "--remove", "[^a-z ]", "--learning_rate", 1e-6]


def hrt(*words) -> int:
    return hrt_cli.main([str(word) for word in words])


def hrt_in_two_processes(*words) -> None:
    assert run_together(hrt, *words, joined=False) == [0, 0]


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_two_processes_compress_to_the_folder_of_one(
    family, compressed, dense_whisper, dense_wav2vec2, tmp_path
):
    dense = dense_whisper if family == "whisper" else dense_wav2vec2
    form = ["--rank", 4, "--rank_pattern", '{"fc2|output_dense": 6}', "--iterations", 2, "--device", "cpu"]
    clips = [*CLIPS[:-1], 6]
    hrt_in_two_processes("compress", dense, *clips, *form, "--out", tmp_path / "out")
    expected = load_file(compressed[family] / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    products = []
    for tensors in (expected, found):  # the factors of a low rank may be other ones with the same product
        ends = [key.removesuffix("residual_A") for key in tensors if key.endswith("residual_A")]
        factors = {
            key: tensors.pop(f"{key}residual_B").float() @ tensors.pop(f"{key}residual_A").float()
            for key in ends
        }
        products.append(factors)
    for key, value in (expected | products[0]).items():
        # They are saved in 16 bits.
        other = (found | products[1])[key]
        torch.testing.assert_close(other.float(), value.float(), rtol=2e-3, atol=1e-3, msg=key)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(compressed[family]))


def compress_without_recordings_in_one(*words) -> str | int:
    """The exit status, or that the process ended with an error."""
    words = ["nowhere" if os.environ["RANK"] == "1" and word == SAMPLE else word for word in words]
    try:
        return hrt(*words)
    except RuntimeError:
        return "ended"


def test_no_process_waits_for_one_that_has_failed(dense_wav2vec2, tmp_path):
    words = ["compress", dense_wav2vec2, *CLIPS, "--rank", 4, "--device", "cpu", "--out", tmp_path / "out"]
    assert run_together(compress_without_recordings_in_one, *words, joined=False) == ["ended", 2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "command", "own"),
    [
        ("whisper", "distill", ["--eval-split", "train", "--learning_rate", 1e-3]),
        ("wav2vec2", "distill", ["--eval-split", "train", "--learning_rate", 1e-3, "--window-seconds", 1]),
        ("whisper", "finetune", []),
        ("wav2vec2", "finetune", SPELLING),
        ("whisper", "finetune", ["--lora_rank", 2]),
        ("wav2vec2", "finetune", ["--lora_rank", 2, *SPELLING]),
    ],
)
def test_two_processes_have_the_gradients_of_one_and_save_the_same_model(
    family, command, own, compressed, dense_whisper, dense_wav2vec2, tmp_path
):
    words = [command, compressed[family], *CLIPS, *TRAINING, *own]
    if command == "distill":
        words += ["--teacher", dense_whisper if family == "whisper" else dense_wav2vec2]
    one, two = tmp_path / "one", tmp_path / "two"
    assert hrt(*words, "--per_device_train_batch_size", 4, "--out", one) == 0
    hrt_in_two_processes(*words, *TWO, "--out", two)
    np.testing.assert_allclose(logged(two, "grad_norm"), logged(one, "grad_norm"), rtol=1e-3)
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert found.keys() == expected.keys()
    before = load_file(compressed[family] / "model.safetensors")
    assert any(not torch.equal(before[key].float(), value) for key, value in expected.items())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)
    if command == "distill":
        results = [json.loads((folder / "train_results.json").read_text()) for folder in (one, two)]
        for name in ("validation_loss_before", "validation_loss_after"):
            assert results[1][name] == pytest.approx(results[0][name], rel=1e-4)
