"""The file in which tiles are kept that a search found: read and written so that nothing about it can end a run.

Whoever can write to the folder can write anything into the file, several processes write at once, and a disk may be
full or read-only. So what is read is believed only where it is a tile that kernels take, and what can't be read or
written is passed over with a warning: then tiles are searched for anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from hetu.backends.triton.variants import Tile
from hetu.backends.triton.variants_backward import BackwardTiles

AnyTile = TypeVar("AnyTile", Tile, BackwardTiles)

MAX_FILE_BYTES = 2**22
"""A larger file is none of ours: a kind takes half a kilobyte."""

LOCK_SECONDS = 2.0
"""How long a writer waits for another one, which has to write a few kilobytes."""

_warned: set[str] = set()


def read(path: Path, kind: str, like: AnyTile) -> AnyTile | None:
    """The tile that is kept for a kind of call; None if there is none that kernels take.

    Args:
        path: The file.
        kind: What the tile is for.
        like: A tile for the same kind: its class and precision must be those of what is kept.
    """
    kept = _entries(path).get(kind)
    return None if kept is None else decoded(kept, like)


def write(path: Path, kind: str, tile: Tile | BackwardTiles) -> None:
    """Adds a tile to the file, which is whole at any moment, and keeps what other processes add meanwhile."""
    with _warning(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            text = json.dumps({**_entries(path), kind: asdict(tile)}, indent=1)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                try:
                    file.write(text + "\n")
                    file.close()
                    os.replace(file.name, path)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(file.name)
                    raise


@contextlib.contextmanager
def _warning(path: Path, done: str) -> Iterator[None]:
    """Passes over what the system or the contents of a file refuse; warns once per file and reason."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = f"hetu: tiles in {path} can't be {done}, so they are searched for anew: {reason[:200]}"
        if text not in _warned:
            _warned.add(text)
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """What the file holds by kind of call, as far as it looks like tiles; nothing where there is no file."""
    found: Any = {}
    with _warning(path, "read"), contextlib.suppress(FileNotFoundError):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # nobody writes to a pipe
            raise ValueError("it is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has {status.st_size:,} bytes")
        found = json.loads(path.read_bytes().decode())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not tiles by kind of call")
    return {kind: kept for kind, kept in found.items() if isinstance(kept, dict)} if isinstance(found, dict) else {}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, if its file system has any and nobody keeps it: an entry that is lost is found again."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)  # which ends the lock
            _wait_for_lock(handle)
        yield


def _wait_for_lock(handle: int) -> None:
    until = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.002)


# What a tile may be


def _is_block(value: Any) -> bool:
    return _is_int(value, 16, 256) and value & (value - 1) == 0


def _is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_flag(value: Any) -> bool:
    return type(value) is bool


_TILE: Mapping[str, Callable[[Any], bool]] = {
    "block_m": _is_block,
    "block_n": _is_block,
    "num_warps": lambda value: type(value) is int and value in (1, 2, 4, 8, 16),
    "num_stages": lambda value: _is_int(value, 1, 8),
    "max_registers": lambda value: value is None or _is_int(value, 16, 255),
    "precision": lambda value: type(value) is str,  # compared with that of another tile for the same kind
    "masks_all": _is_flag,
    "knows_threads": _is_flag,
    "skips_rescaling": _is_flag,
    "chunk": lambda value: _is_int(value, 1, 2**12),
}
"""What each field of a tile may be; the least and the most of what searches try, and a little beyond."""


def decoded(kept: Any, like: AnyTile) -> AnyTile | None:
    """A tile from what JSON made of it; None if it is none that may stand for ``like``."""
    found = _tile(kept) if isinstance(like, Tile) else _backward_tiles(kept)
    if found is None or _precisions(found) != _precisions(like):
        return None
    return found


def _tile(kept: Any) -> Tile | None:
    if not isinstance(kept, dict) or set(kept) != set(_TILE):
        return None
    return Tile(**kept) if all(holds(kept[name]) for name, holds in _TILE.items()) else None


def _backward_tiles(kept: Any) -> BackwardTiles | None:
    if not isinstance(kept, dict) or set(kept) != {item.name for item in fields(BackwardTiles)}:
        return None
    keys, queries, values = (_tile(kept[name]) for name in ("keys", "queries", "own_values"))
    if keys is None or queries is None or (values is None and kept["own_values"] is not None):
        return None
    if not _is_flag(kept["is_split"]) or not _is_int(kept["chunk"], 1, 2**12):
        return None
    if values is not None and not kept["is_split"]:  # they have no programs of their own
        return None
    every = [keys, queries] + ([values] if values else [])
    if len({(tile.num_warps, tile.masks_all) for tile in every}) > 1:  # they are launched together
        return None
    return BackwardTiles(keys, queries, kept["is_split"], values, kept["chunk"])


def _precisions(tile: Tile | BackwardTiles) -> set[str]:
    """The precisions of the tiles of a kind, which decide what is computed and not how fast."""
    every = [tile] if isinstance(tile, Tile) else [tile.keys, tile.queries, tile.values]
    return {one.precision for one in every}
