"""Checks of attention over documents too long for a dense one: chosen rows and keys, exactly, in float64.

What a row's output and gradient are needs only that row and all keys. What a key's gradients are needs all rows'
log-sum-exps and deltas, which are computed here block by block, from the inputs alone.
"""

from __future__ import annotations

import math

import torch
from support.packs import OPERANDS, Pack, Tensors, assert_near


def planted(pack: Pack, device: str, seed: int = 0) -> Tensors:
    """Operands in which every row has one key that takes about half of its weight, itself or any that it may see.

    Over random keys alone a softmax is so flat that a block of keys could go missing without being seen.
    """
    generator = torch.Generator(device).manual_seed(seed)
    assert pack.lens_q == pack.lens_k, "rows and keys are the same tokens"
    data: Tensors = {}
    for name in OPERANDS[1:]:
        data[name] = torch.randn(pack.shape(name), generator=generator, device=device).to(pack.dtype)
    lens = torch.tensor(pack.lens_q, device=device)
    start, length = (torch.repeat_interleave(x, lens) for x in (lens.cumsum(0) - lens, lens))
    own = torch.arange(len(start), device=device) - start
    limit = own + 1 if pack.is_causal else length
    rows, heads, head_dim = pack.shape("q")
    data["q"] = torch.empty(rows, heads, head_dim, dtype=pack.dtype, device=device)
    weight = (math.log(max(pack.lens_q)) + 1) / math.sqrt(head_dim)
    for head in range(heads):
        draw = torch.rand(rows, generator=generator, device=device, dtype=torch.float64)
        anywhere = torch.minimum((draw * limit).long(), limit - 1)
        aim = start + torch.where(own % 2 == 0, own, anywhere)
        noise = torch.randn(rows, head_dim, generator=generator, device=device)
        keys = data["k"][:, head // (heads // pack.heads[1])]
        data["q"][:, head] = (weight * keys[aim].float() + 0.5 * noise).to(pack.dtype)
    slots = (len(pack.lens_q), heads, max(pack.lens_q))
    return data | {"dlse": torch.randn(slots, generator=generator, device=device)}


def chosen(length: int) -> list[int]:
    """The first and the last, those beside blocks' edges, and some at random."""
    edges = [edge + side for edge in (16, 32, 64, 128, 256, length // 128 * 128) for side in (-1, 0, 1)]
    generator = torch.Generator().manual_seed(length)
    some = torch.randint(length, (12,), generator=generator).tolist() if length else []
    places = {0, 1, length // 2, length - 2, length - 1, *edges, *some}
    return sorted(place for place in places if 0 <= place < length)


def check_sampled(pack: Pack, data: Tensors, got: Tensors, documents: list[int]) -> None:
    """Compares out, lse and dq at chosen rows of documents, and dk and dv of the last key head at chosen keys."""
    for document in documents:
        n = pack.lens_q[document]
        places = torch.tensor(chosen(n), dtype=torch.int64, device=data["q"].device)
        operands = [data[name][pack.rows(name, document)] for name in OPERANDS]
        dlse = data["dlse"][document, :, :n].T
        mine = {name: x[pack.rows(name, document)] for name, x in got.items() if name != "lse"}
        want = rows_exactly(*operands, dlse, places, pack.is_causal)
        label = f"of document {document} with {n} tokens"
        lse = got["lse"][document][:, places].T.double()
        torch.testing.assert_close(lse, want["lse"], atol=1e-4, rtol=1e-5, msg=f"lse {label}: {{}}".format)
        for name in ("out", "dq"):
            assert_near(mine[name][places], want[name], name == "out", f"{name} {label}: {{}}")
        group = pack.heads[0] // pack.heads[1]
        q, k, v, dout = operands
        last = [q[:, -group:], k[:, -1], v[:, -1], dout[:, -group:]]
        want = keys_exactly(*last, dlse[:, -group:], places, pack.is_causal)
        for name in ("dk", "dv"):
            assert_near(mine[name][places, -1], want[name], False, f"{name} {label}: {{}}")


def rows_exactly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
    rows: torch.Tensor,
    is_causal: bool,
) -> Tensors:
    """Gives out ``(n, H, D)``, lse ``(n, H)`` and dq of some rows; one head after another, for memory's sake."""
    heads, group, scale = q.shape[1], q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    hidden = torch.arange(len(k), device=k.device) > rows[:, None] if is_causal else None
    parts: list[Tensors] = []
    for head in range(heads):
        keys, values = (x[:, head // group].double() for x in (k, v))
        scores = q[rows, head].double() @ keys.T * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        p = (scores - lse[:, None]).exp()
        dp = dout[rows, head].double() @ values.T
        delta = (p * dp).sum(-1) - dlse[rows, head].double()
        parts.append({"out": p @ values, "lse": lse, "dq": scale * (p * (dp - delta[:, None])) @ keys})
    return {name: torch.stack([part[name] for part in parts], 1) for name in parts[0]}


def keys_exactly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
    keys: torch.Tensor,
    is_causal: bool,
    block: int = 1024,
) -> Tensors:
    """Gives dk and dv ``(n, D)`` of some keys of one key head, from its ``(T, group, D)`` query heads."""
    scale, numbers = q.shape[2] ** -0.5, torch.arange(len(q), device=q.device)
    k, v = k.double(), v.double()
    wanted_k, wanted_v = k[keys], v[keys]
    dk, dv = torch.zeros_like(wanted_k), torch.zeros_like(wanted_v)
    for head in range(q.shape[1]):
        for start in range(0, len(q), block):
            rows = slice(start, start + block)
            seen = min(start + block, len(k)) if is_causal else len(k)
            own_q, own_dout = q[rows, head].double(), dout[rows, head].double()
            scores = own_q @ k[:seen].T * scale
            if is_causal:
                scores.masked_fill_(numbers[:seen] > numbers[rows, None], -torch.inf)
            lse = scores.logsumexp(-1, keepdim=True)
            delta = scores.sub_(lse).exp_().mul_(own_dout @ v[:seen].T).sum(-1, keepdim=True)
            delta -= dlse[rows, head, None].double()
            scores = own_q @ wanted_k.T * scale
            p = (scores - lse).exp()
            if is_causal:
                p = p.masked_fill(keys > numbers[rows, None], 0.0)
            dv += p.T @ own_dout
            dk += scale * (p * (own_dout @ wanted_v.T - delta)).T @ own_q
    return {"dk": dk, "dv": dv}
