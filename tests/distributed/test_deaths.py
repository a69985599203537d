"""Ranks that end at any moment: the others are told within seconds, and only who ended is named."""

from __future__ import annotations

import random
import re
from functools import partial

import pytest
from support import deaths, faults
from support.pool import Outcome, Pool, assert_lost

TIMEOUT = 90.0
"""Nobody waits that long."""

SOON = 30.0
"""Seconds in which all is over, on a machine that does other things as well."""


def named(outcome: Outcome) -> set[int]:
    """The ranks that the first line of an error names."""
    assert_lost(outcome, "^")
    assert outcome.raised is not None
    first = outcome.raised.text.splitlines()[0]
    return {int(number) for part in re.findall(r"ranks? ([\d, ]+)", first) for number in re.findall(r"\d+", part)}


@pytest.mark.parametrize("seed", range(12))
def test_only_the_rank_that_ended_is_named(seed: int) -> None:
    """At any of the messages of a run: agreement, rows of a ring, sums, losses, what idle ranks get, gathering."""
    chance = random.Random(seed)
    size, how, agent = chance.choice([3, 4]), [*deaths.ENDS][seed % 4], chance.random() < 0.6
    victim, number = chance.randrange(size), chance.randint(1, 60)
    with Pool(size, timeout=TIMEOUT, agent=agent) as pool:
        outcomes = pool.outcomes(partial(deaths.work, {victim}, number, how, warm=seed % 3 > 0), limit=SOON)
    cause = "stopped" if how in ("is interrupted", "exits") else "died"
    for outcome in outcomes[:victim] + outcomes[victim + 1 :]:
        assert_lost(outcome, f"(^|: )rank {victim} {cause}(; this rank was |\\n)")
        assert named(outcome) == {victim}


@pytest.mark.parametrize("victims", [{1, 2}, {0, 2}, {2, 3}, {0, 3}], ids=str)
def test_ranks_that_end_together(victims: set[int]) -> None:
    with Pool(4, timeout=TIMEOUT) as pool:
        outcomes = pool.outcomes(partial(deaths.work, victims, 12, "is killed", warm=True), limit=SOON)
    for rank in {0, 1, 2, 3} - victims:
        assert named(outcomes[rank]) and named(outcomes[rank]) <= victims, str(outcomes[rank])


@pytest.mark.parametrize("size", [3, 4])
def test_a_rank_that_was_elsewhere_hears_the_same(size: int) -> None:
    """It isn't taken for dead in the meantime, and is told when it comes back, whoever holds the store."""
    with Pool(size, timeout=TIMEOUT, agent=size == 3) as pool:
        job = partial(deaths.work, {1}, 3, "is killed", elsewhere={0, size - 1}, warm=True)
        outcomes = pool.outcomes(job, limit=SOON)
    for outcome in outcomes[:1] + outcomes[2:]:
        assert_lost(outcome, "(^|: )rank 1 died")
        assert named(outcome) == {1}


def test_a_rank_that_left_in_good_order() -> None:
    with Pool(4, timeout=TIMEOUT) as pool:
        outcomes = pool.outcomes(partial(deaths.leave, {2}), limit=SOON)
        assert outcomes[2].is_value
        for outcome in outcomes[:2] + outcomes[3:]:
            assert_lost(outcome, "^rank 2 left; this rank was waiting for all ranks to come to run 2")
        assert pool.outcomes(faults.here, [2])[0].is_value
