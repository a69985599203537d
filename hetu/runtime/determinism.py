"""Torch's own choice of deterministic kernels, for as long as runs that want it last.

Torch's switch, and the variable that cuBLAS reads, are the process's and not a thread's. So runs are counted: the
first one that begins turns the switch on, the last one that ends turns it off. Meanwhile the torch code of all other
threads finds it on too, which is right and may be slower; nothing short of another process could keep it from them.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class DeterministicKernels:
    """A context that any number of threads may be in; there is one for the process.

    A switch or a variable that the user set is left alone. cuBLAS gives the same bits only with a workspace of a fixed
    size. ``CUBLAS_WORKSPACE_CONFIG`` names one; torch and cuBLAS read it when they first compute a product, on each
    stream, and some versions of torch refuse products without it. So it is set while runs on a GPU last and gone
    afterwards; what read it meanwhile keeps what it read. What computed products before has read its absence: a
    script that does so sets the variable itself before it starts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = self._runs_on_gpu = 0
        self._turned_on = self._named_workspace = False

    def enter(self, on_gpu: bool) -> None:
        """A run begins."""
        with self._lock:
            if self._runs == 0 and not torch.are_deterministic_algorithms_enabled():
                torch.use_deterministic_algorithms(True)
                self._turned_on = True
            if on_gpu and self._runs_on_gpu == 0 and WORKSPACE not in os.environ:
                os.environ[WORKSPACE] = ":4096:8"
                self._named_workspace = True
            self._runs += 1
            self._runs_on_gpu += on_gpu

    def leave(self, on_gpu: bool) -> None:
        """A run ends, well or not."""
        with self._lock:
            self._runs -= 1
            self._runs_on_gpu -= on_gpu
            if self._runs == 0 and self._turned_on:
                torch.use_deterministic_algorithms(False)
                self._turned_on = False
            if self._runs_on_gpu == 0 and self._named_workspace:
                os.environ.pop(WORKSPACE, None)
                self._named_workspace = False


KERNELS = DeterministicKernels()


class deterministic:  # noqa: N801 - used like a function, as torch.no_grad is
    """Runs a ``with`` block with deterministic kernels.

    Args:
        device: Where the block computes.

    Example:
        >>> with deterministic(torch.device("cpu")):
        ...     torch.are_deterministic_algorithms_enabled()
        True
        >>> torch.are_deterministic_algorithms_enabled()
        False
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def __enter__(self) -> None:
        KERNELS.enter(self._on_gpu)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        KERNELS.leave(self._on_gpu)
