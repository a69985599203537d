"""Ids that only a rank's device knows, over several ranks."""

from __future__ import annotations

from collections.abc import Callable

from support.jobs import unseen_ids
from support.pool import Pool


def check_unseen_ids(
    world: Callable[..., Pool], wrong: int, size: int, backend: str = "gloo", device: str = "cpu", stage: int = 0
) -> None:
    """That all ranks refuse one run, and that what one has seen is told by its line and number."""
    for rank, (said, is_kept, _) in enumerate(world(size, backend).run(unseen_ids, wrong, device, stage)):
        if wrong >= size:
            assert said == ["", ""] and not is_kept
            continue
        assert is_kept and said[1] == "", said
        if rank == wrong:
            assert "[embedding] ids of an earlier run holds 7 at [0], expected 0 to below 5" in said[0]
        else:
            assert (
                "ids of an earlier run holds 7" in said[0]
                or "of an earlier run were out of range on another" in said[0]
            )
