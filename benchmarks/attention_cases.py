"""What the attention benchmark runs on: heads, lengths, inputs, and what is right."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch

DISTRIBUTION = Path(__file__).parent / "data" / "doc_length_distribution.csv"

HEADS = ("32:8:128", "16:16:128", "32:32:64", "16:4:256")
"""Query heads, key heads, head_dim."""

TOKENS = (32_768, 4_096)
LENGTHS = ("mix", "equal", "one", "short", "ragged")
MASKS = ("causal", "full")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """One line of inputs.

    Attributes:
        heads: Query heads, key heads and head_dim, as ``"32:8:128"``.
        tokens: In all documents together.
        lengths: A member of LENGTHS.
        is_causal: Whether the mask is causal.
        window: How many keys before its own a query sees, under a causal mask; None for all.
    """

    heads: str
    tokens: int
    lengths: str
    is_causal: bool
    window: int | None = field(default=None, kw_only=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Query heads, key heads, head_dim."""
        num_q, num_kv, head_dim = map(int, self.heads.split(":"))
        return num_q, num_kv, head_dim

    @property
    def mask(self) -> str:
        """A member of MASKS, or a window's name as of :func:`mask_name`."""
        return MASKS[0 if self.is_causal else 1] if self.window is None else f"window-{self.window}"

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as FlashAttention's arguments have it; ``(-1, -1)`` for none."""
        return (-1, -1) if self.window is None else (self.window, 0)

    @property
    def documents(self) -> list[int]:
        return document_lengths(self.lengths, self.tokens)

    def flops(self, direction: str) -> float:
        """Two products of 2 * head_dim operations for every pair that the mask lets through; 2.5 times that back."""
        num_q, _, head_dim = self.shape
        pairs = sum(n * (n + 1) // 2 if self.is_causal else n * n for n in self.documents)
        if self.window is not None:  # what lies before it
            pairs -= sum(n * (n + 1) // 2 for n in (m - self.window - 1 for m in self.documents) if n > 0)
        return 4 * head_dim * num_q * pairs * (2.5 if direction == "backward" else 1)

    def __str__(self) -> str:
        return f"{self.heads} {self.tokens:>6} {self.lengths:<6} {self.mask:<6}"


def cases(heads: Sequence[str], tokens: Sequence[int], lengths: Sequence[str], masks: Sequence[str]) -> Iterator[Case]:
    """All combinations."""
    for total, one, kind, mask in product(tokens, heads, lengths, masks):
        yield Case(one, total, kind, mask != "full", window=int(mask[7:]) if mask.startswith("window-") else None)


def mask_name(text: str) -> str:
    """A mask as the command line names it: of MASKS, or ``window-N``, causal with N keys before a query's own.

    Raises:
        ValueError: If there is no such mask.
    """
    if text not in MASKS and not re.fullmatch(r"window-\d+", text):
        raise ValueError(text)
    return text


@cache
def distribution() -> tuple[list[tuple[int, int]], list[float]]:
    """The bins of real document lengths, each with both ends, and the share of documents in each."""
    with DISTRIBUTION.open(encoding="utf-8") as file:
        rows = [(re.findall(r"\d+", row["range"]), int(row["number"])) for row in csv.DictReader(file)]
    bins = [(max(int(ends[0]), 1), int(ends[1])) for ends, _ in rows]
    counts = np.array([number for _, number in rows], float)
    return bins, list(counts / counts.sum())


def document_lengths(kind: str, total: int, seed: int = 0) -> list[int]:
    """Lengths of documents that make ``total`` tokens.

    ``mix``: drawn from the distribution of real documents, log-uniform inside a bin, each at most a quarter of the
    total; ``equal``: 2,048 each; ``one``: a single one; ``short``: 256 each; ``ragged``: one of half the total, the
    rest 64 and 65 in turns. The last document takes what is left.

    Example:
        >>> document_lengths("ragged", 400)
        [200, 64, 65, 64, 7]
        >>> sum(document_lengths("mix", 4096)), max(document_lengths("mix", 4096)) <= 1024
        (4096, True)
    """
    rng, (bins, shares) = np.random.default_rng(seed), distribution()
    lengths: list[int] = []
    left = total
    while left:
        if kind == "mix":
            low, high = bins[rng.choice(len(bins), p=shares)]
            drawn = min(int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))), max(total // 4, 1))
        elif kind == "ragged":
            drawn = 64 + (len(lengths) - 1) % 2 if lengths else max(total // 2, 1)
        else:
            drawn = {"equal": 2048, "short": 256, "one": total}[kind]
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return lengths


@dataclass
class Inputs:
    """Tensors of a case. ``cu_seqlens`` is on the CPU, ``cu_seqlens_there`` on the device."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_there: torch.Tensor
    longest: int
    scale: float

    @classmethod
    def draw(cls, case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
        """Random inputs, never zeros: those run faster than real data."""
        num_q, num_kv, head_dim = case.shape
        generator = torch.Generator(device).manual_seed(1)

        def rows(heads: int) -> torch.Tensor:
            return torch.randn(case.tokens, heads, head_dim, device=device, dtype=dtype, generator=generator)

        q, k, v, dout = rows(num_q), rows(num_kv), rows(num_kv), rows(num_q)
        cu_seqlens = torch.tensor(np.cumsum([0, *case.documents]), dtype=torch.int32)
        return cls(case, q, k, v, dout, cu_seqlens, cu_seqlens.to(device), max(case.documents), head_dim**-0.5)


Results = dict[str, torch.Tensor]


def sampled(case: Case, results: Results) -> Results:
    """The first and the last key head of each tensor, with the query heads that share them.

    ``q``, ``out``, ``dout`` and ``dq`` have query heads, the others key heads.
    """
    num_q, num_kv, _ = case.shape
    group = num_q // num_kv
    keys = sorted({0, num_kv - 1})
    queries = [head * group + i for head in keys for i in range(group)]
    return {name: x[:, queries if name in ("q", "out", "dout", "dq") else keys] for name, x in results.items()}


def reference(inputs: Inputs, block: int = 2048) -> Results:
    """The output and the gradients in float64, of the sampled heads: all of them would take minutes.

    Block by block of query rows, so that a document of 32,768 tokens takes 2 GB a copy of its scores. Source of the
    formulas: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023, section 2.
    """
    case = inputs.case
    given = sampled(case, {"q": inputs.q, "k": inputs.k, "v": inputs.v, "dout": inputs.dout})
    q, k, v, dout = (x.double() for x in given.values())
    kept = k.shape[1]
    q, dout = (x.unflatten(1, (kept, -1)) for x in (q, dout))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    places = inputs.cu_seqlens.tolist()
    for head in range(kept):
        for start, end in pairwise(places):
            keys, values = k[start:end, head], v[start:end, head]
            for row in range(start, end, block):
                rows = slice(row, min(row + block, end))
                first = 0 if case.window is None else max(row - start - case.window, 0)
                seen = slice(first, rows.stop - start if case.is_causal else end - start)
                scores = torch.einsum("igd,jd->igj", q[rows, head], keys[seen]) * inputs.scale
                if case.is_causal:
                    i = torch.arange(row - start, rows.stop - start, device=q.device)[:, None]
                    j = torch.arange(seen.start, seen.stop, device=q.device)
                    hidden = j > i if case.window is None else (j > i) | (j < i - case.window)
                    scores.masked_fill_(hidden[:, None, :], -torch.inf)
                p = scores.softmax(-1)
                out[rows, head] = torch.einsum("igj,jd->igd", p, values[seen])
                dp = torch.einsum("igd,jd->igj", dout[rows, head], values[seen])
                dv[start:end, head][seen] += torch.einsum("igj,igd->jd", p, dout[rows, head])
                delta = (out[rows, head] * dout[rows, head]).sum(-1, keepdim=True)
                ds = p.mul_(dp.sub_(delta)).mul_(inputs.scale)
                dq[rows, head] = torch.einsum("igj,jd->igd", ds, keys[seen])
                dk[start:end, head][seen] += torch.einsum("igj,igd->jd", ds, q[rows, head])
    return {"out": out.flatten(1, 2), "dq": dq.flatten(1, 2), "dk": dk, "dv": dv}


def error(case: Case, results: Results, right: Results) -> float:
    """The largest ``norm(x - right) / norm(right)`` of the results that are given; NaN is infinite."""
    errors = [
        float((x.detach().double() - right[name]).norm() / right[name].norm())
        for name, x in sampled(case, results).items()
    ]
    return max(e if e == e else float("inf") for e in errors)
