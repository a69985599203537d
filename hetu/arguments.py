"""What users pass: one converter per kind of argument, called where the argument enters.

A converter gives the plain Python value, or raises an error that names the argument and the user's line. What counts:

- Numbers are Python's, numpy's scalars, and arrays and torch tensors without dimensions. Bools are neither ints nor
  floats, and floats are no ints.
- Flags are bools, Python's or numpy's. Nothing else has a truth here.
- Sequences are lists, tuples and whatever else has an order and a length; arrays too, row by row. Strings, bytes, sets
  and iterators are none: an iterator can be read only once.

Sizes, which may be symbols, are converted by :func:`hetu.symbols.as_size`, and dtypes by :func:`hetu.as_dtype`.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Collection, KeysView, Mapping, Sequence, ValuesView
from functools import cache
from typing import Any, NoReturn, cast

import numpy as np

from hetu.errors import DTypeError, HetuError, ShapeError, caller

Number = bool | int | float

MAX_COUNT = 2**16
"""The most strategies, micro-batches or pieces of a tensor: a larger number is a mistake, and a loop without end."""

MAX_BYTES = 2**57
"""The most bytes of a tensor: no processor addresses more."""

MOST_OF_FLOATS = 2**1023
"""The greatest whole number that is taken for a float; in a narrow dtype it is infinite, as torch has it."""

_DEVICE = re.compile(r"(cpu|cuda)(:(0|[1-9][0-9]{0,8}))?")
_SHOWN = 120


def shown(value: Any) -> str:
    """A value for a message: its repr, cut where it is long; its type where it has none."""
    try:
        text = repr(value)
    except Exception:  # a repr may fail in any way: an int of 5,000 digits has none
        text = f"an int of {value.bit_length()} bits" if type(value) is int else f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def refuse(
    value: Any,
    name: str,
    wanted: str,
    *,
    op: str | None = None,
    error: type[HetuError] = HetuError,
    fix: str | None = None,
) -> NoReturn:
    """Raises the error of an argument that is something else than what is wanted.

    Args:
        value: What came.
        name: The argument's name.
        wanted: What is expected, as in ``"an int"``.
        op: Who asks.
        error: The class of the error.
        fix: What to do.
    """
    got = shown(value) if value is None else f"{shown(value)} ({type(value).__name__})"
    raise error(f"expected {name} to be {wanted}, got {got}", op=op, where=caller(), fix=fix or f"give {wanted}")


def is_torch(value: Any) -> bool:
    """Whether a value is a torch tensor; torch is not imported for that."""
    return _is_torch_type(type(value))  # type: ignore[arg-type] # a class is hashable, whatever mypy thinks of it


@cache  # every feed of every run is asked
def _is_torch_type(kind: Any) -> bool:
    return hasattr(kind, "detach") and any(base.__module__.partition(".")[0] == "torch" for base in kind.__mro__)


def number_of(value: Any) -> Number | None:
    """A number as Python's own bool, int or float; None for anything else. Complex numbers are none.

    Example:
        >>> number_of(np.float32(0.5)), number_of(np.array(3)), number_of("3")
        (0.5, 3, None)
    """
    kind = type(value)
    if kind is int or kind is float or kind is bool:
        return cast(Number, value)
    if isinstance(value, float):
        return float(value)
    try:
        if isinstance(value, (np.generic, np.ndarray)):
            is_plain = value.ndim == 0 and value.dtype.kind in "biuf" and not isinstance(value, np.ma.MaskedArray)
            return _plain(value) if is_plain else None
        if is_torch(value):
            return _plain(value) if value.ndim == 0 else None
        return operator.index(value)
    except Exception:  # a value without data (torch's meta tensors), or with an __index__ that fails
        return None


def _plain(value: Any) -> Number | None:
    """The item of an array without dimensions."""
    item = value.item()
    return item if isinstance(item, (bool, int, float)) else float(item) if isinstance(item, np.floating) else None


def int_of(value: Any) -> int | None:
    """A whole number that is no bool as Python's int; None for anything else.

    Example:
        >>> int_of(np.int64(3)), int_of(True), int_of(3.0)
        (3, None, None)
    """
    number = number_of(value)
    return number if type(number) is int else None


def integer(
    value: Any,
    name: str,
    *,
    least: int | None = None,
    most: int | None = None,
    op: str | None = None,
    error: type[HetuError] = HetuError,
    fix: str | None = None,
) -> int:
    """An int within bounds.

    Args:
        value: What came.
        name: The argument's name.
        least: The least allowed value; None for no bound.
        most: The greatest allowed value; None for no bound.
        op: Who asks, for the error.
        error: The class of the error.
        fix: What to do, for the error.

    Example:
        >>> integer(np.int32(7), "head_dim", least=1)
        7
    """
    number = value if type(value) is int else int_of(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        refuse(value, name, _range(least, most), op=op, error=error, fix=fix)
    return number


def _range(least: int | None, most: int | None) -> str:
    if least is None:
        return "an int" if most is None else f"an int of at most {most}"
    if most is None:
        return "a positive int" if least == 1 else f"an int of at least {least}"
    return f"an int from {least} to {most}"


def head_counts(
    num_heads: Any,
    num_kv_heads: Any,
    *,
    names: tuple[str, str] = ("num_heads", "num_kv_heads"),
    most: int | None = None,
    op: str | None = None,
    error: type[HetuError] = HetuError,
) -> tuple[int, int]:
    """The numbers of query heads and of key heads, which the latter divides.

    Args:
        num_heads: What came as the number of query heads.
        num_kv_heads: What came as the number of key heads.
        names: What the user calls them.
        most: The greatest allowed number.
        op: Who asks.
        error: Of which class the error is if they don't divide.

    Example:
        >>> head_counts(8, 2)
        (8, 2)
    """
    heads = integer(num_heads, names[0], least=1, most=most, op=op)
    key_heads = integer(num_kv_heads, names[1], least=1, most=most, op=op)
    if heads % key_heads:
        refuse(heads, names[0], f"a multiple of {names[1]} {shown(key_heads)}", op=op, error=error)
    return heads, key_heads


def index(value: Any, name: str, count: int, *, op: str | None = None, error: type[HetuError] = HetuError) -> int:
    """The number of one of ``count`` things, from 0.

    Example:
        >>> index(1, "pipeline", 2)
        1
    """
    fix = f"give one from 0 to {count - 1}" if count else "there is none"
    return integer(value, name, least=0, most=count - 1, op=op, error=error, fix=fix)


def is_finite(value: float) -> bool:
    """Whether a float is no NaN and no infinity; torch.compile follows this, and not ``math.isfinite``.

    Example:
        >>> is_finite(1e300), is_finite(math.nan), is_finite(-math.inf)
        (True, False, False)
    """
    return -math.inf < value < math.inf


def real(
    value: Any,
    name: str,
    wanted: str = "a finite number",
    holds: Callable[[float], bool] = is_finite,
    *,
    op: str | None = None,
    error: type[HetuError] = HetuError,
    fix: str | None = None,
) -> float:
    """A number as a float.

    Args:
        value: What came.
        name: The argument's name.
        wanted: What is expected, in words.
        holds: Whether a float is that.
        op: Who asks, for the error.
        error: The class of the error.
        fix: What to do, for the error.

    Example:
        >>> real(np.float32(0.25), "p", "a probability in [0, 1)", lambda p: 0 <= p < 1)
        0.25
    """
    number = number_of(value)
    try:
        result = None if number is None or isinstance(number, bool) else float(number)
    except OverflowError:  # an int beyond all floats
        result = None
    if result is None or not holds(result):
        refuse(value, name, wanted, op=op, error=error, fix=fix)
    return result


def flag(value: Any, name: str, *, op: str | None = None, error: type[HetuError] = HetuError) -> bool:
    """A bool.

    Example:
        >>> flag(np.True_, "is_causal")
        True
    """
    if value is True or value is False:
        return value
    number = number_of(value)
    if not isinstance(number, bool):
        refuse(value, name, "a bool", op=op, error=error, fix="give True or False")
    return number


def choice(
    value: Any, name: str, known: Collection[str], *, op: str | None = None, error: type[HetuError] = HetuError
) -> str:
    """One of several names.

    Example:
        >>> choice("sum", "reduction", ("sum", "mean"))
        'sum'
    """
    if not isinstance(value, str) or value not in known:
        quoted = [f'"{item}"' for item in known]
        wanted = " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
        refuse(value, name, wanted, op=op, error=error, fix=f"use one of {', '.join(known)}")
    return value


def text(value: Any, name: str, *, op: str | None = None) -> str:
    """A string."""
    if not isinstance(value, str):
        refuse(value, name, "a string", op=op, fix=f'give {name} as text, as in "{name}"')
    return str(value)


def items(
    value: Any,
    name: str,
    wanted: str = "a list",
    *,
    op: str | None = None,
    error: type[HetuError] = HetuError,
    fix: str | None = None,
) -> list[Any]:
    """The items of a sequence. An array gives its rows as lists, and its entries as Python's numbers.

    Args:
        value: What came.
        name: The argument's name.
        wanted: What is expected, in words.
        op: Who asks, for the error.
        error: The class of the error.
        fix: What to do, for the error.

    Example:
        >>> items(np.array([2, 3]), "seq_lens"), items((1, "a"), "pair")
        ([2, 3], [1, 'a'])
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    try:
        if isinstance(value, (Sequence, KeysView, ValuesView)) and not isinstance(value, (str, bytes, bytearray)):
            if not isinstance(value, memoryview):
                return list(value)
        elif getattr(value, "ndim", 0) and hasattr(value, "tolist") and not isinstance(value, np.ma.MaskedArray):
            return list(value.tolist())
    except Exception:  # a sequence of the user's own may fail in any way, and so may a tensor without data
        pass
    return refuse(value, name, wanted, op=op, error=error, fix=fix or "write [x] for a list of one")


