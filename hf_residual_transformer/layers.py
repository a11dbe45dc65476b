"""The layer: `W_l = U_g + B_l A_l + D_l` (Wang & Li 2024, section 2, https://arxiv.org/abs/2310.02489).

`SharedLinear` holds the weight that a group of layers shares, `QuantizedSharedLinear` holds it in few bits, and
`ResidualLinear` holds the components that belong to one layer. `QuantizedEmbedding` holds the vectors of tokens in few
bits, `MixedEmbedding` holds those of some tokens in more bits than those of others, and `TiedOutput` computes logits
with either. `ChannelsFirst` gives a Conformer's point-wise convolutions the same forms. `modeling.py` puts them into a
model.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .kernels import KernelWeight, is_fast, kernel_weight
from .quantization import (
    BITS,
    BLOCK,
    LEVELS,
    SCALE_BITS,
    Quantized,
    dequantize,
    levels_of,
    lowest,
    rotate,
    rotation_of,
)


class SharedLinear(nn.Linear):
    """`U_g` of shape (out_features, in_features), and the bias if the group shares one.

    It is called as a module, with the components of one layer, and never read from outside in a forward
    pass: FSDP gathers a unit's parameters, and PEFT wraps them, only around a call.
    """

    bits: int | None = None  # not quantised
    rotation = 1  # none

    def forward(
        self,
        hidden_states: Tensor,
        residual_A: Tensor | None = None,
        residual_B: Tensor | None = None,
        diagonal: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Product of `hidden_states` (..., in_features) with the weight of one layer, (..., out_features).

        For many frames the weight is composed first, one rank-R update of a matrix; for so few that thin products
        take fewer multiplications, and in `torch.export`, where composing would be folded into a constant of the
        dense size, these are added to the product with `U`. docs/LOG.md has the measurements. They are also added
        where torchao keeps `U` in few bits, since its tensors multiply and do nothing else.
        """
        bias = self.bias if bias is None else bias
        rows = math.prod(hidden_states.shape[:-1])
        few = rows * (self.out_features + self.in_features) < self.out_features * self.in_features
        if torch.compiler.is_exporting() or few:
            return self._factored(hidden_states, bias, residual_A, residual_B, diagonal)
        stored, scale = self.stored()
        if is_of_torchao(stored):
            return self._factored(hidden_states, bias, residual_A, residual_B, diagonal)
        if scale is None and residual_A is None and diagonal is None:
            return F.linear(hidden_states, stored, bias)
        output: Tensor = _ComposedLinear.apply(
            hidden_states, bias, stored, scale, self.rotation, residual_A, residual_B, diagonal
        )
        return output

    def _factored(
        self,
        hidden_states: Tensor,
        bias: Tensor | None,
        residual_A: Tensor | None,
        residual_B: Tensor | None,
        diagonal: Tensor | None,
    ) -> Tensor:
        """`U x + B (A x) + D x + bias`, added up in place. Casts are for autocast, which does not see this."""
        rows = hidden_states.flatten(0, -2)
        output = self._product(rows, bias)
        if residual_A is not None and residual_B is not None:
            output.addmm_(F.linear(rows, residual_A), residual_B.T.to(output.dtype))
        if diagonal is not None:
            _add_diagonal(output, rows, diagonal)
        return output.unflatten(0, hidden_states.shape[:-1])

    def _product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """`U x + bias` for a few rows, (num_rows, in_features) to (num_rows, out_features)."""
        return F.linear(rows, self.weight, bias)

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """The tensors that hold `U`: the weight and None, or where it is quantised, `packed` and `scale`."""
        return self.weight, None


