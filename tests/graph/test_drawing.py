"""Pictures of graphs: the text in graphviz' language, its frames, and what happens without the program."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import hetu
from hetu.graph import drawing


def mlp(x: hetu.Tensor) -> hetu.Tensor:
    return hetu.relu(x @ hetu.parameter(0.1, [8, 8], name="up"))


class Block:
    def forward(self, x: hetu.Tensor) -> hetu.Tensor:
        return x + mlp(x)


def built() -> hetu.Graph:
    rows = hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", name='a "graph"', device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [rows, 8], name='x\\"')
        with hetu.recompute():
            y = Block().forward(x)
        hetu.gradients(hetu.sum(y * y), [x])
    return g


def test_every_node_and_every_use_is_drawn_once() -> None:
    g = built()
    text, networkx = g.to_dot(), g.to_networkx()
    boxes = re.findall(r'^ +"((?:[^"\\]|\\.)*)" \[label', text, re.MULTILINE)
    plain = [name.replace('\\"', '"').replace("\\\\", "\\") for name in boxes]
    assert sorted(plain) == sorted(node.name for node in g.nodes)
    edges = re.findall(r' -> .*\[label="(.*)"\];$', text, re.MULTILINE)
    assert sorted(edges) == sorted(data["type"] for _, _, data in networkx.edges(data=True))
    assert "float32[rows, 8]" in edges and "dashed" in text


def test_nodes_stand_in_the_frames_of_the_users_functions() -> None:
    text = built().to_dot()
    frames = dict(re.findall(r'subgraph "cluster_\d+" \{ label="([\w.]+)";[^\n]*\n(.*?)\n  \}', text, re.DOTALL))
    assert set(frames) == {"built", "mlp", "Block.forward"}
    assert '"up"' in frames["mlp"] and '"relu_0"' in frames["mlp"] and '"add_0"' in frames["Block.forward"]
    assert '"up"' not in frames["Block.forward"]


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_graphviz_draws_it(tmp_path: Path) -> None:
    g = built()
    for ending, begin in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        g.visualize(tmp_path / f"g.{ending}")
        assert (tmp_path / f"g.{ending}").read_bytes().startswith(begin)
    assert "<svg" in g._repr_html_() and "float32[rows, 8]" in g._repr_html_()


def test_without_graphviz_there_is_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing.shutil, "which", lambda name: None)
    g = built()
    with pytest.raises(hetu.HetuError, match="graphviz' program dot, which is not installed") as caught:
        g.visualize(tmp_path / "g.svg")
    assert "g.dot" in str(caught.value) and not (tmp_path / "g.svg").exists()
    g.visualize(tmp_path / "g.dot")
    assert (tmp_path / "g.dot").read_text() == g.to_dot()
    assert "<svg" not in g._repr_html_() and "&quot;graph&quot;" in g._repr_html_()
    with pytest.raises(hetu.HetuError, match=r"one of \.svg"):
        g.visualize(tmp_path / "g.doc")
