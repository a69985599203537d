"""Plots of what the benchmarks kept under ``benchmarks/results/``: nothing is drawn that is not in a file there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svg import RANKS, Picture

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
LENGTHS = {"mix": "real lengths", "one": "one document", "short": "256 each", "ragged": "one long, rest 64"}
GREY = "#8c959f"
Bar = tuple[str, float, str, str]
"""A bar's label, value, colour, and the words behind it."""


def read(name: str) -> dict[str, Any]:
    """A result as it was kept."""
    kept: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return kept


def bars(picture: Picture, bars: Sequence[Bar], x: float, y: float, width: float, most: float) -> float:
    """Draws bars from y downwards, scaled so that ``most`` is ``width`` long. Returns where the next thing may be."""
    for label, value, colour, words in bars:
        picture.text(x - 8, y + 12, label, "small", "end")
        picture.box(x, y, width * value / most, 16, colour)
        picture.text(x + width * value / most + 6, y + 12, words, "small")
        y += 19
    return y


def speed() -> Picture:
    """Attention against FlashAttention-2 on an H200, by the kernels that are chosen there."""
    forward = [
        (row["lengths"], row["tflops"]["FlashAttention-2"], row["tflops"]["gluon"])
        for row in read("gluon_forward_h200")["rows"]
        if (row["heads"], row["tokens"], row["mask"]) == ("32:8:128", 32768, "causal")
    ]
    backward = [
        (row["lengths"], row["tflops"]["FlashAttention-2"], row["tflops"][row["default"]])
        for row in read("gluon_backward_h200")["rows"]
        if (row["heads"], row["mask"]) == ("32:8:128", "causal")
    ]
    picture = Picture(760, 296, "Attention in TFLOP/s: hetu against FlashAttention-2")
    for left, title, rows in (
        (120, "forward, H200, TFLOP/s", {name: (theirs, ours) for name, theirs, ours in forward}),
        (500, "backward, H200, TFLOP/s", {name: (theirs, ours) for name, theirs, ours in backward}),
    ):
        picture.text(left, 30, title, "bold")
        y, most = 48.0, max(max(pair) for pair in rows.values())
        for name, words in LENGTHS.items():
            if name not in rows:
                continue
            theirs, ours = rows[name]
            shown: list[Bar] = [
                (words, ours, RANKS[0], f"{ours:.0f} ({ours / theirs:.1f} times)"),
                ("", theirs, GREY, f"{theirs:.0f}"),
            ]
            y = bars(picture, shown, left, y, 145, most) + 10
    _legend(picture, 256, [("hetu", RANKS[0]), ("FlashAttention-2, as torch has it", GREY)])
    note = "32,768 tokens, causal, bfloat16, 32:8 heads of 128; "
    note += "benchmarks/results/gluon_forward_h200.json, gluon_backward_h200.json"
    picture.text(24, 284, note, "small")
    return picture


def _legend(picture: Picture, y: int, entries: Sequence[tuple[str, str]]) -> None:
    x = 24
    for words, colour in entries:
        picture.box(x, y - 10, 12, 12, colour)
        picture.text(x + 18, y, words, "small")
        x += 34 + 7 * len(words)


STEPS = {
    "hetu": "hetu",
    "hetu compiled": "hetu, compiled",
    "torch.compile, FlashAttention-2": "torch.compile, FA2",
    "torch.compile, hetu.functional": "torch.compile, hetu",
}


def step() -> Picture:
    """A training step of two models on a GPU against the same models under torch.compile."""
    kept = read("step_h200")
    picture = Picture(760, 190, "A training step on one GPU against torch.compile")
    models = (("small", "46 M parameters, 32,768 tokens", 170), ("large", "723 M, 16,384 tokens", 540))
    for model, words, left in models:
        picture.text(left, 30, f"{words}, ms", "bold")
        rows = {row["name"]: row["median"] for row in kept["rows"] if row["unit"] == "ms"}
        most, y = max(rows[f"{model}: step, {peer}"] for peer in STEPS), 48.0
        for peer, name in STEPS.items():
            value, colour = rows[f"{model}: step, {peer}"], RANKS[0] if peer.startswith("hetu") else GREY
            y = bars(picture, [(name, value, colour, f"{value:.0f}")], left, y, 160, most) + 4
    device = kept["device"].partition(" beside")[0]
    note = f"examples/llama.py in bfloat16 on one {device}, {kept['date']}; benchmarks/results/step_h200.json"
    picture.text(24, 178, note, "small")
    return picture


PARTS = {
    "hetu direct": RANKS[0],
    "hetu ring": RANKS[1],
    "hetu ulysses": RANKS[2],
    "torch flash alltoall": GREY,
    "torch cuDNN allgather": GREY,
}


def parallel() -> Picture:
    """What part of twice one GPU's speed two GPUs reach, forward and backward."""
    picture = Picture(760, 310, "Two GPUs against twice the speed of one")
    picture.text(
        24, 28, "two H200, forward and backward: what part of twice the speed of one (by hetu) is reached", "bold"
    )
    rows = [row for row in read("parallel_h200")["rows"] if row["direction"] == "forward+backward"]
    for i, (lengths, words) in enumerate((("one", "one document"), ("mix", "real lengths, tokens 3:2"))):
        for j, tokens in enumerate((8192, 32768)):
            left, y = 160 + 370 * j, 62.0 + 130 * i
            picture.text(left - 60, y - 10, f"{words}, {tokens:,} tokens", "small")
            found = {
                row["peer"]: row["of_ideal"] for row in rows if (row["lengths"], row["tokens"]) == (lengths, tokens)
            }
            shown = [
                (peer, found[peer], colour, f"{found[peer]:.2f}") for peer, colour in PARTS.items() if peer in found
            ]
            bars(picture, shown, left, y, 130, 1.3)
    picture.text(24, 294, "causal, bfloat16, 32:8 heads of 128; benchmarks/results/parallel_h200.json", "small")
    return picture


def plots() -> dict[str, Picture]:
    """Every plot by its name."""
    return {"speed": speed(), "step": step(), "parallel": parallel()}
