"""Which attention kernel serves a backend: the one place that imports them, each when it is first needed."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from hetu.backends.attention import Attend


@cache
def attention_kernel(backend: str) -> Attend:
    """The ``attend`` of a backend, ``"torch"`` or ``"triton"``."""
    module = {"torch": "hetu.backends.torch.attention", "triton": "hetu.backends.triton"}[backend]
    kernel: Attend = import_module(module).attend
    return kernel
