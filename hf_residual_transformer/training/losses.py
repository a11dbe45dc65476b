"""The losses of distillation as plain modules: one for hidden states, and one for probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import at_least_float32


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


class HiddenStateLoss(nn.Module):
    r"""The squared error of hidden states in each layer, relative to the variance of the teacher's states.

    The error of a clip in a layer is `sum_t |s_t - h_t|^2 / sum_t |h_t - mean(h)|^2` over its frames `t`, where `s` are
    the student's states and `h` the teacher's. It is 0 if the states are equal, and 1 if the student gives the
    teacher's mean state. All layers therefore weigh equally, whatever their scale, and so do all clips, whatever their
    length; the loss of a batch is the mean over its clips. The variance is at least a thousandth of the energy of the
    teacher's states, so that a silent clip, whose frames are all alike, does not outweigh the others.

    Args:
        layer_weights: one number of at least 0 for each layer, not all 0. They are scaled to the sum 1. By default all
            layers weigh equally.

    Raises:
        ValueError: if `layer_weights` has other values.
    """

    ENERGY_FLOOR = 1e-3

    def __init__(self, layer_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if layer_weights is not None and not (all(map(is_number, layer_weights)) and sum(layer_weights) > 0):
            raise ValueError(
                f"`layer_weights` must be numbers of at least 0, and not all 0, got {list(layer_weights)!r}"
            )
        self.layer_weights = layer_weights

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar: the weighted mean over layers of the mean over clips.

        Args:
            student: the student's states in each layer, of shape (batch_size, seq_len, hidden_size).
            teacher: the teacher's states, of the same shapes.
            mask: true for the frames that count, of shape (batch_size, seq_len). By default all frames count.

        Raises:
            ValueError: if student and teacher differ in the number of layers or in shapes.
        """
        shapes, expected = ([tuple(states.shape) for states in layers] for layers in (student, teacher))
        if shapes != expected:
            raise ValueError(f"the student's states must have the teacher's shapes, {expected}, got {shapes}")
        weights = [1.0] * len(student) if self.layer_weights is None else self.layer_weights
        if len(weights) != len(student):
            raise ValueError(
                f"`layer_weights` must be one number for each of {len(student)} layers, got {weights}"
            )
        pairs = zip(student, teacher, strict=True)
        errors = torch.stack([self._relative_error(*pair, mask) for pair in pairs])
        scale = errors.new_tensor(weights) / sum(weights)
        return (scale @ errors).mean()

    def _relative_error(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """The error of each clip in one layer, of shape (batch_size,)."""
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        if mask is None:
            mask = student.new_ones(student.shape[:2])
        padding = ~mask.bool().unsqueeze(-1)
        student, teacher = student.masked_fill(padding, 0), teacher.masked_fill(padding, 0)
        num_frames = (~padding).sum(1, keepdim=True).clamp(min=1)
        mean = teacher.sum(1, keepdim=True) / num_frames
        variance = (teacher - mean).masked_fill(padding, 0).square().sum((1, 2))
        floor = self.ENERGY_FLOOR * teacher.square().sum((1, 2))
        return (student - teacher).square().sum((1, 2)) / variance.maximum(floor).clamp(min=1e-12)


class LogitsLoss(nn.Module):
    r"""`T^2 KL(teacher || student)` of the probabilities `softmax(logits / T)`.

    Source: Hinton et al. 2015, section 2 (https://arxiv.org/abs/1503.02531).

    Args:
        temperature: `T`. The factor `T^2` makes the size of the gradient about independent of it.
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a scalar: the mean over positions in nats, times `T^2`.

        Args:
            student: the student's logits, of shape (batch_size, seq_len, vocab_size).
            teacher: the teacher's logits, of the same shape.
            mask: true for the positions that count, such as `labels != -100`, of shape (batch_size, seq_len). By
                default all positions count.

        Raises:
            ValueError: if the shapes differ.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student's logits must have the teacher's shape, {tuple(teacher.shape)}, got "
                f"{tuple(student.shape)}"
            )
        if mask is not None:
            student, teacher = student[mask.bool()], teacher[mask.bool()]
        log_q = F.log_softmax(at_least_float32(student) / self.temperature, dim=-1)
        log_p = F.log_softmax(at_least_float32(teacher) / self.temperature, dim=-1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return self.temperature**2 * divergence.sum() / max(divergence.numel(), 1)
