"""attn_varlen under masks, softcaps and sinks, and their gradients, against their definition in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense import assert_gradient_near, dropout_of
from support.dense_masks import Packs, masks
from support.longer import LONGER
from support.mask_shapes import SHAPES, TOKENS

import hetu
from hetu import Mask
from hetu.runtime.ranks.digests import graph_lines

# Triton's interpreter computes by numpy, which tells of every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BACKENDS = ["torch", "triton"]
HEAD_DIM = 8


def run(
    lens_q: list[int],
    lens_k: list[int],
    *,
    backend: str = "torch",
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (2, 1),
    sink_dtype: torch.dtype | None = None,
    tail: int = 0,
    symbols: dict[Any, int] | None = None,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Runs an op and the gradient of a random sum of its output and lse; gives all that went in and came out."""
    hetu.manual_seed(7)
    generator = torch.Generator().manual_seed(3)
    counts = {"q": heads[0], "k": heads[1], "v": heads[1], "d_out": heads[0]}
    fed = {}
    for name, count in counts.items():
        rows = sum(lens_q if name in ("q", "d_out") else lens_k) + tail
        fed[name] = torch.randn(rows, count, HEAD_DIM, generator=generator).to(dtype)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    fed["d_lse"] = torch.randn(len(lens_q), heads[0], max(lens_q, default=0), generator=generator).to(high)
    if sink_dtype is not None:
        fed["sinks"] = torch.randn(heads[0], generator=generator).to(sink_dtype)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = {name: hetu.placeholder(value.dtype, value.shape) for name, value in fed.items()}
        cu = [hetu.constant(np.cumsum([0, *lens], dtype=np.int32)) for lens in (lens_q, lens_k)]
        sizes = max(lens_q, default=0), options.pop("max_seqlen_k", None)
        out, lse, p, rng_state = hetu.attn_varlen(
            x["q"], x["k"], x["v"], HEAD_DIM, *cu, *sizes, sinks=x.get("sinks"), **options
        )
        wanted = {name: x[name] for name in ("q", "k", "v", "sinks") if name in x}
        grads = hetu.gradients([out, lse], list(wanted.values()), [x["d_out"], x["d_lse"]])
    with hetu.config(backend=backend):
        results = g.run(
            [out, lse, p, rng_state, *grads],
            {x[name]: value for name, value in fed.items()},
            int_symbol_dict=symbols,
        )
    return dict(zip(("out", "lse", "p", "rng_state", *(f"d_{name}" for name in wanted)), results, strict=True)), fed


