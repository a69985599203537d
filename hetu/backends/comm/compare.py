"""What ranks told each other, compared: an error on all of them, with all sides, where they differ.

It knows neither graphs nor runs: what is told are dicts of plain values by the names that an error gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hetu.errors import CommunicationError, caller, ranks_in_words

SHOWN = 6
"""How many of the items that differ an error shows."""

_FIX = "run the same script with the same arguments and hetu.manual_seed(n) on all ranks"


def refuse_errors(said: Sequence[Mapping[str, Any]], doing: str, op: str, undone: str = "nothing was computed") -> None:
    """Raises an error on this rank too if other ranks have one.

    Args:
        said: What each rank said, by rank; those with an error said ``{"error": text}``.
        doing: What the ranks agree on, as in ``"run 7"``.
        op: The function that the user called.
        undone: What did not happen.

    Raises:
        CommunicationError: If a rank has one; it tells whose and which.
    """
    errors = {rank: one["error"] for rank, one in enumerate(said) if "error" in one}
    if errors:
        raise CommunicationError(
            f"{doing} was refused by {ranks_in_words(list(errors))}, so {undone}",
            op=op,
            where=caller(),
            bound=[f"rank {rank}: {text}" for rank, text in errors.items()],
            fix="mend what these ranks say; the others are ready to run again",
        )


def refuse_differences(
    said: Sequence[Mapping[str, Any]], doing: str, op: str, fixes: Mapping[str, str] | None = None
) -> None:
    """Refuses what is not the same on all ranks.

    Args:
        said: What each rank said, by rank: plain values by what an error calls them. Of lists an error shows the items
            that not all ranks have.
        doing: What the ranks agree on, as in ``"run 7"``.
        op: The function that the user called.
        fixes: What to do where some things differ, by their names.

    Raises:
        CommunicationError: For the first name whose values differ; it shows all sides.

    Example:
        >>> refuse_differences([{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1}], "run 3", "run")
        Traceback (most recent call last):
            ...
        hetu.errors.CommunicationError: [run] lr must be the same on all ranks, but the ranks differ in run 3
        ...
          bound:  ranks 0, 2: 0.1
          bound:  rank 1: 0.2
          fix:    run the same script with the same arguments and hetu.manual_seed(n) on all ranks
          more:   ...
    """
    for name in dict.fromkeys(name for one in said for name in one):
        values = [one.get(name) for one in said]
        if all(value == values[0] for value in values):
            continue
        sides: dict[str, list[int]] = {}
        for rank, value in enumerate(values):
            sides.setdefault(_side(value, values), []).append(rank)
        raise CommunicationError(
            f"{name} must be the same on all ranks, but the ranks differ in {doing}",
            op=op,
            where=caller(),
            bound=[f"{ranks_in_words(ranks)}: {text}" for text, ranks in sides.items()],
            fix=(fixes or {}).get(name, _FIX),
        )


def _side(value: Any, values: Sequence[Any]) -> str:
    """One side of a difference."""
    if not isinstance(value, list):
        return repr(value)
    lists = [item for item in values if isinstance(item, list)]
    if len(lists) == len(values) and all(sorted(map(str, item)) == sorted(map(str, value)) for item in lists):
        own = value  # they differ in their order
    else:
        own = [item for item in value if not all(item in other for other in lists)]
    more = f", and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
    return ", ".join(map(str, own[:SHOWN])) + more or "none of these"
