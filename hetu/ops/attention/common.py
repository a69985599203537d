"""Checks and the plain numpy oracle that both attention ops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hetu.arguments import flag, int_of, real, shown
from hetu.dtypes import DType, bfloat16, float16, float32, float64, int32
from hetu.errors import BindingError, DTypeError, HetuError, ShapeError, UnboundSymbolError, caller
from hetu.graph import Call, Node, Pipeline, Tensor
from hetu.graph.passes import live_nodes
from hetu.ops.common.build import probability
from hetu.parallel import Mask
from hetu.symbols import IntSymbol, as_size, as_symbol, ceil_div

FLOATS = (float16, bfloat16, float32, float64)
_LEAST_CAP, _LARGEST_CAP = 2.0**-126, 2.0**128 - 2.0**104
"""The normal numbers of float32."""


def ceil128(size: int | IntSymbol) -> IntSymbol:
    """The size rounded up to a multiple of 128, as ``p`` is padded."""
    return as_symbol(ceil_div(size, 128) * 128)


def lse_dtype(value: Tensor) -> DType:
    """Log-sum-exps are float32 whatever the inputs are, but for float64, which is computed in float64 throughout."""
    return float64 if value.dtype == float64 else float32


def check_tensor(call: Call, name: str, value: Any, dtypes: tuple[DType, ...], ranks: tuple[int, ...]) -> Tensor:
    """Demands a tensor of one of the dtypes and ranks."""
    if not isinstance(value, Tensor):
        call.fail(DTypeError, f"{name} must be a tensor, got {shown(value)}", f"pass a graph tensor as {name}")
    if value.dtype not in dtypes:
        names = " or ".join(dtype.name for dtype in dtypes)
        call.fail(
            DTypeError, f"{name} is {value.dtype.name}, expected {names}", f"cast it: hetu.cast({name}, {dtypes[0]})"
        )
    if value.ndim not in ranks:
        wanted = " or ".join(map(str, ranks))
        call.fail(
            ShapeError, f"{name} has {value.ndim} dimensions {list(value.shape)}, expected {wanted}", "reshape it"
        )
    return value


def check_cu_seqlens(call: Call, name: str, value: Any, ranks: tuple[int, ...] = (1,)) -> Tensor:
    """Demands an int32 tensor of cumulative lengths with at least one entry."""
    cu = check_tensor(call, name, value, (int32,), ranks)
    call.check(cu.symbolic_shape[-1] >= 1, f"expected {name} to hold at least its first entry, 0")
    for node in live_nodes([cu]):
        if not node.definition.is_known_to_planning:
            call.fail(
                HetuError,
                f"{name} is computed from {node.name}, made at {node.where.short}, which has no value yet "
                "when lengths are planned",
                f"compute {name} from what is fed, from constants and from symbols only",
            )
    return cu


def check_width(call: Call, name: str, width: IntSymbol, head_dim: int) -> int:
    """Demands a width that is a plain int and a whole number of heads; gives that number."""
    if width.constant is None:
        call.fail(
            ShapeError, f"the width of {name} is {width}, expected a plain int", "give heads * head_dim as an int"
        )
    if width.constant == 0 or width.constant % head_dim:
        call.fail(
            ShapeError,
            f"the width of {name} is {width.constant}, expected a positive multiple of head_dim {head_dim}",
            "check head_dim and the projection that makes it",
        )
    return width.constant // head_dim


def check_options(call: Call) -> None:
    """Checks head_dim, p_dropout, softmax_scale and softcap, and replaces a scale of -1 by its value."""
    attrs = call.attrs
    head_dim = attrs["head_dim"] = int_of(attrs["head_dim"]) or attrs["head_dim"]
    if type(head_dim) is not int or not 8 <= head_dim <= 256 or head_dim % 8:
        fix = "pad the heads with zeros, and give the softmax_scale of the unpadded: 1/sqrt(head_dim)"
        call.fail(ShapeError, f"head_dim is {shown(head_dim)}, expected a multiple of 8 from 8 to 256", fix)
    attrs["p_dropout"] = probability(call, "p_dropout")
    scale = real(attrs["softmax_scale"], "softmax_scale", op=call.op, fix="give -1 for 1/sqrt(head_dim)")
    attrs["softmax_scale"] = 1 / math.sqrt(head_dim) if scale == -1 else scale
    attrs["softcap"] = softcap_of(attrs["softcap"], call.op)
    for name in ("zero_tensors", "return_softmax"):
        if name in attrs:
            attrs[name] = flag(attrs[name], name, op=call.op)


def check_sinks(call: Call, value: Any, num_q: int) -> Tensor | None:
    """Demands a floating tensor with one number per query head, or None."""
    if value is None:
        return None
    sinks = check_tensor(call, "sinks", value, FLOATS, (1,))
    what = f"sinks has {sinks.shape[0]} entries, expected one per query head: {num_q}"
    call.same(sinks.symbolic_shape[0], num_q, what, "give a tensor of shape (H_q,)")
    return sinks


def softcap_of(value: Any, op: str) -> float:
    """A cap of scores, checked: kernels divide by it in float32.

    Raises:
        HetuError: If it is negative, or neither 0 nor a normal number of float32.
    """
    wanted, fix = "a finite number of at least 0 that float32 holds", "give 0 for no cap"
    return real(value, "softcap", wanted, is_softcap, op=op, fix=fix)


def is_softcap(cap: float) -> bool:
    """Whether scores can be capped so."""
    return cap == 0 or _LEAST_CAP <= cap <= _LARGEST_CAP


def bound_mask(node: Node, mask: Mask, value: Callable[[IntSymbol], int]) -> Mask:
    """A mask of a node's, or of its strategy's, with its symbols' values.

    Raises:
        UnboundSymbolError: If one has none.
        BindingError: If the mask has no such numbers.
    """
    if not mask.symbols:
        return mask
    try:
        return mask.bound(value)
    except UnboundSymbolError:
        raise
    except HetuError as error:
        bound = [f"{symbol} = {value(symbol)}" for symbol in mask.symbols]
        refuse(node, f"{mask.name}: {error.what}", error.fix or "bind other values", bound)


def max_seqlen(call: Call, name: str) -> IntSymbol:
    """The bound on lengths that the user gave, or a symbol of the op's own that the lengths will tell."""
    given = call.attrs[name]
    symbol = call.symbol(name) if given is None else as_symbol(as_size(given, name, op=call.op))
    call.check(symbol >= 0, f"expected {name} to be at least 0")
    call.attrs[name] = symbol
    return symbol


