"""``attn_varlen`` as PyTorch ops, ``hetu::attn_varlen`` and its backward, around the kernels that a graph runs.

A call has two parts. :func:`prepare` checks the arguments and finds the plan of the lengths, which are read on the
host; :func:`forward` and :func:`backward` then only allocate and call the kernel. :func:`hetu.functional.attn_varlen`
calls the parts itself where it can, because torch's dispatcher may cost more than both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch

from hetu.backends.attention.contract import AttentionState, BackwardState, Dropout, compute_dtype, dropout_key
from hetu.backends.attention.family import AttendCall, AttendSignature, KernelFamily
from hetu.backends.attention.options import with_rows
from hetu.backends.families import choose, default_backend
from hetu.backends.memory import empty
from hetu.cache import LRU
from hetu.config import settings
from hetu.errors import BindingError, DTypeError, HetuError, ShapeError, innermost
from hetu.ops.attention.common import FLOATS, cu_seqlens_fault, longest_of
from hetu.parallel import Mask
from hetu.parallel.plan.varlen import VarlenPlan
from hetu.planning.arrays import host_array

HostArray = np.ndarray[Any, Any]

_DTYPES = {getattr(torch, dtype.name) for dtype in FLOATS}
_LENGTH_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """What the lengths of a call make: its plan, with lse as ``(1, H_q, T_q)``, and the longest sequences."""

    plan: VarlenPlan
    longest_q: int
    longest_k: int


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """A call that is checked and planned.

    Attributes:
        lengths: What its lengths make.
        family: Whose kernels compute the forward.
        backward_family: Whose kernels compute the backward: in a thread of autograd's, which knows no ``hetu.config``.
        softmax_scale: Of the scores.
        dropout: Of the weights.
        key_position: What dropout needs of the keys.
    """

    lengths: Lengths
    family: KernelFamily
    backward_family: KernelFamily
    softmax_scale: float
    dropout: Dropout | None = None
    key_position: HostArray | None = None


lengths_seen: LRU[Lengths] = LRU(256)
"""Lengths by the bytes of cu_seqlens."""

calls_seen: LRU[Attention] = LRU(256)
"""Calls without dropout, by all that they are checked for: seen again, they need no check."""


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    rng_state: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    dropout_p: float,
    softmax_scale: float | None,
) -> Attention:
    """Checks a call and finds its plan, by the values of cu_seqlens.

    Raises:
        HetuError: Whatever :func:`hetu.functional.attn_varlen` refuses.
    """
    is_usual = not dropout_p and type(softmax_scale) in _SCALES
    if not (is_usual and cu_seqlens_q.dtype in _LENGTH_DTYPES and cu_seqlens_k.dtype in _LENGTH_DTYPES):
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, dropout_p, softmax_scale)
    cu_q = host_array(cu_seqlens_q)
    cu_k = cu_q if cu_seqlens_k is cu_seqlens_q else host_array(cu_seqlens_k)

    if is_usual:

        def checked() -> Attention:
            check(q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, dropout_p, softmax_scale)
            return _make(q, k, cu_q, cu_k, is_causal, softmax_scale)

        sizes = (q.shape, k.shape, v.shape, cu_q.shape, cu_k.shape, cu_seqlens_q.dtype, cu_seqlens_k.dtype)
        types = (q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, settings().backend)
        call = calls_seen.get((cu_q.tobytes(), cu_k.tobytes(), sizes, types, is_causal, softmax_scale), checked)
    else:
        dropout = None
        if dropout_p and rng_state is not None:
            seed, offset = rng_state.tolist()
            dropout = Dropout(dropout_p, dropout_key(seed, offset, 0))
        call = _make(q, k, cu_q, cu_k, is_causal, softmax_scale, dropout)
    if max_seqlen_q is not None:
        _check_longest("q", max_seqlen_q, call.lengths.longest_q, cu_seqlens_q)
    if max_seqlen_k is not None:
        _check_longest("k", max_seqlen_k, call.lengths.longest_k, cu_seqlens_k)
    return call


def _make(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_q: HostArray,
    cu_k: HostArray,
    is_causal: bool,
    softmax_scale: float | None,
    dropout: Dropout | None = None,
) -> Attention:
    """Plans a call that is checked, or finds the plan of its lengths."""
    (rows_q, num_q, head_dim), (rows_k, num_kv, _) = q.shape, k.shape
    key = (cu_q.tobytes(), cu_q.itemsize, cu_k.tobytes(), cu_k.itemsize, rows_q, rows_k, is_causal)
    lengths = lengths_seen.get(key, lambda: _plan(cu_q, cu_k, rows_q, rows_k, is_causal))
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    kind = q.dtype, q.device, head_dim, num_q, num_kv, dropout is not None
    forward_of, backward_of = families(default_backend(q.device), *kind)
    return Attention(lengths, forward_of, backward_of, scale, dropout, lengths.plan.key_position if dropout else None)


_SCALES = {type(None), float, int}


def forward(
    call: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, needs_lse: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, like q, and lse ``(H_q, T_q)``, both contiguous; ``(1, H_q, T_q)`` where nobody needs it."""
    rows, heads, _ = shape = q.shape
    dtype, device = q.dtype, q.device
    out = empty(shape, dtype, device)
    lse = empty((1, heads, rows), compute_dtype(dtype), device)  # the kernel writes every row, the tail's too
    state = AttentionState(out, lse, None, None)
    call.family.attend(_attend_call(call, q, k, v), state)
    return out, lse[0] if needs_lse else lse


