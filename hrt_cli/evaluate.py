"""Word and character error rates of a Whisper or CTC model, compact or dense, on recordings with transcripts:

    hrt evaluate compact --audio my-recordings --split test --language en --out results

The folder, if there is one, gets evaluation.json with the rates, the command, versions and hardware, and
predictions.jsonl with every transcript. If a bad clip ends the reading of a stream, partial-evaluation.json and
partial-predictions.jsonl have the clips of the batches before it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from .options import add_data_arguments, add_output_arguments, data_options, described_data

HELP = "measure word error rates"
USAGE = "hrt evaluate MODEL --audio DATA [options]"
SETTINGS = ("task", "batch_size", "keep_marks", "device", "dtype", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("model", metavar="MODEL", help="folder or id of a model, with its processor")
    add_output_arguments(what, "folder for the results; it must be empty or new", required=False)
    add_data_arguments(parser, split="test", texts="column with the transcripts (default: text)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--task",
        choices=("transcribe", "translate"),
        default="transcribe",
        help="translate where texts are English translations (default: transcribe)",
    )
    how.add_argument("--batch-size", type=int, default=8, metavar="N", help="clips at a time (default: 8)")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="limit of a transcript in tokens")
    how.add_argument(
        "--keep-marks",
        action="store_true",
        help="keep vowel signs, as of Devanagari and Thai, in comparisons",
    )
    how.add_argument("--device", help="where to compute (default: a GPU if there is one)")
    how.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of weights and activations (default: float32)",
    )
    how.add_argument("--seed", type=int, default=0, help="for models that sample (default: 0)")


def run(args: argparse.Namespace) -> None:
    from hf_residual_transformer.api import evaluate, require_extra

    require_extra("speech")
    from transformers import set_seed

    from hf_residual_transformer.folders import prepare_output_dir
    from hf_residual_transformer.provenance import portable
    from hf_residual_transformer.speech.metrics import EvaluationResult, EvaluationStopped

    output_dir = args.output_dir and prepare_output_dir(args.output_dir, args.overwrite)
    set_seed(args.seed)
    save = partial(
        EvaluationResult.save,
        model=portable(str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model),
        data={**described_data(args, portable), "text_column": args.text_column},
        settings={name: getattr(args, name) for name in SETTINGS},
    )
    try:
        result = evaluate(
            args.model,
            args.audio,
            split=args.split,
            language=args.language,
            task=args.task,
            text_column=args.text_column,
            data_options=data_options(args),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            keep_marks=args.keep_marks,
            device=args.device,
            dtype=args.dtype,
        )
    except EvaluationStopped as error:
        if output_dir is None:
            raise
        raise ValueError(f"{error}; see {save(error.result, output_dir=output_dir)}") from error
    rates = f"{result.rates.clips} clips: WER {100 * result.wer:.2f} %, CER {100 * result.cer:.2f} %"
    if output_dir is None:
        print(rates)
        return
    print(f"{rates}; see {save(result, output_dir=output_dir)}")
