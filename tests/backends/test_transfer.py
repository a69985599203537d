"""Copies to a device: right, whatever becomes of the array, and nobody waits for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import CUDA

from hetu.backends.memory import SMALL, copied_to

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
