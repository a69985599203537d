"""What a row is: the heads of a token, ranges of them, and which of its values a transfer carries."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import accumulate

from hetu.arguments import integer, refuse, shown
from hetu.errors import ShapeError

_OF_KEY_HEADS = ("k", "v", "dk", "dv")
_ONE_A_HEAD = ("lse", "delta")


class Payload(Enum):
    """What the rows of a transfer are: the values of a token that travel together, one after the other in a row.

    ``delta`` is what the backward subtracts from every score's gradient, see
    :func:`hetu.backends.attention.contract.attention_delta`. ``KV_GRADS`` are parts that the owner adds up; the others
    that hold gradients are finished ones.
    """

    KV = ("k", "v")
    KV_GRADS = ("dk", "dv")
    QKV = ("q", "k", "v")
    OUT = ("out",)
    LSE = ("lse",)
    P = ("p",)
    QKV_DOUT = ("q", "k", "v", "dout")
    LSE_DELTA = ("lse", "delta")
    Q_GRADS = ("dq",)
    QKV_GRADS = ("dq", "dk", "dv")

    __hash__ = object.__hash__  # there is one of each, and Enum's own is called for every row that is packed

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values, in order."""
        names: tuple[str, ...] = self._value_  # as ``value``, which looks it up in ten times the time
        return names

    @property
    def is_wide(self) -> bool:
        """Whether they are float32 whatever the inputs are (float64 for float64 inputs)."""
        return self in (Payload.KV_GRADS, Payload.LSE, Payload.LSE_DELTA)

    @property
    def is_result(self) -> bool:
        """Whether an attend computes them, so that they travel to the owner of the rows and not from it."""
        return self not in (Payload.KV, Payload.QKV, Payload.QKV_DOUT, Payload.LSE_DELTA)

    @property
    def label(self) -> str:
        """The values, as printed plans and messages call them."""
        labels = {Payload.KV: "keys and values", Payload.KV_GRADS: "gradients"}
        return labels.get(self, ", ".join(self.values))


@dataclass(frozen=True, slots=True)
class HeadRange:
    """Neighbouring query heads, and the key heads that they use.

    Attributes:
        first_q: Number of the first query head.
        num_q: How many.
        first_kv: Number of the first key head.
        num_kv: How many.
    """

    first_q: int
    num_q: int
    first_kv: int
    num_kv: int

    def contains(self, other: HeadRange) -> bool:
        """Whether all query heads and key heads of another range are of this one, too."""
        return (
            self.first_q <= other.first_q
            and other.first_q + other.num_q <= self.first_q + self.num_q
            and self.first_kv <= other.first_kv
            and other.first_kv + other.num_kv <= self.first_kv + self.num_kv
        )

    def overlaps(self, other: HeadRange) -> bool:
        """Whether some key head is of both, and so perhaps some query head."""
        return self.first_kv < other.first_kv + other.num_kv and other.first_kv < self.first_kv + self.num_kv

    def of(self, value: str) -> slice:
        """The heads of a value of a token, :attr:`Payload.values`."""
        if value in _OF_KEY_HEADS:
            return slice(self.first_kv, self.first_kv + self.num_kv)
        return slice(self.first_q, self.first_q + self.num_q)

    def count(self, value: str) -> int:
        """How many heads :meth:`of` gives."""
        return self.num_kv if value in _OF_KEY_HEADS else self.num_q

    def width(self, payload: Payload) -> int:
        """Heads that a row of a payload holds, those of all its values together."""
        return sum(map(self.count, payload.values))

    def cuts(self, payload: Payload) -> tuple[tuple[str, int, int], ...]:
        """Name, first head and number of heads of each value of a payload, in a row that holds these heads.

        Example:
            >>> HeadRange(first_q=4, num_q=4, first_kv=2, num_kv=2).cuts(Payload.QKV)
            (('q', 0, 4), ('k', 4, 2), ('v', 6, 2))
        """
        return _cuts(self, payload)

    def __str__(self) -> str:
        last = self.first_q + self.num_q - 1
        return f"head {last}" if self.num_q == 1 else f"heads {self.first_q} to {last}" if self.num_q else "no heads"


