"""A parallel strategy: how many tokens each pipeline holds, and who attends together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from hetu.arguments import integers, items, refuse, shown
from hetu.errors import HetuError, StrategyError, caller
from hetu.parallel.mask.mask import CAUSAL, Mask
from hetu.parallel.topology import Topology
from hetu.symbols import IntSymbol, as_size

if TYPE_CHECKING:
    from hetu.parallel.choice.cost import StrategyCost


def groups_of(cp_groups: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The context groups of a strategy: pipelines with the same value attend together.

    Args:
        cp_groups: Each pipeline's group, any ints.

    Returns:
        Each value's pipelines in index order; the values ascend, and that is the order of groups everywhere.

    Example:
        >>> groups_of([7, 0, 7, 0, 0])
        {0: (1, 3, 4), 7: (0, 2)}
    """
    cp_groups = integers(cp_groups, "cp_groups", op="layout", error=StrategyError)
    members: dict[int, list[int]] = {value: [] for value in sorted(set(cp_groups))}
    for pipeline, value in enumerate(cp_groups):
        members[value].append(pipeline)
    return {value: tuple(pipelines) for value, pipelines in members.items()}


def by_group(
    given: Mapping[Any, Any] | Sequence[Any],
    values: Sequence[int],
    what: str,
    error: type[HetuError] = StrategyError,
    op: str = "layout",
) -> list[Any]:
    """What is given a context group, in the order of the groups' ascending values.

    Args:
        given: A dict by the groups' values, or a list in that order.
        values: The groups' values, ascending.
        what: What is given, in the plural, for the error.
        error: The class of the error.
        op: Who is given it, for the error.

    Raises:
        HetuError: If a group is left out or does not exist, or neither a dict nor a list was given.

    Example:
        >>> by_group({7: "b", 0: "a"}, [0, 7], "x"), by_group(["a", "b"], [0, 7], "x")
        (['a', 'b'], ['a', 'b'])
    """
    names = ", ".join(map(str, values))
    if isinstance(given, Mapping):
        keys = list(given)
        if len(keys) != len(values) or any(isinstance(key, bool) or key not in values for key in keys):
            raise error(
                f"{what} for the context groups {_listed(keys)}, but the strategy's are {names}",
                op=op,
                where=caller(),
                fix="give a dict with one entry per group, by the values that the strategy gives the groups",
            )
        return [given[value] for value in values]
    listed = items(given, what, "a dict by the groups' values, or a list", op=op, error=error)
    if len(listed) != len(values):
        raise error(
            f"{len(listed)} {what} for {len(values)} context groups: {names}",
            op=op,
            where=caller(),
            fix="give a dict by the groups' values, or a list with one entry per group, in the order of their values",
        )
    return list(listed)


def _listed(keys: Sequence[Any]) -> str:
    return ", ".join(map(repr, keys)) or "none"


def check_lengths(
    seq_lens: Sequence[object], cp_groups: Sequence[object], names: tuple[str, str] = ("seq_lens", "cp_groups")
) -> None:
    """Checks that both lists describe the same pipelines, at least one, and that no known length is negative.

    Raises:
        StrategyError: If not.
    """
    if len(seq_lens) != len(cp_groups):
        _refuse(
            f"{names[0]} has {len(seq_lens)} entries and {names[1]} {len(cp_groups)}, expected as many",
            "give each pipeline one length and one context group",
        )
    if not seq_lens:
        _refuse("a strategy of no pipelines", "give at least one length and one context group")
    for pipeline, length in enumerate(seq_lens):
        if isinstance(length, int) and length < 0:
            _refuse(f"pipeline {pipeline} holds {length} tokens, expected at least 0", "give lengths from 0")


