"""Arithmetic that is the same on arrays of ints and on arrays of symbols, so that a count is written once.

An array of symbols has dtype object; its sums, products and ``//`` are those of its items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.symbols import IntSymbol, maximum, minimum

Numbers = NDArray[Any]
"""int64, or object where the items are symbols, or ints that may be beyond 64 bits."""


def numbers(items: Any) -> Numbers:
    """An array of ints, or of ints and symbols; ints stay exact however large they are."""
    return np.array(items, object)


add_up = np.add.reduce
"""The sum along an axis: in half of the time of the method, which matters for groups of a few members."""


def larger(a: Any, b: Any) -> Any:
    """The larger of each two."""
    return _MAXIMUM(a, b)


def smaller(a: Any, b: Any) -> Any:
    """The smaller of each two."""
    return _MINIMUM(a, b)


def any_of(x: Any) -> Any:
    """1 where a number from 0 is positive, else 0."""
    return smaller(x, 1)


def triangle(x: Any) -> Any:
    """``1 + 2 + ... + x``; 0 where x is below 1."""
    x = larger(x, 0)
    return x * (x + 1) // 2


def lifted(size: Any) -> Any:
    """A number that may be a symbol, as what arrays can be computed with."""
    return np.array([size], object) if isinstance(size, IntSymbol) else size


def _is_symbolic(x: Any) -> bool:
    return x.dtype.char == "O" if isinstance(x, np.ndarray) else isinstance(x, IntSymbol)


def _extremum(of_ints: Callable[..., Any], of_symbols: Callable[..., Any], of_arrays: Any) -> Callable[[Any, Any], Any]:
    """Of two numbers, or of each two items of arrays."""

    def pick(a: Any, b: Any) -> Any:
        return (of_symbols if isinstance(a, IntSymbol) or isinstance(b, IntSymbol) else of_ints)(a, b)

    of_items = np.frompyfunc(pick, 2, 1)

    def extremum(a: Any, b: Any) -> Any:
        if not isinstance(a, np.ndarray) and not isinstance(b, np.ndarray):
            return pick(a, b)
        return of_items(lifted(a), lifted(b)) if _is_symbolic(a) or _is_symbolic(b) else of_arrays(a, b)

    return extremum


_MAXIMUM = _extremum(max, maximum, np.maximum)
_MINIMUM = _extremum(min, minimum, np.minimum)
