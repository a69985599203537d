"""``hetu.functional.parallel_attn`` on several ranks against one process in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from support.context_parallel import attend, join
from support.pool import Pool

CASES = {
    "documents": [0, 5, 5, 17, 18, 40],
    "one": [0, 33],
    "fewer tokens than ranks": [0, 1],
    "nothing": [0, 0],
}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(request.param, backend=None) as pool:
        pool.run(join)
        yield pool


@pytest.mark.parametrize("split", ["normal", "sym", "stripe", "balanced"])
@pytest.mark.parametrize("method", ["ring", "direct", "all_gather", "ulysses"])
def test_results_and_gradients_are_those_of_one_process(ranks: Pool, method: str, split: str) -> None:
    for cu, is_causal in product(CASES.values(), (True, False)):
        case = {"cu": cu, "heads": (4, 2, 8), "split": split, "method": method, "is_causal": is_causal}
        assert max(ranks.run(attend, case)) < 1e-12
