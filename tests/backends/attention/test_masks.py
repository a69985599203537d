"""Lower diagonals, softcaps and sinks in both kernel families, forward and backward, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import CUDA, DEVICES
from support.longer import LONGER, grid
from support.table_checks import check_backward, check_forward
from support.tables_by_definition import Case, buffers, dense, random_case, rows_of, run, sinks_of

from hetu.backends.attention.contract import Dropout, dropout_key, finish_softmax, sink_gradient
from hetu.backends.eager import attend as eager
from hetu.backends.triton import BackwardTiles, Tile, launch, launch_backward
from hetu.parallel import Mask
from hetu.parallel.mask.segments import QuerySpans, SegmentTable
from hetu.parallel.mask.varlen import varlen_tables

# Triton's interpreter computes by numpy, which tells of every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DROPOUT = Dropout(0.3, dropout_key(11, 2, 0))
LENGTHS = [0, 1, 63, 129, 5]


@pytest.fixture(params=["torch", "triton"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def windows(seed: int, lengths: list[int], steps: int = 2, is_causal: bool = True, tail: int = 0) -> Case:
    return random_case(seed, lengths, is_causal=is_causal, num_steps=steps, tail=tail, has_windows=True)


EXTRAS = {
    "lower": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"has_sinks": True},
    "all": {"softcap": 4.0, "has_sinks": True, "dropout": DROPOUT},
}


@pytest.mark.parametrize(
    ("family", "extras", "steps", "is_causal"), grid(["torch", "triton"], EXTRAS, [1, 3], [True, False])
)
def test_forward(family: str, extras: str, steps: int, is_causal: bool) -> None:
    case = random_case(7, LENGTHS, is_causal=is_causal, num_steps=steps, tail=3, has_windows=extras in ("lower", "all"))
    check_forward(family, case, (4, 2), 16, torch.float32, **EXTRAS[extras])


forwards = given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 17, 63, 64, 65, 90]), min_size=1, max_size=3),
    is_causal=st.booleans(),
    steps=st.integers(1, 3),
    tail=st.integers(0, 2),
    dropout=st.sampled_from([None, DROPOUT]),
    softcap=st.sampled_from([0.0, 0.7]),
    has_sinks=st.booleans(),
)
"""Each document has bounds of its own; keys that nobody sees are NaN, and rows that see nothing have their sink."""


def check_random_forward(
    backend: str, seed: int, lengths: list[int], steps: int, is_causal: bool, tail: int, **options: Any
) -> None:
    check_forward(backend, windows(seed, lengths, steps, is_causal, tail), (2, 1), 16, torch.float32, **options)


@settings(max_examples=15 * LONGER)
@forwards
def test_random_forward_on_torch(**case: Any) -> None:
    check_random_forward("torch", **case)


@settings(max_examples=5 * LONGER)
@forwards
def test_random_forward_on_triton(**case: Any) -> None:
    check_random_forward("triton", **case)


@settings(max_examples=60 * LONGER)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(0, 20), max_size=4),
    is_causal=st.booleans(),
    steps=st.integers(1, 3),
    p=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.3, -0.2, 0.0]),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    softcap=st.sampled_from([0.0, 0.0, 0.8]),
    has_sinks=st.booleans(),
)
def test_random_backward_on_torch(
    seed: int,
    lengths: list[int],
    is_causal: bool,
    steps: int,
    p: float,
    dtype: torch.dtype,
    scale: float,
    heads: tuple[int, int],
    softcap: float,
    has_sinks: bool,
) -> None:
    case = windows(seed, lengths, steps, is_causal, seed % 3)
    check_backward(case, "torch", dtype, 8, scale, p, seed, heads, softcap=softcap, has_sinks=has_sinks)


@settings(max_examples=4 * LONGER)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(0, 20), max_size=2),
    is_causal=st.booleans(),
    steps=st.integers(1, 3),
    p=st.sampled_from([0.0, 0.4]),
    scale=st.sampled_from([0.3, 0.3, -0.2]),
    heads=st.sampled_from([(2, 1), (3, 1), (2, 2)]),
    softcap=st.sampled_from([0.0, 0.8]),
    has_sinks=st.booleans(),
)
def test_random_backward_on_triton(
    seed: int,
    lengths: list[int],
    is_causal: bool,
    steps: int,
    p: float,
    scale: float,
    heads: tuple[int, int],
    softcap: float,
    has_sinks: bool,
) -> None:
    case = windows(seed, lengths, steps, is_causal, seed % 3)
    check_backward(case, "triton", torch.float32, 8, scale, p, seed, heads, softcap=softcap, has_sinks=has_sinks)


@pytest.mark.parametrize(
    ("family", "dtype", "softcap"), grid(["torch", "triton"], [torch.float16, torch.bfloat16], [0.0, 3.0])
)
def test_half_precision(family: str, dtype: torch.dtype, softcap: float) -> None:
    check_forward(family, windows(2, LENGTHS, tail=2), (2, 1), 64, dtype, softcap=softcap, has_sinks=True)
    case = windows(4, [40, 1], 1, is_causal=False)
    extras: dict[str, Any] = {"softcap": softcap, "has_sinks": True, "in_q_dtype": True}
    check_backward(case, family, dtype, 16, 0.25, heads=(3, 1), **extras)


def test_float64() -> None:
    check_forward("torch", windows(9, [33, 20], 3), (2, 1), 16, torch.float64, softcap=0.9, has_sinks=True)


WIDE = BackwardTiles(Tile(16, 64, 4, 1), Tile(64, 32, 4, 2))
SPLIT = BackwardTiles(Tile(16, 64, 4, 1), Tile(64, 32, 4, 2), is_split=True, own_values=Tile(32, 128, 4, 1))


def sliding(lengths: list[int], left: int, right: int) -> Case:
    """Plain documents under a window, with what it lets see spelled out."""
    cu, rows = np.cumsum([0, *lengths]), sum(lengths)
    spans, table = varlen_tables(cu, cu, rows, Mask.window(left, right))
    apart = torch.arange(max(lengths)) - torch.arange(max(lengths))[:, None]
    seen = (apart >= -left) & (apart <= right)
    case = random_case(0, lengths, is_causal=True, num_steps=1)
    positions = np.concatenate([np.arange(n) for n in lengths])
    step = type(case.steps[0])(table, rows, positions)
    mask = torch.block_diag(*(seen[:n, :n] for n in lengths)).bool()
    return Case(spans, [step], [mask], rows, len(lengths), max(lengths), max(lengths))


@pytest.mark.parametrize("tiles", [WIDE, SPLIT], ids=["keys and values", "apart"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (100, 30), (3, 70)])
def test_more_rows_than_a_block(
    family: str, left: int, right: int, tiles: BackwardTiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that no row sees, that all see, and that one of the diagonals or both cross."""
    monkeypatch.setattr("hetu.backends.eager.attend_backward.CPU_BLOCK", (7, 12))
    monkeypatch.setattr(eager, "_BLOCK_ENTRIES", 16 * 90)
    if family == "triton":
        monkeypatch.setattr(launch_backward, "backward_tile", lambda *_: tiles)
        monkeypatch.setattr(launch_backward, "_kind", launch_backward._kind.__wrapped__)
        monkeypatch.setattr(launch, "tile", lambda *_: Tile(32, 16, 4, 1))
        monkeypatch.setattr(launch, "_kind", launch._kind.__wrapped__)
    elif tiles is SPLIT:
        pytest.skip("torch has no tiles")
    case = sliding([150, 1, 67], left, right)
    for dropout in (None, DROPOUT):
        check_forward(family, case, (2, 1), 16, torch.float32, dropout)
    check_backward(case, family, torch.float32, 16, 0.25, heads=(2, 1))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_softmax(family: str, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is returned is the weight of the keys alone, in blocks that begin anywhere in a segment too."""
    monkeypatch.setattr(eager, "_BLOCK_ENTRIES", 1)
    case = windows(7, [0, 1, 30, 65], 2, tail=1)
    q, pairs = buffers(case, 2, 1, 16, torch.float32, seed=0)
    options: dict[str, Any] = {"scale": 0.25, "softcap": softcap, "sinks": sinks_of(2, torch.float32, 1)}
    state = run(family, case, q, pairs, scores=True, **options)
    p = finish_softmax(state, case.spans, None, torch.float32).double()
    expected, place = dense(case, q, pairs, **options), torch.zeros_like(p)
    keys = torch.from_numpy(np.concatenate([step.key_position for step in case.steps]))
    spans = case.spans
    for start, length, slot, row in zip(spans.start, spans.length, spans.slot, spans.slot_row, strict=True):
        if slot >= 0:
            place[slot, :, row : row + length].index_add_(2, keys, expected.p[:, start : start + length])
    torch.testing.assert_close(p, place, rtol=0, atol=2e-5)
    assert float(p.sum(-1).max()) < 0.999, "the sinks take nothing"


@pytest.mark.parametrize("scale", [0.0, -0.7, 300.0])
def test_any_scale_under_a_softcap(family: str, scale: float) -> None:
    """Scores far past the cap are the cap, and no NaN."""
    case = windows(3, [70, 12])
    q, pairs = buffers(case, 2, 1, 16, torch.float32, seed=0)
    state = run(family, case, q, pairs, scale=scale, softcap=2.0)
    expected = dense(case, q, pairs, scale=scale, softcap=2.0)
    torch.testing.assert_close(state.out.double(), expected.out, rtol=0, atol=2e-5)
    torch.testing.assert_close(rows_of(case, state.lse).double(), expected.lse, rtol=0, atol=2e-5)
    if scale < 1:
        check_backward(case, family, scale=scale, heads=(2, 1), softcap=2.0)


def test_a_wide_softcap_leaves_scores_as_they_are(family: str) -> None:
    """A tangent that is right near 0 absolutely, but not relatively, would be off by a multiple of the cap."""
    case = windows(3, [40])
    q, pairs = buffers(case, 2, 1, 16, torch.float32, seed=0)
    capped = run(family, case, q, pairs, scale=0.25, softcap=1e5)
    free = run(family, case, q, pairs, scale=0.25)
    torch.testing.assert_close(capped.lse, free.lse, rtol=0, atol=2e-5)
    torch.testing.assert_close(capped.out, free.out, rtol=0, atol=2e-5)


def test_rows_that_see_nothing_have_their_sink(family: str) -> None:
    case = random_case(3, [4, 0], is_causal=True, num_steps=3, tail=1)
    nothing = [type(s)(SegmentTable(*(np.empty(0, np.int64),) * 4), s.rows, s.key_position) for s in case.steps]
    case = Case(case.spans, nothing, [mask & False for mask in case.seen], case.rows, case.slots, 4, 4)
    q, pairs = buffers(case, 2, 1, 8, torch.float32, seed=0)
    state = run(family, case, q, pairs, scale=1.0, sinks=torch.tensor([0.3, -torch.inf]))
    assert (state.out == 0).all()
    torch.testing.assert_close(state.lse[0], torch.tensor([[0.3], [-torch.inf]]).expand(2, 4))
    assert (state.lse[1] == -torch.inf).all()


def test_the_gradient_of_sinks_counts_rows_with_a_sum_alone() -> None:
    two = np.array([2, 2, 1])
    nothing = np.zeros(3, np.int64)
    spans = QuerySpans(
        np.array([0, 2, 4]), two, nothing, nothing, nothing + 1, np.array([0, 0, -1]), two.cumsum() - two, nothing
    )
    lse = torch.tensor([[[0.0, 1.0, -torch.inf, 2.0], [0.5, -torch.inf, 0.25, 0.0]]]).double()
    delta = torch.arange(10.0).double().view(5, 2) + 1
    sinks = torch.tensor([0.25, -torch.inf]).double()
    got = sink_gradient(sinks, lse, delta, spans)
    want = -sum(torch.exp(sinks[0] - lse[0, 0, i]) * delta[i, 0] for i in (0, 1, 3))
    torch.testing.assert_close(got, torch.stack([want, torch.zeros(()).double()]))
    assert torch.equal(got, sink_gradient(sinks, lse, delta, spans))


def test_a_window_without_a_left_bound_is_causal_to_the_bit(family: str) -> None:
    """Also where its table says so in full: that nothing is before the lower diagonal changes no bit."""
    assert Mask.window(-1, 0) == Mask.causal() and Mask.window(-1, -1) == Mask.full()
    case = sliding([17, 1, 70], 200, 0)
    assert case.steps[0].table.lower is None, "no row is that long"
    spelled = SegmentTable(*(getattr(case.steps[0].table, n) for n in ("query", "k_start", "k_len", "diagonal")))
    spelled.lower = 1 - case.spans.length[spelled.query]
    other = Case(case.spans, [type(case.steps[0])(spelled, 88, case.steps[0].key_position)], case.seen, 88, 3, 70, 70)
    q, pairs = buffers(case, 2, 1, 16, torch.float32, seed=0)
    states = [run(family, one, q, pairs, scale=0.25) for one in (case, other)]
    if family == "triton":
        assert torch.equal(states[0].out, states[1].out) and torch.equal(states[0].lse, states[1].lse)
    torch.testing.assert_close(states[0].out, states[1].out, rtol=0, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_neighbours_of_a_document_may_be_anything(device: str) -> None:
    """A document's window never reads what lies beside it, NaN here."""
    case = sliding([33, 70, 9], 5, 0)
    q, [(k, v)] = buffers(case, 2, 1, 16, torch.float32, seed=0)
    clean = run("triton", case, q.to(device), [(k.to(device), v.to(device))], scale=0.25)
    k, v, q = k.clone(), v.clone(), q.clone()
    for x in (q, k, v):
        x[33:103] = torch.nan
    ill = run("triton", case, q.to(device), [(k.to(device), v.to(device))], scale=0.25)
    for rows in (slice(0, 33), slice(103, 112)):
        assert torch.equal(clean.out[rows], ill.out[rows])


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "heads"), [(64, (8, 2)), (128, (12, 4)), (128, (5, 5)), (256, (6, 2))], ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_on_gpu(head_dim: int, heads: tuple[int, int], dtype: torch.dtype, extras: str, device: str) -> None:
    case, more = windows(head_dim, [300, 1, 700, 64], 2, tail=5), dict(EXTRAS[extras])
    p = 0.3 if more.pop("dropout", None) else 0.0
    check_backward(case, "triton", dtype, head_dim, head_dim**-0.5, p, heads=heads, device=device, **more)
    case = sliding([1500, 1, 900], 400, 0)
    check_backward(case, "triton", dtype, head_dim, head_dim**-0.5, p, heads=heads, device=device, **more)
