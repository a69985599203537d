"""Who is compared over several GPUs: hetu as a graph, as a function and on each GPU alone, and ``context_parallel``.

A peer is made on all ranks at once, from inputs that are the same on all of them, and keeps this rank's part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from attention_cases import Inputs, Results
from parallel_cases import ALONE, BOTH, Ranks, Spread, check_rows
from timing import first_line
from torch.nn.attention import SDPBackend, sdpa_kernel

import hetu
from hetu.parallel import METHODS, AttnPlan, Hardware


class Peer(ABC):
    """Attention over the ranks.

    Attributes:
        rows: Numbers of the tokens that this rank holds, in the order in which it holds them.
        copies: How many ranks hold each token.
        note: What has to be said of it.
    """

    note = ""

    def __init__(self, rows: torch.Tensor, tokens: int, ranks: Ranks) -> None:
        self.rows, self.copies = rows, check_rows(rows, tokens, ranks)

    @abstractmethod
    def call(self, direction: str) -> Any:
        """What is timed."""

    @abstractmethod
    def results(self, direction: str) -> Results:
        """What it computes, by name: ``(rows, heads, head_dim)``."""

    def plans(self, direction: str) -> list[AttnPlan]:
        """What it follows, if it says so."""
        return []

    @contextmanager
    def around(self) -> Iterator[None]:
        """What has to be entered for calls, and is not part of their times."""
        yield


class Attention:
    """``hetu.parallel_attn`` over the documents of a :class:`Spread`, and its gradient, as a graph.

    Args:
        x: The inputs.
        lens: Tokens of each pipeline.
        groups: The pipelines' context groups, each of which holds all tokens.
        method: How keys and values move.

    Attributes:
        rows: Numbers of the tokens that each pipeline holds.
    """

    def __init__(self, x: Inputs, lens: list[int], groups: list[int], method: str) -> None:
        self.inputs, self.case = x, _spread(x)
        num_q, num_kv, head_dim = self.case.shape
        dtype = hetu.as_dtype(str(x.q.dtype).removeprefix("torch."))
        rows, docs = hetu.IntSymbol("rows"), hetu.IntSymbol("docs")
        with hetu.graph("define_and_run") as self.graph:
            self.qkv = hetu.placeholder(dtype, [rows, (num_q + 2 * num_kv) * head_dim], name="qkv")
            self.dout = hetu.placeholder(dtype, [rows, num_q * head_dim], name="dout")
            self.documents = hetu.placeholder(hetu.int32, [docs + 1], name="cu_seqlens")
            self.out = hetu.parallel_attn(
                self.qkv,
                head_dim,
                num_q // num_kv,
                [lens],
                [groups],
                packing=True,
                cu_seqlens_q=self.documents,
                cu_seqlens_k=self.documents,
                is_causal=self.case.is_causal,
                window_size=self.case.window_size,
                split=self.case.split,
                method=method,
            )[0]
            self.dqkv = hetu.gradients(self.out, self.qkv, self.dout)
        copies = len(set(groups))
        self.cu_seqlens = [x.cu_seqlens.numpy()] * copies
        layout = self.graph.layout(0, cu_seqlens=self.cu_seqlens)
        self.rows: list[torch.Tensor] = layout.scatter([torch.arange(self.case.tokens)] * copies)

    def feeds(self, rows: torch.Tensor) -> dict[Any, torch.Tensor]:
        """What a pipeline that holds these tokens feeds."""
        x, there = self.inputs, rows.to(self.inputs.q.device)
        qkv = torch.cat([y[there].flatten(1) for y in (x.q, x.k, x.v)], 1)
        return {self.qkv: qkv, self.dout: x.dout[there].flatten(1), self.documents: x.cu_seqlens}

    def run(self, direction: str, feeds: dict[Any, Any]) -> Any:
        """The output, or it and the gradient of qkv."""
        return self.graph.run([self.out, self.dqkv] if direction == BOTH else self.out, feeds)

    def named(self, direction: str, results: Any) -> Results:
        """What one pipeline's run gave, by name."""
        num_q, num_kv, head_dim = self.case.shape
        if direction != BOTH:
            return {"out": results.unflatten(1, (num_q, head_dim))}
        out, dqkv = (y.unflatten(1, (-1, head_dim)) for y in results)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *dqkv.split([num_q, num_kv, num_kv], 1)), strict=True))

    def plans(self, direction: str) -> list[AttnPlan]:
        """The plan, and that of the gradients."""
        plan = self.graph.plan(0, cu_seqlens=self.cu_seqlens)
        return [plan, plan.backward()] if direction == BOTH else [plan]


