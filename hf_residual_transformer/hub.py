"""The model card of a compressed model: what it is, how it was made, and only figures that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration import ResidualConfig, values_of
from .reporting import parameter_report

BODY = """---
{metadata}
---

# {name}

{base_model} with a smaller encoder: {form}, as in
`W_l = U_g + B_l A_l + D_l` (ResidualTransformer, [arXiv 2310.02489](https://arxiv.org/abs/2310.02489)).
The encoder's layers have {unique:,} bytes, {ratio:.1%} of the dense {dense:,}, with 16 bits for every parameter that is
not quantised; the decoder and the convolutions are unchanged.

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

{conditions}

## Made by

{made_by}

```json
{settings}
```

## Limits

It was calibrated{distilled} on {data}: expect more errors than measured here on other speakers, languages and noise,
and measure on your own recordings before you rely on it. What {base_model} does
wrong, this model does too.

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
    wer: float,
    details: dict[str, Any],
    distilled: bool,
    license: str = "mit",
    language: list[str] | None = None,
) -> Path:
    """Writes `README.md` with the metadata that the Hub reads into `folder`, and returns its path.

    Args:
        model: the residual model, for its sizes and settings.
        base_model: id of the dense model.
        data: the recordings it was calibrated and distilled on, in words.
        dataset: what the error rate was measured on, in words.
        rows: the table of measurements: column values by row name.
        wer: word error rate of this model, a fraction.
        details: what `provenance()` gave when it was measured.
        distilled: whether it was trained after the conversion.
        license: of the base model's weights.
        language: codes of the languages that it was measured on.
    """
    encoder = parameter_report(model).encoder_bytes
    folder = Path(folder)
    name = f"{base_model.rpartition('/')[2]}-residual-{encoder.ratio:.0%}".rstrip("%")
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    table += [
        f"| {name} | {' | '.join(str(row.get(c, '')) for c in columns)} |" for name, row in rows.items()
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
                metric_value=round(100 * wer, 2),
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
        unique=encoder.unique,
        dense=encoder.dense,
        ratio=encoder.ratio,
        measured="\n".join(table),
        conditions=f"Word error rates on {dataset}, greedy decoding, Whisper's normaliser. {hardware['cpu']}, "
        f"{hardware['threads']} threads; transformers {details['versions']['transformers']}, "
        f"torch {details['versions']['torch']}.",
        made_by=f"`python {details['command']}` of hf-residual-transformer "
        f"{details['versions']['hf_residual_transformer']}, with this `residual_config`:",
        settings=json.dumps(model.config.residual_config.to_dict(), indent=2),
        distilled=" and distilled" if distilled else "",
        data=data,
    )
    path = folder / "README.md"
    ModelCard(text).save(path)
    return path


def _form(config: ResidualConfig) -> str:
    """What layers have of the equation, in words."""
    most = max((size for size in values_of(config.group_size) if size is not None), default=0)
    if not most:
        return "each layer has matrices of low rank"
    bits = ""
    if config.shared_bits:
        bits = f" in {' or '.join(map(str, sorted(set(values_of(config.shared_bits)))))} bits"
    if most > 1:
        return f"layers share full matrices{bits} and keep a low-rank residual each"
    return f"each layer has its full matrices{bits} and a low-rank residual of its own"