def backward(
    call: Attention,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, contiguous, from those of the output and of lse."""
    dout = torch.zeros_like(out) if dout is None else with_rows(dout)
    dq, dk, dv = (empty(x.shape, x.dtype, x.device) for x in (q, k, v))
    delta = call.backward_family.row_dot(out, dout)
    if dlse is not None:
        delta -= dlse.T  # a row of q at its own index: nothing to gather, as attention_delta does
    state = BackwardState(dout, lse[None], delta, dq)
    call.backward_family.attend_backward(_attend_call(call, q, k, v), state, dk, dv)
    return dq, dk, dv


def _attend_call(call: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttendCall:
    """What a checked call attends to."""
    plan = call.lengths.plan
    return AttendCall(
        with_rows(q),
        with_rows(k),
        with_rows(v),
        plan.spans,
        plan.table,
        call.softmax_scale,
        None,
        call.dropout,
        call.key_position,
    )


@cache
def families(backend: str, *kind: Any) -> tuple[KernelFamily, KernelFamily]:
    """The families of the forward and the backward, chosen as a graph chooses them; ``kind`` begins a signature."""
    forward = AttendSignature(*kind)
    return choose(backend, forward).family, choose(backend, forward._replace(is_backward=True)).family


def _plan(cu_q: HostArray, cu_k: HostArray, rows_q: int, rows_k: int, is_causal: bool) -> Lengths:
    """Checks the values of cu_seqlens, and plans them."""
    own_q = np.array(cu_q, np.int64)  # a copy: the tensor's memory may change
    own_k = own_q if cu_k is cu_q else np.array(cu_k, np.int64)
    for name, values, rows in (("q", own_q, rows_q), ("k", own_k, rows_k)):
        is_new = name == "q" or values is not own_q
        if is_new and (fault := cu_seqlens_fault(f"cu_seqlens_{name}", values)):
            refuse(BindingError, *fault)
        if values[-1] > rows:
            what = f"cu_seqlens_{name} ends at {values[-1]}, but {name} has {rows} rows"
            refuse(BindingError, what, f"give {name} all its tokens")
    plan = VarlenPlan.build(own_q, own_k, rows_q, Mask.of(is_causal), packed_lse=True)
    longest_q = longest_of(own_q)
    return Lengths(plan, longest_q, longest_q if own_k is own_q else longest_of(own_k))


# checks


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
    """Refuses what no values are needed to refuse; runs on fake tensors too, where sizes are symbols."""
    check_heads(q, k, v)
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        sizes = f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        refuse(
            ShapeError,
            f"cu_seqlens_q and cu_seqlens_k have {sizes} entries, expected as many",
            "give both batch_size + 1 entries",
        )
    check_options(rng_state, dropout_p, softmax_scale)


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, op: str = "attn_varlen") -> None:
    """Refuses q, k and v that no kernel takes."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES):
        _refuse_dtypes(q, k, v, op=op)
    if not q.ndim == k.ndim == v.ndim == 3:
        _refuse_ranks(q, k, v, op=op)
    (_, heads_q, head_dim), (rows_k, heads_k, dim_k), (rows_v, heads_v, dim_v) = q.shape, k.shape, v.shape
    if not head_dim == dim_k == dim_v:
        sizes = f"{head_dim}, {dim_k} and {dim_v}"
        refuse(ShapeError, f"q, k and v have head_dim {sizes}, expected the same", _PAD, op)
    if head_dim < 8 or head_dim > 256 or head_dim % 8:
        refuse(ShapeError, f"head_dim is {head_dim}, expected a multiple of 8 from 8 to 256", _PAD, op)
    if rows_k != rows_v:
        what = f"k has {rows_k} rows and v has {rows_v} rows, expected as many"
        refuse(ShapeError, what, "give every key its value", op)
    if heads_k == 0 or heads_k != heads_v or heads_q == 0 or heads_q % heads_k:
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
    rng_state: torch.Tensor | None, dropout_p: float, softmax_scale: float | None, op: str = "attn_varlen"
) -> None:
    """Refuses options that mean nothing."""
    if not (isinstance(dropout_p, (int, float)) and 0 <= dropout_p < 1):
        refuse(HetuError, f"dropout_p is {dropout_p!r}, expected a probability in [0, 1)", "give 0 for no dropout", op)
    if dropout_p and (rng_state is None or rng_state.shape != (2,)):
        refuse(HetuError, "dropout has no rng_state, expected (seed, offset)", f"call hetu.functional.{op}", op)
    if softmax_scale is not None and not (isinstance(softmax_scale, (int, float)) and math.isfinite(softmax_scale)):
        what, fix = f"softmax_scale is {softmax_scale!r}, expected a finite number", "give None for 1/sqrt(head_dim)"
        refuse(HetuError, what, fix, op)


