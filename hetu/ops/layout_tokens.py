"""``layout_tokens``: which token each row is, under whatever strategy a run chooses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetu.arguments import refuse
from hetu.dtypes import int64
from hetu.errors import DTypeError, HetuError, StrategyError
from hetu.graph import BadSample, Call, GoodSample, Node, Tensor, TensorSpec, current_graph, register
from hetu.ops.attention.layout_key import LayoutKey
from hetu.ops.attention.layout_op import LayoutOp, Lists, Value
from hetu.ops.common.build import rank, tensor
from hetu.ops.common.samples import eighths
from hetu.ops.sources import placeholder
from hetu.parallel.layout.tokens import TokenTable

__all__ = ["layout_tokens"]


@register
class LayoutTokens(LayoutOp):
    """Position, document and number of every row's token."""

    name = "layout_tokens"
    inputs = ("x", "cu_seqlens_q")
    outputs = ("position", "document", "token")
    host_inputs = ("cu_seqlens_q",)
    stops_gradient = True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        self.check_lists(call)
        self.check_packing(call)
        x = tensor(call, 0, "x")
        rank(call, x, "x", 1)
        return [TensorSpec(int64, x.symbolic_shape[:1])] * 3

    def key(self, node: Node, layout: LayoutKey, value: Value) -> LayoutKey:
        return layout

    def plan(self, key: LayoutKey) -> TokenTable:
        return TokenTable.of(key.layout())

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def reference(x: np.ndarray) -> tuple[np.ndarray, ...]:
            rows = np.arange(len(x))
            return rows % 3, rows // 3, rows

        good = [GoodSample(lambda x: layout_tokens(x, [[3]], [[0]]), [eighths(6, 2)], reference)]
        bad = [
            BadSample(
                lambda: layout_tokens(placeholder("float32", [4]), [[2], [2]], [[0], [0]]), StrategyError, "has 2 rows"
            ),
            BadSample(
                lambda: layout_tokens(placeholder("float32", [4]), [[4]], [[0]], packing=True), HetuError, "cu_seqlens"
            ),
            BadSample(
                lambda: layout_tokens(placeholder("float32", [4]), [[4]], [[0]], split="zigzag"),
                StrategyError,
                "there is no split 'zigzag'",
            ),
        ]
        return good, bad


def layout_tokens(
    x: Tensor,
    multi_seq_lens_symbol: Lists | None = None,
    multi_cp_group_symbol: Lists | None = None,
    packing: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    split: str = "normal",
    name: str | None = None,
) -> list[Tensor]:
    """Says which token each row is. Rotary embeddings and dropout need this to be right under every strategy.

    The op takes the arguments of :func:`hetu.parallel_attn`, and agrees with it on which token lies where.

    Args:
        x: ``(rows, ...)``, any tensor with one row per token of this pipeline's shard; only its length is looked at.
        multi_seq_lens_symbol: One row per strategy, with one length per pipeline. None takes the graph's strategies.
        multi_cp_group_symbol: Rows of the same sizes, with the context group of each pipeline; None with None.
        packing: Whether the sequence is a concatenation of documents.
        cu_seqlens: Only with packing: the documents' cumulative lengths, as ``cu_seqlens_q`` of
            :func:`hetu.parallel_attn`.
        split: How a sequence lies over its group.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        ``[position, document, token]``, int64 ``(rows,)`` each: the row's position in its document (its sequence,
        without packing), the document's number in the context group, and the token's number among the tokens of all
        groups, document after document, which is the same under every strategy.

    Raises:
        StrategyError: If the lists don't fit the graph's strategies or each other.
        HetuError: If cu_seqlens are given without packing, missing with it, or computed from more than what is fed,
            constants and symbols.
        BindingError: If the fed values don't fit the strategy, which a run checks.

    Example:
        >>> import hetu
        >>> rows = hetu.IntSymbol("rows")
        >>> with hetu.graph("define_and_run") as g:
        ...     ids = hetu.placeholder(hetu.int64, [rows])
        ...     position, document, token = hetu.layout_tokens(ids, [[3, 2]], [[0, 0]], split="stripe")
        >>> for shard in g.run(position, {ids: hetu.Shards([[7, 7, 7], [7, 7]])}):
        ...     print(shard.tolist())
        [0, 2, 4]
        [1, 3]
    """
    attrs = {
        "seq_lens": multi_seq_lens_symbol,
        "cp_groups": multi_cp_group_symbol,
        "packing": packing,
        "split": split,
    }
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        refuse(cu_seqlens, "cu_seqlens", "a graph tensor", op="layout_tokens", error=DTypeError)
    inputs = (x, cu_seqlens)
    return list(current_graph(inputs, "layout_tokens").apply("layout_tokens", inputs, attrs, name))
