"""The Gluon family: attention for Hopper, with TMA and specialised warps; the default there.

It takes what most training is made of, and leaves the rest to the portable kernels of ``hetu/backends/triton/``, which
are its check too. Triton has no interpreter for Gluon: without a GPU its kernels are compiled, and run in tests alone,
in an interpreter of theirs.
"""

from __future__ import annotations

import torch

from hetu.backends.attention.family import AttendSignature, KernelFamily
from hetu.backends.gluon import launch, launch_backward, variants_backward
from hetu.backends.gluon.variants import DTYPES, HEAD_DIMS
from hetu.backends.triton import FAMILY as PORTABLE

__all__ = ["FAMILY"]


class GluonFamily(KernelFamily):
    """Takes float16 and bfloat16 on compute capability 9.0: head_dim 64, 128 or 256, and 128 alone in the backward."""

    name = "gluon"
    attend = staticmethod(launch.attend)
    attend_backward = staticmethod(launch_backward.attend_backward)
    row_dot = staticmethod(PORTABLE.row_dot)
    gather = staticmethod(PORTABLE.gather)

    def declines(self, signature: AttendSignature) -> str | None:
        """Says what of it does not fit."""
        device = signature.device
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            return "it is written for compute capability 9.0"
        if signature.dtype not in DTYPES:
            return f"{str(signature.dtype).removeprefix('torch.')} has no kernel"
        if signature.head_dim not in HEAD_DIMS:
            return f"head_dim {signature.head_dim} has no kernel"
        if signature.has_dropout:
            return "dropout has no kernel"
        if signature.has_scores:
            return "returned probabilities have no kernel"
        if signature.is_backward and signature.head_dim not in variants_backward.HEAD_DIMS:
            return f"the backward has no kernel for head_dim {signature.head_dim}"
        return None


FAMILY = GluonFamily()
