"""The systems that `compare_runtimes.py` compares, each of which transcribes clips in a process of its own.

`torch-dense`         the dense model in PyTorch, float32. Its bytes are those of the same model saved in 16 bits.
`ours:FOLDER`         a compact folder in PyTorch, float32.
`q4_0-rounded`        the dense model in PyTorch with every matrix of encoder and decoder, and the tied embedding,
                      rounded as q4_0. It is whisper.cpp's rounding, but not whisper.cpp: only words and bytes count.
                      `q5_0-rounded`, `q5_1-rounded` and `q8_0-rounded` likewise.
`faster-whisper:DIR`  a CTranslate2 folder, run in the precision in which it was saved; float16 runs as float32.
`whisper.cpp:FILE`    a ggml file, through pywhispercpp.
`onnxruntime:DIR`     a folder of `hrt export`, or of the same layout, through ONNX Runtime without PyTorch. After an
                      `@` comes the ending of other graphs there: `onnxruntime:DIR@_int8` runs
                      `encoder_model_int8.onnx`.

All decode greedily, without timestamps, in the given language, one clip of at most 30 seconds at a time in the full
window, of which a model with short windows leaves out the padding itself, to at most 128 new tokens, without the text
before and without a second try at a higher temperature. All suppress blanks at the start and the tokens that are no
speech: PyTorch and ONNX Runtime by the lists of the generation config, the other two by their own lists of the same
signs.

The process imports only what its system needs, so that it may run on an interpreter of another environment. It prints
a JSON line: seconds to import and load, seconds of all clips, what the encoder took of these, and the texts. The first
clip is transcribed once before the clock starts.

    python research/runtimes.py --system q4_0-rounded --model openai-folder --clips clips.npz --language en --threads 2
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ggml_blocks import FORMATS, round_to_blocks

MAX_NEW_TOKENS = 128
SAMPLING_RATE = 16_000
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # the C library gives large blocks back


@dataclass
class Runtime:
    """A system.

    Args:
        name: its name in results, which has no folder of this machine.
        kind: the part of the name before the colon.
        path: the system's own file or folder; the dense model's folder if it has none.
        language: the language of all clips.
        threads: the number of threads.
    """

    name: str
    kind: str
    path: Path
    language: str = "en"
    threads: int = 2

    timed_seconds = 0.0  # of what is `timed`, so far
    rounded = (
        False  # whether it stands for another system's numbers, so that its speed and memory say nothing
    )
    environment: ClassVar[dict[str, str]] = {}  # variables that its process gets

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted(self.path.glob("*.safetensors"))

    def file_bytes(self) -> int:
        """The bytes of the weights as somebody would ship them."""
        return sum(path.stat().st_size for path in self.files)

    def load(self) -> None:
        """Imports the libraries and loads the model."""
        raise NotImplementedError

    def transcribe(self, samples: np.ndarray) -> str:
        """The text of a clip, float32 of shape (num_samples,) at 16 kHz."""
        raise NotImplementedError

    def timed(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which adds to `timed_seconds` what it takes."""

        @functools.wraps(encode)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            states = encode(*args, **kwargs)
            self.timed_seconds += time.perf_counter() - start
            return states

        return timed

    def encoder_seconds(self) -> float:
        """What the encoder took so far."""
        return self.timed_seconds


class TorchRuntime(Runtime):
    """A folder of Transformers, whose class may be ours, in float32."""

    model: Any
    processor: Any

    def load(self) -> None:
        import torch
        from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

        import hf_residual_transformer  # noqa: F401  it registers the compact classes

        torch.set_num_threads(self.threads)
        self.processor = AutoProcessor.from_pretrained(self.path)
        self.model = AutoModelForSpeechSeq2Seq.from_pretrained(self.path, dtype=torch.float32).eval()
        encoder = self.model.get_encoder()
        encoder.forward = self.timed(encoder.forward)

    def transcribe(self, samples: np.ndarray) -> str:
        import torch

        features = self.processor(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
        multilingual = getattr(self.model.generation_config, "is_multilingual", True)
        spoken = {"language": self.language, "task": "transcribe"} if multilingual else {}
        with torch.inference_mode():
            tokens = self.model.generate(
                features, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS, **spoken
            )
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0]


