"""Numbers for what buffers hold, so that plans are followed without data.

Values that all instructions of a plan move together, and that have the same heads, are one *kind* of value. Heads that
no instruction tells apart are one *atom*, for query heads and for key heads: a plan that moves whole rows has one. A
kind of value of an atom of a token has a number, and so has what an attend computes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.heads import HeadRange, Payload
from hetu.parallel.plan.instructions import Copy, Receive, Send, Wait
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.transfers import Tokens

KEYS, KEY_GRADS = "k", "dk"
"""The kinds of keys and values, and of their gradients; kinds are called by their first value."""

_FORWARD = (("q",), ("k", "v"), ("out", "lse", "p"))
_BACKWARD = (("q", "dout", "lse", "delta"), ("out",), ("k", "v"), ("dq",), ("dk", "dv"))


def read_of_queries(is_backward: bool) -> tuple[str, ...]:
    """The values of its queries that an attend reads."""
    return ("q", "dout", "lse", "delta") if is_backward else ("q",)


def results_of(is_backward: bool) -> frozenset[str]:
    """The values that attends compute."""
    return frozenset(("dq", "dk", "dv") if is_backward else ("out", "lse", "p"))


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """The kinds of value of a plan, and the atoms of its heads.

    Attributes:
        kinds: The kind of each value.
        inputs: Kinds that an attend reads of its queries.
        results: Kinds that it computes of them; gradients of keys and values are not among them.
        bounds: The first head of each atom and the number of heads, for query heads and key heads.
        tokens: All tokens.
    """

    kinds: dict[str, str]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    bounds: tuple[IntArray, IntArray]
    tokens: Tokens
    _of_payload: dict[Payload, tuple[str, ...]] = field(default_factory=dict)
    _atoms: dict[HeadRange, tuple[slice, slice]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: PlanData, tokens: Tokens) -> Contents:
        """Those of a plan."""
        payloads: set[Payload] = set()
        ranges: set[HeadRange] = {plan.heads.all}
        for part in plan.pipelines:
            ranges.update([buffer.heads for buffer in part.buffers])
            for item in part.instructions:
                if not isinstance(item, Wait):
                    ranges.add(item.heads)
                if isinstance(item, (Send, Receive, Copy)):
                    payloads.add(item.payload)
        blocks = [list(block) for block in (_BACKWARD if plan.is_backward else _FORWARD)]
        for payload in payloads:
            cut = [(set(block) & set(payload.values), block) for block in blocks]
            blocks = [[x for x in block if (x in both) is side] for both, block in cut for side in (True, False)]
            blocks = [block for block in blocks if block]
        kinds = {value: block[0] for block in blocks for value in block}
        results = results_of(plan.is_backward)
        computed = [block[0] for block in blocks if block[0] in results and block[0] != KEY_GRADS]
        ends = [
            [end for some in ranges for end in (some.of(name).start, some.of(name).stop)]
            + [0, plan.heads.all.count(name)]
            for name in ("q", "k")
        ]
        bounds = np.unique(ends[0]), np.unique(ends[1])
        return cls(
            kinds,
            tuple(dict.fromkeys([kinds[value] for value in read_of_queries(plan.is_backward)])),
            tuple(computed),
            bounds,
            tokens,
        )

    def of_payload(self, payload: Payload) -> tuple[str, ...]:
        """The kinds that a payload has."""
        found = self._of_payload.get(payload)
        if found is None:
            kinds = dict.fromkeys([self.kinds[value] for value in payload.values])
            found = self._of_payload[payload] = tuple(kinds)
        return found

    def atoms(self, kind: str, heads: HeadRange) -> slice:
        """Which atoms of a kind a range of heads has."""
        found = self._atoms.get(heads)
        if found is None:
            sides = [(bounds, heads.of(name)) for bounds, name in zip(self.bounds, ("q", "k"), strict=True)]
            q, kv = (slice(*np.searchsorted(bounds, (own.start, own.stop)).tolist()) for bounds, own in sides)
            found = self._atoms[heads] = q, kv
        return found[kind in (KEYS, KEY_GRADS)]

    def number_of_atoms(self, kind: str) -> int:
        """How many atoms all heads have."""
        return len(self.bounds[kind in (KEYS, KEY_GRADS)]) - 1

    def numbers(self, kind: str, tokens: IntArray, atoms: slice) -> IntArray:
        """The numbers of a kind of some tokens, ``(tokens, atoms)``."""
        count = self.number_of_atoms(kind)
        if count == 1:
            return tokens[:, None][:, atoms]
        return tokens[:, None] * count + np.arange(atoms.start, atoms.stop)

    def name(self, kind: str, number: int) -> str:
        """What a number stands for, as messages call it; not for gradients of keys and values."""
        count = self.number_of_atoms(kind)
        if number < 0:
            return self.tokens.name(number)
        token, atom = divmod(number, count)
        return self.tokens.name(token) if count == 1 else f"{self.name_of(kind, atom)} of {self.tokens.name(token)}"

    def name_of(self, kind: str, atom: int) -> str:
        """A kind of some heads."""
        bounds = self.bounds[kind in (KEYS, KEY_GRADS)]
        first, last = int(bounds[atom]), int(bounds[atom + 1]) - 1
        return f"{kind} of {f'head {first}' if first == last else f'heads {first} to {last}'}"
