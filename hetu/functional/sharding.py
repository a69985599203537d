"""What all :class:`~hetu.functional.ContextParallel` of the same lengths over one group share: layout and plans.

A compiled model knows a context parallelism by a *table*, an int64 tensor on the host that says everything of its
lengths, and by the group's name. So other lengths are other values, and recompile nothing; and a backward finds its
plan even if nobody else has kept it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hetu.backends.attention.options import Options
from hetu.backends.comm.groups import AnyWorld, GroupWorld, world_named
from hetu.backends.families import default_backend
from hetu.backends.memory import copied_to
from hetu.cache import LRU
from hetu.config import settings
from hetu.functional.attention import families
from hetu.functional.masking import USUAL, Masking
from hetu.parallel import AttnPlan, Heads, Layout, Mask, build_plan
from hetu.parallel.topology import topology_of

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class PlannedCall:
    """A ``parallel_attn`` that is checked, planned, and agreed on by all ranks of the group.

    Attributes:
        world: The members of the group.
        plan: What they do.
        options: What of the call's arguments its computation depends on.
        backward_options: The same for the gradient, perhaps with another kernel family.
        facts: What all ranks must say of the call, by the names that an error gives them.
    """

    world: AnyWorld
    plan: AttnPlan
    options: Options
    backward_options: Options
    facts: dict[str, Any]


class Sharding:
    """Which rows each member of a group holds, and the plans of the attention over them.

    Attributes:
        layout: Which token of which document lies on which member.
        rank: This process's number among them.
        rows: Its rows.
        facts: What all ranks must say of it, by the names that an error gives them.
        counts: The rows of each member.
        tokens: Rows of all of them.
        whole: A tensor without memory of its own that has as many entries.
    """

    def __init__(self, layout: Layout, group_name: str, rank: int) -> None:
        self.layout, self.rank, self._group = layout, rank, group_name
        self.rows, self.tokens = layout.rows(rank), layout.groups[0].tokens
        self.counts = [layout.rows(r) for r in range(layout.num_pipelines)]
        self.facts = {"tokens": self.tokens, "the rows of all ranks": self.counts, "the layout": layout.digest()}
        self._calls: dict[Any, PlannedCall] = {}
        self._agreed: dict[PlannedCall | None, int] = {}
        self._on_device: dict[Any, torch.Tensor] = {}
        with torch.inference_mode(False):  # what is made in that mode could never be used in training
            self.whole = torch.empty(1, dtype=torch.int8, device="cpu").expand(self.tokens)

    @property
    def world(self) -> AnyWorld:
        """The members of the group."""
        return world_named(self._group)

    # Plans

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        method: str,
        is_causal: bool,
        dropout_p: float,
        softmax_scale: float | None,
        masking: Masking,
        check: Callable[[], None],
    ) -> PlannedCall:
        """The plan of a call; seen again, it is neither checked nor agreed on again.

        Args:
            q: ``(rows, H_q, head_dim)``
            k: ``(rows, H_kv, head_dim)``
            v: As k.
            method: How members reach each other's keys and values.
            is_causal: Which mask.
            dropout_p: See :func:`hetu.functional.parallel_attn`.
            softmax_scale: Factor of the scores; None for ``1 / sqrt(head_dim)``.
            masking: What else changes the scores.
            check: Refuses what can't be computed.
        """
        now = settings()
        key = (
            *(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device),
            *(method, is_causal, dropout_p, softmax_scale, None if masking is USUAL else masking.key),
            *(now.backend, now.verify_plans),
        )
        found, world = self._calls.get(key), self.world
        if found is None or found.world is not world:
            with world.hanging_up():
                check()
                found = self._plan(world, q, k.shape[1], method, is_causal, dropout_p, softmax_scale, masking)
            if len(self._calls) == _MOST_CALLS:  # of masks that change from step to step; all ranks forget at once
                rows = self._agreed.get(None, 0)
                self._calls, self._agreed = {}, {None: rows}
            self._calls[key] = found
        return found

    def _plan(
        self,
        world: AnyWorld,
        q: torch.Tensor,
        num_kv: int,
        method: str,
        is_causal: bool,
        dropout_p: float,
        softmax_scale: float | None,
        masking: Masking,
    ) -> PlannedCall:
        _, num_q, head_dim = q.shape
        plan = self.plan(method, Heads(num_q, num_kv, head_dim, q.element_size()), masking.mask_of(is_causal))
        plan.need([self.rank])  # here, where others hear of it if it fails
        kind = q.dtype, q.device, head_dim, num_q, num_kv, dropout_p > 0
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        options = [
            Options(family.name, num_q, num_kv, head_dim, dropout_p, scale, False, softcap=masking.softcap)
            for family in families(default_backend(q.device), *kind)
        ]
        facts = {
            **self.facts,
            "method": plan.method,
            "the mask": plan.mask.name,
            "the heads of q": num_q,
            "the heads of k and v": num_kv,
            "head_dim": head_dim,
            "the dtype": str(q.dtype),
            "the kind of device": q.device.type,
            "dropout_p": dropout_p,
            "softmax_scale": scale,
            "softcap": masking.softcap,
            "the dtype of the sinks": None if masking.sinks is None else str(masking.sinks.dtype),
        }
        return PlannedCall(world, plan, options[0], options[1], facts)

    def agree(self, serial: int, call: PlannedCall, seeds: Sequence[int]) -> None:
        """Demands that all ranks are about to do the same, once for each ContextParallel and kind of call.

        Nothing else would tell: a rank that has seen the call before would send its rows, and NCCL would put them
        wherever another expects others.

        Args:
            serial: The number of the ContextParallel.
            call: What it is asked for.
            seeds: Of the dropout.
        """
        world, known = call.world, self._agreed.get(call, 0)
        if isinstance(world, GroupWorld) and serial > known:
            world.agree({**call.facts, "the seed of dropout": list(seeds)}, "parallel_attn")
            if not known:
                world.open_links(self.layout.num_pipelines, [call.plan, call.plan.backward()])
            self._agreed[call] = serial

    def agree_on_rows(self, serial: int) -> None:
        """The same, before whole rows are gathered."""
        world, known = self.world, self._agreed.get(None, 0)
        if isinstance(world, GroupWorld) and serial > known:
            world.agree(self.facts, "cp.undispatch")
            self._agreed[None] = serial

    def plan(self, method: str, heads: Heads, mask: Mask) -> AttnPlan:
        """The plan for given heads and mask; proven if ``hetu.config(verify_plans=True)`` says so."""
        topology = topology_of(settings().hosts, self.layout.num_pipelines)

        def build() -> AttnPlan:
            return build_plan(self.layout, method=method, mask=mask, heads=heads, topology=topology)

        plan = _plans.get((self, method, heads, mask, topology), build)
        if settings().verify_plans and "proven" not in plan.memo:
            for item in (plan, plan.backward()):
                item.verify()
            plan.memo["proven"] = True
        return plan

    # Rows

    def own_rows(self, device: torch.device) -> torch.Tensor:
        """Where this member's rows stand among all tokens: int64 ``(rows,)``."""
        return self._kept("own_rows", device, lambda: self.layout.columns(self.rank))

    def places(self, device: torch.device) -> torch.Tensor:
        """Where each token stands among the rows of all members, one after the other: int64 ``(tokens,)``."""

        def find() -> IntArray:
            columns = np.concatenate([self.layout.columns(r) for r in range(self.layout.num_pipelines)])
            places = np.empty_like(columns)
            places[columns] = np.arange(len(columns))
            return places

        return self._kept("places", device, find)

    def own_positions(self, device: torch.device) -> torch.Tensor:
        """The position in its document of each of this member's rows: int64 ``(rows,)``, a copy that may be changed."""
        kept = self._kept("positions", device, lambda: self.layout.positions(self.rank))
        if not torch.is_inference_mode_enabled():
            return kept.clone()
        with torch.inference_mode(False):
            return kept.clone()

    def last_rows(self, device: torch.device) -> torch.Tensor:
        """Where the last token of each document stands among all tokens: int64, one per document that has any."""

        def find() -> IntArray:
            lengths = self.layout.groups[0].lengths
            return np.asarray(lengths.cumsum()[lengths > 0] - 1)

        return self._kept("last_rows", device, find)

    def _kept(self, name: str, device: torch.device, find: Callable[[], IntArray]) -> torch.Tensor:
        key = name, device
        if key not in self._on_device:
            with torch.inference_mode(False):  # a tensor of that mode could never be used in training
                self._on_device[key] = copied_to(find().astype(np.int64), device)
        return self._on_device[key]


