"""The docstrings of all that is public beside ops: parameters, results, examples; and where formulas come from.

What stands in those of ops is checked by ops/test_docstrings.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import reference
from support.docstrings import sections, without_each_entry

import hetu

PLAIN_OPS = """
    abs add all_reduce arange argmax broadcast_to cast clamp concat constant cos cumsum div embedding eq exp floor full
    gather ge gt layout_tokens le log lt masked_fill matmul max min mul ne one_hot op parameter placeholder pow reshape
    round rsqrt sin slice sort split sqrt step_sum stop_gradient sub sum tanh topk transpose where
"""
"""Ops that move or compare elements, or compute elementary functions: what they are has no source."""

FORMULAS = {
    "hetu.Hardware",
    "hetu.functional.attn_varlen",
    "hetu.functional.parallel_attn",
    "hetu.manual_seed",
    "hetu.nn.Attention",
    "hetu.nn.RMSNorm",
    "hetu.nn.SwiGLU",
    "hetu.optim.Adam",
    "hetu.optim.AdamW",
    "hetu.optim.SGD",
    "hetu.optim.grad_norm",
    "hetu.parallel.Cost",
    "hetu.parallel.StrategyCost",
    "hetu.parallel.build_plan",
    "hetu.plan_batch",
    "hetu.testing.attention",
    *(f"hetu.{name}" for name in hetu.ops.__all__ if name not in PLAIN_OPS.split()),
}
"""What computes by a formula that somebody else wrote down."""

ENTRIES = {name: found for items in reference.entries().values() for name, found in items}
PUBLIC = {
    name: found
    for name, found in ENTRIES.items()
    if callable(found) and name.removeprefix("hetu.") not in hetu.ops.__all__
}


def entries(doc: str) -> set[str]:
    """The names that a docstring has entries for."""
    text = sections(doc)
    return {name for section in ("Args", "Attributes") for name in text.get(section, {})}


def named(found: Any, doc: str) -> set[str]:
    """The parameters that a docstring has entries for, or one of a base, or one that it refers to by a role."""
    room = inspect.getmodule(found)
    roles = [role.rpartition(".")[2] for role in re.findall(r":(?:func|class):`~?([\w.]+)`", doc)]
    others = [getattr(room, role, getattr(hetu, role, None)) for role in roles]
    bases = found.__mro__[1:] if isinstance(found, type) else ()
    docs = [
        doc,
        *(vars(base).get("__doc__") or "" for base in bases),
        *(inspect.getdoc(other) or "" for other in others),
    ]
    return set().union(*map(entries, docs))


def faults(found: Any, doc: str) -> list[str]:
    """What is missing in the docstring of a class or a function."""
    text, signature = sections(doc), inspect.signature(found)
    told = named(found, doc)
    wrong = [f"no entry for {name}" for name in signature.parameters if name[0] != "_" and name not in told]
    is_function = inspect.isroutine(found) and signature.return_annotation not in ("None", "Iterator[None]")
    wrong += ["no section Returns"] if is_function and not {"Returns", "Yields"} & set(text) else []
    return wrong + ([] if "Example" in text else ["no section Example"])


def methods() -> Iterator[tuple[str, Any]]:
    """The public methods of public classes, those of errors too; not functions that a room above hands to a class."""
    errors = {name: getattr(hetu, name) for name in hetu.__all__ if name.endswith("Error")}
    for name, kind in (ENTRIES | errors).items():
        for member in dir(kind) if isinstance(kind, type) else ():
            own = next(base for base in kind.__mro__ if member in vars(base))
            is_public = member[0] != "_" and own.__module__.startswith("hetu.")
            if is_public and inspect.isroutine(getattr(kind, member)) and not member.endswith("_factory"):
                yield f"{name}.{member}", getattr(kind, member)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_whole(name: str) -> None:
    assert not faults(PUBLIC[name], inspect.getdoc(PUBLIC[name]) or "")


def test_a_missing_entry_is_seen() -> None:
    """Each parameter and example is deleted in turn; what another docstring tells too is not missed."""
    for name in ("hetu.config", "hetu.plan_batch", "hetu.testing.bind", "hetu.nn.RMSNorm"):
        cut = dict(without_each_entry(inspect.getdoc(PUBLIC[name]) or ""))
        needed = {what: doc for what, doc in cut.items() if what.split()[0] not in ("Raises", "Attributes")}
        assert needed
        assert not [what for what, doc in needed.items() if not faults(PUBLIC[name], doc)]


def test_methods_have_docstrings() -> None:
    assert not [name for name, found in methods() if not inspect.getdoc(found)]


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_formulas_have_a_source(name: str) -> None:
    assert re.search(r"\bSource: \S", ENTRIES[name].__doc__)
