"""Indices that a device computes or holds: none out of range is looked up, and the host is told without waiting.

What planning sees is checked before a run (:mod:`hetu.planning.indices`), and on a CPU what a graph computes is checked
where it is read. Elsewhere a check that raised would wait for the device, once per lookup, and torch's own kernels end
the process's use of the device. So an index out of range is replaced by one that exists, what is looked up by it is
NaN, and a flag on the device remembers it: no update is applied while the flag is set, and the next run raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from hetu.backends.lower.traced import aside
from hetu.errors import BindingError, HetuError, Where
from hetu.planning.indices import refuse_outside

DEFERRED = {"cuda"}
"""The types of devices that compute while Python goes on."""


def is_deferred(device: torch.device) -> bool:
    """Whether indices on a device are checked there."""
    return device.type in DEFERRED


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """What one op looks up, of one pipeline and micro-batch.

    Attributes:
        index: The indices as they came.
        safe: The same with those out of range replaced.
        outside: Which are out of range, like ``index``.
        is_bad: Whether any is, without dimensions.
        size: How many there are to choose from.
        ignored: A value that may come; None if there is none.
        name: What the op calls its indices.
        op: The op.
        where: The user's line.
    """

    index: torch.Tensor
    safe: torch.Tensor
    outside: torch.Tensor
    is_bad: torch.Tensor
    size: int
    ignored: int | None
    name: str
    op: str
    where: Where


class IndexFlags:
    """The lookups of one run whose indices nobody saw on the host.

    Attributes:
        unseen: The names of placeholders and constants that planning could not look at, of the micro-batch at hand.
    """

    def __init__(self) -> None:
        self.unseen: frozenset[str] = frozenset()
        self._lookups: dict[tuple[int, int, int | None], Lookup] = {}

    def guarded(
        self, index: torch.Tensor, size: int, ignored: int | None, name: str, op: str, where: Where
    ) -> torch.Tensor:
        """The indices, of which those out of range are replaced; an op's gradient gets what the op got."""
        key = (id(index), size, ignored)
        found = self._lookups.get(key)
        if found is None:
            safe = index.clamp(0, min(max(size - 1, 0), torch.iinfo(index.dtype).max))
            if ignored is not None:
                safe = torch.where(index == ignored, index, safe)
            outside = index != safe if size else torch.ones_like(index, dtype=torch.bool)
            found = Lookup(index, safe, outside, outside.any(), size, ignored, name, op, where)
            self._lookups[key] = found
        return found.safe

    def poisoned(self, out: torch.Tensor, index: torch.Tensor, size: int, ignored: int | None) -> torch.Tensor:
        """What was looked up, in place NaN where the index was out of range; a sum of it is NaN if any was."""
        found = self._lookups.get((id(index), size, ignored))
        if found is None or not out.dtype.is_floating_point:
            return out
        if out.ndim == 0:
            return out.masked_fill_(found.is_bad, torch.nan)
        return out.masked_fill_(
            found.outside.view(*found.outside.shape, *[1] * (out.ndim - found.outside.ndim)), torch.nan
        )

    def any(self, device: torch.device) -> torch.Tensor:
        """Whether any index was out of range: an int64 without dimensions, on the device. Nothing is noted after it."""
        for key, found in self._lookups.items():  # what was looked up is let go of
            self._lookups[key] = replace(found, safe=found.index, outside=found.is_bad)
        flags = [found.is_bad for found in self._lookups.values()]
        if not flags:
            return torch.zeros((), dtype=torch.int64, device=device)
        return (flags[0] if len(flags) == 1 else torch.stack(flags).any()).long()

    def refuse(self, of: str = "") -> NoReturn:
        """Raises the error of the first index that is out of range; waits for the device.

        Args:
            of: Says of which run it is.

        Raises:
            BindingError: If one of this rank's is; names the op's line, and the number if it is still there.
            HetuError: If it was another rank's.
        """
        for found in self._lookups.values():
            if found.is_bad.item():
                values, size = found.index.cpu().numpy(), found.size
                refuse_outside(values, size, found.ignored, found.name, found.op, found.where, of)
                raise BindingError(  # the user has written to the tensor since
                    f"{found.name}{of} held a number out of range, expected 0 to below {size}",
                    op=found.op,
                    where=found.where,
                    fix=f"give indices from 0 to below {size}",
                )
        raise HetuError(f"indices{of} were out of range on another rank", op="run", fix="see that rank's error")


@aside
def hetu_guarded_indices(
    flags: IndexFlags | None,
    index: torch.Tensor,
    size: int,
    ignored: int | None,
    source: str | None,
    name: str,
    op: str,
    filename: str,
    lineno: int,
) -> torch.Tensor:
    """Indices that can be looked up, whatever came; see :meth:`IndexFlags.guarded`.

    Args:
        flags: The run's; None if the hosts see all indices, or where the host computes for planning.
        index: The indices.
        size: How many there are to choose from.
        ignored: A value that may come; None if there is none.
        source: The placeholder or constant that has these values; None if they are computed.
        name: What the op calls them.
        op: The op.
        filename: The user's file.
        lineno: The user's line.
    """
    if (source is not None and (flags is None or source not in flags.unseen)) or not index.numel():
        return index
    if flags is None:
        refuse_outside(index.cpu().numpy(), size, ignored, name, op, Where(filename, lineno))
        return index
    return flags.guarded(index, size, ignored, name, op, Where(filename, lineno))


@aside
def hetu_poisoned(
    flags: IndexFlags | None, out: torch.Tensor, index: torch.Tensor, size: int, ignored: int | None
) -> torch.Tensor:
    """What was looked up, see :meth:`IndexFlags.poisoned`."""
    return out if flags is None else flags.poisoned(out, index, size, ignored)