def check(packs: Packs, results: dict[str, torch.Tensor], fed: dict[str, torch.Tensor], with_p: bool) -> None:
    """Compares all that came out with the definition, and gradients with autograd's of it."""
    dtype, rows = fed["q"].dtype, sum(packs.lens_q)
    names = [name for name in ("q", "k", "v", "sinks") if name in fed]
    leaves = {name: fed[name].double().requires_grad_() for name in names}
    used = [leaves["q"][:rows], *(leaves[name][: sum(packs.lens_k)] for name in ("k", "v"))]
    out, lse, p = packs.attend(*used, leaves.get("sinks"))
    atol = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(
        results["out"][:rows].double(), out.detach(), atol=atol, rtol=1e-2 if dtype.itemsize == 2 else 0
    )
    assert (results["out"][rows:] == 0).all()
    at = np.cumsum([0, *packs.lens_q])
    got = torch.cat([results["lse"][b, :, : n - m].T for b, (m, n) in enumerate(pairwise(at))])
    torch.testing.assert_close(got.double(), lse.detach(), atol=max(atol, 1e-12), rtol=1e-5)
    if with_p:
        first_key = np.cumsum([0, *packs.lens_k])
        for b, (start, stop) in enumerate(pairwise(at)):
            keys = slice(None) if packs.mask.joins else slice(*first_key[b : b + 2])
            want = p[start:stop, :, keys].detach().transpose(0, 1)
            n, m = want.shape[1:]
            torch.testing.assert_close(results["p"][b, :, :n, :m].double(), want, atol=max(atol, 1e-12), rtol=0)
            assert (results["p"][b, :, n:] == 0).all() and (results["p"][b, :, :, m:] == 0).all()
    d_lse = torch.cat([fed["d_lse"][b, :, : n - m].T for b, (m, n) in enumerate(pairwise(at))]).double()
    loss = (out * fed["d_out"][:rows].double()).sum() + torch.where(lse > -torch.inf, lse * d_lse, 0.0).sum()
    for name, want in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert results[f"d_{name}"].dtype == fed[name].dtype and results[f"d_{name}"].shape == fed[name].shape
        assert_gradient_near(results[f"d_{name}"], want, min(dtype, fed[name].dtype, key=lambda x: x.itemsize))


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Lengths of sequences, a mask that fits them, and options."""
    lengths = st.sampled_from([0, 1, 2, 5, 11])
    count = draw(st.integers(1, 3))
    lens_q = draw(st.lists(lengths, min_size=count, max_size=count))
    lens_k = draw(st.one_of(st.just(lens_q), st.lists(lengths, min_size=count, max_size=count)))
    return {
        "lens_q": lens_q,
        "lens_k": lens_k,
        "mask": draw(masks(lens_q, lens_k)),
        "softcap": draw(st.sampled_from([0.0, 0.0, 0.8, 30])),
        "p_dropout": draw(st.sampled_from([0.0, 0.0, 0.4])),
        "sink_dtype": draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64])),
        "dtype": dtype,
        "heads": draw(st.sampled_from([(1, 1), (4, 2), (3, 1)])),
        "tail": draw(st.sampled_from([0, 2])),
        "return_softmax": draw(st.booleans()),
    }


def check_problem(problem: dict[str, Any], backend: str) -> None:
    options = dict(problem)
    lens_q, lens_k = options.pop("lens_q"), options.pop("lens_k")
    if options["mask"].joins and options["return_softmax"]:
        options["max_seqlen_k"] = sum(lens_k)
    results, fed = run(lens_q, lens_k, backend=backend, **options)
    dropout = dropout_of(problem["p_dropout"], results["rng_state"])
    packs = Packs(lens_q, lens_k, problem["mask"], problem["softcap"], dropout=dropout)
    check(packs, results, fed, problem["return_softmax"])


@settings(max_examples=120 * LONGER)
@given(problem=problems(torch.float64) | problems(torch.float32))
def test_any_mask_on_torch(problem: dict[str, Any]) -> None:
    check_problem(problem, "torch")


@settings(max_examples=5 * LONGER)
@given(problem=problems(torch.float32))
def test_any_mask_on_triton(problem: dict[str, Any]) -> None:
    check_problem(problem, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "mask", [Mask.window(5, 2), Mask.chunked(7), Mask.prefix(6), SHAPES["shared question"]], ids=repr
)
def test_half_precision(mask: Mask, dtype: torch.dtype, backend: str) -> None:
    lens_q, lens_k = ([11, 13], [11, 13]) if mask.joins else ([3, 19], [21, 12])
    results, fed = run(lens_q, lens_k, mask=mask, softcap=3.0, dtype=dtype, sink_dtype=dtype, backend=backend)
    check(Packs(lens_q, lens_k, mask, 3.0), results, fed, with_p=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", SHAPES.values(), ids=lambda mask: f"\n{mask.draw(TOKENS)}\n")
def test_the_shapes_of_magi_attention(mask: Mask, backend: str) -> None:
    """One for each of its drawings."""
    results, fed = run([TOKENS], [TOKENS], mask=mask, backend=backend, return_softmax=True)
    check(Packs([TOKENS], [TOKENS], mask), results, fed, with_p=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"window_size": (-1, -1)}, {"is_causal": False}),
        ({"window_size": (-1, 0)}, {"is_causal": True}),
        ({"window_size": [np.int64(-1), np.int8(3)], "is_causal": True}, {"is_causal": True}),
        ({"mask": Mask.causal()}, {"is_causal": True}),
        ({"mask": Mask.full(), "is_causal": True}, {"is_causal": False}),
        ({"mask": Mask.window(3, 0)}, {"window_size": (3, 5), "is_causal": True}),
        ({"softcap": 0}, {}),
    ],
    ids=str,
)
def test_short_forms_give_the_same_bits(one: dict[str, Any], other: dict[str, Any], backend: str) -> None:
    first, second = (run([9, 4], [7, 6], backend=backend, **options)[0] for options in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in ("out", "lse", "d_q", "d_k", "d_v"))


def test_gradients_are_those_of_finite_differences() -> None:
    """Of q, k, v and sinks, with a cap and a window, in float64 through the graph."""
    n, eps = 6, 1e-6
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(n, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    values.append(torch.randn(1, generator=generator, dtype=torch.float64))
    with hetu.graph("define_and_run", device="cpu") as g:
        fed = [hetu.placeholder(hetu.float64, value.shape) for value in values]
        cu = hetu.constant(np.array([0, 2, n], np.int32))
        out, lse, *_ = hetu.attn_varlen(
            *fed[:3], 8, cu, cu, is_causal=True, window_size=(2, 0), softcap=1.5, sinks=fed[3]
        )
        weight = hetu.constant(torch.randn(n, 8, generator=generator, dtype=torch.float64).numpy())
        loss = hetu.sum(out * weight) + hetu.sum(hetu.exp(lse))
        grads = hetu.gradients(loss, fed)
    found = g.run(grads, dict(zip(fed, values, strict=True)))
    for place, grad in enumerate(found):
        for entry in range(0, values[place].numel(), 5):
            sides = []
            for step in (eps, -eps):
                moved = [value.clone() for value in values]
                moved[place].view(-1)[entry] += step
                sides.append(float(g.run(loss, dict(zip(fed, moved, strict=True)))))
            assert abs((sides[0] - sides[1]) / (2 * eps) - float(grad.view(-1)[entry])) < 1e-7


def test_a_row_that_sees_nothing_has_its_sink_as_lse() -> None:
    results, fed = run([3], [3], mask=Mask.slices([(0, 1)], [(0, 3)], ["full"]), sink_dtype=torch.float32)
    assert torch.equal(results["lse"][0, :, 1:], fed["sinks"][:, None].expand(2, 2)) and (results["out"][1:] == 0).all()
    results, _ = run([3], [3], mask=Mask.slices([(0, 1)], [(0, 3)], ["full"]))
    assert (results["lse"][0, :, 1:] == -torch.inf).all()


# Symbols


def windowed() -> tuple[hetu.Graph, Any, Any, hetu.IntSymbol]:
    """A graph with a window of any size, its gradient, and causal attention."""
    left = hetu.IntSymbol("left", min=-1, max=100)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n"), 16])
        cu = hetu.placeholder(hetu.int32, [2])
        out = hetu.attn_varlen(x, x, x, 16, cu, cu, window_size=(left, 0))[0]
        grad, causal = hetu.gradients(out, x), hetu.attn_varlen(x, x, x, 16, cu, cu, is_causal=True)[0]
    return g, (x, cu), [out, grad, causal], left


def test_another_window_costs_a_plan_and_no_rebuild() -> None:
    g, (x, cu), fetches, left = windowed()
    feeds = {x: np.random.default_rng(0).standard_normal((9, 16), np.float32), cu: np.array([0, 9], np.int32)}
    runs = [g.run(fetches, feeds, int_symbol_dict={left: size}) for size in (2, 4, -1, 2)]
    stats = g.executor.stats()
    assert (stats["executables"].misses, stats["plans"].misses) == (1, 3), "the causal op has the plan of no bound"
    assert torch.equal(runs[0][0], runs[3][0]) and not torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[2][0], runs[2][2]), "no bound is causal"


def test_a_symbol_of_a_mask_is_bound_like_all_others() -> None:
    g, (x, cu), fetches, left = windowed()
    feeds = {x: np.zeros((9, 16), np.float32), cu: np.array([0, 9], np.int32)}
    with pytest.raises(hetu.UnboundSymbolError, match="no value for left, which attn_varlen_0 needs"):
        g.run(fetches, feeds)
    with pytest.raises(hetu.BindingError, match="left is 101 from int_symbol_dict"):
        g.run(fetches, feeds, int_symbol_dict={left: 101})
    left.set_data(3)
    out, _, causal = g.run(fetches, feeds)
    assert torch.equal(out[:3], causal[:3]) and g.executor.stats()["plans"].misses == 2


def test_a_value_that_a_mask_can_not_have_is_refused_before_anything_is_computed() -> None:
    size = hetu.IntSymbol("size")
    with hetu.graph("define_and_run", device="cpu") as g:
        x, cu = hetu.placeholder(hetu.float32, [4, 16]), hetu.constant(np.array([0, 4], np.int32))
        out = hetu.attn_varlen(x, x, x, 16, cu, cu, mask=Mask.chunked(size + 0))[0]
    with pytest.raises(hetu.BindingError) as caught:
        g.run(out, {x: np.zeros((4, 16), np.float32)}, int_symbol_dict={size: 0})
    text = str(caught.value)
    assert "[attn_varlen] chunked(size): the size of a chunk is 0, expected at least 1" in text
    assert "where:  test_masks.py:" in text and "bound:  size = 0" in text


# Refusals


def build(**options: Any) -> Any:
    with hetu.graph("define_and_run", device="cpu"):
        x, cu = hetu.placeholder(hetu.float32, [4, 16]), hetu.constant(np.array([0, 4], np.int32))
        if isinstance(options.get("sinks"), tuple):
            options["sinks"] = hetu.placeholder(*options["sinks"])
        return hetu.attn_varlen(x, x, x, 8, cu, cu, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_size": (True, 0)}, hetu.DTypeError, r"window_size\[0\] to be an int or an IntSymbol, got True"),
        ({"window_size": (0, 1.0)}, hetu.DTypeError, r"window_size\[1\] to be an int or an IntSymbol, got 1.0"),
        ({"window_size": (-2, 0)}, hetu.HetuError, r"window_size\[0\] is -2, expected at least -1"),
        ({"window_size": (1, 2, 3)}, hetu.HetuError, r"window_size to be \(left, right\)"),
        ({"window_size": 4}, hetu.HetuError, r"window_size to be \(left, right\), got 4(.|\n)*how many keys before"),
        ({"mask": "causal"}, hetu.HetuError, "mask to be a hetu.Mask, got 'causal'"),
        ({"mask": Mask.chunked(2), "window_size": (2, 0)}, hetu.HetuError, "mask and window_size were both given"),
        ({"softcap": -1.0}, hetu.HetuError, "softcap to be a finite number of at least 0 that float32 holds, got -1.0"),
        ({"softcap": float("inf")}, hetu.HetuError, "softcap to be a finite number"),
        ({"softcap": 1e39}, hetu.HetuError, "that float32 holds"),
        ({"softcap": True}, hetu.HetuError, "softcap to be a finite number"),
        ({"sinks": [0.0, 0.0]}, hetu.HetuError, "sinks"),
        ({"sinks": ("int32", [2])}, hetu.DTypeError, "sinks is int32"),
        ({"sinks": ("float32", [3])}, hetu.ShapeError, "sinks has 3 entries, expected one per query head: 2"),
        ({"sinks": ("float32", [2, 1])}, hetu.ShapeError, "sinks has 2 dimensions"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        build(**options)
    assert "test_masks.py:" in str(caught.value)


def test_masks_that_do_not_fit_the_lengths() -> None:
    slices = Mask.slices([(0, 5)], [(0, 5)], ["full"])
    with pytest.raises(
        hetu.BindingError, match=r"(?s)\[attn_varlen\].*reach to position 5 of the queries, .*hetu.attn_varlen\("
    ):
        run([2, 2], [2, 2], mask=slices)
    with pytest.raises(hetu.BindingError, match=r"(?s)\[attn_varlen\] .*prefixes of 3 documents, .*hetu.attn_varlen\("):
        run([2, 2], [2, 2], mask=Mask.prefix([1, 1, 1]))


def test_p_of_slices_has_a_column_for_each_key_of_the_pack() -> None:
    slices = Mask.slices([(0, 4)], [(0, 6)], ["causal"])
    with pytest.raises(hetu.BindingError, match="p has 4 columns, as many as max_seqlen_k, but the mask of slices"):
        run([2, 2], [4, 2], mask=slices, return_softmax=True)
    results, fed = run([2, 2], [4, 2], mask=slices, return_softmax=True, max_seqlen_k=6)
    check(Packs([2, 2], [4, 2], slices), results, fed, with_p=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_p_of_slices_whose_rectangles_meet_between_their_diagonals(backend: str) -> None:
    """What one slice hides in its rectangle another one lets see."""
    slices = Mask.slices([(0, 6), (0, 5)], [(0, 6), (1, 6)], ["causal", "inverse_causal"])
    results, fed = run([6], [6], mask=slices, return_softmax=True, backend=backend)
    check(Packs([6], [6], slices), results, fed, with_p=True)


# Around it


def test_digests_tell_masks_caps_and_sinks_apart() -> None:
    size = hetu.IntSymbol("size")
    masked = [Mask.chunked(2), Mask.chunked(3), Mask.chunked(size), Mask.window(2, 0), Mask.slices([], [], [])]
    options = [{"mask": mask} for mask in masked]
    options += [{}, {"softcap": 1.0}, {"softcap": 2.0}, {"sinks": ("float32", [2])}, {"sinks": ("float64", [2])}]
    lines = ["\n".join(graph_lines(build(**item)[0].graph)) for item in options]
    assert len(set(lines)) == len(lines)
    assert lines[2] == "\n".join(graph_lines(build(mask=Mask.chunked(hetu.IntSymbol("size")))[0].graph))


def test_a_graph_prints_masks_in_a_line() -> None:
    text = str(build(mask=Mask.chunked(2))[0].graph)
    assert "mask=Mask.chunked(2), softcap=0.0" in text


def test_autocast_leaves_sinks_alone() -> None:
    with hetu.graph("define_and_run", device="cpu"), hetu.autocast(hetu.bfloat16):
        x, cu = hetu.placeholder(hetu.float32, [4, 16]), hetu.constant(np.array([0, 4], np.int32))
        sinks = hetu.placeholder(hetu.float64, [2])
        node = hetu.attn_varlen(x, x, x, 8, cu, cu, sinks=sinks)[0].op
    assert node.input("sinks") is sinks and node.input("q").dtype == hetu.bfloat16
