"""The exact form of the kernels' exponentials, for scores so large that the usual one loses digits, or overflows.

The usual form is one fma and one exponential per score: 2 to the power of ``s * (scale * log2(e)) - m``, where m is
the maximum or the log-sum-exp. The fma rounds once, but m is itself rounded, by up to 2**-24 of its size. Below
``running_max.LARGE`` that makes probabilities wrong by a hundredth at most; far above it their common factor grows,
until it overflows or is 0 from about 2**31 on.

The exact form rounds the scaled scores first, as plain torch does, and subtracts before it multiplies by log2(e): the
difference of two numbers of about the same size has no error. So the largest score has the weight 1, whatever its
size, in the forward and in the backward. It takes some instructions more per score. So it is a loop of its own after
the usual one, and only blocks with such rows run it: the usual loop does not test for them, or once per block.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton.language as tl

from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.running_max import spread, tops
from hetu.backends.triton.tiles import INTERPRETED, LOG2E


@jit
def product(a, b):
    """``a * b``, rounded before anything else is done with it: no part of an fma."""
    if INTERPRETED:
        result = a * b
    else:
        result = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, tl.zeros_like(a) + b], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@jit
def raised_exactly(row_max, s):
    """The exact form: the maximum with scaled scores ``s``, the fade of what was summed up before, and the weights.

    In base e, and whatever the size of the scores. The maximum of no scores is -inf; a score of -inf weighs nothing.
    """
    top = tl.max(s, 1) if len(row_max.shape) == 1 else tl.max(tops(s), 1)[:, None]
    new_max = tl.maximum(row_max, top)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    fade = tl.math.exp2((row_max - base) * LOG2E)
    return new_max, fade, tl.math.exp2((s - spread(base, s.shape[1])) * LOG2E)


@jit
def finite_size(lse):
    """The absolute value of log-sum-exps; 0 of infinities, which rows that see nothing have, and of NaN."""
    size = tl.abs(lse)
    return tl.where(size < float("inf"), size, 0.0)


@jit
def exact_probabilities(s, scale, lse):
    """The probabilities of scores ``s * scale`` whose log-sum-exps are large (``running_max.LARGE``).

    A large log-sum-exp is rounded so much that ``2**(s * scale * log2(e) - lse * log2(e))`` may be anything. Here the
    scores are rounded as the forward's exact form rounds them: then the largest is the log-sum-exp itself, where its
    digits hold no more than that, and none is above it but by another order of the dot product's sum.
    """
    below = tl.minimum(product(s, scale) - lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.math.exp2(below * LOG2E)