_MOST_CALLS = 256
_plans: LRU[AttnPlan] = LRU(512)
_shardings: LRU[Sharding] = LRU(64)


# The table: a serial number, rows of each member, the code of the mask that documents are weighed by, and the
# cumulative lengths. Its second number says how many members there are, its third whether lengths are given by pieces,
# its fourth how long the code is. The serial number tells the ContextParallels of a process apart, and is no part of
# what they share.

_serials = itertools.count(1)
_NO_CODE = np.empty(0, np.int64)


def table_of(tokens: Sequence[int], cu_seqlens: IntArray, mask: Mask | None) -> torch.Tensor:
    """The table of a new ContextParallel."""
    code = _NO_CODE if mask is None else mask.code
    head = [next(_serials), len(tokens), cu_seqlens.ndim, len(code), *tokens]
    return torch.from_numpy(np.concatenate([np.array(head, np.int64), code, cu_seqlens.reshape(-1)]))


def sharding_of(table: torch.Tensor, split: str, group_name: str) -> Sharding:
    """What a table stands for; seen tables are not read again."""
    values, rank = table.numpy()[1:], world_named(group_name).rank
    key = values.tobytes(), split, group_name, rank
    return _shardings.get(key, lambda: _read(values, split, group_name, rank))


def _read(values: IntArray, split: str, group_name: str, rank: int) -> Sharding:
    size, ndim, count = values[:3].tolist()
    own = values[3:].copy()  # the table is a user's
    tokens, code, cu = own[:size], own[size : size + count], own[size + count :]
    mask = Mask.decoded(code) if count else None
    cu = cu.reshape(size, -1) if ndim == 2 else cu
    layout = Layout.build(tokens.tolist(), [0] * size, split=split, cu_seqlens=cu, mask=mask)
    return Sharding(layout, group_name, rank)
