"""The error family: its form, and that what is refused is refused before anything is computed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends.comm import LocalComm, run_lock_step
from hetu.backends.lower.lowering import find_lowering
from hetu.errors import DOCS_URL, Where, caller
from hetu.parallel.plan.heads import Heads, Payload
from hetu.parallel.plan.instructions import Receive, Runs, Send
from hetu.runtime.executor import Executor

ROOT = Path(__file__).resolve().parent.parent
HEADS = Heads(num_q=1, num_kv=1, head_dim=8, itemsize=4).all

FAMILY = (
    hetu.ShapeError,
    hetu.DTypeError,
    hetu.UnboundSymbolError,
    hetu.BindingError,
    hetu.StrategyError,
    hetu.PlanError,
    hetu.LoweringError,
    hetu.CommunicationError,
)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_message_answers_four_questions(kind: type[hetu.HetuError]) -> None:
    where = caller()
    error = kind("n is 1, expected 2", op="op", where=where, bound=["n = 1   from x"], fix="bind n to 2")
    assert isinstance(error, hetu.HetuError)
    assert str(error).splitlines() == [
        "[op] n is 1, expected 2",
        f"  where:  test_errors.py:{where.lineno}   where = caller()",
        "  bound:  n = 1   from x",
        "  fix:    bind n to 2",
    ]
    assert str(kind("just this")) == "just this"


@pytest.mark.parametrize("kind", [hetu.HetuError, *FAMILY])
def test_a_traceback_ends_with_a_link_to_a_page_and_an_anchor_that_are_there(kind: type[hetu.HetuError]) -> None:
    below = type("Below", (kind,), {})  # a kind that no page tells of links to what it is a kind of
    for error in (kind("n is 1", fix="bind n"), below("n is 1")):
        link = "".join(traceback.format_exception_only(error)).splitlines()[-1].removeprefix("  more:   ")
        page, anchor = link.removeprefix(DOCS_URL).split("/#")
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert anchor in [line[3:].lower() for line in text.splitlines() if line.startswith("## ")]


def test_the_address_of_the_documentation_is_said_once() -> None:
    """The site's own address is this one, by ``docs/tools/hooks.py``."""
    files = [
        *(ROOT / "hetu").rglob("*.py"),
        *(ROOT / "docs").rglob("*.py"),
        ROOT / "mkdocs.yml",
        ROOT / "pyproject.toml",
    ]
    said = [
        path.name
        for path in files
        if re.search(r"^[^#\n]*= ?\"https://[^\"]*readthedocs", path.read_text("utf-8"), re.M)
    ]
    assert said == ["errors.py"]


