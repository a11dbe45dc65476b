"""Residual wav2vec 2.0: the dense classes of transformers with shared encoder layers."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
)

from .configuration import ResidualConfig, ResidualConfigMixin
from .families import WAV2VEC2
from .modeling import ResidualMixin


@strict
class ResidualWav2Vec2Config(ResidualConfigMixin, Wav2Vec2Config):
    """`Wav2Vec2Config` with a `residual_config`, a `ResidualConfig` or a dict of its fields."""

    model_type = "residual_wav2vec2"
    residual_config: ResidualConfig | dict | None = None


class ResidualWav2Vec2Model(ResidualMixin, Wav2Vec2Model):
    """`Wav2Vec2Model` whose encoder layers share weights."""

    config_class = ResidualWav2Vec2Config
    family = WAV2VEC2


class ResidualWav2Vec2ForCTC(ResidualMixin, Wav2Vec2ForCTC):
    """`Wav2Vec2ForCTC` whose encoder layers share weights."""

    config_class = ResidualWav2Vec2Config
    family = WAV2VEC2


class ResidualWav2Vec2ForPreTraining(ResidualMixin, Wav2Vec2ForPreTraining):
    """`Wav2Vec2ForPreTraining` whose encoder layers share weights."""

    config_class = ResidualWav2Vec2Config
    family = WAV2VEC2


class ResidualWav2Vec2ForSequenceClassification(ResidualMixin, Wav2Vec2ForSequenceClassification):
    """`Wav2Vec2ForSequenceClassification` whose encoder layers share weights."""

    config_class = ResidualWav2Vec2Config
    family = WAV2VEC2


class ResidualWav2Vec2ForAudioFrameClassification(ResidualMixin, Wav2Vec2ForAudioFrameClassification):
    """`Wav2Vec2ForAudioFrameClassification` whose encoder layers share weights."""

    config_class = ResidualWav2Vec2Config
    family = WAV2VEC2


class ResidualWav2Vec2ForXVector(ResidualMixin, Wav2Vec2ForXVector):
    """`Wav2Vec2ForXVector` whose encoder layers share weights."""

    config_class = ResidualWav2Vec2Config
    family = WAV2VEC2
