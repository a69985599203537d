"""The graph: nodes in an order in which they can be computed, and the context that collects them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, overload

from hetu.arguments import MAX_COUNT, MOST_OF_FLOATS, choice, integer, number_of, refuse, shown, text
from hetu.arguments import device as as_device
from hetu.errors import DTypeError, HetuError, ShapeError, StrategyError, Where, caller
from hetu.graph.autocast import wanted_dtype
from hetu.graph.drawing import Drawn
from hetu.graph.node import Node, Operand
from hetu.graph.opdef import Call, OpDef, Role, TensorSpec, find_op
from hetu.graph.recompute import NOWHERE, building
from hetu.graph.tensor import Tensor
from hetu.symbols import Constraint, IntSymbol, as_symbol

if TYPE_CHECKING:
    import networkx

    from hetu.parallel import AttnPlan, Layout, Strategy
    from hetu.planning.planner import Planner, Prepared
    from hetu.runtime.executor import Executor

entered: ContextVar[tuple[Graph, ...]] = ContextVar("hetu_graphs", default=())


class Graph(Drawn):
    """A define-then-run graph. Ops called within ``with graph:`` add nodes to it.

    Args:
        kind: ``"define_and_run"``, the only kind.
        num_strategy: How many parallel strategies its ``parallel_attn`` ops list; at most 65,536.
        strategies: The strategies themselves, instead of their number: ops then need no lists, and ``strategy=`` takes
            their names too.
        device: Where it runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None for CUDA if there is one, else the CPU.
        name: For printing.

    Attributes:
        nodes: In an order in which they can be computed.
        constraints: Relations that ``hetu.require`` demands of every run. Those that ops demand stand in their nodes.
        strategies: The strategies that it was given; empty where ops list them.
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

    planner_factory: ClassVar[Callable[[Graph], Planner]]
    executor_factory: ClassVar[Callable[[Graph], Executor]]
    """What plans and what runs a graph: set by the package, so that this one need not import later stages."""

    check_strategies: ClassVar[Callable[[Any, int], tuple[Strategy, ...]]]
    """What checks a list of strategies against their number; set by the package too."""

    def __init__(
        self,
        kind: str = "define_and_run",
        *,
        num_strategy: int = 1,
        strategies: Sequence[Strategy] | None = None,
        device: str | None = None,
        name: str = "graph",
    ) -> None:
        self.kind = choice(kind, "kind", ("define_and_run",), op="graph")
        count = integer(num_strategy, "num_strategy", least=1, most=MAX_COUNT, op="graph", error=StrategyError)
        self.strategies = () if strategies is None else type(self).check_strategies(strategies, count)
        self.num_strategy = len(self.strategies) or count
        self.device, self.name = as_device(device, op="graph"), text(name, "name", op="graph")
        self.nodes: list[Node] = []
        self.constraints: list[Constraint] = []
        self.listing: Node | None = None
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}
        self._planner: Planner | None = None
        self._executor: Executor | None = None

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
        given = tuple([self._operand(item, place, definition, where) for place, item in enumerate(inputs)])
        operands = self._autocast(definition, given)
        chosen = (None if name is None else text(name, "name", op=op)) or self._free_name(op)
        call = Call(self, op, chosen, operands, dict(attrs or {}), where)
        if call.name in self._names:
            call.fail(HetuError, f"the graph has a node named {name!r} already", "give another name")
        specs = definition.infer(call)
        node = Node(self, len(self.nodes), definition, operands, call.attrs, call.name, where)
        node.symbols, node.constraints = call.symbols, tuple(call.constraints)
        if (now := building.get()) is not NOWHERE:
            node.scopes, node.backward = now
        node.outputs = tuple(self._output(node, spec, i, len(specs)) for i, spec in enumerate(specs))
        self._names.add(call.name)
        self.nodes.append(node)
        if definition.lists_strategies and self.listing is None:
            self.listing = node
        return node.outputs

    def _clone(self, node: Node, inputs: tuple[Operand, ...], backward: Hashable) -> Node:
        """Adds a node that computes another one again, for a backward, from the same values in other tensors."""
        name = self._free_name(f"{node.name}.again")
        clone = replace(node, id=len(self.nodes), inputs=inputs, name=name, scopes=(), original=node, backward=backward)
        specs = [TensorSpec(item.dtype, item.symbolic_shape, item.on_cpu) for item in node.outputs]
        clone.outputs = tuple(self._output(clone, spec, i, len(specs)) for i, spec in enumerate(specs))
        self._names.add(name)
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
            _refuse_requirement(constraint, place)
        if constraint.decided is False:
            what = f"{constraint} never holds"
            raise ShapeError(what, op="require", where=place, fix="change the ranges of the symbols")
        self.constraints.append(constraint.because("", op_name="require", where=place))

    def _free_name(self, op: str) -> str:
        while (name := f"{op}_{self._counts.get(op, 0)}") in self._names:
            self._counts[op] = self._counts.get(op, 0) + 1
        return name

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

    # Running

    @property
    def planner(self) -> Planner:
        """What binds and plans the runs of this graph, without torch."""
        if self._planner is None:
            self._planner = type(self).planner_factory(self)
        return self._planner

    @property
    def executor(self) -> Executor:
        """What lowers and runs this graph; its ``stats()`` tell what was cached, planner included."""
        if self._executor is None:
            self._executor = type(self).executor_factory(self)
        return self._executor

    # What a tensor's value is depends on the strategy and the micro-batches of the run: see what run returns.

    @overload
    def run(
        self,
        fetches: Tensor,
        feed_dict: Mapping[Tensor, Any] | None = None,
        *,
        int_symbol_dict: Mapping[IntSymbol, Any] | None = None,
        strategy: int | str | None = None,
        num_micro_batches: int = 1,
        device: str | None = None,
        run_level: str = "update",
    ) -> Any: ...

    @overload
    def run(
        self,
        fetches: Sequence[Tensor],
        feed_dict: Mapping[Tensor, Any] | None = None,
        *,
        int_symbol_dict: Mapping[IntSymbol, Any] | None = None,
        strategy: int | str | None = None,
        num_micro_batches: int = 1,
        device: str | None = None,
        run_level: str = "update",
    ) -> list[Any]: ...

    def run(
        self,
        fetches: Tensor | Sequence[Tensor],
        feed_dict: Mapping[Tensor, Any] | None = None,
        *,
        int_symbol_dict: Mapping[IntSymbol, Any] | None = None,
        strategy: int | str | None = None,
        num_micro_batches: int = 1,
        device: str | None = None,
        run_level: str = "update",
    ) -> Any:
        """Computes tensors.

        Args:
            fetches: A tensor, or a list of them.
            feed_dict: Placeholders' values: numpy arrays or torch tensors; ``hetu.Shards`` with one array
                per pipeline, a dict with one array per context group by the group's value, or one array that all
                get, which is refused where each pipeline needs its own rows. With micro-batches: a list with one
                value each.
            int_symbol_dict: Values of leaf symbols; with micro-batches, a list gives one value each.
            strategy: An index, the name of one of the graph's ``strategies``, ``"auto"`` (the cheapest feasible one) or
                None (0 if there is one, else ``"auto"``).
            num_micro_batches: How many micro-batches are run one after the other.
            device: Where to run, instead of the graph's device.
            run_level: What a run that fetches what ``minimize`` gave does with the gradients: ``"update"`` adds them
                to those that wait and applies all, ``"grad"`` lets them wait for a later run, ``"compute_only"`` does
                not compute them.

        Returns:
            For a single tensor its value, for a list a list in the same order. A value is a torch tensor,
            ``hetu.Shards`` of them when the strategy has more than one pipeline, and a list of these, one per
            micro-batch, when there are several.

        Raises:
            HetuError: One of the family, before anything is computed.
        """
        return self.executor.run(fetches, feed_dict, int_symbol_dict, strategy, num_micro_batches, device, run_level)

    def state_dict(self) -> dict[str, Any]:
        """All that the graph keeps from run to run, copied: parameters, waiting gradients, optimisers, the generator.

        Returns:
            A nested dict of torch tensors, numbers and strings. ``hetu.save(g, path)`` writes it, ``hetu.load(path)``
            reads it. If an optimiser has a ``zero_stage`` and there are several ranks, all of them call it, and all get
            whole tensors; what other ranks had parts of lies on the CPU.

        Raises:
            CommunicationError: If the ranks hold parts, and one of them does not call it, or refuses.
        """
        return self.executor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state: a run after it gives the same bits as it would have given then.

        Args:
            state: What :meth:`state_dict` or ``hetu.load`` gave, of a graph with the same parameters and optimisers.

        Raises:
            HetuError: If it does not fit the graph; nothing is changed then.
        """
        self.executor.load_state_dict(state)

    def prepare(
        self,
        fetches: Tensor | Sequence[Tensor],
        feed_dict: Mapping[Tensor, Any] | None = None,
        *,
        int_symbol_dict: Mapping[IntSymbol, Any] | None = None,
        strategy: int | str | None = None,
    ) -> Prepared:
        """Binds, selects and plans as ``run`` would, and computes nothing.

        Returns:
            The :class:`~hetu.planning.planner.Prepared` run: its strategy, each pipeline's binding, its plans.
        """
        subgraph = self.planner.subgraph(fetches)
        return self.planner.prepare(subgraph, feed_dict, int_symbol_dict, strategy)[0]

    def layout(
        self,
        strategy: int | str = 0,
        *,
        int_symbol_dict: Mapping[IntSymbol, int] | None = None,
        cu_seqlens: Any = None,
        batch: int | Sequence[int] | Mapping[int, int] = 1,
        node: str | None = None,
    ) -> Layout:
        """Which token lies where under a strategy: ``layout.scatter(x)`` and ``layout.gather(shards)``.

        Args:
            strategy: Index or name of the strategy.
            int_symbol_dict: Values of the symbols in its lengths and groups.
            cu_seqlens: With packing: the array of all groups, or one array per group.
            batch: Without packing: sequences in a batch, or one number per group.
            node: Which ``parallel_attn``, where the graph has several with different layouts.

        What is given per group is a dict by the group's value, or a list in the order in which ``print(layout)`` lists
        the groups, that of ascending values.

        Raises:
            StrategyError: If there is no such strategy, or no or several layouts to choose from.
        """
        return self.planner.layout(strategy, int_symbol_dict, cu_seqlens, batch, node)

    def plan(
        self,
        strategy: int | str = 0,
        *,
        int_symbol_dict: Mapping[IntSymbol, int] | None = None,
        cu_seqlens: Any = None,
        batch: int | Sequence[int] | Mapping[int, int] = 1,
        node: str | None = None,
    ) -> AttnPlan:
        """The plan that a run would follow, as data: see ``print(plan)``, ``plan.verify()``, ``plan.cost(...)``.

        Takes the arguments of :meth:`layout`.
        """
        return self.planner.plan(strategy, int_symbol_dict, cu_seqlens, batch, node)


def _refuse_requirement(given: Any, where: Where) -> NoReturn:
    fix = "compare sizes: s >= 8, or hetu.equal(s, 8)"
    if isinstance(given, bool):
        what = f"expected constraint to be a comparison of symbols, got {given}, which is the same in every run"
        fix = (
            "write hetu.equal(a, b) for a == b, which compares how symbols are made; there is none for a != b; "
            "and assert what is known of plain ints"
        )
    elif isinstance(given, Tensor):
        what = f"expected constraint to be a comparison of symbols, got {given!r}, whose values only a run knows"
        fix = "compare its sizes, which are in its symbolic_shape"
    else:
        what = f"expected constraint to be a comparison of symbols, got {shown(given)}"
    raise HetuError(what, op="require", where=where, fix=fix)
