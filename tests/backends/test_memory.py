"""Memory on a device: what torch would give, seen by whoever watches; and copies to it that nobody waits for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.devices import CUDA, DEVICES
from support.functional_calls import Watching

from hetu.backends.memory import SMALL, copied_to, empty, sent_to
from hetu.runtime.launch import to_device

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


SIZES = (0, 1, SMALL // 4, SMALL // 4 + 1, 2**18)
"""Entries of four bytes: nothing, little, just little enough to be staged by the driver, and more."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", [CUDA])
def test_the_array_may_change_at_once(size: int, device: str) -> None:
    array = np.arange(size, dtype=np.int32)
    torch.cuda._sleep(10**7)
    copy = copied_to(array, torch.device(device))
    array.fill(-1)
    assert torch.equal(copy.cpu(), torch.arange(size, dtype=torch.int32))


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", [CUDA])
def test_a_tensor_may_change_at_once(size: int, is_pinned: bool, device: str) -> None:
    given, wanted = torch.arange(size, dtype=torch.int32), torch.arange(size, dtype=torch.int32)
    if is_pinned:
        given = given.pin_memory()
    to_device(given, torch.int64, on(device))  # memory is found for it
    torch.cuda._sleep(10**7)
    copies = sent_to(given, on(device)), to_device(given, torch.int64, on(device))
    given.fill_(-1)
    assert torch.equal(copies[0].cpu(), wanted) and torch.equal(copies[1].cpu(), wanted.long())


@pytest.mark.parametrize("device", [CUDA])
def test_a_feed_is_sent_without_waiting(device: str) -> None:
    given = torch.arange(2**18)
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = to_device(given.numpy(), torch.int32, on(device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(copy.cpu(), given.int())


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("device", [CUDA])
def test_nobody_waits_for_what_the_device_does(size: int, device: str) -> None:
    array, done = np.arange(size, dtype=np.int32), torch.cuda.Event()
    count = 50 if array.nbytes <= SMALL else 2
    kept = [copied_to(array, torch.device(device)) for _ in range(count)]  # finding memory for so many may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # a second or so
    done.record()
    kept += [copied_to(array, torch.device(device)) for _ in range(count)]
    assert not done.query(), "the host has waited"
    torch.cuda.synchronize()
    assert all(torch.equal(copy.cpu(), torch.arange(size, dtype=torch.int32)) for copy in kept)


def test_on_the_cpu_it_is_the_same_memory() -> None:
    array = np.arange(3)
    copied_to(array, torch.device("cpu"))[0] = 7
    assert array[0] == 7
