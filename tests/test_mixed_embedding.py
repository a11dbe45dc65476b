"""A token embedding in which ranges of tokens have numbers of bits of their own."""

import copy
import threading
import time

import pytest
import torch
from conftest import randomize_, tiny_whisper_config
from safetensors.torch import load_file
from test_conversion import dense_whisper, whisper_inputs
from test_whole_model import labelled
from transformers import AutoModelForSpeechSeq2Seq

import hf_residual_transformer as hrt
from hf_residual_transformer import layers
from hf_residual_transformer.compression import allocation
from hf_residual_transformer.compression.allocation import embedding_curves, token_ranges
from hf_residual_transformer.compression.statistics import EmbeddingStatistics
from hf_residual_transformer.layers import MixedEmbedding, QuantizedEmbedding, unpacked_weights

Whisper = hrt.ResidualWhisperForConditionalGeneration
PLAIN = hrt.ResidualConfig(group_size=1, rank=2, shared_bits=4)
TOKENS = tiny_whisper_config().vocab_size
RANGES = [[20, 6], [100, 3], [TOKENS, 2]]


def mixed(seed=0):
    config = tiny_whisper_config(residual_config=PLAIN, decoder_residual_config=PLAIN, embedding_bits=RANGES)
    return randomize_(Whisper(config), seed).eval()


def inputs():
    ids = torch.tensor([[0, 19, 20, 99, 100, TOKENS - 1], [5, 50, 150, 21, 101, 1]])
    return {"input_features": whisper_inputs(2), "decoder_input_ids": ids}


