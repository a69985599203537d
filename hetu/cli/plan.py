"""``hetu plan``: who holds and computes what, what is sent, and how long it will take."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from hetu.cli.answer import Answer, table
from hetu.cli.options import add_hardware, add_problem, hardware_of, heads_of, mask_of, plan_of, plan_on, positive
from hetu.parallel import AttnPlan, BatchPlan, Cost, plan_batch
from hetu.parallel.views.report import as_bytes, as_time


def add_options(parser: ArgumentParser) -> None:
    """The command's options."""
    add_problem(parser, split=None)
    add_hardware(parser)
    what = "most tokens per pipeline and micro-batch, where no split is named (twice the even share)"
    parser.add_argument("--max-tokens", type=positive, metavar="N", help=what)
    parser.add_argument("--output", metavar="FILE", help="writes the picture: .png, .svg or .pdf")


def run(args: Namespace) -> Answer:
    """Plans and prices: with one split over all pipelines, or as ``hetu.plan_batch`` chooses."""
    hardware = hardware_of(args)
    batch = None if args.split else _batch(args)
    plans = [plan_of(args)] if batch is None else [plan_on(args, item.layout) for item in batch.micro_batches]
    shown: list[RenderableType] = [] if batch is None else [escape(str(batch)), ""]
    told = []
    for number, plan in enumerate(plans):
        cost, picture = plan.cost(hardware), _picture(args.output, number)
        if picture:
            plan.visualize(picture, hardware)
        shown += _shown(plan, cost, args.hardware, picture)
        told.append(_told(plan, cost, picture))
    data = {
        "lengths": args.lengths,
        "split": args.split,
        "mask": repr(mask_of(args)),
        "is_backward": args.backward,
        "hardware": args.hardware,
        "batch": None if batch is None else {"groups": batch.groups, "layer_s": max(batch.seconds, default=0.0)},
        "time_s": sum(item["time_s"] for item in told),
        "micro_batches": told,
    }
    return Answer(data, shown)


def _batch(args: Namespace) -> BatchPlan:
    """What the planner of batches chooses."""
    heads = heads_of(args)
    return plan_batch(
        args.lengths,
        args.pipelines,
        hardware_of(args),
        max_tokens=args.max_tokens or max(1, 2 * -(-sum(args.lengths) // args.pipelines)),
        num_heads=heads.num_q,
        num_kv_heads=heads.num_kv,
        head_dim=heads.head_dim,
        dtype=args.dtype,
        mask=mask_of(args),
    )


def _picture(output: str | None, number: int) -> str | None:
    """The file of a micro-batch's picture: the first one's is the file that was named."""
    if output is None or number == 0:
        return output
    path = Path(output)
    return str(path.with_stem(f"{path.stem}-{number}"))


def _told(plan: AttnPlan, cost: Cost, picture: str | None) -> dict[str, Any]:
    """A micro-batch for programs."""
    pipelines = [
        {
            "pipeline": r,
            "group": plan.layout.place(r)[0].value,
            "tokens": plan.layout.rows(r),
            "pairs": plan.pairs(r),
            "flops": cost.flops[r],
            "bytes_sent": plan.bytes_sent(r),
            "peak_bytes": cost.peak_bytes[r],
            "finish_s": cost.finish[r],
        }
        for r in range(plan.layout.num_pipelines)
    ]
    return {
        "method": plan.method,
        "summary": plan.summary(),
        "time_s": cost.time,
        "fits": cost.fits,
        "layout": str(plan.layout).splitlines(),
        "pipelines": pipelines,
        "picture": picture,
    }


def _shown(plan: AttnPlan, cost: Cost, hardware: str, picture: str | None) -> list[RenderableType]:
    """A micro-batch for people."""
    rows = [
        [
            r,
            plan.layout.place(r)[0].value,
            f"{plan.layout.rows(r):,}",
            f"{plan.pairs(r):,}",
            as_bytes(plan.bytes_sent(r)),
            as_bytes(cost.peak_bytes[r]),
            as_time(cost.finish[r]),
        ]
        for r in range(plan.layout.num_pipelines)
    ]
    columns = ("pipeline", "group", "tokens", "pairs", "sent", "held at most", "done after")
    verdict = f"predicted on {hardware}: {as_time(cost.time)}{'' if cost.fits else '; memory does not suffice'}"
    head = [escape(str(plan.layout)), "", escape(plan.summary())]
    lines: list[RenderableType] = [*head, table("", columns, rows), escape(verdict)]
    return [*lines, *([f"picture: {escape(picture)}"] if picture else [])]
