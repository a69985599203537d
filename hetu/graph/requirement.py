"""Refusing what is given to ``hetu.require`` and is no comparison of sizes."""

from __future__ import annotations

from typing import Any, NoReturn

from hetu.arguments import shown
from hetu.errors import HetuError, Where
from hetu.graph.tensor import Tensor


def refuse_requirement(given: Any, where: Where) -> NoReturn:
    """Says what was given, and what a requirement is."""
    fix = "compare sizes: s >= 8, or hetu.equal(s, 8)"
    if isinstance(given, bool):
        what = f"expected constraint to be a comparison of symbols, got {given}, which is the same in every run"
        fix = (
            "write hetu.equal(a, b) for a == b, which compares how symbols are made; there is none for a != b; "
            "and assert what is known of plain ints"
        )
    elif isinstance(given, Tensor):
        what = f"expected constraint to be a comparison of symbols, got {given!r}, whose values only a run knows"
        fix = "compare its sizes, which are in its symbolic_shape"
    else:
        what = f"expected constraint to be a comparison of symbols, got {shown(given)}"
    raise HetuError(what, op="require", where=where, fix=fix)
