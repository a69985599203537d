"""parallel_attn under masks, caps and sinks: every split and method, against their definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_cases import METHOD_CHOICES, Case
from support.longer import LONGER, grid
from support.mask_shapes import SHAPES, TOKENS
from support.parallel_masks import check_masked, masked_cases

import hetu
from hetu import Mask
from hetu.parallel import METHODS, SPLITS
from hetu.runtime.ranks.digests import graph_digest

# Triton's interpreter computes by numpy, which tells of every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@settings(max_examples=80 * LONGER)
@given(
    case_and_mask=masked_cases(dtype=torch.float64),
    softcap=st.sampled_from([0.0, 0.0, 0.8]),
    sink_dtype=st.sampled_from([None, torch.float64, torch.bfloat16]),
)
def test_any_mask_under_any_strategy(
    case_and_mask: tuple[Case, Mask], softcap: float, sink_dtype: torch.dtype | None
) -> None:
    check_masked(*case_and_mask, softcap=softcap, sink_dtype=sink_dtype)


@settings(max_examples=4 * LONGER)
@given(case_and_mask=masked_cases(), sink_dtype=st.sampled_from([None, torch.float32]))
def test_any_mask_under_any_strategy_on_triton(
    case_and_mask: tuple[Case, Mask], sink_dtype: torch.dtype | None
) -> None:
    check_masked(*case_and_mask, "triton", sink_dtype=sink_dtype)


@pytest.mark.parametrize(("method", "split", "dtype"), grid(METHODS, SPLITS, [torch.float32, torch.bfloat16]))
def test_windows_of_every_split_and_method(split: str, method: str, dtype: torch.dtype) -> None:
    case = Case([7, 0, 12, 5], [0] * 4, split, method, "1d", heads=(4, 2), dtype=dtype, cut=[0.3, 0.4])
    check_masked(case, Mask.window(3, 0), softcap=2.0, sink_dtype=dtype)


@pytest.mark.parametrize("mask", SHAPES.values(), ids=lambda mask: f"\n{mask.draw(TOKENS)}\n")
def test_the_shapes_of_magi_attention(mask: Mask) -> None:
    """Each on one to four pipelines, by every method, with documents that slices cross."""
    splits = list(SPLITS)
    for i, method in enumerate(METHOD_CHOICES):
        lens = ([TOKENS], [13, 11], [8, 3, 13], [5, 9, 0, 10])[i % 4]
        case = Case(
            lens, [0] * len(lens), splits[i % len(splits)], method, "1d", cut=[0.35], return_softmax=True, p=0.2
        )
        check_masked(case, mask, sink_dtype=torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_slices_of_a_batch_count_sequence_after_sequence(method: str) -> None:
    case = Case([6, 6], [0, 0], "sym", method, batch=2)
    check_masked(case, SHAPES["two-sided window with global tokens"])


def test_a_group_without_tokens_has_no_batch_that_prefixes_could_not_fit() -> None:
    check_masked(Case([3, 0, 2], [0, 1, 0], batch=2), Mask.prefix([4, 1]), sink_dtype=torch.float32)
    check_masked(Case([0, 0], [0, 1]), Mask.prefix([4, 1]))


def test_a_mask_that_does_not_fit_is_refused_at_the_line_of_its_op() -> None:
    s = hetu.IntSymbol("s")
    for mask in (Mask.prefix([1, 2]), Mask.slices([(0, 9)], [(0, 3)], ["full"])):
        with hetu.graph("define_and_run", device="cpu") as g:
            qkv = hetu.placeholder(hetu.float32, [s, 24])
            out = hetu.parallel_attn(qkv, 8, 1, [[s]], [[0]], mask=mask)[0]  # the line
        for call in (lambda: g.run(out, {qkv: torch.ones(4, 24)}), lambda: g.plan(0, int_symbol_dict={s: 4})):  # noqa: B023
            with pytest.raises(hetu.BindingError, match=r"(?s)\[parallel_attn\] the mask.*# the line"):
                call()


def test_p_of_slices_and_a_batch_is_refused() -> None:
    case = Case([6, 6], [0, 0], batch=2, return_softmax=True)
    with pytest.raises(hetu.BindingError, match=r"return_softmax: p has columns .* all 2 sequences of the batch"):
        check_masked(case, SHAPES["causal"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"window_size": (-1, -1), "is_causal": False}, {"is_causal": False}),
        ({"window_size": (-1, 0), "is_causal": False}, {}),
        ({"mask": Mask.full()}, {"is_causal": False}),
        ({"mask": Mask.causal(), "is_causal": False}, {}),
        ({"window_size": (3, 5)}, {"mask": Mask.window(3, 0)}),
    ],
    ids=str,
)
def test_short_forms_give_the_same_bits(one: dict[str, Any], other: dict[str, Any], split: str) -> None:
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([4, 7], [0, 0])], device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24])
        outs = [hetu.parallel_attn(qkv, 8, 1, split=split, **options)[0] for options in (one, other)]
        fetches = [*outs, *(hetu.gradients(out, qkv) for out in outs)]
    x = np.random.default_rng(0).standard_normal((11, 24), np.float32)
    out, same_out, grad, same_grad = g.run(fetches, {qkv: hetu.Shards(g.layout(0, node="parallel_attn_0").scatter(x))})
    pairs = [*zip(out, same_out, strict=True), *zip(grad, same_grad, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)


# Symbols


def test_another_window_costs_a_plan_and_no_rebuild() -> None:
    left, s = hetu.IntSymbol("left", min=-1), hetu.IntSymbol("s")
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([s, s], [0, 0])], device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [s, 24])
        out = hetu.parallel_attn(qkv, 8, 1, window_size=(left, 0))[0]
        grad = hetu.gradients(out, qkv)
    shards = hetu.Shards(list(torch.randn(2, 5, 24)))
    for size in (1, 3, -1, 1):
        g.run([out, grad], {qkv: shards}, int_symbol_dict={left: size})
    stats = g.executor.stats()
    assert (stats["executables"].misses, stats["plans"].misses) == (1, 3)
    plans = [g.plan(0, int_symbol_dict={s: 5, left: size}) for size in (1, 3, -1)]
    assert [plan.mask for plan in plans] == [Mask.window(1, 0), Mask.window(3, 0), Mask.causal()]
    assert [plan.rows_received(1) for plan in plans] == [1, 3, 5], "what a window hides doesn't travel"
    assert g.executor.stats()["plans"].misses == 3, "they are those of the runs"
    with pytest.raises(hetu.UnboundSymbolError, match="left"):
        g.plan(0, int_symbol_dict={s: 5})
    with pytest.raises(hetu.UnboundSymbolError, match="no value for left, which parallel_attn_0 needs"):
        g.run(out, {qkv: shards})


# Strategies that weigh


def test_a_strategy_weighs_by_its_mask_and_an_op_by_none() -> None:
    case = Case([24, 24], [0, 0], "balanced", packing="1d", cut=[0.5, 0.75])
    by_length = check_masked(case, Mask.window(2, 0))
    by_window = check_masked(case, Mask.causal(), weighs_by=Mask.window(2, 0))
    pieces = [layout.groups[0].pieces for layout in (by_length, by_window)]
    assert (pieces[0][:, 0] > 0).all(), "the long document is cut by lengths"
    assert pieces[1].tolist() == [[24, 0, 0], [0, 12, 12]], "and is half of the work under a window"


def test_lists_that_agree_with_a_strategy_lie_as_it_says() -> None:
    """Lists can't say a mask: an op with lists has the tokens where the graph's strategy puts them."""
    cu = np.array([0, 24, 36, 48], np.int32)
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([24, 24], [0, 0], mask=Mask.window(2, 0))]) as g:
        qkv = hetu.placeholder(hetu.float32, [24, 24])
        for lists in ((None, None), ([[24, 24]], [[0, 0]])):
            hetu.parallel_attn(qkv, 8, 1, *lists, True, hetu.constant(cu), split="balanced")
    assert g.layout(0, cu_seqlens=cu).groups[0].pieces.tolist() == [[24, 0, 0], [0, 12, 12]]


def test_a_strategys_mask_has_symbols_and_a_digest() -> None:
    left = hetu.IntSymbol("left")

    def graph(mask: Mask | None) -> hetu.Graph:
        with hetu.graph("define_and_run", strategies=[hetu.Strategy([24, 24], [0, 0], mask=mask)], device="cpu") as g:
            qkv = hetu.placeholder(hetu.float32, [24, 24])
            cu = hetu.constant(np.array([0, 24, 36, 48], np.int32))
            hetu.parallel_attn(qkv, 8, 1, None, None, True, cu, split="balanced")
        return g

    g, cu = graph(Mask.window(left, 0)), np.array([0, 24, 36, 48])
    layouts = [g.layout(0, int_symbol_dict={left: size}, cu_seqlens=cu) for size in (2, 100)]
    assert layouts[0].groups[0].pieces[0, 0] == 24 > layouts[1].groups[0].pieces[0, 0]
    with pytest.raises(hetu.UnboundSymbolError, match="left"):
        g.layout(0, cu_seqlens=cu)
    digests = {graph_digest(graph(mask)).whole for mask in (None, Mask.window(2, 0), Mask.window(3, 0))}
    assert len(digests) == 3
    assert "[24, 24] in groups [0, 0], weighed by window(left, 0)" in str(g)
