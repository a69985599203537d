"""FlashAttention's functions, as flash_attn 2.8 has them, over hetu's kernels.

Change one line: ``from flash_attn import flash_attn_func`` becomes ``from hetu.integrations.flash_attn import
flash_attn_func``. Parameters, defaults, shapes, windows and the alignment of masks are flash_attn's. What is more:

- float32 and float64 work too, and so does a CPU.
- Any head_dim up to 256, and v may be narrower or wider than q and k (as in MLA): heads are padded with zeros inside,
  to the wider one's next multiple of 8, and the scale is that of the unpadded q.
- Gradients flow through ``softmax_lse``. A row that sees no key has ``-inf`` there, where flash_attn has ``inf``.
- ``deterministic`` changes nothing: two calls always give the same bits, in the backward too.

What isn't there is refused by its name: ALiBi, block tables, and S_dmask under dropout.
"""

from __future__ import annotations

from typing import Any

import torch

from hetu.arguments import flag, real, shown
from hetu.errors import DTypeError, HetuError, ShapeError, caller
from hetu.functional import attn_varlen
from hetu.functional.heads import padded_heads
from hetu.functional.masking import NO_CAP, NO_WINDOW

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The output alone; or with ``softmax_lse`` and ``S_dmask``, if ``return_attn_probs``."""

_OP = "flash_attn"
_MOST = 256


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = NO_CAP,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention over a batch of sequences of one length.

    Args:
        q: ``(batch, seqlen_q, heads, head_dim)``.
        k: ``(batch, seqlen_k, heads_k, head_dim)``; heads must be a multiple of heads_k.
        v: ``(batch, seqlen_k, heads_k, head_dim_v)``; flash_attn wants head_dim_v to be head_dim.
        dropout_p: Probability with which each attention weight is dropped; give 0 when the model is evaluated. Which
            are dropped is drawn from torch's default CPU generator.
        softmax_scale: Factor of the scores; None means ``1 / sqrt(head_dim)``.
        causal: Whether query i sees keys up to ``i + seqlen_k - seqlen_q`` only.
        window_size: ``(left, right)``: query i sees keys ``i + seqlen_k - seqlen_q - left .. i + seqlen_k - seqlen_q +
            right``; -1 is no bound. ``causal`` makes the right bound 0.
        softcap: Where it is positive, scores become ``softcap * tanh(score / softcap)``.
        alibi_slopes: Must be None.
        deterministic: Changes nothing.
        return_attn_probs: Whether ``(out, softmax_lse, S_dmask)`` is returned; only without dropout.

    Returns:
        out ``(batch, seqlen_q, heads, head_dim_v)``; softmax_lse ``(batch, heads, seqlen_q)``, float32 (float64 for
        float64); S_dmask, an empty tensor, as flash_attn has it without dropout.

    Raises:
        ShapeError: If shapes don't fit.
        DTypeError: If q, k and v are no tensors of one floating-point type.
        HetuError: If an option is out of its range, or isn't there.

    Example:
        >>> q, kv = torch.ones(2, 3, 4, 20), torch.ones(2, 5, 2, 20)
        >>> flash_attn_func(q, kv, kv, causal=True).shape
        torch.Size([2, 3, 4, 20])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, 4, "(batch, seqlen, heads, head_dim)")
    batch, seqlen_q = q.shape[:2]
    if not batch == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1]:
        shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        _refuse(ShapeError, f"q, k and v are {shapes}", "give as many sequences in all, and every key its value")
    lengths_q = _lengths(batch, seqlen_q)
    results = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        lengths_q,
        lengths_q if k.shape[1] == seqlen_q else _lengths(batch, k.shape[1]),
        None,
        None,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
    if isinstance(results, torch.Tensor):
        one: torch.Tensor = results.unflatten(0, (batch, seqlen_q))
        return one
    out, lse, s_dmask = results
    return (
        out.unflatten(0, (batch, seqlen_q)),
        lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1).contiguous(),
        s_dmask,
    )


def flash_attn_kvpacked_func(  # noqa: D417 - the others are told where it says
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = NO_CAP,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of k and v in one; all other arguments are those of it.

    Args:
        kv: ``(batch, seqlen_k, 2, heads_k, head_dim)``.

    Returns:
        What that returns.

    Example:
        >>> q, kv = torch.ones(2, 3, 4, 20), torch.ones(2, 5, 2, 2, 20)
        >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
        torch.Size([2, 3, 4, 20])
    """
    k, v = _unpacked("kv", kv, 2, "(batch, seqlen, 2, heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(  # noqa: D417 - the others are told where it says
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = NO_CAP,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of q, k and v in one; all other arguments are those of it.

    Args:
        qkv: ``(batch, seqlen, 3, heads, head_dim)``.

    Returns:
        What that returns.

    Example:
        >>> qkv = torch.ones(2, 3, 3, 4, 20)
        >>> flash_attn_qkvpacked_func(qkv, causal=True).shape
        torch.Size([2, 3, 4, 20])
    """
    q, k, v = _unpacked("qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = NO_CAP,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> Result:
    """Attention over sequences of different lengths that lie one after the other.

    Args:
        q: ``(total_q, heads, head_dim)``.
        k: ``(total_k, heads_k, head_dim)``; heads must be a multiple of heads_k.
        v: ``(total_k, heads_k, head_dim_v)``; flash_attn wants head_dim_v to be head_dim.
        cu_seqlens_q: ``(batch + 1,)``, int32 or int64, from 0; best on the CPU, where they are read.
        cu_seqlens_k: Like cu_seqlens_q, for the keys.
        max_seqlen_q: At least the longest query sequence, or None: it isn't needed.
        max_seqlen_k: At least the longest key sequence, or None.
        dropout_p: As in :func:`flash_attn_func`, like all that follow but the last.
        softmax_scale: Factor of the scores.
        causal: Whether queries see earlier keys only.
        window_size: Which keys around its own place a query sees.
        softcap: Where scores are capped.
        alibi_slopes: Must be None.
        deterministic: Changes nothing.
        return_attn_probs: Whether ``(out, softmax_lse, S_dmask)`` is returned.
        block_table: Must be None: there is no paged cache.

    Returns:
        out ``(total_q, heads, head_dim_v)``; softmax_lse ``(heads, total_q)``; S_dmask, an empty tensor.

    Raises:
        HetuError: As :func:`flash_attn_func`.
        BindingError: If the values of cu_seqlens or a max_seqlen don't fit.

    Example:
        >>> q, kv, cu_seqlens = torch.ones(8, 4, 20), torch.ones(8, 2, 20), torch.tensor([0, 5, 8])
        >>> flash_attn_varlen_func(q, kv, kv, cu_seqlens, cu_seqlens, 5, 5, causal=True).shape
        torch.Size([8, 4, 20])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, 3, "(total, heads, head_dim)")
    causal, return_attn_probs = flag(causal, "causal", op=_OP), flag(return_attn_probs, "return_attn_probs", op=_OP)
    flag(deterministic, "deterministic", op=_OP)
    _refuse_what_is_not_there(alibi_slopes, block_table)
    if return_attn_probs and real(dropout_p, "dropout_p", op=_OP):
        fix = "give dropout_p=0, or call hetu.functional.attn_varlen with return_lse=True"
        _refuse(HetuError, "return_attn_probs asks for S_dmask under dropout, which isn't computed", fix)
    width, width_v = q.shape[-1], v.shape[-1]
    if width != k.shape[-1]:
        _refuse(ShapeError, f"q and k have head_dim {width} and {k.shape[-1]}, expected the same", "check projections")
    if max(width, width_v) > _MOST or width == 0:
        sizes = f"{width} and {width_v}"
        _refuse(ShapeError, f"the heads of q and v have {sizes} entries, expected 1 to {_MOST}", "use more heads")
    if softmax_scale is None:
        softmax_scale = width**-0.5
    q, k, v = padded_heads(q, k, v)
    results = attn_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        is_causal=causal,
        window_size=window_size,
        softcap=softcap,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        return_lse=return_attn_probs,
    )
    if isinstance(results, torch.Tensor):
        return results if results.shape[-1] == width_v else results[..., :width_v]
    out, lse = results
    return out if out.shape[-1] == width_v else out[..., :width_v], lse, q.new_empty(0)