class DenseRuntime(TorchRuntime):
    """The dense model, whose bytes are those in 16 bits."""

    def file_bytes(self) -> int:
        import torch
        from transformers import AutoModelForSpeechSeq2Seq

        model = AutoModelForSpeechSeq2Seq.from_pretrained(self.path, dtype=torch.float16)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


class RoundedRuntime(DenseRuntime):
    """The dense model with its matrices rounded as whisper.cpp rounds them, and all else in 16 bits."""

    rounded = True

    @property
    def format(self) -> str:
        return self.kind.removesuffix("-rounded")

    def load(self) -> None:
        super().load()
        round_model_(self.model, self.format)

    def file_bytes(self) -> int:
        from transformers import AutoModelForSpeechSeq2Seq

        matrices = matrices_of(AutoModelForSpeechSeq2Seq.from_pretrained(self.path))
        saved = (16 - FORMATS[self.format].bits_a_weight) / 8 * sum(matrix.numel() for matrix in matrices)
        return super().file_bytes() - int(saved)


class FasterWhisperRuntime(Runtime):
    """CTranslate2's model through faster-whisper.

    The folder comes from CTranslate2's converter, `ct2-transformers-converter --model FOLDER --output_dir DIR
    --quantization int8 --copy_files tokenizer.json`. With `float16` the file has 16 bits, and a CPU computes in
    float32.
    """

    model: Any
    environment: ClassVar = RETURNING

    @property
    def files(self) -> list[Path]:
        return [self.path / "model.bin"]

    def load(self) -> None:
        from faster_whisper import WhisperModel

        self.model = WhisperModel(str(self.path), device="cpu", cpu_threads=self.threads, num_workers=1)
        self.model.encode = self.timed(self.model.encode)

    def transcribe(self, samples: np.ndarray) -> str:
        # faster-whisper pads features by zeros, which are no silence for the model; and of the length that CTranslate2
        # is given, which has the prompt in it, it takes half.
        window = np.pad(samples, (0, 30 * SAMPLING_RATE - len(samples)))
        prompt = 4 if self.model.model.is_multilingual else 2
        segments, _ = self.model.transcribe(
            window,
            language=self.language,
            beam_size=1,
            best_of=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
            vad_filter=False,
            max_new_tokens=2 * MAX_NEW_TOKENS - prompt,
            no_speech_threshold=None,
            log_prob_threshold=None,
            compression_ratio_threshold=None,
        )
        return " ".join(segment.text.strip() for segment in segments)


class WhisperCppRuntime(Runtime):
    """whisper.cpp through pywhispercpp, on a file that `ggml_writer.py` or whisper.cpp's own tools wrote.

    The C library's setting that the others have would not change its memory.
    """

    model: Any

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def load(self) -> None:
        from pywhispercpp.model import Model

        self.model = Model(
            str(self.path),
            n_threads=self.threads,
            redirect_whispercpp_logs_to=None,
            print_progress=False,
            print_realtime=False,
        )

    def transcribe(self, samples: np.ndarray) -> str:
        segments = self.model.transcribe(
            samples,
            language=self.language,
            translate=False,
            no_context=True,
            no_timestamps=True,
            single_segment=True,
            max_tokens=MAX_NEW_TOKENS - 1,  # it stops after one more
            suppress_blank=True,
            suppress_nst=True,
            no_speech_thold=1.0,  # leaves out no text
            temperature=0.0,
            temperature_inc=0.0,
            greedy={"best_of": 1},
        )
        return " ".join(segment.text.strip() for segment in segments)

    def encoder_seconds(self) -> float:
        """What whisper.cpp says that its encoder took so far, with the keys and values of cross-attention.

        It writes it to the standard error and nowhere else.
        """
        import _pywhispercpp

        kept = os.dup(2)
        with tempfile.TemporaryFile("w+") as said:
            os.dup2(said.fileno(), 2)
            try:
                _pywhispercpp.whisper_print_timings(self.model._ctx)
            finally:
                os.dup2(kept, 2)
                os.close(kept)
            said.seek(0)
            found = re.search(r"encode time = +([0-9.]+) ms", said.read())
        if not found:
            raise RuntimeError("whisper.cpp must tell the encoder's time, but wrote none")
        return float(found[1]) / 1000


