"""Which kernel family runs a call: the list in order, the reasons of those that decline, and who is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends import families
from hetu.backends.attention.family import AttendSignature, KernelFamily
from hetu.functional import attn_varlen
from hetu.functional.attention import calls_seen
from hetu.functional.attention import families as chosen_families

CPU = torch.device("cpu")


def signature(dtype: torch.dtype = torch.float32, head_dim: int = 16, **options: Any) -> AttendSignature:
    return AttendSignature(dtype, CPU, head_dim, 2, 1, **options)


class Middle(KernelFamily):
    """A family between Triton and torch: torch's kernels for float64 without dropout, and a count of its calls."""

    name = "middle"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def declines(self, signature: AttendSignature) -> str | None:
        return "it drops nothing" if signature.has_dropout else None

    def attend(self, call: Any, state: Any) -> None:
        self.calls.append("attend")
        families.family("torch").attend(call, state)

    def attend_backward(self, call: Any, state: Any, dk: Any, dv: Any, keeps: bool = False) -> None:
        self.calls.append("attend_backward")
        families.family("torch").attend_backward(call, state, dk, dv, keeps)


def forget() -> None:
    for found in (families.family, families.choose, chosen_families):
        found.cache_clear()
    calls_seen._items.clear()


@pytest.fixture
def middle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Middle]:
    """The recipe: a folder, and a line in the list."""
    folder = ModuleType("hetu.backends.middle")
    folder.FAMILY = Middle()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hetu.backends.middle", folder)
    for module in (families, sys.modules["hetu.config"]):
        monkeypatch.setattr(module, "BACKENDS", ("triton", "middle", "torch"))
    forget()
    yield folder.FAMILY  # type: ignore[attr-defined]
    forget()


def test_what_triton_declines_goes_to_the_next_one(middle: Middle) -> None:
    choice = families.choose("triton", signature(torch.float64))
    assert choice.family is middle and choice.declined == (("triton", "float64 has no kernel"),)
    choice = families.choose("triton", signature(torch.float64, has_dropout=True))
    assert str(choice) == "torch; triton declined: float64 has no kernel; middle declined: it drops nothing"
    assert families.choose("triton", signature()).family.name == "triton"


def test_the_setting_says_where_the_list_begins(middle: Middle) -> None:
    assert [str(families.choose(name, signature())) for name in ("triton", "middle", "torch")] == [
        "triton",
        "middle",
        "torch",
    ]
    with hetu.config(backend="middle"):
        assert families.default_backend(CPU) == "middle"
    assert families.default_backend(CPU) == "torch" and families.default_backend(torch.device("cuda")) == "triton"


def test_a_graph_and_a_function_choose_alike(middle: Middle) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3 * 16))
    with hetu.graph("define_and_run", device="cpu") as g:
        qkv = hetu.placeholder(hetu.float64, [5, 48])
        out = hetu.parallel_attn(qkv, 16, 1, [[5]], [[0]])[0]
        grad = hetu.gradients(out, [qkv])[0]
    with hetu.config(backend="triton"):
        first, _ = g.run([out, grad], {qkv: x})
        q, k, v = (torch.from_numpy(part.copy()).unflatten(1, (1, 16)).requires_grad_() for part in np.split(x, 3, 1))
        cu_seqlens = torch.tensor([0, 5])
        second = attn_varlen(q, k, v, cu_seqlens, cu_seqlens, is_causal=True)
    second.sum().backward()
    torch.testing.assert_close(torch.as_tensor(first), second.flatten(1).detach())
    assert middle.calls == ["attend", "attend_backward"] * 2


def test_an_executable_says_who_runs_what_and_why() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        rows = hetu.placeholder(hetu.float64, [5, 48])
        out = hetu.parallel_attn(rows, 16, 1, [[5]], [[0]])[0]
        grad = hetu.gradients(out, [rows])[0]
    with hetu.config(backend="triton"):
        g.run([out, grad], {rows: np.ones((5, 48))})
    (executable,) = g.executor.executables()
    text = str(executable)
    assert "(parallel_attn, test_families.py:" in text and "(parallel_attn_grad, test_families.py:" in text
    assert text.count("): torch; triton declined: float64 has no kernel") == 2
    assert "Options('torch', 1, 1, 16," in text, "and the code"


def test_a_library_that_is_not_installed_is_a_reason() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hetu; from hetu.backends.families import choose; "
        "from hetu.backends.attention.family import AttendSignature\n"
        "print(choose('triton', AttendSignature(torch.float32, torch.device('cpu'), 64, 2, 1)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "torch; triton declined: triton is not installed"


def test_a_family_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys, torch, hetu; from hetu.functional import attn_varlen\n"
        "q, cu = torch.zeros(3, 1, 8), torch.tensor([0, 3]); attn_varlen(q, q, q, cu, cu)\n"
        "print(*{'hetu.backends.triton', 'hetu.backends.eager'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["hetu.backends.eager"]


def test_no_family_takes_it(middle: Middle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(families.family("torch")), "declines", lambda self, signature: "it is tired")
    with pytest.raises(hetu.LoweringError, match="float64 has no kernel; middle: it drops nothing; torch: it is tired"):
        families.choose("triton", signature(torch.float64, has_dropout=True))


def test_only_families_knows_their_names() -> None:
    """No other file decides by the name of a family."""
    import ast
    from pathlib import Path

    found = []
    for path in Path(hetu.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = [item.value for item in ast.walk(node) if isinstance(item, ast.Constant)]
                if "triton" in words:
                    found.append(f"{path}:{node.lineno}")
    assert found == []
