"""Attention in plain torch: the kernel family that runs everywhere, and computes float64."""

from __future__ import annotations

from hetu.backends.attention.family import AttendSignature, KernelFamily
from hetu.backends.eager import attend, attend_backward


class EagerFamily(KernelFamily):
    """Takes every call, so it ends the list of families."""

    name = "torch"
    attend = staticmethod(attend.attend)
    attend_backward = staticmethod(attend_backward.attend_backward)

    def declines(self, signature: AttendSignature) -> None:
        """Takes everything."""


FAMILY = EagerFamily()