def _check_cu_seqlens(name: str, cu: torch.Tensor) -> None:
    if cu.dtype not in _LENGTH_DTYPES:
        refuse(DTypeError, f"{name} is {_name(cu.dtype)}, expected int32 or int64", f"{name}.to(torch.int32)")
    if cu.ndim != 1:
        refuse(ShapeError, f"{name} has {cu.ndim} dimensions {list(cu.shape)}, expected 1", f"{name}.flatten()")
    if cu.shape[0] == 0:
        refuse(ShapeError, f"{name} is empty, expected at least its first entry, 0", "give batch_size + 1 entries")


def _refuse_dtypes(*tensors: torch.Tensor, op: str) -> NoReturn:
    for name, x in zip("qkv", tensors, strict=True):
        if x.dtype not in _DTYPES:
            wanted = ", ".join(dtype.name for dtype in FLOATS)
            refuse(DTypeError, f"{name} is {_name(x.dtype)}, expected {wanted}", f"{name}.to(...) one of them", op)
    q, k, v = (_name(x.dtype) for x in tensors)
    refuse(DTypeError, f"q, k and v are {q}, {k} and {v}, expected one dtype", "cast them to one dtype", op)


def _refuse_ranks(*tensors: torch.Tensor, op: str) -> NoReturn:
    name, x = next((name, x) for name, x in zip("qkv", tensors, strict=True) if x.ndim != 3)
    fix = "give (tokens, heads, head_dim): no batch dimension, heads apart from their entries"
    refuse(ShapeError, f"{name} has {x.ndim} dimensions {list(x.shape)}, expected 3", fix, op)


def _check_longest(side: str, limit: int, longest: int, cu_seqlens: torch.Tensor) -> None:
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse(kind: type[HetuError], what: str, fix: str, op: str = "attn_varlen") -> NoReturn:
    """Raises the error of a call; where it was made is the innermost line that is neither hetu's nor torch's."""
    raise kind(what, op=op, where=innermost(_is_foreign), fix=fix)


def _is_foreign(frame: FrameType) -> bool:
    """Whether a frame is neither hetu's nor torch's."""
    return frame.f_globals.get("__name__", "").partition(".")[0] not in ("hetu", "torch")


# the ops

_library = torch.library.Library("hetu", "FRAGMENT")
_TENSORS = "Tensor q, Tensor k, Tensor v"
_CALL = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? rng_state, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "bool is_causal, float dropout_p, float? softmax_scale"
)
_library.define(f"attn_varlen({_TENSORS}, {_CALL}) -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"attn_varlen_backward(Tensor? dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("hetu::attn_varlen", "CompositeExplicitAutograd", lib=_library)
def _forward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(prepare(q, k, v, *call), q, k, v)


@torch.library.register_fake("hetu::attn_varlen", lib=_library)
def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cu_seqlens_q, cu_seqlens_k, rng_state, _, _, _, dropout_p, softmax_scale = call
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, dropout_p, softmax_scale)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))


@torch.library.impl("hetu::attn_varlen_backward", "CompositeExplicitAutograd", lib=_library)
def _backward_op(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse, *call = rest
    return backward(prepare(q, k, v, *call), dout, dlse, q, k, v, out, lse)


@torch.library.register_fake("hetu::attn_varlen_backward", lib=_library)
def _backward_fake(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, rng_state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.hetu.attn_varlen_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * (len(ctx.options) + 3)


def _no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    refuse(
        HetuError,
        "the gradients of attn_varlen have no derivative: it can't be differentiated twice",
        "use torch.nn.functional.scaled_dot_product_attention where second derivatives are needed",
    )


torch.library.register_autograd("hetu::attn_varlen", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("hetu::attn_varlen_backward", _no_second_derivative, lib=_library)
