"""Builds an ONNX graph from PyTorch modules, in which matrices in few bits stay in few bits.

`MatMulNBits` of ONNX Runtime multiplies with a matrix in blocks. Rows of an embedding are looked up in the same tensor
and unpacked by standard operators, so that an embedding that is tied to the output is stored once, and so is a `U` that
several layers share. Matrices in floating point are stored in 16 bits and cast when a runtime loads the file. Scales
in 8 bits are multiplied with those of the rows at that time, too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..layers import LowRankLinear, QuantizedWeight, ResidualLinear
from ..quantization import LEVELS, hadamard, lowest

OPSET = 17
CONTRIB = "com.microsoft"  # operators that ONNX Runtime has beside the standard ones
OPERATOR_BITS = (2, 4, 8)
FLOATS = {"float16": torch.float16, "float32": torch.float32}


class Graph:
    """An ONNX graph under construction. Values are known by their names, as in ONNX.

    Args:
        model: the model whose modules the graph is made of; its paths name the tensors.
        floats: how floating-point tensors are stored, "float16" or "float32". Products are computed in float32.
        accuracy_level: of `MatMulNBits`; 4 rounds activations to 8 bits in blocks, 0 leaves them in float32.
    """

    def __init__(self, model: nn.Module, floats: str, accuracy_level: int) -> None:
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.folded: list[Any] = []  # nodes that depend on stored tensors alone
        self.widened: Counter[tuple[int, int]] = (
            Counter()
        )  # matrices by their bits and by those of the operator
        self.floats, self.accuracy_level = FLOATS[floats], accuracy_level
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._counts: Counter[str] = Counter()
        self._rotated: dict[tuple[str, int], str] = {}  # by value and size of the rotation

    def input(self, name: str, dtype: int, shape: list[Any]) -> str:
        """Declares an input; a string in `shape` names a dimension that may vary."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: list[Any]) -> None:
        """Declares `value` as the float output `name`."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def add(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output, and returns the output's name."""
        name = self._unused(operator)
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def branch(self, condition: str, then: Any, otherwise: Any) -> list[str]:
        """Adds an `If`. `then` and `otherwise` add the nodes of one branch each, and return its outputs.

        Weights stay outside, so that both branches, and every other node, may use them.
        """
        outer, rotated, graphs = self.nodes, self._rotated, []
        for build in (then, otherwise):
            self.nodes, self._rotated = [], dict(rotated)  # what a branch computes is known nowhere else
            outputs = [helper.make_empty_tensor_value_info(value) for value in build()]
            graphs.append(helper.make_graph(self.nodes, self._unused("branch"), [], outputs))
        self.nodes, self._rotated = outer, rotated
        name = self._unused("If")
        names = [f"{name}_{index}" for index in range(len(graphs[0].output))]
        self.nodes.append(
            helper.make_node(
                "If", [condition], names, name=name, then_branch=graphs[0], else_branch=graphs[1]
            )
        )
        return names

    def integers(self, *values: int) -> str:
        """A constant vector of integers."""
        name = f"integers_{'_'.join(map(str, values))}"
        self.initializers[name] = numpy_helper.from_array(np.array(values, dtype=np.int64), name)
        return name

    def whole(self, value: int) -> str:
        """A constant integer."""
        name = f"whole_{value}"
        self.initializers[name] = numpy_helper.from_array(np.array(value, dtype=np.int64), name)
        return name

    def number(self, value: float) -> str:
        """A constant number in float32."""
        name = f"number_{value}"
        self.initializers[name] = numpy_helper.from_array(np.array(value, dtype=np.float32), name)
        return name

    def path(self, module: nn.Module) -> str:
        """The module's path in the model."""
        return self._paths[id(module)]

    def stored(self, name: str, tensor: Tensor) -> str:
        """A floating-point tensor in the dtype of the file."""
        if name not in self.initializers:
            if type(tensor) not in (Tensor, nn.Parameter):
                raise _no_operator(name, tensor)
            values = tensor.detach().cpu().to(self.floats)
            if not values.isfinite().all():  # numbers that float16 cannot hold
                values = tensor.detach().cpu().float()
            self.initializers[name] = numpy_helper.from_array(values.contiguous().numpy(), name)
        return name

    def tensor(self, name: str, tensor: Tensor) -> str:
        """The same in float32; runtimes cast it once, when they load the file."""
        if self.stored(name, tensor) and self.initializers[name].data_type == TensorProto.FLOAT:
            return name
        return self._cast(name)

    def _cast(self, name: str) -> str:
        """A stored tensor in float32."""
        return self._once("Cast", name, name=f"{name}:float32", to=TensorProto.FLOAT)

    def _once(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        """The output, `name`, of an operator that a runtime computes from stored tensors when it loads the file."""
        if all(name != node.output[0] for node in self.folded):
            self.folded.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def linear(self, module: Any, x: str) -> str:
        """The output of a linear module, dense or residual, for the value `x`, (..., in_features)."""
        path = self._known(module, nn.Linear, ResidualLinear, LowRankLinear)
        bias = module.bias
        shared: Any = module.shared if isinstance(module, ResidualLinear) else module
        if bias is not None:
            owner = path if module._parameters.get("bias") is not None else self.path(shared)
            bias = self.tensor(f"{owner}.bias", bias)
        result = None
        if isinstance(shared, QuantizedWeight):
            result, bias = self.product(shared, x, bias), None
        elif shared is not None:
            weight = self.tensor(f"{self.path(shared)}.weight", shared.weight.T)
            result = self.add("MatMul", x, weight)
        if isinstance(module, ResidualLinear):
            result = self._add_components(module, path, x, result)
        assert result is not None
        return result if bias is None else self.add("Add", result, bias)

    def _add_components(self, module: ResidualLinear, path: str, x: str, result: str | None) -> str | None:
        """`B (A x) + D x`, added to `result`, the product with `U`, where there is one."""
        if module.residual_A is not None and module.residual_B is not None:
            thin = self.add("MatMul", x, self.tensor(f"{path}.residual_A", module.residual_A.T))
            low_rank = self.add("MatMul", thin, self.tensor(f"{path}.residual_B", module.residual_B.T))
            result = low_rank if result is None else self.add("Add", result, low_rank)
        if module.diagonal is not None and result is not None:
            size, inputs = len(module.diagonal), x
            if size < module.in_features:
                ends = self.integers(0), self.integers(size), self.integers(-1)
                inputs = self.add("Slice", x, *ends)
            scaled = self.add("Mul", inputs, self.tensor(f"{path}.diagonal", module.diagonal))
            if size < module.out_features:
                scaled = self.add("Pad", scaled, self.integers(0, 0, 0, 0, 0, module.out_features - size))
            result = self.add("Add", result, scaled)
        return result

    def product(self, weight: QuantizedWeight, x: str, bias: str | None = None) -> str:
        """The product of `x` with a matrix in few bits, and its bias added."""
        packed, bits = self._packed(weight)
        x = self.rotated(x, weight.rotation)
        inputs = [x, packed, self._scale(weight), *([] if bias is None else ["", "", bias])]
        return self.add(
            "MatMulNBits",
            *inputs,
            domain=CONTRIB,
            K=weight.in_features,
            N=weight.out_features,
            bits=bits,
            block_size=weight.block_size,
            accuracy_level=self.accuracy_level,
        )

    def rows(self, weight: QuantizedWeight, ids: str) -> str:
        """Rows of a matrix in few bits: (batch_size, seq_len) to (batch_size, seq_len, in_features).

        `GatherBlockQuantized` would do the same, but ONNX Runtime Web lacks it on a CPU. The rows of a few tokens cost
        nothing.
        """
        packed, bits = self._packed(weight)
        found = self.add("Gather", packed, ids)  # (batch_size, seq_len, blocks, bytes of a block)
        parts = []
        for place in range(0, 8, bits):
            part = self._shifted(self._shifted(found, 8 - bits - place, "LEFT"), 8 - bits, "RIGHT")
            parts.append(self.add("Unsqueeze", part, self.integers(-1)))
        codes = self.add("Cast", self.add("Concat", *parts, axis=-1), to=TensorProto.FLOAT)
        codes = self.add("Reshape", codes, self.integers(0, 0, 0, weight.block_size))
        integers = self.add("Add", codes, self.number(float(lowest(bits))))
        scales = self.add("Unsqueeze", self.add("Gather", self._scale(weight), ids), self.integers(-1))
        scaled = self.add("Mul", integers, scales)
        return self.add("Reshape", scaled, self.integers(0, 0, weight.in_features))

    def rotated(self, x: str, size: int) -> str:
        """(batch_size, seq_len, features) with each `size` features rotated together, once for all of its products."""
        if size == 1:
            return x
        if (x, size) not in self._rotated:
            matrix = f"rotation_{size}"
            self.initializers[matrix] = numpy_helper.from_array(hadamard(size, torch.ones(1)).numpy(), matrix)
            parts = self.add("Reshape", x, self.integers(0, 0, -1, size))
            product = self.add("MatMul", parts, matrix)
            self._rotated[x, size] = self.add("Reshape", product, self.integers(0, 0, -1))
        return self._rotated[x, size]

    def _scale(self, weight: QuantizedWeight) -> str:
        """The scale of each block in float32, (out_features, blocks)."""
        path = self.path(weight)
        scale = self.tensor(f"{path}.weight_scale", weight.weight_scale)
        if weight.weight_levels is None:
            return scale
        levels = f"{path}.weight_levels"
        values = weight.weight_levels.cpu().numpy()
        self.initializers[levels] = numpy_helper.from_array(values, levels)
        unit = self._once("Mul", scale, self.number(1 / LEVELS), name=f"{path}.unit")
        return self._once("Mul", self._cast(levels), unit, name=f"{path}.scale")

    def _shifted(self, value: str, places: int, direction: str) -> str:
        """Bytes shifted by so many bits; what is shifted out is lost."""
        if not places:
            return value
        name = f"bits_{places}"
        self.initializers[name] = numpy_helper.from_array(np.array(places, dtype=np.uint8), name)
        return self.add("BitShift", value, name, direction=direction)

    def _packed(self, weight: QuantizedWeight) -> tuple[str, int]:
        """The packed integers, (out_features, blocks, bytes of a block), and their bits in the file."""
        bits = operator_bits(weight.bits)
        name = f"{self.path(weight)}.weight_packed"
        if name not in self.initializers:
            if bits != weight.bits:
                self.widened[weight.bits, bits] += 1
            packed = repacked(weight.stored()[0].cpu(), weight.bits, bits)
            blocks = packed.view(weight.out_features, weight.in_features // weight.block_size, -1)
            self.initializers[name] = numpy_helper.from_array(blocks.numpy(), name)
        return name, bits

    def layer_norm(self, module: nn.LayerNorm, x: str) -> str:
        """Layer normalisation over the last dimension."""
        path = self._known(module, nn.LayerNorm)
        weight = self.tensor(f"{path}.weight", module.weight)
        bias = self.tensor(f"{path}.bias", module.bias)
        return self.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=module.eps)

    def convolution(self, module: nn.Conv1d, x: str) -> str:
        """A convolution over (batch_size, in_channels, seq_len)."""
        path = self._known(module, nn.Conv1d)
        assert module.bias is not None and not isinstance(module.padding, str)
        weight, bias = self.tensor(f"{path}.weight", module.weight), self.tensor(f"{path}.bias", module.bias)
        (padding,) = module.padding
        return self.add(
            "Conv",
            x,
            weight,
            bias,
            kernel_shape=module.kernel_size,
            strides=module.stride,
            pads=[padding, padding],
        )

    def model(self, name: str) -> Any:
        """The finished ONNX model."""
        graph = helper.make_graph(
            self.folded + self.nodes, name, self.inputs, self.outputs, list(self.initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="hf-residual-transformer")
        model.ir_version = 8  # the first with this opset; make_model writes the newest
        return model

    def _known(self, module: nn.Module, *classes: type[nn.Module]) -> str:
        """The path of a module that must be of one of these classes; a subclass may compute something else."""
        if type(module) not in classes:
            raise _no_operator(self.path(module), module)
        return self.path(module)

    def _unused(self, name: str) -> str:
        self._counts[name] += 1
        return f"{name}_{self._counts[name] - 1}"


def _no_operator(path: str, found: Any) -> ValueError:
    kind = f"{type(found).__module__}.{type(found).__name__}"
    return ValueError(
        f"`model` must have plain or residual modules, got a {kind} at {path}, which no operator computes; "
        "merge an adapter (merge_and_unload() of PEFT), or export the model before another library changes it"
    )


def operator_bits(bits: int) -> int:
    """The fewest bits of the runtime's operators that hold integers of `bits` bits."""
    return next(width for width in OPERATOR_BITS if width >= bits)


def repacked(packed: Tensor, bits: int, wider: int) -> Tensor:
    """The same signed integers packed with `wider` bits each, (out_features, in_features * wider / 8).

    Integers are stored with an offset that makes them positive, which depends on the bits.
    """
    if bits == wider:
        return packed
    codes = np.unpackbits(packed.numpy(), axis=1, bitorder="little").reshape(len(packed), -1, bits)
    numbers = (codes << np.arange(bits, dtype=np.uint8)).sum(2, dtype=np.uint8)
    numbers = numbers + np.uint8(lowest(bits) - lowest(wider))
    wide = (numbers[..., None] >> np.arange(wider, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(wide.reshape(len(packed), -1), axis=1, bitorder="little"))


def save(model: Any, path: Any, most: int = 2**31 - 2**24) -> None:
    """Saves the model in one file, or with its weights in a second file, `<path>_data`, if it is over `most` bytes."""
    if model.ByteSize() > most:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data")
    else:
        onnx.save(model, path)
