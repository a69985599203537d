"""Where there is no GPU hetu's kernels are interpreted, and other users of Triton notice nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.interpreted_bits import digest

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU only")

TESTS = Path(__file__).parents[2]

COMPUTE = """
import os, subprocess, sys, torch, hetu
from hetu.functional import attn_varlen
torch.manual_seed(0)
q, cu = torch.randn(12, 2, 16), torch.tensor([0, 5, 12])
def run(backend):
    with hetu.config(backend=backend):  # with dropout kernels call the most of the library
        x = q.clone().requires_grad_()
        out = attn_varlen(x, x, x, cu, cu, is_causal=True, dropout_p=0.3, seed=3)
        out.sum().backward()
    return out.detach(), x.grad
def compute():
    for mine, want in zip(run("triton"), run("torch")):
        torch.testing.assert_close(mine, want, atol=1e-4, rtol=1e-4)
"""

COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
@triton.jit
def other(x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x, tl.sum(tl.load(x + i) + tl.zeros((SIZE,), tl.float32)))
def compiles():
    source = ASTSource(other, {"x": "*fp32", "SIZE": "constexpr"}, {"SIZE": 64})
    return bool(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def output(*script: str) -> list[str]:
    """What a process without ``TRITON_INTERPRET`` prints."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *script]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.fixture(scope="module")
def said() -> list[str]:
    """By a process that interprets as users' do: of its environment, of one that it started, and its bits."""
    child = "import os; print('TRITON_INTERPRET' in os.environ)"
    code = f"{COMPUTE}\ncompute()\nprint('TRITON_INTERPRET' in os.environ, flush=True)\n"
    code += f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    code += f"sys.path.append({str(TESTS)!r})\nfrom support.interpreted_bits import digest\nprint(digest())"
    return output("-c", code)


def test_the_environment_stays_as_it_was(said: list[str]) -> None:
    """Also that of processes which are started later."""
    assert said[:2] == ["False", "False"]


def test_the_interpreter_of_tests_gives_the_same_bits(said: list[str]) -> None:
    """What ``support/interpreter.py`` takes out of it changes no result."""
    assert said[2:] == [digest()]


@pytest.mark.parametrize("is_first", [True, False])
def test_others_compile_before_and_after(is_first: bool, tmp_path: Path) -> None:
    """Kernels of others use functions of Triton's library, whichever of the two imports Triton first."""
    begin = [COMPUTE, "compute()", COMPILE] if is_first else [COMPILE, "print(compiles())", COMPUTE]
    path = tmp_path / "script.py"  # Triton reads the source of kernels from a file
    path.write_text("\n".join([*begin, "compute()", "print(compiles())", "compute()", "print(compiles())"]))
    assert set(output(str(path))) == {"True"}
