"""FSDP2 over layers that share a matrix: two processes make the step that one makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_contract import build, encoder_of, inputs_of
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_processes import run_together

from hf_residual_transformer import ResidualConfig


def wrap(model: Any, by: str) -> None:
    """Shards a model as docs/guide.md says."""
    mesh, encoder = init_device_mesh("cpu", (distributed.get_world_size(),)), encoder_of(model)
    if by == "layer":
        for bank in encoder.shared.values():
            for shared in bank:
                fully_shard(shared, mesh=mesh)
        for layer in encoder.layers:
            fully_shard(layer, mesh=mesh)
    else:
        fully_shard(encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)


def form(bits: int | None, scale_bits: int) -> ResidualConfig:
    return ResidualConfig(group_size=2, rank=2, diagonal="all", shared_bits=bits, scale_bits=scale_bits)


def step(family: str, by: str, bits: int | None, scale_bits: int) -> dict[str, torch.Tensor]:
    """The weights after two steps, of which each process sees one of two recordings."""
    model = build(family, form(bits, scale_bits))
    inputs = {key: value for key, value in inputs_of(family).items() if key != "labels"}
    if family == "whisper":
        inputs["decoder_input_ids"] = torch.tensor([[1, 72, 73], [1, 80, 81]])
    if distributed.is_initialized():
        index = distributed.get_rank()
        inputs = {key: value[index : index + 1] for key, value in inputs.items()}
        wrap(model, by)
        # A unit of several layers has its `U` in the same place as before, and once.
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.detach()
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(("bits", "scale_bits"), [(None, 16), (4, 16), (4, 8)])
@pytest.mark.parametrize("by", ["layer", "encoder"])
@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_two_processes_make_the_step_of_one(family, by, bits, scale_bits):
    before = build(family, form(bits, scale_bits))
    expected = step(family, by, bits, scale_bits)
    first, second = run_together(step, family, by, bits, scale_bits)
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6, msg=key)
    moved = {key for key, value in before.state_dict().items() if not torch.allclose(value, expected[key])}
    assert any(".shared." in key for key in moved) and any("residual_B" in key for key in moved)
