"""Scripts in the form of PKU's Hetu run over hetu, and give what hetu's own calls give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.errors import HetuError, StrategyError
from hetu.integrations import pku_hetu as ht
from hetu.ops.common.other_names import OTHER_HETU

_numbers = itertools.count()


@pytest.fixture
def prefix() -> str:
    return f"test{next(_numbers)}"


def model(graph: Any, ns: Any, rows: Any, minimize: Callable[[hetu.Tensor], hetu.Tensor]) -> tuple[hetu.Tensor, ...]:
    """The same model by the names of either module."""
    seeded = torch.Generator().manual_seed(1)
    with graph:
        ids, labels = (ns.placeholder(ns.int64, [rows], name=name) for name in ("ids", "labels"))
        w = ns.parameter(lambda p: torch.nn.init.normal_(p, generator=seeded), [7, 6], name="w")
        loss = ns.mean(ns.cross_entropy(ns.matmul(ns.embedding(ids, w), ns.transpose(w, 0, 1)), labels))
        return ids, labels, w, loss, minimize(loss)


def test_a_training_script_is_hetus(prefix: str) -> None:
    old, new = ht.graph("define_and_run", create_new=True, prefix=prefix), hetu.Graph("define_and_run")
    ids, labels, w, loss, train = model(old, ht, 4, ht.AdamOptimizer(0.1, beta1=0.8).minimize)
    n, adam = hetu.IntSymbol("n"), hetu.optim.Adam(lr=0.1, betas=(0.8, 0.999))
    ids2, labels2, w2, loss2, train2 = model(new, hetu, n, adam.minimize)
    of_train: Any = train.graph
    rng = np.random.default_rng(0)
    for count, level in ((1, "update"), (2, "grad"), (3, "update"), (1, "compute_only")):
        batches = [(rng.integers(0, 7, size), rng.integers(0, 7, size)) for size in rng.integers(1, 9, count)]
        feeds, feeds2 = (
            {a: [x for x, _ in batches], b: [y for _, y in batches]} for a, b in ((ids, labels), (ids2, labels2))
        )
        got = of_train.run(
            loss,
            [loss, train],
            feed_dict=feeds,
            num_micro_batches=count,
            cur_strategy_id=0,
            run_level=ht.run_level(level),
        )
        one = {key: value[0] for key, value in feeds2.items()} if count == 1 else feeds2
        losses, of_run = new.run([loss2, train2], one, num_micro_batches=count, run_level=level)
        assert torch.equal(torch.atleast_1d(got[0]), torch.stack(losses) if count > 1 else losses[None])
        assert torch.equal(got[1], of_run)
        assert torch.equal(old.run(w)[0], new.run(w2))


@pytest.mark.parametrize(
    ("pattern", "split"), [("NORMAL", "normal"), ("SYM", "sym"), ("STRIPE", "stripe"), (None, "normal")]
)
def test_the_split_is_the_variables(
    prefix: str, monkeypatch: pytest.MonkeyPatch, pattern: str | None, split: str
) -> None:
    monkeypatch.delenv(ht.SPLIT_PATTERN, raising=False)
    if pattern is not None:
        monkeypatch.setenv(ht.SPLIT_PATTERN, pattern)
    s = ht.IntSymbol(1)
    with ht.graph("define_and_run", create_new=True, prefix=prefix, num_strategy=2) as g:
        qkv = ht.placeholder(ht.float32, [1, 48], name="qkv")
        out = ht.parallel_attn(qkv, 8, 1, [[s], [s // 2, s - s // 2]], [[0], [0, 0]])[0]
    assert out.op.attrs["split"] == split
    s.reset_data(9)
    rows = np.random.default_rng(3).standard_normal((9, 48)).astype(np.float32)
    (whole,) = g.run(out, [out], {qkv: rows})
    layout = g.layout(1, int_symbol_dict={s: 9})
    of_graph: Any = g.graph
    (shards,) = of_graph.run(out, [out], {qkv: [hetu.Shards(layout.scatter(rows))]}, {s: [9]}, 1, 1)
    np.testing.assert_allclose(layout.gather(shards), whole, atol=1e-6)


def test_an_unknown_pattern_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ht.SPLIT_PATTERN, "ZIGZAG")
    with ht.graph("define_and_run", create_new=True, prefix=prefix):
        qkv = ht.placeholder(ht.float32, [1, 48])
        with pytest.raises(StrategyError, match=r"SPLIT_PATTERN is 'ZIGZAG'[^$]*set it to NORMAL, SYM, STRIPE"):
            ht.parallel_attn(qkv, 8, 1, [[1]], [[0]])


def test_graphs_are_found_again(prefix: str) -> None:
    made = ht.graph("define_and_run", create_new=True, prefix=prefix, num_strategy=2)
    assert ht.graph("define_and_run", prefix=prefix) is ht.graph(made) is made.graph is made and made.num_strategy == 2
    assert ht.graph("define_and_run", create_new=True, prefix=prefix) is not made
    assert ht.graph("define_and_run") is ht.graph("define_and_run")
    with ht.graph("define_and_run", create_new=True, prefix=f"{prefix}tmp", tmp=True) as forgotten:
        assert ht.graph("define_and_run", prefix=f"{prefix}tmp") is forgotten
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: ht.graph("define_and_run", prefix=f"{prefix}tmp"), "there is no graph 'define_and_run' of prefix"),
        (lambda: ht.graph(made, num_strategy=3), "has 2 strategies, not 3"),
        (lambda: ht.graph(made, create_new=True), "can't be made new"),
        (lambda: ht.graph("define_and_run", tmp=True), "tmp needs a new graph"),
        (lambda: ht.graph("no kind", create_new=True, prefix=prefix), "kind"),
    ]
    for call, match in refused:
        with pytest.raises(HetuError, match=match):
            call()


def test_sizes_of_placeholders_are_symbols(prefix: str) -> None:
    with ht.graph("define_and_run", create_new=True, prefix=prefix) as g:
        ids = ht.placeholder(ht.int64, [2, 3])
        x = ht.placeholder(ht.float32, [2, 3])
        here, other = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu", "cuda")
        y = ht.data_transfer(ht.float64, ht.from_numpy(np.ones(2, np.float32)), here)
        with pytest.raises(HetuError, match=f"can't be moved to '{other}'"):
            ht.data_transfer(ht.float64, y, other)
    assert [size.get_data() for size in ids.symbolic_shape] == [2, 3] and all(s.is_leaf for s in ids.symbolic_shape)
    assert x.symbolic_shape[0].is_leaf and x.symbolic_shape[1] == hetu.symbols.as_symbol(3)
    assert g.run(y)[0].dtype == torch.float64 and g.run([ids], {ids: np.ones((4, 5), np.int64)})[0].shape == (4, 5)


def test_levels() -> None:
    assert [ht.run_level(name) for name in ("update", "grad", "compute_only")] == [0, 1, 2] and ht.run_level() == 0
    for name in ("alloc", "topo"):
        with pytest.raises(HetuError, match="hetu has nothing to prepare"):
            ht.run_level(name)
    with pytest.raises(HetuError, match='expected type to be "update"'):
        ht.run_level("train")


@pytest.mark.parametrize("name", sorted(OTHER_HETU))
def test_other_names_say_what_to_use(name: str) -> None:
    if name in ht.__all__:
        return
    with pytest.raises(AttributeError, match="of another Hetu: use"):
        getattr(ht, name)


WARMED = {"init_lr": 0.02, "max_lr": 0.5, "min_lr": 0.1, "lr_warmup_steps": 2, "lr_decay_steps": 5}
RATES = {
    "constant": [0.26, 0.5, 0.5, 0.5, 0.5, 0.5],
    "linear": [0.26, 0.5, 0.5 - 0.4 / 3, 0.5 - 0.8 / 3, 0.1, 0.1],
    "cosine": [0.26, 0.5, 0.4, 0.2, 0.1, 0.1],
    "inverse-square-root": [0.26, 0.5, 0.5 * (2 / 3) ** 0.5, 0.5 * 0.5**0.5, 0.5 * 0.4**0.5, 0.1],
}
"""What Hetu's formula gives for the first updates, by hand."""


