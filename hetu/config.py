"""Settings of a run, kept per thread and per async task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any

from hetu.arguments import flag, integers, shown
from hetu.errors import HetuError, caller

BACKENDS = ("gluon", "triton", "torch")
"""The kernel families by name, in the order in which a call is offered to them: a line here and a folder make one more,
see ``hetu/backends/families.py``. The last one takes every call."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What ``hetu.config`` sets.

    Attributes:
        backend: One of :data:`BACKENDS`, or None: the first one on CUDA and torch elsewhere. What it has no kernel for
            goes to the next one.
        verify_plans: Whether every new plan is proven by ``plan.verify()`` before it is followed.
        deterministic: Whether a run gives the same bits every time: torch's deterministic kernels are used while it
            lasts. Attention, forward and backward, is deterministic in any case. Torch's switch is the process's, so
            torch code in other threads finds it on as well as long as such a run lasts.
        compile: Whether what is neither attention nor communication in a module is compiled by Inductor: once a
            structure, for all lengths. What it can't compile runs as it does otherwise, and a warning says why.
        hosts: The host of each pipeline's rank, for ``method="hierarchical"``: pipeline r is on that of entry
            ``r % len(hosts)``. None if all share one. All ranks have to set the same.
    """

    backend: str | None = None
    verify_plans: bool = False
    deterministic: bool = False
    compile: bool = False
    hosts: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that hetu reads.

    Attributes:
        values: What it may be, in words.
        default: What an unset or empty one stands for.
        meaning: What it does, in a sentence.
        setting: The field of :class:`Settings` that it is the default of, or None: it is the process's alone.
    """

    values: str
    default: str
    meaning: str
    setting: str | None = None


VARIABLES = {
    "HETU_BACKEND": Variable(
        ", ".join(BACKENDS), "by device", "names the kernel family that calls are offered to first", "backend"
    ),
    "HETU_COMPILE": Variable("0, 1", "0", "puts what is not attention through Inductor", "compile"),
    "HETU_AUTOTUNE": Variable("0, 1", "0", "searches for the kernels' tiles at the first call of each kind, on CUDA"),
    "HETU_CACHE_DIR": Variable("a folder", "~/.cache/hetu", "is where the tiles that were found are kept"),
    "HETU_DEVICE_COPIES_MB": Variable(
        "a whole number, MiB", "256", "bounds the memory that copies of plans take on devices; read once, on import"
    ),
    "HETU_PARALLEL_ATTN_SPLIT_PATTERN": Variable(
        "NORMAL, SYM, STRIPE", "NORMAL", "is the split of `hetu.integrations.pku_hetu.parallel_attn`, read at each call"
    ),
}
"""Every environment variable of hetu's, by its name: a test finds one that is read and not listed."""


@cache
def _from_environment(backend: Any, compiles: Any) -> Settings:
    text = (compiles and os.environ["HETU_COMPILE"]) or "0"
    if text not in ("0", "1"):
        raise HetuError(f"HETU_COMPILE is {shown(text)}, expected 0 or 1", where=caller(), fix="unset it for 0")
    return _checked(Settings(), {"backend": (backend and os.environ["HETU_BACKEND"]) or None, "compile": text == "1"})


def _checked(old: Settings, changes: dict[str, Any]) -> Settings:
    known = [item.name for item in dataclasses.fields(Settings)]
    for name, value in changes.items():
        if name not in known:
            raise HetuError(f"there is no setting {name!r}", where=caller(), fix=f"use one of {', '.join(known)}")
        if name == "hosts":
            changes[name] = None if value is None else tuple(integers(value, name, op="config"))
            if changes[name] == ():
                raise HetuError("hosts names no host", op="config", where=caller(), fix="leave it out, or say None")
        elif name != "backend":
            changes[name] = flag(value, name, op="config")
        elif value is not None and not (isinstance(value, str) and value in BACKENDS):
            names = ", ".join(BACKENDS)
            raise HetuError(f"there is no backend {shown(value)}", where=caller(), fix=f"use one of {names}")
    return dataclasses.replace(old, **changes)


_settings: ContextVar[Settings | None] = ContextVar("hetu_settings", default=None)


def _raw(environment: Any) -> tuple[Mapping[Any, Any], Callable[[str], Any]]:
    """The environment as the system has it, and how it names a variable; a Python may keep it otherwise."""
    try:
        return environment._data, environment.encodekey
    except AttributeError:
        return environment, str


raw_environment, raw_name = _raw(os.environ)
"""The environment as the system has it, by the names that ``raw_name`` gives: what every run asks for.

``os.environ.get`` takes 1.4 µs, because it translates names and values each time.
"""

_BACKEND, _COMPILE = raw_name("HETU_BACKEND"), raw_name("HETU_COMPILE")


def settings() -> Settings:
    """The settings in force: those of ``hetu.config``, else of ``HETU_BACKEND`` and ``HETU_COMPILE``."""
    return _settings.get() or _from_environment(raw_environment.get(_BACKEND), raw_environment.get(_COMPILE))


class config:  # noqa: N801 - used like a function, as torch.no_grad is
    """Changes settings from here on, or within a ``with`` block.

    Args:
        **changes: Fields of :class:`Settings`.

    Raises:
        HetuError: If there is no such setting or value.

    Example:
        >>> with config(backend="torch"):
        ...     settings().backend
        'torch'
    """

    def __init__(self, **changes: Any) -> None:
        self._token = _settings.set(_checked(settings(), changes))

    def __enter__(self) -> Settings:
        return settings()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _settings.reset(self._token)
