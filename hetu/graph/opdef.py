"""Op definitions: everything that hetu knows of an op apart from how a backend computes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypeVar

from numpy.typing import NDArray

from hetu.arguments import shown
from hetu.dtypes import DType
from hetu.errors import HetuError, ShapeError, Where, caller
from hetu.graph.tensor import Tensor
from hetu.symbols import Constraint, IntSymbol, as_symbol, equal

if TYPE_CHECKING:
    from hetu.graph.graph import Graph
    from hetu.graph.node import Node

Dim = int | IntSymbol

Derived = TypeVar("Derived")


class Role(Enum):
    """What a node is to a run: who asks for parameters, say, asks for this and not for an op's name."""

    COMPUTATION = "computed by a backend"
    PLACEHOLDER = "fed by the user"
    CONSTANT = "the same in every run"
    PARAMETER = "kept by the graph from run to run"
    UPDATE = "changes parameters after all micro-batches of a run"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What an op says of one output: its dtype and shape, and whether it stays on the CPU."""

    dtype: DType
    shape: Sequence[Dim]
    on_cpu: bool = False


@dataclass
class Call:
    """One use of an op while it is checked: what ``OpDef.infer`` reads, asks for and reports to.

    Attributes:
        graph: The graph being built.
        op: The op's name, for errors.
        name: The node's name.
        inputs: The operands in the order of ``OpDef.inputs``.
        attrs: The other arguments; ``infer`` may replace them by their normal form.
        where: The user's line.
        symbols: See :attr:`Node.symbols`.
        constraints: What must hold when the graph runs.
    """

    graph: Graph
    op: str
    name: str
    inputs: tuple[Any, ...]
    attrs: dict[str, Any]
    where: Where
    symbols: dict[str, IntSymbol] = field(default_factory=dict)
    constraints: list[Constraint] = field(default_factory=list)

    def fail(self, error: type[HetuError], what: str, fix: str | None = None) -> NoReturn:
        """Refuses the call."""
        raise error(what, op=self.op, where=self.where, fix=fix)

    def symbol(self, name: str) -> IntSymbol:
        """A symbol that the op itself gives a value in each run (by ``OpDef.infer_sizes``)."""
        return self.symbols.setdefault(name, IntSymbol(f"{self.name}.{name}"))

    def check(self, constraint: Constraint | bool, what: str, fix: str | None = None) -> None:
        """Demands a relation between sizes: decided now if ranges or requirements decide it, else checked by every run.

        Args:
            constraint: A comparison of sizes.
            what: What is expected, for the error.
            fix: What to do about it.
        """
        decided = constraint if isinstance(constraint, bool) else constraint.decided_by(self.graph.constraints)
        if decided is False:
            self.fail(ShapeError, what, fix)
        if decided is None and isinstance(constraint, Constraint):
            self.constraints.append(constraint.because(what, op_name=self.op, where=self.where))

    def same(self, a: Dim, b: Dim, what: str, fix: str | None = None) -> None:
        """Demands that two sizes are equal in every run."""
        if a is not b:
            self.check(equal(as_symbol(a), as_symbol(b)), what, fix)


@dataclass(frozen=True)
class GoodSample:
    """Inputs on which the op must agree with ``reference``.

    Attributes:
        build: Takes the fed tensors (graph tensors) and returns the op's output or outputs.
        feeds: The arrays, one per placeholder. A dimension that ``symbolic`` names is a symbol in the placeholder.
        reference: The same in numpy, from the arrays (converted to float64 where floating).
        symbolic: Pairs (feed, dimension) that are symbols.
        smooth: Whether the op is smooth around these feeds, so that finite differences tell its gradient.
    """

    build: Callable[..., Any]
    feeds: Sequence[NDArray[Any]]
    reference: Callable[..., Any]
    symbolic: Sequence[tuple[int, int]] = ()
    smooth: bool = True


@dataclass(frozen=True)
class BadSample:
    """A call that must be refused, with a piece of the message."""

    build: Callable[[], Any]
    error: type[HetuError]
    message: str


@dataclass(frozen=True, slots=True)
class IndexRange:
    """What the values of an op's input must be: from 0 to below ``size``, or ``ignored``.

    Attributes:
        name: The input's name.
        size: How many there are to choose from.
        ignored: A value that is no index, and may come; None if there is none.
    """

    name: str
    size: Dim
    ignored: int | None = None


class Pipeline(Protocol):
    """What is known of one pipeline while a run is bound and planned."""

    def once(self, key: Hashable, derive: Callable[[], Derived]) -> Derived:
        """What an op derives from the pipeline's host inputs, derived once while the run is bound and planned.

        Args:
            key: The op's name, and what the value depends on.
            derive: Makes the value where no earlier call did.
        """

    def known(self, expr: Dim) -> int | None:
        """The value of a size, or None as long as a symbol in it has no value."""

    def value(self, expr: Dim) -> int:
        """The value of a size; raises UnboundSymbolError if it has none."""

    def host(self, tensor: Tensor) -> NDArray[Any]:
        """The values of a host input (see ``OpDef.host_inputs``)."""

    def describe(self, *exprs: Dim) -> list[str]:
        """Lines that say what the symbols of the expressions are bound to and by whom."""


class RunView(Protocol):
    """A run while it is bound and planned: the strategy and the pipelines that this process knows of."""

    @property
    def strategy(self) -> int: ...

    @property
    def pipelines(self) -> Sequence[Pipeline]: ...


class OpDef:
    """An op: its signature, checks, shape rule and samples. Each op is one subclass, registered once.

    Class attributes:
        name: The op's name, also of the function that users call.
        inputs: Names of the inputs, in order; a last name with ``*`` takes any number.
        outputs: Names of the outputs; a single one needs none.
        host_inputs: Inputs whose *values* planning reads (``cu_seqlens``).
        is_random: Whether each run draws an offset from the generator for it.
        role: What its nodes are to a run.
        is_view: Whether the output may lie in its first input's memory.
        repeats: Whether several elements of the output may be one in memory, as in a view that is stretched.
        spans_pipelines: Whether one call covers all pipelines of the strategy.
        lists_strategies: Whether its attributes say which ``strategies`` there are, and so how many pipelines each has.
        has_plan: Whether ``plan`` makes integers for it anew for every length set.
        overlaps: Whether it takes its time while others are computed, and so is started as early as can be.
        plan_name: Ops of one name share plans, for equal keys; None for the op's own name.
        is_step_wide: Whether its value is made of all pipelines and micro-batches of a run, before the rest is
            computed.
        is_public: Whether users call it; False for ops that only gradients are made of.
        stops_gradient: Whether what it gives counts as a constant when a graph is differentiated.
        is_attention: Whether ``hetu.recompute`` leaves it alone unless it is asked for attention too. It may span
            pipelines; other ops that do are never computed again.
        precision: What ``hetu.autocast`` does to its floating operands: ``"low"`` casts them to half precision,
            ``"high"`` to float32, ``"any"`` leaves them alone.
        uncast_inputs: Inputs that autocast leaves alone, whatever the precision.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("out",)
    host_inputs: ClassVar[tuple[str, ...]] = ()
    is_random: ClassVar[bool] = False
    role: ClassVar[Role] = Role.COMPUTATION
    is_view: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    spans_pipelines: ClassVar[bool] = False
    lists_strategies: ClassVar[bool] = False
    has_plan: ClassVar[bool] = False
    overlaps: ClassVar[bool] = False
    plan_name: ClassVar[str | None] = None
    is_step_wide: ClassVar[bool] = False
    is_public: ClassVar[bool] = True
    stops_gradient: ClassVar[bool] = False
    is_attention: ClassVar[bool] = False
    precision: ClassVar[str] = "any"
    uncast_inputs: ClassVar[tuple[str, ...]] = ()

    @property
    def is_source(self) -> bool:
        """True if it has no inputs and is no computation: a placeholder, a constant or a parameter."""
        return self.role in _SOURCES

    @property
    def is_known_to_planning(self) -> bool:
        """True if its outputs can be computed before a run is planned, from its operands alone."""
        is_plain = self.role in (Role.COMPUTATION, Role.PLACEHOLDER, Role.CONSTANT)
        return is_plain and not (self.is_random or self.spans_pipelines or self.has_plan or self.is_step_wide)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def input_name(self, place: int) -> str:
        """What the input at a place is called, for errors: ``tensors[1]`` where an op takes any number."""
        last = len(self.inputs) - 1
        is_one_of_many = place >= last and self.inputs[last].startswith("*")
        return f"{self.inputs[last][1:]}[{place - last}]" if is_one_of_many else self.inputs[place]

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        """Checks a call and gives the outputs' dtypes and shapes."""
        raise NotImplementedError

    def index_ranges(self, node: Node) -> Sequence[IndexRange]:
        """The inputs by whose values it looks something up, with what these may be."""
        return ()

    def keeps_values(self, node: Node) -> bool:
        """Whether the values of its output are those of its first input, each at least once and no others."""
        return False

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        """Calls with a known answer, and calls that must be refused."""
        raise NotImplementedError

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        """The rule of its gradient, in terms of other ops. An op that doesn't have one is not differentiable.

        Args:
            node: The use of the op.
            grads: For each output the gradient of what is differentiated with respect to it; None where nothing
                depends on it.

        Returns:
            For each input a function that adds the nodes of its gradient, of the input's dtype and shape; called
            only if it is needed. None for an input that there is no gradient for.
        """
        raise NotImplementedError

    def shared_symbols(self, node: Node, strategy: int) -> Sequence[IntSymbol]:
        """Symbols that have one value on all pipelines of a strategy."""
        return ()

    def inferable_sizes(self, node: Node, strategy: int, pipeline: int) -> Sequence[tuple[IntSymbol, str]]:
        """Sizes that the op infers when nothing stronger binds them, each with the name of its source."""
        return ()

    def infer_sizes(self, node: Node, view: RunView) -> Sequence[Sequence[int | None]]:
        """The values of ``inferable_sizes``, one row per pipeline; None where the op doesn't know (yet)."""
        return ()

    def plan_keys(self, node: Node, view: RunView) -> Sequence[Any]:
        """Checks the run's values and gives everything that ``plan`` depends on, hashable.

        One key where the op spans the pipelines, else one per pipeline. Equal keys mean equal plans, also
        between nodes of the same op.
        """
        raise NotImplementedError

    def plan(self, key: Any) -> Any:
        """The plan for a key: integers only."""
        raise NotImplementedError

    def derive(self, plan: Any) -> Any:
        """What the op follows, made from a plan that it may share with others: a gradient its backward."""
        return plan


_SOURCES = (Role.PLACEHOLDER, Role.CONSTANT, Role.PARAMETER)

_registry: dict[str, OpDef] = {}

_Definition = TypeVar("_Definition", bound=type[OpDef])


def register(definition: _Definition) -> _Definition:
    """Class decorator: makes an op known under its name."""
    if definition.name in _registry:
        raise ValueError(f"an op named {definition.name!r} is registered already")
    _registry[definition.name] = definition()
    return definition


def find_op(name: str) -> OpDef:
    """The op of that name.

    Raises:
        HetuError: If there is none.
    """
    found = _registry.get(name) if isinstance(name, str) else None
    if found is None:
        raise HetuError(f"there is no op {shown(name)}", where=caller(), fix="see hetu.graph.registry()")
    return found


def registry() -> Mapping[str, OpDef]:
    """All ops by name."""
    return dict(_registry)
