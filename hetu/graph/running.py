"""Running a graph: what its ``run``, its state and its plans are asked for, by the stages that come later."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, overload

from hetu.arguments import flag
from hetu.graph.eager import EagerValues, refuse_run
from hetu.graph.tensor import Tensor
from hetu.symbols import IntSymbol

if TYPE_CHECKING:
    from hetu.parallel import AttnPlan, Hardware, Layout
    from hetu.planning.choosing import Explanation
    from hetu.planning.planner import Planner, Prepared
    from hetu.runtime.executor import Executor


class LoadedNames(NamedTuple):
    """Names that :meth:`Graph.load_parameters` found on one side only.

    Attributes:
        missing_keys: The graph's parameters that were not given.
        unexpected_keys: What was given and is no parameter of the graph.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


Key = TypeVar("Key", bound=Hashable)


class Running:
    """What runs do with a graph; :class:`~hetu.Graph` is one."""

    planner_factory: ClassVar[Callable[[Any], Planner]]
    executor_factory: ClassVar[Callable[[Any], Executor]]
    """What plans and what runs a graph: set by the package, so that this one need not import later stages."""

    eager: EagerValues | None

    def __init__(self) -> None:
        self._planner: Planner | None = None
        self._executor: Executor | None = None

    @property
    def planner(self) -> Planner:
        """What binds and plans the runs of this graph, without torch."""
        if self.eager is not None:
            raise refuse_run()
        if self._planner is None:
            self._planner = type(self).planner_factory(self)
        return self._planner

    @property
    def executor(self) -> Executor:
        """What lowers and runs this graph; its ``stats()`` tell what was cached, planner included."""
        if self.eager is not None:
            raise refuse_run()
        if self._executor is None:
            self._executor = type(self).executor_factory(self)
        return self._executor

    # What a tensor's value is depends on the strategy and the micro-batches of the run: see what run returns.

    @overload
    def run(
        self,
        fetches: Tensor | str,
        feed_dict: Mapping[Any, Any] | None = None,
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
        fetches: Mapping[Key, Tensor | str],
        feed_dict: Mapping[Any, Any] | None = None,
        *,
        int_symbol_dict: Mapping[IntSymbol, Any] | None = None,
        strategy: int | str | None = None,
        num_micro_batches: int = 1,
        device: str | None = None,
        run_level: str = "update",
    ) -> dict[Key, Any]: ...

    @overload
    def run(
        self,
        fetches: Sequence[Tensor | str],
        feed_dict: Mapping[Any, Any] | None = None,
        *,
        int_symbol_dict: Mapping[IntSymbol, Any] | None = None,
        strategy: int | str | None = None,
        num_micro_batches: int = 1,
        device: str | None = None,
        run_level: str = "update",
    ) -> list[Any]: ...

    def run(
        self,
        fetches: Any,
        feed_dict: Mapping[Any, Any] | None = None,
        *,
        int_symbol_dict: Mapping[IntSymbol, Any] | None = None,
        strategy: int | str | None = None,
        num_micro_batches: int = 1,
        device: str | None = None,
        run_level: str = "update",
    ) -> Any:
        """Computes tensors.

        Args:
            fetches: A tensor or its name, a list of them, or a dict of them.
            feed_dict: Values of placeholders, which stand in it themselves or by their names: numpy arrays or torch
                tensors; ``hetu.Shards`` with one array per pipeline, a dict with one array per context group by the
                group's value, or one array that all get, which is refused where each pipeline needs its own rows. With
                micro-batches: a list with one value each.
            int_symbol_dict: Values of leaf symbols; with micro-batches, a list gives one value each.
            strategy: An index, the name of one of the graph's ``strategies``, ``"auto"`` (the cheapest feasible one) or
                None (0 if there is one, else ``"auto"``).
            num_micro_batches: How many micro-batches are run one after the other.
            device: Where to run, instead of the graph's device.
            run_level: What a run that fetches what ``minimize`` gave does with the gradients: ``"update"`` adds them
                to those that wait and applies all, ``"grad"`` lets them wait for a later run, ``"compute_only"`` does
                not compute them.

        Returns:
            For a single tensor its value, for a list a list in the same order, for a dict a dict with the same keys. A
            value is a torch tensor,
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

    def load_parameters(self, given: Mapping[str, Any], *, strict: bool = True) -> LoadedNames:
        """Gives parameters their values, by name, as ``torch.nn.Module.load_state_dict``; nothing else is changed.

        Args:
            given: Torch tensors or numpy arrays by the parameters' names, of the parameters' shapes and of any floating
                dtype: the ``state_dict()`` of a PyTorch module with the same names, say. They are copied.
            strict: Whether all names must be the graph's, and all of the graph's be there.

        Returns:
            A pair of lists, ``missing_keys`` and ``unexpected_keys``; both are empty if it is strict.

        Raises:
            ShapeError: If an array has another shape than its parameter.
            DTypeError: If it is no array of floating numbers.
            HetuError: If it is strict and names differ. Nothing is changed, whatever is wrong.

        Where several ranks hold parts of the optimiser's state (``zero_stage``), all of them call it.

        Example:
            >>> import hetu, torch
            >>> with hetu.graph("define_and_run", device="cpu") as g:
            ...     w = hetu.parameter(0.0, [2], name="w")
            >>> g.load_parameters({"w": torch.ones(2), "b": torch.ones(1)}, strict=False)
            LoadedNames(missing_keys=[], unexpected_keys=['b'])
            >>> g.run("w")
            tensor([1., 1.])
        """
        return self.executor.load_parameters(given, flag(strict, "strict", op="load_parameters"))

    def prepare(
        self,
        fetches: Any,
        feed_dict: Mapping[Any, Any] | None = None,
        *,
        int_symbol_dict: Mapping[IntSymbol, Any] | None = None,
        strategy: int | str | None = None,
    ) -> Prepared:
        """Binds, selects and plans as ``run`` would, and computes nothing.

        Returns:
            The :class:`~hetu.planning.planner.Prepared` run: its strategy, each pipeline's binding, its plans.
        """
        subgraph = self.planner.asked(fetches)
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

    def explain(
        self,
        *,
        int_symbol_dict: Mapping[IntSymbol, int] | None = None,
        cu_seqlens: Any = None,
        batch: int | Sequence[int] | Mapping[int, int] = 1,
        node: str | None = None,
        hardware: Hardware | None = None,
    ) -> Explanation:
        """What each strategy would cost, or why it can't run, before anything is fed: the choice that "auto" makes.

        Costs are those of all attentions of the graph and of their gradients, one after the other, as a run counts
        those that its fetches need; with ``node`` those of one. Printed, it is a table; ``.chosen`` is the index of
        the cheapest feasible strategy.

        Takes the arguments of :meth:`layout`, and ``hardware``: what to estimate for; None for what is set by
        ``hetu.use_hardware``. ``cu_seqlens`` are those of the attentions with packing, where others are without.
        """
        return self.planner.explain(int_symbol_dict, cu_seqlens, batch, node, hardware)
