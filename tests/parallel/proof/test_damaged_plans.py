"""Damaged plans of every kind: each is refused by a PlanError, or computes the very same attention."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.damage import Damager, in_turn
from support.layout_cases import MASKS, random_case, random_custom_layout
from support.longer import LONGER
from support.plans import holding_back

import hetu
from hetu.backends.attention.options import Options
from hetu.backends.comm import LocalWorld
from hetu.backends.lower.attention import hetu_parallel_attn
from hetu.backends.lower.attention_backward import hetu_parallel_attn_grad
from hetu.parallel import METHODS, Heads, build_plan
from hetu.parallel.attn_plan import AttnPlan

PLANS, PER_PLAN = 24, 60
HEADS = Heads(num_q=4, num_kv=2, head_dim=8, itemsize=4)


@dataclass
class Attention:
    """A plan with what it computes, on numbers drawn once.

    Attributes:
        plan: The plan, a forward or a backward.
        wanted: What it gives: of each pipeline output and lse, or the gradients.
    """

    plan: AttnPlan
    qkv: list[torch.Tensor]
    dout: list[torch.Tensor]
    wanted: list[torch.Tensor]

    @classmethod
    def of(cls, plan: AttnPlan, seed: int) -> Attention:
        draw = torch.Generator().manual_seed(seed)
        rows = [plan.layout.rows(r) for r in range(plan.layout.num_pipelines)]
        qkv = [torch.randn(n, 8 * 8, generator=draw) for n in rows]
        dout = [torch.randn(n, 4 * 8, generator=draw) for n in rows]
        made = cls(plan, qkv, dout, [])
        made.wanted = made.compute(plan)
        return made

    def compute(self, plan: AttnPlan) -> list[torch.Tensor]:
        options = Options("torch", 4, 2, 8, 0.0, 0.35, False)
        if not plan.is_backward:
            return [x for row in _forward(plan, self.qkv, options) for x in row]
        made = _forward(
            build_plan(self.plan.layout, method="direct", mask=self.plan.mask, heads=HEADS), self.qkv, options
        )
        out, lse = ([row[i] for row in made] for i in range(2))
        state = [torch.tensor([0, 0])] * len(out)
        world = LocalWorld()
        return [
            grads[0]
            for grads in hetu_parallel_attn_grad(self.qkv, out, lse, state, self.dout, None, None, plan, options, world)
        ]


def _forward(plan: AttnPlan, qkv: list[torch.Tensor], options: Options) -> list[tuple[torch.Tensor, ...]]:
    shapes = []
    for r in range(plan.layout.num_pipelines):
        group, member = plan.layout.place(r)
        shapes.append((1 if group.is_packed else len(group.lengths), int(group.seq_lens[member]), 0))
    return hetu_parallel_attn(qkv, None, plan, (0, 0), shapes, options, LocalWorld())


def plans(seed: int) -> Iterator[AttnPlan]:
    """Plans of every method, split and mask, forward and backward."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    methods = list(METHODS)
    for number in range(PLANS):
        while True:
            layout = random_custom_layout(rng) if number % 5 == 4 else random_case(rng, longest=12, most=4).layout()
            if sum(group.tokens for group in layout.groups):
                break
        plan = build_plan(layout, method=methods[number % len(methods)], mask=draw.choice(MASKS), heads=HEADS)
        with holding_back(draw.random() < 0.5):
            yield (plan.backward() if number // len(methods) % 2 else plan).whole()


@pytest.mark.parametrize("seed", range(LONGER))
def test_a_damaged_plan_is_refused_or_means_the_same(seed: int) -> None:
    made = list(plans(seed))
    damager, tried, passed, wrong = Damager(seed, made), 0, 0, list[str]()
    for number, plan in enumerate(made):
        attention = Attention.of(plan, number)
        plan.verify()
        for _ in range(PER_PLAN):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    damaged, what = in_turn(plan, damager, damager.draw.choice([1, 1, 1, 2, 3]))
            except Exception:
                continue  # such a plan can't even be made
            tried += 1
            try:
                damaged.verify()
            except hetu.PlanError:
                continue
            except Exception as error:
                wrong.append(f"{number} {what}: {type(error).__name__}: {error}")
                continue
            passed += 1
            wrong += [f"{number} {what}: {why}" for why in differs(attention, damaged)]
    print(f"{tried} damaged plans, {passed} passed, {len(wrong)} wrong")
    assert tried > PLANS * PER_PLAN * 0.8
    assert not wrong, "\n".join([f"{len(wrong)} of {tried}", *wrong[:100]])


def differs(attention: Attention, damaged: AttnPlan) -> Iterator[str]:
    """How what a damaged plan computes differs from what is right, though it was proven."""
    if damaged.hash() == attention.plan.hash():
        return
    if _of(damaged) != _of(attention.plan):
        return  # it is proven for another attention, as it says
    found = attention.compute(damaged)
    for mine, wanted in zip(found, attention.wanted, strict=True):
        if not torch.allclose(mine, wanted, rtol=1e-4, atol=1e-5):
            yield f"passes and computes something else, off by {(mine - wanted).abs().max()}"
            return


def _of(plan: AttnPlan) -> tuple[Any, ...]:
    """Which attention a plan is of."""
    return plan.layout.digest(), plan.mask, plan.heads, plan.is_backward
