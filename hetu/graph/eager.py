"""Eager graphs: each op is run when it is built, as a small graph of its own, by what runs all graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hetu.cache import LRU
from hetu.errors import HetuError, StrategyError, caller
from hetu.graph.autocast import no_autocast
from hetu.graph.node import Node
from hetu.graph.opdef import Role, TensorSpec
from hetu.graph.passes import value_key
from hetu.graph.tensor import Tensor
from hetu.symbols import IntSymbol

MOST_KEPT = 512
"""How many small graphs are kept, so that an op of the same shapes is not lowered again."""

_FORBIDDEN = {
    Role.PLACEHOLDER: ("there is no later run that feeds a placeholder", "give the value: hetu.constant(array)"),
    Role.UPDATE: ("minimize needs runs in which parameters change", 'train in hetu.graph("define_and_run")'),
}
"""Roles of nodes that mean something in later runs only: why there are none, and what to do."""


class EagerValues:
    """The values of an eager graph's tensors; they are kept as long as the graph.

    Args:
        make_graph: Makes an empty graph that runs where the eager one does.

    Attributes:
        sizes: The values of symbols that ops made, ``max_seqlen`` say.
    """

    def __init__(self, make_graph: Callable[[], Any]) -> None:
        self.sizes: dict[IntSymbol, int] = {}
        self._make_graph = make_graph
        self._values: dict[Tensor, Any] = {}
        self._kept: LRU[tuple[Any, list[Tensor], tuple[Tensor, ...]]] = LRU(MOST_KEPT)

    def compute(self, node: Node, specs: Sequence[TensorSpec]) -> tuple[list[TensorSpec], list[Any]]:
        """Runs an op.

        Args:
            node: Its use, which is checked.
            specs: What the op says of its outputs.

        Returns:
            The same of the outputs, with plain sizes, and their values.

        Raises:
            HetuError: Whatever a run refuses, or if the op means something in later runs only.
        """
        if node.role in _FORBIDDEN:
            what, fix = _FORBIDDEN[node.role]
            raise HetuError(f"an eager graph runs each op once: {what}", where=node.where, fix=fix)
        graph, fed, outputs = self._small_graph(node)
        feeds = dict(zip(fed, (self._values[item] for item in node.tensors), strict=True))
        values = graph.run(list(outputs), feeds, int_symbol_dict=self.sizes)
        if any(value is None for value in values):
            what, fix = "an eager graph runs in one process", "start the script without torchrun"
            raise StrategyError(what, where=node.where, fix=fix)
        if node.symbols:
            (binding,) = graph.prepare(list(outputs), feeds, int_symbol_dict=self.sizes).bindings
            made = outputs[0].op.symbols  # the op's own again, or those that it has found in its arguments
            found = {symbol: binding.get(made.get(name, symbol)) for name, symbol in node.symbols.items()}
            self.sizes |= {symbol: size for symbol, size in found.items() if size is not None}
        pairs = zip(specs, values, strict=True)
        return [TensorSpec(spec.dtype, tuple(value.shape), spec.on_cpu) for spec, value in pairs], values

    def _small_graph(self, node: Node) -> tuple[Any, list[Tensor], tuple[Tensor, ...]]:
        """A graph of one op, its placeholders and its outputs."""

        def make() -> tuple[Any, list[Tensor], tuple[Tensor, ...]]:
            graph, fed = self._make_graph(), []
            with graph, no_autocast():
                for item in node.tensors:
                    attrs = {"dtype": item.dtype, "shape": item.shape}
                    fed += graph.apply("placeholder", (), attrs)
                rest = iter(fed)
                operands = [next(rest) if isinstance(item, Tensor) else item for item in node.inputs]
                return graph, fed, graph.apply(node.definition.name, operands, node.attrs, node.name)

        if node.definition.is_source:  # its name or its value is one of a kind
            return make()
        operands = tuple(
            (item.dtype, item.shape, item.on_cpu) if isinstance(item, Tensor) else value_key(item)
            for item in node.inputs
        )
        attrs = tuple((name, value_key(value)) for name, value in sorted(node.attrs.items()))
        key = node.definition.name, operands, attrs
        try:
            hash(key)
        except TypeError:  # an argument without a hash
            return make()
        return self._kept.get(key, make)

    def keep(self, outputs: Sequence[Tensor], values: Sequence[Any]) -> None:
        """Keeps the values of new tensors."""
        self._values.update(zip(outputs, values, strict=True))

    def forget(self, outputs: Sequence[Tensor]) -> None:
        """Drops the values of tensors that are taken back."""
        for item in outputs:
            self._values.pop(item, None)

    def __getitem__(self, tensor: Tensor) -> Any:
        """The value of a tensor, which nobody may change."""
        return self._values[tensor]


def check_eager(num_strategy: int, strategies: Sequence[Any]) -> None:
    """Refuses strategies: an eager graph has one pipeline."""
    if num_strategy > 1 or any(item.num_pipelines > 1 for item in strategies):
        what, fix = "an eager graph runs on one pipeline", 'use hetu.graph("define_and_run")'
        raise StrategyError(what, op="graph", where=caller(), fix=fix)


def refuse_run() -> HetuError:
    """The error of what only makes sense in a graph that is run."""
    return HetuError(
        "an eager graph has run each op when it was built, and keeps nothing from run to run",
        where=caller(),
        fix='read values by x.numpy(), or make the graph by hetu.graph("define_and_run")',
    )
