"""Losses against values worked out by hand, and what a few steps of training move, log, save and resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    randomize_,
    speech,
    tiny_wav2vec2_config,
    tiny_whisper_config,
    wav2vec2_processor,
    whisper_generation_config,
    whisper_processor,
)
from torch import Tensor, nn
from transformers import (
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2ForCTC,
    WhisperForConditionalGeneration,
)

from hf_residual_transformer import (
    ResidualConfig,
    ResidualWav2Vec2ForCTC,
    ResidualWhisperForConditionalGeneration,
)
from hf_residual_transformer.speech.transcription import encode, encoder_window, transcribe
from hf_residual_transformer.speech.windows import WindowCollator
from hf_residual_transformer.training import trainers
from hf_residual_transformer.training.arguments import DistillationArguments
from hf_residual_transformer.training.checkpoints import run_of
from hf_residual_transformer.training.losses import HiddenStateLoss, LogitsLoss
from hf_residual_transformer.training.trainers import (
    CTCDistillationTrainer,
    Seq2SeqDistillationTrainer,
    _components,
    learns_decoder_alone,
)

RESIDUAL = ResidualConfig(group_size=2, rank=3, diagonal="all")
WEIGHTS = ("hidden_weight", "final_weight", "logits_weight", "labels_weight")
NUM_BINS, NUM_FRAMES = 16, 100  # of tiny Whisper


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


def whisper_pair() -> tuple[Any, Any]:
    """A residual student and a dense teacher, with different weights."""
    student = ResidualWhisperForConditionalGeneration(tiny_whisper_config(residual_config=RESIDUAL))
    return randomize_(student, 0), randomize_(WhisperForConditionalGeneration(tiny_whisper_config()), 1)


def ctc_pair(**options: Any) -> tuple[Any, Any]:
    options = {"ctc_loss_reduction": "mean", **options}
    student = ResidualWav2Vec2ForCTC(tiny_wav2vec2_config(residual_config=RESIDUAL, **options))
    return randomize_(student, 0), randomize_(Wav2Vec2ForCTC(tiny_wav2vec2_config(**options)), 1)


def whisper_data(count: int, labels: bool = True, num_frames: int = NUM_FRAMES) -> list[dict[str, Tensor]]:
    """Clips with transcripts of 2, 3, ... tokens, so that equal batches hold unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_features": torch.randn(NUM_BINS, num_frames, generator=generator)} for _ in range(count)]
    if labels:
        for index, row in enumerate(rows):
            row["labels"] = torch.randint(0, 256, (2 + index,), generator=generator)
    return rows


