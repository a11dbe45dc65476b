"""Fine-tunes a Whisper or wav2vec2 CTC model, compact or dense, on recordings with transcripts:

    hrt finetune compact --audio my-recordings --language en --out compact-tuned \\
        --max_steps 500 --learning_rate 1e-5 --per_device_train_batch_size 16

What is residual stays residual. An interrupted run goes on by the same command with --resume_from_checkpoint last.
`hrt distill --labels-weight 1` keeps the dense model as a teacher meanwhile.
"""

from __future__ import annotations

import argparse
from typing import Any

from .distill import add_training_data_arguments
from .options import TRAINER_OPTIONS, add_data_arguments, add_output_arguments, training_data, was_given

HELP = "train a model on transcripts"
USAGE = "hrt finetune MODEL --audio DATA --out DIR [options]"
TRAINS = True
OF_WHISPER = ("task", "freeze")
OF_CTC = ("text_case", "remove", "train_feature_encoder", "config_overrides")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("model", metavar="MODEL", help="folder or id of a model, compact or dense")
    add_output_arguments(what, "folder for the trained model; it must be empty or new")
    add_training_data_arguments(
        add_data_arguments(parser, split="train", texts="column with the transcripts (default: text)"),
        "split to compute the loss on at the end",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--learning-rates", metavar="JSON", help="for shared, lora, diagonal or rest")
    how.add_argument(
        "--lora-rank", type=int, metavar="RANK", help="let LoRA adapters learn alone, then merge them"
    )
    whisper = parser.add_argument_group("how, for Whisper")
    whisper.add_argument("--task", choices=("transcribe", "translate"), help="of texts (default: transcribe)")
    whisper.add_argument("--freeze", choices=("none", "encoder", "decoder"), help="what does not learn")
    ctc = parser.add_argument_group("how, for models with CTC")
    ctc.add_argument("--text-case", choices=("keep", "upper", "lower"), help="case of the vocabulary")
    ctc.add_argument("--remove", metavar="REGEX", help='what to remove from transcripts, as "[^A-Z\' ]"')
    ctc.add_argument("--train-feature-encoder", action="store_true", help="let the convolutions learn too")
    ctc.add_argument("--config-overrides", metavar="JSON", help="such as '{\"layerdrop\": 0.05}'")
    parser.add_argument_group("training", TRAINER_OPTIONS)


def trainer_arguments() -> Any:
    from transformers import Seq2SeqTrainingArguments

    return Seq2SeqTrainingArguments


def run(args: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from hf_residual_transformer.folders import prepare_output_dir
    from hf_residual_transformer.training.arguments import TrainingDataArguments
    from hf_residual_transformer.training.recipe import is_whisper
    from hf_residual_transformer.training.running import run_ctc_finetuning, run_seq2seq_finetuning

    resume = args.training_args.resume_from_checkpoint is not None
    prepare_output_dir(args.training_args.output_dir, args.overwrite, resume=resume)
    whisper = is_whisper(AutoConfig.from_pretrained(args.model))
    for name in OF_CTC if whisper else OF_WHISPER:
        if was_given(getattr(args, name)):
            family = "CTC" if whisper else "Whisper"
            raise ValueError(
                f"--{name.replace('_', '-')} is for {family} models, and {args.model} is another"
            )
    names = OF_WHISPER if whisper else OF_CTC
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if "train_feature_encoder" in options:
        options["freeze_feature_encoder"] = not options.pop("train_feature_encoder")
    run_finetuning: Any = run_seq2seq_finetuning if whisper else run_ctc_finetuning
    run_finetuning(
        args.model,
        training_data(args, TrainingDataArguments),
        args.training_args,
        learning_rates=args.learning_rates,
        lora_rank=args.lora_rank,
        overwrite=args.overwrite,
        **options,
    )
