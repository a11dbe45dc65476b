"""Writes the model card of a compressed model: its sizes, how it was made, and measured figures only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration import RESIDUAL_FIELDS, ResidualConfig, values_of
from .folders import write_text
from .reporting import Count, format_bytes, size_report

BODY = """---
{metadata}
---

# {name}

{base_model} in fewer bytes: {form}, as in
`W_l = U_g + B_l A_l + D_l` (ResidualTransformer, [arXiv 2310.02489](https://arxiv.org/abs/2310.02489)).
The whole model takes {model}.
{parts}
Each number that is not quantised takes 16 bits; everything else is unchanged.

## Use

```python
import hf_residual_transformer  # registers the classes; nothing in this folder is code
from transformers import pipeline

transcriber = pipeline("automatic-speech-recognition", model="path/or/id/of/this/model")
print(transcriber("speech.wav")["text"])
```

`model.merge()` gives the plain architecture, at the dense size, for runtimes that know only that.

## Measured

{measured}

The weights in this repository are those of the row "{chosen}": their word error rate is {wer:.2%}. {conditions}

## Made by

{made_by}

```json
{settings}
```

## Limits

The model was calibrated{distilled} on {data}. Expect more errors than measured here on other speakers, languages and
noise, and measure on your own recordings before you rely on it. It also makes the errors that
{base_model} makes.

## Citation

Y. Wang and J. Li, "ResidualTransformer: Residual Low-Rank Learning with Weight-Sharing for Transformer Layers",
ICASSP 2024, arXiv 2310.02489.
"""


def write_model_card(
    folder: str | Path,
    model: Any,
    *,
    base_model: str,
    data: str,
    dataset: str,
    rows: dict[str, dict[str, Any]],
    evaluations: dict[str, float],
    chosen: str,
    details: dict[str, Any],
    distilled: bool,
    license: str = "mit",
    language: list[str] | None = None,
) -> Path:
    """Writes the model card, `README.md` with the metadata that the Hub reads, and returns its path.

    Args:
        folder: the folder of the saved model.
        model: the residual model, from which the card takes sizes and settings.
        base_model: id of the dense model.
        data: the recordings that the model was calibrated and distilled on, in words.
        dataset: the recordings that the error rates were measured on, in words.
        rows: the table of measurements: for each row name, values by column.
        evaluations: word error rates by row name, as fractions.
        chosen: name of the row that was measured with the saved weights. The metadata report its error rate.
        details: the value of `provenance()` at the time of the measurement.
        distilled: whether the saved model was trained after the conversion.
        license: license of the base model's weights.
        language: codes of the languages that error rates were measured on.

    Raises:
        ValueError: if `chosen` is not the name of a row with an error rate.
    """
    if chosen not in rows or chosen not in evaluations:
        known = ", ".join(repr(name) for name in rows if name in evaluations)
        raise ValueError(f"`chosen` must name a row with an error rate ({known}), got {chosen!r}")
    sizes = size_report(model)
    folder = Path(folder)
    file_size = format_bytes(sizes.model_bytes.unique, decimals=0).replace(" ", "")
    name = f"{base_model.rpartition('/')[2]}-residual-{file_size}"
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    table += [
        f"| {row_name} | {' | '.join(str(row.get(c, '')) for c in columns)} |"
        for row_name, row in rows.items()
    ]
    metadata = ModelCardData(
        base_model=base_model,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["hf-residual-transformer", "model-compression", "weight-sharing", "low-rank"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="automatic-speech-recognition",
                dataset_type="audiofolder",
                dataset_name=dataset,
                metric_type="wer",
                metric_value=round(100 * evaluations[chosen], 2),
                metric_name="WER (%)",
            )
        ],
    )
    hardware = details["hardware"]
    text = BODY.format(
        metadata=metadata.to_yaml().strip(),
        name=name,
        base_model=base_model,
        form=_form(model.config.residual_config),
        model=_size(sizes.model_bytes),
        parts="\n".join(f"- {name}: {_size(count)}" for name, count in sizes.parts.items()),
        chosen=chosen,
        wer=evaluations[chosen],
        measured="\n".join(table),
        conditions=f"All figures were measured on {dataset} with greedy decoding and Whisper's normaliser, on "
        f"{hardware['cpu']} with {hardware['threads']} threads, transformers {details['versions']['transformers']} and "
        f"torch {details['versions']['torch']}.",
        made_by=f"`python {details['command']}` of hf-residual-transformer "
        f"{details['versions']['hf_residual_transformer']}, with these settings:",
        settings=json.dumps(settings_of(model.config), indent=2),
        distilled=" and distilled" if distilled else "",
        data=data,
    )
    path = folder / "README.md"
    write_text(path, str(ModelCard(text)))
    return path


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a residual config's compact parts, as plain values."""
    values = {name: getattr(config, name, None) for name in RESIDUAL_FIELDS}
    return {
        name: value.to_dict() if isinstance(value, ResidualConfig) else value
        for name, value in values.items()
        if value is not None
    }


def _size(count: Count) -> str:
    return f"{format_bytes(count.unique)}, {count.ratio:.1%} of the dense {format_bytes(count.dense)}"


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
