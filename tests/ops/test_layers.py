"""What the layers' samples do not show: strategies, micro-batches, positions, strides, precision, bad labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import hetu
from hetu.backends.comm import reduce_in_order
from hetu.backends.torch.rotary import hetu_rotary, hetu_rotary_table
from hetu.graph import registry

PIPELINES = pytest.mark.parametrize("count", [1, 2, 3])
needs_ne = pytest.mark.skipif("ne" not in registry(), reason="token_mean_loss compares labels by hetu.ne")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def shards(arrays: Sequence[Any]) -> Any:
    return hetu.Shards(arrays) if len(arrays) > 1 else arrays[0]


def listed(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, hetu.Shards) else [result]


# all_reduce


@PIPELINES
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_all_reduce_and_its_gradient(op: str, count: int) -> None:
    """The gradient of the sum of all pipelines' ys: by finite differences of just that."""
    xs, weights = ([random(3, 2, seed=i + j).astype("float64") for i in range(count)] for j in (0, 10))
    with hetu.graph("define_and_run", device="cpu") as g:
        x, w = hetu.placeholder("float64", [3, 2]), hetu.placeholder("float64", [3, 2])
        y = hetu.all_reduce(x, op) * w
        grad = hetu.gradients(hetu.all_reduce(x, op), x, w)

    def total(inputs: Sequence[np.ndarray]) -> float:
        return sum(item.sum().item() for item in listed(g.run(y, {x: shards(inputs), w: shards(weights)})))

    grads = listed(g.run(grad, {x: shards(xs), w: shards(weights)}))
    scale = count if op == "mean" else 1
    for got in grads:
        np.testing.assert_allclose(got, sum(weights) / scale)
    for r in range(count):
        moved = [item.copy() for item in xs]
        moved[r][1, 1] += 1e-6
        assert (total(moved) - total(xs)) / 1e-6 == pytest.approx(grads[r][1, 1].item(), rel=1e-6)
    for got, own in zip(listed(g.run(y, {x: shards(xs), w: shards(weights)})), weights, strict=True):
        np.testing.assert_allclose(got, sum(xs) / scale * own)


def test_all_reduce_adds_half_precision_in_float32_and_in_order() -> None:
    values = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
    assert reduce_in_order(values, "sum").item() == 258  # bfloat16 would stay at 256
    big = [torch.tensor([v]) for v in (1e8, -1e8, 1.0)]
    assert reduce_in_order(big, "sum").item() == 1
    halves = [torch.tensor([60000.0], dtype=torch.float16)] * 2
    assert reduce_in_order(halves, "mean").item() == 60000  # whose sum float16 can't hold


def test_all_reduce_of_ints_and_of_one_pipeline() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int8", [2])
        y = hetu.all_reduce(x)
    for got in g.run(y, {x: hetu.Shards([[1, 2], [3, 4], [5, 6]])}):
        assert got.dtype == torch.int8 and got.tolist() == [9, 12]
    one = torch.ones(2)
    assert reduce_in_order([one], "mean") is one


def test_all_reduce_refuses_shapes_that_differ_before_anything_is_computed() -> None:
    rows = hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [rows, 2])
        total, y = hetu.all_reduce(hetu.sum(x, 0)), hetu.all_reduce(x)
    feeds = {x: hetu.Shards([np.ones((3, 2)), np.ones((3, 2)), np.ones((4, 2))])}
    assert g.run(total, feeds)[2].tolist() == [10, 10]  # shards may differ as long as what is reduced does not
    with pytest.raises(hetu.ShapeError) as caught:
        g.run(y, feeds)
    message = str(caught.value)
    assert "[all_reduce] expected x to have one shape on all pipelines" in message
    assert "got [3, 2] on pipeline 0 and [4, 2] on pipeline 2" in message
    assert "y = hetu.all_reduce(hetu.sum(x, 0)), hetu.all_reduce(x)" in message
    assert "rows = 4" in message
    assert g.executor.stats()["executables"].misses == 1


# step_sum and token_mean_loss


