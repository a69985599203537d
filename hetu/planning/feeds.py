"""What the user feeds: read, checked and spread over the pipelines. Knows torch tensors without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hetu.arguments import MAX_COUNT, integer, is_dense, is_torch, items, mapping, refuse, shown
from hetu.errors import BindingError, DTypeError, HetuError, StrategyError, caller
from hetu.graph import Role, Tensor
from hetu.parallel import groups_of
from hetu.parallel.layout.strategy import by_group
from hetu.planning.arrays import host_array
from hetu.planning.binder import GIVEN
from hetu.planning.pipelines import Pipelines
from hetu.planning.subgraph import Subgraph
from hetu.shards import Shards
from hetu.symbols import IntSymbol, as_symbol, check_leaf

Feeds = Mapping[Tensor, Any]
Symbols = Mapping[IntSymbol, Any]
FeedReader = Callable[[Pipelines, Symbols], "FeedSet"]
"""Gives the feeds of a strategy's pipelines, of which the groups may depend on symbols."""


@dataclass(slots=True)
class FeedSet:
    """The arrays of one run.

    Attributes:
        tensors: The placeholders: those of the subgraph, and those of its witnesses that are fed.
        arrays: For each pipeline, each placeholder's array.
        shapes: For each pipeline the shapes, in the order of ``tensors``.
        host_bytes: The contents of the arrays that planning reads: with the shapes, all that a plan depends on.
        unseen: The names of placeholders and constants that lie on a device, and whose values have to be indices.
    """

    tensors: tuple[Tensor, ...]
    arrays: tuple[dict[Tensor, Any], ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    host_bytes: tuple[bytes, ...]
    unseen: frozenset[str] = frozenset()

    @property
    def num_pipelines(self) -> int:
        return len(self.arrays)

    def restricted(self, subgraph: Subgraph) -> FeedSet:
        """What a part of the graph needs of these."""
        kept = [i for i, tensor in enumerate(self.tensors) if tensor in subgraph.feeds + subgraph.witnesses]
        tensors = tuple(self.tensors[i] for i in kept)
        arrays = tuple({tensor: row[tensor] for tensor in tensors if tensor in row} for row in self.arrays)
        shapes = tuple(tuple(row[i] for i in kept) for row in self.shapes)
        return FeedSet(tensors, arrays, shapes, tuple(_bytes(subgraph, arrays)))


@cache  # asked of every feed too, and isinstance takes longer with an abstract base class
def _is_spread_type(kind: Any) -> bool:
    """Whether a value of that type says by itself what each pipeline gets: shards do, and dicts by context group."""
    return issubclass(kind, (Shards, Mapping))


@cache
def _name_of(torch_dtype: Any) -> str:
    return str(torch_dtype)[6:]


def read_feeds(subgraph: Subgraph, feed_dict: Feeds, pipelines: Pipelines, symbols: Symbols) -> FeedSet:
    """Checks what was fed, and gives every pipeline its arrays.

    Args:
        subgraph: What will be computed; only its placeholders are looked at.
        feed_dict: What the user fed.
        pipelines: The strategy's pipelines.
        symbols: ``int_symbol_dict``, for groups that are symbols.

    Raises:
        BindingError: If a placeholder is not fed, or something else is.
        DTypeError: If an array's element type is not the placeholder's.
        StrategyError: If there are not as many shards as pipelines, or as many entries of a dict as context groups, or
            one array is fed where each pipeline needs its own rows.
    """
    tensors = _fed(subgraph, feed_dict)
    values = [feed_dict[tensor] for tensor in tensors]
    spread = [value for value in values if _is_spread_type(type(value))]  # type: ignore[arg-type]
    count = pipelines.count or max([len(value) for value in spread if isinstance(value, Shards)], default=1)
    if count == 1 and not spread:
        arrays: tuple[dict[Tensor, Any], ...] = (dict(zip(tensors, map(read_array, tensors, values), strict=True)),)
    else:
        spread = [
            _spread(tensor, value, count, pipelines, symbols) for tensor, value in zip(tensors, values, strict=True)
        ]
        arrays = tuple(dict(zip(tensors, row, strict=True)) for row in zip(*spread, strict=True)) or ({},) * count
    shapes = tuple([tuple([array.shape for array in row.values()]) for row in arrays])
    return FeedSet(tensors, arrays, shapes, tuple(_bytes(subgraph, arrays)))


def _fed(subgraph: Subgraph, feed_dict: Feeds) -> tuple[Tensor, ...]:
    """The placeholders that are fed and looked at, none of those missing that must be fed."""
    keys = tuple(feed_dict)
    found = subgraph.fed.get(keys)
    if found is None:
        found = subgraph.fed[keys] = _find_fed(subgraph, feed_dict)
    return found


def _find_fed(subgraph: Subgraph, feed_dict: Feeds) -> tuple[Tensor, ...]:
    check_keys(feed_dict)
    missing = [tensor for tensor in subgraph.feeds if tensor not in feed_dict]
    if missing:
        raise BindingError(
            f"placeholder {missing[0].name} is not fed",
            op="run",
            where=missing[0].op.where,
            fix=f"add {', '.join(tensor.name for tensor in missing)} to feed_dict",
        )
    return subgraph.feeds + tuple(tensor for tensor in subgraph.witnesses if tensor in feed_dict)


def check_keys(feed_dict: Feeds) -> None:
    """Refuses what is no placeholder."""
    for key in feed_dict:
        if not isinstance(key, Tensor) or key.op.role is not Role.PLACEHOLDER:
            what = f"can't feed {shown(key)} in feed_dict: it is no placeholder"
            fix = "pass the tensor that hetu.placeholder(...) gave"
            raise BindingError(what, op="run", where=caller(), fix=fix)


def shard_count(feed_dict: Feeds) -> int | None:
    """How many shards the values of a ``feed_dict`` have; None if none is sharded."""
    counts = [len(value) for value in feed_dict.values() if isinstance(value, Shards)]
    return max(counts, default=None)


def read_own_feeds(
    subgraph: Subgraph, feed_dict: Feeds, own: Sequence[int], pipelines: Pipelines, symbols: Symbols
) -> tuple[tuple[Tensor, ...], dict[int, dict[Tensor, Any]]]:
    """What a process feeds the pipelines that it runs, where others run the rest.

    Args:
        subgraph: What will be computed.
        feed_dict: What the user fed: this process's own arrays, or shards of all pipelines.
        own: The pipelines that run here.
        pipelines: All of the strategy's.
        symbols: ``int_symbol_dict``, for groups that are symbols.

    Returns:
        The placeholders, and each own pipeline's arrays.

    Raises:
        BindingError, DTypeError, StrategyError: As :func:`read_feeds`.
    """
    if not own:
        check_keys(feed_dict)
        return (), {}
    arrays: dict[int, dict[Tensor, Any]] = {r: {} for r in own}
    tensors = _fed(subgraph, feed_dict)
    for tensor in tensors:
        value = feed_dict[tensor]
        if isinstance(value, Shards):
            _check_shards(tensor, value, pipelines.count or len(value))
        elif isinstance(value, Mapping):
            value = _of_groups(tensor, value, pipelines, symbols)
        else:  # this process's own array
            if tensor in pipelines.own_rows and len(own) > 1:
                _refuse_whole_rows(tensor, f"one array for the {len(own)} pipelines that run here")
            value = dict.fromkeys(own, read_array(tensor, value))
        for r in own:
            arrays[r][tensor] = read_array(tensor, value[r])
    return tensors, arrays


def host_values(subgraph: Subgraph, arrays: Mapping[Tensor, Any]) -> dict[Tensor, NDArray[Any]]:
    """What planning reads of a pipeline's arrays, on the host."""
    return {tensor: np.ascontiguousarray(host_array(arrays[tensor])) for tensor in subgraph.host_feeds}


def _bytes(subgraph: Subgraph, arrays: Sequence[Mapping[Tensor, Any]]) -> list[bytes]:
    """Contents of what planning reads; an array that several pipelines share is read once."""
    if len(arrays) == 1:
        return [host_array(arrays[0][tensor]).tobytes() for tensor in subgraph.host_feeds]
    seen: dict[int, bytes] = {}
    for tensor in subgraph.host_feeds:
        for row in arrays:
            array = row[tensor]
            if id(array) not in seen:
                seen[id(array)] = host_array(array).tobytes()
    return [seen[id(row[tensor])] for tensor in subgraph.host_feeds for row in arrays]


def _spread(tensor: Tensor, value: Any, count: int, pipelines: Pipelines, symbols: Symbols) -> list[Any]:
    """One array per pipeline; pipelines that get the same share one."""
    if isinstance(value, Shards):
        _check_shards(tensor, value, count)
        return [read_array(tensor, item) for item in value]
    if isinstance(value, Mapping):
        return _of_groups(tensor, value, pipelines, symbols)
    if tensor in pipelines.own_rows and count > 1:
        _refuse_whole_rows(tensor, f"one array for the {count} pipelines of strategy {pipelines.strategy}")
    return [read_array(tensor, value)] * count


def _of_groups(tensor: Tensor, value: Mapping[Any, Any], pipelines: Pipelines, symbols: Symbols) -> list[Any]:
    """One array per pipeline, of a dict with one per context group."""
    if pipelines.groups is None:
        raise StrategyError(
            f"{tensor.name} was fed a dict by context groups, but it is not said which group each pipeline is in",
            op="run",
            where=caller(),
            fix="give hetu.graph the strategies, and run the strategy by index or name; or feed hetu.Shards",
        )
    leaves = {leaf for expr in pipelines.groups for leaf in as_symbol(expr).leaves}
    known = {**{leaf: leaf.default for leaf in leaves if leaf.default is not None}, **symbols}
    groups = [as_symbol(expr).evaluate(known) for expr in pipelines.groups]
    by_value = groups_of(groups)
    given = by_group(value, tuple(by_value), f"arrays fed to {tensor.name}", op="run")
    if tensor in pipelines.own_rows and len(by_value) < len(groups):
        _refuse_whole_rows(tensor, "one array per context group, of which one has several pipelines")
    arrays = {group: read_array(tensor, item) for group, item in zip(by_value, given, strict=True)}
    return [arrays[group] for group in groups]


def _refuse_whole_rows(tensor: Tensor, fed: str) -> NoReturn:
    raise StrategyError(
        f"{tensor.name} was fed {fed}, but each pipeline needs its own rows",
        op="run",
        where=caller(),
        fix="feed hetu.Shards(layout.scatter(x)) with layout = g.layout(...) of the same strategy",
    )


def _check_shards(tensor: Tensor, value: Shards, count: int) -> None:
    if len(value) != count:
        raise StrategyError(
            f"{tensor.name} was fed {len(value)} shards, but the strategy has {count} pipelines",
            op="run",
            where=caller(),
            fix="feed one array per pipeline: layout.scatter(x) of the same strategy makes them",
        )


def read_array(tensor: Tensor, value: Any) -> Any:
    """One fed array, of the placeholder's element type.

    Ints are converted where all values fit, since numpy and torch make int64 by themselves. Floating torch tensors must
    have it. Floating numpy arrays are rounded to it, since numpy makes float64 by itself and has no bfloat16; lists and
    numbers are literals and take it as they are.
    """
    if is_torch(value):
        if not is_dense(value):
            _refuse_unreadable(tensor, value)
        return value if _name_of(value.dtype) == tensor.dtype.name else _other_ints(tensor, value)
    if isinstance(value, np.ma.MaskedArray):
        raise _unreadable(tensor, "a masked array, whose mask would be lost")
    literal = not isinstance(value, np.ndarray)
    array = value if not literal else _literal(tensor, value)
    if _is_native(array.dtype, tensor.dtype.name):
        return array
    if array.dtype.name == tensor.dtype.name:  # of the other byte order
        return array.astype(array.dtype.newbyteorder("="))
    kind = {"f": "float", "i": "int", "u": "int", "b": "bool"}.get(array.dtype.kind)
    fits = kind == tensor.dtype.kind or (literal and kind == "int" and tensor.dtype.is_floating) or _is_empty(array)
    if not fits:
        raise _wrong_dtype(tensor, f"{tensor.name} is {tensor.dtype.name}, but {array.dtype} values were fed")
    if tensor.dtype.name == "bfloat16":
        return array.astype(np.float32)  # exactly what rounding to bfloat16 starts from, on the device
    converted = array.astype(tensor.dtype.name)
    if tensor.dtype.kind == "int" and not np.array_equal(converted, array):
        raise _wrong_dtype(tensor, f"{tensor.name} is {tensor.dtype.name}, but values that don't fit were fed")
    return converted


@cache  # every fed array is asked, and numpy takes a microsecond to name a type
def _is_native(dtype: np.dtype[Any], name: str) -> bool:
    return dtype.name == name and bool(dtype.isnative)


def _refuse_unreadable(tensor: Tensor, value: Any) -> NoReturn:
    if value.is_meta:
        kind, fix = "meta tensor, which has no values", "feed a tensor that has some"
    elif value.is_nested:
        kind, fix = "nested tensor", "feed its rows one after the other: torch.cat(x.unbind())"
    else:
        kind, fix = f"tensor of layout {value.layout}", "make it dense first: x.to_dense()"
    raise BindingError(f"{tensor.name} was fed a {kind}", op="run", where=tensor.op.where, fix=fix)


def _literal(tensor: Tensor, value: Any) -> NDArray[Any]:
    """A list or a number as an array; tensors in a list might be anything, and shards have a type of their own."""
    try:
        if not (isinstance(value, (list, tuple)) and any(is_torch(item) for item in value)):
            return np.asarray(value)
        why = "it holds tensors"
    except Exception as failure:  # numpy asks the value itself, which may raise anything
        why = str(failure).partition(".")[0] or type(failure).__name__
    what = f"{tensor.name} was fed a {type(value).__name__} that is no array: {why}"
    fix = "feed one array, or hetu.Shards([...]) with one per pipeline"
    raise BindingError(what, op="run", where=caller(), fix=fix)


_TORCH_CASTS = {"uint8": "byte", "int8": "char", "int16": "short", "int32": "int", "int64": "long"}
"""The methods of torch tensors that convert them."""


def _other_ints(tensor: Tensor, value: Any) -> Any:
    """A torch tensor of ints as the placeholder has them, where all values fit."""
    if _name_of(value.dtype) not in _TORCH_CASTS or tensor.dtype.kind != "int":
        raise _wrong_dtype(tensor, f"{tensor.name} is {tensor.dtype.name}, but a {value.dtype} tensor was fed")
    converted = getattr(value, _TORCH_CASTS[tensor.dtype.name])()
    if not bool((converted == value).all()):
        raise _wrong_dtype(tensor, f"{tensor.name} is {tensor.dtype.name}, but values that don't fit were fed")
    return converted


def _is_empty(array: NDArray[Any]) -> bool:
    """Whether an array of plain elements has none: a list without items has no type of its own."""
    return array.size == 0 and array.dtype.kind in "fiubO"


def _unreadable(tensor: Tensor, fed: str) -> BindingError:
    what = f"{tensor.name} was fed {fed}"
    return BindingError(what, op="run", where=tensor.op.where, fix="feed a dense array: to_dense() or filled(...)")


def _wrong_dtype(tensor: Tensor, what: str) -> DTypeError:
    name = tensor.dtype.name
    return DTypeError(what, op="run", where=tensor.op.where, fix=f"convert it first: .to(torch.{name}) or .astype(...)")


def tensors_of(fetches: Any) -> tuple[Tensor, ...]:
    """What a run is asked for, as a tuple: a graph tensor, or a list of them."""
    given = (fetches,) if isinstance(fetches, Tensor) else fetches
    if not isinstance(given, (list, tuple)):
        given = items(given, "fetches", _FETCHES, op="run", fix=f"pass {_FETCHES}")
    for item in given:
        if not isinstance(item, Tensor):
            refuse(item, "each of fetches", "a graph tensor", op="run", fix=f"pass {_FETCHES}")
    return tuple(given)


_FETCHES = "a graph tensor, or a flat list of them"


def split_micro_batches(
    feed_dict: Feeds | None, symbols: Symbols | None, count: int
) -> list[tuple[Feeds, Mapping[IntSymbol, int]]]:
    """What each micro-batch is fed, and its ``int_symbol_dict``: an item of every list, and everything else as it is.

    Raises:
        HetuError: If a list has another length than there are micro-batches, or there are none.
        BindingError: If a symbol is bound to what it can't be.
    """
    feeds, given = {} if feed_dict is None else feed_dict, {} if symbols is None else symbols
    if type(feeds) is not dict:  # nearly always they are
        feeds = mapping(feeds, "feed_dict", "placeholders and arrays", op="run")
    if type(given) is not dict:
        given = mapping(given, "int_symbol_dict", "symbols and ints", op="run")
    if type(count) is not int or count != 1:
        count = integer(count, "num_micro_batches", least=1, most=MAX_COUNT, op="run")
    if count == 1:
        return [(feeds, _read_symbols(given))]
    for key, value in (*feeds.items(), *given.items()):
        if isinstance(value, list) and len(value) != count:
            raise HetuError(
                f"{getattr(key, 'name', key)} was given a list of {len(value)} for {count} micro-batches",
                op="run",
                where=caller(),
                fix="give a list with one value per micro-batch, or one value for all",
            )

    def part(values: Mapping[Any, Any], i: int) -> dict[Any, Any]:
        return {key: value[i] if isinstance(value, list) else value for key, value in values.items()}

    return [(part(feeds, i), _read_symbols(part(given, i))) for i in range(count)]


def _read_symbols(symbols: Symbols) -> Mapping[IntSymbol, int]:
    """The values of symbols as Python's ints: 1.0 and True would be found under the key of 1.

    What are Python's ints already is checked where it is bound, and not by every run.
    """
    for value in symbols.values():
        if type(value) is not int:
            return {leaf: check_leaf(leaf, value, GIVEN) for leaf, value in symbols.items()}
    return symbols
