"""The scripts that train from scratch, as a user starts them: to a saved model, and in two processes."""

from __future__ import annotations

import csv
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import logged, speech
from safetensors.torch import load_file
from transformers import AutoModelForRNNT, AutoProcessor, pipeline

import hf_residual_transformer as hrt
from hf_residual_transformer.training.scratch_parakeet import check_head

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SCRIPTS = REPOSITORY / "scripts"
DATA = ["--language", "en", "--max_seconds", 1, "--max_samples", 8]
ENCODER = ["--encoder_layers", 3, "--d_model", 32, "--encoder_ffn_dim", 64, "--attention_heads", 2]
ENCODER += ["--dropout", 0, "--mask_time", 0, "--mask_bands", 0, "--residual", '{"group_size": 3, "rank": 2}']
WHISPER = ["--decoder_layers", 1, "--decoder_ffn_dim", 32, "--num_mel_bins", 16, "--window_seconds", 1]
WHISPER += ["--max_tokens", 40, "--vocab_size", 80]
WAV2VEC2 = ["--conv_dim", 16, "--text_case", "lower", "--remove", "[^a-z ]"]
PARAKEET = ["--subsampling", 4, "--subsampling_channels", 4, "--num_mel_bins", 16, "--decoder_dim", 16]
PARAKEET += ["--conv_kernel", 3, "--vocab_size", 40, "--text_case", "lower", "--remove", "[^a-z ]"]
TRAINING = ["--use_cpu", "--max_steps", 3, "--logging_steps", 1, "--learning_rate", 0.05, "--optim", "sgd"]
TRAINING += ["--save_strategy", "steps", "--save_steps", 1, "--disable_tqdm", "true", "--max_grad_norm", 1e6]


def has_torchaudio():
    try:
        check_head("rnnt")
    except ValueError:
        return False
    return True


needs_torchaudio = pytest.mark.skipif(not has_torchaudio(), reason="torchaudio cannot be imported")


def run(monkeypatch, name, *options):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("train_asr", WHISPER),
        ("train_ctc", WAV2VEC2),
        ("train_parakeet", [*PARAKEET, "--head", "ctc"]),
        ("train_parakeet", [*PARAKEET, "--head", "tdt"]),
    ],
)
def test_a_model_from_scratch_opens_in_a_pipeline(name, own, monkeypatch, tmp_path):
    out = tmp_path / "out"
    options = [*DATA, *ENCODER, *own, *TRAINING, "--per_device_train_batch_size", 4]
    options += ["--average_checkpoints", 2, "--divide_shared_rate", "true", "--lr_scheduler_type", "constant"]
    run(monkeypatch, name, *options, "--eval_split", "train", "--output_dir", out)
    groups = torch.load(out / "checkpoint-3" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {round(group["lr"], 9) for group in groups} == {0.05, round(0.05 / 3**0.5, 9)}
    assert "eval_loss" in json.loads((out / "eval_results.json").read_text())
    recogniser = pipeline("automatic-speech-recognition", model=str(out))
    assert recogniser.model.config.residual_config == hrt.ResidualConfig(group_size=3, rank=2)
    assert isinstance(recogniser({"raw": speech().numpy(), "sampling_rate": 16_000})["text"], str)
    whole = load_file(out / "model.safetensors")
    mean = [load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3)]
    for key, value in whole.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (mean[0][key] + mean[1][key]) / 2)
    if name == "train_asr":
        assert not any("ctc_head" in key for key in whole)


@needs_torchaudio
def test_an_rnnt_from_scratch_opens_by_its_auto_class(monkeypatch, tmp_path):
    out = tmp_path / "out"
    options = [
        *DATA,
        *ENCODER,
        *PARAKEET,
        *TRAINING,
        "--per_device_train_batch_size",
        4,
        "--eval_split",
        "train",
    ]
    run(monkeypatch, "train_parakeet", "--head", "rnnt", *options, "--output_dir", out)
    assert "eval_loss" in json.loads((out / "eval_results.json").read_text())
    # The pipeline of transformers does not know RNN-T.
    model, processor = AutoModelForRNNT.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.residual_config == hrt.ResidualConfig(group_size=3, rank=2)
    ids = model.generate(**processor(speech().numpy(), sampling_rate=16_000)).sequences
    assert isinstance(processor.batch_decode(ids, skip_special_tokens=True)[0], str)


