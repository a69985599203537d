"""Random documents cut into query spans, key buffers and segments, and attention over them by plain definition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from hetu.backends import families
from hetu.backends.attention.contract import AttentionState, Dropout, new_state
from hetu.backends.attention.dropout import keep_mask
from hetu.backends.attention.family import AttendCall
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable, Turn, take_turns


@dataclass(frozen=True)
class Step:
    """One attend step: a table over a buffer of ``rows`` keys with known positions."""

    table: SegmentTable
    rows: int
    key_position: IntArray


@dataclass(frozen=True)
class Case:
    """Queries and the steps in which they see their keys. ``seen[s]`` is step s's mask, ``(T_q, rows)``."""

    spans: QuerySpans
    steps: list[Step]
    seen: list[torch.Tensor]
    rows: int
    slots: int
    slot_rows: int
    columns: int

    @cached_property
    def turns(self) -> list[Turn | None]:
        """What each step finds and leaves."""
        return take_turns(self.spans, [step.table for step in self.steps])

    @property
    def runs_on(self) -> bool:
        """Whether results run on between steps."""
        return any(turn is not None and turn.runs_on for turn in self.turns)


def cut(rng: np.random.Generator, positions: range) -> list[range]:
    """Cuts an evenly spaced run into one to three parts, none empty."""
    marks = sorted({0, len(positions), *rng.integers(0, len(positions) + 1, rng.integers(0, 3)).tolist()})
    return [positions[a:b] for a, b in pairwise(marks) if b > a]


Bounds = tuple[int, int]
"""The nearest and the farthest key that a query sees, counted from its own position."""


