"""What a call is refused for, before anything is computed. No values are needed to refuse it."""

from __future__ import annotations

import math
from types import FrameType
from typing import NoReturn

import torch

from hetu.arguments import shown
from hetu.errors import BindingError, DTypeError, HetuError, ShapeError, innermost
from hetu.ops.attention.common import FLOATS

_DTYPES = {getattr(torch, dtype.name) for dtype in FLOATS}
LENGTH_DTYPES = (torch.int32, torch.int64)
VARLEN = "attn_varlen"
"""The op that is meant where none is named."""

_PAD = "pad the heads with zeros, and give softmax_scale=1/sqrt(head_dim) of the unpadded ones"


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    rng_state: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
) -> None:
    """Refuses a call of ``attn_varlen``; runs on fake tensors too, where sizes are symbols.

    Sizes that depend on data pass here, and are compared when the op runs.
    """
    check_storage(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_heads(q, k, v)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_cu_seqlens(name, cu, has_values=q.device.type != "meta")
    if is_known(cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]):
        sizes = f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        refuse(
            ShapeError,
            f"cu_seqlens_q and cu_seqlens_k have {sizes} entries, expected as many",
            "give both batch_size + 1 entries",
        )
    check_options(rng_state, dropout_p, softmax_scale)


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, op: str = VARLEN) -> None:
    """Refuses q, k and v that no kernel takes."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES):
        _refuse_dtypes(q, k, v, op=op)
    if not q.ndim == k.ndim == v.ndim == 3:
        _refuse_ranks(q, k, v, op=op)
    (_, heads_q, head_dim), (rows_k, heads_k, dim_k), (rows_v, heads_v, dim_v) = q.shape, k.shape, v.shape
    if is_known(head_dim != dim_k) or is_known(head_dim != dim_v):
        sizes = f"{head_dim}, {dim_k} and {dim_v}"
        refuse(ShapeError, f"q, k and v have head_dim {sizes}, expected the same", _PAD, op)
    if is_known(head_dim < 8) or is_known(head_dim > 256) or is_known(head_dim % 8 != 0):
        refuse(ShapeError, f"head_dim is {head_dim}, expected a multiple of 8 from 8 to 256", _PAD, op)
    if is_known(rows_k != rows_v):
        what = f"k has {rows_k} rows and v has {rows_v} rows, expected as many"
        refuse(ShapeError, what, "give every key its value", op)
    if _has_wrong_heads(heads_q, heads_k, heads_v):
        refuse(
            ShapeError,
            f"q, k and v have {heads_q}, {heads_k} and {heads_v} heads, "
            "expected as many for k and v and a multiple of them for q",
            "check the projections",
            op,
        )
    if not q.device == k.device == v.device:
        devices = f"{q.device}, {k.device} and {v.device}"
        refuse(HetuError, f"q, k and v are on {devices}, expected one device", "move them to one device", op)


def check_options(
    rng_state: torch.Tensor | None, dropout_p: float, softmax_scale: float | None, op: str = VARLEN
) -> None:
    """Refuses options that mean nothing."""
    if not (isinstance(dropout_p, (int, float)) and 0 <= dropout_p < 1):
        refuse(HetuError, f"dropout_p is {dropout_p!r}, expected a probability in [0, 1)", "give 0 for no dropout", op)
    if dropout_p and (rng_state is None or rng_state.shape != (2,)):
        refuse(HetuError, "dropout has no rng_state, expected (seed, offset)", f"call hetu.functional.{op}", op)
    if softmax_scale is not None and not (isinstance(softmax_scale, (int, float)) and math.isfinite(softmax_scale)):
        what, fix = f"softmax_scale is {softmax_scale!r}, expected a finite number", "give None for 1/sqrt(head_dim)"
        refuse(HetuError, what, fix, op)


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; False where that depends on data that a trace doesn't have."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # sizes are symbols: it is loaded already

    return guard_or_false(condition)


def _has_wrong_heads(heads_q: int, heads_k: int, heads_v: int) -> bool:
    is_empty = is_known(heads_q == 0) or is_known(heads_k == 0)
    return is_empty or is_known(heads_k != heads_v) or is_known(heads_q % heads_k != 0)


def check_storage(op: str = VARLEN, /, **tensors: torch.Tensor) -> None:
    """Refuses tensors whose data don't lie in one dense block: nested and sparse ones."""
    for name, x in tensors.items():
        if x.is_nested:
            fix = "give its values() and, as cu_seqlens, its offsets()"
            refuse(HetuError, f"{name} is a nested tensor, expected a dense one", fix, op)
        if x.layout is not torch.strided:
            fix = f"{name}.to_dense()"
            refuse(HetuError, f"{name} has the layout {name_of(x.layout)}, expected a dense tensor", fix, op)


