"""Measures the word and character error rates of a speech recogniser, and saves them with their provenance.

jiwer counts the errors in texts that Whisper's normalisers have made alike: the English normaliser for English, and the
basic one for all other languages (Radford et al. 2022, appendix C, https://arxiv.org/abs/2212.04356). The basic one
takes vowel signs away from scripts such as Devanagari and Thai, and splits words there; `keep_marks` keeps them.
"""

from __future__ import annotations

import json
import logging
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jiwer
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from ..families import WHISPER, num_frames_of
from ..folders import write_text
from ..provenance import portable, provenance
from .collators import (
    SpeechCollator,
    arrays_of,
    batched,
    check_english,
    check_has_frames,
    check_known,
    check_lengths,
    is_english,
    is_multilingual,
)
from .transcription import complete_token_ids

logger = logging.getLogger(__name__)
TASKS = ("transcribe", "translate")
# These models read the language in a prompt that their processors write, and write nonsense without it.
PROMPTED = ("canary", "cohere_asr")


@dataclass(frozen=True)
class Prediction:
    """The reference and the prediction for one clip.

    Args:
        id: the clip's path without this machine's folders, or its index.
        language: the clip's language, if it is known.
        reference: the transcript in the data.
        prediction: the text that the model recognised.
        normalized_reference: the reference as it is compared.
        normalized_prediction: the prediction as it is compared.
        word_errors: the number of substituted, deleted and inserted words.
    """

    id: str
    language: str | None
    reference: str
    prediction: str
    normalized_reference: str
    normalized_prediction: str
    word_errors: int


@dataclass(frozen=True)
class ErrorRates:
    """Error rates over all clips: errors divided by the number of words or characters in the references.

    Args:
        wer: word error rate, a fraction.
        cer: character error rate, a fraction.
        clips: the number of clips.
        words: the number of words in the references.
        characters: the number of characters in the references.
        empty_references: the number of clips whose reference is empty after normalisation. Words that are recognised
            in them count as insertions.
    """

    wer: float
    cer: float
    clips: int
    words: int
    characters: int
    empty_references: int


