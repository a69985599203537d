"""Connections of hetu's own between processes: torch's backends, made straight from a store.

torch's table of process groups is left alone. Only the members of a connection take part in making it, so that several
groups can do so side by side, and a user's process groups are neither used nor changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

Connection = Any
"""``ProcessGroupGloo`` or ``ProcessGroupNCCL``: torch's types don't know what they do."""

NCCL_ENVIRONMENT: Mapping[str, str] = {
    # Our own watch stops messages that nobody answers. torch's would end the process, or go on with what was in memory.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""What a connection over NCCL is made with where the user set nothing; torch reads it then."""


def connect(store: Any, rank: int, size: int, backend: str, timeout: float) -> Connection:
    """A connection between all members of a store.

    Args:
        store: Reached by all members, and used for nothing else.
        rank: This process's number among them.
        size: How many members there are.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: Seconds after which torch gives up a message.
    """
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, seconds(timeout))
    # Messages get multiprocessors before the kernels that wait in line.
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = seconds(timeout)
    with _environment(NCCL_ENVIRONMENT):
        return dist.ProcessGroupNCCL(store, rank, size, options)


def seconds(timeout: float) -> timedelta:
    """A timeout as torch takes it."""
    return timedelta(seconds=timeout)


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Sets variables where the user set nothing, and takes them back."""
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
