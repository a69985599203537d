"""Who computes what when: tiles of persistent programs, blocks of keys of a tile, and the buffers between warps."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hetu.backends.triton.tiles import RECORD_WIDTH

# Triton 3.9 has other names.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def place_in(turn):
    """This program's place in a turn: forth and back, which evens out turns whose tiles get lighter one by one."""
    return gl.where(turn % 2 == 1, gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(0))


@gluon.jit
def turns(tiles):
    """How many of the tiles this program computes."""
    programs = gl.num_programs(0)
    return (tiles - place_in(tiles // programs) + programs - 1) // programs


@gluon.jit
def item_at(turn, items, C: gl.constexpr):
    """The item of the work list and the first head of this program's tile in a turn."""
    return item_of(turn * gl.num_programs(0) + place_in(turn), items, C)


@gluon.jit
def item_of(tile, items, C: gl.constexpr):
    """The item of the work list and the first head of a tile.

    Tiles are ordered much as the programs of ``hetu/backends/triton/tiles.py`` are: CHUNK items for a set of PACK
    heads, then the same items for the next one, so that those of a time read keys that the L2 cache holds. Where items
    are few it does so anyway, and all sets of an item follow each other, so that turns have tiles of the same weight.
    """
    begin = tile // (C.CHUNK * C.SETS) * C.CHUNK
    place = tile - begin * C.SETS
    is_whole = (begin + C.CHUNK <= items) & (items >= 16 * C.CHUNK)
    item = begin + gl.where(is_whole, place % C.CHUNK, place // C.SETS)
    chosen = gl.where(is_whole, place // C.CHUNK, place % C.SETS)
    return item, chosen * C.PACK


@gluon.jit
def record_at(records, item):
    """A pointer to a record."""
    return records + item * RECORD_WIDTH


@gluon.jit
def segment_of(record):
    """The first key of a record's segment, how many there are, and the last one that the block's first row sees."""
    return gl.load(record + 8), gl.load(record + 9), gl.load(record + 10)


@gluon.jit
def last_block(k_len, reach, rows, C: gl.constexpr):
    """The last block of a segment's keys that one of the rows sees; block 0 of a segment that none sees."""
    return gl.maximum((gl.minimum(k_len, reach + rows) + C.BLOCK_N - 1) // C.BLOCK_N, 1) - 1


@gluon.jit
def advanced(stage, phase, STAGES: gl.constexpr):
    """The next one of a ring of buffers, and the phase of its barrier."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(COUNT):
        mbarrier.init(made.index(at), count=ARRIVALS)
    return made


@gluon.jit
def next_tile(counter):
    """Takes the next tile, which no other program gets."""
    return gl.atomic_add(counter, 1, sem="relaxed")


@gluon.jit
def tell_tile(buffers, bars, turn, tile):
    """Tells the consumers the tile of a turn, as soon as they have read that of two turns ago."""
    full, empty = bars
    LANE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    buffers.index(turn & 1).store(gl.full([1], 0, gl.int32, LANE) + tile)
    mbarrier.arrive(full.index(turn & 1), count=1)


@gluon.jit
def told_tile(buffers, bars, turn):
    """The tile of a turn, for a consumer."""
    full, empty = bars
    ALL: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)
    tile = gl.max(buffers.index(turn & 1).load(ALL), 0)
    mbarrier.arrive(empty.index(turn & 1), count=1)
    return tile
