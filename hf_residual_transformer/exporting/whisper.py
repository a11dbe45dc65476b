"""Whisper as two ONNX graphs, with the names of inputs and outputs that optimum uses: `encoder_model`, and
`decoder_model_merged`, which decodes the first tokens and, with `use_cache_branch`, those that follow.

The encoder takes fewer frames than 30 seconds. That of a model with `short_windows` leaves out padding itself, since
runtimes pad every recording. In the decoder, only the choice between the cache and the encoder's states stands in an
`If`, so that every matrix has one node.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import nn

from ..layers import MixedEmbedding, QuantizedEmbedding, TiedOutput
from ..whisper import MARGIN_FRAMES, has_short_windows
from .graph import CONTRIB, Graph

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
END = 2**31 - 1  # of an axis
ENGLISH_ONLY = 51_864  # tokens of the Whisper models that know English alone
ACTIVATIONS = {"gelu": ("Gelu", CONTRIB), "relu": ("Relu", "")}


def encoder_graph(model: Any, **options: Any) -> Graph:
    """(batch_size, num_mel_bins, frames) to (batch_size, frames / 2, d_model)."""
    graph = Graph(model, **options)
    x = encoder_states(graph, model, "input_features")
    graph.output(x, "last_hidden_state", ["batch_size", "encoder_sequence_length", model.config.d_model])
    return graph


def encoder_states(graph: Graph, model: Any, name: str) -> str:
    """The encoder's states, from the input of mel features that gets this name."""
    encoder = model.get_encoder()
    x = graph.input(name, FLOAT, ["batch_size", model.config.num_mel_bins, "feature_length"])
    if has_short_windows(model.config):
        x = without_padding(graph, x, encoder.conv1.stride[0] * encoder.conv2.stride[0])
    for conv in (encoder.conv1, encoder.conv2):
        x = graph.add("Gelu", graph.convolution(conv, x), domain=CONTRIB)
    x = graph.add("Transpose", x, perm=[0, 2, 1])
    positions = graph.tensor(graph.path(encoder.embed_positions) + ".weight", encoder.embed_positions.weight)
    length = size_of(graph, x, 1)
    x = graph.add("Add", x, graph.add("Slice", positions, graph.integers(0), length, graph.integers(0)))
    for layer in encoder.layers:
        module = layer.self_attn
        normed = graph.layer_norm(layer.self_attn_layer_norm, x)
        keys, values = graph.linear(module.k_proj, normed), graph.linear(module.v_proj, normed)
        context = attend(graph, module, normed, keys, values)
        x = graph.add("Add", x, graph.linear(module.out_proj, context))
        x = feed_forward(graph, layer, x, model.config.activation_function)
    return graph.layer_norm(encoder.layer_norm, x)


def without_padding(graph: Graph, features: str, stride: int) -> str:
    """The mel features that `ShortWindowEncoder` hears, of which `stride` make one position."""
    axis, end = graph.integers(2), graph.integers(END)
    last = graph.add("Slice", features, graph.integers(-1), end, axis)
    is_same = graph.add("Cast", graph.add("Equal", features, last), to=FLOAT)
    is_heard = graph.add("Sub", graph.number(1.0), graph.add("ReduceMin", is_same, axes=[0, 1], keepdims=0))
    length = size_of(graph, features, 2)
    after = graph.add("Squeeze", graph.add("Add", length, graph.integers(1)), graph.integers(0))
    numbers = graph.add("Range", graph.whole(1), after, graph.whole(1))
    heard = graph.add("ReduceMax", graph.add("Mul", is_heard, graph.add("Cast", numbers, to=FLOAT)), axes=[0])
    most = graph.add("Add", graph.add("Cast", heard, to=INT64), graph.integers(MARGIN_FRAMES))
    positions = graph.add("Div", graph.add("Min", most, length), graph.integers(stride))
    end = graph.add("Mul", positions, graph.integers(stride))
    return graph.add("Slice", features, graph.integers(0), end, axis)


