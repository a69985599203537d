"""Options that several commands take, and what is made of them."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

import numpy as np

from hetu.arguments import MAX_COUNT
from hetu.dtypes import as_dtype
from hetu.errors import HetuError
from hetu.parallel import METHODS, SPLITS, AttnPlan, Hardware, Heads, Layout, Mask, build_plan

DTYPES = ("bfloat16", "float16", "float32", "float64")
PRESETS: dict[str, Callable[[], Hardware]] = {"cpu": Hardware.cpu, "h100": Hardware.h100, "h200": Hardware.h200}


def add_lengths(parser: ArgumentParser, default: str | None = None) -> None:
    """``--lengths``, and the widths of a token."""
    parser.add_argument(
        "--lengths", type=ints, required=default is None, default=default, metavar="N,N,...", help="tokens per document"
    )
    parser.add_argument("--heads", type=positive, default=32, metavar="N", help="query heads (32)")
    parser.add_argument("--kv-heads", type=positive, default=8, metavar="N", help="heads of keys and values (8)")
    parser.add_argument("--head-dim", type=positive, default=128, metavar="N", help="numbers of a head (128)")


def add_mask(parser: ArgumentParser) -> None:
    """``--mask`` and ``--window``."""
    parser.add_argument("--mask", default="causal", help="causal, full, chunked:SIZE or prefix:LENGTH (causal)")
    parser.add_argument(
        "--window", type=ints, metavar="LEFT,RIGHT", help="keys a query sees before and after it; -1: all"
    )


def add_problem(parser: ArgumentParser, split: str | None = "balanced") -> None:
    """What a plan is a function of; ``split`` is the default, None for what ``hetu.plan_batch`` chooses."""
    add_lengths(parser)
    add_mask(parser)
    parser.add_argument("--pipelines", type=positive, required=True, metavar="N", help="pipelines in the context group")
    spread = f"how tokens are spread over one context group ({split or 'groups and pieces are chosen'})"
    parser.add_argument("--split", default=split, choices=tuple(SPLITS), help=spread)
    parser.add_argument("--method", default="auto", choices=("auto", *METHODS), help="how keys travel (auto)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of keys and values (bfloat16)")
    parser.add_argument("--backward", action="store_true", help="the plan of the gradients")


def add_hardware(parser: ArgumentParser) -> None:
    """``--hardware``."""
    parser.add_argument("--hardware", default="h100", metavar="NAME", help=f"{', '.join(PRESETS)} or a file (h100)")


def ints(text: str) -> list[int]:
    """``100,4000`` as numbers."""
    return [int(item) for item in text.split(",")]


def positive(text: str) -> int:
    """A number of at least 1, which isn't beyond all reason."""
    if not 1 <= (value := int(text)) <= MAX_COUNT:
        raise ValueError(text)
    return value


def mask_of(args: Namespace) -> Mask:
    """The mask that ``--mask`` and ``--window`` ask for.

    Raises:
        HetuError: If there is no such mask.
    """
    kind, _, number = args.mask.partition(":")
    if kind in ("causal", "full") and not number:
        window = (-1, -1) if args.window is None else tuple(args.window)
        return Mask.given(kind == "causal", window, None, "command line")
    if kind in ("chunked", "prefix") and number.isdecimal() and len(number) < 20 and args.window is None:
        return Mask.chunked(int(number)) if kind == "chunked" else Mask.prefix(int(number))
    fix = "use causal or full, with --window LEFT,RIGHT or without it, or chunked:SIZE or prefix:LENGTH"
    raise HetuError(f"there is no mask {args.mask!r}" + " with a window" * (args.window is not None), fix=fix)


def hardware_of(args: Namespace) -> Hardware:
    """The hardware that ``--hardware`` names: a preset, or a file that ``hetu.calibrate`` wrote.

    Raises:
        HetuError: If there is neither, or the file is none of hardware.
    """
    if args.hardware in PRESETS:
        return PRESETS[args.hardware]()
    if not os.path.exists(args.hardware):
        fix = f"use one of {', '.join(PRESETS)}, or a file that hetu.calibrate(path) wrote"
        raise HetuError(f"there is no hardware {args.hardware!r}", fix=fix)
    return Hardware.load(args.hardware)


def heads_of(args: Namespace) -> Heads:
    """The widths of a token."""
    if args.heads % args.kv_heads:
        what = f"--heads is {args.heads}, expected a multiple of --kv-heads, {args.kv_heads}"
        raise HetuError(what, fix="query heads share heads of keys evenly")
    return Heads(
        args.heads, args.kv_heads, args.head_dim, as_dtype(getattr(args, "dtype", None) or "bfloat16").itemsize
    )


def even_layout(lengths: Sequence[int], pipelines: int, split: str, mask: Mask) -> Layout:
    """One context group that holds as many tokens on each pipeline as can be.

    Raises:
        HetuError: If the lengths are none.
    """
    total = sum(lengths)
    rows = [total // pipelines + (r < total % pipelines) for r in range(pipelines)]
    ends = np.cumsum([0, *lengths])
    return Layout.build(rows, [0] * pipelines, split=split, cu_seqlens=ends, mask=mask)


def plan_of(args: Namespace) -> AttnPlan:
    """The plan that the options describe."""
    return plan_on(args, even_layout(args.lengths, args.pipelines, args.split, mask_of(args)))


def plan_on(args: Namespace, layout: Layout) -> AttnPlan:
    """The plan that the options describe, on a given layout."""
    plan = build_plan(layout, method=args.method, mask=mask_of(args), heads=heads_of(args))
    return plan.backward() if args.backward else plan
