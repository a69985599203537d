"""The ops that users call. One module per family; each op stands in the registry of :mod:`hetu.graph`.

A family's ``__all__`` lists the functions that users call, so an op that joins a family needs no entry here.
"""

from typing import TYPE_CHECKING

from hetu.ops import methods as methods
from hetu.ops.activations import *
from hetu.ops.along import *
from hetu.ops.arithmetic import *
from hetu.ops.attention.attn_varlen import *
from hetu.ops.attention.parallel_attn import *
from hetu.ops.choice import *
from hetu.ops.collective import *
from hetu.ops.compare import *
from hetu.ops.indexing import *
from hetu.ops.joining import *
from hetu.ops.layout_tokens import *
from hetu.ops.linalg import *
from hetu.ops.loss import *
from hetu.ops.nn import *
from hetu.ops.norms import *
from hetu.ops.own import *
from hetu.ops.pointwise import *
from hetu.ops.random import *
from hetu.ops.reduce import *
from hetu.ops.rotary import *
from hetu.ops.rounding import *
from hetu.ops.shape import *
from hetu.ops.sources import *
from hetu.ops.swiglu import *

PUBLIC = sorted(name for name, value in globals().items() if callable(value) and not name.startswith("_"))
"""The names of all functions that users call."""

if not TYPE_CHECKING:  # which sees them by the imports above, and would see nothing in a list that is computed
    __all__ = PUBLIC
