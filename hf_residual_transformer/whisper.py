"""What only Whisper has: tokens of languages and tasks."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS


def language_and_task_ids(vocabulary: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """`lang_to_id` and `task_to_id` of a generation config, from the tokens that a vocabulary has."""
    languages = {token: vocabulary[token] for code in LANGUAGES if (token := f"<|{code}|>") in vocabulary}
    tasks = {task: vocabulary[f"<|{task}|>"] for task in TASK_IDS if f"<|{task}|>" in vocabulary}
    return languages, tasks
