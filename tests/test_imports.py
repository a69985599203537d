"""Who may import whom, and what ``import hetu`` loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from import_direction import violations

PACKAGE = Path(__file__).resolve().parent.parent / "hetu"


def test_imports_point_one_way() -> None:
    assert violations(PACKAGE) == []


def found_in(tmp_path: Path, name: str, text: str) -> list[str]:
    path = tmp_path / "hetu" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return violations(tmp_path / "hetu")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("graph/node.py", "from hetu.parallel import Layout", "graph may not know parallel"),
        ("parallel/layout.py", "import hetu.graph.node", "parallel may not know graph"),
        ("parallel/layout.py", "from ..graph import Node", "parallel may not know graph"),
        ("symbols/__init__.py", "from ..ops import add", "symbols may not know ops"),
        ("symbols/leaf.py", "from hetu import executor", "symbols may not know executor"),
        ("symbols/leaf.py", "from .. import ops", "symbols may not know ops"),
        ("ops/add.py", "import hetu", "ops may not know __init__"),
        ("ops/add.py", "def f():\n    import torch", "ops is built without torch"),
        ("ops/add.py", "async def f():\n    from torch.nn import functional", "ops is built without torch"),
        ("ops/add.py", "if TYPE_CHECKING:\n    import torch", "ops is built without torch"),
        ("graph/node.py", "import triton.language as tl", "graph is built without triton"),
        ("parallel/plan.py", "importlib.import_module('torch')", "parallel is built without torch"),
        ("parallel/plan.py", "importlib.import_module('to' + 'rch')", "parallel imports by names that can be read"),
        ("graph/printing.py", "import networkx", "networkx is imported only in the functions that use it"),
        ("backends/torch/basic.py", "from hetu.executor import Executor", "backends may not know executor"),
        ("feeds.py", "import torch", "planner is built without torch"),
        ("__init__.py", "import torch", "__init__ is built without torch"),
        ("errors.py", "from hetu.dtypes import float32", "errors may not know dtypes"),
        ("attic/old.py", "", "attic stands on no floor"),
        ("ops/add.py", "from hetu.attic import old", "attic stands on no floor"),
    ],
)
def test_wrong_direction_is_found(tmp_path: Path, name: str, text: str, why: str) -> None:
    (line,) = found_in(tmp_path, name, text)
    assert why in line
    assert f"{name}:" in line


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("graph/node.py", "from hetu.symbols import IntSymbol\nfrom hetu.graph.tensor import Tensor\nimport numpy"),
        ("graph/printing.py", "def draw():\n    import networkx"),
        ("graph/printing.py", "if TYPE_CHECKING:\n    import networkx"),
        ("backends/torch/basic.py", "import torch\nfrom hetu.ops import add\nfrom . import attention"),
        ("executor.py", "from hetu.binder import Binder\nfrom hetu.backends import lower\nimport torch"),
        ("binder.py", "from hetu.subgraph import Subgraph\nfrom hetu.ops import add"),
        ("__init__.py", "from hetu import graph\ndef f():\n    from hetu.executor import Executor"),
    ],
)
def test_right_direction_passes(tmp_path: Path, name: str, text: str) -> None:
    assert found_in(tmp_path, name, text) == []


def test_import_hetu_loads_no_framework() -> None:
    code = "import sys, hetu; hetu.IntSymbol; print(*sorted({'torch', 'triton', 'networkx'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
