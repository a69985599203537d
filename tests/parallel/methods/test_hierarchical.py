"""``hierarchical``: proven on random hosts, never more bytes between hosts than others, and refused when damaged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layout_cases import HEADS, MASKS, random_case, random_custom_layout, sparse_layout
from support.plans import KV_METHODS, find, refused, with_instructions
from support.same import assert_same

from hetu.parallel import Hardware, Heads, Layout, Mask, Topology, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Copy, Send

LAYOUTS = {
    "any split": lambda rng: random_case(rng, longest=9, most=8).layout(),
    "sparse": lambda rng: sparse_layout(rng, most=8),
    "any tokens": lambda rng: random_custom_layout(rng, longest=10),
}
HOST_OF_TWO = Topology((0, 0, 1, 1))
FAST = Hardware(flops=1e12, link_bytes=1e9, latency=0, memory_bytes=1e9)


def built(layout: Layout, topology: Topology, mask: Mask = MASKS[0], method: str = "hierarchical") -> AttnPlan:
    return build_plan(layout, method=method, mask=mask, heads=HEADS, topology=topology)


@given(
    kind=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 2**32 - 1),
    mask=st.sampled_from(MASKS),
    hosts=st.integers(1, 4),
)
def test_random_hosts(kind: str, seed: int, mask: Mask, hosts: int) -> None:
    """Proven in both directions; own parts are those of the whole; none of the others leaves hosts with fewer bytes."""
    rng = np.random.default_rng(seed)
    layout = LAYOUTS[kind](rng)
    topology = Topology(tuple(rng.integers(0, hosts, layout.num_pipelines).tolist()))
    plan = built(layout, topology, mask)
    plan.verify()
    backward = plan.backward()
    backward.verify()
    for r in range(layout.num_pipelines):
        own = built(layout, topology, mask)
        assert_same(own.backward().part(r), backward.pipelines[r])
        assert_same(own.part(r), plan.pipelines[r])
    for method in set(KV_METHODS) - {"hierarchical"}:
        other = built(layout, topology, mask, method)
        assert plan.cost(FAST).host_bytes <= other.cost(FAST).host_bytes
        assert backward.cost(FAST).host_bytes <= other.backward().cost(FAST).host_bytes


def test_one_host_is_direct() -> None:
    layout = Layout.build([5] * 4, [0] * 4, split="sym")
    one, direct = built(layout, Topology.one_host(4)), built(layout, Topology.one_host(4), method="direct")
    for mine, other in ((one, direct), (one.backward(), direct.backward())):
        assert_same(mine.pipelines[:], other.pipelines[:])


def test_rows_go_once_to_each_host() -> None:
    """Four rows of two members cross over, of which both others need all; their sums come back once."""
    layout = Layout.build([4] * 4, [0] * 4)
    plan = built(layout, HOST_OF_TWO)
    row = HEADS.kv_row_bytes
    assert plan.cost(FAST).host_bytes == 8 * row
    assert built(layout, HOST_OF_TWO, method="direct").cost(FAST).host_bytes == 16 * row
    assert plan.backward().cost(FAST).host_bytes == 8 * (row + HEADS.grad_row_bytes)
    assert plan.cost(FAST, Topology.one_host(4)).host_bytes == 0


def test_damaged_sums_are_refused() -> None:
    backward = built(Layout.build([4] * 4, [0] * 4), HOST_OF_TWO).backward().whole()
    backward.verify()
    (r,) = {r for r, part in enumerate(backward.pipelines) if any(isinstance(x, Copy) for x in part.instructions)} & {2}
    items, at = find(backward, Copy, r)
    refused(with_instructions(backward, r, items[:at] + items[at + 1 :]), "never added")
    refused(with_instructions(backward, r, [*items[: at + 1], *items[at:]]), "a second time")
    runs = dataclasses.replace(items[at].place, start=items[at].place.start + 1, length=items[at].place.length - 1)
    less = dataclasses.replace(items[at].runs, length=items[at].runs.length - 1)
    refused(
        with_instructions(
            backward, r, [*items[:at], dataclasses.replace(items[at], place=runs, runs=less), *items[at + 1 :]]
        ),
        "adds",
    )
    # Sums that set out before they are complete.
    sent = next(n for n, x in enumerate(items) if isinstance(x, Send) and n > at and x.grads)
    moved = [*items[:at], items[sent], *items[at:sent], *items[sent + 1 :]]
    refused(with_instructions(backward, r, moved), "pipeline")


def test_a_topology_of_another_size_is_refused() -> None:
    plan = built(Layout.build([4] * 4, [0] * 4), HOST_OF_TWO).whole()
    refused(dataclasses.replace(plan, topology=Topology((0, 1))), "hosts of 2 pipelines")


@pytest.mark.parametrize("count", [2, 6])
def test_it_is_ahead_where_links_between_hosts_are_slow(count: int) -> None:
    """Of pieces so short that they don't hide what travels."""
    topology = Topology(tuple([r // 2 for r in range(2 * count)]))
    layout = Layout.build([256] * 2 * count, [0] * 2 * count, split="sym")
    slow = Hardware(flops=1e13, link_bytes=1e9, latency=0, memory_bytes=1e9, host_link_bytes=1e9 / 8)

    def time(method: str) -> float:
        plan = built(layout, topology, method=method)
        return plan.cost(slow).time + plan.backward().cost(slow).time

    assert all(time("hierarchical") < time(method) for method in set(KV_METHODS) - {"hierarchical"})


@pytest.mark.parametrize("slower", [8, 32])
@pytest.mark.parametrize("heads", [Heads(32, 8, 128, 2), Heads(32, 32, 128, 2), Heads(4, 4, 128, 2)])
def test_auto_takes_what_the_clock_finds_fastest(heads: Heads, slower: int) -> None:
    """Of direct, ulysses and hierarchical, or one that takes 15% longer at most."""
    topology = Topology((0, 0, 0, 0, 1, 1, 1, 1))
    hardware = dataclasses.replace(Hardware.h100(), host_link_bytes=450e9 / slower)
    for tokens in (256, 2048, 16384):
        layout = Layout.build([tokens] * 8, [0] * 8, split="sym")
        times = {
            method: build_plan(layout, method=method, heads=heads, topology=topology).cost(hardware).time
            for method in ("direct", "ulysses", "hierarchical")
        }
        plan = build_plan(layout, heads=heads, topology=topology, hardware=hardware)
        assert times[plan.method] < 1.15 * min(times.values()), (tokens, plan.method, times)
