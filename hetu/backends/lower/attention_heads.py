"""``parallel_attn`` and its gradient on pipelines that attend for some heads, but for all tokens of their group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hetu.backends.attention.contract import (
    AttentionState,
    BackwardState,
    Dropout,
    attention_delta,
    ceil_padded,
    compute_dtype,
    finish_softmax,
    lse_places,
)
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.options import Options, Random, as_heads, key_positions, with_rows
from hetu.backends.comm import Communicator, Held, follow_heads
from hetu.backends.comm.exchange import Values
from hetu.backends.families import family
from hetu.parallel import AttnPlan
from hetu.parallel.plan.heads import HeadRange
from hetu.parallel.plan.instructions import Attend

GATHERED = 1
"""The buffer of all tokens."""


class _Call:
    """What forward and backward have in common."""

    def __init__(self, plan: AttnPlan, pipeline: int, random: Random, options: Options) -> None:
        self.options, self.layout, self.plan = options, plan.layout, plan.pipelines[pipeline]
        self.heads = plan.heads
        self.spans = plan.layout.query_spans(pipeline)  # of the own rows; those of the plan are all of the group's
        self.random = random, plan.layout.group_index(pipeline)
        self.held: Held

    def of(self, step: Attend) -> HeadRange:
        """The heads of a step."""
        assert step.heads is not None
        return step.heads

    def dropout(self, step: Attend) -> Dropout | None:
        """The dropout of a step's heads."""
        dropout = self.options.dropout(*self.random)
        return None if dropout is None else replace(dropout, first_head=self.of(step).first_q)

    def gathered(self, step: Attend, *names: str) -> list[torch.Tensor]:
        """Values of all tokens for the heads of a step, ``(T, heads, numbers)`` each."""
        return [self.held.value(name, GATHERED, self.of(step)) for name in names]

    def call(
        self,
        step: Attend,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout: Dropout | None,
        positions: np.ndarray[Any, Any] | None,
    ) -> AttendCall:
        """What a step attends to."""
        scale = self.options.softmax_scale
        return AttendCall(q, k, v, self.plan.spans, step.table, scale, None, dropout, positions)