def read_cu_seqlens(node: Node, name: str, pipeline: Pipeline) -> NDArray[np.int64]:
    """The values of cumulative lengths, checked: from 0, never decreasing.

    Raises:
        BindingError: If they are not.
    """
    values = np.asarray(pipeline.host(node.input(name)), np.int64)
    if fault := cu_seqlens_fault(name, values):
        refuse(node, *fault)
    return values


def longest_of(cu_seqlens: NDArray[np.int64]) -> int:
    """The longest sequence of ``(B + 1,)`` cumulative lengths; 0 if there is none.

    Example:
        >>> longest_of(np.array([0, 3, 4]))
        3
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    return int(lengths.item(lengths.argmax())) if len(lengths) else 0  # a third of the time of max()


def cu_seqlens_fault(name: str, values: NDArray[np.int64]) -> tuple[str, str] | None:
    """What is wrong with the values of cumulative lengths, and what to do about it; None if nothing is.

    Example:
        >>> cu_seqlens_fault("cu_seqlens_q", np.array([1, 4]))[0]
        'cu_seqlens_q starts with 1, expected 0'
    """
    is_empty = values.shape[-1] == 0
    # A row of lengths is by far the most common: its first entry is asked for at a fifth of the time of any().
    if is_empty or (values.item(0) if values.ndim == 1 else values[..., 0].any()):
        first = "nothing" if is_empty else values[..., 0].tolist()
        return f"{name} starts with {first}, expected 0", "cu_seqlens are cumulative: [0, n0, n0 + n1, ...]"
    drops = values[..., 1:] < values[..., :-1]
    if drops.size and drops.item(drops.argmax()):
        at = tuple(np.argwhere(drops)[0])
        after = (*at[:-1], at[-1] + 1)
        return (
            f"{name} decreases from {values[at]} to {values[after]} at sequence {at[-1]}",
            "cu_seqlens are cumulative: pass torch.cumsum of the lengths, with a 0 in front",
        )
    return None


def check_longest(node: Node, bound: str, lengths: NDArray[np.int64], of: str, pipeline: Pipeline) -> None:
    """Refuses a bound ``max_seqlen`` that is smaller than the longest sequence."""
    symbol = node.attrs[bound]
    limit = pipeline.value(symbol)
    if len(lengths) and lengths.max() > limit:
        longest = int(lengths.argmax())
        refuse(
            node,
            f"{bound} is {limit}, but sequence {longest} of {of} has {lengths[longest]} tokens",
            raise_bound(symbol, bound, int(lengths.max())),
            pipeline.describe(symbol),
        )


def raise_bound(symbol: IntSymbol, name: str, least: int) -> str:
    """How to make an upper bound large enough: bind the symbol that it is, or those that it is made of."""
    if symbol.is_leaf:
        return f"bind {symbol} to at least {least}, or leave it unbound"
    if symbol.constant is not None:
        return f"give {name} as at least {least}, or leave it out"
    return f"bind {', '.join(map(str, symbol.leaves))} so that {symbol} is at least {least}, or leave {name} out"


def attention_gradient(
    node: Node, d_output: Tensor | None, d_lse: Tensor | None, d_p: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the output and of the lse that the backward of an attention starts from.

    Raises:
        HetuError: If something depends on ``p``: it is there to be looked at.
    """
    if d_p is not None:
        raise HetuError(
            f"the probabilities p of {node.name}, made at {node.where.short}, have no gradient",
            op="gradients",
            where=caller(),
            fix="compute what is differentiated from the output or softmax_lse",
        )
    output = node.outputs[0]
    if d_output is None:
        attrs = {"shape": output.symbolic_shape, "value": 0.0, "dtype": output.dtype}
        d_output = node.graph.apply("full", (), attrs)[0]
    return d_output, d_lse


