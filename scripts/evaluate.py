r"""Word and character error rates of a Whisper or CTC model, dense or residual, on speech with transcripts.

    python scripts/evaluate.py --model openai/whisper-base --dataset openslr/librispeech_asr \
        --dataset_config clean --split test --language en --batch_size 16 --device cuda --dtype bfloat16 \
        --output_dir outputs/whisper-base-librispeech

In about a minute on a CPU, with the recordings that come with this repository:

    python scripts/evaluate.py --language en --max_samples 20 --output_dir outputs/whisper-base-sample

The folder gets `evaluation.json` (rates, data, command, versions, hardware) and `predictions.jsonl`.
The first argument may instead be a JSON or YAML file with options by name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    PreTrainedModel,
    set_seed,
)

import hf_residual_transformer  # noqa: F401 (registers the residual classes)
from hf_residual_transformer.folders import prepare_output_dir
from hf_residual_transformer.provenance import portable
from hf_residual_transformer.speech.metrics import evaluate_asr
from hf_residual_transformer.training.arguments import DataArguments, parse_args


@dataclass
class EvaluationArguments:
    """What to evaluate, how, and where to."""

    output_dir: str = field(metadata={"help": "Folder for the results; it must be empty or new."})
    model: str = field(
        default="openai/whisper-base",
        metadata={
            "help": "A model's id on the Hub or its folder, with its processor: Whisper or wav2vec2 with CTC."
        },
    )
    split: str = field(
        default="test",
        metadata={"help": "Split of the data; 'all' for everything in a table without splits."},
    )
    task: Literal["transcribe", "translate"] = field(
        default="transcribe",
        metadata={
            "help": "What a multilingual Whisper does: 'translate' when the texts are English translations."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Clips at a time."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Limit of a transcript in tokens; by default the model's own, 448 for Whisper."},
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu",
        metadata={"help": "Where to run, such as 'cpu', 'cuda' or 'mps'."},
    )
    dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of weights and activations."}
    )
    seed: int = field(default=0, metadata={"help": "Seed, for models whose generation config samples."})
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that already holds files."})


def load_model(model_id: str, dtype: str) -> PreTrainedModel:
    """A speech recogniser through the Auto class that its config calls for."""
    config = AutoConfig.from_pretrained(model_id)
    auto_class = AutoModelForSpeechSeq2Seq if config.is_encoder_decoder else AutoModelForCTC
    return auto_class.from_pretrained(model_id, dtype=dtype)


def main() -> None:
    args, data_args = parse_args(EvaluationArguments, DataArguments)
    output_dir = prepare_output_dir(args.output_dir, args.overwrite)
    set_seed(args.seed)
    model_id = args.model
    processor = AutoProcessor.from_pretrained(model_id)
    model = load_model(model_id, args.dtype).to(args.device)
    dataset = data_args.load(args.split, processor.feature_extractor.sampling_rate)
    result = evaluate_asr(
        model,
        processor,
        dataset,
        batch_size=args.batch_size,
        language=data_args.language,
        task=args.task,
        max_new_tokens=args.max_new_tokens,
    )
    path = result.save(
        output_dir,
        model=portable(args.model),
        data={**asdict(data_args), "dataset": portable(data_args.dataset), "split": args.split},
        settings={name: getattr(args, name) for name in ("task", "batch_size", "device", "dtype", "seed")},
    )
    print(
        f"{result.rates.clips} clips: WER {100 * result.wer:.2f} %, CER {100 * result.cer:.2f} %; see {path}"
    )


if __name__ == "__main__":
    main()
