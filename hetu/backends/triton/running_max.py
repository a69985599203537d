"""The running softmax of a block of rows: its maximum, and the rescaling of what was summed up under a smaller one.

A row's maximum is kept as two numbers, what is taken from a score before and after it is multiplied by the factor that
brings it into base 2: a *base* and a *shift*, so that the exponent of a score s is ``(s - base) * factor - shift``. Of
nearly all rows the base is 0, and the shift is the maximum in base 2: one fused multiply-add a score. Where the maximum
is LARGE or more its rounding would be no small part of an exponent, from 2**31 on more than an exponential bears. There
the base is the maximum itself, and differences of such scores are exact where they matter.

Both are kept as rows of eight equal columns, ``(rows, 8)``: of a tile of scores, a thread of tensor cores has two
columns in eight, so each has the maximum of its rows beside their scores, and the compiler nothing to move. Without
tensor cores, for float32, they are one number a row, ``(rows,)``: there the columns would be spilled.

There are two ways of raising the maximum. The textbook's asks all threads of a row for theirs in each
iteration, and multiplies all accumulators by what the maximum rose. FlashAttention-4's lets it lag behind: while no row
of a warp has a score more than 8 (in base 2) above it, nothing is asked for and nothing is multiplied. That takes a
branch, which Triton has no words for, and so instructions of the GPU's own and an order of the elements in a thread, to
which :func:`check` holds what was compiled. So does leaving out the subtraction of a base where it is 0.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import re
from typing import Any

import triton
import triton.language as tl

from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.tiles import LOG2E, halves
from hetu.errors import LoweringError, caller

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The base of no scores: finite, so that differences of two of them are 0 and no NaN, and no finite score is below."""

LARGE = tl.constexpr(65536.0)
"""From this size on a maximum in base 2, or a log-sum-exp, is one of large scores: rounded by up to 2**-8."""

_ONE = "0f3F800000"
_SLACK = "0f41000000"
"""By how much a maximum may lag behind, in base 2: 8, so that probabilities are 256 at most."""
_LESS = "0fC1000000"
"""The shift of a base that isn't 0: the maximum then counts as one that lags by 8 already, and so never does."""
_LARGE = "0f47800000"


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
def kept(start, scale, PRECISION: tl.constexpr):
    """The base and the shift of rows that begin with the log-sum-exps ``start``, ``(rows,)``, in the shape for them.

    Args:
        start: -inf where a row begins with nothing.
        scale: What scores are multiplied by before they are those of ``start``.
        PRECISION: Of the dots.
    """
    shift = start * LOG2E
    is_large = tl.abs(shift) >= LARGE
    base = tl.where(is_large, tl.minimum(tl.maximum(tl.fdiv(start, scale), LOWEST), -LOWEST), 0.0)
    # What rounding, or the ends of float32, left of it.
    shift = tl.where(is_large, tl.fma(-base, zeros_and(scale, base), start) * LOG2E, shift)
    shift = tl.minimum(tl.maximum(shift, LOWEST), -LOWEST)
    if PRECISION == "tf32":
        base = tl.broadcast_to(base[:, None], [base.shape[0], 8])
        shift = tl.broadcast_to(shift[:, None], [shift.shape[0], 8])
    return base, shift


