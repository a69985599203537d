"""Settings of a run, kept per thread and per async task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any

from hetu.arguments import flag, integer, integers, path, shown
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
        compile: Whether what is neither attention nor communication in a module is compiled by Inductor: once per
            structure, for all lengths. What it can't compile runs as it does otherwise, and a warning says why.
        debug: How much a run says of its stages (bind, select, lower, plan, launch), to the logger ``hetu``: 0 for
            nothing, 1 for a line with its time each, 2 for every symbol's value as well, 3 for whole plans and modules.
        dump: A folder into which every new stage writes its text: graph, bindings, layouts, plans and lowered modules;
            None for none.
        hosts: The host of each pipeline's rank, which ``method="hierarchical"``, ``method="auto"`` and predicted times
            know: pipeline r is on that of entry ``r % len(hosts)``. None if all share one. It has to be the same on all
            ranks.
    """

    backend: str | None = None
    verify_plans: bool = False
    deterministic: bool = False
    compile: bool = False
    debug: int = 0
    dump: str | None = None
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
    "HETU_DEBUG": Variable("0 to 3", "0", "prints what each stage of a run does and how long it takes", "debug"),
    "HETU_DUMP": Variable("a folder", "none", "is where every new stage writes its text", "dump"),
    "HETU_HARDWARE": Variable(
        "a file", "an H100", "is what `hetu.calibrate` wrote: the hardware for which strategies and methods are chosen"
    ),
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
def _from_environment(*raw: Any) -> Settings:
    """The settings of the variables in :data:`_READ`; ``raw`` are their values, by which the result is remembered."""
    said = {name: (value and os.environ[name]) or None for name, value in zip(_READ, raw, strict=True)}
    compiles, debug = _digit("HETU_COMPILE", said["HETU_COMPILE"], 1), _digit("HETU_DEBUG", said["HETU_DEBUG"], 3)
    changes = {"backend": said["HETU_BACKEND"], "compile": compiles == 1, "debug": debug, "dump": said["HETU_DUMP"]}
    return _checked(Settings(), changes)


def _digit(name: str, text: str | None, most: int) -> int:
    if text is None:
        return 0
    if text not in map(str, range(most + 1)):
        wanted = "0 or 1" if most == 1 else f"0 to {most}"
        raise HetuError(f"{name} is {shown(text)}, expected {wanted}", where=caller(), fix="unset it for 0")
    return int(text)


def _checked(old: Settings, changes: dict[str, Any]) -> Settings:
    known = [item.name for item in dataclasses.fields(Settings)]
    for name, value in changes.items():
        if name not in known:
            raise HetuError(f"there is no setting {name!r}", where=caller(), fix=f"use one of {', '.join(known)}")
        if name == "debug":
            changes[name] = integer(value, name, least=0, most=3, op="config")
        elif name == "dump":
            changes[name] = None if value is None else path(value, name, op="config")
        elif name == "hosts":
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

_READ = ("HETU_BACKEND", "HETU_COMPILE", "HETU_DEBUG", "HETU_DUMP")
"""The variables that are settings' defaults."""

_BACKEND, _COMPILE, _DEBUG, _DUMP = map(raw_name, _READ)


def settings() -> Settings:
    """The settings in force: those of ``hetu.config``, else of the variables."""
    found, get = _settings.get(), raw_environment.get
    return found or _from_environment(get(_BACKEND), get(_COMPILE), get(_DEBUG), get(_DUMP))


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

    def __repr__(self) -> str:
        return f"<hetu.config: {settings()}>"

    def __enter__(self) -> Settings:
        return settings()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _settings.reset(self._token)
