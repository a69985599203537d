"""Jobs for ranks that use ``hetu.functional.ContextParallel``, and what they are compared with: one process in float64.

Each job is called on every rank, and gives the largest difference that the rank saw, or what a test asks it for.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.compiling import with_constant_floats
from support.dense_masks import Packs
from support.pool import Pool
from torch import nn

import hetu
from hetu.backends.comm.control import Control
from hetu.functional import ContextParallel, attn_varlen, parallel_attn
from hetu.parallel import Mask
from hetu.parallel.mask.mask import NO_WINDOW

Case = dict[str, Any]


def joined(job: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A job in torch's world, which is joined first where this process is new; hetu's is not used."""
    if not dist.is_initialized():
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return job(*arguments, **options)


class Ranks:
    """Processes in torch's world.

    Args:
        pool: They.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool, self.size = pool, pool.size

    def run(self, job: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """What a job gives on each rank."""
        return self.pool.run(joined, job, *arguments, **options)


# One attention


def inputs(case: Case) -> list[torch.Tensor]:
    """q, k, v, and the gradients of the output and of lse, of all tokens, the same on all ranks."""
    tokens, (num_q, num_kv, head_dim) = case["cu"][-1], case.get("heads", (4, 2, 8))
    rng = np.random.default_rng(0)
    shapes = [(tokens, h, head_dim) for h in (num_q, num_kv, num_kv, num_q)] + [(num_q, tokens)]
    return [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]


def context_of(case: Case, group: Any = None) -> ContextParallel:
    """The context parallelism of a case."""
    given = {name: case[name] for name in ("split", "method", "tokens", "mask") if name in case}
    return ContextParallel(torch.tensor(case.get("pieces", case["cu"])), group, **given)


def worst(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The largest difference of pairs of tensors, of which the shapes must be equal."""
    found = 0.0
    for a, b in pairs:
        assert a.shape == b.shape, (a.shape, b.shape)
        found = max(found, float((a.double() - b.double()).abs().max()) if a.numel() else 0.0)
    return found


def attend(case: Case, group: Any = None, call: Callable[..., Any] = parallel_attn) -> float:
    """Results, log-sum-exps and gradients of an attention over a group."""
    cp, dtype = context_of(case, group), case.get("dtype", torch.float64)
    is_causal, scale = case.get("is_causal", True), case.get("scale")
    q, k, v, dout, dlse = inputs(case)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = Mask.causal() if is_causal else None
    out, lse, _ = hetu.testing.attention(*whole, case["cu"], mask=mask, softmax_scale=scale)
    wanted = out, lse.T
    wanted_grads = torch.autograd.grad(wanted, whole, [dout, dlse])
    own = [cp.dispatch(x.to(dtype)).detach().requires_grad_() for x in (q, k, v)]
    found = call(*own, cp, is_causal=is_causal, softmax_scale=scale, return_lse=True)
    grads = torch.autograd.grad(found, own, [cp.dispatch(dout.to(dtype)), cp.dispatch(dlse.to(found[1].dtype), dim=1)])
    assert torch.equal(cp.undispatch(own[0]), q.to(dtype))
    pairs = [(found[0], cp.dispatch(wanted[0])), (found[1], cp.dispatch(wanted[1], dim=1))]
    return worst(pairs + [(a, cp.dispatch(b)) for a, b in zip(grads, wanted_grads, strict=True)])


