"""Memory for results: what torch would give, and seen by whoever watches."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES
from functional.calls import Watching

from hetu.backends.memory import empty

SHAPES = [(3, 4, 5), (1, 1, 1), (0, 4, 5), (3, 0, 5), (3, 4, 0), (7, 2), (5,), (), (2, 3, 4, 5)]


def on(device: str) -> torch.device:
    """With the number that tensors' devices have."""
    return torch.zeros(0, device=device).device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_torch_would_give(device: str, shape: tuple[int, ...]) -> None:
    for given in (shape, torch.Size(shape), list(shape)):
        for dtype in (torch.bfloat16, torch.float32, torch.int64):
            made, right = empty(given, dtype, on(device)), torch.empty(shape, dtype=dtype, device=device)
            for x in (made, right):
                assert not x.requires_grad and x.data_ptr() % 16 == 0
            assert (made.shape, made.stride(), made.dtype, made.device) == (
                right.shape,
                right.stride(),
                right.dtype,
                right.device,
            )


@pytest.mark.parametrize("device", DEVICES)
def test_modes_see_it(device: str) -> None:
    where = on(device)
    with Watching() as watching:
        empty((2, 3, 4), torch.float32, where)
    assert watching.seen == [torch.ops.aten.empty.memory_format]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
def test_tests_can_poison_it(device: str) -> None:
    """Or rows that no kernel writes would hold what some earlier test left there."""
    assert empty((2, 3, 4), torch.float32, on(device)).isnan().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.gpu
def test_it_is_on_the_device_that_is_named() -> None:
    for number in range(2):
        device = torch.device("cuda", number)
        assert empty((2, 3, 4), torch.float32, device).device == device
