"""Placements: no code minds how a parameter is cut into boxes, uneven and empty ones included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hetu
from hetu.backends.comm.boxes import assemble, cut
from hetu.parallel.placement import Box, Placement, Placements
from hetu.runtime.state import GraphState


def in_parts(shape: Sequence[int], ranks: int, stage: int) -> Placements:
    """Computations read the whole tensor; it is kept in uneven boxes, cut along all axes, some of them empty."""
    edges = [sorted([0, min(1, n), min(1, n), n]) for n in shape]
    axes = [list(pairwise(row)) for row in edges]
    boxes = tuple(Box(*zip(*parts, strict=True)) if parts else Box((), ()) for parts in product(*axes))
    placement = Placement((boxes,) * ranks)
    return Placements(placement, placement, placement)


class Training:
    """Parameters of several shapes, trained by an elementwise optimiser, placed in one way or another."""

    def __init__(self, rule: Any = None, **options: Any) -> None:
        hetu.manual_seed(1)
        with hetu.graph("define_and_run", device="cpu") as g:
            x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n"), 5], name="x")
            weight = hetu.parameter(torch.nn.init.normal_, [4, 5], name="weight")
            bias = hetu.parameter(torch.nn.init.normal_, [4], name="bias")
            scale = hetu.parameter(1.5, [], name="scale")
            hetu.parameter(0.0, [0, 3], name="nothing")
            y = hetu.tanh(hetu.linear(x, weight) + bias) * scale
            self.train = hetu.optim.AdamW(lr=0.1, **options).minimize(hetu.sum(y * y), name="train")
        self.graph, self.x = g, x
        if rule is not None:
            g.executor.state = GraphState(g, lambda: torch.device("cpu"), rule)

    def run(self, seed: int, run_level: str = "update") -> torch.Tensor:
        rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
        loss: torch.Tensor = self.graph.run(self.train, {self.x: rows}, run_level=run_level)
        return loss


def assert_same_state(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    assert one["parameters"].keys() == other["parameters"].keys()
    for part in ("parameters", "gradients"):
        torch.testing.assert_close(one[part], other[part], **tolerance)
    states = [item["optimizers"]["train"].pop("state") for item in (one, other)]
    torch.testing.assert_close(*states, **tolerance)
    assert one["optimizers"] == other["optimizers"]


def test_training_in_parts_is_training_of_the_whole() -> None:
    whole, parts = Training(), Training(in_parts)
    for seed, level in enumerate(["update", "grad", "update", "grad"]):
        assert torch.equal(whole.run(seed, level), parts.run(seed, level))
    assert_same_state(whole.graph.state_dict(), parts.graph.state_dict(), rtol=0, atol=0)


def test_clipping_counts_each_element_once() -> None:
    whole, parts = Training(max_grad_norm=0.1), Training(in_parts, max_grad_norm=0.1)
    for seed in range(3):
        whole.run(seed), parts.run(seed)
    assert_same_state(whole.graph.state_dict(), parts.graph.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [(None, in_parts), (in_parts, None), (in_parts, in_parts)])
def test_checkpoints_do_not_know_of_places(source: Any, target: Any) -> None:
    before, after = Training(source), Training(target)
    before.run(0), before.run(1, "grad")
    after.run(7)
    after.graph.load_state_dict(before.graph.state_dict())
    assert torch.equal(before.run(2), after.run(2))
    assert_same_state(before.graph.state_dict(), after.graph.state_dict(), rtol=0, atol=0)


def test_each_box_has_memory_of_its_own() -> None:
    made = Training(in_parts)
    made.run(0)
    store = made.graph.executor.state.parameters
    assert {(node.name, len(store.storages(node))) for node in store.nodes} == {
        ("weight", 9), ("bias", 3), ("scale", 1), ("nothing", 3),
    }  # fmt: skip
    storages = [x for node in store.nodes for x in store.storages(node).values()]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in storages)


def test_an_optimiser_that_is_not_elementwise_wants_whole_parameters() -> None:
    class Whitening(hetu.optim.Optimizer):
        kind = "SGD"

    with hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(1.0, [3], name="w")
        train = Whitening(lr=0.1).minimize(hetu.sum(w * w))
    g.run(train)
    g.executor.state = GraphState(g, lambda: torch.device("cpu"), in_parts)
    with pytest.raises(hetu.HetuError, match=r"updates whole parameters, but a rank holds a part of w"):
        g.run(train)


@given(st.lists(st.integers(0, 6), max_size=3), st.data())
def test_any_box_is_put_together_from_any_parts(shape: list[int], data: st.DataObject) -> None:
    edges = [sorted([0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))]) for n in shape]
    boxes = [Box(*zip(*parts, strict=True)) if parts else Box((), ()) for parts in product(*map(pairwise, edges))]
    whole = torch.randn(shape)
    parts = {box: cut(whole, box) for box in boxes}
    assert sum(part.numel() for part in parts.values()) == whole.numel()
    start = tuple(data.draw(st.integers(0, n)) for n in shape)
    wanted = Box(start, tuple(data.draw(st.integers(a, n)) for a, n in zip(start, shape, strict=True)))
    for box in (wanted, Box.whole(shape)):
        assert torch.equal(assemble(box, parts), whole[box.slices_in(Box.whole(shape))])
