"""``cross_entropy`` in torch, block of rows by block of rows, so that it needs little memory of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.nn import functional

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import traced_as
from hetu.backends.torch.common import as_rows, checked_indices, looked_up

_BLOCK_ENTRIES = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are worked on at a time: enough to keep the device busy, few next to all of them."""


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_ENTRIES[logits.device.type] // max(1, logits.shape[1]))
    if logits.itemsize == 2:  # float32 copies of a quarter take less than the half precision that autograd keeps of all
        rows = min(rows, (len(logits) + 3) // 4)
    return (slice(start, start + rows) for start in range(0, len(logits), rows)) if len(logits) else iter(())


def _compute_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float32 if logits.itemsize == 2 else logits.dtype


def _plain_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    rows, targets = as_rows(logits), labels.reshape(-1, 1).long()
    counted = targets != ignore_index
    log_p = torch.log_softmax(rows, -1, dtype=_compute_dtype(logits))
    losses = torch.where(counted, -log_p.gather(1, torch.where(counted, targets, 0)), 0.0).squeeze(1)
    if reduction == "none":
        return losses.reshape(labels.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


@traced_as(_plain_cross_entropy)
def hetu_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    """The losses of all rows, or their sum or mean, in float32 at least."""
    rows, targets, dtype = as_rows(logits), labels.reshape(-1).long(), _compute_dtype(logits)
    losses = rows.new_empty(len(rows), dtype=dtype)
    for block in _blocks(rows):
        log_p = torch.log_softmax(rows[block], -1, dtype=dtype)
        losses[block] = functional.nll_loss(log_p, targets[block], ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses.reshape(labels.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


def _plain_cross_entropy_grad(
    grad: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor:
    rows, targets = as_rows(logits), labels.reshape(-1, 1).long()
    counted, scale = targets != ignore_index, grad.reshape(-1, 1)
    if reduction == "mean":
        scale = scale / counted.sum()
    places = torch.arange(rows.shape[1], device=rows.device)
    part = torch.softmax(rows, -1, dtype=_compute_dtype(logits)) - (places == targets).to(_compute_dtype(logits))
    return torch.where(counted, part * scale, 0.0).to(logits.dtype).reshape(logits.shape)


@traced_as(_plain_cross_entropy_grad)
def hetu_cross_entropy_grad(
    grad: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor:
    """``(softmax - onehot) * grad``, made in the memory that it is returned in, or in blocks of float32."""
    out = logits.new_empty(logits.shape)
    rows, outs = as_rows(logits), as_rows(out)
    targets, dtype = labels.reshape(-1).long(), _compute_dtype(logits)
    counted = targets != ignore_index
    scale = grad.reshape(-1) / counted.sum() if reduction == "mean" else grad.reshape(-1)
    # Ignored rows get a factor of 0, a label that exists, and no gradient even where their softmax is NaN.
    ignored = (~counted).unsqueeze(1)
    scale = torch.where(counted, scale, 0).unsqueeze(1)
    targets = torch.where(counted, targets, 0).unsqueeze(1)
    for block in _blocks(rows):
        part = torch.softmax(rows[block], -1, dtype=dtype, out=outs[block] if dtype == out.dtype else None)
        part.mul_(scale[block]).scatter_add_(1, targets[block], -scale[block])
        part.masked_fill_(ignored[block], 0.0)
        if dtype != out.dtype:
            outs[block] = part
    return out


@lowering("cross_entropy", backend="torch")
def _cross_entropy(cx: NodeLowering, logits: fx.Node, labels: fx.Node) -> fx.Node:
    attrs, checked = cx.node.attrs, checked_indices(cx, labels, "labels")
    losses = cx.call(hetu_cross_entropy, logits, checked, attrs["ignore_index"], attrs["reduction"])
    return looked_up(cx, losses, labels, "labels")


@lowering("cross_entropy_grad", backend="torch")
def _cross_entropy_grad(cx: NodeLowering, grad: fx.Node, logits: fx.Node, labels: fx.Node) -> fx.Node:
    operands = grad, logits, checked_indices(cx, labels, "labels")
    return cx.call(hetu_cross_entropy_grad, *operands, cx.node.attrs["ignore_index"], cx.node.attrs["reduction"])
