"""``rotary`` in torch: a table of angles once per run, then one output per rotation, written in place."""

from __future__ import annotations

import torch
from torch import fx

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import aside, traced_as


@aside
def hetu_rotary_table(positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines ``(T, 2, head_dim / 2)``; angles in float64, for float32 has no fractions at 2 ** 23."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(1) * base ** (pairs / -head_dim)
    table = angles.new_empty((len(angles), 2, head_dim // 2), dtype=dtype)
    table[:, 0], table[:, 1] = angles.cos(), angles.sin_()
    return table


def _plain_rotary(
    x: torch.Tensor, table: torch.Tensor, head_dim: int, num_heads: int, interleaved: bool, inverse: bool
) -> torch.Tensor:
    heads = x if x.ndim == 3 else x.unflatten(1, (x.shape[1] // head_dim, head_dim))
    wide, (cos, sin) = heads[:, :num_heads].to(table.dtype), table.unsqueeze(2).unbind(1)
    sin = -sin if inverse else sin
    if interleaved:
        a, b = wide.unflatten(-1, (head_dim // 2, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = wide.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned.to(x.dtype), heads[:, num_heads:]], 1).view(x.shape)


@traced_as(_plain_rotary)
def hetu_rotary(
    x: torch.Tensor, table: torch.Tensor, head_dim: int, num_heads: int, interleaved: bool, inverse: bool
) -> torch.Tensor:
    """Rotates the first ``num_heads`` heads by the table's angles, or back; the rest is copied."""
    out = x.new_empty(x.shape)
    old, new = (y if y.ndim == 3 else y.unflatten(1, (y.shape[1] // head_dim, head_dim)) for y in (x, out))
    rotate = _rotate_pairs if interleaved else _rotate_halves
    if num_heads and out.numel():
        cos, sin = table[:, 0].unsqueeze(1), table[:, 1].unsqueeze(1)
        rotate(old[:, :num_heads], cos, sin, inverse, new[:, :num_heads])
    new[:, num_heads:].copy_(old[:, num_heads:])
    return out


def _rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, out: torch.Tensor) -> None:
    half = x.shape[-1] // 2
    scaled = out if out.dtype == cos.dtype else out.new_empty(out.shape, dtype=cos.dtype)
    # A GPU's kernels convert what they read and write on the way; on a CPU torch makes a copy for each of them.
    wide, turned = (x.to(cos.dtype), scaled) if x.device.type == "cpu" else (x, out)
    torch.mul(wide.unflatten(-1, (2, half)), cos.unsqueeze(-2), out=scaled.unflatten(-1, (2, half)))
    sign = -1 if inverse else 1
    first, last = slice(None, half), slice(half, None)
    for own, other, factor in ((first, last, -sign), (last, first, sign)):
        torch.addcmul(scaled[..., own], wide[..., other], sin, value=factor, out=turned[..., own])
    if turned is not out:
        out.copy_(turned)


def _rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, out: torch.Tensor) -> None:
    # Neighbouring pairs are complex numbers in memory: one pass instead of four with gaps.
    turn = torch.complex(cos, -sin if inverse else sin)
    turned = out if out.dtype == cos.dtype else out.new_empty(out.shape, dtype=cos.dtype)
    x = x.to(cos.dtype)
    if x.stride(-1) != 1 or any(step % 2 for step in (x.storage_offset(), *x.stride()[:-1])):
        x = x.clone(memory_format=torch.contiguous_format)
    pairs = (y.unflatten(-1, (y.shape[-1] // 2, 2)) for y in (x, turned))
    numbers, result = map(torch.view_as_complex, pairs)
    torch.mul(numbers, turn, out=result)
    if turned is not out:
        out.copy_(turned)


@lowering("rotary_table", backend="torch")
def _rotary_table(cx: NodeLowering, positions: fx.Node) -> fx.Node:
    attrs = cx.node.attrs
    return cx.call(hetu_rotary_table, positions, attrs["head_dim"], attrs["base"], TORCH_DTYPES[attrs["dtype"]])


@lowering("rotary", backend="torch")
def _rotary(cx: NodeLowering, x: fx.Node, table: fx.Node) -> fx.Node:
    attrs = cx.node.attrs
    return cx.call(hetu_rotary, x, table, attrs["head_dim"], attrs["num_heads"], attrs["interleaved"], attrs["inverse"])