@jit
def zeros_and(number, like):
    """A number for each element of a tensor."""
    return tl.zeros_like(like) + number


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
def raise_ptx():
    """PTX for a thread's two columns of two rows.

    $0-3, $4-7 and $8-11 are what :func:`raised` gives, $12-15 the tops, $16-19 and $20-23 base and shift before, $24
    the factor. Where any row of the warp has a score too far above, all rows follow theirs.
    """
    ask = "".join(
        f"shfl.sync.bfly.b32 t, {x}, {lane}, 0x1f, -1; max.f32 {x}, {x}, t; " for lane in (2, 1) for x in "ab"
    )
    excess = "sub.f32 {x}, {top}, ${base}; neg.f32 t, ${shift}; fma.rn.f32 {x}, {x}, $24, t; "
    follow = (
        excess + "setp.neu.f32 q, ${base}, 0f00000000; selp.f32 t, " + _SLACK + ", 0f00000000, q; "
        "setp.gt.f32 p, {x}, t; "  # whether it rises: a base is the largest score itself
        "mul.f32 t, {top}, $24; abs.f32 u, t; setp.ge.f32 q, u, " + _LARGE + "; "
        "selp.f32 u, {top}, 0f00000000, q; selp.f32 t, " + _LESS + ", t, q; "
        "selp.f32 ${to}, u, ${base}, p; selp.f32 ${then}, t, ${shift}, p; "
        "sub.f32 u, ${base}, ${to}; sub.f32 t, ${shift}, ${then}; fma.rn.f32 u, u, $24, t; "
        "ex2.approx.ftz.f32 ${fade}, u; "
    )
    rows = [
        {"x": "c", "top": "a", "base": 16, "shift": 20, "to": 0, "then": 4, "fade": 8},
        {"x": "d", "top": "b", "base": 18, "shift": 22, "to": 2, "then": 6, "fade": 10},
    ]
    return (
        "{ .reg .pred p, q; .reg .f32 a, b, c, d, t, u; max.f32 a, $12, $13; max.f32 b, $14, $15; "
        + "".join(excess.format(**row) for row in rows)
        + f"setp.gt.f32 p, c, {_SLACK}; setp.gt.or.f32 p, d, {_SLACK}, p; vote.sync.any.pred p, p, -1; "
        f"mov.f32 $0, $16; mov.f32 $2, $18; mov.f32 $4, $20; mov.f32 $6, $22; "
        f"mov.f32 $8, {_ONE}; mov.f32 $10, {_ONE}; @!p bra DONE; {ask}"
        + "".join(follow.format(**row) for row in rows)
        + "DONE: "
        + "".join(f"mov.f32 ${i + 1}, ${i}; " for i in range(0, 12, 2))
        + "}"
    )


@jit
def raised(base, shift, s, factor, OWN: tl.constexpr):
    """Base and shift with the scores s, and 2 to the power of what the maximum was before less what it is.

    Args:
        base, shift: Those before, as :func:`kept` gives them.
        s: ``(rows, columns)``; -inf where a row sees nothing.
        factor: Of the scores in base 2; positive.
        OWN: As of :func:`taken`; with 0 the maximum is that of all scores, else it may be 8 less.
    """
    if OWN == 0:
        top = tl.max(s, 1) if len(base.shape) == 1 else tl.max(tops(s), 1)[:, None]
        rises = (top - base) * factor - shift > 0.0
        new_base = tl.where(rises, top, base)
        new_shift = tl.where(rises, 0.0, shift)
        fade = tl.math.exp2((base - new_base) * factor + (shift - new_shift))
    else:
        new_base, new_shift, fade = tl.inline_asm_elementwise(
            raise_ptx(),
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
            [tops(s), base, shift, zeros_and(factor, base)],
            dtype=(tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    return new_base, new_shift, fade


@triton.constexpr_function
def in_place(elements):
    """Constraints of so many elements, changed in place, each with another operand."""
    return ",".join(["=f"] * elements + [str(i) for i in range(elements)] + ["f"] * elements)


@triton.constexpr_function
def take_ptx(scores):
    """PTX that takes their bases from so many scores, if any row of a thread's two has one.

    $0 .. are the scores, in place, and the last ones the bases.
    """
    first = 2 * scores
    differences = "".join(f"sub.f32 ${i}, ${i}, ${first + i}; " for i in range(scores))
    return (
        f"{{ .reg .pred p; .reg .b32 t, u; mov.b32 t, ${first}; mov.b32 u, ${first + 2}; or.b32 t, t, u; "
        f"setp.ne.u32 p, t, 0; @!p bra DONE; {differences}DONE: }}"
    )


@jit
def taken(s, base, OWN: tl.constexpr):
    """Scores ``(rows, columns)`` less the base of :func:`raised`.

    OWN is how many of the scores a thread has, if it has them of two rows as :func:`check` says: then those whose bases
    are 0 leave it out. 0 subtracts in any case, whatever the layout.
    """
    if OWN == 0:
        result = s - spread(base, s.shape[1])
    else:
        result = tl.inline_asm_elementwise(
            take_ptx(OWN), in_place(OWN), [s, spread(base, s.shape[1])], dtype=tl.float32, is_pure=True, pack=OWN
        )
    return result


@triton.constexpr_function
def rescale_ptx(elements):
    """PTX that multiplies so many accumulators by their factors, if any thread of the warp has one that isn't 1.

    $0 .. are the accumulators, in place, and the last ones the factors.
    """
    first = 2 * elements
    products = "".join(f"mul.f32 ${i}, ${i}, ${first + i}; " for i in range(elements))
    return (
        f"{{ .reg .pred p, q; setp.neu.f32 p, ${first}, {_ONE}; setp.neu.f32 q, ${first + 2}, {_ONE}; "
        f"or.pred p, p, q; @!p bra DONE; {products}DONE: }}"
    )


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
            rescale_ptx(ELEMENTS),
            in_place(ELEMENTS),
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
