"""Scripts of PKU's Hetu over hetu: the names and call forms of its Python interface, for what hetu does.

Change one line: ``import hetu as ht`` becomes ``from hetu.integrations import pku_hetu as ht``. Ops, element types and
symbols are hetu's own. What is made here is what Hetu calls in another way: graphs, their ``run``, placeholders whose
sizes are symbols, and the split of ``parallel_attn`` by an environment variable. ``docs/from-hetu.md`` lists what maps
to what, what differs and what is not there; asking for such a name raises an AttributeError that says what to use.

Example:
    >>> import numpy as np
    >>> from hetu.integrations import pku_hetu as ht
    >>> with ht.graph("define_and_run", create_new=True, prefix="example") as g:
    ...     x = ht.placeholder(ht.float32, [4, 2], name="x")
    ...     w = ht.parameter(1.0, [2, 1], name="w")
    ...     loss = ht.mean(ht.matmul(x, w))
    ...     train_op = ht.SGDOptimizer(0.5).minimize(loss)
    >>> feeds = {x: [np.ones((3, 2), np.float32), np.ones((5, 2), np.float32)]}
    >>> g.run(loss, [loss, train_op], feeds, num_micro_batches=2, run_level=ht.run_level("update"))[0]
    tensor([2., 2.])
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch

import hetu
from hetu.arguments import choice, flag, index, int_of, integer, items, mapping, refuse, shown, text
from hetu.arguments import device as as_device
from hetu.errors import HetuError, StrategyError, caller
from hetu.integrations.pku_hetu.optimizers import AdamOptimizer, SGDOptimizer

__all__ = [
    "AdamOptimizer",
    "Graph",
    "IntSymbol",
    "SGDOptimizer",
    "data_transfer",
    "from_numpy",
    "graph",
    "parallel_attn",
    "placeholder",
    "run_level",
]

SPLIT_PATTERN = "HETU_PARALLEL_ATTN_SPLIT_PATTERN"
"""The environment variable that says how ``parallel_attn`` cuts sequences: NORMAL (the default), SYM or STRIPE."""

_LEVELS = ("update", "grad", "compute_only", "alloc", "topo")
"""Hetu's levels of a run; a level's place is its number. The last two prepare what hetu never prepares by itself."""


_RUNS_OTHERS = {
    "grad_scale": "multiply the loss by it, or leave it out: bfloat16 under hetu.autocast needs no scale",
    "run_dict": "leave it out: nothing is kept between runs by hand",
    "save_checkpoint": "call hetu.save(g, path) after the run",
}
"""What Hetu's ``run`` takes and hetu's does not, and what to write instead."""


def __getattr__(name: str) -> Any:
    return getattr(hetu, name)  # its AttributeError says what Hetu's other names are called here


def run_level(type: str = "update") -> int:
    """The number of a level, which ``run`` takes.

    Args:
        type: ``"update"``, ``"grad"`` or ``"compute_only"``.

    Returns:
        Its place in Hetu's list of levels.

    Raises:
        HetuError: If there is no such level, or it is ``"alloc"`` or ``"topo"``.

    Example:
        >>> run_level("update"), run_level("compute_only")
        (0, 2)
    """
    return _level(_LEVELS.index(choice(type, "type", _LEVELS, op="run_level")), "run_level")


def _level(level: Any, op: str) -> int:
    """A level that hetu has."""
    number = integer(level, "run_level", least=0, most=len(_LEVELS) - 1, op=op)
    if number >= _LEVELS.index("alloc"):
        raise HetuError(
            f"run_level {_LEVELS[number]!r} prepares a run, and hetu has nothing to prepare",
            op=op,
            where=caller(),
            fix="leave this run out: the first one lowers the graph and makes the parameters",
        )
    return number


class IntSymbol(hetu.IntSymbol):
    """A size that runs give a value: :class:`hetu.IntSymbol`, with Hetu's ``reset_data``.

    Example:
        >>> size = IntSymbol(4)
        >>> size.reset_data(6)
        >>> size.data
        6
    """

    def reset_data(self, data: int) -> None:
        """Sets the default value; the same as ``set_data``.

        Raises:
            HetuError: For an expression, which Hetu would turn into an unknown of its own: make a new symbol.
        """
        self.set_data(data)


class Graph(hetu.Graph):
    """A graph whose ``run`` has Hetu's form. Make it by :func:`graph`.

    Attributes:
        graph: Itself, as Hetu's context has it.

    Example:
        >>> with graph("define_and_run", create_new=True, prefix="doubled") as g:
        ...     y = from_numpy([1.0, 2.0]) * 2
        >>> g.graph is g, g.run(y, [y])
        (True, [tensor([2., 4.])])
    """

    @property
    def graph(self) -> Graph:
        return self

    def run(  # type: ignore[override]  # Hetu's form: the loss comes first, and a list comes back
        self,
        loss: hetu.Tensor | Sequence[hetu.Tensor],
        fetches: hetu.Tensor | Sequence[hetu.Tensor] | Mapping[hetu.Tensor, Any] | None = None,
        feed_dict: Mapping[hetu.Tensor, Any] | None = None,
        int_symbol_dict: Mapping[hetu.IntSymbol, Any] | None = None,
        num_micro_batches: int = 1,
        cur_strategy_id: int = 0,
        run_level: int | str = 0,
        *,
        compute_strategy_id: int | None = None,
        optimize_strategy_id: int | None = None,
        **others: Any,
    ) -> list[Any]:
        """Computes tensors: ``run(loss, fetches, feed_dict, ...)``, or ``run(fetches, feed_dict)``.

        Args:
            loss: What the gradients are those of. hetu knows it from ``minimize``; it is not fetched for being named.
            fetches: A tensor, or a list of them.
            feed_dict: Placeholders' values: an array, or a list with one array per micro-batch.
            int_symbol_dict: Values of leaf symbols: an int, or a list with one per micro-batch.
            num_micro_batches: How many micro-batches are run one after the other.
            cur_strategy_id: The strategy's index.
            run_level: A number that :func:`run_level` gives, or its name.
            compute_strategy_id: The strategy's index in Hetu's newer form, in place of ``cur_strategy_id``.
            optimize_strategy_id: Has no effect: where parameters lie depends on no strategy.
            **others: ``num_tokens``, which has no effect. Hetu's others are refused with what to write here.

        Returns:
            One value per fetch. Those of several micro-batches are joined along the first dimension; numbers become a
            vector. The value of what ``minimize`` gave is the loss of the run.

        Raises:
            HetuError: What :meth:`hetu.Graph.run` refuses, before anything is computed.
        """
        if fetches is None or isinstance(fetches, Mapping):  # run(fetches, feed_dict)
            fetches, feed_dict = loss, fetches if feed_dict is None else feed_dict  # type: ignore[assignment]
        wanted = [fetches] if isinstance(fetches, hetu.Tensor) else items(fetches, "fetches", "tensors", op="run")
        cur_strategy_id = self._strategy(cur_strategy_id, compute_strategy_id, optimize_strategy_id)
        for name in others.keys() - {"num_tokens"}:
            fix = _RUNS_OTHERS.get(name, "leave it out")
            raise HetuError(f"run takes no {name} here", op="run", where=caller(), fix=fix)
        level = _LEVELS.index(run_level) if isinstance(run_level, str) and run_level in _LEVELS else run_level
        feeds, sizes = (
            {} if given is None else mapping(given, name, of, op="run")
            for given, name, of in (
                (feed_dict, "feed_dict", "placeholders and arrays"),
                (int_symbol_dict, "int_symbol_dict", "symbols and ints"),
            )
        )
        if int_of(num_micro_batches) == 1:
            feeds, sizes = _unlisted(feeds), _unlisted(sizes)
        values = super().run(
            wanted,
            feeds,
            int_symbol_dict=sizes,
            strategy=cur_strategy_id,
            num_micro_batches=num_micro_batches,
            run_level=_LEVELS[_level(level, "run")],
        )
        return [_joined(value) for value in values]

    def _strategy(self, current: Any, compute: Any, optimize: Any) -> int:
        """The index of the strategy that Hetu's two forms name."""
        named = {"cur_strategy_id": current, "compute_strategy_id": compute, "optimize_strategy_id": optimize}
        checked = {
            name: index(value, name, self.num_strategy, op="run", error=StrategyError)
            for name, value in named.items()
            if value is not None
        }
        return checked.get("compute_strategy_id", checked["cur_strategy_id"])


