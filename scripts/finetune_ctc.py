r"""Fine-tunes a model with CTC, such as a wav2vec2 or a Parakeet, residual or dense, on speech with transcripts.

    python scripts/finetune_ctc.py --model outputs/compact-wav2vec2 --dataset openslr/librispeech_asr \
        --dataset_config clean --train_split train.100 --eval_split validation --eval_strategy epoch \
        --per_device_train_batch_size 16 --learning_rate 5e-5 --warmup_steps 0.1 --num_train_epochs 5 --bf16 \
        --output_dir outputs/compact-wav2vec2-100h

In about a minute on a CPU, with the recordings that come with this repository:

    python scripts/finetune_ctc.py --model facebook/wav2vec2-base-960h --text_case upper --remove "[^A-Z' ]" \
        --language en --max_samples 32 --per_device_train_batch_size 4 --max_steps 4 --learning_rate 1e-5 \
        --logging_steps 1 --output_dir outputs/finetuned-ctc

The model has a vocabulary and an output layer already; transcripts must be written with its characters, for
which there are `--text_case` and `--remove`. What is residual stays residual, and `hrt evaluate` gives
the error rates. To keep the dense model as a teacher meanwhile, use `scripts/distill.py`, `--labels_weight`.

A run that was interrupted goes on by the same command with `--resume_from_checkpoint last`.
The first argument may instead be a JSON or YAML file with options by name. `hrt finetune` is the same as a command.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from transformers import TrainingArguments

from hf_residual_transformer.training.arguments import TrainingDataArguments, parse_args
from hf_residual_transformer.training.running import run_ctc_finetuning


@dataclass
class ScriptArguments:
    """Which model, what of it learns, and how transcripts are spelt."""

    model: str = field(
        default="facebook/wav2vec2-base-960h",
        metadata={"help": "Folder or Hub id of a model with CTC, residual or dense."},
    )
    text_case: Literal["keep", "upper", "lower"] = field(
        default="keep", metadata={"help": "Case of the vocabulary, which transcripts are changed to."}
    )
    remove: str = field(
        default="",
        metadata={
            "help": 'Regular expression of what to remove from transcripts then, such as "[^A-Z\' ]". A '
            "character that the vocabulary lacks is an error."
        },
    )
    freeze_feature_encoder: bool = field(
        default=True, metadata={"help": "Keep the convolutions over samples as they are, as is usual."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Values of the model's config to change, as JSON: "
            '\'{"layerdrop": 0.05, "mask_time_prob": 0.05, "ctc_zero_infinity": true}\'.'
        },
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
    args, data_args, training_args = parse_args(ScriptArguments, TrainingDataArguments, TrainingArguments)
    options = asdict(args)
    run_ctc_finetuning(options.pop("model"), data_args, training_args, **options)


if __name__ == "__main__":
    main()