@dataclass(frozen=True)
class EvaluationResult:
    """The result of `evaluate_asr`.

    Args:
        rates: the error rates over all clips.
        by_language: the error rates over the clips of each language that is known.
        normalizers: the class of the normaliser by language.
        audio_seconds: the total length of the clips.
        seconds: the time that features, model and decoding took, without reading the clips.
        predictions: one entry for each clip, in the order of the data.
        removed_marks: the number of combining marks, such as vowel signs, that the normaliser took from the references.
            If it is not 0, words are split there, and error rates tell little; `keep_marks` keeps them.
        has_spellings: whether the tokenizer has a table of English spellings, as Whisper's do.
        stopped_by: the error that ended the evaluation before the end of the data; None if all clips are in it.
    """

    rates: ErrorRates
    by_language: dict[str, ErrorRates]
    normalizers: dict[str, str]
    audio_seconds: float
    seconds: float
    predictions: list[Prediction]
    removed_marks: int = 0
    has_spellings: bool = False
    stopped_by: str | None = None

    @property
    def wer(self) -> float:
        """The word error rate over all clips, a fraction."""
        return self.rates.wer

    @property
    def cer(self) -> float:
        """The character error rate over all clips, a fraction."""
        return self.rates.cer

    def to_dict(self) -> dict[str, Any]:
        """All fields except the predictions, as plain values for JSON."""
        values = asdict(self)
        del values["predictions"]
        return {**values.pop("rates"), **values}

    def save(self, output_dir: str | Path, **details: Any) -> Path:
        """Writes `evaluation.json` and `predictions.jsonl`, and returns the path of the former. The names begin with
        `partial-` where an error ended the evaluation.

        Args:
            output_dir: the folder of the two files, which is made if it does not exist.
            details: further values that a reader needs to repeat the evaluation, such as
                `model`, `dataset`, `split` and `seed`.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        kind = "" if self.stopped_by is None else "partial-"
        lines = [json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in self.predictions]
        write_text(folder / f"{kind}predictions.jsonl", "".join(lines))
        path = folder / f"{kind}evaluation.json"
        contents = {**self.to_dict(), **details, **provenance()}
        write_text(path, json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
        return path


class EvaluationStopped(ValueError):
    """A clip or the reading of the data ended an evaluation; `result` has the clips that were transcribed before."""

    def __init__(self, message: str, result: EvaluationResult) -> None:
        super().__init__(message)
        self.result = result


def evaluate_asr(
    model: PreTrainedModel,
    processor: Any,
    dataset: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    language: str | None = None,
    task: str = "transcribe",
    max_new_tokens: int | None = None,
    keep_marks: bool = False,
    progress: bool = True,
) -> EvaluationResult:
    """Transcribes every row of `dataset` and counts the errors.

    Rows that can be read again are checked before the first is transcribed, so that no work is lost to a bad one.

    Args:
        model: a sequence-to-sequence model or a transducer, which decodes as its generation config says, or a CTC
            model, which decodes to the most probable token of each frame. It runs on its device and in its dtype,
            without dropout.
        processor: the model's processor.
        dataset: rows as from `load_speech_dataset`, with text.
        batch_size: the number of clips in a batch.
        language: the language of all rows, for Whisper and for the choice of the normaliser; by default each row's
            `language`. Where neither is given, a multilingual Whisper detects the language and the basic normaliser is
            used, and the language of an English-only Whisper is English. Other models are not told the language.
        task: the task of a multilingual Whisper: "transcribe", or "translate" for references in English.
        max_new_tokens: the maximum length of a transcript in tokens; by default that of the generation config.
        keep_marks: whether the basic normaliser keeps combining marks, as scripts with vowel signs need it. Figures of
            Whisper's authors are without them. In scripts without spaces between words, read the character error rate.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if there are no rows, rows have no text, the references have no word, a clip does not fit the
            model, the model needs a prompt as Canary does, an English-only Whisper is asked for another language, or a
            model that only transcribes for another task. If a stream ends so after the first clips are transcribed, it
            is an `EvaluationStopped`, which has their result.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    normalize = _normalizers(processor, keep_marks)
    has_spellings = bool(getattr(processor.tokenizer, "english_spelling_normalizer", None))
    if model.config.model_type in PROMPTED:
        raise ValueError(
            f"`model` must be one that needs no prompt, got a {model.config.model_type}; transcribe with its "
            "processor, and compare the texts with hf_residual_transformer.speech.metrics.error_rates"
        )
    is_whisper = model.can_generate() and model.config.model_type == WHISPER.name
    multilingual = is_whisper and is_multilingual(model)
    default = "en" if is_whisper and not multilingual else None
    known: Mapping[str, int] = {}  # languages
    if multilingual:
        complete_token_ids(model, processor.tokenizer)
        known = model.generation_config.lang_to_id  # type: ignore[attr-defined]
    else:
        check_english(default and language, task)

    def check(rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            spoken = language or row.get("language")
            _check_row(model, processor, row, default and spoken)
            if multilingual and spoken:
                check_known(spoken, known, row["audio"].get("path") or "a clip")

    is_stream = not isinstance(dataset, Sized)
    if not is_stream:
        check(dataset)  # so that no transcript is lost at a row that comes late
    was_training = model.training
    model.eval()
    predictions: list[Prediction] = []
    names: dict[str, str] = {}  # of the normalisers, by language
    seconds = audio_seconds = 0.0
    removed_marks = 0
    try:
        with tqdm(total=_length(dataset), desc="evaluate", unit="clip", disable=not progress) as bar:
            for rows in batched(dataset, batch_size):
                if is_stream:
                    check(rows)
                languages = [language or row.get("language") or default for row in rows]
                start = time.perf_counter()
                texts = _transcribe(
                    model, processor, rows, languages, task=task, max_new_tokens=max_new_tokens
                )
                seconds += time.perf_counter() - start
                for row, spoken, text in zip(rows, languages, texts, strict=True):
                    name = portable(row["audio"].get("path") or str(len(predictions)))
                    written = normalize[_is_english(spoken, task)]
                    predictions.append(_compare(name, spoken, row["text"], text, written))
                    names[str(spoken)] = type(written).__name__
                    if isinstance(written, BasicTextNormalizer) and not keep_marks:
                        removed_marks += _count_marks(row["text"])
                    audio_seconds += len(row["audio"]["array"]) / row["audio"]["sampling_rate"]
                bar.update(len(rows))
    except (ValueError, OSError) as error:
        if not any(prediction.normalized_reference for prediction in predictions):
            raise
        result = _result(predictions, names, audio_seconds, seconds, removed_marks, has_spellings, str(error))
        raise EvaluationStopped(
            f"{error}; {len(predictions)} clips were transcribed before", result
        ) from error
    finally:
        model.train(was_training)
    if not predictions:
        raise ValueError("the data set to evaluate on has no rows; it must have at least one")
    if is_whisper and not has_spellings and EnglishTextNormalizer.__name__ in names.values():
        logger.warning(
            "the tokenizer has no table of English spellings, so that 'colour' and 'color' are different words, and "
            "rates are no longer those of the model that it comes from; copy normalizer.json from there, which "
            "transformers reads but does not save"
        )
    if removed_marks:
        logger.warning(
            f"the basic normaliser took {removed_marks} combining marks, such as vowel signs, from the references, and "
            "split words there, so that error rates tell little; `keep_marks=True` (--keep-marks) keeps them"
        )
    return _result(predictions, names, audio_seconds, seconds, removed_marks, has_spellings)


def _result(
    predictions: list[Prediction],
    normalizers: dict[str, str],
    audio_seconds: float,
    seconds: float,
    removed_marks: int,
    has_spellings: bool,
    stopped_by: str | None = None,
) -> EvaluationResult:
    """Counts the errors of all clips, and of those of each language."""
    found = sorted({prediction.language for prediction in predictions if prediction.language is not None})
    groups = {name: [p for p in predictions if p.language == name] for name in found}
    by_language = {
        name: _rates(group) for name, group in groups.items() if any(p.normalized_reference for p in group)
    }
    return EvaluationResult(
        _rates(predictions),
        by_language,
        normalizers,
        audio_seconds,
        seconds,
        predictions,
        removed_marks,
        has_spellings,
        stopped_by,
    )


def _check_row(model: Any, processor: Any, row: Mapping[str, Any], english: str | None) -> None:
    """Checks a row before it is transcribed.

    Args:
        model: the recogniser.
        processor: its processor.
        row: the row.
        english: the language of the row, if the model knows English alone.

    Raises:
        ValueError: naming the clip.
    """
    clip = row["audio"].get("path") or "a clip"
    if row.get("text") is None:
        raise ValueError(
            f"the data must have texts to compare with, got none for {clip}; name their `text_column`"
        )
    if not isinstance(row["text"], str):
        raise ValueError(f"the text of {clip} must be a string, got {row['text']!r}")
    if english is not None:
        check_english(english, "transcribe", clip)
    (samples,) = arrays_of([row], processor.feature_extractor)
    check_lengths([row], processor.feature_extractor)
    if not model.can_generate():
        check_has_frames(model, len(samples), clip)


@torch.inference_mode()
def _transcribe(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    languages: Sequence[str | None],
    *,
    task: str,
    max_new_tokens: int | None,
) -> list[str]:
    """The recognised texts of a batch of rows."""
    is_told = [language is not None for language in languages]
    if len(set(is_told)) > 1 and model.can_generate() and is_multilingual(model):
        # `generate` takes the languages of all rows or of none.
        texts: dict[int, str] = {}
        for told in (True, False):
            numbers = [number for number, known in enumerate(is_told) if known is told]
            part = [rows[number] for number in numbers], [languages[number] for number in numbers]
            found = _transcribe(model, processor, *part, task=task, max_new_tokens=max_new_tokens)
            texts.update(zip(numbers, found, strict=True))
        return [texts[number] for number in range(len(rows))]
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in SpeechCollator(processor)(rows).items()
    }
    if not model.can_generate():
        tokens = model(**inputs).logits.argmax(dim=-1)
        if "input_features" in inputs:
            lengths = inputs["attention_mask"].sum(-1)
        else:
            lengths = torch.tensor([len(row["audio"]["array"]) for row in rows])
        # Tokens of padding are not part of a clip, and would make results depend on the batch.
        for clip, num_frames in zip(tokens, num_frames_of(model, lengths), strict=True):
            clip[num_frames:] = processor.tokenizer.pad_token_id
        return processor.batch_decode(tokens)
    options: dict[str, Any] = {}
    if is_multilingual(model):
        options = {"task": task, "language": list(languages) if all(is_told) else None}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    tokens = model.generate(**inputs, **options)
    if hasattr(tokens, "durations"):
        # A transducer goes on at a clip's last frame until it has heard all clips of the batch.
        frames = tokens.durations.cumsum(-1) - tokens.durations
        heard = frames < num_frames_of(model, inputs["attention_mask"].sum(-1))[:, None]
        tokens = [clip[is_heard] for clip, is_heard in zip(tokens.sequences, heard, strict=True)]
    return processor.batch_decode(tokens, skip_special_tokens=True)


