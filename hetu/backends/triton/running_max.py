"""The running softmax of a block of rows: its maximum, and the rescaling of what was summed up under a smaller one.

A row's maximum is kept as a row of eight equal columns, ``(rows, 8)``: of a tile of scores, a thread of tensor cores
has two columns in eight, so each has the maximum of its rows beside their scores, and the compiler nothing to move.
Without tensor cores, for float32, it is one number a row, ``(rows,)``: there the columns would be spilled.

There are two ways of raising the maximum. The textbook's asks all threads of a row for theirs in each
iteration, and multiplies all accumulators by what the maximum rose. FlashAttention-4's lets it lag behind: while no row
of a warp has a score more than 8 (in base 2) above it, nothing is asked for and nothing is multiplied. That takes a
branch, which Triton has no words for, and so instructions of the GPU's own and an order of the elements in a thread, to
which :func:`check` holds what was compiled.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import re
from typing import Any

import triton
import triton.language as tl

from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.tiles import halves
from hetu.errors import LoweringError, caller

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The maximum of no scores: finite, so that differences of two of them are 0 and no NaN."""

_ONE = "0f3F800000"
_SLACK = "0f41000000"
"""By how much a maximum may lag behind, in base 2: 8, so that probabilities are 256 at most."""


@jit
def tops(s):
    """The largest of each eighth column: ``(rows, 8)`` of ``(rows, columns)``.

    A tree: Triton's own reduction is a chain, each step of which waits for the one before.
    """
    for _ in tl.static_range(5):
        if s.shape[1] > 8:
            left, right = halves(s)
            s = tl.maximum(left, right)
    return s


@jit
def kept(row_max, PRECISION: tl.constexpr):
    """The maximum of rows that begin with ``row_max``, ``(rows,)``, as it is kept: finite, and in the shape for it."""
    row_max = tl.maximum(row_max, LOWEST)
    if PRECISION == "tf32":
        row_max = tl.broadcast_to(row_max[:, None], [row_max.shape[0], 8])
    return row_max


@jit
def by_row(row_max):
    """``(rows,)`` of what is kept."""
    if len(row_max.shape) == 2:
        row_max = tl.max(row_max, 1)
    return row_max


