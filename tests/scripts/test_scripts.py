"""The command-line scripts, run in this process on tiny random models and a handful of the sample's clips."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor

from hf_residual_transformer import ResidualWav2Vec2ForCTC, ResidualWhisperForConditionalGeneration

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
NAMES = ["distill", "finetune_ctc", "finetune_seq2seq"]
DATA = ["--language", "en", "--max_seconds", "1.0", "--max_samples", "6"]
TRAINING = ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "3", "--logging_steps", "1"]
TRAINING += ["--learning_rate", "1e-3", "--save_strategy", "no", "--disable_tqdm", "true"]


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: Any) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def logged(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def moved(before: Path, after: Path) -> set[str]:
    old, new = weights_of(before), weights_of(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_commands_and_every_default(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, name, "--help")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert f"    python scripts/{name}.py" in text
    assert " \\\n" in text, "example commands are printed as written"
    assert "--output_dir" in text
    assert "(default: sample)" in text


@pytest.mark.parametrize("name", NAMES)
def test_an_output_folder_with_files_is_left_alone(name, monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    model = {"distill": ["--student", "nowhere/at-all"]}.get(name, ["--model", "nowhere/at-all"])
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(monkeypatch, name, *model, "--output_dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_a_full_disk_is_found_before_the_work(dense_whisper, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("transformers.Trainer.train", None)
    options = ["--model", dense_whisper, *DATA, *TRAINING, "--output_dir", tmp_path / "out"]
    with pytest.raises(
        OSError, match=r"0 MB free for the output folder .*out.* MB will be written; make room"
    ):
        run(monkeypatch, "finetune_seq2seq", *options)
    assert not list((tmp_path / "out").iterdir())


def test_distill_trains_on_packed_windows_without_transcripts(
    monkeypatch, tmp_path, compressed, dense_whisper
):
    output = tmp_path / "out"
    models = ["--student", compressed["whisper"], "--teacher", dense_whisper]
    options = ["--window_seconds", 0.8, "--eval_split", "validation", "--output_dir", output]
    run(monkeypatch, "distill", *models, *DATA, *TRAINING, *options)
    assert all(name.startswith("model.encoder.") for name in moved(compressed["whisper"], output))
    assert len(logged(output, "loss_final")) == 2
    assert "eval_loss" in json.loads((output / "eval_results.json").read_text())
    assert AutoProcessor.from_pretrained(output).tokenizer.english_spelling_normalizer
    assert isinstance(
        AutoModelForSpeechSeq2Seq.from_pretrained(output), ResidualWhisperForConditionalGeneration
    )


def test_distill_takes_transcripts_where_a_loss_needs_them(monkeypatch, tmp_path, compressed, dense_whisper):
    models = ["--student", compressed["whisper"], "--teacher", dense_whisper]
    options = ["--labels_weight", 0.5, "--logits_weight", 1, "--output_dir", tmp_path / "out"]
    run(monkeypatch, "distill", *models, *DATA, *TRAINING, *options)
    assert any(name.startswith("model.decoder.") for name in moved(compressed["whisper"], tmp_path / "out"))
    for loss in ("final", "logits", "labels"):
        assert len(logged(tmp_path / "out", f"loss_{loss}")) == 2
    with pytest.raises(ValueError, match="window_seconds"):
        options = ["--labels_weight", 1, "--window_seconds", 0.5, "--output_dir", tmp_path / "other"]
        run(monkeypatch, "distill", *models, *DATA, *TRAINING, *options)


def test_distill_trains_ctc_models_and_reads_a_file_of_options(
    monkeypatch, tmp_path, compressed, dense_wav2vec2
):
    options = {"student": str(compressed["wav2vec2"]), "teacher": str(dense_wav2vec2), "hidden_weight": 2.0}
    options |= {"learning_rates": {"shared": 0.0}, "output_dir": str(tmp_path / "out")}
    (tmp_path / "options.json").write_text(json.dumps(options))
    run(monkeypatch, "distill", tmp_path / "options.json", *DATA, *TRAINING)
    names = moved(compressed["wav2vec2"], tmp_path / "out")
    assert names
    assert all(name.startswith("wav2vec2.encoder.") and ".shared." not in name for name in names)


def test_an_interrupted_distillation_goes_on_as_if_nothing_had_been(
    monkeypatch, tmp_path, compressed, dense_whisper
):
    models = ["--student", compressed["whisper"], "--teacher", dense_whisper]
    options = [*models, *DATA, *TRAINING, "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2]
    run(monkeypatch, "distill", *options, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run(
        monkeypatch,
        "distill",
        *options,
        "--output_dir",
        tmp_path / "resumed",
        "--resume_from_checkpoint",
        "last",
    )
    assert not moved(tmp_path / "whole", tmp_path / "resumed")
    assert logged(tmp_path / "whole", "loss_final") == logged(tmp_path / "resumed", "loss_final")


@pytest.mark.parametrize("kind", ["dense", "residual"])
def test_finetune_seq2seq_trains_whichever_model_it_is_given(
    monkeypatch, tmp_path, kind, compressed, dense_whisper
):
    model = dense_whisper if kind == "dense" else compressed["whisper"]
    options = ["--freeze", "encoder", "--eval_split", "train", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "finetune_seq2seq", "--model", model, *DATA, *TRAINING, *options)
    names = moved(model, tmp_path / "out")
    assert names
    assert all(name.startswith("model.decoder.") for name in names)
    assert "eval_loss" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, ResidualWhisperForConditionalGeneration) == (kind == "residual")


@pytest.mark.parametrize("kind", ["dense", "residual"])
def test_finetune_ctc_trains_whichever_model_it_is_given(
    monkeypatch, tmp_path, kind, compressed, dense_wav2vec2
):
    model = dense_wav2vec2 if kind == "dense" else compressed["wav2vec2"]
    options = [
        "--text_case",
        "lower",
        "--remove",
        "[^a-z ]",
        "--config_overrides",
        '{"ctc_loss_reduction": "mean"}',
    ]
    run(
        monkeypatch,
        "finetune_ctc",
        "--model",
        model,
        *DATA,
        *TRAINING,
        *options,
        "--output_dir",
        tmp_path / "out",
    )
    names = moved(model, tmp_path / "out")
    assert "lm_head.weight" in names
    assert not any(name.startswith("wav2vec2.feature_extractor.") for name in names)
    loaded = AutoModelForCTC.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, ResidualWav2Vec2ForCTC) == (kind == "residual")
    assert loaded.config.ctc_loss_reduction == "mean"


def test_finetune_ctc_refuses_characters_that_the_vocabulary_lacks(monkeypatch, tmp_path, dense_wav2vec2):
    with pytest.raises(ValueError, match="the tokenizer has no"):
        run(
            monkeypatch,
            "finetune_ctc",
            "--model",
            dense_wav2vec2,
            *DATA,
            *TRAINING,
            "--output_dir",
            tmp_path / "out",
        )


def test_streamed_data_trains_too(monkeypatch, tmp_path, dense_whisper):
    options = ["--streaming", "--shuffle_buffer", 4, "--output_dir", tmp_path / "out"]
    run(monkeypatch, "finetune_seq2seq", "--model", dense_whisper, *DATA, *TRAINING, *options)
    assert moved(dense_whisper, tmp_path / "out")
