"""Stage one, bind: from what was fed and said to a value for every symbol, on every pipeline.

Sources, strongest first: ``int_symbol_dict``, the shapes of what was fed, what the ops can infer, the
symbols' defaults. All sympy work is done when a :class:`Binder` is made, none when it binds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from numpy.typing import NDArray

from hetu.errors import BindingError, HetuError, ShapeError, UnboundSymbolError
from hetu.graph import Node, Tensor
from hetu.planning.limits import SizeLimits
from hetu.planning.subgraph import Subgraph
from hetu.symbols import Binding, Constraint, Equation, IntSymbol, Solver, Source, as_symbol, check_leaf

HostValue = Callable[[Tensor, int, "BoundPipeline"], NDArray[Any]]
"""Gives the values of a host input on a pipeline, as far as that pipeline is bound."""

Derived = TypeVar("Derived")

GIVEN = "int_symbol_dict"
"""The source of what a run is told."""

DEFAULT = ".data"
"""The source of what is a symbol's default value; it may be followed by the pipeline that it came from."""


@dataclass(slots=True)
class BoundPipeline:
    """One pipeline's symbols while they are bound; what the ops' planning hooks see of it.

    Attributes:
        index: The pipeline's number.
        values: Leaf symbols with a value.
        sources: Where each value came from.
        host_value: Gives the values of host inputs.
    """

    index: int
    values: dict[IntSymbol, int]
    sources: dict[IntSymbol, str]
    host_value: HostValue
    _host: dict[Tensor, NDArray[Any]] = field(default_factory=dict)
    _derived: dict[Hashable, Any] = field(default_factory=dict)

    def known(self, expr: int | IntSymbol) -> int | None:
        if isinstance(expr, int):
            return expr
        value = self.values.get(expr)
        if value is not None or expr.is_leaf:
            return value
        if expr.constant is not None:
            return expr.constant
        return expr.evaluate(self.values) if all(leaf in self.values for leaf in expr.leaves) else None

    def value(self, expr: int | IntSymbol) -> int:
        if isinstance(expr, IntSymbol):
            value = self.values.get(expr)
            if value is not None:  # of a leaf, nearly always
                return value
        found = self.known(expr)
        return as_symbol(expr).evaluate(self.values) if found is None else found  # evaluate names what is missing

    def host(self, tensor: Tensor) -> NDArray[Any]:
        values = self._host.get(tensor)
        if values is None:
            values = self._host[tensor] = self.host_value(tensor, self.index, self)
        return values

    def once(self, key: Hashable, derive: Callable[[], Derived]) -> Derived:
        if key not in self._derived:
            self._derived[key] = derive()
        found: Derived = self._derived[key]
        return found

    def describe(self, *exprs: int | IntSymbol) -> list[str]:
        return self.binding().describe(*exprs)

    def binding(self) -> Binding:
        """What is bound so far, as a value."""
        return Binding(self.values, self.sources)


@dataclass(slots=True)
class BoundRun:
    """All pipelines of a strategy, bound."""

    strategy: int
    pipelines: Sequence[BoundPipeline]


