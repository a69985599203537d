"""Backends: how nodes are computed. Importing this package registers every backend's lowerings."""

from __future__ import annotations

import torch

from hetu.backends import lower_attention
from hetu.backends import torch as torch_backend
from hetu.config import settings

__all__ = ["default_backend", "lower_attention", "torch_backend"]


def default_backend(device: torch.device) -> str:
    """The backend in force: that of ``hetu.config`` or ``HETU_BACKEND``, else triton on CUDA and torch elsewhere."""
    return settings().backend or ("triton" if device.type == "cuda" else "torch")
