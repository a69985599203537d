"""A search for the fastest tile on the device at hand: for ``HETU_AUTOTUNE=1``, kept on disk where that can be.

The tiles of ``variants.py`` were measured on some devices. On another one, or with another version of Triton, a search
may find faster ones: the first call of each kind then tries every candidate, which takes minutes, and writes the winner
to ``$HETU_CACHE_DIR`` (or ``~/.cache/hetu``), where every later process finds it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from hashlib import sha256
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from hetu.backends.attention import records, work
from hetu.backends.triton import kept_tiles
from hetu.backends.triton.variants import PackedHeads, Tile, Variant
from hetu.backends.triton.variants_backward import BackwardTiles, BackwardVariant
from hetu.config import raw_environment, raw_name

AnyTile = TypeVar("AnyTile", Tile, BackwardTiles)

REPEATS = 5
"""Times that a candidate is launched; the fastest counts."""


def is_wanted(device: torch.device) -> bool:
    """Whether tiles are searched for on a device."""
    return raw_environment.get(_WANTED) is not None and os.environ["HETU_AUTOTUNE"] == "1" and device.type == "cuda"


_WANTED = raw_name("HETU_AUTOTUNE")

_known: dict[tuple[Path, str], Any] = {}
"""What this process found, or read and tried: it searches once, whether what it finds can be kept or not."""


def tuned(
    kind: str,
    default: AnyTile,
    candidates: Iterable[AnyTile],
    trial: Callable[[AnyTile], float] | None,
    device: torch.device,
) -> AnyTile:
    """The fastest tile of a kind of call: from the disk, or found by trying.

    Args:
        kind: What the choice is for; see :func:`kind_of`.
        default: What is used where nothing is kept and nothing can be tried; it is tried too.
        candidates: What else to try. Those that the device has no room for are passed over.
        trial: Milliseconds of a call with a tile; None where a call can't be repeated, since it adds to what is there.
        device: Where it runs.
    """
    path = cache_file(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    found = _known.get((path, kind))
    if found is not None:
        return cast(AnyTile, found)
    kept = kept_tiles.read(path, kind, default)
    if trial is None:
        return default if kept is None else kept
    if kept is None or _time(kept, trial, (Exception,)) is None:  # a file may name what can't be compiled here
        times = {tile: _time(tile, trial) for tile in dict.fromkeys(chain([default], candidates))}
        fitting = {tile: time for tile, time in times.items() if time is not None}
        kept = min(fitting, key=fitting.__getitem__, default=default)
        kept_tiles.write(path, kind, kept)
    _known[path, kind] = kept
    return kept


def _time(
    tile: AnyTile,
    trial: Callable[[AnyTile], float],
    passed_over: tuple[type[Exception], ...] = (OutOfResources, PTXASError),
) -> float | None:
    """Milliseconds of a call with a tile; None if it fails, as where the device has no room for it."""
    try:
        return trial(tile)
    except passed_over:
        return None


def kind_of(variant: Variant | BackwardVariant, heads: PackedHeads, keys_per_row: float) -> str:
    """What one search is for. Steps of a longer attention take the tile of a whole one; lengths are of two classes."""
    flags = [name for name in ("dropout", "scores", "lower", "softcap", "sinks") if getattr(variant, name, False)]
    direction = "backward" if isinstance(variant, BackwardVariant) else "forward"
    dtype = str(variant.dtype).removeprefix("torch.")
    keys = "few" if keys_per_row < 512 else "many"
    return " ".join([direction, f"{heads.num_q}:{heads.num_kv}:{variant.head_dim}", dtype, *flags, f"{keys} keys"])


def milliseconds(call: Callable[[], object]) -> float:
    """Time of a call on the device, the first of which compiles."""
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return min(float(start.elapsed_time(end)) for start, end in events)


def forward_candidates(default: Tile) -> Iterator[Tile]:
    """Tiles of the forward around a default."""
    for block_m, block_n, warps, stages in product((64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4)):
        yield replace(default, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages, max_registers=None)


def backward_candidates(default: BackwardTiles) -> Iterator[BackwardTiles]:
    """Tiles of the backward around a default."""
    keys_tiles, query_tiles = [(32, 64), (32, 128), (64, 64), (64, 128)], [(64, 32), (64, 64), (128, 32), (128, 64)]
    for keys, queries, warps, stages in product(keys_tiles, query_tiles, (4, 8), (2, 3)):
        tile = replace(default.keys, num_warps=warps, num_stages=stages, max_registers=None)
        yield replace(
            default,
            keys=replace(tile, block_m=keys[0], block_n=keys[1]),
            queries=replace(tile, block_m=queries[0], block_n=queries[1]),
            own_values=None,
        )


# What is kept


@cache
def cache_file(device: str) -> Path:
    """Where the tiles of a device are kept, for this version of Triton and these kernels: others want other tiles."""
    folder = os.environ.get("HETU_CACHE_DIR") or _default_folder()
    kernels = sha256(b"".join(file.read_bytes() for file in kernel_files())).hexdigest()
    name = re.sub(r"\W+", "-", f"{device} triton {triton.__version__} kernels {kernels[:8]}").lower()
    return Path(folder) / f"tiles-{name}.json"


def _default_folder() -> Path:
    try:
        return Path.home() / ".cache" / "hetu"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"hetu-{os.getuid()}"


def kernel_files() -> list[Path]:
    """The files that decide what kernels do and what they are told: this room's, and those that make work lists."""
    return [*sorted(Path(__file__).parent.glob("*.py")), Path(records.__file__), Path(work.__file__)]
