"""Follows one pipeline's instructions with numbers for what its buffers hold."""

from __future__ import annotations

import numpy as np

from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.buffers import batches, lifetimes
from hetu.parallel.plan.heads import HeadRange, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send
from hetu.parallel.plan.own_gradients import own_gradients
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.contents import KEY_GRADS, KEYS, Contents
from hetu.parallel.proof.follow import Follower
from hetu.parallel.proof.gradients import NOT_COMPUTED, Contributions, OwnSums
from hetu.parallel.proof.structure import buffer_name, query_tokens
from hetu.parallel.proof.transfers import LANDING, UNWRITTEN, Transfer, instruction_name

Rows = slice | IntArray
"""Neighbouring rows, which are a view of an array, or numbers of rows."""


class Run(Follower):
    """One pipeline that follows its instructions.

    Attributes:
        held: By buffer and kind of value, ``(rows, atoms)``: numbers of what is there, or why there is nothing.
        unread: Whether nobody has read it since it was written.
        attends: What it attended to: for whom, and the tokens of the keys by row.
        queries: The token of each query row; None if it never attends.
    """

    def __init__(
        self,
        r: int,
        plan: PlanData,
        contents: Contents,
        transfers: dict[int, Transfer],
        contributions: Contributions | None,
    ) -> None:
        super().__init__(r, plan, transfers)
        self.contents, self.contributions = contents, contributions
        self.sums = OwnSums(r, plan, contents, contributions) if contributions is not None else None
        self.held: dict[tuple[int, str], IntArray] = {}
        self.unread: dict[tuple[int, str], IntArray] = {}
        self._known_columns: dict[tuple[int, str, HeadRange], slice] = {}
        self.attends: list[tuple[Attend, IntArray]] = []
        self.last = {
            item.heads: number for number, item in enumerate(self.part.instructions) if isinstance(item, Attend)
        }
        self.queries = query_tokens(self.part, contents.tokens) if self.last else None
        # What a batch packs last is let go of when all of it is packed.
        ends = {n: n + len(batch.sends) + len(batch.receives) - 1 for n, batch in batches(self.part).items()}
        self.freed = {ends.get(n, n): lives for n, lives in lifetimes(self.part).freed.items()}

    # What is held

    def _of(self, buffer: int, kind: str) -> IntArray:
        """The numbers of a kind in a buffer; those that the shard is given are there from the beginning."""
        found = self.held.get((buffer, kind))
        if found is None:
            declared = self.part.buffers[buffer]
            atoms = self.contents.atoms(kind, declared.heads)
            if buffer == 0 and (kind == KEYS or kind in self.contents.inputs):
                found = self.contents.numbers(kind, self.contents.tokens.shards[self.r], atoms).copy()
            else:
                found = np.full((declared.rows, atoms.stop - atoms.start), UNWRITTEN)
            self.held[buffer, kind] = found
            self.unread[buffer, kind] = np.zeros(found.shape, bool)
        return found

    def _columns(self, buffer: int, kind: str, heads: HeadRange) -> slice:
        """Which columns of a buffer some heads are."""
        found = self._known_columns.get((buffer, kind, heads))
        if found is None:
            atoms, own = (self.contents.atoms(kind, some) for some in (heads, self.part.buffers[buffer].heads))
            found = slice(atoms.start - own.start, atoms.stop - own.start)
            self._known_columns[buffer, kind, heads] = found
        return found

    def _take(self, item: Send | Copy | Accumulate, payload: Payload, rows: IntArray) -> dict[str, IntArray]:
        """What an instruction reads of a buffer."""
        taken, does = {}, "sends" if isinstance(item, Send) else "adds" if isinstance(item, Accumulate) else "copies"
        for kind in self.contents.of_payload(payload):
            held, columns = self._of(item.buffer, kind), self._columns(item.buffer, kind, item.heads)
            numbers = held.take(rows, axis=0)[:, columns]
            if numbers.size and numbers.min() < 0:
                i, atom = np.argwhere(numbers < 0)[0]
                why = self._why_missing(item, kind, int(numbers[i, atom]))
                place = buffer_name(self.part, item.buffer)
                self.refuse(f"{instruction_name(item)} {does} row {rows[i]} of {place}{why}")
            if kind == KEY_GRADS and self.contributions is not None and self.part.buffers[item.buffer].holds_keys:
                self.contributions.send(numbers.reshape(-1), f"pipeline {self.r}: {instruction_name(item)}")
            if item.buffer:
                self.unread[item.buffer, kind][rows, columns] = False
            taken[kind] = numbers
        return taken

    def _why_missing(self, item: Send | Copy | Accumulate, kind: str, number: int) -> str:
        if number == NOT_COMPUTED:
            return ", which no segment names"
        is_computed = kind in (*self.contents.results, KEY_GRADS) and self.part.buffers[item.buffer].holds_keys
        return f" before any attend computed {kind}" if is_computed else f": {self.contents.tokens.name(number)}"

    def _write(self, what: str, buffer: int, kind: str, heads: HeadRange, rows: Rows, numbers: IntArray | int) -> None:
        """Puts numbers where there is nothing, or only what was read; ``LANDING`` where a receive is to put some."""
        held, columns = self._of(buffer, kind), self._columns(buffer, kind, heads)
        is_new = self.unread[buffer, kind][rows, columns]
        if is_new.any():
            self._check_free(what, buffer, kind, heads, rows)
        held[rows, columns] = numbers
        is_new[...] = True
        if not isinstance(rows, slice):  # it is a view otherwise
            self.unread[buffer, kind][rows, columns] = True

    def _check_free(self, what: str, buffer: int, kind: str, heads: HeadRange, rows: Rows) -> None:
        there = self._of(buffer, kind)[rows, self._columns(buffer, kind, heads)]
        if (there == LANDING).any():
            filled = np.arange(len(self._of(buffer, kind)))[rows]
            for other in self.pending.values():
                if isinstance(other, Receive) and other.buffer == buffer and np.isin(other.indices(), filled).any():
                    place = buffer_name(self.part, buffer)
                    self.refuse(f"{what} fills {place} while {instruction_name(other)} is still landing")
            raise AssertionError("what lands was received")
        if (there >= 0).any():
            found = self._name(kind, int(there[there >= 0][0]))
            self.refuse(f"{found} is overwritten by {what} before it is used")

    def _name(self, kind: str, number: int) -> str:
        if kind == KEY_GRADS and self.contributions is not None:
            return self.contributions.name(number)
        return f"{kind} of {self.contents.tokens.name(number // self.contents.number_of_atoms(kind))}"

    def _check_sent(self, what: str, buffer: int, payload: Payload, heads: HeadRange, rows: Rows) -> None:
        """That nothing is filled that is still being sent."""
        for other in self.pending.values():
            if not isinstance(other, Send) or other.buffer != buffer or not heads.overlaps(other.heads):
                continue
            kinds = set(self.contents.of_payload(payload))
            if kinds.isdisjoint(self.contents.of_payload(other.payload)):
                continue
            filled = np.arange(self.part.buffers[buffer].rows)[rows]
            if np.isin(other.runs.indices(), filled).any():
                place = buffer_name(self.part, buffer)
                self.refuse(f"{what} fills {place} while {instruction_name(other)} is still being sent")

    def followed(self, number: int) -> None:
        """What nobody reads any more is let go of: its memory may be taken for something else."""
        for life in self.freed.get(number, ()):
            for kind in self.contents.of_payload(life.payload) if life.receive is None else ():
                numbers = self.held.pop((life.buffer, kind), None)
                if kind == KEY_GRADS and numbers is not None and self.part.buffers[life.buffer].holds_keys:
                    lost = numbers[(numbers >= 0) & self.unread[life.buffer, kind]]
                    if len(lost):
                        self.refuse(f"{self._name(kind, int(lost[0]))} is never sent home")

    # Transfers

    def pack(self, item: Send) -> dict[str, IntArray]:
        return self._take(item, item.payload, item.runs.indices())

    def expect(self, item: Receive) -> None:
        what, rows = instruction_name(item), _rows_of(item)
        self._check_sent(what, item.buffer, item.payload, item.heads, rows)
        for kind in self.contents.of_payload(item.payload):
            if item.buffer or kind != KEY_GRADS:  # those of own rows are followed as sums
                self._write(what, item.buffer, kind, item.heads, rows, LANDING)

    def land(self, item: Receive, content: dict[str, IntArray]) -> None:
        for kind, numbers in content.items():
            if item.buffer == 0:
                self._check_home(item, kind, item.indices(), numbers)
            if item.buffer or kind != KEY_GRADS:
                self._of(item.buffer, kind)[_rows_of(item), self._columns(item.buffer, kind, item.heads)] = numbers

    def _check_home(self, item: Receive | Copy, kind: str, rows: IntArray, numbers: IntArray) -> None:
        """What comes to the shard has to be of the very rows and heads; gradients of keys are added there."""
        what, atoms = instruction_name(item), self.contents.atoms(kind, item.heads)
        if kind == KEY_GRADS:
            assert self.sums is not None, "see check_part"
            self.sums.bring(rows, atoms, numbers, what, is_finished=item.payload is not Payload.KV_GRADS)
            return
        wrong = numbers != self.contents.numbers(kind, self.contents.tokens.shards[self.r][rows], atoms)
        if wrong.any():
            self.refuse(f"{what} brings to another place {self._name(kind, int(numbers[wrong][0]))}")

    def compute(self, item: Attend | Accumulate | Copy) -> None:
        match item:
            case Attend():
                self._attend(item)
            case Accumulate():
                assert self.sums is not None, "see check_part"
                rows = np.arange(item.offset, item.offset + item.runs.rows)
                taken = self._take(item, Payload.KV_GRADS, rows)[KEY_GRADS]
                what = f"an accumulate from {buffer_name(self.part, item.buffer)}"
                atoms = self.contents.atoms(KEY_GRADS, item.heads)
                self.sums.bring(item.runs.indices(), atoms, taken, what, is_finished=False)
            case Copy():
                self._copy(item)

    def _copy(self, item: Copy) -> None:
        rows = item.place.indices()
        for kind, numbers in self._take(item, item.payload, item.runs.indices()).items():
            if item.target == 0:
                self._check_home(item, kind, rows, numbers)
            if item.target and item.payload is Payload.KV_GRADS:
                self._add_up(item, rows, numbers)
            elif item.target or kind != KEY_GRADS:
                self._write(instruction_name(item), item.target, kind, item.heads, rows, numbers)

    def _add_up(self, item: Copy, rows: IntArray, numbers: IntArray) -> None:
        """Adds gradients to those of rows that the pipeline passed on."""
        assert self.contributions is not None, "see check_part"
        what = instruction_name(item)
        self._check_sent(what, item.target, item.payload, item.heads, rows)
        held, columns = self._of(item.target, KEY_GRADS), self._columns(item.target, KEY_GRADS, item.heads)
        there = held[rows, columns]
        if (there == LANDING).any():
            self.refuse(f"{what} adds to {buffer_name(self.part, item.target)}, where something is still landing")
        held[rows, columns] = self.contributions.add_up(there, numbers, self.r, what)
        self.unread[item.target, KEY_GRADS][rows, columns] = True

    # Attends

    def _attend(self, item: Attend) -> None:
        said, number = self.contents.tokens.of_sources(item), len(self.attends)
        self._check_held(item, item.buffer, KEYS, said)
        if self.part.queries:
            assert self.queries is not None
            for kind in self.contents.inputs:
                self._check_held(item, self.part.queries, kind, self.queries)
            if self.last[item.heads] == self.next:  # before that they are not finished
                self._compute_results(item, number, self.queries)
        if item.buffer == 0 and self.sums is not None:
            self.sums.attend(item, number)
        elif self.sums is not None:
            self._compute_gradients(item, number)
        self.attends.append((item, said))

    def _check_held(self, item: Attend, buffer: int, kind: str, tokens: IntArray) -> None:
        """That a buffer holds what an attend is to read of some tokens."""
        atoms, columns = self.contents.atoms(kind, item.heads), self._columns(buffer, kind, item.heads)
        there = self._of(buffer, kind)[: len(tokens), columns]
        wanted = self.contents.numbers(kind, tokens, atoms)
        if (there != wanted).any():
            row, atom = np.argwhere(there != wanted)[0]
            found, said = (self.contents.name(kind, int(numbers[row, atom])) for numbers in (there, wanted))
            heads = "" if item.heads == self.part.buffers[0].heads else f" for {item.heads}"
            self.refuse(f"attending to buffer {buffer}{heads}: row {row} holds {found}, but the plan says {said}")
        self.unread[buffer, kind][: len(tokens), columns] = False

    def _compute_results(self, item: Attend, number: int, tokens: IntArray) -> None:
        """Computes what travels home, row by row."""
        buffer, rows = self.part.queries, slice(0, len(tokens))
        for kind in self.contents.results:
            if kind in self.part.buffers[buffer].values:
                numbers = self.contents.numbers(kind, tokens, self.contents.atoms(kind, item.heads))
                self._write(f"attend {number}", buffer, kind, item.heads, rows, numbers)

    def _compute_gradients(self, item: Attend, number: int) -> None:
        """Computes gradients of the rows of a buffer, in place of what was computed of them before."""
        assert self.contributions is not None
        what, everything = f"attend {number}", slice(0, self.part.buffers[item.buffer].rows)
        if self.next in own_gradients(self.part).aside:  # a number stands for the gradient of one attend
            self.refuse(f"{what} adds to gradients of buffer {item.buffer} that an earlier one computed")
        self._check_sent(what, item.buffer, Payload.KV_GRADS, item.heads, everything)
        self._write(what, item.buffer, KEY_GRADS, item.heads, everything, NOT_COMPUTED)
        atoms = self.contents.atoms(KEY_GRADS, item.heads)
        numbers = self.contributions.numbers(self.r, number, atoms.stop - atoms.start)
        rows = self.contributions.rows[self.r, number]
        self._of(item.buffer, KEY_GRADS)[rows, self._columns(item.buffer, KEY_GRADS, item.heads)] = numbers

    def check_end(self) -> None:
        super().check_end()
        if self.sums is not None:
            self.sums.check_end()
        for kind in self.contents.results if self.part.queries else ():
            if kind in self.part.buffers[0].values and (self._of(0, kind) < 0).any():
                row, atom = np.argwhere(self._of(0, kind) < 0)[0]
                token = self.contents.tokens.name(int(self.contents.tokens.shards[self.r][row]))
                self.refuse(f"{self.contents.name_of(kind, int(atom))} of {token} never comes home")


def _rows_of(item: Receive) -> Rows:
    return slice(item.offset, item.offset + item.rows) if item.runs is None else item.runs.indices()
