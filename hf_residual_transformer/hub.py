"""Shares a compact model on the Hub: its card, which has sizes, settings and measured figures only, and the upload."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForAudioClassification
from transformers.utils import logging

from .classes import PREFIX, RECOGNIZERS, dense_names
from .configuration import RESIDUAL_FIELDS, ResidualConfig, values_of
from .folders import model_bytes, write_text
from .reporting import FLOAT_BITS, Count, format_bytes, size_report

logger = logging.get_logger(__name__)
TAGS = ["hf-residual-transformer", "model-compression", "weight-sharing", "low-rank"]
LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual")
# What the Hub's pipelines do with a class that an Auto class knows.
TASKS: dict[Any, str] = {
    AutoModelForAudioClassification: "audio-classification",
    **dict.fromkeys(RECOGNIZERS, "automatic-speech-recognition"),
}

BODY = """---
{metadata}
---

# {name}

{base_model} in fewer bytes: {form}, as in
`W_l = U_g + B_l A_l + D_l` (ResidualTransformer, [arXiv 2310.02489](https://arxiv.org/abs/2310.02489)).
The whole model takes {model}.
{parts}
{floats}; everything else is unchanged.

## Use

{use}

`model.merge()` gives the plain architecture, at the dense size, for runtimes that know only that.

## Measured

{measured}

## Made by

{made_by}

```json
{settings}
```

## Limits

{limits}

## Citation

Y. Wang and J. Li, "ResidualTransformer: Residual Low-Rank Learning with Weight-Sharing for Transformer Layers",
ICASSP 2024, arXiv 2310.02489.
"""
TRANSCRIBE = """transcriber = pipeline("automatic-speech-recognition", model="{id}"{trust})
print(transcriber("speech.wav")["text"])"""
PLACEHOLDER = "path/or/id/of/this/model"


@dataclass(frozen=True)
class Figures:
    """What was measured of a model, for its card.

    Args:
        dataset: the recordings that the error rates were measured on, in words.
        rows: the table of measurements: for each row name, values by column.
        evaluations: word error rates by row name, as fractions.
        chosen: name of the row that was measured with the saved weights. The metadata report its error rate.
        details: the value of `provenance()` at the time of the measurement.
        dataset_id: id of the data set on the Hub, where it has one.
        split: of the data set.

    Raises:
        ValueError: if `chosen` is not the name of a row with an error rate.
    """

    dataset: str
    rows: dict[str, dict[str, Any]]
    evaluations: dict[str, float]
    chosen: str
    details: dict[str, Any]
    dataset_id: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.chosen not in self.rows or self.chosen not in self.evaluations:
            known = ", ".join(repr(name) for name in self.rows if name in self.evaluations)
            raise ValueError(f"`chosen` must name a row with an error rate ({known}), got {self.chosen!r}")

    @classmethod
    def from_evaluation(cls, path: str | Path, names: Collection[str] | None = None) -> Figures:
        """From the `evaluation.json` of `hrt evaluate`, whose model is the one that gets the card.

        Args:
            path: of the file.
            names: what the model is called, of which folders count by their last part; by default it is not checked,
                and neither is an evaluation that does not say its model.

        Raises:
            ValueError: if the file is no such evaluation, one that an error ended, one of translations, or one of a
                model that has another name.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            rates = {name: float(values[name]) for name in ("wer", "cer")}
            dataset, split = (str(values["data"][name]) for name in ("dataset", "split"))
            language = values["data"].get("language")
            details = {name: values[name] for name in ("versions", "hardware", "command")}
            clips, is_whole = int(values["clips"]), values["stopped_by"] is None
            task = (values.get("settings") or {}).get("task", "transcribe")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`evaluation` must be the evaluation.json of `hrt evaluate`, got {str(path)!r} ({error!r})"
            ) from error
        if not is_whole:
            raise ValueError(f"`evaluation` must be of all clips, got {str(path)!r}, which an error ended")
        if task != "transcribe":
            raise ValueError(
                f"`evaluation` must be of transcripts, got {str(path)!r}, whose task is {task!r}"
            )
        model = values.get("model")
        called = "" if model is None else Path(str(model)).name.strip(".")
        if names is not None and called and called not in {Path(name).name for name in names}:
            raise ValueError(
                f"`evaluation` must be of the model that gets the card ({' or '.join(map(repr, names))}), got "
                f"{str(path)!r}, which is of {model!r}; evaluate this model, and name the file of that run"
            )
        words = f"the {clips} clips of {dataset}, split {split}"
        row = {"clips": clips, **{f"{name.upper()}, %": f"{100 * rate:.2f}" for name, rate in rates.items()}}
        return cls(
            dataset=words if language is None else f"{words}, language {language}",
            rows={"this model": row},
            evaluations={"this model": rates["wer"]},
            chosen="this model",
            details=details,
            dataset_id=None if values["data"].get("dataset_is_path") else _hub_id(dataset),
            split=split,
        )


def model_card(
    model: Any,
    *,
    base_model: str | None = None,
    data: str | None = None,
    figures: Figures | None = None,
    details: Mapping[str, Any] | None = None,
    distilled: bool = False,
    license: str | None = None,
    language: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card of a compact model, with the metadata that the Hub reads. It says only what it is told or can count.

    Args:
        model: the residual model, from which the card takes sizes and settings.
        base_model: id of the dense model. A folder is no id, and the metadata then have no base model.
        data: the recordings that the model was calibrated and distilled on, in words.
        figures: what was measured.
        details: the value of `provenance()` when the model was made; by default that of `figures`.
        distilled: whether the saved model was trained after the conversion.
        license: license of the base model's weights, as the Hub calls it.
        language: codes of the languages that error rates were measured on, such as "en".
        datasets: ids of the data sets on the Hub that the model was calibrated and distilled on.
        repo_id: id that the model will have on the Hub, for the example.

    Raises:
        ValueError: for codes and ids that the Hub would refuse.
    """
    for code in language or ():
        if not LANGUAGE.fullmatch(code):
            raise ValueError(
                f"`language` must be codes of two or three letters, such as 'en', or 'multilingual', got {code!r}"
            )
    for dataset in datasets or ():
        _check_id("datasets", dataset)
    sizes = size_report(model)
    file_size = format_bytes(sizes.model_bytes.unique, decimals=0).replace(" ", "")
    base_name = "model" if base_model is None else Path(base_model).name
    name = f"{base_name}-residual-{file_size}"
    task = next((TASKS[auto] for auto in _autos_of(model) if auto in TASKS), "feature-extraction")
    base_id = _hub_id(base_model)
    metadata = ModelCardData(
        base_model=base_id,
        base_model_relation=None if base_id is None else "quantized",
        datasets=None if datasets is None else list(datasets),
        language=None if language is None else list(language),
        license=license,
        library_name="transformers",
        metrics=None if figures is None else ["wer"],
        pipeline_tag=task,
        tags=TAGS,
        model_name=None if figures is None else name,
        eval_results=None if figures is None else [_result(figures)],
    )
    details = details or (None if figures is None else figures.details)
    dense = "the dense model" if base_model is None else base_model
    return ModelCard(
        BODY.format(
            metadata=metadata.to_yaml().strip(),
            name=name,
            base_model=dense[0].upper() + dense[1:] if base_model is None else dense,
            form=_form(model.config.residual_config),
            model=_size(sizes.model_bytes),
            parts="\n".join(f"- {part}: {_size(count)}" for part, count in sizes.parts.items()),
            floats=_floats(model),
            use=_use(model, task, repo_id or PLACEHOLDER),
            measured="No error rate of this model was measured." if figures is None else _measured(figures),
            made_by="hf-residual-transformer, with these settings:"
            if details is None
            else f"`{_command(details)}` of hf-residual-transformer "
            f"{details['versions']['hf_residual_transformer']}, with these settings:",
            settings=json.dumps(settings_of(model.config), indent=2),
            limits=_limits(dense, data, distilled, figures),
        )
    )


def write_model_card(folder: str | Path, model: Any, **options: Any) -> Path:
    """Writes `model_card(model, **options)` as the `README.md` of the folder of a saved model, and returns its path."""
    card = model_card(model, **options)
    path = Path(folder) / "README.md"
    write_text(path, str(card))
    return path


def push(
    model: Any,
    repo_id: str,
    *,
    with_code: bool | None = None,
    card: ModelCard | str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    files: Sequence[str | Path] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """Uploads a compact model with its processor, card and code in one commit; `model.push_to_hub` calls it.

    Everything is saved and checked before the repository is made.

    Args:
        model: a residual model; its `processor`, if it has one, goes with it.
        repo_id: such as "name/model"; a bare "model" is in the user's own namespace.
        with_code: whether its code goes with it; see `save_pretrained`.
        card: the card, or its text, or the path of its file. By default the card that the repository has stays, and
            where there is none, one is made.
        about: options of `model_card` for the card that is made.
        files: further files that go with it, by their own names.
        private: whether a new repository is private.
        token: of the user; by default the one that is stored by `hf auth login`.
        revision: branch to commit to, which is made if it does not exist.
        create_pr: whether to open a pull request.
        commit_message: of the commit.
        commit_description: of the commit.
        max_shard_size: see `save_pretrained`.
        tags: further tags for the card.

    Raises:
        ValueError: for a malformed id, a missing login, and a card whose metadata the Hub refuses.
    """
    _check_id("repo_id", repo_id)
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise ValueError(
            "`token` must be that of a user who may write, got none: log in with `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi(token=token)
    if model.dtype == torch.float32:
        logger.warning(
            f"the model is uploaded in float32, {format_bytes(model_bytes(model))}; after model.half(), what is not "
            "quantised takes half as much"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, with_code=with_code, max_shard_size=max_shard_size)
        for path in map(Path, files):
            shutil.copyfile(path, folder / path.name)
        full_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        if card is None and not _has_card(api, full_id, revision):
            card = model_card(model, repo_id=full_id, **(about or {}))
        if card is not None:
            is_path = isinstance(card, str | Path) and "\n" not in str(card)
            known: Any = ModelCard.load(str(card)) if is_path else ModelCard(str(card))
            known.data.tags = list(dict.fromkeys((*(known.data.tags or ()), *(tags or ()))))
            try:
                known.validate(repo_type="model")
            except ValueError as error:
                raise ValueError(
                    f"`card` must have metadata that the Hub accepts; it says {error}"
                ) from error
            write_text(folder / "README.md", str(known))
        api.create_repo(full_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(full_id, branch=revision, exist_ok=True)
        files_of_commit = sorted(path for path in folder.rglob("*") if path.is_file())
        return api.create_commit(
            full_id,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files_of_commit],
            commit_message=commit_message or "Upload a compact model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _has_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        return api.file_exists(repo_id, "README.md", revision=revision) or (
            revision is not None and api.file_exists(repo_id, "README.md")  # a new branch starts from it
        )
    except RepositoryNotFoundError:
        return False


def _check_id(field: str, repo_id: Any) -> None:
    """Raises ValueError for what cannot be the id of a repository on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`{field}` must be an id on the Hub such as 'name/repository', got {repo_id!r}: {error}"
        ) from error


def _hub_id(name: str | None) -> str | None:
    """The name, if it can be an id on the Hub and is no folder or file here."""
    if name is None or name.count("/") > 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _autos_of(model: Any) -> list[Any]:
    """The Auto classes that give the model's class."""
    own = type(model).__name__.removeprefix("FSDP")
    return [auto for auto, name in dense_names(model.family).items() if f"{PREFIX}{name}" == own]


def _result(figures: Figures) -> EvalResult:
    return EvalResult(
        task_type="automatic-speech-recognition",
        dataset_type=figures.dataset_id or "audiofolder",
        dataset_name=figures.dataset,
        dataset_split=figures.split,
        metric_type="wer",
        metric_value=round(100 * figures.evaluations[figures.chosen], 2),
        metric_name="WER (%)",
    )


def _use(model: Any, task: str, repo_id: str) -> str:
    """How the model is opened, with the package and, where it carries its code, without."""
    autos = [auto.__name__ for auto in _autos_of(model)]
    is_pipeline = {"AutoModelForSpeechSeq2Seq", "AutoModelForCTC"} & set(autos)
    auto = autos[0] if autos else "AutoModel"

    def example(first: str, trust: str) -> str:
        opening = (
            TRANSCRIBE.format(id=repo_id, trust=trust)
            if is_pipeline
            else f'model = {auto}.from_pretrained("{repo_id}"{trust})'
        )
        imported = "pipeline" if is_pipeline else auto
        return f"```python\n{first}from transformers import {imported}\n\n{opening}\n```"

    with_package = example("import hf_residual_transformer  # pip install hf-residual-transformer\n", "")
    if not model.config.carries_code:
        return f"{with_package}\n\nNothing in this repository is code."
    without = example("", ", trust_remote_code=True")
    return (
        f"{with_package}\n\nWithout the package, the code in this repository opens it. Read it before you run it, and "
        f"pin a `revision`:\n\n{without}"
    )


def _measured(figures: Figures) -> str:
    columns = list(dict.fromkeys(column for row in figures.rows.values() for column in row))
    table = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    table += [
        f"| {name} | {' | '.join(str(row.get(column, '')) for column in columns)} |"
        for name, row in figures.rows.items()
    ]
    hardware, versions = figures.details["hardware"], figures.details["versions"]
    return "\n".join(table) + (
        f'\n\nThe weights in this repository are those of the row "{figures.chosen}": their word error rate is '
        f"{figures.evaluations[figures.chosen]:.2%}. All figures were measured on {figures.dataset} with greedy "
        f"decoding and Whisper's normaliser, on {hardware['cpu']} with {hardware['threads']} threads, transformers "
        f"{versions['transformers']} and torch {versions['torch']}."
    )


def _limits(dense: str, data: str | None, distilled: bool, figures: Figures | None) -> str:
    made = f"calibrated{' and distilled' if distilled else ''}"
    first = (
        f"The model was {made} on {data}. "
        if data is not None
        else "This card does not know the recordings that the model was calibrated on. "
    )
    errors = (
        "Expect more errors than measured here" if figures is not None else "Expect more errors than dense"
    )
    return (
        f"{first}{errors} on other speakers, languages and\nnoise, and measure on your own recordings before you rely "
        f"on it. It also makes the errors that\n{dense} makes."
    )


def _command(details: Mapping[str, Any]) -> str:
    command = str(details["command"])
    return command if command.startswith("hrt ") else f"python {command}"


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a residual config's compact parts, as plain values."""
    values = {name: getattr(config, name, None) for name in RESIDUAL_FIELDS}
    return {
        name: value.to_dict() if isinstance(value, ResidualConfig) else value
        for name, value in values.items()
        if value
    }


def _size(count: Count) -> str:
    return f"{format_bytes(count.unique)}, {count.ratio:.1%} of the dense {format_bytes(count.dense)}"


def _floats(model: Any) -> str:
    bits = 8 * max(value.element_size() for value in model.parameters())
    if bits <= FLOAT_BITS:
        return f"Each number that is not quantised takes {FLOAT_BITS} bits"
    return (
        f"These sizes are of {FLOAT_BITS} bits for each number that is not quantised. The weights in this repository "
        f"have {bits}, and take {format_bytes(model_bytes(model))}"
    )


def _form(config: ResidualConfig) -> str:
    """Says in words which terms of the equation the layers have."""
    most = max((size for size in values_of(config.group_size) if size is not None), default=0)
    if not most:
        return "each layer has matrices of low rank"
    numbers = set(config.bits_pattern.values())
    if config.shared_bits is not None and (isinstance(config.shared_bits, dict) or not numbers):
        numbers |= set(values_of(config.shared_bits))
    bits = f" in {' or '.join(map(str, sorted(numbers)))} bits" if numbers else ""
    if most > 1:
        return f"layers share full matrices{bits} and keep a low-rank residual each"
    return f"each layer has its full matrices{bits} and a low-rank residual of its own"
