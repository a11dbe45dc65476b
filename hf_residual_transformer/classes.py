"""The residual classes of every family: for each dense class that an Auto class of transformers knows, one that puts
`ResidualMixin` before it.

`ResidualHubertForCTC` and all others are attributes of this module, made when they are first asked for, so that a
process imports the modelling code of the families that it uses.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    CONFIG_MAPPING,
    FEATURE_EXTRACTOR_MAPPING,
    PROCESSOR_MAPPING,
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    AutoModelForPreTraining,
    AutoModelForRNNT,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTDT,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto as names
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .configuration import ResidualConfig, ResidualConfigMixin
from .families import FAMILIES, WHISPER, Family
from .folders import CODE
from .modeling import ResidualGenerationMixin, ResidualMixin

PREFIX, MODEL_TYPE_PREFIX = "Residual", "residual_"
# The Auto classes of models that transcribe, and of others; with each, the dense classes' names by `model_type`.
RECOGNIZERS: dict[Any, dict[str, Any]] = {
    AutoModelForSpeechSeq2Seq: names.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    AutoModelForCTC: names.MODEL_FOR_CTC_MAPPING_NAMES,
    AutoModelForRNNT: names.MODEL_FOR_RNNT_MAPPING_NAMES,
    AutoModelForTDT: names.MODEL_FOR_TDT_MAPPING_NAMES,
}
AUTO_MODELS: dict[Any, dict[str, Any]] = {
    AutoModel: names.MODEL_MAPPING_NAMES,
    **RECOGNIZERS,
    AutoModelForPreTraining: names.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    AutoModelForAudioClassification: names.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForAudioFrameClassification: names.MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForAudioXVector: names.MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES,
}


# The dense family's own, since all that the compact form changes is the model.
PROCESSING: dict[Any, Any] = {
    AutoFeatureExtractor: FEATURE_EXTRACTOR_MAPPING,
    AutoTokenizer: TOKENIZER_MAPPING,
    AutoProcessor: PROCESSOR_MAPPING,
}


def register(family: Family) -> None:
    """Makes the Auto classes of transformers know a family's residual classes."""
    config_class = config_class_of(family)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto, cls in model_classes_of(family).items():
        auto.register(config_class, cls, exist_ok=True)
    for auto, mapping in PROCESSING.items():
        cls = mapping.get(CONFIG_MAPPING[family.name], None)
        if cls is not None:
            auto.register(config_class, cls, exist_ok=True)


def dense_names(family: Family) -> dict[Any, str]:
    """The name of the dense class for each Auto class that knows the family."""
    return {auto: known[family.name] for auto, known in AUTO_MODELS.items() if family.name in known}


def config_class_of(family: Family) -> type[ResidualConfigMixin]:
    """The config class of a family, such as `ResidualHubertConfig`."""
    return _made(f"{PREFIX}{CONFIG_MAPPING_NAMES[family.name]}", lambda: _config_class(family))


def model_classes_of(family: Family) -> dict[Any, type[ResidualMixin]]:
    """The model classes of a family, by the Auto class that knows each."""
    return {auto: _model_class_of(family, auto) for auto in dense_names(family)}


def all_model_classes() -> list[type[ResidualMixin]]:
    """The model classes of all families."""
    return [cls for family in FAMILIES.values() for cls in dict.fromkeys(model_classes_of(family).values())]


def _model_class_of(family: Family, auto: Any) -> type[ResidualMixin]:
    name = dense_names(family)[auto]
    return _made(f"{PREFIX}{name}", lambda: _model_class(family, auto))


def _made(name: str, make: Any) -> Any:
    """The class of this name, as an attribute of this module."""
    if name not in globals():
        cls = make()
        cls.__name__ = cls.__qualname__ = name
        globals()[name] = cls
    return globals()[name]


def _config_class(family: Family) -> type[ResidualConfigMixin]:
    dense: Any = CONFIG_MAPPING[family.name]

    if family.decoder is None:

        class Config(ResidualConfigMixin, dense):  # type: ignore[misc]
            model_type = f"{MODEL_TYPE_PREFIX}{family.name}"
            residual_config: ResidualConfig | dict | None = None

    else:

        class Config(ResidualConfigMixin, dense):  # type: ignore[misc,no-redef]
            model_type = f"{MODEL_TYPE_PREFIX}{family.name}"
            residual_config: ResidualConfig | dict | None = None
            decoder_residual_config: ResidualConfig | dict | None = None
            embedding_bits: int | list | None = None

    if family is WHISPER:

        class WhisperConfig(Config):
            short_windows: bool = False

        Config = WhisperConfig  # type: ignore[misc]
    Config.code_map = _code_map(family)
    Config.__doc__ = f"`{dense.__name__}` with settings of the compact parts; see `ResidualConfigMixin`."
    return strict(Config)


def _code_map(family: Family) -> dict[str, str]:
    """By name of the Auto class, where a checkpoint that carries its code has the family's class for it."""
    found = {AutoConfig: CONFIG_MAPPING_NAMES[family.name], **dense_names(family)}
    return {auto.__name__: f"{CODE.stem}.{PREFIX}{name}" for auto, name in found.items()}


def _model_class(family: Family, auto: Any) -> type[ResidualMixin]:
    dense: Any = auto._model_mapping[CONFIG_MAPPING[family.name]]
    mixin = ResidualGenerationMixin if dense.can_generate() else ResidualMixin
    members = {
        "__doc__": f"`{dense.__name__}` in its compact form.",
        "__module__": __name__,
        "config_class": config_class_of(family),
        "family": family,
    }
    return type(dense.__name__, (mixin, dense), members)


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values() if name.startswith(PREFIX) else ():
        if name == f"{PREFIX}{CONFIG_MAPPING_NAMES[family.name]}":
            return config_class_of(family)
        for auto, dense_name in dense_names(family).items():
            if name == f"{PREFIX}{dense_name}":
                return _model_class_of(family, auto)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
