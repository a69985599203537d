"""A method as a value: a builder of the forward's parts and one of the backward's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hetu.parallel.layout.layout import GroupLayout
from hetu.parallel.plan.heads import Heads
from hetu.parallel.plan.parts import PipelinePlan, PlanData


@dataclass(frozen=True, slots=True)
class Method:
    """How the pipelines of a group attend to each other's tokens.

    Attributes:
        forward: Builds the parts of some members of a group, given as a slice, in a strategy of so many pipelines.
        backward: Builds all parts of the backward of a plan that ``forward`` built.
    """

    forward: Callable[[GroupLayout, slice, bool, int, Heads], list[PipelinePlan]]
    backward: Callable[[PlanData], tuple[PipelinePlan, ...]]
