"""What a graph takes of a state: by name, as copies, and only if a run can go on from it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from support.longer import LONGER
from support.states import Trained, at, is_same, places, replaced
from torch.optim import lr_scheduler

import hetu

OPTIMIZERS: dict[str, Any] = {
    "SGD": functools.partial(hetu.optim.SGD, lr=0.1),
    "SGD with momentum": functools.partial(hetu.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(hetu.optim.Adam, lr=0.1, amsgrad=True),
    "AdamW": functools.partial(hetu.optim.AdamW, lr=torch.tensor(0.1)),
}
SCHEDULES: dict[str, Any] = {
    "none": None,
    "StepLR": functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.7),
    "LambdaLR": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "OneCycleLR": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=40, cycle_momentum=False),
    "ReduceLROnPlateau": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [1, 3])], [2]
    ),
}
OPTIONS = {"a": {"lr": 0.3, "weight_decay": 0.2}, "b": {"lr": 0.001, "maximize": True}}


def grouped(order: str) -> Any:
    return lambda p: [{"params": [p[name]], **OPTIONS[name]} for name in order]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("has_groups", [False, True])
def test_states_go_to_the_parameters_of_their_names(kind: str, schedule: str, has_groups: bool) -> None:
    """Parameters and groups may have been made in another order."""
    first, second = (
        Trained(OPTIMIZERS[kind](schedule=SCHEDULES[schedule]), order, grouped(order) if has_groups else None)
        for order in ("ab", "ba")
    )
    for _ in range(3):
        first.step()
    first.step(run_level="grad")
    state = first.state()
    second.graph.load_state_dict(state)
    wanted = [first.step(), first.step(), first.values()]
    second.graph.load_state_dict(state)  # the generator's, too
    assert [second.step(), second.step(), second.values()] == wanted


def test_groups_of_other_parameters_are_refused() -> None:
    one, two = Trained(hetu.optim.SGD()), Trained(hetu.optim.SGD(), groups=grouped("ab"))
    one.step()
    two.step()
    for state, model in ((one.state(), two), (two.state(), one)):
        with pytest.raises(hetu.HetuError, match="the groups of train have other parameters"):
            model.graph.load_state_dict(state)


def test_what_may_be_of_groups_in_another_order_is_refused() -> None:
    class PerGroup:
        def __init__(self, optimizer: Any) -> None:
            self.own = [0.1 * (i + 1) for i, _ in enumerate(optimizer.param_groups)]

        def step(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"own": self.own}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.own = state["own"]

    first, second = (Trained(hetu.optim.SGD(schedule=PerGroup), order, grouped(order)) for order in ("ab", "ba"))
    first.step()
    with pytest.raises(hetu.HetuError, match="may be of groups, which have another order"):
        second.graph.load_state_dict(first.state())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_share_nothing(kind: str, schedule: str) -> None:
    """Neither with the graph that gave them, nor with those that took them, nor these with each other."""
    optimizer = OPTIMIZERS[kind](schedule=SCHEDULES[schedule])  # one for three graphs
    first, second, third = (Trained(optimizer) for _ in range(3))
    first.step()
    first.step(run_level="grad")
    state = first.state()
    wanted = copy.deepcopy(state)
    ends = []
    for model in (second, third, first, second):
        model.graph.load_state_dict(state)
        ends.append((model.step(), model.step(), model.state()))
        assert is_same(state, wanted)
    assert all(is_same(end, ends[0]) for end in ends)


HOSTILE: tuple[Any, ...] = (
    ..., None, "x", -1, 1.5, float("nan"), True, [], {}, (), 2**70, b"x", object(), {"a": 1}, [1, 2, 3], np.ones(2),
    torch.tensor(1.0), torch.tensor(float("nan")), torch.ones(2), torch.ones(2, 2), torch.ones(3),
    torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.complex64),
    torch.ones(2, device="meta"), torch.ones(2).to_sparse(),
)  # fmt: skip


def refusal_of(model: Trained, state: Any) -> str | None:
    try:
        model.graph.load_state_dict(state)
    except hetu.HetuError as error:
        return str(error)
    return None


@pytest.mark.parametrize("schedule", ["none", "StepLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_damaged_state_is_refused_whole_or_can_be_trained(kind: str, schedule: str) -> None:
    """Every part of a state in turn is missing or something else: one of some of them, or of all with HETU_FUZZ."""
    share = 1 if LONGER > 1 else 4
    model = Trained(OPTIMIZERS[kind](schedule=SCHEDULES[schedule]))
    model.step()
    model.step(run_level="grad")
    good, refused = model.state(), 0
    for number, path in enumerate(places(good)):
        for other in HOSTILE[number % share :: share]:
            try:
                damaged = replaced(good, path, other)
            except (TypeError, KeyError):
                continue  # nothing to take away
            refusal = refusal_of(model, damaged)
            if refusal is None:
                model.step()
                model.graph.load_state_dict(good)
            else:
                assert "test_loading_states.py:" in refusal
                assert is_same(model.state(), good), path
                refused += 1
    assert refused > 500 // share


AVERAGES = {"SGD with momentum": ["momentum_buffer"], "Adam": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]}


@pytest.mark.parametrize("names", ["a", "b", "ab"])
@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in AVERAGES.items() for key in keys])
def test_averages_that_are_missing_are_named(kind: str, key: str, names: str) -> None:
    model = Trained(OPTIMIZERS[kind]())
    model.step()
    state = model.state()
    for name in names:
        del at(state, ("optimizers", "train", "state", name))[key]
    with pytest.raises(hetu.HetuError, match=f"misses {key}"):
        model.graph.load_state_dict(state)
    without = replaced(model.state(), ("optimizers", "train", "state"), {})
    with pytest.raises(hetu.HetuError, match="misses"):
        model.graph.load_state_dict(without)


def test_an_average_that_a_schedule_turned_on_may_be_missing() -> None:
    """The momentum was 0 in the last step, and is not in the next."""
    first = Trained(hetu.optim.SGD(lr=0.1))
    first.step()
    state = replaced(first.state(), ("optimizers", "train", "groups", 0, "momentum"), 0.9)
    first.graph.load_state_dict(state)
    first.step()
    state = first.state()
    assert "momentum_buffer" in state["optimizers"]["train"]["state"]["a"]
    state["optimizers"]["train"]["groups"][0]["momentum"] = 0  # and the other way round: it is kept
    first.graph.load_state_dict(state)
    assert is_same(first.state(), state)


WEIGHTS = {
    "a parameter of torch": lambda: torch.nn.Parameter(torch.tensor([5.0, 6.0])),
    "one that requires a gradient": lambda: torch.tensor([5.0, 6.0], requires_grad=True),
    "a result": lambda: torch.tensor([5.0, 6.0], requires_grad=True) * 1,
    "expanded": lambda: torch.tensor([5.0]).expand(2),
    "strided": lambda: torch.tensor([5.0, 0.0, 6.0, 0.0])[::2],
    "of another dtype's memory": lambda: torch.tensor([5.0, 6.0]).view(torch.int32).view(torch.float32),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_tensors_of_a_state_are_taken_as_ordinary_ones(what: str) -> None:
    model = Trained(hetu.optim.Adam(lr=0.1))
    model.step()
    model.step(run_level="grad")
    given = WEIGHTS[what]()
    plain = given.detach().clone(memory_format=torch.contiguous_format)
    ends = []
    for value in (given, plain):
        state = model.state()
        state["parameters"]["a"] = value
        state["gradients"]["train"]["a"] = value
        state["optimizers"]["train"]["state"]["a"]["exp_avg"] = value
        model.graph.load_state_dict(state)
        ends.append((model.step(), model.values()))
        model.graph.load_state_dict(state)
    assert ends[0] == ends[1]
    assert torch.equal(given, plain)


def test_an_earlier_states_gradients_have_no_loss() -> None:
    model = Trained(hetu.optim.SGD(lr=0.1, schedule=SCHEDULES["ReduceLROnPlateau"]))
    model.step(run_level="grad")
    state = model.state()
    assert state.pop("waiting_losses").keys() == {"train"}
    model.graph.load_state_dict(state)
    model.step()


def test_a_schedule_at_its_end_can_be_loaded() -> None:
    make = functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=1, cycle_momentum=False)
    model = Trained(hetu.optim.SGD(lr=0.1, schedule=make))
    model.step()
    state = model.state()
    model.graph.load_state_dict(state)
    with pytest.raises(hetu.HetuError, match="Tried to step"):
        model.step()
    assert is_same({**model.state(), "rng": 0}, {**state, "rng": 0})
