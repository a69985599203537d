"""``hetu bench``: a short timing of both ops on this machine, beside torch's own attention."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from hetu import functional
from hetu.cli.answer import Answer, steps, table
from hetu.cli.options import DTYPES, add_lengths, heads_of
from hetu.errors import HetuError
from hetu.parallel.views.report import as_time

Call = Callable[[], torch.Tensor]


def add_options(parser: ArgumentParser) -> None:
    """The command's options."""
    add_lengths(parser, default="512,100,1436")
    parser.add_argument("--dtype", choices=DTYPES, help="(bfloat16 on a GPU, float32 elsewhere)")
    parser.add_argument("--backward", action="store_true", help="times forward and backward together")
    parser.add_argument("--seconds", type=float, default=0.5, help="least time per line (0.5)")


def run(args: Namespace) -> Answer:
    """Times causal attention over the documents."""
    heads = heads_of(args)
    if min(args.lengths) < 0 or not sum(args.lengths):
        raise HetuError(f"--lengths is {args.lengths}, expected tokens of documents", fix="give some, none below 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    shapes = [(sum(args.lengths), n, heads.head_dim) for n in (heads.num_q, heads.num_kv, heads.num_kv)]
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=args.backward) for shape in shapes)
    pairs = sum(n * (n + 1) // 2 for n in args.lengths)
    flops = (14 if args.backward else 4) * heads.head_dim * heads.num_q * pairs
    found = []
    for name, forward in steps(list(_calls(q, k, v, args.lengths).items()), "timing"):
        call = _with_backward(forward, [q, k, v]) if args.backward else forward
        time = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=args.seconds)
        found.append({"what": name, "seconds": time.median, "iqr": time.iqr, "flops_per_second": flops / time.median})
    data = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "lengths": args.lengths,
        "heads": [heads.num_q, heads.num_kv, heads.head_dim],
        "is_backward": args.backward,
        "times": found,
    }
    rows = [[f["what"], as_time(f["seconds"]), as_time(f["iqr"]), f"{f['flops_per_second'] / 1e12:.3g}"] for f in found]
    title = f"causal attention on {data['device']}, {data['dtype']}{', forward and backward' * args.backward}"
    return Answer(data, [table(title, ("what", "median", "spread", "TFLOP/s"), rows)])


def _calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> dict[str, Call]:
    """What is timed: both ops, and torch's own attention, which knows no documents, document by document."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    cp = functional.ContextParallel(cu_seqlens)

    def varlen() -> torch.Tensor:
        out = functional.attn_varlen(q, k, v, cu_seqlens, cu_seqlens, is_causal=True)
        assert isinstance(out, torch.Tensor)
        return out

    def parallel() -> torch.Tensor:
        out = functional.parallel_attn(q, k, v, cp, is_causal=True)
        assert isinstance(out, torch.Tensor)
        return out

    def plain() -> torch.Tensor:
        attend, outs = torch.nn.functional.scaled_dot_product_attention, []
        for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            x, y, z = (tensor.transpose(0, 1)[None] for tensor in part)
            outs.append(attend(x, y, z, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)

    return {"attn_varlen": varlen, "parallel_attn, 1 pipeline": parallel, "torch, a call per document": plain}


def _with_backward(forward: Call, inputs: list[torch.Tensor]) -> Call:
    """Forward and backward."""

    def call() -> torch.Tensor:
        return torch.autograd.grad(forward().sum(), inputs)[0]

    return call
