"""What the attention kernels share: records of work, tiles of rows, dropout, and dots."""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from hetu.backends.attention import records
from hetu.backends.triton import interpreter
from hetu.backends.triton.interpreter import jit

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

RECORD_WIDTH = tl.constexpr(records.WIDTH)  # int32 fields of a record of work
# Roles of programs, in their records.
QUERIES = tl.constexpr(records.QUERIES)
KEYS = tl.constexpr(records.KEYS)
KEYS_ONLY = tl.constexpr(records.KEYS_ONLY)
VALUES_ONLY = tl.constexpr(records.VALUES_ONLY)
MERGES = tl.constexpr(records.MERGES)
CONTINUES = tl.constexpr(records.CONTINUES)

_PHILOX_ROUNDS = tl.constexpr(7)
_WIDE = tl.constexpr(2**31 // 512)  # a stride from which on offsets inside a tile may pass 2**31
_INT32 = tl.constexpr(2**31)


def _interpreted_range(*bounds: Any, num_stages: Any = None) -> Iterator[int]:
    """``tl.range`` for the interpreter: that of Triton 3.6 cannot make an int of its scalars under NumPy 2.4."""
    return iter(range(*(bound.handle.data.item() if isinstance(bound, tl.tensor) else bound for bound in bounds)))


INTERPRETED = tl.constexpr(interpreter.IS_USED)
loop = _interpreted_range if interpreter.IS_USED else tl.range


@jit
def item_and_set(CHUNK: tl.constexpr, SETS: tl.constexpr):
    """Which item of the work list a program computes, and for which of the SETS of heads; the grid is ``items * SETS``.

    Programs take CHUNK items for one set, then the same items for the next one. With CHUNK 1 those that run at the same
    time are of all heads, and of a long document read the keys of all heads, more than the L2 cache holds. Where items
    are few that does no harm, and all sets of the items with most keys come first, so that what is left at the end is
    short: so it is done there too, and with the last items.
    """
    program = tl.program_id(0)
    items = tl.num_programs(0) // SETS
    begin = program // (CHUNK * SETS) * CHUNK
    place = program - begin * SETS
    is_whole = (begin + CHUNK <= items) & (items >= 8 * CHUNK)
    item = begin + tl.where(is_whole, place % CHUNK, place // SETS)
    set = tl.where(is_whole, place // CHUNK, place % SETS)
    return item, set


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` with float32 accumulation. The interpreter's own dot misreads bfloat16, so it gets float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def add_dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc``; float32 sums a product by itself first: one long chain of additions loses digits."""
    if PRECISION != "tf32":  # float32, then
        # By an fma, because the compiler would turn an addition into the dot's accumulator, and so a chain.
        result = tl.fma(acc, tl.zeros_like(acc) + 1.0, dot(a, b, None, PRECISION))
    else:
        result = dot(a.to(b.dtype), b, acc, PRECISION)
    return result


@jit
def tile_offsets(
    token, member, STRIDE_T: tl.constexpr, STRIDE_H: tl.constexpr, BLOCK_D: tl.constexpr, MEMBERS: tl.constexpr = 512
):
    """Offsets of the elements of a tile whose rows are those of ``token`` and heads ``member``, below MEMBERS.

    Strides are compile-time constants: the distances between the chunks that a thread loads then are immediates
    of its instructions, which saves it some thirty registers of addresses.
    """
    if STRIDE_T >= _WIDE or STRIDE_H * MEMBERS >= _INT32:
        token = token.to(tl.int64)
        member = member.to(tl.int64)
    return (token * STRIDE_T + member * STRIDE_H)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@jit
def load_again(pointer):
    """What was loaded before, without telling the compiler that it is the same.

    Where the addresses of k and v share a term, such as the first row of their segment, LLVM keeps what differs and
    adds the term to each of them in each iteration: up to a seventh of all instructions. So each gets a term of its
    own, and the head, which both need, is in the offsets of the threads.
    """
    return tl.load(pointer, volatile=True)


@jit
def unknown_zero(rows):
    """0, of which the compiler doesn't know that it is, from a positive number.

    Of an outer loop that is known to take one turn ptxas makes, for wide heads and pipelined loads, code in which each
    product on tensor cores waits for the one before. And of an offset that grows by the same in each iteration of a
    loop LLVM makes an address for each row that a thread loads, in two registers each; of one that is xor'ed with this
    it doesn't.
    """
    return tl.minimum(rows, 0)


@jit
def tanh(x, PRECISION: tl.constexpr):
    """The hyperbolic tangent. For half types the hardware's, which is off by 2**-11 of the result at most.

    For float32 by an exponential that cannot overflow; near 0, where 1 less it would lose digits, by a series.
    """
    APPROXIMATES: tl.constexpr = PRECISION == "tf32" and not INTERPRETED
    if APPROXIMATES:
        result = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        fade = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
        far = (1.0 - fade) / (1.0 + fade)
        square = x * x
        series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        result = tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0.0, -far, far))
    return result


@jit
def load_rows(base, offsets, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads a tile; rows that are not ``live`` and columns past HEAD_DIM are 0."""
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(base + offsets, mask=live[:, None], other=0.0)
    else:
        tile = tl.load(base + offsets, mask=live[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM), other=0.0)
    return tile


@jit
def halves(tile):
    """The two halves of the columns of a tile of a power of two of them, without a move between threads."""
    return tl.split(tl.trans(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), 0, 2, 1))


@jit
def first_columns(tile):
    """The first two columns of a tile of a power of two of them, 16 at most."""
    for _ in tl.static_range(3):
        if tile.shape[1] > 2:
            tile, _rest = halves(tile)
    return tl.split(tile)


@jit
def store_rows(base, offsets, tile, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the live rows and first HEAD_DIM columns of a tile, in the target's dtype."""
    mask = live[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=mask)


@jit
def dropout_keeps(key_low, key_high, threshold, document, head, i, j):
    """Which entries dropout keeps, of heads, queries i and keys j that broadcast; see ``attention/dropout.py``."""
    low = key_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = key_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = (i + j + head) * 0
    word0, word1, word2, word3 = tl.philox(
        (high << 32) | low, (j >> 2) + zero, i + zero, document + zero, head + zero, _PHILOX_ROUNDS
    )
    lane = j & 3
    random = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    return random >= threshold.to(tl.uint32, bitcast=True)