class OnnxRuntime(Runtime):
    """Graphs of optimum's layout, with the settings for little memory that docs/deploy.md names.

    Mel spectrograms come from a file of faster-whisper that needs NumPy alone; the rest of faster-whisper is not
    loaded. Tokens become text by the vocabulary, as in onnx-asr, since a whole tokenizer takes 30 MB.
    """

    encoder: Any
    decoder: Any
    environment: ClassVar = RETURNING

    @property
    def folder(self) -> Path:
        return Path(str(self.path).partition("@")[0])

    @property
    def files(self) -> list[Path]:
        ending = str(self.path).partition("@")[2]
        graphs = [
            self.folder / "onnx" / f"{name}{ending}.onnx"
            for name in ("encoder_model", "decoder_model_merged")
        ]
        return [*graphs, *(path for graph in graphs for path in graph.parent.glob(f"{graph.name}_data*"))]

    def load(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = False
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in self.files[:2]
        )
        self.encode = self.timed(self.encoder.run)
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        generation = json.loads((self.folder / "generation_config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))
        self.pieces = {index: piece for piece, index in tokenizer["model"]["vocab"].items()}
        self.frames = 2 * config["max_source_positions"]  # of 10 ms
        self.extractor = module_alone("faster_whisper", "feature_extractor").FeatureExtractor(
            feature_size=config["num_mel_bins"]
        )
        self.prompt = [generation["decoder_start_token_id"]]
        if generation.get("is_multilingual", True):
            ids = generation["lang_to_id"][f"<|{self.language}|>"], generation["task_to_id"]["transcribe"]
            self.prompt += ids
        self.prompt.append(generation["no_timestamps_token_id"])
        self.end = config["eos_token_id"]
        self.suppressed = generation.get("suppress_tokens") or []
        self.suppressed_first = generation.get("begin_suppress_tokens") or []

    def transcribe(self, samples: np.ndarray) -> str:
        window = np.pad(samples, (0, self.frames * SAMPLING_RATE // 100 - len(samples)))
        features = self.extractor(window, padding=0)[None].astype(np.float32)
        (states,) = self.encode(None, {"input_features": features})
        names = [
            value.name for value in self.decoder.get_inputs() if value.name.startswith("past_key_values.")
        ]
        shape = next(value.shape for value in self.decoder.get_inputs() if value.name == names[0])
        cache = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name in names}
        ids, tokens = self.prompt, list[int]()
        while len(tokens) < MAX_NEW_TOKENS:
            inputs = {"input_ids": np.array([ids]), "encoder_hidden_states": states, **cache}
            logits, *present = self.decoder.run(
                None, {**inputs, "use_cache_branch": np.array([bool(tokens)])}
            )
            # With the cache, keys and values of the encoder's states come back empty, and stay.
            cache = {name: new if new.size else cache[name] for name, new in zip(names, present)}
            scores = logits[0, -1]
            scores[self.suppressed] = -np.inf
            if not tokens:
                scores[self.suppressed_first] = -np.inf
            ids = [int(scores.argmax())]
            if ids[0] == self.end:
                break
            tokens += ids
        text = "".join(self.pieces[token] for token in tokens if token < self.end)
        return bytes(map(BYTES.__getitem__, text)).decode("utf-8", errors="replace")


def module_alone(package: str, name: str) -> Any:
    """A module of a package, without what importing the package loads."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    path = Path(found.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{package}.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable Latin-1 characters stand for
    themselves, and the other bytes have the characters from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _bytes_of_characters()
KINDS: dict[str, type[Runtime]] = {
    "torch-dense": DenseRuntime,
    "ours": TorchRuntime,
    **{f"{name}-rounded": RoundedRuntime for name in FORMATS},
    "faster-whisper": FasterWhisperRuntime,
    "whisper.cpp": WhisperCppRuntime,
    "onnxruntime": OnnxRuntime,
}
WITH_PATH = ("ours", "faster-whisper", "whisper.cpp", "onnxruntime")


def create(system: str, model: str | Path, language: str = "en", threads: int = 2) -> Runtime:
    """The system that a command line names.

    Args:
        system: a key of `KINDS`; those of `WITH_PATH` with a colon and the path of their own file or folder.
        model: the folder of the dense model.
        language: the language of all clips.
        threads: the number of threads.

    Raises:
        ValueError: the system does not exist, or its path is missing, too much, or holds no weights.
    """
    kind, _, path = system.partition(":")
    if kind not in KINDS:
        raise ValueError(f"a system must be one of {', '.join(KINDS)}, got {system!r}")
    if (kind in WITH_PATH) != bool(path):
        needed = "a colon and a path" if kind in WITH_PATH else "no path"
        raise ValueError(f"the system {kind} takes {needed} after its name, got {system!r}")
    own = Path(path or model)
    name = f"{kind}:{re.sub(r'[.]bin$', '', own.absolute().name)}" if path else kind
    runtime = KINDS[kind](name, kind, own, language, threads)
    missing = [file for file in runtime.files if not file.is_file()]
    if missing or not runtime.files:
        raise ValueError(
            f"the system {system!r} has no weights in {own}; convert or download the model first"
        )
    return runtime


def matrices_of(model: Any) -> list[Any]:
    """The weights that whisper.cpp rounds: every linear module's, and the embedding that is tied to the output."""
    from torch import nn

    modules = (module for module in model.modules() if isinstance(module, nn.Linear))
    weights = [*(module.weight for module in modules), model.get_input_embeddings().weight]
    return list({weight.data_ptr(): weight for weight in weights}.values())


def round_model_(model: Any, name: str) -> None:
    """Rounds the matrices of a model to blocks in place, and everything to 16 bits before."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
        for weight in matrices_of(model):
            weight.copy_(torch.from_numpy(round_to_blocks(weight.numpy(), name).weights()))


def measure(runtime: Runtime, clips: str | Path) -> dict[str, Any]:
    """Loads the system and transcribes the clips of an `.npz` file in the order of their names."""
    start = time.perf_counter()
    runtime.load()
    loaded = time.perf_counter() - start
    texts, seconds = [], 0.0
    with np.load(clips) as arrays:
        names = sorted(arrays.files)
        runtime.transcribe(arrays[names[0]])
        before = runtime.encoder_seconds()
        for name in names:
            samples = arrays[name]
            start = time.perf_counter()
            texts.append(runtime.transcribe(samples).strip())
            seconds += time.perf_counter() - start
    encoder_seconds = runtime.encoder_seconds() - before
    return {"load_seconds": loaded, "seconds": seconds, "encoder_seconds": encoder_seconds, "texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", required=True, help="a system, see above")
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--clips", required=True, help="an .npz file with an array for each clip")
    parser.add_argument("--language", default="en", help="language of all clips")
    parser.add_argument("--threads", type=int, default=2, help="number of threads")
    args = parser.parse_args()
    runtime = create(args.system, args.model, args.language, args.threads)
    print(json.dumps(measure(runtime, args.clips)), flush=True)


if __name__ == "__main__":
    main()
