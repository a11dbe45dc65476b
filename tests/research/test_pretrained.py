"""Real weights and real speech: what a user does first, on whisper-tiny.en. Marked, as the weights are fetched."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration

import hf_residual_transformer as hrt
from hf_residual_transformer.speech.datasets import load_speech_dataset
from hf_residual_transformer.speech.windows import calibration_batches

ROOT = Path(__file__).resolve().parents[2]
CLIP = "audio/test/en/agent-incorrect.ogg"
pytestmark = pytest.mark.pretrained


@pytest.fixture(scope="module")
def tiny_en():
    sys.path.insert(0, str(ROOT / "research"))
    try:
        from pretrained import resolve_pretrained
    finally:
        sys.path.pop(0)
    return resolve_pretrained("openai/whisper-tiny.en")


def transcribe(model, processor):
    clips = load_speech_dataset(ROOT / "sample", "test", language="en")
    audio = next(row["audio"]["array"] for row in clips if row["audio"]["path"].endswith(Path(CLIP).name))
    features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features
    tokens = model.generate(features, max_new_tokens=64)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].lower()


def test_a_compressed_whisper_still_transcribes_after_saving_loading_and_merging(tiny_en, tmp_path):
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(tiny_en)
    speech = load_speech_dataset(ROOT / "sample", "train", language="en", text_column=None)
    inputs = calibration_batches(speech, processor, num_windows=2, batch_size=1, pack=True)
    residual = hrt.ResidualConfig(
        group_size=dict.fromkeys(("q_proj", "k_proj", "fc1")) | {"out_proj": 2, "fc2": 2}
    )
    model = hrt.ResidualWhisperForConditionalGeneration.from_dense(
        tiny_en, residual, calibration=inputs, budget=0.8, iterations=2, progress=False
    )
    assert 0.78 < hrt.size_report(model).encoder.ratio <= 0.8
    model.save_pretrained(tmp_path / "compact")
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "compact")
    loaded.merge().save_pretrained(tmp_path / "dense")
    merged = WhisperForConditionalGeneration.from_pretrained(tmp_path / "dense")
    for compressed in (loaded, merged):
        text = transcribe(compressed, processor)
        assert "login incorrect" in text and "pound key" in text


def test_the_svd_start_is_worse_than_the_calibrated_one_on_real_weights(tiny_en):
    processor = AutoProcessor.from_pretrained(tiny_en)
    speech = load_speech_dataset(ROOT / "sample", "train", language="en", text_column=None)
    inputs = calibration_batches(speech, processor, num_windows=1, batch_size=1, pack=True)
    residual = hrt.ResidualConfig(
        group_size=dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), 2), rank=64
    )
    reports = {
        start: hrt.ResidualWhisperForConditionalGeneration.from_dense(
            tiny_en,
            residual,
            calibration=inputs,
            start=start,
            iterations=1,
            progress=False,
        ).conversion_report
        for start in ("svd", "calibrated")
    }
    assert reports["calibrated"].mean_error < 0.2 * reports["svd"].mean_error
