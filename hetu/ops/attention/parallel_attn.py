"""``parallel_attn``: attention over sequences that lie spread over the pipelines of a strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import numpy as np

from hetu.arguments import integer
from hetu.dtypes import float32, int32, int64
from hetu.errors import DTypeError, HetuError, ShapeError, StrategyError
from hetu.graph import BadSample, Call, GoodSample, Node, Tensor, TensorSpec, current_graph, register
from hetu.ops.attention.common import (
    FLOATS,
    attention_gradient,
    bound_mask,
    ceil128,
    check_options,
    check_sinks,
    check_tensor,
    check_width,
    dense_attention,
    lse_dtype,
    max_seqlen,
    refuse,
)
from hetu.ops.attention.layout_key import LayoutKey, ParallelKey
from hetu.ops.attention.layout_op import LayoutOp, Lists, Value
from hetu.ops.sources import constant, placeholder
from hetu.parallel import METHODS, AttnPlan, Mask, build_plan
from hetu.parallel.choice.setting import chosen
from hetu.parallel.mask.mask import NO_WINDOW
from hetu.parallel.topology import topology_of
from hetu.symbols import IntSymbol, as_symbol

__all__ = ["parallel_attn"]


class _ParallelAttention(LayoutOp):
    """The base of the op and its gradient: both follow a plan."""

    choices: ClassVar[Mapping[str, Sequence[str]]] = {**LayoutOp.choices, "method": ("auto", *METHODS)}
    precision = "low"
    plan_name = "parallel_attn"

    def shared_symbols(self, node: Node, strategy: int) -> Sequence[IntSymbol]:
        return *super().shared_symbols(node, strategy), *node.attrs["mask"].symbols

    def key(self, node: Node, layout: LayoutKey, value: Value) -> ParallelKey:
        attrs = node.attrs
        mask = bound_mask(node, attrs["mask"], value)
        if mask.joins and attrs["return_softmax"] and max(layout.batches, default=1) > 1:
            refuse(
                node,
                f"return_softmax: p has columns for one sequence, but the mask of slices counts the keys of all "
                f"{max(layout.batches)} sequences of the batch",
                "pack the sequences (packing=True), leave return_softmax out, or give a batch of one",
            )
        return ParallelKey.of(node, layout, mask)

    def plan(self, key: ParallelKey) -> AttnPlan:
        layout, heads = key.layout.layout(), key.heads
        if key.return_softmax:
            keys = [[group.tokens] if key.mask.joins else group.lengths.tolist() for group in layout.groups]
            heads = replace(heads, columns=max(max(of_group, default=0) for of_group in keys))
        hardware = chosen().hardware if key.method == "auto" else None
        topology = topology_of(key.hosts, layout.num_pipelines)
        return build_plan(layout, method=key.method, mask=key.mask, heads=heads, topology=topology, hardware=hardware)


@register
class ParallelAttn(_ParallelAttention):
    name = "parallel_attn"
    inputs = ("qkv", "cu_seqlens_q", "cu_seqlens_k", "sinks")
    uncast_inputs = ("sinks",)
    outputs = ("output", "softmax_lse", "rng_state", "p")
    is_random = True
    is_attention = True

    # Building

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        check_options(call)
        self.check_lists(call)
        self.check_packing(call)
        qkv = check_tensor(call, "qkv", call.inputs[0], FLOATS, (2,))
        num_q, _ = _heads(call, qkv)
        check_sinks(call, call.inputs[3], num_q)
        head_dim, attrs = call.attrs["head_dim"], call.attrs
        rows = qkv.symbolic_shape[0]
        lengths = {as_symbol(length) for strategy in attrs["strategies"] for length in strategy.lengths}
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

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        d_output, d_lse = attention_gradient(node, grads[0], grads[1], grads[3] if len(grads) > 3 else None)
        qkv, cu_q, cu_k, sinks = node.inputs
        inputs = (qkv, node.outputs[0], node.outputs[1], node.outputs[2], d_output, d_lse, cu_q, cu_k, sinks)

        @cache
        def backward() -> tuple[Tensor, ...]:
            return node.graph.apply("parallel_attn_grad", inputs, node.attrs)

        return [lambda: backward()[0], None, None, lambda: backward()[1]]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        qkv = np.random.default_rng(0).standard_normal((6, 4 * 8), np.float32)

        def reference(x: Any) -> Any:
            heads = x.reshape(2, 3, 4, 8)
            out = [dense_attention(item[:, :2], item[:, 2:3], item[:, 3:], 8**-0.5, Mask.causal())[0] for item in heads]
            return np.concatenate(out).reshape(6, 16)

        def capped_reference(x: Any, sinks: Any) -> Any:
            heads = x.reshape(6, 4, 8)
            parts = heads[:, :2], heads[:, 2:3], heads[:, 3:]
            return dense_attention(*parts, 8**-0.5, Mask.chunked(4), 1.5, sinks)[0].reshape(6, 16)

        def capped(x: Tensor, sinks: Tensor) -> Tensor:
            return parallel_attn(x, 8, 2, [[6]], [[0]], mask=Mask.chunked(4), softcap=1.5, sinks=sinks)[0]

        sinks = np.array([0.5, -0.25], np.float32)

        def bad(lens: Any = ((4,),), groups: Any = ((0,),), width: int = 24, **options: Any) -> Any:
            return parallel_attn(placeholder(float32, [4, width]), 8, 1, lens, groups, **options)

        cu = np.array([0, 4], np.int32)
        return [
            GoodSample(lambda x: parallel_attn(x, 8, 2, [[3]], [[0]])[0], (qkv,), reference),
            GoodSample(capped, (qkv, sinks), capped_reference),
        ], [
            BadSample(lambda: bad(width=32), ShapeError, "4 heads"),
            BadSample(lambda: bad(lens=((2,), (2,))), StrategyError, "has 2 rows"),
            BadSample(lambda: bad(groups=((0, 0),)), StrategyError, "has 1 entries and groups 2"),
            BadSample(lambda: bad(split="zigzag"), StrategyError, "there is no split 'zigzag'"),
            BadSample(lambda: bad(packing=True), HetuError, "packing needs cu_seqlens_q"),
            BadSample(lambda: bad(cu_seqlens_q=constant(cu)), HetuError, "without packing"),
            BadSample(lambda: bad(packing=True, cu_seqlens_q=constant(cu.astype(np.int64))), DTypeError, "is int64"),
            BadSample(
                lambda: parallel_attn(placeholder(int32, [4, 24]), 8, 1, [[4]], [[0]]), DTypeError, "qkv is int32"
            ),
        ]


@register
class ParallelAttnGrad(_ParallelAttention):
    """The gradients of ``parallel_attn`` with respect to qkv, and to the sinks if there are some."""

    name = "parallel_attn_grad"
    is_public = False
    precision = "any"
    inputs = ("qkv", "output", "softmax_lse", "rng_state", "d_output", "d_lse", "cu_seqlens_q", "cu_seqlens_k", "sinks")
    outputs = ("d_qkv", "d_sinks")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        inputs = (call.inputs[0], call.inputs[-1])
        return [TensorSpec(item.dtype, item.symbolic_shape) for item in inputs if item is not None]

    def derive(self, plan: AttnPlan) -> AttnPlan:
        return plan.backward()

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        return (), ()


def _heads(call: Call, qkv: Tensor) -> tuple[int, int]:
    head_dim, name = call.attrs["head_dim"], "group_query_ratio"
    ratio = integer(call.attrs[name], name, least=1, most=2**31, op=call.op, error=ShapeError, fix="give H_q / H_kv")
    call.attrs[name] = ratio
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
    multi_seq_lens_symbol: Lists | None = None,
    multi_cp_group_symbol: Lists | None = None,
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
    window_size: tuple[IntSymbol | int, IntSymbol | int] = NO_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mask: Mask | None = None,
    name: str | None = None,
) -> list[Tensor]:
    """Attends over sequences that are spread over the pipelines of a strategy. The result is that of one device.

    A *pipeline* is a holder of tokens, in practice a rank; it is no stage of pipeline parallelism.

    Under strategy i pipeline r holds ``multi_seq_lens_symbol[i][r]`` tokens of each sequence. Pipelines with the
    same ``multi_cp_group_symbol[i][r]`` form a context group, in index order, and attend together.

    Source: that of :func:`attn_varlen`. Partial results merge as in Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018, section 3. Methods: ``"ring"`` of Liu et al., "Ring Attention", 2023;
    ``"ulysses"`` of Jacobs et al., "DeepSpeed Ulysses", 2023; ``"all_gather"`` of "The Llama 3 Herd of Models",
    2024, section 3.3.2. Splits: ``"sym"`` of the same section; ``"stripe"`` of Brandon et al., "Striped Attention",
    2023.

    Args:
        qkv: This pipeline's shard, ``(batch * seq_len, (H_q + 2 * H_kv) * head_dim)``: all q heads, all k, all v.
            float16, bfloat16, float32 (float64 on the torch backend).
        head_dim: A multiple of 8, at most 256.
        group_query_ratio: ``H_q / H_kv``.
        multi_seq_lens_symbol: One row per strategy, with one length per pipeline: any lengths, zero included. None
            takes the strategies of the graph (``hetu.graph(..., strategies=[...])``), with which lists must agree.
        multi_cp_group_symbol: Rows of the same sizes, with the context group of each pipeline; None with None.
        packing: Whether the sequence is a concatenation of documents (batch 1).
        cu_seqlens_q: With packing, int32 ``(B + 1,)``, the documents of the whole group, or ``(R, B + 1)``, the
            piece of each document on each pipeline of the group.
        cu_seqlens_k: The same as cu_seqlens_q, or None.
        max_seqlen_q: At least the length of the longest document. None, or an unbound symbol, becomes that length.
        max_seqlen_k: As max_seqlen_q.
        p_dropout: Probability in [0, 1) with which each attention weight is dropped: the same weights under every
            strategy, split and method.
        softmax_scale: Factor of the scores; -1 means ``1 / sqrt(head_dim)``.
        is_causal: Whether a token sees only itself and what stands before it in its document.
        return_softmax: Whether to return ``p`` as well. It takes memory quadratic in the sequence length.
        split: How a sequence lies over its group: ``"normal"`` (contiguous), ``"sym"`` (a front piece and a back
            piece each), ``"stripe"`` (dealt one token at a time) or ``"balanced"`` (as sym, but most packed documents
            whole on one pipeline, so that all have as much to do). See ``docs/layouts.md``.
        method: How pipelines of a group attend to each other's tokens: keys and values move (``"ring"``, ``"direct"``,
            ``"all_gather"``, or ``"hierarchical"``, which sends them once to each host of ``hetu.config(hosts=...)``),
            each attends for some heads to all tokens (``"ulysses"``), or ``"auto"``.
        window_size: ``(left, right)``: a token sees only the keys from ``left`` before itself to ``right`` after it; -1
            is no bound, and ``is_causal`` makes right 0. Each may be a symbol (one with ``min=-1`` may be no bound):
            another window is another plan, and no other graph.
        softcap: Where positive, scores become ``softcap * tanh(score / softcap)`` before the softmax.
        sinks: Any of the floating dtypes, ``(H_q,)``, the same on all pipelines: one more logit for each query head,
            which takes weight and gives no value. Its gradient has its dtype, and is that of the pipeline's own rows.
            None for none.
        mask: A :class:`hetu.Mask`, which replaces ``is_causal``. It never moves tokens. With a mask of slices, which
            count positions of the whole pack of a context group, rows and columns of dropout and columns of ``p`` are
            such positions too.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        ``[output, softmax_lse, rng_state]``: ``(batch * seq_len, H_q * head_dim)``; natural-log lse with the
        sink, float32 ``(batch, H_q, seq_len)``; int64 ``(2,)`` on the CPU: seed, offset. With ``return_softmax`` also p
        ``(batch, H_q, ceil128(seq_len), ceil128(total))``, columns in sequence order, dropped weights negative.

    Raises:
        ShapeError: If widths and heads don't fit.
        DTypeError: If a dtype is not one of the above.
        StrategyError: If the lists don't fit the graph's strategies or each other.
        HetuError: If cu_seqlens are given without packing, missing with it, or computed from more than what is fed,
            constants and symbols, or both a mask and a window are given.
        BindingError: If the fed values don't fit the strategy or the mask, or ``p`` of a mask of slices is asked for
            with a batch of several sequences, which a run checks.

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

        A sliding window, of a size that each run may choose:

        >>> left = hetu.IntSymbol("left")
        >>> with g:
        ...     windowed, *_ = hetu.parallel_attn(
        ...         qkv, 8, 1, [[s], [s // 3, s - s // 3]], [[0], [0, 0]], window_size=(left, 0), name="windowed"
        ...     )
        >>> print(g.plan(1, int_symbol_dict={s: 10, left: 4}, node="windowed").mask.name)
        window(4, 0)
    """
    attrs = {
        "head_dim": head_dim,
        "group_query_ratio": group_query_ratio,
        "seq_lens": multi_seq_lens_symbol,
        "cp_groups": multi_cp_group_symbol,
        "packing": packing,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "p_dropout": p_dropout,
        "softmax_scale": softmax_scale,
        "mask": Mask.given(is_causal, window_size, mask, op="parallel_attn"),
        "softcap": softcap,
        "return_softmax": return_softmax,
        "split": split,
        "method": method,
    }
    inputs = (qkv, cu_seqlens_q, cu_seqlens_k, sinks)
    return list(current_graph(inputs, "parallel_attn").apply("parallel_attn", inputs, attrs, name))
