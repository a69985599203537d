"""The Triton backend: one kernel family over segment tables; the default on CUDA.

Without a GPU the same kernels run in Triton's interpreter on CPU tensors. Triton reads ``TRITON_INTERPRET`` when
its own library and the kernels are defined, so it is set here, before either is imported, unless it is set already.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hetu.backends.triton.launch import attend, work_list
from hetu.backends.triton.launch_backward import attend_backward, key_work_list
from hetu.backends.triton.variants import Tile, Variant, tile, variants
from hetu.backends.triton.variants_backward import BackwardTiles, BackwardVariant, backward_tile, backward_variants

__all__ = [
    "BackwardTiles",
    "BackwardVariant",
    "Tile",
    "Variant",
    "attend",
    "attend_backward",
    "backward_tile",
    "backward_variants",
    "key_work_list",
    "tile",
    "variants",
    "work_list",
]
