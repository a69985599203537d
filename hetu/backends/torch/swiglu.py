"""``swiglu`` in torch, in few allocations, or by a kernel of its own where torch's would each go through memory."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import aside, traced, traced_as
from hetu.backends.torch.common import outputs_of
from hetu.dtypes import bfloat16, float16
from hetu.graph import Node

aten = torch.ops.aten


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


@traced
def hetu_swiglu(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """``silu(gate) * up`` in one allocation."""
    if up is None:
        gate, up = _halves(gate)
    return functional.silu(gate).mul_(up)


def _plain_swiglu_grad(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    if up is not None:
        return aten.silu_backward(grad * up, gate), functional.silu(gate) * grad
    dtype = gate.dtype
    # Each element of the result picks its half of what both halves compute, from one exponential. Of two halves that
    # are joined Inductor computes both for each element, with two, and that takes longer than the memory does.
    wide = torch.promote_types(dtype, torch.float32)
    gate, up = gate.unflatten(-1, (2, -1)).to(wide).split(1, -2)
    grad = grad.unsqueeze(-2).to(wide)
    sigmoid = torch.sigmoid(gate)
    is_gate = torch.arange(2, device=grad.device).unsqueeze(-1) == 0
    grads = sigmoid * grad * torch.where(is_gate, up * (1 + gate * (1 - sigmoid)), gate)
    return (grads.flatten(-2).to(dtype),)


@traced_as(_plain_swiglu_grad)
def hetu_swiglu_grad(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The gradients, computed in the memory that they are returned in."""
    outputs = tuple(x.new_empty(x.shape) for x in (gate, up) if x is not None)
    if up is None:
        gate, up = _halves(gate)
    d_gate, d_up = outputs if len(outputs) == 2 else _halves(outputs[0])
    torch.mul(grad, up, out=d_gate)
    aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    aten.silu.out(gate, out=d_up).mul_(grad)
    return outputs


@aside
def hetu_swiglu_kernel(gate_up: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """What Triton's kernel gives: ``silu(gate) * up``, or its gradient."""
    from hetu.backends.triton.swiglu import swiglu  # not before it is needed: importing Triton takes its time

    return swiglu(gate_up.contiguous(), grad)


def _is_not_for_the_kernel(node: Node, device: torch.device) -> str | None:
    """The kernel computes in float32, which is as good as torch's for half precision only."""
    gate, *up = node.tensors[node.definition.name == "swiglu_grad" :]
    if device.type != "cuda":
        return "Triton's kernel is for GPUs"
    if up or gate.symbolic_shape[-1].constant is None:
        return "Triton's kernel takes gate and value as the halves of one array, of a size that is a number"
    if gate.dtype not in (float16, bfloat16):
        return "Triton's kernel computes in float32"
    return None


@lowering("swiglu", backend="torch", declines=_is_not_for_the_kernel)
def _swiglu_by_kernel(cx: NodeLowering, gate: fx.Node, up: None) -> fx.Node:
    return cx.call(hetu_swiglu_kernel, gate)


@lowering("swiglu_grad", backend="torch", declines=_is_not_for_the_kernel)
def _swiglu_grad_by_kernel(cx: NodeLowering, grad: fx.Node, gate: fx.Node, up: None) -> tuple[fx.Node, ...]:
    return (cx.call(hetu_swiglu_kernel, gate, grad),)


@lowering("swiglu", backend="torch")
def _swiglu(cx: NodeLowering, gate: fx.Node, up: fx.Node | None) -> fx.Node:
    return cx.call(hetu_swiglu, gate, up)


@lowering("swiglu_grad", backend="torch")
def _swiglu_grad(cx: NodeLowering, grad: fx.Node, gate: fx.Node, up: fx.Node | None) -> tuple[fx.Node, ...]:
    return outputs_of(cx, cx.call(hetu_swiglu_grad, grad, gate, up))
