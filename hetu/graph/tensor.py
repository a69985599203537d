"""The graph's tensor: a name, an element type and a symbolic shape; never any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from hetu.dtypes import DType
from hetu.errors import HetuError, caller
from hetu.symbols import IntSymbol

if TYPE_CHECKING:
    from hetu.graph.graph import Graph
    from hetu.graph.node import Node


class Tensor:
    """A value of a graph. Ops make tensors; ``Graph.run`` gives their data.

    Attributes:
        name: Unique in its graph.
        dtype: Element type.
        symbolic_shape: One :class:`~hetu.IntSymbol` per dimension.
        op: The node that makes it.
        index: Which output of that node it is.
        on_cpu: Whether its data lies on the CPU whatever the graph's device is (``rng_state``).
    """

    __slots__ = ("__weakref__", "dtype", "index", "name", "on_cpu", "op", "symbolic_shape")
    __array_ufunc__ = None  # so that "array * tensor" asks the tensor and is not tried on each element

    def __init__(
        self, name: str, dtype: DType, shape: tuple[IntSymbol, ...], op: Node, index: int, on_cpu: bool = False
    ) -> None:
        self.name, self.dtype, self.symbolic_shape = name, dtype, shape
        self.op, self.index, self.on_cpu = op, index, on_cpu

    @property
    def graph(self) -> Graph:
        """The graph it belongs to."""
        return self.op.graph

    @property
    def shape(self) -> tuple[int | IntSymbol, ...]:
        """The shape with plain ints where a dimension is the same in every run."""
        return tuple(dim if dim.constant is None else dim.constant for dim in self.symbolic_shape)

    @property
    def ndim(self) -> int:
        return len(self.symbolic_shape)

    def __repr__(self) -> str:
        return f"hetu.Tensor({self.name}: {self.dtype.name}[{', '.join(map(str, self.shape))}])"

    def __bool__(self) -> NoReturn:
        raise HetuError(
            f"the graph's tensor {self.name} has no value while the graph is built, so it is neither true nor false",
            where=caller(),
            fix="fetch it with g.run(...) and decide on the result",
        )

    def _apply(self, op: str, *inputs: Any, **attrs: Any) -> Tensor:
        return self.graph.apply(op, inputs, attrs)[0]

    def __add__(self, other: Any) -> Tensor:
        return self._apply("add", self, other)

    def __radd__(self, other: Any) -> Tensor:
        return self._apply("add", other, self)

    def __sub__(self, other: Any) -> Tensor:
        return self._apply("sub", self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return self._apply("sub", other, self)

    def __mul__(self, other: Any) -> Tensor:
        return self._apply("mul", self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return self._apply("mul", other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return self._apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return self._apply("div", other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return self._apply("matmul", self, other)

    def __pow__(self, other: Any) -> Tensor:
        return self._apply("pow", self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return self._apply("pow", other, self)

    def __neg__(self) -> Tensor:
        return self._apply("mul", self, -1)

    # No == and != element by element, which are hetu.eq and hetu.ne: tensors are keys of dicts.

    def __lt__(self, other: Any) -> Tensor:
        return self._apply("lt", self, other)

    def __le__(self, other: Any) -> Tensor:
        return self._apply("le", self, other)

    def __gt__(self, other: Any) -> Tensor:
        return self._apply("gt", self, other)

    def __ge__(self, other: Any) -> Tensor:
        return self._apply("ge", self, other)
