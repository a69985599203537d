"""Memory for results: what torch would give, and seen by whoever watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICES
from torch.utils._python_dispatch import TorchDispatchMode

from hetu.backends.allocate import empty


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (0, 4, 5), (3, 0, 5), (3, 4, 0)])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_it_is_what_torch_would_give(device: str, shape: tuple[int, int, int], dtype: torch.dtype | None) -> None:
    like = torch.zeros(shape, dtype=torch.bfloat16, device=device).transpose(0, 2)
    for given in (shape, torch.Size(shape), list(shape)):
        made, right = empty(like, given, dtype), like.new_empty(shape, dtype=dtype)
        assert (made.shape, made.stride(), made.dtype, made.device) == (shape, right.stride(), right.dtype, like.device)
        assert not made.requires_grad and made.data_ptr() % 16 == 0


class Seen(TorchDispatchMode):
    """Notes what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
def test_modes_see_it(device: str) -> None:
    like = torch.zeros(2, device=device)
    with Seen() as seen:
        empty(like, (2, 3, 4))
    assert seen.ops == [torch.ops.aten.new_empty.default]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.gpu
def test_it_is_on_the_device_of_the_other_one() -> None:
    for device in ("cuda:0", "cuda:1"):
        assert empty(torch.zeros(2, device=device), (2, 3, 4)).device == torch.device(device)