def random_case(
    seed: int, lengths: list[int], *, is_causal: bool, num_steps: int, tail: int = 0, has_windows: bool = False
) -> Case:
    """Self-attention of documents whose queries and keys are dealt out in strides, in random order, over steps.

    Each document is its own slot. Every (query, key) pair of the mask is in exactly one segment; some steps may
    be empty, and rows of a buffer that no segment names hold keys of nobody. With ``has_windows`` each document has
    bounds of its own, both before a query or both behind it too, so that some rows see nothing.
    """
    bounds = [(-n, 0 if is_causal else n) for n in lengths]
    if has_windows:
        drawn = np.random.default_rng([seed, 1])
        bounds = [(int(drawn.integers(-n, n // 4 + 1)), n) for n in lengths]
        bounds = [(low, 0 if is_causal and low <= 0 else int(drawn.integers(low, n + 1))) for low, n in bounds]
    rng = np.random.default_rng(seed)
    spans: list[tuple[int, range]] = []
    runs: list[list[tuple[int, range]]] = [[] for _ in range(num_steps)]
    for document, length in enumerate(lengths):
        stride = int(rng.integers(1, 4))
        for residue in range(min(stride, length)):
            spans += [(document, part) for part in cut(rng, range(residue, length, stride))]
            for part in cut(rng, range(residue, length, stride)):
                runs[int(rng.integers(num_steps))].append((document, part))
    spans = [spans[i] for i in rng.permutation(len(spans))]
    query_spans, total = _query_spans(spans, tail)
    steps, seen = [], []
    for step_runs in runs:
        step, mask = _step(rng, spans, query_spans, step_runs, total, bounds, has_windows)
        steps.append(step)
        seen.append(mask)
    longest = max(lengths, default=0)
    return Case(query_spans, steps, seen, total, len(lengths), longest, longest)


def _query_spans(spans: list[tuple[int, range]], tail: int) -> tuple[QuerySpans, int]:
    length = [len(part) for _, part in spans]
    used: dict[int, int] = {}
    slot_row = []
    for document, part in spans:
        slot_row.append(used.get(document, 0))
        used[document] = slot_row[-1] + len(part)
    fields = {
        "start": (np.cumsum(length) - length).tolist(),
        "length": length,
        "document": [document for document, _ in spans],
        "position": [part.start for _, part in spans],
        "step": [part.step for _, part in spans],
        "slot": [document for document, _ in spans],
        "slot_row": slot_row,
        "column": [0 for _ in spans],
    }
    total = sum(length) + tail
    if tail:
        last = {"start": sum(length), "length": tail, "document": -1, "step": 1, "slot": -1}
        fields = {name: [*values, last.get(name, 0)] for name, values in fields.items()}
    return QuerySpans(**{name: np.asarray(values, np.int64) for name, values in fields.items()}), total


def _step(
    rng: np.random.Generator,
    spans: list[tuple[int, range]],
    query_spans: QuerySpans,
    runs: list[tuple[int, range]],
    total: int,
    bounds: list[Bounds],
    has_windows: bool,
) -> tuple[Step, torch.Tensor]:
    starts, size = [], 0
    for _, part in runs:
        size += int(rng.integers(0, 3))  # rows of nobody
        starts.append(size)
        size += len(part)
    size += int(rng.integers(0, 3))
    positions = np.zeros(size, np.int64)
    for (_, part), start in zip(runs, starts, strict=True):
        positions[start : start + len(part)] = part
    rows = []
    seen = torch.zeros(total, size, dtype=torch.bool)
    for query, (document, part) in enumerate(spans):
        for i in rng.permutation(len(runs)):
            other, keys = runs[i]
            if other != document:
                continue
            # Of equal stride: keys[j] - part[r] <= bound is j <= r + (bound + the starts' distance) / stride.
            near, far = bounds[document]
            apart = part.start - keys.start
            lower, diagonal = -(-(near + apart) // part.step), (far + apart) // part.step
            if not has_windows and far > 0:
                diagonal = len(keys) - 1
            first, k_len = max(lower, 0), min(len(keys), len(part) + diagonal)
            if k_len <= first or lower > diagonal:
                continue
            lower = max(lower - first, 1 - len(part))
            rows.append((query, starts[i] + first, k_len - first, diagonal - first, lower))
            allowed = torch.tensor([[near <= key - p <= far for key in keys] for p in part])
            start = int(query_spans.start[query])
            seen[start : start + len(part), starts[i] : starts[i] + len(keys)] = allowed
    columns = np.asarray(rows, np.int64).reshape(-1, 5).T
    return Step(SegmentTable(*(columns if has_windows else columns[:4])), size, positions), seen


def sinks_of(heads: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A sink for each head, as calls take them: one that outweighs a few keys, then others."""
    high = torch.float64 if dtype == torch.float64 else torch.float32
    sinks = 2.0 * torch.randn(heads, generator=torch.Generator().manual_seed(seed), dtype=high)
    sinks[0] = 3.0
    return sinks


def buffers(
    case: Case, heads_q: int, heads_k: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Random q and, a step, k and v: strided views, with NaN in every key that nobody sees."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(case.rows, (heads_q + 2) * head_dim, generator=generator).to(dtype)
    q = wide[:, head_dim:-head_dim].view(case.rows, heads_q, head_dim)
    pairs = []
    for step, seen in zip(case.steps, case.seen, strict=True):
        kv = torch.randn(step.rows, 2, heads_k, head_dim, generator=generator).to(dtype)
        kv[~seen.any(0)] = torch.nan
        pairs.append((kv[:, 0], kv[:, 1]))
    return q, pairs


def run(
    family: str,
    case: Case,
    q: torch.Tensor,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    scale: float,
    dropout: Dropout | None = None,
    scores: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> AttentionState:
    """All steps by a kernel family, into a state that held NaN wherever a kernel must write."""
    columns = case.columns if scores else None
    state = new_state(q, case.spans, case.slots, case.slot_rows, case.runs_on, columns=columns)
    state.out.fill_(torch.nan)
    if state.acc is not None:
        state.acc.fill_(torch.nan)
    spans = case.spans
    for slot, row, length in zip(spans.slot, spans.slot_row, spans.length, strict=True):
        if slot >= 0:
            state.lse[slot, :, row : row + length] = torch.nan
    for step, turn, (k, v) in zip(case.steps, case.turns, pairs, strict=True):
        call = AttendCall(q, k, v, spans, step.table, scale, turn, dropout, step.key_position, softcap, sinks)
        families.family(family).attend(call, state)
    return state


@dataclass(frozen=True)
class Dense:
    """What the definition gives: out ``(T_q, H, D)``, lse ``(H, T_q)``, p and keep ``(H, T_q, all keys)``."""

    out: torch.Tensor
    lse: torch.Tensor
    p: torch.Tensor
    keep: torch.Tensor


def dense(
    case: Case,
    q: torch.Tensor,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    scale: float,
    dropout: Dropout | None = None,
    dtype: torch.dtype = torch.float64,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> Dense:
    """Attention over all keys of all steps at once, by the masks.

    Buffers and segments are of no document, so no oracle of documents can say what a kernel should make of them.
    """
    heads, group = q.shape[1], q.shape[1] // pairs[0][0].shape[1]
    seen = torch.cat(case.seen, 1)
    q, k, v = (
        x.nan_to_num().to(dtype) for x in (q, torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
    )
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        owned = owned_rows(case.spans)
        lse[:, owned] = torch.logaddexp(lse[:, owned], sinks.to(dtype)[:, None])
    p = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    keep, factor = torch.ones_like(p, dtype=torch.bool), 1.0
    if dropout is not None:
        keys = torch.from_numpy(np.concatenate([step.key_position for step in case.steps]))
        spans, factor = case.spans, dropout.scale
        for start, length, document, position, step in zip(
            spans.start, spans.length, spans.document, spans.position, spans.step, strict=True
        ):
            queries = int(position) + int(step) * torch.arange(int(length))
            rows = slice(int(start), int(start + length))
            keep[:, rows] = keep_mask(dropout, int(document), torch.arange(heads), queries, keys)
    return Dense(torch.einsum("hij,jhd->ihd", p * keep * factor, v), lse, p, keep)


def owned_rows(spans: QuerySpans) -> torch.Tensor:
    """Which rows of q have a log-sum-exp."""
    return torch.from_numpy(np.repeat(spans.slot >= 0, spans.length))


def rows_of(case: Case, lse: torch.Tensor) -> torch.Tensor:
    """``(H, T_q)`` from lse ``(slots, H, S)``; -inf for the tail."""
    flat = lse.new_full((lse.shape[1], case.rows), -torch.inf)
    spans = case.spans
    for start, length, slot, row in zip(spans.start, spans.length, spans.slot, spans.slot_row, strict=True):
        if slot >= 0:
            flat[:, start : start + length] = lse[slot, :, row : row + length]
    return flat