def check_tensor(value: object, name: str, op: str) -> None:
    """Refuses what is no dense tensor."""
    if not isinstance(value, torch.Tensor):
        refuse(DTypeError, f"{name} must be a tensor, got {shown(value)}", f"pass a torch tensor as {name}", op)
    check_storage(op, **{name: value})


def _check_cu_seqlens(name: str, cu: torch.Tensor, has_values: bool) -> None:
    if has_values and cu.device.type == "meta":
        fix = "give the lengths' values, best on the CPU"
        refuse(HetuError, f"{name} is a meta tensor, which has no values, but q has", fix)
    if cu.dtype not in LENGTH_DTYPES:
        refuse(DTypeError, f"{name} is {name_of(cu.dtype)}, expected int32 or int64", f"{name}.to(torch.int32)")
    if cu.ndim != 1:
        refuse(ShapeError, f"{name} has {cu.ndim} dimensions {list(cu.shape)}, expected 1", f"{name}.flatten()")
    if is_known(cu.shape[0] == 0):
        refuse(ShapeError, f"{name} is empty, expected at least its first entry, 0", "give batch_size + 1 entries")


def _refuse_dtypes(*tensors: torch.Tensor, op: str) -> NoReturn:
    for name, x in zip("qkv", tensors, strict=True):
        if x.dtype not in _DTYPES:
            wanted = ", ".join(dtype.name for dtype in FLOATS)
            refuse(DTypeError, f"{name} is {name_of(x.dtype)}, expected {wanted}", f"{name}.to(...) one of them", op)
    q, k, v = (name_of(x.dtype) for x in tensors)
    refuse(DTypeError, f"q, k and v are {q}, {k} and {v}, expected one dtype", "cast them to one dtype", op)


def _refuse_ranks(*tensors: torch.Tensor, op: str) -> NoReturn:
    name, x = next((name, x) for name, x in zip("qkv", tensors, strict=True) if x.ndim != 3)
    fix = "give (tokens, heads, head_dim): no batch dimension, heads apart from their entries"
    refuse(ShapeError, f"{name} has {x.ndim} dimensions {list(x.shape)}, expected 3", fix, op)


def check_longest(side: str, limit: int, longest: int, cu_seqlens: torch.Tensor) -> None:
    """Refuses a ``max_seqlen`` that is no int, or smaller than the longest sequence."""
    name = f"max_seqlen_{side}"
    if not isinstance(limit, int):
        refuse(DTypeError, f"{name} is {limit!r}, expected an int", f"leave {name} out: it is not needed")
    if limit < longest:
        sequence = int(cu_seqlens.diff().argmax())
        refuse(
            BindingError,
            f"{name} is {limit}, but sequence {sequence} of cu_seqlens_{side} has {longest} tokens",
            f"give {name} as at least {longest}, or leave it out",
        )


def name_of(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def refuse(kind: type[HetuError], what: str, fix: str, op: str = VARLEN) -> NoReturn:
    """Raises the error of a call; where it was made is the innermost line that is neither hetu's nor torch's."""
    raise kind(what, op=op, where=innermost(_is_foreign), fix=fix)


def _is_foreign(frame: FrameType) -> bool:
    """Whether a frame is neither hetu's nor torch's; code that torch generates stands in no module."""
    return frame.f_globals.get("__name__", "torch").partition(".")[0] not in ("hetu", "torch")
