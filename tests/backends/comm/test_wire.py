"""What ranks tell each other comes as it was said; anything else is an error that names the rank."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from hetu.backends.comm import wire
from hetu.errors import CommunicationError

NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(NUMBERS | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=20)
MESSAGES = st.dictionaries(st.text(), PLAIN, max_size=5)
DTYPES = of_numpy.integer_dtypes() | of_numpy.floating_dtypes(sizes=[16, 32, 64]) | of_numpy.boolean_dtypes()


@given(MESSAGES)
def test_messages_come_as_they_were_said(message: dict[str, Any]) -> None:
    found = wire.decode(wire.encode(message), 0)
    assert found == message and repr(found) == repr(message)  # 1 is no 1.0, and -0.0 no 0.0


@given(of_numpy.arrays(DTYPES, of_numpy.array_shapes(min_dims=0, min_side=0, max_side=4)))
def test_arrays_come_as_they_were_packed(array: np.ndarray[Any, Any]) -> None:
    (found,) = wire.decode(wire.encode({"array": wire.pack_array(array)}), 0).values()
    found = wire.unpack_array(found)
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert found.flags.writeable and found.flags.aligned


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), np.int64(1), np.ones(2), {1, 2}, b"x", 1j, object(), {(1, 2): 3}],
    ids=lambda value: type(value).__name__,
)
def test_only_plain_values_are_said(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        wire.encode({"value": value})


@given(st.binary() | st.builds(lambda body: b"hetu/1 " + body, st.binary()))
def test_bytes_that_are_no_message_name_the_rank(data: bytes) -> None:
    if data.startswith(b"hetu/1 ") and data[len("hetu/1 ") :].lstrip().startswith(b"{"):  # it may be one
        return
    with pytest.raises(CommunicationError, match=r"(?s)rank 7 .*fix:"):
        wire.decode(data, 7)


BROKEN = [b"", b"[1]", b"3", b'{"a":', b'{"a":NaN}', b"\xff", b'{"a":1}x', b"[" * 10**6, b'{"a":' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: body[:8].decode("latin1"))
def test_messages_that_cannot_be_read(body: bytes) -> None:
    with pytest.raises(CommunicationError, match=r"what rank 2 said can't be read: .*\n[^$]*fix:"):
        wire.decode(b"hetu/1 " + body, 2)


@pytest.mark.parametrize("cut", range(0, 30, 3))
def test_messages_that_are_cut(cut: int) -> None:
    whole = wire.encode({"shapes": [[2, 3]], "name": None})
    with pytest.raises(CommunicationError, match=r"what rank 1 said "):
        wire.decode(whole[:cut], 1)


def test_another_version_is_named() -> None:
    other = wire.encode({}).replace(b"/1 ", b"/23 ")
    with pytest.raises(CommunicationError, match=r"rank 5 speaks version 23 .*, and this rank version 1"):
        wire.decode(other, 5)


def test_a_pickle_is_not_opened() -> None:
    with pytest.raises(CommunicationError, match="what rank 3 said is no message of hetu's"):
        wire.decode(pickle.dumps({"seed": 3}), 3)


def test_what_is_missing_is_named() -> None:
    assert wire.decode(wire.encode({"a": 1, "c": 2}), 0, ["a"]) == {"a": 1, "c": 2}
    with pytest.raises(CommunicationError, match="what rank 0 said can't be read: without b"):
        wire.decode(wire.encode({"a": 1}), 0, ["a", "b"])
    assert wire.decode(wire.encode({"error": "no"}), 0, ["a", "b"]) == {"error": "no"}
