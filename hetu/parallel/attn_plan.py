"""AttnPlan: the users' face of a plan, and :func:`build_plan`, which makes one.

A plan is data, see :mod:`hetu.parallel.plan.parts`. This is the only module that knows the methods, which make that
data, and those that read it: the proof and the views.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hetu.arguments import index, integer, refuse, shown
from hetu.arguments import path as as_path
from hetu.errors import PlanError, StrategyError, caller
from hetu.parallel.choice.price import cheapest_method
from hetu.parallel.layout.layout import Layout
from hetu.parallel.layout.splits import check_mask
from hetu.parallel.mask.mask import CAUSAL, Mask
from hetu.parallel.methods import AUTO, METHODS, AttnSpec, Method
from hetu.parallel.plan.heads import Heads
from hetu.parallel.plan.memory import peak_bytes
from hetu.parallel.plan.parts import Parts, PipelinePlan, PlanData
from hetu.parallel.proof import verify
from hetu.parallel.topology import Topology, check_topology
from hetu.parallel.views import picture, report
from hetu.parallel.views.cost import Cost, predict
from hetu.parallel.views.hardware import Hardware
from hetu.parallel.views.trace import predicted_trace


class AttnPlan(PlanData):
    """What every pipeline of a strategy does in one ``parallel_attn``.

    Attributes:
        layout: Which token lies where.
        method: ``"ring"``, ``"direct"``, ``"all_gather"``, ``"ulysses"`` or ``"hierarchical"``.
        mask: Which keys a query sees.
        heads: Widths of a token's row.
        pipelines: One part per pipeline, in order. It is built when it is first asked for: whoever follows one part
            needs no other.
        is_backward: Whether it computes the gradients; see :meth:`backward`.
        memo: What was found of the plan already. Not part of the value.

    Example:
        >>> plan = build_plan(Layout.build([2, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
        >>> plan.method, plan.pairs(0), plan.bytes_sent(0)
        ('direct', 3, 512)
    """

    __slots__ = ()

    def backward(self) -> AttnPlan:
        """The plan of the gradients of the attention that this plan computes; made once.

        Keys and values travel once more, as they do here. Gradients of foreign rows return to their owner, and those
        of a row that come from several pipelines do so in float32, and are added in an order that the plan fixes. A
        pipeline may attend to its own rows in two parts, the second while the last gradients travel.

        Raises:
            PlanError: If this plan is a backward itself, or can't be followed to its end.

        Example:
            >>> from hetu.parallel import build_plan
            >>> plan = build_plan(Layout.build([2, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
            >>> print(plan.backward().summary())
            direct backward, causal: 4 tokens of 1 document on 2 pipelines in 1 group; 10 pairs, largest share 1.40 of
            the mean; 1.5 kB sent
        """
        if self.is_backward:
            raise PlanError(
                "this plan is a backward already", op="plan", fix="call .backward() of the forward's plan, once"
            )
        if "backward" not in self.memo:
            parts = Parts(len(self.pipelines), partial(METHODS[self.method].backward, self))
            if not isinstance(self.pipelines, Parts):  # a plan by hand is whole, and so is its backward
                parts.need(range(len(parts)))
            self.memo["backward"] = replace(self, pipelines=parts, is_backward=True, memo={})
        plan: AttnPlan = self.memo["backward"]
        return plan

    def peak_bytes(self, pipeline: int) -> int:
        """Most bytes that a pipeline holds at a time.

        Its shard, the buffers that are needed at the time, and the packed rows that are still being sent; its output
        and lse, and with several steps the running output in float32. In the backward also the gradients: of output,
        queries, keys and values in the user's dtype, those that are summed up in float32, those computed of foreign
        rows, and those that land.
        """
        return peak_bytes(self, self.part(pipeline))

    def verify(self, max_bytes: int | None = None) -> None:
        """Proves, without running it, that the plan computes the attention and can be followed.

        Every allowed (query, key) pair is computed exactly once and no other; sends and receives pair up; the
        pipelines can't wait for each other for ever; no buffer is read before its rows have landed or filled while
        it is being sent; no pipeline holds more rows than its group has tokens. In the backward also: every gradient
        of a foreign row comes home, to the very row of its owner, and is added there exactly once.

        Args:
            max_bytes: What a pipeline may take; see :meth:`peak_bytes`.

        Raises:
            PlanError: Saying which pair, which transfer, which buffer or which gradient is wrong.
        """
        verify(self, None if max_bytes is None else integer(max_bytes, "max_bytes", least=0, op="plan"))
        if self.method not in METHODS:
            names = ", ".join(METHODS)
            raise PlanError(
                f"there is no method {self.method!r}", op="plan", fix=f"name the one it was built by: {names}"
            )

    def cost(self, hardware: Hardware, topology: Topology | None = None) -> Cost:
        """FLOPs, bytes per link, peak memory and predicted time on given hardware.

        All pipelines are followed by a virtual clock: computing and transfers overlap as they would, a device sends one
        transfer at a time and receives one, and each attend takes a launch, and its FLOPs at the rate of its mask,
        head_dim and number of keys.

        Args:
            hardware: What it runs on.
            topology: Which pipelines share a host; None for those that the plan was built for.

        Raises:
            PlanError: If the plan deadlocks.
            StrategyError: If the topology is one of another number of pipelines.
        """
        known = self.topology if topology is None else check_topology(topology, len(self.pipelines), "plan")
        hosts = None if known is None else known.hosts
        return predict(self, _checked(hardware), hosts)

    def trace(self, hardware: Hardware | None = None) -> dict[str, Any]:
        """The timeline that :meth:`cost` predicts, as a trace for https://ui.perfetto.dev or chrome://tracing.

        A pipeline is a process of the trace, with a lane for what it computes and one for each link; steps are named as
        in ``print(plan)``. An arrow leads from each transfer to the step that needs it.

        Args:
            hardware: What to predict for; an H100 if None.

        Returns:
            A Chrome trace, to be written by ``json.dump``.

        Raises:
            PlanError: If the plan deadlocks.

        Example:
            >>> from hetu.parallel import Hardware, build_plan
            >>> plan = build_plan(Layout.build([4, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
            >>> slow = Hardware(flops=256e6, link_bytes=128e6, latency=1e-6, memory_bytes=1e9)  # a pair takes 1 µs
            >>> for event in plan.trace(slow)["traceEvents"]:
            ...     if event["ph"] == "X":
            ...         print(event["pid"], event["tid"], event["ts"], event["dur"], event["name"])
            0 3 0.0 9.0 send 4 rows (1 run) of buffer 0 to 1
            0 0 0.0 10.0 attend buffer 0 (rows of 0): 1 segment, 10 pairs
            1 2 0.0 9.0 receive 4 rows from 0 into buffer 1
            1 0 0.0 3.0 attend buffer 0 (rows of 1): 1 segment, 3 pairs
            1 0 3.0 6.0 wait for what comes from 0
            1 0 9.0 8.0 attend buffer 1 (rows of 0): 1 segment, 8 pairs
        """
        return predicted_trace(self, None if hardware is None else _checked(hardware))

    def visualize(self, path: str | os.PathLike[str], hardware: Hardware | None = None) -> None:
        """Writes a picture: what each pipeline does when, and beside it the mask coloured by who computes it.

        The times are those that :meth:`cost` predicts. Rows that arrive are drawn below what is computed meanwhile,
        and where a pipeline waits, or is done before the last one, its lane is grey. With ``"ulysses"`` the mask is
        drawn for head 0.

        Args:
            path: A file that ends in ``.png``, ``.svg`` or ``.pdf``.
            hardware: What to predict for; an H100 if None.

        Raises:
            HetuError: If matplotlib is not installed, or the file has another ending.
            PlanError: If the plan deadlocks.
            OSError: If it can't be written.

        Example:
            >>> import os, tempfile
            >>> from hetu.parallel import build_plan
            >>> heads = Heads(num_q=32, num_kv=8, head_dim=128, itemsize=2)
            >>> plan = build_plan(Layout.build([4000, 6000], [0, 0], split="sym"), heads=heads)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     plan.visualize(os.path.join(folder, "plan.svg"))
        """
        picture.save(self, as_path(path, op="plan"), Hardware.h100() if hardware is None else _checked(hardware))

    def _repr_html_(self) -> str:
        return picture.html(self)

    def summary(self) -> str:
        """One line: the method, the size of the problem, its balance, and what is moved."""
        return report.summary(self)

    def draw(self, width: int = 48, head: int = 0) -> str:
        """Who computes what for a head: a drawing per group, as :meth:`Layout.draw` makes it.

        Args:
            width: Most columns; in a larger group a character stands for a square of pairs.
            head: The query head; with ``"ulysses"`` each pipeline attends for some heads to all tokens.

        Example:
            >>> from hetu.parallel import build_plan
            >>> heads = Heads(num_q=2, num_kv=2, head_dim=8, itemsize=2)
            >>> layout = Layout.build([2, 3], [0, 0])
            >>> print(build_plan(layout, method="ulysses", mask=Mask.window(1, 0), heads=heads).draw(head=1))
            group 0 under Mask.window(1, 0): 5 tokens on 2 pipelines
            held by  00111
                  0  1····
                  0  11···
                  1  ·11··
                  1  ··11·
                  1  ···11
        """
        head = index(head, "head", self.heads.num_q, op="plan")
        return self.layout.drawn(self.mask, report.computing(self, head), width)

    def __str__(self) -> str:
        return report.table(self)

    def __repr__(self) -> str:
        return f"<AttnPlan {self.summary()}>"


def _checked(hardware: Hardware) -> Hardware:
    if not isinstance(hardware, Hardware):
        refuse(
            hardware, "hardware", "a hetu.Hardware", op="plan", fix="pass hetu.Hardware(...) or hetu.Hardware.h100()"
        )
    return hardware


def build_plan(
    layout: Layout,
    *,
    method: str = "auto",
    mask: Mask = CAUSAL,
    heads: Heads,
    topology: Topology | None = None,
    hardware: Hardware | None = None,
) -> AttnPlan:
    """What every pipeline does; each one's part is built when it is first asked for.

    Source: ``"ring"`` is by Liu et al., "Ring Attention", 2023; ``"ulysses"`` by Jacobs et al., "DeepSpeed
    Ulysses", 2023; ``"all_gather"`` by "The Llama 3 Herd of Models", 2024, section 3.3.2.

    Args:
        layout: Which token lies where.
        method: ``"ring"``, ``"direct"``, ``"all_gather"``, ``"ulysses"`` or
            ``"hierarchical"``; ``"auto"`` is ``"direct"``: of those that
            move keys and values none moves fewer bytes, and each of its transfers can be hidden behind all of the
            computation before it.
        mask: Which keys of its document a query sees.
        heads: Widths of a token's row.
        topology: Which pipelines share a host; None if all do.
        hardware: If it is given, ``"auto"`` is ``"direct"``, ``"ulysses"`` or, over several hosts, ``"hierarchical"``,
            whichever is estimated to be fastest on it.

    Returns:
        The plan.

    Raises:
        StrategyError: If there is no such method.
        BindingError: If the mask doesn't fit the documents of some group.

    Example:
        >>> plan = build_plan(Layout.build([2, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
        >>> [plan.pairs(r) for r in range(2)], plan.bytes_sent(0)
        ([3, 7], 512)
    """
    for name, value, kind in (("layout", layout, Layout), ("mask", mask, Mask), ("heads", heads, Heads)):
        if not isinstance(value, kind):
            refuse(value, name, f"a {kind.__name__}", op="plan", error=StrategyError)
    check_mask(mask)
    if isinstance(method, str) and method == "auto" and hardware is not None:
        hosts = None if topology is None else check_topology(topology, layout.num_pipelines, "plan")
        method = cheapest_method(layout, mask, heads, _checked(hardware), hosts)
    name, chosen = _find(method)
    spec = _spec(layout, mask, heads, topology)
    for group in () if mask.is_plain else layout.groups:  # refused by all, whichever parts they build
        mask.bands(group.lengths, group.lengths)
    parts = Parts(layout.num_pipelines, partial(_forward, layout, chosen, spec))
    return AttnPlan(layout, name, mask, heads, parts, topology=topology)


def _forward(layout: Layout, method: Method, spec: AttnSpec, pipelines: Sequence[int]) -> Iterator[PipelinePlan]:
    """Parts of a plan; where many of a group are asked for, those between them too, since it takes less time."""
    members: dict[int, list[int]] = {}
    for pipeline in pipelines:
        group, member = layout.place(pipeline)
        members.setdefault(group.index, []).append(member)
    for number, some in members.items():
        yield from method.forward(layout.groups[number], slice(min(some), max(some) + 1), spec)


def build_pipeline_plan(
    layout: Layout,
    pipeline: int,
    *,
    method: str = "auto",
    mask: Mask = CAUSAL,
    heads: Heads,
    topology: Topology | None = None,
) -> PipelinePlan:
    """One pipeline's part of what :func:`build_plan` gives, without building the others'.

    Args:
        layout: Which token lies where.
        pipeline: Whose part.
        method: As :func:`build_plan` takes it, like all that follow.
        mask: Which keys of its document a query sees.
        heads: Widths of a token's row.
        topology: Which pipelines share a host.

    Returns:
        The part.

    Example:
        >>> heads = Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2)
        >>> part = build_pipeline_plan(Layout.build([2, 2], [0, 0]), 1, method="ring", heads=heads)
        >>> [type(item).__name__ for item in part.instructions]
        ['Receive', 'Attend', 'Wait', 'Attend']
    """
    return build_plan(layout, method=method, mask=mask, heads=heads, topology=topology).part(pipeline)


def _spec(layout: Layout, mask: Mask, heads: Heads, topology: Topology | None) -> AttnSpec:
    count = layout.num_pipelines
    return AttnSpec(
        mask, heads, Topology.one_host(count) if topology is None else check_topology(topology, count, "plan")
    )


def _find(method: str) -> tuple[str, Method]:
    known = isinstance(method, str)
    name = AUTO if known and method == "auto" else method
    if not known or name not in METHODS:
        names = ", ".join(("auto", *METHODS))
        raise StrategyError(f"there is no method {shown(method)}", op="plan", where=caller(), fix=f"use one of {names}")
    return name, METHODS[name]
