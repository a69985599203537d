"""The ops that users call. One module a family; each op stands in the registry of :mod:`hetu.graph`."""

from hetu.ops.activations import gelu, silu
from hetu.ops.arithmetic import add, div, mul, sub
from hetu.ops.attention import attn_varlen
from hetu.ops.collective import all_reduce, step_sum
from hetu.ops.layout_tokens import layout_tokens
from hetu.ops.linalg import linear, matmul
from hetu.ops.loss import cross_entropy, token_mean_loss
from hetu.ops.nn import cast, embedding, softmax
from hetu.ops.norms import layer_norm, rms_norm
from hetu.ops.parallel_attention import parallel_attn
from hetu.ops.random import dropout
from hetu.ops.reduce import mean, sum
from hetu.ops.rotary import rotary
from hetu.ops.shape import concat, reshape, slice, transpose
from hetu.ops.sources import constant, full, parameter, placeholder
from hetu.ops.swiglu import swiglu

__all__ = [
    "add",
    "all_reduce",
    "attn_varlen",
    "cast",
    "concat",
    "constant",
    "cross_entropy",
    "div",
    "dropout",
    "embedding",
    "full",
    "gelu",
    "layer_norm",
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
    "rotary",
    "silu",
    "slice",
    "softmax",
    "step_sum",
    "sub",
    "sum",
    "swiglu",
    "token_mean_loss",
    "transpose",
]
