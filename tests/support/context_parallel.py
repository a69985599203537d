"""Jobs for ranks that use ``hetu.functional.ContextParallel``, and the attention that they are compared with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import hetu

Case = dict[str, Any]


def join(timeout: float = 60.0) -> None:
    """Joins torch's world; hetu's is not used."""
    from datetime import timedelta

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: list[int], is_causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of whole documents, one by one, by the definition."""
    outs, lses = [], []
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for begin, end in zip(cu, cu[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], k[begin:end]) * (scale or 1 / math.sqrt(q.shape[2]))
        if is_causal:
            n = end - begin
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[begin:end]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def inputs(case: Case, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, dout and dlse of all tokens, the same on all ranks."""
    tokens, (num_q, num_kv, head_dim) = case["cu"][-1], case["heads"]
    rng = np.random.default_rng(seed)
    shapes = [(tokens, h, head_dim) for h in (num_q, num_kv, num_kv, num_q)] + [(num_q, tokens)]
    return [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]


def attend(case: Case, group: Any = None, seed: int = 0) -> float:
    """The largest difference between a rank's results and gradients and those of one process in float64."""
    cp = hetu.functional.ContextParallel(
        torch.tensor(case["cu"]), group, case["split"], case["method"], tokens=case.get("tokens")
    )
    dtype = case.get("dtype", torch.float64)
    q, k, v, dout, dlse = inputs(case, seed)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = dense(*whole, case["cu"], case["is_causal"], case.get("scale"))
    wanted_grads = torch.autograd.grad(wanted, whole, [dout, dlse])
    own = [cp.dispatch(x.to(dtype)).detach().requires_grad_() for x in (q, k, v)]
    options = {"is_causal": case["is_causal"], "softmax_scale": case.get("scale"), "return_lse": True}
    found = hetu.functional.parallel_attn(*own, cp, **options)
    grads = torch.autograd.grad(found, own, [cp.dispatch(dout.to(dtype)), cp.dispatch(dlse.to(found[1].dtype), dim=1)])
    pairs = [(found[0], cp.dispatch(wanted[0])), (found[1], cp.dispatch(wanted[1], dim=1))]
    pairs += [(a, cp.dispatch(b)) for a, b in zip(grads, wanted_grads, strict=True)]
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape, (a.shape, b.shape)
        worst = max(worst, float((a.double() - b).abs().max()) if a.numel() else 0.0)
    assert torch.equal(cp.undispatch(own[0]), q.to(dtype))
    return worst
