"""The base of ops over tokens that lie as the strategies say: their lists, their binding, and the layout's key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hetu.arguments import flag, items, shown
from hetu.errors import BindingError, HetuError, ShapeError, StrategyError, caller
from hetu.graph import Call, Node, OpDef, Pipeline, RunView
from hetu.ops.attention.common import bound_mask, check_cu_seqlens, check_longest, read_cu_seqlens
from hetu.ops.attention.layout_key import LayoutKey, batch_of, group_cu_seqlens, refuse_rows
from hetu.parallel import SPLITS, Mask, Strategy, groups_of
from hetu.parallel.layout.documents import batch_lists, cu_seqlens_lists
from hetu.symbols import IntSymbol, as_size, as_symbol

Lists = Sequence[Sequence[IntSymbol | int]]

Value = Callable[[IntSymbol], int]
"""Gives the value of a size in a run."""

_LISTS = {"multi_seq_lens_symbol": "seq_lens", "multi_cp_group_symbol": "cp_groups"}
"""What users call the two lists, and the attributes that bring them."""


class LayoutOp(OpDef):
    """An op over the rows of its first input, which lie over the pipelines as a strategy says.

    Its attributes have the two lists (``strategies``), ``split`` and ``packing``, its inputs ``cu_seqlens_q`` and
    perhaps ``cu_seqlens_k``.
    """

    host_inputs: ClassVar[tuple[str, ...]] = ("cu_seqlens_q", "cu_seqlens_k")
    spans_pipelines = True
    has_plan = True
    lists_strategies = True
    choices: ClassVar[Mapping[str, Sequence[str]]] = {"split": tuple(SPLITS)}
    """Attributes that are names, and the names that there are."""

    def check_lists(self, call: Call) -> None:
        """Replaces both lists by the strategies, after checking that they fit each other and the graph."""
        attrs = call.attrs
        if "strategies" in attrs:  # the graph's verification asks again, with the normal form
            return
        lists = {name: attrs.pop(given) for name, given in _LISTS.items()}
        strategies = call.graph.strategies
        if any(value is not None for value in lists.values()) or not strategies:
            strategies = self._listed(call, lists)
        for i, strategy in enumerate(strategies):
            for r, length in enumerate(strategy.lengths):
                most = as_symbol(length).max  # what ranges leave open, a run checks of the strategy that it follows
                if most is not None and most < 0:
                    call.fail(ShapeError, f"expected the length of pipeline {r} under strategy {i} to be at least 0")
        attrs["strategies"] = strategies
        for name, known in self.choices.items():
            if not isinstance(attrs[name], str) or attrs[name] not in known:
                what = f"there is no {name} {shown(attrs[name])}"
                call.fail(StrategyError, what, f"use one of {', '.join(known)}")

    @staticmethod
    def _rows(call: Call, name: str, value: Any) -> list[tuple[IntSymbol, ...]]:
        """One of the lists as symbols, a row per strategy."""
        fix = "give one list per strategy"
        rows = []
        for i, row in enumerate(items(value, name, "a list of lists", op=call.op, error=StrategyError, fix=fix)):
            what = f"{name}[{i}]"
            given = items(row, what, "a list of ints and symbols", op=call.op, error=StrategyError, fix=fix)
            sizes = [as_size(item, f"{what}[{r}]", op=call.op, error=StrategyError) for r, item in enumerate(given)]
            rows.append(tuple(map(as_symbol, sizes)))
        return rows

    def _listed(self, call: Call, lists: Mapping[str, Any]) -> tuple[Strategy, ...]:
        """The strategies that two lists describe, which must be the graph's where it has some."""
        graph, rows = call.graph, []
        for name, value in lists.items():
            if value is None:
                fix = "give both lists, or give hetu.graph the strategies and leave both out"
                call.fail(StrategyError, f"{name} is missing", fix)
            rows.append(self._rows(call, name, value))
            if len(rows[-1]) != graph.num_strategy:
                call.fail(
                    StrategyError,
                    f"{name} has {len(rows[-1])} rows, but the graph has {graph.num_strategy} strategies",
                    "give one row per strategy, or another num_strategy to hetu.graph",
                )
        listed = tuple(Strategy(*row) for row in zip(*rows, strict=True))
        for i, (own, other) in enumerate(zip(listed, graph.strategies, strict=False)):
            if not own.says_the_same_as(other):
                call.fail(
                    StrategyError,
                    f"the lists make strategy {i} {own}, but the graph's is {other}",
                    "leave the lists out: the op then takes the graph's strategies",
                )
        self._check_counts(call, listed)
        return graph.strategies or listed  # the graph's may have a mask too, which lists can't say

    @staticmethod
    def _check_counts(call: Call, listed: Sequence[Strategy]) -> None:
        """Demands that all ops of a graph have the same number of pipelines under a strategy."""
        first = call.graph.listing
        for i, own in enumerate(listed if first is not None else ()):
            assert first is not None
            count = strategy_of(first, i).num_pipelines
            if own.num_pipelines != count:
                call.fail(
                    StrategyError,
                    f"ops disagree on the number of pipelines of strategy {i}: {call.name} lists {own.num_pipelines}, "
                    f"{first.name} lists {count} ({first.where.short})",
                    "give all of them rows of the same length for a strategy",
                )

    def check_packing(self, call: Call) -> None:
        """Demands cu_seqlens with packing, and only then."""
        given = [call.inputs[self.inputs.index(name)] for name in self.host_inputs]
        call.attrs["packing"] = flag(call.attrs["packing"], "packing", op=call.op)
        if not call.attrs["packing"]:
            if any(item is not None for item in given):
                call.fail(HetuError, "cu_seqlens were given without packing", "pass packing=True, or leave them out")
            return
        if given[0] is None:
            name = self.host_inputs[0] if len(self.host_inputs) > 1 else "cu_seqlens"
            call.fail(HetuError, f"packing needs {name}", "pass the documents' cumulative lengths")
        for name, item in zip(self.host_inputs, given, strict=True):
            if item is not None:
                check_cu_seqlens(call, name, item, ranks=(1, 2))

    # Binding

    def shared_symbols(self, node: Node, strategy: int) -> Sequence[IntSymbol]:
        return strategy_of(node, strategy).symbols

    def inferable_sizes(self, node: Node, strategy: int, pipeline: int) -> Sequence[tuple[IntSymbol, str]]:
        own, listed = node.symbols, as_symbol(strategy_of(node, strategy).lengths[pipeline])
        sizes = [(listed, f"rows of {self.inputs[0]} on pipeline {pipeline}")]
        sizes += [(own[name], f"the layout of {node.name}") for name in ("seq_len", "batch", "total") if name in own]
        group = "longest document of the pipeline's context group"
        return sizes + [(node.attrs[name], group) for name in bounds_of(node)]

    def infer_sizes(self, node: Node, view: RunView) -> Sequence[Sequence[int | None]]:
        chosen = strategy_of(node, view.strategy)
        lens = [item.known(expr) for item, expr in zip(view.pipelines, chosen.lengths, strict=True)]
        rows = [item.known(node.tensors[0].symbolic_shape[0]) for item in view.pipelines]
        if node.attrs["packing"]:
            lens = [row if length is None else length for length, row in zip(lens, rows, strict=True)]
        return [self._infer_pipeline(node, view, r, lens, rows) for r in range(len(view.pipelines))]

    def _infer_pipeline(
        self, node: Node, view: RunView, r: int, lens: list[int | None], rows: list[int | None]
    ) -> list[int | None]:
        attrs, pipeline = node.attrs, view.pipelines[r]
        groups = [pipeline.known(group) for group in strategy_of(node, view.strategy).groups]
        members = [i for i, group in enumerate(groups) if group == groups[r]]
        known = [lens[i] for i in members]
        total = None if None in groups or None in known else sum(length or 0 for length in known)
        batch = None if total is None else batch_of(members, lens, rows)
        own: dict[str, int | None] = {"seq_len": lens[r], "batch": batch, "total": total}
        values = [lens[r] if attrs["packing"] else None]
        values += [own[name] for name in ("seq_len", "batch", "total") if name in node.symbols]
        sides = bounds_of(node)
        longest = int(self._documents(node, pipeline, total).max(initial=0)) if sides and total is not None else None
        return values + [longest] * len(sides)

    def _documents(self, node: Node, pipeline: Pipeline, total: int) -> NDArray[np.int64]:
        """Lengths of the documents of a pipeline's group."""
        if not node.attrs["packing"]:
            return np.array([total])
        lengths = np.diff(read_cu_seqlens(node, "cu_seqlens_q", pipeline))
        return lengths if lengths.ndim == 1 else lengths.sum(0)

    # Planning

    def plan_keys(self, node: Node, view: RunView) -> Sequence[Any]:
        chosen = strategy_of(node, view.strategy)
        lens = tuple(item.value(expr) for item, expr in zip(view.pipelines, chosen.lengths, strict=True))
        groups = tuple(view.pipelines[0].value(expr) for expr in chosen.groups)
        rows = [item.value(node.tensors[0].symbolic_shape[0]) for item in view.pipelines]
        batches, cus = [], []
        for members in groups_of(groups).values():
            batch = 1 if node.attrs["packing"] else batch_of(members, lens, rows)
            for r in members:
                if rows[r] != batch * lens[r]:
                    refuse_rows(node, view, r, rows[r], lens[r], batch)
            total = sum(lens[r] for r in members)
            if node.attrs["packing"]:
                cus.append(group_cu_seqlens(node, view, members, total))
            else:
                batches.append(batch)
            first = view.pipelines[members[0]]
            for name in bounds_of(node):
                lengths = self._documents(node, first, total)
                check_longest(node, name, lengths, f"context group {groups[members[0]]}", first)
        value = view.pipelines[0].value
        layout = LayoutKey.of(node, lens, groups, batches, cus, _weighs_by(node, chosen, value))
        return [self.key(node, layout, value)]

    def key(self, node: Node, layout: LayoutKey, value: Value) -> Any:
        """What the plan of a node depends on, given the layout's part of it and the values of symbols."""
        raise NotImplementedError

    # Looking before running

    def inspect(self, node: Node, strategy: int, value: Value, cu_seqlens: Any, batch: Any) -> LayoutKey:
        """The layout that a run would have in which symbols have these values; see :meth:`hetu.Graph.layout`."""
        chosen = strategy_of(node, strategy)
        lens, groups = chosen.evaluate(value)
        order, mask = tuple(groups_of(groups)), _weighs_by(node, chosen, value)
        if not node.attrs["packing"]:
            return LayoutKey.of(node, lens, groups, batch_lists(batch, order, is_packed=False), (), mask)
        if cu_seqlens is None:
            raise BindingError(
                "packing needs cu_seqlens",
                op="layout",
                where=caller(),
                fix="pass cu_seqlens=..., as the run will feed it",
            )
        return LayoutKey.of(node, lens, groups, (), cu_seqlens_lists(cu_seqlens, order) or (), mask)


def _weighs_by(node: Node, strategy: Strategy, value: Value) -> Mask | None:
    """What a strategy weighs documents by, bound."""
    return None if strategy.mask is None else bound_mask(node, strategy.mask, value)


def strategy_of(node: Node, index: int) -> Strategy:
    """A strategy of a node."""
    chosen: Strategy = node.attrs["strategies"][index]
    return chosen


def bounds_of(node: Node) -> list[str]:
    """The bounds on lengths that the user gave."""
    return [name for name in ("max_seqlen_q", "max_seqlen_k") if node.attrs.get(name) is not None]
