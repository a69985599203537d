"""hetu's attention as an attention implementation of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from hetu.errors import HetuError
from hetu.functional import attn_varlen, parallel_attn
from hetu.functional.heads import padded_heads
from hetu.functional.masking import NO_CAP, NO_WINDOW
from hetu.integrations.transformers.lengths import Lengths, fail, refuse
from hetu.integrations.transformers.masks import (
    HetuMask,
    check_positions,
    current,
    longest_of,
    make_mask,
    of_padding,
)

NAME = "hetu"

_ABSENT = ("position_bias", "head_mask", "layer_head_mask", "alibi", "output_attentions")
"""What models may ask of an attention and hetu's doesn't have, by its name."""


def register() -> None:
    """Makes ``attn_implementation="hetu"`` known to transformers.

    Example:
        >>> import hetu.integrations.transformers
        >>> hetu.integrations.transformers.register()
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of a layer, as ``transformers.AttentionInterface`` asks for it.

    Args:
        module: The layer; its ``training`` says whether weights are dropped.
        query: ``(batch, H_q, T_q, head_dim)``
        key: ``(batch, H_kv, T_k, head_dim)``
        value: ``(batch, H_kv, T_k, head_dim of v)``, which may be less than that of q and k.
        attention_mask: The :class:`~hetu.integrations.transformers.masks.HetuMask` of the model, a 2-D mask, or None
            for a model that makes none.
        dropout: Probability with which a weight is dropped, in training.
        scaling: Factor of the scores; None for ``1 / sqrt(head_dim)``.
        sliding_window: How many keys a query sees, its own among them, where the model's mask says nothing of a window.
        softcap: Where scores are capped; None for nowhere.
        s_aux: ``(H_q,)``, the sinks: one more logit per head, which takes weight and gives no value.
        is_causal: For a layer whose model makes no mask; None for what the layer says.
        position_ids: Compared under context parallelism.
        cu_seq_lens_q: Cumulative lengths of packed sequences, as ``DataCollatorWithFlattening`` gives them.
        cu_seq_lens_k: Those of the keys; None for the same.
        max_length_k: The most keys of a sequence.
        options: What models pass for other implementations. What changes the result is refused by its name.

    Returns:
        ``(batch, T_q, H_q, head_dim of v)``, and None for the weights.

    Raises:
        HetuError: If what is asked for is not there.
    """
    for name in _ABSENT:
        if options.get(name) is not None and options[name] is not False:
            refuse(f"{name} of {type(module).__name__}")
    batch, _, q_length, _ = query.shape
    kv_length, head_dim = key.shape[2], value.shape[3]
    mask = _mask_of(module, attention_mask, batch, q_length, kv_length, is_causal)
    window = mask.window
    if window is None and sliding_window is not None:
        if not mask.is_causal and mask.keep is not None:
            refuse(f"sliding_window={sliding_window} to both sides of a layer whose mask knows pads only")
        window = sliding_window - 1, 0 if mask.is_causal else sliding_window - 1
    q, k, v = padded_heads(*(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)))
    scores: dict[str, Any] = {
        "is_causal": mask.is_causal,
        "softcap": softcap or NO_CAP,
        "sinks": s_aux,
        "dropout_p": dropout if module.training else 0.0,
        "softmax_scale": query.shape[3] ** -0.5 if scaling is None else scaling,
    }
    if mask.cp is not None:
        if cu_seq_lens_q is not None:
            fail(HetuError, "cu_seq_lens_q is given under context_parallel", "leave it out: cp has the lengths")
        longest = None
        if not torch.compiler.is_compiling():
            check_positions(mask, position_ids)
            longest = None if window is None else longest_of(mask.cp)
        out = parallel_attn(q, k, v, mask.cp, window_size=_hiding(window, longest), **scores)
    else:
        lengths = mask.lengths()
        if cu_seq_lens_q is not None:
            if mask.chunk is not None:
                refuse(f"attention_chunk_size={mask.chunk} beside cu_seq_lens_q")
            lengths = _packed(lengths, cu_seq_lens_q, cu_seq_lens_k, max_length_k)
        out = _attend(q, k, v, lengths, window_size=_hiding(window, lengths.longest), **scores)
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (batch, q_length))[..., :head_dim], None


def _mask_of(
    module: torch.nn.Module, given: Any, batch: int, q_length: int, kv_length: int, is_causal: bool | None
) -> HetuMask:
    """The mask of a layer's model, or the one that stands for what it has instead."""
    if isinstance(given, HetuMask):
        if (given.batch, given.q_length, given.kv_length) != (batch, q_length, kv_length):
            sizes, own = (batch, q_length, kv_length), (given.batch, given.q_length, given.kv_length)
            refuse(f"a layer with (batch, queries, keys) of {sizes} under a mask of {own}")
        return given
    if current() is not None:
        name = type(module).__name__
        what = f"context_parallel doesn't reach {name}, whose model makes no mask by transformers' functions"
        fail(HetuError, what, "call hetu.functional.parallel_attn in the model")
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if given is None:
        return HetuMask(batch, q_length, kv_length, kv_length - q_length, is_causal)
    return of_padding(given, q_length, kv_length, is_causal)


def _hiding(window: tuple[int, int] | None, longest: int | None) -> tuple[int, int]:
    """The window of a layer; none if it hides nothing of sequences of at most so many keys.

    It reaches as far forwards as backwards, or no further than the query itself.
    """
    if window is None or (longest is not None and window[0] + 1 >= longest):
        return NO_WINDOW
    return window


def _packed(lengths: Lengths, cu_q: torch.Tensor, cu_k: torch.Tensor | None, longest: int | None) -> Lengths:
    """The lengths that a collator gives, which say more than the mask does."""
    if lengths.has_pads:
        fail(HetuError, "cu_seq_lens_q is given beside an attention_mask with pads", "give one of the two")
    return Lengths(cu_q, cu_q if cu_k is None else cu_k, longest=None if longest is None else int(longest))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Lengths,
    **scores: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Rows that are left out get an output of 0."""
    order_q, order_k, count = lengths.order_q, lengths.order_k, len(q)
    if order_k is not None:
        k, v = k[order_k], v[order_k]
    if order_q is not None:
        q = q[order_q]
    out = attn_varlen(q, k, v, lengths.cu_q, lengths.cu_k, **scores)
    assert isinstance(out, torch.Tensor)
    return out if order_q is None else out.new_zeros((count, *out.shape[1:])).index_copy(0, order_q, out)
