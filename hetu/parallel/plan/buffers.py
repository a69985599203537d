"""What a pipeline holds: its buffers, and from when to when it needs the memory of their values.

A buffer declares its rows, its heads and its values. Values that travel together are one *payload*: they lie beside
each other in a row, so that what comes lands where it is read. Memory is that of a payload of a buffer. It is made for
what writes first, and let go of after what reads last: :class:`Lifetimes` says when, to the interpreter, to the model
of memory and to the proof alike.

Memory may only be made where the pipeline may wait. To allocate some, a GPU may wait for all transfers under way, and
a plan is proven as if whatever computes did (see :mod:`hetu.parallel.proof.follow`); a receive is no such place. So
what a receive fills is made by the last instruction up to it that computes or packs, or where nothing is under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from hetu.parallel.plan.heads import HeadRange, Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send, Wait

if TYPE_CHECKING:
    from hetu.parallel.plan.parts import PipelinePlan


@dataclass(frozen=True, slots=True)
class Buffer:
    """Rows that a pipeline holds.

    Attributes:
        rows: How many.
        heads: The heads of which it holds values.
        payloads: What it holds of each row and head; values of one payload lie beside each other.
    """

    rows: int
    heads: HeadRange
    payloads: tuple[Payload, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """Names of all values."""
        return _values(self.payloads)

    @property
    def holds_keys(self) -> bool:
        """Whether it can be attended to; else gradients of other rows land in it."""
        return "k" in self.values

    def holds(self, payload: Payload) -> list[Payload]:
        """Those of its payloads that have values of another one."""
        if payload in self.payloads:
            return [payload]
        return [own for own in self.payloads if not set(own.values).isdisjoint(payload.values)]


@lru_cache(maxsize=256)
def _values(payloads: tuple[Payload, ...]) -> tuple[str, ...]:
    """Asked for with every transfer of a plan that is proven."""
    return tuple([name for payload in payloads for name in payload.values])


_FORWARD = (Payload.QKV, Payload.OUT, Payload.LSE)
_BACKWARD = (Payload.QKV_DOUT, Payload.OUT, Payload.LSE_DELTA, Payload.QKV_GRADS)


def shard(rows: int, heads: Heads, is_backward: bool = False) -> Buffer:
    """Buffer 0 of a pipeline: its own rows, with all values of all heads, given ones and results."""
    if is_backward:
        return Buffer(rows, heads.all, _BACKWARD)
    return Buffer(rows, heads.all, (*_FORWARD, Payload.P) if heads.columns else _FORWARD)


@dataclass(slots=True, eq=False)
class Lifetime:
    """From when to when memory is needed.

    Attributes:
        buffer: Whose values it holds.
        payload: Which of them.
        rows: How many rows.
        heads: Of which heads.
        first: The instruction, by number, before which it is made.
        last: The one after which nobody reads it. What a batch packs last is let go of as soon as it is packed, before
            memory is made for what the batch receives.
        receive: The receive that lands there aside, before it is copied into its buffer; None for the buffer's own.
        cuts: Where the values of the payload lie in a row, see :meth:`~hetu.parallel.plan.heads.HeadRange.cuts`.
        width: Heads of all of them together.
    """

    buffer: int
    payload: Payload
    rows: int
    heads: HeadRange
    first: int
    last: int
    receive: Receive | None = None
    cuts: tuple[tuple[str, int, int], ...] = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.cuts = self.heads.cuts(self.payload)
        _, first, count = self.cuts[-1]
        self.width = first + count


@dataclass(frozen=True, slots=True, eq=False)
class Lifetimes:
    """The lifetimes of a part's values, but those of its shard: these last until its end.

    Attributes:
        made: What is made before an instruction, by its number.
        freed: What is let go of after it, where memory is made later on; else it may as well stay until the end.
        results: Before which instruction the shard's results are made; None if nothing writes any.
        written: The instructions before which anything is made.
    """

    made: dict[int, list[Lifetime]]
    freed: dict[int, list[Lifetime]]
    results: int | None
    written: frozenset[int]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Transfers that follow each other: all sends are packed before any is started."""

    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]


def batches(part: PipelinePlan) -> dict[int, Batch]:
    """The batches of a part, by the number of their first instruction; see :mod:`hetu.parallel.proof.follow`."""
    return part.known("batches", lambda: _find_batches(part))


def _find_batches(part: PipelinePlan) -> dict[int, Batch]:
    found: dict[int, list[Send | Receive]] = {}
    first: int | None = None
    for number, item in enumerate(part.instructions):
        if isinstance(item, (Send, Receive)):
            first = number if first is None else first
            found.setdefault(first, []).append(item)
        else:
            first = None
    return {
        number: Batch(
            tuple([item for item in items if isinstance(item, Send)]),
            tuple([item for item in items if isinstance(item, Receive)]),
        )
        for number, items in found.items()
    }


