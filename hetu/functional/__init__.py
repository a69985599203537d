"""hetu's attention for models that are written in PyTorch: the kernels without the graph."""

from hetu.functional.varlen import attn_varlen

__all__ = ["attn_varlen"]
