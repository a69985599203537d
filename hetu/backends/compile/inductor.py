"""What Inductor makes of traced regions: once per structure, for all graphs of the process."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from hetu.backends.compile.regions import Region
from hetu.backends.compile.tracing import Conditions, trace
from hetu.backends.torch_private import find_inductor
from hetu.cache import LRU
from hetu.errors import in_words


@dataclass(frozen=True, slots=True)
class Compiled:
    """A region that was compiled, or why it could not be.

    Attributes:
        call: Takes what :meth:`sizes` gives, then its inputs, and gives a list of tensors; None if it could not be
            compiled.
        outputs: Which item of the list each output of the region is.
        conditions: What its sizes must meet. None if it takes all.
        reason: Why it could not be compiled.
    """

    call: Callable[..., Any] | None
    outputs: Sequence[int] = ()
    conditions: Conditions | None = None
    reason: str = ""

    def sizes(self, values: Sequence[Any]) -> Sequence[int] | None:
        """What it takes before its inputs, or None if it takes no such inputs."""
        if self.conditions is None:
            return ()
        sizes = self.conditions.sizes(values)
        return sizes if self.conditions.hold(*sizes) else None


MOST_COMPILED = 1024
"""Compiled regions that are found again for another graph, or another layer of the same."""

PATIENCE = 1.0
"""Seconds that compiling may take before it is said that it takes long."""

_OPTIONS = {
    "size_asserts": False,  # an empty tensor's strides may be any
    "cpp.dynamic_threads": True,  # torch.set_num_threads may be called between runs
}

compiled: LRU[Compiled] = LRU(MOST_COMPILED)
"""Regions by their structure; its misses are those that this process traced and compiled."""

_lock = threading.Lock()


def compile_region(region: Region, device: torch.device, is_typical: bool = False) -> Compiled:
    """Compiles a region, or finds what one of the same structure was compiled to.

    Inductor keeps what it made on disk, and finds it there in another process.

    Args:
        region: The region.
        device: Where it will run.
        is_typical: For typical sizes and what decides as these do, or else for all: see
            :mod:`hetu.backends.compile.tracing`.
    """
    with _lock:  # Inductor compiles in processes and threads of its own, and for one caller at a time
        return compiled.get((is_typical, region.structure(device)), lambda: _compile(region, device, is_typical))


def _compile(region: Region, device: torch.device, is_typical: bool) -> Compiled:
    inductor = find_inductor()
    if inductor is None:
        return Compiled(None, reason=f"torch {torch.__version__} has no torch._inductor.standalone_compile")
    try:
        traced = trace(region, device, is_typical)
        for node in traced.module.graph.nodes:
            if "val" in node.meta:
                node.meta["example_value"] = node.meta["val"]  # where it looks for the sizes' symbols
        options = {"config_patches": _OPTIONS}
        with torch.no_grad():
            call = inductor(traced.module, traced.inputs, dynamic_shapes="from_graph", options=options)
        conditions = traced.conditions() if traced.conditions is not None else None
    except Exception as error:  # whatever torch raises: it refuses an op, finds no compiler, can't write to the disk
        return Compiled(None, reason=in_words(error))
    return Compiled(call, traced.outputs, conditions)


class Progress:
    """A line on stderr that says how far compiling is, once it has taken more than a second.

    Args:
        total: How many regions there are.

    Example:
        >>> with Progress(2) as progress:
        ...     progress.advance()
    """

    def __init__(self, total: int) -> None:
        self._total, self._done, self._is_shown = total, 0, False
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Progress:
        self._timer.start()
        return self

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if time.perf_counter() - self._start > PATIENCE:
            self._show()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._is_shown:
            self._write("\n")

    def _show(self) -> None:
        with self._lock:
            self._is_shown = True
            seconds = time.perf_counter() - self._start
            self._write(f"\rhetu compiles: {self._done} of {self._total} regions after {seconds:.0f} s")

    @staticmethod
    def _write(text: str) -> None:
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
