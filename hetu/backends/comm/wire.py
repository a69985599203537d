"""What ranks tell each other, as bytes: JSON of plain values behind the version of the format.

A message is a dict of strings, ints, finite floats, bools, None, lists and dicts. To read one runs no code of the
sender's, and a rank with another hetu is told apart by the version.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hetu.errors import CommunicationError, caller

VERSION = 1
"""Changes whenever what is said, or how, changes."""

_MAGIC = b"hetu/"
_HEAD = _MAGIC + str(VERSION).encode() + b" "


def to_text(value: Any) -> str:
    """A plain value as JSON; equal values give equal texts where their dicts have the same order.

    Raises:
        TypeError, ValueError: If it is no plain value.

    Example:
        >>> to_text({"shapes": [[2, 3]], "name": None})
        '{"shapes":[[2,3]],"name":null}'
    """
    return _ENCODER.encode(value)


def from_text(text: str) -> Any:
    """The inverse of :func:`to_text`.

    Raises:
        ValueError: If it is no JSON.
    """
    return _DECODER.decode(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as bytes.

    Raises:
        TypeError, ValueError: If something in it is no plain value.

    Example:
        >>> encode({"seed": 3})
        b'hetu/1 {"seed":3}'
    """
    return _HEAD + to_text(message).encode()


def decode(data: bytes, rank: int, keys: Collection[str] = ()) -> dict[str, Any]:
    """What a rank said.

    Args:
        data: What came.
        rank: Who sent it, for the error.
        keys: What the message must have, unless it has an ``"error"``.

    Raises:
        CommunicationError: If it has another version, or is no message.

    Example:
        >>> decode(encode({"seed": 3}), rank=1)
        {'seed': 3}
    """
    if not data.startswith(_HEAD):
        version, space, _ = data[len(_MAGIC) :].partition(b" ")
        if data.startswith(_MAGIC) and space and version.isdigit() and len(version) < 10:
            what = f"rank {rank} speaks version {int(version)} of hetu's messages, and this rank version {VERSION}"
        else:
            what = f"what rank {rank} said is no message of hetu's: {data[:20]!r}"
        raise CommunicationError(what, where=caller(), fix="install the same hetu for all ranks, and start them again")
    try:
        message = from_text(data[len(_HEAD) :].decode())
        if not isinstance(message, dict):
            raise ValueError(f"a {type(message).__name__}, expected a dict")
        if "error" not in message and (missing := [key for key in keys if key not in message]):
            raise ValueError(f"without {', '.join(missing)}")
    except (ValueError, RecursionError) as error:  # of the text, of JSON, or of what it means
        raise CommunicationError(
            f"what rank {rank} said can't be read: {error}",
            where=caller(),
            fix="see whether all ranks have the same hetu and the network is sound, and start them again",
        ) from error
    return message


def pack_array(array: NDArray[Any]) -> list[Any]:
    """An array as a plain value: its dtype with the byte order, its shape, and its bytes in base 64.

    Example:
        >>> pack_array(np.array([1, 2], "<i2"))
        ['<i2', [2], 'AQACAA==']
    """
    return [array.dtype.str, list(array.shape), b64encode(array.tobytes()).decode()]


def unpack_array(packed: list[Any]) -> NDArray[Any]:
    """The inverse of :func:`pack_array`, as an array with memory of its own."""
    dtype, shape, data = packed
    return np.frombuffer(b64decode(data), dtype).reshape(shape).copy()