class Binder:
    """Binds the runs of one set of live nodes under one strategy. Made once, used for every run.

    Args:
        subgraph: What will be computed.
        strategy: Index of the strategy.
        num_pipelines: How many pipelines it has.
        feeds: The placeholders whose shapes are known.
    """

    def __init__(self, subgraph: Subgraph, strategy: int, num_pipelines: int, feeds: Sequence[Tensor]) -> None:
        self.subgraph, self.strategy, self.num_pipelines, self.feeds = subgraph, strategy, num_pipelines, feeds
        self.leaves = subgraph.leaves(strategy)
        nodes = subgraph.nodes
        dims = [
            Equation(dim, f"shape of {x.name}, dimension {i}", x.op.where)
            for x in feeds
            for i, dim in enumerate(x.symbolic_shape)
        ]
        self._shapes, self._ranks = Solver(dims), [tensor.ndim for tensor in feeds]
        self._inferring = [node for node in nodes if node.definition.inferable_sizes(node, strategy, 0)]
        sizes = [
            [node.definition.inferable_sizes(node, strategy, r) for r in range(num_pipelines)]
            for node in self._inferring
        ]
        self._inferable = [
            [[(size[0], Solver([Equation(*size, node.where)])) for size in own] for own in of_node]
            for node, of_node in zip(self._inferring, sizes, strict=True)
        ]
        self._shared = list(dict.fromkeys(s for node in nodes for s in node.definition.shared_symbols(node, strategy)))
        inferred = {leaf for of_node in sizes for own in of_node for expr, _ in own for leaf in expr.leaves}
        relevant = dict.fromkeys(
            [*self.leaves, *self._shared, *(leaf for dim in dims for leaf in dim.expr.leaves), *inferred]
        )
        self._defaults = [leaf for leaf in relevant if leaf.is_leaf]
        self._limits = SizeLimits(nodes)

    @property
    def defaults(self) -> tuple[int | None, ...]:
        """The symbols' default values as they are now: part of what a binding depends on."""
        return tuple([leaf.default for leaf in self._defaults])

    def bind(
        self, given: Mapping[IntSymbol, int], shapes: Sequence[Sequence[tuple[int, ...]]], host_value: HostValue
    ) -> BoundRun:
        """Gives every symbol its value.

        Args:
            given: ``int_symbol_dict``.
            shapes: For each pipeline the fed arrays' shapes, in the order of ``feeds``.
            host_value: Gives the values of host inputs.

        Raises:
            BindingError: Where two sources disagree, or a value breaks a range or constraint.
            ShapeError: Where a fed array has another number of dimensions than its placeholder.
            UnboundSymbolError: Where a needed symbol got no value.
        """
        if given:
            given = {leaf: check_leaf(leaf, value, GIVEN) for leaf, value in given.items()}
        named = dict.fromkeys(given, GIVEN)
        pipelines = [BoundPipeline(r, dict(given), dict(named), host_value) for r in range(self.num_pipelines)]
        run = BoundRun(self.strategy, pipelines)
        dims = [self._dims(row) for row in shapes]
        shared = [leaf for leaf in self._shared if leaf not in given] if self.num_pipelines > 1 else []
        done = self._solve_shapes(run, dims, shared)
        self._infer(run, shared)
        done = done or self._solve_shapes(run, dims, shared)
        if not self._is_bound(run, given):
            if self._apply_defaults(run):
                self._infer(run, shared)
                done = done or self._solve_shapes(run, dims, shared)
            for pipeline in pipelines:
                self._check_complete(pipeline)
        if self.subgraph.constraints:
            for pipeline in pipelines:
                check_constraints(self.subgraph.constraints, pipeline)
        for pipeline in pipelines:
            self._limits.check(pipeline)
        return run

    def _is_bound(self, run: BoundRun, given: Mapping[IntSymbol, int]) -> bool:
        """Whether surely all symbols have values: without given ones, none has a value that isn't asked for."""
        wanted, counts = len(self._defaults), [len(item.values) for item in run.pipelines]
        return not given and min(counts, default=wanted) == wanted

    def _dims(self, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        if list(map(len, shapes)) == self._ranks:
            return list(chain.from_iterable(shapes))
        for tensor, rank, shape in zip(self.feeds, self._ranks, shapes, strict=True):
            if len(shape) != rank:
                raise ShapeError(
                    f"{tensor.name} has {tensor.ndim} dimensions [{', '.join(map(str, tensor.shape))}], "
                    f"but an array of shape {list(shape)} was fed",
                    op="placeholder",
                    where=tensor.op.where,
                    fix="feed an array with as many dimensions as the placeholder",
                )
        raise AssertionError("ranks differ")

    def _solve_shapes(self, run: BoundRun, dims: Sequence[Sequence[int]], shared: Sequence[IntSymbol]) -> bool:
        """Takes what the shapes tell; True once they have nothing more to tell."""
        done = self._solve_own_shapes(run, dims)
        if shared and self._share(run, shared) and not done:
            return self._solve_own_shapes(run, dims)
        return done

    def _solve_own_shapes(self, run: BoundRun, dims: Sequence[Sequence[int]]) -> bool:
        done, solve = True, self._shapes.solve
        for item, values in zip(run.pipelines, dims, strict=True):
            done &= solve(item.values, item.sources, values)
        return done

    def _share(self, run: BoundRun, shared: Sequence[IntSymbol]) -> bool:
        """Gives all pipelines the values of shared symbols that some know. True if that told any anything."""
        news = False
        for leaf in shared:
            knowing = [item for item in run.pipelines if leaf in item.values]
            for other in knowing[1:]:
                _check_agree(leaf, knowing[0], other)
            for pipeline in run.pipelines if len(knowing) < len(run.pipelines) else ():
                if knowing and leaf not in pipeline.values:
                    first = knowing[0]
                    pipeline.values[leaf], news = first.values[leaf], True
                    pipeline.sources[leaf] = _told_by(first, leaf)
        return news

    def _infer(self, run: BoundRun, shared: Sequence[IntSymbol]) -> None:
        for node, sizes in zip(self._inferring, self._inferable, strict=True):
            if self._is_known(run, sizes):
                continue  # no host input is read that nobody asks for
            values = node.definition.infer_sizes(node, run)
            for pipeline, own, inferred in zip(run.pipelines, sizes, values, strict=True):
                for (expr, solver), value in zip(own, inferred, strict=True):
                    if value is not None and pipeline.known(expr) is None:
                        solver.solve(pipeline.values, pipeline.sources, (value,))
            if shared:
                self._share(run, shared)

    def _is_known(self, run: BoundRun, sizes: Sequence[Sequence[tuple[IntSymbol, Solver]]]) -> bool:
        for pipeline, own in zip(run.pipelines, sizes, strict=True):
            for expr, _ in own:
                if pipeline.known(expr) is None:
                    return False
        return True

    def _apply_defaults(self, run: BoundRun) -> bool:
        news = False
        for leaf in self._defaults:
            for pipeline in run.pipelines:
                if leaf not in pipeline.values and leaf.default is not None:
                    pipeline.values[leaf], pipeline.sources[leaf], news = leaf.default, DEFAULT, True
        return news

    def _check_complete(self, pipeline: BoundPipeline) -> None:
        missing = [leaf for leaf in self.leaves if leaf not in pipeline.values]
        if not missing:
            return
        # What an op could not infer (its batch) is missing because something of the user's is: name that.
        of_ops = {leaf for node in self.subgraph.nodes for leaf in node.symbols.values()}
        missing = [leaf for leaf in missing if leaf not in of_ops] or missing
        names = ", ".join(map(str, missing))
        node = next((node for node in self.subgraph.nodes if self._uses(node, missing)), None)
        raise UnboundSymbolError(
            f"no value for {names}" + (f", which {node.name} needs" if node else ""),
            op=node.definition.name if node else None,
            where=node.where if node else None,
            bound=pipeline.describe(*pipeline.values),
            fix=f"give {names} in int_symbol_dict, feed an array whose shape tells it, or give the symbol a default",
        )

    def _uses(self, node: Node, missing: Iterable[IntSymbol]) -> bool:
        shapes = {leaf for tensor in node.outputs for dim in tensor.symbolic_shape for leaf in dim.leaves}
        return not shapes.union(node.definition.shared_symbols(node, self.strategy)).isdisjoint(missing)


def check_constraints(constraints: Iterable[Constraint], pipeline: BoundPipeline) -> None:
    """Demands what must hold, as far as its symbols are bound.

    Raises:
        BindingError: Where what the user required does not hold.
        ShapeError: Where what an op expects does not.
    """
    for constraint in constraints:
        sides = (constraint.lhs, constraint.rhs)
        if all(pipeline.known(side) is not None for side in sides) and not constraint.holds(pipeline.values):
            error: type[HetuError] = BindingError if constraint.op_name == "require" else ShapeError
            got = f"{constraint} does not hold: {pipeline.known(sides[0])} against {pipeline.known(sides[1])}"
            raise error(
                f"{constraint.reason}: {got}" if constraint.reason else got,
                op=constraint.op_name,
                where=constraint.where,
                bound=pipeline.describe(*sides),
                fix="feed arrays, or bind symbols, for which it holds",
            )


def _told_by(pipeline: BoundPipeline, leaf: IntSymbol) -> str:
    """Where a leaf's value came from, told to another pipeline."""
    source = pipeline.sources[leaf]
    return source.on(pipeline.index) if isinstance(source, Source) else f"{source} (pipeline {pipeline.index})"


def _check_agree(leaf: IntSymbol, one: BoundPipeline, other: BoundPipeline) -> None:
    if one.values[leaf] != other.values[leaf]:
        raise BindingError(
            f"{leaf} has one value on all pipelines, but it is {one.values[leaf]} on pipeline {one.index} "
            f"and {other.values[leaf]} on pipeline {other.index}",
            bound=[
                f"{leaf} = {item.values[leaf]}   from {item.sources[leaf]} (pipeline {item.index})"
                for item in (one, other)
            ],
            fix="feed every pipeline an array of the length that the strategy gives it",
        )