def flash_attn_varlen_kvpacked_func(  # noqa: D417 - the others are told where it says
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = NO_CAP,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of k and v in one; all other arguments are those of it.

    Args:
        kv: ``(total_k, 2, heads_k, head_dim)``.

    Returns:
        What that returns.

    Example:
        >>> q, kv, cu_seqlens = torch.ones(8, 4, 20), torch.ones(8, 2, 2, 20), torch.tensor([0, 5, 8])
        >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 5, 5, causal=True).shape
        torch.Size([8, 4, 20])
    """
    k, v = _unpacked("kv", kv, 2, "(total, 2, heads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(  # noqa: D417 - the others are told where it says
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = NO_CAP,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of q, k and v in one; all other arguments are those of it.

    Args:
        qkv: ``(total, 3, heads, head_dim)``.
        cu_seqlens: ``(batch + 1,)``, int32 or int64, from 0, of queries and keys.
        max_seqlen: At least the longest sequence, or None: it isn't needed.

    Returns:
        What that returns.

    Example:
        >>> flash_attn_varlen_qkvpacked_func(torch.ones(8, 3, 4, 20), torch.tensor([0, 5, 8]), 5, causal=True).shape
        torch.Size([8, 4, 20])
    """
    q, k, v = _unpacked("qkv", qkv, 3, "(total, 3, heads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _lengths(batch: int, seqlen: int) -> torch.Tensor:
    """The cu_seqlens of sequences of one length."""
    return torch.arange(batch + 1, dtype=torch.int64, device="cpu") * seqlen


def _unpacked(name: str, packed: torch.Tensor, count: int, shape: str) -> tuple[torch.Tensor, ...]:
    """What was packed, as views."""
    _check_tensor(name, packed, shape.count(",") + 1, shape)
    if packed.shape[-3] != count:
        _refuse(ShapeError, f"{name} is {list(packed.shape)}, expected {shape}", f"torch.stack the {count}, at dim -3")
    return packed.unbind(-3)


def _check_tensor(name: str, x: Any, ndim: int, shape: str) -> None:
    if not isinstance(x, torch.Tensor):
        _refuse(DTypeError, f"{name} must be a tensor, got {shown(x)}", f"pass a torch tensor as {name}")
    if x.is_nested:
        _refuse(HetuError, f"{name} is a nested tensor, expected a dense one", "give its values() and offsets()")
    if x.ndim != ndim:
        _refuse(ShapeError, f"{name} has {x.ndim} dimensions {list(x.shape)}, expected {ndim}", f"give {shape}")


def _refuse_what_is_not_there(alibi_slopes: Any, block_table: Any) -> None:
    if alibi_slopes is not None:
        _refuse(HetuError, "alibi_slopes are given, but there are no biases", "give None, and rotate q and k instead")
    if block_table is not None:
        _refuse(HetuError, "block_table is given, but there is no paged cache", "give None, and k and v in one piece")


def _refuse(kind: type[HetuError], what: str, fix: str) -> None:
    raise kind(what, op=_OP, where=caller(), fix=fix)
