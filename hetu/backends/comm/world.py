"""Which of a strategy's pipelines this process runs, and what carries their values to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from hetu.backends.comm.boxes import flat_boxes
from hetu.backends.comm.interpreter import Communicator
from hetu.backends.comm.local import LocalComm
from hetu.parallel.placement import Placement

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


Named = tuple[Any, torch.Tensor]
"""A tensor with a name: plain values, as the control plane sends them."""

_NO_GUARD = nullcontext()


class World(Protocol):
    """The processes that run the pipelines of every strategy together.

    Modules are lowered for the pipelines that run here, and get the world as an input: the same module runs whether
    the others are in this process or elsewhere.

    Attributes:
        rank: This process's number.
        size: How many processes there are.
        device: Where graphs that name no device run; None for torch's choice.
        is_distributed: Whether there are other processes.
        lock: Held while messages are exchanged, which those of several threads would mix up.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device | None: ...

    @property
    def is_distributed(self) -> bool: ...

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    def pipelines(self, count: int) -> Sequence[int]:
        """Which pipelines of a strategy of ``count`` run here, in order; none on a rank that is past the last."""

    def begin(self) -> None:
        """A module is launched next, on every rank that has pipelines of it; all ranks say so."""

    def communicator(self, count: int) -> Communicator:
        """What carries the rows of one attention, forward or backward, of a strategy of ``count`` pipelines."""

    def start_reduce(self, parts: Sequence[torch.Tensor], op: str, count: int, home: Placement | None = None) -> Any:
        """Starts to add up, or average, a tensor over a strategy's pipelines, in their order.

        Args:
            parts: The values of the pipelines that run here; they are not changed before the end.
            op: ``"sum"`` or ``"mean"``.
            count: Pipelines of the strategy.
            home: Which boxes of the result each rank is to get; None for all of it on each that has pipelines.

        Returns:
            What :meth:`finish_reduce` takes.
        """

    def finish_reduce(self, started: Any) -> torch.Tensor:
        """The sum or the mean, the same on all pipelines. With a ``home`` it is what :meth:`deliver` takes."""

    def deliver(
        self,
        sums: Sequence[torch.Tensor] | None,
        homes: Sequence[Placement],
        dtypes: Sequence[torch.dtype],
        count: int,
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Brings sums to their homes: what ranks without a pipeline are to get lies on one that has some.

        Args:
            sums: What :meth:`finish_reduce` gave of each tensor; None on a rank that has no pipeline.
            homes: Which boxes of each tensor each rank gets.
            dtypes: Of the tensors.
            count: Pipelines of the strategy.
            device: Where they lie.

        Returns:
            The boxes of each tensor that this rank gets, one after the other.
        """

    def start_gather(self, own: torch.Tensor, sizes: Sequence[int]) -> Any:
        """Starts to bring flat tensors of all ranks to every rank, beside whatever is computed or sent meanwhile.

        All ranks start the same ones in the same order, and finish each.

        Args:
            own: uint8 ``(n,)``, that of this rank.
            sizes: The n of each rank.

        Returns:
            What :meth:`finish_gather` takes.
        """

    def finish_gather(self, started: Any) -> list[torch.Tensor]:
        """That of each rank. Each begins at a multiple of 16 bytes."""

    def gather_values(
        self, read: Callable[[], Sequence[Named]], what: str, check: Callable[[Sequence[int]], None] | None = None
    ) -> list[Sequence[Named]]:
        """Named tensors of any shapes of all ranks, on every rank.

        Args:
            read: Gives those of this rank; may raise, of which all ranks are told.
            what: The function that the user called, for errors.
            check: Refuses numbers of values, of all ranks, before any is sent; alike on all ranks.

        Returns:
            Those of each rank.

        Raises:
            CommunicationError: If another rank refuses, or can't be reached.
        """

    def gather(
        self, own: Sequence[torch.Tensor], counts: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> list[torch.Tensor]:
        """Numbers of all pipelines, on every rank.

        Args:
            own: Tensors without dimensions: of each of several launches those of the pipelines that run here.
            counts: Pipelines of each launch.
            dtype: Of the tensors.
            device: Where they lie.

        Returns:
            Those of all pipelines, launch after launch.
        """

    def share(
        self, tensors: Sequence[torch.Tensor] | None, like: Sequence[Spec], count: int, device: torch.device
    ) -> list[torch.Tensor]:
        """Gives tensors that are the same on all pipelines to the ranks that have none; those give None."""

    def total(self, numbers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sums of int64 tensors without dimensions over all ranks."""

    def hanging_up(self) -> AbstractContextManager[None]:
        """A block in which messages are under way: the others hear of an error in it that only this rank has."""

    def confirm(self, failure: BaseException | None) -> None:
        """Ends what each rank did by itself: the others hear how that went here.

        Args:
            failure: What this rank raises next, if it failed.

        Raises:
            CommunicationError: If it failed on other ranks only, or they can't be reached.
        """


class LocalWorld:
    """One process that runs all pipelines, in lock step."""

    rank, size, device, is_distributed, lock = 0, 1, None, False, nullcontext()

    def pipelines(self, count: int) -> Sequence[int]:
        """All of them."""
        return range(count)

    def begin(self) -> None:
        """Nobody else has to know."""

    def communicator(self, count: int) -> Communicator:
        """A mailbox of its own for each attention."""
        return LocalComm()

    def start_reduce(
        self, parts: Sequence[torch.Tensor], op: str, count: int, home: Placement | None = None
    ) -> torch.Tensor:
        """Adds them up; all boxes are at home here."""
        total = reduce_in_order(parts, op)
        return total if home is None else flat_boxes(total, home)

    def finish_reduce(self, started: torch.Tensor) -> torch.Tensor:
        """The sum."""
        return started

    def gather(
        self, own: Sequence[torch.Tensor], counts: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> list[torch.Tensor]:
        """All pipelines run here."""
        return list(own)

    def share(
        self, tensors: Sequence[torch.Tensor] | None, like: Sequence[Spec], count: int, device: torch.device
    ) -> list[torch.Tensor]:
        """There is no other rank."""
        return list(tensors or ())

    def deliver(
        self,
        sums: Sequence[torch.Tensor] | None,
        homes: Sequence[Placement],
        dtypes: Sequence[torch.dtype],
        count: int,
        device: torch.device,
    ) -> list[torch.Tensor]:
        """There is no other rank."""
        return list(sums or ())

    def start_gather(self, own: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """There is no other rank."""
        return own

    def finish_gather(self, started: torch.Tensor) -> list[torch.Tensor]:
        """There is no other rank."""
        return [started]

    def gather_values(
        self, read: Callable[[], Sequence[Named]], what: str, check: Callable[[Sequence[int]], None] | None = None
    ) -> list[Sequence[Named]]:
        """There is no other rank."""
        return [read()]

    def total(self, numbers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """There is no other rank."""
        return list(numbers)

    def hanging_up(self) -> AbstractContextManager[None]:
        """There is no other rank."""
        return _NO_GUARD

    def confirm(self, failure: BaseException | None) -> None:
        """There is no other rank."""


def reduce_in_order(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The sum or the mean of one tensor per pipeline, added in their order, half precision in float32.

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


_world: World = LocalWorld()


def current_world() -> World:
    """The world of this process: that of ``hetu.init_distributed``, else one that runs all pipelines here."""
    return _world


def set_world(world: World) -> None:
    """Replaces the world of this process."""
    global _world
    _world = world
