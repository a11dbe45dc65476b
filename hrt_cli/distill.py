"""Distils the dense model into the compact one that was made from it, on recordings alone or on transcripts too:

    hrt distill compact --teacher openai/whisper-base --audio my-recordings --out compact-distilled \\
        --max_steps 200 --per_device_train_batch_size 16

By default only the compact parts learn, and transcripts are not read. Where encoder and decoder have few bits, as
`hrt compress` makes them, the decoder learns alone. The result is kept only if the loss on validation
clips falls; otherwise DIR gets the model as it was, and a warning says so. An interrupted run goes on by the same
command with --resume_from_checkpoint last. Several GPUs: accelerate launch -m hrt_cli distill ...
"""

from __future__ import annotations

import argparse
from typing import Any

from .options import TRAINER_OPTIONS, add_data_arguments, add_output_arguments, training_data

HELP = "train a compact model towards the dense one"
USAGE = "hrt distill STUDENT --teacher MODEL --audio DATA --out DIR [options]"
TRAINS = True
LOSSES = ("hidden_weight", "final_weight", "logits_weight", "labels_weight", "temperature", "learning_rates")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("student", metavar="STUDENT", help="folder or id of a model as from `hrt compress`")
    what.add_argument("--teacher", required=True, metavar="MODEL", help="folder or id of its dense model")
    add_output_arguments(what, "folder for the trained model; it must be empty or new")
    data = add_data_arguments(parser, split="train", texts="transcripts, for --labels-weight (default: text)")
    add_training_data_arguments(data, "split that decides, or none (default: 48 clips of validation, if any)")
    how = parser.add_argument_group("how", "weights of the losses; a loss of weight 0 is not computed")
    how.add_argument("--final-weight", type=float, metavar="W", help="last encoder states (default: 1)")
    how.add_argument("--hidden-weight", type=float, metavar="W", help="every layer's states (default: 0)")
    how.add_argument("--logits-weight", type=float, metavar="W", help="teacher's probabilities (default: 1)")
    how.add_argument("--labels-weight", type=float, metavar="W", help="loss on transcripts (default: 0)")
    how.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="softens probabilities (default: 2; 1 for a decoder alone)",
    )
    how.add_argument(
        "--window-seconds",
        type=float,
        metavar="S",
        help="clips are packed so (default: 10; 30 for a decoder alone)",
    )
    how.add_argument(
        "--short-windows", action="store_true", help="a Whisper learns to do without padding to 30 seconds"
    )
    how.add_argument("--task", choices=("transcribe", "translate"), default="transcribe", help="of the texts")
    how.add_argument("--learning-rates", metavar="JSON", help="for shared, lora, diagonal or rest")
    how.add_argument(
        "--keep", choices=("better", "always"), default="better", help="always: save a worse result too"
    )
    parser.add_argument_group("training", TRAINER_OPTIONS)


def add_training_data_arguments(group: Any, eval_split: str) -> None:
    group.add_argument("--eval-split", metavar="NAME", help=eval_split)
    group.add_argument("--shuffle-buffer", type=int, metavar="N", help="clips of a stream (default: 200)")


def trainer_arguments() -> Any:
    from hf_residual_transformer.training.arguments import RecipeArguments

    return RecipeArguments


def run(args: argparse.Namespace) -> None:
    from hf_residual_transformer.training.arguments import DistillationArguments, DistillationDataArguments
    from hf_residual_transformer.training.running import run_distillation

    losses = {name: value for name in LOSSES if (value := getattr(args, name)) is not None}
    run_distillation(
        args.student,
        args.teacher,
        DistillationArguments(**losses),
        training_data(args, DistillationDataArguments),
        args.training_args,
        window_seconds=args.window_seconds,
        short_windows=args.short_windows,
        task=args.task,
        overwrite=args.overwrite,
    )
