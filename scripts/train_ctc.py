r"""Trains a wav2vec2 with CTC from scratch, residual or dense, for recognition.

    python scripts/train_ctc.py --dataset openslr/librispeech_asr --dataset_config all --train_split train.clean.360 \
        --eval_split validation.clean --eval_strategy epoch --text_case lower --remove "[^a-z' ]" \
        --residual '{"group_size": 3, "rank": 2, "share_biases": true}' --per_device_train_batch_size 32 \
        --learning_rate 5e-4 --warmup_steps 0.1 --num_train_epochs 30 --average_checkpoints 5 --bf16 \
        --output_dir outputs/ctc

In about a minute on a CPU, with the recordings that come with this repository:

    python scripts/train_ctc.py --language en --max_samples 32 --max_seconds 4 --text_case lower --remove "[^a-z' ]" \
        --encoder_layers 6 --d_model 64 --encoder_ffn_dim 256 --attention_heads 4 --conv_dim 32 \
        --residual '{"group_size": 3, "rank": 2}' --per_device_train_batch_size 4 --max_steps 8 --learning_rate 1e-3 \
        --logging_steps 1 --output_dir outputs/ctc-small

Without `--residual` the model is dense. The vocabulary is the characters of the training split. `scripts/train_asr.py`
trains models with a decoder, which can translate too; `scripts/finetune_ctc.py` starts from a checkpoint.

A run that was interrupted goes on by the same command with `--resume_from_checkpoint last`.
The first argument may instead be a JSON or YAML file with options by name. For many processes,
`accelerate launch --config_file research/paper/accelerate.yaml scripts/train_ctc.py ...` takes the same options.
"""

from __future__ import annotations

from dataclasses import asdict

from transformers import TrainingArguments

from hf_residual_transformer.training.arguments import (
    FrameScratchArguments,
    TrainingDataArguments,
    parse_args,
)
from hf_residual_transformer.training.running import run_ctc_training
from hf_residual_transformer.training.scratch_ctc import CTCSizes


def main() -> None:
    args, sizes, data_args, training_args = parse_args(
        FrameScratchArguments, CTCSizes, TrainingDataArguments, TrainingArguments
    )
    run_ctc_training(sizes, data_args, training_args, **asdict(args))


if __name__ == "__main__":
    main()
