"""Ranks whose graphs, states or defaults have other values are refused, all of them, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import differences
from support.pool import Pool

import hetu

World = Callable[..., Pool]

GRAPH, STATE = "the graph must be the same on all ranks", "what the graph keeps from run to run must be the same"
OPTIONS = "the optimisers' options must be the same"
BY_VALUE = {
    "a closure": STATE,
    "what an initialiser draws": STATE,
    "a rate's tensor": GRAPH,
    "a default": "the symbols' default values must be the same",
    "an unnamed default": "the symbols' default values must be the same",
}
"""What is said of a difference, where it is not one of graphs."""


@pytest.mark.parametrize("what", differences.GRAPHS)
def test_graphs_of_other_values_are_refused(world: World, what: str) -> None:
    for kind, text in world(2).run(differences.graphs_that_differ, what):
        assert kind == "CommunicationError" and BY_VALUE.get(what, GRAPH) in text
        assert "bound:  rank 0: " in text and "bound:  rank 1: " in text and "where:  differences.py:" in text


@pytest.mark.parametrize("after_a_run", [False, True])
@pytest.mark.parametrize("what", differences.STATES)
def test_states_of_other_values_are_refused(world: World, what: str, after_a_run: bool) -> None:
    """Also where only one rank loaded one, and the others go on from what all had."""
    for kind, text in world(2).run(differences.states_that_differ, what, after_a_run):
        assert kind == "CommunicationError" and (OPTIONS if what == "the rate" else STATE) in text
        assert "bound:  rank 0: " in text and "bound:  rank 1: " in text and "where:  differences.py:" in text


def test_what_differs_in_a_state_is_named(world: World) -> None:
    for _, text in world(2).run(differences.states_that_differ, "steps", True):
        lines = [line.strip() for line in text.splitlines() if "bound:" in line]
        assert lines == [f"bound:  rank {r}: optimizers/t/state/w/step = float32 {r + 1}.0" for r in range(2)]
        assert "g.load_state_dict(hetu.load(path)) of one file on all of them" in text


def test_a_schedule_that_comes_to_differ_is_refused_before_its_rate_is_used(world: World) -> None:
    for losses, (kind, text) in world(2).run(differences.schedules_that_differ_late):
        assert len(losses) == 2 and kind == "CommunicationError" and OPTIONS in text
        assert "rank 1: lr of group 0 of t = 0.02" in text


def test_a_norm_to_clip_at_that_one_rank_sets_is_refused(world: World) -> None:
    for kind, text in world(2).run(differences.a_norm_that_one_rank_sets):
        assert kind == "CommunicationError" and "rank 1: max_grad_norm of t = 2.0" in text


def test_what_is_alike_runs_whoever_made_it_first(world: World) -> None:
    one, other = world(2).run(differences.a_state_that_one_rank_made_early)
    assert [len(values) for values in one] == [1, 1, 1] and one[0][0].equal(other[0][0])


def test_defaults_may_differ_where_no_run_uses_them(world: World) -> None:
    assert [len(values) for values in world(2).run(differences.defaults_that_differ_unused)] == [2, 2]


@pytest.mark.parametrize("job", [differences.a_default_set_between_runs, differences.a_group_set_between_runs])
def test_a_default_that_one_rank_sets_after_a_run_is_found(world: World, job: Callable[[], list[str]]) -> None:
    for kind, text in world(2).run(job):
        assert kind == "CommunicationError" and "must be the same on all ranks" in text


def test_an_initialiser_that_fails_on_one_rank_is_refused_by_all(world: World) -> None:
    (kind, text), own = world(2).run(differences.fails_to_initialise)
    assert kind == "CommunicationError" and "rank 1: HetuError: the initialiser of w raised ValueError" in text
    assert own[0] == "HetuError" and "no weight today" in own[1]


def test_ranks_of_another_version_are_told_apart() -> None:
    """In a world of its own: it can't go on after a transfer whose ranks don't understand each other."""
    with Pool(2) as pool:
        told = pool.run(differences.speaks_another_version)
    for other, texts in zip((1, 0), told, strict=True):
        for kind, text in texts:
            assert kind == "CommunicationError" and f"rank {other} speaks version " in text


def test_steps_are_not_digested(world: World) -> None:
    """Only the first one is: afterwards all ranks change their states alike, whatever the run level and the lengths."""
    assert world(2).run(differences.digests_of_training, 6) == [1, 1]


def test_a_first_step_warns_of_nothing(world: World) -> None:
    assert world(2).run(differences.warnings_of_a_first_step) == [[], []]


@pytest.mark.parametrize("what", differences.RESULTS)
def test_only_results_are_gathered(world: World, what: str) -> None:
    *others, (kind, text) = world(3).run(differences.gathers, what)
    assert kind == "HetuError" and "expected value to be what a run gave of one tensor" in text
    for kind, text in others:
        assert kind == "CommunicationError"
        assert "gather_shards was refused by rank 2, so nothing was gathered" in text


@pytest.mark.parametrize("what", differences.RESULTS)
def test_one_process_gathers_only_results_too(what: str) -> None:
    with pytest.raises(hetu.HetuError, match="expected value to be what a run gave of one tensor"):
        hetu.gather_shards(differences.RESULTS[what](0))


@pytest.mark.parametrize("size", [2, 3])
def test_values_of_different_things_are_not_gathered(world: World, size: int) -> None:
    for kind, text in world(size).run(differences.gathers_too_many):
        assert kind == "CommunicationError" and "the ranks hold values of different things" in text
        assert f"rank {size - 1}: 2 values" in text and "rank 0: 1 value\n" in text
