"""Sharded state in one process: the bits of stage 0, whatever the model, the strategies and the optimiser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.longer import LONGER
from support.same import assert_same
from support.zero import STEPS, Case, Model, Step, cut_finely, train

import hetu

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"foreach": True}),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, list[Step]]:
    columns = draw(st.integers(1, 5))
    rows = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    pipelines = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    kind, options = draw(st.sampled_from(OPTIMIZERS))
    unit, dtype = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from(["float32", "float64"]))
    is_mixed = draw(st.booleans())
    step = st.builds(
        Step,
        st.integers(0, len(pipelines) - 1),
        st.integers(1, 3),
        st.sampled_from(["update", "update", "grad", "compute_only"]),
    )
    bucket_bytes = draw(st.sampled_from([1, 40, 100, 10_000]))
    case = Case([(n, columns) for n in rows], pipelines, kind, options, dtype, unit, bucket_bytes, is_mixed)
    return case, draw(st.lists(step, min_size=2, max_size=4))


@settings(max_examples=15 * LONGER, deadline=None)
@given(cases(), st.sampled_from([1, 2, 3]))
def test_losses_and_state_are_those_of_stage_0(drawn: tuple[Case, list[Step]], stage: int) -> None:
    case, steps = drawn
    whole, cut = train(case, 0, steps), train(case, stage, steps)
    assert_same([loss for loss, _ in cut.numbers], [loss for loss, _ in whole.numbers])
    for (_, norm), (_, wanted) in zip(cut.numbers, whole.numbers, strict=True):
        torch.testing.assert_close(norm, wanted, equal_nan=True)
    assert_same(cut.state, whole.state)
    largest = max(rows * columns for rows, columns in case.shapes) * getattr(torch, case.dtype).itemsize
    assert cut.gathered <= 3 * max(case.bucket_bytes, largest) * (stage == 3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_counts_each_element_once(stage: int) -> None:
    case = Case(dtype="float64", options={"max_grad_norm": 0.1})
    whole, cut = train(case, 0), train(case, stage)
    torch.testing.assert_close([x for x, _ in cut.numbers], [x for x, _ in whole.numbers], rtol=1e-12, atol=0)
    torch.testing.assert_close(cut.state["parameters"], whole.state["parameters"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_cut_lies_in_parts(stage: int) -> None:
    case = Case()
    with cut_finely(case):
        model = Model(case, stage)
        model.run(STEPS[0], 0), model.run(replace(STEPS[0], run_level="grad"), 1)
    state = model.graph.executor.state
    (bound,), (waiting,) = state.optimizers.values(), state.waiting.values()
    assert len(bound.params) > 4 and all(
        bound.optimizer.state[x]["exp_avg"].shape == x.shape for x in bound.params.values()
    )
    assert (len(waiting.grads) > 4) is (stage >= 2)
    store = state.parameters
    values = [store.storages(node) for node in store.nodes]
    assert all(max(box.numel for box in own) < 8 for own in values) is (stage == 3)


@pytest.mark.parametrize(("source", "target"), [(0, 3), (1, 0), (3, 2), (2, 3)])
def test_a_state_goes_on_at_another_stage(source: int, target: int, tmp_path: Path) -> None:
    """And over another number of pipelines, of which the largest strategy decides how many parts there are."""
    case, path = Case(), tmp_path / "state.safetensors"
    other = replace(case, pipelines=(1, 2, 3, 5))
    wanted = train(case, 0, [*STEPS[:4], *STEPS[4:]])
    train(case, source, STEPS[:4], end=path)
    found = train(other, target, STEPS[4:], first=4, begin=path)
    assert_same([loss for loss, _ in found.numbers], [loss for loss, _ in wanted.numbers[4:]])
    assert_same(found.state, wanted.state)


def test_a_run_that_fails_changes_nothing() -> None:
    case = Case()
    with cut_finely(case):
        model, plain = Model(case, 3), Model(case, 3)
        for one in (model, plain):
            one.run(STEPS[0], 0)
        before = model.graph.state_dict()
        with pytest.MonkeyPatch.context() as patched:
            step = torch.optim.AdamW.step

            def half_done(self: Any, *arguments: Any) -> None:
                step(self, *arguments)
                raise ValueError("not today")

            patched.setattr(torch.optim.AdamW, "step", half_done)
            with pytest.raises(hetu.HetuError, match="changed nothing: ValueError: not today"):
                model.run(STEPS[1], 1)
        assert_same(model.graph.state_dict(), before)
        assert_same(model.run(STEPS[1], 1), plain.run(STEPS[1], 1))


def test_two_updates_may_have_other_stages() -> None:
    def state(stages: tuple[int, int]) -> dict[str, Any]:
        hetu.manual_seed(2)
        with hetu.graph("define_and_run", strategies=[hetu.Strategy([1] * 3, [0] * 3)], device="cpu") as g:
            w = hetu.parameter(torch.nn.init.normal_, [300], name="w")
            u = hetu.parameter(torch.nn.init.normal_, [300], name="u")
            one, other = (hetu.optim.Adam(lr=0.1, zero_stage=stage) for stage in stages)
            loss = hetu.sum(w * w * u)
            fetches = [one.minimize(loss, [w], name="one"), other.minimize(loss, [u], name="other")]
        for _ in range(2):
            g.run(fetches)
        return g.state_dict()

    for stages in ((1, 2), (3, 2), (0, 3)):
        assert_same(state(stages), state((0, 0)))


def test_an_update_that_cuts_what_another_one_trained() -> None:
    """It is refused by name; a state goes on."""
    hetu.manual_seed(2)
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([1] * 3, [0] * 3)], device="cpu") as g:
        w = hetu.parameter(torch.nn.init.normal_, [600], name="w")
        frozen = hetu.parameter(torch.nn.init.normal_, [600], name="frozen", requires_grad=False)
        loss = hetu.sum(w * w * frozen)
        first = hetu.optim.Adam(lr=0.1).minimize(loss, name="first")
    g.run(first)
    state = g.state_dict()
    with g:
        second = hetu.optim.Adam(lr=0.1, zero_stage=3).minimize(loss, name="second")
    g.run(second)  # it has no past, and takes what there is
    with pytest.raises(hetu.HetuError, match="first has trained parameters that an update with a zero_stage, added"):
        g.run(first)
    g.load_state_dict(state)
    assert_same(g.state_dict(), state)
    g.run(first)
    store = g.executor.state.parameters
    assert [max(box.numel for box in store.storages(node)) for node in store.nodes] == [256, 256]


class Whitening(hetu.optim.Optimizer):
    """It could need whole matrices."""

    kind = "SGD"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hetu.optim.SGD(lr=0.1, zero_stage=4), "zero_stage"),
        (lambda: hetu.optim.SGD(lr=0.1, zero_stage=-1), "zero_stage"),
        (lambda: hetu.optim.SGD(lr=0.1, zero_stage=True), "zero_stage"),
        (lambda: Whitening(lr=0.1, zero_stage=1), "zero_stage=1 cuts parameters for their updates, but SGD needs them"),
    ],
)
def test_what_is_not_there_is_refused(make: Any, message: str) -> None:
    with pytest.raises(hetu.HetuError, match=message) as caught:
        make()
    assert "test_zero.py" in str(caught.value)
    assert isinstance(hetu.optim.SGD(lr=0.1, zero_stage=2), hetu.optim.Optimizer)