def integers(
    value: Any,
    name: str,
    *,
    least: int | None = None,
    wanted: str = "a list of ints",
    op: str | None = None,
    error: type[HetuError] = HetuError,
    fix: str | None = None,
) -> tuple[int, ...]:
    """A sequence of ints.

    Args:
        value: What came.
        name: The argument's name.
        least: The smallest that an int may be; None for any.
        wanted: What is expected, in words.
        op: Who asks, for the error.
        error: The class of the error.
        fix: What to do if it is no sequence, for the error.

    Example:
        >>> integers(np.array([2, 3]), "seq_lens", least=0)
        (2, 3)
    """
    if type(value) is tuple and _are_ints(value, least):
        return value  # what the layouts of every new set of lengths are made of
    given = items(value, name, wanted, op=op, error=error, fix=fix)
    return tuple(integer(item, f"{name}[{place}]", least=least, op=op, error=error) for place, item in enumerate(given))


def _are_ints(values: tuple[Any, ...], least: int | None) -> bool:
    for item in values:  # noqa: SIM110 - all(...) of a generator takes twice as long
        if type(item) is not int or (least is not None and item < least):
            return False
    return True


def array(value: Any, name: str, *, op: str | None = None) -> Any:
    """A copy of an array whose elements are numbers: of a dense torch tensor as a tensor, of all else as numpy's.

    Args:
        value: A numpy array, a torch tensor, a number, or nested lists of numbers.
        name: The argument's name.
        op: Who asks, for the error.

    Raises:
        ShapeError: If rows differ in length.
        DTypeError: If elements are no real numbers, are masked, or can't be read.

    Example:
        >>> array([[1, 2]], "value")
        array([[1, 2]])
    """
    if is_torch(value):
        wanted = "a dense tensor of real numbers, with data"
        if not is_dense(value) or value.is_complex():
            refuse(value, name, wanted, op=op, error=DTypeError, fix="convert it first: to_dense(), view_as_real()")
        return value.detach().clone()
    try:
        found = None if isinstance(value, np.ma.MaskedArray) else np.array(value)
    except ValueError:  # numpy's word for rows that differ
        refuse(value, name, "rows of equal length", op=op, error=ShapeError, fix="pad the shorter ones")
    except Exception:  # a sequence of the user's own may fail in any way
        found = None
    if found is None or not (found.dtype.kind in "biuf" or found.dtype.name == "bfloat16"):
        wanted = "an array of real numbers, none of them masked"
        refuse(value, name, wanted, op=op, error=DTypeError, fix="convert it first: fill what is masked, .astype(...)")
    return found.astype(found.dtype.newbyteorder("="), copy=False)