class Hetu(Peer):
    """``hetu.parallel_attn`` through ``g.run``; each rank feeds its own shard.

    Args:
        x: The inputs, of a :class:`Spread`.
        ranks: The ranks.
        method: How keys and values move; None if each GPU attends to all tokens, alone, all at the same time: as
            busy and as warm as in the other rows, and the slowest of them counts.
    """

    def __init__(self, x: Inputs, ranks: Ranks, method: str | None) -> None:
        is_alone = method is None
        lens = [x.case.tokens] * ranks.size if is_alone else _spread(x).seq_lens
        groups = list(range(ranks.size)) if is_alone else [0] * ranks.size
        self.attention = Attention(x, lens, groups, method or "auto")
        super().__init__(self.attention.rows[ranks.rank], x.case.tokens, ranks)
        self.feeds = self.attention.feeds(self.rows)

    def call(self, direction: str) -> Any:
        """A run."""
        return self.attention.run(direction, self.feeds)

    def results(self, direction: str) -> Results:
        """The output, and the gradients of what was fed."""
        return self.attention.named(direction, self.call(direction))

    def plans(self, direction: str) -> list[AttnPlan]:
        """The plan, and that of the gradients."""
        return self.attention.plans(direction)


class Functional(Peer):
    """``hetu.functional.parallel_attn``: q, k and v are tensors of their own, and autograd asks for the gradients.

    Args:
        x: The inputs, of a :class:`Spread`.
        ranks: The ranks.
        method: How keys and values move.
    """

    def __init__(self, x: Inputs, ranks: Ranks, method: str) -> None:
        self.case = _spread(x)
        self.cp = hetu.functional.ContextParallel(
            x.cu_seqlens, split=self.case.split, method=method, tokens=self.case.seq_lens
        )
        super().__init__(self.cp.dispatch(torch.arange(self.case.tokens)), self.case.tokens, ranks)
        there = self.rows.to(x.q.device)
        self.leaves, self.dtype = [y[there].requires_grad_() for y in (x.q, x.k, x.v)], x.q.dtype
        self.dout = x.dout[there]

    def call(self, direction: str) -> Any:
        """The forward alone, without what a backward needs, or both."""
        case = self.case
        options: dict[str, Any] = {"is_causal": case.is_causal, "window_size": case.window_size}
        attend = partial(hetu.functional.parallel_attn, *self.leaves, self.cp, **options)
        if direction != BOTH:
            with torch.no_grad():
                return (attend(),)
        out = attend()
        return out, *torch.autograd.grad(out, self.leaves, self.dout)

    def results(self, direction: str) -> Results:
        """The output, and the gradients of the shards."""
        return dict(zip(("out", "dq", "dk", "dv"), self.call(direction), strict=False))

    def plans(self, direction: str) -> list[AttnPlan]:
        """The plan, and that of the gradients."""
        case = self.case
        plan = self.cp.plan(*case.shape, self.dtype, is_causal=case.is_causal, window_size=case.window_size)
        return [plan, plan.backward()] if direction == BOTH else [plan]


def load_of(plans: Sequence[AttnPlan]) -> float:
    """FLOPs of the busiest pipeline over their mean."""
    flops = np.sum([plan.cost(Hardware.h100()).flops for plan in plans], axis=0)
    return float(flops.max() / flops.mean())


BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
"""Of ``scaled_dot_product_attention``."""

ROTATIONS = ("allgather", "alltoall")


