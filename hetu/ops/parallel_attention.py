"""``parallel_attn``: attention over sequences that lie spread over the pipelines of a strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    refuse,
)
from hetu.ops.sources import constant, placeholder
from hetu.parallel import METHODS, SPLITS, AttnPlan, Heads, Layout, build_plan, groups_of
from hetu.symbols import IntSymbol, as_symbol

Lists = Sequence[Sequence[IntSymbol | int]]


@dataclass(frozen=True, slots=True)
class ParallelKey:
    """Everything that the layout and the plan of a ``parallel_attn`` depend on.

    Attributes:
        seq_lens: Tokens of each sequence on each pipeline.
        cp_groups: Each pipeline's context group.
        split: How a sequence lies over its group.
        batches: Sequences in each group's batch, in the order of ``groups_of``; empty with packing.
        cu_seqlens: Each group's (shape, bytes as int64) of its cumulative document lengths; empty without packing.
        method: How keys and values move.
        is_causal: Whether the mask is causal.
        heads: Widths of a token's row.
    """

    seq_lens: tuple[int, ...]
    cp_groups: tuple[int, ...]
    split: str
    batches: tuple[int, ...]
    cu_seqlens: tuple[tuple[tuple[int, ...], bytes], ...]
    method: str
    is_causal: bool
    heads: Heads

    def layout(self) -> Layout:
        """Which token lies where."""
        cu = [np.frombuffer(data, np.int64).reshape(shape) for shape, data in self.cu_seqlens]
        return Layout.build(
            self.seq_lens, self.cp_groups, split=self.split, batch=list(self.batches) or 1, cu_seqlens=cu or None
        )


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
        rows, seq_len = qkv.symbolic_shape[0], _same_everywhere(attrs["seq_lens"])
        seq_len = call.symbol("seq_len") if seq_len is None else seq_len
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
        """Brings both lists into their normal form, tuples of symbols, and checks that they fit each other."""
        lists = {}
        for name, given in (("multi_seq_lens_symbol", "seq_lens"), ("multi_cp_group_symbol", "cp_groups")):
            rows = call.attrs[given]
            try:
                lists[given] = tuple(tuple(as_symbol(item) for item in row) for row in rows)
            except TypeError:
                call.fail(StrategyError, f"{name} is {rows!r}, expected a list of lists", "give one list a strategy")
            if len(lists[given]) != call.graph.num_strategy:
                call.fail(
                    StrategyError,
                    f"{name} has {len(lists[given])} rows, but the graph has {call.graph.num_strategy} strategies",
                    "give one row a strategy, or another num_strategy to hetu.graph",
                )
        for i, (lens, groups) in enumerate(zip(lists["seq_lens"], lists["cp_groups"], strict=True)):
            if not lens or len(lens) != len(groups):
                call.fail(
                    StrategyError,
                    f"strategy {i} lists {len(lens)} lengths and {len(groups)} context groups, expected as many, not none",
                    "give one length and one group a pipeline",
                )
            for r, length in enumerate(lens):
                call.check(length >= 0, f"the length of pipeline {r} under strategy {i} is at least 0")
        call.attrs.update(lists)
        for name, known in (("split", SPLITS), ("method", ("auto", *METHODS))):
            if call.attrs[name] not in known:
                call.fail(StrategyError, f"there is no {name} {call.attrs[name]!r}", f"use one of {', '.join(known)}")

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
        return len(node.attrs["seq_lens"][strategy])

    def shared_symbols(self, node: Node, strategy: int) -> Sequence[IntSymbol]:
        listed = (*node.attrs["seq_lens"][strategy], *node.attrs["cp_groups"][strategy])
        return tuple(dict.fromkeys(leaf for expr in listed for leaf in expr.leaves))

    def facts(self, node: Node, strategy: int, pipeline: int) -> Sequence[tuple[IntSymbol, str]]:
        own, listed = node.symbols, node.attrs["seq_lens"][strategy][pipeline]
        facts = [(listed, f"rows of qkv on pipeline {pipeline}")]
        facts += [(own[name], f"the layout of {node.name}") for name in ("seq_len", "batch", "total") if name in own]
        sides = [name for name in ("max_seqlen_q", "max_seqlen_k") if node.attrs[name] is not None]
        return facts + [(node.attrs[name], "longest document of the pipeline's context group") for name in sides]

    def tell(self, node: Node, view: RunView) -> Sequence[Sequence[int | None]]:
        lens = [item.known(expr) for item, expr in zip(view.pipelines, self._lens(node, view), strict=True)]
        rows = [item.known(node.inputs[0].symbolic_shape[0]) for item in view.pipelines]  # type: ignore[union-attr]
        if node.attrs["packing"]:
            lens = [row if length is None else length for length, row in zip(lens, rows, strict=True)]
        return [self._tell_pipeline(node, view, r, lens, rows) for r in range(len(view.pipelines))]

    def _tell_pipeline(
        self, node: Node, view: RunView, r: int, lens: list[int | None], rows: list[int | None]
    ) -> list[int | None]:
        attrs, pipeline = node.attrs, view.pipelines[r]
        groups = [pipeline.known(group) for group in attrs["cp_groups"][view.strategy]]
        members = [i for i, group in enumerate(groups) if group == groups[r]]
        known = [lens[i] for i in members]
        total = None if None in groups or None in known else sum(length or 0 for length in known)
        batch = None if total is None else _batch(members, lens, rows)
        told: dict[str, int | None] = {"seq_len": lens[r], "batch": batch, "total": total}
        values = [lens[r] if attrs["packing"] else None]
        values += [told[name] for name in ("seq_len", "batch", "total") if name in node.symbols]
        sides = [name for name in ("max_seqlen_q", "max_seqlen_k") if attrs[name] is not None]
        longest = int(self._documents(node, pipeline, total).max(initial=0)) if sides and total is not None else None
        return values + [longest] * len(sides)

    def _lens(self, node: Node, view: RunView) -> tuple[IntSymbol, ...]:
        lens: tuple[IntSymbol, ...] = node.attrs["seq_lens"][view.strategy]
        return lens

    def _documents(self, node: Node, pipeline: Pipeline, total: int) -> NDArray[np.int64]:
        """Lengths of the documents of a pipeline's group."""
        if not node.attrs["packing"]:
            return np.array([total])
        lengths = np.diff(read_cu_seqlens(node, "cu_seqlens_q", pipeline))
        return lengths if lengths.ndim == 1 else lengths.sum(0)

    # Planning

    def plan_keys(self, node: Node, view: RunView) -> Sequence[Any]:
        lens = tuple(item.value(expr) for item, expr in zip(view.pipelines, self._lens(node, view), strict=True))
        groups = tuple(view.pipelines[0].value(expr) for expr in node.attrs["cp_groups"][view.strategy])
        rows = [item.value(node.inputs[0].symbolic_shape[0]) for item in view.pipelines]  # type: ignore[union-attr]
        batches, cus = [], []
        for members in groups_of(groups).values():
            batch = 1 if node.attrs["packing"] else _batch(members, list(lens), list(rows))
            for r in members:
                if rows[r] != batch * lens[r]:
                    _refuse_rows(node, view.pipelines[r], self._lens(node, view)[r], r, rows[r], lens[r], batch)
            total = sum(lens[r] for r in members)
            if node.attrs["packing"]:
                cus.append(self._group_cu_seqlens(node, view, members, total))
            else:
                batches.append(batch)
            lengths = self._documents(node, view.pipelines[members[0]], total)
            for name in ("max_seqlen_q", "max_seqlen_k"):
                if node.attrs[name] is not None:
                    check_longest(node, name, lengths, f"context group {groups[members[0]]}", view.pipelines[members[0]])
        return [self._key(node, lens, groups, tuple(batches), cus)]

    def _group_cu_seqlens(
        self, node: Node, view: RunView, members: Sequence[int], total: int
    ) -> NDArray[np.int64]:
        """The group's cumulative lengths, the same wherever they were fed."""
        names = [name for name in ("cu_seqlens_q", "cu_seqlens_k") if node.input(name) is not None]
        fed = [(r, name, read_cu_seqlens(node, name, view.pipelines[r])) for r in members for name in names]
        first = fed[0][2]
        for r, name, values in fed[1:]:
            if not np.array_equal(values, first):
                refuse(
                    node,
                    f"{name} on pipeline {r} differs from {names[0]} on pipeline {members[0]} of the same context group",
                    "feed all pipelines of a group the same cu_seqlens, for queries and keys alike",
                )
        end = int(first[..., -1].sum())
        if end != total:
            refuse(
                node,
                f"cu_seqlens_q holds {end} tokens, but pipelines {list(members)} hold {total} together",
                "make the last entry the number of all tokens; count padding as a document of its own",
                [line for r in members for line in view.pipelines[r].describe(self._lens(node, view)[r])],
            )
        return first

    def _key(
        self,
        node: Node,
        lens: tuple[int, ...],
        groups: tuple[int, ...],
        batches: tuple[int, ...],
        cus: Sequence[NDArray[np.int64]],
    ) -> ParallelKey:
        attrs, qkv = node.attrs, node.inputs[0]
        assert isinstance(qkv, Tensor)
        width, ratio, head_dim = qkv.symbolic_shape[1].constant or 0, attrs["group_query_ratio"], attrs["head_dim"]
        num_kv = width // head_dim // (ratio + 2)
        heads = Heads(num_kv * ratio, num_kv, head_dim, qkv.dtype.itemsize)
        packed = tuple((cu.shape, np.ascontiguousarray(cu, np.int64).tobytes()) for cu in cus)
        return ParallelKey(lens, groups, attrs["split"], batches, packed, attrs["method"], attrs["is_causal"], heads)

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

        lens = tuple(value(expr) for expr in node.attrs["seq_lens"][strategy])
        groups = tuple(value(expr) for expr in node.attrs["cp_groups"][strategy])
        count = len(groups_of(groups))
        if not node.attrs["packing"]:
            batches = _one_a_group("batch", batch if isinstance(batch, (list, tuple)) else [batch] * count, count)
            return self._key(node, lens, groups, tuple(batches), ())
        if cu_seqlens is None:
            raise BindingError(
                "packing needs cu_seqlens", op="layout", where=caller(), fix="pass cu_seqlens=..., as the run will feed it"
            )
        several = isinstance(cu_seqlens, (list, tuple)) and np.ndim(cu_seqlens[0]) > 0
        cus = _one_a_group("cu_seqlens", cu_seqlens if several else [cu_seqlens] * count, count)
        return self._key(node, lens, groups, (), [np.asarray(cu, np.int64) for cu in cus])

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
            BadSample(lambda: bad(groups=((0, 0),)), StrategyError, "1 lengths and 2 context groups"),
            BadSample(lambda: bad(split="zigzag"), StrategyError, "there is no split 'zigzag'"),
            BadSample(lambda: bad(packing=True), HetuError, "packing needs cu_seqlens_q"),
            BadSample(lambda: bad(cu_seqlens_q=constant(cu)), HetuError, "without packing"),
            BadSample(lambda: bad(packing=True, cu_seqlens_q=constant(cu.astype(np.int64))), DTypeError, "is int64"),
            BadSample(lambda: parallel_attn(placeholder(int32, [4, 24]), 8, 1, [[4]], [[0]]), DTypeError, "qkv is int32"),
        ]


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