def decoder_graph(model: Any, **options: Any) -> Graph:
    """Token ids, the encoder's states and the cache to logits, (batch_size, seq_len, vocab_size), and the new cache.

    Without `use_cache_branch`, the cache that is given does not count, and the keys and values of the cross-attention
    are computed. With it they are read, and their outputs are empty.
    """
    graph, config, decoder = Graph(model, **options), model.config, model.get_decoder()
    heads = config.decoder_attention_heads
    ids = graph.input("input_ids", INT64, ["batch_size", "decoder_sequence_length"])
    states = graph.input(
        "encoder_hidden_states", FLOAT, ["batch_size", "encoder_sequence_length", config.d_model]
    )
    cache = [
        {
            part: graph.input(
                f"past_key_values.{index}.{part}", FLOAT, _cache_shape(config, f"past_{part.split('.')[0]}")
            )
            for part in ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
        }
        for index in range(config.decoder_layers)
    ]
    uses_cache = graph.input("use_cache_branch", BOOL, [1])
    new = size_of(graph, ids, 1)
    past = graph.add("Where", uses_cache, size_of(graph, cache[0]["decoder.key"], 2), graph.integers(0))
    total = graph.add("Add", past, new)
    at, mask = causal(graph, past, total)
    table = graph.tensor(graph.path(decoder.embed_positions) + ".weight", decoder.embed_positions.weight)
    x = graph.add("Add", look_up(graph, decoder.embed_tokens, ids), graph.add("Gather", table, at))
    present: list[list[str]] = []
    for layer, old in zip(decoder.layers, cache):
        attention = layer.self_attn
        normed = graph.layer_norm(layer.self_attn_layer_norm, x)
        heads_of = [
            _split(graph, graph.linear(p, normed), heads) for p in (attention.k_proj, attention.v_proj)
        ]
        joined = graph.branch(
            uses_cache,
            lambda old=old, heads_of=heads_of: [
                graph.add("Concat", old[f"decoder.{name}"], value, axis=2)
                for name, value in zip(("key", "value"), heads_of)
            ],
            lambda heads_of=heads_of: [graph.add("Identity", value) for value in heads_of],
        )
        context = attend(graph, attention, normed, joined[0], joined[1], mask)
        x = graph.add("Add", x, graph.linear(attention.out_proj, context))
        normed = graph.layer_norm(layer.encoder_attn_layer_norm, x)
        context, *kept = _cross_attention(graph, layer.encoder_attn, normed, states, old, uses_cache)
        x = graph.add("Add", x, graph.linear(layer.encoder_attn.out_proj, context))
        x = feed_forward(graph, layer, x, config.activation_function)
        present.append([*joined, *kept])
    logits = logits_of(graph, model, graph.layer_norm(decoder.layer_norm, x))
    graph.output(logits, "logits", ["batch_size", "decoder_sequence_length", config.vocab_size])
    for index, values in enumerate(present):
        for part, value in zip(cache[index], values):
            shape = _cache_shape(config, "present_decoder" if "decoder" in part else "encoder")
            graph.output(value, f"present.{index}.{part}", shape)
    return graph


