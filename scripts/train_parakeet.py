r"""Trains a Parakeet from scratch, residual or dense, for recognition: with CTC, RNN-T or TDT.

    python scripts/train_parakeet.py --head tdt --dataset openslr/librispeech_asr --dataset_config all \
        --train_split train.clean.360 --eval_split validation.clean --eval_strategy epoch --text_case lower \
        --remove "[^a-z' ]" --residual '{"group_size": 3, "rank": 2, "share_biases": true}' \
        --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_steps 0.1 --num_train_epochs 30 \
        --average_checkpoints 5 --bf16 --output_dir outputs/parakeet

In about a minute on a CPU, with the recordings that come with this repository:

    python scripts/train_parakeet.py --head tdt --language en --max_samples 32 --max_seconds 4 --text_case lower \
        --remove "[^a-z' ]" --vocab_size 60 --encoder_layers 6 --d_model 64 --encoder_ffn_dim 256 \
        --attention_heads 4 --subsampling_channels 16 --decoder_dim 64 --residual '{"group_size": 3, "rank": 2}' \
        --per_device_train_batch_size 4 --max_steps 8 --learning_rate 1e-3 --logging_steps 1 \
        --output_dir outputs/parakeet-small

Without `--residual` the model is dense. The vocabulary is trained on the texts of the training split. The head "rnnt"
is the paper's own setting; its loss needs torchaudio. `scripts/train_ctc.py` trains a wav2vec2, and
`scripts/train_asr.py` a model with a decoder, which can translate too.

A run that was interrupted goes on by the same command with `--resume_from_checkpoint last`.
The first argument may instead be a JSON or YAML file with options by name. For many processes,
`accelerate launch --config_file research/paper/accelerate.yaml scripts/train_parakeet.py ...` takes the same options.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from transformers import TrainingArguments

from hf_residual_transformer.training.arguments import (
    FrameScratchArguments,
    TrainingDataArguments,
    parse_args,
)
from hf_residual_transformer.training.running import run_parakeet_training
from hf_residual_transformer.training.scratch_parakeet import ParakeetSizes


@dataclass
class ScriptArguments(FrameScratchArguments):
    """The head, what the encoder shares, the vocabulary, how transcripts are respelt, and the recipe beyond the
    Trainer's.
    """

    head: Literal["ctc", "rnnt", "tdt"] = field(default="ctc", metadata={"help": "What writes the text."})
    vocab_size: int = field(default=1024, metadata={"help": "Tokens of the vocabulary."})


def main() -> None:
    args, sizes, data_args, training_args = parse_args(
        ScriptArguments, ParakeetSizes, TrainingDataArguments, TrainingArguments
    )
    run_parakeet_training(sizes, data_args, training_args, **asdict(args))


if __name__ == "__main__":
    main()
