"""Proves a plan without running it: follows every instruction with token numbers in place of keys and values.

The proof is exact and takes time and memory in proportion to the keys that the segments name, not to the pairs:

1. Every instruction refers to rows, spans and buffers that exist, and every transfer has two ends that agree.
2. The instructions are followed. Sends and receives are posted, and a wait blocks until the other end of the
   transfer is posted, and so does whatever computes, until those of all transfers under way are: a plan that passes
   can't deadlock however little a network buffers, and whatever a device waits for. What lands in a buffer is known
   by token, a read of what has not landed is refused, and so is a receive into rows that are still being sent.
3. Row i of a query span sees a segment's key j from ``i = max(0, j - diagonal)`` on. The mask lets position ``p + i *
   step`` see key position k from ``i = max(0, ceil((k - p) / step))`` on. Where the two are equal for every key of
   every segment, and every key that the span's last row may see is named exactly once, every allowed pair is computed
   exactly once and no other.
4. In the backward, the gradients of foreign rows are followed too, and none of own rows is overwritten; see
   :mod:`hetu.parallel.proof.gradients`.

Where heads are exchanged for tokens, step 2 follows every head of every token and step 3 is done for every attend; see
:mod:`hetu.parallel.proof.heads`.
"""

from __future__ import annotations

import numpy as np

from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send
from hetu.parallel.plan.memory import peak_bytes
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.follow import Follower, follow
from hetu.parallel.proof.gradients import Contributions, Gradients
from hetu.parallel.proof.heads import HeadsRun, Shares
from hetu.parallel.proof.heads_structure import check_heads_part
from hetu.parallel.proof.pairs import Seen, prove_pairs, seen_by
from hetu.parallel.proof.structure import (
    LANDING,
    UNWRITTEN,
    Tokens,
    Transfer,
    check_part,
    instruction_name,
    pair_transfers,
    refuse,
)


def verify(plan: PlanData, max_bytes: int | None = None) -> None:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.verify`."""
    tokens = Tokens.of(plan)
    if len(plan.pipelines) != plan.layout.num_pipelines:
        refuse(f"{len(plan.pipelines)} parts for {plan.layout.num_pipelines} pipelines")
    for r, part in enumerate(plan.pipelines):
        if part.heads is None:
            check_part(plan, r, part)
        else:
            check_heads_part(plan, r, part, part.heads, tokens)
    transfers = pair_transfers(plan)
    contributions = Contributions(plan, tokens) if plan.is_backward else None
    shares = Shares(plan, tokens)
    runs: list[_Run | HeadsRun] = []
    for r, part in enumerate(plan.pipelines):
        if part.heads is None:
            runs.append(_Run(r, plan, tokens, transfers, contributions))
        else:
            runs.append(HeadsRun(r, plan, tokens, transfers, shares))
    follow(runs)
    for run in runs:
        run.check_end()
        if isinstance(run, _Run):
            group, _ = plan.layout.place(run.r)
            prove_pairs(plan, run.r, group, run.part.spans, run.seen, tokens)
    if contributions is not None:
        contributions.check_home()
    shares.check_home()
    _check_memory(plan, max_bytes)


# Following the instructions


class _Run(Follower):
    """One pipeline that follows its instructions, with token numbers for keys and values.

    ``gradients`` follows those of a backward; no instruction is about any in a forward.
    """

    def __init__(
        self,
        r: int,
        plan: PlanData,
        tokens: Tokens,
        transfers: dict[int, Transfer],
        contributions: Contributions | None,
    ) -> None:
        super().__init__(r, plan, transfers)
        self.tokens = tokens
        self.buffers = [tokens.shards[r], *(np.full(size, UNWRITTEN) for size in self.part.buffers[1:])]
        self.gradients = None if contributions is None else Gradients(r, plan, contributions)
        self.seen: list[Seen] = []

    def pack(self, item: Send) -> IntArray:
        if self.gradients and item.grads:
            return self.gradients.send(item)
        rows = item.runs.indices()
        content = self.buffers[item.buffer][rows]
        if (content < 0).any():
            row = int((content < 0).argmax())
            self.refuse(
                f"{instruction_name(item)} sends row {rows[row]} of buffer {item.buffer}: "
                f"{self.tokens.name(content[row])}"
            )
        return content

    def expect(self, item: Receive) -> None:
        for other in self.pending.values():
            # Gradients land in buffers of their own, and are sent from where an attend computed them.
            if other.buffer == item.buffer and other.grads == item.grads and not (item.grads and type(other) is Send):
                self._check_apart(item, other)
        if self.gradients and item.grads:
            self.gradients.receive(item)
        else:
            self.buffers[item.buffer][item.offset : item.offset + item.rows] = LANDING

    def land(self, item: Receive, content: IntArray) -> None:
        place = self.gradients.landing if self.gradients and item.grads else self.buffers
        place[item.buffer][item.offset : item.offset + item.rows] = content

    def _check_apart(self, item: Receive, other: Send | Receive) -> None:
        """That a receive fills no rows that another transfer reads or fills."""
        end = item.offset + item.rows
        if isinstance(other, Send):
            runs, why = other.runs, "is still being sent"
            is_busy = bool(((runs.start < end) & (runs.start + runs.length > item.offset)).any())
        else:
            why = "is still landing"
            is_busy = other.offset < end and other.offset + other.rows > item.offset
        if is_busy:
            place = f"{'landing ' * item.grads}buffer {item.buffer}"
            self.refuse(f"{instruction_name(item)} fills {place} while {instruction_name(other)} {why}")

    def compute(self, item: Attend | Accumulate | Copy) -> None:
        if isinstance(item, Attend):
            self._attend(item)
        else:
            assert self.gradients is not None and isinstance(item, Accumulate), "see check_part"
            self.gradients.add(item)

    def check_end(self) -> None:
        super().check_end()
        if self.gradients:
            self.gradients.check_end()

    def _attend(self, item: Attend) -> None:
        """Notes for every key of every segment: the query span, the key's token, the first row that sees it."""
        buffer, what = self.buffers[item.buffer], f"attending to buffer {item.buffer}"
        said = [self.tokens.shards[source.owner][source.runs.indices()] for source in item.sources]
        held = np.concatenate(said) if said else np.empty(0, np.int64)
        wrong = buffer[: len(held)] != held
        if wrong.any():
            row = int(wrong.argmax())
            there, wanted = self.tokens.name(int(buffer[row])), self.tokens.name(int(held[row]))
            self.refuse(f"{what}: row {row} holds {there}, but the plan says {wanted}")
        self.seen.append(seen_by(item.table, buffer))
        if self.gradients:
            self.gradients.attend(item, list(self.pending.values()))


def _check_memory(plan: PlanData, max_bytes: int | None) -> None:
    for r, part in enumerate(plan.pipelines):
        group, _ = plan.layout.place(r)
        held = sum(part.buffers)
        if held > group.tokens + (0 if part.heads is None else part.rows):
            refuse(f"pipeline {r} holds {held} rows in buffers {part.buffers}; its group has {group.tokens}")
        if max(part.landing, default=0) > part.rows:
            refuse(f"pipeline {r} has landing buffers of {part.landing} rows, but its shard only {part.rows}")
        if max_bytes is not None and peak_bytes(plan, part) > max_bytes:
            refuse(f"pipeline {r} needs {peak_bytes(plan, part):,} bytes, but may take {max_bytes:,}")
