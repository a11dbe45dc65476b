"""Reports of a residual model: its size (`size_report`) and the error of its matrices (`ConversionReport`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .layers import SHARED, QuantizedEmbedding, ResidualLinear, quantized_weights

FLOAT_BITS = 16
COMPONENTS = ("shared", "lora", "diagonal", "biases", "layer_norms", "other")


@dataclass(frozen=True)
class Count:
    """A number of parameters or bytes in two models.

    Args:
        unique: the number in the residual model, where each shared tensor counts once.
        dense: the number in the dense model of the same shapes.
    """

    unique: int
    dense: int

    @property
    def ratio(self) -> float:
        """`unique / dense`."""
        return self.unique / self.dense

    def to_dict(self) -> dict[str, float]:
        """Both numbers and their ratio."""
        return {"unique": self.unique, "dense": self.dense, "ratio": self.ratio}


@dataclass(frozen=True)
class SizeReport:
    """The size of a residual model beside that of its dense form. `print` shows two tables, bytes first.

    Bytes are those of the tensors in a saved file: 16 bits for each number that is not quantised, and the packed bytes
    of the quantised weights. Parameters include the quantised weights and their scales, each of which counts as one.

    Args:
        model_bytes: bytes of the whole saved model.
        parts: bytes of its compact parts: "encoder layers" and "decoder layers" with the matrices that they share, and
            "token embedding". Convolutions, positions and the norms after the last layers belong to none.
        model: parameters of the whole model.
        encoder: parameters of the encoder's layers, the sum of `components`.
        components: parameters of the encoder's layers by component: "shared" (every `U`, with its scales where it is
            quantised; its dense number is that of the matrices it replaces), "lora", "diagonal", "biases",
            "layer_norms" and "other" (such as matrices that stay dense).
    """

    model_bytes: Count
    parts: dict[str, Count]
    model: Count
    encoder: Count
    components: dict[str, Count]

    @property
    def encoder_bytes(self) -> Count:
        """Bytes of the encoder's layers."""
        return self.parts["encoder layers"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        components = {
            name: {"unique": count.unique, "dense": count.dense} for name, count in self.components.items()
        }
        return {
            "model_bytes": self.model_bytes.to_dict(),
            "encoder_bytes": self.encoder_bytes.to_dict(),
            "parts": {name: count.to_dict() for name, count in self.parts.items()},
            "model": self.model.to_dict(),
            "encoder": {**self.encoder.to_dict(), "components": components},
        }

    def __str__(self) -> str:
        in_bytes = {"whole model": self.model_bytes, **self.parts}
        parameters = {"whole model": self.model, "encoder layers": self.encoder}
        parameters |= {f"  {name.replace('_', ' ')}": count for name, count in self.components.items()}
        return "\n\n".join(
            (
                _table("bytes when saved", in_bytes, format_bytes),
                _table("parameters", parameters, "{:,}".format),
            )
        )


def format_bytes(number: float, decimals: int = 1) -> str:
    """Bytes in MB (10^6), or below 1 MB in kB (10^3)."""
    value, unit = (number / 1e6, "MB") if number >= 1e6 else (number / 1e3, "kB")
    return f"{value:,.{decimals}f} {unit}"


def _table(title: str, counts: Mapping[str, Count], written: Callable[[int], str]) -> str:
    lines = [f"{title:<18}{'compressed':>14}{'dense':>14}{'ratio':>9}"]
    for name, count in counts.items():
        ratio = f"{count.ratio:.1%}" if count.dense else "-"
        lines.append(f"{name:<18}{written(count.unique):>14}{written(count.dense):>14}{ratio:>9}")
    return "\n".join(lines)


def size_report(model: nn.Module) -> SizeReport:
    """Counts the bytes and parameters of a residual model and of its dense form, from the shapes of its tensors.

    The dtype of `model` does not matter, and it may be on the meta device.

    Raises:
        ValueError: if `model` has no residual layers.
    """
    owners = [m for m in model.modules() if isinstance(getattr(m, "shared", None), nn.ModuleDict)]
    if not owners:
        raise ValueError(
            f"`model` must have residual layers, got {type(model).__name__}; make one with a residual "
            "class's from_dense(...)"
        )
    saved = sum(map(_saved_bytes, saved_tensors(model)))
    parts: dict[str, Count] = {}
    parameters, components = [], []
    for owner in owners:
        layers, layer_bytes, of_layers = _layers_report(owner)
        parts["decoder layers" if parts else "encoder layers"] = layer_bytes
        parameters.append(layers)
        components.append(of_layers)
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            number = module.out_features * module.in_features
            in_bytes = sum(map(_saved_bytes, saved_tensors(module)))
            of_part = Count(in_bytes, number * FLOAT_BITS // 8)
            known = parts.get("token embedding", Count(0, 0))
            parts["token embedding"] = Count(known.unique + of_part.unique, known.dense + of_part.dense)
            floats = module.weight_scale.numel() + module.weight_mean.numel()
            own = floats + quantized_weights(module, scales=True).total()
            parameters.append(Count(own, number))
    dense_saved = saved + sum(count.dense - count.unique for count in parts.values())
    unique = (
        sum(parameter.numel() for parameter in model.parameters())
        + quantized_weights(model, scales=True).total()
    )
    dense = unique + sum(count.dense - count.unique for count in parameters)
    return SizeReport(Count(saved, dense_saved), parts, Count(unique, dense), parameters[0], components[0])


def _layers_report(owner: Any) -> tuple[Count, Count, dict[str, Count]]:
    """Parameters and bytes of the layers of a stack and of the matrices that they share; parameters by component."""
    unique = dict.fromkeys(COMPONENTS, 0)
    dense = dict.fromkeys(COMPONENTS, 0)
    quantized = quantized_weights(owner.shared, scales=True)
    for module in _modules(owner.layers, owner.shared):
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
    layer_bytes = Count(round(in_floats * FLOAT_BITS / 8), layers.dense * FLOAT_BITS // 8)
    return layers, layer_bytes, {name: Count(unique[name], dense[name]) for name in COMPONENTS}


def saved_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of a saved model, where tied weights are one tensor."""
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _saved_bytes(tensor: Tensor) -> int:
    return tensor.numel() * FLOAT_BITS // 8 if tensor.is_floating_point() else tensor.nbytes


def quantized_size(weights: Mapping[int, int]) -> float:
    """The size of integers in few bits, without scales in floating point, as a number of 16-bit parameters.

    Args:
        weights: numbers of integers by their bits, as `quantized_weights` counts them.
    """
    return sum(number * bits for bits, number in weights.items()) / FLOAT_BITS


def _modules(*roots: Any) -> Iterator[nn.Module]:
    for root in roots:
        yield from root.modules()


def _component(module: nn.Module, name: str) -> str:
    if name.startswith("residual_"):
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
    """The relative error of one residual matrix, from 0 (equal) to about 1 (as bad as a constant output).

    With calibration inputs, `error` is the variance of the error of the matrix's outputs divided by the variance of the
    outputs that it should give. Both encoders run on their own hidden states. A matrix that reads from the residual
    stream should give the dense matrix's outputs; one that writes to the stream should also add what the stream lacks
    at that point. Without inputs, `error` is the sum of squares of the weights' error divided by that of the weights.
    """

    layer: int
    module: str
    rank: int
    error: float
    stack: str = "encoder"


@dataclass(frozen=True)
class ConversionReport:
    """How well `from_dense` reproduced each matrix. `print` shows a table, `plot` a heat-map.

    Args:
        start: how the components were computed, "calibrated" or "svd".
        measured_on: "outputs" if the errors are those of outputs over the calibration inputs, "weights" if there were
            no inputs.
        errors: one entry for each residual matrix.
        windows: the number of calibration inputs.
    """

    start: str
    measured_on: str
    errors: list[ModuleError]
    windows: int = 0

    @property
    def mean_error(self) -> float:
        """The mean of the relative errors of all matrices."""
        return sum(entry.error for entry in self.errors) / len(self.errors)

    def table(self, stack: str = "encoder") -> tuple[list[str], list[int], list[list[float]]]:
        """Module names, layer indices, and a row of errors for each layer; NaN where a matrix stayed dense."""
        errors = [entry for entry in self.errors if entry.stack == stack]
        modules = list(dict.fromkeys(entry.module for entry in errors))
        layers = sorted({entry.layer for entry in errors})
        values = {(entry.layer, entry.module): entry.error for entry in errors}
        return modules, layers, [[values.get((layer, m), float("nan")) for m in modules] for layer in layers]

    @property
    def stacks(self) -> list[str]:
        """The stacks that have errors, "encoder" and "decoder"."""
        return list(dict.fromkeys(entry.stack for entry in self.errors))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"mean_error": self.mean_error}

    def __str__(self) -> str:
        lines = [
            f"relative error of the {self.measured_on} ({self.start} start), mean {self.mean_error:.4f}",
        ]
        for stack in self.stacks:
            modules, layers, rows = self.table(stack)
            width = max(len(m) for m in modules) + 2
            lines.append(f"{stack:<7}" + "".join(f"{m:>{width}}" for m in modules))
            lines += [
                f"{layer:>7}" + "".join(f"{v:>{width}.4f}" for v in row) for layer, row in zip(layers, rows)
            ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draws the errors by layer and module as a heat-map with a logarithmic scale, into an image file.

        Args:
            path: the file; its suffix gives the format, such as `.png`.
        """
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        tables = {stack: self.table(stack) for stack in self.stacks}
        seen = [value for _, _, rows in tables.values() for row in rows for value in row if value > 0]
        norm = LogNorm(max(min(seen, default=1e-6), 1e-6), max(max(seen, default=1.0), 1e-5))
        width = sum(1.2 * len(modules) + 1 for modules, _, _ in tables.values()) + 1
        height = max(0.45 * len(layers) for _, layers, _ in tables.values()) + 1.8
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(
            1, len(tables), squeeze=False, width_ratios=[len(modules) for modules, _, _ in tables.values()]
        )
        for axes, (stack, (modules, layers, rows)) in zip(grid[0], tables.items()):
            image = axes.imshow(rows, norm=norm, aspect="auto", cmap="viridis_r")
            axes.set_xticks(range(len(modules)), modules, rotation=30 if len(tables) > 1 else 0)
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            axes.set_ylabel(f"{stack} layer")
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    if not math.isnan(value):
                        color = "white" if value > 0 and norm(value) > 0.5 else "black"
                        axes.text(x, y, f"{value:.3f}", ha="center", va="center", color=color)
        figure.suptitle(f"relative error of the {self.measured_on}, {self.start} start")
        figure.colorbar(image, ax=grid[0])
        figure.savefig(path, dpi=120)
