"""Rows of speech to batches of model inputs, with labels where a loss needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

T = TypeVar("T")
LABEL_PADDING = -100  # left out of the losses of transformers


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last has what is left."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


@dataclass
class SpeechCollator:
    """Rows to a batch of model inputs without labels, for label-free training and inference.

    Whisper's `input_features` (batch_size, num_mel_bins, 3000), or wav2vec2's `input_values`
    (batch_size, num_samples), padded to the longest, with an `attention_mask` if its extractor makes one.

    Args:
        processor: the model's, or its feature extractor alone.

    Raises:
        ValueError: for audio of another rate than the model's, or of more than Whisper's 30 seconds.
    """

    processor: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        extractor = feature_extractor_of(self.processor)
        batch = extract(arrays_of(rows, extractor), extractor)
        if "text" in rows[0]:
            labels = [torch.tensor(ids, dtype=torch.long) for ids in self.encode(rows)]
            if labels:
                batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=LABEL_PADDING)
        return batch

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Token ids of each row's text; none for a batch without labels."""
        return []


@dataclass
class Seq2SeqCollator(SpeechCollator):
    """As `SpeechCollator`, and for rows with text Whisper's `labels` (batch_size, num_tokens), with -100
    for padding.

    They are `<|en|><|transcribe|><|notimestamps|> text <|endoftext|>`: the first of the tokenizer's tokens,
    `<|startoftranscript|>`, is what the model prepends itself when it shifts the labels right.

    Args:
        language: of all rows, a name or code that Whisper knows; by default each row's `language`.
        task: "transcribe", or "translate" for texts in English.
        multilingual: False for an English-only model, whose labels have no language and task.
    """

    language: str | None = None
    task: str = "transcribe"
    multilingual: bool = True

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        tokenizer = self.processor.tokenizer
        labels = []
        for row in rows:
            if self.multilingual:
                language = self.language or row.get("language")
                if language is None:
                    raise ValueError(
                        "labels of a multilingual Whisper need a language: pass `language`, or rows with one"
                    )
                tokenizer.set_prefix_tokens(language=language, task=self.task, predict_timestamps=False)
            labels.append(tokenizer(row["text"]).input_ids[1:])
        return labels


@dataclass
class CTCCollator(SpeechCollator):
    """As `SpeechCollator`, and for rows with text their characters as `labels`, padded by -100.

    Args:
        normalize: applied to each text first, such as `str.upper`.

    Raises:
        ValueError: for a character that the tokenizer does not have.
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
    """The collator with labels for a Whisper or a CTC model; without, where `processor` has no tokenizer."""
    if not hasattr(processor, "tokenizer"):
        return SpeechCollator(processor)
    if not model.config.is_encoder_decoder:
        return CTCCollator(processor)
    return Seq2SeqCollator(processor, language, task, is_multilingual(model))


def is_multilingual(model: Any) -> bool:
    """Whether a Whisper model takes a language and a task, by its generation config or its vocabulary."""
    return getattr(model.generation_config, "is_multilingual", model.config.vocab_size >= 51_865)


def feature_extractor_of(processor: Any) -> Any:
    return getattr(processor, "feature_extractor", processor)


def arrays_of(rows: Sequence[Mapping[str, Any]], extractor: Any) -> list[np.ndarray]:
    """The rows' samples, if they have the model's rate."""
    for row in rows:
        rate = row["audio"]["sampling_rate"]
        if rate != extractor.sampling_rate:
            raise ValueError(
                f"{row['audio'].get('path')} must have the model's rate of {extractor.sampling_rate} Hz, got "
                f"{rate}; pass `sampling_rate={extractor.sampling_rate}` to `load_speech_dataset`"
            )
    return [np.asarray(row["audio"]["array"], dtype=np.float32) for row in rows]


def extract(arrays: list[np.ndarray], extractor: Any, length: int | None = None) -> dict[str, Tensor]:
    """Model inputs padded to `length` samples; if None, to the longest array, or to Whisper's 30 seconds."""
    longest = getattr(extractor, "n_samples", None)
    too_long = max(map(len, arrays))
    if longest is not None and too_long > longest:
        rate = extractor.sampling_rate
        raise ValueError(
            f"a clip must be of at most {longest / rate:g} seconds, got {too_long / rate:.2f}; leave longer "
            "ones out with `max_seconds`, or cut them"
        )
    padding = "longest" if longest is None and length is None else "max_length"
    features = extractor(
        arrays,
        sampling_rate=extractor.sampling_rate,
        padding=padding,
        max_length=length,
        return_tensors="pt",
    )
    return dict(features)
