"""``layout_tokens``: the plan's arrays as tensors on the device, copied there once a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.memory import copied_to
from hetu.parallel.layout.tokens import TokenTable


def hetu_layout_tokens(table: TokenTable, pipelines: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """Each pipeline's int64 ``(3, rows)`` table; a copy on the device, for what a run returns is the caller's."""
    if device not in table.memo:
        table.memo[device] = {}
    copies = table.memo[device]
    for r in pipelines:
        if r not in copies:
            copies[r] = copied_to(table.pipelines[r], device)
    return [copies[r].clone() for r in pipelines]


@lowering("layout_tokens", backend="torch")
def _layout_tokens(cx: NodeLowering, x: Any, cu_seqlens: Any) -> list[tuple[fx.Node, ...]]:
    tables = cx.call(hetu_layout_tokens, cx.plan(), cx.pipelines, cx.device)
    rows = [cx.item(tables, i) for i in range(len(cx.pipelines))]
    return [tuple(cx.item(one, i) for i in range(3)) for one in rows]