@jit
def spread(x, COLUMNS: tl.constexpr):
    """What is kept of rows for each of a tile's columns: ``(rows, COLUMNS)``, or ``(rows, 1)``."""
    if len(x.shape) == 1:
        wide = x[:, None]
    elif COLUMNS == 8:
        wide = x
    else:
        wide = tl.broadcast_to(x[:, None, :], [x.shape[0], COLUMNS // 8, 8])
        wide = tl.reshape(wide, [x.shape[0], COLUMNS])
    return wide


@triton.constexpr_function
def _raise():
    """PTX for a thread's two columns of two rows.

    $0-3 and $4-7 are what :func:`raised` gives, $8-11 the tops, $12-15 the maximum before, $16 the factor.
    """
    ask = "".join(
        f"shfl.sync.bfly.b32 t, {x}, {lane}, 0x1f, -1; max.f32 {x}, {x}, t; " for lane in (2, 1) for x in "ab"
    )
    return (
        "{ .reg .pred p; .reg .f32 a, b, c, d, t; "
        "max.f32 a, $8, $9; max.f32 b, $10, $11; mul.f32 a, a, $16; mul.f32 b, b, $16; "
        f"add.f32 c, $12, {_SLACK}; add.f32 d, $14, {_SLACK}; "
        "setp.gt.f32 p, a, c; setp.gt.or.f32 p, b, d, p; vote.sync.any.pred p, p, -1; "
        f"mov.f32 $0, $12; mov.f32 $2, $14; mov.f32 $4, {_ONE}; mov.f32 $6, {_ONE}; @!p bra DONE; "
        f"{ask}max.f32 $0, $12, a; max.f32 $2, $14, b; "
        "sub.f32 c, $12, $0; sub.f32 d, $14, $2; ex2.approx.ftz.f32 $4, c; ex2.approx.ftz.f32 $6, d; "
        "DONE: mov.f32 $1, $0; mov.f32 $3, $2; mov.f32 $5, $4; mov.f32 $7, $6; }"
    )


@jit
def raised(row_max, s, factor, ELEMENTS: tl.constexpr):
    """The maximum with the scores ``s * factor``, and 2 to the power of what it was before less what it is.

    Args:
        row_max: The maximum before, as :func:`kept` gives it: LOWEST where there were no scores.
        s: ``(rows, columns)``; -inf where a row sees nothing.
        factor: Positive.
        ELEMENTS: As of :func:`rescaled`; with 0 the maximum is that of all scores, else it may be 8 less.
    """
    if ELEMENTS == 0:
        top = tl.max(s, 1) if len(row_max.shape) == 1 else tl.max(tops(s), 1)[:, None]
        new_max = tl.maximum(row_max, top * factor)
        fade = tl.math.exp2(row_max - new_max)
    else:
        new_max, fade = tl.inline_asm_elementwise(
            _raise(),
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f",
            [tops(s), row_max, tl.zeros_like(row_max) + factor],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    return new_max, fade


@triton.constexpr_function
def _rescale(elements):
    """PTX that multiplies so many accumulators by their factors, if any thread of the warp has one that isn't 1.

    $0 .. are the accumulators, in place, and the last ones the factors.
    """
    first = 2 * elements
    products = "".join(f"mul.f32 ${i}, ${i}, ${first + i}; " for i in range(elements))
    return (
        f"{{ .reg .pred p, q; setp.neu.f32 p, ${first}, {_ONE}; setp.neu.f32 q, ${first + 2}, {_ONE}; "
        f"or.pred p, p, q; @!p bra DONE; {products}DONE: }}"
    )


@triton.constexpr_function
def _rescale_operands(elements):
    outputs, factors = ["=f"] * elements, ["f"] * elements
    return ",".join([*outputs, *map(str, range(elements)), *factors])


@jit
def rescaled(acc, fade, ELEMENTS: tl.constexpr):
    """Accumulators ``(rows, columns)`` times the fade of :func:`raised`.

    ELEMENTS is how many of the accumulators a thread has, if it has them of two rows as :func:`check` says: then warps
    all of whose factors are 1 leave it out. 0 multiplies in any case, whatever the layout.

    Source: the conditional rescaling of FlashAttention-4.
    """
    if ELEMENTS == 0:
        result = acc * spread(fade, acc.shape[1])
    else:
        result = tl.inline_asm_elementwise(
            _rescale(ELEMENTS),
            _rescale_operands(ELEMENTS),
            [acc, spread(fade, acc.shape[1])],
            dtype=tl.float32,
            is_pure=True,
            pack=ELEMENTS,
        )
    return result


_FRAGMENT = "register = [[0, 1], [8, 0]], lane = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], warp = [[16, 0]"
"""How tensor cores give a thread the elements of ``(rows, 8)``: two columns of a row, the same of the eighth below."""
_ACCUMULATORS = re.compile(r"nvidia_mma<\{versionMajor = 3, versionMinor = 0, warpsPerCTA = \[\d+, 1\]")
_LAYOUT = re.compile(r"^#(\w+) = #ttg\.(.*)$", re.MULTILINE)
_OURS = 'elementwise_inline_asm "{ .reg .pred'
"""Triton has some of its own, for the parts of float32 numbers."""
_ASM = re.compile(rf"{re.escape(_OURS)}.* -> tensor<\d+x\d+xf32, #(\w+)>")


def check(compiled: Any) -> None:
    """Refuses a kernel whose threads have other elements than the instructions above take for granted.

    Raises:
        LoweringError: If they do, which depends on the version of Triton alone.
    """
    code: str = compiled.asm["ttgir"]
    known = dict(_LAYOUT.findall(code))
    found = [known.get(name, name) for name in _ASM.findall(code)]
    others = [layout for layout in found if _FRAGMENT not in layout and not _ACCUMULATORS.match(layout)]
    if others or len(found) != code.count(_OURS):
        raise LoweringError(
            "this version of Triton gives threads other elements of a tile than the kernel for sm_90 is written for",
            op="attention",
            where=caller(),
            bound=others or ["code that cannot be read"],
            fix="use triton 3.6 to 3.9",
        )
