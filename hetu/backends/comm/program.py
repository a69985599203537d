"""A pipeline's part of a plan as the interpreter follows it: what its steps ask for, found once for all runs."""

from __future__ import annotations

from dataclasses import dataclass

from hetu.parallel.mask.segments import Turn
from hetu.parallel.plan.buffers import Batch, Lifetime, Lifetimes, batches, lifetimes
from hetu.parallel.plan.heads import HeadRange
from hetu.parallel.plan.instructions import Instruction
from hetu.parallel.plan.own_gradients import OwnGradients, own_gradients
from hetu.parallel.plan.parts import PipelinePlan, turns


@dataclass(slots=True, eq=False)
class Step:
    """An instruction, and what is done before and after it.

    Attributes:
        number: Its number among the instructions.
        item: It.
        batch: The transfers that begin with it, if it is the first of some.
        makes: Whether memory is made before it; a batch does that itself.
        turn: That of an attend.
        freed: What is let go of after it.
    """

    number: int
    item: Instruction
    batch: Batch | None
    makes: bool
    turn: Turn | None
    freed: tuple[Lifetime, ...]


@dataclass(slots=True, eq=False)
class Program:
    """What following a part takes.

    Attributes:
        steps: Its instructions.
        lives: From when to when memory is needed.
        own: Where gradients are written; None in a forward.
        ranges: The heads of each buffer.
    """

    steps: tuple[Step, ...]
    lives: Lifetimes
    own: OwnGradients | None
    ranges: list[HeadRange]

    @classmethod
    def of(cls, part: PipelinePlan) -> Program:
        """That of a part; found once."""
        return part.known("program", lambda: cls._lower(part))

    @classmethod
    def _lower(cls, part: PipelinePlan) -> Program:
        starts, lives, taken = batches(part), lifetimes(part), turns(part)
        steps = [
            Step(
                number,
                item,
                starts.get(number),
                number in lives.written and number not in starts,
                taken.get(number),
                () if number in starts else tuple(lives.freed.get(number, ())),
            )
            for number, item in enumerate(part.instructions)
        ]
        own = own_gradients(part) if part.is_backward else None
        return cls(tuple(steps), lives, own, [buffer.heads for buffer in part.buffers])
