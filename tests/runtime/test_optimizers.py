"""Optimisers against torch's own, and what a step does with gradients."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.runtime import optimizers

RNG = np.random.default_rng(0)
X, Y = (RNG.standard_normal(shape).astype(np.float32) for shape in ((12, 5), (12, 3)))
W, B = (RNG.standard_normal(shape).astype(np.float32) for shape in ((3, 5), (3,)))


class Regression:
    """A linear model with the sum of squares as its loss: sums over rows, so that parts of a batch add up."""

    def __init__(self, optimizer: Any, parameters: Any = None, **options: Any) -> None:
        rows = hetu.IntSymbol("rows")
        with hetu.graph("define_and_run", device="cpu") as self.graph:
            self.x = hetu.placeholder(hetu.float32, [rows, 5], name="x")
            self.y = hetu.placeholder(hetu.float32, [rows, 3], name="y")
            self.w = hetu.parameter(W, [3, 5], name="w")
            self.b = hetu.parameter(B, [3], name="b", requires_grad=options.pop("train_b", True))
            error = hetu.linear(self.x, self.w, self.b) - self.y
            self.loss = hetu.sum(error * error)
            named = {"w": self.w, "b": self.b}
            groups = None if parameters is None else parameters(named)
            self.train = optimizer.minimize(self.loss, groups)

    def run(self, fetch: Any, rows: Any = slice(None), **options: Any) -> Any:
        return self.graph.run(fetch, {self.x: X[rows], self.y: Y[rows]}, **options)

    def values(self) -> list[torch.Tensor]:
        return self.graph.run([self.w, self.b])


def by_torch(make: Any, steps: int, max_norm: float | None = None, schedule: Any = None) -> tuple[list[float], Any]:
    w, b = (torch.tensor(value, requires_grad=True) for value in (W, B))
    optimizer = make(w, b)
    plan = schedule(optimizer) if schedule else None
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        error = torch.nn.functional.linear(torch.from_numpy(X), w, b) - torch.from_numpy(Y)
        loss = (error * error).sum()
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([w, b], max_norm)
        optimizer.step()
        if plan is not None:
            plan.step()
        losses.append(float(loss.detach()))
    return losses, [w.detach(), b.detach()]


UNREACHED = {
    "a target behind stop_gradient": lambda w, other: w - hetu.stop_gradient(other),
    "a threshold": lambda w, other: hetu.where(w > other, w, 2.0 * w),
    "an index": lambda w, other: w * hetu.sum(hetu.gather(w, 0, hetu.cast(other * 0.0, "int64"))),
    "a cast to an int": lambda w, other: w * hetu.cast(hetu.cast(other, "int32"), "float32"),
}


@pytest.mark.parametrize("use", UNREACHED)
def test_what_no_gradient_reaches_is_left_alone(use: str) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        w, other = (hetu.parameter(1.0, [2], name=name) for name in ("w", "other"))
        loss = hetu.sum(UNREACHED[use](w, other))
        train = hetu.optim.SGD(lr=0.5, weight_decay=0.1).minimize(loss)
        alone = hetu.sum(hetu.stop_gradient(w))
        with pytest.raises(hetu.HetuError, match="there is nothing to train"):
            hetu.optim.SGD(lr=0.5).minimize(alone)
        with pytest.raises(hetu.HetuError, match="depends on other"):  # asked for by name, and in vain
            hetu.optim.SGD(lr=0.5).minimize(loss, [w, other])
    g.run(train)
    assert g.run(other).tolist() == [1.0, 1.0]
    assert g.run(w).tolist() != [1.0, 1.0]
    assert train.op.attrs["parameters"] == ("w",)


def check(model: Regression, losses: list[float], values: list[torch.Tensor]) -> None:
    got = [float(model.run(model.train)) for _ in losses]
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    for mine, theirs in zip(model.values(), values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SGD", {"lr": 1e-3}),
        ("SGD", {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("Adam", {"lr": 1e-2, "betas": (0.8, 0.9)}),
        ("AdamW", {"lr": 1e-2, "weight_decay": 0.2}),
    ],
)
def test_ten_steps_are_torchs(kind: str, options: dict[str, Any]) -> None:
    losses, values = by_torch(lambda w, b: getattr(torch.optim, kind)([w, b], **options), 10)
    check(Regression(getattr(hetu.optim, kind)(**options)), losses, values)


def test_clipping_is_torchs() -> None:
    losses, values = by_torch(lambda w, b: torch.optim.SGD([w, b], lr=0.05), 6, max_norm=1.5)
    check(Regression(hetu.optim.SGD(lr=0.05, max_grad_norm=1.5)), losses, values)


def test_schedules_are_torchs() -> None:
    schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)
    losses, values = by_torch(lambda w, b: torch.optim.SGD([w, b], lr=1e-2), 6, schedule=schedule)
    check(Regression(hetu.optim.SGD(lr=1e-2, schedule=schedule)), losses, values)


def test_a_schedule_that_looks_at_the_loss() -> None:
    schedule = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.99)
    model = Regression(hetu.optim.SGD(lr=1e-6, schedule=schedule))
    for _ in range(3):
        model.run(model.train)
    assert model.graph.state_dict()["optimizers"]["update_0"]["groups"][0]["lr"] < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_schedule_sees_the_loss_of_all_runs_of_a_step(dtype: str) -> None:
    """The last run's alone went up: 10 is followed by 9, and by 8."""
    seen = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            seen.append(metrics)

    with hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(1.0, [1], dtype, name="w")
        x = hetu.placeholder(dtype, [1], name="x")
        loss = hetu.sum(w * 0.0 + x)
        first, second = (hetu.optim.SGD(schedule=Plateau).minimize(loss, name=name) for name in ("one", "two"))
    for waiting, last in (([9.0], [1.0]), ([4.0], [2.0, 3.0]), ([], [5.0, 3.0])):
        for value in waiting:
            g.run([first, second], {x: [value]}, run_level="grad")
            g.load_state_dict(g.state_dict())  # it is part of the state
        feed = [[value] for value in last] if len(last) > 1 else last
        assert g.run(first, {x: feed}, num_micro_batches=len(last)) == sum(last)
        g.run(second, {x: [0.0]})
    assert seen == [10.0, 9.0, 9.0, 4.0, 8.0, 0.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("pipelines", [1, 3])
def test_gradients_are_added_and_clipped_in_at_least_float32(dtype: str, pipelines: int) -> None:
    """The sums overflow float16, and what the last ones add is lost in bfloat16."""
    with hetu.graph("define_and_run", device="cpu") as g:
        a = hetu.parameter(1.0, [2], dtype, name="a")
        b = hetu.parameter(1.0, [2], name="b")
        x = hetu.placeholder("float32", [], name="x")
        loss = (hetu.sum(hetu.cast(a, "float32")) + hetu.sum(b)) * x
        train = hetu.optim.SGD(lr=0.5, max_grad_norm=1.0).minimize(loss)
        norm = hetu.optim.grad_norm(train)
    feeds = lambda value: {x: hetu.Shards([value] * pipelines)}  # noqa: E731
    g.run(norm, feeds(np.float32(30208.0)), run_level="grad")
    assert g.run(norm, feeds(np.float32(19968.0)), run_level="grad").item() == pytest.approx(2 * 50176 * pipelines)
    assert g.run(norm, feeds(np.float32(2.0))).item() == pytest.approx(2 * 50178 * pipelines, rel=1e-6)
    assert [*g.run(a).tolist(), *g.run(b).tolist()] == pytest.approx([0.75] * 4, abs=1e-3)


def test_groups_have_their_own_options() -> None:
    losses, values = by_torch(
        lambda w, b: torch.optim.AdamW([{"params": [w], "weight_decay": 0.5}, {"params": [b], "lr": 0.1}], lr=0.01), 5
    )
    groups = lambda p: [{"params": [p["w"]], "weight_decay": 0.5}, {"params": [p["b"]], "lr": 0.1}]  # noqa: E731
    check(Regression(hetu.optim.AdamW(lr=0.01), groups), losses, values)


def test_only_what_asks_for_it_is_trained() -> None:
    model = Regression(hetu.optim.SGD(lr=1e-3), train_b=False)
    model.run(model.train)
    w, b = model.values()
    assert torch.equal(b, torch.from_numpy(B))
    assert not torch.equal(w, torch.from_numpy(W))


def test_the_norm_of_the_gradients() -> None:
    model = Regression(hetu.optim.SGD(lr=0.0, max_grad_norm=0.1))
    grads = hetu.gradients(model.loss, [model.w, model.b])
    _, norm, *values = model.run([model.train, hetu.optim.grad_norm(model.train), *grads])
    torch.testing.assert_close(norm, torch.cat([x.flatten() for x in values]).norm())


def test_uneven_micro_batches_are_one_batch() -> None:
    parts = [slice(0, 1), slice(1, 8), slice(8, 12)]
    one, many = (Regression(hetu.optim.AdamW(lr=1e-2)) for _ in range(2))
    for _ in range(3):
        loss = one.run(one.train)
        feeds = {many.x: [X[part] for part in parts], many.y: [Y[part] for part in parts]}
        same = many.graph.run(many.train, feeds, num_micro_batches=3)
        torch.testing.assert_close(same, loss, rtol=1e-5, atol=0)
    for a, b in zip(one.values(), many.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_wait_for_the_update() -> None:
    one, many = (Regression(hetu.optim.SGD(lr=1e-3)) for _ in range(2))
    one.run(one.train)
    before = many.values()
    many.run(many.train, slice(0, 5), run_level="grad")
    assert all(torch.equal(a, b) for a, b in zip(before, many.values(), strict=True))
    many.run(many.train, slice(5, 6), run_level="grad")
    many.run(many.train, slice(6, 12))
    for a, b in zip(one.values(), many.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert many.graph.state_dict()["gradients"] == {}


def test_compute_only_computes_no_gradient() -> None:
    model = Regression(hetu.optim.SGD(lr=1e-3))
    before = model.values()
    loss, norm = model.run([model.train, hetu.optim.grad_norm(model.train)], run_level="compute_only")
    torch.testing.assert_close(loss, model.run(model.loss))
    assert norm.isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, model.values(), strict=True))
    assert model.graph.state_dict()["gradients"] == {}


def test_fetches_beside_the_update_are_of_before_it() -> None:
    model = Regression(hetu.optim.SGD(lr=1e-3))
    w, loss, train = model.run([model.w, model.loss, model.train])
    assert torch.equal(w, torch.from_numpy(W))
    assert torch.equal(loss, train)
    assert not torch.equal(model.values()[0], w)


def test_gradients_that_are_one_tensor_are_clipped_once() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        a, b = (hetu.parameter(1.0, [4], name=name) for name in "ab")
        loss = hetu.sum(a + b)
        grads = hetu.gradients(loss, [a, b])
        train = hetu.optim.SGD(lr=1.0, max_grad_norm=1.0).minimize(loss)
    _, da, db = g.run([train, *grads])
    assert da.tolist() == db.tolist() == [1.0] * 4, "what was fetched is not what the optimiser changes"
    for value in g.run([a, b]):
        torch.testing.assert_close(value, torch.full((4,), 1 - 8**-0.5))


def test_a_run_that_fails_changes_nothing() -> None:
    model = Regression(hetu.optim.Adam(lr=1e-2))
    model.run(model.train)
    before = model.graph.state_dict()
    with pytest.raises(hetu.HetuError):
        model.graph.run(model.train, {model.x: [X, X[:, :4]], model.y: [Y, Y]}, num_micro_batches=2)
    after = model.graph.state_dict()
    assert after["gradients"] == {}
    for name in "wb":
        assert torch.equal(before["parameters"][name], after["parameters"][name])


def test_two_optimisers_keep_apart() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        a, b = (hetu.parameter(1.0, [], name=name) for name in "ab")
        loss = a * b * b
        first = hetu.optim.SGD(lr=0.5).minimize(loss, [a])
        second = hetu.optim.SGD(lr=0.25).minimize(loss, [b])
    g.run([first, second])
    assert [float(x) for x in g.run([a, b])] == [0.5, 0.5]
    g.run(first)
    assert [float(x) for x in g.run([a, b])] == [0.375, 0.5]


def refused(build: Any, error: type[hetu.HetuError], message: str) -> None:
    with hetu.graph("define_and_run", device="cpu"):
        w = hetu.parameter(1.0, [2], name="w")
        with pytest.raises(error) as caught:
            build(w)
    assert message in str(caught.value)
    assert "test_optimizers.py:" in str(caught.value)


def test_what_minimize_refuses() -> None:
    sgd = hetu.optim.SGD()
    refused(lambda w: sgd.minimize(w), hetu.ShapeError, "the loss has shape [2]")
    refused(lambda w: sgd.minimize(hetu.constant(1)), hetu.DTypeError, "floating tensor")
    refused(lambda w: sgd.minimize(hetu.constant(1.0)), hetu.HetuError, "nothing to train")
    refused(lambda w: sgd.minimize(hetu.sum(w), [w, w]), hetu.HetuError, "named twice")
    refused(lambda w: sgd.minimize(hetu.sum(w), [hetu.sum(w)]), hetu.HetuError, "it is no parameter")
    refused(lambda w: hetu.optim.SGD(max_grad_norm=0), hetu.HetuError, "max_grad_norm is 0")
    refused(lambda w: hetu.optim.grad_norm(w), hetu.HetuError, "nothing that minimize gave")
    other = lambda w: sgd.minimize(hetu.sum(w), [hetu.parameter(0.0, [1], name="other")])  # noqa: E731
    refused(other, hetu.HetuError, "no y depends on other")


def test_there_is_no_such_run_level() -> None:
    model = Regression(hetu.optim.SGD())
    with pytest.raises(hetu.HetuError, match="there is no run_level 'train'"):
        model.run(model.train, run_level="train")


@pytest.fixture
def fused_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "FUSED_ON", {"cpu"})