def test_step_sum_is_over_pipelines_and_micro_batches() -> None:
    n = hetu.IntSymbol("n")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int32", [n])
        fetches = [hetu.step_sum(x), hetu.step_sum(x, least=100), hetu.step_sum(x * 2)]
    batches = [hetu.Shards([[1, 2, 3], []]), hetu.Shards([[-7], [4, 5]])]
    for columns, wanted in zip(g.run(fetches, {x: batches}, num_micro_batches=2), (8, 100, 16), strict=True):
        assert [item.item() for batch in columns for item in batch] == [wanted] * 4
        assert columns[0][0].dtype == torch.int64


def test_step_sum_of_a_step_sum_is_refused() -> None:
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("int64", [3])
        with pytest.raises(hetu.HetuError, match="depends on step_sum_0"):
            hetu.step_sum(x * hetu.step_sum(x))
    assert sum(node.definition.name == "step_sum" for node in g.nodes) == 1


@needs_ne
def test_token_mean_loss_sums_to_the_mean_over_the_step() -> None:
    """However unevenly the labels lie over pipelines and micro-batches, values and gradients are torch's of all."""
    sizes, rng = [[3, 0], [5, 1], [1, 7]], np.random.default_rng(0)
    n = hetu.IntSymbol("n")
    with hetu.graph("define_and_run", device="cpu") as g:
        logits, labels = hetu.placeholder("float64", [n, 11]), hetu.placeholder("int64", [n])
        loss = hetu.token_mean_loss(logits, labels)
        grad = hetu.gradients(loss, logits)
    xs = [[rng.standard_normal((rows, 11)) for rows in row] for row in sizes]
    ys = [[np.where(rng.random(rows) < 0.4, -100, rng.integers(0, 11, rows)) for rows in row] for row in sizes]
    feeds = {logits: [hetu.Shards(row) for row in xs], labels: [hetu.Shards(row) for row in ys]}
    losses, grads = g.run([loss, grad], feeds, num_micro_batches=3)
    every_x = torch.from_numpy(np.concatenate([x for row in xs for x in row])).requires_grad_()
    every_y = torch.from_numpy(np.concatenate([y for row in ys for y in row]))
    wanted = functional.cross_entropy(every_x, every_y)
    assert sum(item.item() for row in losses for item in row) == pytest.approx(wanted.item(), rel=1e-12)
    wanted.backward()
    torch.testing.assert_close(torch.cat([item for row in grads for item in row]), every_x.grad)


@needs_ne
def test_token_mean_loss_of_no_labels_is_0() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        logits, labels = hetu.placeholder("float32", [3, 5]), hetu.placeholder("int64", [3])
        loss = hetu.token_mean_loss(logits, labels, ignore_index=2)
        fetches = [loss, hetu.gradients(loss, logits)]
    value, grad = g.run(fetches, {logits: random(3, 5), labels: [2, 2, 2]})
    assert value.item() == 0 and not grad.any()


# cross_entropy


@pytest.mark.parametrize(
    "bad", [[-math.inf] * 5, [math.nan, 0.0, 0.0, 0.0, 0.0], [math.inf, 0.0, 1.0, 0.0, 0.0]], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "token_mean"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_ignored_rows_have_no_gradient_whatever_their_logits(dtype: str, reduction: str, bad: list[float]) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        logits, labels = hetu.placeholder(dtype, [3, 5]), hetu.placeholder("int64", [3])
        if reduction == "token_mean":
            loss = hetu.token_mean_loss(logits, labels)
        else:
            loss = hetu.cross_entropy(logits, labels, reduction=reduction)
        fetches = [loss, hetu.gradients(loss, logits)]
    rows = random(3, 5)
    _, want = g.run(fetches, {logits: rows, labels: [4, -100, 0]})
    rows[1] = bad
    value, grad = g.run(fetches, {logits: rows, labels: [4, -100, 0]})
    assert value.isfinite().all() and not grad[1].any()
    assert torch.equal(grad, want)


@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        logits, labels = hetu.placeholder("float32", [3, 5]), hetu.placeholder("int64", [3])
        loss = hetu.cross_entropy(logits, labels)
    with pytest.raises(hetu.BindingError, match=rf"holds {label} at \[1\], expected 0 to below 5"):
        g.run(loss, {logits: random(3, 5), labels: [0, label, 4]})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cross_entropy_of_half_precision_is_float32s(dtype: str, reduction: str) -> None:
    """Of the same rounded logits, to float32's precision: 4096 losses of 9 would lose all digits in half."""
    x = torch.from_numpy(4 * random(4096, 33)).to(getattr(torch, dtype))
    y = np.random.default_rng(0).integers(0, 33, 4096)
    with hetu.graph("define_and_run", device="cpu") as g:
        logits, labels = hetu.placeholder(dtype, [4096, 33]), hetu.placeholder("int32", [4096])
        loss = hetu.cross_entropy(logits, labels, reduction=reduction)
    wanted = functional.cross_entropy(x.double(), torch.from_numpy(y), reduction=reduction)
    got = g.run(loss, {logits: x, labels: y})
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6)


