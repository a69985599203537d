"""The order in which programs take items of the work list and heads."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.devices import DEVICES
from support.packs import Pack, assert_right, by_kernels

from hetu.backends.triton import BackwardVariant, PackedHeads, Variant, backward_tile, launch, launch_backward, tile
from hetu.backends.triton.tiles import item_and_set


@triton.jit
def order_kernel(found, CHUNK: tl.constexpr, SETS: tl.constexpr):  # type: ignore[no-untyped-def]
    item, set = item_and_set(CHUNK, SETS)
    tl.store(found + 2 * tl.program_id(0), item)
    tl.store(found + 2 * tl.program_id(0) + 1, set)


def order(items: int, sets: int, chunk: int, device: str) -> np.ndarray[Any, Any]:
    """The item and the set of each program."""
    found = torch.full((items * sets, 2), -1, dtype=torch.int32, device=device)
    order_kernel[(items * sets,)](found, chunk, sets)
    return found.cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sets", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_every_item_meets_every_set_once(sets: int, chunk: int, device: str) -> None:
    for items in (1, 2, 7, 8 * chunk - 1, 8 * chunk, 8 * chunk + 1, 9 * chunk + chunk // 2):
        found = order(items, sets, chunk, device)
        assert {tuple(pair) for pair in found.tolist()} == {(item, set) for item in range(items) for set in range(sets)}


def test_a_set_has_a_chunk_to_itself_where_items_are_many() -> None:
    """Else, and with the last items, the sets take turns."""
    chunk, sets = 4, 3
    many = order(34, sets, chunk, "cpu")
    whole, rest = many[: 32 * sets], many[32 * sets :]
    for begin in range(0, len(whole), chunk):
        first = begin // chunk // sets * chunk
        assert whole[begin : begin + chunk].tolist() == [
            [item, begin // chunk % sets] for item in range(first, first + chunk)
        ]
    assert rest.tolist() == [[item, set] for item in (32, 33) for set in range(sets)]
    few = order(31, sets, chunk, "cpu")
    assert few.tolist() == [[item, set] for item in range(31) for set in range(sets)]


def test_programs_of_a_long_document_share_keys() -> None:
    """What it is for: of programs that run at the same time, most walk the same keys."""
    chunk = tile(Variant(128, torch.bfloat16), 90, keys_per_row=32_768).chunk
    found = order(512, 16, chunk, "cpu")[:264]
    assert sum(a == b for a, b in pairwise(found[:, 1])) > 240


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_results_in_this_order(device: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So many documents that whole chunks and some items more are taken, forward and backward."""
    variants = Variant(16, torch.float32), BackwardVariant(16, torch.float32)
    count, chunk = 300, max(tile(variants[0], 90).chunk, backward_tile(variants[1], 90).chunk // 2)
    if device == "cpu":  # 2,000 programs take the interpreter long
        count, chunk = 19, 2

        def with_chunk(choose: Any) -> Any:
            return lambda *arguments: replace(choose(*arguments), chunk=chunk)

        monkeypatch.setattr(launch, "tile", with_chunk(tile))
        monkeypatch.setattr(launch_backward, "backward_tile", with_chunk(backward_tile))
        for module in (launch, launch_backward):
            monkeypatch.setattr(module, "_kind", module._kind.__wrapped__)
    assert 8 * chunk < count, "items are many, and the backward's, of queries and of keys, twice as many"
    assert PackedHeads(*heads).num_q // PackedHeads(*heads).pack > 1, "there are several sets"
    lens = [1 + i * i % 4 for i in range(count)]
    pack = Pack(lens, lens, heads, 16)
    data = pack.data()
    assert_right(pack, data, by_kernels(pack, data, "triton", device))
