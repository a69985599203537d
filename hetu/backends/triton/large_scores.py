"""Probabilities of the backward, from scores and log-sum-exps, that rounding doesn't take above 1.

``exp2(s * (scale * log2(e)) - lse * log2(e))`` is one fused multiply-add per score. Of a log-sum-exp from 65,536 on
(``running_max.LARGE``) its rounding is no small part of the exponent: a probability of 1 would come out as anything.
Such rows take the scores as the forward rounds them. The largest then is the log-sum-exp itself, where that holds no
digits of other scores, and nothing is above it: what another order of a sum leaves above it counts as it.

Few rows are such, so threads ask first, by instructions of the GPU's own (see running_max.py). All others compute the
one fused multiply-add.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton
import triton.language as tl

from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.running_max import in_place, zeros_and
from hetu.backends.triton.tiles import INTERPRETED, LOG2E

ASKED = tl.constexpr(2.0**-15)
"""What a log-sum-exp is multiplied by where threads ask: the highest bit of its exponent is then set from 65,536 on."""

_LOG2E = "0f3FB8AA3B"
_TO_LSE = "0f47000000"  # from times ASKED: 2**15
_TO_BASE_2 = "0fC738AA3B"  # and -2**15 * LOG2E


@jit
def careful_exponents(s, scale, lse):
    """In base 2, of scores ``s * scale``, rounded as a forward's lse is; s and lse broadcast."""
    if INTERPRETED:
        scores = s * scale
    else:
        scores = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [s, zeros_and(scale, s)], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.minimum(scores - lse, 0.0, propagate_nan=tl.PropagateNan.ALL) * LOG2E


@triton.constexpr_function
def _places(scores, columns, over_columns):
    """For each score of a thread the first one of its row (or column) in a tile of so many columns.

    Of 64 rows a thread has those of two, and of each of these two columns in eight: four scores per eight columns.
    """
    tile = columns // 2
    if over_columns:
        return [i % tile // 4 * 4 + i % 2 for i in range(scores)]
    return [i // tile * tile + i % 4 // 2 * 2 for i in range(scores)]


@triton.constexpr_function
def exponents_ptx(scores, columns, over_columns):
    """PTX for so many scores of a thread.

    $0 .. are the scores, in place, then their log-sum-exps times ASKED, and the last ones the scale.
    """
    first, scale, places = 2 * scores, f"${3 * scores}", _places(scores, columns, over_columns)
    own = sorted(set(places))
    ask = "".join(f"mov.b32 u, ${first + place}; or.b32 t, t, u; " for place in own)
    near = "".join(f"mul.f32 l{place}, ${first + place}, {_TO_BASE_2}; " for place in own)
    near += "".join(f"fma.rn.f32 ${i}, ${i}, c, l{place}; " for i, place in enumerate(places))
    far = "".join(
        f"mul.rn.f32 ${i}, ${i}, {scale}; mul.f32 x, ${first + place}, {_TO_LSE}; sub.rn.f32 ${i}, ${i}, x; "
        f"min.NaN.f32 ${i}, ${i}, 0f00000000; mul.f32 ${i}, ${i}, {_LOG2E}; "
        for i, place in enumerate(places)
    )
    return (
        f"{{ .reg .pred p; .reg .b32 t, u; .reg .f32 c, x, {', '.join(f'l{place}' for place in own)}; "
        f"mov.b32 t, 0; {ask}and.b32 t, t, 0x40000000; setp.ne.u32 p, t, 0; mul.f32 c, {scale}, {_LOG2E}; "
        f"@p bra FAR; {near}bra DONE; FAR: {far}DONE: }}"
    )


@triton.constexpr_function
def exponents_constraints(scores):
    return in_place(scores) + ",f" * scores


@jit
def exponents(s, scale, lse, OVER_COLUMNS: tl.constexpr, OWN: tl.constexpr):
    """In base 2, of a tile of scores times scale less the log-sum-exps of its rows, or of its columns.

    OWN is how many of the scores a thread has, if they lie as ``running_max.check`` says; the log-sum-exps then come
    times ASKED. With 0 all take the careful way.
    """
    wide = lse[None, :] if OVER_COLUMNS else lse[:, None]
    if OWN == 0:
        result = careful_exponents(s, scale, wide)
    else:
        result = tl.inline_asm_elementwise(
            exponents_ptx(OWN, s.shape[1], OVER_COLUMNS),
            exponents_constraints(OWN),
            [s, tl.broadcast_to(wide, s.shape), zeros_and(scale, s)],
            dtype=tl.float32,
            is_pure=True,
            pack=OWN,
        )
    return result


@jit
def asked(lse, OWN: tl.constexpr):
    """Log-sum-exps as :func:`exponents` takes them."""
    if OWN:
        lse *= ASKED
    return lse