def test_infinite_logits_forbid_a_class() -> None:
    x = np.array([[0.0, -np.inf, 0.0], [-np.inf, 1.0, -np.inf]], "float32")
    with hetu.graph("define_and_run", device="cpu") as g:
        logits, labels = hetu.placeholder("float32", [2, 3]), hetu.placeholder("int64", [2])
        loss = hetu.cross_entropy(logits, labels, reduction="none")
        grad = hetu.gradients(loss, logits)
    values, grads = g.run([loss, grad], {logits: x, labels: [0, 1]})
    torch.testing.assert_close(values, torch.tensor([math.log(2), 0.0]))
    torch.testing.assert_close(grads, torch.tensor([[-0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]))


# rotary


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_how_far_apart_tokens_are(interleaved: bool) -> None:
    q, k = random(1, 64), random(1, 64, seed=1)
    with hetu.graph("define_and_run", device="cpu") as g:
        x, at = hetu.placeholder("float64", [6, 64]), hetu.placeholder("int64", [6])
        y = hetu.rotary(x, at, 64, interleaved=interleaved)
    starts = [0, 3, 1000, 2**20 - 17]
    products = []
    for start in starts:
        rows = g.run(y, {x: np.concatenate([q, k] * 3), at: [start, start + 17, start, start, start + 5, start]})
        products.append([(rows[2 * i] @ rows[2 * i + 1]).item() for i in range(3)])
    np.testing.assert_allclose(products, [products[0]] * len(starts), rtol=1e-9)
    assert products[0][1] == pytest.approx((q @ k.T).item(), rel=1e-6)
    assert abs(products[0][0] - products[0][1]) > 1e-2


def test_far_positions_have_exact_angles() -> None:
    """float32 angles would be off by 0.06 at 2**20."""
    at = torch.tensor([2**20 - 1, 2**20], dtype=torch.int32)
    table = hetu_rotary_table(at, 128, 10000.0, torch.float32)
    angle = at.double()[:, None] * 10000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    torch.testing.assert_close(table, torch.stack([angle.cos(), angle.sin()], 1).float(), rtol=0, atol=1e-7)


def test_layers_share_one_table() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, at = hetu.placeholder("float32", [3, 8]), hetu.placeholder("int64", [3])
        y = x
        for _ in range(3):
            y = hetu.rotary(y, at, 4)
        other = hetu.rotary(y, at, 4, base=500.0)
        grad = hetu.gradients(other, x, y)
    names = [node.definition.name for node in g.planner.subgraph([other, grad]).nodes]
    assert names.count("rotary_table") == 2
    assert names.count("rotary") == 8
    turned, back = g.run([y, hetu.gradients(y, x, y)], {x: random(3, 8), at: [5, 0, 70]})
    assert (turned[0] - torch.from_numpy(random(3, 8))[0]).abs().max() > 0.1
    torch.testing.assert_close(back, torch.from_numpy(random(3, 8)))  # rotations by the negative angle undo it


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["columns of a wider one", "transposed", "odd offset", "odd stride"])
def test_rotary_reads_any_strides(layout: str, dtype: torch.dtype, interleaved: bool) -> None:
    plain = torch.from_numpy(random(5, 12)).to(dtype)
    x = {
        "columns of a wider one": torch.cat([plain, plain], 1)[:, :12],
        "transposed": plain.t().contiguous().t(),
        "odd offset": torch.cat([plain.new_zeros(1), plain.flatten()])[1:].view(5, 12),
        "odd stride": torch.cat([plain, plain.new_zeros(5, 1)], 1)[:, :12],
    }[layout]
    table = hetu_rotary_table(torch.arange(5), 4, 10000.0, torch.float32)
    results = [hetu_rotary(item, table, 4, 2, interleaved, False) for item in (x, plain)]
    assert torch.equal(*results)
    assert results[0].is_contiguous()


