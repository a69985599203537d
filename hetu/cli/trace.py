"""``hetu trace``: the predicted timeline as a Chrome trace."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.markup import escape

from hetu.arguments import path
from hetu.cli.answer import Answer, seconds
from hetu.cli.options import add_hardware, add_problem, hardware_of, plan_of


def add_options(parser: ArgumentParser) -> None:
    """The command's options."""
    add_problem(parser)
    add_hardware(parser)
    parser.add_argument("--output", default="trace.json", metavar="FILE", help="(trace.json)")


def run(args: Namespace) -> Answer:
    """Writes the trace."""
    plan, hardware = plan_of(args), hardware_of(args)
    trace = plan.trace(hardware)
    Path(path(args.output, "--output")).write_text(json.dumps(trace), encoding="utf-8")
    events, time = len(trace["traceEvents"]), plan.cost(hardware).time
    data = {"output": args.output, "events": events, "time_s": time, "plan": plan.summary()}
    where = f"{args.output}: {events:,} events, {seconds(time)} predicted; open it at https://ui.perfetto.dev"
    return Answer(data, [escape(plan.summary()), escape(where)])
