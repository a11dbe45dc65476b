"""Measures how far a smaller Whisper is from the dense one, in final states, probabilities and words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from hf_residual_transformer.speech.collators import batched, collator_for
from hf_residual_transformer.speech.metrics import error_rates, evaluate_asr
from hf_residual_transformer.training.losses import HiddenStateLoss, LogitsLoss

Row = dict[str, Any]
Outputs = tuple[list[Tensor], Tensor]  # of a batch of clips, see `outputs`
CLIPS_AT_ONCE = 8
MAX_NEW_TOKENS = 128  # what a broken model may babble


@torch.inference_mode()
def outputs(model: Any, processor: Any, rows: Sequence[Row]) -> Outputs:
    """The outputs of a model for a batch of clips.

    They are the encoder's final states while there is speech, each of shape (frames, hidden_size), and the decoder's
    logits for the words and the end of each transcript, each of shape (tokens, vocab_size).
    """
    inputs = {name: value.to(model.device) for name, value in collator_for(model, processor)(rows).items()}
    found = model(**inputs)
    samples = 2 * processor.feature_extractor.hop_length  # in a frame of the encoder
    states = [
        clip[: math.ceil(len(row["audio"]["array"]) / samples)]
        for row, clip in zip(rows, found.encoder_last_hidden_state)
    ]
    start = len(processor.tokenizer.prefix_tokens) - 1  # language and task are given in use
    spoken = inputs["labels"][:, start:] != -100
    return states, found.logits[:, start:][spoken]


@contextmanager
def encoding_once(model: Any) -> Iterator[None]:
    """Inside this context, the encoder runs once for the features from which words and probabilities are computed."""
    encoder = model.get_encoder()
    own = encoder.forward
    seen: list[tuple[Tensor, Any]] = []

    def forward(input_features: Tensor, *args: Any, **kwargs: Any) -> Any:
        for features, output in seen:
            if torch.equal(features, input_features):
                return output
        seen.append((input_features, own(input_features, *args, **kwargs)))
        return seen[-1][1]

    encoder.forward = forward
    try:
        yield
    finally:
        del encoder.forward


@torch.inference_mode()
def deviation(model: Any, processor: Any, rows: Sequence[Row], expected: list[Outputs]) -> dict[str, float]:
    """The deviation from the dense model's `outputs`.

    "final_error" is the mean over clips of the squared error of the final states, relative to their variance. "kl" is
    the mean over tokens of the divergence, in nats.
    """
    errors, divergence, tokens = [], 0.0, 0
    state_loss, logits_loss = HiddenStateLoss(), LogitsLoss(temperature=1.0)
    for batch, (wanted_states, wanted) in zip(batched(rows, CLIPS_AT_ONCE), expected, strict=True):
        states, logits = outputs(model, processor, batch)
        errors += [state_loss([own[None]], [other[None]]).item() for own, other in zip(states, wanted_states)]
        divergence += logits_loss(logits, wanted).item() * len(wanted)
        tokens += len(wanted)
    return {"final_error": sum(errors) / len(errors), "kl": divergence / tokens}


def word_errors(model: Any, processor: Any, rows: Sequence[Row]) -> dict[str, float]:
    """The word error rate and the number of words.

    Diacritics count only in English, where the normaliser knows them: most of the sample's Spanish transcripts lack
    them.
    """
    result = evaluate_asr(
        model, processor, rows, batch_size=CLIPS_AT_ONCE, max_new_tokens=MAX_NEW_TOKENS, progress=False
    )
    plain = BasicTextNormalizer(remove_diacritics=True)
    references, predictions = zip(
        *(
            (p.normalized_reference, p.normalized_prediction)
            if p.language == "en"
            else (plain(p.normalized_reference).strip(), plain(p.normalized_prediction).strip())
            for p in result.predictions
        )
    )
    rates = error_rates(references, predictions)
    return {"wer": rates.wer, "words": rates.words}
