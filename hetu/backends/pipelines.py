"""One pipeline's share of a ``parallel_attn`` and of its gradient: what it holds, and how it computes a step.

A pipeline attends for the rows of its plan's queries' buffer. Where these are its own rows, it writes its results where
the op returns them. Else they come home row by row, and are put there at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

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
    new_state,
    sink_gradient,
)
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.options import Options, Random, as_heads, key_positions, wide_sinks, with_rows
from hetu.backends.comm import Buffers, Communicator, Owned, Values, follow
from hetu.backends.families import family
from hetu.backends.memory import empty
from hetu.parallel import AttnPlan
from hetu.parallel.mask.segments import QuerySpans, Turn
from hetu.parallel.plan.heads import HeadRange, Payload
from hetu.parallel.plan.instructions import Attend
from hetu.parallel.plan.parts import PipelinePlan


@dataclass(slots=True)  # not frozen: every attention makes some
class Rows:
    """The queries, keys and values of a pipeline's own tokens, or their gradients.

    Attributes:
        q: ``(rows, H_q, head_dim)`` in any strides, the last dim contiguous.
        k: ``(rows, H_kv, head_dim)``, also so.
        v: As k.
        kv: k and v beside each other, ``(rows, 2 * H_kv, head_dim)``; None if they lie apart.
        qkv: All three of them in one tensor ``(rows, (H_q + 2 * H_kv) * head_dim)``; None if they lie apart.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv: torch.Tensor | None
    qkv: torch.Tensor | None = None

    @classmethod
    def packed(cls, qkv: torch.Tensor, options: Options) -> Rows:
        """Views of what lies in one tensor, copied only if its rows are no stretches."""
        q, kv = options.cut(with_rows(qkv))
        k, v = kv.unbind(1)
        return cls(q, k, v, kv.flatten(1, 2), qkv)

    @classmethod
    def new(cls, like: torch.Tensor, num_kv: int) -> Rows:
        """New memory for as many rows as ``like`` has, ``(rows, H_q, head_dim)``."""
        rows, _, head_dim = like.shape
        kv = empty((rows, 2, num_kv, head_dim), like.dtype, like.device)
        k, v = kv.unbind(1)
        return cls(empty(like.shape, like.dtype, like.device), k, v, kv.flatten(1, 2))


@dataclass(frozen=True, slots=True)
class _Share:
    """What a plan says of a pipeline's share of an attention: the same in every run.

    Attributes:
        part: Its part of the plan.
        is_own: Whether it attends for its own rows.
        spans: The spans of the own rows, which are not always the queries.
        group: The number of the group whose documents its rows are of.
        attends: How often each range of heads is attended for, of rows whose results travel.
    """

    part: PipelinePlan
    is_own: bool
    spans: QuerySpans
    group: int
    attends: Mapping[HeadRange, int]

    @classmethod
    def of(cls, plan: AttnPlan, pipeline: int) -> _Share:
        """Found once."""
        key = "share", pipeline
        known: _Share | None = plan.memo.get(key)
        if known is None:
            part = plan.pipelines[pipeline]
            is_own = part.queries == 0
            spans = part.spans if is_own else plan.layout.query_spans(pipeline)
            steps = () if is_own else [item.heads for item in part.instructions if isinstance(item, Attend)]
            known = plan.memo[key] = cls(part, is_own, spans, plan.layout.group_index(pipeline), Counter(steps))
        return known


class _Call:
    """What forward and backward have in common.

    Attributes:
        own: The pipeline's own queries, keys and values.
        spans: The spans of the own rows, which are not always the queries.
        sinks: float32 ``(H_q,)`` (float64 for float64 inputs), contiguous, or None.
        held: What the pipeline holds while it follows its part.
    """

    held: Buffers

    def __init__(
        self,
        own: Rows,
        plan: AttnPlan,
        pipeline: int,
        random: Random,
        options: Options,
        sinks: torch.Tensor | None,
    ) -> None:
        share = _Share.of(plan, pipeline)
        self.own, self.dtype = own, own.q.dtype
        self.options, self.layout, self.mask, self.heads = options, plan.layout, plan.mask, plan.heads
        self.sinks = None if sinks is None else wide_sinks(sinks, self.dtype)
        self.plan, self.is_own, self.spans = share.part, share.is_own, share.spans
        self.all_dropout = options.dropout(random, share.group) if options.p_dropout else None
        self.left = dict(share.attends)  # how often each is still attended for

    def given(self) -> Owned:
        """The values that are there from the beginning."""
        own = self.own
        return {"q": own.q, "k": own.k, "v": own.v}, {} if own.kv is None else {Payload.KV: own.kv}

    def dropout(self, step: Attend) -> Dropout | None:
        """The dropout of a step's heads."""
        if self.all_dropout is None or step.heads.first_q == 0:
            return self.all_dropout
        return replace(self.all_dropout, first_head=step.heads.first_q)

    def call(
        self,
        step: Attend,
        queries: Values,
        keys: Values,
        turn: Turn | None,
        dropout: Dropout | None,
        needs_positions: bool,
    ) -> AttendCall:
        """What a kernel family takes of a step, forward and backward."""
        return AttendCall(
            queries["q"],
            keys["k"],
            keys["v"],
            self.plan.spans,
            step.table,
            self.options.softmax_scale,
            turn,
            dropout,
            key_positions(self.plan, step, self.layout, self.mask) if needs_positions else None,
            self.options.softcap,
            None if self.sinks is None else self.sinks[step.heads.of("q")],
        )

    def follow(self, comm: Communicator) -> Iterator[bool]:
        """Follows its part of the plan."""
        return follow(self.plan, self.held, comm, self.attend)

    def attend(self, step: Attend, queries: Values, keys: Values, turn: Turn | None, keeps: bool) -> None:
        """Computes a step; see :data:`hetu.backends.comm.buffers.AttendStep`."""
        raise NotImplementedError

    def is_last(self, step: Attend) -> bool:
        """Counts a step; whether it is the last one for its heads."""
        self.left[step.heads] -= 1
        return self.left[step.heads] == 0


