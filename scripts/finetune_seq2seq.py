r"""Fine-tunes a Whisper model, residual or dense, on speech with transcripts or translations.

    python scripts/finetune_seq2seq.py --model outputs/compact-distilled --dataset google/fleurs \
        --dataset_config de_de --text_column transcription --language german --train_split train \
        --eval_split validation --eval_strategy epoch --per_device_train_batch_size 16 --learning_rate 1e-5 \
        --learning_rates '{"lora": 1e-4}' --warmup_steps 0.1 --num_train_epochs 3 --bf16 \
        --output_dir outputs/compact-de

In about a minute on a CPU, with the recordings that come with this repository:

    python scripts/finetune_seq2seq.py --model openai/whisper-tiny.en --language en --max_samples 32 \
        --per_device_train_batch_size 4 --max_steps 4 --learning_rate 1e-5 --logging_steps 1 \
        --output_dir outputs/finetuned

What is residual stays residual, and `hrt evaluate` gives the error rates. To keep the dense model as a
teacher meanwhile, use `scripts/distill.py` with `--labels_weight`.

A run that was interrupted goes on by the same command with `--resume_from_checkpoint last`.
The first argument may instead be a JSON or YAML file with options by name. `hrt finetune` is the same as a command.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from transformers import Seq2SeqTrainingArguments

from hf_residual_transformer.training.arguments import TrainingDataArguments, parse_args
from hf_residual_transformer.training.running import run_seq2seq_finetuning


@dataclass
class ScriptArguments:
    """Which model, and what of it learns."""

    model: str = field(
        default="openai/whisper-base",
        metadata={"help": "Folder or Hub id of a Whisper model, residual or dense."},
    )
    task: Literal["transcribe", "translate"] = field(
        default="transcribe", metadata={"help": "What the texts are to a multilingual Whisper."}
    )
    freeze: Literal["none", "encoder", "decoder"] = field(
        default="none", metadata={"help": "What does not learn."}
    )
    learning_rates: str | None = field(
        default=None,
        metadata={
            "help": "Learning rates that differ from --learning_rate in a residual model, as JSON: for "
            "'shared', 'lora', 'diagonal' and 'rest'."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of LoRA adapters, which then learn alone and are merged into the model at the end."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that already holds files."})


def main() -> None:
    args, data_args, training_args = parse_args(
        ScriptArguments, TrainingDataArguments, Seq2SeqTrainingArguments
    )
    options = asdict(args)
    run_seq2seq_finetuning(options.pop("model"), data_args, training_args, **options)


if __name__ == "__main__":
    main()