def layers_in_a_row(cases: list[Case]) -> bool:
    """Whether layers that follow each other, and gradients in their reverse order, are what each layer is alone.

    Layer i has the lengths, the type and the strides of case i.
    """

    def begin(number: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        case = cases[number]
        cp, dtype = context_of(case), case.get("dtype", torch.float64)
        q, k, v, dout = (x.to(dtype) + number for x in inputs(case)[:4])
        if case.get("beside"):  # views of one tensor
            own = cp.dispatch(torch.cat([q, k, v], 1)).split([q.shape[1], k.shape[1], v.shape[1]], 1)
        else:
            own = [cp.dispatch(x) for x in (q, k, v)]
        leaves = [x.detach().requires_grad_() for x in own]
        return parallel_attn(*leaves, cp), leaves, cp.dispatch(dout)

    def end(layer: tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return [layer[0].detach().clone(), *torch.autograd.grad(*layer)]

    begun = [begin(number) for number in range(len(cases))]
    found = [end(layer) for layer in reversed(begun)][::-1]
    alone = [end(begin(number)) for number in range(len(cases))]
    return all(a.equal(b) for one, other in zip(found, alone, strict=True) for a, b in zip(one, other, strict=True))


def attend_on_hosts(case: Case) -> float:
    """The same with ranks on pretended hosts, by a plan that is proven."""
    with hetu.config(hosts=case["hosts"], verify_plans=True):
        return attend(case)


def attend_masked(case: Case, call: Callable[..., Any] = parallel_attn) -> float:
    """The same under a mask, a softcap and sinks, whose gradients ranks add up like those of any weight."""
    cp, options, lengths = context_of(case), case["options"], np.diff(case["cu"]).tolist()
    *given, dlse = inputs(case)
    sinks = torch.linspace(-1, 1, given[0].shape[1], dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in (*given[:3], sinks)]
    is_causal = options.get("is_causal", True)
    seen = Mask.given(is_causal, options.get("window_size", NO_WINDOW), options.get("mask"), "parallel_attn")
    out, lse, _ = Packs(lengths, lengths, seen, options.get("softcap", 0.0)).attend(*whole)
    wanted = torch.autograd.grad((out, lse), whole, [given[3], dlse.T])
    own = [cp.dispatch(x).detach().requires_grad_() for x in given[:3]] + [sinks.clone().requires_grad_()]
    found = call(*own[:3], cp, sinks=own[3], return_lse=True, **options)
    *grads, dsinks = torch.autograd.grad(found, own, [cp.dispatch(given[3]), cp.dispatch(dlse, dim=1)])
    if dist.is_initialized():
        dist.all_reduce(dsinks)
    pairs = [(found[0], cp.dispatch(out)), (found[1], cp.dispatch(lse.T, dim=1)), (dsinks, wanted[3])]
    return worst(pairs + [(a, cp.dispatch(b)) for a, b in zip(grads, wanted[:3], strict=True)])


def attend_masked_compiled(cases: list[Case]) -> tuple[float, int]:
    """The same through torch.compile, and how often it compiled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(parallel_attn, fullgraph=True, dynamic=True, backend="aot_eager")
    found = max(attend_masked(case, compiled) for case in cases)
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]  # type: ignore[no-untyped-call]


def attend_compiled(cases: list[Case]) -> tuple[float, int]:
    """The same through torch.compile, and how often it compiled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(parallel_attn, fullgraph=True, dynamic=True, backend="aot_eager")
    found = max(attend(case, call=compiled) for case in cases)
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]  # type: ignore[no-untyped-call]


def attend_in_groups(cases: list[Case]) -> float:
    """Two groups side by side, over a mesh of two dimensions, with other lengths each; then all ranks together."""
    mesh = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "cp"))
    found = attend(cases[mesh.get_local_rank("dp")], mesh["cp"])
    found = max(found, attend(cases[mesh.get_local_rank("cp") % 2], mesh["dp"]), attend(cases[0]))
    return max(found, attend(cases[mesh.get_local_rank("dp")], mesh["cp"].get_group()))


def attend_in_part(case: Case) -> float | str:
    """A group of some ranks; the others are told that they are not in it."""
    group = dist.new_group([0, 1])
    try:
        return attend(case, group)
    except hetu.HetuError as error:
        return str(error)


def dropped(case: Case, seed: int) -> torch.Tensor:
    """The whole output with dropout, and the gradient of the queries."""
    cp = context_of(case)
    q, k, v, dout, _ = inputs(case)
    own = [cp.dispatch(x).detach().requires_grad_() for x in (q, k, v)]
    out = parallel_attn(*own, cp, dropout_p=0.3, seed=seed)
    grads = torch.autograd.grad(out, own, cp.dispatch(dout))
    return torch.cat([cp.undispatch(x.detach()).flatten() for x in (out, *grads)])


