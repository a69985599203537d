"""How this process finds the others: by torch's world if it has one, else by what torchrun put into the environment."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from hetu.arguments import shown
from hetu.backends.comm import connect
from hetu.backends.torch_private import default_store
from hetu.errors import CommunicationError, HetuError, caller

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment, among others."""

NCCL_ENVIRONMENT = {
    # Read when CUDA starts: messages of all peers at a time must be able to be under way.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    **connect.NCCL_ENVIRONMENT,
}
"""Set where the user set nothing, and kept, for torch's own world too."""

MOST = 1_000_000
"""No run has as many processes."""

_stores: dict[tuple[str, int], Any] = {}
"""Connections by address and port, kept: the store of rank 0 lives in it, and others may look into it later."""


@dataclass(frozen=True, slots=True)
class Others:
    """The processes of a run, and where they can leave word for each other.

    Attributes:
        rank: This process's number.
        size: How many processes there are.
        is_torchs: True if torch has a world of them already.
    """

    rank: int
    size: int
    is_torchs: bool

    @classmethod
    def find(cls) -> Others | None:
        """Those of torch's world, however it was started, else those of the environment; None if there are none.

        Raises:
            HetuError: If the environment is not whole, or makes no sense.
        """
        if dist.is_available() and dist.is_initialized():
            size = dist.get_world_size()
            return cls(dist.get_rank(), size, True) if size > 1 else None
        given = [name for name in LAUNCHED if name in os.environ]
        if not given or os.environ.get("WORLD_SIZE") == "1":
            return None
        if len(given) < len(LAUNCHED):
            missing = ", ".join(name for name in LAUNCHED if name not in given)
            refuse(f"the environment has {', '.join(given)}, but not {missing}", "start the script with torchrun")
        size = _number("WORLD_SIZE", 1, MOST)
        rank = _number("RANK", 0, size - 1)
        _number("MASTER_PORT", 0, 65535)
        return cls(rank, size, False) if size > 1 else None

    def store(self, timeout: float) -> Any:
        """A store that all of them reach; doesn't wait for the others.

        Raises:
            CommunicationError: If it can't be reached in time.
        """
        if self.is_torchs:
            return default_store()
        return _connect(self.rank, timeout)

    @property
    def holder(self) -> int | None:
        """The rank in which the store lives; None if it is torchrun's agent's, which outlives them."""
        return None if _has_agent() else 0

    def backend(self) -> str:
        """NCCL where there is CUDA, unless torch's world does without; else gloo."""
        has_nccl = not self.is_torchs or any(name in str(dist.get_backend_config()) for name in ("nccl", "undefined"))
        return "nccl" if torch.cuda.is_available() and has_nccl else "gloo"

    def device(self, backend: str) -> torch.device:
        """The CPU for gloo; for NCCL the GPU of this process, which becomes torch's current one.

        That is the one of its number on its host. If torch's world names a GPU, or the process is in torch's world and
        has no such number, it is the one that torch would take. NCCL lets several processes share a GPU, from version
        2.30 on and if the environment asks for it. They take turns.

        Raises:
            HetuError: If there are fewer GPUs than processes, or the environment lets NCCL hang.
        """
        if backend == "gloo":
            return torch.device("cpu")
        count = torch.cuda.device_count()
        local = self._local(count)
        if local >= count and not (count and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"):
            refuse(
                f"this is process {local} of its host, which has {count} GPUs",
                "start one process per GPU, or pass backend='gloo'",
            )
        if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
            refuse(
                "CUDA_DEVICE_MAX_CONNECTIONS is 1, with which messages to several peers wait for each other for ever",
                "unset it, or set it to 32",
            )
        for name, value in NCCL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(local % count)
        return torch.device("cuda", local % count)

    def _local(self, count: int) -> int:
        bound = dist.group.WORLD.bound_device_id if self.is_torchs and dist.group.WORLD is not None else None
        if bound is not None and bound.index is not None:
            return int(bound.index)
        if "LOCAL_RANK" in os.environ:
            return _number("LOCAL_RANK", 0, MOST)
        return self.rank if not self.is_torchs or not count else torch.cuda.current_device()


def _has_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _number(name: str, least: int, most: int) -> int:
    """A number of the environment."""
    text = os.environ[name]
    number = int(text) if text.strip().isdecimal() and len(text) < 10 else -1
    if not least <= number <= most:
        what = f"the environment's {name} is {shown(text)}, expected a number from {least} to {most}"
        refuse(what, "start the script with torchrun")
    return number


def _connect(rank: int, timeout: float) -> Any:
    """The store of torchrun's agent, or that of rank 0."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if (store := _stores.get((address, port))) is None or not _answers(store):
        is_master = rank == 0 and not _has_agent()
        try:
            if not is_master:
                _wait_for_port(address, port, timeout)
            wait = timedelta(seconds=timeout)
            store = TCPStore(address, port, is_master=is_master, wait_for_workers=False, timeout=wait)
        except (RuntimeError, OSError) as error:
            what = f"the store at {address}:{port} can't be reached within {timeout:g} s"
            fix = "see that rank 0 has started, and that its address can be reached from here"
            raise CommunicationError(
                what, op="init_distributed", where=caller(), bound=[str(error).splitlines()[0]], fix=fix
            ) from error
        _stores[address, port] = store
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _answers(store: Any) -> bool:
    try:
        store.check(["is somebody there"])
    except RuntimeError:
        return False
    return True


def _wait_for_port(address: str, port: int, timeout: float) -> None:
    """Waits until somebody listens there; torch's own attempts may take twice the time they are given."""
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), max(until - time.monotonic(), 0.01)).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def refuse(what: str, fix: str) -> NoReturn:
    """Refuses to join."""
    raise HetuError(what, op="init_distributed", where=caller(), fix=fix)
