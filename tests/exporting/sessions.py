"""An exported Whisper in ONNX Runtime, as the runtimes of others call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch


class Runtime:
    """The two graphs in ONNX Runtime, called as the runtimes of others call them."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # idle threads would wait in loops, and take the core of other tests
        paths = [folder / "onnx" / f"{name}.onnx" for name in ("encoder_model", "decoder_model_merged")]
        self.encoder, self.decoder = (onnxruntime.InferenceSession(path, options) for path in paths)
        self.outputs = [output.name for output in self.decoder.get_outputs()]

    def encode(self, features: torch.Tensor) -> np.ndarray:
        return self.encoder.run(["last_hidden_state"], {"input_features": features.numpy()})[0]

    def empty_cache(self, batch_size: int, length: int = 0) -> dict[str, np.ndarray]:
        past = [value for value in self.decoder.get_inputs() if value.name.startswith("past")]
        return {
            value.name: np.ones((batch_size, value.shape[1], length, value.shape[3]), dtype=np.float32)
            for value in past
        }

    def decode(self, ids: torch.Tensor, states: np.ndarray, cache: dict[str, np.ndarray], uses: bool) -> Any:
        inputs = {
            "input_ids": ids.numpy(),
            "encoder_hidden_states": states,
            "use_cache_branch": np.array([uses]),
        }
        found = dict(zip(self.outputs, self.decoder.run(None, inputs | cache)))
        kept = {name: found[name.replace("past_key_values", "present")] for name in cache}
        return found["logits"], {
            name: cache[name] if uses and ".encoder." in name else value for name, value in kept.items()
        }

    def logits(
        self, ids: torch.Tensor, states: np.ndarray, first: int, cache: dict[str, np.ndarray]
    ) -> np.ndarray:
        """Of all tokens: the `first` at once, and the others one by one with the cache."""
        start, cache = self.decode(ids[:, :first], states, cache, uses=False)
        parts = [start]
        for index in range(first, ids.shape[1]):
            part, cache = self.decode(ids[:, index : index + 1], states, cache, uses=True)
            parts.append(part)
        return np.concatenate(parts, axis=1)
