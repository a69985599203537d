"""Backends: how nodes are computed. Importing this package registers every backend's lowerings."""

from hetu.backends import lower_attention, lower_attention_backward, torch
from hetu.backends.kernels import default_backend

__all__ = ["default_backend", "lower_attention", "lower_attention_backward", "torch"]
