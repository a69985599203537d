"""``rotary``: positions as rotations of the heads of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.arguments import flag, integer, real
from hetu.dtypes import bfloat16, float32, float64, int32, int64
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import build, floating, output, rank, tensor
from hetu.ops.common.layers import GradientOp, check_indices
from hetu.ops.common.samples import eighths
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder

__all__ = ["rotary"]


@register
class RotaryTable(GradientOp):
    """Cosines and sines of the angles of all rows: a node of its own, so that all layers share one table."""

    name = "rotary_table"
    inputs = ("positions",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        call.op = "rotary"  # which is what the user called
        positions, head_dim, base = tensor(call, 0, "positions"), call.attrs["head_dim"], call.attrs["base"]
        check_indices(call, positions, "positions")
        rank(call, positions, "positions", 1, 1)
        head_dim = integer(head_dim, "head_dim", least=2, most=2**31, op=call.op, error=ShapeError)
        if head_dim % 2:
            call.fail(ShapeError, f"expected head_dim to be even, got {head_dim}", "turn an even number of entries")
        base = real(base, "base", "a positive number", lambda value: 0 < value < math.inf, op=call.op)
        call.attrs.update(head_dim=head_dim, base=base)
        return [output(call, call.attrs["dtype"], (positions.symbolic_shape[0], 2, head_dim // 2))]


@register
class Rotary(OpDef):
    """Rotation of pairs of columns by a table's angles, or (``inverse``) by their negatives."""

    name = "rotary"
    inputs = ("x", "table")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, table = tensor(call, 0, "x"), tensor(call, 1, "table")
        floating(call, x, "x")
        rank(call, x, "x", 2, 3)
        rows = f"expected one position per row of x, got {table.shape[0]} for {x.shape[0]} rows"
        call.same(table.symbolic_shape[0], x.symbolic_shape[0], rows)
        heads = self._heads(call, x)
        wanted = call.attrs["num_heads"]
        if wanted is not None:
            fix = f"x has {heads} head(s)"
            wanted = integer(wanted, "num_heads", least=0, most=heads, op=call.op, error=ShapeError, fix=fix)
        call.attrs["num_heads"] = heads if wanted is None else wanted
        call.attrs["interleaved"] = flag(call.attrs["interleaved"], "interleaved", op=call.op)
        return [output(call, x.dtype, x.symbolic_shape)]

    @staticmethod
    def _heads(call: Call, x: Tensor) -> int:
        """How many heads x has."""
        head_dim, width = call.attrs["head_dim"], x.shape[1]
        if x.ndim == 3:
            if x.shape[2] != head_dim:
                call.fail(ShapeError, f"expected the last dimension of x to be head_dim {head_dim}, got {x.shape[2]}")
            width = width * head_dim
        if not isinstance(width, int) or width % head_dim:
            what = f"expected the width of x to be a plain int, a multiple of head_dim {head_dim}, got {width}"
            call.fail(ShapeError, what, "check head_dim and the projection that makes x")
        return width // int(head_dim)

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        attrs = node.attrs | {"inverse": not node.attrs["inverse"]}
        return [lambda: build("rotary", (grads[0], node.inputs[1]), attrs), None]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def reference(x: np.ndarray, at: np.ndarray, D: int, H: int, base: float = 1e4, pairs: bool = False) -> Any:
            angle = at[:, None, None] * base ** (-2 * np.arange(D // 2) / D)
            out = np.array(x).reshape(len(x), -1, D)
            parts = np.s_[:, :H, ::2], np.s_[:, :H, 1::2]
            one, two = parts if pairs else (np.s_[:, :H, : D // 2], np.s_[:, :H, D // 2 :])
            a, b = out[one].copy(), out[two].copy()
            out[one], out[two] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
            return out.reshape(x.shape)

        at, far = np.array([0, 1, 5]), np.array([2**20, 7, 2**20 - 1], "int32")
        good = [
            GoodSample(
                lambda x, t: rotary(x, t, 4), [eighths(3, 8), at], lambda x, t: reference(x, t, 4, 2), [(0, 0), (1, 0)]
            ),
            GoodSample(lambda x, t: rotary(x, t, 4, 2), [eighths(3, 3, 4), at], lambda x, t: reference(x, t, 4, 2)),
            GoodSample(
                lambda x, t: rotary(x, t, 6, 1, interleaved=True),
                [eighths(3, 12), far],
                lambda x, t: reference(x, t, 6, 1, pairs=True),
                [(0, 0), (1, 0)],
            ),
            GoodSample(
                lambda x, t: rotary(x, t, 2, base=500.0),
                [eighths(3, 2, dtype="float64"), far],
                lambda x, t: reference(x, t, 2, 1, 500.0),
            ),
            GoodSample(
                lambda x, t: rotary(cast(x, bfloat16), t, 8),
                [eighths(3, 16), far],
                lambda x, t: reference(x, t, 8, 2),
                smooth=False,
            ),
            GoodSample(lambda x, t: rotary(x, t, 4, 0), [eighths(3, 8), at], lambda x, t: x),
            GoodSample(lambda x, t: rotary(x, t, 4), [eighths(0, 8), at[:0]], lambda x, t: x),
        ]
        bad = [
            BadSample(lambda: rotary(_float(3, 8), _float(3), 4), DTypeError, "positions to be int32 or int64"),
            BadSample(lambda: rotary(_float(3, 8), _at(), 3), ShapeError, "head_dim to be even"),
            BadSample(lambda: rotary(_float(3, 8), _at(), 4, base=0), HetuError, "base to be a positive"),
            BadSample(lambda: rotary(_float(3, 10), _at(), 4), ShapeError, "multiple of head_dim 4, got 10"),
            BadSample(lambda: rotary(_float(3, 2, 8), _at(), 4), ShapeError, "to be head_dim 4, got 8"),
            BadSample(lambda: rotary(_float(4, 8), _at(), 4), ShapeError, "got 3 for 4 rows"),
            BadSample(lambda: rotary(_float(3, 8), _at(), 4, 3), ShapeError, "to be an int from 0 to 2, got 3"),
            BadSample(lambda: rotary(_float(3), _at(), 4), ShapeError, "x to have 2 to 3 dimension(s)"),
            BadSample(lambda: rotary(placeholder(int32, [3, 8]), _at(), 4), DTypeError, "expected x to be floating"),
        ]
        return good, bad


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def _at() -> Tensor:
    return placeholder(int64, [3])


def rotary(
    x: Tensor,
    positions: Tensor,
    head_dim: int,
    num_heads: int | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    name: str | None = None,
) -> Tensor:
    """Rotates pairs of columns of each head by angles that grow with the row's position.

    Pair i of a head is turned by ``position * base ** (-2 * i / head_dim)``, so that the product of a rotated query
    and a rotated key depends on how far apart they are, and not on where they are. Angles are exact to float64;
    rotations are computed in float32, and in float64 for float64. Source: Su et al., "RoFormer", 2021, equation 34.

    Args:
        x: Floating, ``(T, H * head_dim)`` or ``(T, H, head_dim)``.
        positions: int32 or int64, ``(T,)``: each row's position in its document. The ``position`` that
            :func:`layout_tokens` gives is right under every parallel strategy.
        head_dim: Columns per head, an even number.
        num_heads: How many heads are rotated, from the first on; the rest passes through. None rotates all. A packed
            qkv is rotated in one go with ``num_heads = H_q + H_kv``.
        base: A positive number; with a larger one pairs turn more slowly.
        interleaved: Whether pairs are columns ``(2i, 2i + 1)``, as in GPT-J, and not ``(i, i + head_dim / 2)``, as in
            Llama and GPT-NeoX.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        ShapeError: If head_dim is odd or does not divide x's width, x has no ``num_heads`` heads, or there is not one
            position per row.
        DTypeError: If x is not floating, or positions are not int32 or int64.
        HetuError: If base is no positive number.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3, 2], name="x")
        ...     y = hetu.rotary(x, hetu.constant([0, 1, 2]), head_dim=2)
        >>> g.run(y, feed_dict={x: [[1.0, 0.0]] * 3})
        tensor([[ 1.0000,  0.0000],
                [ 0.5403,  0.8415],
                [-0.4161,  0.9093]])
    """
    dtype = float64 if isinstance(x, Tensor) and x.dtype == float64 else float32
    table = build("rotary_table", (positions,), {"head_dim": head_dim, "base": base, "dtype": dtype})
    own = table.op.attrs["head_dim"]  # as an int
    attrs = {"head_dim": own, "num_heads": num_heads, "interleaved": interleaved, "inverse": False}
    return build("rotary", (x, table), attrs, name)
