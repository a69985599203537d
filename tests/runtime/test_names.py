"""Names in runs: what is fed and fetched by name, results as dicts, and parameters that are loaded by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hetu

X = np.ones((2, 3), np.float32)


def built(zero: int = 0) -> hetu.Graph:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [hetu.IntSymbol("n"), 3], name="x")
        w = hetu.parameter(0.5, [3, 3], name="w")
        y = hetu.linear(x, w, hetu.parameter(0.25, [3], "bfloat16", name="b").float(), name="y")
        hetu.topk(y, 2, name="best")
        hetu.optim.Adam(lr=0.1, zero_stage=zero).minimize(hetu.sum(y * y, name="loss"), name="train")
    return g


def test_a_run_by_names_is_that_by_tensors() -> None:
    g = built()
    x, y = g.find("x"), g.find("y")
    expected = g.run(y, {x: X})
    assert torch.equal(g.run("y", {"x": X}), expected)
    found = g.run({"out": "y", "same": y, 3: "best.values"}, {"x": X})
    assert list(found) == ["out", "same", 3]
    assert torch.equal(found["out"], expected)
    assert torch.equal(found["same"], expected)
    found["out"].fill_(0)  # no two results share memory
    assert torch.equal(found["same"], expected)
    assert found[3].tolist() == expected[:, :2].tolist()
    assert g.run({}, {}) == {}
    several = g.run(["y", x], {"x": [X, 2 * X]}, num_micro_batches=2)
    assert torch.equal(several[0][0], expected)
    assert g.prepare("y", {"x": X}).bindings[0] == g.prepare([y], {x: X}).bindings[0]


def test_a_step_in_a_dict() -> None:
    g = built()
    found = g.run({"loss": "train", "plain": "loss"}, {"x": X})
    assert found["loss"] == found["plain"]
    assert g.run("loss", {"x": X}) < found["loss"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda g: g.run("z", {"x": X}), r"no tensor named 'z', as fetches says"),
        (lambda g: g.run(["y", "loos"], {"x": X}), "did you mean loss"),
        (lambda g: g.run({"a": "z"}, {"x": X}), "no tensor named 'z'"),
        (lambda g: g.run({"a": 3}, {"x": X}), "each of fetches to be a graph tensor"),
        (lambda g: g.run("best", {"x": X}), "did you mean best.values or best.indices"),
        (lambda g: g.run("y", {"z": X}), "no tensor named 'z', as feed_dict says"),
        (lambda g: g.run("y", {"w": X, "x": X}), "it is no placeholder"),
        (lambda g: g.run("y", {"x": X, g.find("x"): X}), "twice"),
        (lambda g: g.prepare("z", {"x": X}), "no tensor named 'z'"),
        (lambda g: g.prepare("y", {"z": X}), "no tensor named 'z'"),
        (lambda g: g.find(3), "name to be a string"),
    ],
)
def test_what_is_refused(wrong: Callable[[hetu.Graph], Any], message: str) -> None:
    with pytest.raises(hetu.HetuError, match=message) as caught:
        wrong(built())
    assert "test_names.py" in str(caught.value)


def test_names_are_found_as_the_graph_grows_and_nodes_are_taken_back() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [2], name="x")
        with hetu.recompute():
            y = hetu.exp(hetu.tanh(x, name="t"), name="y")
        assert g.find("y") is y
        hetu.gradients(y, x)
        late = hetu.sum(y, name="late")
    assert g.find("late") is late
    for node in g.nodes:
        for item in node.outputs:
            assert g.find(item.name) is item


def test_parameters_are_loaded_by_name() -> None:
    g = built()
    given = {"w": torch.arange(9.0, dtype=torch.float64).view(3, 3), "b": np.array([1.0, 2.0, 3.5])}
    assert g.load_parameters(given) == ([], [])
    assert torch.equal(g.run("w"), given["w"].float())
    assert g.run("b").dtype == torch.bfloat16
    assert g.run("b").tolist() == [1.0, 2.0, 3.5]
    given["w"].fill_(7)
    assert g.run("w")[0, 0] == 0, "it was copied"
    names = g.load_parameters({"w": torch.eye(3), "more": torch.ones(1)}, strict=False)
    assert (names.missing_keys, names.unexpected_keys) == (["b"], ["more"])
    assert torch.equal(g.run("w"), torch.eye(3))
    assert g.run("b").tolist() == [1.0, 2.0, 3.5]


@pytest.mark.parametrize("zero", [0, 2])
def test_the_optimiser_goes_on_with_what_was_loaded(zero: int) -> None:
    g = built(zero)
    g.run("train", {"x": X})
    before = g.state_dict()
    g.load_parameters({"w": torch.eye(3)}, strict=False)
    after = g.state_dict()
    assert torch.equal(after["parameters"]["w"], torch.eye(3))
    assert torch.equal(after["parameters"]["b"], before["parameters"]["b"])
    moments = [state["optimizers"]["train"]["state"]["w"]["exp_avg"] for state in (before, after)]
    assert torch.equal(*moments)
    g.run("train", {"x": X})
    assert not torch.equal(g.run("w"), torch.eye(3)), "the optimiser updates what computations read"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"w": torch.eye(3)}, hetu.HetuError, "missing: b"),
        ({"w": torch.eye(3), "b": torch.ones(3), "c": torch.ones(3)}, hetu.HetuError, "unknown: c"),
        ({"w": torch.eye(2), "b": torch.ones(3)}, hetu.ShapeError, r"value of w in given to have shape \[3, 3\]"),
        ({"w": torch.eye(3), "b": [1, 2, 3]}, hetu.DTypeError, "value of b in given to be floating, got torch.int64"),
        ({"w": torch.eye(3), "b": "text"}, hetu.DTypeError, "value of b in given"),
        ({"w": torch.eye(3), "b": [1.0, float("nan"), 2.0]}, None, ""),
        ([("w", 1)], hetu.HetuError, "given to be a dict"),
    ],
)
def test_what_can_not_be_loaded_changes_nothing(given: Any, error: Any, message: str) -> None:
    g = built()
    if error is None:  # as torch does
        g.load_parameters(given)
        return
    before = g.state_dict()["parameters"]
    with pytest.raises(error, match=message) as caught:
        g.load_parameters(given)
    assert "test_names.py" in str(caught.value)
    after = g.state_dict()["parameters"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_state_dict_of_a_torch_module_fits() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [2, 3], name="x")
        layers = [hetu.nn.Linear(3, 5, name="0"), hetu.nn.Linear(5, 2, bias=False, name="1")]
        y = layers[1](layers[0](x))
    g.load_parameters(module.state_dict())
    values = torch.randn(2, 3)
    torch.testing.assert_close(g.run(y, {"x": values}), module(values).detach())
