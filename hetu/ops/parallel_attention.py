"""``parallel_attn``: attention over sequences that lie spread over the pipelines of a strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.dtypes import float32, int32, int64
from hetu.errors import BindingError, DTypeError, HetuError, ShapeError, StrategyError, caller
from hetu.graph import (
    BadSample,
    Call,
    GoodSample,
    Node,
    OpDef,
    Pipeline,
    RunView,
    Tensor,
    TensorSpec,
    current_graph,
    register,
)
from hetu.ops._attention import (
    FLOATS,
    ceil128,
    check_cu_seqlens,
    check_longest,
    check_options,
    check_tensor,
    check_width,
    dense_attention,
    lse_dtype,
    max_seqlen,
    read_cu_seqlens,
)
from hetu.ops._parallel_key import ParallelKey, batch_of, group_cu_seqlens, make_key, one_a_group, refuse_rows
from hetu.ops.sources import constant, placeholder
from hetu.parallel import METHODS, SPLITS, AttnPlan, Layout, Strategy, build_plan, groups_of
from hetu.symbols import IntSymbol, as_symbol

Lists = Sequence[Sequence[IntSymbol | int]]


@register
class ParallelAttn(OpDef):
    name = "parallel_attn"
    inputs = ("qkv", "cu_seqlens_q", "cu_seqlens_k")
    outputs = ("output", "softmax_lse", "rng_state", "p")
    host_inputs = ("cu_seqlens_q", "cu_seqlens_k")
    is_random = True
    spans_pipelines = True
    has_plan = True

    # Building

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        check_options(call)
        self._check_lists(call)
        self._check_packing(call)
        qkv = check_tensor(call, "qkv", call.inputs[0], FLOATS, (2,))
        num_q, _ = _heads(call, qkv)
        head_dim, attrs = call.attrs["head_dim"], call.attrs
        rows = qkv.symbolic_shape[0]
        lengths = {as_symbol(length) for strategy in attrs["strategies"] for length in strategy.seq_lens}
        seq_len = lengths.pop() if len(lengths) == 1 else call.symbol("seq_len")
        batch = as_symbol(1) if attrs["packing"] else call.symbol("batch")
        for side in ("max_seqlen_q", "max_seqlen_k"):
            if attrs[side] is not None:
                max_seqlen(call, side)
        specs = [
            TensorSpec(qkv.dtype, (rows, num_q * head_dim)),
            TensorSpec(lse_dtype(qkv), (batch, num_q, seq_len)),
            TensorSpec(int64, (2,), on_cpu=True),
        ]
        if attrs["return_softmax"]:
            total = ceil128(call.symbol("total"))
            specs.append(TensorSpec(qkv.dtype, (batch, num_q, ceil128(seq_len), total)))
        return specs

    def _check_lists(self, call: Call) -> None:
        """Replaces both lists by one strategy a row, after checking that they fit each other and the graph."""
        attrs, rows = call.attrs, {}
        if "strategies" in attrs:  # the graph's verification asks again, with the normal form
            return
        for name, given in (("multi_seq_lens_symbol", "seq_lens"), ("multi_cp_group_symbol", "cp_groups")):
            value = attrs.pop(given)
            try:
                rows[given] = [tuple(as_symbol(item) for item in row) for row in value]
            except TypeError:
                call.fail(StrategyError, f"{name} is {value!r}, expected a list of lists", "give one list a strategy")
            if len(rows[given]) != call.graph.num_strategy:
                call.fail(
                    StrategyError,
                    f"{name} has {len(rows[given])} rows, but the graph has {call.graph.num_strategy} strategies",
                    "give one row a strategy, or another num_strategy to hetu.graph",
                )
        strategies = tuple(Strategy(*row) for row in zip(rows["seq_lens"], rows["cp_groups"], strict=True))
        for i, strategy in enumerate(strategies):
            for r, length in enumerate(strategy.seq_lens):
                call.check(length >= 0, f"the length of pipeline {r} under strategy {i} is at least 0")
        attrs["strategies"] = strategies
        for name, known in (("split", SPLITS), ("method", ("auto", *METHODS))):
            if attrs[name] not in known:
                call.fail(StrategyError, f"there is no {name} {attrs[name]!r}", f"use one of {', '.join(known)}")

    def _check_packing(self, call: Call) -> None:
        given = call.inputs[1:]
        if not call.attrs["packing"]:
            if given != (None, None):
                call.fail(HetuError, "cu_seqlens were given without packing", "pass packing=True, or leave them out")
            return
        if given[0] is None:
            call.fail(HetuError, "packing needs cu_seqlens_q", "pass the documents' cumulative lengths")
        for name, item in zip(("cu_seqlens_q", "cu_seqlens_k"), given, strict=True):
            if item is not None:
                check_cu_seqlens(call, name, item, ranks=(1, 2))

    # Binding

    def num_pipelines(self, node: Node, strategy: int) -> int:
        return _strategy(node, strategy).num_pipelines

    def shared_symbols(self, node: Node, strategy: int) -> Sequence[IntSymbol]:
        chosen = _strategy(node, strategy)
        listed = (*chosen.seq_lens, *chosen.cp_groups)
        return tuple(dict.fromkeys(leaf for expr in listed for leaf in as_symbol(expr).leaves))

    def facts(self, node: Node, strategy: int, pipeline: int) -> Sequence[tuple[IntSymbol, str]]:
        own, listed = node.symbols, as_symbol(_strategy(node, strategy).seq_lens[pipeline])
        facts = [(listed, f"rows of qkv on pipeline {pipeline}")]
        facts += [(own[name], f"the layout of {node.name}") for name in ("seq_len", "batch", "total") if name in own]
        sides = [name for name in ("max_seqlen_q", "max_seqlen_k") if node.attrs[name] is not None]
        return facts + [(node.attrs[name], "longest document of the pipeline's context group") for name in sides]

    def tell(self, node: Node, view: RunView) -> Sequence[Sequence[int | None]]:
        chosen = _strategy(node, view.strategy)
        lens = [item.known(expr) for item, expr in zip(view.pipelines, chosen.seq_lens, strict=True)]
        rows = [item.known(node.tensors[0].symbolic_shape[0]) for item in view.pipelines]
        if node.attrs["packing"]:
            lens = [row if length is None else length for length, row in zip(lens, rows, strict=True)]
        return [self._tell_pipeline(node, view, r, lens, rows) for r in range(len(view.pipelines))]

    def _tell_pipeline(
        self, node: Node, view: RunView, r: int, lens: list[int | None], rows: list[int | None]
    ) -> list[int | None]:
        attrs, pipeline = node.attrs, view.pipelines[r]
        groups = [pipeline.known(group) for group in _strategy(node, view.strategy).cp_groups]
        members = [i for i, group in enumerate(groups) if group == groups[r]]
        known = [lens[i] for i in members]
        total = None if None in groups or None in known else sum(length or 0 for length in known)
        batch = None if total is None else batch_of(members, lens, rows)
        told: dict[str, int | None] = {"seq_len": lens[r], "batch": batch, "total": total}
        values = [lens[r] if attrs["packing"] else None]
        values += [told[name] for name in ("seq_len", "batch", "total") if name in node.symbols]
        sides = [name for name in ("max_seqlen_q", "max_seqlen_k") if attrs[name] is not None]
        longest = int(self._documents(node, pipeline, total).max(initial=0)) if sides and total is not None else None
        return values + [longest] * len(sides)

    def _documents(self, node: Node, pipeline: Pipeline, total: int) -> NDArray[np.int64]:
        """Lengths of the documents of a pipeline's group."""
        if not node.attrs["packing"]:
            return np.array([total])
        lengths = np.diff(read_cu_seqlens(node, "cu_seqlens_q", pipeline))
        return lengths if lengths.ndim == 1 else lengths.sum(0)

    # Planning

    def plan_keys(self, node: Node, view: RunView) -> Sequence[Any]:
        chosen = _strategy(node, view.strategy)
        lens = tuple(item.value(expr) for item, expr in zip(view.pipelines, chosen.seq_lens, strict=True))
        groups = tuple(view.pipelines[0].value(expr) for expr in chosen.cp_groups)
        rows = [item.value(node.tensors[0].symbolic_shape[0]) for item in view.pipelines]
        batches, cus = [], []
        for members in groups_of(groups).values():
            batch = 1 if node.attrs["packing"] else batch_of(members, lens, rows)
            for r in members:
                if rows[r] != batch * lens[r]:
                    refuse_rows(node, view, r, rows[r], lens[r], batch)
            total = sum(lens[r] for r in members)
            if node.attrs["packing"]:
                cus.append(group_cu_seqlens(node, view, members, total))
            else:
                batches.append(batch)
            for name in ("max_seqlen_q", "max_seqlen_k"):
                if node.attrs[name] is not None:
                    lengths = self._documents(node, view.pipelines[members[0]], total)
                    check_longest(
                        node, name, lengths, f"context group {groups[members[0]]}", view.pipelines[members[0]]
                    )
        return [make_key(node, lens, groups, tuple(batches), cus)]

    def plan(self, key: ParallelKey) -> AttnPlan:
        return build_plan(key.layout(), method=key.method, is_causal=key.is_causal, heads=key.heads)

    # Looking before running

    def inspect_key(
        self, node: Node, strategy: int, values: Mapping[IntSymbol, int], cu_seqlens: Any, batch: Any
    ) -> ParallelKey:
        """The key that a run with these symbols would have; see :meth:`hetu.Graph.plan`."""

        def value(expr: IntSymbol) -> int:
            defaults = {leaf: leaf.default for leaf in expr.leaves if leaf.default is not None}
            return expr.evaluate({**defaults, **values})

        lens, groups = _strategy(node, strategy).evaluate(value)
        count = len(groups_of(groups))
        if not node.attrs["packing"]:
            batches = one_a_group("batch", batch if isinstance(batch, (list, tuple)) else [batch] * count, count)
            return make_key(node, lens, groups, tuple(batches), ())
        if cu_seqlens is None:
            raise BindingError(
                "packing needs cu_seqlens",
                op="layout",
                where=caller(),
                fix="pass cu_seqlens=..., as the run will feed it",
            )
        several = isinstance(cu_seqlens, (list, tuple)) and np.ndim(cu_seqlens[0]) > 0
        cus = one_a_group("cu_seqlens", cu_seqlens if several else [cu_seqlens] * count, count)
        return make_key(node, lens, groups, (), [np.asarray(cu, np.int64) for cu in cus])

    def layout(self, key: ParallelKey) -> Layout:
        """Which token lies where."""
        return key.layout()

    def layout_key(self, key: ParallelKey) -> Any:
        """What of a key the layout depends on."""
        return key.seq_lens, key.cp_groups, key.split, key.batches, key.cu_seqlens

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        qkv = np.random.default_rng(0).standard_normal((6, 4 * 8), np.float32)

        def reference(x: Any) -> Any:
            heads = x.reshape(2, 3, 4, 8)
            out = [dense_attention(item[:, :2], item[:, 2:3], item[:, 3:], 8**-0.5, True)[0] for item in heads]
            return np.concatenate(out).reshape(6, 16)

        def bad(lens: Any = ((4,),), groups: Any = ((0,),), width: int = 24, **options: Any) -> Any:
            return parallel_attn(placeholder(float32, [4, width]), 8, 1, lens, groups, **options)

        cu = np.array([0, 4], np.int32)
        return [GoodSample(lambda x: parallel_attn(x, 8, 2, [[3]], [[0]])[0], (qkv,), reference)], [
            BadSample(lambda: bad(width=32), ShapeError, "4 heads"),
            BadSample(lambda: bad(lens=((2,), (2,))), StrategyError, "has 2 rows"),
            BadSample(lambda: bad(groups=((0, 0),)), StrategyError, "has 1 entries and cp_groups 2"),
            BadSample(lambda: bad(split="zigzag"), StrategyError, "there is no split 'zigzag'"),
            BadSample(lambda: bad(packing=True), HetuError, "packing needs cu_seqlens_q"),
            BadSample(lambda: bad(cu_seqlens_q=constant(cu)), HetuError, "without packing"),
            BadSample(lambda: bad(packing=True, cu_seqlens_q=constant(cu.astype(np.int64))), DTypeError, "is int64"),
            BadSample(
                lambda: parallel_attn(placeholder(int32, [4, 24]), 8, 1, [[4]], [[0]]), DTypeError, "qkv is int32"
            ),
        ]