@lru_cache(maxsize=1024)
def _cuts(heads: HeadRange, payload: Payload) -> tuple[tuple[str, int, int], ...]:
    """Asked for with every memory of every plan."""
    counts = [heads.count(name) for name in payload.values]
    return tuple(zip(payload.values, accumulate([0, *counts]), counts, strict=False))


@lru_cache(maxsize=64)
def _first_heads(num_q: int, num_kv: int) -> HeadRange:
    """One object for equal numbers, so that most comparisons of ranges end with a look at the address."""
    return HeadRange(0, num_q, 0, num_kv)


@dataclass(frozen=True, slots=True)
class Heads:
    """The widths of a token's row: what turns rows into bytes and FLOPs.

    Attributes:
        num_q: Query heads.
        num_kv: Key heads; a divisor of ``num_q``.
        head_dim: Numbers of a head.
        itemsize: Bytes of a number.
        columns: If the softmax is returned, keys of the longest document; else 0.

    Raises:
        ShapeError: If they are no ints from 0, or ``num_kv`` is no divisor of ``num_q``.
    """

    num_q: int
    num_kv: int
    head_dim: int
    itemsize: int
    columns: int = 0

    def __post_init__(self) -> None:
        names = ("num_q", "num_kv", "head_dim", "itemsize", "columns")
        for name in names:  # made in each run
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                object.__setattr__(self, name, integer(value, name, least=0, op="Heads", error=ShapeError))
        if self.num_q and (not self.num_kv or self.num_q % self.num_kv):
            wanted = f"a divisor of num_q, which is {shown(self.num_q)}"
            refuse(self.num_kv, "num_kv", wanted, op="Heads", error=ShapeError)

    @property
    def all(self) -> HeadRange:
        """All heads."""
        return _first_heads(self.num_q, self.num_kv)

    def range(self, start: int, stop: int) -> HeadRange:
        """Query heads ``start .. stop``, and the key heads that they use.

        Example:
            >>> Heads(num_q=6, num_kv=2, head_dim=8, itemsize=2).range(2, 4)
            HeadRange(first_q=2, num_q=2, first_kv=0, num_kv=2)
        """
        start = integer(start, "start", least=0, most=self.num_q, op="Heads", error=ShapeError)
        stop = integer(stop, "stop", least=start, most=self.num_q, op="Heads", error=ShapeError)
        if start == stop:
            return HeadRange(start, 0, 0, 0)
        group = self.num_q // self.num_kv
        first, last = start // group, (stop - 1) // group
        return HeadRange(start, stop - start, first, last - first + 1)

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.row_bytes(Payload.KV)

    @property
    def grad_row_bytes(self) -> int:
        """Bytes of the gradients of one token's keys and values: float32, or float64 for float64 inputs."""
        return self.row_bytes(Payload.KV_GRADS)

    def row_bytes(self, payload: Payload, heads: HeadRange | None = None) -> int:
        """Bytes of one row of a transfer, of all heads or of a range of them.

        Example:
            >>> heads = Heads(num_q=6, num_kv=2, head_dim=8, itemsize=2)
            >>> heads.row_bytes(Payload.KV), heads.row_bytes(Payload.QKV, heads.range(0, 3))
            (64, 80)
        """
        if type(payload) is not Payload or not (heads is None or type(heads) is HeadRange):
            name, value, wanted = (
                ("heads", heads, "a range of heads") if type(payload) is Payload else ("payload", payload, "a Payload")
            )
            refuse(value, name, wanted, op="Heads")
        width = (heads or self.all).width(payload) * self.numbers(payload)
        return width * (max(self.itemsize, 4) if payload.is_wide else self.itemsize)

    def numbers(self, payload: Payload) -> int:
        """How many numbers a head of a payload's values has."""
        return self.columns if payload is Payload.P else 1 if payload.values[0] in _ONE_A_HEAD else self.head_dim
