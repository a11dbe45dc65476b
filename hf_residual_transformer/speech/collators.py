"""Collators make batches of model inputs from rows of speech, with labels where a loss needs them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import SeamlessM4TFeatureExtractor
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ..families import WHISPER

T = TypeVar("T")
LABEL_PADDING = -100  # the losses of transformers ignore it
SEAMLESS_FRAME, SEAMLESS_HOP = 400, 160  # samples, which the feature extractor of Wav2Vec2-BERT does not tell


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of `size` items; the last list may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


@dataclass
class SpeechCollator:
    """Makes a batch of model inputs without labels from rows, for label-free training and inference.

    For Whisper, a batch has `input_features` of shape (batch_size, num_mel_bins, 3000). For wav2vec2, it has
    `input_values` of shape (batch_size, num_samples), padded to the longest clip, and an `attention_mask` if the
    feature extractor makes one.

    Args:
        processor: the model's processor, or its feature extractor alone.

    Raises:
        ValueError: if a clip does not have the model's rate, or is longer than Whisper's 30 seconds.
    """

    processor: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        extractor = feature_extractor_of(self.processor)
        check_lengths(rows, extractor)
        batch = extract(arrays_of(rows, extractor), extractor)
        if "text" in rows[0]:
            labels = [torch.tensor(ids or [LABEL_PADDING]) for ids in self.encode(rows)]
            if labels:
                batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=LABEL_PADDING)
        return batch

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The token ids of each row's text; an empty list for a batch without labels."""
        return []


@dataclass
class Seq2SeqCollator(SpeechCollator):
    """A `SpeechCollator` that adds Whisper's `labels` to rows with text, (batch_size, num_tokens), padded with -100.

    Labels are `<|en|><|transcribe|><|notimestamps|> text <|endoftext|>`. They lack the tokenizer's first token,
    `<|startoftranscript|>`, because the model prepends it when it shifts the labels right.

    Args:
        language: the language of all rows, a name or code that Whisper knows; by default each row's `language`.
        task: "transcribe", or "translate" for texts in English.
        multilingual: False for an English-only model, whose labels have no language and task, whatever the processor
            was saved with.

    Raises:
        ValueError: if `multilingual` is true and a row has no language, or false and another language or task is asked
            for.
    """

    language: str | None = None
    task: str = "transcribe"
    multilingual: bool = True

    def __post_init__(self) -> None:
        if not self.multilingual:
            check_english(self.language, self.task)

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        tokenizer = self.processor.tokenizer
        labels = []
        for row in rows:
            if self.multilingual:
                language = self.language or row.get("language")
                if language is None:
                    raise ValueError(
                        "labels of a multilingual Whisper need a language, got None; pass `language`, or add it to "
                        "each row"
                    )
                tokenizer.set_prefix_tokens(language=language, task=self.task, predict_timestamps=False)
            else:
                check_english(row.get("language"), self.task)
                # `set_prefix_tokens` keeps what it is not given, here what the processor was saved with.
                tokenizer.language = tokenizer.task = None
                tokenizer.set_prefix_tokens(predict_timestamps=False)
            labels.append(tokenizer(row["text"]).input_ids[1:])
        return labels


@dataclass
class CTCCollator(SpeechCollator):
    """A `SpeechCollator` that adds `labels` to rows with text: its characters, padded with -100.

    Their shape is (batch_size, num_characters).

    Args:
        normalize: a function that is applied to each text first, such as `str.upper`.

    Raises:
        ValueError: if a text has a character that the tokenizer does not have.
    """

    normalize: Callable[[str], str] | None = None

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        tokenizer = self.processor.tokenizer
        labels = []
        for row in rows:
            text = row["text"] if self.normalize is None else self.normalize(row["text"])
            ids = tokenizer(text).input_ids
            if tokenizer.unk_token_id in ids:
                unknown = sorted(c for c in set(text) if tokenizer.unk_token_id in tokenizer(c).input_ids)
                raise ValueError(
                    f"the tokenizer has no {''.join(unknown)!r}, which is in {text!r}: pass a `normalize` "
                    "that removes or replaces such characters"
                )
            labels.append(ids)
        return labels


def collator_for(
    model: Any, processor: Any, *, language: str | None = None, task: str = "transcribe"
) -> SpeechCollator:
    """Chooses the collator for a Whisper or a CTC model; it makes no labels if `processor` has no tokenizer.

    Args:
        model: the model, from which the kind of labels follows.
        processor: the model's processor, or its feature extractor alone.
        language: the language of all rows, for Whisper; by default each row's `language`.
        task: the task, for Whisper.
    """
    if not hasattr(processor, "tokenizer"):
        return SpeechCollator(processor)
    if not model.config.is_encoder_decoder:
        return CTCCollator(processor)
    return Seq2SeqCollator(processor, language, task, is_multilingual(model))


def is_multilingual(model: Any) -> bool:
    """Whether a model is a Whisper that takes a language and a task, from its generation config or the size of its
    vocabulary."""
    if model.config.model_type != WHISPER.name:
        return False
    return bool(getattr(model.generation_config, "is_multilingual", model.config.vocab_size >= 51_865))


