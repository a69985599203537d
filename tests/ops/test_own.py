"""hetu.op: a function of PyTorch as an op, wherever ops go, and what is wrong with what it gives."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends.compile import inductor
from hetu.cache import LRU

calls: list[tuple[int, ...]] = []


def gated(x: Any, w: Any) -> Any:
    calls.append(tuple(x.shape))
    return torch.nn.functional.mish(x @ w)


GATED = hetu.op(gated, shape=lambda x, w: [x.shape[0], w.shape[1]])
ROWS = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")


def built(own: bool, recompute: bool = False) -> tuple[hetu.Graph, hetu.Tensor, hetu.Tensor]:
    """A graph of three strategies, with the own op or with hetu's, and the gradients of its parameter."""
    s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
    two, three = hetu.Strategy([2, s - 2], [0, 0]), hetu.Strategy([1, 0, s - 1], [0, 0, 0])
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([s], [0]), two, three], device="cpu") as g:
        x = hetu.placeholder("float32", [rows, 4], name="x")
        w = hetu.parameter(np.linspace(-1, 1, 96).reshape(4, 24).astype("float32"), [4, 24], name="w")
        with hetu.recompute() if recompute else nullcontext():
            gate = GATED(x, w) if own else (lambda p: p * hetu.tanh(hetu.log(1 + hetu.exp(p))))(x @ w)
            y = gate.square()  # whose gradient reads what the op gave
        out = hetu.parallel_attn(y, 8, 1)[0]
        loss = hetu.sum(out * out, name="loss")
        train = hetu.optim.SGD(lr=0.001).minimize(loss, name="train")
    return g, train, loss


def trained(strategy: int, batches: int = 1, compiles: bool = False, **options: Any) -> tuple[float, torch.Tensor]:
    g, train, _ = built(**options)
    (s,) = (leaf for leaf in g.strategies[0].lengths[0].leaves)
    feeds: Any = hetu.Shards(g.layout(strategy, int_symbol_dict={s: 6}).scatter(ROWS))
    with hetu.config(compile=compiles):
        loss = g.run(
            train, {"x": [feeds] * batches if batches > 1 else feeds}, int_symbol_dict={s: 6}, strategy=strategy,
            num_micro_batches=batches,
        )  # fmt: skip
    return float(loss), g.run("w", strategy=0)


@pytest.mark.parametrize("strategy", [0, 1, 2])
@pytest.mark.parametrize("batches", [1, 2])
def test_an_own_op_trains_as_hetus_ops_do(strategy: int, batches: int) -> None:
    wanted_loss, wanted = trained(0, batches, own=False)
    loss, w = trained(strategy, batches, own=True)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    torch.testing.assert_close(w, wanted, rtol=1e-4, atol=1e-5)


def test_recomputed_and_compiled_it_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled around it runs as it was traced."""
    monkeypatch.setattr(inductor, "compiled", LRU(inductor.MOST_COMPILED))
    monkeypatch.setattr(inductor, "find_inductor", lambda: lambda module, inputs, **_: module.forward)
    loss, w = trained(1, own=True)
    calls.clear()
    again_loss, again = trained(1, own=True, recompute=True)
    assert (again_loss, again.tolist()) == (loss, w.tolist())
    assert len(calls) == 6, "forward, once more, and in autograd, on each of two pipelines"
    compiled_loss, compiled = trained(1, compiles=True, own=True)
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(compiled, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "shape", "dtype", "error", "message"),
    [
        (lambda x: x[:1], [3], None, hetu.ShapeError, r"to have shape \[3\], as promised, got \[1\]"),
        (lambda x: x.double(), [3], None, hetu.DTypeError, "to be torch.float32, as promised, got torch.float64"),
        (lambda x: x, [3], "float64", hetu.DTypeError, "to be torch.float64, as promised, got torch.float32"),
        (lambda x: [x, x], [3], None, hetu.ShapeError, r"give 1 tensor\(s\), as promised by shape, got Tensor, Tensor"),
        (lambda x: None, [3], None, hetu.ShapeError, "got NoneType"),
        (lambda x: (x, x[:2]), [[3], [3]], None, hetu.ShapeError, "result 1 of the function"),
        (lambda x: x.add_(1), [3], None, hetu.HetuError, "changed an operand in place"),
        (lambda x: x.nothing, [3], None, hetu.HetuError, "function raised AttributeError"),
    ],
)
def test_what_it_gives_is_checked(function: Any, shape: Any, dtype: Any, error: type, message: str) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [3], name="x")
        y = hetu.op(function, shape, dtype)(x)
    with pytest.raises(error, match=message) as caught:
        g.run(y, {x: [1.0, 2.0, 3.0]})
    assert "test_own.py" in str(caught.value)


def test_only_what_depends_on_operands_has_a_gradient() -> None:
    """An operand that is not used has the gradient 0; ints have none; a function that cuts the way gives zeros."""
    pick = hetu.op(
        lambda x, i, y: (x[i] * 2, i + 1), shape=lambda x, i, y: [i.shape, i.shape], dtype=["float32", "int64"]
    )
    with hetu.graph("define_and_run", device="cpu") as g:
        x, y = (hetu.placeholder("float32", [3], name=name) for name in "xy")
        i = hetu.constant([2, 0])
        out, places = pick(x, i, y)
        cut = hetu.op(lambda x: x.detach() * 3, shape=lambda x: x.shape)(x)
        grads = [*hetu.gradients(out, [x, y]), hetu.gradients(cut, x)]
        with pytest.raises(hetu.HetuError, match="op_grad is not differentiable"):
            hetu.gradients(grads[0] * grads[0], x)
    found = g.run([out, places, *grads], {x: [1.0, 2.0, 3.0], y: [0.0] * 3})
    assert [item.tolist() for item in found] == [[6.0, 2.0], [3, 1], [2.0, 0.0, 2.0], [0.0] * 3, [0.0] * 3]
