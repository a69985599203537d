"""Random integer expressions, with what they mean told three times: on ints, on sympy's numbers, and as IntSymbols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from hypothesis import strategies as st

import hetu
from hetu import IntSymbol

Tree = Any
"""An int, a leaf's index in a 1-tuple, or ``(operation, operand, ...)``."""

LARGE = 2**70


@dataclass(frozen=True)
class Meaning:
    """What the operations are, in one world of numbers."""

    floordiv: Callable[[Any, Any], Any]
    mod: Callable[[Any, Any], Any]
    ceil_div: Callable[[Any, Any], Any]
    maximum: Callable[..., Any]
    minimum: Callable[..., Any]


INTS = Meaning(lambda a, b: a // b, lambda a, b: a % b, lambda a, b: -((-a) // b), lambda *v: max(v), lambda *v: min(v))
SYMPY = Meaning(
    lambda a, b: sympy.floor(sympy.Rational(a, b)),
    lambda a, b: a - b * sympy.floor(sympy.Rational(a, b)),
    lambda a, b: sympy.ceiling(sympy.Rational(a, b)),
    sympy.Max,
    sympy.Min,
)
SYMBOLS = Meaning(lambda a, b: a // b, lambda a, b: a % b, hetu.ceil_div, hetu.maximum, hetu.minimum)


def build(tree: Tree, leaves: Sequence[Any], number: Callable[[int], Any], world: Meaning) -> Any:
    """The value of a tree in a world."""
    if isinstance(tree, int):
        return number(tree)
    if len(tree) == 1:
        return leaves[tree[0]]
    parts = [build(part, leaves, number, world) for part in tree[1:]]
    if tree[0] == "+":
        return parts[0] + parts[1]
    if tree[0] == "-":
        return parts[0] - parts[1]
    if tree[0] == "*":
        return parts[0] * parts[1]
    if tree[0] == "neg":
        return -parts[0]
    return getattr(world, tree[0])(*parts)


@dataclass(frozen=True)
class Unknowns:
    """Leaves, and a value in range for each."""

    leaves: tuple[IntSymbol, ...]
    values: tuple[int, ...]

    @property
    def bound(self) -> dict[IntSymbol, int]:
        return dict(zip(self.leaves, self.values, strict=True))


numbers = st.one_of(st.integers(-9, 9), st.integers(-LARGE, LARGE), st.sampled_from([64, 128, 2**60 + 1, -(2**53) - 1]))


@st.composite
def unknowns(draw: st.DrawFn) -> Unknowns:
    """Three leaves named a, b, c, of all kinds of ranges, and a value in each."""
    leaves, values = [], []
    for name in "abc":
        multiple = draw(st.sampled_from([1, 1, 2, 64]))
        value = draw(numbers) // multiple * multiple
        low = draw(st.none() | st.just(value) | st.integers(0, 200).map(lambda gap, value=value: value - gap))
        high = draw(st.none() | st.just(value) | st.integers(0, 200).map(lambda gap, value=value: value + gap))
        leaves.append(IntSymbol(name, min=low, max=high, multiple_of=multiple))
        values.append(value)
    return Unknowns(tuple(leaves), tuple(values))


def _larger(part: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    pairs = st.tuples(st.sampled_from(["+", "-", "*", "floordiv", "mod", "ceil_div"]), part, part)
    by_number = st.tuples(st.sampled_from(["*", "floordiv", "mod", "ceil_div"]), part, numbers)
    extrema = st.tuples(st.sampled_from(["maximum", "minimum"]), st.lists(part, min_size=1, max_size=4))
    return st.one_of(pairs, by_number, st.tuples(st.just("neg"), part), extrema.map(lambda item: (item[0], *item[1])))


leaf_trees = st.integers(0, 2).map(lambda index: (index,))
trees: st.SearchStrategy[Tree] = st.recursive(leaf_trees | leaf_trees | numbers, _larger, max_leaves=10)
