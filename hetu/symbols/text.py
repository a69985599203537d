"""How expressions read: as the Python that makes them again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from keyword import iskeyword
from typing import Any

from hetu.symbols.expr import Extremum, FloorDiv, Leaf, Mod, parts_of

# How tightly a text holds together, for brackets.
_SUM, _FLOOR, _PRODUCT, _ATOM = range(4)


def names_of(leaves: Iterable[Leaf]) -> dict[Leaf, str]:
    """What a text calls unknowns: by their names, with a number behind where several of them have the same.

    Names are such as Python takes: what else a name has in it is an underscore in a text.
    """
    named: dict[str, list[Leaf]] = {}
    for leaf in sorted(set(leaves), key=lambda leaf: leaf.dummy_index):
        named.setdefault(_identifier(str(leaf.name)), []).append(leaf)
    found: dict[Leaf, str] = {same[0]: name for name, same in named.items() if len(same) == 1}
    taken = set(named)
    for name, same in named.items():
        numbers = itertools.count(1)
        for leaf in same if len(same) > 1 else ():
            found[leaf] = next(text for number in numbers if (text := f"{name}_{number}") not in taken)
            taken.add(found[leaf])
    return found


def _identifier(name: str) -> str:
    """A name as Python takes one; dots stay, as in ``parallel_attn_0.batch``, which is told apart by them."""
    parts = [re.sub(r"\W", "_", part) for part in name.split(".")]
    return ".".join(f"_{part}" if _is_taken(part) else part for part in parts)


def _is_taken(name: str) -> bool:
    """Whether a name is none for an unknown: ``max`` and ``min`` are functions in texts."""
    return not name.isidentifier() or iskeyword(name) or name in ("max", "min")


def text_of(expr: Any, names: Mapping[Leaf, str] | None = None) -> str:
    """How an expression reads: as the Python that would make it again.

    Args:
        expr: The expression.
        names: What its unknowns are called; by default what :func:`names_of` says of them.
    """
    texts: dict[Any, tuple[str, int]] = {}
    parts = parts_of(expr)
    called = names_of(item for item in parts if isinstance(item, Leaf)) if names is None else names
    for item in parts:
        texts[item] = (called[item], _ATOM) if isinstance(item, Leaf) else _text(item, texts)
    return texts[expr][0]


def _text(item: Any, texts: dict[Any, tuple[str, int]]) -> tuple[str, int]:
    def of(part: Any, least: int) -> str:
        text, holds = texts[part]
        return text if holds >= least else f"({text})"

    if item.is_Integer:
        return _digits(int(item.p)), _ATOM if item.p >= 0 else _SUM
    if isinstance(item, (FloorDiv, Mod)):
        return ("//" if isinstance(item, FloorDiv) else "%").join(of(part, _ATOM) for part in item.args), _FLOOR
    if isinstance(item, Extremum):
        return f"{type(item).__name__.lower()}({', '.join(of(part, _SUM) for part in item.args)})", _ATOM
    if item.is_Pow:
        return "**".join(of(part, _ATOM) for part in item.args), _PRODUCT
    if item.is_Mul:
        number, _ = item.as_coeff_Mul()
        factors = sorted((of(part, _PRODUCT) for part in item.args if not part.is_Integer), key=_short_first)
        sign = {1: "", -1: "-"}.get(int(number.p), f"{number.p}*")
        return sign + "*".join(factors), _PRODUCT if number.p > 0 else _SUM
    positive, negative = list[str](), list[tuple[str, str]]()
    for part in item.args:
        number, rest = part.as_coeff_Mul()
        if number.p > 0:
            positive.append(of(part, _SUM))
        else:  # a floor may stand bare after a minus, s - s//2, but not at the beginning: -s//2 is (-s)//2
            alone = of(part, _SUM)
            negative.append((f"-{of(rest, _FLOOR)}" if number.p == -1 and rest in texts else alone, alone))
    positive.sort(key=_short_first)
    negative.sort(key=lambda term: _short_first(term[0]))
    first, *others = positive or [negative.pop(0)[1]]
    terms = [f" + {term}" for term in others] + [f" - {term[1:]}" for term, _ in negative]
    return first + "".join(terms), _SUM


def _digits(number: int) -> str:
    """An int as Python reads it: Python refuses to write thousands of digits, but not of hexadecimal ones."""
    return str(number) if number.bit_length() < _MOST_BITS else hex(number)


_MOST_BITS = 2048


def _short_first(text: str) -> tuple[bool, int, str]:
    """Sorts what is simple to the front, numbers last; sympy's own order costs more, and recurses."""
    bare = text.lstrip("-0123456789*")
    return not bare, len(bare), bare


_PLACE = re.compile(r"((?:.?[<>^])?)[^0-9]*0?([0-9]*)")
"""The beginning of a format spec: a fill and an alignment, signs and flags that only numbers have, and a width."""


def placed(text: str, spec: str) -> str:
    """A text as wide as a format spec of ints says, and where it says; what no int takes is refused."""
    try:
        return format(text, spec)
    except ValueError:
        format(0, spec)  # as Python says it
    place = _PLACE.match(spec)
    assert place is not None, "it matches the empty text"
    return format(text, f"{place[1] or '>'}{place[2] or ''}")
