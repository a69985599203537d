"""``hetu.functional.parallel_attn`` on several ranks against one process in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from support import context_parallel as jobs
from support.longer import LONGER, grid
from support.pool import Pool

from hetu.parallel import METHODS, SPLITS, Mask

CASES = {
    "documents": [0, 5, 5, 17, 18, 40],
    "one": [0, 33],
    "fewer tokens than ranks": [0, 1],
    "nothing": [0, 0],
}


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, jobs.Ranks]]:
    with Pool(2, backend=None) as two, Pool(4, backend=None) as four:
        yield {2: jobs.Ranks(two), 4: jobs.Ranks(four)}


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, worlds: dict[int, jobs.Ranks]) -> jobs.Ranks:
    return worlds[request.param]


@pytest.mark.parametrize(
    ("size", "method", "split", "lengths", "is_causal"), grid([2, 4], METHODS, SPLITS, CASES, [True, False])
)
def test_results_and_gradients_are_those_of_one_process(
    worlds: dict[int, jobs.Ranks], size: int, method: str, split: str, lengths: str, is_causal: bool
) -> None:
    case = {"cu": CASES[lengths], "split": split, "method": method, "is_causal": is_causal}
    assert max(worlds[size].run(jobs.attend, case)) < 1e-12


def test_hosts_relay_rows_and_sum_gradients(worlds: dict[int, jobs.Ranks]) -> None:
    for hosts, split, cu in grid([(0, 0, 1, 1), (0, 1, 2, 1)], SPLITS, CASES.values()):
        case = {"cu": cu, "split": split, "method": "hierarchical", "hosts": hosts}
        assert max(worlds[4].run(jobs.attend_on_hosts, case)) < 1e-12


def test_ranks_may_hold_any_numbers_of_rows(ranks: jobs.Ranks) -> None:
    size = ranks.size
    assert max(ranks.run(jobs.attend, {"cu": [0, 5, 30], "tokens": [30, *[0] * (size - 1)]})) < 1e-12
    assert max(ranks.run(jobs.attend, {"cu": [0, 5, 30], "tokens": [*[1] * (size - 1), 31 - size]})) < 1e-12
    pieces = [[0, 2 + r, 2 + r + 3] for r in range(size)]
    lengths = [sum(p[1] for p in pieces), 3 * size]
    case = {"cu": [0, lengths[0], sum(lengths)], "pieces": pieces, "split": "sym", "scale": 0.7}
    assert max(ranks.run(jobs.attend, case)) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_layers_do_not_touch_each_other(ranks: jobs.Ranks, method: str) -> None:
    """They share a plan and all that was found of it, but no memory; other lengths, types and strides come between."""
    layer = {"cu": CASES["documents"], "method": method}
    others = {"dtype": torch.float32}, {"beside": True}, {"cu": [0, 3, 40]}, {"split": "stripe"}, {}
    assert all(ranks.run(jobs.layers_in_a_row, [layer, layer, *({**layer, **other} for other in others)]))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_narrower_types(ranks: jobs.Ranks, dtype: torch.dtype, bound: float) -> None:
    assert max(ranks.run(jobs.attend, {"cu": CASES["documents"], "dtype": dtype})) < bound


@pytest.mark.parametrize("size", [2, *([4] if LONGER > 1 else [])])
def test_other_lengths_are_not_compiled_again(worlds: dict[int, jobs.Ranks], size: int) -> None:
    # No number of rows is also one of heads, say: torch.compile would take them for one size.
    lengths = [0, 5, 30], [0, 7, 20, 41], [0, 13, 33], [0, 2, 4, 50, 70]
    cases = [{"cu": cu, "heads": (4, 2, 24), "scale": 0.3} for cu in lengths]  # a symbolic float while it is compiled
    for found, graphs in worlds[size].run(jobs.attend_compiled, cases):
        assert found < 1e-12
        assert graphs == 1


MASKED: dict[str, dict[str, Any]] = {
    "window": {"window_size": (6, 0)},
    "window of both sides": {"window_size": (3, 4), "is_causal": False, "softcap": 2.0},
    "chunked": {"mask": Mask.chunked(5), "softcap": 1.5},
    "prefix": {"mask": Mask.prefix([3, 0, 7, 1, 9])},
    "slices": {
        "mask": Mask.slices([(0, 9), (9, 30), (30, 40)], [(0, 12), (5, 30), (0, 7)], ["causal", "bicausal", "full"])
    },
    "all": {"is_causal": False, "mask": Mask.full()},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MASKED)
def test_masks_softcaps_and_sinks(worlds: dict[int, jobs.Ranks], kind: str, method: str) -> None:
    for split in ("sym", "balanced"):
        case = {"cu": CASES["documents"], "split": split, "method": method, "options": MASKED[kind]}
        assert max(worlds[2].run(jobs.attend_masked, case)) < 1e-11


def test_documents_are_weighed_by_a_mask(worlds: dict[int, jobs.Ranks]) -> None:
    case = {"cu": [0, 24, 32, 40], "mask": Mask.window(1, 0), "options": {"window_size": (1, 0)}}
    assert max(worlds[2].run(jobs.attend_masked, case)) < 1e-11


def test_other_masks_are_not_compiled_again(worlds: dict[int, jobs.Ranks]) -> None:
    heads = {"heads": (4, 2, 24)}
    prefixes = [{"cu": [0, n, 30], "options": {"mask": Mask.prefix([n, 5])}, **heads} for n in (5, 13, 11)]
    windows = [{"cu": [0, n, 30], "options": {"window_size": (n, 0)}, **heads} for n in (5, 13, 11)]
    for cases in (prefixes, windows):
        for found, graphs in worlds[2].run(jobs.attend_masked_compiled, cases):
            assert found < 1e-11
            assert graphs == 1


def test_groups_side_by_side(worlds: dict[int, jobs.Ranks]) -> None:
    assert max(worlds[4].run(jobs.attend_in_groups, [{"cu": [0, 5, 30]}, {"cu": [0, 41]}])) < 1e-12


def test_a_rank_that_is_not_in_the_group_is_told(worlds: dict[int, jobs.Ranks]) -> None:
    found = worlds[4].run(jobs.attend_in_part, {"cu": [0, 5, 30]})
    assert max(found[:2]) < 1e-12
    assert all("not in the group" in text for text in found[2:])


def test_what_dropout_drops_does_not_depend_on_the_ranks(worlds: dict[int, jobs.Ranks]) -> None:
    cases = [{"cu": [0, 5, 30], "split": split} for split in ("stripe", "balanced")]
    found = [worlds[size].run(jobs.dropped, case, 7)[0] for size, case in product((2, 4), cases)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    assert not torch.allclose(worlds[2].run(jobs.dropped, cases[0], 8)[0], found[0])


CAUSAL = {"is_causal": True}
DIFFERENT: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, str]] = {
    "lengths": ([{"cu": [0, 5, 30]}, {"cu": [0, 6, 30]}], None, "the layout must be the same"),
    "rows": ([{"cu": [0, 30]}, {"cu": [0, 30], "tokens": [10, 20]}], None, "the rows of all ranks must be the same"),
    "method": ([{"cu": [0, 30]}, {"cu": [0, 30], "method": "ring"}], None, "method must be the same"),
    "mask": ([{"cu": [0, 30]}], [CAUSAL, {"is_causal": False}], "the mask must be the same"),
    "window": ([{"cu": [0, 30]}], [{"window_size": (r + 3, 0)} for r in range(2)], "the mask must be the same"),
    "mask's lengths": ([{"cu": [0, 30]}], [{"mask": Mask.prefix([r])} for r in range(2)], "the mask must be the same"),
    "softcap": ([{"cu": [0, 30]}], [{"softcap": r / 2} for r in range(2)], "softcap must be the same"),
    "sinks": ([{"cu": [0, 30]}], [{"sinks": torch.ones(4)}, {}], "the dtype of the sinks must be the same"),
    "weights": (
        [{"cu": [0, 24, 32, 40]}, {"cu": [0, 24, 32, 40], "mask": Mask.window(1, 0)}],
        None,
        "the layout must be",
    ),
    "scale": ([{"cu": [0, 30]}], [{"softmax_scale": 0.5}, {"softmax_scale": 0.25}], "softmax_scale must be the same"),
    "seed": ([{"cu": [0, 30]}], [{"dropout_p": 0.5, "seed": r} for r in range(2)], "the seed of dropout must be"),
}


def test_ranks_that_agree_compare_digests_once_a_context(ranks: jobs.Ranks) -> None:
    cases = [{"cu": CASES["documents"]}, {"cu": [0, 7, 50]}, {"cu": CASES["documents"]}]
    assert ranks.run(jobs.agreements, cases) == [(3, 0)] * ranks.size


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_call_different_things_are_told_so_and_go_on(worlds: dict[int, jobs.Ranks], what: str) -> None:
    cases, options, text = DIFFERENT[what]
    said = worlds[2].run(jobs.differ, cases, options)
    assert all(text in one and one.startswith("CommunicationError") for one in said), said


def test_an_error_of_one_rank_is_told_to_all_and_they_go_on(worlds: dict[int, jobs.Ranks]) -> None:
    said = worlds[2].run(jobs.differ, [{"cu": [0, 30]}], [{}, {"rows": -1}])
    assert said[1].startswith("ShapeError"), said
    assert said[0].startswith("CommunicationError"), said


def test_groups_of_torch_are_left_alone(ranks: jobs.Ranks) -> None:
    for before, after, is_working in ranks.run(jobs.groups_of_torch):
        assert before == after
        assert is_working


# What is compiled for two groups of two ranks is more than for one group.
@pytest.mark.parametrize(
    ("size", "how"),
    [(size, how) for size in (2, 4) for how in jobs.WRAPPERS if (size, how) != (2, "torch.compile") or LONGER > 1],
)
def test_a_model_trains_as_on_one_process(worlds: dict[int, jobs.Ranks], size: int, how: str) -> None:
    assert max(worlds[size].run(jobs.train, how, layers=1 if how == "torch.compile" else 2)) < 1e-10


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_labels_count_alike_however_unevenly_ranks_hold_them(ranks: jobs.Ranks, how: str) -> None:
    assert max(ranks.run(jobs.train, how, "normal", "all on the first")) < 1e-10


def test_tensor_parallelism_over_heads(worlds: dict[int, jobs.Ranks]) -> None:
    assert max(worlds[4].run(jobs.train_with_tensor_parallelism)) < 1e-10


def test_stages_of_a_pipeline(worlds: dict[int, jobs.Ranks]) -> None:
    assert max(worlds[4].run(jobs.train_in_pipeline_stages)) < 1e-10


def test_gradients_of_batches_add_up(ranks: jobs.Ranks) -> None:
    assert max(ranks.run(jobs.accumulate)) < 1e-10
