"""What pipelines hold while tests follow plans without a lowering."""

from __future__ import annotations

import torch

from hetu.backends.comm import Buffers
from hetu.parallel import Heads
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.parts import PipelinePlan


def holding_keys(part: PipelinePlan, heads: Heads, kv: torch.Tensor, dkv: torch.Tensor | None = None) -> Buffers:
    """Keys and values of a shard ``(rows, 2, H_kv, head_dim)``, and in a backward where their gradients are written."""
    given = {"k": kv[:, 0], "v": kv[:, 1]}, {Payload.KV: kv.flatten(1, 2)}
    if dkv is None:
        return Buffers(part, heads, given, lambda: ({}, {}))
    made = {"dk": dkv[:, 0], "dv": dkv[:, 1]}, {Payload.KV_GRADS: dkv.flatten(1, 2)}
    return Buffers(part, heads, given, lambda: made)


def holding_zeros(part: PipelinePlan, heads: Heads) -> Buffers:
    """Zeros of everything, results too."""
    values = {name: payload for payload in Payload for name in payload.values}
    shapes = {name: (part.rows, heads.all.count(name), heads.numbers(payload)) for name, payload in values.items()}
    return Buffers(part, heads, ({name: torch.zeros(shape) for name, shape in shapes.items()}, {}), lambda: ({}, {}))
