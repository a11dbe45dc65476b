"""Greedy transcripts as labels, and Whisper on windows shorter than 30 seconds, for encoder states too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from ..whisper import language_and_task_ids
from .collators import LABEL_PADDING, is_multilingual

FRAMES_A_SECOND = 100  # the rate of mel features
SAMPLES_A_SECOND = 16_000
TOKENS_A_SECOND = 6  # fast speech in a language that needs many tokens


@contextmanager
def encoder_window(encoder: Any, num_frames: int) -> Iterator[None]:
    """Inside this context, a Whisper encoder takes `num_frames` mel frames of 10 ms each instead of 3000.

    The frames have the first positions of the full window. A window of 10 seconds costs less than a third of the full
    one. The context changes no weights, and restores the config at its end. Several threads must not share one model.

    Raises:
        ValueError: if the encoder has no positions for so many frames, or its stride does not divide their number.
    """
    config, positions = encoder.config, encoder.embed_positions
    full = config.max_source_positions, positions.num_embeddings
    stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]
    limit = stride * positions.num_embeddings
    if num_frames % stride or not 0 < num_frames <= limit:
        raise ValueError(
            f"`num_frames` must be a multiple of {stride} and from {stride} to {limit}, got {num_frames}"
        )
    try:
        config.max_source_positions = positions.num_embeddings = num_frames // stride
        yield
    finally:
        config.max_source_positions, positions.num_embeddings = full


def encode(encoder: Any, input_features: Tensor, **kwargs: Any) -> Any:
    """The output of a Whisper encoder for mel features, which may be shorter than its window (see `encoder_window`).

    Args:
        encoder: the encoder.
        input_features: mel features of shape (batch_size, num_mel_bins, num_frames).
        kwargs: further arguments of the encoder.
    """
    with encoder_window(encoder, input_features.shape[-1]):
        return encoder(input_features, **kwargs)


def complete_token_ids(model: Any, tokenizer: Any = None) -> None:
    """Gives a multilingual Whisper the numbers of its language and task tokens, which older fine-tunes lack.

    `lang_to_id` and `task_to_id` of the generation config are set where they are missing.

    Args:
        model: a multilingual Whisper.
        tokenizer: the model's; by default that of `model.processor`, or the one saved with the model.

    Raises:
        ValueError: if there is no tokenizer, or it has no such tokens.
    """
    config = model.generation_config
    if getattr(config, "lang_to_id", None) and getattr(config, "task_to_id", None):
        return
    if tokenizer is None:
        tokenizer = getattr(getattr(model, "processor", None), "tokenizer", None)
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                "the generation config of a multilingual Whisper must have `lang_to_id` and `task_to_id`, and "
                f"{model.name_or_path or 'the model'!r} has neither these nor a tokenizer to take them from; set "
                "`model.processor`, or save the tokenizer beside the model"
            ) from error
    languages, tasks = language_and_task_ids(tokenizer.get_vocab())
    if not getattr(config, "lang_to_id", None):
        config.lang_to_id = languages
    if not getattr(config, "task_to_id", None):
        config.task_to_id = tasks
    config.is_multilingual = True


@torch.no_grad()
def transcribe(
    model: Any, input_features: Tensor, encoder_states: Tensor | None = None, heard_frames: int | None = None
) -> Tensor:
    """Transcribes mel features, which may be shorter than Whisper's window, into labels.

    Decoding is greedy, in the language that the model detects and without timestamps. A transcript has at most
    `TOKENS_A_SECOND` tokens for each second, so that endless repetitions stop.

    Args:
        model: a Whisper for generation.
        input_features: mel features of shape (batch_size, num_mel_bins, num_frames).
        encoder_states: the encoder's states for them, (batch_size, num_positions, hidden_size), if they are known.
        heard_frames: the number of frames whose seconds limit the tokens, by default all.

    Returns:
        Labels of shape (batch_size, num_tokens), as from `Seq2SeqCollator`: language and task if the model is
        multilingual, the text, its end, and -100 as padding.
    """
    if is_multilingual(model):
        complete_token_ids(model)
    config, encoder = model.generation_config, model.get_encoder()
    num_frames = input_features.shape[-1]
    untimed = getattr(config, "no_timestamps_token_id", None)
    tail = [] if untimed is None else [untimed]
    spoken: list[list[int]] = [[] for _ in input_features]
    with encoder_window(encoder, num_frames):
        encoded = BaseModelOutput(encoder_states) if encoder_states is not None else encoder(input_features)
        if is_multilingual(model):
            languages = model.detect_language(encoder_outputs=encoded, generation_config=config).tolist()
            task = config.task_to_id["transcribe"]
            spoken = [[language, task] for language in languages]
        heads = [[config.decoder_start_token_id, *head, *tail] for head in spoken]
        prefix = torch.tensor(heads, device=input_features.device)
        # Whisper's own `generate` would look for more audio after a token that may be a timestamp.
        tokens = GenerationMixin.generate(
            model,
            encoder_outputs=encoded,
            # Whisper has no use for it here, but `generate` warns of a batch without one.
            attention_mask=torch.ones_like(input_features[:, 0], dtype=torch.long),
            decoder_input_ids=prefix,
            decoder_attention_mask=torch.ones_like(prefix),
            max_length=prefix.shape[1]
            + math.ceil((heard_frames or num_frames) / FRAMES_A_SECOND * TOKENS_A_SECOND),
            max_new_tokens=None,
            do_sample=False,
            num_beams=1,
        )[:, 1:]
    ended = (tokens == config.eos_token_id).int()
    return tokens.masked_fill(ended.cumsum(1) > ended, LABEL_PADDING)


@torch.no_grad()
def greedy_labels(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Labels of a sequence-to-sequence model for recordings of any length, as `transcribe` gives those of Whisper.

    Args:
        model: the model.
        inputs: one of `input_values`, samples, and `input_features`, and perhaps an `attention_mask`.

    Returns:
        (batch_size, num_tokens): the text, its end, and -100 as padding.
    """
    samples = inputs.get("input_values")
    seconds = (
        inputs["input_features"].shape[1] / FRAMES_A_SECOND
        if samples is None
        else samples.shape[1] / SAMPLES_A_SECOND
    )
    limit = math.ceil(seconds * TOKENS_A_SECOND)
    tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=limit)[:, 1:]
    ended = (tokens == model.generation_config.eos_token_id).int()
    return tokens.masked_fill(ended.cumsum(1) > ended, LABEL_PADDING)


def has_words(model: Any, labels: Tensor) -> bool:
    """Whether there are tokens of text among labels, and not only those that begin and end it."""
    config = model.config
    if config.model_type == "whisper":  # whose special tokens are the last
        return bool(((labels < config.eos_token_id) & (labels >= 0)).any())
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    special = [
        LABEL_PADDING,
        *(value for name in names if (value := getattr(config, name, None)) is not None),
    ]
    return not bool(torch.isin(labels, torch.tensor(special, device=labels.device)).all())
