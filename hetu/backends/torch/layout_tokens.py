"""``layout_tokens``: the plan's arrays as tensors on the device, copied there once a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import aside
from hetu.backends.memory import copied_to, device_copies
from hetu.parallel.layout.tokens import TokenTable


@aside
def hetu_layout_tokens(table: TokenTable, pipelines: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """Each pipeline's int64 ``(3, rows)`` table; a copy on the device, for what a run returns is the caller's."""
    return [_copy(table, r, device).clone() for r in pipelines]


def _copy(table: TokenTable, pipeline: int, device: torch.device) -> torch.Tensor:
    """A pipeline's table on a device, copied there once."""
    key = device, pipeline
    kept: torch.Tensor | None = table.copies.get(key)
    if kept is None:
        copy = copied_to(table.pipelines[pipeline], device)
        kept = device_copies.keep(table, key, copy, copy.nbytes)
    return kept


@lowering("layout_tokens", backend="torch")
def _layout_tokens(cx: NodeLowering, x: Any, cu_seqlens: Any) -> list[tuple[fx.Node, ...]]:
    tables = cx.call(hetu_layout_tokens, cx.plan(), cx.pipelines, cx.device)
    rows = [cx.item(tables, i) for i in range(len(cx.pipelines))]
    return [tuple(cx.item(one, i) for i in range(3)) for one in rows]
