"""hetu's attention for models that are written in PyTorch: the kernels without the graph."""

from hetu.functional.context_parallel import ContextParallel
from hetu.functional.parallel import parallel_attn
from hetu.functional.varlen import attn_varlen

__all__ = ["ContextParallel", "attn_varlen", "parallel_attn"]
