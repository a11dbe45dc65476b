"""Options of Trainer that a data set of speech must serve: batches of like lengths, and trackers."""

from __future__ import annotations

from uuid import uuid4

import numpy as np
import pytest
from conftest import SAMPLE
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

import hrt_cli
from hf_residual_transformer.speech.datasets import clip_samples, load_speech_dataset
from hf_residual_transformer.training.guarded import GuardedTrainer

CLIPS = ["--audio", SAMPLE, "--language", "en", "--max-seconds", 1.5, "--max-samples", 8]
TRAINING = ["--use_cpu", "--max_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-3, "--save_strategy"]
TRAINING += ["no", "--disable_tqdm", "true", "--per_device_train_batch_size", 2]
SPELLING = ["--text-case", "lower", "--remove", "[^a-z ]"]


def hrt(*words) -> int:
    return hrt_cli.main([str(word) for word in words])


def test_lengths_are_those_of_the_decoded_clips():
    rows = load_speech_dataset(SAMPLE, "train", language="en", max_samples=5)
    lengths = [len(row["audio"]["array"]) for row in rows]
    assert clip_samples(rows) == pytest.approx(lengths, abs=2)
    assert clip_samples(list(rows)) == lengths
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_a_run_groups_clips_by_length(strategy, compressed, tmp_path, monkeypatch):
    samplers = []
    plain = GuardedTrainer._get_train_sampler

    def kept(self, *args):
        samplers.append(plain(self, *args))
        return samplers[-1]

    monkeypatch.setattr(GuardedTrainer, "_get_train_sampler", kept)
    words = ["finetune", compressed["wav2vec2"], *CLIPS, *TRAINING, *SPELLING]
    assert hrt(*words, "--train_sampling_strategy", strategy, "--out", tmp_path / "out") == 0
    rows = load_speech_dataset(SAMPLE, "train", language="en", max_seconds=1.5, max_samples=8)
    assert list(samplers[0].lengths) == clip_samples(rows)


def test_batches_of_a_run_have_clips_of_like_lengths(tmp_path):
    lengths = np.random.default_rng(0).permutation(np.arange(1, 65)).tolist()
    rows = [{"audio": {"array": [0.0] * length}} for length in lengths]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=2,
        remove_unused_columns=False,
    )
    trainer = GuardedTrainer.__new__(GuardedTrainer)
    trainer.args, trainer.processing_class = args, None
    for dataset in (rows, Dataset.from_list(rows)):
        trainer.train_dataset = dataset
        sampler = trainer._get_train_sampler()
        assert isinstance(sampler, LengthGroupedSampler)
        pairs = np.array([lengths[index] for index in sampler]).reshape(-1, 2)
        # At random, the lengths of two clips differ by 21 in the mean.
        assert np.abs(np.diff(pairs)).mean() < 8


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_tensorboard_gets_the_losses(command, compressed, dense_wav2vec2, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    # The evaluation after training opens a file of its own, named by the second and the host. A run this short would
    # overwrite the file of its training.
    monkeypatch.setattr("tensorboardX.event_file_writer.socket.gethostname", lambda: uuid4().hex)
    words = [command, compressed["wav2vec2"], *CLIPS, *TRAINING, "--report_to", "tensorboard"]
    words += SPELLING if command == "finetune" else ["--teacher", dense_wav2vec2, "--keep", "always"]
    assert hrt(*words, "--out", tmp_path / "out") == 0
    content = b"".join(file.read_bytes() for file in (tmp_path / "board").glob("events.out.tfevents.*"))
    assert b"train/loss" in content and b"train/grad_norm" in content
    assert (tmp_path / "out" / "model.safetensors").is_file()
