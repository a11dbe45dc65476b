"""Interrupted, repeated and spoilt runs: what is refused, what is set aside, and what a checkpoint remembers."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import logged, moved
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import Seq2SeqTrainingArguments

import hrt_cli
from hf_residual_transformer.folders import adopt, complete_folder, prepare_output_dir, unfinished
from hf_residual_transformer.training.arguments import TrainingDataArguments, warn_of_slow_bfloat16
from hf_residual_transformer.training.checkpoints import fault_of, last_checkpoint
from hf_residual_transformer.training.running import run_training
from hf_residual_transformer.training.scratch import ModelSizes, average_checkpoints

TRAINING = [
    "--use_cpu",
    "--per_device_train_batch_size",
    "2",
    "--logging_steps",
    "1",
    "--disable_tqdm",
    "true",
]
TRAINING += [
    "--report_to",
    "none",
    "--save_strategy",
    "steps",
    "--save_steps",
    "1",
    "--learning_rate",
    "1e-3",
]


def table(folder, texts, seconds=0.5):
    """A folder of noise with these transcripts."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = [("file_name", "text")]
    for number, text in enumerate(texts):
        soundfile.write(
            folder / f"{number}.wav", 0.1 * generator.standard_normal(int(seconds * 16_000)), 16_000
        )
        rows.append((f"{number}.wav", text))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def finetune(model, audio, out, *more):
    return hrt_cli.main(
        [
            "finetune",
            str(model),
            "--audio",
            str(audio),
            "--out",
            str(out),
            *TRAINING,
            "--max_steps",
            "2",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return table(tmp_path_factory.mktemp("clips") / "data", ["abc", "bad", "cab", "face"])


@pytest.fixture(scope="module")
def whole(dense_wav2vec2, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finetune(dense_wav2vec2, clips, out) == 0
    return out


def test_last_is_the_newest_complete_checkpoint_and_a_half_one_is_named_and_skipped(
    whole, dense_wav2vec2, clips, tmp_path, caplog
):
    assert not [*whole.parent.glob("**/*.unfinished")]
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "run.json"):
        for damage in ("cut", "gone"):
            if (name, damage) == ("run.json", "gone"):
                continue
            out = tmp_path / f"{name}-{damage}"
            shutil.copytree(whole, out)
            path = out / "checkpoint-2" / name
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2]) if damage == "cut" else path.unlink()
            caplog.clear()
            assert last_checkpoint(out) == out / "checkpoint-1", (name, damage)
            assert "checkpoint-2 is not complete, and is skipped" in caplog.text
    shutil.copytree(whole, tmp_path / "resumed")
    (tmp_path / "resumed/checkpoint-2/optimizer.pt").write_bytes(b"")
    assert finetune(dense_wav2vec2, clips, tmp_path / "resumed", "--resume_from_checkpoint", "last") == 0
    assert not moved(whole, tmp_path / "resumed")
    assert fault_of(tmp_path / "resumed/checkpoint-2") is None


