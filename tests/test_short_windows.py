"""A compact Whisper with `short_windows` does not hear the padding of short recordings, in PyTorch and exported."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    randomize_,
    speech,
    tiny_wav2vec2_config,
    tiny_whisper_config,
    whisper_generation_config,
    whisper_processor,
)
from transformers import (
    AutoModelForSpeechSeq2Seq,
    Wav2Vec2FeatureExtractor,
    WhisperForConditionalGeneration,
    pipeline,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import hf_residual_transformer as hrt
from hf_residual_transformer import whisper as whisper_module
from hf_residual_transformer.speech.transcription import encode, transcribe
from hf_residual_transformer.speech.windows import PaddedWindowCollator
from hf_residual_transformer.training.recipe import prepare_windows
from hf_residual_transformer.training.trainers import DistillationTrainer
from hf_residual_transformer.whisper import ShortWindowEncoder, num_heard_frames

FULL, MARGIN = 100, 6  # frames of tiny Whisper, and of the padding that its encoder hears here


@pytest.fixture(autouse=True)
def _small_margin(monkeypatch):
    from hf_residual_transformer.exporting import whisper as exporting

    monkeypatch.setattr(whisper_module, "MARGIN_FRAMES", MARGIN)
    monkeypatch.setattr(exporting, "MARGIN_FRAMES", MARGIN)
    monkeypatch.setattr(whisper_module, "EXTRA_FRAMES", 20)


def whisper(short_windows: bool = True) -> Any:
    """A tiny Whisper whose encoder and decoder are compact; both kinds have the same weights."""
    residual = hrt.ResidualConfig(group_size=2, rank=4)
    config = tiny_whisper_config(
        residual_config=residual, decoder_residual_config=residual, short_windows=short_windows
    )
    torch.manual_seed(0)
    model = randomize_(hrt.ResidualWhisperForConditionalGeneration(config))
    model.generation_config = whisper_generation_config()
    return model


def features(*seconds: float) -> torch.Tensor:
    """Mel features of recordings of these lengths, padded to the full window."""
    samples = [speech(length, seed=index).numpy() for index, length in enumerate(seconds)]
    return whisper_processor()(samples, sampling_rate=16_000, return_tensors="pt").input_features


def rows(*seconds: float) -> list[dict[str, Any]]:
    return [
        {"audio": {"array": speech(length, seed=index).numpy(), "sampling_rate": 16_000}, "text": "a"}
        for index, length in enumerate(seconds)
    ]


@torch.no_grad()
def states(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    return model.get_encoder()(inputs).last_hidden_state


def test_frames_that_equal_the_last_one_are_padding():
    heard = num_heard_frames(features(0.3))
    assert 30 <= heard <= 32  # a window of the Fourier transform reaches beyond the samples
    assert num_heard_frames(features(0.3, 0.6)) == num_heard_frames(features(0.6)) > heard
    assert num_heard_frames(torch.nn.functional.pad(torch.randn(1, 16, 40), (0, 60))) == 40
    assert num_heard_frames(torch.zeros(1, 16, 100)) == 0
    assert num_heard_frames(torch.randn(1, 16, 100)) == 99


def test_states_are_those_of_the_full_window_cut_after_the_margin():
    short, full = whisper(), whisper(short_windows=False)
    inputs = features(0.3, 0.5)
    heard = (num_heard_frames(inputs) + MARGIN) // 2 * 2
    with torch.no_grad():
        wanted = encode(full.get_encoder(), inputs[..., :heard]).last_hidden_state
    assert wanted.shape[1] == heard // 2 < FULL // 2
    assert torch.equal(states(short, inputs), wanted)
    assert torch.equal(states(short, inputs[..., :heard]), wanted)
    loud = torch.randn(2, 16, FULL)
    assert torch.equal(states(short, loud), states(full, loud))


def test_the_config_decides_and_is_saved(tmp_path):
    assert type(whisper().get_encoder()) is ShortWindowEncoder
    full = whisper(short_windows=False)
    assert type(full.get_encoder()) is WhisperEncoder
    with pytest.raises(ValueError, match="mel input features"):
        states(full, torch.randn(1, 16, 40))
    whisper().save_pretrained(tmp_path)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert loaded.config.short_windows
    assert torch.equal(states(loaded, features(0.3)), states(whisper(), features(0.3)))
    with pytest.raises(ValueError, match="short_windows"):
        tiny_whisper_config(residual_config=hrt.ResidualConfig(), short_windows="yes")


@pytest.mark.parametrize("frames", [0, 1, FULL + 2])
def test_frames_that_the_encoder_has_no_positions_for_are_refused(frames):
    with pytest.raises(ValueError, match=f"`input_features` must have from 2 to {FULL} frames, got {frames}"):
        states(whisper(), torch.randn(1, 16, frames))


def test_hidden_states_have_the_short_length():
    found = whisper().get_encoder()(features(0.3), output_hidden_states=True)
    assert {state.shape[1] for state in found.hidden_states} == {found.last_hidden_state.shape[1]}
    assert len(found.hidden_states) == 5


def test_training_hears_a_random_part_of_the_padding():
    encoder = whisper().get_encoder().train()
    lengths = {encoder(features(0.3)).last_hidden_state.shape[1] for _ in range(30)}
    least = (num_heard_frames(features(0.3)) + MARGIN) // 2
    assert min(lengths) >= least and max(lengths) <= least + 10 and len(lengths) > 4
    encoder.eval()
    assert len({encoder(features(0.3)).last_hidden_state.shape[1] for _ in range(9)}) == 1


def test_threads_share_a_model_whose_config_never_changes():
    model = whisper()
    inputs = [features(0.2), features(0.6)]
    wanted = [states(model, one) for one in inputs]
    seen: list[Any] = []
    model.get_encoder().layers[0].register_forward_hook(
        lambda *_: seen.append(model.config.max_source_positions)
    )
    found: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda index=index: found.extend(
                (index % 2, states(model, inputs[index % 2])) for _ in range(10)
            )
        )
        for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40 and all(torch.equal(result, wanted[index]) for index, result in found)
    assert set(seen) == {FULL // 2}
    assert model.get_encoder().embed_positions.num_embeddings == FULL // 2


def test_generate_hears_the_same_with_and_without_padding():
    model, inputs = whisper(), features(0.3)
    lengths = []
    model.get_encoder().layers[0].register_forward_hook(lambda m, a, output: lengths.append(output.shape[1]))
    padded = model.generate(inputs, language="en")
    # Where a token may be a timestamp, `generate` looks for more after it.
    assert lengths[0] == (num_heard_frames(inputs) + MARGIN) // 2
    found = model.generate(inputs[..., : num_heard_frames(inputs) + MARGIN], language="en")
    number = min(padded.shape[1], found.shape[1])
    assert number > 1 and torch.equal(found[:, :number], padded[:, :number])


def test_a_recording_of_several_windows_hears_each_of_them():
    model = whisper()
    long = whisper_processor()(
        speech(2.3).numpy(),
        sampling_rate=16_000,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )
    lengths = []
    model.get_encoder().layers[0].register_forward_hook(lambda m, a, output: lengths.append(output.shape[1]))
    found = model.generate(**long, language="en", return_timestamps=True, return_segments=True)
    assert lengths[0] == FULL // 2 and len(found["segments"][0]) > 1


def test_pipeline_and_evaluate_leave_out_the_padding():
    model, processor = whisper(), whisper_processor()
    lengths = []
    model.get_encoder().layers[0].register_forward_hook(lambda m, a, output: lengths.append(output.shape[1]))
    recognizer = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    wanted = (num_heard_frames(features(0.3)) + MARGIN) // 2
    recognizer({"raw": speech(0.3).numpy(), "sampling_rate": 16_000})
    assert lengths.pop(0) == wanted
    lengths.clear()
    hrt.evaluate(model, rows(0.3), processor=processor, language="en", progress=False)
    assert lengths.pop(0) == wanted


def test_merged_it_is_a_plain_whisper():
    merged = whisper().merge()
    assert type(merged) is WhisperForConditionalGeneration
    assert not hasattr(merged.config, "short_windows")
    full = features(0.3)
    torch.testing.assert_close(
        states(merged, full), states(whisper(short_windows=False), full), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("format", ["onnx", "sherpa-onnx"])
def test_the_exported_encoder_leaves_out_the_padding_too(format, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = whisper()
    options = {"floats": "float32", "accuracy_level": 0, "processor": whisper_processor(), "format": format}
    folder = hrt.export(model, tmp_path / "out", **options)
    if format == "onnx":
        assert "short_windows" not in json.loads((folder / "config.json").read_text())
    path = folder / "onnx" / "encoder_model.onnx" if format == "onnx" else folder / "encoder.onnx"
    session = onnxruntime.InferenceSession(path)
    for inputs in (
        features(0.3),
        features(0.3, 0.5),
        *(features(0.3)[..., :length] for length in (35, 36)),
        *(features(0.3 + index / 100) for index in range(4)),  # of even and odd numbers of frames
        torch.randn(1, 16, FULL),
        torch.zeros(1, 16, FULL),
    ):
        (found, *_) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        wanted = states(model, inputs)
        if format == "onnx":
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
        else:  # the keys of the cross-attention
            assert found.shape[2] == wanted.shape[1]


def test_windows_of_a_batch_have_one_length_and_are_padded():
    collator = PaddedWindowCollator(whisper_processor(), 1.0)
    collator.SHORTEST = 0.2
    lengths = set()
    for seed in range(8):
        batch = [
            {"audio": {"array": speech(0.9, seed=10 * seed + n).numpy(), "sampling_rate": 16_000}}
            for n in range(4)
        ]
        inputs = collator(batch)["input_features"]
        assert inputs.shape[1:] == (16, FULL) and 1 <= len(inputs) <= 4
        assert torch.equal(collator(batch)["input_features"], inputs)
        lengths.add(num_heard_frames(inputs))
    assert len(lengths) > 2 and min(lengths) < 50 and max(lengths) > 90


def distilled(student: Any, **options: Any) -> Any:
    teacher = WhisperForConditionalGeneration(tiny_whisper_config())
    randomize_(teacher).generation_config = whisper_generation_config()
    options = {
        "steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "processor": whisper_processor(),
        **options,
    }
    return hrt.distill(student, rows(0.3, 0.5, 0.2, 0.4), teacher, **options)


def test_a_distilled_student_gets_short_windows_and_the_teacher_hears_the_full_one(monkeypatch):
    lengths = set()
    forward = WhisperEncoder.forward

    def recorded(self, input_features, *args, **kwargs):
        lengths.add((type(self).__name__, input_features.shape[-1] < FULL))
        return forward(self, input_features, *args, **kwargs)

    monkeypatch.setattr(WhisperEncoder, "forward", recorded)
    monkeypatch.setattr(PaddedWindowCollator, "SHORTEST", 0.2)
    student = whisper(short_windows=False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert distilled(student, short_windows=True) is student
    assert student.config.short_windows and type(student.get_encoder()) is ShortWindowEncoder
    assert ("WhisperEncoder", False) in lengths and ("WhisperEncoder", True) not in lengths
    assert ("ShortWindowEncoder", True) in lengths
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("model.encoder.") for name in moved)
    assert distilled(student).config.short_windows  # it keeps them


def test_a_student_that_is_not_improved_keeps_its_windows():
    options = {"validation": rows(0.3, 0.4), "learning_rate": 1e3, "short_windows": True}
    student = distilled(whisper(short_windows=False), **options)
    assert not student.config.short_windows and type(student.get_encoder()) is WhisperEncoder
    assert distilled(whisper(), **options).config.short_windows


def test_scales_of_few_bits_learn_more_slowly_than_the_rest(monkeypatch):
    rates: dict[str, float] = {}
    create = DistillationTrainer.create_optimizer

    def recorded(trainer, model=None):
        optimizer = create(trainer, model)
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        rates.update({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        return optimizer

    monkeypatch.setattr(DistillationTrainer, "create_optimizer", recorded)
    few_bits = hrt.ResidualConfig(group_size=1, rank=4, shared_bits=4)
    model = hrt.ResidualWhisperForConditionalGeneration(tiny_whisper_config(residual_config=few_bits))
    distilled(randomize_(model), short_windows=True, learning_rate=1e-3, warmup_steps=0)
    scales = {rate for name, rate in rates.items() if name.endswith("weight_scale")}
    others = {rate for name, rate in rates.items() if not name.endswith("weight_scale")}
    assert list(scales) == [pytest.approx(3e-4)] and others == {1e-3}


def test_a_teacher_that_repeats_itself_is_cut_to_what_a_short_recording_can_hold():
    teacher = WhisperForConditionalGeneration(tiny_whisper_config(max_target_positions=400)).eval()
    teacher.generation_config = whisper_generation_config()
    teacher.generation_config.max_new_tokens = None
    teacher.generation_config.suppress_tokens = [teacher.config.eos_token_id]
    inputs = features(0.3)
    assert transcribe(teacher, inputs).shape[1] == 3 + 6
    assert transcribe(teacher, inputs, heard_frames=34).shape[1] == 3 + 3


def test_short_windows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"`window_seconds` must be None beside `short_windows`.*got 0.5"):
        distilled(whisper(short_windows=False), short_windows=True, window_seconds=0.5)
    other = hrt.ResidualWav2Vec2ForCTC(tiny_wav2vec2_config(residual_config=hrt.ResidualConfig()))
    with pytest.raises(ValueError, match="`short_windows` must be False for a ResidualWav2Vec2ForCTC"):
        prepare_windows(other, Wav2Vec2FeatureExtractor(), None, short_windows=True)
