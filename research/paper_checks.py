"""Checks the fields of a scale of `paper.py` when it is read, so that a fault is named before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import Seq2SeqTrainingArguments
from words import SPLITS, WORDS

from hf_residual_transformer.training.arguments import TrainingDataArguments
from hf_residual_transformer.training.losses import is_number

LANGUAGES = {"recognition": "en", "translation": "es"}
RUN_FIELDS = ("task", "seeds", "cells")
MOST_SEED = 2**32 - 1  # of numpy


def check_scale(scale: Any) -> None:
    """Checks the fields of a `Scale`, but for what only the Trainer or the cells know.

    Raises:
        ValueError: naming the field, what it must be, and what it was.
    """
    _check_whole("`vocab_size`", scale.vocab_size)
    _check_whole("`average_checkpoints`", scale.average_checkpoints)
    if not is_number(scale.ctc_weight) or scale.ctc_weight >= 1:
        raise ValueError(f"`ctc_weight` must be a number from 0 to below 1, got {scale.ctc_weight!r}")
    _check_names("`data`", scale.data, LANGUAGES)
    _check_names("`sizes_of`", scale.sizes_of, scale.data)
    for part in (scale.sizes, *scale.sizes_of.values()):
        _check_names("`sizes`", part, _names(scale.architecture.sizes_class))
    _check_recipe(scale.recipe)
    for task, entry in scale.data.items():
        place = f"`data` of {task}"
        _check_names(place, entry)
        sizes = scale.sizes_for(task)
        if "words" in entry:
            _check_names(place, entry, ["words"])
            _check_words(f"`words` of {task}", entry["words"], getattr(sizes, "window_seconds", None))
            _check_synthetic(scale.recipe)
        elif "sentences" in entry:
            _check_names(place, entry, ["sentences"])
            _check_sentences(f"`sentences` of {task}", entry["sentences"])
            _check_synthetic(scale.recipe)
        else:
            splits = [f"{split}_split" for split in SPLITS]
            _check_names(
                f"{place}, which has no `words` and no `sentences`,",
                entry,
                [*splits, *_names(TrainingDataArguments)],
                splits,
            )
            if entry.get("streaming", False) is not False:
                raise ValueError(f"`streaming` in {place} must be false, got {entry['streaming']!r}")
    _check_runs(scale.runs)


def _check_recipe(recipe: Any) -> None:
    _check_names("`recipe`", recipe)
    for option in fields(Seq2SeqTrainingArguments):
        # The Trainer takes text for a number, such as YAML's 5e-4, until it computes with it.
        if type(option.default) in (int, float) and option.name in recipe:
            value = recipe[option.name]
            if type(value) not in (int, float):
                hint = "; YAML wants a point and a sign, as in 5.0e-4" if isinstance(value, str) else ""
                raise ValueError(f"`{option.name}` of `recipe` must be a number, got {value!r}{hint}")
    for name in ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if name in recipe:
            _check_whole(f"`{name}` of `recipe`", recipe[name])


def _check_synthetic(recipe: dict[str, Any]) -> None:
    """Checks the options that synthetic clips need. They are made for the steps of a run, the easy ones first."""
    _check_names("`recipe`", recipe, needed=["max_steps", "per_device_train_batch_size"])
    if recipe.get("train_sampling_strategy") != "sequential":
        raise ValueError(
            "`train_sampling_strategy` of `recipe` must be sequential for synthetic clips, which are in order already, "
            f"got {recipe.get('train_sampling_strategy')!r}"
        )


def _check_sentences(place: str, sentences: Any) -> None:
    needed = ("folder", "validation", "test")
    _check_names(place, sentences, [*needed, "table", "decibels"], needed)
    for name in ("folder", "table"):
        if not isinstance(sentences.get(name, ""), str):
            raise ValueError(f"`{name}` in {place} must be the name of a {name}, got {sentences[name]!r}")
    for split in needed[1:]:
        _check_whole(f"`{split}` in {place}", sentences[split])
    decibels = sentences.get("decibels", [0, 0])
    if not isinstance(decibels, list) or len(decibels) != 2 or not all(map(_is_finite, decibels)):
        raise ValueError(f"`decibels` in {place} must be a list of two finite numbers, got {decibels!r}")
    if decibels[0] > decibels[1]:
        raise ValueError(f"`decibels` in {place} must have the lower number first, got {decibels}")


def _check_words(place: str, words: Any, window_seconds: int | None) -> None:
    needed = ["vocabulary", "validation", "test", *(["seconds"] if window_seconds is None else [])]
    _check_names(place, words, [*needed, "train", "seconds", "speeds", "new_voices"], needed)
    _check_whole(f"`vocabulary` in {place}", words["vocabulary"], most=len(WORDS))
    for split in SPLITS:
        if split in words:
            _check_whole(f"`{split}` in {place}", words[split])
    if type(words.get("new_voices", False)) is not bool:
        raise ValueError(f"`new_voices` in {place} must be true or false, got {words['new_voices']!r}")
    seconds, speeds = words.get("seconds", window_seconds), words.get("speeds", [1.0])
    if not _is_positive(seconds):
        raise ValueError(f"`seconds` in {place} must be a number above 0, got {seconds!r}")
    if window_seconds is not None and seconds > window_seconds:
        raise ValueError(
            f"`seconds` in {place} must be at most `window_seconds`, {window_seconds}, got {seconds}"
        )
    if not isinstance(speeds, list) or not speeds or not all(map(_is_positive, speeds)):
        raise ValueError(f"`speeds` in {place} must be a list of numbers above 0, got {speeds!r}")


def _check_runs(runs: Any) -> None:
    if not isinstance(runs, list) or not runs:
        raise ValueError(f"`runs` must be a list of tasks with their seeds and cells, got {runs!r}")
    for run in runs:
        _check_names("each of `runs`", run, RUN_FIELDS, RUN_FIELDS)
        for name in ("seeds", "cells"):
            if not isinstance(run[name], list):
                raise ValueError(f"`{name}` must be a list, got {run[name]!r}")
        for seed in run["seeds"]:
            _check_whole("each of `seeds`", seed, least=0, most=MOST_SEED)


def _check_names(
    place: str, values: Any, allowed: Iterable[str] | None = None, needed: Iterable[str] = ()
) -> None:
    """Checks the names in one part of a scale."""
    if not isinstance(values, dict):
        raise ValueError(f"{place} must hold fields by name, got {values!r}")
    for name in needed:
        if name not in values:
            raise ValueError(
                f"{place} must have the field {name!r}, got {', '.join(map(str, values)) or 'none'}"
            )
    for name in values:
        if allowed is not None and name not in allowed:
            raise ValueError(f"{place} must have fields of {', '.join(allowed)}, got {name!r}")


def _check_whole(place: str, value: Any, least: int = 1, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{place} must be a whole number {bounds}, got {value!r}")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _names(kind: Any) -> list[str]:
    return [option.name for option in fields(kind)]
