"""Set-up of all tests: Triton's interpreter where there is no GPU, and few hypothesis examples by default."""

from __future__ import annotations

import gc
import os

# Several test processes run side by side: threads of one would wait for cores that the others have.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which is imported below

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

# What tests share asserts too: a failure there shows its values, as one in a test does.
pytest.register_assert_rewrite("support")

from support.longer import LONGER  # noqa: E402

torch.set_num_threads(1)

# CI draws the same examples every time, so that a red run is the change's fault; everybody else explores.
settings.register_profile(
    "hetu",
    derandomize="CI" in os.environ,
    deadline=None,
    max_examples=50 * LONGER,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("hetu")

if os.environ.get("TRITON_INTERPRET") == "1":
    from support.interpreter import lighten

    lighten()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a timeout of their own may take minutes: they come first, or all would wait for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def pytest_collection_finish() -> None:
    """Twelve thousand tests stay to the end: whoever collects garbage need not look through them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries say at the end that theirs was leaked


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an output row that nobody writes is seen."""
    from support.poison import poison

    poison(monkeypatch.setattr)
