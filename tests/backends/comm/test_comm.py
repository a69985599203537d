"""The interpreter of plans: with integers as data every gradient comes home exactly, whatever was in fresh memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.held import holding_keys
from support.layout_cases import DEFINITIONS, HEADS, MASKS, random_case, random_custom_layout
from support.plans import KV_METHODS, broadcast, by_halves, holding_back, rows_aside

import hetu
from hetu.backends.comm import LocalComm, Values, follow, run_lock_step
from hetu.backends.comm import buffers as comm_buffers
from hetu.parallel import Heads, Layout, Mask, QuerySpans, SegmentTable, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.mask.segments import Turn
from hetu.parallel.plan.buffers import Buffer, shard
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Receive, Runs, Send, Source, Wait
from hetu.parallel.plan.own_gradients import OwnGradients, own_gradients
from hetu.parallel.plan.parts import PipelinePlan, turns

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = Heads(num_q=2, num_kv=1, head_dim=2, itemsize=4)


class Step:
    """In place of the backward of an attention: a row's gradient is the sum over queries that see it of w and w * kv.

    Rows that no segment names get NaN where nobody needs them, so that sending one home is seen.
    """

    def __init__(self, part: PipelinePlan, weights: torch.Tensor) -> None:
        self.part, self.weights, self.steps = part, weights, 0

    divisor = 1

    def __call__(self, item: Attend, queries: Values, keys: Values, turn: Turn | None, keeps: bool) -> None:
        buffer, grads = (torch.stack([keys[name] for name in pair], 1) for pair in (("k", "v"), ("dk", "dv")))
        assert buffer.shape == grads.shape and len(buffer) == (item.rows if item.buffer else self.part.rows)
        assert turn is list(turns(self.part).values())[self.steps]
        self.steps += 1
        spans, table, total = self.part.spans, item.table, torch.zeros(grads.shape, dtype=torch.float64)
        named = torch.zeros(len(grads), dtype=torch.bool)
        columns = (table.query, table.k_start, table.k_len, table.diagonal, table.lower_over(spans))
        for query, k_start, k_len, diagonal, lower in zip(*(column.tolist() for column in columns), strict=True):
            i, j = torch.arange(spans.length[query])[:, None], torch.arange(k_len)
            rows = slice(spans.start[query], spans.start[query] + spans.length[query])
            w = torch.where((i + lower <= j) & (j <= i + diagonal), self.weights[rows][:, None], 0.0).sum(0)[
                :, None, None
            ]
            seen = slice(k_start, k_start + k_len)
            total[seen, 0] += w
            total[seen, 1] += w * buffer[seen, 1]
            named[seen] = True
        total /= self.divisor
        if item.buffer:
            assert keeps
            total[~named] = torch.nan
        if keeps and not item.buffer:
            total[~named] = grads[~named].double()
        keys["dk"].copy_(total[:, 0])
        keys["dv"].copy_(total[:, 1])


class Rounding(Step):
    """The same divided by odd numbers, so that sums in another order have other bits."""

    @property
    def divisor(self) -> int:
        return 3 + 7 * self.part.pipeline + self.steps


def run(
    plan: AttnPlan, dtype: torch.dtype, seed: int = 0, turn: int = 0, step: type[Step] = Step, widths: Heads = WIDTHS
) -> tuple[list[torch.Tensor], ...]:
    """Follows a backward plan on integers; gives each pipeline's (kv, weights of queries, gradients)."""
    random = torch.Generator().manual_seed(seed)
    comm, kv, weights, grads, held, coroutines = LocalComm(), [], [], [], [], []
    for part in plan.pipelines:
        kv.append(torch.randint(0, 8, (part.rows, 2, widths.num_kv, 2), generator=random).to(dtype))
        weights.append(torch.randint(1, 1000, (part.rows,), generator=random).double())
        high = torch.float64 if dtype == torch.float64 else torch.float32
        kind = high if part.sums_gradients else dtype
        grads.append(
            torch.full((part.rows, 3, widths.num_kv, 2), torch.nan, dtype=kind)[:, 1:]
        )  # a view, as in a lowering
        held.append(holding_keys(part, widths, kv[-1], grads[-1]))
        coroutines.append(follow(part, held[-1], comm, step(part, weights[-1])))
    turn %= len(coroutines)
    run_lock_step(coroutines[turn:] + coroutines[:turn])
    for buffers in held:
        buffers.finish()
    return kv, weights, grads


