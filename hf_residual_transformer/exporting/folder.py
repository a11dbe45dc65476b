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
    if format == "ggml" and (accuracy_level is not None or floats != "float16"):
        raise ValueError(
            "`floats` and `accuracy_level` must be left out for the format ggml, which is fixed, got "
            f"{floats!r} and {accuracy_level!r}"
        )
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
    folder = prepare_export_dir(out, overwrite)
    with complete_folder(folder) as draft:
        if format == "ggml":
            save_q4_0(model, processor, draft / GGML_FILE)
            return folder
        is_sherpa = format == "sherpa-onnx"
        generation = {} if is_sherpa else _generation_config(model, processor.tokenizer)
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
        large = [path.name.removesuffix("_data") for path in graphs.glob("*.onnx_data")]
        _save_configs(config, generation, draft, large)
        _save_processor(processor, draft)
    return folder


def prepare_export_dir(out: str | Path, overwrite: bool) -> Path:
    """As `prepare_output_dir`, and refuses the folder of a checkpoint in any case.

    The config of the export would replace that of the checkpoint, whose weights nothing could read then.

    Raises:
        FileExistsError: if the folder holds weights, or other files and `overwrite` is false.
    """
    folder = prepare_output_dir(out, overwrite)
    weights = sorted(path.name for path in folder.glob("*.safetensors")) if folder.is_dir() else []
    if weights:
        raise FileExistsError(
            f"the output folder {folder} holds a checkpoint, {weights[0]}, whose config an export may replace, so that "
            "nothing could load it any more; name another folder"
        )
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


def _save_configs(config: Any, generation: dict[str, Any], folder: Path, large: list[str]) -> None:
    """A plain Whisper's config.json, and its generation_config.json. The graphs `large` have a second file."""
    dense = config.to_dense_config() if hasattr(config, "to_dense_config") else config
    values = {
        **dense.to_dict(),
        "architectures": ["WhisperForConditionalGeneration"],
        "dtype": "float32",
        # The file without a suffix, which transformers.js calls fp32. In browsers it would look for another.
        "transformers.js_config": {"dtype": "fp32"},
    }
    if large:  # transformers.js does not look for second files by itself
        values["transformers.js_config"]["use_external_data_format"] = dict.fromkeys(large, True)
    _write(folder / "config.json", values)
    _write(folder / "generation_config.json", generation)


def _generation_config(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The model's, with what a trained Whisper says about its special tokens, which runtimes look for there.

    Raises:
        ValueError: if the model is multilingual, and neither its generation config nor its tokenizer has languages and
            tasks.
    """
    generation = model.generation_config.to_dict()
    vocabulary, missing = tokenizer.get_vocab(), dict[str, Any]()
    is_multilingual = generation.get("is_multilingual")
    if is_multilingual is None:
        missing["is_multilingual"] = is_multilingual = model.config.vocab_size != ENGLISH_ONLY
    if generation.get("no_timestamps_token_id") is None and "<|notimestamps|>" in vocabulary:
        missing["no_timestamps_token_id"] = vocabulary["<|notimestamps|>"]
    if is_multilingual and not (generation.get("lang_to_id") and generation.get("task_to_id")):
        languages, tasks = language_and_task_ids(vocabulary)
        for name, ids in (("lang_to_id", languages), ("task_to_id", tasks)):
            if not generation.get(name):
                missing[name] = ids
    if missing:
        logger.warning(
            f"the generation config lacks {', '.join(missing)}; the export has them from the tokenizer's tokens"
        )
    generation |= missing
    if not is_multilingual:
        logger.warning(
            "this model knows English alone, but onnx-asr asks every Whisper for a language and a task, and such a "
            "model may then hear nothing; transformers.js and sherpa-onnx ask it for English alone"
        )
    return generation


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
