"""Which backend serves a run, and its attention kernel: the one place that imports kernels, when first needed."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

from hetu.backends.attention.contract import Attend, AttendBackward, RowDot
from hetu.config import settings


def default_backend(device: torch.device) -> str:
    """The backend in force: that of ``hetu.config`` or ``HETU_BACKEND``, else triton on CUDA and torch elsewhere."""
    return settings().backend or ("triton" if device.type == "cuda" else "torch")


_FORWARD = {"torch": "hetu.backends.eager.attend", "triton": "hetu.backends.triton"}
_BACKWARD = {"torch": "hetu.backends.eager.attend_backward", "triton": "hetu.backends.triton"}
_ROW_DOT = {"torch": "hetu.backends.attention.contract", "triton": "hetu.backends.triton"}


@cache
def attention_kernel(backend: str) -> Attend:
    """The ``attend`` of a backend, ``"torch"`` or ``"triton"``."""
    kernel: Attend = import_module(_FORWARD[backend]).attend
    return kernel


@cache
def backward_kernel(backend: str) -> AttendBackward:
    """The ``attend_backward`` of a backend."""
    kernel: AttendBackward = import_module(_BACKWARD[backend]).attend_backward
    return kernel


@cache
def row_dot_kernel(backend: str) -> RowDot:
    """The ``row_dot`` of a backend."""
    kernel: RowDot = import_module(_ROW_DOT[backend]).row_dot
    return kernel