def refuse(node: Node, what: str, fix: str, bound: Sequence[str] = ()) -> NoReturn:
    """Raises the error of a run whose values don't fit the op."""
    raise BindingError(what, op=node.definition.name, where=node.where, bound=bound, fix=fix)


def dense_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    mask: Mask,
    softcap: float = 0.0,
    sinks: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The definition in plain numpy, float64: the oracle of the samples.

    Args:
        q: ``(n, H_q, head_dim)``.
        k: ``(m, H_k, head_dim)``; query head h uses key head ``h // (H_q // H_k)``.
        v: Like k.
        scale: The factor of the scores.
        mask: Which keys a query sees; query i stands at key ``i + m - n``.
        softcap: Where positive, scores become ``softcap * tanh(score / softcap)``.
        sinks: ``(H_q,)``, one more logit for each head, which gives no value; None for none.

    Returns:
        out ``(n, H_q, head_dim)``, lse ``(H_q, n)``, p ``(H_q, n, m)``. Rows that see nothing: 0, -inf or the sink, 0.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, 1).astype(np.float64), np.repeat(v, group, 1).astype(np.float64)
    scores = np.einsum("ihd,jhd->hij", q.astype(np.float64), keys) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    n, m = scores.shape[1:]
    scores = np.where(mask.matrix(n, m), scores, -np.inf)
    if sinks is not None:  # the last column, whose value is 0
        last = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (len(sinks), n, 1))
        scores, values = np.concatenate([scores, last], -1), np.pad(values, ((0, 1), (0, 0), (0, 0)))
    top = scores.max(-1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(top), top, 0))[..., 0]
    return np.einsum("hij,jhd->ihd", p, values), lse, p[..., :m]
