"""The two halves of a transformer's layer: Attention and SwiGLU."""

from __future__ import annotations

from typing import Any

from hetu.arguments import flag, head_counts, integer
from hetu.dtypes import DType, as_dtype, float32
from hetu.errors import HetuError, caller
from hetu.graph import Tensor
from hetu.nn.layers import MOST, Linear, Module, named, prefix, uniform, width
from hetu.ops import linear, parallel_attn, parameter, rotary, swiglu


class SwiGLU(Module):
    """``down(silu(gate(x)) * up(x))``, a Llama's feed-forward; see :func:`hetu.swiglu`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.

    Args:
        in_features: The width of what it is given and gives.
        hidden_features: The width in between.
        bias: Whether the three products have one.
        dtype: A floating element type.
        name: What its parameters' names begin with: ``name.gate_proj.weight`` and so on, as transformers has them.

    Attributes:
        gate_proj: A :class:`Linear`.
        up_proj: A :class:`Linear`.
        down_proj: A :class:`Linear`.

    Raises:
        HetuError: If a width is no positive int, or a name is taken.
        DTypeError: If the dtype is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run"):
        ...     mlp = hetu.nn.SwiGLU(8, 16, name="mlp")
        ...     mlp(hetu.placeholder(hetu.float32, [3, 8], name="x"))
        hetu.Tensor(linear_2: float32[3, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        bias: bool = False,
        dtype: DType | Any = float32,
        name: str | None = None,
    ) -> None:
        outer = width(in_features, "in_features", "nn.SwiGLU")
        inner = width(hidden_features, "hidden_features", "nn.SwiGLU")
        name = prefix(name, "nn.SwiGLU")
        self.gate_proj = Linear(outer, inner, bias, dtype, named(name, "gate_proj"))
        self.up_proj = Linear(outer, inner, bias, dtype, named(name, "up_proj"))
        self.down_proj = Linear(inner, outer, bias, dtype, named(name, "down_proj"))

    def __call__(self, x: Tensor) -> Tensor:
        """Takes ``(..., in_features)``, gives the same shape."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Attention(Module):
    """Self-attention over sequences that may be spread over pipelines, as ``torch.nn.MultiheadAttention``.

    Parameters have that module's names, order and initial values: q, k and v are one product, whose weight is drawn
    evenly from ``+-sqrt(6 / (rows + columns))``; biases begin with 0. With fewer key than query heads the rows of k and
    v are fewer.

    Source: ``torch.nn.MultiheadAttention``; initial values by Glorot and Bengio, 2010, equation 16; grouped queries
    by Ainslie et al., "GQA", 2023.

    Args:
        embed_dim: The width of what it is given and gives.
        num_heads: Query heads.
        num_kv_heads: Key heads, of which each serves ``num_heads / num_kv_heads`` query heads; None for as many.
        head_dim: Columns per head, a multiple of 8 up to 256; None for ``embed_dim / num_heads``.
        bias: Whether both products have one.
        dtype: A floating element type.
        name: What its parameters' names begin with: ``name.in_proj_weight`` and so on; None makes names up.

    Attributes:
        in_proj_weight: ``((num_heads + 2 * num_kv_heads) * head_dim, embed_dim)``: all q, all k, all v.
        in_proj_bias: One number per row of it, or None.
        out_proj: A :class:`Linear`.

    Raises:
        HetuError: If a number is no positive int, the heads don't divide, or a name is taken.
        DTypeError: If the dtype is not floating.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run", strategies=[hetu.Strategy([s], [0])]):
        ...     attention = hetu.nn.Attention(16, 2, name="attn")
        ...     attention(hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 16], name="x"))
        hetu.Tensor(linear_1: float32[rows, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dtype: DType | Any = float32,
        name: str | None = None,
    ) -> None:
        op = "nn.Attention"
        columns = width(embed_dim, "embed_dim", op)
        given = num_heads if num_kv_heads is None else num_kv_heads
        heads, key_heads = head_counts(num_heads, given, most=MOST, op=op)
        if head_dim is None and columns % heads:
            what = f"embed_dim of {columns} is no multiple of num_heads, {heads}"
            raise HetuError(what, op=op, where=caller(), fix="choose numbers that divide, or give head_dim")
        self.head_dim = (
            columns // heads if head_dim is None else integer(head_dim, "head_dim", least=1, most=256, op=op)
        )
        self.num_heads, self.num_kv_heads = heads, key_heads
        rows = width((heads + 2 * key_heads) * self.head_dim, "the width of all num_heads and num_kv_heads", op)
        has_bias, name, kind = flag(bias, "bias", op=op), prefix(name, op), as_dtype(dtype)
        xavier = uniform((6 / (rows + columns)) ** 0.5)
        self.in_proj_weight = parameter(xavier, [rows, columns], kind, name=named(name, "in_proj_weight"))
        self.in_proj_bias = parameter(0.0, [rows], kind, name=named(name, "in_proj_bias")) if has_bias else None
        self.out_proj = Linear(heads * self.head_dim, columns, False, kind, named(name, "out_proj"))
        if has_bias:
            self.out_proj.bias = parameter(0.0, [columns], kind, name=named(named(name, "out_proj"), "bias"))

    def __call__(
        self, x: Tensor, position: Tensor | None = None, *, rotary_base: float = 10000.0, **options: Any
    ) -> Tensor:
        """Attends over this pipeline's rows and those of its context group.

        Args:
            x: ``(rows, embed_dim)``.
            position: int32 or int64 ``(rows,)``, each row's position in its document, for rotary embeddings: what
                :func:`hetu.layout_tokens` gives. None for no rotary embeddings.
            rotary_base: See :func:`hetu.rotary`.
            options: What :func:`hetu.parallel_attn` takes: strategies' lists where the graph has none, ``packing``,
                ``cu_seqlens_q``, ``is_causal``, ``window_size`` and so on.

        Returns:
            ``(rows, embed_dim)``.
        """
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        if position is not None:
            heads = self.num_heads + self.num_kv_heads
            qkv = rotary(qkv, position, self.head_dim, num_heads=heads, base=rotary_base)
        attended = parallel_attn(qkv, self.head_dim, self.num_heads // self.num_kv_heads, **options)[0]
        return self.out_proj(attended)