@pytest.mark.parametrize("style", RATES)
def test_a_schedule_is_hetus(prefix: str, style: str) -> None:
    def made(suffix: str) -> tuple[ht.Graph, hetu.Tensor, hetu.Tensor]:
        with ht.graph("define_and_run", create_new=True, prefix=prefix + suffix) as g:
            w = ht.parameter(0.0, [1], name="w")
            return g, w, ht.SGDOptimizer(**WARMED, lr_decay_style=style).minimize(ht.sum(w), name="train")

    g, w, step = made("a")
    seen = [0.0]
    for count in range(6):
        if count == 3:  # a saved schedule goes on
            saved = g.state_dict()
            g, w, step = made("b")
            g.load_state_dict(saved)
        g.run(step)
        seen.append(float(g.run(w)[0]))
    np.testing.assert_allclose(-np.diff(seen), RATES[style], rtol=1e-5)


def test_constructors_take_hetus_forms(prefix: str) -> None:
    with ht.graph("define_and_run", create_new=True, prefix=prefix) as g:
        v, w = (ht.parameter(1.0, [1], name=name) for name in "vw")
        loss = ht.sum(v * w)
        steps = [
            ht.SGDOptimizer([v], lr=0.5).minimize(loss),
            ht.SGDOptimizer(0.5, 0.0).minimize(loss, var_list=[v]),
            ht.SGDOptimizer(lr=0.5, vars=[w]).minimize(loss, [v], None, "third"),
        ]
    for step, left in zip(steps, (0.5, 0.0, -0.5), strict=True):
        g.run(loss, [loss, step], {}, {}, 1)
        assert [float(x) for x in g.run([v, w])] == [left, 1.0]
    fixed = ht.AdamOptimizer(**{**WARMED, "lr_warmup_steps": 0}, lr_decay_style="constant")
    assert fixed.options["lr"] == 0.5 and fixed.schedule is None
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: ht.AdamOptimizer(), "either lr or"),
        (lambda: ht.AdamOptimizer(0.1, init_lr=0.1), "either lr or"),
        (lambda: ht.AdamOptimizer(init_lr=0.1), "has no max_lr, min_lr"),
        (lambda: ht.AdamOptimizer(0.1, 0.9, 0.99, 1e-8, 3), "got 5 values"),
        (lambda: ht.AdamOptimizer(0.1, lr=0.1), "lr: given twice"),
        (lambda: ht.AdamOptimizer(learning_rate=0.1), "learning_rate: no argument of Hetu's"),
        (lambda: ht.AdamOptimizer(0.1, end_wd=0.1), "asks for weight decay"),
        (lambda: ht.SGDOptimizer(**WARMED, lr_decay_style="step"), "lr_decay_style"),
        (lambda: ht.SGDOptimizer(**{**WARMED, "min_lr": 0.6}, lr_decay_style="linear"), "between 0 and max_lr"),
        (lambda: ht.SGDOptimizer(**{**WARMED, "lr_warmup_steps": 5}, lr_decay_style="linear"), "not below"),
        (lambda: ht.SGDOptimizer(0.1).minimize(loss, grad_loss=loss), "multiply the loss"),
    ]
    for call, match in refused:
        with pytest.raises(HetuError, match=match):
            call()


