"""How a run of `paper.py` is measured: word errors, BLEU and cross-entropy of its test, clip by clip."""

from __future__ import annotations

from typing import Any

import jiwer
import numpy as np
import torch
from paper_models import Architecture
from sentences import SpokenSentences
from words import WordStrings

from hf_residual_transformer.speech.collators import batched


def texts_of(processor: Any, predicted: Any) -> tuple[list[str], list[str]]:
    """References and predictions. CTC writes a token in many frames, so that equal neighbours are one token in what is
    predicted, and not in a reference, such as the two letters in "look".
    """
    padding = processor.tokenizer.pad_token_id
    sides: Any = (predicted.label_ids, {"group_tokens": False}), (predicted.predictions, {})
    return tuple(  # type: ignore[return-value]
        [
            text.strip()
            for text in processor.batch_decode(
                np.where(ids >= 0, ids, padding), skip_special_tokens=True, **options
            )
        ]
        for ids, options in sides
    )


@torch.inference_mode()
def recognise(
    architecture: Architecture, model: Any, processor: Any, dataset: Any, batch_size: int
) -> tuple[list[str], list[str]]:
    """References and predictions, by greedy search."""
    collator = architecture.collator(processor)
    references: list[str] = []
    predictions: list[str] = []
    model.eval()
    for rows in batched((dataset[index] for index in range(len(dataset))), batch_size):
        ids = architecture.recognise(model, collator([{"audio": row["audio"]} for row in rows]))
        predictions += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        references += [row["text"] for row in rows]
    return references, predictions


@torch.inference_mode()
def measure_nats(
    architecture: Architecture, model: Any, processor: Any, dataset: Any, batch_size: int
) -> dict[str, Any]:
    """The mean over a reference's tokens of less the logarithm of its probability, given the audio, in nats; and for
    each clip the sum, and the number of its tokens. Empty for a model whose loss is not this.

    It tells models apart with fewer runs than word errors do, since it also moves where no word changes. Models that
    are trained with label smoothing keep some of it for any clip.
    """
    collator = architecture.collator(processor)
    nats: list[float] = []
    tokens: list[int] = []
    model.eval()
    for rows in batched((dataset[index] for index in range(len(dataset))), batch_size):
        found = architecture.nats(model, collator(rows))
        if found is None:
            return {}
        nats += found[0].tolist()
        tokens += found[1].tolist()
    return {
        "nats_per_token": sum(nats) / sum(tokens),
        "nats_of_clips": " ".join(f"{value:.4g}" for value in nats),
        "tokens_of_clips": " ".join(map(str, tokens)),
    }


def measure(task: str, references: list[str], predictions: list[str]) -> dict[str, Any]:
    """WER and CER, for a translation BLEU and chrF too, and for each clip what a bootstrap adds up.

    That is the numbers of words and of word errors, and for BLEU the matches of one to four words, and the lengths of
    prediction and reference.
    """
    translated: dict[str, Any] = {}
    if task == "translation":
        import sacrebleu

        one_clip = sacrebleu.BLEU(effective_order=True)  # sacrebleu warns without it; no count changes
        translated = {
            "bleu": sacrebleu.corpus_bleu(predictions, [references]).score,
            "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
            "bleu_of_clips": " ".join(
                ",".join(map(str, (*clip.counts, clip.sys_len, clip.ref_len)))
                for clip in map(one_clip.sentence_score, predictions, ([text] for text in references))
            ),
        }
    counts = [jiwer.process_words(*pair) for pair in zip(references, predictions)]
    errors = [count.substitutions + count.deletions + count.insertions for count in counts]
    words = [len(reference.split()) for reference in references]
    return {
        "wer": sum(errors) / sum(words),
        "cer": jiwer.cer(references, predictions),
        **translated,
        "clips": len(references),
        "words": sum(words),
        "word_errors_of_clips": " ".join(map(str, errors)),
        "words_of_clips": " ".join(map(str, words)),
    }


def voices(test: Any) -> dict[str, Any]:
    """Who speaks in the test, by whom the intervals are drawn: names, and a number for each clip. Only synthetic speech
    has it.
    """
    if not isinstance(test, WordStrings | SpokenSentences):
        return {}
    names = list(test.voices)
    return {
        "voices": names,
        "voices_of_clips": " ".join(str(names.index(test.voice(index))) for index in range(len(test))),
    }
