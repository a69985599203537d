"""The search for tiles: what it chooses, what it keeps, and when it tries nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.table_checks import check_backward, check_forward, whole_documents
from triton.runtime.errors import OutOfResources

from hetu.backends.triton import BackwardTiles, BackwardVariant, PackedHeads, Tile, Variant, autotune, launch, tile
from hetu.backends.triton.variants import MAX_PACK

CPU = torch.device("cpu")
DEFAULT = Tile(64, 64, 4, 1, precision="ieee")
OTHER, LARGE = replace(DEFAULT, block_n=32), replace(DEFAULT, block_m=128)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HETU_CACHE_DIR", str(tmp_path))
    _as_another_process()
    yield tmp_path
    _as_another_process()


def _as_another_process() -> None:
    """Forgets what this process knows: what is kept is read again."""
    autotune.cache_file.cache_clear()
    autotune._known.clear()


def timed(times: dict[Tile, float], tried: list[Tile]) -> Callable[[Tile], float]:
    def trial(tile: Tile) -> float:
        tried.append(tile)
        if times[tile] < 0:
            raise OutOfResources(2, 1, "shared memory")
        return times[tile]

    return trial


def test_the_fastest_is_chosen_and_kept(folder: Path) -> None:
    tried: list[Tile] = []
    trial = timed({DEFAULT: 3.0, OTHER: 1.0, LARGE: 2.0}, tried)
    assert autotune.tuned("a", DEFAULT, [OTHER, LARGE, DEFAULT], trial, CPU) == OTHER
    assert tried == [DEFAULT, OTHER, LARGE], "each once"
    assert autotune.tuned("a", DEFAULT, [OTHER, LARGE], trial, CPU) == OTHER and len(tried) == 3
    _as_another_process()
    assert autotune.tuned("a", DEFAULT, [OTHER, LARGE], trial, CPU) == OTHER and tried[3:] == [OTHER], "tried once"
    assert autotune.tuned("b", DEFAULT, [LARGE], trial, CPU) == LARGE
    (file,) = folder.iterdir()
    assert set(json.loads(file.read_text())) == {"a", "b"}, "a search keeps what others found, and leaves no other file"


def test_what_has_no_room_is_passed_over() -> None:
    trial = timed({DEFAULT: 3.0, OTHER: -1.0, LARGE: -1.0}, [])
    assert autotune.tuned("a", DEFAULT, [OTHER, LARGE], trial, CPU) == DEFAULT
    nothing = timed({DEFAULT: -1.0}, [])
    assert autotune.tuned("b", DEFAULT, [], nothing, CPU) == DEFAULT


def test_calls_that_cannot_be_repeated_take_what_is_kept() -> None:
    assert autotune.tuned("a", DEFAULT, [OTHER], None, CPU) == DEFAULT
    autotune.tuned("a", DEFAULT, [OTHER], timed({DEFAULT: 2.0, OTHER: 1.0}, []), CPU)
    _as_another_process()
    assert autotune.tuned("a", DEFAULT, [OTHER], None, CPU) == OTHER


def test_tiles_of_the_backward_come_back_as_they_were() -> None:
    default = BackwardTiles(DEFAULT, OTHER)
    best = BackwardTiles(LARGE, replace(OTHER, max_registers=168), is_split=True)
    assert autotune.tuned("a", default, [best], lambda tiles: float(tiles is not best), CPU) == best
    _as_another_process()
    assert autotune.tuned("a", default, [], None, CPU) == best
    best = replace(best, own_values=OTHER)
    assert autotune.tuned("b", default, [best], lambda tiles: float(tiles is not best), CPU) == best
    _as_another_process()
    assert autotune.tuned("b", default, [], None, CPU) == best


def test_kinds() -> None:
    heads, half = PackedHeads(8, 2), torch.bfloat16
    plain = Variant(64, half)
    assert autotune.kind_of(plain, heads, 100) == "forward 8:2:64 bfloat16 few keys"
    step = replace(plain, runs_on=True, more=True)
    assert autotune.kind_of(step, heads, 100) == autotune.kind_of(plain, heads, 100)
    others = {
        autotune.kind_of(plain, heads, 5000),
        autotune.kind_of(replace(plain, dropout=True), heads, 100),
        autotune.kind_of(replace(plain, scores=True), heads, 100),
        *(autotune.kind_of(replace(plain, **{flag: True}), heads, 100) for flag in ("lower", "softcap", "sinks")),
        autotune.kind_of(replace(plain, dtype=torch.float16), heads, 100),
        autotune.kind_of(replace(plain, head_dim=72), heads, 100),
        autotune.kind_of(plain, PackedHeads(8, 8), 100),
        autotune.kind_of(BackwardVariant(64, half), heads, 100),
    }
    assert len(others) == 10 and autotune.kind_of(plain, heads, 100) not in others


def test_it_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HETU_AUTOTUNE", raising=False)
    assert not autotune.is_wanted(torch.device("cuda:0"))
    monkeypatch.setenv("HETU_AUTOTUNE", "1")
    assert autotune.is_wanted(torch.device("cuda:0")) and not autotune.is_wanted(CPU)


def test_candidates_are_what_the_kernels_take() -> None:
    every = list(autotune.forward_candidates(DEFAULT))
    pairs = list(autotune.backward_candidates(BackwardTiles(DEFAULT, OTHER, is_split=True, own_values=LARGE)))
    assert len(set(every)) == len(every) and len(set(pairs)) == len(pairs)
    assert all(
        pair.is_split and len({pair.keys.num_warps, pair.values.num_warps, pair.queries.num_warps}) == 1
        for pair in pairs
    )
    for each in [*every, *(pair.keys for pair in pairs), *(pair.queries for pair in pairs)]:
        assert each.block_m >= MAX_PACK and each.block_n >= 16 and each.precision == "ieee"


def test_candidates_skip_rescaling_where_threads_have_two_rows() -> None:
    variant = Variant(128, torch.bfloat16)
    for default in (tile(variant, 90, 9999), tile(variant, 80, 9999)):
        every = list(autotune.forward_candidates(default))
        found = {each: variant.constants(PackedHeads(8, 2), each, {})["ELEMENTS"] for each in every}
        assert {each for each in every if found[each]} == {
            each for each in every if default.skips_rescaling and each.block_m == 16 * each.num_warps
        }
        assert set(found.values()) <= {0, variant.block_d // 2}
        assert any(found.values()) == default.skips_rescaling


def test_tiles_of_other_kernels_are_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = autotune.cache_file("cpu")
    autotune.tuned("a", DEFAULT, [OTHER], timed({DEFAULT: 2.0, OTHER: 1.0}, []), CPU)
    copy = folder / "triton"
    shutil.copytree(Path(autotune.__file__).parent, copy)
    (copy / "kernels.py").write_text("another")
    monkeypatch.setattr(autotune, "__file__", str(copy / "autotune.py"))
    _as_another_process()
    assert autotune.cache_file("cpu") != mine
    assert autotune.tuned("a", DEFAULT, [OTHER], None, CPU) == DEFAULT


@pytest.mark.parametrize("is_backward", [False, True])
def test_a_call_searches_and_is_right(is_backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that prefers the last candidate, on the interpreter."""
    clock = iter(range(1000, 0, -1))

    def milliseconds(call: Callable[[], None]) -> float:
        call()
        return float(next(clock))

    name = "backward_candidates" if is_backward else "forward_candidates"
    tiles = [replace(DEFAULT, block_m=16), replace(DEFAULT, block_m=32, block_n=16)]
    candidates = [BackwardTiles(tile, tile) for tile in tiles] if is_backward else tiles
    monkeypatch.setattr(autotune, "is_wanted", lambda device: True)
    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(autotune, name, lambda default: iter(candidates))
    case = whole_documents([5, 0, 37], True)
    if is_backward:
        check_backward(case, "triton", torch.float32, 16, 0.3, 0.0)
    else:
        check_forward("triton", case, (4, 2), 16, torch.float32)
    kept = json.loads(autotune.cache_file("cpu").read_text())
    direction = "backward" if is_backward else "forward"
    (found,) = (tile for kind, tile in kept.items() if kind.startswith(direction))
    assert (found["queries"] if is_backward else found)["block_m"] == 32
    used = [item.kind.shape for item in case.steps[0].table.copies.values() if isinstance(item, launch.DeviceWork)]
    assert candidates[-1] in used and candidates[0] not in used, "what was found is what is launched"
