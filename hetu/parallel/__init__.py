"""Which pipeline holds which tokens, what attends to what, and who sends what to whom: integers only."""

from hetu.parallel.builders import METHODS, build_pipeline_plan, build_plan
from hetu.parallel.cost import Cost, Hardware
from hetu.parallel.layout import GroupLayout, Layout, Spans
from hetu.parallel.plan import AttnPlan, Heads
from hetu.parallel.segments import QuerySpans, SegmentTable
from hetu.parallel.splits import SPLITS
from hetu.parallel.strategy import Strategy, groups_of

__all__ = [
    "METHODS",
    "SPLITS",
    "AttnPlan",
    "Cost",
    "GroupLayout",
    "Hardware",
    "Heads",
    "Layout",
    "QuerySpans",
    "SegmentTable",
    "Spans",
    "Strategy",
    "build_pipeline_plan",
    "build_plan",
    "groups_of",
]
