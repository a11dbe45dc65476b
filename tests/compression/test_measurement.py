"""Divergences that are measured with kept keys and values are those of the whole model."""

from __future__ import annotations

import pytest
import torch
from tiny_families import dense_model, inputs_for

from hf_residual_transformer.compression import measurement
from hf_residual_transformer.compression.conversion import _make_linear
from hf_residual_transformer.compression.inputs import frozen_view
from hf_residual_transformer.compression.measurement import (
    Divergence,
    Keeps,
    cross_keys,
    divergence_of,
    logits_of,
    replaced,
)
from hf_residual_transformer.families import FAMILIES, LayerStack

WITH_DECODER = [name for name, family in FAMILIES.items() if len(family.stacks) > 1]


@pytest.fixture(params=WITH_DECODER)
def view_and_batch(request):
    view = frozen_view(dense_model(request.param))
    _make_linear(view, FAMILIES[request.param])
    labels = torch.tensor([[3, 4, 5, 6], [7, 8, -100, -100]])
    return request.param, view, {**inputs_for(request.param), "labels": labels}


def roundings_of(name, view, path):
    """The matrices at a path of the decoder, each with another value."""
    stack = LayerStack(FAMILIES[name].stacks[1], view)
    linears = [stack.linear(layer, path) for layer in range(len(stack))]
    return [(linear, linear.weight + 0.1, None) for linear in linears]


@torch.no_grad()
def test_kept_keys_give_the_same_chances(view_and_batch):
    _, view, batch = view_and_batch
    keys = cross_keys(view, batch)
    assert keys is not None
    for _ in range(2):  # they can be used again
        torch.testing.assert_close(logits_of(view, batch, keys), logits_of(view, batch))


@torch.no_grad()
def test_a_change_that_keeps_keys_has_the_same_divergence(view_and_batch):
    name, view, batch = view_and_batch
    divergence = Divergence(view, [batch, batch])
    stack = FAMILIES[name].stacks[1]
    read_memory = {path for block in stack.blocks for path in block.memory}
    for path in stack.modules:
        with replaced(roundings_of(name, view, path)):
            whole = divergence(Keeps.NOTHING)
            assert whole > 0
            assert divergence(Keeps.STATES) == pytest.approx(whole, rel=1e-4)
            # Keys that are kept show nothing of a change of the keys.
            expected = 0.0 if path in read_memory else whole
            assert divergence(Keeps.KEYS) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@torch.no_grad()
def test_without_room_nothing_is_kept(view_and_batch, monkeypatch):
    name, view, batch = view_and_batch
    path = FAMILIES[name].stacks[1].modules[-1]
    bytes_of_one = Divergence(view, [batch]).kept_bytes
    assert bytes_of_one > 0
    monkeypatch.setattr(measurement, "CACHE_BYTES", 1)
    divergence = Divergence(view, [batch, batch])
    assert divergence.kept_bytes == bytes_of_one  # of the first, after which there is no room
    with replaced(roundings_of(name, view, path)):
        assert divergence(Keeps.KEYS) == pytest.approx(divergence(Keeps.NOTHING), rel=1e-4)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_a_small_divergence_has_no_error_of_rounding(size):
    torch.manual_seed(0)
    reference = 8 * torch.randn(5, 50_000)
    found = (
        reference + size * torch.randn(5, 50_000) + torch.randn(5, 1)
    )  # one number for all tokens changes nothing
    wanted, own = (values.double().log_softmax(-1) for values in (reference, found))
    expected = (wanted.exp() * (wanted - own)).sum(-1)
    # In float32 alone, the plain formula is off by more than the smallest of these divergences.
    torch.testing.assert_close(divergence_of(reference, found).double(), expected, rtol=0.02, atol=0)