def test_the_checkpoint_of_another_run_is_refused_with_what_differs(
    whole, dense_wav2vec2, clips, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    other = table(tmp_path / "other", ["abc", "bad", "cab", "face"])
    resume = ("--resume_from_checkpoint", "last")
    for model, audio, more, named in (
        (dense_wav2vec2, clips, ("--weight_decay", "0.5"), "its options.weight_decay is 0.0"),
        (dense_wav2vec2, other, (), "its data.dataset is"),
        (dense_wav2vec2, clips, ("--train-feature-encoder",), "its trained_parameters is"),
        (dense_wav2vec2, clips, ("--remove", "[a-c]"), "its data.spelling is"),
        (whole, clips, (), "its student is"),
    ):
        assert finetune(model, audio, out, *resume, *more) == 2
        message = capsys.readouterr().err
        assert "belongs to another run" in message and named in message


def test_a_run_may_become_longer_and_says_so_but_not_shorter_than_it_is(
    whole, dense_wav2vec2, clips, tmp_path, capsys, caplog
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    resume = ("--resume_from_checkpoint", "last", "--max_steps")
    assert finetune(dense_wav2vec2, clips, out, *resume, "1") == 2
    assert "`max_steps` must be at least 2, the steps of" in capsys.readouterr().err
    assert finetune(dense_wav2vec2, clips, out, *resume, "3") == 0
    assert "options.max_steps was 2, and now is 3: the learning rate follows the new length" in caplog.text
    assert len(logged(out, "loss")) == 3 and moved(whole, out)
    assert last_checkpoint(out) == out / "checkpoint-3"


@pytest.fixture
def train(clips):
    """Trains a Whisper from scratch for two steps, with a checkpoint for each."""
    sizes = ModelSizes(
        encoder_layers=1, d_model=16, encoder_ffn_dim=16, attention_heads=2, decoder_layers=1, decoder_ffn_dim=16,
        num_mel_bins=16, window_seconds=1, max_tokens=12,
    )  # fmt: skip

    def train(out, average=2, **options):
        args = Seq2SeqTrainingArguments(
            str(out), max_steps=2, save_steps=1, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True,
            report_to="none", disable_tqdm=True, logging_steps=1, **options,
        )  # fmt: skip
        run_training(
            sizes, TrainingDataArguments(str(clips)), args, vocab_size=40, average_checkpoints=average
        )

    return train


@pytest.mark.parametrize("average", [2, 3])
def test_the_mean_is_of_all_weights_that_are_there_and_says_where_they_are_fewer(
    average, train, tmp_path, caplog
):
    train(tmp_path / "out", average, save_only_model=True)
    expected = average_checkpoints([tmp_path / "out/checkpoint-1", tmp_path / "out/checkpoint-2"])
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(value, expected[name]), name
    assert ("has 2 checkpoints with complete weights: the model is their mean" in caplog.text) == (
        average == 3
    )


def test_several_gpus_in_one_process_are_refused_from_scratch_too(train, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(ValueError, match="each process must use one GPU, got 2; start one process for each"):
        train(tmp_path / "out")


def test_a_half_checkpoint_of_training_from_scratch_is_skipped_too(train, tmp_path, caplog):
    train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "out/checkpoint-2/optimizer.pt").write_bytes(b"")
    train(tmp_path / "out", resume_from_checkpoint="last")
    assert "checkpoint-2 is not complete, and is skipped" in caplog.text
    assert not moved(tmp_path / "whole", tmp_path / "out")
    assert fault_of(tmp_path / "out/checkpoint-2") is None
    with pytest.raises(ValueError, match=r"belongs to another run: its student is"):
        train(tmp_path / "out", resume_from_checkpoint="last", seed=1)


def test_overwriting_sets_old_checkpoints_aside_so_that_last_cannot_mean_them(
    whole, dense_wav2vec2, clips, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    bad = table(tmp_path / "bad", ["a" * 3000])
    assert finetune(dense_wav2vec2, bad, out, "--overwrite") == 2
    assert not (out / "_earlier-run-1").exists(), "nothing is moved by a command that is refused"
    assert finetune(dense_wav2vec2, clips, out, "--overwrite", "--save_strategy", "no") == 0
    assert sorted(path.name for path in (out / "_earlier-run-1").iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    capsys.readouterr()
    assert finetune(dense_wav2vec2, clips, out, "--resume_from_checkpoint", "last") == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_transcript_that_is_too_long_for_its_frames_is_refused_by_name_before_training(
    dense_wav2vec2, tmp_path, capsys
):
    audio = table(tmp_path / "data", ["abc", "a" * 300], seconds=0.5)
    assert finetune(dense_wav2vec2, audio, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "1.wav" in message and "its transcript needs 599 frames" in message
    assert not (tmp_path / "out").exists()


def test_metrics_that_a_killed_run_left_in_pieces_are_written_anew(dense_wav2vec2, clips, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "all_results.json").write_text("")
    assert finetune(dense_wav2vec2, clips, out, "--overwrite") == 0
    assert json.loads((out / "all_results.json").read_text())["epoch"]


def test_a_batch_of_clips_without_words_is_learnt_from(dense_wav2vec2, tmp_path):
    audio = table(tmp_path / "data", ["", ""])
    assert finetune(dense_wav2vec2, audio, tmp_path / "out") == 0
    assert len(logged(tmp_path / "out", "loss")) == 2 and moved(dense_wav2vec2, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "a"])
def test_a_clip_that_makes_no_frame_is_refused_by_name_before_training(
    text, dense_wav2vec2, tmp_path, capsys
):
    audio = table(tmp_path / "data", ["abc", text])
    soundfile.write(audio / "1.wav", np.ones(8) / 2, 16_000)
    for more, place in ((), "row 1"), (("--streaming",), "a row of the stream"):
        assert finetune(dense_wav2vec2, audio, tmp_path / "out", *more) == 2
        message = capsys.readouterr().err
        assert f"1.wav ({place}) must be longer than the model's receptive field, got 8 samples" in message


def test_a_transcript_that_is_too_long_for_the_decoder_is_refused_by_name_before_training(
    dense_whisper, tmp_path, capsys
):
    audio = table(tmp_path / "data", ["abc", "a" * 300])
    assert finetune(dense_whisper, audio, tmp_path / "out", "--language", "en") == 2
    message = capsys.readouterr().err
    assert "row 1" in message and "tokens, and the model has 40" in message


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_a_clip_longer_than_the_window_is_refused_by_name_before_training(
    command, dense_whisper, compressed, tmp_path, capsys
):
    audio = table(tmp_path / "data", ["abc", "bad"])
    soundfile.write(audio / "1.wav", np.ones(16_001) / 2, 16_000)
    model, more = (
        (dense_whisper, []) if command == "finetune" else (compressed["whisper"], ["--labels-weight", "1"])
    )
    more += ["--teacher", str(dense_whisper)] if command == "distill" else []
    words = [command, str(model), "--audio", str(audio), "--out", str(tmp_path / "out"), "--language", "en"]
    assert hrt_cli.main([*words, *TRAINING, "--max_steps", "2", *more]) == 2
    assert "1.wav (row 1) must be of at most 1 seconds" in capsys.readouterr().err


def test_a_run_whose_loss_is_not_finite_stops_and_names_the_step_and_the_texts(
    dense_wav2vec2, tmp_path, capsys
):
    clips = table(tmp_path / "data", ["abba", "feed"])
    assert (
        finetune(dense_wav2vec2, clips, tmp_path / "out", "--learning_rate", "1e30", "--max_grad_norm", "0")
        == 2
    )
    message = capsys.readouterr().err
    assert "the loss must be finite, got" in message and "in the batch of step 2" in message
    assert "'abba'" in message and "'feed'" in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("capability", "warns"), [("AVX2", True), ("AVX512", False)])
def test_slow_bfloat16_is_said_before_training(capability, warns, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for bf16 in (True, False):
        args = Seq2SeqTrainingArguments(str(tmp_path / "out"), bf16=bf16, use_cpu=True, report_to="none")
        caplog.clear()
        warn_of_slow_bfloat16(args)
        assert ("several times slower" in caplog.text) == (warns and bf16)


NEW, OLD = (
    {"config.json": "new", "model.safetensors": "new", "onnx/graph.onnx": "new"},
    {"config.json": "old", "model.safetensors": "old", "notes.txt": "old"},
)


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def files_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def mount(monkeypatch, volume):
    """Lets `os.replace` refuse what the kernel refuses where `volume` is mounted."""
    replace = os.replace

    def refusing(source, target):
        source, target = Path(source).resolve(), Path(target).resolve()
        if volume in (source, target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        if (volume in source.parents) != (volume in target.parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr("os.replace", refusing)


@pytest.mark.parametrize("old", [{}, OLD], ids=["empty", "overwritten"])
@pytest.mark.parametrize("kind", ["mounted", "linked", "working"])
def test_a_folder_that_is_there_gets_the_result_whatever_it_is(kind, old, tmp_path, monkeypatch):
    folder = out = tmp_path / "volume"
    out.mkdir()
    write_files(folder, old)
    if kind == "mounted":
        mount(monkeypatch, folder)
    elif kind == "linked":
        out = tmp_path / "link"
        out.symlink_to(folder, target_is_directory=True)
    else:
        monkeypatch.chdir(folder)
        out = Path(".")
    with complete_folder(prepare_output_dir(out, overwrite=bool(old))) as new:
        write_files(new, NEW)
        assert files_in(folder) != NEW
    assert files_in(folder) == {**old, **NEW}
    assert set(tmp_path.iterdir()) == {folder, out.absolute()}


def test_a_link_to_no_folder_yet_leads_to_the_new_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "volume" / "model", target_is_directory=True)
    with complete_folder(prepare_output_dir(tmp_path / "link", overwrite=False)) as new:
        write_files(new, NEW)
    assert (tmp_path / "link").is_symlink() and files_in(tmp_path / "volume" / "model") == NEW


def test_files_are_flushed_by_handles_that_may_write_as_windows_wants_it(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fsync", lambda handle: flushed.append(os.write(handle, b"")))
    with complete_folder(tmp_path / "out") as new:
        write_files(new, NEW)
    assert len(flushed) == len(NEW)


@pytest.mark.parametrize("killed", [False, True])
def test_no_file_is_lost_where_the_result_cannot_be_moved(killed, tmp_path, monkeypatch):
    replace = os.replace
    for failing in range(1, 6):  # two old files go, three new ones come
        folder, calls = tmp_path / str(failing), []
        write_files(folder, OLD)
        new = unfinished(folder)
        write_files(new, NEW)

        def refusing(source, target, failing=failing, calls=calls):
            calls.append(target)
            if len(calls) == failing or (killed and len(calls) > failing):
                raise PermissionError("the file is open elsewhere")
            replace(source, target)

        monkeypatch.setattr("os.replace", refusing)
        with pytest.raises(OSError, match="open elsewhere") as error_info:
            adopt(new, folder)
        found = files_in(folder)
        if not killed:
            assert found == {**OLD, **{f"{new.name}/{name}": content for name, content in NEW.items()}}
            assert f"the whole result is in {new}: move it from there" in str(error_info.value)
        else:
            assert {
                name.removeprefix(f"{new.name}/replaced.unfinished/")
                for name, text in found.items()
                if text == "old"
            } == set(OLD)
            assert {
                name.removeprefix(f"{new.name}/") for name, text in found.items() if text == "new"
            } == set(NEW)
            if "config.json" in found:
                assert failing == 1 and found["config.json"] == "old" and found["model.safetensors"] == "old"


def test_what_a_killed_run_left_is_no_file_of_the_user_and_is_named_before_it_is_deleted(tmp_path, caplog):
    for out in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        left = unfinished(out)
        write_files(left, {"old.txt": "of a killed run"})
        caplog.clear()
        with complete_folder(prepare_output_dir(out, overwrite=False)) as new:
            write_files(new, NEW)
        assert f"{left} holds what an earlier run wrote before it was stopped" in caplog.text
        assert files_in(out) == NEW and not left.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_training(dense_wav2vec2, clips, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert finetune(dense_wav2vec2, clips, tmp_path / "file" / "out") == 2
    assert f"{tmp_path / 'file'} takes no new files" in capsys.readouterr().err


def test_only_complete_folders_are_pushed(whole, dense_wav2vec2, clips, tmp_path, monkeypatch):
    out, pushed = tmp_path / "out", []

    def start(trainer, **kwargs):
        trainer.hub_model_id, trainer.push_in_progress = "me/model", None

    def upload(*, folder_path, commit_message, ignore_patterns=None, **kwargs):
        names = [
            path.relative_to(folder_path).as_posix()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        ]
        names = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        pushed.append((commit_message, Path(folder_path).name, names, (out / "checkpoint-2").is_dir()))
        done = Future()
        done.set_result(None)
        return done

    shutil.copytree(whole, out)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", start)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload))
    monkeypatch.setattr("transformers.Trainer.create_model_card", lambda *args, **kwargs: None)
    assert (
        finetune(dense_wav2vec2, clips, out, "--overwrite", "--push_to_hub", "--hub_strategy", "checkpoint")
        == 0
    )
    assert [(message, folder) for message, folder, *_ in pushed] == [
        ("Training in progress, step 1", "out"),
        ("Training in progress, step 1, checkpoint", "checkpoint-1"),
        ("Training in progress, step 2", "out"),
        ("Training in progress, step 2, checkpoint", "checkpoint-2"),
        ("Model save", "out"),
    ]
    assert [complete for *_, complete in pushed] == [False, False, True, True, True]
    for _, folder, names, _ in pushed:
        assert "model.safetensors" in names and not [name for name in names if "/" in name]
        assert folder == "out" or {"optimizer.pt", "run.json"} <= names
