"""The file that tiles are kept in: whatever is wrong with it, tiles are searched for anew, with at most a warning."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.longer import LONGER
from triton.runtime.errors import OutOfResources

from hetu.backends.triton import BackwardTiles, Tile, autotune, kept_tiles

CPU = torch.device("cpu")
DEFAULT = Tile(64, 64, 4, 1, precision="ieee")
OTHER = replace(DEFAULT, block_n=32)
PAIR = BackwardTiles(DEFAULT, OTHER)
OTHER_PAIR = BackwardTiles(OTHER, OTHER, is_split=True, own_values=DEFAULT)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HETU_CACHE_DIR", str(tmp_path / "tiles"))
    forget()
    (tmp_path / "tiles").mkdir()
    yield autotune.cache_file("cpu")
    forget()


def forget() -> None:
    """What another process doesn't know."""
    autotune.cache_file.cache_clear()
    autotune._known.clear()
    kept_tiles._warned.clear()


def search(kind: str = "a") -> tuple[Tile, int]:
    """What a call gets, of which the other tile is the faster one, and how many tiles were tried for it."""
    tried: list[Tile] = []

    def trial(tile: Tile) -> float:
        tried.append(tile)
        return float(tile != OTHER)

    return autotune.tuned(kind, DEFAULT, [OTHER], trial, CPU), len(tried)


def entry(**changes: Any) -> Any:
    return {"a": {**asdict(OTHER), **changes}}


CONTENTS: dict[str, Any] = {
    "nothing": b"",
    "cut": json.dumps(entry()).encode()[:-9],
    "not utf-8": b'{"a": "\xff\xfe"}',
    "zeros": bytes(4096),
    "deep": b"[" * 100_000,
    "a number of 5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "a list": [entry()],
    "a text": "a",
    "null": None,
    "NaN": b"NaN",
    "an entry that is none": {"a": 3},
    "an entry of a list": {"a": [64, 64, 4, 1]},
    "an empty entry": {"a": {}},
    "an unknown field": entry(tile=3),
    "a field missing": {"a": {"block_m": 64}},
    "a block as text": entry(block_m="64"),
    "a block as a float": entry(block_m=64.0),
    "a flag for a block": entry(block_m=True),
    "no power of two": entry(block_n=48),
    "no rows": entry(block_m=0),
    "negative rows": entry(block_m=-64),
    "too many rows": entry(block_m=2**40),
    "too few keys": entry(block_n=8),
    "null warps": entry(num_warps=None),
    "3 warps": entry(num_warps=3),
    "no stages": entry(num_stages=0),
    "many stages": entry(num_stages=10**6),
    "a million registers": entry(max_registers=10**6),
    "another precision": entry(precision="tf32"),
    "no precision": entry(precision="fp8"),
    "a flag that is none": entry(masks_all=1),
    "no chunk": entry(chunk=0),
    "the tiles of a backward": {"a": asdict(PAIR)},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_damaged_file_is_searched_for_anew(kind: str, file: Path) -> None:
    content = CONTENTS[kind]
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert search() == (OTHER, 2)
        forget()
        assert search() == (OTHER, 1), "and is whole afterwards"


def broken_folder(file: Path) -> None:
    os.rmdir(file.parent)
    file.parent.write_text("a file")


BROKEN: dict[str, Callable[[Path], object]] = {
    "a folder in its place": lambda file: file.mkdir(),
    "a pipe in its place": lambda file: os.mkfifo(file),
    "a device in its place": lambda file: file.symlink_to("/dev/zero"),
    "a link to itself": lambda file: file.symlink_to(file),
    "a folder that is a file": broken_folder,
    "a huge file": lambda file: (file.touch(), os.truncate(file, 2**40)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_used_costs_one_search_per_process(kind: str, file: Path) -> None:
    BROKEN[kind](file)
    searches_once()


@pytest.mark.parametrize("place", ["tempfile.NamedTemporaryFile", "os.replace", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_folder_that_takes_nothing(place: str, error: OSError, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(place, fails)
    searches_once()
    assert not list(file.parent.iterdir()), "and leaves nothing behind"


def searches_once() -> None:
    with pytest.warns(RuntimeWarning, match="searched for anew"):
        assert search() == (OTHER, 2)
    assert search() == (OTHER, 0), "it is known, though it isn't kept"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search("b") == (OTHER, 2), "and nobody is told twice"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HETU_CACHE_DIR")
    monkeypatch.setattr(Path, "home", homeless)
    autotune.cache_file.cache_clear()
    assert autotune.cache_file("cpu").parent.name == f"hetu-{os.getuid()}"


@pytest.mark.parametrize("error", [OutOfResources(2, 1, "shared memory"), RuntimeError("it doesn't compile")])
def test_a_kept_tile_that_the_device_does_not_take(error: Exception, file: Path) -> None:
    large = replace(DEFAULT, block_m=256)
    file.write_text(json.dumps({"a": asdict(large)}))

    def trial(tile: Tile) -> float:
        if tile == large:
            raise error
        return float(tile != OTHER)

    assert autotune.tuned("a", DEFAULT, [OTHER], trial, CPU) == OTHER


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": None},
        {"keys": {}},
        {"queries": asdict(PAIR)},
        {"own_values": 3},
        {"own_values": asdict(DEFAULT), "is_split": False},
        {"own_values": asdict(replace(DEFAULT, num_warps=8))},
        {"queries": asdict(replace(DEFAULT, num_warps=8))},
        {"queries": asdict(replace(DEFAULT, masks_all=True))},
        {"queries": asdict(replace(DEFAULT, precision="tf32"))},
        {"is_split": 1},
        {"chunk": True},
        {"more": 1},
    ],
)
def test_damaged_tiles_of_a_backward(changes: dict[str, Any]) -> None:
    good = asdict(OTHER_PAIR)
    assert kept_tiles.decoded(good, PAIR) == OTHER_PAIR
    assert kept_tiles.decoded({**good, **changes}, PAIR) is None


def _add(folder: str, number: int) -> None:
    for i in range(10):
        kept_tiles.write(Path(folder) / "tiles.json", f"{number} {i}", OTHER)


def test_processes_that_write_at_once_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add, args=(str(file.parent), number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    kept = json.loads((file.parent / "tiles.json").read_text())
    assert set(kept) == {f"{number} {i}" for number in range(4) for i in range(10)}
    assert os.listdir(file.parent) == ["tiles.json"]


def test_a_lock_that_nobody_lets_go_of_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tiles, "LOCK_SECONDS", 0.05)
    with kept_tiles._locked(tmp_path):
        kept_tiles.write(tmp_path / "tiles.json", "a", OTHER)
    assert kept_tiles.read(tmp_path / "tiles.json", "a", DEFAULT) == OTHER


def test_random_damage(file: Path) -> None:
    """Bytes are changed, cut out and put in; what is read is nothing, or a tile that kernels take."""
    draw = random.Random(14)
    search("a")
    autotune.tuned("b", PAIR, [OTHER_PAIR], lambda tiles: float(tiles != OTHER_PAIR), CPU)
    whole = file.read_bytes()
    for _ in range(300 * LONGER):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(content))
            content[place : place + draw.choice([0, 1, 1, 9])] = draw.choice(
                [b"", b"0", b"-", b'"', b"e9", b"\xff", b"{"]
            )
        file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            one, two = kept_tiles.read(file, "a", DEFAULT), kept_tiles.read(file, "b", PAIR)
        assert one is None or kept_tiles.decoded(asdict(one), DEFAULT) == one
        assert two is None or kept_tiles.decoded(asdict(two), PAIR) == two
