r"""Trains a Whisper-type model from scratch, residual or dense, for recognition or translation.

    python scripts/train_asr.py --dataset openslr/librispeech_asr --dataset_config all --train_split train.clean.360 \
        --eval_split validation.clean --eval_strategy epoch --vocab_size 4096 --ctc_weight 0.3 \
        --residual '{"group_size": 3, "rank": 2, "share_biases": true}' --per_device_train_batch_size 32 \
        --learning_rate 1e-3 --warmup_steps 0.1 --num_train_epochs 30 \
        --label_smoothing_factor 0.1 --average_checkpoints 5 --bf16 --output_dir outputs/paper

In about a minute on a CPU, with the recordings that come with this repository:

    python scripts/train_asr.py --language en --max_samples 32 --max_seconds 4 --window_seconds 4 \
        --encoder_layers 6 --d_model 64 --encoder_ffn_dim 256 --attention_heads 4 --decoder_layers 1 \
        --decoder_ffn_dim 128 --vocab_size 200 --residual '{"group_size": 3, "rank": 2}' \
        --per_device_train_batch_size 4 --max_steps 8 --learning_rate 1e-3 \
        --logging_steps 1 --output_dir outputs/scratch

Without `--residual` the model is dense. The vocabulary is trained on the texts of the training split; for translation,
`--text_column` names the column with the translations. SpecAugment, label smoothing, warm-up, CTC beside the decoder,
and the mean of the last checkpoints are options. `research/paper.py` runs the paper's grid with the same code.
`scripts/finetune_seq2seq.py` starts from a checkpoint of a Whisper, and `scripts/finetune_ctc.py` from one with CTC.

A run that was interrupted goes on by the same command with `--resume_from_checkpoint last`.
The first argument may instead be a JSON or YAML file with options by name. For many processes,
`accelerate launch --config_file research/paper/accelerate.yaml scripts/train_asr.py ...` takes the same options.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from transformers import Seq2SeqTrainingArguments

from hf_residual_transformer.training.arguments import ScratchArguments, TrainingDataArguments, parse_args
from hf_residual_transformer.training.running import run_training
from hf_residual_transformer.training.scratch import ModelSizes


@dataclass
class ScriptArguments(ScratchArguments):
    """What the encoder shares, the vocabulary, and the recipe beyond the Trainer's."""

    vocab_size: int = field(default=1024, metadata={"help": "Tokens of the vocabulary."})
    ctc_weight: float = field(
        default=0.3, metadata={"help": "Weight of CTC on the encoder, during training only."}
    )


def main() -> None:
    args, sizes, data_args, training_args = parse_args(
        ScriptArguments, ModelSizes, TrainingDataArguments, Seq2SeqTrainingArguments
    )
    run_training(sizes, data_args, training_args, **asdict(args))


if __name__ == "__main__":
    main()
