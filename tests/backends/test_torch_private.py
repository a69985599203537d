"""The private APIs of torch that hetu uses: there are all of them here, and without any of them all comes out the same.

If a new torch lacks one, the first test names it. hetu works on with what stands for it, as the others show; give the
entry in ``hetu/backends/torch_private.py`` the new name, or make the public way the only one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hetu
from hetu.backends.torch_private import ON_CUDA_ONLY, PRIVATE, apply_of, version_of

PACKAGE = Path(hetu.__file__).parent


@pytest.mark.parametrize("name", PRIVATE)
def test_torch_has_it(name: str) -> None:
    if name in ON_CUDA_ONLY and torch.version.cuda is None:
        pytest.skip("torch is built without CUDA")
    assert PRIVATE[name][0] is not None, f"torch {torch.__version__} has no torch.{name}: hetu takes a slower way"


def test_no_other_file_uses_any() -> None:
    """``torch._anything`` and ``sys._anything``, however deep; ATen's private ops have files of their own."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and path.name != "torch_private.py":
                name = ast.unparse(node)
                if name.startswith(("torch.", "dist.", "sys.", "fx.")) and "._" in name and "__" not in name:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}")
                if node.attr in ("_version", "_root", "_data"):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}")
    assert [line for line in found if not line.startswith("config.py")] == []


CALLS = """
import sys, importlib.util
if sys.argv[1] == "without":  # as if torch had none of them
    path = sys.argv[2]
    source = open(path).read()
    assert source.count('getattr(x, "_version", None)') == source.count('getattr(base, "apply", ') == 1
    source = source.replace("def _find(name", "def _find(name):\\n    return None\\n\\n\\ndef _unused(name")
    source = source.replace('getattr(x, "_version", None)', "None").replace('getattr(base, "apply", ', '(')
    assert source.count('getattr(forward_ad, "_current_level", 0)') == 1
    source = source.replace('getattr(forward_ad, "_current_level", 0)', "0")
    spec = importlib.util.spec_from_loader("hetu.backends.torch_private", None)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(compile(source, path, "exec"), module.__dict__)
import hashlib, numpy as np, torch, hetu
from torch.utils._python_dispatch import TorchDispatchMode
from hetu.backends import torch_private
from hetu.functional import attn_varlen
assert (torch_private.flash_attention_cpu is None) == (sys.argv[1] == "without")
torch.manual_seed(0)
q, cu = torch.randn(12, 2, 16), torch.tensor([0, 5, 12])
def show(name, *tensors):
    print(name, *(x.double().abs().sum().mul(1e4).round().item() for x in tensors), *(str(x.dtype) for x in tensors))
def call():
    x = q.clone().requires_grad_()
    out = attn_varlen(x, x, x, cu, cu, is_causal=True)
    out.float().sum().backward()
    return out.detach(), x.grad
show("plain", *call())
with torch.autocast("cpu", dtype=torch.bfloat16):
    show("autocast", attn_varlen(q, q, q, cu, cu).float().mean().round(decimals=2))
class Mode(TorchDispatchMode):
    seen = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Mode.seen += "hetu" in str(func)
        return func(*args, **(kwargs or {}))
with Mode():
    show("mode", *call())
print("seen", Mode.seen)
changed = torch.tensor([0, 5, 12])
first = attn_varlen(q, q, q, changed, changed)
changed[1] = 9
show("changed", first, attn_varlen(q, q, q, changed, changed))
with hetu.graph("define_and_run", device="cpu") as g:
    qkv = hetu.placeholder(hetu.float32, [12, 48])
    out = hetu.parallel_attn(qkv, 16, 1, [[12]], [[0]])[0]
    grad = hetu.gradients(out, [qkv])[0]
with torch.autocast("cpu", dtype=torch.bfloat16):
    show("graph", *g.run([out, grad], {qkv: np.linspace(-1, 1, 12 * 48, dtype=np.float32).reshape(12, 48)}))
print(torch.is_grad_enabled(), torch_private.is_any_autocast_enabled())
try:
    attn_varlen(q, q, q, cu, cu, max_seqlen_q=1)
except hetu.BindingError as error:
    print("where:" in str(error))
"""


def test_without_any_of_them_all_is_the_same() -> None:
    path = str(PACKAGE / "backends" / "torch_private.py")
    told = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", CALLS, how, path], capture_output=True, text=True)
        for how in ("with", "without")
    ]
    assert not [run.stderr for run in told if run.returncode]
    one, other = (run.stdout.split() for run in told)
    assert len(one) == len(other) and "seen 2" in told[0].stdout
    for mine, theirs in zip(one, other, strict=True):  # sums that are rounded to whole numbers may fall either way
        assert mine == theirs or abs(float(mine) - float(theirs)) <= 1


def test_what_stands_for_each_says_the_same() -> None:
    """Those that say something of torch's state; of who watches they may say that somebody does."""

    def both(name: str) -> list[object]:
        return [way() for way in PRIVATE[name]]

    assert both("_C._is_any_autocast_enabled") == [False, False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert both("_C._is_any_autocast_enabled") == [True, True]
        for disabled in both("_C._DisableAutocast"):
            with disabled:  # type: ignore[attr-defined]
                assert both("_C._is_any_autocast_enabled") == [False, False]
            assert both("_C._is_any_autocast_enabled") == [True, True]
    assert both("_C._get_tracing_state") == [None, None]
    traced: list[object] = []
    torch.jit.trace(lambda x: traced.extend(both("_C._get_tracing_state")) or x + 1, torch.ones(2))
    is_none = [state is None for state in traced]  # the function is called again without being traced, to compare
    assert is_none[::2] == is_none[1::2] and not is_none[0]
    for switch in PRIVATE["_C._set_grad_enabled"]:
        switch(False)
        assert not torch.is_grad_enabled()
        switch(True)
        assert torch.is_grad_enabled()
    assert PRIVATE["_C._len_torch_dispatch_stack"][1]() > 0
    assert PRIVATE["_C._functorch.peek_interpreter_stack"][1]() is not None
    assert PRIVATE["_C._autograd._profiler_enabled"][1]() is True


def test_versions_and_functions() -> None:
    x = torch.zeros(2)
    before = version_of(x)
    x += 1
    assert before is not None and version_of(x) == before + 1
    assert version_of(object()) is None  # type: ignore[arg-type]

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return 2 * grad

    y = torch.ones(3, requires_grad=True)
    for apply in (apply_of(Twice), Twice.apply):
        (grad,) = torch.autograd.grad(apply(y).sum(), y)
        assert grad.tolist() == [2, 2, 2]
