"""``hetu plan``: who holds and computes what, what is sent, and how long it will take."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.markup import escape

from hetu.cli.answer import Answer, seconds, sized, table
from hetu.cli.options import add_hardware, add_problem, hardware_of, plan_of


def add_options(parser: ArgumentParser) -> None:
    """The command's options."""
    add_problem(parser)
    add_hardware(parser)
    parser.add_argument("--output", metavar="FILE", help="writes the picture: .png, .svg or .pdf")


def run(args: Namespace) -> Answer:
    """Builds the plan and prices it."""
    plan, hardware = plan_of(args), hardware_of(args)
    cost = plan.cost(hardware)
    if args.output:
        plan.visualize(args.output, hardware)
    pipelines = [
        {
            "pipeline": r,
            "tokens": plan.layout.rows(r),
            "documents": len(set(plan.layout.documents(r).tolist())),
            "pairs": plan.pairs(r),
            "flops": cost.flops[r],
            "bytes_sent": plan.bytes_sent(r),
            "peak_bytes": cost.peak_bytes[r],
            "finish_s": cost.finish[r],
        }
        for r in range(plan.layout.num_pipelines)
    ]
    data = {
        "lengths": args.lengths,
        "method": plan.method,
        "split": args.split,
        "mask": repr(plan.mask),
        "is_backward": plan.is_backward,
        "hardware": args.hardware,
        "time_s": cost.time,
        "fits": cost.fits,
        "layout": str(plan.layout).splitlines(),
        "pipelines": pipelines,
        "picture": args.output,
    }
    rows = [
        [
            row["pipeline"],
            f"{row['tokens']:,}",
            row["documents"],
            f"{row['pairs']:,}",
            sized(row["bytes_sent"]),
            sized(row["peak_bytes"]),
            seconds(row["finish_s"]),
        ]
        for row in pipelines
    ]
    columns = ("pipeline", "tokens", "documents", "pairs", "sent", "held at most", "done after")
    verdict = f"predicted on {args.hardware}: {seconds(cost.time)}{'' if cost.fits else '; memory does not suffice'}"
    shown = [escape(str(plan.layout)), "", escape(plan.summary()), table("", columns, rows), verdict]
    if args.output:
        shown.append(f"picture: {escape(args.output)}")
    return Answer(data, shown)
