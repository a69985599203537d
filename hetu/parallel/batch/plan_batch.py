"""From the lengths of a batch's documents to who holds what."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetu.arguments import MAX_COUNT, choice, head_counts, integer, integers, real, refuse
from hetu.dtypes import as_dtype
from hetu.errors import ShapeError, StrategyError, caller
from hetu.parallel.batch.assign import assign
from hetu.parallel.batch.batch_plan import BatchPlan
from hetu.parallel.batch.cost import BatchCost, Documents
from hetu.parallel.batch.finish import Place, joined
from hetu.parallel.layout.documents import MAX_TOKENS
from hetu.parallel.layout.splits import check_mask
from hetu.parallel.mask.mask import CAUSAL, Mask
from hetu.parallel.views.hardware import Hardware

_OP = "plan_batch"

LAYER_FLOPS = 6 * 12
"""FLOPs of a layer without attention, per token and width squared: 12 weights, and 6 FLOPs per token and weight."""


def plan_batch(
    lengths: Any,
    pipelines: int,
    hardware: Hardware,
    *,
    max_tokens: int,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: Any = "bfloat16",
    token_flops: float | None = None,
    mask: Mask | None = None,
) -> BatchPlan:
    """Plans a batch: which pipelines form context groups, and which of them hold which documents in which micro-batch.

    The slowest pipeline shall be done as early as can be. Short documents stay whole on one pipeline, long ones are cut
    over as many as it takes. There are as few micro-batches as documents have room in, or a few more where pipelines
    would have to wait for each other otherwise.

    Time is that of forward and backward of one layer, by three things: work per token, attention per pair that the mask
    allows, and the keys and values that travel between the pieces of a document while their pipelines attend. It takes
    2 to 14 ms for 512 documents of real lengths on 64 pipelines of 32,768 tokens, 4 ms in the median. The same
    arguments give the same plan on every machine.

    Source: 12 weights per width squared, and 6 FLOPs per weight and token: Kaplan et al., "Scaling Laws for Neural
    Language Models", 2020, section 2.1.

    Args:
        lengths: Tokens of each document, ints from 0.
        pipelines: How many there are.
        hardware: What each of them can do. Its ``memory_bytes`` are not looked at: ``max_tokens`` is the limit.
        max_tokens: The most tokens that a pipeline may hold in a micro-batch.
        num_heads: Query heads of the model.
        num_kv_heads: Heads of its keys and values.
        head_dim: Numbers of a head.
        dtype: Of keys and values.
        token_flops: FLOPs per token of the rest of a layer, forward and backward. None takes those of 12 weights per
            width squared, with a width of ``num_heads * head_dim``: ``72 * width**2``.
        mask: Which keys a query sees in most layers; None for causal. It has no symbols, and lets no document see
            another.

    Returns:
        The plan: print it, feed it, or hand its ``cu_seqlens`` to ``hetu.functional.ContextParallel``.

    Raises:
        StrategyError: If a document has more tokens than all pipelines have room for; it says which, and by how much.
        HetuError: If an argument is something else than it should be.

    Example:
        >>> import hetu
        >>> lengths = [8000, 900, 0, 2100, 2000, 1900]
        >>> plan = hetu.plan_batch(lengths, 4, hetu.Hardware.h100(), max_tokens=8192)
        >>> [[tokens for _, tokens in place.pieces] for place in plan.places]
        [[2667, 2667, 2666], [900], [0], [2100], [2000], [949, 951]]
        >>> plan.groups, plan.micro_batches[0].lengths
        ((0, 0, 0, 1), (3616, 3567, 3617, 4100))
    """
    given = integers(lengths, "lengths", least=0, op=_OP, error=ShapeError)
    pipelines = integer(pipelines, "pipelines", least=1, most=MAX_COUNT, op=_OP)
    if not isinstance(hardware, Hardware):
        refuse(hardware, "hardware", "a hetu.Hardware", op=_OP, fix="hetu.Hardware.h100(), say")
    max_tokens = integer(max_tokens, "max_tokens", least=1, most=MAX_TOKENS, op=_OP)
    _check_room(given, pipelines, max_tokens)
    cost = _cost(hardware, num_heads, num_kv_heads, head_dim, dtype, token_flops)
    tokens = np.array(given, np.int64)
    attention = cost.pair * _mask(mask).pairs(tokens)
    work = cost.token * tokens + attention
    order = np.argsort(-work, kind="stable")
    documents = Documents(tokens[order].tolist(), attention[order].tolist(), work[order].tolist())
    least = cost.least_seconds(documents, pipelines, max_tokens)
    micro_batches, places, seconds = assign(documents, pipelines, max_tokens, cost, least)
    cut = [[r for r, _ in pieces] for _, pieces in places if len(pieces) > 1]
    groups = joined([*cut, *([r] for r in range(pipelines))])
    groups.sort(key=lambda members: (-len(members), members))
    number = {r: i for i, r in enumerate(r for members in groups for r in members)}
    where = [places[i] for i in order.argsort().tolist()]
    return BatchPlan(
        lengths=given,
        groups=tuple(value for value, members in enumerate(groups) for _ in members),
        max_tokens=max_tokens,
        num_micro_batches=micro_batches,
        places=tuple([Place(micro_batch, _renumbered(pieces, number)) for micro_batch, pieces in where]),
        seconds=tuple(seconds[r] for r in number),
        least_seconds=least,
    )


def _renumbered(pieces: tuple[tuple[int, int], ...], number: dict[int, int]) -> tuple[tuple[int, int], ...]:
    if len(pieces) == 1:
        ((r, tokens),) = pieces
        return ((number[r], tokens),)
    return tuple(sorted([(number[r], tokens) for r, tokens in pieces]))


def _check_room(lengths: tuple[int, ...], pipelines: int, max_tokens: int) -> None:
    """Refuses a document that fits into no micro-batch."""
    room = pipelines * max_tokens
    for d, length in enumerate(lengths):
        if length > room:
            what = (
                f"document {d} has {length:,} tokens, but {pipelines:,} pipelines of at most {max_tokens:,} tokens "
                f"have room for {room:,}: {length - room:,} too many"
            )
            fix = f"give max_tokens of at least {-(-length // pipelines)}, more pipelines, or cut the document"
            raise StrategyError(what, op=_OP, where=caller(), fix=fix)
    total = sum(lengths)
    if min(total, room) > MAX_TOKENS:
        what = f"a micro-batch would hold up to {min(total, room):,} tokens, expected at most {MAX_TOKENS:,}"
        raise StrategyError(what, op=_OP, where=caller(), fix="give fewer documents, or a smaller max_tokens")


def _cost(
    hardware: Hardware, num_heads: Any, num_kv_heads: Any, head_dim: Any, dtype: Any, token_flops: Any
) -> BatchCost:
    num_q, num_kv = head_counts(num_heads, num_kv_heads, most=MAX_COUNT, op=_OP, error=ShapeError)
    width = integer(head_dim, "head_dim", least=1, most=MAX_COUNT, op=_OP)
    element = as_dtype(dtype)
    choice(element.name, "dtype", ("float16", "bfloat16", "float32", "float64"), op=_OP)
    flops = float(LAYER_FLOPS * (num_q * width) ** 2)
    if token_flops is not None:
        flops = real(token_flops, "token_flops", "a number from 0", lambda x: 0 <= x < 1e30, op=_OP)
    return BatchCost.of(hardware, num_q, num_kv, width, element.itemsize, flops)


def _mask(mask: Any) -> Mask:
    check_mask(mask)
    if mask is not None and mask.joins:
        refuse(mask, "mask", "a mask under which no document sees another", op=_OP, error=StrategyError)
    return CAUSAL if mask is None else mask
