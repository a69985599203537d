"""What objects say of themselves: nothing public prints as an address, and notebooks are shown pictures."""

from __future__ import annotations

import importlib
import inspect
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import hetu
from hetu.integrations import pku_hetu
from hetu.parallel import METHODS, SPLITS, Layout, Topology

MODULES = ("hetu", "hetu.functional", "hetu.integrations.pku_hetu", "hetu.optim", "hetu.parallel", "hetu.testing")


@pytest.fixture(scope="module")
def instances() -> list[Any]:
    """One of everything that users get to see."""
    s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", device="cpu", strategies=[hetu.Strategy([s], [0])]) as g:
        x = hetu.placeholder(hetu.float32, [rows, 24], name="x")
        out = hetu.parallel_attn(x * hetu.parameter(1.0, [24], name="w"), 8, 1)[0]
        optimizers = [kind(lr=0.1) for kind in (hetu.optim.SGD, hetu.optim.Adam, hetu.optim.AdamW)]
        step = optimizers[0].minimize(hetu.sum(out))
    feeds, said = {x: np.ones((3, 24), np.float32)}, {s: 3}
    with hetu.trace() as trace:
        g.run(out, feeds, int_symbol_dict=said)
    plan, prepared = g.plan(0, int_symbol_dict=said), g.prepare(out, feeds, int_symbol_dict=said)
    part, group, hardware = plan.pipelines[0], plan.layout.groups[0], hetu.Hardware.h200()
    with hetu.testing.counting(g) as counted:
        pass
    with (change := hetu.config()) as settings:  # outside a block it would hold for all tests after these
        pass
    values = [g, out, step, out.op, out.op.definition, s, s // 2, s < 3, hetu.float32, hetu.Shards([1, 2]), trace]
    values += [prepared, *prepared.bindings, g.planner, g.executor, *g.executor.executables(), *optimizers, counted]
    values += [plan, part, part.spans, *part.instructions, plan.layout, group, group.spans, plan.mask, plan.heads]
    values += [part.instructions[0].table, *g.strategies, Topology.one_host(2), *METHODS.values(), *SPLITS.values()]
    values += [hardware, *hardware.rates, plan.cost(hardware), g.explain(int_symbol_dict=said), settings]
    values += [hetu.plan_batch([3, 5], 2, hardware, max_tokens=8), hetu.autocast(), hetu.recompute()]
    cost = g.strategies[0].cost(1, 1, 8, "float32", split="normal")
    values += [cost, cost.evaluate(said), cost.document(), pku_hetu.Graph(), pku_hetu.IntSymbol(3), change]
    values += [pku_hetu.SGDOptimizer(0.1), pku_hetu.AdamOptimizer(0.1)]
    values += [hetu.functional.ContextParallel(torch.tensor([0, 3]))]
    values += [hetu.testing.bind(g, out, {x: (3, 24)}, int_symbol_dict=said)]
    return values


def test_nothing_prints_as_an_address(instances: list[Any]) -> None:
    found = [type(item).__name__ for item in instances if " at 0x" in repr(item) + str(item)]
    assert not found


def test_every_public_class_is_among_them(instances: list[Any]) -> None:
    seen = {kind for item in instances for kind in type(item).__mro__}
    public = [
        getattr(importlib.import_module(path), name)
        for path in MODULES
        for name in importlib.import_module(path).__all__
    ]
    kinds = {kind for kind in public if inspect.isclass(kind) and not issubclass(kind, BaseException)}
    assert not [kind for kind in kinds if kind not in seen]


def test_notebooks_are_shown_pictures(instances: list[Any]) -> None:
    shown = {type(item).__name__ for item in instances if hasattr(item, "_repr_svg_") or hasattr(item, "_repr_html_")}
    assert shown >= {"Graph", "Layout", "Mask", "AttnPlan", "Executable", "Explanation"}
    many = Layout.build([3] * 20 + [0], [0] * 20 + [1], split="stripe")
    for item in [*instances, many, hetu.Mask.full(), hetu.Mask.slices([(0, 2)], [(0, 3)], ["full"])]:
        if hasattr(item, "_repr_svg_"):
            root = ElementTree.fromstring(item._repr_svg_())
            assert root.tag.endswith("svg") and len(root) > 2
        if hasattr(item, "_repr_html_"):
            assert " at 0x" not in item._repr_html_() and "<" in item._repr_html_()


def test_a_mask_is_drawn_pair_by_pair() -> None:
    mask = hetu.Mask.chunked(3)
    root = ElementTree.fromstring(mask._repr_svg_() or "")
    drawn = [item for item in root if item.get("fill") == "#3d7eea"]
    assert len(drawn) == mask.draw().count("█")
    assert hetu.Mask.window(hetu.IntSymbol("w"), 0)._repr_svg_() is None


def test_a_layout_is_drawn_where_tokens_lie() -> None:
    layout = Layout.build([2, 3], [0, 0], split="sym")
    root = ElementTree.fromstring(layout._repr_svg_())
    for pipeline, colour in enumerate(("#3d7eea", "#e0812f")):
        places = [float(item.get("x", "")) for item in root if item.get("fill") == colour]
        cell = 480 / 5
        assert [round((x - 80) / cell) for x in places] == sorted(layout.columns(pipeline).tolist())
