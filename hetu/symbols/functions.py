"""Functions of sizes: a quotient rounded up, and the largest and the smallest of several."""

from __future__ import annotations

from typing import Any

from hetu.arguments import refuse
from hetu.errors import BindingError
from hetu.symbols.expr import Max, Min
from hetu.symbols.int_symbol import IntSymbol, as_symbol


def ceil_div(a: IntSymbol | int, b: IntSymbol | int) -> IntSymbol:
    """``a / b`` rounded up.

    Args:
        a: An int or a symbol.
        b: What it is divided by; not 0.

    Returns:
        The quotient, as a symbol.

    Example:
        >>> ceil_div(IntSymbol("s"), 128), ceil_div(129, 128).constant
        (IntSymbol((s + 127)//128), 2)
    """
    a, b = as_symbol(a, "a"), as_symbol(b, "b")
    if b == 0:
        refuse(0, "b", "an int other than 0", op="ceil_div", error=BindingError)
    if b.constant is not None and b.constant > 0:
        return (a + (b - 1)) // b  # as people write it, so that both are equal
    return -((-a) // b)


def maximum(*values: IntSymbol | int) -> IntSymbol:
    """The largest of one or more values.

    Args:
        *values: Ints or symbols, one at least.

    Returns:
        The largest, as a symbol.

    Example:
        >>> maximum(3, 5).constant
        5
    """
    return _extremum(Max, values)


def minimum(*values: IntSymbol | int) -> IntSymbol:
    """The smallest of one or more values.

    Args:
        *values: Ints or symbols, one at least.

    Returns:
        The smallest, as a symbol.

    Example:
        >>> minimum(3, 5).constant
        3
    """
    return _extremum(Min, values)


def _extremum(kind: Any, values: tuple[IntSymbol | int, ...]) -> IntSymbol:
    if not values:
        raise TypeError("expected at least one value")  # as Python says it of its own max
    return IntSymbol.from_expr(kind(*(as_symbol(item, f"values[{i}]").expr for i, item in enumerate(values))))
