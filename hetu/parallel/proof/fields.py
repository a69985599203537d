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
from hetu.parallel.layout.pieces import Totals
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

_TOTALS: Any = Totals

_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)

_SHORT = 2**16
"""Arrays up to this size are joined to be checked: a long one may be a view of a single number."""


class _WrongFieldError(Exception):
    """A field that has another type. Whoever looked into a value on the way there adds the name by which it did.

    So texts are made of places that are wrong only, and not of all the thousands that a plan has.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what, self.path = what, list[str]()


class _Walk:
    """What was looked at.

    Attributes:
        seen: The ids of what was checked already: instructions may share their sources, and so on.
        arrays: Those whose numbers are yet to be checked, all at once; None to check each where it is met.
    """

    def __init__(self, arrays: list[IntArray] | None) -> None:
        self.seen: set[int] = set()
        self.arrays = arrays

    def is_new(self, value: Any) -> bool:
        """Whether a value was not checked yet; it is from now on."""
        known = len(self.seen)
        self.seen.add(id(value))
        return len(self.seen) > known

    def in_range(self) -> bool:
        """Whether the numbers of all arrays that were noted are small enough."""
        arrays = self.arrays or []
        some = (np.concatenate([x.reshape(-1) for x in arrays[i : i + 512]]) for i in range(0, len(arrays), 512))
        return all(x.size == 0 or (x.min() >= -MOST and x.max() <= MOST) for x in some)


Check = Callable[[Any, _Walk], None]
"""Checks a value.

Raises:
    _WrongFieldError: If it is not what it should be.
"""


def check_fields(plan: PlanData) -> None:
    """Demands of all fields of a plan, however deep, the types that their classes declare.

    Raises:
        PlanError: If one has another type; names its place in the plan.
    """
    check, walk = _check_of(PlanData), _Walk([])
    try:
        check(plan, walk)
        if not walk.in_range():
            check(plan, _Walk(None))
    except _WrongFieldError as wrong:
        refuse(f"plan{''.join(reversed(wrong.path))}{wrong.what}")


@cache
def _check_of(hint: Any) -> Check:
    """The check of what a field is declared to be."""
    if hint == _TOTALS:
        return _check_totals
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
    def check(value: Any, walk: _Walk) -> None:
        if type(value) is not kind:
            _refuse(value, kind.__name__)

    return check


def _any_of(hints: tuple[Any, ...]) -> Check:
    plain = [_plain(hint) for hint in hints if hint is not type(None)]
    by_type = {get_origin(hint) or hint: _check_of(hint) for hint in plain}
    takes_none = type(None) in hints

    def check(value: Any, walk: _Walk) -> None:
        if value is None and takes_none:
            return
        found = by_type.get(type(value))
        if found is None:
            names = [kind.__name__ for kind in by_type] + ["None"] * takes_none
            _refuse(value, " or ".join(names))
        found(value, walk)

    return check


def _each(hint: Any) -> Check:
    check_one = _check_of(hint)

    def check(value: Any, walk: _Walk) -> None:
        if type(value) is not tuple:
            _refuse(value, "tuple")
        number = 0
        try:
            for item in value if walk.is_new(value) else ():
                check_one(item, walk)
                number += 1
        except _WrongFieldError as wrong:
            wrong.path.append(f"[{number}]")
            raise

    return check


def _fields_of(kind: Any) -> Check:
    hints = get_type_hints(kind)
    checks = [(item.name, _check_of(hints[item.name])) for item in fields(kind) if item.repr]
    columns = [name for name, check in checks if hints[name] == _INTS or _INTS in get_args(hints[name])]

    def check(value: Any, walk: _Walk) -> None:
        if not isinstance(value, kind):
            _refuse(value, kind.__name__)
        name = ""
        try:
            for name, check_one in checks if walk.is_new(value) else ():
                check_one(getattr(value, name), walk)
        except _WrongFieldError as wrong:
            wrong.path.append(f".{name}")
            raise
        if kind in _COLUMNS:
            _check_columns(value, columns)

    return check


def _check_array(value: Any, walk: _Walk) -> None:
    if type(value) is not np.ndarray or value.dtype != _INT64:
        _refuse(value, "an int64 array")
    if walk.arrays is not None and value.size <= _SHORT:
        walk.arrays.append(value)
    elif value.size and not (value.min() >= -MOST and value.max() <= MOST):
        raise _WrongFieldError(f" holds numbers from {value.min()} to {value.max()}, expected them within {MOST} of 0")


def _check_totals(value: Any, walk: _Walk) -> None:
    if type(value) is not np.ndarray or value.dtype != _INT32:
        _refuse(value, "an int32 array")


def _check_columns(value: Any, columns: list[str]) -> None:
    shape = getattr(value, columns[0]).shape
    for name in columns:
        column = getattr(value, name)
        if column is not None and (column.shape != shape or len(shape) != 1):
            what = f".{name} has shape {column.shape}, expected one dimension, and as many entries as in {columns[0]}"
            raise _WrongFieldError(what)


def _check_layout(value: Any, walk: _Walk) -> None:
    if type(value) is not Layout:
        _refuse(value, "Layout")
    try:
        _check_of(tuple[GroupLayout, ...])(value.groups, walk)
    except _WrongFieldError as wrong:
        wrong.path.append(".groups")
        raise


def _check_rule(value: Any, walk: _Walk) -> None:
    if type(value) not in RULES:
        _refuse(value, " or ".join(kind.__name__ for kind in RULES))
    _fields_of(type(value))(value, walk)
    if not all(isinstance(size, int) for size in value.sizes):
        raise _WrongFieldError(" has numbers that are not bound, expected ints")
    try:
        value.check()
    except HetuError as error:
        raise _WrongFieldError(f" is no mask: {error.what}") from error


def _refuse(value: Any, wanted: str) -> NoReturn:
    if isinstance(value, np.ndarray):
        raise _WrongFieldError(f" is a {value.dtype} array ({type(value).__name__}), expected {wanted}")
    raise _WrongFieldError(f" is {shown(value)} ({type(value).__name__}), expected {wanted}")