class ForwardCall(_Call):
    """One pipeline's share of a ``parallel_attn``: its queries, its running results, and how it attends."""

    def __init__(
        self,
        own: Rows,
        plan: AttnPlan,
        pipeline: int,
        random: Random,
        shape: tuple[int, int, int],
        options: Options,
        sinks: torch.Tensor | None = None,
    ) -> None:
        super().__init__(own, plan, pipeline, random, options, sinks)
        self.shape = shape
        self.state: AttentionState | None = None  # of the own rows
        self.states: dict[HeadRange, AttentionState] = {}  # of rows whose results travel
        self.held = Buffers(self.plan, self.heads, self.given(), self._results, family(options.family).gather)

    def _results(self) -> Owned:
        q = self.own.q
        if self.is_own:
            batch, seq_len, columns = self.shape
            wanted = columns if self.options.return_softmax else None
            self.state = new_state(q, self.spans, batch, seq_len, self.plan.runs_on, columns=wanted)
            return {}, {}
        made = {"out": torch.empty_like(q, memory_format=torch.contiguous_format)}
        made["lse"] = q.new_empty((len(q), self.heads.num_q, 1), dtype=compute_dtype(q.dtype))
        if self.options.return_softmax:
            made["p"] = q.new_empty((len(q), self.heads.num_q, self.heads.columns))
        return made, {}

    def attend(self, step: Attend, queries: Values, keys: Values, turn: Turn | None, keeps: bool) -> None:
        """Attends to one buffer of keys and values."""
        state = self.state or self._state_by_row(step, queries)
        dropout = None if self.all_dropout is None else self.dropout(step)
        needs_positions = dropout is not None or self.options.return_softmax
        call = self.call(step, queries, keys, turn, dropout, needs_positions)
        family(self.options.family).attend(call, state)
        if not self.is_own and self.is_last(step):
            del self.states[step.heads]
            if self.options.return_softmax:
                p, rows = finish_softmax(state, self.plan.spans, dropout, self.dtype), len(queries["q"])
                queries["p"].copy_(p[0, :, :rows, : self.heads.columns].transpose(0, 1))

    def _state_by_row(self, step: Attend, queries: Values) -> AttentionState:
        """The running result of queries whose results travel home: they are written row by row, in one slot."""
        if step.heads in self.states:
            return self.states[step.heads]
        q, scores = queries["q"], None
        high = compute_dtype(q.dtype)
        if self.options.return_softmax:
            size = 1, q.shape[1], ceil_padded(len(q)), ceil_padded(self.heads.columns)
            scores = q.new_full(size, -torch.inf, dtype=high)
        acc = q.new_empty(q.shape, dtype=high) if self.plan.runs_on else None
        lse = queries["lse"].squeeze(-1).T.unsqueeze(0)
        state = self.states[step.heads] = AttentionState(queries["out"], lse, acc, scores)
        return state

    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Output ``(rows, H_q, head_dim)``, lse and, if asked for, p, once the plan is done."""
        values = self.held.finish()
        if self.state is not None:
            outputs = self.state.out, self.state.lse
            if not self.options.return_softmax:
                return outputs
            return *outputs, finish_softmax(self.state, self.spans, self.all_dropout, self.dtype)
        batch, seq_len, columns = self.shape
        lse = values["lse"].new_full((batch, self.heads.num_q, seq_len), -torch.inf)
        rows, slot, slot_row = lse_places(self.spans, lse.device)
        lse[slot, :, slot_row] = values["lse"][rows, :, 0]
        outputs = values["out"], lse
        if not self.options.return_softmax:
            return outputs
        return *outputs, self._probabilities(values["p"], batch, seq_len, columns)

    def _probabilities(self, p: torch.Tensor, batch: int, seq_len: int, columns: int) -> torch.Tensor:
        """Probabilities as the op returns them; see :func:`~hetu.backends.attention.contract.finish_softmax`."""
        whole = p.new_zeros((batch, p.shape[1], ceil_padded(seq_len), ceil_padded(columns)))
        spans, group = self.spans, self.layout.place(self.plan.pipeline)[0]
        for span in range(len(spans)):
            start, row, column = int(spans.start[span]), int(spans.slot_row[span]), int(spans.column[span])
            length, keys = int(spans.length[span]), int(group.lengths[spans.document[span]])
            if self.mask.joins:  # a row has a column for every key of the pack
                column, keys = 0, group.tokens
            part = p[start : start + length, :, :keys].transpose(0, 1)
            whole[int(spans.slot[span]), :, row : row + length, column : column + keys] = part
        return whole


class BackwardCall(_Call):
    """One pipeline's share of the gradient of a ``parallel_attn``.

    Attributes:
        grads: The gradients of its own rows, once the plan is done.
    """

    def __init__(
        self,
        own: Rows,
        grads: Callable[[], Rows],
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        plan: AttnPlan,
        pipeline: int,
        random: Random,
        options: Options,
        sinks: torch.Tensor | None = None,
    ) -> None:
        super().__init__(own, plan, pipeline, random, options, sinks)
        self._new_grads = grads
        out, self.dout = as_heads(out, options.head_dim), as_heads(dout, options.head_dim)
        self.lse = lse
        self.delta = attention_delta(out, self.dout, dlse, self.spans, family(options.family).row_dot)
        self.state: BackwardState | None = None  # of the own rows
        self.states: dict[HeadRange, BackwardState] = {}  # of rows whose results travel
        values, beside = self.given()
        if not self.is_own:
            values = {**values, **self._by_row()}
        self.held = Buffers(self.plan, self.heads, (values, beside), self._results, family(options.family).gather)

    def _by_row(self) -> Values:
        """What travels to who attends for the own rows."""
        lse = torch.empty_like(self.delta)
        rows, slot, slot_row = lse_places(self.spans, lse.device)
        lse[rows] = self.lse[slot, :, slot_row]
        return {"dout": self.dout, "lse": lse.unsqueeze(-1), "delta": self.delta.unsqueeze(-1)}

    def _results(self) -> Owned:
        # Sums of several parts are made in float32; what a single step computes is written as it is returned.
        high = compute_dtype(self.dtype)
        grads = self.grads = self._new_grads()
        assert grads.kv is not None
        self.sums = grads.kv
        if self.plan.sums_gradients and high != self.dtype:
            self.sums = empty(grads.kv.shape, high, grads.kv.device)
        if self.is_own:
            self.state = BackwardState(self.dout, self.lse, self.delta, grads.q, self._acc(grads.q))
        half = self.heads.num_kv
        dk, dv = (grads.k, grads.v) if self.sums is grads.kv else self.sums.split_with_sizes((half, half), 1)
        return {"dq": grads.q, "dk": dk, "dv": dv}, {Payload.KV_GRADS: self.sums}

    def _acc(self, dq: torch.Tensor) -> torch.Tensor | None:
        """Where gradients of queries are added up that several steps compute."""
        if not self.plan.runs_on:
            return None
        high = compute_dtype(dq.dtype)
        return dq if dq.dtype == high else empty(dq.shape, high, dq.device)

    def attend(self, step: Attend, queries: Values, keys: Values, turn: Turn | None, keeps: bool) -> None:
        """The backward of one step: adds to the gradient of q, writes those of the buffer's keys and values."""
        state = self.state or self._state_by_row(step, queries)
        dropout = None if self.all_dropout is None else self.dropout(step)
        call = self.call(step, queries, keys, turn, dropout, dropout is not None)
        family(self.options.family).attend_backward(call, state, keys["dk"], keys["dv"], keeps)
        if not self.is_own and self.is_last(step):
            del self.states[step.heads]

    def _state_by_row(self, step: Attend, queries: Values) -> BackwardState:
        """What steps read of queries whose gradients travel home, and the gradients, row by row."""
        if step.heads not in self.states:
            by_head = queries["lse"].squeeze(-1).T.contiguous().unsqueeze(0)
            delta, dq = queries["delta"].squeeze(-1).contiguous(), queries["dq"]
            self.states[step.heads] = BackwardState(queries["dout"], by_head, delta, dq, self._acc(dq))
        return self.states[step.heads]

    def finish(self) -> Rows:
        """The gradients of its own rows, once the plan is done."""
        self.held.finish()
        grads = self.grads
        if grads.kv is not None and self.sums is not grads.kv:
            grads.kv.copy_(self.sums)
        return grads

    def sink_gradient(self) -> torch.Tensor:
        """The gradient of the sinks, ``(H_q,)`` in their wide dtype: what the own rows do to them."""
        assert self.sinks is not None, "there are no sinks"
        return sink_gradient(self.sinks, self.lse, self.delta, self.spans)