def is_english(language: str) -> bool:
    """Whether a name or code of a language is one of English, such as "en", "eng", "en_us" or "English (US)"."""
    return re.fullmatch(r"en(g|glish)?([-_ (].*)?", language.strip().lower()) is not None


def check_english(language: str | None, task: str, clip: str | None = None) -> None:
    """Checks what is asked of a model that only transcribes English.

    Raises:
        ValueError: for another language or task.
    """
    where = f" of {clip}" if clip else ""
    if task != "transcribe":
        raise ValueError(f"`task` must be 'transcribe' for a model that only transcribes, got {task!r}")
    if language is not None and not is_english(language):
        raise ValueError(
            f"the language{where} must be English for an English-only Whisper, got {language!r}; choose a multilingual "
            "model, or other data"
        )


def check_known(language: str, ids: Mapping[str, int], clip: str) -> None:
    """Checks that a multilingual Whisper knows a language by its name, code or token; `ids` are those of its tokens.

    Raises:
        ValueError: naming the clip.
    """
    name = language.lower()
    if not {name, f"<|{TO_LANGUAGE_CODE.get(name, name)}|>"} & set(ids):
        raise ValueError(
            f"the language of {clip} must be one that the model knows, such as 'en' or 'english', got {language!r}; "
            "correct the data, or name the language of all clips"
        )


def check_lengths(rows: Sequence[Mapping[str, Any]], extractor: Any) -> None:
    """Checks that no clip is longer than a model's window, or too short for a frame of its features.

    Raises:
        ValueError: naming the first that is.
    """
    longest, shortest = getattr(extractor, "n_samples", math.inf), 1
    if isinstance(extractor, SeamlessM4TFeatureExtractor):
        shortest = SEAMLESS_FRAME + (extractor.stride - 1) * SEAMLESS_HOP
    for row in rows:
        length = len(row["audio"]["array"])
        if length < shortest:
            raise ValueError(
                f"{row['audio'].get('path') or 'a clip'} must have at least {shortest} samples, of which the model's "
                f"features make one frame, got {length}; remove it from the data"
            )
        if length > longest:
            rate = extractor.sampling_rate
            raise ValueError(
                f"{row['audio'].get('path') or 'a clip'} must be of at most {longest / rate:g} seconds, got "
                f"{length / rate:.2f}; leave longer ones out with `max_seconds`, or cut them"
            )


def check_has_frames(model: Any, num_samples: int, clip: str) -> None:
    """Checks that a CTC model hears anything in a clip.

    Raises:
        ValueError: for a clip that is shorter than the receptive field of the model's convolutions.
    """
    compute = getattr(model, "_get_feat_extract_output_lengths", None)  # of models that read samples
    if compute is not None and compute(torch.tensor(num_samples)) < 1:
        raise ValueError(
            f"{clip} must be longer than the model's receptive field, got {num_samples} samples, which make no frame; "
            "remove it from the data"
        )


def feature_extractor_of(processor: Any) -> Any:
    """The feature extractor of a processor; a feature extractor is returned as it is."""
    return getattr(processor, "feature_extractor", processor)


def arrays_of(rows: Sequence[Mapping[str, Any]], extractor: Any) -> list[np.ndarray]:
    """The samples of each row, float32, of shape (num_samples,).

    Raises:
        ValueError: if a row does not have the model's sampling rate.
    """
    for row in rows:
        rate = row["audio"]["sampling_rate"]
        if rate != extractor.sampling_rate:
            raise ValueError(
                f"{row['audio'].get('path')} must have the model's rate of {extractor.sampling_rate} Hz, got "
                f"{rate}; pass `sampling_rate={extractor.sampling_rate}` to `load_speech_dataset`"
            )
    return [np.asarray(row["audio"]["array"], dtype=np.float32) for row in rows]


def extract(arrays: list[np.ndarray], extractor: Any, length: int | None = None) -> dict[str, Tensor]:
    """Makes model inputs from samples.

    Args:
        arrays: samples at the model's rate, each of shape (num_samples,).
        extractor: the model's feature extractor.
        length: number of samples to which each array is padded; by default that of the longest array, or of Whisper's
            30 seconds.

    Raises:
        ValueError: if an array is longer than Whisper's 30 seconds.
    """
    longest = getattr(extractor, "n_samples", None)
    too_long = max(map(len, arrays))
    if longest is not None and too_long > longest:
        rate = extractor.sampling_rate
        raise ValueError(
            f"a clip must be of at most {longest / rate:g} seconds, got {too_long / rate:.2f}; leave longer "
            "ones out with `max_seconds`, or cut them"
        )
    # Where it pads mel frames and not samples, a length in samples says nothing; the mask says what is padding.
    pads_frames = extractor.model_input_names[0] == "input_features" and not hasattr(extractor, "hop_length")
    padding = "longest" if pads_frames or (longest is None and length is None) else "max_length"
    features = extractor(
        arrays,
        sampling_rate=extractor.sampling_rate,
        padding=padding,
        max_length=None if pads_frames else length,
        return_tensors="pt",
    )
    return dict(features)
