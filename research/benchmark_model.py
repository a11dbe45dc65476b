"""The parts of `benchmark.py` that handle one model, dense or residual.

As a script, it measures the loading, the resident memory or a training step of a saved encoder in a fresh process,
and prints JSON. The folder also holds a small model, `warm-up`.

    python research/benchmark_model.py --measurement resident --folder FOLDER --seconds 30
"""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

import hf_residual_transformer as hrt
from hf_residual_transformer.speech.transcription import encode
from hf_residual_transformer.training.arguments import parse_args

# The heads are a few weights large, so that these are encoders alone.
ENCODERS: dict[str, Any] = {
    "whisper": hrt.ResidualWhisperForAudioClassification,
    "wav2vec2": hrt.ResidualWav2Vec2Model,
}
# What a training step holds whatever the batch, of the layers and of the whole encoder; and names of other figures.
STATE = ("weights", "gradients", "optimiser state")
ACTIVATIONS = "activations"
KEPT = "all that is kept for backward"
PEAK = "peak while loading"
WEIGHTS = "weights, the head's too"


@dataclass(frozen=True)
class Shape:
    """The values that a model's cost depends on. Heads have 64 features, and the inner width is 4 x `width`."""

    family: str
    layers: int
    width: int
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"`layers` must be at least 1, got {self.layers}")
        if self.width < 64 or self.width % 64:
            raise ValueError(f"`width` must be a multiple of 64, got {self.width}")

    def config_values(self) -> dict[str, Any]:
        """The values under the names of the family's config."""
        width, layers, heads = self.width, self.layers, self.width // 64
        if self.family == "whisper":
            values: dict[str, Any] = {"d_model": width, "classifier_proj_size": 1}
            for part in ("encoder", "decoder"):
                values[f"{part}_layers"] = layers
                values[f"{part}_attention_heads"] = heads
                values[f"{part}_ffn_dim"] = 4 * width
        else:
            # Steps that skip layers at random could not be compared.
            values = {"hidden_size": width, "layerdrop": 0.0, "apply_spec_augment": False}
            values |= {"num_hidden_layers": layers, "num_attention_heads": heads}
            values["intermediate_size"] = 4 * width
        return values | self.others