def lifetimes(part: PipelinePlan) -> Lifetimes:
    """The lifetimes of a part's values; found once."""
    return part.known("lifetimes", lambda: _Finder(part).find())


class _Finder:
    """Walks the instructions of a part, and notes what writes first and reads last.

    Attributes:
        now: The number of the instruction, or of the first of its batch.
        safe: The last number up to now at which memory may be made.
        last: The last one up to now at which memory is made for a while: to pack what is sent, or for an attend.
        under_way: Transfers that are started and not waited for, with what a receive among them fills.
        open: The memory of each buffer's payloads that was made last.
        computed: The heads of which attends computed gradients in a foreign buffer since its memory was made.
    """

    def __init__(self, part: PipelinePlan) -> None:
        self.part, self.batches = part, batches(part)
        self.now, self.safe, self.last = 0, 0, 0
        self.under_way: dict[int, list[Lifetime]] = {}
        self.open: dict[tuple[int, Payload], Lifetime] = {}
        self.computed: dict[int, list[HeadRange]] = {}
        self.all: list[Lifetime] = []
        self.results: int | None = None

    def find(self) -> Lifetimes:
        for number, item in enumerate(self.part.instructions):
            is_transfer = isinstance(item, (Send, Receive))
            if not is_transfer or number in self.batches:
                self.now = number
                packs = is_transfer and bool(self.batches[number].sends)
                if packs or not self.under_way or isinstance(item, (Attend, Copy, Accumulate)):
                    self.safe = number
                if packs or (isinstance(item, Attend) and self.part.is_backward):
                    self.last = number
            match item:
                case Send():
                    self._need(item.buffer, item.payload)
                    self.under_way[item.transfer] = []
                case Receive():
                    self._receive(item)
                case Wait():
                    for life in self.under_way.pop(item.transfer, ()):
                        life.last = number
                case Copy():
                    self._need(item.buffer, item.payload)
                    self._need(item.target, item.payload)
                case Accumulate():
                    self._need(item.buffer, Payload.KV_GRADS)
                    self._need(0, Payload.KV_GRADS)
                case Attend():
                    self._attend(item)
        made: dict[int, list[Lifetime]] = {}
        freed: dict[int, list[Lifetime]] = {}
        for life in self.all:
            made.setdefault(life.first, []).append(life)
        written = frozenset([*made, *([] if self.results is None else [self.results])])
        last = max([self.last, *written])
        for life in self.all:
            if life.last <= last:
                freed.setdefault(life.last, []).append(life)
        return Lifetimes(made, freed, self.results, written)

    def _need(self, buffer: int, payload: Payload) -> list[Lifetime]:
        """Notes that an instruction reads or writes a payload of a buffer; gives its memory."""
        if buffer == 0:
            if payload.is_result and self.results is None:
                self.results = self.safe
            return []
        needed = []
        for own in self.part.buffers[buffer].holds(payload):
            if (buffer, own) not in self.open:
                declared = self.part.buffers[buffer]
                self._make(Lifetime(buffer, own, declared.rows, declared.heads, self.safe, self.now))
            self.open[buffer, own].last = self.now
            needed.append(self.open[buffer, own])
        return needed

    def _make(self, life: Lifetime) -> None:
        self.all.append(life)
        if life.receive is None:
            self.open[life.buffer, life.payload] = life

    def _receive(self, item: Receive) -> None:
        filled = self._need(item.buffer, item.payload)
        if item.runs is not None:
            aside = Lifetime(item.buffer, item.payload, item.rows, item.heads, self.safe, self.now, item)
            self._make(aside)
            filled.append(aside)
        self.under_way[item.transfer] = filled

    def _attend(self, item: Attend) -> None:
        """Notes what an attend reads, and what it computes."""
        part = self.part
        if part.queries != item.buffer:
            self._touch(part.queries)
            if item.buffer:
                self._compute_aside(item)
        self._touch(item.buffer)
        if part.queries == 0:
            self._need(0, Payload.OUT)

    def _touch(self, buffer: int) -> None:
        for payload in self.part.buffers[buffer].payloads if buffer else ():
            self._need(buffer, payload)

    def _compute_aside(self, item: Attend) -> None:
        """Gradients of foreign rows are computed anew by each attend for the same heads."""
        buffer, computed = item.buffer, self.computed.setdefault(item.buffer, [])
        is_anew = any(item.heads.overlaps(heads) for heads in computed)
        for payload in self.part.buffers[buffer].payloads:
            if payload.is_result and (is_anew or (buffer, payload) not in self.open):
                self._make(Lifetime(buffer, payload, item.rows, self.part.buffers[buffer].heads, self.now, self.now))
        self.computed[buffer] = [item.heads] if is_anew else [*computed, item.heads]