def error_rates(references: Sequence[str], predictions: Sequence[str]) -> ErrorRates:
    """The error rates of normalised texts, by word and by character.

    A rate is `(substitutions + deletions + insertions) / N`, where `N` is the number of words or characters in the
    references.

    Args:
        references: the normalised transcripts.
        predictions: the normalised predictions, one for each reference.

    Raises:
        ValueError: if the references hold no word.
    """
    words = jiwer.process_words(list(references), list(predictions))
    characters = jiwer.process_characters(list(references), list(predictions))
    said = [output.hits + output.substitutions + output.deletions for output in (words, characters)]
    wrong = [output.substitutions + output.deletions + output.insertions for output in (words, characters)]
    if said[0] == 0:
        raise ValueError(
            f"the {len(references)} references hold no word after normalisation, so there is no error rate"
        )
    empty = sum(not reference.strip() for reference in references)
    return ErrorRates(wrong[0] / said[0], wrong[1] / said[1], len(references), said[0], said[1], empty)


def _rates(predictions: Sequence[Prediction]) -> ErrorRates:
    return error_rates(
        [prediction.normalized_reference for prediction in predictions],
        [prediction.normalized_prediction for prediction in predictions],
    )


class MarkKeepingNormalizer(BasicTextNormalizer):
    """Whisper's basic normaliser, but it removes punctuation and symbols alone, and keeps combining marks."""

    def __init__(self) -> None:
        super().__init__()
        self.clean = _without_symbols