def agreements(cases: list[Case]) -> tuple[int, int]:
    """How often ranks compared what they were asked for, and how often they told each other more than a digest."""
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_same", "exchange"):
            counted, plain = [0], getattr(Control, name)

            def call(*arguments: Any, counted: list[int] = counted, plain: Any = plain) -> Any:
                counted[0] += 1
                return plain(*arguments)

            patch.setattr(Control, name, call)
            counts.append(counted)
        for case in cases:
            cp = context_of(case)
            for _ in range(3):
                parallel_attn(*(cp.dispatch(x) for x in inputs(case)[:3]), cp)
    (compared,), (told,) = counts
    return compared, told


def differ(cases: list[Case], options: list[dict[str, Any]] | None = None) -> str:
    """The ranks call different things; then the same, which must work. Gives the error."""
    rank, text = dist.get_rank(), ""
    case = cases[rank % len(cases)]
    try:
        cp = context_of(case)
        own = [cp.dispatch(x) for x in inputs(case)[:3]]
        if options is not None and "rows" in options[rank]:
            own = [x[1:] for x in own]
        parallel_attn(*own, cp, **{k: v for k, v in (options or [{}] * 9)[rank].items() if k != "rows"})
    except hetu.HetuError as error:
        text = f"{type(error).__name__}: {error}"
    assert attend(cases[0]) < 1e-12
    return text


def groups_of_torch() -> tuple[int, int, bool]:
    """How many process groups torch knows before and after an attention, and whether the default one works then."""
    known = dist.distributed_c10d._world.pg_map  # type: ignore[attr-defined]
    before = len(known)
    attend({"cu": [0, 7, 20]})
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return before, len(known), ones.item() == dist.get_world_size()


# A model


class Block(nn.Module):
    """A layer of a decoder; over a context parallelism, or over whole documents."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, context: ContextParallel | torch.Tensor) -> torch.Tensor:
        """``(rows, width)`` to the same."""
        y = self.norm(x)
        # From the local width: tensor parallelism leaves a part of the heads here.
        q, k, v = (proj(y).unflatten(1, (-1, x.shape[1] // self.heads)) for proj in (self.q, self.k, self.v))
        if isinstance(context, ContextParallel):
            out = parallel_attn(q, k, v, context)
        else:
            out = attn_varlen(q, k, v, context, context, is_causal=True)
        x = x + self.o(out.flatten(1))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """A tiny decoder."""

    def __init__(self, vocabulary: int = 31, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary)
        self.checkpoint: Callable[..., Any] | None = None

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, context: Any) -> torch.Tensor:
        """Logits ``(rows, vocabulary)``."""
        x = self.embed(ids) + self.place(positions)
        for block in self.blocks:
            x = block(x, context) if self.checkpoint is None else self.checkpoint(block, x, context)
        logits: torch.Tensor = self.head(x)
        return logits


def batch(number: int) -> tuple[list[int], torch.Tensor]:
    """Cumulative lengths and tokens of a batch."""
    rng = np.random.default_rng(number)
    cu = np.concatenate([[0], rng.integers(0, 25, 3).cumsum()]).tolist()
    return cu, torch.from_numpy(rng.integers(0, 31, cu[-1]))


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over all labels."""
    return torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum", ignore_index=-100)


def wanted(batches: list[int], layers: int = 2) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all labels of some batches, and its gradients, of one process in float64."""
    model = Model(layers=layers).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number in batches:
        cu, ids = batch(number)
        labels = ContextParallel(torch.tensor(cu), _alone()).next_tokens(ids)
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cu)])
        total = total + loss_sum(model(ids, positions, torch.tensor(cu)), labels)
        count += int((labels != -100).sum())
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


_own_group: list[Any] = []


def _alone() -> Any:
    """A group of this rank alone."""
    if not _own_group:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _own_group.append(groups[dist.get_rank()])
    return _own_group[0]


def own_loss(model: nn.Module, cp: ContextParallel, ids: torch.Tensor, group: Any = None) -> torch.Tensor:
    """A rank's loss of a batch that its group holds."""
    labels = cp.dispatch(cp.next_tokens(ids))
    return cp.token_mean(loss_sum(model(cp.dispatch(ids), cp.position_ids, cp), labels), labels, group)