class QuantizedWeight(nn.Module):
    """A matrix that is kept in few bits (`quantization.py`).

    Training moves the scales and leaves the whole numbers, as in PEQA (https://arxiv.org/abs/2305.14152, section 3).
    Where the scales of blocks have 8 bits, they are whole numbers, too: `weight_levels`, in parts of the row's
    `weight_scale`. Training then moves the scale of each row, and with it those of its blocks in proportion.
    It is not an `nn.Linear`, so that adapters which would be merged into its weight are refused.

    Args:
        in_features: number of columns, a multiple of `block_size`.
        out_features: number of rows.
        device: of its tensors.
        dtype: of `weight_scale`, and so of the dequantised weight. float16 holds the scales that `quantize` finds
            exactly.
        bits: of each weight, from 2 to 8.
        block_size: the number of weights in a row that have one scale.
        scale_bits: of each such scale: 16, a float in the dtype, or 8, an integer beside the scale of the row.
        rotation: how many columns are rotated together, as in `quantize`.
    """

    weight_packed: Tensor
    weight_levels: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device,
        dtype: torch.dtype,
        bits: int = BITS,
        block_size: int = BLOCK,
        scale_bits: int = SCALE_BITS[0],
        rotation: int = 1,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rotation = rotation_of(in_features, rotation)
        self.bits, self.block_size, self.scale_bits = bits, block_size, scale_bits
        shape = (out_features, in_features * bits // 8)
        self.register_buffer("weight_packed", torch.empty(shape, device=device, dtype=torch.uint8))
        shape = (out_features, in_features // block_size)
        levels = torch.empty(shape, device=device, dtype=torch.int8) if scale_bits == 8 else None
        self.register_buffer("weight_levels", levels)
        shape = shape if levels is None else (out_features, 1)
        self.weight_scale = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._unpacked: Tensor | None = None  # see `unpacked_weights`
        self._num_users = 0  # of the unpacked matrix
        self._kernel: tuple[KernelWeight | None, list[Any]] = (None, [])  # see `kernel`

    @property
    def is_offloaded(self) -> bool:
        """Whether Accelerate keeps the weights elsewhere until the module is called."""
        return self.weight_scale.is_meta

    @property
    def weight(self) -> Tensor:
        """The matrix, (out_features, in_features), computed at each access unless it is unpacked."""
        unpacked = self._unpacked  # read once, since another thread may change it
        return self.dequantized() if unpacked is None else unpacked

    def dequantized(self) -> Tensor:
        """The matrix, (out_features, in_features), computed from the integers and scales."""
        return rotate(dequantize(self.weight_packed, self.scale(), self.bits), self.rotation)

    @property
    def rounding(self) -> dict[str, int]:
        """The arguments of `quantization.quantize` that give integers and scales in this form."""
        return {
            "bits": self.bits,
            "block_size": self.block_size,
            "scale_bits": self.scale_bits,
            "rotation": self.rotation,
        }

    def scale(self, rows: Tensor | None = None) -> Tensor:
        """The scale of each block in the dtype of `weight_scale`, (out_features, num_blocks), or those of some rows.

        Gradients reach `weight_scale`.
        """
        scale: Tensor = self.weight_scale if rows is None else self.weight_scale[rows]
        if self.weight_levels is None:
            return scale
        levels = self.weight_levels if rows is None else self.weight_levels[rows]
        return (levels.float() / LEVELS * scale).to(scale.dtype)

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """`packed` and `scale`, or the matrix and None while it is unpacked."""
        unpacked = self._unpacked
        return (self.weight_packed, self.scale()) if unpacked is None else (unpacked, None)

    def kernel(self) -> KernelWeight | None:
        """The matrix, still rotated, in the form of a kernel, which takes memory of its own; None where it has none.

        It is made again where the tensors have changed since.
        """
        kernel, known = self._kernel
        big = [t.detach() for t in (self.weight_packed, self.weight_levels) if t is not None]
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in big]
        # Steps of a training change the scales alone, and not always in a way that moves their version.
        if not known or versions != known[1] or not torch.equal(known[2], self.weight_scale):
            kernel = kernel_weight(self.weight_packed, self.scale(), self.bits)
            # As long as their tensors are kept here, no others can have the same place in memory.
            self._kernel = kernel, [big, versions, self.weight_scale.detach().clone()]
        return kernel

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Where the module is moved or gets another dtype, the kernel's form is not kept."""
        self._kernel = (None, [])
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def write(self, quantized: Quantized) -> None:
        """Copies a quantised matrix of the same shape and form into the tensors."""
        assert quantized.rotation == self.rotation
        self.weight_packed.copy_(quantized.packed)
        if self.weight_levels is None:
            self.weight_scale.copy_(quantized.scale)
            return
        assert quantized.row_scale is not None
        self.weight_levels.copy_(levels_of(quantized.scale, quantized.row_scale))
        self.weight_scale.copy_(quantized.row_scale)

    def reset_parameters(self) -> None:
        """Random numbers of about the size that `nn.Linear` begins with; loaded ones are left alone."""
        init.copy_(self.weight_packed, torch.randint_like(self.weight_packed, 256))
        init.constant_(self.weight_scale, self.in_features**-0.5 / -lowest(self.bits))
        if self.weight_levels is not None:
            init.copy_(self.weight_levels, torch.randint_like(self.weight_levels, LEVELS // 2, LEVELS))

    def extra_repr(self) -> str:
        """Shape for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"block_size={self.block_size}, scale_bits={self.scale_bits}, rotation={self.rotation}"
        )


class QuantizedSharedLinear(QuantizedWeight):
    """A `SharedLinear` whose `U` is kept in few bits.

    Args:
        in_features: a multiple of `block_size`.
        out_features: any number.
        bias: whether the group shares one.
        options: further arguments of `QuantizedWeight`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, *options: Any) -> None:
        super().__init__(in_features, out_features, *options)
        scale = self.weight_scale
        self.bias = nn.Parameter(scale.new_empty(out_features)) if bias else None

    forward = SharedLinear.forward
    _factored = SharedLinear._factored

    def _product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        unpacked = self._unpacked
        if unpacked is not None:
            return F.linear(rows, unpacked, bias)
        rows = rotate(rows, self.rotation)  # sooner than the matrix
        kernel = self.kernel() if is_fast(rows) else None
        if kernel is None:
            return F.linear(rows, _numbers(self.weight_packed, self.scale(), self.in_features), bias)
        output = kernel.product(rows)
        return output if bias is None else output.add_(bias)

    def reset_parameters(self) -> None:
        """As in `QuantizedWeight`, with a bias of zeros."""
        super().reset_parameters()
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Shape for `print(model)`."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class QuantizedEmbedding(QuantizedWeight):
    """A table of token vectors in few bits, (num_tokens, hidden_size), used for look-up and for logits.

    What all vectors have in common, `weight_mean` of shape (hidden_size,), is kept apart, so that the few bits hold how
    tokens differ. It adds the same number to the logits of all tokens of the table.

    Args:
        dense: the embedding that it takes the place of.
        bits: of each weight, from 2 to 8.
        block_size: the number of weights that have one scale.
        scale_bits: of each such scale, 16 or 8.
        num_embeddings: rows, where it takes the place of some of those of `dense`; by default all.
    """

    def __init__(
        self,
        dense: nn.Embedding,
        bits: int,
        block_size: int = BLOCK,
        scale_bits: int = SCALE_BITS[0],
        num_embeddings: int | None = None,
    ) -> None:
        weight = dense.weight
        self.num_embeddings = dense.num_embeddings if num_embeddings is None else num_embeddings
        super().__init__(
            dense.embedding_dim,
            self.num_embeddings,
            weight.device,
            weight.dtype,
            bits,
            block_size,
            scale_bits,
        )
        self.embedding_dim, self.padding_idx = dense.embedding_dim, dense.padding_idx
        self.weight_mean = nn.Parameter(self.weight_scale.new_zeros(dense.embedding_dim))

    def dequantized(self) -> Tensor:
        """The matrix, (num_tokens, hidden_size), with the mean."""
        return super().dequantized() + self.weight_mean

    def reset_parameters(self) -> None:
        """As in `QuantizedWeight`, with a mean of zeros."""
        super().reset_parameters()
        init.zeros_(self.weight_mean)

    @property
    def ranges(self) -> list[tuple[int, QuantizedEmbedding]]:
        """As in `MixedEmbedding`, with one range that has all tokens."""
        return [(0, self)]

    def forward(self, inputs: Tensor, as_output: bool = False) -> Tensor:
        """Token ids of any shape to vectors, (..., hidden_size). Only the rows of these tokens are dequantised.

        With `as_output`, the `logits` of states.
        """
        if as_output:
            return self._logits(inputs)
        ids = inputs.flatten()
        rows = dequantize(self.weight_packed[ids], self.scale(ids), self.bits)
        return (rows + self.weight_mean).unflatten(0, inputs.shape)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to one logit for each token, (..., num_tokens).

        Only where the weights are elsewhere is it a call of the module, since Accelerate's hooks bring them then. Other
        hooks of an input embedding, such as for noise or gradients, are not for logits.
        """
        if self.is_offloaded:
            found: Tensor = self(hidden_states, as_output=True)
            return found
        return self._logits(hidden_states)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.flatten(0, -2)
        kernel = self.kernel() if self._unpacked is None and is_fast(rows) else None
        if kernel is not None:
            output = kernel.product(rows).unflatten(0, hidden_states.shape[:-1])
        else:
            stored, scale = self.stored()
            output = _ComposedLinear.apply(hidden_states, None, stored, scale, 1, None, None, None)
            if scale is None:  # unpacked, with the mean
                return output
        # Not a product with a matrix of one row, whose sums depend on where the tensors lie in memory.
        of_mean = (hidden_states * self.weight_mean).sum(-1, keepdim=True)
        return output + of_mean.to(output.dtype)


class MixedEmbedding(nn.Module):
    """A table of token vectors in which ranges of tokens have numbers of bits of their own.

    Tokenizers give low ids to frequent tokens, whose vectors are worth more bits.

    Args:
        dense: the embedding that it takes the place of.
        ranges: for each range of token ids, in order, the id at which it ends, exclusive, and its bits.
        block_size: the number of weights that have one scale.
        scale_bits: of each such scale, 16 or 8.
    """

    def __init__(
        self,
        dense: nn.Embedding,
        ranges: Sequence[Sequence[int]],
        block_size: int = BLOCK,
        scale_bits: int = SCALE_BITS[0],
    ) -> None:
        super().__init__()
        ends = [end for end, _ in ranges]
        self.starts = [0, *ends[:-1]]
        self.parts = nn.ModuleList(
            QuantizedEmbedding(dense, bits, block_size, scale_bits, end - start)
            for start, (end, bits) in zip(self.starts, ranges)
        )
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.padding_idx = dense.padding_idx

    @property
    def ranges(self) -> list[tuple[int, QuantizedEmbedding]]:
        """The first token of each range, with the vectors of its tokens."""
        return list(zip(self.starts, self.parts))  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The matrix, (num_tokens, hidden_size), computed at each access."""
        return torch.cat([part.weight for _, part in self.ranges])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids of any shape to vectors, (..., hidden_size)."""
        found: Tensor | None = None
        for start, part in self.ranges:
            # Every range looks up every token, so that no shape depends on the ids.
            rows = part((input_ids - start).clamp(0, part.num_embeddings - 1))
            found = rows if found is None else torch.where((input_ids >= start).unsqueeze(-1), rows, found)
        assert found is not None
        return found

    def logits(self, hidden_states: Tensor) -> Tensor:
        """As in `QuantizedEmbedding`."""
        return torch.cat([part.logits(hidden_states) for _, part in self.ranges], -1)


class TiedOutput(nn.Module):
    """The output projection that is tied to an embedding in few bits, and has no weights of its own.

    Args:
        model: the model that owns the embedding; it is looked up at each call, and not registered here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_model"] = model

    def __deepcopy__(self, memo: dict[int, Any]) -> TiedOutput:
        """With a copy of the model, the output of that copy.

        Raises:
            ValueError: for a copy without the model, as PEFT makes one to train it.
        """
        owner = self.__dict__["_model"]
        if id(owner) not in memo:
            raise ValueError(NOTHING_TO_COPY)
        copied = memo[id(self)] = TiedOutput.__new__(TiedOutput)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def weight(self) -> Tensor:
        """The embedding's matrix, (num_tokens, hidden_size), computed at each access."""
        weight: Tensor = self.__dict__["_model"].get_input_embeddings().weight
        return weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to logits, (..., num_tokens)."""
        logits: Tensor = self.__dict__["_model"].get_input_embeddings().logits(hidden_states)
        return logits


_unpacking = threading.Lock()


@contextmanager
def unpacked_weights(model: nn.Module) -> Iterator[None]:
    """Inside this context, all matrices of few bits that `model` uses are also there in full, for many calls.

    They take the memory of a dense model meanwhile. Offloaded ones stay as they are. Gradients do not reach the scales.
    Several threads may be inside: the first unpacks a matrix, and the last to leave takes it away.
    """
    used = [
        getattr(module, "shared", None) for module in model.modules() if isinstance(module, ResidualLinear)
    ]
    packed = [
        module
        for module in (*model.modules(), *used)
        if isinstance(module, QuantizedWeight) and not module.is_offloaded
    ]
    held = []
    try:
        with _unpacking, torch.no_grad():
            for module in packed:
                if not module._num_users:
                    module._unpacked = module.dequantized()
                module._num_users += 1
                held.append(module)
        yield
    finally:
        with _unpacking:
            for module in held:
                module._num_users -= 1
                if not module._num_users:
                    module._unpacked = None


NOTHING_TO_COPY = (
    "the output of a token table in few bits has no weights of its own to copy or to train; leave it out of "
    "`modules_to_save`, name the table instead, or compress with parts=('encoder', 'decoder')"
)
SHARED = (SharedLinear, QuantizedSharedLinear)
# Names of version 0.1.0, which PEFT and transformers take for those of an adapter.
OLD_NAMES = {"lora_A": "residual_A", "lora_B": "residual_B"}


def quantized_weights(module: nn.Module, scales: bool = False) -> Counter[int]:
    """Number of weights that `module` holds in few bits, by these bits. For torch, they are no parameters.

    Args:
        module: any module.
        scales: whether scales that are integers of 8 bits count, too.
    """
    found: Counter[int] = Counter()
    for part in module.modules():
        if isinstance(part, QuantizedWeight):
            found[part.bits] += part.out_features * part.in_features
            if scales and part.weight_levels is not None:
                found[8] += part.weight_levels.numel()
    return found


def is_of_torchao(weight: Tensor) -> bool:
    """Whether `torchao.quantization.quantize_` has put its own tensor in the place of a weight."""
    plain = type(weight) in (Tensor, nn.Parameter)  # `torch.compile` follows this, but not the rest
    return not plain and type(weight).__module__.startswith("torchao.")


def _add_diagonal(output: Tensor, rows: Tensor, diagonal: Tensor) -> None:
    """Adds `D x` to `output`, (num_rows, out_features), for `rows`, (num_rows, in_features)."""
    size = len(diagonal)
    output[:, :size].addcmul_(rows[:, :size].to(output.dtype), diagonal.to(output.dtype))


class _ComposedLinear(torch.autograd.Function):
    """`F.linear` with `U + B A + D`, which the backward pass composes again.

    Kept for every layer, the composed matrices would take the memory of a dense model's weights. Only the inputs and
    the parameters are kept, as in a dense layer. `stored`, `scale` and `rotation` give `U`, and `compose` adds the
    `components`.
    """

    @staticmethod
    def forward(
        hidden_states: Tensor,
        bias: Tensor | None,
        stored: Tensor,
        scale: Tensor | None,
        rotation: int,
        *components: Any,
    ) -> Tensor:
        weight = compose(_full(stored, scale, rotation, hidden_states.shape[-1]), *components)
        return F.linear(hidden_states, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden_states, _, stored, scale, ctx.rotation, *components = inputs
        # Under autocast, a dense layer too keeps its inputs in the dtype that it computes in.
        ctx.save_for_backward(hidden_states.to(output.dtype), stored, scale, *components)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, stored, scale, residual_A, residual_B, diagonal = ctx.saved_tensors
        of_input, of_bias, of_shared, of_scale, of_A, of_B, of_diagonal = [None] * 7
        if ctx.needs_input_grad[0]:
            shared = _full(stored, scale, ctx.rotation, hidden_states.shape[-1])
            weight = compose(shared, residual_A, residual_B, diagonal)
            of_input = grad @ weight.to(grad.dtype)
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            of_bias = rows.sum(0)
        if any(ctx.needs_input_grad[2:]):
            dtype = stored.dtype if scale is None else scale.dtype
            of_shared = (rows.T @ hidden_states.flatten(0, -2)).to(dtype)
            if residual_A is not None:
                of_A, of_B = residual_B.T @ of_shared, of_shared @ residual_A.T
            if diagonal is not None:
                of_diagonal = of_shared.diagonal()
            if ctx.needs_input_grad[3]:
                numbers = _numbers(stored, torch.ones_like(scale), hidden_states.shape[-1])
                products = rotate(of_shared, ctx.rotation) * numbers
                of_scale = products.unflatten(1, (scale.shape[1], -1)).sum(2)
        of_shared = of_shared if ctx.needs_input_grad[2] else None
        return of_input, of_bias, of_shared, of_scale, None, of_A, of_B, of_diagonal


def _full(stored: Tensor, scale: Tensor | None, rotation: int, in_features: int) -> Tensor:
    """`U` from the tensors that hold it, see `SharedLinear.stored`."""
    return stored if scale is None else rotate(_numbers(stored, scale, in_features), rotation)


def _numbers(stored: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """A matrix in few bits, still rotated."""
    return dequantize(stored, scale, stored.shape[1] * 8 // in_features)


def compose(
    shared: Tensor,
    residual_A: Tensor | None = None,
    residual_B: Tensor | None = None,
    diagonal: Tensor | None = None,
) -> Tensor:
    """`U + B A + D`, of shape (out_features, in_features); components that are None are left out.

    Args:
        shared: `U`, (out_features, in_features).
        residual_A: `A`, (rank, in_features).
        residual_B: `B`, (out_features, rank).
        diagonal: the main diagonal of `D`, (min(out_features, in_features),).
    """
    weight = shared
    if residual_A is not None and residual_B is not None:
        weight = torch.addmm(weight, residual_B, residual_A)
    if diagonal is not None:
        if weight is shared:
            weight = weight.clone()
        weight.diagonal().add_(diagonal)
    return weight


class ResidualLinear(nn.Module):
    """One layer's linear map: its own `residual_A`, `residual_B`, diagonal and bias over a shared `U`.

    Args:
        shared: the `SharedLinear`s or `QuantizedSharedLinear`s of this role, one a group. Held without being
            registered, so that `U` has one place in `state_dict`, and looked up at each call, since loading, FSDP
            and PEFT replace modules and parameters.
        group_idx: which of them this layer uses.
        rank: R; 0 for no `B A`.
        diagonal: whether there is a `D`.
        bias: whether the layer has a bias of its own.
    """

    def __init__(self, shared: nn.ModuleList, group_idx: int, rank: int, diagonal: bool, bias: bool) -> None:
        super().__init__()
        self.__dict__["_shared"] = shared
        self.group_idx = group_idx
        self._create(self.shared.weight, rank, diagonal, bias)

    def _create(self, weight: Tensor, rank: int, diagonal: bool, bias: bool) -> None:
        """Uninitialised parameters for a matrix of the shape, dtype and device of `weight`."""
        out_features, in_features = weight.shape
        self.out_features = out_features
        self.in_features = in_features
        self.rank = rank

        def parameter(wanted: object, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(weight.new_empty(shape)) if wanted else None

        self.residual_A = parameter(rank, rank, in_features)
        self.residual_B = parameter(rank, out_features, rank)
        self.diagonal = parameter(diagonal, min(out_features, in_features))
        self._parameters["bias"] = parameter(bias, out_features)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in OLD_NAMES.items():
            if f"{prefix}{old}" in state_dict:
                state_dict[f"{prefix}{new}"] = state_dict.pop(f"{prefix}{old}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def join(self, first: Tensor, second: Tensor) -> None:
        """Adds `B A` to the layer, whose rank grows, to at most what the matrix can have.

        Args:
            first: `A`, (more ranks, in_features).
            second: `B`, (out_features, more ranks).
        """
        first, second = self.joined(first, second)
        weight = self.weight
        self.set_factors(first.to(weight), second.to(weight))

    def joined(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The factors that the layer has after `join`."""
        if self.residual_A is not None and self.residual_B is not None:
            first = torch.cat([self.residual_A, first.to(self.residual_A)])
            second = torch.cat([self.residual_B, second.to(self.residual_B)], 1)
        return shortened(first, second)

    @torch.no_grad()
    def cut(self, number: int) -> None:
        """Takes away the last `number` ranks, as `join` added them."""
        assert self.residual_A is not None and self.residual_B is not None
        self.set_factors(self.residual_A[: self.rank - number], self.residual_B[:, : self.rank - number])

    def set_factors(self, first: Tensor, second: Tensor) -> None:
        """Replaces `A` and `B`, whose number of ranks becomes that of the layer."""
        self.rank = len(first)
        trained = self.residual_A is not None and self.residual_A.requires_grad
        self.residual_A = nn.Parameter(first.clone(), requires_grad=trained) if self.rank else None
        self.residual_B = nn.Parameter(second.clone(), requires_grad=trained) if self.rank else None

    @property
    def weight(self) -> Tensor:
        """`U + B A + D` as one matrix, (out_features, in_features), computed at each access. Gradients reach the
        components. Some attentions, such as WavLM's, read it instead of calling the layer.
        """
        shared = self.shared.weight
        shared = shared.dequantize() if is_of_torchao(shared) else shared
        return compose(shared, self.residual_A, self.residual_B, self.diagonal)

    @property
    def own_bias(self) -> nn.Parameter | None:
        """The bias that belongs to this layer alone, (out_features,)."""
        return self._parameters["bias"]

    @property
    def bias(self) -> Tensor | None:
        """The bias that is added, (out_features,): the layer's own, or the group's."""
        own = self.own_bias
        return self.shared.bias if own is None and self.shared is not None else own

    @property
    def shared(self) -> SharedLinear | QuantizedSharedLinear:
        """The module with the `U` of the group."""
        return self.__dict__["_shared"][self.group_idx]

    def reset_parameters(self) -> None:
        """The start for training from scratch: every layer begins as its `U`, which has the dense class's
        own initialisation. `B`, `D` and biases are zero and `A` is uniform, as in LoRA (arXiv 2106.09685,
        section 4.1) and PEFT, so that gradients reach `B` at once. Loaded weights are left alone.
        """
        for zero in (self.residual_B, self.diagonal, self.own_bias):
            if zero is not None:
                init.zeros_(zero)
        if self.residual_A is not None:
            init.kaiming_uniform_(self.residual_A, a=5**0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.shared(hidden_states, self.residual_A, self.residual_B, self.diagonal, self.own_bias)

    def extra_repr(self) -> str:
        """Shape and group for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_idx={self.group_idx}, "
            f"rank={self.rank}, diagonal={self.diagonal is not None}"
        )


def shortened(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Factors `A` (rank, in_features) and `B` (out_features, rank) with the same product, whose rank is at most the
    least of `in_features` and `out_features`, as that of any matrix. They are as they were where it is.
    """
    most = min(first.shape[1], len(second))
    if len(first) <= most:
        return first, second
    u, s, v = torch.linalg.svd(at_least_float32(second) @ at_least_float32(first), full_matrices=False)
    root = s.sqrt()
    return (root[:, None] * v).to(first.dtype), (u * root).to(second.dtype)


class LowRankLinear(ResidualLinear):
    """`B_l A_l + D_l` alone, for roles that share nothing: low rank, as in LiteASR (arXiv 2502.20583).

    Args:
        weight: a matrix of the shape, dtype and device wanted.
        layer_idx: the layer it belongs to.
        rank: R, at least 1.
        diagonal: whether there is a `D`.
        bias: whether there is a bias.
    """

    residual_A: nn.Parameter
    residual_B: nn.Parameter

    def __init__(self, weight: Tensor, layer_idx: int, rank: int, diagonal: bool, bias: bool) -> None:
        nn.Module.__init__(self)
        self.group_idx = layer_idx
        self._create(weight, rank, diagonal, bias)

    @property
    def shared(self) -> None:  # type: ignore[override]
        """There is no `U`."""
        return None

    @property
    def weight(self) -> Tensor:
        """`B A + D` as one matrix, (out_features, in_features)."""
        return compose(self.residual_B @ self.residual_A, diagonal=self.diagonal)

    def reset_parameters(self) -> None:
        """From scratch, `B A` has the variance of LeCun's initialisation, 1 / in_features."""
        super().reset_parameters()
        init.normal_(self.residual_A, std=self.in_features**-0.5)
        init.normal_(self.residual_B, std=self.rank**-0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), by two thin products."""
        rows = hidden_states.flatten(0, -2)
        output = F.linear(F.linear(rows, self.residual_A), self.residual_B, self.own_bias)
        if self.diagonal is not None:
            _add_diagonal(output, rows, self.diagonal)
        return output.unflatten(0, hidden_states.shape[:-1])


class ChannelsFirst(nn.Module):
    """A linear map of each frame that stands where a point-wise convolution stood, (batch_size, features, seq_len)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch_size, in_features, seq_len) to (batch_size, out_features, seq_len)."""
        output: Tensor = super().forward(hidden_states.transpose(1, 2)).transpose(1, 2)  # type: ignore[misc]
        return output


class PointwiseLinear(ChannelsFirst, nn.Linear):
    """The linear map that a convolution of one frame is, on the same tensors.

    Args:
        convolution: an `nn.Conv1d` for which `is_linear` is true.
    """

    def __init__(self, convolution: nn.Conv1d) -> None:
        super().__init__(convolution.in_channels, convolution.out_channels, bias=False, device="meta")
        weight = convolution.weight
        self.weight = nn.Parameter(weight.detach().squeeze(-1), requires_grad=weight.requires_grad)
        self.register_parameter("bias", convolution.bias)  # type: ignore[arg-type]


class PointwiseResidual(ChannelsFirst, ResidualLinear):
    """A `ResidualLinear` in the place of a point-wise convolution."""


class PointwiseLowRank(ChannelsFirst, LowRankLinear):
    """A `LowRankLinear` in the place of a point-wise convolution."""


def at_least_float32(values: Tensor) -> Tensor:
    """Values in their own dtype, or in float32 if that is finer."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain `nn.Linear`, or a convolution that looks at one frame."""
    one = (1,)
    return type(module) is nn.Linear or (
        type(module) is nn.Conv1d
        and (module.kernel_size, module.stride, module.groups) == (one, one, 1)
        and module.padding == (0,)
    )


def as_linear(module: nn.Module) -> nn.Linear:
    """A plain `nn.Linear` as it is, or a point-wise convolution as one, with the same tensors."""
    return PointwiseLinear(module) if isinstance(module, nn.Conv1d) else module  # type: ignore[return-value]


def rows_last(module: nn.Module, states: Tensor) -> Tensor:
    """Inputs or outputs of a linear module with their features last, (..., features)."""
    return states.transpose(1, 2) if isinstance(module, (ChannelsFirst, nn.Conv1d)) else states
