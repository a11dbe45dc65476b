"""Several processes that convert one model together, each of which runs the model on its share of the calibration.

What a conversion needs to know of the calibration are sums over its windows. Each process adds up its own share, and
then all of them get the totals. What follows from the totals is computed by every process in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, distributed

from .inputs import Batch


class OtherProcessError(RuntimeError):
    """Raised in the processes that work when another one has failed."""


class Processes:
    """The processes that work together, which is this one alone unless `together` is true.

    All of them make the same exchanges in the same order. Each exchange begins with the question whether any process
    has failed, so that the others end with an error too and do not wait for it.

    Args:
        together: whether all processes of `torch.distributed` work together.

    Raises:
        ValueError: if they are to work together and `torch.distributed` is not initialised.
    """

    def __init__(self, together: bool = False) -> None:
        if together and not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "`distributed` must be false where `torch.distributed` is not initialised, got true; start the "
                "processes with `accelerate launch` or torchrun, and call torch.distributed.init_process_group() first"
            )
        self.count: int = distributed.get_world_size() if together else 1
        self.index: int = distributed.get_rank() if together else 0

    def share(self, places: Sequence[int]) -> set[int]:
        """The part of these indices that belongs to this process; neighbours belong to different ones."""
        return set(places[self.index :: self.count])

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        return [value] if self.count == 1 else self._exchange(None, value)

    def from_first(self, value: Any) -> Any:
        """The value that the first process has."""
        return self.gather(value if self.index == 0 else None)[0]

    def total(self, tensors: Iterable[Tensor]) -> None:
        """Replaces the values of each tensor by their sum over all processes."""
        if self.count > 1:
            self.gather(None)
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replaces the values of each tensor by those that it has in the first process."""
        if self.count > 1:
            self.gather(None)
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def check_same(self, batches: Sequence[Batch]) -> None:
        """Checks that all processes have the same calibration.

        Raises:
            ValueError: if one of them has another.
        """
        if self.count == 1:
            return
        found = self.gather(
            [[(name, value.shape, float(value.double().sum())) for name, value in b.items()] for b in batches]
        )
        for index, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    "`calibration` must be the same in all processes, which share it among themselves, but that of "
                    f"process {index} differs from that of process 0; pass all of it to each, with one seed"
                )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tells the other processes of an error that is raised inside; at their next exchange they raise one too."""
        try:
            yield
        except OtherProcessError:
            raise
        except Exception as error:
            if self.count > 1:
                with suppress(Exception):
                    self._exchange(f"{type(error).__name__}: {error}", None)
            raise

    def _exchange(self, problem: str | None, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, (problem, value))
        for index, (other, _) in enumerate(found):
            if other is not None and problem is None:
                raise OtherProcessError(f"process {index} of {self.count} has failed: {other}")
        return [value for _, value in found]


ALONE = Processes()
