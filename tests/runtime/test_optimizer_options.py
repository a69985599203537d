"""Options of optimisers and of groups: refused at the line that gives them, and numbers whatever their type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.states import Trained, is_same

import hetu

KINDS = {"SGD": hetu.optim.SGD, "Adam": hetu.optim.Adam, "AdamW": hetu.optim.AdamW}
NO_NUMBERS = ("x", None, float("nan"), float("inf"), -1.0, True, [0.1], 1j, torch.ones(2), torch.ones(1, device="meta"))
NO_FLAGS = ("no", 1, [], np.ones(1))
HOSTILE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("lr", "weight_decay", "momentum", "eps"), NO_NUMBERS),
    "dampening": ("x", None, float("nan"), True),
    **dict.fromkeys(("nesterov", "maximize", "differentiable", "amsgrad", "capturable"), (*NO_FLAGS, None)),
    **dict.fromkeys(("foreach", "fused"), NO_FLAGS),
    "betas": (0.9, "ab", (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, "x"), (0.9, float("nan")), None, (0.9, True)),
    "params": (None,),
    "momentun": (0.9,),
    "init_lr": (0.1,),
}


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("option", HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_options_are_refused_where_they_are_written(kind: str, option: str, in_group: bool) -> None:
    for value in HOSTILE[option]:
        with hetu.graph("define_and_run", device="cpu") as g:
            a, b = (hetu.parameter(1.0, [2], name=name) for name in "ab")
            loss = hetu.sum(a) + hetu.sum(b)
            count = len(g.nodes)
            groups = [{"params": [a]}, {"params": [b], option: value}] if in_group else None
            of_all = {} if in_group else {option: value}
            with pytest.raises(hetu.HetuError, match="params is None|" + option) as caught:
                KINDS[kind](**of_all).minimize(loss, groups)
            assert "test_optimizer_options.py:" in str(caught.value)
            assert len(g.nodes) == count


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], in_group: bool) -> None:
    groups = (lambda p: [{"params": [p["a"]]}, {"params": [p["b"]], **options}]) if in_group else None
    with pytest.raises(hetu.HetuError, match=r"torch\.optim\.SGD refuses its options"):
        Trained(hetu.optim.SGD(**({} if in_group else options)), groups=groups)


def test_what_only_torch_knows_is_refused_before_the_run() -> None:
    for options in (
        {"capturable": True},
        {"lr": torch.tensor(0.1), "foreach": True},
        {"betas": (torch.tensor(0.5), 0.9)},
    ):
        model = Trained(hetu.optim.AdamW(), groups=lambda p: [{"params": list(p.values()), **options}])  # noqa: B023
        before = model.state()
        with pytest.raises(hetu.HetuError, match=r"torch\.optim\.AdamW refuses its options"):
            model.step()
        assert is_same(before, model.state())


NUMBERS = (
    np.float64(0.25),
    np.float32(0.25),
    np.float16(0.25),
    np.array(0.25),
    torch.tensor(0.25),
    torch.tensor([0.25]),
)


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{type(number).__name__} {number.dtype}")
def test_numbers_are_numbers(number: Any, in_group: bool) -> None:
    def trained(lr: Any) -> Trained:
        groups = (lambda p: [{"params": list(p.values()), "lr": lr}]) if in_group else None
        model = Trained(hetu.optim.Adam(lr=0.1 if in_group else lr), groups=groups)
        hetu.manual_seed(0)
        model.step()
        return model

    assert trained(number).values() == trained(0.25).values()
    kept = trained(number).state()["optimizers"]["train"]["groups"][0]["lr"]
    assert float(kept) == 0.25 and type(kept) in (float, torch.Tensor)


def test_a_tensor_of_the_users_is_neither_kept_nor_changed() -> None:
    rate, decay = torch.tensor(0.1), torch.tensor(0.01)
    half = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # noqa: E731
    optimizer = hetu.optim.SGD(lr=rate, schedule=half)
    one = Trained(optimizer, groups=lambda p: [{"params": [p["a"]]}, {"params": [p["b"]], "weight_decay": decay}])
    other = Trained(optimizer)
    one.step()
    assert rate.item() == torch.tensor(0.1).item()
    rate.fill_(7)
    decay.fill_(7)
    assert float(other.state()["optimizers"].get("train", {"groups": [{"lr": 0.1}]})["groups"][0]["lr"]) == 0.1
    other.step()
    for model in (one, other):
        assert float(model.state()["optimizers"]["train"]["groups"][0]["lr"]) == pytest.approx(0.05)


@pytest.mark.parametrize("value", ["1", float("nan"), 0, -1, True, [1.0]])
def test_a_norm_is_a_positive_number(value: Any) -> None:
    with pytest.raises(hetu.HetuError, match="max_grad_norm"):
        hetu.optim.SGD(max_grad_norm=value)


def test_a_schedule_is_a_function_that_gives_one() -> None:
    with pytest.raises(hetu.HetuError, match="schedule is 5"):
        hetu.optim.SGD(schedule=5)  # type: ignore[arg-type]
    for schedule in (lambda _: 5, lambda _: 1 / 0, lambda _: {}["x"]):
        with pytest.raises(hetu.HetuError, match="refuses its options"):
            Trained(hetu.optim.SGD(schedule=schedule)).step()


def test_what_is_trained_is_a_list() -> None:
    with hetu.graph("define_and_run", device="cpu"):
        w = hetu.parameter(1.0, [1], name="w")
        loss, sgd = hetu.sum(w), hetu.optim.SGD(lr=0.1)
        for given in (
            w,
            "w",
            5,
            {"params": [w]},
            [{"params": 5}],
            [{"lr": 0.1}],
            [{"params": "w"}],
            [w, {"params": [w]}],
        ):
            with pytest.raises(hetu.HetuError, match=r"\[minimize\]"):
                sgd.minimize(loss, given)  # type: ignore[arg-type]
        with pytest.raises(hetu.HetuError, match="name"):
            sgd.minimize(loss, name=5)  # type: ignore[arg-type]
        for given in ([w], (w,), iter([w]), [{"params": w}], [{"params": (w,)}]):
            assert isinstance(sgd.minimize(loss, given), hetu.Tensor)  # type: ignore[arg-type]
