"""A world of processes, each a rank as torchrun would start it, kept alive over many cases.

Processes are forked from a server that has imported torch and hetu once: a new world takes a tenth of a second, so one
that a case broke, or broke on purpose, is simply replaced.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch.distributed import TCPStore

PRELOADED = [
    *("pytest", "torch.distributed.fsdp", "torch._dynamo", "torch._inductor.compile_fx", "hetu.backends.triton"),
    *("support.poison", "support.interpreter", "support.context_parallel", "support.deaths", "support.zero"),
]
"""What the server imports before it forks: each optimizer and each compilation imports Dynamo, which takes seconds."""

AFTER_AN_ERROR = 15.0
"""Seconds that the others get once a rank raised or died in a case in which none should."""


@dataclass(frozen=True)
class Raised:
    """What a job raised on a rank."""

    kinds: tuple[str, ...]
    text: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        kinds = tuple(kind.__name__ for kind in type(error).__mro__)
        return cls(kinds, str(error), "".join(traceback.format_exception(error)))


@dataclass(frozen=True)
class Outcome:
    """How a job ended on a rank: with a value, an error, the process's end, or not at all."""

    value: Any = None
    raised: Raised | None = None
    exitcode: int | None = None
    stuck_at: str | None = None

    @property
    def is_value(self) -> bool:
        return self.raised is None and self.exitcode is None and self.stuck_at is None

    def __str__(self) -> str:
        if self.raised is not None:
            return self.raised.traceback
        if self.exitcode is not None:
            return f"the process ended with exit code {self.exitcode}"
        if self.stuck_at is not None:
            return f"did not come back; it was at\n{self.stuck_at}"
        return "all right"


def assert_lost(outcome: Outcome, pattern: str) -> None:
    """It got an error that says so, in time: it is neither stuck nor ended."""
    assert outcome.raised is not None, str(outcome)
    assert outcome.raised.kinds[0] == "CommunicationError", outcome.raised.traceback
    assert re.search(pattern, outcome.raised.text), outcome.raised.text


class Pool:
    """The processes of one world; they start when they are first needed, and anew after a case went wrong.

    Args:
        size: How many.
        backend: Of ``hetu.init_distributed``; None for processes that don't call it.
        timeout: Of ``hetu.init_distributed``, in seconds.
        agent: Whether the store is held by this process, as torchrun's agent does, or by rank 0.
    """

    def __init__(self, size: int, backend: str | None = "gloo", timeout: float = 60.0, agent: bool = True) -> None:
        self.size, self.backend, self.timeout, self.agent = size, backend, timeout, agent
        self._workers: list[_Worker] = []
        self._store: Any = None

    def run(self, job: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """Calls a function of an importable module on all ranks; gives what each returned.

        Raises:
            AssertionError: If it failed on any, with the traceback of each.
        """
        outcomes = self.outcomes(partial(job, *arguments, **options), is_hopeful=True)
        if not all(outcome.is_value for outcome in outcomes):
            self.close()
            _fail(job, outcomes)
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self,
        job: Callable[[], Any],
        ranks: Sequence[int] | None = None,
        limit: float = 120.0,
        is_hopeful: bool = False,
    ) -> list[Outcome]:
        """Runs a job, and tells how it ended on each rank.

        Args:
            job: Something that can be pickled: a function of an importable module, or a partial call of one.
            ranks: Who runs it; None for all.
            limit: Seconds after which a rank counts as stuck. It is ended then.
            is_hopeful: Whether an error of one rank makes it pointless to wait long for the others.
        """
        self._start()
        chosen = [self._workers[rank] for rank in (range(self.size) if ranks is None else ranks)]
        for worker in chosen:
            worker.send(job)
        until, found = time.monotonic() + limit, dict[_Worker, Outcome]()
        while len(found) < len(chosen) and (left := until - time.monotonic()) > 0:
            waiting = [worker for worker in chosen if worker not in found]
            ready = wait([item for worker in waiting for item in (worker.connection, worker.process.sentinel)], left)
            for worker in waiting:
                if worker.connection in ready or worker.process.sentinel in ready:
                    found[worker] = worker.receive()
                    if is_hopeful and not found[worker].is_value:
                        until = min(until, time.monotonic() + AFTER_AN_ERROR)
        return [found.get(worker) or worker.stuck() for worker in chosen]

    def _start(self) -> None:
        if self._workers:
            return
        environment = {"WORLD_SIZE": str(self.size), "MASTER_ADDR": "localhost"}
        if self.agent:
            self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            environment |= {"MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        else:
            environment |= {"MASTER_PORT": str(_free_port())}
        self._workers = [
            _Worker(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, self.backend == "nccl")
            for rank in range(self.size)
        ]
        if self.backend is not None:
            self.run(join, self.backend, self.timeout)

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers:
            worker.end()
        self._workers, self._store = [], None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def join(backend: str, timeout: float) -> None:
    """The first job of a rank."""
    import hetu

    hetu.init_distributed(backend, timeout)


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, environment: dict[str, str], with_cuda: bool) -> None:
        context = multiprocessing.get_context("spawn") if with_cuda else _forking()
        self.connection, theirs = context.Pipe()
        handle, self._stacks = tempfile.mkstemp(prefix="hetu-stacks-")
        os.close(handle)
        self.process = context.Process(target=_work, args=(theirs, environment, self._stacks), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, job: Callable[[], Any]) -> None:
        """Starts a job."""
        with suppress(OSError):  # it is dead, which receive() finds
            self.connection.send_bytes(pickle.dumps(job))

    def receive(self) -> Outcome:
        """What it sent, or that it ended."""
        try:
            value, raised = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            return Outcome(exitcode=self.process.exitcode)
        return Outcome(value, raised)

    def stuck(self) -> Outcome:
        """Where it is; ends it."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
        stacks = Path(self._stacks).read_text(encoding="utf-8")
        self.end()
        return Outcome(stuck_at=stacks or "an unknown place")

    def end(self) -> None:
        """Kills the process: what it would say at its end is of no use to anybody."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        Path(self._stacks).unlink(missing_ok=True)


@cache
def _forking() -> Any:
    """Starts the server that forks, without CUDA, which can't be used in a fork."""
    missing = [name for name in PRELOADED if find_spec(name) is None]
    assert not missing, f"the server would leave out {missing}, and say nothing"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    settings = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _work(connection: Connection, environment: dict[str, str], stacks: str) -> None:
    """A worker's life: jobs from the pipe, until it is closed."""
    gc.freeze()  # what was imported stays: whoever collects garbage need not look through it
    os.environ.update(environment)
    from support.poison import poison

    torch.set_num_threads(1)
    poison(setattr)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from support.interpreter import lighten

        lighten()
    with open(stacks, "w", encoding="utf-8") as file:
        faulthandler.register(signal.SIGUSR1, file)
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            try:
                answer = pickle.dumps((pickle.loads(message)(), None))
            except BaseException as error:
                answer = pickle.dumps((None, Raised.of(error)))
            connection.send_bytes(answer)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _fail(job: Callable[..., Any], outcomes: Sequence[Outcome]) -> NoReturn:
    text = "\n".join(f"--- rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes))
    raise AssertionError(f"{job.__name__} failed\n{text}")
