"""Compares compressed Whispers with the dense one in translating speech into English, beside recognising it: a metric
of recognition may not see what a compressed encoder loses.

    apt-get install ffmpeg asterisk-core-sounds-{en,es,fr,it,ru}{,-g722} fillets-ng-data{,-cs,-nl} pocketsphinx-testdata
    python research/make_sample.py --full /tmp/speech
    pip install ".[research]"
    python research/translation.py --data /tmp/speech --dense openai/whisper-base \
        --models outputs/base-31 outputs/base-50 --output results/translation-base.json

The data is telephone prompts in Spanish, French, Italian and Russian, whose English counterparts are the references,
and Czech and Dutch dialogue of a game with its English script. All of it is human speech. Every clip is encoded once,
then written down and translated by greedy search; the language is given. BLEU and chrF are sacrebleu's, of texts as
they are; WER is of normalised texts without diacritics, which many Spanish transcripts lack. All intervals are of the
same bootstrap samples of the clips, and hold 95 % of them.

`results/translation-base.json` has the figures, a `.md` beside it the table, and a `.jsonl` every text. A model whose
texts are in the `.jsonl` already is not run again; `--table` needs neither models nor audio, and only computes the
figures again from these texts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from pretrained import resolve_pretrained
from runtimes_report import INTERVAL, bootstrap_samples, count_errors
from tqdm import tqdm
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, GenerationMixin
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

import hf_residual_transformer as hrt
from hf_residual_transformer.folders import model_bytes
from hf_residual_transformer.provenance import portable, provenance
from hf_residual_transformer.speech.collators import batched, extract
from hf_residual_transformer.speech.transcription import TOKENS_A_SECOND, complete_token_ids, encoder_window

LANGUAGES = ("es", "fr", "it", "ru", "cs", "nl")
LEAST_WORDS = 3  # of a translation; BLEU says little of shorter ones
TASKS = ("transcribe", "translate")


@dataclass
class Clip:
    """A clip with both references, and each model's texts by the name of the model."""

    id: str
    language: str
    text: str
    translation: str
    transcribe: dict[str, str] = field(default_factory=dict)
    translate: dict[str, str] = field(default_factory=dict)


