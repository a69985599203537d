"""Backends: how nodes are computed. Importing this package registers every backend's lowerings."""

from hetu.backends import torch
from hetu.backends.families import default_backend
from hetu.backends.lower import attention, attention_backward

__all__ = ["attention", "attention_backward", "default_backend", "torch"]
