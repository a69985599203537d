"""The members of a user's process group as a world: each runs the pipeline of its number in the group.

A group may be any: the default one, one dimension of a mesh, several at once. hetu makes connections of its own between
its members, once for each group, and leaves the group itself alone.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from hetu.backends.comm.compare import refuse_differences
from hetu.backends.comm.control import Control
from hetu.backends.comm.peers import Peers
from hetu.backends.comm.wire import encode
from hetu.backends.comm.world import LocalWorld
from hetu.backends.torch_private import default_store
from hetu.errors import HetuError, caller

_FIX = "call it with the same arguments on all ranks of the group"

TIMEOUT = 300.0
"""Seconds that a rank waits for another, where the group doesn't say."""


class GroupWorld(Peers):
    """The members of a process group.

    Attributes:
        name: The group's name in torch.
        process: The number of the process that joined it.
    """

    def __init__(self, group: Any, control: Control, device: torch.device, backend: str) -> None:
        super().__init__(control, device, backend)
        self.name: str = group.group_name
        self.process = os.getpid()
        self._group = weakref.ref(group)

    @property
    def group(self) -> Any:
        """The process group; None once it is gone."""
        return self._group()

    # Agreement

    def agree(self, facts: Mapping[str, Any], what: str) -> None:
        """Demands that all members say the same. They tell each other the facts only if it isn't so.

        Args:
            facts: Plain values by the names that an error gives them.
            what: What they are about to call.

        Raises:
            CommunicationError: If they differ, on all members, showing all sides.
        """
        if not self.control.is_same(encode(facts), what):
            refuse_differences(self.control.tell(facts, what), f"a call of {what}", what, dict.fromkeys(facts, _FIX))

    # Rows

    def gather_rows(self, own: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The rows of all members, one member after the other.

        Args:
            own: ``(counts[rank], ...)``, contiguous.
            counts: Rows of each member.
        """
        most = max(counts)
        place = own.new_empty((self.size, most, *own.shape[1:]))
        sent = own if len(own) == most else torch.cat([own, own.new_zeros((most - len(own), *own.shape[1:]))])
        if place.numel():
            self._gather_bytes(place, sent)
        return (
            place.flatten(0, 1)
            if min(counts) == most
            else torch.cat([x[:n] for x, n in zip(place, counts, strict=True)])
        )

    def _gather_bytes(self, place: torch.Tensor, sent: torch.Tensor) -> None:
        """As bytes, for gloo doesn't know all types; through the host where gloo carries what lies on a device."""
        device = torch.device("cpu") if self.backend == "gloo" else self.device
        there = place if place.device == device else torch.empty_like(place, device=device)
        flat, own = there.view(-1).view(torch.uint8), sent.to(device).reshape(-1).view(torch.uint8)
        self.say("gathering rows", lambda: self.everyone._allgather_base(flat, own).wait(), [there])
        if there is not place:
            place.copy_(there)

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sums of a few numbers over all members, on every one of them."""
        return self.gather_rows(values[None].contiguous(), [1] * self.size).sum(0)


_ALONE: AbstractContextManager[None] = nullcontext()


class OneProcess(LocalWorld):
    """The world of a process that is in no group: it runs the only pipeline itself."""

    name = ""

    def hanging_up(self) -> AbstractContextManager[None]:
        """There is nobody to be told of an error."""
        return _ALONE

    def gather_rows(self, own: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """They are all here."""
        return own

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """There is nothing to add."""
        return values


AnyWorld = GroupWorld | OneProcess

ONE_PROCESS = OneProcess()

_worlds: dict[str, GroupWorld] = {}
_made: Counter[tuple[int, ...]] = Counter()
"""How many worlds this process made with each list of ranks: the same number on all of these."""


def world_of(group: Any) -> AnyWorld:
    """The world of a process group, made when it is first asked for: all members have to ask.

    Args:
        group: A process group of torch with this process among its members; None for a process alone.

    Raises:
        CommunicationError: If not all members come in time; it names those that didn't.
        HetuError: If there is no way to carry rows between them.
    """
    if group is None or group.size() == 1:
        return ONE_PROCESS
    known = _worlds.get(group.group_name)
    if known is not None and (known.group is not group or known.control.is_broken):
        known.close()  # a name may come again once a group is destroyed; and after a failure all begin anew
        known = None
    if known is None:
        known = _worlds[group.group_name] = _make(group)
    return known


def world_named(name: str) -> AnyWorld:
    """The world of a group by its name, which :func:`world_of` has made; begun anew after a failure."""
    if not name:
        return ONE_PROCESS
    known = _worlds[name]
    if not known.control.is_broken:
        return known
    if known.group is None:
        what = f"the process group {name} was destroyed"
        raise HetuError(what, op="ContextParallel", where=caller(), fix="make a ContextParallel of another group")
    return world_of(known.group)


def _make(group: Any) -> GroupWorld:
    ranks = tuple(dist.get_process_group_ranks(group))
    _made[ranks] += 1
    store: Any = PrefixStore(f"hetu/{'-'.join(map(str, ranks))}/{_made[ranks]}", default_store())
    backend, device = _carrier(group)
    # The control plane has a connection of its own: torch blocks all threads that use one while one of them waits.
    control = Control(store.clone(), group.rank(), group.size(), _timeout(group, device), holder=None)
    control.meet("ContextParallel", {})
    return GroupWorld(group, control, device, backend)


def _carrier(group: Any) -> tuple[str, torch.device]:
    """What carries rows between the members, and where they lie."""
    backends = {device.type for device in group._device_types}
    is_nccl = "cuda" in backends and group._get_backend(torch.device("cuda")).name() == "nccl"
    if is_nccl and torch.cuda.is_available():
        return "nccl", torch.device("cuda", torch.cuda.current_device())
    if "cpu" in backends or "cuda" in backends:
        return "gloo", torch.device("cpu")
    raise HetuError(
        f"the process group {group.group_name} has no backend for the CPU or CUDA",
        op="ContextParallel",
        where=caller(),
        fix="make it with backend='nccl', 'gloo', or 'cpu:gloo,cuda:nccl'",
    )


def _timeout(group: Any, device: torch.device) -> float:
    """Seconds that the group's own messages may take."""
    try:
        found = group._get_backend(device).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return TIMEOUT
    return float(found)


@atexit.register
def _leave() -> None:
    """The others shall not take the end of this script for the death of its process."""
    while _worlds:
        _, world = _worlds.popitem()
        if world.process == os.getpid():  # and not that of a fork of it
            world.leave()
            world.close()
