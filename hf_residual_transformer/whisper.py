"""Residual Whisper: the dense classes of transformers with shared encoder layers."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import (
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from .configuration import ResidualConfig, ResidualConfigMixin
from .families import WHISPER
from .modeling import ResidualMixin


@strict
class ResidualWhisperConfig(ResidualConfigMixin, WhisperConfig):
    """`WhisperConfig` with a `residual_config`, a `ResidualConfig` or a dict of its fields."""

    model_type = "residual_whisper"
    residual_config: ResidualConfig | dict | None = None


class ResidualWhisperModel(ResidualMixin, WhisperModel):
    """`WhisperModel` whose encoder layers share weights."""

    config_class = ResidualWhisperConfig
    family = WHISPER


class ResidualWhisperForConditionalGeneration(ResidualMixin, WhisperForConditionalGeneration):
    """`WhisperForConditionalGeneration` whose encoder layers share weights."""

    config_class = ResidualWhisperConfig
    family = WHISPER


class ResidualWhisperForAudioClassification(ResidualMixin, WhisperForAudioClassification):
    """`WhisperForAudioClassification` whose encoder layers share weights."""

    config_class = ResidualWhisperConfig
    family = WHISPER