def ctc_data(count: int, labels: bool = True) -> list[dict[str, Tensor]]:
    """Clips of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_values": torch.randn(400 + 90 * i, generator=generator)} for i in range(count)]
    if labels:
        for index, row in enumerate(rows):
            row["labels"] = torch.randint(1, 12, (2 + index % 3,), generator=generator)
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def pad(name: str, value: float) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    batch = {}
    if "input_features" in rows[0]:
        batch["input_features"] = torch.stack([row["input_features"] for row in rows])
    else:
        batch["input_values"] = pad("input_values", 0.0)
        lengths = torch.tensor([len(row["input_values"]) for row in rows])
        batch["attention_mask"] = (torch.arange(batch["input_values"].shape[1]) < lengths[:, None]).long()
    if "labels" in rows[0]:
        batch["labels"] = pad("labels", -100)
    return batch


def trainer_for(
    student: Any, teacher: Any, data: list, folder: Path, weights: dict[str, Any], **options: Any
) -> Any:
    is_whisper = "input_features" in data[0]
    callbacks = options.pop("callbacks", None)
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "dataloader_pin_memory": False, "max_grad_norm": 0.0, "remove_unused_columns": False,
    }  # fmt: skip
    kind, arguments = (
        (Seq2SeqDistillationTrainer, Seq2SeqTrainingArguments)
        if is_whisper
        else (CTCDistillationTrainer, TrainingArguments)
    )
    return kind(
        model=student,
        teacher=teacher,
        args=arguments(**{**settings, **options}),
        distillation=DistillationArguments(**{**dict.fromkeys(WEIGHTS, 0.0), **weights}),
        train_dataset=data,
        data_collator=collate,
        callbacks=callbacks,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# Losses


def test_hidden_state_loss_is_the_error_over_the_variance_of_the_teacher():
    teacher = torch.tensor(
        [[[0.0, 10.0], [2.0, 14.0]]]
    )  # one clip, two frames, means 1 and 12: variance 2 + 8
    student = torch.tensor([[[1.0, 10.0], [2.0, 12.0]]])  # squared error 1 + 4
    assert HiddenStateLoss()([student], [teacher]).item() == pytest.approx(5 / 10)


def test_hidden_state_loss_of_the_mean_state_is_one_and_of_equal_states_zero():
    teacher = torch.randn(3, 50, 7) + 0.5
    mean = teacher.mean(1, keepdim=True).expand_as(teacher)
    assert HiddenStateLoss()([mean], [teacher]).item() == pytest.approx(1.0, rel=1e-5)
    assert HiddenStateLoss()([teacher], [teacher]).item() == 0


def test_hidden_state_loss_weighs_layers_equally_whatever_their_scale():
    student, teacher = torch.randn(2, 2, 9, 5)
    alone = HiddenStateLoss()([student], [teacher]).item()
    loss = HiddenStateLoss()([student, 1000 * student], [teacher, 1000 * teacher]).item()
    assert loss == pytest.approx(alone, rel=1e-5)


def test_hidden_state_loss_averages_layers_by_their_weights():
    student, teacher = torch.randn(2, 3, 2, 9, 5)
    alone = [HiddenStateLoss()([s], [t]).item() for s, t in zip(student, teacher, strict=True)]
    loss = HiddenStateLoss([1, 0, 3])(list(student), list(teacher)).item()
    assert loss == pytest.approx((alone[0] + 3 * alone[2]) / 4, rel=1e-5)


def test_hidden_state_loss_does_not_see_padding():
    student, teacher = torch.randn(2, 1, 6, 5)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    short = HiddenStateLoss()([student[:, :4]], [teacher[:, :4]])
    student[:, 4:], teacher[:, 4:] = math.nan, math.inf
    torch.testing.assert_close(HiddenStateLoss()([student], [teacher], mask), short)


def test_hidden_state_loss_of_a_silent_clip_is_finite():
    silent = torch.ones(1, 6, 5)
    assert HiddenStateLoss()([1.1 * silent], [silent]).item() == pytest.approx(0.01 / 1e-3, rel=1e-4)
    assert HiddenStateLoss()([0 * silent], [0 * silent]).item() == 0


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [math.nan, 1]])
def test_hidden_state_loss_refuses_impossible_layer_weights(weights):
    with pytest.raises(ValueError, match="layer_weights"):
        HiddenStateLoss(weights)


def test_hidden_state_loss_refuses_states_that_do_not_fit():
    states = torch.randn(1, 6, 5)
    with pytest.raises(ValueError, match="shapes"):
        HiddenStateLoss()([states], [states, states])
    with pytest.raises(ValueError, match="shapes"):
        HiddenStateLoss()([states], [states[..., :3]])
    with pytest.raises(ValueError, match="layer_weights"):
        HiddenStateLoss([1, 1])([states], [states])


def test_logits_loss_is_the_divergence_of_softened_probabilities_times_the_squared_temperature():
    teacher = torch.tensor([[[math.log(9.0) * 2, 0.0]]])  # at temperature 2: 0.9 and 0.1
    student = torch.tensor([[[0.0, 0.0]]])
    divergence = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert LogitsLoss(temperature=2.0)(student, teacher).item() == pytest.approx(4 * divergence, rel=1e-5)


def test_logits_loss_is_the_mean_over_the_positions_that_count():
    student, teacher = torch.randn(2, 2, 3, 5)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    kept = [
        LogitsLoss()(student[i : i + 1, j : j + 1], teacher[i : i + 1, j : j + 1]) for i, j in mask.nonzero()
    ]
    loss = LogitsLoss()(student, teacher, mask)
    assert loss.item() == pytest.approx(sum(kept).item() / 3, rel=1e-5)
    student[~mask], teacher[~mask] = math.nan, math.inf
    assert torch.equal(LogitsLoss()(student, teacher, mask), loss)


def test_logits_loss_refuses_another_vocabulary():
    with pytest.raises(ValueError, match="shape"):
        LogitsLoss()(torch.randn(1, 2, 5), torch.randn(1, 2, 6))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"labels_weight": math.nan}, "labels_weight"),
        (dict.fromkeys(WEIGHTS, 0.0), "hidden_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"learning_rates": "{"}, "learning_rates"),
        ({"learning_rates": {"U": 1e-4}}, "learning_rates"),
        ({"learning_rates": {"shared": "fast"}}, "learning_rates"),
    ],
)
def test_impossible_distillation_arguments_are_refused_by_name(values, field):
    with pytest.raises(ValueError, match=field):
        DistillationArguments(**values)


def test_distillation_arguments_read_learning_rates_as_json():
    assert DistillationArguments(learning_rates='{"shared": 1e-5}').learning_rates == {"shared": 1e-5}


# Windows shorter than 30 seconds


def test_a_full_window_gives_what_the_encoder_gives():
    for model in whisper_pair():
        features = torch.randn(2, NUM_BINS, NUM_FRAMES)
        encoder = model.get_encoder()
        expected = encoder(features).last_hidden_state
        assert torch.equal(encode(encoder, features).last_hidden_state, expected)


def test_a_short_window_gives_what_an_encoder_with_so_few_positions_gives():
    student, teacher = whisper_pair()
    config = copy.deepcopy(teacher.config)
    config.max_source_positions = 7
    short = WhisperForConditionalGeneration(config).eval()
    weights = teacher.state_dict()
    weights["model.encoder.embed_positions.weight"] = weights["model.encoder.embed_positions.weight"][:7]
    short.load_state_dict(weights)
    features = torch.randn(2, NUM_BINS, 14)
    expected = short.get_encoder()(features).last_hidden_state
    assert torch.equal(encode(teacher.get_encoder(), features).last_hidden_state, expected)
    assert encode(student.get_encoder(), features).last_hidden_state.shape == (2, 7, 32)


def test_a_short_window_leaves_the_encoder_as_it_was_even_after_an_error():
    model, _ = whisper_pair()
    encoder, before = model.get_encoder(), weights_of(model)
    with pytest.raises(RuntimeError, match="inside"), encoder_window(encoder, 14):
        assert model.config.max_source_positions == 7
        raise RuntimeError("inside")
    with pytest.raises(RuntimeError):
        encode(encoder, torch.randn(2, NUM_BINS + 1, 14))  # one mel bin too many
    encode(encoder, torch.randn(2, NUM_BINS, 14))
    assert model.config.max_source_positions == encoder.embed_positions.num_embeddings == NUM_FRAMES // 2
    assert not changed(before, model)
    encoder(torch.randn(2, NUM_BINS, NUM_FRAMES))
    with pytest.raises(ValueError, match="mel input features"):
        encoder(torch.randn(2, NUM_BINS, 14))


def test_gradients_of_a_short_window_reach_every_layer():
    model, _ = whisper_pair()
    encode(model.get_encoder(), torch.randn(2, NUM_BINS, 14)).last_hidden_state.square().sum().backward()
    trained = {name for name, p in model.get_encoder().named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.get_encoder().named_parameters() if p.requires_grad}


@pytest.mark.parametrize("num_frames", [0, 13, NUM_FRAMES + 2])
def test_a_window_that_the_encoder_has_no_positions_for_is_refused(num_frames):
    model, _ = whisper_pair()
    with pytest.raises(ValueError, match="num_frames"):
        encode(model.get_encoder(), torch.randn(1, NUM_BINS, num_frames))


def clip(seconds: float) -> dict[str, Any]:
    return {"audio": {"array": speech(seconds).numpy(), "sampling_rate": 16_000, "path": None}}


def test_windows_hold_as_many_whole_clips_as_fit():
    batch = WindowCollator(whisper_processor(), seconds=1.0)([clip(0.2), clip(0.25), clip(0.9), clip(0.4)])
    assert set(batch) == {"input_features"}
    assert batch["input_features"].shape == (3, NUM_BINS, 100)


def test_clips_longer_than_a_window_are_cut_in_equal_parts(tmp_path):
    assert WindowCollator(whisper_processor(), seconds=0.5)([clip(1.2)])["input_features"].shape == (
        3,
        16,
        50,
    )
    batch = WindowCollator(wav2vec2_processor(tmp_path), seconds=0.5)([clip(1.2)])
    assert batch["input_values"].shape == (3, 8000)
    assert batch["attention_mask"].sum(1).tolist() == [6400, 6400, 6400]


@pytest.mark.parametrize("seconds", [0.0, 1.02])
def test_windows_that_the_model_does_not_take_are_refused(seconds):
    with pytest.raises(ValueError, match="seconds"):
        WindowCollator(whisper_processor(), seconds)


# What training moves


def test_label_free_training_moves_the_encoder_alone(tmp_path):
    student, teacher = whisper_pair()
    before, taught = weights_of(student), weights_of(teacher)
    trainer = trainer_for(student, teacher, whisper_data(4, labels=False), tmp_path, {"hidden_weight": 1.0})
    trainer.train()
    moved = changed(before, student)
    expected = {
        n for n, p in student.named_parameters() if n.startswith("model.encoder.") and p.requires_grad
    }
    assert moved == expected - {"model.encoder.layer_norm.weight", "model.encoder.layer_norm.bias"}
    assert not changed(taught, teacher)
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in student.get_decoder().parameters())


def few_bit_student(**changes: Any) -> Any:
    """A model in which encoder, decoder and token table have few bits."""
    four = ResidualConfig(group_size=1, rank=2, diagonal="none", shared_bits=4)
    fields = {"residual_config": four, "decoder_residual_config": four, "embedding_bits": 4, **changes}
    student = ResidualWhisperForConditionalGeneration(tiny_whisper_config(**fields))
    student.generation_config = whisper_generation_config()
    return student


def test_where_all_parts_have_few_bits_the_decoder_alone_learns(tmp_path):
    _, teacher = whisper_pair()
    teacher.generation_config = whisper_generation_config()
    student, data = few_bit_student(), whisper_data(4, labels=False)
    assert learns_decoder_alone(student)
    before, buffers = weights_of(student), {name: b.clone() for name, b in student.named_buffers()}
    weights = {"final_weight": 1.0, "logits_weight": 1.0}
    trainer = trainer_for(student, teacher, data, tmp_path, weights, max_steps=8, learning_rate=1e-3)
    assert trainer.logits_loss.temperature == 1.0
    start = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < start
    # Scales, which are small, have small rates.
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in student.named_parameters() if id(p) in rates}
    scales = [name for name in found if name.endswith("weight_scale")]
    assert len(scales) == 2 * 10 + 1
    for name in scales:
        assert found[name] == pytest.approx(1e-3 * 40 * before[name].abs().mean().item(), rel=1e-5), name
    assert found["model.decoder.layers.0.fc1.bias"] == 1e-3
    moved = changed(before, student)
    assert all(name.startswith("model.decoder.") for name in moved)
    # Scales, factors, biases, norms, and the mean of the token vectors.
    for part in (
        "fc1.0.weight_scale",
        "residual_A",
        "residual_B",
        "fc1.bias",
        "layer_norm.weight",
        "weight_mean",
    ):
        assert any(name.endswith(part) for name in moved), part
    assert all(torch.equal(value, dict(student.named_buffers())[name]) for name, value in buffers.items())
    frozen = [name for name, p in student.get_encoder().named_parameters() if not p.requires_grad]
    assert frozen == ["embed_positions.weight"]  # as before


@pytest.mark.parametrize(
    "changes",
    [
        {"residual_config": RESIDUAL},
        {"decoder_residual_config": None, "embedding_bits": None},
        {"short_windows": True},
    ],
)
def test_other_encoders_learn(changes):
    assert not learns_decoder_alone(few_bit_student(**changes))


def test_scales_of_the_token_table_have_the_rate_of_scales():
    student = few_bit_student()
    kinds = {name: _components(student).get(id(p), "rest") for name, p in student.named_parameters()}
    assert kinds["model.decoder.embed_tokens.weight_scale"] == "shared"
    assert kinds["model.decoder.embed_tokens.weight_mean"] == "rest"
    assert kinds["model.decoder.shared.fc1.0.weight_scale"] == "shared"


def test_the_last_hidden_state_is_that_after_the_final_norm(tmp_path):
    student, teacher = whisper_pair()
    before = weights_of(student)
    trainer_for(student, teacher, whisper_data(4, labels=False), tmp_path, {"final_weight": 1.0}).train()
    assert "model.encoder.layer_norm.weight" in changed(before, student)


def test_label_free_training_runs_no_decoder(tmp_path):
    student, teacher = whisper_pair()
    for model in (student, teacher):
        model.get_decoder().forward = None  # a call would fail
    data = whisper_data(4)  # labels may be there
    trainer_for(student, teacher, data, tmp_path, {"hidden_weight": 1.0, "final_weight": 1.0}).train()


@pytest.mark.parametrize("num_frames", [NUM_FRAMES, 60])
def test_without_labels_the_decoder_runs_on_what_the_teacher_makes_of_the_audio(num_frames, tmp_path):
    student, teacher = whisper_pair()
    teacher.generation_config = config = whisper_generation_config()
    config.max_new_tokens = None  # as published models have it
    before, data = weights_of(student), whisper_data(4, labels=False, num_frames=num_frames)
    trainer = trainer_for(student, teacher, data, tmp_path, {"logits_weight": 1.0}, max_steps=8)
    start = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < 0.85 * start
    assert all(name.startswith("model.encoder.") for name in changed(before, student))
    labels = trainer._with_labels(collate(data))["labels"]
    features = {"input_features": collate(data)["input_features"]}
    with encoder_window(teacher.get_encoder(), num_frames), torch.no_grad():
        loss = teacher(**features, labels=labels).loss
        others = [teacher(**features, labels=labels.roll(shift, 0)).loss for shift in (1, 2, 3)]
    assert all(loss < other for other in others)


@pytest.mark.parametrize("hears", [False, True])
def test_a_teacher_that_hears_no_word_is_said(hears, tmp_path, monkeypatch, caplog):
    def says(teacher: Any, features: Tensor, *_: Any) -> Tensor:
        token = 5 if hears else teacher.config.eos_token_id
        return torch.tensor([[teacher.config.decoder_start_token_id, token]]).repeat(len(features), 1)

    monkeypatch.setattr(trainers, "transcribe", says)
    trainer_for(*whisper_pair(), whisper_data(4, labels=False), tmp_path, {"logits_weight": 1.0}).train()
    assert any("heard no word" in record.getMessage() for record in caplog.records) != hears


def test_a_transcription_has_its_language_task_and_end_and_no_more():
    _, teacher = whisper_pair()
    config = teacher.generation_config = whisper_generation_config()
    config.max_new_tokens = None
    features = collate(whisper_data(4, labels=False))["input_features"]
    labels = transcribe(teacher, features)
    assert set(labels[:, 0].tolist()) <= set(config.lang_to_id.values())
    assert set(labels[:, 1].tolist()) == {config.task_to_id["transcribe"]}
    assert set(labels[:, 2].tolist()) == {config.no_timestamps_token_id}
    for row in labels[:, 3:].tolist():
        kept = [token for token in row if token != -100]
        assert row == kept + [-100] * (len(row) - len(kept))
        assert config.eos_token_id not in kept[:-1]
    assert torch.equal(transcribe(teacher, features[:1])[0], labels[0][labels[0] != -100])


def test_label_free_training_of_ctc_moves_the_layers_alone(tmp_path):
    student, teacher = ctc_pair()
    before, taught = weights_of(student), weights_of(teacher)
    weights = {"hidden_weight": 1.0, "final_weight": 1.0}
    trainer_for(student, teacher, ctc_data(4, labels=False), tmp_path, weights).train()
    moved = changed(before, student)
    assert moved == {name for name, _ in student.named_parameters() if name.startswith("wav2vec2.encoder.")}
    assert not changed(taught, teacher)


def test_training_on_labels_moves_the_decoder_too_and_needs_no_teacher(tmp_path):
    student, _ = whisper_pair()
    before = weights_of(student)
    trainer_for(student, None, whisper_data(4), tmp_path, {"labels_weight": 1.0}).train()
    assert changed(before, student) == {name for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("pair", [whisper_pair, ctc_pair])
@pytest.mark.parametrize("name", ["hidden", "final", "logits", "labels"])
def test_each_loss_falls_where_it_is_trained(pair, name, tmp_path):
    student, teacher = pair()
    data = whisper_data(2) if pair is whisper_pair else ctc_data(2)
    trainer = trainer_for(
        student, teacher, data, tmp_path, {f"{name}_weight": 1.0}, max_steps=15, learning_rate=3e-3
    )
    trainer.train()
    losses = [entry[f"loss_{name}"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 15
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("pair", [whisper_pair, ctc_pair])
def test_the_loss_is_the_weighted_sum_of_those_that_are_logged(pair, tmp_path):
    student, teacher = pair()
    data = whisper_data(5) if pair is whisper_pair else ctc_data(5)
    weights = {"hidden_weight": 2.0, "final_weight": 1.0, "logits_weight": 3.0, "labels_weight": 0.5}
    trainer = trainer_for(student, teacher, data, tmp_path, weights, max_steps=6, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        total = sum(
            weight * entry[f"loss_{name.removesuffix('_weight')}"] for name, weight in weights.items()
        )
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_padding_changes_no_loss(tmp_path):
    student, teacher = ctc_pair()
    weights = {"hidden_weight": 1.0, "final_weight": 1.0, "logits_weight": 1.0, "labels_weight": 1.0}
    trainer = trainer_for(student, teacher, ctc_data(2), tmp_path, weights)
    batch = collate(ctc_data(1))
    padded = {**batch, "input_values": torch.cat([batch["input_values"], torch.full((1, 200), 9.0)], dim=1)}
    padded["attention_mask"] = torch.cat(
        [batch["attention_mask"], torch.zeros(1, 200, dtype=torch.long)], dim=1
    )
    padded["labels"] = torch.cat([batch["labels"], torch.full((1, 3), -100)], dim=1)
    with torch.no_grad():
        expected, losses = (trainer._losses(student, inputs)[0] for inputs in (batch, padded))
    assert losses.keys() == {"hidden", "final", "logits", "labels"}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_padded_labels_change_no_loss(tmp_path):
    student, teacher = whisper_pair()
    trainer = trainer_for(
        student, teacher, whisper_data(2), tmp_path, {"logits_weight": 1.0, "labels_weight": 1.0}
    )
    batch = collate(whisper_data(1))
    padded = {**batch, "labels": torch.cat([batch["labels"], torch.full((1, 3), -100)], dim=1)}
    with torch.no_grad():
        expected, losses = (trainer._losses(student, inputs)[0] for inputs in (batch, padded))
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_short_windows_train_like_full_ones(tmp_path):
    student, teacher = whisper_pair()
    data = whisper_data(2, num_frames=16)
    weights = {"hidden_weight": 1.0, "labels_weight": 0.1}
    trainer = trainer_for(student, teacher, data, tmp_path, weights, max_steps=20, learning_rate=3e-3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert student.config.max_source_positions == NUM_FRAMES // 2


# One large batch, in parts


ACCUMULATED = [
    pytest.param(
        whisper_pair, whisper_data, {"hidden_weight": 1.0, "final_weight": 1.0}, {}, id="label-free"
    ),
    pytest.param(whisper_pair, whisper_data, {"logits_weight": 1.0, "labels_weight": 1.0}, {}, id="seq2seq"),
    pytest.param(ctc_pair, ctc_data, {"hidden_weight": 1.0, "final_weight": 1.0}, {}, id="ctc label-free"),
    pytest.param(ctc_pair, ctc_data, {"logits_weight": 1.0, "labels_weight": 1.0}, {}, id="ctc"),
    pytest.param(ctc_pair, ctc_data, {"labels_weight": 1.0}, {"ctc_loss_reduction": "sum"}, id="ctc sum"),
]


class KeepGradients(TrainerCallback):
    """The gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("pair", "data", "weights", "options"), ACCUMULATED)
