"""Planned batches: every token in one place, budgets kept, near the optimum, and refusals that say what is too much."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hetu
from hetu.parallel import Heads, build_plan
from hetu.parallel.batch.cost import BatchCost, Documents
from hetu.parallel.batch.finish import Place, finish

SLOW_LINKS = hetu.Hardware(flops=500e12, link_bytes=10e9, latency=1e-4, memory_bytes=80e9)
HARDWARE = [hetu.Hardware.h100(), SLOW_LINKS]
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int, int, hetu.Hardware]:
    """Lengths, pipelines, a budget in which the longest document has room, and hardware."""
    pipelines = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 90), st.integers(0, 3000)), max_size=30))
    least = max(-(-max(lengths, default=0) // pipelines), 1)
    return (
        lengths,
        pipelines,
        least + draw(st.one_of(st.just(0), st.integers(0, 2000))),
        draw(st.sampled_from(HARDWARE)),
    )


@settings(max_examples=100, deadline=None)
@given(batches())
@example(([9, 4, 10, 10, 1, 1, 1, 0, 2, 3, 1, 4, 0, 10, 4, 1, 0, 1, 10, 10], 1, 17, HARDWARE[0]))
def test_every_token_lies_in_one_place_within_the_budget(batch: tuple[list[int], int, int, hetu.Hardware]) -> None:
    lengths, pipelines, max_tokens, hardware = batch
    plan = hetu.plan_batch(lengths, pipelines, hardware, max_tokens=max_tokens)
    assert plan.groups == tuple(sorted(plan.groups))  # a group's pipelines are neighbours
    seen: list[tuple[int, int]] = []
    assert len(plan.micro_batches) == plan.num_micro_batches
    for item in plan.micro_batches:
        assert sum(item.lengths) > 0 or not sum(lengths)  # no micro-batch is empty
        assert max(item.lengths) <= max_tokens
        assert item.lengths == tuple(item.layout.rows(r) for r in range(pipelines))
        for r in range(pipelines):
            own = item.documents[plan.groups[r]]
            seen += [
                (own[d], p)
                for d, p in zip(item.layout.documents(r).tolist(), item.layout.positions(r).tolist(), strict=True)
            ]
    assert sorted(seen) == [(d, position) for d, length in enumerate(lengths) for position in range(length)]
    held = [d for item in plan.micro_batches for own in item.documents.values() for d in own]
    assert sorted(held) == list(range(len(lengths)))  # empty ones too
    assert max(plan.seconds) >= plan.least_seconds * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(batches())
def test_scatter_and_gather_are_inverse(batch: tuple[list[int], int, int, hetu.Hardware]) -> None:
    lengths, pipelines, max_tokens, hardware = batch
    plan = hetu.plan_batch([*lengths, 1], pipelines, hardware, max_tokens=max_tokens)
    documents = [np.random.default_rng(d).standard_normal((length, 2)) for d, length in enumerate(plan.lengths)]
    for mine, whole in zip(plan.gather(plan.scatter(documents)), documents, strict=True):
        np.testing.assert_array_equal(mine, whole)


def test_plans_are_values() -> None:
    plans = [hetu.plan_batch([700, 30, 0, 5], 3, HARDWARE[0], max_tokens=400) for _ in range(2)]
    assert plans[0] == plans[1]
    assert hash(plans[0]) == hash(plans[1])
    assert plans[0] != hetu.plan_batch([700, 30, 1, 5], 3, HARDWARE[0], max_tokens=400)


def test_short_documents_stay_whole_and_long_ones_get_what_pays() -> None:
    lengths = [60_000, 9000] + [700] * 40
    fast, slow = (hetu.plan_batch(lengths, 8, hardware, max_tokens=32768) for hardware in HARDWARE)
    for plan in (fast, slow):
        assert len(plan.places[0].pieces) == 7
        assert sum(len(place.pieces) > 1 for place in plan.places[1:]) <= 1
        assert max(plan.seconds) <= 1.05 * plan.least_seconds
    # Where links are so slow that no cut pays, only what has no room is cut.
    never = hetu.Hardware(flops=500e12, link_bytes=1.0, latency=0.0, memory_bytes=1.0)
    assert all(len(p.pieces) == 1 for p in hetu.plan_batch(lengths, 8, never, max_tokens=60_000).places)


def test_more_micro_batches_where_one_has_no_room() -> None:
    plan = hetu.plan_batch([90] * 10, 2, HARDWARE[0], max_tokens=100)
    assert plan.num_micro_batches >= 5
    assert all(max(item.lengths) <= 100 for item in plan.micro_batches)
    whole = hetu.plan_batch([101] * 3, 2, HARDWARE[0], max_tokens=100)  # two of them have no room together
    assert sorted(place.micro_batch for place in whole.places) == [0, 1, 2]


def test_the_cost_counts_what_plans_do() -> None:
    """Pairs of a piece, up to the edges of a sym cut, and an upper bound of the rows that travel."""
    lengths = [5000, 800, 300, 40]
    plan = hetu.plan_batch(lengths, 4, HARDWARE[0], max_tokens=4000)
    assert len(plan.places[0].pieces) > 1
    for item in plan.micro_batches:
        attn = build_plan(item.layout, method="direct", heads=Heads(2, 1, 8, 2))
        for r in range(4):
            own = [(d, dict(place.pieces)[r]) for d, place in enumerate(plan.places) if r in dict(place.pieces)]
            priced = sum(x * (lengths[d] + 1) / 2 for d, x in own)
            assert attn.pairs(r) == pytest.approx(priced, rel=0.01)
            rows = sum((lengths[d] - x) * (len(plan.places[d].pieces) > 1) for d, x in own)
            assert attn.rows_received(r) <= rows


def test_waiting_for_each_other_is_priced() -> None:
    """Two pipelines that share a document begin and end its micro-batch together."""
    documents = Documents([100, 50, 20], [0.0, 0.0, 0.0], [100.0, 50.0, 20.0])
    cost = BatchCost(token=1.0, pair=0.0, row=0.0, latency=0.0)
    places = [Place(1, ((0, 60), (1, 40))), Place(0, ((0, 50),)), Place(2, ((1, 20),))]
    assert finish(documents, places, 3, 3, cost) == [110.0, 130.0, 0.0]


@pytest.mark.parametrize("seed", range(4))
def test_near_the_exact_optimum(seed: int) -> None:
    """One micro-batch, three pipelines, documents over any sets of pipelines, by mixed-integer programming."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(200, 12000, 5))[::-1].tolist()
    hardware = [hetu.Hardware.h100(), hetu.Hardware(500e12, 15e9, 3e-5, 80e9)][seed % 2]
    plan = hetu.plan_batch(lengths, 3, hardware, max_tokens=sum(lengths))
    optimum = _optimum(lengths, 3, sum(lengths), BatchCost.of(hardware, 32, 8, 128, 2, 72.0 * 4096**2))
    assert plan.num_micro_batches == 1
    # A group of the plan ends together, which the program does not ask for.
    assert optimum * (1 - 1e-6) <= max(plan.seconds) <= optimum * 1.05


