"""Older Whispers, whose generation config does not say which tokens are languages and tasks."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    WHISPER_VOCAB,
    randomize_,
    tiny_whisper_config,
    whisper_generation_config,
    whisper_processor,
)
from transformers import WhisperForConditionalGeneration

from hf_residual_transformer.speech.transcription import complete_token_ids, transcribe


def older_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model = randomize_(WhisperForConditionalGeneration(tiny_whisper_config()))
    model.generation_config = whisper_generation_config()
    del model.generation_config.lang_to_id, model.generation_config.task_to_id
    return model


def features() -> torch.Tensor:
    return torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("where", ["model.processor", "the folder of the model"])
def test_labels_are_those_of_a_model_that_knows_its_tokens(tmp_path, where):
    model = older_whisper()
    if where == "model.processor":
        model.processor = whisper_processor()
    else:
        model.save_pretrained(tmp_path)
        whisper_processor().save_pretrained(tmp_path)
        model = WhisperForConditionalGeneration.from_pretrained(tmp_path)
        assert not hasattr(model.generation_config, "lang_to_id")
    labels = transcribe(model, features())
    newer = older_whisper()
    newer.generation_config = whisper_generation_config()
    assert torch.equal(labels, transcribe(newer, features()))
    assert set(labels[:, 1].tolist()) == {WHISPER_VOCAB["<|transcribe|>"]}


def test_without_a_tokenizer_the_error_says_what_to_set():
    with pytest.raises(ValueError, match=r"must have `lang_to_id` and `task_to_id`.*set `model\.processor`"):
        transcribe(older_whisper(), features())


def test_a_tokenizer_without_such_tokens_is_refused():
    class Other:
        def get_vocab(self):
            return {"a": 0, "<|en|>": 1}

    with pytest.raises(ValueError, match="got 1 languages and 0 tasks"):
        complete_token_ids(older_whisper(), Other())


def test_what_a_model_says_is_kept():
    model = older_whisper()
    model.generation_config.task_to_id = {"transcribe": 5, "translate": 6}
    complete_token_ids(model, whisper_processor().tokenizer)
    assert model.generation_config.task_to_id == {"transcribe": 5, "translate": 6}
    assert model.generation_config.lang_to_id == {
        token: WHISPER_VOCAB[token] for token in ("<|en|>", "<|de|>")
    }
