"""Positions of keys, which dropout asks for: made once for each step of a plan, and copied to a device once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hetu
from hetu.backends.triton import launch
from hetu.backends.triton.launcher import Launcher
from hetu.parallel.layout.layout import Layout


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_positions_are_made_and_copied_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *arguments: made.append(name) or function(*arguments)

    monkeypatch.setattr(Launcher, "__call__", lambda *_: None)
    with hetu.graph("define_and_run", device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 6 * 8])
        lists = [[12, 12]], [[0, 0]]
        out = hetu.parallel_attn(qkv, 8, 1, *lists, split="sym", method=method, p_dropout=0.5)[0]
        grad = hetu.gradients(out, [qkv])[0]
    feeds = {qkv: hetu.Shards([np.ones((12, 48), np.float32)] * 2)}
    counts = []
    for _ in range(3):
        with hetu.config(backend="triton"), monkeypatch.context() as patch:
            patch.setattr(Layout, "positions", noted("positions", Layout.positions))
            patch.setattr(launch, "copied_to", noted("copied", launch.copied_to))
            g.run([out, grad], feeds)
        counts.append((made.count("positions"), made.count("copied")))
        made.clear()
    assert counts[0][0] > 0 and counts[0][1] > 0
    assert counts[1:] == [(0, 0)] * 2, counts
