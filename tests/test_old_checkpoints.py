"""Checkpoints that version 0.1.0 wrote: they load, and give the outputs that 0.1.0 gave."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq

import hf_residual_transformer as hrt

FOLDER = Path(__file__).parent / "data" / "0.1.0"
CASES = {
    "whisper-shared": (AutoModelForSpeechSeq2Seq, hrt.ResidualWhisperForConditionalGeneration),
    "whisper-bits": (AutoModelForSpeechSeq2Seq, hrt.ResidualWhisperForConditionalGeneration),
    "wav2vec2-shared": (AutoModelForCTC, hrt.ResidualWav2Vec2ForCTC),
    "wav2vec2-bits": (AutoModelForCTC, hrt.ResidualWav2Vec2ForCTC),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_0_1_0_loads_with_equal_outputs_and_saves_the_same_tensors(name, tmp_path):
    auto_class, residual_class = CASES[name]
    expected = load_file(FOLDER / name / "expected.safetensors")
    model = auto_class.from_pretrained(FOLDER / name)
    assert type(model) is residual_class
    inputs = {key: value for key, value in expected.items() if key != "logits"}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected["logits"], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    old, new = load_file(FOLDER / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    # The low rank had the names of an adapter's.
    old = {re.sub(r"\.lora_([AB])$", r".residual_\1", key): value for key, value in old.items()}
    assert old.keys() == new.keys()
    assert all(torch.equal(value, new[key]) for key, value in old.items())
