"""Which pipeline holds which tokens, what attends to what, and who sends what to whom: integers only."""

from hetu.parallel.attn_plan import AttnPlan, build_pipeline_plan, build_plan
from hetu.parallel.batch.batch_plan import BatchPlan
from hetu.parallel.batch.plan_batch import plan_batch
from hetu.parallel.choice.cost import Amounts, DocumentCost, StrategyCost, strategy_cost
from hetu.parallel.layout.group import GroupLayout, Spans
from hetu.parallel.layout.layout import Layout
from hetu.parallel.layout.splits import SPLITS
from hetu.parallel.layout.strategy import Strategy, groups_of
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import QuerySpans, SegmentTable
from hetu.parallel.methods import METHODS, Method
from hetu.parallel.plan.heads import Heads
from hetu.parallel.topology import Topology
from hetu.parallel.views.cost import Cost
from hetu.parallel.views.hardware import Hardware, Rate

Strategy.cost_factory = strategy_cost  # it knows the methods, and strategies stand below these

__all__ = [
    "METHODS",
    "SPLITS",
    "Amounts",
    "AttnPlan",
    "BatchPlan",
    "Cost",
    "DocumentCost",
    "GroupLayout",
    "Hardware",
    "Heads",
    "Layout",
    "Mask",
    "Method",
    "QuerySpans",
    "Rate",
    "SegmentTable",
    "Spans",
    "Strategy",
    "StrategyCost",
    "Topology",
    "build_pipeline_plan",
    "build_plan",
    "groups_of",
    "plan_batch",
]
