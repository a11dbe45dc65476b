"""The paper's grid end to end on a tiny scale: training, resuming, four bits, the table; and what it refuses."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import re
import shutil
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from two_processes import run_together

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.modeling import residual_linears
from hf_residual_transformer.training import scratch_parakeet
from hf_residual_transformer.training.clips import ctc_frames
from hf_residual_transformer.training.scratch import (
    ModelSizes,
    ScratchTrainer,
    average_checkpoints,
    check_transcripts,
    new_model,
    new_processor,
    train_tokenizer,
)

RESEARCH = Path(__file__).resolve().parent.parent.parent / "research"
sys.path.insert(0, str(RESEARCH))
MODULES = (
    "paper",
    "paper_bits",
    "paper_cells",
    "paper_checks",
    "paper_measures",
    "paper_models",
    "paper_scale",
    "paper_splits",
    "paper_summary",
    "paper_table",
    "words",
    "sentences",
)
(
    paper,
    paper_bits,
    paper_cells,
    paper_checks,
    paper_measures,
    paper_models,
    paper_scale,
    paper_splits,
    paper_summary,
    paper_table,
    words,
    spoken,
) = map(importlib.import_module, MODULES)
SpokenSentences = spoken.SpokenSentences
WordStrings, all_texts = words.WordStrings, words.all_texts

TINY = {
    "data": {"recognition": {"words": {"vocabulary": 3, "validation": 8, "test": 8}}},
    "sizes": {
        "encoder_layers": 3, "d_model": 32, "encoder_ffn_dim": 64, "attention_heads": 2, "decoder_layers": 1,
        "decoder_ffn_dim": 32, "num_mel_bins": 16, "hop_length": 320, "window_seconds": 2, "max_tokens": 12,
        "dropout": 0.0, "mask_time": 0.0, "mask_bands": 0.0,
    },
    "vocab_size": 40,
    "recipe": {
        "max_steps": 40, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "learning_rate": 3e-3,
        "warmup_steps": 0.1, "logging_steps": 10, "eval_strategy": "steps", "eval_steps": 20, "save_strategy": "steps",
        "save_steps": 20, "use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential",
    },
    "runs": [{"task": "recognition", "seeds": [0], "cells": ["dense", "k3-r2"]}],
}  # fmt: skip
SIZES = ModelSizes(**TINY["sizes"])
DATA = TINY["data"]["recognition"]
RUN = TINY["runs"][0]
WHISPERS_OWN = ("decoder_ffn_dim", "hop_length", "window_seconds", "max_tokens")


@pytest.fixture
def scale(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return paper_scale.Scale.read(path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(all_texts("en"), 40)


def test_a_grid_trains_resumes_exactly_and_writes_its_table(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "paper.py",
            "--scale",
            str(tmp_path / "tiny.yaml"),
            "--work",
            str(tmp_path / "work"),
            "--results",
            str(tmp_path / "results"),
        ],
    )
    paper.main()
    results = tmp_path / "results" / "tiny"
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert set(found) == {"recognition-dense-0", "recognition-k3-r2-0"}
    for values in found.values():
        losses = [loss for _, loss in values["losses"]]
        assert losses[-1] < 0.6 * losses[0]
        assert values["test"]["clips"] == 8
        assert 0 < values["test"]["nats_per_token"] < 10
        assert values["settings"] == scale.settings("recognition")
        assert 0 < values["cpu_seconds_per_step"] < 60
        assert 0 < values["seconds_per_step"] < 60
    table = (results / "table.md").read_text()
    assert "| K=3, R=2 | 1 |" in table
    assert "| K=3, R=2 | dense | 1 | " in table
    for figure in ("recognition", "recognition-ratios"):
        assert (results / f"{figure}.png").stat().st_size > 1000

    # What was killed while it wrote its second checkpoint ends where the whole run ended.
    cell = paper_cells.make_cells(SIZES)["k3-r2"]
    whole = tmp_path / "work" / "tiny" / "recognition-k3-r2-0"
    killed = tmp_path / "killed"
    (killed / "checkpoint-40").mkdir(parents=True)
    (whole / "checkpoint-20").rename(killed / "checkpoint-20")
    (killed / "checkpoint-40" / "model.safetensors").write_bytes(b"half")
    trainer, _, clock = paper.train(scale, "recognition", cell, 0, killed)
    assert clock.steps == 20
    before = average_checkpoints([whole / "checkpoint-40"])
    after = average_checkpoints([killed / "checkpoint-40"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(name.startswith("ctc_head") for name, _ in trainer.model.named_parameters())

    # One that was killed after its last checkpoint has no steps to measure.
    paper.run(scale, "recognition", "k3-r2", 0, tmp_path / "work" / "tiny", tmp_path / "again.json")
    values = json.loads((tmp_path / "again.json").read_text())
    assert values["cpu_seconds_per_step"] is values["seconds_per_step"] is None
    assert values["test"] == found["recognition-k3-r2-0"]["test"]

    # A run that has a file is skipped, and the table alone is written again.
    monkeypatch.setattr(paper, "run", None)
    paper.main()


def test_a_checkpoint_of_another_recipe_or_other_data_is_refused(scale, tmp_path):
    few = scale.recipe | {"max_steps": 2, "eval_strategy": "no", "save_steps": 2}
    scale = replace(scale, recipe=few)
    cell = paper_cells.make_cells(SIZES)["shallow"]
    paper.train(scale, "recognition", cell, 0, tmp_path)
    data = deepcopy(TINY["data"])
    data["recognition"]["words"]["speeds"] = [1.0]
    for changed, message in (
        (replace(scale, data=data), "data.data.words.speeds is None"),
        (replace(scale, recipe=few | {"adam_beta2": 0.98}), "data.recipe.adam_beta2 is None"),
        (replace(scale, sizes=scale.sizes | {"dropout": 0.1}), "data.sizes.dropout is 0.0"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-2 belongs to another run: its {message}"):
            paper.train(changed, "recognition", cell, 0, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"recipe": TINY["recipe"] | {"warmup_steps": 0.2}}, "`recipe.warmup_steps` was 0.1, and .* has 0.2"),
        (
            {"recipe": TINY["recipe"] | {"weight_decay": 0.1}},
            "`recipe.weight_decay` was None, and .* has 0.1",
        ),
        (
            {"data": {"recognition": {"words": DATA["words"] | {"test": 9}}}},
            "`data.words.test` was 8, and .* has 9",
        ),
        ({"sizes": TINY["sizes"] | {"dropout": 0.1}}, "`sizes.dropout` was 0.0, and .* has 0.1"),
        ({"vocab_size": 41}, "`vocab_size` was 40, and .* has 41"),
        ({"ctc_weight": 0.2}, "`ctc_weight` was 0.3, and .* has 0.2"),
        ({"average_checkpoints": 2}, "`average_checkpoints` was 1, and .* has 2"),
    ],
)
def test_a_finished_run_of_other_settings_is_refused_and_not_skipped(
    change, message, scale, tmp_path, monkeypatch
):
    result = tmp_path / "tiny" / "recognition-dense-0.json"
    result.parent.mkdir()
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"runs": [RUN | {"cells": ["dense"]}]} | change))
    monkeypatch.setattr(sys, "argv", ["paper.py", "--scale", str(path), "--results", str(tmp_path)])
    monkeypatch.setattr(paper, "run", None)
    monkeypatch.setattr(paper, "write_table", lambda folder: None)
    result.write_text(json.dumps({"settings": scale.settings("recognition")}))
    expected = nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with expected:
        paper.main()
    result.write_text("{}")  # an older run
    paper.main()


def grid_in_one_process(*words):
    """How many tables this process writes, as one of those that `accelerate launch` starts."""
    written = []
    write = paper.write_table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "write_table", lambda folder: written.append(write(folder)))
        patch.setattr(sys, "argv", ["paper.py", *words])
        paper.main()
    return len(written)


def test_the_first_of_two_processes_writes_the_files(tmp_path):
    steps = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "ddp_backend": "gloo"}
    runs = [{"task": "recognition", "seeds": [0], "cells": ["narrow"]}]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"recipe": TINY["recipe"] | steps, "runs": runs}))
    words = ["--scale", path, "--work", tmp_path / "work", "--results", tmp_path]
    assert run_together(grid_in_one_process, *map(str, words), joined=False) == [2, 0]
    assert [found.name for found in (tmp_path / "tiny").glob("*.json")] == ["recognition-narrow-0.json"]
    assert "| dense, narrower | 1 |" in (tmp_path / "tiny" / "table.md").read_text()


def test_a_grid_reads_data_sets_too(scale, tmp_path):
    data = {"dataset": "sample", "language": "en", "max_seconds": 1, "max_samples": 6}
    data |= {"train_split": "train", "validation_split": "train", "test_split": "test"}
    few = scale.recipe | {
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "eval_strategy": "no",
        "logging_steps": 1,
    }
    sizes = scale.sizes | {"max_tokens": 60}
    scale = replace(scale, data={"recognition": data}, sizes=sizes, vocab_size=60, recipe=few)
    paper.run(scale, "recognition", "k3-r2", 0, tmp_path / "work", tmp_path / "result.json")
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["test"]["clips"] == 6
    assert len(values["losses"]) == 2


def test_steps_are_measured_alone(monkeypatch):
    clock = paper.StepClock()
    assert clock.means() == {"cpu_seconds_per_step": None, "seconds_per_step": None}
    # Two steps of 1 and 3 seconds, and an evaluation between them.
    readings = iter((0.0, 1.0, 10.0, 13.0))
    times = SimpleNamespace(process_time=lambda: 2 * now, perf_counter=lambda: now)
    monkeypatch.setattr(paper, "time", times)
    for event in (clock.on_step_begin, clock.on_step_end) * 2:
        now = next(readings)
        event()
    assert clock.means() == {"cpu_seconds_per_step": 4.0, "seconds_per_step": 2.0}


def test_controls_are_as_large_as_the_paper_s_cell():
    sizes = replace(SIZES, encoder_layers=6, d_model=128, encoder_ffn_dim=512, attention_heads=4)
    cells = paper_cells.make_cells(sizes)
    target = paper_cells.encoder_size(sizes, cells["k3-r2"].residual)
    for name in ("shallow", "narrow", "low-rank"):
        size = paper_cells.encoder_size(replace(sizes, **cells[name].sizes), cells[name].residual)
        assert 0.95 * target < size < 1.05 * target, name


def test_cyclic_layers_share_with_the_layer_a_period_later(tokenizer):
    sizes = replace(SIZES, encoder_layers=6)
    model = new_model(sizes, tokenizer, paper_cells.make_cells(sizes)["k3-r2-cyclic"].residual)
    small, _ = paper_bits.with_four_bits(model, [{"input_features": torch.randn(8, 16, 100)}])
    for one in (model, small):
        banks = [linear.shared for path, linear in residual_linears(one) if path.endswith("fc1")]
        assert [bank is banks[0] for bank in banks] == [True, False, True, False, True, False]


@pytest.mark.parametrize("residual", [None, ResidualConfig.paper(3, 2)])
def test_four_bits_keep_the_outputs_of_a_parakeet_nearly(residual, monkeypatch):
    sizes = scratch_parakeet.ParakeetSizes(
        encoder_layers=3,
        d_model=32,
        encoder_ffn_dim=64,
        attention_heads=2,
        num_mel_bins=16,
        subsampling_channels=4,
    )
    architecture = paper_models.ARCHITECTURES["parakeet_ctc"]
    processor = architecture.processor(["one two"], 20, sizes)
    torch.manual_seed(0)
    model = architecture.model(sizes, processor, residual).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.0 if parameter.ndim < 2 else 2.0)  # so that branches count
    heard = {
        "input_features": torch.randn(4, 160, 16),
        "attention_mask": torch.ones(4, 160, dtype=torch.long),
    }
    errors = []
    for bits in (4, 8):
        monkeypatch.setattr(paper_bits, "BITS", bits)
        small, _ = paper_bits.with_four_bits(model, [heard])
        with torch.no_grad():
            found, expected = (one.encoder(**heard).last_hidden_state for one in (small, model))
        errors.append(((found - expected).square().mean() / expected.var()).item())
    assert 0 < 20 * errors[1] < errors[0] < 0.1


@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize("residual", [None, ResidualConfig.paper(3, 2)])
def test_four_bits_keep_the_outputs_of_a_trained_encoder_nearly(residual, scale_bits, tokenizer):
    torch.manual_seed(0)
    model = new_model(SIZES, tokenizer, residual).eval()
    features = torch.randn(8, 16, 100)
    small, num_bytes = paper_bits.with_four_bits(model, [{"input_features": features}], scale_bits)
    with torch.no_grad():
        expected = model.get_encoder()(features).last_hidden_state
        found = small.get_encoder()(features).last_hidden_state
    error = (found - expected).square().mean() / expected.var()
    assert 0 < error < 0.1
    assert num_bytes < (0.5 if residual is None else 0.9) * 2 * paper_cells.count_encoder(model)


def test_a_dense_model_as_a_residual_one_that_shares_nothing_is_the_same(tokenizer):
    model = new_model(SIZES, tokenizer).eval()
    features = torch.randn(2, 16, 100)
    other = paper_bits._one_matrix_a_layer(model)
    with torch.no_grad():
        torch.testing.assert_close(
            other.get_encoder()(features).last_hidden_state, model.get_encoder()(features).last_hidden_state
        )


def test_a_four_bit_model_is_on_the_device_of_the_model_that_it_comes_from(tokenizer):
    model = new_model(SIZES, tokenizer).to("meta")
    other = paper_bits._residual(model, ResidualConfig.paper(3, 2))
    assert {parameter.device.type for parameter in other.parameters()} == {"meta"}


def test_strings_depend_on_index_and_seed_alone_and_voices_are_in_one_split():
    one, again = (WordStrings("en", "train", 10, 2, seed=1) for _ in range(2))
    other = WordStrings("en", "train", 10, 2, seed=2)
    assert (one[7]["audio"]["array"] == again[7]["audio"]["array"]).all()
    assert any(one[i]["text"] != other[i]["text"] for i in range(10))
    voices = [set(WordStrings(language, split, 1, 3).voices) for language in ("en", "es")
              for split in ("train", "validation", "test")]  # fmt: skip
    assert not any(a & b for i, a in enumerate(voices) for b in voices[:i])


def test_a_seed_of_voices_gives_each_split_others_and_as_many():
    shuffled = [WordStrings("es", split, 1, 3, voices_seed=1) for split in ("train", "validation", "test")]
    assert [len(strings.voices) for strings in shuffled] == [18, 2, 6]
    assert len(set[str]().union(*(strings.voices for strings in shuffled))) == 26
    assert set(shuffled[2].voices) != set(WordStrings("es", "test", 1, 3).voices)
    test = WordStrings("es", "test", 30, 3)
    assert [test[index]["audio"]["path"] for index in range(30)] == [
        f"{test.voice(index)}-test-{index}" for index in range(30)
    ]


def test_translations_in_the_test_are_of_combinations_that_training_never_has():
    strings = [WordStrings("es", split, 300, 3) for split in ("train", "test")]
    sentences = [{split[index]["text"] for index in range(200)} for split in strings]
    of_three = [{text for text in texts if len(text.split()) == 3} for texts in sentences]
    assert not of_three[0] & of_three[1]


def test_sentences_that_do_not_fit_are_not_drawn():
    strings = WordStrings("es", "train", 60, 3)
    for clips in strings.voices.values():
        for word in clips:
            clips[word] = [np.ones(13_000, np.float32)] * 3
    assert {len(strings[index]["text"].split()) for index in range(60)} == {3}, "four words take 3.25 seconds"
    strings.seconds = 2
    with pytest.raises(
        ValueError, match="`seconds` must be long enough for sentences, got 2; none of 1000 by"
    ):
        strings[0]


@pytest.mark.parametrize(
    ("clips", "sizes", "message"),
    [
        (
            [("a.wav", "one été")],
            {},
            "text of a.wav must have only characters of the training split, got 'é'",
        ),
        ([("a.wav", "one two " * 9)], {}, "text of a.wav must have at most `max_tokens` = 12 tokens, got 4"),
        ([("b.wav", "zero " * 30)], {"max_tokens": 200}, "text of b.wav must fit the 50 encoder frames"),
        ([], {}, "every split must have clips, got an empty one"),
    ],
)
def test_texts_that_cannot_be_learnt_are_named(clips, sizes, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        check_transcripts(clips, tokenizer, replace(SIZES, **sizes), with_ctc=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_layers": 0}, "`encoder_layers` must be a whole number of at least 1, got 0"),
        ({"d_model": 33}, "`d_model` must be an even multiple of `attention_heads`"),
        ({"hop_length": 321}, "`window_seconds` must be a whole number of encoder frames"),
    ],
)
def test_sizes_that_cannot_be_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        replace(SIZES, **values)


def test_a_grid_with_an_unknown_cell_or_field_is_refused(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"runs": [{"task": "recognition", "seeds": [0], "cells": ["k4"]}]}))
    with pytest.raises(ValueError, match=r"`cells` must be of dense, .* got 'k4'"):
        list(paper_scale.Scale.read(path).all_runs())
    path.write_text(yaml.safe_dump(TINY | {"colour": 1}))
    with pytest.raises(ValueError, match=r"must hold the fields of a scale: .*colour"):
        paper_scale.Scale.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": [{"seeds": [0], "cells": ["dense"]}]}, "each of `runs` must have the field 'task'"),
        (
            {"runs": [{"task": "recognition", "cells": ["dense"]}]},
            "each of `runs` must have the field 'seeds'",
        ),
        ({"runs": [{"task": "recognition", "seeds": [0]}]}, "each of `runs` must have the field 'cells'"),
        ({"runs": [RUN | {"seeds": 0}]}, "`seeds` must be a list, got 0"),
        ({"runs": ["dense"]}, "each of `runs` must hold fields by name, got 'dense'"),
        ({"runs": [RUN | {"task": "translation"}]}, "`task` must be one of recognition, got 'translation'"),
        ({"data": {"summary": DATA}}, "`data` must have fields of recognition, translation, got 'summary'"),
        ({"data": {"recognition": None}}, "`data` of recognition must hold fields by name, got None"),
        (
            {"data": {"recognition": {}}},
            "which has no `words` and no `sentences`, must have the field 'train_split', got none",
        ),
        (
            {"data": {"recognition": {"words": {"vocabulary": 3, "test": 8}}}},
            "`words` of recognition must have the field 'validation', got test, vocabulary",
        ),
        (
            {"data": {"recognition": {"sentences": {"folder": "a", "validation": 8}}}},
            "`sentences` of recognition must have the field 'test', got folder, validation",
        ),
        (
            {"data": {"recognition": {"sentences": {"folder": 1, "validation": 8, "test": 8}}}},
            "`folder` in `sentences` of recognition must be the name of a folder, got 1",
        ),
        (
            {"data": {"recognition": {"sentences": {"folder": "a", "table": 1, "validation": 8, "test": 8}}}},
            "`table` in `sentences` of recognition must be the name of a table, got 1",
        ),
        *(
            (
                {
                    "data": {
                        "recognition": {
                            "sentences": {"folder": "a", "decibels": value, "validation": 8, "test": 8}
                        }
                    }
                },
                f"`decibels` in `sentences` of recognition must {message}",
            )
            for value, message in (
                (3, "be a list of two finite numbers, got 3"),
                ([1], r"be a list of two finite numbers, got \[1\]"),
                ([1, 2, 3], r"be a list of two finite numbers, got \[1, 2, 3\]"),
                ([1, "2"], r"be a list of two finite numbers, got \[1, '2'\]"),
                ([1, float("nan")], r"be a list of two finite numbers, got \[1, nan\]"),
                ([10, -5], r"have the lower number first, got \[10, -5\]"),
            )
        ),
        (
            {"data": {"recognition": {"sentences": {"folder": "a", "validation": 0, "test": 8}}}},
            "`validation` in `sentences` of recognition must be a whole number of at least 1, got 0",
        ),
        (
            {"model": "parakeet_tdt", "sizes": {"d_model": 32}},
            "`words` of recognition must have the field 'seconds'",
        ),
        ({"sizes": {"width": 32}}, "`sizes` must have fields of encoder_layers, .*got 'width'"),
        ({"sizes_of": {"recognition": {"width": 32}}}, "`sizes` must have fields of .*got 'width'"),
        ({"recipe": {}}, "`recipe` must have the field 'max_steps', got none"),
        (
            {"recipe": {**TINY["recipe"], "train_sampling_strategy": "random"}},
            "`train_sampling_strategy` of `recipe` must be sequential for synthetic clips, .*, got 'random'",
        ),
        ({"recipe": None}, "`recipe` must hold fields by name, got None"),
        ({"model": ["whisper"]}, r"`model` must be one of .*, got \['whisper'\]"),
        ({"runs": None}, "`runs` must be a list of tasks with their seeds and cells, got None"),
        ({"runs": []}, r"`runs` must be a list of tasks .*, got \[\]"),
        (
            {"runs": [RUN | {"seeds": [0.5]}]},
            f"each of `seeds` must be a whole number from 0 to {2**32 - 1}, got 0.5",
        ),
        ({"runs": [RUN | {"seeds": ["0"]}]}, "each of `seeds` must be a whole number from 0 to .*, got '0'"),
        ({"runs": [RUN | {"seeds": [-1]}]}, "each of `seeds` must be a whole number from 0 to .*, got -1"),
        ({"runs": [RUN | {"seeds": [2**32]}]}, f"each of `seeds` must be .*, got {2**32}"),
        ({"runs": [RUN | {"cells": [["dense"]]}]}, r"`cells` must be of dense, .* got \['dense'\]"),
        ({"runs": [RUN | {"task": {}}]}, r"`task` must be one of recognition, got \{\}"),
        ({"vocab_size": "40"}, "`vocab_size` must be a whole number of at least 1, got '40'"),
        ({"average_checkpoints": 1.5}, "`average_checkpoints` must be a whole number of at least 1, got 1.5"),
        ({"ctc_weight": 1}, "`ctc_weight` must be a number from 0 to below 1, got 1"),
        ({"ctc_weight": "0.3"}, "`ctc_weight` must be a number from 0 to below 1, got '0.3'"),
    ],
)
def test_faults_of_a_scale_are_named(change, message, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | change))
    with pytest.raises(ValueError, match=message):
        list(paper_scale.Scale.read(path).all_runs())


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("sizes", {"d_model": "128"}, "`d_model` must be a whole number of at least 1, got '128'"),
        ("sizes", {"window_seconds": 2.5}, "`window_seconds` must be a whole number of at least 1, got 2.5"),
        (
            "sizes",
            {"encoder_layers": True},
            "`encoder_layers` must be a whole number of at least 1, got True",
        ),
        ("sizes", {"dropout": 1.0}, "`dropout` must be a number from 0 to below 1, got 1.0"),
        ("sizes", {"mask_time": None}, "`mask_time` must be a number from 0 to below 1, got None"),
        (
            "recipe",
            {"learning_rate": "5e-4"},
            r"`learning_rate` of `recipe` must be a number, got '5e-4'; .* 5\.0e-4",
        ),
        ("recipe", {"weight_decay": None}, "`weight_decay` of `recipe` must be a number, got None$"),
        ("recipe", {"max_steps": 0}, "`max_steps` of `recipe` must be a whole number of at least 1, got 0"),
        (
            "recipe",
            {"max_steps": 1.5},
            "`max_steps` of `recipe` must be a whole number of at least 1, got 1.5",
        ),
        (
            "recipe",
            {"per_device_train_batch_size": 0},
            "`per_device_train_batch_size` of `recipe` must be a whole number of at least 1, got 0",
        ),
        ("words", {"vocabulary": 0}, "`vocabulary` in `words` of recognition must be .* from 1 to 30, got 0"),
        (
            "words",
            {"vocabulary": 31},
            "`vocabulary` in `words` of recognition must be .* from 1 to 30, got 31",
        ),
        ("words", {"test": -5}, "`test` in `words` of recognition must be .* of at least 1, got -5"),
        (
            "words",
            {"validation": 0},
            "`validation` in `words` of recognition must be .* of at least 1, got 0",
        ),
        ("words", {"train": "9"}, "`train` in `words` of recognition must be .* of at least 1, got '9'"),
        ("words", {"seconds": 0}, "`seconds` in `words` of recognition must be a number above 0, got 0"),
        (
            "words",
            {"seconds": 3},
            "`seconds` in `words` of recognition must be at most `window_seconds`, 2, got 3",
        ),
        (
            "words",
            {"speeds": []},
            r"`speeds` in `words` of recognition must be a list of numbers above 0, got \[\]",
        ),
        ("words", {"new_voices": 1}, r"`new_voices` in `words` of recognition must be true or false, got 1"),
        ("words", {"speeds": [1, 0]}, r"`speeds` in `words` of recognition must be a list .*, got \[1, 0\]"),
    ],
)
def test_values_in_a_scale_that_cannot_be_are_named_when_it_is_read(place, change, message, tmp_path):
    values = deepcopy(TINY)
    part = values["data"]["recognition"]["words"] if place == "words" else values[place]
    part.update(change)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        paper_scale.Scale.read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "nope"], "--scale must be one of acted, cluster, .*, or a YAML file, got 'nope'"),
        (["--scale", "no.yaml"], "--scale must be one of .*, got 'no.yaml'"),
        (
            ["--scale", "cpu", "--table", "--results", "nowhere"],
            "--table needs the JSON files of runs, and nowhere/cpu",
        ),
    ],
)
def test_a_scale_that_is_not_there_and_a_table_of_nothing_are_named(
    options, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["paper.py", *options])
    with pytest.raises(SystemExit):
        paper.main()
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"colour": 1}}, "`recipe` must hold options of the Trainer: .*'colour'"),
        ({"recipe": {"eval_strategy": "often"}}, "`recipe` must hold options of the Trainer: .*often"),
        ({"recipe": {"seed": 1}}, "`recipe` must hold options of the Trainer: .*'seed'"),
        (
            {"average_checkpoints": 3, "recipe": {"save_total_limit": 2}},
            "`average_checkpoints` must be at most the number of checkpoints that are kept, got 3",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_trained(
    change, message, tmp_path, monkeypatch
):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | change | {"recipe": TINY["recipe"] | change["recipe"]}))
    monkeypatch.setattr(sys, "argv", ["paper.py", "--scale", str(path)])
    monkeypatch.setattr(paper, "run", None)
    with pytest.raises(ValueError, match=message):
        paper.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seconds": 0.1}, "no clip is left to read; check the split"),
        ({}, r"\(row \d+\) must be of at most 2 seconds"),
        ({"streaming": True}, "`streaming` in `data` of recognition must be false, got True"),
    ],
)
def test_data_sets_that_a_grid_cannot_use_are_named_before_training(change, message, scale):
    splits = {"train_split": "train", "validation_split": "train", "test_split": "test"}
    data = {"recognition": {"dataset": "sample", "language": "en", **splits, **change}}
    with pytest.raises(ValueError, match=message):
        other = replace(scale, data=data)
        paper_checks.check_scale(other)
        paper_splits.load_splits(other, "recognition", 0)


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        (
            {"max_tokens": 5},
            40,
            "the text of the string '(zero|one|two)( \\1){2}' must have at most `max_tokens` = 5 tokens, got 6",
        ),
        (
            {"max_tokens": 40, "hop_length": 1600},
            11,
            "the text of the string 'zero zero zero' must fit the 10 encoder frames of a window, .* needs 15",
        ),
    ],
)
def test_strings_that_cannot_be_learnt_are_named_before_training(
    changes, vocab_size, message, scale, tmp_path, monkeypatch
):
    monkeypatch.setattr(ScratchTrainer, "train", None)
    scale = replace(scale, sizes=scale.sizes | changes, vocab_size=vocab_size)
    with pytest.raises(ValueError, match=message):
        paper.train(scale, "recognition", paper_cells.make_cells(SIZES)["dense"], 0, tmp_path)


@pytest.mark.parametrize("vocab_size", [25, 40, 60])
def test_no_string_needs_more_than_the_longest_texts(vocab_size):
    rng = np.random.default_rng(0)
    joined = [" ".join(found) for n in (1, 2, 3) for found in itertools.product(words.WORDS[:10], repeat=n)]
    sentences = [words.random_sentence(rng)[1] for _ in range(500)]
    for language, possible in (("en", joined), ("es", sentences)):
        tokenizer = train_tokenizer(all_texts(language, 10), vocab_size)

        def most(texts, tokenizer=tokenizer):
            ids = [tokenizer(text).input_ids[2:-1] for text in texts]
            return max(map(len, ids)), max(map(ctc_frames, ids))

        longest = words.longest_texts(language, 10)
        assert most(longest) >= most(possible)
        assert len(longest) == (10 if language == "en" else 4 * 8 * 5 * 8)
        if language == "en":
            assert most(longest) == most(possible), "nothing is refused that can be learnt"
        else:
            assert {text for text in sentences if len(text.split()) == 4} <= set(longest)


def test_a_cell_whose_sizes_cannot_be_is_named_before_anything_is_trained(scale):
    runs = [{"task": "recognition", "seeds": [0], "cells": ["k3-r16"]}]
    small = replace(scale, sizes=scale.sizes | {"d_model": 8, "encoder_ffn_dim": 8}, runs=runs)
    with pytest.raises(
        ValueError, match=r"the cell 'k3-r16' cannot have these sizes: `rank` must be at most 8"
    ):
        list(small.all_runs())


def test_a_cell_with_larger_groups_than_there_are_layers_is_refused(scale):
    deep = replace(scale, sizes=scale.sizes | {"encoder_layers": 6})
    run = {"task": "recognition", "seeds": [0]}
    assert list(replace(deep, runs=[run | {"cells": ["k6-r16"]}]).all_runs()) == [
        ("recognition", "k6-r16", 0)
    ]
    with pytest.raises(ValueError, match="the cell 'k9-r16' needs `encoder_layers` of at least 9, got 6"):
        list(replace(deep, runs=[run | {"cells": ["k9-r16"]}]).all_runs())


def test_a_grid_trains_transducers_too(scale, tmp_path):
    sizes = {name: value for name, value in TINY["sizes"].items() if name not in WHISPERS_OWN}
    sizes |= {"subsampling": 4, "subsampling_channels": 4, "decoder_dim": 32}
    words = {"recognition": {"words": {**TINY["data"]["recognition"]["words"], "seconds": 2}}}
    scale = replace(scale, model="parakeet_tdt", sizes=sizes, data=words)
    paper.run(scale, "recognition", "k3-r2", 0, tmp_path / "work", tmp_path / "result.json")
    values = json.loads((tmp_path / "result.json").read_text())
    losses = [loss for _, loss in values["losses"]]
    assert losses[-1] < 0.6 * losses[0]
    assert values["model"] == "parakeet_tdt"
    assert values["test"]["words"] > 8
    assert values["validation"][-1][2] >= 0
    assert values["four_bits"]["ratio"] < 0.5
    assert "nats_per_token" not in values["test"]
    dense = paper_cells.encoder_size(scale.sizes_for("recognition"), None)
    assert values["encoder"]["parameters"] < 0.6 * dense


@pytest.fixture
def sentences(tmp_path):
    """Noise for speech: voices that each split has two of, and texts of one to three words."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(24):
        split = ("train", "train", "validation", "test")[index % 4]
        samples = 0.1 * rng.standard_normal(4_000 + 1_000 * (index % 7)).astype(np.float32)
        soundfile.write(tmp_path / f"{index}.flac", samples, 16_000)
        text = " ".join(["one", "two", "three"][: 1 + index % 3])
        row = {
            "file_name": f"{index}.flac",
            "text": text,
            "split": split,
            "voice": f"{split}-{'ab'[index % 3 == 0]}",
        }
        rows.append(row | {"duration": f"{len(samples) / 16_000:.2f}"})
    with open(tmp_path / "recognition.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_sentences_begin_with_short_ones_and_have_neighbours_of_one_length(sentences):
    spoken = SpokenSentences(sentences, "recognition", "train", 60, seed=1, batch_size=4)
    durations = np.array([float(spoken.rows[row]["duration"]) for row in spoken.order])
    assert len(spoken) == len(durations) == 60
    assert set(durations[:12]) < set(durations)
    assert durations[:12].mean() < durations[12:].mean()
    # All come as often as one another, but for the last round.
    assert set(np.bincount(spoken.order[12:], minlength=12)) == {4}
    batches = durations.reshape(-1, 4)
    assert np.ptp(batches, axis=1).mean() < 0.5 * np.ptp(durations)
    again, other = (SpokenSentences(sentences, "recognition", "train", 60, seed, 4) for seed in (1, 2))
    assert (spoken[5]["audio"]["array"] == again[5]["audio"]["array"]).all()
    assert list(spoken.order) == list(again.order) != list(other.order)


def test_sentences_to_measure_on_are_read_once_with_the_same_noise(sentences):
    spoken = SpokenSentences(sentences, "recognition", "test", 6)
    assert sorted(spoken.order) == [*range(6)]
    assert spoken.voices == ["test-a", "test-b"]
    durations = [len(spoken[index]["audio"]["array"]) for index in range(6)]
    assert durations == sorted(durations)
    voices = {row["file_name"]: row["voice"] for row in spoken.rows}
    assert [voices[spoken[index]["audio"]["path"]] for index in range(6)] == [*map(spoken.voice, range(6))]
    names = paper_measures.voices(spoken)
    of_clips = [names["voices"][int(number)] for number in names["voices_of_clips"].split()]
    assert of_clips == [*map(spoken.voice, range(6))]
    speech, _ = soundfile.read(sentences / spoken[0]["audio"]["path"], dtype="float32")
    noise = spoken[0]["audio"]["array"] - speech
    assert 1 < speech.std() / noise.std() < 1000
    assert (spoken[0]["audio"]["array"] == spoken[0]["audio"]["array"]).all()


def test_the_noise_of_sentences_is_as_loud_as_is_said(sentences):
    for low, high in ((-5, 0), (30, 30)):
        spoken = SpokenSentences(sentences, "recognition", "test", 6, decibels=[low, high])
        for row in spoken:
            speech, _ = soundfile.read(sentences / row["audio"]["path"], dtype="float32")
            noise = row["audio"]["array"] - speech
            decibels = 10 * np.log10((speech**2).mean() / (noise**2).mean())
            assert (
                low - 3 < decibels < high + 3
            )  # a part of falling noise is louder or quieter than all of it


def test_sentences_that_are_not_there_are_named(sentences):
    for task, size, message in (
        ("translation", 6, "`folder` must have the table translation.csv, as .* writes it, got "),
        ("recognition", 7, "must have 7 sentences of 'test', got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            SpokenSentences(sentences, task, "test", size)
    with pytest.raises(
        ValueError, match=r"`window_seconds` must hold every sentence, got 0\.5, and .*flac has"
    ):
        SpokenSentences(sentences, "recognition", "test", 6).check_longest(0.5)
    assert len(SpokenSentences(sentences, "recognition", "train", 4, batch_size=4).order) == 4


def test_references_of_ctc_keep_their_double_letters(sentences):
    sizes = scratch_parakeet.ParakeetSizes(num_mel_bins=16)
    processor = paper_models.ARCHITECTURES["parakeet_ctc"].processor(["all dress"], 11, sizes)
    ids = processor.tokenizer("all dress").input_ids
    blank = processor.tokenizer.pad_token_id
    frames = [frame for token in ids for frame in (token, token, blank)]
    predicted = SimpleNamespace(
        label_ids=np.array([[*ids, -100, -100]]), predictions=np.array([[*frames, -100]])
    )
    assert paper_measures.texts_of(processor, predicted) == (["all dress"], ["all dress"])


def test_a_run_reads_as_many_synthetic_clips_as_its_steps_need(scale, monkeypatch):
    assert scale.items_to_train_on() == 40 * 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    more = replace(scale, recipe=scale.recipe | {"gradient_accumulation_steps": 3})
    assert more.items_to_train_on() == 40 * 8 * 3 * 2


def test_a_test_text_that_does_not_fit_its_frames_is_named_before_training(scale, sentences, tmp_path):
    table = sentences / "recognition.csv"
    table.write_text(table.read_text().replace("one two,test", f"{'one two ' * 30},test", 1))
    sizes = {name: value for name, value in TINY["sizes"].items() if name not in WHISPERS_OWN}
    data = {"recognition": {"sentences": {"folder": str(sentences), "validation": 6, "test": 6}}}
    scale = replace(scale, model="parakeet_ctc", sizes=sizes | {"subsampling": 4}, data=data)
    cell = paper_cells.make_cells(scale.sizes_for("recognition"))["dense"]
    with pytest.raises(ValueError, match=r"flac .* cannot be learnt from: its transcript needs .* frames"):
        paper.train(scale, "recognition", cell, 0, tmp_path / "work")


def test_a_grid_trains_sentences_with_ctc_and_rounds_them_to_four_bits(scale, sentences, tmp_path):
    sizes = {name: value for name, value in TINY["sizes"].items() if name not in WHISPERS_OWN}
    sizes |= {"subsampling": 4, "subsampling_channels": 4}
    data = {"recognition": {"sentences": {"folder": str(sentences), "validation": 6, "test": 6}}}
    scale = replace(scale, model="parakeet_ctc", sizes=sizes, data=data)
    paper_checks.check_scale(scale)
    for cell in ("dense", "k3-r2"):
        result = tmp_path / f"{cell}.json"
        paper.run(scale, "recognition", cell, 0, tmp_path / "work", result)
        values = json.loads(result.read_text())
        losses = [loss for _, loss in values["losses"]]
        assert losses[-1] < 0.6 * losses[0]
        assert values["test"]["voices"] == ["test-a", "test-b"]
        assert 0 < values["test"]["nats_per_token"] < 20
        assert values["four_bits_small_scales"]["test"]["clips"] == 6
        assert values["four_bits"]["ratio"] < 0.4


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (
            [("a.wav", "one two"), ("b.wav", "one \u00e9t\u00e9")],
            "text of b.wav must have only characters of the training split, got '\u00e9' in",
        ),
        ([], "every split must have clips, got an empty one"),
    ],
)
def test_texts_that_a_transducer_cannot_learn_are_named(clips, message):
    parakeet = paper_models.ARCHITECTURES["parakeet_tdt"]
    processor = parakeet.processor(all_texts("en"), 40, parakeet.sizes_class())
    parakeet.check_texts([("a.wav", "one two"), ("b.wav", "")], processor, None, 0.0)
    with pytest.raises(ValueError, match=message):
        parakeet.check_texts(clips, processor, None, 0.0)


def test_a_grid_of_another_model_is_named(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(TINY | {"model": "moonshine"}))
    with pytest.raises(
        ValueError,
        match="`model` must be one of whisper, parakeet_ctc, parakeet_rnnt, parakeet_tdt, got 'moonshine'",
    ):
        paper_scale.Scale.read(path)


@pytest.mark.parametrize(
    "name", [path.stem for path in (RESEARCH / "paper").glob("*.yaml") if path.stem != "accelerate"]
)
def test_the_scales_can_be_read_and_have_sizes_that_can_be(name, monkeypatch, tmp_path):
    scale = paper_scale.Scale.read(RESEARCH / "paper" / f"{name}.yaml")
    cells = dict.fromkeys(paper_cells.make_cells(SIZES), paper_cells.Cell("dense"))
    monkeypatch.setattr(
        paper_scale, "make_cells", lambda sizes: cells
    )  # their sizes take seconds for 18 layers
    monkeypatch.setattr(paper_scale, "check_sizes", lambda *_: None)
    assert list(scale.all_runs())
    for task in scale.data:
        assert scale.sizes_for(task).encoder_layers > 0
    anywhere = scale.recipe | {"use_cpu": True, "bf16": False}
    assert replace(scale, recipe=anywhere).training_arguments(tmp_path).max_steps > 0


def test_a_vocabulary_needs_texts_and_room_for_their_characters():
    with pytest.raises(ValueError, match="training split must have clips with text"):
        train_tokenizer([], 100)
    with pytest.raises(ValueError, match="`vocab_size` must be at least"):
        train_tokenizer(all_texts("en"), 5)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(scale, tmp_path, monkeypatch):
    scale = replace(scale, recipe=scale.recipe | {"max_steps": 1})
    monkeypatch.setattr(ScratchTrainer, "_ctc_loss", lambda self, logits, labels: logits.sum() * float("nan"))
    with pytest.raises(
        ValueError, match=r"loss must be finite, got nan at step 0 for the batch of the texts \["
    ):
        paper.train(scale, "recognition", paper_cells.make_cells(SIZES)["dense"], 0, tmp_path / "nan")


def written(*sides):
    return paper_table.written_ratio(paper_table.ratio_of_errors(*sides))


def test_the_ratio_of_errors_is_of_word_errors_over_the_same_seeds():
    def run(seed, errors, **test):
        return {"seed": seed, "test": {"word_errors_of_clips": errors, **test}}

    one = [run(0, "1 1 1 1")]
    assert written([run(0, "2 2 2 2"), run(1, "9 9 9 9")], one) == [
        "2.00",
        "1.86 to 1.86",  # 3 of 4 clips, and half an error
        "-",
    ]
    two = [run(0, "2 2 2 2"), run(1, "4 4 4 4")]
    ratio, of_clips, of_both = written(two, two)
    assert (ratio, of_clips, of_both) == ("1.00", "1.00 to 1.00", "0.52 to 1.92")
    assert written(two, [run(7, "1 1 1 1")]) == ["-", "-", "-"]


def test_the_figure_of_ratios_has_a_row_for_each_encoder_but_dense(tmp_path):
    def runs(cell, residual, *errors):
        test = {"voices": ["a", "b"], "voices_of_clips": "0 0 1 1"}
        return [
            {
                "cell": cell,
                "title": cell,
                "seed": seed,
                "encoder": {"ratio": 0.37},
                "residual_config": residual,
                "test": test | {"word_errors_of_clips": own},
            }
            for seed, own in enumerate(errors)
        ]

    cells = {
        "dense": runs("dense", None, "1 2 1 2", "2 1 2 1"),
        "shared": runs("shared", {"group_size": 3}, "2 2 2 2", "2 2 3 2"),
        "low rank": runs("low rank", {"group_size": None}, "4 4 4 9"),
        "perfect": runs("perfect", None, "0 0 0 0"),
    }
    axes = paper_table.draw_ratios(cells).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]  # from the bottom, the most errors first
    assert names == ["low rank, 37 %, 1 seed", "shared, 37 %, 2 seeds", "perfect, 37 %, 1 seed"]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_color() != "black"]
    assert [line.get_color() for line in lines] == ["tab:orange", "tab:blue", "tab:orange"]
    assert lines[1].get_linewidth() > lines[0].get_linewidth()  # voices and seeds
    shared = paper_table.ratio_of_errors(cells["shared"], cells["dense"])
    assert tuple(lines[1].get_xdata()) == shared.of_voices_and_seeds
    points = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    assert points[:2] == [21 / 6, 17 / 12] and 0 < points[2] < 0.2
    paper_table.plot_ratios({"shared": cells["shared"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_strings_of_a_voice_are_drawn_together():
    def run(seed, errors, voices="ab", of_clips="0 0 0 0 0 0 1 1 1 1 1 1"):
        test = {"word_errors_of_clips": errors, "voices": list(voices), "voices_of_clips": of_clips}
        return {"seed": seed, "test": test}

    # One voice has twice the errors of the other side, one has half.
    ours, theirs = run(0, "2 2 2 2 2 2 1 1 1 1 1 1"), run(0, "1 1 1 1 1 1 2 2 2 2 2 2")
    assert written([ours], [theirs]) == ["1.00", "0.52 to 1.92", "-"]
    sides = [
        [
            run(seed, errors, voices)
            for seed, (errors, voices) in enumerate(zip(of_seeds, ("ab", "cd"), strict=True))
        ]
        for of_seeds in (
            ("2 2 2 2 2 2 2 2 2 2 2 2", "1 1 1 1 1 1 1 1 1 1 1 1"),
            ("1 1 1 1 1 1 1 1 1 1 1 1",) * 2,
        )
    ]
    # Where seeds have their own voices, a seed is drawn for both sides: 24.5 / 12.5, or 12.5 / 12.5.
    assert written(*sides) == ["1.50", "-", "1.00 to 1.96"]


def test_the_cross_entropy_of_references_is_compared_seed_by_seed(tokenizer):
    def runs(cell, *nats, voices="ab"):
        return [
            {
                "cell": cell,
                "title": cell,
                "seed": seed,
                "test": {"nats_per_token": value, "voices": voices[seed:]},
            }
            for seed, value in enumerate(nats)
        ]

    dense, ours = runs("dense", 0.1, 0.3), runs("k3-r2", 0.2, 0.6)
    # Differences of 0.1 and 0.3, whose standard error is 0.1; Student's t has 12.706 for one degree of freedom.
    assert paper_table.difference_in_nats(ours, dense) == ["+0.200", "-1.071 to +1.471"]
    assert paper_table.difference_in_nats(ours[:1], dense) == ["+0.100", "-"]
    assert paper_table.difference_in_nats(ours, []) == ["-", "-"]
    same = [run | {"test": run["test"] | {"voices": "a"}} for run in ours]
    # Of two voices that all seeds have, one is drawn for both sides, and a seed for either: from voice a, 0.1 of seed 0
    # less 0.2 of seed 1, to voice b, 0.8 of seed 1 less 0.2 of seed 0.
    for run, of_voices in zip([*same, *dense], ("1 3", "4 8", "0 2", "2 4"), strict=True):
        run["test"] |= {"voices": ["a", "b"], "voices_of_clips": "0 1"}
        run["test"] |= {"nats_of_clips": of_voices, "tokens_of_clips": "10 10"}
    assert paper_table.difference_in_nats(same, dense) == ["+0.200", "-0.100 to +0.600"]
    old = [{"cell": "shallow", "title": "shallow", "seed": 0, "test": {}}]
    assert paper_table._nats({"dense": dense, "shallow": old, "k3-r2": ours})[2:] == [
        "| dense | 2 | 0.200 | - | - | - | - |",
        "| k3-r2 | 2 | 0.400 | +0.200 | -1.071 to +1.471 | - | - |",
    ]
    assert paper_table._nats({"shallow": old}) == []


def test_the_cross_entropy_is_of_the_tokens_of_each_reference(tokenizer):
    architecture = paper_models.ARCHITECTURES["whisper"]
    processor = new_processor(tokenizer, SIZES)
    model = architecture.model(SIZES, processor, None).eval()
    rows = [WordStrings("en", "test", 3, 2, 0, 3)[index] for index in range(3)]
    found = paper_measures.measure_nats(architecture, model, processor, rows, 2)
    tokens = [int(number) for number in found["tokens_of_clips"].split()]
    for row, nats, number in zip(rows, found["nats_of_clips"].split(), tokens, strict=True):
        batch = architecture.collator(processor)([row])
        assert number == batch["labels"].shape[1]
        assert float(nats) == pytest.approx(number * model(**batch).loss.item(), rel=1e-3)
    total = sum(map(float, found["nats_of_clips"].split()))
    assert found["nats_per_token"] == pytest.approx(total / sum(tokens), rel=1e-3)


def test_the_seconds_of_a_step_are_of_the_runs_that_made_one():
    def row(*seconds):
        test = {"wer": 0.5, "cer": 0.5, "word_errors_of_clips": "1 1"}
        run = {"cell": "dense", "title": "dense", "encoder": {"ratio": 1.0, "parameters": 9}, "test": test}
        runs = [run | {"seed": seed, "cpu_seconds_per_step": value} for seed, value in enumerate(seconds)]
        return paper_table._rows("recognition", {"dense": runs})[2]

    assert row(0.1, None, 0.3).endswith("| 0.200 |")
    assert row(None).endswith("| - |")


def test_the_bleu_of_a_translation_is_that_of_its_clips_together():
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra `research` has it")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(80)]
    predictions = ["", "a", *(text[:5] + text[7:] for text in texts[2:])]
    speakers = {"voices": [*"abcdefgh"], "voices_of_clips": " ".join(str(index % 8) for index in range(80))}
    run = {"test": paper_measures.measure("translation", texts, predictions) | speakers}
    counts = paper_table.bleu_counts(run)
    assert counts.shape == (80, 10)
    expected = sacrebleu.corpus_bleu(predictions, [texts]).score
    assert paper_table.bleu(counts.sum(0)) == pytest.approx(run["test"]["bleu"]) == pytest.approx(expected)
    drawn = rng.integers(80, size=80)
    expected = sacrebleu.corpus_bleu([predictions[i] for i in drawn], [[texts[i] for i in drawn]]).score
    assert paper_table.bleu(counts[drawn].sum(0)) == pytest.approx(expected)

    interval = paper_table.interval_of_bleu([run])
    assert paper_table.interval_of_bleu([run, run]) == interval, "all seeds have the same draws"
    low, high = map(float, interval.split(" to "))
    assert 2 < run["test"]["bleu"] - low < 20
    assert 2 < high - run["test"]["bleu"] < 20
    perfect = {"test": paper_measures.measure("translation", texts, texts) | speakers}
    assert paper_table.interval_of_bleu([perfect]) == "100.0 to 100.0"
    # The mean of two seeds, of which one is perfect in every draw, varies by half as much.
    ends = map(float, paper_table.interval_of_bleu([run, perfect]).split(" to "))
    assert list(ends) == pytest.approx([(low + 100) / 2, (high + 100) / 2], abs=0.11)
    del run["test"]["bleu_of_clips"]
    assert paper_table.interval_of_bleu([run, perfect]) == "-"


def test_voices_are_left_out_of_the_errors_and_words_of_a_run():
    test = {"voices": ["a", "b", "c"], "voices_of_clips": "2 0 1 2", "wer": 0.5}
    run = {"test": test | {"word_errors_of_clips": "1 2 3 4", "words_of_clips": "5 6 7 8"}}
    assert paper_summary._without_voices(run, ["d"]) is run
    left = paper_summary._without_voices(run, ["a"])
    assert paper_table.of_units(left, paper_table.word_errors(left)).tolist() == [3, 5]
    assert paper_table.of_units(left, paper_table.words_of(left)).tolist() == [7, 13]
    assert left["test"]["voices"] == ["b", "c"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nobody", "af_bella"], "must name voices of the tests, got nobody"),
        (["zm_yunxi"], "must be of tests that all seeds have, and those of cpu-voices, translation, differ"),
        (
            ["af_bella", "af_sky", "am_liam", "am_onyx", "bf_lily", "bm_lewis"],
            "must leave a voice in the test of cpu,",
        ),
    ],
)
def test_voices_that_cannot_be_left_out_are_named(names, message):
    with pytest.raises(ValueError, match=f"`without_voices` {message}"):
        paper_summary.summary(RESULTS, without_voices=names)


@pytest.mark.parametrize("strategy", ["random", None])
def test_sentences_are_read_in_order(strategy):
    data = {"recognition": {"sentences": {"folder": "a", "validation": 8, "test": 8}}}
    recipe = {name: value for name, value in TINY["recipe"].items() if name != "train_sampling_strategy"}
    recipe |= {} if strategy is None else {"train_sampling_strategy": strategy}
    sizes = {name: value for name, value in TINY["sizes"].items() if name not in WHISPERS_OWN}
    scale = paper_scale.Scale("a", data, sizes, recipe, [RUN], model="parakeet_ctc")
    with pytest.raises(ValueError, match="`train_sampling_strategy` of `recipe` must be sequential"):
        paper_checks.check_scale(scale)


def test_sentences_are_as_many_as_all_processes_read_and_fit_the_window(scale, sentences, monkeypatch):
    data = {"recognition": {"sentences": {"folder": str(sentences), "validation": 6, "test": 6}}}
    scale = replace(scale, data=data)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(paper_splits.load_splits(scale, "recognition", 0).train) == 2 * 40 * 8
    monkeypatch.setattr(paper_scale.Scale, "sizes_for", lambda *_: SimpleNamespace(window_seconds=0.3))
    with pytest.raises(ValueError, match=r"`window_seconds` must hold every sentence, got 0\.3"):
        paper_splits.load_splits(scale, "recognition", 0)


def test_sentences_of_another_table_have_its_texts(scale, sentences):
    table = (sentences / "recognition.csv").read_text()
    (sentences / "spanish.csv").write_text(table.replace("one", "uno").replace("two", "dos"))
    folder = {"folder": str(sentences), "validation": 6, "test": 6}
    texts = []
    for data in (folder, folder | {"table": "spanish", "decibels": [-10, -5]}):
        scale = replace(scale, data={"recognition": {"sentences": data}})
        paper_checks.check_scale(scale)
        splits = paper_splits.load_splits(scale, "recognition", 0)
        texts.append([row["text"] for row in splits.test])
        assert splits.train.decibels == data.get("decibels", words.NOISE_DECIBELS)
    assert texts[1] == [text.replace("one", "uno").replace("two", "dos") for text in texts[0]] != texts[0]


def test_each_row_that_shares_has_a_twin_with_a_divided_rate(scale, tmp_path):
    cells = paper_cells.make_cells(SIZES)
    twins = {name: cell for name, cell in cells.items() if name.endswith("-divided")}
    assert {name.removesuffix("-divided") for name in twins} == {
        name for name in cells if name[:2] in ("k3", "k6", "k9")
    } - set(twins)
    short = replace(scale, recipe=scale.recipe | {"max_steps": 2})
    for name, rates in (("dense", {3e-3}), ("k3-r2", {3e-3}), ("k3-r2-divided", {3e-3, 3e-3 / 3**0.5})):
        trainer, _, _ = paper.train(short, "recognition", cells[name], 0, tmp_path / name)
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == rates


RESULTS = RESEARCH.parent / "results" / "paper"


@pytest.mark.parametrize("scale", sorted(path.parent.name for path in RESULTS.glob("*/table.md")))
def test_a_table_is_what_the_runs_beside_it_give(scale, tmp_path, monkeypatch):
    shutil.copytree(RESULTS / scale, tmp_path / scale)
    for figure in ("plot", "plot_ratios"):
        monkeypatch.setattr(paper_table, figure, lambda *_: None)  # takes longer than the table
    table = paper_table.write_table(tmp_path / scale)
    assert "| dense | " in table
    assert table == (RESULTS / scale / "table.md").read_text()


@pytest.mark.parametrize(
    ("page", "scale"),
    [
        *(
            ("paper-words.md", scale)
            for scale in ("cpu", "cpu-long", "cpu-narrow", "cpu-rnnt", "cpu-voices", "cpu-wide")
        ),
        *(
            ("paper.md", scale)
            for scale in ("cpu-sentences-noise", "cpu-sentences-warm", "cpu-sentences-warm-rate")
        ),
    ],
)
@pytest.mark.skipif(not (RESEARCH.parent / "docs" / "paper.md").is_file(), reason="documents are not here")
def test_the_pages_have_the_tables_of_the_results(page, scale):
    table = (RESULTS / scale / "table.md").read_text()
    page = (RESEARCH.parent / "docs" / page).read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    assert [row for row in rows if row not in page] == []


@pytest.mark.skipif(not (RESEARCH.parent / "docs" / "paper.md").is_file(), reason="documents are not here")
def test_the_page_has_the_table_over_all_grids():
    text = paper_summary.summary(RESULTS)
    assert text == (RESULTS / "summary.md").read_text()
    rows = text.splitlines()
    assert len(rows) > 5
    pages = "".join((RESEARCH.parent / "docs" / name).read_text() for name in ("paper.md", "paper-words.md"))
    assert [row for row in rows if row not in pages] == []
