"""A parallel strategy: how many tokens each pipeline holds, and who attends together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from hetu.errors import StrategyError, caller

if TYPE_CHECKING:
    from hetu.symbols import IntSymbol


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
    members: dict[int, list[int]] = {value: [] for value in sorted(set(cp_groups))}
    for pipeline, value in enumerate(cp_groups):
        members[value].append(pipeline)
    return {value: tuple(pipelines) for value, pipelines in members.items()}


def check_lengths(seq_lens: Sequence[object], cp_groups: Sequence[object]) -> None:
    """Checks that both lists describe the same pipelines, at least one, and that no known length is negative.

    Raises:
        StrategyError: If not.
    """
    if len(seq_lens) != len(cp_groups):
        _refuse(
            f"seq_lens has {len(seq_lens)} entries and cp_groups {len(cp_groups)}, expected as many",
            "give each pipeline one length and one context group",
        )
    if not seq_lens:
        _refuse("a strategy of no pipelines", "give at least one length and one context group")
    for pipeline, length in enumerate(seq_lens):
        if isinstance(length, int) and length < 0:
            _refuse(f"pipeline {pipeline} holds {length} tokens, expected at least 0", "give lengths from 0")


@dataclass(frozen=True, slots=True)
class Strategy:
    """One row of ``multi_seq_lens_symbol`` and ``multi_cp_group_symbol``.

    Attributes:
        seq_lens: Tokens of each sequence on each pipeline.
        cp_groups: Each pipeline's context group.

    Raises:
        StrategyError: If the rows differ in length, are empty, or hold a negative length.

    Example:
        >>> Strategy((3, 5, 4), (0, 0, 1)).evaluate(int)
        ((3, 5, 4), (0, 0, 1))
    """

    seq_lens: tuple[IntSymbol | int, ...]
    cp_groups: tuple[IntSymbol | int, ...]

    def __post_init__(self) -> None:
        check_lengths(self.seq_lens, self.cp_groups)

    @property
    def num_pipelines(self) -> int:
        return len(self.seq_lens)

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.seq_lens))}] in groups [{', '.join(map(str, self.cp_groups))}]"

    def evaluate(self, value: Callable[[IntSymbol], int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths and groups as ints.

        Args:
            value: Gives a symbol's value; ints are taken as they are.

        Raises:
            StrategyError: If a length comes out negative.
        """
        lens = tuple(item if isinstance(item, int) else value(item) for item in self.seq_lens)
        groups = tuple(item if isinstance(item, int) else value(item) for item in self.cp_groups)
        check_lengths(lens, groups)
        return lens, groups


def _refuse(what: str, fix: str) -> NoReturn:
    raise StrategyError(what, op="strategy", where=caller(), fix=fix)
