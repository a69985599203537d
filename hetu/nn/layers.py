"""The base of modules, and those with one weight: Linear, Embedding, RMSNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from hetu.arguments import flag, integer, text
from hetu.dtypes import DType, as_dtype, float32
from hetu.graph import Tensor
from hetu.ops import embedding, linear, parameter, rms_norm

MOST = 2**31
"""The largest width of a weight."""

_EPS = {"float64": 2.0**-52}
"""What follows 1, less 1, in the dtype that a norm is computed in: torch's default. That is float32 but for float64."""


class Module:
    """The base of modules: parameters that belong together, and what is computed with them.

    A module makes its parameters in the graph that is being built, when it is made; calling it adds ops. A module that
    is given a ``name`` calls them ``name.weight`` and so on: give a module within another one that one's name in
    front, as PyTorch's attributes do, and ``g.load_parameters(module.state_dict())`` finds each by its name.

    Example:
        >>> import hetu, torch
        >>> class Block(hetu.nn.Module):
        ...     def __init__(self, width, name):
        ...         self.norm = hetu.nn.RMSNorm(width, name=f"{name}.norm")
        ...         self.mlp = hetu.nn.SwiGLU(width, 2 * width, name=f"{name}.mlp")
        ...
        ...     def __call__(self, x):
        ...         return x + self.mlp(self.norm(x))
        >>> with hetu.graph("define_and_run") as g:
        ...     block = Block(8, "layers.0")
        ...     y = block(hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 8], name="x"))
        >>> [item.name for item in block.parameters()]
        ['layers.0.norm.weight', 'layers.0.mlp.gate_proj.weight', 'layers.0.mlp.up_proj.weight',
         'layers.0.mlp.down_proj.weight']
    """

    def parameters(self) -> list[Tensor]:
        """Its parameters and those of the modules in it, in the order in which its attributes were set."""
        return list(dict.fromkeys(self._found()))

    def _found(self) -> Iterator[Tensor]:
        for item in vars(self).values():
            for part in item if isinstance(item, (list, tuple)) else [item]:
                if isinstance(part, Module):
                    yield from part._found()
                elif isinstance(part, Tensor) and part.op.definition.name == "parameter":
                    yield part

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{item.name}: {list(item.shape)}' for item in self.parameters())})"


def prefix(name: Any, op: str) -> str | None:
    """A module's name; None for one whose parameters have names that are made up."""
    return None if name is None else text(name, "name", op=op)


def named(name: str | None, part: str) -> str | None:
    """The name of a part of a module."""
    return None if name is None else f"{name}.{part}"


def width(value: Any, what: str, op: str) -> int:
    """A size of a weight."""
    return integer(value, what, least=1, most=MOST, op=op)


def uniform(bound: float) -> Callable[[Any], Any]:
    """An initialiser: evenly from ``-bound`` to ``bound``."""
    return partial(_uniform, bound=bound)


def _uniform(blank: Any, bound: float) -> Any:
    return blank.uniform_(-bound, bound)


def _normal(blank: Any) -> Any:
    return blank.normal_()


class Linear(Module):
    """``x @ weight.T + bias``, as ``torch.nn.Linear``: both are drawn evenly from ``+-1 / sqrt(in_features)``.

    Args:
        in_features: The width of what it is given.
        out_features: The width of what it gives.
        bias: Whether it has one.
        dtype: A floating element type.
        name: What its parameters' names begin with; None makes names up.

    Attributes:
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``, or None.

    Raises:
        HetuError: If a width is no positive int, or a name is taken.
        DTypeError: If the dtype is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run"):
        ...     up = hetu.nn.Linear(8, 16, name="up")
        ...     up(hetu.placeholder(hetu.float32, [3, 8], name="x"))
        hetu.Tensor(linear_0: float32[3, 16])
        >>> up
        Linear(up.weight: [16, 8], up.bias: [16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: DType | Any = float32,
        name: str | None = None,
    ) -> None:
        columns = width(in_features, "in_features", "nn.Linear")
        rows = width(out_features, "out_features", "nn.Linear")
        has_bias, name, kind = flag(bias, "bias", op="nn.Linear"), prefix(name, "nn.Linear"), as_dtype(dtype)
        init = uniform(columns**-0.5)
        self.weight = parameter(init, [rows, columns], kind, name=named(name, "weight"))
        self.bias = parameter(init, [rows], kind, name=named(name, "bias")) if has_bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """Takes ``(..., in_features)``, gives ``(..., out_features)``."""
        return linear(x, self.weight, self.bias)


class Embedding(Module):
    """Rows of a table by ids, as ``torch.nn.Embedding``: the table is drawn from a normal distribution.

    Args:
        num_embeddings: How many rows.
        embedding_dim: How wide they are.
        dtype: A floating element type.
        name: What its parameter's name begins with; None makes one up.

    Attributes:
        weight: ``(num_embeddings, embedding_dim)``.

    Raises:
        HetuError: If a width is no positive int, or the name is taken.
        DTypeError: If the dtype is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run"):
        ...     embed = hetu.nn.Embedding(256, 8, name="embed")
        ...     embed(hetu.placeholder(hetu.int64, [3], name="ids"))
        hetu.Tensor(embedding_0: float32[3, 8])
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: DType | Any = float32, name: str | None = None
    ) -> None:
        rows = width(num_embeddings, "num_embeddings", "nn.Embedding")
        columns = width(embedding_dim, "embedding_dim", "nn.Embedding")
        name, kind = prefix(name, "nn.Embedding"), as_dtype(dtype)
        self.weight = parameter(_normal, [rows, columns], kind, name=named(name, "weight"))

    def __call__(self, ids: Tensor) -> Tensor:
        """Takes ids of any shape, gives ``(*ids.shape, embedding_dim)``."""
        return embedding(ids, self.weight)


class RMSNorm(Module):
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension, as ``torch.nn.RMSNorm``; weights begin with 1.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.

    Args:
        normalized_shape: The width.
        eps: What is added to the mean; None for what follows 1, less 1, in float32, and in float64 for float64.
        dtype: A floating element type.
        name: What its parameter's name begins with; None makes one up.

    Attributes:
        weight: ``(normalized_shape,)``.

    Raises:
        HetuError: If the width is no positive int, or the name is taken. A use of it refuses an ``eps`` below 0.
        DTypeError: If the dtype is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run"):
        ...     norm = hetu.nn.RMSNorm(8, name="norm")
        ...     norm(hetu.placeholder(hetu.float32, [3, 8], name="x"))
        hetu.Tensor(rms_norm_0.out: float32[3, 8])
    """

    def __init__(
        self, normalized_shape: int, eps: float | None = None, dtype: DType | Any = float32, name: str | None = None
    ) -> None:
        columns = width(normalized_shape, "normalized_shape", "nn.RMSNorm")
        name, kind = prefix(name, "nn.RMSNorm"), as_dtype(dtype)
        self.eps, self.weight = eps, parameter(1.0, [columns], kind, name=named(name, "weight"))

    def __call__(self, x: Tensor) -> Tensor:
        """Takes ``(..., normalized_shape)``, gives the same shape."""
        eps = self.eps
        if eps is None and isinstance(x, Tensor):
            eps = _EPS.get(x.dtype.name, 2.0**-23)
        return rms_norm(x, self.weight, 0.0 if eps is None else eps)
