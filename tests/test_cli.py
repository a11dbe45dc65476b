"""The command `hrt`, run in this process on tiny random models and a handful of the sample's clips."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
from conftest import (
    CLIPS,
    SAMPLE,
    TRAINING,
    logged,
    moved,
    randomize_,
    speech,
    tiny_wav2vec2_config,
    tiny_whisper_config,
    wav2vec2_processor,
    whisper_generation_config,
    whisper_processor,
)
from tiny_families import dense_model
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    Wav2Vec2ForCTC,
    WhisperForConditionalGeneration,
)

import hrt_cli
from hf_residual_transformer import (
    ResidualConfig,
    ResidualWav2Vec2ForCTC,
    ResidualWhisperForAudioClassification,
    ResidualWhisperForConditionalGeneration,
    size_report,
)

COMMANDS = list(hrt_cli.COMMANDS)
DATA = ["--audio", SAMPLE, *CLIPS]
# Of every command that needs more than a model, what is needed beside it.
NEEDED = {
    "compress": DATA,
    "distill": ["--teacher", "nowhere/at-all", *DATA],
    "finetune": DATA,
    "evaluate": DATA,
    "export": [],
}


def run(*words: Any) -> int:
    return hrt_cli.main([str(word) for word in words])


def refused(capsys, *words: Any) -> str:
    """What a command that ends with status 2 says, on one line."""
    assert run(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hrt ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"hrt {words[0]}: error: ")
    return lines[0]


def misused(capsys, *words: Any) -> str:
    """What the parser says of words that it cannot read."""
    with pytest.raises(SystemExit) as exit_info:
        run(*words)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


class TestHelp:
    def test_no_parser_imports_torch_or_transformers(self):
        code = "import sys, hrt_cli; hrt_cli.overview_parser().format_help(); "
        code += "[hrt_cli.command_parser(name).format_help() for name in hrt_cli.COMMANDS]; "
        code += "print({'torch', 'transformers', 'numpy', 'hf_residual_transformer'} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"

    def test_the_overview_names_every_command(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            run("--help")
        assert exit_info.value.code == 0
        text = capsys.readouterr().out
        for name in COMMANDS:
            assert re.search(rf"^    {name} +\w", text, re.MULTILINE)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_is_short_and_starts_with_one_example_on_its_own_lines(self, name, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as exit_info:
            run(name, "--help")
        assert exit_info.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        example = next(i for i, line in enumerate(lines) if line.startswith(f"    hrt {name} "))
        assert example < 6
        assert lines[example - 1] == ""
        assert len(lines) < 70
        assert max(map(len, lines)) <= 120

    @pytest.mark.parametrize("name", COMMANDS)
    def test_the_example_is_a_command_that_can_be_read(self, name):
        example = re.search(r"^    hrt \w+ (.+(?:\\\n.+)*)", hrt_cli.COMMANDS[name].__doc__, re.MULTILINE)
        words = re.sub(r"\\\n", " ", example[1]).split()
        parser = hrt_cli.command_parser(name)
        args, unknown = parser.parse_known_args(hrt_cli.options.expand(parser, words))
        assert vars(args)
        options = {word for word in unknown if word.startswith("--")}
        assert options <= {"--max-steps", "--per-device-train-batch-size", "--learning-rate"}

    def test_the_options_of_the_trainer_are_listed_on_request(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            run("distill", "--help-trainer")
        assert exit_info.value.code == 0
        assert "--warmup_steps" in capsys.readouterr().out

    def test_defaults_that_help_states_are_those_of_the_package(self):
        from hf_residual_transformer.compression.conversion import BUDGETS
        from hf_residual_transformer.quantization import BITS, BLOCK, MOST, ROTATION
        from hf_residual_transformer.training.arguments import DistillationArguments, TrainingDataArguments
        from hf_residual_transformer.training.recipe import WINDOW_SECONDS
        from hf_residual_transformer.training.trainers import TEMPERATURE

        stated = {}
        for name in ("compress", "distill"):
            text = " ".join(hrt_cli.command_parser(name).format_help().split())
            for option in text.split(" --"):
                stated |= dict(re.findall(r"^([\w-]+) .*\(default: ([\d.]+)[);]", option))
        losses = DistillationArguments()
        assert int(stated["block-size"]) == BLOCK
        assert int(stated["rotation"]) == ROTATION
        assert float(stated["size"]) == BUDGETS[BITS]
        assert int(stated["bits"]) == MOST
        assert float(stated["window-seconds"]) == WINDOW_SECONDS
        for name in ("final", "hidden", "logits", "labels"):
            assert float(stated[f"{name}-weight"]) == getattr(losses, f"{name}_weight")
        assert float(stated["temperature"]) == TEMPERATURE
        assert int(stated["shuffle-buffer"]) == TrainingDataArguments().shuffle_buffer

    def test_it_runs_as_a_module(self):
        done = subprocess.run(
            [sys.executable, "-m", "hrt_cli", "report", "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "hrt report MODEL" in done.stdout


class TestErrors:
    @pytest.mark.parametrize("name", list(NEEDED))
    def test_an_output_folder_with_files_is_left_alone(self, name, tmp_path, capsys):
        (tmp_path / "model.safetensors").write_text("precious")
        message = refused(capsys, name, "nowhere/at-all", *NEEDED[name], "--out", tmp_path)
        assert "already holds files" in message and "--overwrite" in message
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        assert (tmp_path / "model.safetensors").read_text() == "precious"

    @pytest.mark.parametrize("name", ["compress", "finetune"])
    def test_a_full_disk_is_found_before_the_work(self, name, dense_whisper, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        monkeypatch.setattr("transformers.Trainer.train", None)
        monkeypatch.setattr("hf_residual_transformer.compression.conversion.convert", None)
        training = TRAINING if name != "compress" else ["--device", "cpu"]
        message = refused(capsys, name, dense_whisper, *DATA, *training, "--out", tmp_path / "out")
        assert re.search(r"0 MB free for the output folder .*out.* MB will be written; make room", message)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", list(NEEDED))
    def test_an_unknown_model_leaves_no_folder(self, name, tmp_path, capsys):
        message = refused(capsys, name, "nobody/nothing", *NEEDED[name], "--out", tmp_path / "new" / "out")
        assert "cannot be loaded from the Hub" in message
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", [name for name, needed in NEEDED.items() if needed])
    def test_an_error_in_the_work_leaves_no_folder_but_one_that_was_there(
        self, name, compressed, dense_whisper, tmp_path, monkeypatch, capsys
    ):
        def fail(*args, **kwargs):
            raise OSError("the work failed")

        monkeypatch.setattr("transformers.Trainer.train", fail)
        monkeypatch.setattr("hf_residual_transformer.compression.conversion.convert", fail)
        monkeypatch.setattr("hf_residual_transformer.speech.metrics.evaluate_asr", fail)
        model = compressed["whisper"] if name == "distill" else dense_whisper
        words = [name, model, *DATA, *(TRAINING if name in ("distill", "finetune") else ["--device", "cpu"])]
        words += ["--teacher", dense_whisper] if name == "distill" else []
        (tmp_path / "old").mkdir()
        for folder in (tmp_path / "new" / "out", tmp_path / "old"):
            assert "the work failed" in refused(capsys, *words, "--out", folder)
        assert [path.name for path in tmp_path.iterdir()] == ["old"]

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (["--rank_pattern", "fc2=64"], "`rank_pattern` must be JSON"),
            (["--bits", "four"], "`bits` must be JSON, got 'four'"),
            (["--rank", "4", "--bits", "1"], "`shared_bits` must be from 2 to 8"),
            (["--size", "0.5", "--rank", "4"], "must not be set with --size alone"),
            (["--size", "0.5", "--target-modules", "fc1", "fc2"], "must not be set with --size alone"),
            (["--size", "0.5", "--diagonal", "all"], "must not be set with --size alone"),
            (["--size", "0.5", "--share-biases"], "must not be set with --size alone"),
            (["--rank", "4", "--bits", "4", "--rotation", "3"], "`rotation` must be one of 1, 16"),
            (["--rank", "4", "--bits", "4", "--block-size", "48"], "`block_size` must be one of 32"),
            (["--size", "0.5", "0.5"], "--size must have each size once, got 0.5 0.5"),
            (["--rank", "4", "--rotation", "16"], "--block-size and --rotation are of matrices in few bits"),
            (
                ["--bits", "none", "--block-size", "64"],
                "--block-size and --rotation are of matrices in few bits",
            ),
            (["--rank", "4", "--parts", "encoder"], "--parts must not be set with the precise form"),
            (["--start", "svd", "--size", "0.5"], "--size must not be set with --start svd"),
            (["--num-windows", "0"], "--num-windows above 0 are needed"),
            (["--whisper-cpp", "--size", "0.31"], "--whisper-cpp has a form of its own"),
            (["--whisper-cpp", "--rank", "4"], "--whisper-cpp has a form of its own"),
        ],
    )
    def test_compress_refuses_settings_before_it_makes_a_folder(self, options, problem, tmp_path, capsys):
        message = refused(capsys, "compress", "a/b", *DATA, *options, "--out", tmp_path / "out")
        assert problem in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["compress", "evaluate"])
    @pytest.mark.parametrize("device", ["moon", "cuda:99"])
    def test_a_device_that_is_not_here_is_named(self, command, device, dense_whisper, tmp_path, capsys):
        message = refused(
            capsys, command, dense_whisper, *DATA, "--device", device, "--out", tmp_path / "out"
        )
        assert f"`device` must be one that torch can use here, such as cpu, got '{device}'" in message

    def test_a_folder_that_is_missing_is_no_matter_of_repo_ids(self, tmp_path, capsys):
        message = refused(capsys, "evaluate", tmp_path / "no" / "such", *DATA)
        assert "there is no such folder" in message and str(tmp_path) in message

    def test_compress_needs_audio_but_for_the_start_from_weights(self, dense_whisper, tmp_path, capsys):
        message = refused(capsys, "compress", dense_whisper, "--out", tmp_path / "out")
        assert "--audio" in message and "--start svd" in message
        options = ["--start", "svd", "--rank", 4, "--device", "cpu"]
        assert run("compress", dense_whisper, *options, "--out", tmp_path / "out") == 0
        assert json.loads((tmp_path / "out" / "compression.json").read_text())["data"] is None

    def test_compress_refuses_models_that_are_compact(self, compressed, tmp_path, capsys):
        for family, model in compressed.items():
            words = ["compress", model, *DATA, "--out", tmp_path / f"{family} again"]
            assert f"a residual_{family}" in refused(capsys, *words)

    @pytest.mark.parametrize(
        ("words", "problem"),
        [
            (["compress", "model", "--out", "out", "--rnak", "4"], "unrecognized arguments: --rnak"),
            (["compress", "model"], "the following arguments are required: --out"),
            (
                ["distill", "s", "--teacher", "t", "--audio", "a", "--out", "o", "--max_step", "4"],
                "--max-step;",
            ),
            (["distill", "s", "--audio", "a", "--out", "o"], "required: --teacher"),
            (
                ["finetune", "m", "--audio", "a", "--out", "o", "--max_steps", "few"],
                "invalid int value: 'few'",
            ),
            (["compress", "--size", "0.5", "model", "--out", "o"], "MODEL must come before them"),
            (["compress", "model", "--size", "0.5", "2", "--out", "o"], "at most 1, got 2"),
            (["squeeze"], "invalid choice: 'squeeze'"),
        ],
    )
    def test_options_that_there_are_not_end_with_status_2(self, words, problem, capsys):
        assert problem in misused(capsys, *words)

    def test_a_model_that_no_hub_gives_has_one_line_with_the_way_without(self, tmp_path, capsys):
        words = ["compress", "openai/whisper-base", *DATA, "--out", tmp_path / "a"]
        message = refused(capsys, *words)
        assert "`python research/pretrained.py openai/whisper-base`" in message
        message = refused(capsys, "report", "nobody/nothing")
        assert "cannot be loaded from the Hub" in message and "pretrained.py" not in message

    def test_a_traceback_is_shown_on_request(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HRT_DEBUG", "1")
        with pytest.raises(FileNotFoundError):
            run("report", tmp_path / "options.json")

    def test_options_of_another_family_are_refused(self, dense_whisper, dense_wav2vec2, tmp_path, capsys):
        words = ["finetune", dense_whisper, *DATA, *TRAINING, "--remove", "x", "--out", tmp_path / "a"]
        assert "--remove is for CTC models" in refused(capsys, *words)
        words = ["finetune", dense_wav2vec2, *DATA, *TRAINING, "--task", "translate", "--out", tmp_path / "b"]
        assert "--task is for Whisper models" in refused(capsys, *words)

    def test_a_family_that_is_not_trained_here_is_refused(self, tmp_path, capsys):
        dense_model("parakeet_tdt").save_pretrained(tmp_path / "tdt")
        words = ["finetune", tmp_path / "tdt", *DATA, *TRAINING, "--out", tmp_path / "out"]
        assert "must be a Whisper or an encoder with CTC to be trained here, got a parakeet_tdt" in refused(
            capsys, *words
        )

    def test_a_dense_model_has_no_report(self, dense_whisper, capsys):
        assert "`model` must be a compact model as from `hrt compress`" in refused(
            capsys, "report", dense_whisper
        )


def test_a_classifier_has_a_report(tmp_path, capsys):
    config = tiny_whisper_config(residual_config=ResidualConfig(rank=2))
    model = ResidualWhisperForAudioClassification(config)
    model.save_pretrained(tmp_path)
    assert run("report", tmp_path) == 0
    assert capsys.readouterr().out.strip() == str(size_report(model))


def test_compress_leaves_a_residual_model_its_processor_and_a_report(compressed, dense_whisper):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(compressed["whisper"])
    assert isinstance(model, ResidualWhisperForConditionalGeneration)
    assert model.dtype == torch.float16
    assert model.config.residual_config.rank_pattern == {"fc2|output_dense": 6}
    assert model.generation_config.is_multilingual
    processor = AutoProcessor.from_pretrained(compressed["whisper"])
    assert processor.tokenizer.english_spelling_normalizer == {"colour": "color"}
    report = json.loads((compressed["whisper"] / "compression.json").read_text())
    assert (report["model"], report["model_is_path"]) == (dense_whisper.name, True)
    assert 0 < report["parameters"]["encoder"]["ratio"] < 1
    assert 0 <= report["conversion"]["mean_error"] < 1
    assert report["seconds"] > 0
    assert (report["data"]["dataset"], report["data"]["split"]) == ("sample", "train")
    assert isinstance(AutoModelForCTC.from_pretrained(compressed["wav2vec2"]), ResidualWav2Vec2ForCTC)


def test_compress_reads_a_file_of_options_and_either_spelling(dense_whisper, tmp_path, capsys):
    options = {"model": str(dense_whisper), "audio": str(SAMPLE), "language": "en", "max_samples": 6}
    options |= {"size": 0.5, "bits": "none", "max_seconds": 1.0, "num_windows": 4, "streaming": False}
    (tmp_path / "options.json").write_text(json.dumps({**options, "overwrite": True, "device": "cpu"}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("kept")
    words = ["--size=0.7", "--batch_size", 2, "--dtype", "float32", "--out", tmp_path / "out"]
    assert run("compress", tmp_path / "options.json", *words) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert report["parameters"]["encoder"]["ratio"] == pytest.approx(0.7, abs=0.05)
    assert report["residual_config"]["shared_bits"] is None
    assert (tmp_path / "out" / "note.txt").read_text() == "kept"
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    run("report", tmp_path / "out")
    assert capsys.readouterr().out.strip() in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": None}, ["--group-size=null"]),
        ({"bits": [2, 4, 8], "size": [0.5, 0.7]}, ["--bits=[2, 4, 8]", "--size", "0.5", "0.7"]),
        ({"bits": None, "language": None}, ["--bits=null"]),
        ({"group_size": {"fc1": None}, "rank": 0}, ['--group-size={"fc1": null}', "--rank=0"]),
    ],
)
def test_values_in_a_file_of_options_are_those_of_the_command(options, words, tmp_path):
    (tmp_path / "options.json").write_text(json.dumps({"model": "a/b", **options}))
    parser = hrt_cli.command_parser("compress")
    assert hrt_cli.expand(parser, [str(tmp_path / "options.json")]) == ["a/b", *words]


@pytest.mark.parametrize("option", ["--max-samples", "--max-seconds", "--source-sampling-rate"])
def test_an_option_of_zero_is_not_left_out(option, dense_whisper, tmp_path, capsys):
    words = ["compress", dense_whisper, "--audio", SAMPLE, option, 0, "--out", tmp_path / "out"]
    assert f"`{option[2:].replace('-', '_')}` must be" in refused(capsys, *words)


def test_compress_rounds_as_it_is_told_where_settings_are_given(dense_whisper, tmp_path):
    words = ["--start", "svd", "--rank", 4, "--bits", 4, "--device", "cpu", "--out", tmp_path / "out"]
    words += ["--target-modules", "fc2"]
    assert run("compress", dense_whisper, *words, "--block-size", 64, "--rotation", 16) == 0
    config = AutoConfig.from_pretrained(tmp_path / "out").residual_config
    assert (config.block_size, config.rotation, config.shared_bits) == (64, 16, 4)


def test_compress_writes_a_folder_for_each_of_several_sizes(dense_whisper, tmp_path):
    words = ["--audio", SAMPLE, "--language", "en", "--max-seconds", 1, "--max-samples", 6, "--device", "cpu"]
    words += ["--num-windows", 2, "--size", 0.5, 0.7]
    assert run("compress", dense_whisper, *words, "--out", tmp_path / "out") == 0
    ratios = {}
    for folder in sorted((tmp_path / "out").iterdir()):
        assert AutoModelForSpeechSeq2Seq.from_pretrained(folder).config.embedding_bits
        AutoProcessor.from_pretrained(folder)
        report = json.loads((folder / "compression.json").read_text())
        ratios[folder.name] = report["parameters"]["model_bytes"]["ratio"]
    assert list(ratios) == ["0.5", "0.7"]
    assert ratios["0.5"] <= 0.5 < ratios["0.7"] <= 0.7


def test_compress_needs_no_copy_of_the_dense_model(dense_whisper, tmp_path):
    words = ["--audio", SAMPLE, "--language", "en", "--max-seconds", 1, "--max-samples", 6, "--device", "cpu"]
    words += ["--num-windows", 2, "--size", 0.5]
    for name, options in (("small", ["--low-memory"]), ("plain", [])):
        assert run("compress", dense_whisper, *words, *options, "--out", tmp_path / name) == 0
    assert moved(tmp_path / "small", tmp_path / "plain") == set()


def test_distill_trains_on_packed_windows_without_transcripts(tmp_path, compressed, dense_whisper):
    output = tmp_path / "out"
    options = ["--window-seconds", 0.8, "--eval-split", "validation", "--out", output]
    # An option of the Trainer's may come first, and take nothing for itself.
    words = ["distill", "--seed", "1", compressed["whisper"], "--teacher", dense_whisper]
    assert run(*words, *DATA, *TRAINING, *options) == 0
    assert all(name.startswith("model.encoder.") for name in moved(compressed["whisper"], output))
    assert len(logged(output, "loss_final")) == 2
    assert "eval_loss" in json.loads((output / "eval_results.json").read_text())
    assert AutoProcessor.from_pretrained(output).tokenizer.english_spelling_normalizer
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(output)
    assert isinstance(loaded, ResidualWhisperForConditionalGeneration)


def test_a_distilled_model_is_saved_in_the_dtype_that_it_had(tmp_path, compressed, dense_whisper):
    half = tmp_path / "half"
    AutoModelForSpeechSeq2Seq.from_pretrained(compressed["whisper"]).half().save_pretrained(half)
    AutoProcessor.from_pretrained(compressed["whisper"]).save_pretrained(half)
    output = tmp_path / "out"
    words = ["distill", half, "--teacher", dense_whisper, *DATA, *TRAINING, "--eval-split", "validation"]
    assert run(*words, "--keep", "always", "--out", output) == 0
    assert AutoModelForSpeechSeq2Seq.from_pretrained(output).dtype == torch.float16
    assert moved(half, output)
    assert "eval_loss" in json.loads((output / "eval_results.json").read_text())


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_a_finetuned_model_is_saved_in_the_dtype_that_it_had(family, tmp_path, dense_whisper, dense_wav2vec2):
    folder, auto_class, options = {
        "whisper": (dense_whisper, AutoModelForSpeechSeq2Seq, []),
        "wav2vec2": (dense_wav2vec2, AutoModelForCTC, ["--text-case", "lower", "--remove", "[^a-z ]"]),
    }[family]
    half, output = tmp_path / "half", tmp_path / "out"
    shutil.copytree(folder, half)
    auto_class.from_pretrained(half).half().save_pretrained(half)
    assert run("finetune", half, *DATA, *TRAINING, *options, "--out", output) == 0
    assert auto_class.from_pretrained(output).dtype == torch.float16
    assert moved(half, output)


def test_distill_gives_short_windows_but_not_with_transcripts(tmp_path, compressed, dense_whisper, capsys):
    words = [
        "distill",
        compressed["whisper"],
        "--teacher",
        dense_whisper,
        *DATA,
        *TRAINING,
        "--short-windows",
    ]
    assert run(*words, "--eval-split", "none", "--out", tmp_path / "out") == 0
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").config.short_windows
    assert "`short_windows` must be false" in refused(
        capsys, *words, "--labels-weight", 1, "--out", tmp_path / "no"
    )


class TestWhatDistillKeeps:
    """The clips of the split "validation" decide, unless told otherwise."""

    def distil(self, compressed, dense_whisper, output, *options) -> tuple[set[str], dict[str, Any]]:
        words = ["distill", compressed["whisper"], "--teacher", dense_whisper, *DATA, *TRAINING]
        assert run(*words, *options, "--out", output) == 0
        return moved(compressed["whisper"], output), json.loads((output / "train_results.json").read_text())

    def test_a_better_result_is_saved(self, compressed, dense_whisper, tmp_path, caplog):
        options = ["--learning_rate", "1e-4", "--max_steps", 20, "--eval-split", "train"]
        names, results = self.distil(compressed, dense_whisper, tmp_path / "out", *options)
        assert names
        assert results["kept"] is True
        assert results["validation_loss_after"] < results["validation_loss_before"]
        assert "the student keeps its weights" not in caplog.text
        saved = json.loads((tmp_path / "out" / "eval_results.json").read_text())
        assert saved["eval_loss"] == pytest.approx(results["validation_loss_after"])

    @pytest.mark.parametrize("strategy", ["no", "steps"])
    def test_a_worse_one_is_not_which_is_said(self, strategy, compressed, dense_whisper, tmp_path, caplog):
        options = ["--learning_rate", "10", "--save_strategy", strategy]
        names, results = self.distil(compressed, dense_whisper, tmp_path / "out", *options)
        assert not names
        assert results["kept"] is False
        assert results["validation_loss_after"] >= results["validation_loss_before"]
        assert "the student keeps its weights as they were" in caplog.text
        checkpoint = tmp_path / "out" / "checkpoint-2"
        assert (f"the distilled weights are in {checkpoint}" in caplog.text) == (strategy == "steps")
        assert checkpoint.is_dir() == (strategy == "steps")
        if strategy == "steps":
            assert moved(compressed["whisper"], checkpoint)

    @pytest.mark.parametrize("options", [["--keep", "always"], ["--eval-split", "none"]])
    def test_a_worse_one_is_saved_on_request(self, options, compressed, dense_whisper, tmp_path, caplog):
        options = ["--learning_rate", "10", *options]
        names, results = self.distil(compressed, dense_whisper, tmp_path / "out", *options)
        assert names and "kept" not in results
        assert not caplog.text

    @pytest.mark.parametrize("streaming", [[], ["--streaming"]])
    def test_without_validation_clips_the_result_is_saved_which_is_said(
        self, streaming, compressed, dense_whisper, tmp_path, caplog
    ):
        (tmp_path / "clips").mkdir()
        for seed in range(2):
            soundfile.write(tmp_path / "clips" / f"{seed}.wav", speech(0.5, seed).numpy(), 16_000)
        # Of an option that is given twice, the last value counts.
        options = ["--learning_rate", "10", "--audio", tmp_path / "clips", *streaming]
        names, results = self.distil(compressed, dense_whisper, tmp_path / "out", *options)
        assert names and "kept" not in results
        assert "there are no validation clips to decide on: `split` must be 'train' or 'all'" in caplog.text

    def test_clips_that_are_trained_on_do_not_decide(self, compressed, dense_whisper, tmp_path, caplog):
        options = ["--learning_rate", "10", "--split", "validation"]
        names, _ = self.distil(compressed, dense_whisper, tmp_path / "out", *options)
        assert names
        assert "the split 'validation' is trained on" in caplog.text


def test_distill_takes_transcripts_where_a_loss_needs_them(tmp_path, compressed, dense_whisper, capsys):
    words = ["distill", compressed["whisper"], "--teacher", dense_whisper, *DATA, *TRAINING]
    options = ["--labels-weight", 0.5, "--logits_weight", 1, "--keep", "always", "--out", tmp_path / "out"]
    assert run(*words, *options) == 0
    assert any(name.startswith("model.decoder.") for name in moved(compressed["whisper"], tmp_path / "out"))
    for loss in ("final", "logits", "labels"):
        assert len(logged(tmp_path / "out", f"loss_{loss}")) == 2
    options = ["--labels-weight", 1, "--window-seconds", 0.5, "--out", tmp_path / "other"]
    assert "window_seconds" in refused(capsys, *words, *options)


def test_distill_trains_ctc_models_and_reads_a_file_of_options(tmp_path, compressed, dense_wav2vec2):
    options = {"student": str(compressed["wav2vec2"]), "teacher": str(dense_wav2vec2), "hidden_weight": 2.0}
    options |= {"learning_rates": {"shared": 0.0}, "keep": "always", "out": str(tmp_path / "out")}
    (tmp_path / "options.json").write_text(json.dumps(options))
    assert run("distill", tmp_path / "options.json", *DATA, *TRAINING) == 0
    names = moved(compressed["wav2vec2"], tmp_path / "out")
    assert names
    assert all(name.startswith("wav2vec2.encoder.") and ".shared." not in name for name in names)


def test_an_interrupted_distillation_goes_on_as_if_nothing_had_been(tmp_path, compressed, dense_whisper):
    words = ["distill", compressed["whisper"], "--teacher", dense_whisper, *DATA, *TRAINING]
    words += ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2]
    assert run(*words, "--out", tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert run(*words, "--out", tmp_path / "resumed", "--resume_from_checkpoint", "last") == 0
    assert not moved(tmp_path / "whole", tmp_path / "resumed")
    assert logged(tmp_path / "whole", "loss_final") == logged(tmp_path / "resumed", "loss_final")


@pytest.mark.parametrize("kind", ["dense", "residual"])
def test_finetune_trains_whichever_whisper_it_is_given(tmp_path, kind, compressed, dense_whisper):
    model = dense_whisper if kind == "dense" else compressed["whisper"]
    options = ["--freeze", "encoder", "--eval-split", "train", "--out", tmp_path / "out"]
    assert run("finetune", model, *DATA, *TRAINING, *options) == 0
    names = moved(model, tmp_path / "out")
    assert names
    assert all(name.startswith("model.decoder.") for name in names)
    assert "eval_loss" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, ResidualWhisperForConditionalGeneration) == (kind == "residual")


@pytest.mark.parametrize("kind", ["dense", "residual"])
def test_finetune_trains_whichever_ctc_model_it_is_given(tmp_path, kind, compressed, dense_wav2vec2):
    model = dense_wav2vec2 if kind == "dense" else compressed["wav2vec2"]
    options = ["--text-case", "lower", "--remove", "[^a-z ]"]
    options += ["--config_overrides", '{"ctc_loss_reduction": "mean"}', "--out", tmp_path / "out"]
    assert run("finetune", model, *DATA, *TRAINING, *options) == 0
    names = moved(model, tmp_path / "out")
    assert "lm_head.weight" in names
    assert not any(name.startswith("wav2vec2.feature_extractor.") for name in names)
    loaded = AutoModelForCTC.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, ResidualWav2Vec2ForCTC) == (kind == "residual")
    assert loaded.config.ctc_loss_reduction == "mean"


def test_finetune_refuses_characters_that_the_vocabulary_lacks(tmp_path, dense_wav2vec2, capsys):
    words = ["finetune", dense_wav2vec2, *DATA, *TRAINING, "--out", tmp_path / "out"]
    said = refused(capsys, *words)
    assert "the tokenizer has no" in said
    assert re.search(r"\.\w+ \(row \d+\) has a transcript that cannot be used", said), said


def test_streamed_data_trains_too(tmp_path, dense_whisper):
    options = ["--streaming", "--shuffle-buffer", 4, "--out", tmp_path / "out"]
    assert run("finetune", dense_whisper, *DATA, *TRAINING, *options) == 0
    assert moved(dense_whisper, tmp_path / "out")


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_evaluate_writes_its_results_and_overwrites_nothing(tmp_path, monkeypatch, family, capsys):
    torch.manual_seed(0)
    if family == "whisper":
        model = randomize_(WhisperForConditionalGeneration(tiny_whisper_config()))
        model.generation_config, processor = whisper_generation_config(), whisper_processor()
    else:
        model, processor = Wav2Vec2ForCTC(tiny_wav2vec2_config()), wav2vec2_processor(tmp_path)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "one.wav", speech(0.2).numpy(), 16_000)
    (tmp_path / "data.csv").write_text("file_name,text\none.wav,a bad cab\none.wav,bed\n")
    words = ["evaluate", tmp_path / "model", "--audio", tmp_path / "data.csv", "--split", "all"]
    words += ["--language", "en", "--max_new_tokens", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hrt", *map(str, words)])
    assert run(*words) == 0
    assert re.search(r"2 clips: WER \d+\.\d\d %, CER \d+\.\d\d %$", capsys.readouterr().out.strip())
    words += ["--out", tmp_path / "out"]
    assert run(*words) == 0
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (saved["clips"], saved["words"], saved["model"]) == (2, 4, "model")
    assert (saved["data"]["dataset"], saved["data"]["split"]) == ("data.csv", "all")
    assert saved["data"]["dataset_is_path"]
    assert saved["command"].startswith("hrt evaluate model --audio data.csv")
    assert saved["command"].startswith("hrt evaluate model --audio data.csv")
    assert "already holds files" in refused(capsys, *words)
    soundfile.write(tmp_path / "none.wav", speech(0.2).numpy()[:0], 16_000)
    (tmp_path / "data.csv").write_text("file_name,text\none.wav,a bad cab\nnone.wav,bed\n")
    words[-1] = tmp_path / "stopped"
    message = refused(capsys, *words, "--streaming", "--batch-size", "1")
    assert "none.wav holds no audio" in message and "1 clips were transcribed before; see" in message
    saved = json.loads((tmp_path / "stopped" / "partial-evaluation.json").read_text())
    assert (saved["clips"], saved["words"]) == (1, 3) and "none.wav holds no audio" in saved["stopped_by"]