def test_a_parakeet_from_scratch_is_fine_tuned_by_the_script_for_ctc(monkeypatch, tmp_path):
    options = [*DATA, *TRAINING, "--per_device_train_batch_size", 4]
    out, tuned = tmp_path / "out", tmp_path / "tuned"
    run(monkeypatch, "train_parakeet", *options, *ENCODER, *PARAKEET, "--output_dir", out)
    run(monkeypatch, "finetune_ctc", "--model", out, *options, *PARAKEET[-4:], "--output_dir", tuned)
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tuned))
    assert not torch.equal(before["ctc_head.weight"], after["ctc_head.weight"])
    assert set(before) == set(after)


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'torchaudio'"), OSError("cannot load library")]
)
def test_rnnt_without_its_loss_is_refused_before_anything_is_read(error, monkeypatch, tmp_path):
    def fail(name):
        raise error

    monkeypatch.setattr("hf_residual_transformer.training.scratch_parakeet.importlib.import_module", fail)
    with pytest.raises(ValueError, match=f"`head` 'rnnt' needs torchaudio.*{error}.*or take 'tdt'"):
        options = [*DATA, *PARAKEET, *TRAINING, "--output_dir", tmp_path / "out"]
        run(monkeypatch, "train_parakeet", "--head", "rnnt", *options)
    assert not (tmp_path / "out").exists()


