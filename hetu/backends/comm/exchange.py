"""The interpreter of parts that exchange heads for tokens: one loop for forward and backward, over any communicator.

What such a part holds is named by values of a token, see :class:`hetu.parallel.plan.heads.Payload`: in buffer 0, of the
own rows and all heads; in buffer 1, of all rows of the group and the pipeline's heads, all values of a kind in one
tensor, so that what is one stretch on the wire lands where it is attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from hetu.backends.attention.contract import compute_dtype
from hetu.backends.comm.interpreter import Communicator, Sends, indices, pack, wait_for
from hetu.backends.comm.recorder import watched
from hetu.parallel.plan.heads import HeadRange, Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan

Values = Mapping[str, torch.Tensor]
"""Values of rows by name: ``(rows, heads, numbers)`` each, in any strides."""


class Held:
    """What a pipeline holds while it follows its part.

    Args:
        part: Its part of the plan, with ``heads``.
        heads: Widths of a token's row.
        own: The values of its own rows that are there from the beginning.
        results: Makes those of its own rows that the plan computes, when the first of them comes.
    """

    def __init__(self, part: PipelinePlan, heads: Heads, own: Values, results: Callable[[], Values]) -> None:
        assert part.heads is not None
        self.part, self.heads, self.mine = part, heads, part.heads
        self.own, self._results = dict(own), [results]
        self.gathered: dict[Payload, torch.Tensor] = {}
        self._like = own["q"]
        self._aside: dict[int, tuple[Receive, torch.Tensor]] = {}
        self._landing: dict[int, torch.Tensor] = {}
        sent = (item for item in part.instructions if isinstance(item, (Send, Copy)) and item.buffer)
        self._computed = tuple(dict.fromkeys(item.payload for item in sent))

    def value(self, name: str, buffer: int, heads: HeadRange) -> torch.Tensor:
        """A view of a value of some heads, ``(rows, heads, numbers)``."""
        if buffer == 0:
            return self.own[name][:, heads.of(name)]
        kind = next(kind for kind in self.gathered if name in kind.values)
        return self.gathered[kind][:, heads.columns(kind, name, self.mine)]

    def finish(self) -> Values:
        """The own rows' results, once the plan is done."""
        self._make_results()
        return self.own

    # Transfers and copies

    def packed(self, item: Send) -> torch.Tensor:
        """What a send sends."""
        assert item.heads is not None
        if item.buffer:
            return pack(self.gathered[item.payload], item.runs)
        values = [_rows(self.value(name, 0, item.heads), item.runs) for name in item.payload.values]
        return torch.cat(values, 1)

    def place(self, item: Receive) -> torch.Tensor:
        """Where a receive lands: where the rows belong, or aside."""
        assert item.heads is not None
        if not item.grads:
            self._make(item.payload)
            if item.runs is None:
                return self.gathered[item.payload][item.offset : item.offset + item.rows]
        rows = self._new(item.payload, item.rows, item.heads)
        if item.grads:
            self._landing[item.buffer] = rows
        else:
            self._aside[item.transfer] = item, rows
        return rows

    def landed(self, transfer: int) -> None:
        """Puts what landed aside where it belongs."""
        if transfer in self._aside:
            item, rows = self._aside.pop(transfer)
            assert item.heads is not None and item.runs is not None
            for name in item.payload.values:
                target = self.value(name, item.buffer, item.heads)
                _put(target, item.runs, rows[:, item.heads.columns(item.payload, name, item.heads)])

    def copy(self, item: Copy) -> None:
        """What a transfer from the pipeline to itself would do."""
        self._make(item.payload)
        for name in item.payload.values:
            rows, target = _rows(self.value(name, item.buffer, item.heads), item.runs), item.target
            if item.payload is Payload.KV_GRADS:
                _add(self.value(name, target, item.heads), item.place, rows)
            else:
                _put(self.value(name, target, item.heads), item.place, rows)

    def add(self, item: Accumulate) -> None:
        """Adds gradients that landed to those of the own rows."""
        assert item.heads is not None
        self._make_results()
        rows = self._landing.pop(item.buffer)[item.offset : item.offset + item.runs.rows]
        for name in Payload.KV_GRADS.values:
            columns = item.heads.columns(Payload.KV_GRADS, name, item.heads)
            _add(self.value(name, 0, item.heads), item.runs, rows[:, columns])

    # Memory

    def begin_attend(self) -> None:
        """Makes place for what an attend computes."""
        for kind in self._computed:
            self._make_gathered(kind)

    def free(self, kinds: tuple[Payload, ...]) -> None:
        """Lets go of what nobody needs any more of buffer 1."""
        for kind in kinds:
            self.gathered.pop(kind, None)

    def _make(self, kind: Payload) -> None:
        """Makes what rows of a kind that come belong to, if they are the first."""
        if kind.is_result:
            self._make_results()
        else:
            self._make_gathered(kind)

    def _make_results(self) -> None:
        if self._results:  # let go of at once: who makes them holds this object, so both would outlive their use
            self.own |= self._results.pop()()

    def _make_gathered(self, kind: Payload) -> None:
        if kind in self.gathered:
            return
        self.gathered[kind] = made = self._new(kind, self.part.buffers[1], self.mine)
        if kind is Payload.LSE:  # kernels write it head by head
            self.gathered[kind] = made.view(made.shape[1], made.shape[0], 1).transpose(0, 1)

    def _new(self, kind: Payload, rows: int, heads: HeadRange) -> torch.Tensor:
        dtype = compute_dtype(self._like.dtype) if kind.is_wide else self._like.dtype
        return self._like.new_empty((rows, heads.width(kind), self.heads.numbers(kind)), dtype=dtype)


def follow_heads(
    plan: PipelinePlan, held: Held, comm: Communicator, attend: Callable[[Attend], None]
) -> Iterator[bool]:
    """Follows one pipeline's part, forward or backward; a coroutine as :func:`~hetu.backends.comm.interpreter.follow`.

    Args:
        plan: The part.
        held: What the pipeline holds.
        comm: What carries rows, ``(rows, heads, numbers)`` each: the values of its kind one after the other.
        attend: Computes a step, from what is held to there.

    Yields:
        As ``follow``.
    """
    instructions, comm = watched(plan, comm, held.own["q"].device)
    last_uses, sends = plan.last_uses(), Sends(plan, held.packed)
    for number, item in enumerate(instructions):
        sends.come_to(number)
        match item:
            case Send():
                comm.send(plan.pipeline, item, sends.packed(item))
            case Receive():
                comm.receive(plan.pipeline, item, held.place(item))
            case Wait(transfer=transfer):
                yield from wait_for(plan.pipeline, transfer, comm)
                held.landed(transfer)
            case Copy():
                held.copy(item)
            case Attend():
                held.begin_attend()
                attend(item)
            case Accumulate():
                held.add(item)
        held.free(last_uses.get(number, ()))


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