def choose_clips(folder: Path, languages: Sequence[str], number: int, max_seconds: float) -> list[Clip]:
    """So many clips of each language, evenly spread over those of the test split that have a translation.

    Raises:
        ValueError: for a language that has none.
    """
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as table:
        rows = [
            row
            for row in csv.DictReader(table)
            if row["split"] == "test"
            and len(row["translation"].split()) >= LEAST_WORDS
            and float(row["duration"]) <= max_seconds
        ]
    clips = []
    for language in languages:
        own = [row for row in rows if row["language"] == language]
        if not own:
            raise ValueError(
                f"`languages` must be of {folder}, which has no translated clips of {language!r}"
            )
        kept = min(number, len(own))
        clips += [
            Clip(row["file_name"], language, row["text"], row["translation"])
            for row in (own[index * len(own) // kept] for index in range(kept))
        ]
    return clips


def read_clips(path: Path) -> list[Clip]:
    """The clips of a `.jsonl` with their texts."""
    return [Clip(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def run_model(model: Any, processor: Any, folder: Path, clips: Sequence[Clip], name: str, args: Any) -> float:
    """Adds the model's texts to the clips; returns the seconds that it took."""
    complete_token_ids(model, processor.tokenizer)
    started = time.perf_counter()
    # Clips of a similar length together: greedy search runs to the longest text of a batch.
    order = sorted(clips, key=lambda clip: len(clip.translation))
    batches = list(batched(order, args.batch_size))
    for batch in tqdm(batches, desc=name):
        arrays = [soundfile.read(folder / clip.id, dtype="float32")[0] for clip in batch]
        extractor = processor.feature_extractor
        length = round(args.window_seconds * extractor.sampling_rate)
        features = extract(arrays, extractor, length)["input_features"]
        with encoder_window(model.get_encoder(), features.shape[-1]):
            encoded = model.get_encoder()(features)
            for task in TASKS:
                most = math.ceil(TOKENS_A_SECOND * max(map(len, arrays)) / extractor.sampling_rate) + 4
                texts = decode(model, processor, encoded, [clip.language for clip in batch], task, most)
                for clip, text in zip(batch, texts, strict=True):
                    getattr(clip, task)[name] = text
    return time.perf_counter() - started


def decode(
    model: Any, processor: Any, encoded: Any, languages: Sequence[str], task: str, max_new_tokens: int
) -> list[str]:
    """Texts of encoded clips in the given languages, by greedy search without timestamps."""
    config = model.generation_config
    prefix = torch.tensor(
        [
            [
                config.decoder_start_token_id,
                config.lang_to_id[f"<|{language}|>"],
                config.task_to_id[task],
                config.no_timestamps_token_id,
            ]
            for language in languages
        ]
    )
    # Whisper's own `generate` would look for more audio after a token that may be a timestamp.
    tokens = GenerationMixin.generate(
        model,
        encoder_outputs=encoded,
        decoder_input_ids=prefix,
        decoder_attention_mask=torch.ones_like(prefix),
        max_length=prefix.shape[1] + max_new_tokens,
        max_new_tokens=None,
        do_sample=False,
        num_beams=1,
    )
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


def measure(clips: Sequence[Clip], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The metrics of each model on these clips; the first of `names` is what the others are compared with."""
    from sacrebleu.metrics import BLEU, CHRF

    normalize = BasicTextNormalizer(remove_diacritics=True)
    references = [normalize(clip.text) for clip in clips]
    counts = {
        name: count_errors(references, [normalize(clip.transcribe[name]) for clip in clips]) for name in names
    }
    draws = bootstrap_samples(len(clips))
    scores = {"wer": {name: (own.rate(), own.rates(draws)) for name, own in counts.items()}}
    translations = [clip.translation for clip in clips]
    for title, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        scores[title] = {
            name: _score(metric, [clip.translate[name] for clip in clips], translations, draws)
            for name in names
        }
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for title, by_name in scores.items():
        for name, (score, sampled) in by_name.items():
            found[name] |= {title: score, f"{title}_95": _interval(sampled)}
            if name != names[0]:
                found[name][f"{title}_minus_dense_95"] = _interval(sampled - by_name[names[0]][1])
    return found


def _score(
    metric: Any, texts: Sequence[str], references: Sequence[str], draws: np.ndarray
) -> tuple[float, np.ndarray]:
    """A metric of sacrebleu over all clips, and over each of `draws`, which hold indices of clips."""
    # Its own bootstrap has samples of its own, and its p-values are of differences less their mean.
    counts = np.array(metric._extract_corpus_statistics(texts, [references]))
    whole, *sampled = (
        metric._compute_score_from_stats(counts[draw].sum(0).tolist()).score
        for draw in (np.arange(len(counts)), *draws)
    )
    return whole, np.array(sampled)


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, INTERVAL)]


def write_results(clips: Sequence[Clip], values: dict[str, Any], path: Path) -> None:
    """Writes the JSON file, which has `values` too, and the table."""
    models = values["models"]
    languages = list(dict.fromkeys(clip.language for clip in clips))
    groups = {"all": list(clips)} | {
        language: [clip for clip in clips if clip.language == language] for language in languages
    }
    measured = {group: measure(own, list(models)) for group, own in groups.items()}
    values = values | {"clips": {group: len(own) for group, own in groups.items()}, "results": measured}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    lines = [
        "language | clips | model | MB | WER % | BLEU | BLEU minus dense, 95 % | chrF | chrF minus dense, 95 %",
        "---|---:|---|---:|---:|---:|---:|---:|---:",
    ]
    for group, by_model in measured.items():
        for name, row in by_model.items():
            cells = [group, str(len(groups[group])), name, f"{models[name]['bytes'] / 1e6:.1f}"]
            cells.append(f"{100 * row['wer']:.1f}")
            for title in ("BLEU", "chrF"):
                interval = row.get(f"{title}_minus_dense_95")
                difference = "{:+.2f} to {:+.2f}".format(*interval) if interval else "-"
                cells += [f"{row[title]:.1f}", difference]
            lines.append(" | ".join(cells))
    lines = [f"| {line} |" for line in lines]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of `make_sample.py --full`")
    parser.add_argument(
        "--dense", default="openai/whisper-base", help="the multilingual Whisper to compare with"
    )
    parser.add_argument("--models", nargs="*", default=[], help="folders of compressed ones")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES))
    parser.add_argument("--clips", type=int, default=40, help="the most clips of each language")
    parser.add_argument("--max_seconds", type=float, default=10.0, help="leave out longer clips")
    parser.add_argument("--window_seconds", type=float, default=30.0, help="what clips are padded to")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("outputs/translation.json"))
    parser.add_argument(
        "--table",
        action="store_true",
        help="only compute the figures of --output again, from the texts beside it",
    )
    args = parser.parse_args()
    texts = args.output.with_suffix(".jsonl")
    if args.table:
        stored = json.loads(args.output.read_text(encoding="utf-8"))
        write_results(read_clips(texts), stored, args.output)
        return
    if args.data is None:
        parser.error("--data is needed, or --table")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    clips = choose_clips(args.data, args.languages, args.clips, args.max_seconds)
    if texts.is_file():
        known = {clip.id: clip for clip in read_clips(texts)}
        clips = [known.get(clip.id, clip) for clip in clips]
    models: dict[str, dict[str, Any]] = {}
    for source in (args.dense, *args.models):
        name = portable(source).rpartition("/")[2]
        path = resolve_pretrained(source)
        model = AutoModelForSpeechSeq2Seq.from_pretrained(path, dtype=torch.float32).eval()
        is_dense = not isinstance(model, hrt.ResidualWhisperForConditionalGeneration)
        models[name] = {
            "bytes": model_bytes(model) // 2 if is_dense else hrt.size_report(model).model_bytes.unique
        }
        if all(name in clip.translate for clip in clips):
            continue
        seconds = run_model(model, AutoProcessor.from_pretrained(path), args.data, clips, name, args)
        models[name]["seconds"] = seconds
        texts.write_text(
            "".join(json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips), encoding="utf-8"
        )
    settings = {"models": models, "window_seconds": args.window_seconds, "max_seconds": args.max_seconds}
    write_results(clips, settings | provenance(), args.output)


if __name__ == "__main__":
    main()