def test_two_processes_have_the_gradients_of_one_and_save_the_same_file(monkeypatch, tmp_path):
    name, options = "train_asr", [*DATA, *ENCODER, *WHISPER, *TRAINING]
    one, two, parts = (tmp_path / folder for folder in ("one", "two", "parts"))
    run(monkeypatch, name, *options, "--per_device_train_batch_size", 4, "--output_dir", one)
    accumulated = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    run(monkeypatch, name, *options, *accumulated, "--output_dir", parts)
    words = [*options, "--per_device_train_batch_size", 2, "--ddp_backend", "gloo", "--output_dir", two]
    run_in_two_processes(name, words, tmp_path)
    expected = load_file(one / "model.safetensors")
    for other in (two, parts):
        np.testing.assert_allclose(logged(other, "grad_norm"), logged(one, "grad_norm"), rtol=1e-3)
        found = load_file(other / "model.safetensors")
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        (
            "train_asr",
            [*WHISPER, "--max_tokens", 4],
            r"clip \d+ of split 'train' must have at most `max_tokens` = 4",
        ),
        ("train_asr", [*WHISPER, "--streaming"], "`streaming` must be false"),
        (
            "train_asr",
            [*WHISPER, "--average_checkpoints", 0],
            "`average_checkpoints` must be at least 1, got 0",
        ),
        (
            "train_ctc",
            [*WAV2VEC2, "--average_checkpoints", 3, "--save_total_limit", 2],
            "`average_checkpoints` must be at most the number of checkpoints that are kept, got 3",
        ),
        ("train_asr", [*WHISPER, "--residual", '{"rank": 99}'], "`rank` must be at most 32"),
        ("train_parakeet", [*PARAKEET, "--subsampling", 6], "`subsampling` must be a power of two .*got 6"),
        ("train_parakeet", [*PARAKEET, "--conv_kernel", 4], "`conv_kernel` must be odd, got 4"),
        ("train_parakeet", [*PARAKEET, "--vocab_size", 8], r"`vocab_size` must be at least \d+, .*got 8"),
        ("train_parakeet", [*PARAKEET, "--remove", "."], "training split must have clips with text"),
        ("train_parakeet", [*PARAKEET, "--residual", '{"rank": 99}'], "`rank` must be at most 32"),
        ("train_ctc", [*WAV2VEC2, "--remove", "."], "training split must have clips with text"),
        (
            "train_ctc",
            [*WAV2VEC2, "--attention_heads", 3],
            "`d_model` must be an even multiple of `attention_heads`",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_training(name, own, message, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.Trainer.train", None)
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, name, *DATA, *ENCODER, *own, *TRAINING, "--output_dir", tmp_path / "out")


def test_characters_that_the_training_split_lacks_are_named(monkeypatch, tmp_path):
    table(
        tmp_path / "data",
        ["one", "two", "wo\N{LATIN SMALL LETTER E WITH ACUTE}"],
        ["train", "train", "validation"],
    )
    monkeypatch.setattr("transformers.Trainer.train", None)
    data = ["--dataset", tmp_path / "data", "--eval_split", "validation", "--output_dir", tmp_path / "out"]
    for name, own, message in (
        (
            "train_asr",
            WHISPER,
            "clip 0 of split 'validation' must have only characters of the training split, got '\u00e9'",
        ),
        ("train_ctc", WAV2VEC2[:2], "tokenizer has no '\u00e9', which is in 'wo\u00e9'"),
        (
            "train_parakeet",
            [*PARAKEET[:-4], "--head", "tdt"],
            "tokenizer has no '\u00e9', which is in 'wo\u00e9'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, name, *data, *ENCODER, *own, *TRAINING)


@pytest.mark.parametrize(
    ("name", "own", "words"),
    [
        ("train_ctc", WAV2VEC2[:2], 40),
        ("train_parakeet", [*PARAKEET[:-4], "--vocab_size", 10], 40),
        # A transducer writes up to ten tokens at a frame.
        ("train_parakeet", [*PARAKEET[:-4], "--vocab_size", 10, "--head", "tdt"], 400),
    ],
)
def test_a_transcript_that_is_too_long_for_the_frames_is_named(name, own, words, monkeypatch, tmp_path):
    table(tmp_path / "data", ["one", "two " * words], ["train", "train"])
    monkeypatch.setattr("transformers.Trainer.train", None)
    with pytest.raises(
        ValueError, match=r"1\.wav \(row 1\) cannot be learnt from: its transcript needs \d+ frames"
    ):
        options = [*own, *TRAINING, "--output_dir", tmp_path / "out"]
        run(monkeypatch, name, "--dataset", tmp_path / "data", *ENCODER, *options)


def test_a_clip_longer_than_the_window_is_named_before_training(monkeypatch, tmp_path):
    table(tmp_path / "data", ["one", "two", "one"], ["train", "train", "validation"])
    monkeypatch.setattr("transformers.Trainer.train", None)
    data = ["--dataset", tmp_path / "data", "--output_dir", tmp_path / "out"]
    for path, more in (("1.wav", []), ("2.wav", ["--eval_split", "validation"])):
        soundfile.write(tmp_path / "data" / path, speech(1.1).numpy(), 16_000)
        with pytest.raises(ValueError, match=rf"{path} \(row \d\) must be of at most 1 seconds"):
            run(monkeypatch, "train_asr", *data, *ENCODER, *WHISPER, *TRAINING, *more)
        soundfile.write(tmp_path / "data" / path, speech(0.5).numpy(), 16_000)


def run_in_two_processes(name, options, folder):
    """What `accelerate launch` and `torchrun` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, options)]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            own = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as said:
                processes.append(
                    subprocess.Popen(command, cwd=REPOSITORY, env=own, stdout=said, stderr=subprocess.STDOUT)
                )
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=900) == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()


def table(folder, texts, splits):
    """A folder of half seconds of noise with these transcripts."""
    folder.mkdir()
    rows = [("file_name", "text", "split")]
    for number, (text, split) in enumerate(zip(texts, splits, strict=True)):
        soundfile.write(folder / f"{number}.wav", speech(0.5, seed=number).numpy(), 16_000)
        rows.append((f"{number}.wav", text, split))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