def is_dense(tensor: Any) -> bool:
    """Whether a torch tensor has its data in memory, element by element."""
    return _is_strided(tensor.layout) and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)


@cache
def _is_strided(layout: Any) -> bool:
    return str(layout) == "torch.strided"


def mapping(value: Any, name: str, of: str, *, op: str | None = None) -> Mapping[Any, Any]:
    """A mapping.

    Args:
        value: What came.
        name: The argument's name.
        of: What its entries are, in words.
        op: Who asks, for the error.
    """
    if type(value) is not dict and not isinstance(value, Mapping):
        refuse(value, name, f"a dict of {of}", op=op, fix="write {key: value}")
    return value


def device(value: Any, name: str = "device", *, op: str | None = None) -> str | None:
    """A device's name, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, which need not be there; None stays None.

    Example:
        >>> device("cuda:1"), device(1), device(None)
        ('cuda:1', 'cuda:1', None)
    """
    if value is None:
        return None
    number = int_of(value)
    named = f"cuda:{number}" if number is not None and 0 <= number < 2**15 else value
    if type(value).__module__ == "torch":
        named = str(value)
    if not isinstance(named, str) or not _DEVICE.fullmatch(named):
        refuse(value, name, "a device", op=op, fix='use "cpu", "cuda" or "cuda:1", or leave it out')
    return named


def path(value: Any, name: str = "path", *, op: str | None = None) -> str:
    """A file's path as a string.

    Example:
        >>> path("step100.safetensors")
        'step100.safetensors'
    """
    try:
        found = os.fspath(value)
    except Exception:  # no path, or a __fspath__ that fails
        found = None
    if not isinstance(found, str) or "\0" in found:
        refuse(value, name, "a path", op=op, fix="give a string or a pathlib.Path")
    return found
