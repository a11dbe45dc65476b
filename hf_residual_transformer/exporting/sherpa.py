"""Whisper in the form that sherpa-onnx reads: an encoder that gives the keys and values of all decoder layers, a
decoder with caches of fixed length, the numbers of model and tokens in the metadata, and a list of tokens.

The matrices are those of `whisper.py`; only the wiring between the two graphs differs.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

from ..whisper import language_ids
from .ggml import ordinary_tokens
from .graph import Graph
from .whisper import (
    END,
    ENGLISH_ONLY,
    attend,
    causal,
    encoder_states,
    feed_forward,
    logits_of,
    look_up,
    size_of,
)

# Of the vocabulary, in the metadata.
TOKENS = (
    "<|startoftranscript|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|notimestamps|>",
    "<|startofprev|>",
    "<|startoflm|>",
    "Ġ",
)
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
PARTS = ("k", "v")


def encoder_graph(model: Any, **options: Any) -> Graph:
    """`mel` to `n_layer_cross_k` and `n_layer_cross_v`, (layers, batch_size, seq_len, d_model)."""
    graph, config = Graph(model, **options), model.config
    states = encoder_states(graph, model, "mel")
    for part in PARTS:
        layers = [
            graph.linear(getattr(layer.encoder_attn, f"{part}_proj"), states)
            for layer in model.get_decoder().layers
        ]
        shape = [config.decoder_layers, "batch_size", "encoder_sequence_length", config.d_model]
        graph.output(_stacked(graph, layers), f"n_layer_cross_{part}", shape)
    return graph


def decoder_graph(model: Any, **options: Any) -> Graph:
    """Tokens and caches to logits, (batch_size, seq_len, vocab_size), and the caches with the new tokens in them.

    A cache has room for all positions, and `offset` says how many of them count.
    """
    graph, config, decoder = Graph(model, **options), model.config, model.get_decoder()
    ids = graph.input("tokens", INT64, ["batch_size", "decoder_sequence_length"])
    room: list[Any] = [config.decoder_layers, "batch_size", config.max_target_positions, config.d_model]
    heard = [*room[:2], "encoder_sequence_length", config.d_model]
    caches = [graph.input(f"in_n_layer_self_{part}_cache", FLOAT, room) for part in PARTS]
    crossed = [graph.input(f"n_layer_cross_{part}", FLOAT, heard) for part in PARTS]
    offset = graph.input("offset", INT64, [1])
    total = graph.add("Add", offset, size_of(graph, ids, 1))
    at, mask = causal(graph, offset, total)
    table = graph.tensor(graph.path(decoder.embed_positions) + ".weight", decoder.embed_positions.weight)
    x = graph.add("Add", look_up(graph, decoder.embed_tokens, ids), graph.add("Gather", table, at))
    zero, one, end = (graph.integers(value) for value in (0, 1, END))
    new: dict[str, list[str]] = {part: [] for part in PARTS}
    for index, layer in enumerate(decoder.layers):
        place = graph.add("Squeeze", graph.integers(index), zero)
        attention = layer.self_attn
        normed = graph.layer_norm(layer.self_attn_layer_norm, x)
        seen = []
        for part, cache in zip(PARTS, caches):
            own = graph.add("Gather", cache, place, axis=0)
            before, after = (
                graph.add("Slice", own, zero, offset, one),
                graph.add("Slice", own, total, end, one),
            )
            projected = graph.linear(getattr(attention, f"{part}_proj"), normed)
            seen.append(graph.add("Concat", before, projected, axis=1))
            new[part].append(graph.add("Concat", seen[-1], after, axis=1))
        context = attend(graph, attention, normed, seen[0], seen[1], mask)
        x = graph.add("Add", x, graph.linear(attention.out_proj, context))
        normed = graph.layer_norm(layer.encoder_attn_layer_norm, x)
        keys, values = (graph.add("Gather", states, place, axis=0) for states in crossed)
        context = attend(graph, layer.encoder_attn, normed, keys, values)
        x = graph.add("Add", x, graph.linear(layer.encoder_attn.out_proj, context))
        x = feed_forward(graph, layer, x, config.activation_function)
    logits = logits_of(graph, model, graph.layer_norm(decoder.layer_norm, x))
    graph.output(logits, "logits", ["batch_size", "decoder_sequence_length", config.vocab_size])
    for part in PARTS:
        graph.output(_stacked(graph, new[part]), f"out_n_layer_self_{part}_cache", room)
    return graph


def _stacked(graph: Graph, layers: list[str]) -> str:
    return graph.add("Concat", *(graph.add("Unsqueeze", x, graph.integers(0)) for x in layers), axis=0)


def metadata(config: Any, tokenizer: Any) -> dict[str, str]:
    """What sherpa-onnx reads in the encoder's metadata.

    Raises:
        ValueError: naming the tokens of Whisper that the tokenizer lacks.
    """
    ids = tokenizer.get_vocab()
    lacking = [token for token in TOKENS if token not in ids]
    if lacking:
        raise ValueError(
            f"the tokenizer must have the tokens {', '.join(lacking)} for sherpa-onnx, as those of trained Whisper "
            "models have; take the tokenizer that the model was trained with"
        )
    languages = language_ids(ids)
    multilingual = len(languages) > 1 and config.vocab_size != ENGLISH_ONLY
    start = ids["<|startoftranscript|>"]
    first = [start]
    if multilingual:
        first += [languages.get("<|en|>", next(iter(languages.values()))), ids["<|transcribe|>"]]
    values: dict[str, Any] = {
        "model_type": "whisper",
        "n_mels": config.num_mel_bins,
        "n_audio_ctx": config.max_source_positions,
        "n_text_layer": config.decoder_layers,
        "n_text_ctx": config.max_target_positions,
        "n_text_state": config.d_model,
        "n_vocab": config.vocab_size,
        "sot": start,
        "sot_index": 0,
        "sot_sequence": ",".join(map(str, first)),
        "eot": tokenizer.eos_token_id,
        "blank_id": ids["Ġ"],
        "is_multilingual": int(multilingual),
        "transcribe": ids["<|transcribe|>"],
        "translate": ids["<|translate|>"],
        "no_timestamps": ids["<|notimestamps|>"],
        "no_speech": ids.get("<|nospeech|>", ids.get("<|nocaptions|>", 0)),
        "sot_prev": ids["<|startofprev|>"],
        "sot_lm": ids["<|startoflm|>"],
        "all_language_tokens": ",".join(map(str, languages.values())),
        "all_language_codes": ",".join(token[2:-2] for token in languages),
    }
    return {name: str(value) for name, value in values.items()}


def with_metadata(graph: Graph, name: str, values: dict[str, str]) -> Any:
    """The finished ONNX model with its metadata."""
    model = graph.model(name)
    helper.set_model_props(model, values)
    return model


def save_tokens(tokenizer: Any, path: Path) -> None:
    """The ordinary tokens, in base64, with their numbers."""
    lines = [
        f"{base64.b64encode(token).decode()} {index}"
        for index, token in enumerate(ordinary_tokens(tokenizer))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
