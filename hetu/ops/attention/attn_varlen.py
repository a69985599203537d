"""``attn_varlen``: attention over sequences of different lengths, packed without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.dtypes import float32, int32, int64
from hetu.errors import DTypeError, HetuError, ShapeError
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
from hetu.ops.attention.common import (
    FLOATS,
    attention_gradient,
    bound_mask,
    ceil128,
    check_cu_seqlens,
    check_longest,
    check_options,
    check_sinks,
    check_tensor,
    check_width,
    dense_attention,
    longest_of,
    lse_dtype,
    max_seqlen,
    read_cu_seqlens,
    refuse,
)
from hetu.ops.sources import constant, placeholder
from hetu.parallel import Mask
from hetu.parallel.mask.mask import CAUSAL, FULL, NO_WINDOW
from hetu.parallel.plan.varlen import VarlenPlan
from hetu.symbols import IntSymbol

__all__ = ["attn_varlen"]

_SIDES = ("q", "k")

_Lengths = tuple[NDArray[np.int64], int, bytes]
"""Cumulative lengths, the longest sequence, and the bytes for a key."""


def _lengths(cu_seqlens: NDArray[np.int64]) -> _Lengths:
    return cu_seqlens, longest_of(cu_seqlens), cu_seqlens.tobytes()


class _VarlenAttention(OpDef):
    """The base of the op and its gradient: both read the lengths, and follow a plan."""

    host_inputs = ("cu_seqlens_q", "cu_seqlens_k")
    has_plan = True
    plan_name = "attn_varlen"

    def inferable_sizes(self, node: Node, strategy: int, pipeline: int) -> Sequence[tuple[IntSymbol, str]]:
        return [(node.attrs[f"max_seqlen_{side}"], f"longest sequence of cu_seqlens_{side}") for side in _SIDES]

    def shared_symbols(self, node: Node, strategy: int) -> Sequence[IntSymbol]:
        symbols: tuple[IntSymbol, ...] = node.attrs["mask"].symbols
        return symbols

    def infer_sizes(self, node: Node, view: RunView) -> Sequence[Sequence[int | None]]:
        return [(q[1], k[1]) for q, k in map(partial(self._read, node), view.pipelines)]

    def _read(self, node: Node, pipeline: Pipeline) -> tuple[_Lengths, _Lengths]:
        """The lengths of both sides: found once, whoever asks."""
        cu_seqlens = node.inputs[-3:-1]  # the sinks come last

        def read() -> tuple[_Lengths, _Lengths]:
            of_q, of_k = self.host_inputs
            q = _lengths(read_cu_seqlens(node, of_q, pipeline))
            return q, q if cu_seqlens[0] is cu_seqlens[1] else _lengths(read_cu_seqlens(node, of_k, pipeline))

        return pipeline.once(("attn_varlen", cu_seqlens), read)

    def plan_keys(self, node: Node, view: RunView) -> Sequence[Any]:
        return [self._key(node, item) for item in view.pipelines]

    def _key(self, node: Node, pipeline: Pipeline) -> Any:
        rows, cu = [], []
        for place, (values, longest, content) in enumerate(self._read(node, pipeline)):
            side, name = _SIDES[place], self.host_inputs[place]
            attended = node.inputs[place]
            assert isinstance(attended, Tensor)
            rows.append(pipeline.value(attended.symbolic_shape[0]))
            if values.item(-1) > rows[-1]:
                refuse(
                    node, f"{name} ends at {values[-1]}, but {side} has {rows[-1]} rows", f"feed {side} all its tokens"
                )
            if longest > pipeline.value(node.attrs[f"max_seqlen_{side}"]):
                check_longest(node, f"max_seqlen_{side}", np.diff(values), name, pipeline)
            cu.append(content)
        if len(cu[0]) != len(cu[1]):
            entries = [len(content) // np.dtype(np.int64).itemsize for content in cu]
            refuse(
                node,
                f"cu_seqlens_q and cu_seqlens_k have {entries[0]} and {entries[1]} entries, expected as many",
                "give both batch_size + 1 entries",
            )
        mask = node.attrs["mask"]
        if mask is not CAUSAL and mask is not FULL:  # new lengths wait for this, and mostly it is one of the two
            mask = bound_mask(node, mask, pipeline.value)
        if node.attrs["return_softmax"] and mask.joins:
            self._check_columns(node, pipeline)
        return *cu, rows[0], mask

    def _check_columns(self, node: Node, pipeline: Pipeline) -> None:
        """Refuses ``p`` of a mask over positions of the pack if it has no column for some of them."""
        (_, (cu_seqlens, _, _)), bound = self._read(node, pipeline), node.attrs["max_seqlen_k"]
        columns, keys = pipeline.value(bound), cu_seqlens.item(-1)
        if columns < keys:
            refuse(
                node,
                f"return_softmax: p has {columns} columns, as many as max_seqlen_k, but the mask of slices counts "
                f"{keys} keys of the whole pack",
                f"give max_seqlen_k as {keys} or more, or pack one sequence",
                pipeline.describe(bound),
            )

    def plan(self, key: Any) -> VarlenPlan:
        content_q, content_k, rows, mask = key
        cu_q = np.frombuffer(content_q, np.int64)
        cu_k = cu_q if content_k == content_q else np.frombuffer(content_k, np.int64)
        return VarlenPlan.build(cu_q, cu_k, rows, mask)


@register
class AttnVarlen(_VarlenAttention):
    name = "attn_varlen"
    inputs = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "sinks")
    uncast_inputs = ("sinks",)
    outputs = ("output", "softmax_lse", "p", "rng_state")
    is_random = True
    is_attention = True
    precision = "low"

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        check_options(call)
        q, k, v = (
            check_tensor(call, name, item, FLOATS, (2, 3)) for name, item in zip("qkv", call.inputs, strict=False)
        )
        if not q.dtype == k.dtype == v.dtype:
            dtypes = f"{q.dtype.name}, {k.dtype.name} and {v.dtype.name}"
            call.fail(DTypeError, f"q, k and v are {dtypes}, expected one dtype", "cast them to one dtype")
        if not q.ndim == k.ndim == v.ndim:
            call.fail(ShapeError, f"q, k and v have {q.ndim}, {k.ndim} and {v.ndim} dimensions", "give all 2, or all 3")
        num_q = self._heads(call, q, k, v)
        check_sinks(call, call.inputs[5], num_q)
        cu_q, cu_k = (check_cu_seqlens(call, f"cu_seqlens_{side}", call.inputs[3 + i]) for i, side in enumerate(_SIDES))
        call.same(
            cu_q.symbolic_shape[0],
            cu_k.symbolic_shape[0],
            f"cu_seqlens_q and cu_seqlens_k have {cu_q.shape[0]} and {cu_k.shape[0]} entries, expected as many",
            "give both batch_size + 1 entries",
        )
        batch = cu_q.symbolic_shape[0] - 1
        max_q, max_k = (max_seqlen(call, f"max_seqlen_{side}") for side in _SIDES)
        p = (batch, num_q, ceil128(max_q), ceil128(max_k)) if call.attrs["return_softmax"] else (0,)
        return (
            TensorSpec(q.dtype, q.symbolic_shape),
            TensorSpec(lse_dtype(q), (batch, num_q, max_q)),
            TensorSpec(q.dtype, p),
            TensorSpec(int64, (2,), on_cpu=True),
        )

    def _heads(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> int:
        head_dim = call.attrs["head_dim"]
        heads = []
        for name, item in zip("qkv", (q, k, v), strict=True):
            if item.ndim == 3 and item.shape[2] != head_dim:
                call.fail(ShapeError, f"the last dimension of {name} is {item.shape[2]}, expected head_dim {head_dim}")
            width = item.symbolic_shape[1] * head_dim if item.ndim == 3 else item.symbolic_shape[1]
            heads.append(check_width(call, name, width, head_dim))
        call.same(
            k.symbolic_shape[0],
            v.symbolic_shape[0],
            f"k and v have {k.shape[0]} and {v.shape[0]} rows, expected as many",
            "give every key its value",
        )
        if heads[1] != heads[2] or heads[0] % heads[1]:
            call.fail(
                ShapeError,
                f"q, k and v have {heads[0]}, {heads[1]} and {heads[2]} heads, "
                "expected as many for k and v and a multiple of them for q",
                "check head_dim and the projections",
            )
        return heads[0]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        d_output, d_lse = attention_gradient(node, grads[0], grads[1], grads[2])
        q, k, v, cu_q, cu_k, sinks = node.inputs
        output, lse, _, rng_state = node.outputs

        @cache
        def backward() -> tuple[Tensor, ...]:
            inputs = (q, k, v, output, lse, rng_state, d_output, d_lse, cu_q, cu_k, sinks)
            return node.graph.apply("attn_varlen_grad", inputs, node.attrs)

        return [*(partial(_item, backward, i) for i in range(3)), None, None, partial(_item, backward, 3)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        rng = np.random.default_rng(0)
        cu_q, cu_k = np.array([0, 0, 1, 6], np.int32), np.array([0, 2, 9, 9], np.int32)
        q, k, v = (rng.standard_normal((rows, width), np.float32) for rows, width in ((7, 32), (9, 16), (9, 16)))

        def reference(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> Any:
            out = np.zeros((len(q), 4, 8))
            for b in range(3):
                at_q, at_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
                heads = (q[at_q].reshape(-1, 4, 8), k[at_k].reshape(-1, 2, 8), v[at_k].reshape(-1, 2, 8))
                out[at_q] = dense_attention(*heads, 8**-0.5, Mask.causal())[0]
            return out.reshape(-1, 32)

        def good(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
            return attn_varlen(q, k, v, 8, cu_q, cu_k, is_causal=True)[0]

        def bad(head_dim: int = 8, width: int = 16, dtype: Any = float32, **options: Any) -> Any:
            x = placeholder(dtype, [4, width])
            cu = constant(np.array([0, 4], np.int32))
            return attn_varlen(x, x, x, head_dim, cu, cu, **options)

        def capped_reference(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, sinks: Any) -> Any:
            heads = q.reshape(7, 4, 8), k.reshape(9, 2, 8), v.reshape(9, 2, 8)
            return dense_attention(*heads, 8**-0.5, Mask.window(4, 1), 1.5, sinks)[0].reshape(-1, 32)

        def capped(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sinks: Tensor) -> Tensor:
            return attn_varlen(q, k, v, 8, cu_q, cu_k, window_size=(4, 1), softcap=1.5, sinks=sinks)[0]

        one_q, one_k, sinks = (
            np.array([0, 7], np.int32),
            np.array([0, 9], np.int32),
            np.array([0.5, -0.25, 1.0, 0.0], np.float32),
        )
        return [
            GoodSample(good, (q, k, v, cu_q, cu_k), reference, ((0, 0), (1, 0), (2, 0))),
            GoodSample(capped, (q, k, v, one_q, one_k, sinks), capped_reference),
        ], [
            BadSample(lambda: bad(head_dim=12), ShapeError, "head_dim is 12"),
            BadSample(lambda: bad(width=20), ShapeError, "the width of q is 20"),
            BadSample(lambda: bad(dtype=int32), DTypeError, "q is int32"),
            BadSample(lambda: bad(window_size=(2, 0), mask=Mask.causal()), HetuError, "mask and window_size were both"),
            BadSample(lambda: bad(max_seqlen_q=1.5), DTypeError, "max_seqlen_q to be an int or an IntSymbol, got 1.5"),
        ]


@register
class AttnVarlenGrad(_VarlenAttention):
    """The gradients of ``attn_varlen`` with respect to q, k and v, and to the sinks if there are some."""

    name = "attn_varlen_grad"
    is_public = False
    inputs = (
        "q", "k", "v", "output", "softmax_lse", "rng_state", "d_output", "d_lse", "cu_seqlens_q", "cu_seqlens_k",
        "sinks",
    )  # fmt: skip
    outputs = ("d_q", "d_k", "d_v", "d_sinks")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        inputs = (*call.inputs[:3], call.inputs[-1])
        return [TensorSpec(item.dtype, item.symbolic_shape) for item in inputs if item is not None]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        return (), ()


def _item(made: Callable[[], tuple[Tensor, ...]], index: int) -> Tensor:
    return made()[index]


def attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_dim: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: IntSymbol | int | None = None,
    max_seqlen_k: IntSymbol | int | None = None,
    p_dropout: float = 0,
    softmax_scale: float = -1,
    zero_tensors: bool = False,
    is_causal: bool = False,
    return_softmax: bool = False,
    name: str | None = None,
    *,
    window_size: tuple[IntSymbol | int, IntSymbol | int] = NO_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mask: Mask | None = None,
) -> list[Tensor]:
    """Attends over sequences of different lengths that lie one after the other, without padding.

    Sequence b attends rows ``cu_seqlens_q[b] .. cu_seqlens_q[b+1]`` of q to rows ``cu_seqlens_k[b] ..
    cu_seqlens_k[b+1]`` of k and v. Rows of q past ``cu_seqlens_q[-1]`` belong to no sequence; their output is 0.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1, computed by algorithms 1 and 2 of Dao,
    "FlashAttention-2", 2023. Grouped queries: Ainslie et al., "GQA", 2023. Softcap: "Gemma 2", 2024, section 2.
    Sinks: the "gpt-oss" model card of OpenAI, 2025.

    Args:
        q: ``(T_q, H_q * head_dim)`` or ``(T_q, H_q, head_dim)``; float16, bfloat16, float32 (float64 on the
            torch backend).
        k: ``(T_k, H_k * head_dim)`` or ``(T_k, H_k, head_dim)``; H_q must be a multiple of H_k (grouped queries:
            query head h uses key head ``h // (H_q // H_k)``).
        v: As k.
        head_dim: A multiple of 8, at most 256.
        cu_seqlens_q: int32 ``(B + 1,)``: where each query sequence starts, and where the last one ends. They start at 0
            and never decrease; a sequence may have no tokens.
        cu_seqlens_k: As cu_seqlens_q, for the keys.
        max_seqlen_q: At least the length of the longest query sequence. None, or an unbound symbol, becomes that
            length.
        max_seqlen_k: As max_seqlen_q, for the keys.
        p_dropout: Probability in [0, 1) with which each attention weight is dropped.
        softmax_scale: Factor of the scores; -1 means ``1 / sqrt(head_dim)``.
        zero_tensors: Whether slots past a sequence's end are 0 in ``softmax_lse`` too, instead of ``-inf``.
        is_causal: Whether row i of n sees only the keys up to number ``i + m - n`` of m. The mask is aligned to the
            bottom right, as in FlashAttention.
        return_softmax: Whether to compute ``p``, which takes memory quadratic in the lengths.
        name: The node's name, unique in the graph; None makes one up.
        window_size: ``(left, right)``: row i of n sees only the keys from ``left`` before number ``i + m - n`` to
            ``right`` after it; -1 is no bound, and ``is_causal`` makes right 0. Each may be a symbol;
            one with ``min=-1`` may be no bound.
        softcap: Where positive, scores become ``softcap * tanh(score / softcap)`` before the softmax.
        sinks: Any of the floating dtypes, ``(H_q,)``: one more logit for each query head, which takes weight and gives
            no value. Its gradient has its dtype. None for none.
        mask: A :class:`hetu.Mask`, which replaces ``is_causal``. With a mask of slices, which count positions of the
            whole pack, rows and columns of dropout and columns of ``p`` are such positions too.

    Returns:
        ``[output, softmax_lse, p, rng_state]``: the output, like q; natural-log lse with the sink, float32
        ``(B, H_q, max_seqlen_q)``, for a row that sees no key its head's sink, or ``-inf`` (its output is 0); the
        weights in q's dtype
        ``(B, H_q, ceil128(max_seqlen_q), ceil128(max_seqlen_k))``, dropped ones negative, or an empty tensor;
        int64 ``(2,)`` on the CPU: seed, offset.

    Raises:
        ShapeError: If widths, head counts or ranks don't fit.
        DTypeError: If a dtype is not one of the above.
        HetuError: If cu_seqlens are computed from more than what is fed, constants and symbols, or both a mask and a
            window are given.
        BindingError: If cu_seqlens, max_seqlen or the mask don't fit the fed tensors, or the slices of a mask reach
            over more keys than ``p`` has columns, which a run checks.

    Example:
        >>> import hetu, numpy as np
        >>> n = hetu.IntSymbol("n")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [n, 2 * 8])
        ...     cu = hetu.placeholder(hetu.int32, [3])
        ...     out, lse, p, rng_state = hetu.attn_varlen(x, x, x, 8, cu, cu, is_causal=True)
        >>> g.run(lse, feed_dict={x: np.ones((8, 16), np.float32), cu: [0, 5, 8]}).shape
        torch.Size([2, 2, 5])
    """
    attrs = {
        "head_dim": head_dim,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "p_dropout": p_dropout,
        "softmax_scale": softmax_scale,
        "zero_tensors": zero_tensors,
        "mask": Mask.given(is_causal, window_size, mask, op="attn_varlen"),
        "softcap": softcap,
        "return_softmax": return_softmax,
    }
    inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k, sinks)
    return list(current_graph(inputs, "attn_varlen").apply("attn_varlen", inputs, attrs, name))