@torch.no_grad()
def test_rows_and_logits_are_those_of_the_ranges():
    table, ids = mixed().get_input_embeddings(), inputs()["decoder_input_ids"]
    assert isinstance(table, MixedEmbedding)
    assert [part.bits for _, part in table.ranges] == [6, 3, 2]
    weight = torch.cat([part.weight for part in table.parts])
    assert weight.shape == (TOKENS, table.embedding_dim)
    torch.testing.assert_close(table.weight, weight, rtol=0, atol=0)
    torch.testing.assert_close(table(ids), weight[ids], rtol=0, atol=0)
    states = torch.randn(2, 3, table.embedding_dim)
    torch.testing.assert_close(table.logits(states), states @ weight.T, rtol=1e-4, atol=1e-4)
    with unpacked_weights(table):
        torch.testing.assert_close(table.logits(states), states @ weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_saved_model_its_copy_and_its_merged_form_give_the_same_logits(tmp_path):
    model, batch = mixed().half(), inputs()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    report = hrt.size_report(model)
    own = [value for key, value in saved.items() if "embed_tokens" in key]
    hidden = model.config.d_model
    starts = [0, 20, 100]
    in_bits = sum((end - start) * hidden * bits // 8 for start, (end, bits) in zip(starts, RANGES))
    means = len(RANGES) * hidden * 2
    assert sum(value.nbytes for value in own) == in_bits + TOKENS * hidden // 32 * 2 + means
    assert report.parts["token embedding"].unique == sum(value.nbytes for value in own)
    assert report.parts["token embedding"].dense == TOKENS * hidden * 2
    assert report.model_bytes.unique == sum(value.nbytes for value in saved.values())
    model.float()
    logits = model(**batch).logits
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.embedding_bits == RANGES
    for other in (again, copy.deepcopy(model)):
        torch.testing.assert_close(other(**batch).logits, logits, rtol=0, atol=0)
    merged = model.merge()
    torch.testing.assert_close(merged(**batch).logits, logits, rtol=1e-4, atol=1e-4)
    tokens = [m.generate(batch["input_features"], max_new_tokens=5) for m in (model, merged)]
    assert torch.equal(*tokens)


def test_gradients_reach_the_scales_of_every_range():
    model = mixed()
    model(**inputs()).logits.square().sum().backward()
    for part in model.get_input_embeddings().parts:
        assert part.weight_scale.grad.abs().sum(1).gt(0).all()


def test_neighbouring_ranges_with_equal_bits_become_one():
    config = tiny_whisper_config(residual_config=PLAIN, embedding_bits=[(20, 5), (30, 5), [TOKENS, 3]])
    assert config.embedding_bits == [[30, 5], [TOKENS, 3]]


@pytest.mark.parametrize(
    ("num_tokens", "end_token", "ends"),
    [
        (51865, 50257, [1024, 4096, 16384, 50257, 51865]),  # Whisper
        (32768, 2, [1024, 4096, 16384, 32768]),  # an end that is among the first tokens
        (300, 256, [300]),
        (16384, None, [1024, 4096, 16384]),
    ],
)
def test_ranges_begin_with_frequent_tokens_and_end_with_special_ones(num_tokens, end_token, ends):
    assert token_ranges(num_tokens, end_token) == ends


@torch.no_grad()
def test_errors_of_ranges_add_up_to_that_of_the_table_and_follow_their_use():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(300, 32, generator=generator)
    statistics = EmbeddingStatistics(300, 32, torch.device("cpu"))
    states = torch.randn(50, 32, generator=generator)
    logits = states @ table.T
    logits[:, :40] += 8  # the first tokens are frequent
    statistics.add_logits(states, logits.softmax(-1))
    ids = torch.randint(0, 40, (50,), generator=generator)
    statistics.add_lookup(ids, torch.randn(50, 32, generator=generator))
    curves = embedding_curves(table, statistics, [(40, (2, 3)), (300, (2, 3))], 32)
    errors = {(curve.group.layers[0], curve.bits): curve.errors[0] for curve in curves}
    assert errors[40, 3] > 3 * errors[300, 3]
    assert errors[40, 2] > 2 * errors[40, 3]
    (whole,) = embedding_curves(table, statistics, [(300, (3,))], 32)
    # The integers differ a little, since a metric is that of the average row of a range.
    assert errors[40, 3] + errors[300, 3] == pytest.approx(whole.errors[0], rel=0.3)


def test_a_table_that_cannot_be_factorised_is_named(monkeypatch):
    statistics = EmbeddingStatistics(64, 32, torch.device("cpu"))
    monkeypatch.setattr(statistics, "metric", lambda start, end: -torch.eye(32, dtype=torch.float64))
    with pytest.raises(ValueError, match="the weights of embed_tokens, or what it reads, are of sizes"):
        embedding_curves(torch.randn(64, 32), statistics, [(64, (4,))], 32)


def test_given_ranges_are_kept_whether_ranks_are_given_or_chosen():
    for options in ({}, {"budget": 0.6}):
        model = Whisper.from_dense(
            dense_whisper(),
            PLAIN,
            labelled(),
            decoder_residual_config=PLAIN,
            embedding_bits=[(20, 8), (TOKENS, 3)],
            progress=False,
            **options,
        )
        assert model.config.embedding_bits == [[20, 8], [TOKENS, 3]]
        dense = dense_whisper().get_input_embeddings().weight
        error = (model.get_input_embeddings().weight - dense).norm(dim=1) / dense.norm(dim=1)
        assert error[:20].max() < 0.02 < error[20:].min()


def test_a_budget_may_give_ranges_of_tokens_different_bits(monkeypatch):
    monkeypatch.setattr(allocation, "TOKEN_RANGES", (16, 64))
    model = Whisper.from_dense(dense_whisper(), calibration=labelled(), budget=0.4, progress=False)
    report = hrt.size_report(model)
    assert 0.38 < report.model_bytes.ratio <= 0.4
    found = model.get_input_embeddings()
    assert isinstance(found, (MixedEmbedding, QuantizedEmbedding))
    with torch.no_grad():
        assert model.eval()(**inputs()).logits.isfinite().all()


@torch.no_grad()
def test_few_bits_are_measured_and_more_bits_follow_from_them():
    table = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    statistics = EmbeddingStatistics(100, 32, torch.device("cpu"))
    statistics.add_logits(table[:50], (table[:50] @ table.T).softmax(-1))
    seen = []

    def measure(other):
        changed = (other != table).any(1)
        seen.append((changed[:40].all().item(), changed[40:].all().item()))
        assert changed.any() and not changed.all()  # one range at a time
        return (other - table).square().sum().item() ** 2  # not of second order

    curves = embedding_curves(table, statistics, [(40, (2, 3, 5)), (100, (2, 3, 5))], 32, measure)
    assert seen == [(True, False)] * 2 + [(False, True)] * 2
    for end in (40, 100):
        two, three, five = (curve.errors[0] for curve in curves if curve.group.layers == (end,))
        assert two > 8 * three  # the square of about four
        assert 4 < three / five < 40  # of second order again


def test_threads_that_unpack_a_table_at_the_same_time_all_see_it_whole(monkeypatch):
    table = mixed().get_input_embeddings()
    expected, found, real = table.weight, [], layers.dequantize
    first_is_done, both = threading.Event(), threading.Barrier(2)

    def slow(*args):
        result = real(*args)
        time.sleep(0.02)  # so that the threads are inside at the same time
        return result

    def use(leaves_first):
        both.wait()
        with unpacked_weights(table):
            found.append(table.weight)
            if not leaves_first:
                first_is_done.wait()
                found.append(table.weight)
        first_is_done.set()

    monkeypatch.setattr(layers, "dequantize", slow)
    threads = [threading.Thread(target=use, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(weight, expected) for weight in found)
    assert all(part._unpacked is None for _, part in table.ranges)
    with pytest.raises(RuntimeError, match="no memory"), monkeypatch.context() as patch:
        patch.setattr(QuantizedEmbedding, "dequantized", fails_at_last(table))
        with unpacked_weights(table):
            pass
    assert all(part._unpacked is None for _, part in table.ranges)


def fails_at_last(table):
    """A `dequantized` that fails for the last range."""
    last, real = table.ranges[-1][1], QuantizedEmbedding.dequantized

    def dequantized(part):
        if part is last:
            raise RuntimeError("no memory")
        return real(part)

    return dequantized
