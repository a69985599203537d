"""The host side of the Triton backend: work lists and tiles."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from hetu.backends.attention.contract import BackwardState, new_state
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.work import query_work
from hetu.backends.triton import (
    BackwardVariant,
    PackedHeads,
    Tile,
    Variant,
    backward_tile,
    backward_variants,
    launch,
    launch_backward,
    tile,
    variants,
)
from hetu.backends.triton.launcher import Launcher
from hetu.backends.triton.rows import row_dot
from hetu.backends.triton.variants import (
    DTYPES,
    FLAGGED_DTYPES,
    FLAGGED_HEAD_DIMS,
    HEAD_DIMS,
    INTERPRETER,
    MAX_PACK,
    named_strides,
    rounded_keys,
    row_strides,
    whole_strides,
)
from hetu.backends.triton.variants_backward import BackwardTiles
from hetu.parallel import Mask
from hetu.parallel.mask.segments import SegmentTable
from hetu.parallel.mask.varlen import varlen_tables


@pytest.mark.parametrize("is_backward", [False, True])
def test_work_is_made_once(is_backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share lengths share the work list, and what is on the device of it."""
    made = []
    module = launch_backward if is_backward else launch

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(arguments)
        return query_work(*arguments, **options)

    monkeypatch.setattr(module, "query_work", counted)
    spans, table = varlen_tables(np.array([0, 9]), np.array([0, 9]), 9, Mask.causal())
    for heads in (2, 2, 4):
        q, k = torch.randn(9, heads, 8), torch.randn(9, 2, 8)
        state = new_state(q, spans, 1, 9, runs_on=False)
        launch.attend(AttendCall(q, k, k, spans, table, 1.0), state)
        if is_backward:
            of = BackwardState(q, state.lse, torch.zeros(9, heads), torch.empty_like(q))
            grads = torch.empty_like(k), torch.empty_like(k)
            launch_backward.attend_backward(AttendCall(q, k, k, spans, table, 1.0), of, *grads)
    assert len(made) == 2, "one for the layers with two heads, one for that with four"


def test_strides_of_single_rows_and_heads_make_no_variant() -> None:
    row = torch.zeros(9, 6, 8)[:1]
    assert row_strides(row) == (48, 8)
    assert row_strides(row.as_strided((1, 6, 8), (7, 8, 1))) == (48, 8)
    assert row_strides(torch.zeros(5, 1, 8).as_strided((5, 1, 8), (8, 3, 1))) == (8, 8)
    packed = torch.zeros(5, 80).view(5, 10, 8)[:, 2:4]
    assert row_strides(packed) == (80, 8)
    named = {"STRIDE_QT": 48, "STRIDE_QH": 8, "STRIDE_KT": 80, "STRIDE_KH": 8}
    assert named_strides("QK", [(48, 8), (80, 8)]) == named
    assert whole_strides(8, {"Q": 6, "K": 10}) == named


@pytest.mark.parametrize(
    ("num_q", "num_kv", "pack"), [(8, 8, 1), (8, 4, 2), (6, 1, 2), (7, 1, 1), (32, 8, 4), (16, 1, 4)]
)
def test_heads_of_a_group_are_packed(num_q: int, num_kv: int, pack: int) -> None:
    assert PackedHeads(num_q, num_kv).pack == pack


