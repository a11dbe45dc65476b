"""A new wav2vec2 with CTC, dense or residual, to train from scratch: its characters, its sizes, its random weights.

The Trainer that fine-tunes on transcripts (`trainers.py`) trains it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from ..classes import ResidualWav2Vec2Config, ResidualWav2Vec2ForCTC
from ..configuration import ResidualConfig
from .scratch import EncoderSizes

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|")
NUM_CONVOLUTIONS = 7  # of wav2vec2, which makes a frame of 320 samples


@dataclass
class CTCSizes(EncoderSizes):
    """The sizes of a new wav2vec2.

    Raises:
        ValueError: naming the field, for sizes that cannot be.
    """

    conv_dim: int = field(default=512, metadata={"help": "Width of the convolutions over the samples."})


def new_ctc_processor(texts: Iterable[str]) -> Wav2Vec2Processor:
    """The processor of a new model, with the characters of `texts`.

    Raises:
        ValueError: if `texts` has none.
    """
    characters = sorted(set().union(*texts) - {" "})
    if not characters:
        raise ValueError("the training split must have clips with text, got none")
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters])}
    if len(vocab) < len(SPECIAL_TOKENS) + len(characters):
        raise ValueError(
            "the texts of the training split must not have '|', which stands for the space between words; take it "
            "away with `remove`"
        )
    with TemporaryDirectory() as folder:
        path = Path(folder, "vocab.json")
        path.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(str(path))
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)


def new_ctc_model(
    sizes: CTCSizes, tokenizer: Wav2Vec2CTCTokenizer, residual_config: ResidualConfig | None = None
) -> Any:
    """A model with random weights, residual if there is a `residual_config`."""
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": sizes.d_model,
        "num_hidden_layers": sizes.encoder_layers,
        "intermediate_size": sizes.encoder_ffn_dim,
        "num_attention_heads": sizes.attention_heads,
        "num_conv_pos_embedding_groups": sizes.attention_heads,
        "conv_dim": (sizes.conv_dim,) * NUM_CONVOLUTIONS,
        # The normalisations of the large models, with which deep encoders train without pretraining.
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "mask_time_prob": sizes.mask_time,
        "mask_time_length": sizes.mask_time_length,
        "mask_feature_prob": sizes.mask_bands,
        "mask_feature_length": sizes.mask_bands_length,
        "mask_time_min_masks": 0,
        "apply_spec_augment": sizes.mask_time > 0 or sizes.mask_bands > 0,
        "hidden_dropout": sizes.dropout,
        "activation_dropout": sizes.dropout,
        "attention_dropout": sizes.dropout,
        "feat_proj_dropout": sizes.dropout,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "ctc_loss_reduction": "mean",
    }
    if residual_config is None:
        return Wav2Vec2ForCTC(Wav2Vec2Config(**values))
    return ResidualWav2Vec2ForCTC(ResidualWav2Vec2Config(**values, residual_config=residual_config))