class HeadsCall(_Call):
    """One pipeline's share of a ``parallel_attn``; see :class:`hetu.backends.lower.attention.PipelineCall`."""

    def __init__(
        self,
        qkv: torch.Tensor,
        plan: AttnPlan,
        pipeline: int,
        random: Random,
        shape: tuple[int, int, int],
        options: Options,
    ) -> None:
        super().__init__(plan, pipeline, random, options)
        self.shape = shape
        self.q, kv = options.cut(with_rows(qkv))
        self.held = Held(self.plan, self.heads, {"q": self.q, "k": kv[:, 0], "v": kv[:, 1]}, self._results)

    def _results(self) -> Values:
        rows, heads, _ = self.q.shape
        made = {"out": torch.empty_like(self.q, memory_format=torch.contiguous_format)}
        made["lse"] = self.q.new_empty((rows, heads, 1), dtype=compute_dtype(self.q.dtype))
        if self.options.return_softmax:
            made["p"] = self.q.new_empty((rows, heads, self.heads.columns))
        return made

    def follow(self, comm: Communicator) -> Iterator[bool]:
        """Follows its part of the plan."""
        return follow_heads(self.plan, self.held, comm, self._attend)

    def _attend(self, step: Attend) -> None:
        q, k, v, out, lse = self.gathered(step, "q", "k", "v", "out", "lse")
        rows, columns, scores = len(q), self.heads.columns, None
        if self.options.return_softmax:
            size = 1, q.shape[1], ceil_padded(rows), ceil_padded(columns)
            scores = q.new_full(size, -torch.inf, dtype=compute_dtype(q.dtype))
        state = AttentionState(out, lse.squeeze(-1).T.unsqueeze(0), None, scores)
        dropout = self.dropout(step)
        positions = key_positions(self.plan, step, self.layout) if self.options.needs_positions else None
        call = self.call(step, q, k, v, dropout, positions)
        family(self.options.family).attend(call, state)
        if self.options.return_softmax:
            p = finish_softmax(state, self.plan.spans, dropout, q.dtype)
            self.gathered(step, "p")[0].copy_(p[0, :, :rows, :columns].transpose(0, 1))

    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Output, lse and, if asked for, p, once the plan is done."""
        values, (batch, seq_len, columns) = self.held.finish(), self.shape
        heads = self.q.shape[1]
        lse = values["lse"].new_full((batch, heads, seq_len), -torch.inf)
        rows, slot, slot_row = lse_places(self.spans, lse.device)
        lse[slot, :, slot_row] = values["lse"][rows, :, 0]
        outputs = values["out"].flatten(1), lse
        if not self.options.return_softmax:
            return outputs
        return *outputs, self._probabilities(values["p"], batch, seq_len, columns)

    def _probabilities(self, p: torch.Tensor, batch: int, seq_len: int, columns: int) -> torch.Tensor:
        """Probabilities as the op returns them; see :func:`~hetu.backends.attention.contract.finish_softmax`."""
        whole = p.new_zeros((batch, p.shape[1], ceil_padded(seq_len), ceil_padded(columns)))
        spans, lengths = self.spans, self.layout.place(self.plan.pipeline)[0].lengths
        for span in range(len(spans)):
            start, row, column = int(spans.start[span]), int(spans.slot_row[span]), int(spans.column[span])
            length, keys = int(spans.length[span]), int(lengths[spans.document[span]])
            part = p[start : start + length, :, :keys].transpose(0, 1)
            whole[int(spans.slot[span]), :, row : row + length, column : column + keys] = part
        return whole


class HeadsBackward(_Call):
    """One pipeline's share of the gradient of a ``parallel_attn``."""

    def __init__(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        plan: AttnPlan,
        pipeline: int,
        random: Random,
        options: Options,
    ) -> None:
        super().__init__(plan, pipeline, random, options)
        self.qkv = with_rows(qkv)
        out, dout = as_heads(out, options.head_dim), as_heads(dout, options.head_dim)
        delta = attention_delta(out, dout, dlse, self.spans, family(options.family).row_dot)
        own_lse = torch.empty_like(delta)
        rows, slot, slot_row = lse_places(self.spans, lse.device)
        own_lse[rows] = lse[slot, :, slot_row]
        q, kv = options.cut(self.qkv)
        own = {"q": q, "k": kv[:, 0], "v": kv[:, 1], "dout": dout}
        own |= {"lse": own_lse.unsqueeze(-1), "delta": delta.unsqueeze(-1)}
        self.held = Held(self.plan, self.heads, own, self._results)

    def _results(self) -> Values:
        self.grad = self.qkv.new_empty(self.qkv.shape)
        dq, self.dkv = self.options.cut(self.grad)
        self.sums = self.dkv
        if self.plan.sums_gradients:
            high = compute_dtype(self.dkv.dtype)
            self.sums = self.dkv if self.dkv.dtype == high else torch.empty_like(self.dkv, dtype=high)
            self.sums.zero_()
        return {"dq": dq, "dk": self.sums[:, 0], "dv": self.sums[:, 1]}

    def follow(self, comm: Communicator) -> Iterator[bool]:
        """Follows its part of the plan."""
        return follow_heads(self.plan, self.held, comm, self._attend)

    def _attend(self, step: Attend) -> None:
        q, k, v, dout, lse, delta, dq, dk, dv = self.gathered(
            step, "q", "k", "v", "dout", "lse", "delta", "dq", "dk", "dv"
        )
        by_head = lse.squeeze(-1).T.contiguous().unsqueeze(0)
        state = BackwardState(dout, by_head, delta.squeeze(-1).contiguous(), dq)
        dropout = self.dropout(step)
        positions = key_positions(self.plan, step, self.layout) if dropout else None
        call = self.call(step, q, k, v, dropout, positions)
        family(self.options.family).attend_backward(call, state, dk, dv)

    def gradient(self) -> torch.Tensor:
        """The gradient of the shard, once the plan is done."""
        self.held.finish()
        if self.sums is not self.dkv:
            self.dkv.copy_(self.sums)
        return self.grad
