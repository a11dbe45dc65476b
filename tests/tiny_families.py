"""A tiny random model of every family, and inputs for it; the smallest that have every kind of matrix."""

from __future__ import annotations

from typing import Any

import torch
from conftest import randomize_, tiny_wav2vec2_config, tiny_whisper_config
from transformers import CONFIG_MAPPING

from hf_residual_transformer import classes
from hf_residual_transformer.families import FAMILIES

VOCAB = 13
OF_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WAV2VEC2 = {
    name: value
    for name, value in tiny_wav2vec2_config().to_dict().items()
    if name not in ("model_type", "architectures", "transformers_version", "num_hidden_layers", "vocab_size")
}
WAV2VEC2 |= {"num_hidden_layers": 2, "vocab_size": VOCAB}
WAVES = {"conv_dim", "conv_kernel", "conv_stride", "num_feat_extract_layers", "feat_extract_norm"}
MELS = 16
FAST = {**OF_LAYERS, "num_mel_bins": MELS, "subsampling_conv_channels": 8, "subsampling_factor": 4}
FAST |= {"conv_kernel_size": 5, "layerdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0}
FAST |= {"activation_dropout": 0.0}
LASR = {name: value for name, value in FAST.items() if name != "subsampling_factor"}
TRANSDUCER = {
    "vocab_size": VOCAB,
    "blank_token_id": VOCAB - 1,
    "decoder_hidden_size": 16,
    "num_decoder_layers": 1,
}
DECODER = {**OF_LAYERS, "head_dim": 16, "num_key_value_heads": 2, "vocab_size": VOCAB}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
# Settings of each dense config.
SETTINGS: dict[str, dict[str, Any]] = {
    "whisper": {
        name: value
        for name, value in tiny_whisper_config(encoder_layers=2).to_dict().items()
        if name not in ("model_type", "architectures", "transformers_version")
    },
    "wav2vec2": WAV2VEC2,
    "hubert": WAV2VEC2,
    "wavlm": WAV2VEC2,
    "data2vec-audio": {**WAV2VEC2, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
    "unispeech": WAV2VEC2,
    "unispeech-sat": WAV2VEC2,
    "sew": {**WAV2VEC2, "squeeze_factor": 2},
    "wav2vec2-conformer": {**WAV2VEC2, "conv_depthwise_kernel_size": 5},
    "wav2vec2-bert": {
        **{name: value for name, value in WAV2VEC2.items() if name not in WAVES},
        "feature_projection_input_dim": MELS,
        "conv_depthwise_kernel_size": 5,
    },
    "speech_to_text": {
        **SEQ2SEQ,
        "input_feat_per_channel": MELS,
        "conv_channels": 16,
        "max_source_positions": 100,
    },
    "moonshine": {
        "pad_token_id": 2,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
    },
    "moonshine_streaming": {
        **OF_LAYERS,
        "vocab_size": VOCAB,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
        "encoder_config": {
            **OF_LAYERS,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "sliding_windows": [[3, 1], [4, 0]],
        },
    },
    "parakeet_encoder": FAST,
    "parakeet_ctc": {"vocab_size": VOCAB, "pad_token_id": VOCAB - 1, "encoder_config": FAST},
    "parakeet_rnnt": {**TRANSDUCER, "encoder_config": FAST},
    "parakeet_tdt": {**TRANSDUCER, "durations": (0, 1), "encoder_config": FAST},
    "canary": {
        "vocab_size": VOCAB,
        "encoder_config": {**FAST, "model_type": "parakeet_encoder"},
        "decoder_config": DECODER,
    },
    "cohere_asr": {**DECODER, "encoder_config": FAST},
    "lasr_encoder": LASR,
    "lasr_ctc": {"vocab_size": VOCAB, "encoder_config": LASR},
    "nemotron_asr_streaming_encoder": FAST,
    "nemotron_asr_streaming": {**TRANSDUCER, "encoder_config": FAST},
    "nemotron3_5_asr": {
        **TRANSDUCER,
        "num_prompts": 4,
        "default_prompt_id": 1,
        "prompt_intermediate_size": 16,
        "encoder_config": FAST,
    },
}


def dense_model(name: str, seed: int = 0) -> Any:
    """The family's recogniser, or its encoder, with every component random, in eval mode."""
    config = CONFIG_MAPPING[name](**SETTINGS[name])
    autos = classes.dense_names(FAMILIES[name])
    auto = next((auto for auto in classes.RECOGNIZERS if auto in autos), classes.AutoModel)
    torch.manual_seed(seed)
    model: Any = auto._model_mapping[type(config)](config)
    return randomize_(model)


def inputs_for(name: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two recordings, the second half as long as the first and padded."""
    generator = torch.Generator().manual_seed(seed)
    if name == "whisper":
        return {"input_features": torch.randn(2, MELS, 100, generator=generator)}
    lengths = {"moonshine": 2304 * 2, "moonshine_streaming": 80 * 32}
    if name in lengths or "conv_dim" in SETTINGS[name]:
        shape: tuple[int, ...] = (2, lengths.get(name, 480))
        key = "input_values"
    else:
        shape, key = (2, 64, MELS), "input_features"
    values = torch.randn(shape, generator=generator)
    mask = torch.ones(shape[:2], dtype=torch.long)
    mask[1, shape[1] // 2 :] = 0
    values[1, shape[1] // 2 :] = 0
    return {key: values, "attention_mask": mask}