@pytest.mark.parametrize("num_q", [1, 4])
def test_a_launchs_key_decides_what_is_compiled(num_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one row or of none have the strides of views of many, and are compiled for others."""
    of_key: dict[Any, Any] = {}

    def note(_: Launcher, device: torch.device, key: Any, programs: int, given: Any, constants: Any, *of: Any) -> None:
        assert of_key.setdefault(key, constants(*of)) == constants(*of)

    monkeypatch.setattr(Launcher, "__call__", note)
    for is_wide, rows, keys in product([False, True], [1, 2, 300], [0, 1, 2, 300]):
        tokens = max(rows, keys)
        qkv = torch.zeros(tokens, 3 * num_q, 16) if is_wide else torch.zeros(3, tokens, num_q, 16).transpose(0, 1)
        heads = qkv.chunk(3, 1) if is_wide else qkv.unbind(1)
        q, k, v = heads[0][:rows], heads[1][:keys], heads[2][:keys]
        spans, table = varlen_tables(np.array([0, rows]), np.array([0, keys]), rows, Mask.full())
        state = new_state(q, spans, 1, rows, runs_on=False)
        launch.attend(AttendCall(q, k, v, spans, table, 1.0), state)
        of = BackwardState(state.out, state.lse, row_dot(state.out, q), torch.empty_like(q))
        grads = torch.empty_like(k), torch.empty_like(v)
        launch_backward.attend_backward(AttendCall(q, k, v, spans, table, 1.0), of, *grads)
    assert len(of_key) > 12


KEYS_PER_ROW = (0, 128, 255, 256, 511, 512, 1535, 1536, 4095, 4096, 1e6)
PACKS = (1, 2, MAX_PACK)


def check_tile(shape: Tile) -> None:
    for size in (shape.block_m, shape.block_n):
        assert size >= 16 and size & (size - 1) == 0, "dots take powers of two from 16 on"
    assert shape.block_m >= MAX_PACK
    assert shape.num_warps in (1, 2, 4, 8) and shape.num_stages >= 1


@pytest.mark.parametrize("capability", [INTERPRETER, 80, 86, 90, 100, 120])
def test_tiles_are_what_triton_takes(capability: int) -> None:
    for variant in variants():
        assert variant.head_dim <= variant.block_d and variant.block_d & (variant.block_d - 1) == 0
        for keys in KEYS_PER_ROW:
            for pack in PACKS:
                check_tile(tile(variant, capability, keys, pack))
    for each in backward_variants():
        for keys in KEYS_PER_ROW:
            tiles = backward_tile(each, capability, keys)
            check_tile(tiles.keys)
            check_tile(tiles.queries)
            assert tiles.keys.num_warps == tiles.queries.num_warps, "both are of one launch"


def test_lengths_choose_among_few_tiles() -> None:
    """Lengths change from run to run: each other tile is another compilation."""
    counts = {rounded_keys(keys) for keys in range(0, 10_000, 64)}
    assert len(counts) < 10
    for capability in (INTERPRETER, 80, 90):
        for variant, pack in product(variants(), PACKS):
            assert len({tile(variant, capability, keys, pack) for keys in counts}) <= 2
        for each in backward_variants():
            assert len({backward_tile(each, capability, keys) for keys in counts}) <= 2


@pytest.mark.parametrize("capability", [INTERPRETER, 80, 90])
def test_tiles_change_where_it_is_said(capability: int) -> None:
    """Launches of new lengths look for their tile by this number, and not by the exact one."""
    counts = [
        0.0,
        1.0,
        5e6,
        *(edge + by for edge in (256, 512, 1024, 1536, 2048, 4096, 8192) for by in (-0.5, 0.0, 0.5)),
    ]
    assert sorted({rounded_keys(count) for count in counts}) == [0, 256, 512, 1536]
    for count, pack in product(counts, PACKS):
        keys = rounded_keys(count)
        assert keys <= count
        for variant in variants():
            assert tile(variant, capability, keys, pack) == tile(variant, capability, count, pack)
        for each in backward_variants():
            assert backward_tile(each, capability, keys) == backward_tile(each, capability, count)


def test_keys_of_the_rows_that_a_step_attends_for() -> None:
    """Not of all: the tile would be one for short documents wherever few rows see anything in a step."""
    cu_seqlens = np.array([0, 10, 200])
    spans, table = varlen_tables(cu_seqlens, cu_seqlens, 200, Mask.full())
    assert launch.keys_per_row(spans, table) == (10 * 10 + 190 * 190) / 200
    first = SegmentTable(table.query[:1], table.k_start[:1], table.k_len[:1], table.diagonal[:1])
    assert launch.keys_per_row(spans, first) == 10
    assert launch.keys_per_row(spans, SegmentTable(*np.empty((4, 0), np.int64))) == 0


KNOWN = {"knows_threads": True, "skips_rescaling": True}


def test_tiles_that_were_tuned() -> None:
    half = torch.bfloat16
    assert tile(Variant(64, half), 90, 200, pack=4) == Tile(64, 32, 4, 4, **KNOWN)
    for keys, pack in ((0, 1), (200, 1), (256, 2), (2000, 4), (9999, 1)):
        chosen = Tile(64, 64, 4, 3, max_registers=128, **KNOWN)
        assert tile(Variant(64, half), 90, keys, pack) == chosen
    for keys, runs_on in product((200, 511), (False, True)):
        chosen = Tile(64, 32, 4, 3, max_registers=168, **KNOWN, chunk=1)
        assert tile(Variant(128, torch.float16, runs_on=runs_on), 90, keys) == chosen
    for keys, pack in ((512, 1), (9999, 1), (5000, 4)):
        assert tile(Variant(128, half), 90, keys, pack) == Tile(64, 64, 4, 3, **KNOWN)
    assert tile(Variant(256, half), 90, 256) == Tile(64, 32, 4, 2, **KNOWN, chunk=1)
    assert tile(Variant(256, half), 90, 512) == Tile(128, 64, 8, 2, knows_threads=True)


def test_tiles_of_the_backward_that_were_tuned() -> None:
    chosen = {(d, k): backward_tile(BackwardVariant(d, torch.bfloat16), 90, k) for d in (64, 128) for k in (1535, 1536)}
    known = partial(Tile, knows_threads=True)
    short = BackwardTiles(known(32, 64, 4, 3, max_registers=168), known(64, 64, 4, 3))
    assert chosen[64, 1535] == short and chosen[64, 1536] == BackwardTiles(known(32, 128, 4, 3), known(128, 64, 4, 3))
    assert chosen[128, 1535] == chosen[128, 1536] == BackwardTiles(known(32, 64, 4, 3), known(64, 64, 4, 2))
    wide = backward_tile(BackwardVariant(256, torch.bfloat16), 90)
    assert wide.is_split and wide.values == known(64, 128, 8, 2)
    assert wide.keys == known(32, 128, 8, 3) and wide.queries == known(128, 32, 8, 3)


def test_instructions_for_a_thread_are_where_its_elements_are_known() -> None:
    """Where warps have whole rows of tensor cores of sm_90."""
    capabilities = (INTERPRETER, 80, 90, 100, 120)
    for variant, capability, keys in product(variants(), capabilities, KEYS_PER_ROW):
        chosen = tile(variant, capability, keys)
        assert chosen.knows_threads == (capability == 90 and variant.dtype != torch.float32)
        assert chosen.knows_threads or not chosen.skips_rescaling
        if chosen.knows_threads:
            assert chosen.block_m == 16 * chosen.num_warps
    for backward, capability, keys in product(backward_variants(), capabilities, KEYS_PER_ROW):
        tiles = backward_tile(backward, capability, keys)
        own = {
            key: value
            for key, value in backward.constants(PackedHeads(8, 2), tiles, {}).items()
            if key.endswith("_OWN")
        }
        assert all(own.values()) if capability == 90 and backward.dtype != torch.float32 else not any(own.values())


def test_consumers_blackwell_has_as_little_shared_memory_as_ampere() -> None:
    for each in variants():
        assert tile(each, 120, 2_000) == tile(each, 86, 2_000)
    for backward in backward_variants():
        assert backward_tile(backward, 120, 2_000) == backward_tile(backward, 86, 2_000)


def test_variants_are_all_there() -> None:
    every = list(variants())
    flagged = len(FLAGGED_HEAD_DIMS) * len(FLAGGED_DTYPES) * len(("lower", "softcap", "sinks"))
    assert len(set(every)) == len(every) == len(DTYPES) * len(HEAD_DIMS) * 16 + flagged
