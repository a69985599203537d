"""Relations between symbols: decided where ranges decide them, else checked when the graph runs."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from hetu.errors import UnboundSymbolError, Where, caller
from hetu.symbols.analysis import bounds_of, difference_of, never_zero
from hetu.symbols.expr import Leaf, interval_of_difference, make_int, subtract, terms
from hetu.symbols.int_symbol import IntSymbol, as_symbol
from hetu.symbols.interval import Interval
from hetu.symbols.text import names_of, text_of

_STEPS, _MOST_KNOWN = 3, 8
"""How many known relations are put together for a decision, and of how many."""

_OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A comparison of two sizes.

    Attributes:
        op: ``<``, ``<=``, ``>``, ``>=`` or ``==``.
        lhs: Left side.
        rhs: Right side.
        reason: What is expected, for the error.
        op_name: Who demands it.
        where: The user's line that asked for it.

    Example:
        >>> s = IntSymbol("s", min=8)
        >>> (s > 5).decided, (s > 9).decided, str(s > 9)
        (True, None, 's > 9')
    """

    requirements: ClassVar[Callable[[], Sequence[Constraint]]] = tuple
    """Gives what the current graph requires: set by the graph, of which symbols know nothing."""

    op: str
    lhs: IntSymbol
    rhs: IntSymbol
    reason: str = dataclasses.field(default="", compare=False)
    op_name: str = dataclasses.field(default="", compare=False)
    where: Where | None = dataclasses.field(default=None, compare=False)

    def because(self, reason: str, *, op_name: str, where: Where) -> Constraint:
        """The same, with who demands it, where and why."""
        return dataclasses.replace(self, reason=reason, op_name=op_name, where=where)

    @cached_property
    def decided(self) -> bool | None:
        """Whether it holds for all values in range (True) or for none (False); None if that depends or is not known."""
        quick = _decide(self.op, self.lhs.interval - self.rhs.interval)
        if quick is not None:
            return quick
        quick = _decide(self.op, interval_of_difference(self.lhs.expr, self.rhs.expr))
        if quick is not None:
            return quick
        difference = difference_of(self.lhs.expr, self.rhs.expr)
        if self.op == "==" and never_zero(difference):
            return False
        return _decide(self.op, bounds_of(difference))

    def decided_by(self, known: Sequence[Constraint]) -> bool | None:
        """The same as :attr:`decided`, where some relations are known to hold: what ``hetu.require`` demanded.

        Only relations between symbols that the comparison has itself are used: a run that binds these checks them.

        Args:
            known: The relations.

        Example:
            >>> a, b = IntSymbol("a"), IntSymbol("b")
            >>> (a + 1 > b).decided_by([a >= b])
            True
        """
        if self.decided is not None or not known:
            return self.decided
        own = {*self.lhs.leaves, *self.rhs.leaves}
        usable = [item for item in known if own.issuperset((*item.lhs.leaves, *item.rhs.leaves))][:_MOST_KNOWN]
        facts = [fact for item in usable for fact in item._at_least_zero()]
        if not facts:
            return None
        difference = difference_of(self.lhs.expr, self.rhs.expr)
        low, low_of_negative = (
            _least_by(item, facts, _STEPS) for item in (difference, subtract(make_int(0), difference))
        )
        return _decide(self.op, Interval(low, None if low_of_negative is None else -low_of_negative))

    def _at_least_zero(self) -> list[Any]:
        """Expressions that are at least 0 where it holds."""
        difference = difference_of(self.lhs.expr, self.rhs.expr)
        negative = subtract(make_int(0), difference)
        one = make_int(1)
        return {
            ">=": [difference],
            ">": [subtract(difference, one)],
            "<=": [negative],
            "<": [subtract(negative, one)],
            "==": [difference, negative],
        }[self.op]

    def holds(self, values: Mapping[IntSymbol, int]) -> bool:
        """Whether it holds for given values of the leaves."""
        return _OPERATORS[self.op](self.lhs.evaluate(values), self.rhs.evaluate(values))

    def __bool__(self) -> bool:
        decided = self.decided_by(type(self).requirements())
        if decided is None:
            names = ", ".join(self._names().values())
            raise UnboundSymbolError(
                f"whether {self} is known only when the graph runs: it depends on {names}",
                where=caller(),
                fix=f"demand it with hetu.require({self}), or give {names} a range that decides it",
            )
        return decided

    def _names(self) -> dict[Leaf, str]:
        return names_of(leaf.expr for leaf in (*self.lhs.leaves, *self.rhs.leaves))

    def __str__(self) -> str:
        names = self._names()
        return f"{text_of(self.lhs.expr, names)} {self.op} {text_of(self.rhs.expr, names)}"


def equal(a: IntSymbol | int, b: IntSymbol | int) -> Constraint:
    """The relation ``a == b`` (``==`` itself compares structure).

    Args:
        a: An int or a symbol.
        b: Another one.

    Returns:
        The relation, which :func:`hetu.require` demands of every run.

    Example:
        >>> s = IntSymbol("s")
        >>> bool(equal(s + s, 2 * s))
        True
    """
    return Constraint("==", as_symbol(a, "a"), as_symbol(b, "b"))


def _least_by(expr: Any, facts: Sequence[Any], steps: int) -> int | None:
    """A lower bound of an expression, from that of what is left without some of the facts, which are at least 0."""
    bounds = [bounds_of(expr).lo]
    for place, fact in enumerate(facts if steps else ()):
        left = difference_of(expr, fact)
        if len(terms(left)) <= len(terms(expr)):  # something of it cancels
            bounds.append(_least_by(left, facts[place:], steps - 1))
    return max((bound for bound in bounds if bound is not None), default=None)


def _decide(op: str, difference: Interval) -> bool | None:
    """Whether ``difference op 0``."""
    low, high = difference.lo, difference.hi
    if op in (">", ">="):
        return _decide({">": "<", ">=": "<="}[op], -difference)
    if op == "==":
        return True if low == high == 0 else None if 0 in difference else False
    limit = 0 if op == "<=" else -1
    if high is not None and high <= limit:
        return True
    return False if low is not None and low > limit else None