def _optimum(lengths: list[int], pipelines: int, max_tokens: int, cost: BatchCost) -> float:
    """The least time of the slowest pipeline."""
    from scipy.optimize import LinearConstraint, milp

    sets = [[r for r in range(pipelines) if bits >> r & 1] for bits in range(1, 1 << pipelines)]
    chosen = {(d, s): i for i, (d, s) in enumerate((d, s) for d in range(len(lengths)) for s in range(len(sets)))}
    held = {}
    for d, s in chosen:
        for r in sets[s]:
            held[d, s, r] = len(chosen) + len(held)
    attends, waits = (len(chosen) + len(held) + i * pipelines for i in range(2))
    # For each pipeline the longer of attending and of rows on the way, and whether it holds a piece; then the time.
    size = len(chosen) + len(held) + 2 * pipelines + 1
    rows: list[tuple[dict[int, float], float]] = []  # of what is at most a number
    equal: list[tuple[dict[int, float], float]] = []
    for d, length in enumerate(lengths):
        equal.append(({chosen[d, s]: 1.0 for s in range(len(sets))}, 1.0))
        for s, members in enumerate(sets):
            equal.append(({**{held[d, s, r]: 1.0 for r in members}, chosen[d, s]: -float(length)}, 0.0))
            for r in members:
                if len(members) > 1:
                    rows.append(({chosen[d, s]: 1.0, waits + r: -1.0}, 0.0))
    for r in range(pipelines):
        own = [(d, s, held[d, s, r]) for d, s in chosen if r in sets[s]]
        pairs = {x: cost.pair * (lengths[d] + 1) / 2 for d, _, x in own}
        edges = {
            chosen[d, s]: cost.edge(n, cost.pair * n * (n + 1) / 2)
            for d, s, _ in own
            if len(sets[s]) > 1
            for n in [lengths[d]]
        }
        rows.append(({**pairs, **edges, attends + r: -1.0}, 0.0))
        cut = [(d, s, x) for d, s, x in own if len(sets[s]) > 1]
        came = {**{x: -cost.row for _, _, x in cut}, **{chosen[d, s]: cost.row * lengths[d] for d, s, _ in cut}}
        went = {x: cost.row * (len(sets[s]) - 1) for _, s, x in cut}
        rows += [({**came, attends + r: -1.0}, 0.0), ({**went, attends + r: -1.0}, 0.0)]
        rows.append(({x: 1.0 for _, _, x in own}, float(max_tokens)))
        time = {x: cost.token for _, _, x in own}
        rows.append(({**time, attends + r: 1.0, waits + r: cost.latency, size - 1: -1.0}, 0.0))
    integral = np.zeros(size)
    integral[: len(chosen)] = 1
    goal = np.zeros(size)
    goal[-1] = 1

    def constraint(given: list[tuple[dict[int, float], float]], is_equal: bool) -> LinearConstraint:
        matrix, most = np.zeros((len(given), size)), np.array([bound for _, bound in given])
        for line, (factors, _) in enumerate(given):
            matrix[line, list(factors)] = list(factors.values())
        return LinearConstraint(matrix, most if is_equal else -np.inf, most)

    found = milp(goal * 1e3, integrality=integral, constraints=[constraint(rows, False), constraint(equal, True)])
    assert found.success, found.message
    return float(found.x[-1])