def expected(layout: Layout, r: int, mask: Mask, kv: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """The gradients of pipeline r's rows, straight from positions."""
    w = torch.zeros(layout.rows(r), dtype=torch.float64)
    for c in layout.place(r)[0].members:
        seen = layout.documents(c)[:, None] == layout.documents(r)
        seen &= DEFINITIONS[mask](layout.positions(c)[:, None], layout.positions(r))
        w += weights[c] @ torch.from_numpy(seen).double()
    w = w[:, None, None]
    return torch.stack([w.expand(kv[:, 0].shape), w * kv[:, 1]], 1)


def check(layout: Layout, method: str, mask: Mask, dtype: torch.dtype, held: bool) -> None:
    build = broadcast(layout, mask) if method == "broadcast" else None
    with holding_back(held):
        plan = (build or build_plan(layout, method=method, mask=mask, heads=HEADS)).backward().whole()
    kv, weights, grads = run(plan, dtype)
    for r, mine in enumerate(grads):
        wanted = expected(layout, r, mask, kv[r], weights)
        assert torch.equal(mine, wanted.to(mine.dtype)), f"pipeline {r}"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", [*KV_METHODS, "broadcast"])
@given(seed=SEEDS, mask=st.sampled_from(MASKS), custom=st.booleans(), held=st.booleans())
def test_every_gradient_comes_home(
    method: str, dtype: torch.dtype, seed: int, mask: Mask, custom: bool, held: bool
) -> None:
    """Keys and values may be bfloat16, in which no weight from 257 on is exact: gradients travel in float32."""
    rng = np.random.default_rng(seed)
    layout = random_custom_layout(rng, longest=9) if custom else random_case(rng, longest=7, most=6).layout()
    check(layout, method, mask, dtype, held)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("method", KV_METHODS)
@given(seed=SEEDS, mask=st.sampled_from(MASKS))
def test_halves_of_rows_that_travel_apart(method: str, seed: int, mask: Mask) -> None:
    layout, widths = random_case(np.random.default_rng(seed), longest=7, most=6).layout(), Heads(4, 2, 2, 4)
    plan = by_halves(build_plan(layout, method=method, mask=mask, heads=widths)).backward()
    kv, weights, grads = run(plan, torch.float64, widths=widths)
    for r, mine in enumerate(grads):
        assert torch.equal(mine, expected(layout, r, mask, kv[r], weights)), f"pipeline {r}"


@pytest.mark.parametrize("method", [*KV_METHODS, "broadcast"])
@pytest.mark.parametrize("lens", [[9, 4, 7, 6], [15, 11]], ids=str)
def test_sums_have_the_same_bits_whoever_is_faster(lens: list[int], method: str) -> None:
    layout = Layout.build(lens, [0] * len(lens), split="sym", cu_seqlens=[0, 11, 26])
    build = broadcast(layout, Mask.full()) if method == "broadcast" else None
    with holding_back(True):
        plan = (build or build_plan(layout, method=method, mask=Mask.full(), heads=HEADS)).backward().whole()
    exact = run(plan, torch.float32)[2]
    results = [run(plan, torch.float32, turn=turn, step=Rounding)[2] for turn in range(4)]
    assert not torch.equal(results[0][0], exact[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# One pipeline's part by hand

SPANS = QuerySpans(*(np.array([x]) for x in (0, 2, 0, 0, 1, 0, 0, 0)))
NOTHING = SegmentTable(*np.empty((4, 0), np.int64))


LANDING = 2


def alone(*instructions: Attend | Receive | Wait | Accumulate) -> PipelinePlan:
    foreign = Buffer(3, WIDTHS.all, (Payload.KV, Payload.KV_GRADS))
    buffers = shard(2, WIDTHS, is_backward=True), foreign, Buffer(2, WIDTHS.all, (Payload.KV_GRADS,))
    return PipelinePlan(0, SPANS, buffers, instructions)


def run_alone(plan: PipelinePlan, *values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gradients of a pipeline whose i-th attend computes ``values[i]`` for every row that its segments name."""
    given, dkv = iter(values), torch.full((2, 2, 1, 2), torch.nan)

    def attend(item: Attend, queries: Values, keys: Values, turn: Turn | None, keeps: bool) -> None:
        value = {span: next(given) for span in zip(*item.table.stretches(), strict=True)}
        for grads in (keys["dk"], keys["dv"]):
            if not keeps:
                grads.zero_()
            for (begin, end), computed in value.items():
                grads[begin:end] = computed

    held = holding_keys(plan, WIDTHS, torch.zeros(2, 2, 1, 2, dtype=dtype), dkv)
    run_lock_step([follow(plan, held, LocalComm(), attend)])
    held.finish()
    return dkv


def own(start: int, rows: int) -> Attend:
    """An attend to some of the own rows, all of which the last query sees."""
    table = SegmentTable(*(np.array([x]) for x in (0, start, rows, rows - 1)))
    return Attend(0, table, (Source(0, Runs(np.array([0]), np.array([2]))),), WIDTHS.all)


def added(row: int) -> Accumulate:
    return Accumulate(LANDING, 0, Runs(np.array([row]), np.array([1])), WIDTHS.all)


def by_row(grads: torch.Tensor) -> list[float]:
    assert (grads == grads[:, :1, :, :1]).all()
    return grads[:, 0, 0, 0].tolist()


OWN = own(0, 2)
FOREIGN = Attend(1, NOTHING, (Source(1, Runs(np.array([0]), np.array([3]))),), WIDTHS.all)


@pytest.mark.usefixtures("poisoned")
def test_own_rows_are_cleared_if_nothing_attends_to_them() -> None:
    assert by_row(run_alone(alone(FOREIGN))) == [0.0, 0.0]
    assert by_row(run_alone(alone(own(1, 1)), 5.0)) == [0.0, 5.0]
    assert by_row(run_alone(alone(own(1, 1), FOREIGN, own(1, 1)), 5.0, 3.0)) == [0.0, 8.0]


@pytest.mark.usefixtures("poisoned")
def test_attending_to_the_own_shard_again_adds() -> None:
    assert by_row(run_alone(alone(OWN, FOREIGN, OWN), 5.0, 2.0)) == [7.0, 7.0]
    assert by_row(run_alone(alone(OWN, own(1, 1), own(0, 1)), 5.0, 2.0, 1.0)) == [6.0, 7.0]


@pytest.mark.usefixtures("poisoned")
def test_attends_to_other_own_rows_write_in_place() -> None:
    plan = alone(own(1, 1), FOREIGN, own(0, 1))
    assert by_row(run_alone(plan, 5.0, 2.0)) == [2.0, 5.0]
    assert own_gradients(plan) == OwnGradients(frozenset(), gaps=frozenset())
    assert not plan.sums_gradients and rows_aside(plan) == 3  # those of the foreign rows
    # What was added to a row, or computed of it aside, is kept; other rows are written in place all the same.
    assert own_gradients(alone(OWN, own(1, 1), own(0, 1))).aside == {1, 2}
    assert own_gradients(alone(added(0), own(1, 1), own(0, 1))) == OwnGradients(frozenset({2}), gaps=frozenset({0}))
    every_other = Accumulate(LANDING, 0, Runs(np.array([0]), np.array([2]), step=np.array([2])), WIDTHS.all)
    assert own_gradients(alone(every_other, own(1, 1), own(2, 1))).aside == {2}


def test_gradients_that_come_in_several_parts_are_summed_up() -> None:
    assert alone(OWN, FOREIGN, OWN).sums_gradients and alone(OWN, added(1)).sums_gradients
    assert not alone(OWN, FOREIGN).sums_gradients and not alone(FOREIGN).sums_gradients


def test_what_was_added_before_the_own_shard_is_attended_to_is_kept() -> None:
    plan = alone(FOREIGN, added(1), OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm_buffers, "empty", lambda shape, dtype, device: torch.full(shape, 3.0, dtype=dtype))
        assert by_row(run_alone(plan, 2.0)) == [2.0, 5.0]


def test_scratch_is_freed_once_it_is_sent() -> None:
    """Memory is that of one foreign buffer's gradients, as ``peak_bytes`` says."""
    plan = build_plan(Layout.build([4] * 4, [0] * 4), method="ring", mask=Mask.full(), heads=HEADS).backward()
    alive: list[int] = []

    class Counting(Step):
        def __call__(self, item: Attend, queries: Values, keys: Values, turn: Turn | None, keeps: bool) -> None:
            super().__call__(item, queries, keys, turn, keeps)
            frame = coroutines[self.part.pipeline].gi_frame
            buffers = zip(self.part.buffers, frame.f_locals["held"]._values, strict=True)
            foreign = [values for buffer, values in buffers if buffer.holds_keys][1:]
            alive.append(sum(len(values["dk"]) for values in foreign if "dk" in values))

    comm = LocalComm()
    coroutines = []
    for part in plan.pipelines:
        kv = torch.zeros(4, 2, 1, 2)
        step = Counting(part, torch.ones(4, dtype=torch.float64))
        coroutines.append(follow(part, holding_keys(part, WIDTHS, kv, torch.empty(4, 2, 1, 2)), comm, step))
    run_lock_step(coroutines)
    assert max(alive) == 4 == max(rows_aside(part) for part in plan.pipelines)


# Taking turns


@pytest.mark.parametrize("turn", range(4))
def test_who_waits_in_its_first_turn_may_have_sent_what_others_wait_for(turn: int) -> None:
    plan = broadcast(Layout.build([2] * 4, [0] * 4), mask=Mask.full())
    comm, steps = LocalComm(), []
    kv = [torch.zeros(2, 2, 1, 2) for _ in range(4)]
    coroutines = [
        follow(part, holding_keys(part, WIDTHS, kv[r]), comm, lambda item, *_: steps.append(item.buffer))
        for r, part in enumerate(plan.pipelines)
    ]
    run_lock_step([*coroutines[turn:], *coroutines[:turn]][::-1])
    assert len(steps) == 16


# The mailbox


def mailed(rows: torch.Tensor, place: torch.Tensor) -> None:
    comm, runs = LocalComm(), Runs(np.array([0]), np.array([2]))
    comm.receive(1, Receive(0, 0, 0, 0, 2, Payload.KV_GRADS, WIDTHS.all), place)
    comm.send(0, Send(0, 1, 1, runs, Payload.KV_GRADS, WIDTHS.all), rows)
    assert comm.done(0, 0) and comm.done(1, 0)


def test_a_transfer_of_another_shape_or_dtype() -> None:
    rows = torch.ones(2, 3)
    mailed(rows, torch.zeros(2, 3))
    with pytest.raises(hetu.CommunicationError, match="brings 2 rows, expected 4"):
        mailed(rows, torch.zeros(4, 3))
    with pytest.raises(hetu.CommunicationError, match=r"brings torch\.float32, expected torch\.bfloat16"):
        mailed(rows, torch.zeros(2, 3, dtype=torch.bfloat16))


def test_pipelines_that_wait_for_each_other() -> None:
    buffers = shard(2, WIDTHS), Buffer(2, WIDTHS.all, (Payload.KV,))
    plan = PipelinePlan(0, SPANS, buffers, (Receive(0, 1, 1, 0, 2, Payload.KV, WIDTHS.all), Wait(0)))
    kv = torch.zeros(2, 2, 1, 2)
    with pytest.raises(hetu.CommunicationError, match="pipelines 0 wait for each other"):
        run_lock_step([follow(plan, holding_keys(plan, WIDTHS, kv), LocalComm(), lambda *_: None)])
