"""Every class through its Auto class: heads, processors and pipelines from a saved folder."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import (
    SAMPLING_RATE,
    randomize_,
    speech,
    tiny_wav2vec2_config,
    tiny_whisper_config,
    wav2vec2_processor,
    whisper_generation_config,
    whisper_processor,
)
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    AutoModelForPreTraining,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)

import hf_residual_transformer as hrt
from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.classes import model_classes_of
from hf_residual_transformer.families import FAMILIES
from hf_residual_transformer.modeling import residual_linears

SMALL = ResidualConfig(group_size=3, rank=2)
HEADS = {
    "ResidualWhisperModel": AutoModel,
    "ResidualWhisperForConditionalGeneration": AutoModelForSpeechSeq2Seq,
    "ResidualWhisperForAudioClassification": AutoModelForAudioClassification,
    "ResidualWav2Vec2Model": AutoModel,
    "ResidualWav2Vec2ForCTC": AutoModelForCTC,
    "ResidualWav2Vec2ForPreTraining": AutoModelForPreTraining,
    "ResidualWav2Vec2ForSequenceClassification": AutoModelForAudioClassification,
    "ResidualWav2Vec2ForAudioFrameClassification": AutoModelForAudioFrameClassification,
    "ResidualWav2Vec2ForXVector": AutoModelForAudioXVector,
}


def build(name: str):
    config = tiny_whisper_config if "Whisper" in name else tiny_wav2vec2_config
    options = {"mask_time_prob": 0.5} if name.endswith("PreTraining") else {}
    return randomize_(getattr(hrt, name)(config(residual_config=SMALL, num_labels=3, **options)))


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """A batch of two, with what gives the class a loss."""
    generator = torch.Generator().manual_seed(0)
    if "Whisper" in name:
        features = {"input_features": torch.randn(2, 16, 100, generator=generator)}
        if name.endswith("Model"):
            return features | {"decoder_input_ids": torch.tensor([[257, 72], [257, 80]])}
        return features | {"labels": torch.tensor([0, 2] if "Audio" in name else [[72, 73], [80, 81]])}
    values = {"input_values": torch.randn(2, 1600, generator=generator)}
    frames = 80
    if name.endswith("PreTraining"):
        mask = torch.zeros(2, frames, dtype=torch.bool)
        mask[:, 10:30] = True
        negatives = torch.randint(0, 2 * frames, (2, frames, 4), generator=generator)
        return values | {"mask_time_indices": mask, "sampled_negative_indices": negatives}
    labels = {
        "CTC": torch.tensor([[5, 6], [7, 8]]),
        "FrameClassification": torch.nn.functional.one_hot(torch.arange(2 * frames).view(2, -1) % 3, 3),
        "SequenceClassification": torch.tensor([0, 2]),
        "XVector": torch.tensor([0, 2]),
    }
    suffix = next((suffix for suffix in labels if name.endswith(suffix)), None)
    return values if suffix is None else values | {"labels": labels[suffix]}


def loss_of(outputs) -> torch.Tensor:
    return outputs[0].pow(2).mean() if outputs.get("loss") is None else outputs.loss


def test_every_head_of_the_contract_is_covered():
    made = {
        cls.__name__ for name in ("whisper", "wav2vec2") for cls in model_classes_of(FAMILIES[name]).values()
    }
    assert made == set(HEADS)
    assert hrt.__version__.count(".") == 2


@pytest.mark.parametrize(("name", "auto_class"), HEADS.items())
def test_every_head_runs_backward_and_round_trips_through_its_auto_class(name, auto_class, tmp_path):
    model = build(name)
    outputs = model(**inputs_of(name))
    loss_of(outputs).backward()
    for path, linear in residual_linears(model):
        for component, parameter in [*linear.named_parameters(), ("U", linear.shared.weight)]:
            # a key's bias moves no softmax
            unmoved = path.endswith("k_proj") and component == "bias"
            assert unmoved or parameter.grad.any(), (path, component)
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert type(auto_class.from_config(AutoConfig.from_pretrained(tmp_path))) is type(model)
    dense = model.merge()
    assert type(dense).__name__ == name.removeprefix("Residual")
    with torch.no_grad():
        for other in (loaded, dense):
            torch.manual_seed(0)
            actual = other.eval()(**inputs_of(name))
            torch.manual_seed(0)
            torch.testing.assert_close(actual[0], model(**inputs_of(name))[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=["whisper", "wav2vec2"])
def folder(request, tmp_path_factory):
    """A compact model with its processor beside it."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "whisper":
        model, processor = build("ResidualWhisperForConditionalGeneration"), whisper_processor()
        model.generation_config = whisper_generation_config()
    else:
        model, processor = build("ResidualWav2Vec2ForCTC"), wav2vec2_processor(path)
        (path / "vocab.json").rename(path.parent / "vocab.json")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def classes_of(path) -> tuple[type, type, type]:
    if path.name.startswith("whisper"):
        return WhisperProcessor, WhisperFeatureExtractor, WhisperTokenizer
    return Wav2Vec2Processor, Wav2Vec2FeatureExtractor, Wav2Vec2CTCTokenizer


def test_processors_load_from_the_compact_folder(folder):
    processor, extractor, tokenizer = classes_of(folder)
    assert type(AutoProcessor.from_pretrained(folder)) is processor
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is extractor
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, tokenizer)
    assert loaded.get_vocab() == AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()


def test_processors_load_where_only_the_models_config_tells_their_class(folder, tmp_path):
    """Folders of older transformers, and those that an extractor and a tokenizer were saved to one by one."""
    processor, extractor, tokenizer = classes_of(folder)
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(folder)
    loaded.feature_extractor.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    for file, keys in {
        "preprocessor_config.json": ("feature_extractor_type", "processor_class"),
        "tokenizer_config.json": ("tokenizer_class", "processor_class"),
    }.items():
        values = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({k: v for k, v in values.items() if k not in keys}))
    assert not (tmp_path / "processor_config.json").exists()
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is extractor
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), tokenizer)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is processor


def test_the_asr_pipeline_knows_the_family_and_transcribes(folder):
    whisper = folder.name.startswith("whisper")
    recognise = pipeline("automatic-speech-recognition", model=str(folder))
    assert type(recognise.model).__name__.startswith("Residual")
    assert recognise.type == ("seq2seq_whisper" if whisper else "ctc")
    audio = {"raw": (10 * speech(0.9)).numpy(), "sampling_rate": SAMPLING_RATE}
    dense = pipeline(
        "automatic-speech-recognition",
        model=recognise.model.merge(),
        tokenizer=recognise.tokenizer,
        feature_extractor=recognise.feature_extractor,
    )
    assert dense.type == recognise.type
    options = [{}, {"return_timestamps": True if whisper else "char"}]
    for option in options:
        result = recognise(dict(audio), **option)
        assert result == dense(dict(audio), **option)
        assert isinstance(result["text"], str) and result["text"]
    long = {"raw": (10 * speech(2.5)).numpy(), "sampling_rate": SAMPLING_RATE}
    chunked = {"chunk_length_s": 1, "stride_length_s": 0.2} | ({"return_timestamps": True} if whisper else {})
    assert recognise(dict(long), **chunked) == dense(dict(long), **chunked)