# Refusals


def test_a_document_that_has_no_room_is_named() -> None:
    with pytest.raises(hetu.StrategyError) as caught:
        hetu.plan_batch([10, 70_000, 3], 8, HARDWARE[0], max_tokens=8192)
    text = str(caught.value)
    assert "document 1 has 70,000 tokens" in text
    assert "room for 65,536: 4,464 too many" in text
    assert "max_tokens of at least 8750" in text
    assert "test_plan_batch.py" in text


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lengths": [3, -1]}, r"lengths\[1\]"),
        ({"lengths": 3}, "lengths"),
        ({"pipelines": 0}, "pipelines"),
        ({"hardware": "h100"}, "hardware"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"num_kv_heads": 5}, "num_kv_heads"),
        ({"dtype": "int8"}, "dtype"),
        ({"token_flops": -1.0}, "token_flops"),
        ({"mask": hetu.Mask.window(hetu.IntSymbol("w"), 0)}, "has no value for w"),
        ({"mask": hetu.Mask.slices([(0, 3)], [(0, 3)], ["full"])}, "no document sees another"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], match: str) -> None:
    good: dict[str, object] = {"lengths": [3], "pipelines": 2, "hardware": HARDWARE[0], "max_tokens": 4}
    with pytest.raises(hetu.HetuError, match=match):
        hetu.plan_batch(**{**good, **changes})  # type: ignore[arg-type]


def test_what_does_not_fit_a_plan_is_refused() -> None:
    plan = hetu.plan_batch([3, 5], 2, HARDWARE[0], max_tokens=5)
    n, m = hetu.IntSymbol("n"), hetu.IntSymbol("m")
    with pytest.raises(hetu.ShapeError, match="1 array for a batch of 2 documents"):
        plan.scatter([np.zeros(3)])
    with pytest.raises(hetu.ShapeError, match=r"documents\[1\] has 4 rows, but was planned with 5 tokens"):
        plan.scatter([np.zeros(3), np.zeros(4)])
    with pytest.raises(hetu.ShapeError, match="documents 0 and 1 have rows of float64"):
        plan.scatter([np.zeros(3), np.zeros(5, np.float32)])
    with pytest.raises(hetu.StrategyError, match=r"a hetu\.Strategy of 2 pipelines"):
        plan.symbols(hetu.Strategy([n], [0]))
    with pytest.raises(hetu.StrategyError, match="n of the strategy would have to be 5 and 3"):
        plan.symbols(hetu.Strategy([n, n], [0, 1]))
    with pytest.raises(hetu.StrategyError, match="4 of the strategy would have to be 4 and 3"):
        plan.symbols(hetu.Strategy([n, 4], [0, 1]))
    with pytest.raises(hetu.StrategyError, match="a symbol or an int"):
        plan.symbols(hetu.Strategy([n, m + 1], [0, 1]))
