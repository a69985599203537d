"""``hetu verify``: proves plans, forward and backward, for every split and method that is asked for."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from itertools import product
from typing import Any

from hetu.arguments import MAX_COUNT
from hetu.cli.answer import Answer, Exit, steps, table
from hetu.cli.options import add_lengths, add_mask, even_layout, heads_of, ints, mask_of
from hetu.errors import HetuError, PlanError
from hetu.parallel import METHODS, SPLITS, build_plan


def add_options(parser: ArgumentParser) -> None:
    """The command's options."""
    add_lengths(parser)
    add_mask(parser)
    parser.add_argument("--pipelines", type=ints, required=True, metavar="N,N,...", help="numbers of pipelines")
    parser.add_argument("--splits", default=",".join(SPLITS), metavar="NAME,...", help="(all)")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME,...", help="(all)")


def run(args: Namespace) -> Answer:
    """Proves every combination; what is not proven makes the exit code 1."""
    mask, heads = mask_of(args), heads_of(args)
    for count in args.pipelines:
        if not 1 <= count <= MAX_COUNT:
            what = f"--pipelines has {count}, expected numbers from 1 to {MAX_COUNT}"
            raise HetuError(what, fix="name how many ranks")
    found: list[dict[str, Any]] = []
    cases = list(product(args.pipelines, args.splits.split(","), args.methods.split(",")))
    for pipelines, split, method in steps(cases, "proving"):
        layout = even_layout(args.lengths, pipelines, split, mask)
        forward = build_plan(layout, method=method, mask=mask, heads=heads)
        case = {"pipelines": pipelines, "split": split, "method": method}
        try:
            forward.verify()
            forward.backward().verify()
        except PlanError as error:
            found.append({**case, "is_proven": False, "pairs": None, "why": error.what})
        else:
            pairs = sum(forward.head_pairs(r) for r in range(pipelines)) // heads.num_q
            found.append({**case, "is_proven": True, "pairs": pairs, "why": None})
    bad = sum(not item["is_proven"] for item in found)
    rows = [
        [i["split"], i["method"], i["why"] or "proven", i["pipelines"], f"{i['pairs']:,}" if i["is_proven"] else ""]
        for i in found
    ]
    data = {"lengths": args.lengths, "mask": repr(mask), "are_proven": not bad, "plans": found}
    shown = table("", ("split", "method", "forward and backward", "pipelines", "pairs"), rows, left=3)
    verdict = f"{bad} of {len(found)} not proven" if bad else f"all {len(found)} proven, forward and backward"
    return Answer(data, [shown, verdict], Exit.FAILED if bad else Exit.DONE)
