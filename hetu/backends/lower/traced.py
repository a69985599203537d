"""What Inductor may see of the calls that lowerings emit.

``hetu.config(compile=True)`` gives Inductor the parts of a module that are made of torch's functions, and of hetu's
that are entered here. All others are called as they are: attention, what exchanges values between pipelines, what
checks indices, random numbers, and scattered sums, whose order would not be the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

TRACED: dict[Callable[..., Any], Callable[..., Any]] = {}
"""By a function that lowerings call, what is traced in its place: the same, up to rounding, for all sizes at once."""

ASIDE: set[Callable[..., Any]] = set()
"""Functions that are not traced, and that take so little that what stands around them is compiled together."""


def traced(function: Function) -> Function:
    """Decorator: the function may be traced as it is: which torch functions it calls depends on no size."""
    TRACED[function] = function
    return function


def traced_as(plain: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorator: ``plain`` is traced in the function's place. It has no loops over rows, and names every value."""

    def add(function: Function) -> Function:
        TRACED[function] = plain
        return function

    return add


def aside(function: Function) -> Function:
    """Decorator: the function is called as it is, and holds up nothing that does not read what it gives."""
    ASIDE.add(function)
    return function
