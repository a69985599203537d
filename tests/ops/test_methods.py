"""Methods of tensors and indexing: what PyTorch gives for the same call, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hetu
from hetu.ops.methods import METHODS

SHAPE = (3, 4, 6)
CALLS: dict[str, Callable[[Any], Any]] = {
    "reshape": lambda x: x.reshape(-1, 24),
    "reshape a list": lambda x: x.reshape([2, 12, 3]),
    "view": lambda x: x.view(3, -1),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 2, 4, -1),
    "expand in front": lambda x: x.expand(2, 3, 4, 6),
    "permute": lambda x: x.permute(2, 0, 1),
    "permute a list": lambda x: x.permute([1, 2, 0]),
    "flatten": lambda x: x.flatten(1),
    "flatten all": lambda x: x.flatten(),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "squeeze": lambda x: x[:, :1].squeeze(),
    "squeeze one": lambda x: x[:, :1].squeeze(1),
    "squeeze none": lambda x: x.squeeze(1),
    "T": lambda x: x[0].T,
    "t": lambda x: x[0].t(),
    "matmul": lambda x: x[0] @ x[1].T,
    "sum": lambda x: x.sum(1, keepdim=True),
    "mean": lambda x: x.mean((0, 2)),
    "amax": lambda x: x.max(),
    "amin": lambda x: x.min(),
    "logsumexp": lambda x: x.logsumexp(-1),
    "argmax": lambda x: x.argmax(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2)[1],
    "softmax": lambda x: x.softmax(-1),
    "split": lambda x: x.split(2, 2)[1],
    "gather": lambda x: x.gather(2, x.argmax(-1, keepdim=True)),
    "masked_fill": lambda x: x.masked_fill(x < 0, -9.0),
    "clamp": lambda x: x.clamp(max=0.5),
    "abs": abs,
    "neg": lambda x: x.neg() + -x,
    "square": lambda x: x.square().sqrt(),
    "eq": lambda x: x.eq(x.detach()),
    "half": lambda x: x.half(),
    "double": lambda x: x.double().float(),
    "long": lambda x: x.long(),
    "bool": lambda x: (x > 0).bool().int(),
    "to": lambda x: x.to(torch.float64),
    "iterate": lambda x: sum(row * 2 for row in x[0]),
    "unpack": lambda x: (lambda a, b, c, d: a - d)(*x[1]),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
}


def compare(call: Callable[[Any], Any], symbolic: bool) -> None:
    first: Any = hetu.IntSymbol("s", min=3) if symbolic else 3
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(SHAPE).astype("float32"))
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [first, *SHAPE[1:]], name="x")
        y = call(x)
    expected = call(values)
    got = g.run(y, {"x": values})
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert [size if isinstance(size, int) else size.evaluate({first: 3}) for size in y.shape] == list(expected.shape)


@pytest.mark.parametrize("name", CALLS)
def test_a_method_gives_what_torchs_gives(name: str) -> None:
    compare(CALLS[name], symbolic=False)
    if name not in {"reshape a list", "expand in front"}:  # which need a plain size in front
        compare(CALLS[name], symbolic=True)


indices = st.one_of(
    st.integers(-3, 2),
    st.just(None),
    st.tuples(st.none() | st.integers(0, 1), st.none() | st.integers(1, 3), st.none() | st.integers(1, 3)).map(
        lambda item: slice(*item)
    ),
    st.tuples(st.none() | st.integers(-3, -1), st.none()).map(lambda item: slice(*item)),
)


@given(st.lists(indices, max_size=3), st.none() | st.integers(0, 3), st.booleans())
@settings(max_examples=40)
def test_any_index_gives_what_torchs_gives(entries: list[Any], dots: int | None, symbolic: bool) -> None:
    key = list(entries)
    if dots is not None:
        key.insert(min(dots, len(key)), Ellipsis)
    compare(lambda x: x[tuple(key)], symbolic)


def test_bounds_may_be_symbols() -> None:
    s, k = hetu.IntSymbol("s", min=1), hetu.IntSymbol("k")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s, 2], name="x")
        ys = [x[: s // 2], x[k], x[k:], x[s - 1, None], x[-k - 1 :][:1]]
    values = torch.arange(10.0).view(5, 2)
    found = g.run(ys, {x: values}, int_symbol_dict={k: 3})
    for got, expected in zip(found, [values[:2], values[3], values[3:], values[4, None], values[1:2]], strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(hetu.ShapeError, match="0 <= start <= stop <= s"):
        g.run(ys[1], {x: values}, int_symbol_dict={k: 5})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[1.5], "an index to be made of ints"),
        (lambda x: x["a"], "an index to be made of ints"),
        (lambda x: x[x > 0], "an index to be made of ints"),
        (lambda x: x[[0, 1]], "an index to be made of ints"),
        (lambda x: x[np.array([True])], "an index to be made of ints"),
        (lambda x: x[True], "an index to be made of ints"),
        (lambda x: x[0, 0, 0], "at most 2 entries"),
        (lambda x: x[..., ...], "at most one"),
        (lambda x: x[:, 7:], "stop <= 4 in dim 1"),
        (lambda x: x[:, -7], "an index from -4 to 3 in dim 1"),
        (lambda x: x[:, 4], "an index from -4 to 3 in dim 1"),
        (lambda x: x[-7 - hetu.IntSymbol("k") :, 9], "an index from -4 to 3"),
        (lambda x: x[:, ::-1], "step"),
        (lambda x: x[:, "a":], "start"),
        (len, "is no plain number"),
        (list, "is no plain number"),
        (lambda x: 3 in x, "is known only when the graph runs"),
        (np.asarray, "is no array"),
        (bool, "neither true nor false"),
        (float, "is no number"),
        (int, "is no number"),
        (lambda x: torch.ones(2, 2) @ x, "expected a to be a graph tensor"),
        (torch.relu, "torch's relu was called on a hetu.Tensor"),
        (lambda x: torch.cat([x, x]), "torch's cat was called on a hetu.Tensor"),
        (lambda x: x.numpy(), "has no numbers"),
        (lambda x: x.item(), "is no number"),
        (lambda x: x.permute(0), "name each of 2 dimension"),
        (lambda x: x.permute(0, 0), "name each of 2 dimension"),
        (lambda x: x.permute("a"), "dims to be a list of ints"),
        (lambda x: x.flatten(1, 0), "start_dim to be at most end_dim"),
        (lambda x: x.unsqueeze(3), "dim to be an int from -3 to 2"),
        (lambda x: x.squeeze(0), "has size 1 is known only when the graph runs"),
        (lambda x: x.squeeze(5), "dim to be an int from -2 to 1"),
        (lambda x: x[0].t(), "expected two dimensions"),
        (lambda x: x.size(2), "dim to be an int from -2 to 1"),
        (lambda x: x.sum().size(0), "tensor without dimensions"),
        (lambda x: x.to("cuda"), "no element type 'cuda'"),
    ],
)
def test_what_is_refused(wrong: Callable[[Any], Any], message: str) -> None:
    with hetu.graph("define_and_run", device="cpu"):
        x = hetu.placeholder("float32", [hetu.IntSymbol("s"), 4], name="x")
        with pytest.raises(hetu.HetuError, match=message) as caught:
            wrong(x)
    assert "test_methods.py" in str(caught.value)


def test_sizes_are_plain_where_they_can_be() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run"):
        x = hetu.placeholder("float32", [s, 4])
        assert x.size() == (s, 4)
        assert x.size(-1) == 4
        assert x.numel() == 4 * s
        assert hetu.full([2, 3], 1.0).numel() == 6
        assert x.dim() == 2
        assert x.contiguous() is x
        assert x.float() is x


def test_every_method_that_is_a_function_is_hetus() -> None:
    """Nothing is written twice: a method of a function's name with other arguments is one of a few."""
    own = {"reshape", "bool", "float16", "bfloat16"}
    for name, method in METHODS.items():
        function = getattr(hetu, name, None)
        if callable(function) and name not in own:
            assert method is function, name
