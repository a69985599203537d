"""The Triton family: attention in one set of kernels over segment tables; the default on CUDA.

Without a GPU the same kernels run in Triton's interpreter on CPU tensors; see ``interpreter.py``.
"""

from __future__ import annotations

from hetu.backends.attention.family import AttendSignature, KernelFamily
from hetu.backends.triton import launch, launch_backward, rows
from hetu.backends.triton.variants import (
    DTYPES,
    HEAD_DIMS,
    PackedHeads,
    Tile,
    Variant,
    compiler_options,
    tile,
    variants,
)
from hetu.backends.triton.variants_backward import (
    BackwardTiles,
    BackwardVariant,
    backward_options,
    backward_tile,
    backward_variants,
)

__all__ = [
    "FAMILY",
    "BackwardTiles",
    "BackwardVariant",
    "PackedHeads",
    "Tile",
    "Variant",
    "backward_options",
    "backward_tile",
    "backward_variants",
    "compiler_options",
    "tile",
    "variants",
]


class TritonFamily(KernelFamily):
    """Takes float16, bfloat16 and float32, and head_dim 8 to 256 in multiples of 8."""

    name = "triton"
    attend = staticmethod(launch.attend)
    attend_backward = staticmethod(launch_backward.attend_backward)
    row_dot = staticmethod(rows.row_dot)
    gather = staticmethod(rows.gather)

    def declines(self, signature: AttendSignature) -> str | None:
        """Says which of the two does not fit."""
        if signature.dtype not in DTYPES:
            return f"{str(signature.dtype).removeprefix('torch.')} has no kernel"
        if signature.head_dim not in HEAD_DIMS:
            return f"head_dim {signature.head_dim} has no kernel"
        return None


FAMILY = TritonFamily()