def test_rotary_passes_the_other_heads_through() -> None:
    x = random(4, 5 * 6)
    with hetu.graph("define_and_run", device="cpu") as g:
        packed, at = hetu.placeholder("float32", [4, 30]), hetu.placeholder("int64", [4])
        rank2 = hetu.rotary(packed, at, 6, num_heads=3)
        rank3 = hetu.rotary(hetu.reshape(packed, [4, 5, 6]), at, 6, num_heads=3)
        alone = hetu.rotary(hetu.slice(packed, 1, 0, 18), at, 6)
    two, three, front = g.run([rank2, rank3, alone], {packed: x, at: [9, 8, 7, 6]})
    assert torch.equal(two, three.flatten(1)) and torch.equal(two[:, :18], front)
    assert torch.equal(two[:, 18:], torch.from_numpy(x[:, 18:]))


# norms and swiglu


@pytest.mark.parametrize("op", [hetu.rms_norm, hetu.layer_norm])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_of_half_precision_are_rounded_once(op: Any, dtype: str) -> None:
    x = torch.from_numpy(100 + random(6, 513)).to(getattr(torch, dtype))
    with hetu.graph("define_and_run", device="cpu") as g:
        fed = hetu.placeholder(dtype, [6, 513])
        low, wide = op(fed), op(hetu.cast(fed, "float32"))
        kept = low.op.outputs[1:]
    got, exact, *statistics = g.run([low, wide, *kept], {fed: x})
    # One rounding, but for ties that the last bit of float32 decides.
    assert (got == exact.to(got.dtype)).float().mean() > 0.999
    assert all(item.dtype == torch.float32 and item.shape == (6, 1) for item in statistics)


def test_autocast_computes_what_must_be_exact_in_float32() -> None:
    with hetu.graph("define_and_run"), hetu.autocast(hetu.bfloat16):
        x, labels = hetu.placeholder(hetu.bfloat16, [3, 8]), hetu.placeholder(hetu.int64, [3])
        high = [hetu.rms_norm(x), hetu.layer_norm(x), hetu.softmax(x)]
        assert all(item.dtype == item.op.tensors[0].dtype == hetu.float32 for item in high)
        loss = hetu.cross_entropy(x, labels)  # reads half precision and computes in float32: no copy of the logits
        assert loss.dtype == hetu.float32 and loss.op.tensors[0] is x
        kept = [hetu.swiglu(x), hetu.dropout(x, 0.5), hetu.rotary(x, labels, 4), hetu.all_reduce(x)]
        assert all(item.dtype == hetu.bfloat16 for item in kept)


def test_swiglu_of_symbols_that_are_odd_is_refused_by_the_run() -> None:
    n = hetu.IntSymbol("n")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [n])
        y = hetu.swiglu(x)
    assert g.run(y, {x: np.ones(6)}).shape == (3,)
    with pytest.raises(hetu.ShapeError, match="an even last dimension"):
        g.run(y, {x: np.ones(5)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_uses_of_a_row_are_summed_in_float32(dtype: str) -> None:
    """4096 ones: bfloat16 has no 257, float16 no 2049."""
    with hetu.graph("define_and_run", device="cpu") as g:
        ids, table = hetu.placeholder("int32", [4096]), hetu.placeholder(dtype, [3, 2])
        grad = hetu.gradients(hetu.embedding(ids, table), table)
    got = g.run(grad, {ids: np.ones(4096, "int32"), table: np.zeros((3, 2))})
    assert got.tolist() == [[0, 0], [4096, 4096], [0, 0]]
