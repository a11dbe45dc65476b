"""The rows of the grid of `paper.py`: encoders that share, and the dense and low-rank ones that are as small."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paper_models import without_weights

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.families import family_of
from hf_residual_transformer.training.scratch import EncoderSizes

BLOCK = ResidualConfig().block_size


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Args:
        title: of the row.
        residual: what the encoder shares; None for a dense one.
        sizes: sizes that differ from the scale's.
        four_bits: whether `U`, or each dense matrix, is also measured in four bits after training.
        divide_shared_rate: as in `GuardedTrainer`.
    """

    title: str
    residual: ResidualConfig | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    four_bits: bool = True
    divide_shared_rate: bool = False


def make_cells(sizes: EncoderSizes) -> dict[str, Cell]:
    """The rows by name. The controls have the parameters of K=3, R=2, as near as whole numbers allow. Each that shares
    has a twin, `...-divided`, whose shared matrices have a smaller learning rate.
    """
    paper = ResidualConfig.paper
    target = encoder_size(sizes, paper(3, 2))
    layers = max(1, round(sizes.encoder_layers / 3))
    widths = range(BLOCK, 4 * sizes.encoder_ffn_dim + BLOCK, BLOCK)
    shallow = [{"encoder_layers": layers, "encoder_ffn_dim": width} for width in widths]
    step = math.lcm(2, sizes.attention_heads)
    narrow = [
        {"d_model": width, "encoder_ffn_dim": width * sizes.encoder_ffn_dim // sizes.d_model}
        for width in range(step, sizes.d_model + 1, step)
    ]
    low_rank = [
        ResidualConfig(group_size=None, rank=rank, diagonal="square") for rank in range(1, sizes.d_model + 1)
    ]
    cells = {
        "dense": Cell("dense"),
        "k3-r2": Cell("K=3, R=2", paper(3, 2)),
        "shallow": Cell("dense, fewer layers", sizes=_nearest(shallow, lambda s: _size(sizes, s), target)),
        "narrow": Cell(
            "dense, narrower",
            sizes=_nearest(narrow, lambda s: _size(sizes, s), target),
            four_bits=False,  # such widths are no multiples of a block
        ),
        "low-rank": Cell(
            "low rank, nothing shared",
            _nearest(low_rank, lambda r: encoder_size(sizes, r), target),
            four_bits=False,
        ),
        "k3-r16": Cell("K=3, R=16", paper(3, 16)),
        "k3-r0": Cell("K=3, R=0 (diagonal alone)", paper(3, 0)),
        "k3-r0-none": Cell("K=3, R=0, no diagonal (pure sharing)", replace(paper(3, 0), diagonal="none")),
        "k3-r2-none": Cell("K=3, R=2, no diagonal", replace(paper(3, 2), diagonal="none")),
        "k3-r2-all": Cell("K=3, R=2, diagonal on all", replace(paper(3, 2), diagonal="all")),
        "k3-r2-cyclic": Cell("K=3, R=2, cyclic", replace(paper(3, 2), cyclic=True)),
        "k6-r16": Cell("K=6, R=16", paper(6, 16)),
        "k9-r16": Cell("K=9, R=16", paper(9, 16)),
        # Rank 2 as in K=3, R=2: a rank of 16 is a sixth of 96 features, and a 32nd of the paper's 512.
        "k9-r2": Cell("K=9, R=2", paper(9, 2)),
    }
    divided = {
        f"{name}-divided": replace(cell, title=f"{cell.title}, divided rate", divide_shared_rate=True)
        for name, cell in cells.items()
        if cell.residual and cell.residual.group_size
    }
    return cells | divided


def _nearest(choices: Sequence[Any], size: Callable[[Any], int], target: int) -> Any:
    """That of `choices`, which become larger, whose size is nearest to `target`."""
    number = bisect_right(choices, target, key=size)
    return min(choices[max(0, number - 1) : number + 1], key=lambda choice: abs(size(choice) - target))


def _size(sizes: EncoderSizes, changes: dict[str, int]) -> int:
    return encoder_size(replace(sizes, **changes), None)


def check_sizes(name: str, cell: Cell, sizes: EncoderSizes) -> None:
    """Checks that a row can have the sizes of a scale.

    Raises:
        ValueError: naming the row, for sizes that it cannot have, or fewer layers than one group has.
    """
    try:
        encoder_size(replace(sizes, **cell.sizes), cell.residual)
    except ValueError as error:
        raise ValueError(f"the cell {name!r} cannot have these sizes: {error}") from error
    layers = cell.sizes.get("encoder_layers", sizes.encoder_layers)
    group_size = cell.residual.group_size if cell.residual else None
    if isinstance(group_size, int) and group_size > layers:
        raise ValueError(
            f"the cell {name!r} needs `encoder_layers` of at least {group_size}, got {layers}, which would share as in "
            f"K={layers}"
        )


def encoder_size(sizes: EncoderSizes, residual: ResidualConfig | None) -> int:
    """Parameters of the encoder's layers and of what they share."""
    return count_encoder(without_weights(sizes, residual))


def count_encoder(model: Any) -> int:
    """Parameters of the encoder's layers and of what they share."""
    encoder = family_of(model).find_encoder(model)
    parts = [encoder.layers, *([encoder.shared] if hasattr(encoder, "shared") else [])]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())
