"""State: saved, loaded, refused; and that a run that goes on from it gives the same bits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.states import is_same as same

import hetu

WIDTH, HEAD_DIM = 16, 8


class Model:
    """One attention with dropout, so that parameters, optimiser, schedule and generator all matter."""

    def __init__(self, kind: str = "AdamW", width: int = WIDTH, names: str = "ab", schedule: bool = True) -> None:
        rows = hetu.IntSymbol("rows")
        with hetu.graph("define_and_run", device="cpu") as self.graph:
            self.x = hetu.placeholder(hetu.float32, [rows, width])
            first = hetu.parameter(functools.partial(torch.nn.init.normal_, std=0.2), [48, width], name=names[0])
            second = hetu.parameter(functools.partial(torch.nn.init.normal_, std=0.2), [16, 16], name=names[1])
            attended = hetu.parallel_attn(hetu.linear(self.x, first), HEAD_DIM, 1, [[rows]], [[0]], p_dropout=0.3)[0]
            y = hetu.linear(attended, second)
            cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=9)
            optimizer = getattr(hetu.optim, kind)(lr=1e-2, schedule=cosine if schedule else None, max_grad_norm=1.0)
            self.train = optimizer.minimize(hetu.mean(y * y), name="train")

    def steps(self, numbers: range, **options: Any) -> list[float]:
        return [float(self.graph.run(self.train, {self.x: batch(number)}, **options)) for number in numbers]


def batch(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((5 + number % 3, WIDTH)).astype(np.float32)


def test_later_runs_leave_a_state_alone() -> None:
    """That of the graph that gave it, and that of the graph that goes on from it."""
    first, second = Model(), Model()
    first.steps(range(2))
    first.steps(range(2, 3), run_level="grad")
    state, wanted = first.graph.state_dict(), first.graph.state_dict()
    second.graph.load_state_dict(state)
    for model in (first, second):
        model.steps(range(3, 5))
        assert same(state, wanted)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_resuming_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    hetu.manual_seed(1)
    whole = Model(kind)
    losses = whole.steps(range(4))
    whole.steps(range(4, 5), run_level="grad")  # a gradient that waits is part of the state
    hetu.save(whole.graph, tmp_path / "state.safetensors")
    losses += whole.steps(range(5, 9))
    end = whole.graph.state_dict()

    hetu.manual_seed(99)
    later = Model(kind)
    later.steps(range(2))
    later.graph.load_state_dict(hetu.load(tmp_path / "state.safetensors"))
    assert later.steps(range(5, 9)) == losses[4:]
    assert same(later.graph.state_dict(), end)


def test_a_file_holds_the_state(tmp_path: Path) -> None:
    model = Model()
    model.steps(range(2))
    state = model.graph.state_dict()
    hetu.save(model.graph, tmp_path / "graph.safetensors")
    hetu.save({**state, "losses": [0.1, 1e-30], "note/with.odd names": "x"}, tmp_path / "dict.safetensors")
    read = hetu.load(tmp_path / "graph.safetensors")
    assert read["parameters"].keys() == {"a", "b"}
    assert same(state["optimizers"]["train"]["state"], read["optimizers"]["train"]["state"])
    assert hetu.load(tmp_path / "dict.safetensors")["losses"] == [0.1, 1e-30]
    Model().graph.load_state_dict(hetu.load(tmp_path / "dict.safetensors"))  # what the user added is left alone


def test_a_state_is_a_copy() -> None:
    model = Model()
    model.steps(range(1))
    state, again = model.graph.state_dict(), model.graph.state_dict()
    model.steps(range(1, 2))
    assert same(state, again)


def test_before_the_first_run(tmp_path: Path) -> None:
    hetu.manual_seed(5)
    first = Model()
    hetu.save(first.graph, tmp_path / "new.safetensors")
    losses = first.steps(range(3))
    hetu.manual_seed(6)
    second = Model()
    second.graph.load_state_dict(hetu.load(tmp_path / "new.safetensors"))
    assert second.steps(range(3)) == losses


def test_saving_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = Model(), tmp_path / "state.safetensors"
    hetu.save(model.graph, path)
    before = path.read_bytes()

    def fail(tensors: Any, filename: str, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        hetu.save(model.graph, path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    hetu.save(Model().graph, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(hetu.HetuError, match="no whole safetensors file"):
        hetu.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(hetu.HetuError, match=r"not one that hetu\.save wrote"):
        hetu.load(path)
    path.write_text("not a file of tensors at all, but long enough to hold a header")
    with pytest.raises(hetu.HetuError, match="no whole safetensors file"):
        hetu.load(path)
    with pytest.raises(FileNotFoundError):
        hetu.load(tmp_path / "missing.safetensors")


def damaged(state: dict[str, Any], *path: Any, value: Any = None) -> dict[str, Any]:
    """A state in which one entry is another, or missing."""
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("parameters",), None, "it has no 'parameters'"),
        (("format",), 2, "format 2, expected 1"),
        (("parameters", "a"), None, "missing: a"),
        (("parameters", "c"), torch.zeros(1), "unknown: c"),
        (("parameters", "a"), torch.zeros(1), "has shape [1] in the state, expected [48, 16]"),
        (("parameters", "a"), torch.zeros(48, 16).double(), "is torch.float64 in the state"),
        (("optimizers", "other"), {"groups": []}, "an optimiser of other, which the graph has not"),
        (("optimizers", "train", "kind"), "SGD", "that of SGD, but it is AdamW here"),
        (("optimizers", "train", "schedule"), {}, "torch refuses the state"),
        (("optimizers", "train", "groups"), None, "no whole state"),
        (("optimizers", "train", "state", "a", "exp_avg"), torch.zeros(3), "exp_avg of a has shape [3]"),
        (("rng", "seed"), None, "no whole state"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(path: tuple[Any, ...], value: Any, message: str) -> None:
    model = Model()
    model.steps(range(2))
    before = model.graph.state_dict()
    other = Model()
    other.steps(range(1))
    if path[-1] == "schedule":
        value = None
    with pytest.raises(hetu.HetuError) as caught:
        model.graph.load_state_dict(damaged(other.graph.state_dict(), *path, value=value))
    if path[-1] != "schedule":
        assert message in str(caught.value)
    assert "test_checkpoints.py:" in str(caught.value)
    after = model.graph.state_dict()
    assert same({**before, "rng": 0}, {**after, "rng": 0})


def test_states_of_other_graphs_are_refused() -> None:
    state = Model().graph.state_dict()
    with pytest.raises(hetu.HetuError, match=r"missing: c; unknown: b"):
        Model(names="ac").graph.load_state_dict(state)
    trained = Model(schedule=False)
    trained.steps(range(1))
    with pytest.raises(hetu.HetuError, match="a schedule in the state or in the graph, but not in both"):
        Model().graph.load_state_dict(trained.graph.state_dict())
    with pytest.raises(hetu.HetuError, match="no state of a graph"):
        Model().graph.load_state_dict([1, 2])  # type: ignore[arg-type]
