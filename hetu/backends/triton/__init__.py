"""The Triton backend: one kernel family over segment tables; the default on CUDA.

Without a GPU the same kernels run in Triton's interpreter on CPU tensors. Triton reads ``TRITON_INTERPRET`` when
its own library and the kernels are defined, so it is set here, before either is imported, unless it is set already.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hetu.backends.triton.launch import attend
from hetu.backends.triton.launch_backward import attend_backward, row_dot
from hetu.backends.triton.variants import Heads, Tile, Variant, compiler_options, tile, variants
from hetu.backends.triton.variants_backward import (
    BackwardTiles,
    BackwardVariant,
    backward_options,
    backward_tile,
    backward_variants,
)

__all__ = [
    "BackwardTiles",
    "BackwardVariant",
    "Heads",
    "Tile",
    "Variant",
    "attend",
    "attend_backward",
    "backward_options",
    "backward_tile",
    "backward_variants",
    "compiler_options",
    "row_dot",
    "tile",
    "variants",
]
