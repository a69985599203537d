"""The Triton kernel of ``swiglu`` and its gradients, of a gate and a value that are the halves of one array."""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hetu.backends.memory import empty
from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.launcher import Constants, Launcher

TILE = 1024
"""Elements of each half that a program takes: 8 of half precision per thread, which are loaded at once."""


@jit(do_not_specialize=["rows"])
def swiglu_kernel(
    gate_up, grad, out, rows,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, IS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up`` of a contiguous ``(rows, 2 * HALF)``, or, by ``grad``, the gradient of both halves.

    All is computed in float32. The grid is ``(ceil(rows / BLOCK_R) * ceil(HALF / BLOCK_C),)``.
    """
    chunks: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows) & (column < HALF)
    one, both = row * HALF + column, row * (2 * HALF) + column
    gate = tl.load(gate_up + both, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + both + HALF, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if IS_GRADIENT:
        weight = sigmoid * tl.load(grad + one, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + both, weight * up * (1.0 + gate * (1.0 - sigmoid)), mask=mask)
        tl.store(out + both + HALF, weight * gate, mask=mask)
    else:
        tl.store(out + one, gate * sigmoid * up, mask=mask)


_launch = Launcher(swiglu_kernel, "rows")


def swiglu(gate_up: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up``, or its gradient by both.

    Args:
        gate_up: ``(..., 2 * half)``, the gate before the value, contiguous, float16 or bfloat16: its float32 is less
            exact than torch's.
        grad: ``(..., half)``, that of the result; None for the result itself.

    Returns:
        ``(..., half)``, or the gradient ``(..., 2 * half)``, of the array's dtype.
    """
    *outer, both = gate_up.shape
    half = both // 2
    out = empty((*outer, half if grad is None else both), gate_up.dtype, gate_up.device)
    if out.numel() == 0:
        return out
    rows = out.numel() // out.shape[-1]
    block_c = min(TILE, triton.next_power_of_2(half))
    block_r = TILE // block_c

    def constants() -> Constants:
        return {"HALF": half, "BLOCK_R": block_r, "BLOCK_C": block_c, "IS_GRADIENT": grad is not None}, {"num_warps": 4}

    programs = -(-rows // block_r) * -(-half // block_c)
    key = (gate_up.device, gate_up.dtype, None if grad is None else grad.dtype, half)
    # A kernel that doesn't read a gradient gets any address.
    given = gate_up if grad is None else grad.contiguous()
    _launch(
        gate_up.device, key, programs, _launch.arguments(gate_up=gate_up, grad=given, out=out, rows=rows), constants
    )
    return out
