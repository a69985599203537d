"""Where an op is lowered: in the file of the same name as the one that defines it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import hetu
from hetu.graph import registry

PACKAGE = Path(hetu.__file__).parent
TORCH, LOWER = PACKAGE / "backends" / "torch", PACKAGE / "backends" / "lower"

DEFINED = {
    name: Path(*type(definition).__module__.split(".")[2:]).with_suffix(".py")
    for name, definition in registry().items()
    if type(definition).__module__.startswith("hetu.ops.")  # optimisers define an op that runs without a lowering
}
"""Each op's file in hetu/ops."""


def registered(path: Path) -> set[str]:
    """The ops that a file registers a lowering of."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.literal_eval(node.args[0]) for node in ast.walk(tree) if is_registration(node)}


def is_registration(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lowering"


def texts(path: Path) -> set[str]:
    """Every text of a file: attention's ops are registered in a loop over their names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


IN_TORCH = {path.name: registered(path) for path in TORCH.glob("*.py")}
IN_LOWER = {path.name: texts(path) for path in LOWER.glob("*.py")}


@pytest.mark.parametrize("name", DEFINED)
def test_an_op_is_lowered_in_the_file_of_its_name(name: str) -> None:
    """Those of ops/attention are the exception: they lower to kernels, in backends/lower/attention*.py."""
    in_torch = {file for file, names in IN_TORCH.items() if name in names}
    in_lower = {file for file, names in IN_LOWER.items() if name in names}
    if DEFINED[name].parent.name == "attention":
        assert not in_torch
        assert in_lower
        assert all(file.startswith("attention") for file in in_lower)
    else:
        assert in_torch == {DEFINED[name].name}
        assert not in_lower


def test_every_file_has_its_counterpart() -> None:
    """And every family's file is imported, or its ops would be missing everywhere."""
    ops = {path.name for path in (PACKAGE / "ops").glob("*.py")}
    assert {file.removesuffix(".py") for file in ops - {"__init__.py"}} <= {
        module.removeprefix("hetu.ops.") for module in sys.modules
    }
    assert set(IN_TORCH) - ops == {"common.py"}  # which has a folder there
