"""What a call says of its scores beside ``is_causal``: windows, masks, a cap and sinks, as the ops take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hetu.arguments import integers
from hetu.arguments import refuse as refuse_argument
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.functional.checks import check_tensor, is_known, name_of, refuse
from hetu.ops.attention.common import is_softcap, softcap_of
from hetu.parallel import Mask
from hetu.parallel.mask.mask import NO_WINDOW

__all__ = [
    "NO_CAP",
    "NO_WINDOW",
    "SCHEMA",
    "USUAL",
    "Masking",
    "check_masking",
    "check_sinks",
    "checked_masking",
    "parted",
]

NO_CAP = 0.0
"""The default of ``softcap``; that of ``window_size`` is :data:`hetu.parallel.mask.mask.NO_WINDOW`."""


class Masking(NamedTuple):
    """What changes scores, as an op takes it: numbers and tensors, so that other ones recompile nothing.

    Attributes:
        left: How many keys before its own a query sees; -1 for all.
        right: How many after its own; -1 for all, as far as ``is_causal`` lets it.
        mask: int64, ``Mask.code`` of a mask that replaces the window and ``is_causal``; None for none.
        softcap: Where scores are capped; 0 for nowhere.
        sinks: ``(H_q,)``, one more logit per head; None for none.
    """

    left: int = -1
    right: int = -1
    mask: torch.Tensor | None = None
    softcap: float = NO_CAP
    sinks: torch.Tensor | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is, to be looked up by: of sinks only what is checked."""
        sinks = self.sinks
        about = None if sinks is None else (sinks.dtype, sinks.shape, sinks.device)
        return self.left, self.right, None if self.mask is None else self.mask.numpy().tobytes(), self.softcap, about

    @property
    def without_sinks(self) -> Masking:
        """The same without sinks, which autograd has to save by its own means."""
        return self if self.sinks is None else self._replace(sinks=None)

    def mask_of(self, is_causal: bool) -> Mask:
        """The mask that it stands for, beside ``is_causal``."""
        if self.mask is not None:
            return Mask.decoded(self.mask.numpy())
        return Mask.of(is_causal, (self.left, self.right))


USUAL = Masking()
"""No window, no mask, no cap and no sinks; this object alone, so that looking for it costs nothing."""

SCHEMA = "SymInt window_left=-1, SymInt window_right=-1, Tensor? mask=None, float softcap=0., Tensor? sinks=None"
"""The last arguments of the ops, in which a masking is handed to them."""


def parted(call: tuple[Any, ...]) -> tuple[tuple[Any, ...], Masking]:
    """The arguments of an op, without q, k and v, as those before the masking's and the masking.

    The op leaves out last ones that are their defaults; all ops have eight before them.
    """
    masking = Masking(*call[8:])
    return call[:8], USUAL if masking == USUAL else masking


def checked_masking(op: str, window_size: Any, softcap: Any, sinks: Any, mask: Any) -> Masking:
    """The arguments of a call as an op takes them.

    Raises:
        HetuError: If one is out of its range, or a mask and a window are given, or a mask has symbols.
        DTypeError: If sinks are no tensor of floats.
    """
    code = None
    if mask is not None:
        Mask.given(False, window_size, mask, op)
        code = torch.from_numpy(mask.code)
        if len(code) == 0:
            what, fix = f"mask is {mask!r}, which has symbols", "give it ints: only a graph binds symbols"
            refuse(HetuError, what, fix, op)
    left, right = _window(window_size, op)
    if not (type(softcap) is float and torch.compiler.is_compiling()):
        softcap = softcap_of(softcap, op)
    if sinks is not None:
        check_tensor(sinks, "sinks", op)
    if torch.compiler.is_compiling() or not (code is None and sinks is None):
        return Masking(left, right, code, softcap, sinks)
    masking = Masking(left, right, None, softcap)
    return USUAL if masking == USUAL else masking


def check_masking(masking: Masking, q: torch.Tensor, op: str) -> None:
    """Refuses bounds and caps that are none, and sinks that don't fit ``q``; runs on fake tensors too."""
    for name, bound in (("left", masking.left), ("right", masking.right)):
        if is_known(bound < -1):
            what = f"the window's {name} bound is {bound}, expected at least -1"
            refuse(HetuError, what, "give the number of keys, or -1 for no bound", op)
    if not is_softcap(masking.softcap):
        softcap_of(masking.softcap, op)
    check_sinks(masking.sinks, q, op)


def check_sinks(sinks: torch.Tensor | None, q: torch.Tensor, op: str) -> None:
    """Refuses sinks that don't fit ``q`` ``(T_q, H_q, head_dim)``."""
    if sinks is None:
        return
    if not sinks.is_floating_point():
        refuse(DTypeError, f"sinks is {name_of(sinks.dtype)}, expected a floating-point type", "sinks.float()", op)
    if sinks.ndim != 1 or sinks.shape[0] != q.shape[1]:
        what = f"sinks has shape {list(sinks.shape)}, expected [{q.shape[1]}], one per head of q"
        refuse(ShapeError, what, "give each query head its logit", op)
    if sinks.device != q.device:
        refuse(HetuError, f"sinks is on {sinks.device}, and q on {q.device}", "move them to one device", op)


def _window(window_size: Any, op: str) -> tuple[int, int]:
    """Two ints. Symbols are refused: only a graph binds them."""
    fix = "give how many keys before its own a query sees, and how many after it; -1 for all"
    least = None if torch.compiler.is_compiling() else -1  # what is traced, the op refuses: errors can't be traced
    bounds = integers(window_size, "window_size", least=least, wanted="(left, right)", op=op, fix=fix)
    if len(bounds) != 2:
        refuse_argument(window_size, "window_size", "(left, right)", op=op, fix=fix)
    return bounds[0], bounds[1]
