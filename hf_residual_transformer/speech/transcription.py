"""Whisper on windows shorter than its own: encoder states, and greedy transcripts as labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from .collators import LABEL_PADDING, is_multilingual

FRAMES_A_SECOND = 100  # of Whisper's mel features
TOKENS_A_SECOND = 6  # fast speech in a language that takes many


@contextmanager
def encoder_window(encoder: Any, num_frames: int) -> Iterator[None]:
    """Inside, a Whisper encoder takes `num_frames` mel frames (10 ms each) instead of its 3000, at the
    positions that the first so many have. A window of 10 seconds costs less than a third of the full one.

    Weights are not touched, and the config is as before afterwards. Not for several threads with one model.

    Raises:
        ValueError: when the encoder has no positions for so many frames, or its stride does not divide them.
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
    """The output of a Whisper encoder for mel features, (batch_size, num_mel_bins, num_frames), that may be
    shorter than its window; see `encoder_window`. `kwargs` go to the encoder.
    """
    with encoder_window(encoder, input_features.shape[-1]):
        return encoder(input_features, **kwargs)


@torch.no_grad()
def transcribe(model: Any, input_features: Tensor) -> Tensor:
    """What a Whisper makes of mel features, which may be shorter than its window, as labels: greedy, in the language
    that it hears, without timestamps, and at most `TOKENS_A_SECOND`, so that what it repeats ends.

    Returns:
        (batch_size, num_tokens), as from `Seq2SeqCollator`: language and task, text, end, and -100.
    """
    config, encoder = model.generation_config, model.get_encoder()
    num_frames = input_features.shape[-1]
    untimed = getattr(config, "no_timestamps_token_id", None)
    tail = [] if untimed is None else [untimed]
    spoken: list[list[int]] = [[] for _ in input_features]
    with encoder_window(encoder, num_frames):
        encoded = encoder(input_features)
        if is_multilingual(model):
            languages = model.detect_language(encoder_outputs=encoded, generation_config=config).tolist()
            task = config.task_to_id["transcribe"]
            spoken = [[language, task] for language in languages]
        heads = [[config.decoder_start_token_id, *head, *tail] for head in spoken]
        prefix = torch.tensor(heads, device=input_features.device)
        # Not Whisper's own, which looks for more of the audio after what may be a timestamp.
        tokens = GenerationMixin.generate(
            model,
            encoder_outputs=encoded,
            decoder_input_ids=prefix,
            decoder_attention_mask=torch.ones_like(prefix),
            max_length=prefix.shape[1] + math.ceil(num_frames / FRAMES_A_SECOND * TOKENS_A_SECOND),
            max_new_tokens=None,
            do_sample=False,
            num_beams=1,
        )[:, 1:]
    ended = (tokens == config.eos_token_id).int()
    return tokens.masked_fill(ended.cumsum(1) > ended, LABEL_PADDING)
