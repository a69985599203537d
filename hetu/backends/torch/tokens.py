"""``layout_tokens``: the plan's arrays as tensors on the device, copied there once a layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hetu.backends.lowering import NodeLowering, lowering
from hetu.backends.transfer import copied_to
from hetu.parallel.tokens import TokenTable


def hetu_layout_tokens(table: TokenTable, device: torch.device) -> list[torch.Tensor]:
    """Each pipeline's int64 ``(3, rows)`` table; a copy on the device, for what a run returns is the caller's."""
    if device not in table.memo:
        table.memo[device] = [copied_to(rows, device) for rows in table.pipelines]
    return [rows.clone() for rows in table.memo[device]]


@lowering("layout_tokens", backend="torch")
def _layout_tokens(cx: NodeLowering, x: Any, cu_seqlens: Any) -> list[tuple[fx.Node, ...]]:
    tables = cx.call(hetu_layout_tokens, cx.plan(), cx.device)
    rows = [cx.item(tables, r) for r in range(cx.num_pipelines)]
    return [tuple(cx.item(one, i) for i in range(3)) for one in rows]