@dataclass(frozen=True, slots=True, init=False)
class Strategy:
    """A parallel strategy: how many tokens of each sequence each pipeline holds, and which pipelines attend together.

    A *pipeline* is a holder of tokens, in practice a rank. Strategies are values: they print, compare and hash by what
    they say. ``hetu.graph(..., strategies=[...])`` takes a list of them, and a run follows one of them.

    Args:
        lengths: Tokens of each sequence on each pipeline: ints or :class:`~hetu.IntSymbol`, zero included.
        groups: The context group of each pipeline: ints or symbols. Pipelines with the same value form one group, in
            index order.
        name: What ``g.run(..., strategy=name)`` may call it; None for no name.
        mask: What the split ``"balanced"`` weighs documents by; its numbers may be symbols. None weighs by lengths, as
            fits causal and full attention. It moves tokens for all ops alike; what an op lets a token see, its own mask
            says.

    Raises:
        StrategyError: If the lists differ in length, are empty, or hold something else or a negative length, or the
            name is no string, or "auto", which means another thing, or the mask is no mask.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> print(hetu.Strategy([s // 2, s - s // 2], [0, 0], name="halves"))
        halves: [s//2, s - s//2] in groups [0, 0]
    """

    lengths: tuple[IntSymbol | int, ...]
    groups: tuple[IntSymbol | int, ...]
    name: str | None = None
    mask: Mask | None = None
    cost_factory: ClassVar[Callable[..., StrategyCost]]

    def __init__(
        self,
        lengths: Sequence[IntSymbol | int],
        groups: Sequence[IntSymbol | int],
        name: str | None = None,
        mask: Mask | None = None,
    ) -> None:
        fields = {"lengths": _sizes("lengths", lengths), "groups": _sizes("groups", groups), "name": name, "mask": mask}
        for field, value in fields.items():
            object.__setattr__(self, field, value)  # the class is frozen
        check_lengths(self.lengths, self.groups, ("lengths", "groups"))
        if name is not None and (not isinstance(name, str) or name == "auto" or not name):
            _refuse(
                f"a strategy's name is {shown(name)}, expected a string other than 'auto'",
                "give another, or none",
            )
        if mask is not None and not isinstance(mask, Mask):
            refuse(mask, "mask", "a hetu.Mask or None", op="strategy", error=StrategyError)

    @property
    def num_pipelines(self) -> int:
        """How many pipelines it has."""
        return len(self.lengths)

    def cost(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        *,
        split: str = "normal",
        mask: Mask = CAUSAL,
        method: str = "auto",
        batch: IntSymbol | int = 1,
        topology: Topology | None = None,
    ) -> StrategyCost:
        """What the forward of an attention takes under this strategy, as expressions in its symbols, without a plan.

        They are equal to what is counted from the plan, without tolerance: FLOPs of each pipeline, bytes over each
        link, and peak memory.

        Args:
            num_heads: Query heads.
            num_kv_heads: Key heads, a divisor of the query heads.
            head_dim: Numbers of a head.
            dtype: Of q, k and v.
            split: ``"normal"``, ``"sym"``, ``"stripe"`` or ``"balanced"``.
            mask: Causal, full, or a window; under ``"stripe"`` a window where a group's pipelines hold equal lengths.
            method: ``"ring"``, ``"direct"``, ``"all_gather"``, ``"ulysses"`` or ``"hierarchical"``; ``"auto"`` is
                ``"direct"`` here, for the cheapest depends on the lengths.
            batch: Sequences of each context group.
            topology: Which pipelines share a host; None if all do.

        Returns:
            The expressions, with ``evaluate(int_symbol_dict, cu_seqlens)``, which gives ints.

        Raises:
            StrategyError: If there is no such split or method, a group is a symbol, or the mask has no closed form.
            DTypeError: If there is no such dtype.

        Example:
            >>> import hetu
            >>> s = hetu.IntSymbol("s")
            >>> cost = hetu.Strategy([s, 2 * s], [0, 0]).cost(1, 1, 8, "float32")
            >>> cost.flops[0].expr.subs(s.expr, 4), cost.link_bytes
            (320, {(0, 1): IntSymbol(64*s*min(2*s, 1))})
            >>> cost.evaluate({s: 4}).flops
            (320, 2176)
        """
        return type(self).cost_factory(
            self, num_heads, num_kv_heads, head_dim, dtype, split, mask, method, batch, topology
        )

    def says_the_same_as(self, other: Strategy) -> bool:
        """True if both have the same lengths and groups, whatever they are called and weigh by."""
        return self.lengths == other.lengths and self.groups == other.groups

    def __str__(self) -> str:
        text = f"[{', '.join(map(str, self.lengths))}] in groups [{', '.join(map(str, self.groups))}]"
        text += "" if self.mask is None else f", weighed by {self.mask.name}"
        return text if self.name is None else f"{self.name}: {text}"

    @property
    def symbols(self) -> tuple[IntSymbol, ...]:
        """The leaves of all its symbols, each once."""
        sizes = [size for size in (*self.lengths, *self.groups) if isinstance(size, IntSymbol)]
        leaves = [leaf for size in sizes for leaf in size.leaves]
        return tuple(dict.fromkeys([*leaves, *(() if self.mask is None else self.mask.symbols)]))

    def evaluate(self, value: Callable[[IntSymbol], int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths and groups as ints.

        Args:
            value: Gives a symbol's value; ints are taken as they are.

        Raises:
            StrategyError: If a length comes out negative.

        Example:
            >>> Strategy((3, 5, 4), (0, 0, 1)).evaluate(lambda symbol: 0)
            ((3, 5, 4), (0, 0, 1))
        """
        lens = tuple(item if isinstance(item, int) else value(item) for item in self.lengths)
        groups = tuple(item if isinstance(item, int) else value(item) for item in self.groups)
        check_lengths(lens, groups)
        return lens, groups


def check_strategies(given: Any, num_strategy: int) -> tuple[Strategy, ...]:
    """The strategies of a graph.

    Args:
        given: What the user gave as a list of them.
        num_strategy: How many the user said there are; 1 says nothing.

    Raises:
        StrategyError: If it is no list of strategies, at least one, or two have one name.
    """
    is_list = isinstance(given, (list, tuple)) and all(isinstance(item, Strategy) for item in given)
    if not is_list or not given:
        _refuse(
            f"strategies is {shown(given)}, expected a list of hetu.Strategy", "give at least one hetu.Strategy(...)"
        )
    names = [item.name for item in given if item.name is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        _refuse(f"two strategies are named {twice!r}", "give each a name of its own")
    if num_strategy not in (1, len(given)):
        _refuse(f"num_strategy is {num_strategy}, but there are {len(given)} strategies", "leave num_strategy out")
    return tuple(given)


def _sizes(what: str, given: Any) -> tuple[IntSymbol | int, ...]:
    """A list of ints and symbols as a tuple; constants become ints, so that equal strategies are equal."""
    listed = items(given, what, "a list of ints or symbols", op="strategy", error=StrategyError)
    sizes = [as_size(item, f"{what}[{i}]", op="strategy", error=StrategyError) for i, item in enumerate(listed)]
    return tuple(size if not isinstance(size, IntSymbol) or size.constant is None else size.constant for size in sizes)


def _refuse(what: str, fix: str) -> NoReturn:
    raise StrategyError(what, op="strategy", where=caller(), fix=fix)
