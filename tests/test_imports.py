"""Who may import whom, and what ``import hetu`` loads."""

from __future__ import annotations

import ast
import re
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
        ("symbols/leaf.py", "from hetu.runtime import executor", "symbols may not know runtime"),
        ("symbols/leaf.py", "from .. import ops", "symbols may not know ops"),
        ("ops/add.py", "import hetu", "ops may not know __init__"),
        ("ops/add.py", "def f():\n    import torch", "ops is built without torch"),
        ("ops/add.py", "async def f():\n    from torch.nn import functional", "ops is built without torch"),
        ("ops/add.py", "if TYPE_CHECKING:\n    import torch", "ops is built without torch"),
        ("graph/node.py", "import triton.language as tl", "graph is built without triton"),
        ("parallel/plan.py", "importlib.import_module('torch')", "parallel is built without torch"),
        ("parallel/plan.py", "importlib.import_module('to' + 'rch')", "parallel imports by names that can be read"),
        ("graph/printing.py", "import networkx", "networkx is imported only in the functions that use it"),
        ("backends/torch/arithmetic.py", "from hetu.runtime.executor import Executor", "backends may not know runtime"),
        ("planning/feeds.py", "import torch", "planning is built without torch"),
        ("parallel/layout/layout.py", "from hetu.parallel.plan.parts import PlanData", "layout may not know plan"),
        ("parallel/proof/verify.py", "from hetu.parallel.methods import METHODS", "proof may not know methods"),
        ("parallel/plan/parts.py", "def f():\n    import hetu.parallel.attn_plan", "plan may not know attn_plan"),
        ("parallel/attic/old.py", "from hetu.parallel.mask import segments", "attic stands on no floor"),
        ("backends/lower/attention.py", "from hetu.backends.torch import common", "lower may not know torch"),
        ("backends/triton/launch.py", "from ..eager import attend", "triton may not know eager"),
        ("runtime/step.py", "from hetu.ops.common._own import f", "_own of ops is not for other rooms"),
        ("integrations/flash_attn.py", "import hetu.backends.families", "integrations may not know backends"),
        ("integrations/flash_attn.py", "import hetu.distributed", "integrations may not know distributed"),
        ("functional/varlen.py", "import hetu.integrations", "functional may not know integrations"),
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
        ("backends/torch/arithmetic.py", "import torch\nfrom hetu.ops import add\nfrom . import common"),
        (
            "runtime/executor.py",
            "from hetu.planning.binder import Binder\nfrom hetu.backends import lower\nimport torch",
        ),
        ("integrations/flash_attn.py", "import torch\nfrom hetu.functional import attn_varlen"),
        ("planning/binder.py", "from hetu.planning.subgraph import Subgraph\nfrom hetu.ops import add"),
        ("__init__.py", "from hetu import graph\ndef f():\n    from hetu.runtime.executor import Executor"),
    ],
)
def test_right_direction_passes(tmp_path: Path, name: str, text: str) -> None:
    assert found_in(tmp_path, name, text) == []


def write(folder: Path, **modules: str) -> list[str]:
    for name, text in modules.items():
        path = folder / "hetu" / f"{name.replace('_in_', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return violations(folder / "hetu")


def test_circles_are_found(tmp_path: Path) -> None:
    """Through three modules, one of which imports in a function."""
    a, b = "from hetu.ops.b import x", "from hetu.ops import c"
    (line,) = write(tmp_path, ops_in_a=a, ops_in_b=b, ops_in_c="def f():\n    import hetu.ops.a")
    assert "in a circle: hetu.ops.a, hetu.ops.b, hetu.ops.c" in line


def test_a_types_own_circle_may_be(tmp_path: Path) -> None:
    """Under TYPE_CHECKING, by a package's face, and in the rooms that say so."""
    assert write(tmp_path, graph_in_a="import hetu.graph.b", graph_in_b="import hetu.graph.a") == []
    typing = "if TYPE_CHECKING:\n    import hetu.ops.a"
    assert write(tmp_path, ops_in_a="import hetu.ops.b", ops_in_b=typing, ops_in___init__="import hetu.ops.a") == []


def test_what_is_too_large_is_found(tmp_path: Path) -> None:
    assert "a file of 451 lines" in write(tmp_path, ops_in_long="\n" * 451)[0]
    assert "25 modules in a folder" in write(tmp_path / "two", **{f"ops_in_m{i}": "" for i in range(25)})[0]


TESTS = Path(__file__).parent


def imported_tests(path: Path) -> list[str]:
    """The modules of tests that a file imports, each with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        found += [f"{path}:{node.lineno}: {name}" for name in names if re.search(r"(^|\.)(test_|conftest)", name)]
    return found


def test_no_test_module_is_imported() -> None:
    """What tests share stands in tests/support, so that each test module can be read, run and changed alone."""
    found = [line for path in sorted(TESTS.rglob("*.py")) for line in imported_tests(path)]
    assert not found


def test_an_imported_test_module_is_found(tmp_path: Path) -> None:
    path = tmp_path / "test_a.py"
    path.write_text("import ops.test_b\nfrom ops.test_c import check\ndef f():\n    from ops import test_d")
    assert [line.split(": ")[1] for line in imported_tests(path)] == [
        "ops.test_b",
        "ops.test_c.check",
        "ops.test_d",
    ]


def test_import_hetu_loads_no_framework() -> None:
    code = (
        "import sys, hetu; hetu.IntSymbol; print(*{'torch', 'triton', 'networkx', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
