"""Compresses a Whisper or wav2vec2 model, with recordings like those that it will hear:

    hrt compress openai/whisper-base --audio my-recordings --size 0.31 --out compact

Transcripts are not read. A few minutes are enough, but of several speakers. By default --size chooses everything else.
The folder gets the model, its processor, and compression.json with settings, sizes and the error of each matrix.
Several GPUs, or machines, share the windows: accelerate launch -m hrt_cli compress ...
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .options import add_data_arguments, add_output_arguments, data_options, described_data

HELP = "make a model smaller"
USAGE = "hrt compress MODEL --audio DATA --out DIR [options]"
RANK = 32  # where neither it nor a size is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("model", metavar="MODEL", help="a dense model's id on the Hub, or its folder")
    add_output_arguments(what, "folder for the compact model; it must be empty or new")
    what.add_argument(
        "--with-code",
        action="store_true",
        help="add the model's code, so that trust_remote_code=True opens it without this package",
    )
    add_data_arguments(parser, split="train", required=False)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--size",
        type=_size,
        nargs="+",
        help="bytes of the whole saved model, relative to dense (default: 0.31); several: one model each, in DIR/SIZE",
    )
    how.add_argument(
        "--parts",
        nargs="+",
        choices=("encoder", "decoder", "embed_tokens"),
        help="(default: all); with encoder, --size is that of its layers",
    )
    how.add_argument(
        "--bits",
        help="most bits of a full matrix, 2 to 8 (default: 8); all that it may have, as [2, 4, 8] for ONNX Runtime; "
        "or none",
    )
    how.add_argument(
        "--block-size", type=int, help="weights that have one scale: 32, 64 or 128 (default: 32)"
    )
    how.add_argument(
        "--rotation",
        type=int,
        help="inputs that are rotated together before rounding, 1 for none (default: 128; 1 in the precise form)",
    )
    how.add_argument(
        "--num-windows",
        type=int,
        metavar="N",
        help="inputs of 30 s (default: 64, or 16 for an encoder alone)",
    )
    how.add_argument(
        "--pack", type=float, default=0.75, help="part of the windows that hold several clips (default: 0.75)"
    )
    how.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows at a time (default: 1)")
    how.add_argument("--seed", type=int, default=0, help="seed of the choice of recordings (default: 0)")
    how.add_argument("--device", help="where to compute (default: a GPU if there is one)")
    how.add_argument(
        "--low-memory",
        action="store_true",
        help="keep the dense model in the CPU's memory as it is stored, and copy one matrix at a time to the device",
    )
    how.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="dtype of weights that are not quantised (default: float16)",
    )
    how.add_argument(
        "--whisper-cpp",
        action="store_true",
        help="whisper.cpp's q4_0, fitted, for hrt export --format ggml",
    )
    form = parser.add_argument_group(
        "precise form", "settings by hand, as in the paper, where --size does not choose them"
    )
    form.add_argument("--group-size", metavar="K", help="layers that share a matrix, null, or JSON by module")
    form.add_argument(
        "--rank", type=int, metavar="R", help=f"rank of each layer's low-rank part (default: {RANK})"
    )
    form.add_argument("--rank-pattern", metavar="JSON", help="other ranks by module: '{\"fc2\": 64}'")
    form.add_argument("--diagonal", choices=("none", "square", "all"), help="matrices with a diagonal")
    form.add_argument("--share-biases", action="store_true", help="one bias a group, not one a layer")
    form.add_argument("--cyclic", action="store_true", help="layers that lie apart share, not adjacent ones")
    form.add_argument("--target-modules", nargs="+", metavar="NAME", help="such as fc1 fc2 (default: all)")
    form.add_argument(
        "--start", choices=("calibrated", "svd"), default="calibrated", help="svd needs no audio"
    )
    form.add_argument("--iterations", type=int, metavar="N", help="rounds for groups without a closed form")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, before anything is loaded."""
    from hf_residual_transformer.api import compress, load_dense, require_extra

    require_extra("speech")
    import torch

    from hf_residual_transformer import size_report
    from hf_residual_transformer.folders import (
        complete_folder,
        model_bytes,
        prepare_output_dir,
        require_space,
    )
    from hf_residual_transformer.hub import settings_of
    from hf_residual_transformer.provenance import portable, provenance

    bits = _bits(args)
    residual_config = _residual_config(args, bits)
    by_hand = residual_config is not None
    if args.whisper_cpp and (by_hand or args.size or args.bits or args.parts or _rounding(args)):
        raise ValueError(
            "--whisper-cpp has a form of its own: --size, --bits, --parts, --block-size, --rotation, --start and the "
            "other options of the precise form must not be set with it"
        )
    if _rounding(args) and bits is None and (by_hand or args.bits is not None):
        raise ValueError(
            "--block-size and --rotation are of matrices in few bits: give --bits, or leave them out"
        )
    if by_hand and args.parts is not None:
        raise ValueError("--parts must not be set with the precise form, which is of the encoder's layers")
    calibrated = args.num_windows != 0 and args.audio is not None
    if not calibrated and args.start == "calibrated":
        raise ValueError(
            "--audio and --num-windows above 0 are needed, since matrices are fitted to recordings; `--start svd` "
            "needs none and is far worse"
        )
    output_dir = Path(args.output_dir)
    sizes = args.size or [None]
    folders = [output_dir / f"{size:g}" for size in sizes] if len(sizes) > 1 else [output_dir]
    if len(set(folders)) < len(folders):
        raise ValueError(
            f"--size must have each size once, got {' '.join(folder.name for folder in folders)}"
        )
    for folder in sorted({output_dir, *folders}):
        prepare_output_dir(folder, args.overwrite)
    with _all_processes() as (distributed, writes):
        dense, processor = load_dense(args.model, device=args.device, low_memory=args.low_memory)
        require_space(output_dir, len(folders) * model_bytes(dense))
        options: dict[str, Any] = {"parts": args.parts}
        if residual_config is None:
            options |= {"bits": "auto" if args.bits is None else bits, **_rounding(args)}
        started = time.perf_counter()
        models = compress(
            dense,
            args.audio if calibrated else None,
            sizes if len(sizes) > 1 else sizes[0],
            processor=processor,
            split=args.split,
            language=args.language,
            data_options=data_options(args),
            num_windows=args.num_windows,
            batch_size=args.batch_size,
            pack=args.pack,
            seed=args.seed,
            residual_config=residual_config,
            whisper_cpp=args.whisper_cpp,
            start=args.start,
            iterations=args.iterations,
            device=args.device,
            low_memory=args.low_memory,
            distributed=distributed,
            **options,
        )
        seconds = round(time.perf_counter() - started, 1)
        if not writes:
            return
        for own_dir, model in zip(folders, models if isinstance(models, list) else [models]):
            parameters = size_report(model)
            print(model.conversion_report, parameters, sep="\n\n")
            report = {
                "model": portable(args.model),
                "model_is_path": Path(args.model).exists(),
                **settings_of(model.config),
                "parameters": parameters.to_dict(),
                "conversion": model.conversion_report.to_dict(),
                "seconds": seconds,  # of the compression, to all sizes
                "data": described_data(args, portable) if calibrated else None,
                **provenance(),
            }
            with complete_folder(own_dir) as folder:
                model.to(getattr(torch, args.dtype)).save_pretrained(folder, with_code=args.with_code)
                text = json.dumps(report, indent=2) + "\n"
                (folder / "compression.json").write_text(text, encoding="utf-8")
            print(f"\nthe compact model is in {own_dir}")


