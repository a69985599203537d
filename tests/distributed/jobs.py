"""What a rank is told to do, and one process without others too: both build the same graphs and run them."""

from __future__ import annotations

from typing import Any

import torch
from attention.cases import Case, cu_seqlens

import hetu

Own = list[torch.Tensor]
"""The values of the pipelines that run in this process."""


def own(value: Any) -> Own:
    """What a run gave, as a list."""
    return list(value) if isinstance(value, hetu.Shards) else [] if value is None else [value]


# Attention


def attention(case: Case, backend: str, device: str = "cpu", with_grads: bool = True, own_shard: bool = False) -> Any:
    """Runs parallel_attn and its gradients under a strategy.

    Args:
        case: The strategy and its data.
        backend: ``"torch"`` or ``"triton"``.
        device: Where.
        with_grads: Whether gradients are fetched too.
        own_shard: Whether each rank feeds its own shard alone, and ranks without a pipeline nothing.

    Returns:
        For each fetched tensor the values of the pipelines that run here.
    """
    generator = torch.Generator().manual_seed(case.seed)
    (num_q, num_kv), members = case.heads, case.members
    width = (num_q + 2 * num_kv) * case.head_dim
    lens = [hetu.IntSymbol(f"n{r}") for r in range(len(case.lens))]
    with hetu.graph("define_and_run", device=device) as g:
        qkv = hetu.placeholder(case.dtype, [hetu.IntSymbol("rows"), width], name="qkv")
        shape = [hetu.IntSymbol("pieces"), hetu.IntSymbol("b")][case.packing == "1d" :]
        cu = hetu.placeholder(hetu.int32, shape, name="cu") if case.packing else None
        fetches = hetu.parallel_attn(
            qkv, case.head_dim, num_q // num_kv, [lens], [case.groups], bool(case.packing), cu,
            p_dropout=case.p, is_causal=case.is_causal, return_softmax=case.return_softmax,
            split=case.split, method=case.method,
        )  # fmt: skip
        d_out = hetu.placeholder(case.dtype, fetches[0].shape, name="d_out")
        if with_grads:
            fetches = [*fetches, hetu.gradients(fetches[0], qkv, d_out)]
    symbols = dict(zip(lens, case.lens, strict=True))
    tables = [cu_seqlens(case, m) for m in members.values()] if case.packing else None
    layout = g.layout(0, int_symbol_dict=symbols, cu_seqlens=tables, batch=case.batch)

    def scattered(columns: int) -> hetu.Shards:
        totals = [sum(case.documents(m)) for m in members.values()]
        arrays = [torch.randn(n, columns, generator=generator).to(case.dtype) for n in totals]
        return hetu.Shards(layout.scatter(arrays[0] if len(arrays) == 1 else arrays))

    feeds: dict[Any, Any] = {qkv: scattered(width)}
    if with_grads:
        feeds[d_out] = scattered(num_q * case.head_dim)
    if tables is not None:
        order = list(members)
        feeds[cu] = hetu.Shards([tables[order.index(group)] for group in case.groups])
    if own_shard:
        rank = hetu.init_distributed().rank
        feeds = {key: value[rank] for key, value in feeds.items()} if rank < len(case.lens) else {}
    hetu.manual_seed(case.seed)
    with hetu.config(backend=backend):
        return [own(x) for x in g.run(fetches, feed_dict=feeds, int_symbol_dict=symbols)]
