"""Whose fault a failure is, from what the ranks wrote of themselves."""

from __future__ import annotations

import time

import pytest
from torch.distributed import HashStore

from hetu.backends.comm.notes import Kind, Note, Notes

SIZE, TIMEOUT = 4, 60.0


class Broken:
    """A store whose process is gone."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("Broken pipe")


def told(notes: dict[int, Note], by: int = 0, dead: tuple[int, ...] = (), grace: float = 0.05) -> str:
    """The cause that a rank finds, with what all have written."""
    store = HashStore()
    ranks = [Notes(store, rank, SIZE, None) for rank in range(SIZE)]
    for rank, note in notes.items():
        ranks[rank].write(note)
    for rank in dead:
        ranks[(rank - 1) % SIZE].ended(rank)
    return ranks[by].verdict(grace, TIMEOUT).cause


def lost(*waited_for: int) -> Note:
    return Note(Kind.LOST, "was receiving rows", waited_for)


RAISED, HEARD = Note(Kind.RAISED, "ValueError: out of luck"), Note(Kind.HEARD, "heard of the failure")


@pytest.mark.parametrize(
    ("notes", "dead", "cause"),
    [
        ({0: lost(1), 2: lost(1), 3: lost(2)}, (1,), "rank 1 died"),
        ({0: lost(1), 3: lost(1, 2)}, (1, 2), "ranks 1, 2 died"),
        ({0: lost(2), 2: lost(1), 3: HEARD, 1: RAISED}, (), "rank 1 stopped"),
        ({0: lost(1), 1: RAISED, 2: lost(1)}, (3,), "rank 3 died, rank 1 stopped"),
        # Nobody died or failed: who came late is who was waited for and didn't wait in vain.
        ({0: lost(2), 2: lost(1), 3: lost(0, 1, 2)}, (), "rank 1 did not come within 60 s"),
        ({0: lost(1, 2, 3), 1: HEARD, 2: lost(0, 1, 3), 3: lost(2)}, (), "rank 1 did not come within 60 s"),
        ({0: HEARD, 1: lost(0), 2: lost(0), 3: lost(1)}, (), "the other ranks waited for this rank, and gave up"),
        ({0: lost(1), 1: lost(0), 2: lost(3), 3: lost(2)}, (), "the ranks lost each other"),
    ],
)
def test_the_cause(notes: dict[int, Note], dead: tuple[int, ...], cause: str) -> None:
    assert told(notes, dead=dead) == cause


def test_who_hung_up_did_not_die() -> None:
    """Its line ends as that of a dead one does, but it has written why."""
    assert told({0: lost(2), 1: lost(2), 3: lost(2)}, dead=(1, 2)) == "rank 2 died"


def test_an_own_reason_replaces_what_was_heard_and_nothing_replaces_that() -> None:
    notes = Notes(HashStore(), 0, SIZE, None)
    for note, kept in [(HEARD, HEARD), (lost(1), lost(1)), (HEARD, lost(1)), (RAISED, lost(1))]:
        notes.write(note)
        assert notes.own == kept


@pytest.mark.parametrize(("holder", "cause"), [(2, "rank 2 died"), (None, "the ranks lost each other")])
def test_the_store_ends_with_who_holds_it(holder: int | None, cause: str) -> None:
    notes = Notes(Broken(), 0, SIZE, holder)
    notes.write(Note(Kind.LOST, "was receiving rows"))
    assert notes.any() and notes.verdict(60.0, TIMEOUT).cause == cause


def test_a_death_is_settled_long_before_the_grace_is_over() -> None:
    start = time.monotonic()
    assert told({0: lost(1)}, dead=(1,), grace=60.0) == "rank 1 died"
    assert time.monotonic() - start < 10


def test_late_reasons_are_waited_for() -> None:
    store = HashStore()
    first, other = Notes(store, 0, 2, None), Notes(store, 1, 2, None)
    first.write(lost(1))
    other.write(RAISED)
    verdict = first.verdict(60.0, TIMEOUT)
    assert verdict.cause == "rank 1 stopped" and verdict.reasons == ("rank 1: ValueError: out of luck",)