class ContextParallel(Peer):
    """Torch's ``context_parallel`` around ``scaled_dot_product_attention``.

    It is entered outside of what is timed, and inputs are sharded beforehand. Where it doesn't take fewer key heads
    than query heads, key heads are repeated, as its user would have to, and that is part of what is timed.

    Args:
        x: The inputs, of one document.
        ranks: The ranks.
        backend: Of ``scaled_dot_product_attention``.
        rotation: Of ROTATIONS.

    Raises:
        ValueError: If there are several documents.
    """

    def __init__(self, x: Inputs, ranks: Ranks, backend: SDPBackend, rotation: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental import context_parallel

        case = _spread(x)
        if len(case.documents) > 1:
            raise ValueError("knows no packed documents")
        if case.window is not None:
            raise ValueError("knows no windows")
        self.case, self.backend, self.rotation = case, backend, rotation
        self.mesh = init_device_mesh(x.q.device.type, (ranks.size,))
        self._context = context_parallel
        self._unused = torch.zeros(2 * ranks.size if case.tokens % (2 * ranks.size) == 0 else ranks.size).to(x.q.device)
        buffers = [y.transpose(0, 1)[None].clone(memory_format=torch.contiguous_format) for y in _given(x)]
        buffers.append(torch.arange(case.tokens, device=x.q.device))
        with context_parallel(
            self.mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2, 2, 0], no_restore_buffers=set(buffers)
        ):
            *shards, rows = buffers
        self.leaves, self.dout = [y.detach().requires_grad_() for y in shards[:3]], shards[3]
        super().__init__(rows.clone(), case.tokens, ranks)
        self.repeats = 1
        try:
            self._try()
        except Exception as failure:  # of whatever kind; it is the same on all ranks
            num_q, num_kv, _ = case.shape
            self.repeats = num_q // num_kv
            self.note = f"key heads are repeated for it, as without that it fails ({first_line(failure)})"
            self._try()

    def _try(self) -> None:
        with self.around():
            self.call(BOTH)

    @contextmanager
    def around(self) -> Iterator[None]:
        """The contexts of a user's training step."""
        with ExitStack() as stack:
            stack.enter_context(self._context(self.mesh, buffers=[self._unused], buffer_seq_dims=[0]))
            stack.enter_context(sdpa_kernel(self.backend))
            _set_rotation(self.rotation)
            yield

    def _attend(self) -> torch.Tensor:
        q, k, v = self.leaves
        if self.repeats > 1:
            k, v = (y.repeat_interleave(self.repeats, 1) for y in (k, v))
        is_grouped = q.shape[1] != k.shape[1]
        attend = torch.nn.functional.scaled_dot_product_attention  # looked up here: the context replaces it
        return attend(q, k, v, is_causal=self.case.is_causal, enable_gqa=is_grouped)

    def call(self, direction: str) -> Any:
        """The forward alone, without what a backward needs, or both."""
        if direction != BOTH:
            with torch.no_grad():
                return (self._attend(),)
        out = self._attend()
        return out, *torch.autograd.grad(out, self.leaves, self.dout)

    def results(self, direction: str) -> Results:
        """The output, and the gradients of the shards."""
        with self.around():
            found = self.call(direction)
        return {name: y[0].transpose(0, 1) for name, y in zip(("out", "dq", "dk", "dv"), found, strict=False)}


def _set_rotation(rotation: str) -> None:
    from torch.distributed.tensor.experimental import _attention

    _attention.set_rotate_method(rotation)


def _given(x: Inputs) -> list[torch.Tensor]:
    return [x.q, x.k, x.v, x.dout]


def _spread(x: Inputs) -> Spread:
    assert isinstance(x.case, Spread)
    return x.case


Make = Callable[[Inputs, Ranks], Peer]

HETU: dict[str, Make] = {f"hetu {method}": partial(Hetu, method=method) for method in METHODS}

TORCH: dict[str, Make] = {
    f"torch {name} {rotation}": partial(ContextParallel, backend=backend, rotation=rotation)
    for (name, backend), rotation in product(BACKENDS.items(), ROTATIONS)
}

FUNCTIONAL: dict[str, Make] = {"functional direct": partial(Functional, method="direct")}

PEERS: dict[str, Make] = {ALONE: partial(Hetu, method=None), **HETU, **FUNCTIONAL, **TORCH}
