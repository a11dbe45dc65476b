"""Measures what `accuracy_level` of an exported model costs and gains, beside the same compact model in PyTorch.

    python research/measure_export.py --model outputs/demo --clips 12 --results results/export-accuracy.json

`MatMulNBits` of ONNX Runtime either computes with the activations in float32, accuracy level 0, or rounds them to eight
bits in blocks, level 4. By default an export has level 0 in its encoder and 4 in its decoder. On clips of the sample's
validation split, each in the full window of 30 seconds, it measures the relative error of encoder states and logits and
the tokens whose greatest logit is another one, over PyTorch's own transcript; the medians of the times of the encoder
and of a decoder step with its cache, in turns; and the bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import SAMPLE, spread
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import hf_residual_transformer as hrt
from hf_residual_transformer.provenance import provenance
from hf_residual_transformer.speech.datasets import load_speech_dataset

LEVELS: dict[str, int | None] = {"default": None, "0": 0, "4": 4}


class Sessions:
    """The graphs of an export in ONNX Runtime.

    Args:
        folder: the exported model.
        threads: of the runtime.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A session that waits for work in a loop would slow the next one down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        paths = [folder / "onnx" / f"{name}.onnx" for name in ("encoder_model", "decoder_model_merged")]
        self.bytes = sum(path.stat().st_size for path in paths)
        self.encoder, self.decoder = (onnxruntime.InferenceSession(path, options) for path in paths)
        self.names = [output.name for output in self.decoder.get_outputs()]
        self.past = [value for value in self.decoder.get_inputs() if value.name.startswith("past")]

    def encode(self, features: np.ndarray) -> Any:
        return self.encoder.run(None, {"input_features": features})[0]

    def decode(self, ids: np.ndarray, states: Any, cache: dict[str, Any] | None = None) -> dict[str, Any]:
        """Logits and cache, with the cache of an earlier call or without."""
        empty = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in self.past}
        inputs = {
            "input_ids": ids,
            "encoder_hidden_states": states,
            "use_cache_branch": np.array([cache is not None]),
            **(cache or empty),
        }
        return dict(zip(self.names, self.decoder.run(None, inputs)))


def seconds_of(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """The relative error in the Frobenius norm."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a compact Whisper")
    parser.add_argument("--clips", type=int, default=12, help="number of clips, evenly spread")
    parser.add_argument("--language", default="en", help="of the clips")
    parser.add_argument("--threads", type=int, default=2, help="of each runtime")
    parser.add_argument("--results", type=Path, default=Path("results/export-accuracy.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(args.model, dtype=torch.float32)
    prefix = {"language": args.language, "task": "transcribe"}
    processor.tokenizer.set_prefix_tokens(**prefix, predict_timestamps=False)
    rows = spread(load_speech_dataset(SAMPLE, "validation", language=args.language), args.clips)
    times: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    unlike, tokens = dict.fromkeys(LEVELS, 0), 0
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        sessions = {}
        for level, number in LEVELS.items():
            folder = hrt.export(args.model, Path(temporary) / level, accuracy_level=number)
            sessions[level] = Sessions(folder, args.threads)
        for row in rows:
            samples = row["audio"]["array"]
            features = processor(samples, sampling_rate=16_000, return_tensors="pt").input_features
            said = processor.batch_decode(model.generate(features, **prefix), skip_special_tokens=True)
            ids = torch.tensor([processor.tokenizer(said[0]).input_ids])
            tokens += ids.shape[1]
            took, encoded = seconds_of(model.get_encoder(), features)
            times.setdefault("pytorch, encoder", []).append(took)
            logits = model(encoder_outputs=encoded, decoder_input_ids=ids).logits.numpy()
            for level, session in sessions.items():
                took, states = seconds_of(session.encode, features.numpy())
                times.setdefault(f"{level}, encoder", []).append(took)
                found = session.decode(ids.numpy(), states)
                cache = {
                    value.name: found[value.name.replace("past_key_values", "present")]
                    for value in session.past
                }
                last = ids[:, -1:].numpy()
                session.decode(last, states, cache)
                took, _ = seconds_of(session.decode, last, states, cache)
                times.setdefault(f"{level}, step", []).append(took)
                errors.setdefault(f"{level}, states", []).append(
                    relative(states, encoded.last_hidden_state.numpy())
                )
                errors.setdefault(f"{level}, logits", []).append(relative(found["logits"], logits))
                unlike[level] += int((found["logits"].argmax(-1) != logits.argmax(-1)).sum())
        sizes = {level: session.bytes for level, session in sessions.items()}

    def milliseconds(name: str) -> float:
        return round(1000 * statistics.median(times[name]), 1)

    levels = {
        level: {
            "encoder_ms": milliseconds(f"{level}, encoder"),
            "step_ms": milliseconds(f"{level}, step"),
            "error_of_states": max(errors[f"{level}, states"]),
            "error_of_logits": max(errors[f"{level}, logits"]),
            "tokens_unlike_pytorch": unlike[level],
            "bytes": sizes[level],
        }
        for level in LEVELS
    }
    results = {
        "accuracy_level": levels,
        "pytorch": {"encoder_ms": milliseconds("pytorch, encoder")},
        "tokens": tokens,
        "clips": len(rows),
        "threads": args.threads,
        "onnxruntime": onnxruntime.__version__,
        "split": "validation",
        "language": args.language,
        **provenance(),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, row in levels.items():
        print(f"accuracy level {name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    print(f"PyTorch: encoder {milliseconds('pytorch, encoder')} ms; {tokens} tokens; {args.results}")


if __name__ == "__main__":
    main()