def _same_everywhere(lists: Sequence[Sequence[IntSymbol]]) -> IntSymbol | None:
    """The length that every pipeline has under every strategy, if it is one expression."""
    exprs = {expr for row in lists for expr in row}
    return next(iter(exprs)) if len(exprs) == 1 else None


def _batch(members: Sequence[int], lens: list[int | None], rows: list[int | None]) -> int:
    """Sequences in a group's batch, from a member that holds tokens of each; 1 where none does."""
    for r in members:
        length, row = lens[r], rows[r]
        if length and row is not None:
            return max(row // length, 1)
    return 1


def _refuse_rows(
    node: Node, pipeline: Pipeline, length: IntSymbol, r: int, rows: int, seq_len: int, batch: int
) -> None:
    what = "expected as many" if node.attrs["packing"] else f"and its context group a batch of {batch}"
    rows_expr = node.inputs[0].symbolic_shape[0]  # type: ignore[union-attr]
    refuse(
        node,
        f"qkv has {rows} rows on pipeline {r}, but the strategy gives it {seq_len} tokens of each sequence, {what}",
        "feed batch * seq_len rows: layout.scatter(x) of the same strategy makes the shards",
        pipeline.describe(rows_expr, length),
    )


def _one_a_group(name: str, values: Sequence[Any], count: int) -> Sequence[Any]:
    if len(values) != count:
        raise StrategyError(
            f"{name} has {len(values)} entries, but the strategy has {count} context groups",
            op="layout",
            where=caller(),
            fix=f"give one {name} a group, or one for all",
        )
    return values


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
