"""Step 4: the closed forms that give `U`, `B A` and `D` of a group of layers from their weights and two metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..layers import ResidualLinear
from ..quantization import BLOCK, SCALE_BITS, SWEEPS, Quantized, quantize
from .statistics import damp, parallel_sum

ITERATIONS = 30
ROUNDING_DAMPING = 1e-2  # of the mean variance of the inputs


@dataclass
class Components:
    """The components of one layer's matrix.

    Args:
        shared: `U` of the group, (out_features, in_features); None where there is none.
        residual_B: `B`, (out_features, rank).
        residual_A: `A`, (rank, in_features).
        diagonal: the entries of `D`, (min(out_features, in_features),), or None.
        quantized: the integers and scales that give a quantised `U`.
    """

    shared: Tensor | None
    residual_B: Tensor
    residual_A: Tensor
    diagonal: Tensor | None
    quantized: Quantized | None = None

    def weight(self) -> Tensor:
        """`U + B A + D`, (out, in)."""
        weight = self.residual_B @ self.residual_A
        if self.shared is not None:
            weight = weight + self.shared
        if self.diagonal is not None:
            weight.diagonal().add_(self.diagonal)
        return weight

    def write(self, linear: ResidualLinear) -> None:
        """Copies each component into the parameter that `linear`, or for `U` its group, has for it."""
        shared: Any = linear.shared
        if self.quantized is not None:
            shared.write(self.quantized)
        for owner, name, value in (
            (shared, "weight", self.shared if self.quantized is None else None),
            (linear, "residual_A", self.residual_A),
            (linear, "residual_B", self.residual_B),
            (linear, "diagonal", self.diagonal),
        ):
            parameter = getattr(owner, name, None)
            if parameter is not None and value is not None:
                parameter.copy_(value)

    def balance(self) -> None:
        """Gives each column of `B` the norm of its row of `A`, so that one learning rate suits both."""
        of_A, of_B = self.residual_A.norm(dim=1), self.residual_B.norm(dim=0)
        scale = torch.where((of_A > 0) & (of_B > 0), (of_A / of_B).sqrt(), torch.ones_like(of_A))
        self.residual_B, self.residual_A = self.residual_B * scale, self.residual_A / scale[:, None]


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (out, rank), (rank, in) of the nearest matrix of that rank, by the eigenvectors of the smaller
    Gram matrix, which is many times faster than an SVD.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, left = truncate(matrix.T, rank)
        return left.T, right.T
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    return matrix @ vectors, vectors.T


def fit_group(
    weights: list[Tensor],
    covariances: list[Tensor] | None,
    ranks: list[int],
    *,
    importance: Tensor | None = None,
    diagonal: bool = False,
    shared: bool = True,
    bits: int | None = None,
    block_size: int = BLOCK,
    scale_bits: int = SCALE_BITS[0],
    rotation: int = 1,
    iterations: int = ITERATIONS,
) -> list[Components]:
    """Minimises `sum_l tr(G E_l C_l E_lᵀ)`, `E_l = W_l - U - B_l A_l - D_l`, by alternating closed forms.

    With `C_l = S_l S_lᵀ` and `G = Rᵀ R`: the best `B_l A_l` is the truncated SVD of `R (W_l - U - D_l) S_l`, with
    `R⁻¹` from the left and `S_l⁻¹` from the right; the best `U` solves `U ΣC_l = Σ(W_l - B_l A_l - D_l) C_l`; the
    diagonal `d` of the best `D_l` solves `(G ∘ C_l) d = diag(G E C_l)`, `E` being what the others leave. Two layers
    start from the minimum that `_fit_pair` knows.

    Args:
        weights: `W_l`, each (out, in), float64 for full precision.
        covariances: `C_l`, each (in, in) and positive definite; None for identities, for which the first
            round is the mean and the truncated SVD.
        ranks: R of each layer.
        importance: `G`, (out, out), positive definite, the group's; None for the identity.
        diagonal: whether there are `D_l`.
        shared: whether there is a `U`; without one, every layer is fitted on its own.
        bits: the number of bits that `U` is rounded to; the other components are then fitted again. None leaves `U` as
            it is.
        block_size: the number of weights of a rounded `U` that have one scale.
        scale_bits: the number of bits of each such scale, 16 or 8.
        rotation: how many columns of a rounded `U` are rotated together.
        iterations: rounds after the first.
    """
    out_features, in_features = weights[0].shape
    size = min(out_features, in_features)
    identity = torch.eye(in_features, dtype=weights[0].dtype, device=weights[0].device)
    C = covariances or [identity] * len(weights)
    # Roots are taken only of what a low rank, or a `U` of several layers, is fitted with.
    roots = [torch.linalg.cholesky(c) if covariances and rank else c for c, rank in zip(C, ranks)]
    alone = len(weights) == 1
    total = C[0] if alone else torch.stack(C).sum(0)
    total_root = total if alone else torch.linalg.cholesky(total)
    G = torch.eye(out_features, dtype=weights[0].dtype, device=weights[0].device)
    G = G if importance is None else importance
    R = torch.linalg.cholesky(G).T if any(ranks) else G
    shape = (out_features - size, in_features - size)

    def embed(values: Tensor | None) -> Tensor | float:
        return 0.0 if values is None else functional.pad(torch.diag(values), (0, shape[1], 0, shape[0]))

    fits = [
        Components(None, w.new_zeros(out_features, r), w.new_zeros(r, in_features), None)
        for w, r in zip(weights, ranks)
    ]
    if shared and covariances and len(weights) == 2:
        for fit, factors in zip(fits, _fit_pair(weights, C, ranks, R)):
            fit.residual_B, fit.residual_A = factors
    if (shared and alone) or (not diagonal and (not shared or len(weights) == 2)):
        iterations = 0  # the first round is the minimum
    rounding = bits is not None and shared
    U = weights[0]  # all that there is to fit where it is alone
    for round_idx in range(int(alone and rounding), iterations + 1 + rounding):
        quantized = None
        if shared and not alone and round_idx <= iterations:
            rest = [
                (w - f.residual_B @ f.residual_A - embed(f.diagonal)) @ c for w, f, c in zip(weights, fits, C)
            ]
            U = torch.cholesky_solve(torch.stack(rest).sum(0).T, total_root).T
        elif bits is not None and round_idx > iterations:
            quantized = quantize_for(U, total, bits, block_size, scale_bits=scale_bits, rotation=rotation)
            U = quantized.weight()
        for w, fit, c, root in zip(weights, fits, C, roots):
            fit.shared, fit.quantized = U if shared else None, quantized
            own = w - U if shared else w
            fit.residual_B, fit.residual_A = _truncate_between(
                R, own - embed(fit.diagonal), root, len(fit.residual_A)
            )
            if diagonal:
                wanted = (G @ (own - fit.residual_B @ fit.residual_A) @ c).diagonal()[:size]
                fit.diagonal = torch.linalg.solve((G[:size, :size] * c[:size, :size]), wanted)
    for fit in fits:
        fit.balance()
    return fits


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Inside, a factorisation that fails is a ValueError that names the matrix."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the weights of {path}, or what it reads, are of sizes too different to be factorised; scale them, or "
            f"leave it dense ({error})"
        ) from error


def quantize_for(
    shared: Tensor,
    covariance: Tensor,
    bits: int,
    block_size: int = BLOCK,
    sweeps: int = SWEEPS,
    scale_bits: int = SCALE_BITS[0],
    rotation: int = 1,
) -> Quantized:
    """A `U` in few bits, for inputs of that covariance, which need not be damped."""
    damped = damp(covariance, ROUNDING_DAMPING)
    return quantize(shared, damped, bits, block_size, sweeps, scale_bits, rotation)


def _truncate_between(left: Tensor, matrix: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the `X` of that rank for which `left X right` is nearest to `left matrix right`; `left` is
    upper triangular, `right` lower.
    """
    if not rank:
        return matrix.new_zeros(len(matrix), 0), matrix.new_zeros(0, matrix.shape[1])
    residual_B, residual_A = truncate(left @ matrix @ right, rank)
    return (
        torch.linalg.solve_triangular(left, residual_B, upper=True),
        torch.linalg.solve_triangular(right, residual_A, upper=False, left=False),
    )


def _fit_pair(
    weights: list[Tensor], covariances: list[Tensor], ranks: list[int], R: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The best `B_l A_l` of a group of two layers without diagonals, in one step.

    With the best `U` put in, the error depends on `L = B_1 A_1 - B_2 A_2` alone, of rank R_1 + R_2, and is
    `tr(G (W_1 - W_2 - L) P (W_1 - W_2 - L)ᵀ)` with the parallel sum `P = (C_1⁻¹ + C_2⁻¹)⁻¹`.
    """
    root = torch.linalg.cholesky(parallel_sum(*covariances))
    rank = min(sum(ranks), *weights[0].shape)
    residual_B, residual_A = _truncate_between(R, weights[0] - weights[1], root, rank)
    factors = []
    for sign, start, r in ((1, 0, ranks[0]), (-1, ranks[0], ranks[1])):
        B, A = sign * residual_B[:, start : start + r], residual_A[start : start + r]
        missing = r - len(A)
        factors.append((functional.pad(B, (0, missing)), functional.pad(A, (0, 0, 0, missing))))
    return factors
