"""The docstrings of what users call: an entry for each parameter, for what comes back and for every error."""

from __future__ import annotations

import pytest
from support.docstrings import faults, sections, without_each_entry

import hetu
from hetu.graph import registry

LATER = {
    "all_reduce": {"ShapeError"},
    "arange": {"HetuError"},
    "attn_varlen": {"BindingError", "HetuError"},
    "constant": {"HetuError"},
    "cross_entropy": {"BindingError"},
    "embedding": {"BindingError"},
    "full": {"HetuError"},
    "gather": {"BindingError"},
    "layout_tokens": {"BindingError"},
    "one_hot": {"BindingError"},
    "parallel_attn": {"BindingError"},
    "parameter": {"HetuError"},
    "placeholder": {"HetuError"},
    "step_sum": {"HetuError"},
    "token_mean_loss": {"BindingError", "DTypeError", "ShapeError"},
}
"""Errors that no bad sample raises: of a run, of what stands outside of a graph, and of a function over several ops."""


def errors_of(name: str) -> set[str]:
    """The errors that an op is known to raise: those of its bad samples, and some more."""
    bad = registry()[name].samples()[1] if name in registry() else ()
    return {sample.error.__name__ for sample in bad} | LATER.get(name, set())


@pytest.mark.parametrize("name", hetu.ops.__all__)
def test_docstring_is_whole(name: str) -> None:
    assert not faults(getattr(hetu, name), errors_of(name))


@pytest.mark.parametrize("name", hetu.ops.__all__)
def test_a_missing_entry_is_seen(name: str) -> None:
    """Each entry is deleted in turn, so that the check above can be trusted."""
    function = getattr(hetu, name)
    cut = dict(without_each_entry(function.__doc__))
    assert len(cut) == sum(map(len, sections(function.__doc__).values()))
    unseen = [what for what, doc in cut.items() if not faults(function, errors_of(name), doc)]
    assert not unseen
