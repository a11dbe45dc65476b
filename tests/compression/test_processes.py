"""Two processes share the calibration, and convert as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_wav2vec2_config, whisper_generation_config
from test_conversion import dense_whisper, whisper_inputs
from torch import distributed
from transformers import Wav2Vec2ForCTC
from two_processes import run_together

import hf_residual_transformer as hrt
from hf_residual_transformer.compression import conversion
from hf_residual_transformer.compression.processes import OtherProcessError

QUIET = {"progress": False, "iterations": 2}


def whole_whisper() -> Any:
    """All parts within a budget, from batches of one and two windows, of which some have no labels."""
    # A few of the windows serve the encoder, and others the measurement.
    conversion.ENCODER_WINDOWS, conversion.CHECK_WINDOWS = 5, 2
    dense = dense_whisper()
    dense.generation_config = whisper_generation_config()
    features = whisper_inputs(9)
    labels = torch.randint(0, 256, (9, 6), generator=torch.Generator().manual_seed(4))
    labels[2, 4:] = -100
    batches = [
        {"input_features": features[start:end], **({"labels": labels[start:end]} if start % 2 else {})}
        for start, end in ((0, 1), (1, 3), (3, 4), (4, 5), (5, 7), (7, 8), (8, 9))
    ]
    return converted(hrt.ResidualWhisperForConditionalGeneration, dense, None, batches, budget=0.6)


def wav2vec2_of_different_lengths() -> Any:
    """Shared matrices, from batches of which no two have the same length."""
    torch.manual_seed(0)
    dense = Wav2Vec2ForCTC(tiny_wav2vec2_config()).eval()
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_values": 0.1 * torch.randn(2, length, generator=generator)} for length in (900, 640, 760)
    ]
    residual = hrt.ResidualConfig(group_size=2, rank=4, diagonal="all")
    return converted(hrt.ResidualWav2Vec2ForCTC, dense, residual, batches)


def one_window() -> Any:
    """A process that has no share."""
    residual = hrt.ResidualConfig(group_size=2, rank=4, shared_bits=4)
    batch = {"input_features": whisper_inputs(1)}
    return converted(hrt.ResidualWhisperForConditionalGeneration, dense_whisper(), residual, [batch])


def converted(cls: Any, dense: Any, residual: Any, batches: Any, **options: Any) -> Any:
    """The weights, those of the merged model, the settings and the errors."""
    options = {**QUIET, **options, "distributed": distributed.is_initialized()}
    model = cls.from_dense(dense, residual, batches, **options)
    errors = [(error.module, error.rank, error.error) for error in model.conversion_report.errors]
    return model.state_dict(), model.merge().state_dict(), model.config.to_dict(), errors


@pytest.mark.parametrize("convert", [whole_whisper, wav2vec2_of_different_lengths, one_window])
def test_two_processes_convert_as_one_does(convert, monkeypatch):
    for name in ("ENCODER_WINDOWS", "CHECK_WINDOWS"):
        monkeypatch.setattr(conversion, name, getattr(conversion, name))  # it comes back afterwards
    first, second = run_together(convert)
    _, merged, config, errors = convert()
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(value, second[0][key]) for key, value in first[0].items())
    assert first[2:] == second[2:]
    assert first[2] == config
    for key, value in merged.items():
        torch.testing.assert_close(first[1][key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert [error[:2] for error in first[3]] == [error[:2] for error in errors]
    assert [error[2] for error in first[3]] == pytest.approx([error[2] for error in errors], rel=1e-4)


def work_of_each_process() -> tuple[int, int]:
    """How many forward passes of the dense encoder a conversion takes here, beside all batches."""
    dense, calls = dense_whisper(), []
    view = conversion.frozen_view

    def counted(model: Any, *options: Any) -> Any:
        found = view(model, *options)
        found.model.encoder.conv1.register_forward_pre_hook(lambda *given: calls.append(len(given[1][0])))
        return found

    conversion.frozen_view = counted
    batches = [{"input_features": window[None]} for window in whisper_inputs(8)]
    converted(
        hrt.ResidualWhisperForConditionalGeneration,
        dense,
        hrt.ResidualConfig(group_size=2, rank=4),
        batches,
    )
    return len(calls), distributed.get_rank()


def test_each_process_runs_its_own_share():
    (calls, _), (others, _) = run_together(work_of_each_process)
    # One pass for the statistics and one for the states; the second process looks at one batch for its shape.
    assert (calls, others) == (8, 9)


def a_process_fails(what: str) -> str:
    index, batches = (
        distributed.get_rank(),
        [{"input_features": window[None]} for window in whisper_inputs(3)],
    )
    if index == 1 and what == "a value":
        batches[0]["input_features"][0, 0, 0] = float("nan")
    if index == 1 and what == "the order":
        batches.reverse()
    if index == 1 and what == "in the middle":

        def broken(*_: Any) -> Any:
            raise MemoryError("no memory is left")

        conversion.Streams.advance = broken
    try:
        converted(
            hrt.ResidualWhisperForConditionalGeneration,
            dense_whisper(),
            hrt.ResidualConfig(group_size=2, rank=4),
            batches,
        )
    except (ValueError, MemoryError, OtherProcessError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        (
            "a value",
            "OtherProcessError: process 1 of 2 has failed: ValueError: `calibration[0]` must be finite",
            "ValueError: `calibration[0]` must be finite",
        ),
        (
            "the order",
            "ValueError: `calibration` must be the same in all processes",
            "ValueError: `calibration` must be the same in all processes",
        ),
        (
            "in the middle",
            "OtherProcessError: process 1 of 2 has failed: MemoryError: no memory is left",
            "MemoryError: no memory is left",
        ),
    ],
)
def test_all_processes_end_when_one_fails(what, first, second):
    found = run_together(a_process_fails, what)
    assert found[0].startswith(first)
    assert found[1].startswith(second)


def test_processes_must_be_started_before_they_convert_together():
    with pytest.raises(
        ValueError, match=r"`distributed` must be false where `torch\.distributed` is not init"
    ):
        hrt.ResidualWhisperForConditionalGeneration.from_dense(
            dense_whisper(), start="svd", distributed=True, progress=False
        )
