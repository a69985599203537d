"""What all kernel families have in common: the running states of an attention, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hetu.backends.attention.dropout import Dropout, dropout_key, keep_mask
from hetu.backends.memory import copied_to, device_copies, empty
from hetu.backends.precision import in_own_precision
from hetu.parallel.mask.segments import QuerySpans, Turn

__all__ = [
    "AttentionState",
    "BackwardState",
    "Dropout",
    "RowDot",
    "attention_delta",
    "ceil_padded",
    "dropout_key",
    "finish_softmax",
    "gather",
    "lse_places",
    "new_state",
    "row_dot",
    "sink_gradient",
]

PADDING = 128
"""``p`` is padded to multiples of this, as FlashAttention pads it."""


@dataclass(slots=True)
class AttentionState:
    """What the steps of one attention build up. Made by :func:`new_state`; kernels write into it.

    Attributes:
        out: ``(T_q, H_q, D)`` in the user's dtype; each row is written by its last step.
        lse: float32 ``(slots, H_q, S)``, natural logarithm of the softmax's denominators; -inf where no row
            lives and where a row has seen no key.
        acc: float32 ``(T_q, H_q, D)``, the attention over the keys seen so far (each row already divided by
            its denominator), of rows that further steps attend for; None where there are none.
        scores: float32 ``(slots, H_q, rows, columns)``, scaled scores, -inf where nothing was computed; None
            unless the softmax is asked for.

    For float64 inputs (torch backend only) ``lse``, ``acc`` and ``scores`` are float64.
    """

    out: torch.Tensor
    lse: torch.Tensor
    acc: torch.Tensor | None
    scores: torch.Tensor | None


@dataclass(slots=True)
class BackwardState:
    """What the steps of an attention's backward read of the queries, and what they build up.

    Attributes:
        dout: ``(T_q, H_q, D)``, the gradient of the output, in any strides with the last dim contiguous.
        lse: float32 ``(slots, H_q, S)``, what the forward gave: the logarithms of the whole softmax's denominators.
        delta: float32 ``(T_q, H_q)``, contiguous; from :func:`attention_delta`.
        dq: ``(T_q, H_q, D)`` in any strides with the last dim contiguous: the gradient of q, in q's dtype or float32;
            each row is written by its last step.
        acc: float32, otherwise as ``dq``, which it may be itself: what was added up of rows that further steps attend
            for, scaled or not as the backend likes; None where there are none.

    For float64 inputs (torch backend only) ``lse``, ``delta``, ``dq`` and ``acc`` are float64.
    """

    dout: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    dq: torch.Tensor
    acc: torch.Tensor | None = None

    def add_queries(self, dq: torch.Tensor, spans: QuerySpans, turn: Turn | None) -> None:
        """Adds to the gradients of the rows that a step attends for; for kernels that compute them apart.

        Args:
            dq: ``(T_q, H_q, D)``, what the step's keys do to them.
            spans: The rows of q.
            turn: The step's.
        """
        if turn is None:
            self.dq.copy_(dq)
            return
        for span in turn.attends.nonzero()[0].tolist():
            rows = slice(int(spans.start[span]), int(spans.start[span] + spans.length[span]))
            part = dq[rows]
            if turn.merges[span]:
                assert self.acc is not None, "there are several steps"
                part = part + self.acc[rows]
            target = self.acc if turn.continues[span] else self.dq
            assert target is not None, "there are several steps"
            target[rows] = part


RowDot = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes the dot products of rows, as :func:`row_dot` does."""


@in_own_precision
def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot products of the rows of two ``(T, H, D)`` tensors: float32 ``(T, H)``, float64 for float64, contiguous."""
    high = compute_dtype(a.dtype)
    return torch.einsum("thd,thd->th", a.to(high), b.to(high)).contiguous()


Gather = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
"""Packs rows, as :func:`gather` does."""


def gather(parts: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """Some rows of ``(T, heads, numbers)`` tensors, those of each beside the others: ``(n, all heads, numbers)``.

    Args:
        parts: At least one; of one dtype, and of as many numbers.
        index: int32 ``(n,)``, which rows.

    Example:
        >>> x = torch.arange(6.0).view(3, 2, 1)
        >>> gather([x, -x[:, :1]], torch.tensor([2, 0], dtype=torch.int32)).flatten(1)
        tensor([[ 4.,  5., -4.],
                [ 0.,  1., -0.]])
    """
    packed = [x.index_select(0, index) for x in parts]
    return packed[0] if len(packed) == 1 else torch.cat(packed, 1)


def attention_delta(
    out: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    spans: QuerySpans,
    row_dot: RowDot = row_dot,
) -> torch.Tensor:
    """What every score's gradient has subtracted: the sum of ``dout * out`` over a row, less the gradient of its lse.

    Args:
        out: ``(T_q, H_q, D)``, the forward's output.
        dout: ``(T_q, H_q, D)``, its gradient.
        dlse: ``(slots, H_q, S)``, the gradient of the log-sum-exps, or None.
        spans: The rows of q.
        row_dot: The kernel family's.

    Returns:
        float32 ``(T_q, H_q)`` (float64 for float64 inputs), contiguous.
    """
    delta = row_dot(out, dout)
    if dlse is not None:
        rows, slot, slot_row = lse_places(spans, out.device)
        delta[rows] -= dlse[slot, :, slot_row].to(delta.dtype)
    return delta


def lse_places(spans: QuerySpans, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of q that have a log-sum-exp, and the slot and the place in it of each; copied to a device once."""
    key = ("lse_places", device)
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = spans.copies.get(key)
    if places is None:
        owned = np.repeat(spans.slot >= 0, spans.length)
        rows = np.flatnonzero(owned)
        slot, shift = (np.repeat(x, spans.length)[owned] for x in (spans.slot, spans.slot_row - spans.start))
        places = copied_to(rows, device), copied_to(slot, device), copied_to(shift + rows, device)
        device_copies.keep(spans, key, places, sum(x.nbytes for x in places))
    return places


def sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, spans: QuerySpans) -> torch.Tensor:
    """The gradient of each head's sink: less the sum over rows of its weight times the row's delta.

    A row that saw nothing, not even a sink, adds nothing. The order of summation depends on the rows alone.

    Args:
        sinks: ``(H_q,)``, float32, or float64 for float64 inputs; as the forward had them.
        lse: ``(slots, H_q, S)`` in their dtype, what the whole forward gave.
        delta: ``(T_q, H_q)`` in their dtype, from :func:`attention_delta`.
        spans: The rows of q.

    Returns:
        ``(H_q,)`` in their dtype.
    """
    rows, slot, slot_row = lse_places(spans, lse.device)
    own = lse[slot, :, slot_row]
    weight = (sinks - own).exp_().masked_fill_(own == -torch.inf, 0.0)
    return weight.mul_(delta[rows]).sum(0).neg_()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute and accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ceil_padded(size: int) -> int:
    """Rounds a side of ``p`` up to what it is padded to.

    Example:
        >>> ceil_padded(0), ceil_padded(1), ceil_padded(128), ceil_padded(129)
        (0, 128, 128, 256)
    """
    return -(-size // PADDING) * PADDING


def new_state(
    q: torch.Tensor,
    spans: QuerySpans,
    slots: int,
    rows: int,
    runs_on: bool,
    columns: int | None = None,
    fills_lse: bool = True,
) -> AttentionState:
    """Allocates the state of an attention.

    Args:
        q: ``(T_q, H_q, D)``; out takes its shape, dtype and device.
        spans: The rows of q.
        slots: First size of lse and p: sequences.
        rows: Last size of lse; p's third is this, padded.
        runs_on: Whether results run on between steps; see :attr:`hetu.parallel.plan.parts.PipelinePlan.runs_on`.
        columns: Last size of p before padding; None if the softmax is not asked for.
        fills_lse: Whether lse has to be -inf where no row of q writes it: not where only kernels read it.
    """
    total, heads, head_dim = q.shape
    high, device = compute_dtype(q.dtype), q.device
    scores = None
    if columns is not None:
        scores = q.new_full((slots, heads, ceil_padded(rows), ceil_padded(columns)), -torch.inf, dtype=high)
    # Every row writes its lse: only what lies between the sequences has to be filled.
    has_gaps = fills_lse and spans.rows_with_lse < slots * rows
    lse = (slots, heads, rows)
    return AttentionState(
        out=empty((total, heads, head_dim), q.dtype, device),
        lse=q.new_full(lse, -torch.inf, dtype=high) if has_gaps else empty(lse, high, device),
        acc=empty((total, heads, head_dim), high, device) if runs_on else None,
        scores=scores,
    )


def finish_softmax(
    state: AttentionState, spans: QuerySpans, dropout: Dropout | None, dtype: torch.dtype
) -> torch.Tensor:
    """The attention probabilities, once the last step is done.

    The magnitude of an entry is its softmax probability before dropout (no ``1 / (1 - p)``), whether it was
    kept or not; an entry that dropout dropped is negative. This is FlashAttention's convention. Entries that
    the mask hides and padding are 0. A row with a sink sums to less than 1: what is missing is the sink's weight.

    Args:
        state: With ``scores``; they are consumed.
        spans: The rows of q.
        dropout: What the steps dropped.
        dtype: Of the result.

    Returns:
        ``(slots, H_q, rows, columns)``, rows and columns padded to multiples of 128.
    """
    scores, lse = state.scores, state.lse
    assert scores is not None, "the state was made without columns"
    rows = lse.shape[-1]
    denominator = torch.where(lse == -torch.inf, 0.0, lse)  # a row without keys: exp(-inf - 0) = 0, not NaN
    scores[:, :, :rows].sub_(denominator.unsqueeze(-1))
    probabilities = scores.exp_()
    state.scores = None
    if dropout is not None:
        _negate_dropped(probabilities, spans, dropout)
    return probabilities.to(dtype)


def _negate_dropped(probabilities: torch.Tensor, spans: QuerySpans, dropout: Dropout) -> None:
    """Turns the sign of what dropout dropped. Goes span by span and head by head to bound the masks' memory."""
    device, columns = probabilities.device, probabilities.shape[-1]
    for span in np.flatnonzero(spans.slot >= 0).tolist():
        length, column = int(spans.length[span]), int(spans.column[span])
        queries = int(spans.position[span]) + int(spans.step[span]) * torch.arange(length, device=device)
        keys = torch.arange(columns - column, device=device)  # all columns of the document, and zeros after it
        row = int(spans.slot_row[span])
        for head in range(probabilities.shape[1]):
            part = probabilities[int(spans.slot[span]), head, row : row + length, column:]
            heads = torch.tensor([head], device=device)
            keep = keep_mask(dropout, int(spans.document[span]), heads, queries, keys)[0]
            part.copy_(torch.where(keep | (part == 0), part, -part))
