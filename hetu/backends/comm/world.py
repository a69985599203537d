"""Which of a strategy's pipelines this process runs, and what carries their values to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from hetu.backends.comm.interpreter import Communicator
from hetu.backends.comm.local import LocalComm


class World(Protocol):
    """The processes that run the pipelines of every strategy together.

    Modules are lowered for the pipelines that run here, and get the world as an input: the same module runs whether
    the others are in this process or elsewhere.

    Attributes:
        rank: This process's number.
        size: How many processes there are.
    """

    rank: int
    size: int

    def pipelines(self, count: int) -> Sequence[int]:
        """Which pipelines of a strategy of ``count`` run here, in order; none on a rank that is past the last."""

    def communicator(self) -> Communicator:
        """What carries the rows of one attention, forward or backward, of all pipelines that run here."""

    def all_reduce(self, parts: Sequence[torch.Tensor], op: str, count: int) -> torch.Tensor:
        """The sum or the mean over a strategy's pipelines, added in their order.

        Args:
            parts: The values of the pipelines that run here.
            op: ``"sum"`` or ``"mean"``.
            count: Pipelines of the strategy.
        """


class LocalWorld:
    """One process that runs all pipelines, in lock step."""

    rank, size = 0, 1

    def pipelines(self, count: int) -> Sequence[int]:
        """All of them."""
        return range(count)

    def communicator(self) -> Communicator:
        """A mailbox of its own for each attention."""
        return LocalComm()

    def all_reduce(self, parts: Sequence[torch.Tensor], op: str, count: int) -> torch.Tensor:
        """Adds them up."""
        return reduce_in_order(parts, op)


def reduce_in_order(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The sum or the mean of one tensor a pipeline, added in their order, half precision in float32.

    Example:
        >>> reduce_in_order([torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])], "sum")
        tensor([11., 22.])
    """
    first, dtype = parts[0], parts[0].dtype
    if len(parts) == 1:
        return first
    wide = torch.float32 if dtype.is_floating_point and first.itemsize == 2 else dtype
    total = torch.add(first.to(wide), parts[1])
    for part in parts[2:]:
        total.add_(part)
    return (total.div_(len(parts)) if op == "mean" else total).to(dtype)
