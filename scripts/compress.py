"""Compresses a trained Whisper or wav2vec2 CTC model: encoder layers share weights, and keep a low rank each.

    python scripts/compress.py --model openai/whisper-base \
        --dataset openslr/librispeech_asr --dataset_config clean --calibration_split train.100 --streaming \
        --num_windows 128 --device cuda --output_dir outputs/compact

In about a minute on a CPU, with the recordings that come with this repository:

    python scripts/compress.py --model openai/whisper-tiny.en --language en --num_windows 8 \
        --output_dir outputs/compact

Group sizes and ranks are chosen for --budget by what they do to the encoder's output, which is the best that this
package knows; --group_size and --rank give them by hand, as the paper does. Tens of recordings like those that the
model will hear are enough, but of several speakers: low ranks that are calibrated on one fail on another. Transcripts
are not read. The folder gets the model, its processor and `compression.json` (settings, parameters, and the error of
each matrix). `scripts/distill.py` then repairs much of what was lost.
The first argument may instead be a JSON or YAML file with options by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoProcessor

import hf_residual_transformer as hrt
from hf_residual_transformer.compression.conversion import BUDGETS
from hf_residual_transformer.compression.fitting import ITERATIONS
from hf_residual_transformer.folders import model_bytes, prepare_output_dir, require_space, save_processor
from hf_residual_transformer.provenance import portable, provenance
from hf_residual_transformer.quantization import BITS
from hf_residual_transformer.speech.windows import calibration_batches
from hf_residual_transformer.training.arguments import DataArguments, parse_args, read_json

CLASSES: dict[str, Any] = {
    "whisper": hrt.ResidualWhisperForConditionalGeneration,
    "wav2vec2": hrt.ResidualWav2Vec2ForCTC,
}
SHUFFLE_BUFFER = 200  # clips of a stream
RANK = 32  # where neither it nor a budget is given


@dataclass
class CompressionArguments:
    """What to compress, how far, and where to."""

    output_dir: str = field(metadata={"help": "Folder for the compressed model; it must be empty or new."})
    model: str = field(
        default="openai/whisper-base",
        metadata={"help": "A dense model's id on the Hub, or its folder: Whisper, or wav2vec2 with CTC."},
    )
    budget: float | None = field(
        default=None,
        metadata={
            "help": "Size of the encoder's layers, relative to dense, in bytes with 16 bits for all that is not "
            "quantised: chooses the ranks, which --rank and --rank_pattern then do not, and, without --group_size, all "
            f"other settings too. By default {BUDGETS[BITS]}, or {BUDGETS[None]} with --shared_bits none, unless "
            "others of these are given, or the start is 'svd'."
        },
    )
    shared_bits: str | None = field(
        default=None,
        metadata={
            "help": "Bits of the shared matrices, from 2 to 8; where --budget chooses all settings, the most that are "
            "tried, by default 4. Or 'none' for matrices that can be trained and exported as any, by default where "
            'settings are given; or as JSON, a number for each module: \'{"fc1": 4, "fc2": 3}\'.'
        },
    )
    group_size: str | None = field(
        default=None,
        metadata={
            "help": "How many adjacent layers share a full-rank matrix (the paper's K); 'null' for none. As "
            'JSON, a size for each module that is to be compressed: \'{"fc1": 3, "fc2": 3}\'. By default 2, or '
            "what --budget chooses."
        },
    )
    rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of what each layer adds to it (the paper's R); 0 for nothing. By default what "
            f"--budget chooses, or {RANK}."
        },
    )
    rank_pattern: str | None = field(
        default=None, metadata={"help": "Ranks that differ, as JSON, by module: '{\"fc2\": 64}'."}
    )
    diagonal: Literal["none", "square", "all"] | None = field(
        default=None,
        metadata={
            "help": "Which matrices also get a diagonal of their own; by default 'square', or --budget's none."
        },
    )
    share_biases: bool = field(
        default=False, metadata={"help": "One bias a group, not one a layer, as the paper's sizes suggest."}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to compress, such as fc1 fc2; by default all of a layer."}
    )
    start: Literal["calibrated", "svd"] = field(
        default="calibrated",
        metadata={
            "help": "'calibrated' keeps outputs on real recordings; 'svd' keeps weights, which is far worse."
        },
    )
    iterations: int = field(
        default=ITERATIONS, metadata={"help": "Rounds of alternation, for groups that have no closed form."}
    )
    calibration_split: str = field(default="train", metadata={"help": "Split of the data to calibrate on."})
    num_windows: int = field(
        default=16,
        metadata={
            "help": "Windows of 30 seconds to calibrate on; 0 for none, which the start 'svd' does not need. More take "
            "as much longer, and are a little better, with matrices in floating point and many speakers much better."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice of recordings to calibrate on."})
    pack: float = field(
        default=0.75,
        metadata={"help": "Part of the windows in which short clips are joined, so that fewer are enough."},
    )
    batch_size: int = field(default=8, metadata={"help": "Windows at a time; the result is the same."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu",
        metadata={"help": "Where to compute, such as 'cpu' or 'cuda'."},
    )
    dtype: Literal["float16", "bfloat16", "float32"] = field(
        default="float16",
        metadata={"help": "Of all that is saved and not quantised; it is computed in float32."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that already holds files."})

    @property
    def bits(self) -> Any:
        """`shared_bits` where settings are given by hand; raises ValueError for what is not JSON."""
        return None if self.shared_bits in (None, "none") else read_json("shared_bits", self.shared_bits)

    def residual_config(self) -> hrt.ResidualConfig | None:
        """None where `budget`, or its default, chooses; raises ValueError for what is not JSON, or not possible."""
        chosen = [self.group_size, self.rank, self.rank_pattern, self.diagonal, self.target_modules]
        if all(choice is None for choice in chosen) and not self.share_biases and self.start == "calibrated":
            return None
        if self.budget is not None and self.group_size is None:
            raise ValueError(
                "`rank`, `rank_pattern`, `diagonal`, `share_biases` and `target_modules` must not be set with `budget` "
                "alone, which chooses all: give `group_size` too, or leave them out"
            )
        return hrt.ResidualConfig(
            group_size=read_json("group_size", self.group_size or "2"),
            rank=RANK if self.rank is None else self.rank,
            rank_pattern=read_json("rank_pattern", self.rank_pattern or "{}"),
            diagonal=self.diagonal or "square",
            share_biases=self.share_biases,
            target_modules=None if self.target_modules is None else tuple(self.target_modules),
            shared_bits=self.bits,
        )


def main() -> None:
    args, data_args = parse_args(CompressionArguments, DataArguments)
    residual_config, bits = args.residual_config(), args.bits
    output_dir = prepare_output_dir(args.output_dir, args.overwrite)
    model_id = args.model
    # The class's, since a residual model's config calls itself dense.
    model_type = type(AutoConfig.from_pretrained(model_id)).model_type
    if model_type not in CLASSES:
        raise ValueError(f"`model` must be one of {', '.join(CLASSES)}, got {args.model!r}, a {model_type}")
    residual_class = CLASSES[model_type]
    processor = AutoProcessor.from_pretrained(model_id)
    calibration = None
    if args.num_windows > 0:
        rate = processor.feature_extractor.sampling_rate
        rows = data_args.load(args.calibration_split, rate, with_text=False)
        # Of all of the data, which may be in order of speakers or languages.
        among = {"buffer_size": SHUFFLE_BUFFER} if data_args.streaming else {}
        rows = rows.shuffle(seed=args.seed, **among)
        calibration = calibration_batches(
            rows, processor, num_windows=args.num_windows, batch_size=args.batch_size, pack=args.pack
        )

    dense = residual_class.dense_class().from_pretrained(model_id, dtype=torch.float32).to(args.device)
    require_space(output_dir, model_bytes(dense))
    model = residual_class.from_dense(
        dense,
        residual_config,
        calibration=calibration,
        start=args.start,
        budget=args.budget,
        shared_bits=BITS if args.shared_bits is None else bits,
        iterations=args.iterations,
    )

    parameters = hrt.parameter_report(model)
    print(model.conversion_report, parameters, sep="\n\n")
    model.to(getattr(torch, args.dtype)).save_pretrained(output_dir)
    save_processor(processor, output_dir)
    data = {**asdict(data_args), "dataset": portable(data_args.dataset), "split": args.calibration_split}
    report = {
        "model": portable(args.model),
        "residual_config": model.config.residual_config.to_dict(),
        "parameters": parameters.to_dict(),
        "conversion": model.conversion_report.to_dict(),
        "data": data if calibration else None,
        **provenance(),
    }
    (output_dir / "compression.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
