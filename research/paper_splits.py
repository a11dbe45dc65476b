"""The data of a run of `paper.py`: synthetic words or sentences, or what `TrainingDataArguments` load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_checks import LANGUAGES
from paper_scale import Scale
from sentences import SpokenSentences
from words import NOISE_DECIBELS, SPLITS, TRAINING_SPEEDS, WordStrings, all_texts, longest_texts

from hf_residual_transformer.speech.datasets import refuse_long_clips
from hf_residual_transformer.training.arguments import TrainingDataArguments


@dataclass
class Splits:
    """The data of a task. The vocabulary is trained on `texts`; `named_texts` are those that a model must be able to
    write, each after its name.
    """

    texts: list[str]
    named_texts: list[tuple[str, str]]
    train: Any
    validation: Any
    test: Any


def load_splits(scale: Scale, task: str, seed: int) -> Splits:
    """The data of a run. Of synthetic clips, those to train on depend on the seed, and with `new_voices` the voices of
    all splits.

    Raises:
        ValueError: for an empty split, a table that is not there or has too few sentences, or a clip that is longer
            than the window of the model.
    """
    data, sizes = scale.data[task], scale.sizes_for(task)
    if "words" in data:
        language, words = LANGUAGES[task], data["words"]
        seconds = words.get("seconds") or sizes.window_seconds
        strings = scale.items_to_train_on()
        splits = {
            split: WordStrings(
                language,
                split,
                words.get(split, strings),
                seconds,
                seed if split == "train" else 0,
                words["vocabulary"],
                words.get("speeds", TRAINING_SPEEDS),
                seed if words.get("new_voices") else None,
            )
            for split in SPLITS
        }
        longest = longest_texts(language, words["vocabulary"])
        named_texts = [(f"the string {text!r}", text) for text in longest]
        return Splits(all_texts(language, words["vocabulary"]), named_texts, **splits)
    if "sentences" in data:
        options = data["sentences"] | {"train": scale.items_to_train_on()}
        batch_size = scale.recipe["per_device_train_batch_size"]
        found = {
            split: SpokenSentences(
                Path(options["folder"]),
                options.get("table", task),
                split,
                options[split],
                seed if split == "train" else 0,
                batch_size,
                options.get("decibels", NOISE_DECIBELS),
            )
            for split in SPLITS
        }
        if hasattr(sizes, "window_seconds"):
            for split in found.values():
                split.check_longest(sizes.window_seconds)
        texts = {split: [row["text"] for row in found[split].rows] for split in ("train", "validation")}
        named_texts = [(repr(text), text) for own in texts.values() for text in own]
        return Splits(texts["train"], named_texts, **found)
    names = {split: data[f"{split}_split"] for split in SPLITS}
    options = TrainingDataArguments(**{key: data[key] for key in data if not key.endswith("_split")})
    loaded = {split: options.load(name, 16_000) for split, name in names.items()}
    if hasattr(sizes, "window_seconds"):
        for rows in loaded.values():
            refuse_long_clips(rows, sizes.window_seconds)
    texts = {split: list(loaded[split]["text"]) for split in ("train", "validation")}
    named_texts = [
        (f"clip {index} of split {names[split]!r}", text)
        for split, own in texts.items()
        for index, text in enumerate(own)
    ]
    return Splits(texts["train"], named_texts, **loaded)
