"""The divergence from a dense model's transcripts, on a tiny model of random weights."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_conversion import dense_whisper

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "research"


@pytest.fixture(scope="module")
def measure_divergence():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("measure_divergence")


def batches(number=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 256, (number, 6), generator=generator)
    return [
        {"input_features": torch.randn(1, 16, 100, generator=generator), "labels": ids[None]} for ids in labels
    ]


@torch.no_grad()
def test_a_model_does_not_diverge_from_itself_and_a_changed_one_does(measure_divergence):
    dense, changed = dense_whisper(), dense_whisper()
    same = measure_divergence.compare(dense, dense, batches(), "same")
    assert same["divergence"] == [0.0] * 3 and same["differ"] == [0] * 3 and same["tokens"] == [6] * 3
    changed.get_decoder().layers[0].fc1.weight.mul_(-3)
    other = measure_divergence.compare(dense, changed, batches(), "changed")
    assert min(other["divergence"]) > 0 and sum(other["differ"]) > 0


def test_figures_are_sums_over_all_tokens_with_intervals_over_clips(measure_divergence, tmp_path):
    results = [
        {
            "system": "q4_0-rounded",
            "file_bytes": 46e6,
            "divergence": [1.0, 8.0],
            "differ": [1, 2],
            "tokens": [10, 20],
        },
        {
            "system": "ours:small",
            "file_bytes": 45e6,
            "divergence": [0.3, 0.6],
            "differ": [0, 1],
            "tokens": [10, 20],
        },
    ]
    figures = measure_divergence.figures_of(results)
    first, second = figures
    assert first["system"] == "q4_0-rounded" and first["tokens"] == 30
    assert first["divergence"]["value"] == pytest.approx(0.3)
    assert (first["divergence"]["low"], first["divergence"]["high"]) == pytest.approx((0.1, 0.4))
    assert second["differ"]["value"] == pytest.approx(1 / 30)
    settings = {
        "model": "m",
        "data": "d",
        "split": "test",
        "clips": 2,
        "audio_seconds": 60.0,
        "dense_mb": 145.2,
    }
    measure_divergence.write_report(tmp_path / "figures.json", settings, figures)
    assert "| ours:small | 45.0 | 0.0300 |" in (tmp_path / "figures.md").read_text()
    assert (tmp_path / "figures.png").stat().st_size > 1000
    assert np.isfinite(second["differ"]["high"])
