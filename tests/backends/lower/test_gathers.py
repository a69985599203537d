"""What modules gather: together, when, for how long, and in which element type."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.zero import Case, Model, Step, cut_finely
from torch import fx

import hetu
from hetu.backends.comm import reduce
from hetu.backends.compile.regions import Region, divide
from hetu.backends.lower.gathers import hetu_finish_gather, hetu_start_gather
from hetu.backends.lower.lowering import Executable


def module_of(case: Case) -> Executable:
    """What a step of a model is lowered to."""
    model = Model(case, 3)
    model.run(Step(0), 0)
    (executable,) = model.graph.executor.executables()
    return executable


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=7),
    st.sampled_from([1, 16, 40, 64, 10_000]),
    st.booleans(),
)
def test_a_module_holds_no_more_than_three_buckets(rows: list[int], bucket_bytes: int, is_mixed: bool) -> None:
    """What it has of what was gathered, and what is on its way, after each of its calls; views and casts of it too."""
    case = Case([(n, 4) for n in rows], (2,), bucket_bytes=bucket_bytes, is_mixed=is_mixed)
    with cut_finely(case):
        executable = module_of(case)
        most = 3 * max(reduce.BUCKET_BYTES, max(x.nbytes for bucket in executable.buckets for x in bucket))
    nodes = list(executable.module.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}

    def last(node: fx.Node) -> int:
        """When its memory is free."""
        return max([last(x) if x.target is torch.transpose else places[x] for x in node.users], default=-1)

    sizes = [sum(x.nbytes for x in bucket) for bucket in executable.buckets]
    started, held = 0, dict[fx.Node, int]()
    for place, node in enumerate(nodes):
        if node.target is hetu_start_gather:
            assert node.args[1] == started and sum(x.target is hetu_start_gather for x in held) == 0
            held[node], started = sizes[started], started + 1
        elif node.target is hetu_finish_gather:
            held[node] = sizes[started - 1]  # what is made of what came
        elif any(x.target is hetu_finish_gather for x in node.all_input_nodes):
            held[node] = executable.buckets[started - 1][node.args[1]].nbytes  # a variable of its own
        assert sum(held.values()) <= most
        held = {x: n for x, n in held.items() if last(x) > place and x.target is not hetu_finish_gather}
    assert started == len(sizes)


def test_what_is_compiled_together_lies_between_gathers() -> None:
    """Else a compiled module would hold all parameters before its first region."""
    case = Case([(n, 4) for n in (5, 1, 3, 2)], (2,), bucket_bytes=1)
    with cut_finely(case):
        steps = divide(module_of(case).module.graph)
    assert any(isinstance(step, Region) for step in steps)
    places = {node: i for i, step in enumerate(steps) for node in (step.nodes if isinstance(step, Region) else [step])}
    finishes = [node for node in places if node.target is hetu_finish_gather]
    assert finishes == sorted(finishes, key=places.__getitem__) and len(finishes) > 5
    for one, following in pairwise(finishes):
        readers = [places[user] for item in one.users for user in item.users]
        assert places[one] < min(readers) < places[following]


def test_what_is_cast_to_a_narrower_type_travels_in_it() -> None:
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([1] * 2, [0] * 2)], device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [2, 256], name="x")
        wide, narrow = (hetu.parameter(0.5, [256, 256], name=name) for name in ("wide", "narrow"))
        with hetu.autocast(hetu.bfloat16):
            y = hetu.linear(x, narrow)
        y = hetu.cast(hetu.matmul(hetu.cast(y, hetu.float32), wide), hetu.float64) + hetu.sum(
            hetu.cast(wide, hetu.float64)
        )
        train: Any = hetu.optim.SGD(lr=0.1, zero_stage=3).minimize(hetu.sum(y))
    g.run(train, {x: hetu.Shards([[[1.0] * 256] * 2] * 2)})
    (executable,) = g.executor.executables()
    found = {(item.parameter.name, item.dtype) for bucket in executable.buckets for item in bucket}
    assert found == {("narrow", hetu.bfloat16), ("wide", hetu.float32)}
    assert "gather 0: " in str(executable)


@pytest.mark.parametrize("stage", [1, 2])
def test_in_one_process_nothing_is_gathered_that_lies_here(stage: int) -> None:
    model = Model(Case(), stage)
    model.run(Step(0), 0), model.run(Step(0), 1)
    assert all(not executable.buckets for executable in model.graph.executor.executables())
