"""Documents side by side with all that a forward and a backward of them read, on any device, and the check of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from support.dense import dense, dense_backward, dropout_of

import hetu
from hetu.backends.attention.contract import BackwardState, Dropout, attention_delta, compute_dtype, new_state
from hetu.backends.attention.family import AttendCall
from hetu.backends.families import family
from hetu.parallel import Mask
from hetu.parallel.plan.varlen import VarlenPlan

Tensors = dict[str, torch.Tensor]

OPERANDS = ("q", "k", "v", "dout")
GRADIENTS = ("dq", "dk", "dv")

# Triton's interpreter cuts float32 off where a GPU rounds it to bfloat16.
_BFLOAT16 = 4.0 if not torch.cuda.is_available() else 1.0

OUT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2 * _BFLOAT16}
"""Largest error of an output, relative to the largest entry (1 if that is smaller)."""

GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2 * _BFLOAT16}
"""The same of a gradient. The forward's rounding of out, 2**-9 in bfloat16, is in it absolutely, through delta."""

GROUPS = [(1, 1), (4, 1), (3, 1), (5, 1), (7, 1), (8, 1), (9, 3), (12, 2), (10, 5), (5, 5)]
"""Heads of queries and of keys; groups that are powers of two and others."""


def heads_of(head_dim: int) -> tuple[int, int]:
    """The heads to test a width with: one choice a width, so that all tests of it share what is compiled."""
    return GROUPS[head_dim // 8 % len(GROUPS)]


@dataclass(frozen=True)
class Pack:
    """Documents side by side, and how they attend. ``tail`` rows of q, k and v belong to nobody."""

    lens_q: list[int]
    lens_k: list[int]
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    is_causal: bool = True
    dropout: Dropout | None = None
    tail: int = 0

    @property
    def cu_seqlens(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        return np.cumsum([0, *self.lens_q]), np.cumsum([0, *self.lens_k])

    def shape(self, name: str) -> tuple[int, int, int]:
        """Of an operand or a gradient: ``(T, H, D)``."""
        of_query = name.removeprefix("d") in ("q", "out")
        rows = sum(self.lens_q if of_query else self.lens_k) + self.tail
        return rows, self.heads[not of_query], self.head_dim

    def rows(self, name: str, document: int) -> slice:
        """The document's rows of a tensor."""
        cu = self.cu_seqlens[name.removeprefix("d") in ("k", "v")]
        return slice(int(cu[document]), int(cu[document + 1]))

    def data(self, seed: int = 0, device: str = "cpu") -> Tensors:
        """Random operands, and the gradient of lse ``(B, H_q, S)``."""
        generator = torch.Generator().manual_seed(seed)
        data = {name: torch.randn(self.shape(name), generator=generator).to(self.dtype) for name in OPERANDS}
        slots = (len(self.lens_q), self.heads[0], max(self.lens_q, default=0))
        data["dlse"] = torch.randn(slots, generator=generator).to(compute_dtype(self.dtype))
        return {name: x.to(device) for name, x in data.items()}


def by_kernels(pack: Pack, data: Tensors, backend: str, device: str, into: Tensors | None = None) -> Tensors:
    """out, lse, dq, dk and dv by a backend's kernels, in memory that held NaN; ``into`` takes the gradients."""
    q, k, v, dout, dlse = (data[name].to(device) for name in (*OPERANDS, "dlse"))
    plan = VarlenPlan.build(*pack.cu_seqlens, len(q), Mask.of(pack.is_causal))
    position = np.pad(plan.key_position, (0, pack.tail)) if pack.dropout else None
    call = AttendCall(q, k, v, plan.spans, plan.table, pack.head_dim**-0.5, None, pack.dropout, position)
    state = new_state(q, plan.spans, len(pack.lens_q), max(pack.lens_q, default=0), runs_on=False)
    state.out.fill_(torch.nan)
    family(backend).attend(call, state)
    grads = into or {name: torch.full(pack.shape(name), torch.nan, dtype=q.dtype, device=device) for name in GRADIENTS}
    backward = BackwardState(dout, state.lse, attention_delta(state.out, dout, dlse, plan.spans), grads["dq"])
    family(backend).attend_backward(call, backward, grads["dk"], grads["dv"])
    return {"out": state.out, "lse": state.lse} | {name: grads[name] for name in GRADIENTS}


def by_op(
    pack: Pack, data: Tensors, backend: str, p_dropout: float = 0.0, max_seqlen: int | None = None, **options: Any
) -> tuple[Pack, Tensors]:
    """The same by ``attn_varlen`` and its gradient, fed with the data where it lies.

    Gives the pack with the dropout that was drawn, and, if ``return_softmax`` is asked for, p as well. Without ``dlse``
    in the data the gradient is that of the output alone.
    """
    fed = {name: data[name] for name in (*OPERANDS, "dlse") if name in data}
    top = hetu.IntSymbol("max_seqlen_q")
    with hetu.graph("define_and_run", device=data["q"].device.type) as g:
        inputs = {name: hetu.placeholder(x.dtype, x.shape, name=name) for name, x in fed.items() if name != "dlse"}
        q, k, v, dout = inputs.values()
        cu_seqlens = [hetu.constant(cu.astype(np.int32)) for cu in pack.cu_seqlens]
        out, lse, p, rng_state = hetu.attn_varlen(
            q, k, v, pack.head_dim, *cu_seqlens, top, p_dropout=p_dropout, is_causal=pack.is_causal, **options
        )  # fmt: skip
        targets, weights = [out], [dout]
        if "dlse" in fed:
            inputs["dlse"] = hetu.placeholder(lse.dtype, lse.shape, name="dlse")
            targets, weights = [out, lse], [dout, inputs["dlse"]]
        grads = hetu.gradients(targets, [q, k, v], weights)
    symbols = {} if max_seqlen is None else {top: max_seqlen}
    feeds = {inputs[name]: x for name, x in fed.items()}
    with hetu.config(backend=backend):
        got = g.run([out, lse, *grads, rng_state, p], feed_dict=feeds, int_symbol_dict=symbols)
    drawn = Pack(**{**vars(pack), "dropout": dropout_of(p_dropout, got[5])})
    results = dict(zip(("out", "lse", *GRADIENTS), got, strict=False))
    return drawn, results | ({"p": got[6]} if options.get("return_softmax") else {})


def assert_right(pack: Pack, data: Tensors, got: Tensors, documents: Iterable[int] | None = None) -> None:
    """Compares documents (default: all) with the definition in float64; rows of nobody are 0.

    Computes where the data lies.
    """
    device = data["q"].device
    for document in range(len(pack.lens_q)) if documents is None else documents:
        n, m = pack.lens_q[document], pack.lens_k[document]
        q, k, v, dout = (data[name][pack.rows(name, document)] for name in OPERANDS)
        dlse = data["dlse"][document, :, :n].T if "dlse" in data else None
        options: dict[str, Any] = {"is_causal": pack.is_causal, "document": document, "dropout": pack.dropout}
        out, lse, p = dense(q, k, v, **options)
        grads = dense_backward(q, k, v, dout, dlse, **options)
        for name, want in zip(("out", *GRADIENTS), (out, *grads), strict=True):
            mine = got[name][pack.rows(name, document)].to(device)
            assert_near(mine, want, name == "out", f"{name} of document {document}: {{}}")
        torch.testing.assert_close(got["lse"][document, :, :n].to(device).double(), lse, atol=3e-5, rtol=1e-5)
        assert (got["lse"][document, :, n:] == -torch.inf).all()
        if "p" in got:
            mine = got["p"][document].to(device)
            assert_near(mine[:, :n, :m], p, True, f"p of document {document}: {{}}")
            assert (mine[:, n:] == 0).all() and (mine[:, :, m:] == 0).all()
    for name in ("out", *GRADIENTS) if pack.tail else ():
        assert (got[name][pack.shape(name)[0] - pack.tail :] == 0).all(), f"{name} of rows of nobody"


def assert_near(mine: torch.Tensor, want: torch.Tensor, is_output: bool, message: str) -> None:
    """Absolutely, by the tolerance of the type and the size of what is wanted."""
    size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    atol = (OUT_TOLERANCE if is_output else GRADIENT_TOLERANCE)[mine.dtype] * size
    torch.testing.assert_close(mine.double(), want, atol=atol, rtol=0, msg=message.format)