def _cache_shape(config: Any, name: str) -> list[Any]:
    heads = config.decoder_attention_heads
    batch = "batch_size" if name != "encoder" else "batch_size_or_none"
    return [batch, heads, f"{name}_sequence_length", config.d_model // heads]


def attend(graph: Graph, attention: Any, normed: str, keys: str, values: str, mask: str = "") -> str:
    """Attention of the queries from `normed` over keys and values, before the output projection."""
    inputs = [graph.linear(attention.q_proj, normed), keys, values, *(("", "", mask) if mask else ())]
    return graph.add("MultiHeadAttention", *inputs, domain=CONTRIB, num_heads=attention.num_heads)


def _cross_attention(
    graph: Graph, attention: Any, normed: str, states: str, old: dict[str, str], uses_cache: str
) -> list[str]:
    """Attention over the encoder's states, and the keys and values to keep: none where they come from the cache."""
    queries = graph.linear(attention.q_proj, normed)

    def over(keys: str, values: str) -> str:
        heads = attention.num_heads
        return graph.add("MultiHeadAttention", queries, keys, values, domain=CONTRIB, num_heads=heads)

    def from_cache() -> list[str]:
        keys, values = old["encoder.key"], old["encoder.value"]
        nothing = graph.add("Slice", keys, graph.integers(0), graph.integers(0), graph.integers(0))
        return [over(keys, values), nothing, graph.add("Identity", nothing)]

    def from_states() -> list[str]:
        heads = attention.num_heads
        keys = _split(graph, graph.linear(attention.k_proj, states), heads)
        values = _split(graph, graph.linear(attention.v_proj, states), heads)
        return [over(keys, values), keys, values]

    return graph.branch(uses_cache, from_cache, from_states)


def feed_forward(graph: Graph, layer: Any, x: str, activation: str) -> str:
    operator, domain = ACTIVATIONS[activation]
    hidden = graph.linear(layer.fc1, graph.layer_norm(layer.final_layer_norm, x))
    return graph.add("Add", x, graph.linear(layer.fc2, graph.add(operator, hidden, domain=domain)))


def look_up(graph: Graph, embedding: nn.Module, ids: str) -> str:
    if isinstance(embedding, QuantizedEmbedding):
        return _rows(graph, embedding, ids)
    if isinstance(embedding, MixedEmbedding):
        return _look_up_in_parts(graph, embedding, ids)
    stored = graph.stored(f"{graph.path(embedding)}.weight", embedding.weight)  # type: ignore[arg-type]
    return graph.add("Cast", graph.add("Gather", stored, ids), to=FLOAT)


def _look_up_in_parts(graph: Graph, embedding: MixedEmbedding, ids: str) -> str:
    """As `MixedEmbedding.forward`."""
    found = None
    for start, part in embedding.ranges:
        low, last = graph.whole(0), graph.whole(part.num_embeddings - 1)
        rows = _rows(graph, part, graph.add("Clip", graph.add("Sub", ids, graph.whole(start)), low, last))
        if found is not None:
            is_here = graph.add("GreaterOrEqual", ids, graph.whole(start))
            rows = graph.add("Where", graph.add("Unsqueeze", is_here, graph.integers(-1)), rows, found)
        found = rows
    assert found is not None
    return found


def _rows(graph: Graph, part: QuantizedEmbedding, ids: str) -> str:
    """The vectors of tokens of one range."""
    rows, mean = graph.rows(part, ids), _mean(graph, part)
    return rows if mean is None else graph.add("Add", rows, mean)


def _logits(graph: Graph, part: QuantizedEmbedding, x: str) -> str:
    """The logits of the tokens of one range."""
    logits, mean = graph.product(part, x), _mean(graph, part)
    if mean is None:
        return logits
    of_mean = graph.add("Unsqueeze", graph.add("MatMul", x, mean), graph.integers(-1))
    return graph.add("Add", logits, of_mean)


def _mean(graph: Graph, part: QuantizedEmbedding) -> str | None:
    """What the vectors have in common; None where it is kept in none."""
    return (
        graph.tensor(f"{graph.path(part)}.weight_mean", part.weight_mean) if part.weight_mean.any() else None
    )


def logits_of(graph: Graph, model: Any, x: str) -> str:
    """Logits from the embedding itself where the output is tied to it, so that it is stored once."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(output, TiedOutput):
        products = [_logits(graph, part, x) for _, part in embedding.ranges]
        return products[0] if len(products) == 1 else graph.add("Concat", *products, axis=-1)
    if output.weight is embedding.weight and output.bias is None:
        table = graph.tensor(f"{graph.path(embedding)}.weight", embedding.weight)
        return graph.add("FusedMatMul", x, table, domain=CONTRIB, transB=1)
    return graph.linear(output, x)


def _split(graph: Graph, x: str, heads: int) -> str:
    """(batch_size, seq_len, d_model) to (batch_size, heads, seq_len, d_model / heads)."""
    return graph.add("Transpose", graph.add("Reshape", x, graph.integers(0, 0, heads, -1)), perm=[0, 2, 1, 3])


def size_of(graph: Graph, x: str, axis: int) -> str:
    """The length of `x` along `axis`, as a vector of one integer."""
    return graph.add("Shape", x, start=axis, end=axis + 1)


def causal(graph: Graph, past: str, total: str) -> tuple[str, str]:
    """Positions of the new tokens, (seq_len,), and what is added to their scores, (1, 1, seq_len, total)."""
    axis = graph.integers(0)
    start, end = graph.add("Squeeze", past, axis), graph.add("Squeeze", total, axis)
    zero, one = graph.whole(0), graph.whole(1)
    new, every = graph.add("Range", start, end, one), graph.add("Range", zero, end, one)
    is_seen = graph.add("LessOrEqual", every, graph.add("Unsqueeze", new, graph.integers(1)))
    mask = graph.add("Where", is_seen, graph.number(0.0), graph.number(torch.finfo(torch.float32).min))
    return new, graph.add("Unsqueeze", mask, graph.integers(0, 1))
