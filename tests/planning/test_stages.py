"""What stages say (HETU_DEBUG) and write (HETU_DUMP)."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import hetu


def run(times: int = 1) -> hetu.Graph:
    s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", device="cpu", name="told") as g:
        x = hetu.placeholder(hetu.float32, [rows, 24], name="x")
        out = hetu.parallel_attn(x, 8, 1, [[s // 3, s - s // 3]], [[0, 0]])[0]
    for _ in range(times):
        shards = hetu.Shards([np.ones((n, 24), np.float32) for n in (2, 4)])
        g.run(out, {x: shards}, int_symbol_dict={s: 6})
    return g


def stages(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage().splitlines()[0].split()[0] for record in caplog.records if record.name == "hetu"]
    return [name for i, name in enumerate(said) if i == 0 or name != said[i - 1]]


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hetu")


def test_every_stage_says_what_it_did(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETU_DEBUG", "1")
    run(times=2)
    once = [name for name in stages(caplog) if name != "plan"]
    assert once == ["bind", "select", "lower", "launch", "select", "launch"]  # the second run has all of it
    assert "21 pairs" in caplog.text and all(" ms " in record.getMessage() for record in caplog.records)
    assert "from int_symbol_dict" not in caplog.text


def test_levels_say_more(caplog: pytest.LogCaptureFixture) -> None:
    with hetu.config(debug=2):
        run()
    assert "s = 6, from int_symbol_dict" in caplog.text and "def forward" not in caplog.text
    with hetu.config(debug=3):
        run()
    assert "def forward" in caplog.text and "wait     for what comes from 0" in caplog.text


def test_nothing_is_said_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    run()
    assert stages(caplog) == []


def test_texts_are_written(tmp_path: Path) -> None:
    with hetu.config(dump=tmp_path):
        g = run(times=2)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("told-")
    texts = {path.name.split("-", 1)[1]: path.read_text() for path in folder.iterdir()}
    assert sorted(texts) == [
        "bind.txt",
        "graph.txt",
        "layout-parallel_attn_0.txt",
        "lower.py",
        "plan-parallel_attn_0.txt",
    ]
    assert texts["graph.txt"] == f"{g}\n" and texts["lower.py"] == f"{g.executor.executables()[0]}\n"
    assert "21 pairs" in texts["plan-parallel_attn_0.txt"] and "s = 6" in texts["bind.txt"]


def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(hetu.HetuError, match="debug"):
        hetu.config(debug=4)
    with pytest.raises(hetu.HetuError, match="dump"):
        hetu.config(dump=3)
    monkeypatch.setenv("HETU_DEBUG", "loud")
    with pytest.raises(hetu.HetuError, match="HETU_DEBUG is 'loud', expected 0 to 3"):
        run()


def test_a_run_of_nothing_is_told_too(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    g = run()
    with hetu.config(debug=3, dump=str(tmp_path)):
        assert g.run([]) == [] and g.run({}) == {}
    assert "bind" in stages(caplog)