def test_accumulated_steps_equal_one_large_batch(pair, data, weights, options, tmp_path):
    student, teacher = (model.double() for model in pair(**options))
    rows = [
        {name: value.double() if value.is_floating_point() else value for name, value in row.items()}
        for row in data(7)
    ]
    results = []
    for batch_size, steps in ((7, 1), (2, 4)):  # of seven clips of unequal lengths, the last part has one
        kept = KeepGradients()
        trainer = trainer_for(
            copy.deepcopy(student), teacher, rows, tmp_path, weights, callbacks=[kept], optim="sgd",
            max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer.train()
        results.append((kept.gradients, weights_of(trainer.model), trainer.state.log_history[0]))
    (gradients, updated, logs), (parts_gradients, parts_updated, parts_logs) = results
    scale = max(1.0, *(gradient.abs().max().item() for gradient in gradients.values()))
    assert largest_difference(gradients, parts_gradients) < 1e-6 * scale
    assert largest_difference(updated, parts_updated) < 1e-6 * scale
    for key in (key for key in logs if key.startswith("loss")):
        assert parts_logs[key] == pytest.approx(logs[key], rel=1e-5), key


@pytest.mark.parametrize("pair", [whisper_pair, ctc_pair])
def test_training_on_labels_has_the_gradient_of_the_model_itself(pair, tmp_path):
    student, _ = pair()
    data = whisper_data(3) if pair is whisper_pair else ctc_data(3)
    reference = copy.deepcopy(student)
    reference(**collate(data)).loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    kept = KeepGradients()
    options: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
    }
    trainer_for(student, None, data, tmp_path, {"labels_weight": 1.0}, callbacks=[kept], **options).train()
    assert largest_difference(expected, kept.gradients) < 1e-5


