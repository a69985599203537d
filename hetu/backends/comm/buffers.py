"""What a pipeline holds while it follows its part of a plan: the memory of its buffers.

The values of a payload lie beside each other in one tensor ``(rows, heads, numbers)``, so that what is one stretch on
the wire lands where it is attended to. Those of the pipeline's own rows are given by who runs the plan, in any strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from hetu.backends.attention.contract import Gather, compute_dtype, gather
from hetu.backends.comm.program import Program
from hetu.backends.memory import copied_to, device_copies, empty
from hetu.parallel.mask.segments import Turn
from hetu.parallel.plan.buffers import Batch, Lifetime
from hetu.parallel.plan.heads import HeadRange, Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs, Send
from hetu.parallel.plan.parts import PipelinePlan

Values = Mapping[str, torch.Tensor]
"""Values of rows by name: ``(rows, heads, numbers)`` each, in any strides."""

Owned = tuple[Values, Mapping[Payload, torch.Tensor]]
"""Values by name, and those of them that lie beside each other, by payload, ``(rows, heads, numbers)``."""

AttendStep = Callable[[Attend, Values, Values, Turn | None, bool], None]
"""Computes a step: of the values of the queries' buffer and of the buffer that it attends to, of its heads, in its
turn. In a backward it writes ``dk`` and ``dv`` of the latter; the last argument says whether rows of these that no
segment names keep what they hold; else they become 0."""


_LSE, _KV_GRADS = Payload.LSE, Payload.KV_GRADS  # an Enum's members are found in a slow way


class Buffers:
    """The memory of one pipeline's buffers.

    Args:
        part: The pipeline's part of the plan.
        heads: Widths of a token's row.
        given: The values of its own rows that are there from the beginning. Those that lie beside each other are packed
            by one call.
        results: Makes those that the plan computes, before the first of them is written. ``dk`` and ``dv`` are float32
            (float64 for float64 inputs) where several parts are summed up, see
            :attr:`~hetu.parallel.plan.parts.PipelinePlan.sums_gradients`; they need not be cleared.
        pack: How rows are packed that are sent.

    Attributes:
        device: Where it all lies.
        packed: What sends that are about to be started send, by transfer.
        places: Where receives that are about to be started land.
        aside: What is landing aside, before it is put into its buffer.
    """

    def __init__(
        self,
        part: PipelinePlan,
        heads: Heads,
        given: Owned,
        results: Callable[[], Owned],
        pack: Gather = gather,
    ) -> None:
        values, beside = given
        self.part, self.heads, self._like = part, heads, values["k"]
        self.device = self._like.device
        program = Program.of(part)
        self._ranges, self._lives, self._own = program.ranges, program.lives, program.own
        self._values: list[dict[str, torch.Tensor]] = [dict(values)]
        self._beside: list[dict[Payload, torch.Tensor]] = [dict(beside)]
        for _ in range(1, len(self._ranges)):
            self._values.append({})
            self._beside.append({})
        self._results, self._gather = [results], pack
        # Numbers per head, and of which type.
        self._made_of: dict[Payload, tuple[int, torch.dtype]] = part.known(("made of", heads, self._like.dtype), dict)
        self.packed: dict[int, torch.Tensor] = {}
        self.places: dict[int, torch.Tensor] = {}
        self.aside: dict[int, tuple[Receive, torch.Tensor]] = {}

    def finish(self) -> Values:
        """All values of the own rows, once the plan is done."""
        self._make_results()
        return self._values[0]

    # Memory

    def make(self, number: int) -> None:
        """Makes the memory of what an instruction is the first to write."""
        for life in self._lives.made.get(number, ()):
            made = self._new(life.payload, life.rows, life.width)
            if life.receive is None:
                self._keep(life, made)
            else:
                self.aside[life.receive.transfer] = life.receive, made
        if number == self._lives.results:
            self._make_results()

    def _keep(self, life: Lifetime, made: torch.Tensor) -> None:
        """Gives memory to a buffer."""
        buffer, payload = life.buffer, life.payload
        if payload is _LSE:  # kernels write it head by head
            made = made.view(made.shape[1], made.shape[0], 1).transpose(0, 1)
        self._beside[buffer][payload] = made
        values, cuts = self._values[buffer], life.cuts
        if len(cuts) == 1:
            values[cuts[0][0]] = made
        else:
            parts = made.split_with_sizes([count for _, _, count in cuts], 1)
            for (name, _, _), part in zip(cuts, parts, strict=True):
                values[name] = part
        if self._own is not None and buffer in self._own.gaps and "dk" in values:
            made.zero_()

    def _new(self, payload: Payload, rows: int, width: int) -> torch.Tensor:
        known = self._made_of.get(payload)
        if known is None:
            dtype = compute_dtype(self._like.dtype) if payload.is_wide else self._like.dtype
            known = self._made_of[payload] = self.heads.numbers(payload), dtype
        numbers, dtype = known
        return empty((rows, width, numbers), dtype, self.device)

    def _make_results(self) -> None:
        if not self._results:
            return
        # Let go of at once: who makes them holds this object, so both would outlive their use.
        values, beside = self._results.pop()()
        self._values[0] |= values
        self._beside[0] |= beside
        if self._own is not None and 0 in self._own.gaps:
            own = self._beside[0].get(_KV_GRADS)
            for x in self._parts(0, _KV_GRADS, self._ranges[0]) if own is None else [own]:
                x.zero_()

    def free(self, lives: Iterable[Lifetime]) -> None:
        """Lets go of what nobody needs any more."""
        for life in lives:
            if life.receive is None and self._beside[life.buffer].pop(life.payload, None) is not None:
                for name, _, _ in life.cuts:
                    del self._values[life.buffer][name]

    # Transfers and copies

    def start(self, batch: Batch, number: int) -> None:
        """Packs all that a batch sends, and makes the places of what it receives, before any of it is started."""
        for send in batch.sends:
            self.packed[send.transfer] = self._pack(send)
        if number in self._lives.freed:
            self.free(self._lives.freed[number])
        if number in self._lives.written:
            self.make(number)
        for receive in batch.receives:
            self.places[receive.transfer] = self._place(receive)

    def _pack(self, item: Send) -> torch.Tensor:
        """The rows that the wire needs, one after the other: the only copy of them that is made."""
        whole, own = self._beside[item.buffer].get(item.payload), self._ranges[item.buffer]
        if whole is not None and (item.heads is own or item.heads == own):
            # Also where rows follow each other: a GPU gathers more than twice as fast as it copies a strided part.
            parts = [whole]
        else:
            parts = self._parts(item.buffer, item.payload, item.heads)
        return self._gather(parts, indices(item.runs, self.device))

    def _place(self, item: Receive) -> torch.Tensor:
        if item.runs is not None:
            return self.aside[item.transfer][1]
        whole = self._beside[item.buffer][item.payload]
        if item.rows == self.part.buffers[item.buffer].rows:
            return whole
        return whole[item.offset : item.offset + item.rows]

    def put(self, transfer: int) -> None:
        """Puts what landed aside where it belongs."""
        item, rows = self.aside.pop(transfer)
        assert item.runs is not None, "else it lands in place"
        targets = self._parts(item.buffer, item.payload, item.heads)
        for target, part in zip(targets, _cut(rows, item.payload, item.heads), strict=True):
            _put(target, item.runs, part)

    def copy(self, item: Copy) -> None:
        """Does what a transfer from the pipeline to itself would do."""
        sources = self._parts(item.buffer, item.payload, item.heads)
        place = _add if item.payload is _KV_GRADS else _put
        for source, target in zip(sources, self._parts(item.target, item.payload, item.heads), strict=True):
            place(target, item.place, _rows(source, item.runs))

    def add(self, item: Accumulate) -> None:
        """Adds gradients that landed to those of the own rows."""
        landed, rows = self._beside[item.buffer][_KV_GRADS], item.runs.rows
        if item.offset or landed.shape[0] != rows:
            landed = landed[item.offset : item.offset + rows]
        self._add_all(0, item.heads, item.runs, landed)

    def _add_all(self, buffer: int, heads: HeadRange, runs: Runs | None, rows: torch.Tensor) -> None:
        """Adds gradients of keys and values to rows of a buffer, no row twice; to all of them without ``runs``."""
        whole = self._beside[buffer].get(_KV_GRADS) if heads == self._ranges[buffer] else None
        targets = self._parts(buffer, _KV_GRADS, heads) if whole is None else [whole]
        parts = _cut(rows, _KV_GRADS, heads) if whole is None else [rows]
        for target, part in zip(targets, parts, strict=True):
            if runs is None:
                target += part
            else:
                _add(target, runs, part)

    # Attends

    def attend(self, item: Attend, number: int, turn: Turn | None, step: AttendStep) -> None:
        """Computes a step; gradients that would overwrite some are computed aside, and added."""
        queries = self._of(self.part.queries, item.heads)
        keys = queries if item.buffer == self.part.queries else self._of(item.buffer, item.heads)
        if self._own is None:
            step(item, queries, keys, turn, True)
        elif number in self._own.aside:
            aside = self._new(_KV_GRADS, self.part.buffers[item.buffer].rows, item.heads.width(_KV_GRADS))
            dk, dv = _cut(aside, _KV_GRADS, item.heads)
            step(item, queries, {**keys, "dk": dk, "dv": dv}, turn, False)
            self._add_all(item.buffer, item.heads, None, aside)
        elif keys["dk"].shape[0] < keys["k"].shape[0]:  # of foreign rows, gradients are made for those that are there
            step(item, queries, {name: x[: item.rows] for name, x in keys.items()}, turn, True)
        else:
            step(item, queries, keys, turn, True)

    # Views

    def _of(self, buffer: int, heads: HeadRange) -> Values:
        """The values that a buffer holds, of some heads."""
        own = self._ranges[buffer]
        if heads is own or heads == own:
            return self._values[buffer]
        return {name: self._value(buffer, name, heads) for name in self._values[buffer]}

    def _value(self, buffer: int, name: str, heads: HeadRange) -> torch.Tensor:
        mine, first = heads.of(name), self._ranges[buffer].of(name).start
        return self._values[buffer][name][:, mine.start - first : mine.stop - first]

    def _parts(self, buffer: int, payload: Payload, heads: HeadRange) -> list[torch.Tensor]:
        """The values of a payload, of some heads."""
        own, values = self._ranges[buffer], self._values[buffer]
        if heads is own or heads == own:
            return [values[name] for name in payload.values]
        return [self._value(buffer, name, heads) for name in payload.values]


def _cut(rows: torch.Tensor, payload: Payload, heads: HeadRange) -> list[torch.Tensor]:
    """Rows of a payload by value."""
    return [rows.narrow(1, first, count) for _, first, count in heads.cuts(payload)]


def _rows(x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Rows in packing order; a view where they are evenly spaced."""
    part = runs.as_slice
    return x[part] if part is not None else x.index_select(0, indices(runs, x.device))


def _put(x: torch.Tensor, runs: Runs, rows: torch.Tensor) -> None:
    part = runs.as_slice
    if part is not None:
        x[part] = rows
    else:
        x[indices(runs, x.device)] = rows


def _add(x: torch.Tensor, runs: Runs, rows: torch.Tensor) -> None:
    part = runs.as_slice
    if part is not None:
        x[part] += rows
    else:
        x.index_add_(0, indices(runs, x.device), rows)


def indices(runs: Runs, device: torch.device) -> torch.Tensor:
    """The rows' numbers on the device, copied there once a plan."""
    kept: torch.Tensor | None = runs.copies.get(device)
    if kept is None:
        part = runs.as_slice
        if part is None:
            kept = copied_to(runs.indices().astype(np.int32), device)
        else:
            kept = torch.arange(part.start, part.stop, part.step, dtype=torch.int32, device=device)
        device_copies.keep(runs, device, kept, kept.nbytes)
    return kept
