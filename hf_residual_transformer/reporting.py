"""What a residual model costs: `parameter_report`, parameters of the encoder's layers by component."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .layers import SHARED, ResidualLinear, quantized_weights

FLOAT_BITS = 16
COMPONENTS = ("shared", "lora", "diagonal", "biases", "layer_norms", "other")


@dataclass(frozen=True)
class Count:
    """Of parameters, or of their bytes: `unique` in the residual model, `dense` in the dense one of the same shapes."""

    unique: int
    dense: int

    @property
    def ratio(self) -> float:
        """Unique / dense."""
        return self.unique / self.dense

    def to_dict(self) -> dict[str, float]:
        """Both counts and their ratio."""
        return {"unique": self.unique, "dense": self.dense, "ratio": self.ratio}


@dataclass(frozen=True)
class ParameterReport:
    """Unique and dense parameters. `print` shows a table.

    Args:
        components: of the encoder's layers, what they share included, by component: "shared" (every `U`,
            with its scales where it is quantised; in the dense model, the matrices that they stand for), "lora",
            "diagonal", "biases", "layer_norms" and "other" (such as matrices that stay dense).
        encoder: their sum. Embeddings, convolutions and the norm after the last layer do not count.
        model: the whole model.
        encoder_bytes: of the encoder's layers, with 16 bits for each parameter that is not quantised.
    """

    components: dict[str, Count]
    encoder: Count
    model: Count
    encoder_bytes: Count

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        components = {
            name: {"unique": count.unique, "dense": count.dense} for name, count in self.components.items()
        }
        return {
            "encoder": {**self.encoder.to_dict(), "components": components},
            "encoder_bytes": self.encoder_bytes.to_dict(),
            "model": self.model.to_dict(),
        }

    def __str__(self) -> str:
        rows = {**self.components, "encoder layers": self.encoder, "whole model": self.model}
        rows["bytes of layers"] = self.encoder_bytes
        lines = [f"{'parameters':<16}{'unique':>14}{'dense':>14}{'ratio':>9}"]
        for name, count in rows.items():
            ratio = f"{count.ratio:.1%}" if count.dense else "-"
            lines.append(f"{name.replace('_', ' '):<16}{count.unique:>14,}{count.dense:>14,}{ratio:>9}")
        return "\n".join(lines)


def parameter_report(model: nn.Module) -> ParameterReport:
    """Counts the parameters of a residual model and of its dense form, from the shapes of its matrices.

    Raises:
        ValueError: when `model` has no residual layers.
    """
    encoder: Any = next(
        (m for m in model.modules() if isinstance(getattr(m, "shared", None), nn.ModuleDict)), None
    )
    if encoder is None:
        raise ValueError(
            f"`model` must have residual layers, got {type(model).__name__}; make one with a residual "
            "class's from_dense(...)"
        )
    unique = dict.fromkeys(COMPONENTS, 0)
    dense = dict.fromkeys(COMPONENTS, 0)
    quantized = quantized_weights(encoder.shared)
    for module in _modules(encoder.layers, encoder.shared):
        for name, parameter in module.named_parameters(recurse=False):
            component = _component(module, name)
            unique[component] += parameter.numel()
            if not isinstance(module, (ResidualLinear, *SHARED)):
                dense[component] += parameter.numel()
        if isinstance(module, ResidualLinear):
            dense["shared"] += module.out_features * module.in_features
            dense["biases"] += 0 if module.bias is None else module.out_features
    unique["shared"] += quantized.total()
    layers = Count(sum(unique.values()), sum(dense.values()))
    in_floats = layers.unique - quantized.total() + quantized_size(quantized)
    whole = sum(parameter.numel() for parameter in model.parameters()) + quantized.total()
    return ParameterReport(
        components={name: Count(unique[name], dense[name]) for name in COMPONENTS},
        encoder=layers,
        model=Count(whole, whole - layers.unique + layers.dense),
        encoder_bytes=Count(round(in_floats * FLOAT_BITS / 8), layers.dense * FLOAT_BITS // 8),
    )


def quantized_size(weights: Mapping[int, int]) -> float:
    """Of so many weights by bits, without their scales, in parameters of 16 bits."""
    return sum(number * bits for bits, number in weights.items()) / FLOAT_BITS


def _modules(*roots: Any) -> Iterator[nn.Module]:
    for root in roots:
        yield from root.modules()


def _component(module: nn.Module, name: str) -> str:
    if name.startswith("lora_"):
        return "lora"
    if name == "diagonal":
        return "diagonal"
    if "LayerNorm" in type(module).__name__:
        return "layer_norms"
    if name == "bias":
        return "biases"
    return "shared" if isinstance(module, SHARED) else "other"


@dataclass(frozen=True)
class ModuleError:
    """Relative error of one matrix: variance of the outputs' error / variance of the outputs, 0 to about 1, the
    residual encoder's outputs against the dense one's, each on its own hidden states. A matrix that writes to the
    residual stream is to give also what the stream lacks by then. Without inputs, the same of the weights' squares.
    """

    layer: int
    module: str
    rank: int
    error: float


@dataclass(frozen=True)
class ConversionReport:
    """How well `from_dense` reproduced each matrix. `print` shows a table, `plot` a heat-map.

    Args:
        start: how the components were computed, "calibrated" or "svd".
        measured_on: "outputs" over the calibration inputs, or "weights" where there were none.
        errors: one entry for each residual matrix.
    """

    start: str
    measured_on: str
    errors: list[ModuleError]

    @property
    def mean_error(self) -> float:
        """Mean of the matrices' relative errors."""
        return sum(entry.error for entry in self.errors) / len(self.errors)

    def table(self) -> tuple[list[str], list[int], list[list[float]]]:
        """Module names, layers, and the error of each (layer, module); NaN where a matrix stayed dense."""
        modules = list(dict.fromkeys(entry.module for entry in self.errors))
        layers = sorted({entry.layer for entry in self.errors})
        values = {(entry.layer, entry.module): entry.error for entry in self.errors}
        return modules, layers, [[values.get((layer, m), float("nan")) for m in modules] for layer in layers]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"mean_error": self.mean_error}

    def __str__(self) -> str:
        modules, layers, rows = self.table()
        width = max(len(m) for m in modules) + 2
        lines = [
            f"relative error of the {self.measured_on} ({self.start} start), mean {self.mean_error:.4f}",
            "layer" + "".join(f"{m:>{width}}" for m in modules),
        ]
        lines += [
            f"{layer:>5}" + "".join(f"{v:>{width}.4f}" for v in row) for layer, row in zip(layers, rows)
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draws the errors of layers and modules as a heat-map with a logarithmic scale, to an image file."""
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        modules, layers, rows = self.table()
        seen = [value for row in rows for value in row if value > 0]
        norm = LogNorm(max(min(seen, default=1e-6), 1e-6), max(max(seen, default=1.0), 1e-5))
        figure = Figure(figsize=(1.2 * len(modules) + 2, 0.45 * len(layers) + 1.6), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(rows, norm=norm, aspect="auto", cmap="viridis_r")
        axes.set_xticks(range(len(modules)), modules)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_ylabel("encoder layer")
        axes.set_title(f"relative error of the {self.measured_on}, {self.start} start")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    dark = value > 0 and norm(value) > 0.5
                    axes.text(
                        x, y, f"{value:.3f}", ha="center", va="center", color="white" if dark else "black"
                    )
        figure.colorbar(image, ax=axes)
        figure.savefig(path, dpi=120)
