"""The scripts, run in this process on tiny random models and a handful of the sample's clips.

They call what `hrt` calls, which test_cli.py tests. These tests check that the options of each script arrive.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CLIPS, TRAINING, logged, moved
from transformers import AutoModelForCTC

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
NAMES = ["distill", "finetune_ctc", "finetune_seq2seq"]


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: Any) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


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
    options = ["--model", dense_whisper, *CLIPS, *TRAINING, "--output_dir", tmp_path / "out"]
    with pytest.raises(
        OSError, match=r"0 MB free for the output folder .*out.* MB will be written; make room"
    ):
        run(monkeypatch, "finetune_seq2seq", *options)
    assert not list((tmp_path / "out").iterdir())


def test_distill_takes_transcripts_where_a_loss_needs_them(monkeypatch, tmp_path, compressed, dense_whisper):
    models = ["--student", compressed["whisper"], "--teacher", dense_whisper]
    options = [
        "--labels_weight",
        0.5,
        "--logits_weight",
        1,
        "--keep",
        "always",
        "--output_dir",
        tmp_path / "out",
    ]
    run(monkeypatch, "distill", *models, *CLIPS, *TRAINING, *options)
    assert any(name.startswith("model.decoder.") for name in moved(compressed["whisper"], tmp_path / "out"))
    for loss in ("final", "logits", "labels"):
        assert len(logged(tmp_path / "out", f"loss_{loss}")) == 2
    with pytest.raises(ValueError, match="window_seconds"):
        options = ["--labels_weight", 1, "--window_seconds", 0.5, "--output_dir", tmp_path / "other"]
        run(monkeypatch, "distill", *models, *CLIPS, *TRAINING, *options)


def test_distill_trains_ctc_models_and_reads_a_file_of_options(
    monkeypatch, tmp_path, compressed, dense_wav2vec2
):
    options = {"student": str(compressed["wav2vec2"]), "teacher": str(dense_wav2vec2), "hidden_weight": 2.0}
    options |= {"learning_rates": {"shared": 0.0}, "keep": "always", "output_dir": str(tmp_path / "out")}
    (tmp_path / "options.json").write_text(json.dumps(options))
    run(monkeypatch, "distill", tmp_path / "options.json", *CLIPS, *TRAINING)
    names = moved(compressed["wav2vec2"], tmp_path / "out")
    assert names
    assert all(name.startswith("wav2vec2.encoder.") and ".shared." not in name for name in names)


def test_finetune_seq2seq_trains_what_is_not_frozen(monkeypatch, tmp_path, dense_whisper):
    options = ["--freeze", "encoder", "--eval_split", "train", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "finetune_seq2seq", "--model", dense_whisper, *CLIPS, *TRAINING, *options)
    names = moved(dense_whisper, tmp_path / "out")
    assert names
    assert all(name.startswith("model.decoder.") for name in names)
    assert "eval_loss" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


def test_finetune_ctc_respells_transcripts_and_changes_the_config(monkeypatch, tmp_path, compressed):
    options = ["--text_case", "lower", "--remove", "[^a-z ]", "--output_dir", tmp_path / "out"]
    options += ["--config_overrides", '{"ctc_loss_reduction": "mean", "attn_implementation": "eager"}']
    run(monkeypatch, "finetune_ctc", "--model", compressed["wav2vec2"], *CLIPS, *TRAINING, *options)
    names = moved(compressed["wav2vec2"], tmp_path / "out")
    assert "lm_head.weight" in names
    assert not any(name.startswith("wav2vec2.feature_extractor.") for name in names)
    assert AutoModelForCTC.from_pretrained(tmp_path / "out").config.ctc_loss_reduction == "mean"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--remove", "["], r"`remove` must be a regular expression, got '\['"),
        (["--config_overrides", "[]"], r"`config_overrides` must be a JSON object .* got '\[\]'"),
        (["--config_overrides", '{"dtype": "float16"}'], "fields of a wav2vec2's config, got .*dtype"),
        (["--config_overrides", '{"to_dict": 1}'], "fields of a wav2vec2's config, got .*to_dict"),
        (["--config_overrides", '{"layerdropp": 0.1}'], "fields of a wav2vec2's config, got .*layerdropp"),
        (["--lora_rank", "0"], "`lora_rank` must be at least 1, got 0"),
        (["--text_case", "upper", "--remove", "[^a-z ]"], r"leave nothing of 6 of 6 transcripts, such as "),
    ],
)
def test_options_that_cannot_be_are_refused_before_training(
    options, problem, monkeypatch, tmp_path, compressed
):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    words = ["--model", compressed["wav2vec2"], *CLIPS, *TRAINING, "--output_dir", tmp_path / "out", *options]
    with pytest.raises(ValueError, match=problem):
        run(monkeypatch, "finetune_ctc", *words, "--overwrite")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-5"]
