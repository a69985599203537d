"""Modules that models need, with the names and the initial values of PyTorch's, so that a state dict maps by name."""

from hetu.nn.layers import Embedding, Linear, Module, RMSNorm
from hetu.nn.transformer import Attention, SwiGLU

__all__ = ["Attention", "Embedding", "Linear", "Module", "RMSNorm", "SwiGLU"]
