r"""Distils a dense model into the one compressed from it, on recordings alone or on transcripts too.

    python scripts/distill.py --student outputs/compact --teacher openai/whisper-base \
        --dataset openslr/librispeech_asr --dataset_config clean --train_split train.100 \
        --per_device_train_batch_size 32 --learning_rate 2e-4 --num_train_epochs 3 --bf16 --logging_steps 20 \
        --output_dir outputs/compact-distilled

In about a minute on a CPU, with the recordings that come with this repository, after
`hrt compress openai/whisper-tiny.en --audio sample --language en --num-windows 8 --out outputs/compact`:

    python scripts/distill.py --student outputs/compact --teacher openai/whisper-tiny.en --language en \
        --max_steps 40 --logging_steps 5 --output_dir outputs/compact-distilled

Each step packs clips into windows of 10 seconds, which train several times faster than Whisper's 30. By default only
the encoder learns, from the teacher's final encoder states (`--final_weight`) and from the teacher's probabilities for
the words that the teacher hears (`--logits_weight`), and transcripts are not read. With a `--logits_weight` of 0 no
decoder runs, and steps take half the time. With `--labels_weight` transcripts are read, and the whole model learns. The
default `--learning_rate` suits a few hundred steps; longer runs bear more. wav2vec2 is trained without dropout,
LayerDrop and SpecAugment, as the teacher runs.

The result is kept only if the loss on validation clips falls (`--eval_split`, `--keep`). Otherwise the output folder
gets the student as it was, and a warning says so. `train_results.json` has both losses and what was decided.

A run that was interrupted goes on by the same command with `--resume_from_checkpoint last`.
The first argument may instead be a JSON or YAML file with options by name. `hrt distill` is the same as a command.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_residual_transformer.training.arguments import (
    DistillationArguments,
    DistillationDataArguments,
    RecipeArguments,
    parse_args,
)
from hf_residual_transformer.training.recipe import WINDOW_SECONDS
from hf_residual_transformer.training.running import run_distillation


@dataclass
class ScriptArguments:
    """Which models, and how they hear the recordings."""

    student: str = field(
        metadata={"help": "Folder or Hub id of the compressed model, as `hrt compress` saves it."}
    )
    teacher: str = field(
        default="openai/whisper-base",
        metadata={"help": "Folder or Hub id of the dense model that it was compressed from."},
    )
    window_seconds: float | None = field(
        default=None,
        metadata={
            "help": f"Pack whole clips into windows of this length, by default {WINDOW_SECONDS:g}. With "
            "--labels_weight each clip is an input instead, which Whisper pads to 30 seconds."
        },
    )
    short_windows: bool = field(
        default=False,
        metadata={
            "help": "Train a compact Whisper to hear recordings without the padding to 30 seconds; see `hrt.distill`."
        },
    )
    task: Literal["transcribe", "translate"] = field(
        default="transcribe",
        metadata={"help": "What the transcripts are to a multilingual Whisper, if used."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that already holds files."})


def main() -> None:
    args, distillation, data_args, training_args = parse_args(
        ScriptArguments, DistillationArguments, DistillationDataArguments, RecipeArguments
    )
    run_distillation(
        args.student,
        args.teacher,
        distillation,
        data_args,
        training_args,
        window_seconds=args.window_seconds,
        short_windows=args.short_windows,
        task=args.task,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    main()
