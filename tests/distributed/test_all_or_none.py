"""What fails in one run on one rank fails on all: nothing has changed anywhere, and the next run works."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
from support import mishaps
from support.longer import grid
from support.pool import Pool, assert_lost
from support.states import is_same

World = Callable[..., Pool]


@pytest.mark.parametrize(("kind", "mishap", "who"), grid(mishaps.OPTIMIZERS, mishaps.MISHAPS, [{1}, {2}, {0, 2}]))
def test_an_update_is_made_on_all_ranks_or_on_none(world: World, kind: str, mishap: str, who: set[int]) -> None:
    """Ranks with a pipeline, and one without; what is trained in the end is what one process trains without the run."""
    ((_, alone),) = world(1).run(mishaps.train, kind)
    for rank, (told, state) in enumerate(world(3).run(mishaps.train, kind, mishap, who)):
        assert not told.has_changed and is_same(state, alone)
        if rank in who:
            is_memory = mishap == "the device's memory"  # torch's own error: scripts catch it by its type
            assert (
                "OutOfMemoryError" in told.kinds if is_memory else "the run failed, and changed nothing: " in told.text
            )
        else:
            names = f"rank{'s' * (len(who) > 1)} {', '.join(map(str, sorted(who)))}"
            assert told.kinds[0] == "CommunicationError"
            assert re.search(rf"run \d+ failed on {names}, so no rank has changed anything", told.text)
            assert (
                re.search(r"bound:  rank \d: \w+: .*(today|out of memory)", told.text)
                and "where:  mishaps.py:" in told.text
            )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_update_of_unseen_ids_is_made_on_all_ranks_or_on_none(world: World, stage: int) -> None:
    """What devices take back of runs with wrong ids, hosts take back of a run that another rank failed."""
    for who in ({1}, {0, 2}):
        assert all(world(3).run(mishaps.unseen, who, stage))


def test_gradients_wait_on_all_ranks_or_on_none(world: World) -> None:
    ((_, alone),) = world(1).run(mishaps.train, "SGD")
    for rank, (told, state) in enumerate(world(3).run(mishaps.train, "SGD", "the norm", {1}, "grad")):
        assert not told.has_changed and is_same(state, alone), rank
        assert ("failed on rank 1, so no rank has changed anything" in told.text) is (rank != 1)


@pytest.mark.parametrize("what", ["a parameter", "a parameter that is only read", "a schedule"])
@pytest.mark.parametrize("who", [{1}, {0, 1}, {0, 1, 2}], ids=str)
def test_what_cannot_be_made_is_refused_before_anything_is_sent(world: World, what: str, who: set[int]) -> None:
    for rank, told in enumerate(world(3).run(mishaps.makes, what, who)):
        if rank in who:  # rank 2 has no pipeline, but compares what it has
            assert "HetuError" in told.kinds and "no value today" in told.text
        else:
            assert told.kinds[0] == "CommunicationError" and "so nothing was computed" in told.text


def test_an_interrupted_update_is_made_on_no_rank() -> None:
    """Who is interrupted doesn't go on, so the others can't either; the state of all is that of before."""
    with Pool(3) as pool:
        outcomes = pool.outcomes(partial(mishaps.interrupted, {1}), limit=30.0)
        for rank in (0, 2):
            assert_lost(
                outcomes[rank],
                "(?s)^rank 1 stopped; this rank was .* come to the end of run 2.*KeyboardInterrupt",
            )
        assert outcomes[1].raised is not None and outcomes[1].raised.kinds[0] == "KeyboardInterrupt"
        assert all(outcome.value for outcome in pool.outcomes(mishaps.is_as_before))
