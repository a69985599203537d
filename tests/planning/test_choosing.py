"""Choices: the cheapest strategy that can run, why others can't, and the method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import hetu
from hetu.parallel import Heads, Layout, build_plan
from hetu.parallel.choice.setting import chosen, set_hardware

H100 = hetu.Hardware.h100()
SLOW_LINKS = hetu.Hardware(1e12, 1e3, 1.0, 1e12)
s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
STRATEGIES = [hetu.Strategy([s], [0], "one"), hetu.Strategy([s // 2, s - s // 2], [0, 0], "two")]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = chosen().hardware
    yield
    set_hardware(before)


def graph(packing: bool = False, **options: Any) -> tuple[hetu.Graph, hetu.Tensor, hetu.Tensor, hetu.Tensor | None]:
    with hetu.graph("define_and_run", strategies=STRATEGIES, device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [rows, 24], name="qkv")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("n")], name="cu") if packing else None
        out, *_ = hetu.parallel_attn(qkv, 8, 1, packing=packing, cu_seqlens_q=cu, split="sym", **options)
    return g, qkv, out, cu


def shards(count: int, each: int = 512) -> hetu.Shards:
    return hetu.Shards([np.zeros((each, 24), np.float32)] * count)


@pytest.mark.parametrize("packing", [False, True])
def test_only_what_fits_the_feeds_is_taken(packing: bool) -> None:
    """Whatever is cheaper."""
    g, qkv, out, cu = graph(packing)
    for hardware in (SLOW_LINKS, H100):
        hetu.use_hardware(hardware)
        for count in (1, 2):
            feeds: dict[Any, Any] = {qkv: shards(count)}
            if cu is not None:
                feeds[cu] = np.array([0, 100, 512 * count], np.int32)
            run = g.prepare(out, feeds, int_symbol_dict={s: 512 * count}, strategy="auto")
            assert run.strategy == count - 1


def test_the_cheapest_is_taken_for_the_hardware_that_is_set() -> None:
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([s, s], groups) for groups in ([0, 0], [0, 1])]) as g:
        qkv = hetu.placeholder(hetu.float32, [rows, 24], name="qkv")
        out, *_ = hetu.parallel_attn(qkv, 8, 1, split="sym")
    # Two groups send nothing; for them the same rows are two sequences, and less work.
    assert g.prepare(out, {qkv: shards(2, 2000)}, int_symbol_dict={s: 2000}, strategy="auto").strategy == 1
    swift = [hetu.Strategy([s // 4, s - s // 4], [0, 0], "uneven"), hetu.Strategy([s // 2, s - s // 2], [0, 0], "even")]
    with hetu.graph("define_and_run", strategies=swift) as g:
        qkv = hetu.placeholder(hetu.float32, [rows, 24], name="qkv")
        hetu.parallel_attn(qkv, 8, 1, split="sym", method="direct")
    assert g.explain(int_symbol_dict={s: 4000}, hardware=replace(H100, latency=0)).chosen == 1


def test_a_default_is_not_taken_for_what_feeds_tell() -> None:
    """What shapes say is stronger than a default; a strategy is judged by the sizes that it runs with."""
    for default, fed, fits in ((1, 300, False), (10**6, 300, True)):
        t = hetu.IntSymbol(default)
        with hetu.graph(
            "define_and_run", strategies=[hetu.Strategy([t, t], groups) for groups in ([0, 0], [0, 1])]
        ) as g:
            qkv = hetu.placeholder(hetu.float32, [t, 24], name="qkv")
            out, *_ = hetu.parallel_attn(qkv, 8, 1, split="sym")
        need = [choice.peak_bytes for choice in g.explain(int_symbol_dict={t: fed}).choices]
        hetu.use_hardware(replace(H100, memory_bytes=max(need) if fits else min(need) - 1))
        if fits:
            assert g.prepare(out, {qkv: shards(2, fed)}, strategy="auto").strategy == 1
            continue
        with pytest.raises(hetu.StrategyError, match="none of the 2 strategies can run"):
            g.prepare(out, {qkv: shards(2, fed)}, strategy="auto")


@pytest.mark.parametrize("mask", [hetu.Mask.causal(), hetu.Mask.chunked(64)])
def test_runs_and_explanations_agree_on_what_fits(mask: hetu.Mask) -> None:
    """Of training, too: whether the mask has a closed form or not."""
    with hetu.graph("define_and_run", strategies=STRATEGIES, device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [rows, 24], name="qkv")
        out, *_ = hetu.parallel_attn(qkv, 8, 1, split="sym", mask=mask)
        grads = hetu.gradients(hetu.sum(out), qkv)
    values = {s: 600}
    need = g.explain(int_symbol_dict=values).choices[1].peak_bytes
    hetu.use_hardware(replace(H100, memory_bytes=need))
    assert g.explain(int_symbol_dict=values).choices[1].reason is None
    assert g.prepare(grads, {qkv: shards(2, 300)}, int_symbol_dict=values, strategy="auto").strategy == 1


def test_explanations_count_all_attentions_as_runs_do() -> None:
    """The first attention alone would take another strategy than both of them; one has a gradient."""
    with hetu.graph("define_and_run", strategies=STRATEGIES, device="cpu") as g:
        qkv, wide = (hetu.placeholder(hetu.float32, [rows, n * 24], name=f"x{n}") for n in (1, 64))
        first, *_ = hetu.parallel_attn(qkv, 8, 1, split="sym", window_size=(1, 0), name="first")
        second, *_ = hetu.parallel_attn(wide, 8, 1, split="sym", name="second")
        grads = hetu.gradients(hetu.sum(second), wide)
    values = {s: 4000}
    one, other, both = (g.explain(int_symbol_dict=values, node=name) for name in ("first", "second", None))
    assert (one.chosen, other.chosen, both.chosen) == (0, 1, 1)
    for parts in zip(one.choices, other.choices, both.choices, strict=True):
        a, b, total = (choice.estimate.time for choice in parts)
        assert total == pytest.approx(a + b) and parts[2].peak_bytes == max(choice.peak_bytes for choice in parts)
    feeds = {qkv: shards(2, 2000), wide: hetu.Shards([np.zeros((2000, 64 * 24), np.float32)] * 2)}
    run = g.prepare([first, grads], feeds, int_symbol_dict=values, strategy=1)
    ranking = g.planner._chooser.by_symbols(run.subgraph, values, chosen())
    assert ranking.order == sorted(range(2), key=lambda index: both.choices[index].estimate.time)


def test_hosts_decide_the_method() -> None:
    """Also where symbols alone are known, which is before anything is planned."""
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([s] * 4, [0] * 4)]) as g:
        qkv = hetu.placeholder(hetu.bfloat16, [rows, 3072], name="qkv")
        hetu.parallel_attn(qkv, 128, 4, split="sym")
    hetu.use_hardware(replace(H100, host_link_bytes=H100.link_bytes / 32))
    for hosts, method in ((None, "direct"), ((0, 0, 1, 1), "hierarchical"), ((5,), "direct"), ((0, 1), "hierarchical")):
        with hetu.config(hosts=hosts):
            assert g.explain(int_symbol_dict={s: 512}).choices[0].method == method
            assert g.plan(0, int_symbol_dict={s: 512}).method == method


def test_explain_says_why_not() -> None:
    g, *_ = graph()
    found = g.explain(int_symbol_dict={s: 4000})
    assert [choice.name for choice in found.choices] == ["one", "two"] and found.hardware == H100
    need = found.choices[0].peak_bytes
    small = replace(H100, memory_bytes=need - 1)
    found = g.explain(int_symbol_dict={s: 4000}, hardware=small)
    assert "1 B more than" in (found.choices[0].reason or "") and "can't run: it holds" in str(found)
    with pytest.raises(hetu.HetuError, match="expected hardware to be"):
        g.explain(int_symbol_dict={s: 4000}, hardware=8)
    packed, *_ = graph(True)
    assert packed.explain(int_symbol_dict={s: 10}).chosen is None  # it needs cu_seqlens
    assert packed.explain(int_symbol_dict={s: 10}, cu_seqlens=[0, 3, 10]).chosen is not None


def test_the_estimate_is_of_the_plan_that_a_run_follows() -> None:
    """Work and memory are those of the plan."""
    g, *_ = graph(method="direct")
    hardware = replace(H100, latency=0, link_bytes=1e30)
    for index, choice in enumerate(g.explain(int_symbol_dict={s: 1001}, hardware=hardware).choices):
        cost = g.plan(index, int_symbol_dict={s: 1001}).cost(hardware)
        assert choice.estimate.compute == pytest.approx(max(cost.flops) / hardware.flops)
        assert choice.peak_bytes == max(cost.peak_bytes)


def test_where_none_can_run_each_says_why() -> None:
    g, qkv, out, _ = graph()
    hetu.use_hardware(replace(H100, memory_bytes=1000))
    with pytest.raises(hetu.StrategyError, match="none of the 2 strategies can run") as caught:
        g.prepare(out, {qkv: shards(1)}, int_symbol_dict={s: 512}, strategy="auto")
    assert len(caught.value.bound) == 2 and all("more than the 1.0 kB of memory" in line for line in caught.value.bound)
    hetu.use_hardware(H100)
    with pytest.raises(hetu.StrategyError) as caught:
        g.prepare(out, {qkv: shards(3)}, int_symbol_dict={s: 512}, strategy="auto")
    assert len(caught.value.bound) == 2


def test_a_strategy_that_is_not_followed_may_have_negative_lengths() -> None:
    strategies = [hetu.Strategy([s - 600, 600], [0, 0]), hetu.Strategy([s], [0])]
    with hetu.graph("define_and_run", strategies=strategies, device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [rows, 24], name="qkv")
        out, *_ = hetu.parallel_attn(qkv, 8, 1)
    assert g.prepare(out, {qkv: shards(1)}, int_symbol_dict={s: 512}, strategy="auto").strategy == 1
    with pytest.raises(hetu.HetuError):
        g.prepare(out, {qkv: shards(2, 300)}, int_symbol_dict={s: 512}, strategy=0)


def test_the_method_is_the_cheapest() -> None:
    heads, layout = Heads(8, 8, 128, 2), Layout.build([100, 100_000], [0, 0])
    for hardware, wanted in ((H100, "ulysses"), (SLOW_LINKS, "direct")):
        plan = build_plan(layout, heads=heads, hardware=hardware)
        other = {"ulysses": "direct", "direct": "ulysses"}[wanted]
        assert plan.method == wanted
        assert plan.cost(hardware).time < build_plan(layout, method=other, heads=heads).cost(hardware).time
    assert build_plan(layout, heads=heads).method == "direct"
    g, qkv, out, _ = graph()
    plans = []
    for hardware in (SLOW_LINKS, replace(H100, latency=0, link_bytes=1e30)):
        hetu.use_hardware(hardware)  # the same lengths make another plan then
        plans.append(next(g.prepare(out, {qkv: shards(2)}, int_symbol_dict={s: 1024}, strategy=1).attention_plans()))
    assert plans[0].method == "direct" and plans[0] is not plans[1]


def test_masks_without_closed_form_are_asked_of_the_clock() -> None:
    g, qkv, out, _ = graph(mask=hetu.Mask.chunked(16), method="direct")
    assert g.prepare(out, {qkv: shards(2)}, int_symbol_dict={s: 1024}, strategy="auto").strategy == 1


def test_groups_may_be_symbols() -> None:
    """Then no expression is there, and all strategies are bound."""
    k = hetu.IntSymbol("k")
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([s, s], groups) for groups in ([0, 0], [0, k])]) as g:
        qkv = hetu.placeholder(hetu.float32, [rows, 24], name="qkv")
        out, *_ = hetu.parallel_attn(qkv, 8, 1, split="sym")
    for value in (0, 1):
        run = g.prepare(out, {qkv: shards(2)}, int_symbol_dict={s: 512, k: value}, strategy="auto")
        assert run.strategy == value
