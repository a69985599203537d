"""The kernel families in order, and which of them runs a call: the one place that imports kernels, when first needed.

To add a family, give it a folder ``hetu/backends/<name>/`` whose ``__init__.py`` has a ``FAMILY``, and write its name
into ``hetu.config.BACKENDS``, the ordered list. It stands there, because a wrong name is refused before torch is
imported.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch

from hetu.backends.attention.family import AttendSignature, KernelFamily
from hetu.config import BACKENDS, settings
from hetu.errors import LoweringError, caller

_FOLDERS = {"torch": "eager"}
"""Folders that are not named as their family: ``hetu/backends/torch/`` has the lowerings of other ops."""


def default_backend(device: torch.device) -> str:
    """The family that calls on a device are offered to first.

    It is the one of ``hetu.config`` or ``HETU_BACKEND``, else the first of all on CUDA and the last, torch, elsewhere.
    """
    return settings().backend or (BACKENDS[0] if device.type == "cuda" else BACKENDS[-1])


@cache
def family(name: str) -> KernelFamily:
    """A family by its name; imports it.

    Raises:
        ModuleNotFoundError: If a library that it needs is not installed.
    """
    found: KernelFamily = import_module(f"hetu.backends.{_FOLDERS.get(name, name)}").FAMILY
    return found


class Choice(NamedTuple):
    """Who runs a call.

    Attributes:
        family: The first family of the list, from where the setting says, that takes the call.
        declined: The names of those before it, each with its reason.

    Example:
        >>> print(choose("torch", AttendSignature(torch.float64, torch.device("cpu"), 64, 2, 1)))
        torch
    """

    family: KernelFamily
    declined: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "; ".join([self.family.name, *(f"{name} declined: {reason}" for name, reason in self.declined)])


@cache
def choose(backend: str, signature: AttendSignature) -> Choice:
    """Chooses the family that runs calls of a signature.

    Args:
        backend: The name of the family that they are offered to first; those after it in the list follow.
        signature: What is known of the calls.

    Raises:
        LoweringError: If no family takes them; gives each one's reason.
    """
    declined: list[tuple[str, str]] = []
    for name in BACKENDS[BACKENDS.index(backend) :]:
        reason = _reason(name, signature)
        if reason is None:
            return Choice(family(name), tuple(declined))
        declined.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in declined)
    raise LoweringError(f"no kernel family takes the attention: {reasons}", where=caller())


def _reason(name: str, signature: AttendSignature) -> str | None:
    """Why a family does not take such calls; None if it does."""
    try:
        return family(name).declines(signature)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("hetu"):
            raise
        return f"{error.name} is not installed"