def _unlisted(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Values of the only micro-batch, out of lists of one."""
    inner = (int, hetu.Shards, torch.Tensor)
    return {
        key: value[0]
        if isinstance(value, list)
        and len(value) == 1
        and (isinstance(value[0], inner) or hasattr(value[0], "__array__"))
        else value
        for key, value in given.items()
    }


def _joined(value: Any) -> Any:
    """What micro-batches gave, as one value."""
    if not isinstance(value, list):
        return value
    if isinstance(value[0], hetu.Shards):
        return hetu.Shards([_joined(list(of_one)) for of_one in zip(*value, strict=True)])
    return torch.cat([torch.atleast_1d(one) for one in value])


class _Key(NamedTuple):
    """What Hetu calls a graph by."""

    prefix: str
    kind: str


_graphs: dict[_Key, Graph] = {}
"""The graphs that :func:`graph` made, as long as nobody made others of the same name."""


class _Temporary(Graph):
    """A graph that is forgotten when its block is left."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, error, tb)
        for key in [key for key, kept in _graphs.items() if kept is self]:
            del _graphs[key]


def graph(
    g: str | Graph, create_new: bool = False, prefix: str = "default", num_strategy: int = -1, tmp: bool = False
) -> Graph:
    """Makes a graph, or finds one again, to be entered by ``with``.

    Args:
        g: ``"define_and_run"``, or a graph that was made before.
        create_new: Whether to make a new one of this prefix. The prefix ``"default"`` has one without being asked.
        prefix: What it is found by later.
        num_strategy: How many strategies its ``parallel_attn`` ops list; -1 for one, or for what the graph has.
        tmp: Forget it when its block is left; only with ``create_new``.

    Returns:
        The graph. Unlike Hetu's, a block within the block of another graph builds its own.

    Raises:
        HetuError: If there is no graph of this prefix, or ``tmp`` and ``create_new`` don't go together.
        StrategyError: If the graph that is found has another number of strategies.

    Example:
        >>> g = graph("define_and_run", create_new=True, prefix="found")
        >>> graph("define_and_run", prefix="found") is g
        True
    """
    new, forget = flag(create_new, "create_new", op="graph"), flag(tmp, "tmp", op="graph")
    count = integer(num_strategy, "num_strategy", least=-1, op="graph", error=StrategyError)
    if isinstance(g, Graph):
        return _found(g, count, new)
    if forget and not new:
        raise HetuError("tmp needs a new graph", op="graph", where=caller(), fix="give create_new=True")
    key = _Key(text(prefix, "prefix", op="graph"), choice(g, "g", ("define_and_run", "eager"), op="graph"))
    if not new and key in _graphs:
        return _found(_graphs[key], count, new)
    if not new and key.prefix != "default":
        raise HetuError(
            f"there is no graph {key.kind!r} of prefix {shown(prefix)}",
            op="graph",
            where=caller(),
            fix="give create_new=True",
        )
    made = (_Temporary if forget else Graph)(key.kind, num_strategy=max(count, 1), name=f"{key.prefix}_{key.kind}")
    _graphs[key] = made
    return made


def _found(known: Graph, count: int, new: bool) -> Graph:
    """A graph that was made before, if it is what was asked for."""
    if new:
        raise HetuError("a graph can't be made new", op="graph", where=caller(), fix='give "define_and_run" as g')
    if count >= 1 and count != known.num_strategy:
        raise StrategyError(
            f"{known.name} has {known.num_strategy} strategies, not {shown(count)}",
            op="graph",
            where=caller(),
            fix="give num_strategy when the graph is made",
        )
    return known


def placeholder(dtype: Any, shape: Sequence[int | hetu.IntSymbol], name: str | None = None) -> hetu.Tensor:
    """Makes a tensor that each run feeds. As in Hetu its sizes may change from run to run.

    Args:
        dtype: The element type.
        shape: One size per dimension. Ints become symbols with that default, which ``x.symbolic_shape`` gives; the last
            one of a floating placeholder of two or more dimensions stays as it is, for it counts features.
        name: The node's name; made up if None.

    Returns:
        The tensor.

    Example:
        >>> with graph("define_and_run", create_new=True, prefix="fed") as g:
        ...     x = placeholder(hetu.float32, [4, 2], name="x")
        >>> x.symbolic_shape[0].data, x.shape[1]
        (4, 2)
    """
    sizes = items(shape, "shape", "a list of sizes", op="placeholder")
    kept = len(sizes) - 1 if len(sizes) > 1 and hetu.as_dtype(dtype).is_floating else len(sizes)
    return hetu.placeholder(
        dtype,
        [size if i >= kept else _as_symbol(size, f"shape[{i}]") for i, size in enumerate(sizes)],
        name,
    )


def _as_symbol(size: Any, name: str) -> hetu.IntSymbol:
    """A symbol with an int as its default; a string would be its name."""
    return size if isinstance(size, hetu.IntSymbol) else IntSymbol(integer(size, name, least=0, op="placeholder"))


def from_numpy(array: Any) -> hetu.Tensor:
    """Makes a constant of the current graph.

    Args:
        array: A numpy array, or what numpy makes one of.

    Returns:
        The constant.

    Example:
        >>> with graph("define_and_run", create_new=True, prefix="constant"):
        ...     from_numpy([1, 2]).shape
        (2,)
    """
    return hetu.constant(array)


def data_transfer(dtype: Any, input: hetu.Tensor, device: str | None = None) -> hetu.Tensor:
    """Casts a tensor. hetu keeps all of a graph on one device, so the device can only be the graph's.

    Args:
        dtype: The element type.
        input: The tensor.
        device: The graph's device, or None for it.

    Returns:
        The tensor in that type.

    Raises:
        HetuError: If it is another one.

    Example:
        >>> with graph("define_and_run", create_new=True, prefix="cast"):
        ...     data_transfer(hetu.float16, from_numpy([1.0])).dtype
        hetu.float16
    """
    if not isinstance(input, hetu.Tensor):
        refuse(input, "input", "a tensor of a graph", op="data_transfer")
    wanted = input.graph.device or ("cuda" if torch.cuda.is_available() else "cpu")
    other = as_device(device, op="data_transfer")
    if other is not None and torch.device(other).type != torch.device(wanted).type:
        raise HetuError(
            f"the graph runs on {wanted}, and its tensors can't be moved to {shown(other)}",
            op="data_transfer",
            where=caller(),
            fix="leave the device out",
        )
    return hetu.cast(input, dtype)


def parallel_attn(qkv: hetu.Tensor, *args: Any, **kwargs: Any) -> list[hetu.Tensor]:
    """:func:`hetu.parallel_attn`, whose split is the one that ``HETU_PARALLEL_ATTN_SPLIT_PATTERN`` names.

    Args:
        qkv: As :func:`hetu.parallel_attn` takes it.
        *args: What that takes.
        **kwargs: What that takes; ``split`` goes before the variable.

    Returns:
        What that returns.

    Example:
        >>> with graph("define_and_run", create_new=True, prefix="attention"):
        ...     qkv = placeholder(hetu.float32, [4, 24])
        ...     parallel_attn(qkv, 8, 1, [[4]], [[0]])[0].shape[1]
        8
    """
    pattern = os.environ.get(SPLIT_PATTERN, "NORMAL")
    patterns = {split.upper(): split for split in ("normal", "sym", "stripe")}
    if pattern not in patterns:
        raise StrategyError(
            f"{SPLIT_PATTERN} is {shown(pattern)}",
            op="parallel_attn",
            where=caller(),
            fix=f"set it to {', '.join(patterns)}, or call hetu.parallel_attn with a split",
        )
    return hetu.parallel_attn(qkv, *args, **{"split": patterns[pattern], **kwargs})