SIZES = {
    "tiny": Shape("whisper", 4, 384),
    "base": Shape("whisper", 6, 512),
    "small": Shape("whisper", 12, 768),
    "large-v3": Shape("whisper", 32, 1280, {"num_mel_bins": 128, "vocab_size": 51866}),
    "wav2vec2-base": Shape("wav2vec2", 12, 768),
    # As in wav2vec2-large-lv60 and XLSR.
    "wav2vec2-large": Shape(
        "wav2vec2", 24, 1024, {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
    ),
}


@dataclass
class ModelArguments:
    """The settings of one measurement."""

    measurement: Literal["load", "resident", "step"] = field(metadata={"help": "What to measure."})
    folder: str = field(metadata={"help": "Folder of the model, with a small one in `warm-up`."})
    seconds: float = field(default=30.0, metadata={"help": "Length of the recordings."})
    batch_size: int = field(default=1, metadata={"help": "How many there are."})
    device: str = field(default="cpu", metadata={"help": "Where to compute."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of weights and inputs."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch's choice."})


def random_inputs(model: Any, seconds: float, batch_size: int) -> Tensor:
    """Random mel features (batch_size, num_mel_bins, num_frames) or samples (batch_size, num_samples)."""
    config = model.config
    is_whisper = config.model_type == "whisper"
    shape = (config.num_mel_bins, 2 * round(50 * seconds)) if is_whisper else (round(16_000 * seconds),)
    return torch.randn(batch_size, *shape).to(model.device, model.dtype)


def encoder_of(model: Any) -> Any:
    """The module from inputs to hidden states: the encoder of a Whisper, the whole of a wav2vec2."""
    return model.encoder if model.config.model_type == "whisper" else model


def run_encoder(model: Any, inputs: Tensor) -> Tensor:
    """The last hidden states. Whisper's inputs may be shorter than its window."""
    encoder = encoder_of(model)
    output = encoder(inputs) if encoder is model else encode(encoder, inputs)
    return output.last_hidden_state


def training_step(model: Any, inputs: Tensor) -> Callable[[], torch.optim.Optimizer]:
    """Returns a function that runs a training step: forward, backward and AdamW."""
    parameters = [p for p in encoder_of(model).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> torch.optim.Optimizer:
        optimizer.zero_grad()
        run_encoder(model, inputs).float().pow(2).mean().backward()
        optimizer.step()
        return optimizer

    return step


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages of `tensors`, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def kept_for_backward(model: Any, inputs: Tensor) -> int:
    """The bytes that a forward pass keeps for backward, except parameters and quantised weights."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_encoder(model, inputs)
    return unique_bytes(kept)


def resident() -> dict[str, int]:
    """The bytes of this process in memory, those that it alone uses, and those that no file holds (Linux only)."""
    gc.collect()
    info = psutil.Process().memory_full_info()
    sizes = {"RSS": info.rss, "USS": info.uss}
    details = Path("/proc/self/smaps_rollup")
    if details.exists():
        found = re.search(r"Private_Dirty: +(\d+) kB", details.read_text())
        sizes |= {"Private_Dirty": 1024 * int(found[1])} if found else {}
    return sizes


class PeakMemory:
    """Inside this context, samples the RSS every millisecond; `bytes` is the maximum."""

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(0.001):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def load(args: ModelArguments, folder: Path) -> Any:
    """Loads the saved model with the class that its config names."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model_class = getattr(hrt, name, None) or getattr(transformers, name)
    return model_class.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device)


def touch(model: nn.Module) -> None:
    """Reads every weight."""
    for tensor in model.state_dict().values():
        tensor.sum().item()


def loading_seconds(args: ModelArguments, folder: Path) -> dict[str, float]:
    """The time to load the model, after a small model has imported all code."""
    touch(load(args, folder / "warm-up"))
    start = time.perf_counter()
    model = load(args, folder)
    loaded = time.perf_counter()
    touch(model)
    return {
        "from_pretrained": loaded - start,
        "from_pretrained, and every weight read": time.perf_counter() - start,
    }


@torch.no_grad()
def resident_bytes(args: ModelArguments, folder: Path) -> dict[str, float]:
    """The growth of this process by the model, after a small model has imported all code."""
    small = load(args, folder / "warm-up")
    run_encoder(small, random_inputs(small, 0.1, 1))
    del small
    before = resident()
    with PeakMemory() as peak:
        model = load(args, folder)
        touch(model)
    found = {f"loaded, {name}": size - before[name] for name, size in resident().items()}
    run_encoder(model, random_inputs(model, args.seconds, args.batch_size))
    found |= {f"after a forward pass, {name}": size - before[name] for name, size in resident().items()}
    return {**found, PEAK: peak.bytes - before["RSS"]}


def training_bytes(args: ModelArguments, folder: Path) -> dict[str, float]:
    """The exact bytes of a training step, and the growth of this process (on CUDA, of the allocated memory)."""
    small = load(args, folder / "warm-up").train()
    training_step(small, random_inputs(small, 0.1, 1))()
    del small
    before = resident()["RSS"]
    model = load(args, folder).train()
    step = training_step(model, random_inputs(model, args.seconds, args.batch_size))
    step()
    on_cuda = torch.device(args.device).type == "cuda"
    with PeakMemory() as peak:
        optimizer = step()
    most = torch.cuda.max_memory_allocated(args.device) if on_cuda else peak.bytes - before
    layers = ENCODERS[model.config.model_type].family.find_encoder(model)
    of_layers = nn.ModuleList([layers.layers, *([layers.shared] if hasattr(layers, "shared") else [])])
    found: dict[str, float] = {WEIGHTS: unique_bytes(model.state_dict().values())}
    for whose, part in ((" of the layers", of_layers), ("", encoder_of(model))):
        parameters = list(part.parameters())
        states = [optimizer.state[p].values() for p in parameters if p in optimizer.state]
        found[f"weights{whose}"] = unique_bytes(part.state_dict().values())
        found[f"gradients{whose}"] = unique_bytes(p.grad for p in parameters if p.grad is not None)
        found[f"optimiser state{whose}"] = unique_bytes(tensor for state in states for tensor in state)
    one, two, batch = (
        kept_for_backward(model, random_inputs(model, args.seconds, size)) for size in (1, 2, args.batch_size)
    )
    whatever_the_batch = 2 * one - two
    return {**found, ACTIVATIONS: batch - whatever_the_batch, KEPT: batch, "peak of a step": most}


MEASUREMENTS = {"load": loading_seconds, "resident": resident_bytes, "step": training_bytes}


def main() -> None:
    (args,) = parse_args(ModelArguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(json.dumps(MEASUREMENTS[args.measurement](args, Path(args.folder))))


if __name__ == "__main__":
    main()
