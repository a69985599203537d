"""Norms in torch: its fused kernels where a device has them, few passes over memory where it does not."""

from __future__ import annotations

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import traced, traced_as
from hetu.backends.torch.common import as_rows, at_least_float32, outputs_of

aten = torch.ops.aten


def _plain_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = at_least_float32(x)
    rstd = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
    out = wide * rstd
    return (out if weight is None else out * weight).to(x.dtype), rstd


@traced_as(_plain_rms_norm)
def hetu_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``x * rstd * weight``, and ``rstd = 1 / sqrt(mean(x ** 2) + eps)`` of each row, ``(..., 1)``."""
    width = x.shape[-1]
    if x.device.type == "cuda":
        fused: tuple[torch.Tensor, torch.Tensor] = aten._fused_rms_norm(x, [width], weight, eps)
        return fused
    wide = at_least_float32(x)
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
    out = wide * rstd
    return (out if weight is None else out.mul_(weight)).to(x.dtype), rstd


def _plain_rms_norm_grad(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    dy, wide, width = at_least_float32(grad), at_least_float32(x), x.shape[-1]
    normed = wide * rstd
    scaled = dy if weight is None else dy * weight
    d_x = (rstd * (scaled - normed * ((scaled * normed).sum(-1, keepdim=True) / width))).to(x.dtype)
    return (d_x,) if weight is None else (d_x, as_rows(dy * normed).sum(0).to(weight.dtype))


@traced_as(_plain_rms_norm_grad)
def hetu_rms_norm_grad(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """``d_x = rstd * (grad * weight - x * rstd ** 2 * mean(grad * weight * x))``, and the weight's gradient."""
    width = x.shape[-1]
    if x.device.type == "cuda":
        d_x, d_weight = aten._fused_rms_norm_backward(grad, x, [width], rstd, weight, [True, weight is not None])
        return (d_x,) if weight is None else (d_x, d_weight)
    dy, rows, scale = as_rows(at_least_float32(grad)), as_rows(at_least_float32(x)), as_rows(rstd)
    product = dy * rows
    total = product.sum(1, keepdim=True) if weight is None else (product @ at_least_float32(weight)).unsqueeze(1)
    factor = total.mul_(scale.square()).div_(-width)
    d_weight = [] if weight is None else [product.mul_(scale).sum(0).to(weight.dtype)]
    d_x = torch.mul(rows, factor, out=product)  # whose memory is free by now
    d_x = d_x.add_(dy) if weight is None else d_x.addcmul_(dy, at_least_float32(weight))
    return d_x.mul_(scale).to(x.dtype).view(x.shape), *d_weight


@traced
def hetu_layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalised x, and the mean and ``1 / sqrt(var + eps)`` of each row, ``(..., 1)``."""
    x_, weight_, bias_ = _for_kernel(x, x, weight, bias)
    out, mean, rstd = aten.native_layer_norm(x_, x.shape[-1:], weight_, bias_, eps)
    return out.to(x.dtype), mean, rstd


@traced
def hetu_layer_norm_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The gradients of x and, as far as there are any, of weight and bias."""
    grad_, x_, weight_, bias_ = _for_kernel(x, grad, x, weight, bias)
    wanted = [True, weight is not None, bias is not None]
    found = aten.native_layer_norm_backward(grad_, x_, x.shape[-1:], mean, rstd, weight_, bias_, wanted)
    return tuple(item.to(x.dtype) for item, is_wanted in zip(found, wanted, strict=True) if is_wanted)


def _for_kernel(x: torch.Tensor, *operands: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Operands as the layer_norm kernel of x's device takes them: that of CUDA computes in float32 by itself."""
    return [item if item is None or x.device.type == "cuda" else at_least_float32(item) for item in operands]


@lowering("rms_norm", backend="torch")
def _rms_norm(cx: NodeLowering, x: fx.Node, weight: fx.Node | None) -> tuple[fx.Node, ...]:
    return outputs_of(cx, cx.call(hetu_rms_norm, x, weight, cx.node.attrs["eps"]))


@lowering("rms_norm_grad", backend="torch")
def _rms_norm_grad(cx: NodeLowering, *operands: fx.Node | None) -> tuple[fx.Node, ...]:
    return outputs_of(cx, cx.call(hetu_rms_norm_grad, *operands))


@lowering("layer_norm", backend="torch")
def _layer_norm(cx: NodeLowering, *operands: fx.Node | None) -> tuple[fx.Node, ...]:
    return outputs_of(cx, cx.call(hetu_layer_norm, *operands, cx.node.attrs["eps"]))


@lowering("layer_norm_grad", backend="torch")
def _layer_norm_grad(cx: NodeLowering, *operands: fx.Node | None) -> tuple[fx.Node, ...]:
    return outputs_of(cx, cx.call(hetu_layer_norm_grad, *operands))
