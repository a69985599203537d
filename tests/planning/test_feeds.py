"""What can be fed: every array that numpy can read, in whatever memory; the rest is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetu


def plus_one(dtype: str = "float32") -> tuple[hetu.Graph, hetu.Tensor, hetu.Tensor]:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(dtype, [hetu.IntSymbol("n")], name="x")
        y = x + 1
    return g, x, y


def column(dtype: str, layout: list[Any]) -> np.ndarray:
    table = np.zeros(3, dtype=layout)
    table["x"] = [1, 2, 3]
    return table["x"].view(dtype) if table["x"].dtype != dtype else table["x"]


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


MEMORY = {
    "plain": lambda t: np.array([1, 2, 3], t),
    "a column of packed records": lambda t: column(t, [("a", "i1"), ("x", t)]),
    "a column of aligned records": lambda t: column(t, [("a", "i8"), ("x", t), ("b", "i8")]),
    "two columns that overlap": lambda t: np.lib.stride_tricks.as_strided(
        np.frombuffer(np.array([1, 2, 3], t).tobytes() + b"\0" * 8, t), (3,), (np.dtype(t).itemsize,)
    ),
    "reversed": lambda t: np.array([3, 2, 1], t)[::-1],
    "every other": lambda t: np.array([1, 0, 2, 0, 3], t)[::2],
    "read only": lambda t: read_only(np.array([1, 2, 3], t)),
    "the other byte order": lambda t: np.array([1, 2, 3], t).astype(np.dtype(t).newbyteorder()),
    "a row of Fortran's order": lambda t: np.asfortranarray(np.array([[1, 2, 3], [0, 0, 0]], t))[0],
    "one element stretched": lambda t: np.broadcast_to(np.array([2], t), (3,)) + np.array([-1, 0, 1], t),
    "a torch view": lambda t: torch.tensor([1, 0, 2, 0, 3], dtype=getattr(torch, t))[::2],
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32", "int16", "float16"])
def test_arrays_are_fed_from_any_memory(memory: str, dtype: str) -> None:
    g, x, y = plus_one(dtype)
    value = MEMORY[memory](dtype)
    assert g.run(y, {x: value}).tolist() == [2, 3, 4]
    assert list(np.asarray(value)) == [1, 2, 3]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_constants_are_made_of_any_memory(memory: str, dtype: str) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        y = hetu.constant(MEMORY[memory](dtype)) + 1
    assert g.run(y).tolist() == [2, 3, 4]


def test_columns_are_read_for_planning_too() -> None:
    table = np.zeros(3, dtype=[("a", "i1"), ("ends", ">i4")])
    table["ends"] = [0, 2, 5]
    with hetu.graph("define_and_run", device="cpu") as g:
        q = hetu.placeholder("float32", [5, 24], name="q")
        cu = hetu.placeholder("int32", [3], name="cu")
        out = hetu.parallel_attn(q, 8, 1, [[5]], [[0]], True, cu)[0]
    data = np.random.default_rng(0).standard_normal((5, 24), np.float32)
    plain = g.run(out, {q: data, cu: np.array([0, 2, 5], np.int32)})
    assert torch.equal(g.run(out, {q: data, cu: table["ends"]}), plain)


class Refusing:
    """An object that numpy asks for its array, and that has none."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no array here")


UNREADABLE = {
    "a meta tensor": (lambda: torch.ones(3, device="meta"), "meta tensor, which has no values"),
    "a nested tensor": (lambda: torch.nested.nested_tensor([torch.ones(3)]), "nested tensor"),
    "a jagged tensor": (lambda: torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged), "nested tensor"),
    "a sparse tensor": (lambda: torch.ones(3).to_sparse(), "layout torch.sparse_coo"),
    "a compressed tensor": (lambda: torch.ones(3, 3).to_sparse_csr(), "layout torch.sparse_csr"),
    "records": (lambda: np.zeros(3, [("a", "i1"), ("x", "f4")]), "values were fed"),
    "objects": (lambda: np.array([1.0, None, 2.0]), "object values were fed"),
    "texts": (lambda: ["a", "b"], "values were fed"),
    "times": (lambda: np.zeros(3, "datetime64[s]"), "datetime64"),
    "a list of tensors": (lambda: [torch.ones(1)] * 3, "it holds tensors"),
    "rows of other lengths": (lambda: [[1.0], [1.0, 2.0]], "is no array"),
    "what raises": (Refusing, "no array here"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("spread", ["one array", "shards", "micro-batches"])
def test_what_cannot_be_read_is_refused(kind: str, spread: str) -> None:
    g, x, y = plus_one()
    make, text = UNREADABLE[kind]
    fed: Any = make()
    options = {}
    if spread == "shards":
        fed = hetu.Shards([np.ones(3, np.float32), fed])
    elif spread == "micro-batches":
        fed, options = [np.ones(3, np.float32), fed], {"num_micro_batches": 2}
    with pytest.raises(hetu.HetuError, match=text) as caught:
        g.run(y, {x: fed}, **options)
    assert "x" in str(caught.value) and "fix:" in str(caught.value)
    assert g.run(y, {x: [1.0]}).tolist() == [2.0]