def fused_groups(model: Regression) -> list[Any]:
    bound = model.graph.executor.state.optimizers[model.train.op]
    return [group["fused"] for group in bound.optimizer.param_groups]


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_some_devices_update_by_fused_kernels(kind: str, fused_on_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make = functools.partial(getattr(hetu.optim, kind), lr=1e-2, max_grad_norm=1.5)
    model = Regression(make())
    losses, values = by_torch(lambda w, b: getattr(torch.optim, kind)([w, b], lr=1e-2), 4, max_norm=1.5)
    found = [model.run(model.train).item() for _ in range(2)]
    state = model.graph.state_dict()
    assert fused_groups(model) == [True]
    assert [group["fused"] for group in state["optimizers"][model.train.op.name]["groups"]] == [None]
    other = Regression(make())
    other.graph.load_state_dict(state)
    assert fused_groups(other) == [True]
    monkeypatch.setattr(optimizers, "FUSED_ON", set())
    plain = Regression(make())  # on a device of the other kind
    plain.graph.load_state_dict(state)
    assert fused_groups(plain) == [None]
    for one in (model, other, plain):
        np.testing.assert_allclose([*found, *(one.run(one.train).item() for _ in range(2))], losses, rtol=1e-5)
        for mine, theirs in zip(one.values(), values, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}])
def test_kernels_that_the_user_chooses_are_taken(options: dict[str, bool], fused_on_cpus: None) -> None:
    def groups(named: Any) -> Any:
        return [{"params": [named["w"]], **options}, {"params": [named["b"]]}]

    one, grouped = Regression(hetu.optim.AdamW(**options)), Regression(hetu.optim.AdamW(), groups)
    for model in (one, grouped):
        model.run(model.train)
    assert fused_groups(one) == [options.get("fused")]
    assert fused_groups(grouped) == [options.get("fused"), True]
