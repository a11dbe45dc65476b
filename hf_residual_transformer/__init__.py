"""Hugging Face speech encoders whose layers share weights: `W_l = U_g + B_l A_l + D_l` (arXiv 2310.02489).

Importing this package registers its classes with the Auto classes of transformers, and does nothing else. What
`compress`, `distill`, `evaluate` and `export` need beyond transformers is imported when they are called.
"""

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
)

from .api import compress, distill, evaluate, export
from .configuration import ResidualConfig
from .reporting import size_report
from .version import __version__
from .wav2vec2 import (
    ResidualWav2Vec2Config,
    ResidualWav2Vec2ForAudioFrameClassification,
    ResidualWav2Vec2ForCTC,
    ResidualWav2Vec2ForPreTraining,
    ResidualWav2Vec2ForSequenceClassification,
    ResidualWav2Vec2ForXVector,
    ResidualWav2Vec2Model,
)
from .whisper import (
    ResidualWhisperConfig,
    ResidualWhisperForAudioClassification,
    ResidualWhisperForConditionalGeneration,
    ResidualWhisperModel,
)

__all__ = [
    "ResidualConfig",
    "ResidualWav2Vec2Config",
    "ResidualWav2Vec2ForAudioFrameClassification",
    "ResidualWav2Vec2ForCTC",
    "ResidualWav2Vec2ForPreTraining",
    "ResidualWav2Vec2ForSequenceClassification",
    "ResidualWav2Vec2ForXVector",
    "ResidualWav2Vec2Model",
    "ResidualWhisperConfig",
    "ResidualWhisperForAudioClassification",
    "ResidualWhisperForConditionalGeneration",
    "ResidualWhisperModel",
    "__version__",
    "compress",
    "distill",
    "evaluate",
    "export",
    "size_report",
]

for _config, _auto_classes in (
    (
        ResidualWhisperConfig,
        {
            AutoModel: ResidualWhisperModel,
            AutoModelForSpeechSeq2Seq: ResidualWhisperForConditionalGeneration,
            AutoModelForAudioClassification: ResidualWhisperForAudioClassification,
            AutoFeatureExtractor: WhisperFeatureExtractor,
            AutoTokenizer: WhisperTokenizer,
            AutoProcessor: WhisperProcessor,
        },
    ),
    (
        ResidualWav2Vec2Config,
        {
            AutoModel: ResidualWav2Vec2Model,
            AutoModelForCTC: ResidualWav2Vec2ForCTC,
            AutoModelForPreTraining: ResidualWav2Vec2ForPreTraining,
            AutoModelForAudioClassification: ResidualWav2Vec2ForSequenceClassification,
            AutoModelForAudioFrameClassification: ResidualWav2Vec2ForAudioFrameClassification,
            AutoModelForAudioXVector: ResidualWav2Vec2ForXVector,
            AutoFeatureExtractor: Wav2Vec2FeatureExtractor,
            AutoTokenizer: Wav2Vec2CTCTokenizer,
            AutoProcessor: Wav2Vec2Processor,
        },
    ),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto_class, _class in _auto_classes.items():
        _auto_class.register(_config, _class, exist_ok=True)  # type: ignore[attr-defined]
