"""Every field of a plan is demanded to be what its class declares; a new one is checked without being named."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import numpy as np
import pytest
from support.layout_cases import HEADS
from support.plans import find, refused, with_instructions

from hetu.parallel import METHODS, Layout, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.plan import instructions
from hetu.parallel.plan.instructions import Receive, Runs, Send
from hetu.parallel.plan.parts import PipelinePlan
from hetu.parallel.proof.fields import check_fields


def plan_of(method: str = "direct") -> AttnPlan:
    return build_plan(Layout.build([3, 4, 2], [0, 0, 1], split="stripe"), method=method, heads=HEADS)


@pytest.mark.parametrize("method", METHODS)
def test_plans_have_the_types_that_they_declare(method: str) -> None:
    for plan in (plan_of(method), plan_of(method).backward()):
        check_fields(plan.whole())


def shown_fields(kind: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(kind) if item.repr]


@pytest.mark.parametrize("wrong", [None, True, 1.0, "text", b"", [], {}, np.int64(1), np.zeros(1), object(), int])
def test_a_value_of_another_type_is_named_by_its_place(wrong: Any) -> None:
    plan = plan_of()
    for name in shown_fields(PipelinePlan):
        part = dataclasses.replace(plan.pipelines[1], **{name: wrong})
        damaged = dataclasses.replace(plan, pipelines=(plan.pipelines[0], part, plan.pipelines[2]))
        refused(damaged, f"plan.pipelines[1].{name} is ", "expected ")
    for kind in (Send, Receive):
        items, at = find(plan, kind, 1 if kind is Receive else 0)
        hints = get_type_hints(kind)
        for name in shown_fields(kind):
            if wrong is None and "None" in str(hints[name]):
                continue
            changed = list(items)
            changed[at] = dataclasses.replace(items[at], **{name: wrong})
            refused(with_instructions(plan, 1 if kind is Receive else 0, changed), f"[{at}].{name} is ", "expected ")
    hints = get_type_hints(AttnPlan)
    for name in shown_fields(AttnPlan):
        if type(wrong) is not hints[name] and not (wrong is None and "None" in str(hints[name])):
            refused(dataclasses.replace(plan, **{name: wrong}), f"plan.{name} is ", "expected ")


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros(1, np.int32), "is a int32 array"),
        (np.zeros(1, ">i8"), "is a >i8 array"),
        (np.zeros(1, object), "is a object array"),
        (np.ma.masked_array([0]), "MaskedArray"),
        (np.zeros((1, 1), np.int64), "has shape (1, 1)"),
        (np.zeros(2, np.int64), "has shape (2,)"),
        (np.zeros((), np.int64), "has shape ()"),
        (np.array([2**40]), "within 2147483648 of 0"),
        (np.array([-(2**63)]), "within 2147483648 of 0"),
    ],
)
def test_arrays_are_columns_of_int64_that_can_be_added(array: Any, why: str) -> None:
    plan = plan_of()
    items, at = find(plan, Send, 0)
    assert len(items[at].runs.start) == 1
    items[at] = dataclasses.replace(items[at], runs=dataclasses.replace(items[at].runs, length=array))
    refused(with_instructions(plan, 0, items), f"plan.pipelines[0].instructions[{at}].runs.", why)


def test_nothing_is_allocated_for_numbers_that_nobody_holds() -> None:
    """Each of these would take gigabytes before it is seen to be wrong."""
    plan = plan_of()
    endless = np.broadcast_to(np.int64(1), (2**31,))
    items, at = find(plan, Send, 0)
    items[at] = dataclasses.replace(items[at], runs=Runs(endless, endless))
    refused(with_instructions(plan, 0, items), "2147483648 runs of rows")
    part = plan.pipelines[0]
    for buffers in ([2**31], [2**62]):
        own, foreign = part.buffers[0], dataclasses.replace(part.buffers[-1], rows=buffers[0])
        damaged = dataclasses.replace(part, buffers=(own, foreign))
        refused(dataclasses.replace(plan, pipelines=(damaged, *plan.pipelines[1:])), f"holds {buffers[0]} rows")
    group = plan.layout.groups[0]
    totals = group.totals.copy()
    totals[0, -1] = 2**31 - 1
    for given, what in (
        (totals, "context group 0 have [2147483647, 4] tokens"),
        (totals.astype(np.int64), "layout.groups[0].totals is a int64 array (ndarray), expected an int32 array"),
    ):
        layout = Layout([dataclasses.replace(group, totals=given), plan.layout.groups[1]])
        refused(dataclasses.replace(plan, layout=layout), what)


def changed_group(**values: Any) -> AttnPlan:
    plan = plan_of()
    group = dataclasses.replace(plan.layout.groups[0], **values)
    return dataclasses.replace(plan, layout=Layout([group, plan.layout.groups[1]]))


def test_a_layout_that_is_none() -> None:
    group = plan_of().layout.groups[0]
    spans = dataclasses.replace(group.spans, start=group.spans.start + 1)
    refused(changed_group(split=None, custom_spans=spans), "context group 0 is no layout")
    refused(changed_group(split=None), "by a split and by spans")
    refused(changed_group(split="halves"), "cut by the split 'halves', which there is not")
    refused(changed_group(lengths=group.lengths + 1), "lie on it")
    refused(changed_group(index=1), "is number 1")
    refused(changed_group(value=1), "two context groups have one value")
    refused(changed_group(seq_lens=group.seq_lens + 1), "sequences of [4, 5] tokens")
    refused(changed_group(totals=group.totals[:1]), "expected a row per member of 2")
    doubled = Layout(
        [dataclasses.replace(g, members=(0, 1, 2)[: 2 + i]) for i, g in enumerate(plan_of().layout.groups)]
    )
    refused(dataclasses.replace(plan_of(), layout=doubled), "don't share out pipelines 0 to 2")


def test_every_class_of_a_plan_can_be_checked() -> None:
    """A field of a type that nobody knows how to check fails when the first plan is checked, not in a user's hands."""
    from hetu.parallel.proof.fields import _check_of

    for kind in (*vars(instructions).values(), GroupLayout):
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            assert _check_of(kind) is not None
    with pytest.raises(NotImplementedError, match="are not checked"):
        _check_of(dict[str, int])
