"""``hetu autotune``: searches for the fastest tiles of the Triton kernels on this GPU, and keeps them."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from itertools import product

import torch

import hetu
from hetu.cli.answer import Answer, Unavailable, steps, table
from hetu.cli.options import add_lengths, heads_of


def add_options(parser: ArgumentParser) -> None:
    """The command's options."""
    add_lengths(parser, default="256,4096")
    parser.add_argument(
        "--dtypes", default="bfloat16", metavar="NAME,...", help="bfloat16, float16, float32 (bfloat16)"
    )


def run(args: Namespace) -> Answer:
    """Runs forward and backward for each dtype and length with the search on; what was found before is kept.

    Raises:
        Unavailable: If there is no GPU.
    """
    heads = heads_of(args)
    dtypes = [hetu.as_dtype(name) for name in args.dtypes.split(",")]
    if not torch.cuda.is_available():
        raise Unavailable("there is no GPU that torch sees, and tiles are searched for on one: see hetu doctor")
    from hetu.backends.triton.autotune import cache_file  # it brings Triton's compiler

    os.environ["HETU_AUTOTUNE"] = "1"
    file = cache_file(torch.cuda.get_device_name())
    cases = list(product(dtypes, args.lengths))
    for dtype, length in steps(cases, "searching"):
        shapes = [(length, n, heads.head_dim) for n in (heads.num_q, heads.num_kv, heads.num_kv)]
        kind = getattr(torch, dtype.name)
        q, k, v = (torch.randn(shape, device="cuda", dtype=kind, requires_grad=True) for shape in shapes)
        cu_seqlens = torch.tensor([0, length])
        with hetu.config(backend="triton"):
            out = hetu.functional.attn_varlen(q, k, v, cu_seqlens, cu_seqlens, is_causal=True)
            assert isinstance(out, torch.Tensor)
            out.sum().backward()
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows = [[kind, ", ".join(f"{name} {value}" for name, value in tile.items())] for kind, tile in kept.items()]
    data = {"file": str(file), "tiles": kept}
    return Answer(data, [table("tiles that are kept", ("kind of call", "tile"), rows, left=2), f"file: {file}"])
