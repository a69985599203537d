"""The hardware that strategies and methods are chosen for: one of the process, which a world takes from rank 0."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from hetu.parallel.views.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Chosen:
    """Hardware, with a number that no other has that was set in this process."""

    hardware: Hardware
    number: int


_numbers = itertools.count(1)
_chosen: list[Chosen] = []


def chosen() -> Chosen:
    """What is in force: what was set last, else the file that ``HETU_HARDWARE`` names, else an H100.

    Raises:
        HetuError: If that is no hardware file, or one of another version.
        FileNotFoundError: If there is none.
    """
    if not _chosen:
        path = os.environ.get("HETU_HARDWARE")
        set_hardware(Hardware.load(path) if path else Hardware.h100())
    return _chosen[0]


def set_hardware(hardware: Hardware) -> None:
    """From now on strategies and methods are chosen for this."""
    _chosen[:] = [Chosen(hardware, next(_numbers))]
