"""The graph: nodes in an order in which they can be computed, and the context that collects them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from difflib import get_close_matches
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from hetu.arguments import (
    MAX_COUNT,
    MOST_OF_FLOATS,
    choice,
    index,
    integer,
    items,
    mapping,
    number_of,
    refuse,
    shown,
    text,
)
from hetu.arguments import device as as_device
from hetu.errors import DTypeError, HetuError, ShapeError, StrategyError, Where, caller
from hetu.graph.autocast import wanted_dtype
from hetu.graph.drawing import Drawn
from hetu.graph.eager import EagerValues, check_eager
from hetu.graph.names import Names, all_or_nothing
from hetu.graph.node import Node, Operand
from hetu.graph.opdef import Call, OpDef, Role, TensorSpec, find_op
from hetu.graph.recompute import NOWHERE, building
from hetu.graph.requirement import refuse_requirement
from hetu.graph.running import Running
from hetu.graph.tensor import Tensor
from hetu.symbols import Constraint, IntSymbol, as_symbol

if TYPE_CHECKING:
    import networkx

    from hetu.parallel import Strategy


entered: ContextVar[tuple[Graph, ...]] = ContextVar("hetu_graphs", default=())


class Graph(Running, Drawn):
    """A define-then-run graph. Ops called within ``with graph:`` add nodes to it.

    Args:
        kind: ``"define_and_run"``, or ``"eager"``: each op is run when it is built, once, and tensors have ``numpy()``.
            For debugging and small tools: it has no placeholders, strategies or optimisers.
        num_strategy: How many parallel strategies its ``parallel_attn`` ops list; at most 65,536.
        strategies: The strategies themselves, instead of their number: ops then need no lists, and ``strategy=`` takes
            their names too.
        device: Where it runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None for CUDA if there is one, else the CPU.
        name: For printing.

    Attributes:
        nodes: In an order in which they can be computed.
        constraints: Relations that ``hetu.require`` demands of every run. Those that ops demand stand in their nodes.
        strategies: The strategies that it was given; empty where ops list them.
        eager: The values of an eager graph; None for all others.
        listing: The first node that lists strategies, and so says how many pipelines each has; None if there is none.

    Raises:
        HetuError: If there is no such kind of graph, or the device is none that hetu knows.
        StrategyError: If ``num_strategy`` is not a positive int, ``strategies`` is no list of strategies of different
            names, or both are given and don't agree.

    Example:
        >>> import hetu
        >>> n = hetu.IntSymbol("n")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [n, 2], name="x")
        ...     y = x + x
        >>> g.run(y, feed_dict={x: [[1.0, 2.0]]})
        tensor([[2., 4.]])
    """

    check_strategies: ClassVar[Callable[[Any, int], tuple[Strategy, ...]]]
    """What checks a list of strategies against their number: set by the package, so that this one need not know."""

    def __init__(
        self,
        kind: str = "define_and_run",
        *,
        num_strategy: int = 1,
        strategies: Sequence[Strategy] | None = None,
        device: str | None = None,
        name: str = "graph",
    ) -> None:
        self.kind = choice(kind, "kind", ("define_and_run", "eager"), op="graph")
        count = integer(num_strategy, "num_strategy", least=1, most=MAX_COUNT, op="graph", error=StrategyError)
        self.strategies = () if strategies is None else type(self).check_strategies(strategies, count)
        self.num_strategy = len(self.strategies) or count
        self.device, self.name = as_device(device, op="graph"), text(name, "name", op="graph")
        self.nodes: list[Node] = []
        self.constraints: list[Constraint] = []
        self.listing: Node | None = None
        self._names = Names()
        self._found: dict[str, Tensor] = {}
        self.eager = EagerValues(self._small_graph) if self.kind == "eager" else None
        if self.eager is not None:
            check_eager(self.num_strategy, self.strategies)
        super().__init__()

    # Building

    def __enter__(self) -> Self:
        entered.set((*entered.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stack = entered.get()
        last = max((i for i, item in enumerate(stack) if item is self), default=None)
        if last is not None:  # with blocks of generators may be left in any order: this graph goes, and no other
            entered.set(stack[:last] + stack[last + 1 :])
        elif error is None:
            raise HetuError(
                f"{self.name} is left where it was not entered",
                where=caller(),
                fix="leave a graph in the thread or task that entered it, once for each time",
            )

    def apply(
        self, op: str, inputs: Sequence[Any], attrs: Mapping[str, Any] | None = None, name: str | None = None
    ) -> tuple[Tensor, ...]:
        """Adds a node: checks the operands, asks the op for its outputs' shapes, records constraints.

        Args:
            op: A registered op.
            inputs: Operands in the order of the op's ``inputs``.
            attrs: The op's other arguments.
            name: The node's name; made up from the op's if None.

        Returns:
            The outputs.

        Raises:
            HetuError: Whatever the op refuses, with the user's line. The graph is then unchanged.
        """
        definition, where = find_op(op), caller()
        listed = inputs if type(inputs) is tuple else items(inputs, "inputs", "tensors", op=op)
        names = definition.inputs
        takes_any = bool(names) and names[-1].startswith("*")
        if (len(listed) > len(names) and not takes_any) or (not listed and names and not names[0].startswith("*")):
            refuse(len(listed), "len(inputs)", f"that of {', '.join(names) or 'none'}", op=op)
        others = {} if attrs is None else dict(mapping(attrs, "attrs", "the op's other arguments", op=op))
        given = tuple([self._operand(item, place, definition, where) for place, item in enumerate(listed)])
        with all_or_nothing(self):
            return self._apply(definition, self._autocast(definition, given), others, name, where)

    def _apply(
        self, definition: OpDef, operands: tuple[Operand, ...], attrs: dict[str, Any], name: str | None, where: Where
    ) -> tuple[Tensor, ...]:
        op = definition.name
        chosen = (None if name is None else text(name, "name", op=op)) or self._names.free(op)
        call = Call(self, op, chosen, operands, attrs, where)
        if call.name in self._names:
            call.fail(HetuError, f"the graph has a node or a tensor named {name!r} already", "give another name")
        specs = definition.infer(call)
        node = Node(self, len(self.nodes), definition, operands, call.attrs, call.name, where)
        node.symbols, node.constraints = call.symbols, tuple(call.constraints)
        if self.eager is not None:
            specs, values = self.eager.compute(node, specs)
        elif (now := building.get()) is not NOWHERE:
            node.scopes, node.backward = now
        node.outputs = tuple(self._output(node, spec, i, len(specs)) for i, spec in enumerate(specs))
        for item in node.outputs:
            if item.name in self._names:
                call.fail(
                    HetuError, f"the graph has a node or a tensor named {item.name!r} already", "give another name"
                )
        if self.eager is not None:
            self.eager.keep(node.outputs, values)
        self._names.take(node.names)
        self.nodes.append(node)
        if definition.lists_strategies and self.listing is None:
            self.listing = node
        return node.outputs

    def _small_graph(self) -> Graph:
        """An empty graph that runs where this one does."""
        return Graph("define_and_run", device=self.device, name=self.name)

    def _clone(self, node: Node, inputs: tuple[Operand, ...], backward: Hashable) -> Node:
        """Adds a node that computes another one again, for a backward, from the same values in other tensors."""
        name = self._names.free(f"{node.name}.again")
        clone = replace(node, id=len(self.nodes), inputs=inputs, name=name, scopes=(), original=node, backward=backward)
        specs = [TensorSpec(item.dtype, item.symbolic_shape, item.on_cpu) for item in node.outputs]
        clone.outputs = tuple(self._output(clone, spec, i, len(specs)) for i, spec in enumerate(specs))
        self._names.take(clone.names)
        self.nodes.append(clone)
        return clone

    def _autocast(self, definition: OpDef, operands: tuple[Operand, ...]) -> tuple[Operand, ...]:
        kept = [definition.inputs.index(name) for name in definition.uncast_inputs]
        floating = {
            place: item.dtype
            for place, item in enumerate(operands)
            if isinstance(item, Tensor) and item.dtype.is_floating and place not in kept
        }
        wanted = wanted_dtype(definition.precision, list(floating.values()))
        if wanted is None:
            return operands
        return tuple(
            self.apply("cast", (item,), {"dtype": wanted})[0] if floating.get(place, wanted) != wanted else item
            for place, item in enumerate(operands)
        )

    def require(self, constraint: Constraint, where: Where | None = None) -> None:
        """Records what must hold in every run that binds the symbols in question.

        Args:
            constraint: See :func:`hetu.require`.
            where: The user's line; the caller's if None.

        Raises:
            ShapeError: If it can't hold for any value in the symbols' ranges.
            HetuError: If it is no constraint.
        """
        place = where or caller()
        if not isinstance(constraint, Constraint):
            refuse_requirement(constraint, place)
        if constraint.decided is False:
            what = f"{constraint} never holds"
            raise ShapeError(what, op="require", where=place, fix="change the ranges of the symbols")
        self.constraints.append(constraint.because("", op_name="require", where=place))

    def _operand(self, item: Any, place: int, definition: OpDef, where: Where) -> Operand:
        if isinstance(item, Tensor) and item.graph is self and item.op.role is not Role.UPDATE:
            return item
        op, what = definition.name, definition.input_name(place)
        if not isinstance(item, Tensor):
            number = number_of(item)
            if type(number) is int and abs(number) > MOST_OF_FLOATS:
                refuse(item, what, "a number of at most 2**1023", op=op, error=DTypeError)
            if number is not None or item is None or isinstance(item, IntSymbol):
                return item if number is None else number
            raise DTypeError(
                f"expected {what} to be a graph tensor or a number, got {type(item).__name__}",
                op=op,
                where=where,
                fix="wrap arrays in hetu.constant(...), or feed them through hetu.placeholder(...)",
            )
        if item.graph is not self:
            raise HetuError(
                f"expected {what} to be of the same graph as the other tensors, but tensor {item.name} belongs to "
                f"another graph (made at {item.op.where.short})",
                op=op,
                where=where,
                fix="build all of a computation in one graph",
            )
        raise HetuError(
            f"{item.name} is the result of minimize (made at {item.op.where.short}), which is there only after "
            "everything is computed",
            op=op,
            where=where,
            fix="compute with the loss that minimize was given",
        )

    @staticmethod
    def _output(node: Node, spec: TensorSpec, index: int, count: int) -> Tensor:
        names = node.definition.outputs
        # An op with as many outputs as it is asked for (split) numbers them.
        name = node.name if count == 1 else f"{node.name}.{names[index] if len(names) > 1 else index}"
        shape = tuple(as_symbol(dim) for dim in spec.shape)
        return Tensor(name, spec.dtype, shape, node, index, spec.on_cpu)

    # Looking

    def num_pipelines(self, strategy: int) -> int | None:
        """How many pipelines a strategy has, whatever is fetched; None if neither the graph nor an op of it says."""
        strategy = index(strategy, "strategy", self.num_strategy, op="graph", error=StrategyError)
        if self.strategies:
            return self.strategies[strategy].num_pipelines
        return None if self.listing is None else len(self.listing.attrs["strategies"][strategy].lengths)

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the graph grows: what is found out of a graph holds for one version."""
        return len(self.nodes), len(self.constraints)

    def verify(self) -> None:
        """Checks the graph's own promises: order, ownership, unique names, shapes that the ops confirm.

        Raises:
            HetuError: Naming the node that breaks one.
        """
        from hetu.graph.passes import verify

        verify(self)

    def __str__(self) -> str:
        from hetu.graph.printing import format_graph

        return format_graph(self)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The graph as a networkx graph: one vertex per node, one edge per use of a tensor."""
        from hetu.graph.printing import to_networkx

        return to_networkx(self)

    def find(self, name: str, what: str = "name") -> Tensor:
        """The tensor of a name: ``"linear_0"``, or ``"parallel_attn_0.out"`` where an op has several outputs.

        The name that ``minimize`` was given is that of the step's loss, which it returned.

        Args:
            name: The name, as ``print(g)`` shows it.
            what: The argument that it stands in, for the error.

        Raises:
            HetuError: If there is none.

        Example:
            >>> import hetu
            >>> with hetu.graph("define_and_run") as g:
            ...     x = hetu.placeholder(hetu.float32, [2], name="x")
            >>> g.find("x") is x
            True
        """
        found = self._found.get(text(name, what, op="find"))
        if found is None or found.op.id >= len(self.nodes) or self.nodes[found.op.id] is not found.op:
            named = {node.name: node.outputs[0] for node in self.nodes if node.role is Role.UPDATE}
            named |= {item.name: item for node in self.nodes for item in node.outputs}
            if name not in named:
                _refuse_name(self, name, what, list(named))
            self._found, found = named, named[name]
        return found


def _refuse_name(graph: Graph, name: str, what: str, known: Sequence[str]) -> NoReturn:
    outputs = [item.name for node in graph.nodes if node.name == name for item in node.outputs]
    near = outputs or get_close_matches(name, known, n=3)
    fix = f"did you mean {' or '.join(near)}?" if near else "print(g) shows the names of its tensors"
    raise HetuError(f"the graph has no tensor named {shown(name)}, as {what} says", where=caller(), fix=fix)
