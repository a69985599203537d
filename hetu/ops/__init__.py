"""The ops that users call. One module a family; each op stands in the registry of :mod:`hetu.graph`."""

from hetu.ops.activations import gelu, relu, sigmoid, silu, tanh
from hetu.ops.arithmetic import add, div, mul, sub
from hetu.ops.attention.attn_varlen import attn_varlen
from hetu.ops.attention.parallel_attn import parallel_attn
from hetu.ops.collective import all_reduce, step_sum
from hetu.ops.compare import eq, ge, gt, le, lt, ne, where
from hetu.ops.indexing import gather, slice
from hetu.ops.joining import concat, split
from hetu.ops.layout_tokens import layout_tokens
from hetu.ops.linalg import linear, matmul
from hetu.ops.loss import cross_entropy, token_mean_loss
from hetu.ops.nn import cast, embedding, softmax
from hetu.ops.norms import layer_norm, rms_norm
from hetu.ops.pointwise import exp, log, pow, rsqrt, sqrt
from hetu.ops.random import dropout
from hetu.ops.reduce import max, mean, sum
from hetu.ops.rotary import rotary
from hetu.ops.shape import broadcast_to, reshape, stop_gradient, transpose
from hetu.ops.sources import constant, full, parameter, placeholder
from hetu.ops.swiglu import swiglu

__all__ = [
    "add",
    "all_reduce",
    "attn_varlen",
    "broadcast_to",
    "cast",
    "concat",
    "constant",
    "cross_entropy",
    "div",
    "dropout",
    "embedding",
    "eq",
    "exp",
    "full",
    "gather",
    "ge",
    "gelu",
    "gt",
    "layer_norm",
    "layout_tokens",
    "le",
    "linear",
    "log",
    "lt",
    "matmul",
    "max",
    "mean",
    "mul",
    "ne",
    "parallel_attn",
    "parameter",
    "placeholder",
    "pow",
    "relu",
    "reshape",
    "rms_norm",
    "rotary",
    "rsqrt",
    "sigmoid",
    "silu",
    "slice",
    "softmax",
    "split",
    "sqrt",
    "step_sum",
    "stop_gradient",
    "sub",
    "sum",
    "swiglu",
    "tanh",
    "token_mean_loss",
    "transpose",
    "where",
]
