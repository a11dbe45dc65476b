"""Writes the folder that runtimes read: the layout and names of optimum, and of the models of onnx-community.

The graphs are in `onnx/`, where transformers.js wants them and where onnx-asr and optimum find them; everything else is
beside it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..folders import complete_folder, prepare_output_dir, save_processor
from ..whisper import language_and_task_ids
from . import sherpa
from .ggml import save_q4_0
from .graph import FLOATS, OPERATOR_BITS, Graph, save
from .whisper import ACTIVATIONS, ENGLISH_ONLY, decoder_graph, encoder_graph

logger = logging.get_logger(__name__)
FORMATS = ("onnx", "sherpa-onnx", "ggml")
GGML_FILE = "ggml-model-q4_0.bin"
# With one row, a product is several times as fast with inputs in 8 bits; with the rows of a window, it is slower.
ENCODER_LEVEL, DECODER_LEVEL = 0, 4
GRAPHS = {"encoder_model": encoder_graph, "decoder_model_merged": decoder_graph}
SHERPA_GRAPHS = {"encoder": sherpa.encoder_graph, "decoder": sherpa.decoder_graph}


def export_model(
    model: Any,
    processor: Any,
    out: str | Path,
    *,
    format: str = "onnx",
    floats: str = "float16",
    accuracy_level: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the folder, whole or not at all; see `hf_residual_transformer.export`."""
    for field, value, choices in (
        ("format", format, FORMATS),
        ("floats", floats, FLOATS),
        ("accuracy_level", accuracy_level, (None, 0, 4)),
    ):
        if value not in choices:
            raise ValueError(f"`{field}` must be one of {', '.join(map(str, choices))}, got {value!r}")
    config = model.config
    if config.model_type != "whisper" or not model.can_generate():
        raise ValueError(
            f"`model` must be a Whisper for transcription, dense or compact, got {type(model).__name__}; no other "
            "family can be exported yet"
        )
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"`activation_function` must be one of {', '.join(ACTIVATIONS)}, got {config.activation_function!r}"
        )
    folder = prepare_output_dir(out, overwrite)
    with complete_folder(folder) as draft:
        if format == "ggml":
            save_q4_0(model, processor, draft / GGML_FILE)
            return folder
        is_sherpa = format == "sherpa-onnx"
        graphs = draft if is_sherpa else draft / "onnx"
        graphs.mkdir(exist_ok=True)
        for name, build in (SHERPA_GRAPHS if is_sherpa else GRAPHS).items():
            level = accuracy_level
            if level is None:
                level = ENCODER_LEVEL if name.startswith("encoder") else DECODER_LEVEL
            graph = build(model, floats=floats, accuracy_level=level)
            _say_widened(name, graph)
            values = sherpa.metadata(config, processor.tokenizer) if name == "encoder" else {}
            save(sherpa.with_metadata(graph, name, values), graphs / f"{name}.onnx")
            _check_runs(graphs / f"{name}.onnx")
        if is_sherpa:
            sherpa.save_tokens(processor.tokenizer, draft / "tokens.txt")
            return folder
        _save_configs(model, processor, draft)
        _save_processor(processor, draft)
    return folder


def _say_widened(name: str, graph: Graph) -> None:
    if graph.widened:
        known = ", ".join(map(str, OPERATOR_BITS))
        numbers = ", ".join(
            f"{number} of {bits} bits in {wider}" for (bits, wider), number in sorted(graph.widened.items())
        )
        logger.warning(
            f"{name}: some matrices are stored in more bits than they have, since ONNX Runtime knows {known} "
            f"({numbers}). Their numbers stay the same, and the file is larger than the checkpoint. A model that is "
            f"compressed with bits=({known}) exports as small as it is"
        )


def _check_runs(path: Path) -> None:
    """Raises ValueError where the ONNX Runtime that is installed, if there is one, cannot load the graph."""
    if find_spec("onnxruntime") is None:
        return
    import onnxruntime

    try:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common class
        raise ValueError(
            f"{path.name} cannot be loaded by onnxruntime {onnxruntime.__version__}, which may be too old for its "
            f"operators; pip install --upgrade onnxruntime. It said: {error}"
        ) from error


def _save_configs(model: Any, processor: Any, folder: Path) -> None:
    """A plain Whisper's config.json, and a generation_config.json that has the tokens of languages and tasks."""
    config = model.config
    dense = config.to_dense_config() if hasattr(config, "to_dense_config") else config
    values = {
        **dense.to_dict(),
        "architectures": ["WhisperForConditionalGeneration"],
        "dtype": "float32",
        # The file without a suffix, which transformers.js calls fp32. In browsers it would look for another.
        "transformers.js_config": {"dtype": "fp32"},
    }
    _write(folder / "config.json", values)
    tokenizer = processor.tokenizer
    generation = model.generation_config.to_dict()
    missing = {
        name: value
        for name, value in _tokens_for_generation(tokenizer, config.vocab_size).items()
        if generation.get(name) is None
    }
    if missing:
        logger.warning(
            f"the generation config lacks {', '.join(missing)}; the export has them from the tokenizer's tokens"
        )
    generation |= missing
    if not generation["is_multilingual"]:
        logger.warning(
            "this model knows English alone, but onnx-asr asks every Whisper for a language and a task, and such a "
            "model may then hear nothing; transformers.js and sherpa-onnx ask it for English alone"
        )
    _write(folder / "generation_config.json", generation)


def _tokens_for_generation(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """What the generation config of a trained Whisper says about its special tokens."""
    vocabulary = tokenizer.get_vocab()
    found: dict[str, Any] = {
        "no_timestamps_token_id": vocabulary.get("<|notimestamps|>"),
        "is_multilingual": vocab_size != ENGLISH_ONLY,
    }
    if found["is_multilingual"]:
        found["lang_to_id"], found["task_to_id"] = language_and_task_ids(vocabulary)
    return {name: value for name, value in found.items() if value is not None}


def _save_processor(processor: Any, folder: Path) -> None:
    """The processor's files, and those of earlier versions of transformers, which other runtimes read."""
    save_processor(processor, folder)
    processor.feature_extractor.save_pretrained(folder)
    added = processor.tokenizer.get_added_vocab()
    plain = {token: index for token, index in processor.tokenizer.get_vocab().items() if token not in added}
    for name, tokens in (("vocab.json", plain), ("added_tokens.json", added)):
        _write(folder / name, dict(sorted(tokens.items(), key=lambda item: item[1])))


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