def train(how: str, split: str = "balanced", tokens: str = "even", layers: int = 2) -> float:
    """One step of the tiny model, wrapped in some way, over a mesh of data and context parallelism."""
    size = dist.get_world_size()
    dp = 2 if size == 4 else 1
    mesh = dist.init_device_mesh("cpu", (dp, size // dp), mesh_dim_names=("dp", "cp"))
    number = mesh.get_local_rank("dp")
    cu, ids = batch(number)
    uneven = [cu[-1], *[0] * (size // dp - 1)] if tokens == "all on the first" else None
    cp = ContextParallel(torch.tensor(cu), mesh["cp"], split, tokens=uneven)
    model, grads = WRAPPERS[how](Model(layers=layers).double(), mesh)
    with with_constant_floats():
        loss = own_loss(model, cp, ids)
    loss.backward()
    wanted_loss, wanted_grads = wanted(list(range(dp)), layers)
    found = grads()
    assert found.keys() == wanted_grads.keys()
    return max(abs(loss.item() - wanted_loss), worst([(found[name], wanted_grads[name]) for name in found]))


Wrapped = tuple[nn.Module, Callable[[], dict[str, torch.Tensor]]]


def _plain_grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def _by_hand(model: nn.Module, mesh: Any) -> Wrapped:
    def grads() -> dict[str, torch.Tensor]:
        for p in model.parameters():
            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            p.grad.div_(dist.get_world_size())  # type: ignore[union-attr]
        return _plain_grads(model)

    return model, grads


def _ddp(model: nn.Module, mesh: Any) -> Wrapped:
    wrapped = nn.parallel.DistributedDataParallel(model)
    return wrapped, lambda: _plain_grads(wrapped)


def _fsdp2(model: nn.Module, mesh: Any) -> Wrapped:
    from torch.distributed.fsdp import fully_shard

    flat = mesh._flatten("all")
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=flat)
    fully_shard(model, mesh=flat)
    return model, lambda: {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def _checkpointed(use_reentrant: bool, context_fn: Any = None) -> Callable[[nn.Module, Any], Wrapped]:
    from torch.utils.checkpoint import checkpoint

    def wrap(model: Any, mesh: Any) -> Wrapped:
        more = {} if context_fn is None else {"context_fn": context_fn}
        model.checkpoint = lambda *given: checkpoint(*given, use_reentrant=use_reentrant, **more)
        return _by_hand(model, mesh)

    return wrap


def _selective() -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        is_kept = op is torch.ops.hetu.parallel_attn.default
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _compiled(model: nn.Module, mesh: Any) -> Wrapped:
    torch.compiler.reset()
    _, grads = _by_hand(model, mesh)
    return torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"), grads


WRAPPERS: dict[str, Callable[[nn.Module, Any], Wrapped]] = {
    "gradients averaged by hand": _by_hand,
    "DDP": _ddp,
    "FSDP2": _fsdp2,
    "re-entrant checkpointing": _checkpointed(True),
    "checkpointing": _checkpointed(False),
    "selective checkpointing": _checkpointed(False, _selective),
    "torch.compile": _compiled,
}


def train_with_tensor_parallelism() -> float:
    """Heads over one dimension of the mesh, tokens over the other."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("cp", "tp"))
    cu, ids = batch(0)
    cp = ContextParallel(torch.tensor(cu), mesh["cp"])
    model = Model().double()
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {**plan, "up": ColwiseParallel(), "down": RowwiseParallel()})
    loss = own_loss(model, cp, ids)
    loss.backward()
    wanted_loss, wanted_grads = wanted([0])
    pairs = []
    for name, p in model.named_parameters():
        grad: Any = p.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        dist.all_reduce(grad, group=mesh["cp"].get_group())
        pairs.append((grad / mesh["cp"].size(), wanted_grads[name]))
    return max(abs(loss.item() - wanted_loss), worst(pairs))


class Stage(nn.Module):
    """A part of the tiny model, as a stage of a pipeline: its attention is over the ranks of the stage."""

    def __init__(self, model: Model, index: int, count: int) -> None:
        super().__init__()
        each = len(model.blocks) // count
        self.blocks = model.blocks[index * each : (index + 1) * each]
        self.first = nn.ModuleList([model.embed, model.place]) if index == 0 else None
        self.head = model.head if index == count - 1 else None
        self.contexts: list[ContextParallel] = []

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Of one micro-batch; they come in order."""
        cp = self.contexts.pop(0)
        if self.first is not None:
            x = self.first[0](x) + self.first[1](cp.position_ids)
        for block in self.blocks:
            x = block(x, cp)
        return x if self.head is None else self.head(x)


def train_in_pipeline_stages() -> float:
    """``torch.distributed.pipelining`` over one dimension of the mesh, context parallelism inside each stage."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    mesh = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "cp"))
    index, number = mesh.get_local_rank("pp"), 2
    model = Model().double()
    module = Stage(model, index, 2)
    cu, tokens = [0, 9, 20, 24], 24  # micro-batches of a pipeline have one shape
    ids = torch.from_numpy(np.random.default_rng(5).integers(0, 31, (number, tokens)))
    made = [ContextParallel(torch.tensor(cu), mesh["cp"]) for _ in range(number)]
    module.contexts = list(made)
    rows = [cp.dispatch(x) for cp, x in zip(made, ids, strict=True)]
    labels = [cp.dispatch(cp.next_tokens(x)) for cp, x in zip(made, ids, strict=True)]
    example = rows[0] if index == 0 else torch.zeros(len(rows[0]), 32, dtype=torch.float64, requires_grad=True)
    shape = (len(rows[0]), 31 if index else 32)
    stage = PipelineStage(
        module,
        index,
        2,
        torch.device("cpu"),
        input_args=(example,),
        output_args=(torch.zeros(shape, dtype=torch.float64, requires_grad=True),),
        group=mesh["pp"].get_group(),
    )
    schedule = ScheduleGPipe(stage, number, loss_fn=loss_sum, scale_grads=False)
    if index == 0:
        schedule.step(torch.cat(rows))
    else:
        schedule.step(target=torch.cat(labels))
    wanted_model = Model().double()
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cu)])
    alone = ContextParallel(torch.tensor(cu), _alone())
    for x in ids:
        loss_sum(wanted_model(x, positions, torch.tensor(cu)), alone.next_tokens(x)).backward()
    grads = {name: p.grad for name, p in wanted_model.named_parameters()}
    pairs = []
    for name, p in model.named_parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=mesh["cp"].get_group())
            pairs.append((p.grad, grads[name]))
    assert pairs
    return worst(pairs)


def accumulate() -> float:
    """Gradients of several batches, each with lengths of its own, added up before they are used."""
    model = Model().double()
    numbers, counts, losses = [3, 4, 5], 0, []
    contexts = [(ContextParallel(torch.tensor(batch(n)[0])), batch(n)[1]) for n in numbers]
    for cp, ids in contexts:
        counts += int((cp.next_tokens(ids) != -100).sum())
    for cp, ids in contexts:
        labels = cp.dispatch(cp.next_tokens(ids))
        loss = loss_sum(model(cp.dispatch(ids), cp.position_ids, cp), labels) / counts
        losses.append(loss.item())
        loss.backward()
    _, wanted_grads = wanted(numbers)
    pairs = []
    for name, p in model.named_parameters():
        dist.all_reduce(p.grad)
        pairs.append((p.grad, wanted_grads[name]))
    return worst(pairs)
