"""Residual Whisper: the dense classes of transformers with compact encoder and decoder layers and embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

from .configuration import ResidualConfig, ResidualConfigMixin
from .families import WHISPER
from .layers import unpacked_weights
from .modeling import ResidualMixin


def language_and_task_ids(vocabulary: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """`lang_to_id` and `task_to_id` of a generation config, from the tokens that a vocabulary has."""
    languages = {token: vocabulary[token] for code in LANGUAGES if (token := f"<|{code}|>") in vocabulary}
    tasks = {task: vocabulary[f"<|{task}|>"] for task in TASK_IDS if f"<|{task}|>" in vocabulary}
    return languages, tasks


@strict
class ResidualWhisperConfig(ResidualConfigMixin, WhisperConfig):
    """`WhisperConfig` with a `residual_config` for the encoder and a `decoder_residual_config`, each a `ResidualConfig`
    or a dict of its fields, and with `embedding_bits`; see `ResidualConfigMixin`.
    """

    model_type = "residual_whisper"
    residual_config: ResidualConfig | dict | None = None
    decoder_residual_config: ResidualConfig | dict | None = None
    embedding_bits: int | None = None


class ResidualWhisperModel(ResidualMixin, WhisperModel):
    """`WhisperModel` in its compact form."""

    config_class = ResidualWhisperConfig
    family = WHISPER


class ResidualWhisperForConditionalGeneration(ResidualMixin, WhisperForConditionalGeneration):
    """`WhisperForConditionalGeneration` in its compact form."""

    config_class = ResidualWhisperConfig
    family = WHISPER

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Each token uses the decoder's weights again, so they are unpacked once and kept
        meanwhile, in the memory of a dense decoder.
        """
        with unpacked_weights(self.get_decoder()):
            return super().generate(*args, **kwargs)


class ResidualWhisperForAudioClassification(ResidualMixin, WhisperForAudioClassification):
    """`WhisperForAudioClassification` in its compact form."""

    config_class = ResidualWhisperConfig
    family = WHISPER
