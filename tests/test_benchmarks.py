"""The attention benchmark: its cases, its reference, and what it refuses to print."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import attention  # noqa: E402
import attention_cases  # noqa: E402
import attention_peers  # noqa: E402
import tables  # noqa: E402
from attention import Measured  # noqa: E402
from attention_cases import HEADS, LENGTHS, TOKENS, Case, Inputs, document_lengths  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(HEADS, "tiny", (4, 2, 8))
    return "tiny"


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("total", [*TOKENS, 1000])
def test_lengths_make_the_total(kind: str, total: int) -> None:
    lengths = document_lengths(kind, total)
    assert sum(lengths) == total and min(lengths) > 0
    assert lengths == document_lengths(kind, total), "seeds are fixed"
    if kind == "mix":
        assert max(lengths) <= total // 4 and len(set(lengths)) > 2


def test_the_mix_is_that_of_real_documents() -> None:
    lengths = np.array(document_lengths("mix", 20_000_000))
    bins, shares = attention_cases.distribution()
    assert len(bins) == 14 and sum(shares) == pytest.approx(1)
    for (low, high), share in zip(bins, shares, strict=True):
        assert np.mean((lengths >= low) & (lengths <= high)) == pytest.approx(share, abs=0.01), (low, high)


@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_count_unmasked_pairs(is_causal: bool, tiny: str) -> None:
    case = Case(tiny, 300, "ragged", is_causal)
    mask = torch.block_diag(*(torch.ones(n, n) for n in case.documents))
    pairs = int((mask.tril() if is_causal else mask).sum())
    assert case.flops == 4 * 8 * 4 * pairs


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_reference_is_right(is_causal: bool, tiny: str) -> None:
    inputs = Inputs.draw(Case(tiny, 90, "ragged", is_causal), "cpu")
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])
    mask = torch.block_diag(*(torch.ones(n, n) for n in inputs.case.documents)).bool()
    scores = torch.einsum("ihd,jhd->hij", q, k) * 8**-0.5
    scores = scores.masked_fill(~(mask.tril() if is_causal else mask), -torch.inf)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    dq, dk, dv = torch.autograd.grad(out, leaves, inputs.dout.double())
    right = attention_cases.reference(inputs, block=16)
    exact = {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}
    assert attention_cases.error(inputs, exact, right) < 1e-12
    exact["dk"] = exact["dk"].clone()
    exact["dk"][5, 1] *= 1.5
    assert attention_cases.error(inputs, exact, right) > 1e-3
    exact["dk"][5, 1] = torch.nan
    assert attention_cases.error(inputs, exact, right) == float("inf")


def test_a_wrong_peer_is_not_timed(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = Inputs.draw(Case(tiny, 64, "short", True), "cpu", torch.float32)
    good = attention_peers.PEERS["hetu"](inputs)
    bad = replace(good, forward=lambda: good.forward() * 1.1)
    broken = replace(good, backward=lambda: 1 / 0)
    kept = attention.accepted(inputs, {attention.YARDSTICK: good, "hetu": good, "bad": bad, "broken": broken})
    assert set(kept["forward"]) == {attention.YARDSTICK, "hetu"}
    assert set(kept["backward"]) == {attention.YARDSTICK, "hetu", "bad"}
    told = capsys.readouterr().err
    assert "bad is wrong by" in told and "without broken: division by zero" in told


def test_peers_that_do_not_run_are_left_out(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = Inputs.draw(Case(tiny, 64, "short", True), "cpu", torch.float32)
    assert list(attention.prepared(["FlashAttention-2", "hetu"], inputs)) == ["hetu"]
    assert "without FlashAttention-2" in capsys.readouterr().err


ROW = Measured("16:16:128", 32_768, "mix", True, "forward", "hetu", 1.0, 1.1, 1.2, 10, 400.0, 1.3, 2e-3)


def test_targets() -> None:
    assert ROW.target == 1.25 and not ROW.is_missed
    assert replace(ROW, ratio=1.24).is_missed
    assert replace(ROW, direction="backward").target == 1.15
    assert replace(ROW, lengths="ragged").target == replace(ROW, lengths="short").target == 1.5
    assert replace(ROW, lengths="short", is_causal=False).target == 1.0
    assert replace(ROW, tokens=4096).target == replace(ROW, lengths="one").target == 1.0
    assert replace(ROW, peer="cuDNN").target is None


def test_docs_are_made_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROW, replace(ROW, lengths="short", ratio=1.4, tflops=170.0), replace(ROW, peer="cuDNN", ratio=2.0)]
    about = dict.fromkeys(("device", "python", "torch", "triton", "numpy", "date", "command"), "1")
    results = tmp_path / "results.json"
    results.write_text(json.dumps({**about, "rows": [vars(row) for row in rows]}))
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- attention.json: begin -->\nold\n<!-- attention.json: end -->\nafter\n")
    monkeypatch.setattr(tables, "DOCS", docs)
    attention.write_docs(results)
    text = docs.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| 16:16:128 causal | 400, 1.30 |  |  | 170, 1.40 ✗ |  |" in text
    assert "1 of 2 rows keep their target" in text and "| cuDNN | forward | 1 | 2.00 | 2.00 | 2.00 |" in text
