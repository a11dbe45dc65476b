"""`torch.compile` and `torch.export` of every family: a residual model goes through them where its dense one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_family_contract import KINDS, case, decoder_inputs, encoder_of, residual
from torch import Tensor, nn

# With a decoder, and without; the others take minutes and run with `pytest -m compilers`.
FIRST = ("whisper", "wav2vec2")
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.compilers) for name in KINDS]
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a module and the arguments of a call of it


def whole(name: str, model: Any) -> Call:
    return model, (), {**case(name).inputs, **decoder_inputs(name)}


def encoder_alone(name: str, model: Any) -> Call:
    """The stack of layers, with what the model gives it."""
    seen: list[Call] = []
    owner = encoder_of(name, model)
    handle = owner.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module, args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**whole(name, model)[2])
    handle.remove()
    return seen[0]


def compiled(module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)(*args, **kwargs)[0]


def exported(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return torch.export.export(module, args, kwargs, strict=False)


def possible(name: str, work: Callable[..., Any]) -> Callable[..., Call]:
    """The whole model or its encoder, whichever goes first through `work` in its dense form; or the test is skipped."""
    reasons = []
    for part in (whole, encoder_alone):
        try:
            with torch.no_grad():
                work(*part(name, case(name).dense))
        except Exception as error:
            reasons.append(f"{part.__name__}: {type(error).__name__} {str(error).split(chr(10))[0]}")
        else:
            return part
    pytest.skip(f"the dense {name} does not go through: {'; '.join(reasons)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_as_one_graph_with_equal_outputs_and_gradients(name):
    part = possible(name, compiled)
    module, args, kwargs = part(name, residual(name))
    shared = [p for key, p in module.named_parameters() if ".shared." in f".{key}"]
    expected = module(*args, **kwargs)[0]
    gradients = torch.autograd.grad(expected.square().sum(), shared)
    found = compiled(module, args, kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for mine, other in zip(torch.autograd.grad(found.square().sum(), shared), gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_exported_with_each_u_once(name):
    part = possible(name, exported)
    with torch.no_grad():
        module, args, kwargs = part(name, residual(name))
        program = exported(module, args, kwargs)
        found, expected = program.module()(*args, **kwargs)[0], module(*args, **kwargs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    state = {key: value for key, value in program.state_dict.items() if ".shared." in f".{key}"}
    own = {key: value for key, value in module.state_dict().items() if ".shared." in f".{key}"}
    assert own and {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in own.items()
    }
    # Nothing of the size of a dense matrix has become a constant, but for positions, which the dense model has too.
    with torch.no_grad():
        dense = exported(*part(name, case(name).dense))
    smallest = min(value.numel() for value in own.values() if value.dim() == 2)
    found_constants, of_dense = (
        [
            value.shape
            for value in p.constants.values()
            if isinstance(value, Tensor) and value.numel() >= smallest
        ]
        for p in (program, dense)
    )
    assert found_constants == of_dense