def _strategy(node: Node, index: int) -> Strategy:
    chosen: Strategy = node.attrs["strategies"][index]
    return chosen


def _heads(call: Call, qkv: Tensor) -> tuple[int, int]:
    head_dim, ratio = call.attrs["head_dim"], call.attrs["group_query_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
        call.fail(ShapeError, f"group_query_ratio is {ratio!r}, expected a positive int", "give H_q / H_kv")
    heads = check_width(call, "qkv", qkv.symbolic_shape[1], head_dim)
    if heads % (ratio + 2):
        call.fail(
            ShapeError,
            f"qkv has {heads} heads, expected a multiple of group_query_ratio + 2 = {ratio + 2}",
            "make its width (H_q + 2 * H_kv) * head_dim with H_q = group_query_ratio * H_kv",
        )
    num_kv = heads // (ratio + 2)
    return num_kv * ratio, num_kv


def parallel_attn(
    qkv: Tensor,
    head_dim: int,
    group_query_ratio: int,
    multi_seq_lens_symbol: Lists,
    multi_cp_group_symbol: Lists,
    packing: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: IntSymbol | int | None = None,
    max_seqlen_k: IntSymbol | int | None = None,
    p_dropout: float = 0,
    softmax_scale: float = -1,
    is_causal: bool = True,
    return_softmax: bool = False,
    *,
    split: str = "normal",
    method: str = "auto",
    name: str | None = None,
) -> list[Tensor]:
    """Attention over sequences spread over the pipelines of a strategy; the result is that of one device.

    Under strategy i pipeline r holds ``multi_seq_lens_symbol[i][r]`` tokens of each sequence. Pipelines with the
    same ``multi_cp_group_symbol[i][r]`` form a context group, in index order, and attend together.

    Args:
        qkv: This pipeline's shard, ``(batch * seq_len, (H_q + 2 * H_kv) * head_dim)``: all q heads, all k, all v.
            float16, bfloat16, float32 (float64 on the torch backend).
        head_dim: A multiple of 8, at most 256.
        group_query_ratio: ``H_q / H_kv``.
        multi_seq_lens_symbol: One row a strategy, one length a pipeline: any lengths, zero included.
        multi_cp_group_symbol: Rows of the same sizes: each pipeline's context group.
        packing: Whether the sequence is a concatenation of documents (batch 1).
        cu_seqlens_q: With packing, int32 ``(B + 1,)``, the documents of the whole group, or ``(R, B + 1)``, the
            piece of each document on each pipeline of the group.
        cu_seqlens_k: The same as cu_seqlens_q, or None.
        max_seqlen_q: If bound, at least the longest document.
        max_seqlen_k: Likewise.
        p_dropout: Probability in [0, 1) with which each attention weight is dropped: the same weights under every
            strategy, split and method.
        softmax_scale: Factor of the scores; -1 means ``1 / sqrt(head_dim)``.
        is_causal: Whether a token sees only itself and what stands before it in its document.
        return_softmax: Whether to return ``p`` as well. It takes memory quadratic in the sequence length.
        split: How a sequence lies over its group: ``"normal"`` (contiguous), ``"sym"`` (a front piece and a back
            piece each) or ``"stripe"`` (dealt one token at a time). See ``docs/layouts.md``.
        method: How keys and values move in a group: ``"ring"``, ``"direct"``, ``"all_gather"`` or ``"auto"``.
        name: The node's name.

    Returns:
        ``[output, softmax_lse, rng_state]``: ``(batch * seq_len, H_q * head_dim)``; natural-log lse, float32
        ``(batch, H_q, seq_len)``; int64 ``(2,)`` on the CPU: seed, offset. With ``return_softmax`` also p
        ``(batch, H_q, ceil128(seq_len), ceil128(total))``, columns in sequence order, dropped weights negative.

    Raises:
        ShapeError: If widths and heads don't fit.
        DTypeError: If an element type is not one of the above.
        StrategyError: If the lists don't fit the graph's strategies or each other.
        BindingError: When run, if what was fed does not fit the strategy.

    Example:
        >>> import hetu, numpy as np
        >>> s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
        >>> with hetu.graph("define_and_run", num_strategy=2) as g:
        ...     qkv = hetu.placeholder(hetu.float32, [rows, 3 * 16])
        ...     out, lse, rng_state = hetu.parallel_attn(qkv, 8, 1, [[s], [s // 3, s - s // 3]], [[0], [0, 0]])
        >>> x = np.random.default_rng(0).standard_normal((10, 48), np.float32)
        >>> one = g.run(out, feed_dict={qkv: x}, int_symbol_dict={s: 10}, strategy=0)
        >>> layout = g.layout(1, int_symbol_dict={s: 10})
        >>> shards = hetu.Shards(layout.scatter(x))
        >>> two = g.run(out, feed_dict={qkv: shards}, int_symbol_dict={s: 10}, strategy=1)
        >>> bool((layout.gather(two) - one).abs().max() < 1e-5)
        True
    """
    attrs = {
        "head_dim": head_dim,
        "group_query_ratio": group_query_ratio,
        "seq_lens": multi_seq_lens_symbol,
        "cp_groups": multi_cp_group_symbol,
        "packing": bool(packing),
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "p_dropout": p_dropout,
        "softmax_scale": softmax_scale,
        "is_causal": bool(is_causal),
        "return_softmax": bool(return_softmax),
        "split": split,
        "method": method,
    }
    inputs = (qkv, cu_seqlens_q, cu_seqlens_k)
    return list(current_graph(inputs, "parallel_attn").apply("parallel_attn", inputs, attrs, name))