def test_a_place_without_source() -> None:
    assert str(Where("/nowhere/train.py", 7)) == "train.py:7"


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails as soon as a run gets as far as computing."""

    def launch(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(Executor, "_launch", launch)


def graph() -> tuple[hetu.Graph, hetu.Tensor, hetu.Tensor, hetu.IntSymbol]:
    s = hetu.IntSymbol("s", max=64)
    with hetu.graph("define_and_run", num_strategy=2, device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24], name="x")
        out = hetu.parallel_attn(x, 8, 1, [[s], [s // 2, s - s // 2]], [[0], [0, 0]])[0]
    return g, x, out, s


def rows(count: int, dtype: Any = np.float32) -> Any:
    return np.zeros((count, 24), dtype)


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("feed", "symbols", "options", "error", "message"),
    [
        (None, {"s": 4}, {}, hetu.BindingError, "placeholder x is not fed"),
        (rows(4, int), {"s": 4}, {}, hetu.DTypeError, "x is float32, but int64 values were fed"),
        (torch.zeros(4, 24).half(), {"s": 4}, {}, hetu.DTypeError, "x is float32, but a torch.float16 tensor was fed"),
        (rows(4)[0], {"s": 4}, {}, hetu.ShapeError, "x has 2 dimensions"),
        (rows(4)[:, 1:], {"s": 4}, {}, hetu.BindingError, "shape of x, dimension 1 is 23, expected 24"),
        (rows(4), {"s": 65}, {}, hetu.BindingError, "s is 65 from int_symbol_dict, expected an int from 0 to 64"),
        (rows(4), {"s": 2.0}, {}, hetu.BindingError, "s is 2.0 (float) from int_symbol_dict, expected an int"),
        (rows(4), {"s": 3}, {}, hetu.BindingError, "qkv has 4 rows on pipeline 0"),
        (rows(4), {}, {}, hetu.UnboundSymbolError, "no value for s"),
        (rows(4), {"s": 4}, {"strategy": 2}, hetu.StrategyError, "there is no strategy 2 in a graph of 2"),
        (hetu.Shards([rows(4)] * 2), {"s": 4}, {}, hetu.StrategyError, "x was fed 2 shards"),
        ([rows(4)], {"s": 4}, {"num_micro_batches": 2}, hetu.HetuError, "a list of 1 for 2 micro-batches"),
        (
            rows(4),
            {"s": 4},
            {"num_micro_batches": 0},
            hetu.HetuError,
            "num_micro_batches to be an int from 1",
        ),
    ],
)
def test_bad_runs(feed: Any, symbols: dict[str, Any], options: Any, error: type[Exception], message: str) -> None:
    g, x, out, s = graph()
    with pytest.raises(error, match=re.escape(message)) as caught:
        g.run(
            out,
            feed_dict={} if feed is None else {x: feed},
            int_symbol_dict={s: symbols["s"]} if symbols else {},
            **{"strategy": 0, **options},
        )
    assert "where:  test_errors.py:" in str(caught.value)


@pytest.mark.usefixtures("nothing_computed")
def test_the_last_micro_batch_is_checked_before_the_first_is_computed() -> None:
    g, x, out, s = graph()
    with pytest.raises(hetu.BindingError, match="qkv has 5 rows"):
        g.run(out, {x: [rows(4), rows(5)]}, int_symbol_dict={s: 4}, strategy=0, num_micro_batches=2)


def test_fetching_and_feeding_what_is_not_there() -> None:
    g, x, out, s = graph()
    other = graph()[2]
    with pytest.raises(hetu.HetuError, match="no tensor of this graph"):
        g.run(other)
    with pytest.raises(hetu.BindingError, match="it is no placeholder"):
        g.run(out, {out: rows(4), x: rows(4)}, int_symbol_dict={s: 4}, strategy=0)


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(hetu.HetuError, match="no setting 'speed'"):
        hetu.config(speed=11)
    with pytest.raises(hetu.HetuError, match="no backend 'cuda'"):
        hetu.config(backend="cuda")


def test_an_op_that_no_backend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, out, _ = graph()
    from hetu.backends.lower import lowering

    monkeypatch.setattr(lowering, "_lowerings", {})
    with pytest.raises(hetu.LoweringError) as caught:
        find_lowering(out.op, "triton", torch.device("cpu"))
    text = str(caught.value)
    assert "triton: has no lowering of this op; torch: has no lowering of this op" in text
    assert "[parallel_attn]" in text and "where:  test_errors.py:" in text


def waiting(comm: LocalComm, transfer: int) -> Iterator[bool]:
    comm.receive(0, Receive(transfer, 1, 1, 0, 2, Payload.KV, HEADS), torch.empty(2, 2, 8))
    while not comm.done(0, transfer):
        yield False


def test_pipelines_that_wait_for_each_other() -> None:
    comm = LocalComm()
    with pytest.raises(hetu.CommunicationError, match="pipelines 0, 1 wait for each other"):
        run_lock_step([waiting(comm, 1), waiting(comm, 2)])


def test_rows_that_do_not_fit() -> None:
    comm = LocalComm()
    send = Send(1, 0, 0, Runs(np.array([0]), np.array([3])), Payload.KV, HEADS)
    comm.send(1, send, torch.zeros(3, 2, 8))
    with pytest.raises(hetu.CommunicationError, match="brings 3 rows, expected 2"):
        run_lock_step([waiting(comm, 1)])
    again = replace(send, transfer=2)
    comm.send(1, again, torch.zeros(3, 2, 8))
    with pytest.raises(hetu.CommunicationError, match="was sent twice"):
        comm.send(1, again, torch.zeros(3, 2, 8))
