"""The graph's tensor: a name, an element type and a symbolic shape. It holds no data; an eager graph knows its own."""

from __future__ import annotations

import builtins
import math
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hetu.dtypes import DType
from hetu.errors import DTypeError, HetuError, caller
from hetu.symbols import IntSymbol

if TYPE_CHECKING:
    from hetu.graph.graph import Graph
    from hetu.graph.node import Node
    from hetu.ops import (
        activations,
        along,
        arithmetic,
        choice,
        compare,
        indexing,
        joining,
        linalg,
        methods,
        nn,
        pointwise,
        reduce,
        rounding,
    )
    from hetu.ops import shape as shapes


class Tensor:
    """A value of a graph. Ops make tensors; ``Graph.run`` gives their data.

    The ops are its methods too, in the call forms of PyTorch: ``x.reshape(2, -1)``, ``x.sum(0)``, ``x[:, 2:]``,
    ``x @ y``; ``dir(hetu.Tensor)`` lists them. Where PyTorch's method of a name gives something else than hetu's
    function (``x.max(dim)`` has no indices), it is hetu's function that is meant.

    Attributes:
        name: Unique in its graph.
        dtype: Element type.
        shape: One size per dimension: an int where it is known, else an :class:`~hetu.IntSymbol`.
        symbolic_shape: One :class:`~hetu.IntSymbol` per dimension.
        op: The node that makes it.
        index: Which output of that node it is.
        on_cpu: Whether its data lies on the CPU whatever the graph's device is (``rng_state``).

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run"):
        ...     x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 4], name="x")
        ...     x[:, 2:].sum(0)
        hetu.Tensor(sum_0: float32[2])
    """

    __slots__ = ("__weakref__", "dtype", "index", "name", "on_cpu", "op", "symbolic_shape")
    __array_ufunc__ = None  # so that "array * tensor" asks the tensor and is not tried on each element

    def __init__(
        self,
        name: str,
        dtype: DType,
        shape: tuple[IntSymbol, ...],
        op: Node,
        index: builtins.int,
        on_cpu: builtins.bool = False,
    ) -> None:
        self.name, self.dtype, self.symbolic_shape = name, dtype, shape
        self.op, self.index, self.on_cpu = op, index, on_cpu

    @property
    def graph(self) -> Graph:
        """The graph it belongs to."""
        return self.op.graph

    @property
    def shape(self) -> tuple[builtins.int | IntSymbol, ...]:
        """The shape with plain ints where a dimension is the same in every run."""
        return tuple(dim if dim.constant is None else dim.constant for dim in self.symbolic_shape)

    @property
    def ndim(self) -> builtins.int:
        return len(self.symbolic_shape)

    @property
    def T(self) -> Tensor:  # noqa: N802 - torch's name
        """A matrix with rows and columns swapped."""
        return self.t()

    def dim(self) -> builtins.int:
        """How many dimensions it has."""
        return self.ndim

    def __repr__(self) -> str:
        text = f"{self.name}: {self.dtype.name}[{', '.join(map(str, self.shape))}]"
        eager = self.graph.eager
        return f"hetu.Tensor({text})" if eager is None else f"hetu.Tensor({text}, {eager[self]!r})"

    def numpy(self) -> NDArray[Any]:
        """The value of a tensor of an eager graph, copied; bfloat16, which numpy lacks, as float32.

        Raises:
            HetuError: If the graph is none: then only runs have values.

        Example:
            >>> import hetu
            >>> with hetu.graph("eager", device="cpu"):
            ...     (hetu.constant([1.0, 2.0]) * 3).numpy()
            array([3., 6.], dtype=float32)
        """
        value = self._value("has no numbers")
        if self.dtype.name == "bfloat16":
            value = value.float()
        return np.array(value.cpu().numpy())

    def item(self) -> builtins.bool | builtins.int | builtins.float:
        """The number that a tensor with one element is, in an eager graph.

        Raises:
            HetuError: If the graph is none, or there are more elements.
        """
        value = self._value("is no number")
        if math.prod(value.shape) != 1:
            what = f"expected one element, got {self!r}"
            raise HetuError(what, op="item", where=caller(), fix="take one by an index")
        item: bool | int | float = value.item()
        return item

    def _value(self, what: str) -> Any:
        """The value in an eager graph."""
        if self.graph.eager is not None:
            return self.graph.eager[self]
        raise HetuError(
            f"the graph's tensor {self.name} has no value while the graph is built, so it {what}",
            where=caller(),
            fix="fetch it with g.run(...), and decide and convert then",
        )

    def __bool__(self) -> builtins.bool:
        self._value("is neither true nor false")
        return builtins.bool(self.item())

    def __int__(self) -> builtins.int:
        self._value("is no number")
        return builtins.int(self.item())

    def __float__(self) -> builtins.float:
        self._value("is no number")
        return builtins.float(self.item())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuses functions of torch; of an operator torch then asks the other operand, which is this one."""
        name = getattr(function, "__name__", str(function))
        raise DTypeError(
            f"torch's {name} was called on a hetu.Tensor, which is no torch.Tensor",
            op=name,
            where=caller(),
            fix=f"use hetu's own op, or make one of torch's function: hetu.op(torch.{name}, shape=...)",
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        self._value("is no array")
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __contains__(self, item: Any) -> NoReturn:
        raise HetuError(
            f"what is in the graph's tensor {self.name} is known only when the graph runs",
            where=caller(),
            fix="compare with hetu.eq(...), and fetch that with g.run(...)",
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

    def __rmatmul__(self, other: Any) -> Tensor:
        return self._apply("matmul", other, self)

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

    if TYPE_CHECKING:  # what hetu.ops.methods gives the class
        abs, clamp, floor, round = rounding.abs, rounding.clamp, rounding.floor, rounding.round
        sum, mean, max, min, logsumexp = reduce.sum, reduce.mean, reduce.max, reduce.min, reduce.logsumexp
        argmax, cumsum, sort, topk = along.argmax, along.cumsum, along.sort, along.topk
        add, sub, mul, div = arithmetic.add, arithmetic.sub, arithmetic.mul, arithmetic.div
        eq, ne, lt, le, gt, ge = compare.eq, compare.ne, compare.lt, compare.le, compare.gt, compare.ge
        exp, log, sqrt, rsqrt, pow = pointwise.exp, pointwise.log, pointwise.sqrt, pointwise.rsqrt, pointwise.pow
        sin, cos, relu, sigmoid, tanh = (
            pointwise.sin,
            pointwise.cos,
            activations.relu,
            activations.sigmoid,
            activations.tanh,
        )
        masked_fill, gather, split, matmul = choice.masked_fill, indexing.gather, joining.split, linalg.matmul
        softmax, broadcast_to, transpose = nn.softmax, shapes.broadcast_to, shapes.transpose
        detach, reshape, view, expand = shapes.stop_gradient, methods.reshape, methods.view, methods.expand
        permute, flatten, unsqueeze, squeeze = methods.permute, methods.flatten, methods.unsqueeze, methods.squeeze
        to, neg, square, t, size = methods.to, methods.neg, methods.square, methods.t, methods.size
        numel, contiguous, bool, int = methods.numel, methods.contiguous, methods.as_bool, methods.as_int
        long, half, bfloat16 = methods.as_long, methods.as_half, methods.as_bfloat16
        float, double = methods.as_float, methods.as_double
        __getitem__, __len__, __iter__, __abs__ = methods.getitem, methods.length, methods.iterate, rounding.abs
