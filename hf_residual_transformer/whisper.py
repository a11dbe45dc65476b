"""What only Whisper has: tokens of languages and tasks, and an encoder that leaves out the padding of recordings."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

# Mel frames of 10 ms that the encoder hears of the padding. docs/LOG.md has the measurements.
MARGIN_FRAMES = 100
# In training, up to so many frames more are heard, so that every length of the padding is learnt.
EXTRA_FRAMES = 200
_one_at_a_time = threading.Lock()


def language_ids(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The tokens of languages that a vocabulary has, in Whisper's order."""
    return {token: vocabulary[token] for code in LANGUAGES if (token := f"<|{code}|>") in vocabulary}


def language_and_task_ids(vocabulary: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """`lang_to_id` and `task_to_id` of a multilingual model's generation config, from the tokens of its vocabulary.

    Raises:
        ValueError: if there are no tokens of languages, or not those of both tasks.
    """
    languages = language_ids(vocabulary)
    tasks = {task: vocabulary[f"<|{task}|>"] for task in TASK_IDS if f"<|{task}|>" in vocabulary}
    if not languages or len(tasks) < len(TASK_IDS):
        raise ValueError(
            "the tokenizer of a multilingual Whisper must have tokens such as <|en|> and <|transcribe|>, got "
            f"{len(languages)} languages and {len(tasks)} tasks; take the tokenizer that the model was trained with"
        )
    return languages, tasks


def num_heard_frames(input_features: Tensor) -> int:
    """The number of mel frames before the padding: those at the end that equal the last one, in every recording.

    Feature extractors pad samples with zeros, which makes such frames, or frames with zeros.

    Args:
        input_features: (batch_size, num_mel_bins, num_frames).
    """
    is_heard = (input_features != input_features[..., -1:]).any(1).any(0)
    places = is_heard.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


class ShortWindowEncoder(WhisperEncoder):
    """`WhisperEncoder` that leaves out the padding of short recordings, but for `MARGIN_FRAMES`, and accepts fewer
    frames than those of 30 seconds.

    Its output has as many positions as the frames that it hears. The recordings of a batch are cut to the length of the
    longest. In training, a random part of the padding is heard.
    """

    def forward(self, input_features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in the dense class.

        Args:
            input_features: (batch_size, num_mel_bins, num_frames), where `num_frames` is at most that of 30 seconds.
            args, kwargs: as in the dense class.

        Raises:
            ValueError: for more frames, or none.
        """
        stride = self.conv1.stride[0] * self.conv2.stride[0]
        margin = MARGIN_FRAMES + (random.randint(0, EXTRA_FRAMES) if self.training else 0)
        positions: Any = self.embed_positions
        # The class of transformers takes the length from its config. The whole model's stays as it is, and so that
        # threads may share a model, one encodes at a time.
        with _one_at_a_time:
            full, given = (self.config, positions.num_embeddings), input_features.shape[-1]
            limit = stride * positions.num_embeddings
            if not stride <= given <= limit:
                raise ValueError(f"`input_features` must have from {stride} to {limit} frames, got {given}")
            num_frames = min(num_heard_frames(input_features) + margin, given) // stride * stride
            try:
                self.config = copy.copy(self.config)
                self.config.max_source_positions = positions.num_embeddings = num_frames // stride
                return super().forward(input_features[..., :num_frames], *args, **kwargs)
            finally:
                self.config, positions.num_embeddings = full


@cache
def _short_window_encoder() -> type[WhisperEncoder]:
    """The class. Transformers returns hidden states only of classes of which it has built a model."""
    with torch.device("meta"):
        ShortWindowEncoder(WhisperConfig(encoder_layers=0))
    return ShortWindowEncoder


def has_short_windows(config: Any) -> bool:
    """Whether a config, of any family, asks for an encoder that leaves out padding."""
    return getattr(config, "short_windows", False)


def choose_windows(model: nn.Module) -> None:
    """Gives a Whisper the encoder that its config asks for by `short_windows`."""
    chosen = _short_window_encoder() if has_short_windows(model.config) else WhisperEncoder
    for module in model.modules():
        if type(module) in (WhisperEncoder, ShortWindowEncoder):
            module.__class__ = chosen
