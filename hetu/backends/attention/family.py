"""A kernel family: one implementation of attention, and what a call of it is.

A family's ``attend`` lets the query rows see the keys of one buffer, as a segment table says, and merges what comes out
into the running ``(out, lse)``. One call is plain varlen attention; a call a step is a ring, with nothing in between.

``hetu/backends/families.py`` lists the families and chooses one for a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from hetu.backends.attention.contract import AttentionState, BackwardState, gather, row_dot
from hetu.backends.attention.dropout import Dropout
from hetu.parallel.mask.segments import QuerySpans, SegmentTable, Turn


class AttendSignature(NamedTuple):
    """What is known of a call when a graph is lowered, before there are tensors: by this a family is chosen.

    Attributes:
        dtype: Of q, k and v.
        device: Where they lie.
        head_dim: Their last dim.
        num_q: Query heads of the whole attention; a step may attend for some of them only.
        num_kv: Key heads of the whole attention.
        has_dropout: Whether entries are dropped.
        has_scores: Whether scores are written, for the softmax that is returned.
        is_backward: Whether gradients are computed.
    """

    dtype: torch.dtype
    device: torch.device
    head_dim: int
    num_q: int
    num_kv: int
    has_dropout: bool = False
    has_scores: bool = False
    is_backward: bool = False


@dataclass(slots=True)  # not frozen: every step makes one, and making a frozen one takes three times as long
class AttendCall:
    """What one step attends to, and how. Kernels read it; what they write is in the state.

    Attributes:
        q: ``(T_q, H_q, D)`` in any strides, the last dim contiguous.
        k: ``(T_k, H_k, D)``, also so; query head h reads head ``h // (H_q // H_k)``. Rows that no segment names may
            hold anything, NaN too.
        v: ``(T_k, H_k, D)``, as k.
        spans: The rows of q.
        table: Which keys of the buffer they see. May be empty.
        softmax_scale: Scores are ``softmax_scale * q @ k.T``; any finite number.
        turn: What the state holds of each span, and whether its result is written; None if this is the only step.
        dropout: Drops entries; None drops none.
        key_position: ``(T_k,)``, the position in its document of each row of the buffer. Only dropout and
            ``AttentionState.scores`` need it. The same array again finds the copy on the device again.
        softcap: Where it is positive, scores become ``softcap * tanh(score / softcap)``; 0 leaves them as they are.
        sinks: float32 ``(H_q,)`` (float64 for float64 inputs), contiguous, one more logit for each query head of the
            call, which takes weight and gives no value; None for none. It enters in the first step of each span: lse
            includes it, and a row that sees no key has it as its lse. The backward doesn't read it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    spans: QuerySpans
    table: SegmentTable
    softmax_scale: float
    turn: Turn | None = None
    dropout: Dropout | None = None
    key_position: np.ndarray[Any, Any] | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def with_positive_scale(self) -> AttendCall:
        """A call with the same scores and a positive scale, for kernels that mask with -inf before they scale.

        A negative sign moves into q, and a scale of 0 makes q zeros, but of NaN and infinity NaN.
        """
        if self.softmax_scale > 0:
            return self
        if self.softmax_scale < 0:
            return replace(self, q=-self.q, softmax_scale=-self.softmax_scale)
        return replace(self, q=self.q * 0.0, softmax_scale=1.0)


class KernelFamily(ABC):
    """One implementation of attention, forward and backward.

    Attributes:
        name: What ``hetu.config(backend=...)`` calls it.
    """

    name: ClassVar[str]

    @abstractmethod
    def declines(self, signature: AttendSignature) -> str | None:
        """Says why the family does not take such calls; None if it takes them."""

    @abstractmethod
    def attend(self, call: AttendCall, state: AttentionState) -> None:
        """Attends to one buffer and merges the result into ``state``.

        A row that sees no key at all gets out 0 and lse -inf, or its head's sink. Rows of spans that the step does not
        attend for are not touched.

        Args:
            call: What is attended to.
            state: Changed in place.
        """

    @abstractmethod
    def attend_backward(
        self, call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor, keeps: bool = False
    ) -> None:
        """Computes the gradients of the attention to one buffer.

        With s the scaled and capped scores, ``p = exp(s - lse)`` and m the dropout mask times ``1 / (1 - p_dropout)``
        (1 without dropout): ``dv = (p * m).T @ dout``, ``ds = p * (m * (dout @ v.T) - delta)``, with a softcap times
        ``1 - (s / softcap)**2``, ``dq = softmax_scale * ds @ k``, ``dk = softmax_scale * ds.T @ q``. All accumulated in
        float32, over the query heads that share a key head too, in an order that depends on nothing but the table: two
        calls give the same bits.
        Source: Dao, "FlashAttention-2", 2023, algorithm 2.

        Args:
            call: What the forward attended to; its dropout is the forward's.
            state: ``dq`` and ``acc`` are changed in place.
            dk: ``(T_k, H_k, D)`` in any strides, the last dim contiguous; float32 or k's dtype. Every row that a
                segment names is written, whatever it held.
            dv: ``(T_k, H_k, D)``, as dk, for v.
            keeps: Whether rows of ``dk`` and ``dv`` that no segment names keep what they hold; else they become 0.
        """

    def row_dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """See :func:`hetu.backends.attention.contract.row_dot`; a family may have a faster one."""
        return row_dot(a, b)

    def gather(self, parts: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
        """See :func:`hetu.backends.attention.contract.gather`; a family may have a faster one."""
        return gather(parts, index)
