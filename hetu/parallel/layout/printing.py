"""Layouts as text."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bracketed(document: int, start: int, length: int, step: int) -> str:
    """A span as ``document[start:stop:step]``."""
    stop = start + (length - 1) * step + 1
    return f"{document}[{start}:{stop}{f':{step}' if step > 1 else ''}]"
