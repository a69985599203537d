"""Compiles kernel variants for one GPU without having it; prints what each uses as a line of JSON.

Run by test_compile.py in a process of its own, because Triton's interpreter and its compiler exclude each other:
``python compile_variants.py 90``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import product
from typing import Any

import torch
import triton
from support.longer import LONGER, covering_part
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hetu.backends.triton import (
    BackwardTiles,
    BackwardVariant,
    PackedHeads,
    Tile,
    Variant,
    backward_options,
    backward_tile,
    compiler_options,
    running_max,
    tile,
    variants,
)

AnyVariant = Variant | BackwardVariant
AnyTile = Tile | BackwardTiles
Case = tuple[int, AnyVariant, AnyTile, PackedHeads]
"""What is compiled: a compute capability, a variant, one of its tiles there, and heads that it is chosen for."""

CAPABILITIES = (80, 90)

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def flagged_widths(capability: int) -> tuple[int, ...]:
    """Where lower diagonals, softcaps and sinks are compiled, each alone: everywhere for what was measured."""
    return (64, 128, 256) if capability >= 90 else (128,)


def flagged_together(capability: int) -> tuple[int, ...]:
    """Where the same are also compiled all at once: a part of the cases needs the widest only once then."""
    return tuple(d for d in flagged_widths(capability) if d != 128)  # of 128 there are some with more flags


def chosen(capability: int) -> list[Variant]:
    """All combinations without extras where speed matters most, and a sample of every other kind."""
    half, single = torch.bfloat16, torch.float32
    return [
        *variants([64, 128], [half], extras=False),
        *(Variant(d, half, dropout=p, scores=s) for d in (64, 128) for p, s in [(True, False), (False, True)]),
        *(Variant(d, half, True, True, True, True) for d in (64, 128)),
        *(Variant(d, single, *flags) for d in (64, 128) for flags in [(False,), (True, True, True, True)]),
        *(Variant(d, torch.float16, runs_on=d % 16 != 0, scores=d == 24) for d in (8, 24, 32, 40, 72, 192, 256)),
        Variant(256, half),
        Variant(256, single, dropout=True),
        *(
            Variant(d, half, **{flag: True})
            for d in flagged_widths(capability)
            for flag in ("lower", "softcap", "sinks")
        ),
        *(Variant(d, half, lower=True, softcap=True, sinks=True) for d in flagged_together(capability)),
        Variant(128, half, True, True, lower=True, softcap=True, sinks=True),
        Variant(128, single, lower=True, softcap=True, sinks=True),
    ]


def chosen_backward(capability: int) -> list[BackwardVariant]:
    """The same for the backward."""
    half, single = torch.bfloat16, torch.float32
    flags = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
    return [
        *(BackwardVariant(d, half, *some) for d in (64, 128) for some in flags),
        *(BackwardVariant(d, torch.float16, runs_on=d % 16 != 0) for d in (72, 256)),
        BackwardVariant(256, half, True, True, True),
        BackwardVariant(64, single, dropout=True),
        BackwardVariant(128, single, runs_on=True),
        BackwardVariant(256, single),
        *(
            BackwardVariant(d, half, **{flag: True})
            for d in flagged_widths(capability)
            for flag in ("lower", "softcap")
        ),
        *(BackwardVariant(d, half, lower=True, softcap=True) for d in flagged_together(capability)),
        BackwardVariant(128, half, True, True, lower=True, softcap=True),
        BackwardVariant(64, single, lower=True, softcap=True),
    ]


HEADS = (PackedHeads(num_q=32, num_kv=8), PackedHeads(num_q=16, num_kv=16))
KEYS_PER_ROW = (100, 10_000)


def tiles_of(variant: AnyVariant, capability: int) -> dict[AnyTile, PackedHeads]:
    """The tiles that are chosen by keys a row and packed heads, each with the first heads that it is chosen for."""
    shapes: dict[AnyTile, PackedHeads] = {}
    for heads, keys in product(HEADS, KEYS_PER_ROW):
        if isinstance(variant, BackwardVariant):
            shapes.setdefault(backward_tile(variant, capability, keys), heads)
        else:
            shapes.setdefault(tile(variant, capability, keys, heads.pack), heads)
    return shapes


def cases(choose: Callable[[int], Sequence[AnyVariant]]) -> list[Case]:
    """What is compiled for any GPU: all that is chosen, or a part of it.

    In that part are all tiles of what runs most, half types of usual widths without flags, and with those each two
    properties meet that meet in the whole: of a variant, whether the tile is its first, and the GPU.
    """
    whole, usual = dict[tuple[Any, ...], Case](), list[Case]()
    for capability in CAPABILITIES:
        for variant in choose(capability):
            for index, (shape, heads) in enumerate(tiles_of(variant, capability).items()):
                case = capability, variant, shape, heads
                whole[capability, index > 0, *astuple(variant)] = case
                if variant in (type(variant)(64, torch.bfloat16), type(variant)(128, torch.bfloat16)):
                    usual.append(case)
    if LONGER > 1:
        return list(whole.values())
    part = [whole[properties] for properties in covering_part(list(whole))]
    return [*usual, *(case for case in part if case not in usual)]


def compiled(case: Case) -> dict[str, object]:
    """Compiles a kernel, and asks cuobjdump what it uses and which instructions it has.

    Registers are of a thread; its stack (spills) and shared memory are in bytes.
    """
    capability, variant, shape, heads = case
    source = variant.source(heads, shape)
    options = backward_options(shape) if isinstance(shape, BackwardTiles) else compiler_options(shape)
    kernel = triton.compile(ASTSource(**source), target=GPUTarget("cuda", capability, 32), options=options)
    running_max.check(kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "variant": f"{variant} {shape}",
        "is_backward": isinstance(variant, BackwardVariant),
        "dtype": str(variant.dtype),
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "products": len(re.findall(r"\bHGMMA\b", code)),
        "starts": len(re.findall(r"\bWARPGROUP\.ARRIVE\b", code)),
        "barriers": max((loop.count("BAR.SYNC") for loop in inner_loops(code) if "HMMA." in loop), default=0),
    }


def inner_loops(code: str) -> list[str]:
    """The innermost loops of machine code, from the target of a branch back to the branch."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", code)
    at = {int(place, 16): index for index, (place, _) in enumerate(lines)}
    branches = [(index, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for index, (_, text) in enumerate(lines)]
    loops = [(at[int(found[1], 16)], index) for index, found in branches if found and int(found[1], 16) in at]
    loops = [(begin, end) for begin, end in loops if begin < end]
    inner = [(b, e) for b, e in loops if not any((c, f) != (b, e) and b <= c and f <= e for c, f in loops)]
    return ["\n".join(text for _, text in lines[begin : end + 1]) for begin, end in inner]


if __name__ == "__main__":
    for choose in (chosen, chosen_backward):
        for case in cases(choose):
            if case[0] == int(sys.argv[1]):
                print(json.dumps(compiled(case)), flush=True)
