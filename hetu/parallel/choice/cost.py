"""The cost of a strategy, in the symbols of its lengths: what users ask :meth:`hetu.Strategy.cost` for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hetu.arguments import MAX_COUNT, choice, head_counts, int_of, integer, mapping, refuse, shown
from hetu.dtypes import as_dtype
from hetu.errors import StrategyError, UnboundSymbolError, caller
from hetu.parallel.choice.counts import counts_of
from hetu.parallel.choice.numbers import numbers
from hetu.parallel.choice.work import WORK, GroupCounts, Work
from hetu.parallel.layout.layout import Layout
from hetu.parallel.layout.splits import SPLITS
from hetu.parallel.layout.strategy import Strategy, groups_of
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.rules import Size
from hetu.parallel.methods import AUTO
from hetu.parallel.methods.hosts import Hosts
from hetu.parallel.plan.heads import Heads
from hetu.parallel.topology import Topology, check_topology
from hetu.symbols import IntSymbol, as_size, as_symbol, check_leaf
from hetu.symbols.compile import compile_exprs

_OP, _GIVEN = "cost", "int_symbol_dict"
Links = dict[tuple[int, int], Any]


@dataclass(frozen=True, slots=True)
class Amounts:
    """What the forward of an attention takes, as ints: what :class:`~hetu.parallel.Cost` counts from its plan.

    Attributes:
        flops: Of each pipeline.
        link_bytes: Bytes from one pipeline to another; those that send nothing have no entry.
        peak_bytes: Of each pipeline.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> cost = hetu.Strategy([s, s], [0, 0]).cost(num_heads=1, num_kv_heads=1, head_dim=64, dtype="bfloat16")
        >>> cost.evaluate({s: 2})
        Amounts(flops=(768, 1792), link_bytes={(0, 1): 512}, peak_bytes=(1544, 2056))
    """

    flops: tuple[int, ...]
    link_bytes: dict[tuple[int, int], int]
    peak_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DocumentCost:
    """What one document of a pack adds, in symbols of its pieces. Summed over documents it is the pack's.

    Attributes:
        pieces: A symbol per pipeline of the group: tokens of the document that it holds.
        flops: Of each of these pipelines.
        link_bytes: Bytes from one of the strategy's pipelines to another.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> cost = hetu.Strategy([s, s], [0, 0]).cost(num_heads=1, num_kv_heads=1, head_dim=64, dtype="bfloat16")
        >>> one = cost.document()
        >>> one.pieces, one.link_bytes
        ((IntSymbol(piece0), IntSymbol(piece1)), {(0, 1): IntSymbol(256*piece0*min(piece1, 1))})
    """

    pieces: tuple[IntSymbol, ...]
    flops: tuple[Size, ...]
    link_bytes: dict[tuple[int, int], Size]


@dataclass(frozen=True, eq=False)
class StrategyCost:
    """What the forward of an attention takes under a strategy, exactly: expressions in the strategy's symbols.

    They are those of a batch without packing. What a pack takes depends on its documents: :meth:`evaluate` counts it,
    and :meth:`document` says what one of them adds. Every expression is an int or an :class:`~hetu.IntSymbol`, whose
    ``expr`` is sympy's.

    Source: FLOPs are counted as :class:`~hetu.parallel.Cost` does: Dao, "FlashAttention-2", 2023, section 4.1.

    Attributes:
        strategy: The strategy.
        heads: Widths of a token's row.
        split: How sequences lie over their group.
        mask: Which keys a query sees.
        method: How tokens move.
        batch: Sequences of each group.
        topology: Which pipelines share a host; None if all do.
        flops: Of each pipeline: ``4 * head_dim`` per pair and query head.
        link_bytes: Bytes from one pipeline to another, of those that may send any.
        peak_bytes: Most bytes that each pipeline holds at a time, as ``plan.peak_bytes``.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> cost = hetu.Strategy([s, s], [0, 0]).cost(num_heads=1, num_kv_heads=1, head_dim=64, dtype="bfloat16")
        >>> cost.flops[0]
        IntSymbol(256*((s*(s + 1))//2))
    """

    strategy: Strategy
    heads: Heads
    split: str
    mask: Mask
    method: str
    batch: Size
    topology: Topology | None
    flops: tuple[Size, ...]
    link_bytes: dict[tuple[int, int], Size]
    peak_bytes: tuple[Size, ...]
    _compiled: list[Callable[[Mapping[IntSymbol, int]], Amounts]] = field(default_factory=list, repr=False)

    def evaluate(self, int_symbol_dict: Mapping[IntSymbol, int] | None = None, cu_seqlens: Any = None) -> Amounts:
        """The amounts for given values of the symbols, or for a pack.

        The expressions are compiled at the first call; later calls take microseconds.

        Args:
            int_symbol_dict: Values of the symbols; those that are left out have their default.
            cu_seqlens: Documents of each group, as :meth:`hetu.Layout.build` takes them. They are counted document by
                document, as ints.

        Raises:
            UnboundSymbolError: If a symbol has no value.
            BindingError: If a value is outside of its symbol's range, or the documents don't fit the lengths.
            StrategyError: If a length comes out negative, or the batch below 1; of a pack, if it is not 1.
        """
        given = {} if int_symbol_dict is None else mapping(int_symbol_dict, _GIVEN, "symbols and ints", op=_OP)
        values = {leaf: check_leaf(leaf, value, _GIVEN) for leaf, value in given.items()}
        if cu_seqlens is not None:
            return self._of_pack(values, cu_seqlens)
        if not self._compiled:
            self._compiled.append(self._compile())
        return self._compiled[0](values)

    def document(self, group: int | None = None) -> DocumentCost:
        """What a document of a pack adds, as expressions in its pieces.

        Args:
            group: The value of its context group; may be left out where there is one.

        Raises:
            StrategyError: If there is no such group.
        """
        found = groups_of(constant_groups(self.strategy))
        if group is None and len(found) == 1:
            (group,) = found
        number = int_of(group)
        if number is None or number not in found:
            names = ", ".join(map(str, found))
            _refuse(f"there is no context group {shown(group)}", f"name one of {names}")
        members = found[number]
        pieces = tuple(IntSymbol(f"piece{r}") for r in members)
        work = self._work(members, [[piece] for piece in pieces], self.mask)
        return DocumentCost(pieces, tuple(map(_size, work.flops)), _moved(members, work))

    def _work(self, members: tuple[int, ...], pieces: Any, mask: Mask) -> Work:
        counts, hosts = counts_of(numbers(pieces), self.split, mask), Hosts.of(members, self.topology)
        return WORK[self.method](GroupCounts(counts, self.heads, hosts=hosts))

    def _of_pack(self, values: Mapping[IntSymbol, int], cu_seqlens: Any) -> Amounts:
        def value(size: IntSymbol) -> int:
            return size.evaluate(_with_values(size.leaves, values))

        lens, groups = self.strategy.evaluate(value)
        weighs = None if self.strategy.mask is None else self.strategy.mask.bound(value)
        batch = self.batch if isinstance(self.batch, int) else value(self.batch)
        layout = Layout.build(lens, groups, split=self.split, batch=batch, cu_seqlens=cu_seqlens, mask=weighs)
        mask = self.mask.bound(value)
        flops, peak, links = [0] * len(lens), [0] * len(lens), Links()
        for group in layout.groups:
            work = self._work(group.members, group.pieces, mask)
            for member, r in enumerate(group.members):
                flops[r], peak[r] = int(work.flops[member]), int(work.peak[member])
            links |= _moved(group.members, work)
        return Amounts(tuple(flops), links, tuple(peak))

    def _compile(self) -> Callable[[Mapping[IntSymbol, int]], Amounts]:
        sizes = [as_symbol(size) for size in (*self.flops, *self.peak_bytes, *self.link_bytes.values())]
        lengths = [as_symbol(size) for size in (*self.strategy.lengths, self.batch)]
        leaves = tuple(dict.fromkeys(leaf for size in (*sizes, *lengths) for leaf in size.leaves))
        function, links = compile_exprs([*sizes, *lengths], leaves), list(self.link_bytes)
        count, end = len(self.flops), len(sizes)

        def evaluate(values: Mapping[IntSymbol, int]) -> Amounts:
            known = _with_values(leaves, values)
            found = function(*known.values())
            if min(found[end:-1]) < 0:
                self.strategy.evaluate(lambda size: size.evaluate(known))  # it says which length is negative
            _check_batch(found[-1])
            moved = {link: n for link, n in zip(links, found[2 * count : end], strict=True) if n}
            return Amounts(found[:count], moved, found[count : 2 * count])

        return evaluate

    def __str__(self) -> str:
        lines = [f"{self.method} under {self.split}, {self.mask.name}: {self.strategy}"]
        for r, (flops, peak) in enumerate(zip(self.flops, self.peak_bytes, strict=True)):
            lines += [f"  pipeline {r}: {flops} FLOPs", f"    at most {peak} bytes"]
        lines += [f"  from {a} to {b}: {count} bytes" for (a, b), count in sorted(self.link_bytes.items())]
        return "\n".join(lines)


def strategy_cost(
    strategy: Strategy,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    split: str,
    mask: Mask,
    method: str,
    batch: Size,
    topology: Topology | None = None,
) -> StrategyCost:
    """See :meth:`hetu.Strategy.cost`."""
    num_q, num_kv = head_counts(num_heads, num_kv_heads, most=MAX_COUNT, op=_OP, error=StrategyError)
    dim = integer(head_dim, "head_dim", least=1, most=MAX_COUNT, op=_OP)
    if not isinstance(mask, Mask):
        refuse(mask, "mask", "a hetu.Mask", op=_OP, error=StrategyError)
    choice(split, "split", tuple(SPLITS), op=_OP, error=StrategyError)
    choice(method, "method", ("auto", *WORK), op=_OP, error=StrategyError)
    times = as_size(batch, "batch", op=_OP, error=StrategyError)
    if isinstance(times, int):
        _check_batch(times)
    if topology is not None:
        check_topology(topology, strategy.num_pipelines, _OP)
    heads = Heads(num_q, num_kv, dim, as_dtype(dtype).itemsize)
    return cost_of(strategy, heads, split, mask, AUTO if method == "auto" else method, times, topology)


def cost_of(
    strategy: Strategy, heads: Heads, split: str, mask: Mask, method: str, batch: Size, topology: Topology | None
) -> StrategyCost:
    """:func:`strategy_cost` of checked arguments.

    Raises:
        StrategyError: If a group is a symbol, or the mask has no closed form.
    """
    flops: list[Any] = [0] * strategy.num_pipelines
    peak, links = list(flops), Links()
    for members in groups_of(constant_groups(strategy)).values():
        pieces = numbers([[strategy.lengths[r]] for r in members])
        counts, hosts = counts_of(pieces, split, mask), Hosts.of(members, topology)
        work = WORK[method](GroupCounts(counts, heads, batch, hosts))
        for member, r in enumerate(members):
            flops[r], peak[r] = _size(work.flops[member]), _size(work.peak[member])
        links |= _moved(members, work)
    return StrategyCost(strategy, heads, split, mask, method, batch, topology, tuple(flops), links, tuple(peak))


def _check_batch(batch: int) -> None:
    if batch < 1:
        _refuse(f"batch is {batch}, expected at least 1", "give each context group a sequence at least")


def _with_values(leaves: tuple[IntSymbol, ...], values: Mapping[IntSymbol, int]) -> dict[IntSymbol, int]:
    """The values of some leaves, in their order."""
    known = {leaf: values.get(leaf, leaf.default) for leaf in leaves}
    if None in known.values():
        names = ", ".join(str(leaf) for leaf, value in known.items() if value is None)
        fix = f"give {names} in int_symbol_dict, or a default"
        raise UnboundSymbolError(f"no value for {names}", op=_OP, where=caller(), fix=fix)
    return known  # type: ignore[return-value]


def constant_groups(strategy: Strategy) -> tuple[int, ...]:
    """A strategy's context groups, which must be known for its cost to be an expression.

    Raises:
        StrategyError: If one is a symbol.
    """
    for r, group in enumerate(strategy.groups):
        if not isinstance(group, int):
            what = f"the context group of pipeline {r} is the symbol {group}, and who attends to whom depends on it"
            _refuse(what, "give the groups as ints")
    return strategy.groups  # type: ignore[return-value]


def _moved(members: tuple[int, ...], work: Work) -> Links:
    """The links of a group that carry anything, by the strategy's pipelines."""
    sizes = {
        (members[i], members[j]): _size(size) for i, row in enumerate(work.links.tolist()) for j, size in enumerate(row)
    }
    return {link: size for link, size in sizes.items() if isinstance(size, IntSymbol) or size}


def _size(count: Any) -> Size:
    if isinstance(count, IntSymbol):
        return count if count.constant is None else count.constant
    return int(count)


def _refuse(what: str, fix: str) -> NoReturn:
    raise StrategyError(what, op=_OP, where=caller(), fix=fix)