def test_run_takes_hetus_other_forms(prefix: str) -> None:
    with ht.graph("define_and_run", create_new=True, prefix=prefix, num_strategy=2) as g:
        qkv = ht.placeholder(ht.float32, [4, 24], name="qkv")
        out = ht.parallel_attn(qkv, 8, 1, [[4], [2, 2]], [[0], [0, 0]])[0]
    rows = np.random.default_rng(5).standard_normal((4, 24)).astype(np.float32)
    (whole,) = g.run(out, [out], {qkv: rows}, num_tokens=4)
    halves = hetu.Shards([rows[:2], rows[2:]])
    (cut,) = g.run(out, [out], {qkv: [halves]}, compute_strategy_id=1, optimize_strategy_id=0)
    np.testing.assert_allclose(torch.cat(list(cut)), whole, atol=1e-6)
    for wrong, match in (
        ({"compute_strategy_id": 2}, "compute_strategy_id"),
        ({"optimize_strategy_id": -1}, "optimize_strategy_id"),
        ({"save_checkpoint": True}, r"no save_checkpoint here[^$]*hetu\.save"),
        ({"nonsense": 1}, "no nonsense here"),
    ):
        of_run: Any = g.run
        with pytest.raises(HetuError, match=match):
            of_run(out, [out], {qkv: rows}, **wrong)
