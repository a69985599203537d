"""Checks that every field of a plan has the type that its class declares, before anything is made of it.

What comes after this may count on it: ints are Python's own, arrays are ``int64`` with numbers that can be added and
multiplied without overflow, and arrays that belong together have one length. Nothing is allocated here. Fields that
are no part of a value, which are not shown, are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import numpy as np

from hetu.arguments import shown
from hetu.errors import HetuError
from hetu.parallel.layout.group import GroupLayout, Spans
from hetu.parallel.layout.layout import Layout
from hetu.parallel.mask.rules import RULES, Rule
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable
from hetu.parallel.plan.instructions import Runs
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.transfers import refuse

MOST = 2**31
"""The largest number in an array, apart from its sign: products of two still fit."""

_COLUMNS = (QuerySpans, SegmentTable, Runs, Spans)
"""Structs of arrays: all columns have one length."""

_INTS: Any = IntArray

Check = Callable[[Any, str, "set[int]"], None]
"""Checks a value; gets its place in the plan, and the ids of what was checked already."""


def check_fields(plan: PlanData) -> None:
    """Demands of all fields of a plan, however deep, the types that their classes declare.

    Raises:
        PlanError: If one has another type; names its place in the plan.
    """
    _check_of(PlanData)(plan, "plan", set())


@cache
def _check_of(hint: Any) -> Check:
    """The check of what a field is declared to be."""
    hint = _plain(hint)
    if hint in (int, bool, str):
        return _exactly(hint)
    if hint is np.ndarray:
        return _check_array
    if hint is Layout:
        return _check_layout
    if get_origin(hint) in (Union, UnionType):
        return _any_of(get_args(hint))
    if get_origin(hint) is Sequence or (get_origin(hint) is tuple and get_args(hint)[1:] == (...,)):
        return _each(get_args(hint)[0])  # parts that are built when they are asked for were asked for
    if hint is Rule:
        return _check_rule
    if is_dataclass(hint):
        return _fields_of(hint)
    if isinstance(hint, type):  # an enumeration
        return _exactly(hint)
    raise NotImplementedError(f"fields of plans of type {hint} are not checked: say here how")


def _plain(hint: Any) -> Any:
    """A type hint, or the class of arrays: in some versions of numpy a hint of arrays does not lead to it."""
    return np.ndarray if hint == _INTS else hint


def _exactly(kind: type) -> Check:
    def check(value: Any, place: str, _: set[int]) -> None:
        if type(value) is not kind:
            _refuse(value, place, kind.__name__)

    return check


def _any_of(hints: tuple[Any, ...]) -> Check:
    plain = [_plain(hint) for hint in hints if hint is not type(None)]
    by_type = {get_origin(hint) or hint: _check_of(hint) for hint in plain}
    takes_none = type(None) in hints

    def check(value: Any, place: str, seen: set[int]) -> None:
        if value is None and takes_none:
            return
        found = by_type.get(type(value))
        if found is None:
            names = [kind.__name__ for kind in by_type] + ["None"] * takes_none
            _refuse(value, place, " or ".join(names))
        found(value, place, seen)

    return check


def _each(hint: Any) -> Check:
    check_one = _check_of(hint)

    def check(value: Any, place: str, seen: set[int]) -> None:
        if type(value) is not tuple:
            _refuse(value, place, "tuple")
        if id(value) not in seen:  # instructions may share their sources, and so on
            seen.add(id(value))
            for number, item in enumerate(value):
                check_one(item, f"{place}[{number}]", seen)

    return check


def _fields_of(kind: Any) -> Check:
    hints = get_type_hints(kind)
    checks = [(item.name, _check_of(hints[item.name])) for item in fields(kind) if item.repr]

    def check(value: Any, place: str, seen: set[int]) -> None:
        if not isinstance(value, kind):
            _refuse(value, place, kind.__name__)
        if id(value) in seen:
            return
        seen.add(id(value))
        for name, check_one in checks:
            check_one(getattr(value, name), f"{place}.{name}", seen)
        if isinstance(value, _COLUMNS):
            _check_columns(value, place)

    return check


def _check_array(value: Any, place: str, _: set[int]) -> None:
    if type(value) is not np.ndarray or value.dtype != np.int64:
        _refuse(value, place, "an int64 array")
    if value.size and not (value.min() >= -MOST and value.max() <= MOST):
        refuse(f"{place} holds numbers from {value.min()} to {value.max()}, expected them within {MOST} of 0")


def _check_columns(value: Any, place: str) -> None:
    columns = [item.name for item in fields(value) if isinstance(getattr(value, item.name), np.ndarray) and item.repr]
    length = getattr(value, columns[0]).shape
    for name in columns:
        found = getattr(value, name).shape
        if len(found) != 1 or found != length:
            refuse(f"{place}.{name} has shape {found}, expected one dimension, and as many entries as in {columns[0]}")


def _check_layout(value: Any, place: str, seen: set[int]) -> None:
    if type(value) is not Layout:
        _refuse(value, place, "Layout")
    _check_of(tuple[GroupLayout, ...])(value.groups, f"{place}.groups", seen)


def _check_rule(value: Any, place: str, seen: set[int]) -> None:
    if type(value) not in RULES:
        _refuse(value, place, " or ".join(kind.__name__ for kind in RULES))
    _fields_of(type(value))(value, place, seen)
    if not all(isinstance(size, int) for size in value.sizes):
        refuse(f"{place} has numbers that are not bound, expected ints")
    try:
        value.check()
    except HetuError as error:
        refuse(f"{place} is no mask: {error.what}")


def _refuse(value: Any, place: str, wanted: str) -> NoReturn:
    if isinstance(value, np.ndarray):
        refuse(f"{place} is a {value.dtype} array ({type(value).__name__}), expected {wanted}")
    refuse(f"{place} is {shown(value)} ({type(value).__name__}), expected {wanted}")