def _without_symbols(s: str) -> str:
    normalized = unicodedata.normalize("NFKC", s)
    return "".join(" " if unicodedata.category(c)[0] in "SP" else c for c in normalized)


def _count_marks(text: str) -> int:
    """The number of combining marks that the basic normaliser takes away; accents of composed letters stay."""
    return sum(unicodedata.category(c)[0] == "M" for c in unicodedata.normalize("NFKC", text))


def _normalizers(processor: Any, keep_marks: bool) -> dict[bool, Any]:
    """Whisper's normalisers for English (True) and for all other languages (False).

    Only Whisper's tokenizer has the table of American spellings; without it, the English normaliser keeps spellings.
    """
    spellings = getattr(processor.tokenizer, "english_spelling_normalizer", None)
    basic = MarkKeepingNormalizer() if keep_marks else BasicTextNormalizer()
    return {True: EnglishTextNormalizer(spellings or {}), False: basic}


def _is_english(language: str | None, task: str) -> bool:
    return task == "translate" or (language is not None and is_english(language))


def _compare(name: str, language: str | None, reference: str, prediction: str, normalize: Any) -> Prediction:
    said, heard = normalize(reference).strip(), normalize(prediction).strip()
    words = jiwer.process_words(said, heard)
    errors = words.substitutions + words.deletions + words.insertions
    return Prediction(name, language, reference, prediction.strip(), said, heard, errors)


def _length(dataset: Iterable[Any]) -> int | None:
    return len(dataset) if isinstance(dataset, Sized) else None