# Resuming, precision, evaluation, learning rates


@pytest.mark.parametrize("pair", [whisper_pair, ctc_pair])
def test_interrupted_and_resumed_equals_uninterrupted(pair, tmp_path):
    data = whisper_data(5, labels=False) if pair is whisper_pair else ctc_data(5, labels=False)
    student, teacher = pair()
    weights = {"hidden_weight": 1.0, "learning_rates": {"shared": 1e-3}}
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
    whole = trainer_for(copy.deepcopy(student), teacher, data, tmp_path, weights, **options)
    whole.train()
    resumed = trainer_for(student, teacher, data, tmp_path, weights, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert largest_difference(weights_of(whole.model), weights_of(resumed.model)) == 0
    keys = ("loss", "loss_hidden", "learning_rate", "step")
    assert [[e.get(k) for k in keys] for e in whole.state.log_history[:3]] == [
        [e.get(k) for k in keys] for e in resumed.state.log_history[:3]
    ]


@pytest.mark.parametrize("pair", [whisper_pair, ctc_pair])
def test_checkpoints_are_whole_models_without_the_teacher(pair, tmp_path):
    student, teacher = pair()
    data = whisper_data(2, labels=False) if pair is whisper_pair else ctc_data(2, labels=False)
    trainer_for(
        student, teacher, data, tmp_path, {"hidden_weight": 1.0}, save_strategy="steps", save_steps=2
    ).train()
    loaded = type(student).from_pretrained(tmp_path / "checkpoint-2")
    assert largest_difference(weights_of(student), weights_of(loaded)) == 0


@pytest.mark.parametrize("pair", [whisper_pair, ctc_pair])
def test_bfloat16_computes_in_it_and_keeps_float32_weights(pair, tmp_path):
    student, teacher = pair()
    data = whisper_data(2, labels=False) if pair is whisper_pair else ctc_data(2, labels=False)
    seen = set()
    name = "fc1" if pair is whisper_pair else "feed_forward.intermediate_dense"
    for model in (student, teacher):
        linear = model.base_model.encoder.layers[1].get_submodule(name)
        linear.register_forward_hook(lambda module, args, output: seen.add((module, output.dtype)))
    trainer = trainer_for(student, teacher, data, tmp_path, {"hidden_weight": 1.0}, bf16=True, max_steps=20)
    trainer.train()
    assert len(seen) == 2
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    student, teacher = whisper_pair()
    gradients = []
    for checkpointing in (False, True):
        kept = KeepGradients()
        trainer_for(
            copy.deepcopy(student), teacher, whisper_data(2), tmp_path, {"hidden_weight": 1.0},
            callbacks=[kept], max_steps=1, gradient_checkpointing=checkpointing,
        ).train()  # fmt: skip
        gradients.append(kept.gradients)
    assert largest_difference(*gradients) < 1e-6


@pytest.mark.parametrize("pair", [whisper_pair, ctc_pair])
def test_evaluation_gives_the_loss_without_labels(pair, tmp_path):
    student, teacher = pair()
    data = whisper_data(3, labels=False) if pair is whisper_pair else ctc_data(3, labels=False)
    trainer = trainer_for(
        student, teacher, data, tmp_path, {"hidden_weight": 1.0}, per_device_eval_batch_size=3
    )
    metrics = trainer.evaluate(eval_dataset=data)
    with torch.no_grad():
        expected = trainer._losses(student.eval(), collate(data))[0]["hidden"]
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    student.train()
    trainer.train()


def test_components_have_their_own_learning_rates(tmp_path):
    student, teacher = whisper_pair()
    rates = {"shared": 1e-3, "lora": 2e-3, "diagonal": 3e-3}
    weights = {"hidden_weight": 1.0, "final_weight": 1.0, "learning_rates": rates}
    trainer = trainer_for(
        student,
        teacher,
        whisper_data(2),
        tmp_path,
        weights,
        max_steps=1,
        optim="sgd",
        lr_scheduler_type="constant",
    )
    before, kept = weights_of(student), KeepGradients()
    trainer.add_callback(kept)
    trainer.train()
    seen = set()
    for name, gradient in kept.gradients.items():
        vector = name.endswith(("diagonal", "proj.bias", "fc1.bias", "fc2.bias"))
        kind = (
            "shared"
            if ".shared." in name
            else "lora"
            if "residual_" in name
            else "diagonal"
            if vector
            else "rest"
        )
        seen.add(kind)
        update = before[name] - weights_of(student)[name]
        torch.testing.assert_close(update, rates.get(kind, 1e-2) * gradient, rtol=1e-2, atol=1e-7, msg=name)
    assert seen == {"shared", "lora", "diagonal", "rest"}


def test_learning_rates_of_what_is_not_trained_are_refused(tmp_path):
    _, dense = whisper_pair()
    weights = {"labels_weight": 1.0, "learning_rates": {"lora": 1e-3}}
    with pytest.raises(ValueError, match="learning_rates"):
        trainer_for(dense, None, whisper_data(2), tmp_path, weights).train()


# What is refused


def test_a_trainer_without_the_teacher_it_needs_is_refused(tmp_path):
    student, _ = whisper_pair()
    with pytest.raises(ValueError, match="teacher"):
        trainer_for(student, None, whisper_data(2), tmp_path, {"hidden_weight": 1.0})


@pytest.mark.parametrize(
    ("field", "value", "weights", "problem"),
    [
        ("encoder_layers", 2, {"hidden_weight": 1.0}, "num_hidden_layers, 4, got 2"),
        ("num_mel_bins", 80, {"final_weight": 1.0}, "num_mel_bins, 16, got 80"),
        ("vocab_size", 500, {"logits_weight": 1.0}, r"vocab_size, \d+, got 500"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(field, value, weights, problem, tmp_path):
    student, teacher = whisper_pair()
    config = copy.deepcopy(teacher.config)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=problem):
        trainer_for(student, WhisperForConditionalGeneration(config), whisper_data(2), tmp_path, weights)


def test_a_checkpoint_remembers_the_teacher(tmp_path):
    student, teacher = whisper_pair()
    other = randomize_(copy.deepcopy(teacher), 7)
    trainers = [
        trainer_for(student, each, whisper_data(2), tmp_path, {"logits_weight": 1.0})
        for each in (teacher, teacher, other)
    ]
    first, again, third = (run_of(trainer) for trainer in trainers)
    assert first == again
    assert {name for name in first if first[name] != third[name]} == {"teacher"}


def test_a_student_cannot_teach_itself_and_stays_trainable(tmp_path):
    student, _ = whisper_pair()
    trainable = [parameter.requires_grad for parameter in student.parameters()]
    with pytest.raises(ValueError, match="`teacher` must be another model than the student"):
        trainer_for(student, student, whisper_data(2), tmp_path, {"logits_weight": 1.0})
    assert [parameter.requires_grad for parameter in student.parameters()] == trainable


def test_a_teacher_of_another_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no encoder \(WhisperEncoder\)"):
        trainer_for(whisper_pair()[0], ctc_pair()[1], whisper_data(2), tmp_path, {"hidden_weight": 1.0})


def test_layers_that_are_dropped_at_random_cannot_be_compared(tmp_path):
    student, teacher = ctc_pair(layerdrop=0.1)
    with pytest.raises(ValueError, match="layerdrop"):
        trainer_for(student, teacher, ctc_data(2), tmp_path, {"hidden_weight": 1.0})


@pytest.mark.parametrize("pair", [whisper_pair, ctc_pair])
def test_a_batch_without_the_labels_a_loss_needs_is_refused(pair, tmp_path):
    student, teacher = pair()
    data = whisper_data(2, labels=False) if pair is whisper_pair else ctc_data(2, labels=False)
    trainer = trainer_for(student, teacher, data, tmp_path, {"labels_weight": 1.0})
    with pytest.raises(ValueError, match="labels"):
        trainer.train()


def test_losses_of_trainer_that_would_be_ignored_are_refused(tmp_path):
    student, teacher = whisper_pair()
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_for(
            student, teacher, whisper_data(2), tmp_path, {"hidden_weight": 1.0}, label_smoothing_factor=0.1
        )
