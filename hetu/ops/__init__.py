"""The ops that users call. One module a family; each op stands in the registry of :mod:`hetu.graph`."""

from hetu.ops.activations import gelu, silu
from hetu.ops.arithmetic import add, div, mul, sub
from hetu.ops.attention import attn_varlen
from hetu.ops.layout_tokens import layout_tokens
from hetu.ops.linalg import linear, matmul
from hetu.ops.nn import cast, embedding, rms_norm, softmax
from hetu.ops.parallel_attention import parallel_attn
from hetu.ops.reduce import mean, sum
from hetu.ops.shape import concat, reshape, slice, transpose
from hetu.ops.sources import constant, full, parameter, placeholder

__all__ = [
    "add",
    "attn_varlen",
    "cast",
    "concat",
    "constant",
    "div",
    "embedding",
    "full",
    "gelu",
    "layout_tokens",
    "linear",
    "matmul",
    "mean",
    "mul",
    "parallel_attn",
    "parameter",
    "placeholder",
    "reshape",
    "rms_norm",
    "silu",
    "slice",
    "softmax",
    "sub",
    "sum",
    "transpose",
]
