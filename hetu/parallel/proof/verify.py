"""Proves a plan without running it: follows every instruction with numbers in place of data.

The proof is exact and takes time and memory in proportion to the rows of buffers and to the segments, or where these
are no runs of neighbouring tokens to the keys that they name; never to the pairs:

1. Every field has the type that it is declared to have, the layout holds every token once, every instruction refers to
   rows, heads, spans and buffers that exist, and every transfer has two ends that agree. Until that is known nothing
   is allocated that isn't bounded by the rows of the shards.
2. The instructions are followed. Sends and receives are posted, and a wait blocks until the other end of the
   transfer is posted, and so does whatever computes, until those of all transfers under way are: a plan that passes
   can't deadlock however little a network buffers, and whatever a device waits for. What lands in a buffer is known
   by token and head. A read of what has not landed is refused, and so is a write to what is still being sent, or to
   what nobody has read. Every attend finds the tokens and heads that it says, of keys and of queries.
3. Every head of every token is attended for by one pipeline. Rows ``j - diagonal .. j - lower`` of a query span see a
   segment's key j. A band of the mask lets position ``p + i * step`` see key position k for ``lower <= k - p - i * step
   <= upper``, which again are neighbouring rows. Where these are the same rows for every span and every key, and no row
   is named twice, every allowed pair is computed exactly once and no other.
4. Results that are computed elsewhere come home to their row and head. In the backward every gradient of keys and
   values comes home once, and none of own rows is overwritten; see :mod:`hetu.parallel.proof.gradients`.
"""

from __future__ import annotations

import numpy as np

from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.instructions import Attend
from hetu.parallel.plan.memory import peak_bytes
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.contents import Contents
from hetu.parallel.proof.fields import check_fields
from hetu.parallel.proof.follow import follow_all
from hetu.parallel.proof.gradients import Contributions
from hetu.parallel.proof.held import Run
from hetu.parallel.proof.layout import check_layout
from hetu.parallel.proof.pairs import prove_pairs
from hetu.parallel.proof.structure import check_heads, check_part, check_rows
from hetu.parallel.proof.transfers import Tokens, pair_transfers, refuse


def verify(plan: PlanData, max_bytes: int | None = None) -> None:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.verify`."""
    plan = plan.whole()
    check_fields(plan)
    check_heads(plan)
    check_layout(plan)
    if plan.topology is not None and len(plan.topology.hosts) != len(plan.pipelines):
        refuse(f"the topology names the hosts of {len(plan.topology.hosts)} pipelines, not of {len(plan.pipelines)}")
    tokens = Tokens.of(plan)
    for r, part in enumerate(plan.pipelines):
        check_part(plan, r, part, tokens)
    transfers, contents = pair_transfers(plan), Contents.of(plan, tokens)
    contributions = Contributions(plan, contents) if plan.is_backward else None
    runs = [Run(r, plan, contents, transfers, contributions) for r in range(len(plan.pipelines))]
    follow_all(runs)
    for run in runs:
        run.check_end()
    _prove_attends(plan, runs, contents)
    if contributions is not None:
        contributions.check_home()
    for r, part in enumerate(plan.pipelines):
        check_rows(plan, r, part)
        if max_bytes is not None and peak_bytes(plan, part) > max_bytes:
            refuse(f"pipeline {r} needs {peak_bytes(plan, part):,} bytes, but may take {max_bytes:,} (max_bytes)")


def _prove_attends(plan: PlanData, runs: list[Run], contents: Contents) -> None:
    """That every head of every token is attended for once, and with all pairs that the mask allows."""
    times = np.zeros((len(contents.tokens.group), contents.number_of_atoms("q")), np.int64)
    proven: set[tuple[int, ...]] = set()
    for run in runs:
        by_atom: dict[int, list[tuple[Attend, IntArray]]] = {}
        for item, said in run.attends:
            atoms = contents.atoms("q", item.heads)
            for atom in range(atoms.start, atoms.stop):
                by_atom.setdefault(atom, []).append((item, said))
        assert run.queries is not None or not by_atom
        for atom, attends in by_atom.items():
            times[run.queries, atom] += 1
            # Pipelines that exchange heads attend alike, and so do the atoms of one.
            key = (id(run.part.spans), *[id(x) for item, said in attends for x in (item.table, said)])
            if key not in proven:
                proven.add(key)
                said_by_table = [(item.table, said) for item, said in attends]
                group, _ = plan.layout.place(run.r)
                prove_pairs(plan, run.r, group, run.part.spans, said_by_table, contents.tokens)
    if (times != 1).any():
        token, atom = np.argwhere(times != 1)[0]
        what = contents.name_of("q", int(atom)) + f" of {contents.tokens.name(int(token))}"
        refuse(f"{what} is attended for by {times[token, atom]} pipelines, expected one")