@contextmanager
def _all_processes() -> Iterator[tuple[bool, bool]]:
    """Joins the processes that a launcher started: whether there are several, and whether this one writes the result.

    They leave together, when the result is written.
    """
    import torch
    from torch import distributed

    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield False, True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group()
    try:
        yield True, distributed.get_rank() == 0
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"sizes must be numbers, got {text!r}; MODEL must come before them"
        ) from None
    if not 0 < size <= 1:
        raise argparse.ArgumentTypeError(f"sizes must be above 0 and at most 1, got {text}")
    return size


def _bits(args: argparse.Namespace) -> Any:
    from hf_residual_transformer.training.arguments import read_json

    return None if args.bits in (None, "none") else read_json("bits", args.bits)


def _residual_config(args: argparse.Namespace, bits: Any) -> Any:
    """The config that was given by hand; None where the size, or its default, chooses."""
    from hf_residual_transformer import ResidualConfig
    from hf_residual_transformer.training.arguments import read_json

    chosen = [args.group_size, args.rank, args.rank_pattern, args.diagonal, args.target_modules]
    flags = args.share_biases or args.cyclic
    if all(choice is None for choice in chosen) and not flags and args.start == "calibrated":
        return None
    if args.size is not None and args.start == "svd":
        raise ValueError(
            "--size must not be set with --start svd, which has nothing to choose ranks by: give --rank"
        )
    if args.size is not None and args.group_size is None:
        raise ValueError(
            "--rank, --rank-pattern, --diagonal, --share-biases, --cyclic and --target-modules must not be set with "
            "--size alone, which chooses all of them: give --group-size too, or leave them out"
        )
    return ResidualConfig(
        group_size=read_json("group_size", args.group_size or "2"),
        rank=RANK if args.rank is None else args.rank,
        rank_pattern=read_json("rank_pattern", args.rank_pattern or "{}"),
        diagonal=args.diagonal or "square",
        share_biases=args.share_biases,
        cyclic=args.cyclic,
        target_modules=None if args.target_modules is None else tuple(args.target_modules),
        shared_bits=bits,
        **_rounding(args),
    )


def _rounding(args: argparse.Namespace) -> dict[str, Any]:
    """Which of the options of rounding were given."""
    given = {"block_size": args.block_size, "rotation": args.rotation}
    return {name: value for name, value in given.items() if value is not None}
