"""Draws the pictures of README and docs from layouts, plans and results: ``python docs/tools/pictures.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from plots import plots
from svg import RANKS, Picture

import hetu
from hetu.parallel import SPLITS, AttnPlan, Hardware, Heads, build_plan

IMAGES = Path(__file__).resolve().parent.parent / "images"
HEADS = Heads(num_q=32, num_kv=8, head_dim=128, itemsize=2)
DOCUMENTS = (10, 7, 4, 3)
CAUSAL = hetu.Mask.causal()


def packed(split: str = "sym") -> hetu.Layout:
    """Four documents over four ranks of six tokens."""
    return hetu.Layout.build([6] * 4, [0] * 4, split=split, cu_seqlens=np.cumsum([0, *DOCUMENTS], dtype=np.int32))


def matrix(picture: Picture, drawn: str, x: float, y: float, cell: int) -> None:
    """Draws what ``layout.draw`` and ``plan.draw`` say in characters: who holds a token, who computes a pair."""
    lines = [line.split() for line in drawn.splitlines()[1:]]
    held = lines[0][2]
    for i, holder in enumerate(held):
        picture.box(x + i * cell, y - cell - 4, cell - 1, cell - 1, RANKS[int(holder)])
        picture.box(x - cell - 4, y + i * cell, cell - 1, cell - 1, RANKS[int(holder)])
    for i, (_, marks) in enumerate(lines[1:]):
        for j, mark in enumerate(marks):
            colour = "empty" if mark == "·" else RANKS[int(mark)]
            picture.box(x + j * cell, y + i * cell, cell - 1, cell - 1, colour)


def packed_batch() -> Picture:
    """Who holds and who computes what of a packed batch."""
    layout = packed()
    plan = build_plan(layout, heads=HEADS)
    plan.verify()
    picture = Picture(760, 480, "A packed batch of four documents over four ranks: who holds and who computes what")
    picture.text(24, 30, "4 documents of 10, 7, 4 and 3 tokens, packed, over 4 ranks", "bold")
    cell, x, y = 15, 66, 88
    begin = 0
    for number, length in enumerate(DOCUMENTS):
        picture.text(x + (begin + length / 2) * cell, 60, f"doc {number}", "small", "middle")
        begin += length
    matrix(picture, plan.draw(), x, y, cell)
    picture.text(
        40,
        y + 24 * cell + 16,
        "row: query; column: key; margins: who holds the token; 1:6 is token 6 of doc 1",
        "small",
    )
    left = 462
    for rank, colour in enumerate(RANKS):
        top = 88 + rank * 84
        picture.box(left, top - 11, 13, 13, colour)
        picture.text(left + 20, top, f"rank {rank}", "bold")
        for i, (document, position) in enumerate(zip(layout.documents(rank), layout.positions(rank), strict=True)):
            picture.box(left + i * 42, top + 9, 38, 17, colour, 0.25)
            picture.text(left + i * 42 + 19, top + 22, f"{document}:{position}", "small", "middle")
        received = f"{plan.rows_received(rank)} rows of keys"
        picture.text(left, top + 44, f"computes {plan.pairs(rank)} pairs, receives {received}", "small")
    total = sum(plan.pairs(rank) for rank in range(4))
    picture.text(left, 88 + 4 * 84 + 2, f"plan.verify(): each of {total} pairs, once", "bold")
    return picture


def splits() -> Picture:
    """The four splits of the same documents."""
    names = list(SPLITS)
    picture = Picture(760, 48 + 52 * len(names), "Who holds which token under each split")
    picture.text(110, 26, "who holds each token of documents of 10, 7, 4 and 3 tokens", "small")
    for row, name in enumerate(names):
        y = 44 + 52 * row
        picture.text(24, y + 15, name, "bold")
        layout = packed(name)
        owner = np.empty(24, int)
        for rank in range(4):
            owner[layout.columns(rank)] = rank
        ends = np.cumsum(DOCUMENTS)
        for token, rank in enumerate(owner):
            x = 110 + token * 24 + 10 * int((ends <= token).sum())
            picture.box(x, y, 22, 22, RANKS[rank])
            picture.text(x + 11, y + 15, str(rank), "on", "middle")
        work = [build_plan(layout, heads=HEADS).pairs(rank) for rank in range(4)]
        picture.text(110, y + 38, f"pairs of a causal mask on each rank: {', '.join(map(str, work))}", "small")
    return picture


def masks() -> Picture:
    """The kinds of masks over one document of two ranks."""
    kinds = (CAUSAL, hetu.Mask.window(3, 0), hetu.Mask.chunked(5), hetu.Mask.prefix([4]))
    picture = Picture(760, 236, "Four masks over one document on two ranks")
    layout = hetu.Layout.build([6, 6], [0, 0], split="sym")
    for i, mask in enumerate(kinds):
        x = 40 + 182 * i
        picture.text(x - 14, 28, mask.name, "bold")
        matrix(picture, layout.draw(mask), x, 58, 12)
        plan = build_plan(layout, mask=mask, heads=HEADS)
        rows = [plan.rows_received(rank) for rank in range(2)]
        picture.text(x - 14, 222, f"rows that travel: {rows[0]} + {rows[1]}", "small")
    return picture


def timeline(picture: Picture, plan: AttnPlan, hardware: Hardware, top: int, name: str, scale: float) -> None:
    """Draws when each pipeline computes and receives, as ``plan.trace`` predicts it."""
    picture.text(24, top, name, "bold")
    for event in plan.trace(hardware)["traceEvents"]:
        if event["ph"] != "X":
            continue
        rank, is_attend = event["pid"], event["name"].startswith("attend")
        is_receive = event["name"].startswith("receive")
        if is_attend or is_receive:
            y = top + 14 + rank * 30 + (0 if is_attend else 15)
            x, width = 100 + event["ts"] * scale, event["dur"] * scale
            picture.box(x, y, max(width - 1, 1), 13 if is_attend else 7, RANKS[rank], 1 if is_attend else 0.5)


def plans() -> Picture:
    """When ranks compute and receive under two methods."""
    layout = hetu.Layout.build([2048] * 4, [0] * 4, split="sym")
    hardware = Hardware(flops=4e14, link_bytes=2e11, latency=5e-6, memory_bytes=8e10)
    methods = ("direct", "ring", "ulysses")
    made = [build_plan(layout, method=method, heads=HEADS) for method in methods]
    longest = max(plan.cost(hardware).time for plan in made) * 1e6
    picture = Picture(760, 56 + 156 * len(methods), "When four ranks compute and receive, as plans predict it")
    for i, (method, plan) in enumerate(zip(methods, made, strict=True)):
        plan.verify()
        time = plan.cost(hardware).time * 1e6
        timeline(picture, plan, hardware, 30 + 156 * i, f'method="{method}": {time:.0f} µs', 630 / longest)
        for rank in range(4):
            picture.text(88, 30 + 156 * i + 26 + rank * 30, f"rank {rank}", "small", "end")
    bottom = 30 + 156 * len(methods)
    picture.text(
        24, bottom + 6, "thick: computes; thin: what it receives is under way. 8,192 tokens, causal, forward", "small"
    )
    return picture


def memory() -> Picture:
    """What each rank holds at most, by method."""
    picture = Picture(760, 196, "Peak memory of a plan by method")
    layout = hetu.Layout.build([2048] * 8, [0] * 8, split="sym")
    picture.text(
        24, 28, "what a rank holds at most, its own rows included: 16,384 tokens over 8 ranks, forward", "bold"
    )
    sizes = {name: build_plan(layout, method=name, heads=HEADS) for name in ("direct", "ring", "all_gather", "ulysses")}
    most = max(plan.peak_bytes(0) for plan in sizes.values())
    for i, (name, plan) in enumerate(sizes.items()):
        y = 48 + i * 36
        held = max(plan.peak_bytes(rank) for rank in range(8))
        picture.text(110, y + 16, name, "", "end")
        picture.box(120, y, 500 * held / most, 24, RANKS[0])
        picture.text(128 + 500 * held / most, y + 16, f"{held / 2**20:.0f} MiB")
    return picture


def pictures() -> dict[str, str]:
    """Every picture by the name of its file."""
    own = {
        "packed_batch": packed_batch(),
        "splits": splits(),
        "masks": masks(),
        "plans": plans(),
        "memory": memory(),
    }
    return {f"{name}.svg": picture.svg() for name, picture in (own | plots()).items()}


if __name__ == "__main__":
    for file, text in pictures().items():
        (IMAGES / file).write_text(text, encoding="utf-8")
        print(IMAGES / file)
