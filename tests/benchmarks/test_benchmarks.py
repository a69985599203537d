"""The attention benchmark: its cases, its reference, what it refuses to time, and the docs that are made of it."""

from __future__ import annotations

import doctest
import json
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import attention_cases  # noqa: E402
import attention_peers  # noqa: E402
import attention_report  # noqa: E402
import choosing  # noqa: E402
import host  # noqa: E402
import own_parts  # noqa: E402
import tables  # noqa: E402
from attention_cases import HEADS, LENGTHS, MASKS, TOKENS, Case, Inputs, document_lengths  # noqa: E402
from attention_peers import YARDSTICK, Calls  # noqa: E402
from attention_report import LeftOut, Measured, Run, report  # noqa: E402


def load_script() -> Any:
    """``benchmarks/attention.py``, under another name: ``attention`` is a folder of tests."""
    spec = spec_from_file_location("benchmark_of_attention", BENCHMARKS / "attention.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


attention = load_script()
sys.path.remove(str(BENCHMARKS))

TINY = "4:2:16"


# the host


def test_what_is_measured_of_the_host_runs() -> None:
    threads = torch.get_num_threads()
    rows = [*host.planning(repeats=10), *host.small_ops(repeats=10), *host.building(repeats=1, nodes=300)]
    torch.set_num_threads(threads)
    assert len(rows) == 7 and all(row.samples and row.median > 0 for row in rows)


def test_what_is_measured_of_own_parts_runs() -> None:
    rows = [*own_parts.own_part(8, "balanced"), own_parts.proof(3, "sym")]
    assert [row.limit for row in rows] == [None, None, None, 0.5, 2.0] and all(row.median > 0 for row in rows)


def test_what_is_measured_of_choosing_runs() -> None:
    rows = [*choosing.by_symbols(3), *choosing.for_packs(2), *choosing.for_batches(1, documents=9, pipelines=3)]
    assert [row.limit for row in rows] == [100, 100, 2, 5] and all(row.samples and row.median > 0 for row in rows)


# cases


def test_examples() -> None:
    assert doctest.testmod(attention_cases) == (0, 2)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("total", [*TOKENS, 1000, 1])
def test_lengths_make_the_total(kind: str, total: int) -> None:
    lengths = document_lengths(kind, total)
    assert sum(lengths) == total and min(lengths) > 0
    assert lengths == document_lengths(kind, total), "seeds are fixed"
    if total in TOKENS:
        rest = {"equal": {2048}, "one": {total}, "short": {256}, "ragged": {total // 2, 64, 65}}
        assert set(lengths[:-1] or lengths) == rest.get(kind, set(lengths[:-1]))
    if kind == "mix" and total > 1:
        assert max(lengths) <= total // 4 and len(set(lengths)) > 2
        assert lengths != document_lengths(kind, total, seed=1)


def test_the_mix_is_that_of_real_documents() -> None:
    lengths = np.array(document_lengths("mix", 20_000_000))
    bins, shares = attention_cases.distribution()
    assert len(bins) == 14 and sum(shares) == pytest.approx(1)
    for (low, high), share in zip(bins, shares, strict=True):
        inside = lengths[(lengths >= low) & (lengths <= high)]
        assert len(inside) / len(lengths) == pytest.approx(share, abs=0.01), (low, high)
        if share > 0.05:  # log-uniform: as many below the geometric middle as above
            assert np.mean(inside < np.sqrt(low * (high + 1))) == pytest.approx(0.5, abs=0.05), (low, high)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", LENGTHS)
def test_flops_count_unmasked_pairs(kind: str, mask: str) -> None:
    (case,) = attention_cases.cases([TINY], [600], [kind], [mask])
    seen = torch.block_diag(*(torch.ones(n, n) for n in case.documents))
    pairs = int((seen.tril() if mask == "causal" else seen).sum())
    assert case.mask == mask and case.flops("forward") == 4 * 16 * 4 * pairs
    assert case.flops("backward") == 2.5 * case.flops("forward")


def test_inputs_are_the_cases() -> None:
    inputs = Inputs.draw(Case("16:4:256", 100, "ragged", True), "cpu")
    assert inputs.q.shape == inputs.dout.shape == (100, 16, 256) and inputs.k.shape == inputs.v.shape == (100, 4, 256)
    assert inputs.q.dtype == torch.bfloat16 and inputs.cu_seqlens.tolist() == [0, 50, 100]
    assert inputs.longest == 50 and inputs.scale == 1 / 16
    assert not any(torch.equal(a, b) for a, b in [(inputs.q, inputs.dout), (inputs.k, inputs.v)])


# the reference and the judgement


@pytest.mark.parametrize("heads", [TINY, "3:3:8", "6:2:8"])
@pytest.mark.parametrize("mask", ["causal", "full", "window-1", "window-7", "window-90"])
def test_the_reference_is_right(mask: str, heads: str) -> None:
    (case,) = attention_cases.cases([heads], [90], ["ragged"], [mask])
    assert case.mask == mask
    inputs, (num_q, num_kv, head_dim) = Inputs.draw(case, "cpu"), case.shape
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves[0], *(x.repeat_interleave(num_q // num_kv, 1) for x in leaves[1:])
    seen = torch.block_diag(*(torch.ones(n, n) for n in case.documents)).bool()
    if case.is_causal:
        seen = seen.tril()
    if case.window is not None:
        seen = seen.triu(-case.window)
    assert case.flops("forward") == 4 * head_dim * num_q * int(seen.sum())
    scores = torch.einsum("ihd,jhd->hij", q, k) * head_dim**-0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    grads = torch.autograd.grad(out, leaves, inputs.dout.double())
    exact = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    right = attention_cases.reference(inputs, block=16)
    assert attention_cases.error(case, exact, right) < 1e-12
    for name in exact:
        wrong = exact | {name: exact[name].clone()}
        wrong[name][5, -1] *= 1.5
        assert attention_cases.error(case, wrong, right) > 1e-3, name
        wrong[name][5, -1] = torch.nan
        assert attention_cases.error(case, wrong, right) == float("inf"), name


def tiny_inputs() -> Inputs:
    return Inputs.draw(Case(TINY, 64, "short", True), "cpu", torch.float32)


def test_who_is_wrong_is_refused() -> None:
    inputs = tiny_inputs()
    good, right = attention_peers.PEERS["hetu"](inputs), attention_cases.reference(inputs)
    calls = {
        YARDSTICK: good,
        "hetu": good,
        "near": replace(good, forward=lambda: good.forward() * (1 + 1e-5)),
        "wrong": replace(good, backward=lambda: (*good.backward()[:2], torch.full_like(inputs.v, torch.nan))),
        "broken": replace(good, forward=lambda: 1 / 0),
    }
    errors, reasons = attention.judge(inputs, calls, "forward", right)
    assert set(errors) == {YARDSTICK, "hetu", "wrong"} and max(errors.values()) < 1e-6
    assert reasons["broken"] == "division by zero"
    assert reasons["near"].startswith("its error is 1.0e-05, over ")
    errors, reasons = attention.judge(inputs, calls, "backward", right)
    assert set(errors) == {YARDSTICK, "hetu", "near", "broken"} and reasons["wrong"].startswith("its error is inf")


def test_a_wrong_yardstick_excuses_nobody() -> None:
    inputs = tiny_inputs()
    good, right = attention_peers.PEERS["hetu"](inputs), attention_cases.reference(inputs)
    bad = replace(good, forward=lambda: good.forward() * torch.nan)
    errors, reasons = attention.judge(inputs, {YARDSTICK: bad, "hetu": good, "bad": bad}, "forward", right)
    assert set(errors) == {"hetu"} and set(reasons) == {YARDSTICK, "bad"}


def test_who_is_refused_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed, hetu = [], attention_peers.PEERS["hetu"]

    class Timer(attention.HostTimer):
        def __init__(self, call: Any) -> None:
            timed.append(call)
            super().__init__(call)

    def wrong(inputs: Inputs) -> Calls:
        right = hetu(inputs)
        return replace(right, forward=wrong_forward, backward=right.backward)

    def wrong_forward() -> torch.Tensor:
        return torch.zeros(64, 4, 16)

    monkeypatch.setattr(attention, "HostTimer", Timer)
    monkeypatch.setitem(attention_peers.PEERS, "wrong", wrong)
    monkeypatch.setitem(attention_peers.PEERS, "broken", lambda inputs: 1 / 0)
    case = Case(TINY, 64, "short", True)
    rows = list(attention.measure(case, ["hetu", "wrong", "broken"], ["forward", "backward"], 5, "cpu"))
    found = {(row.direction, row.peer): type(row) for row in rows}
    assert wrong_forward not in timed and len(timed) == 3
    assert found == {
        ("forward", "hetu"): Measured,
        ("forward", "wrong"): LeftOut,
        ("forward", "broken"): LeftOut,
        ("backward", "hetu"): Measured,
        ("backward", "wrong"): Measured,
        ("backward", "broken"): LeftOut,
    }


# timing


def test_peers_take_samples_in_turns() -> None:
    order = []

    def timer(name: str, cost: float) -> Any:
        return SimpleNamespace(cost=cost, sample=lambda: order.append(name) or len(order))

    taken = attention.take_turns({"a": timer("a", 0.1), "b": timer("b", 100.0), "c": timer("c", 70.0)}, 7)
    assert "".join(order) == "abc" * 5 + "acac"
    assert taken["a"] == [1, 4, 7, 10, 13, 16, 18] and [*map(len, taken.values())] == [7, 5, 7]


def test_a_sample_that_shows_the_host_is_taken_again() -> None:
    timer, slept = object.__new__(attention.DeviceTimer), []

    def take(enough: float) -> tuple[float, bool]:
        slept.append(timer.sleep)
        return 100.0 - timer.sleep, timer.sleep >= enough

    timer.sleep, timer._take = 1.0, lambda: take(4.0)
    assert timer.sample() == 96.0 and slept == [1.0, 2.0, 4.0]
    assert timer.sample() == 96.0 and slept == [1.0, 2.0, 4.0, 4.0]
    timer._take = lambda: take(float("inf"))
    with pytest.raises(RuntimeError, match="waits for the device"):
        timer.sample()


def test_what_is_compiled_beforehand() -> None:
    arguments = attention.parse(["--mask", "full"])
    found = list(attention.compiled_cases(arguments))
    assert [peer for peer, _ in found] == ["hetu"] * 12 + ["FlexAttention"] * 8
    by_tile = {case.flops("forward") / case.tokens for peer, case in found if peer == "hetu"}
    assert len(by_tile) > 2, "rows that see few keys, some and many have kernels of their own"
    assert {case.heads for _, case in found} == set(HEADS)
    assert not list(attention.compiled_cases(attention.parse(["--peers", "cuDNN"])))


def test_what_cannot_be_compiled_is_tried_once() -> None:
    tried = []

    def fail() -> None:
        tried.append(1)
        raise ValueError("too large")

    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="too large"):
            attention_peers._compiling("test", fail)
    assert len(tried) == 1 and attention_peers._compiling("another", lambda: 3) == 3


# results


ROW = Measured(
    "16:16:128", 32_768, "mix", True, "forward", "hetu",
    first_quartile=1.0, median=1.1, third_quartile=1.2, samples=10, host=0.1, tflops=400.0, ratio=1.3, error=2e-3,
)  # fmt: skip


def test_targets() -> None:
    assert ROW.target == 1.25 and not ROW.is_missed
    assert replace(ROW, ratio=1.24).is_missed and not replace(ROW, ratio=1.25).is_missed
    back = replace(ROW, direction="backward")
    assert back.target == replace(back, lengths="equal").target == 1.15
    assert replace(ROW, lengths="ragged").target == replace(ROW, lengths="short").target == 1.5
    assert replace(back, lengths="short").target == 1.5
    assert replace(ROW, lengths="short", is_causal=False).target == 1.0
    assert replace(ROW, tokens=4096).target == replace(ROW, lengths="one").target == 1.0
    assert replace(ROW, peer="cuDNN").target is None and replace(ROW, ratio=None).target is None


ABOUT = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-11-23", "command": "python benchmarks/attention.py"}
ABOUT |= dict.fromkeys(("python", "torch", "triton", "cuda", "cudnn"), "1")


def a_run() -> Run:
    yardstick = replace(ROW, peer=YARDSTICK, tflops=307.7, ratio=1.0)
    rows = [
        ROW,
        yardstick,
        replace(ROW, lengths="short", ratio=1.4, tflops=170.0),
        replace(ROW, is_causal=False, ratio=None),
        replace(ROW, tokens=4096, direction="backward", ratio=2.0, tflops=200.0),
        replace(ROW, peer="cuDNN", ratio=2.0),
        replace(ROW, peer="cuDNN", ratio=0.5, is_causal=False),
    ]
    reason = {"peer": "hetu", "direction": "backward", "reason": "its error is inf"}
    left_out = [LeftOut("16:4:256", 4096, lengths, True, **reason) for lengths in ("one", "mix")]
    return Run(ABOUT, rows, left_out)


def test_tables() -> None:
    text = report(a_run())
    assert "| forward, 32,768 tokens | mix | short |\n| --- | ---: | ---: |\n" in text
    assert "| 16:16:128 causal | 400 / 308 **1.30** | 170 / - **1.40** ✗ |" in text
    assert "| 16:16:128 full | 400 / - |  |" in text
    assert "| 16:16:128 causal | 200 / - **2.00** |  |" in text
    assert "2 of 5 rows keep their target (✗: not); geometric mean of the ratio: forward 1.35, backward 2.00." in text
    assert "| forward, 32,768 tokens: cuDNN | 1.00 |  |  |  |  | 2 |" in text
    assert "| forward, 32,768 tokens: hetu | 1.30 |  |  | 1.40 |  | 3 |" in text
    assert "- hetu, backward, 2 cases: its error is inf" in text
    mix = document_lengths("mix", 4096)
    assert f"{len(mix)} documents of {min(mix)} to {max(mix):,} tokens at 4,096" in text
    assert text.splitlines()[-1].startswith("NVIDIA H100 80GB HBM3; python 1, torch 1, triton 1, cuda 1, cudnn 1; 2026")
    assert "No targets" in report(Run(ABOUT, [replace(ROW, ratio=None)]))


def test_docs_are_made_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = a_run().write(tmp_path)
    assert results == tmp_path / "attention_h100.json" and [*tmp_path.iterdir()] == [results]
    assert Run.read(results) == a_run()
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- attention.json: begin -->\nold\n<!-- attention.json: end -->\nafter\n")
    monkeypatch.setattr(tables, "DOCS", docs)
    monkeypatch.setattr(sys, "argv", ["attention_report.py", str(results)])
    attention_report.main()
    text = docs.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text
    assert report(a_run()) in text


def test_results_of_several_commands_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = a_run()
    parts = [Run({**ABOUT, "command": f"command {i}"}, whole.rows[i::2], whole.left_out[i::2]) for i in range(2)]
    files = [part.write(tmp_path / str(i)) for i, part in enumerate(parts)]
    joined = Run.joined([Run.read(path) for path in files])
    assert sorted(joined.rows, key=str) == sorted(whole.rows, key=str) and len(joined.left_out) == len(whole.left_out)
    assert joined.about == {**ABOUT, "command": "command 0; command 1"}
    with pytest.raises(ValueError, match="measured twice"):
        Run.joined([parts[0], parts[0]])
    with pytest.raises(ValueError, match="they differ in date"):
        Run.joined([parts[0], replace(parts[1], about={**ABOUT, "date": "another"})])
    docs = tmp_path / "docs.md"
    docs.write_text("<!-- attention.json: begin -->\n<!-- attention.json: end -->\n")
    monkeypatch.setattr(tables, "DOCS", docs)
    monkeypatch.setattr(attention_report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["attention_report.py", *map(str, files)])
    attention_report.main()
    assert Run.read(tmp_path / "attention_h100.json") == joined and report(joined) in docs.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["attention_h100", "attention_masks_h200"])
def test_the_docs_show_the_kept_results(name: str) -> None:
    docs = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    run = Run.read(BENCHMARKS / "results" / f"{name}.json")
    begin, end = f"<!-- {run.marker}: begin -->", f"<!-- {run.marker}: end -->"
    assert run.marker.removesuffix(".json") in name and docs.count(begin) == docs.count(end) == 1
    assert docs.split(begin)[1].split(end)[0].strip() == report(run)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(attention_peers.PEERS, YARDSTICK, attention_peers.PEERS["hetu"])  # its own has no CPU kernel
    chosen = ["--heads", TINY, "--tokens", "100", "--lengths", "mix", "one", "--samples", "5", "--device", "cpu"]
    attention.main([*chosen, "--peers", YARDSTICK, "hetu", "cuDNN", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "attention_cpu.json").read_text(encoding="utf-8"))
    assert told["torch"] == torch.__version__ and str(tmp_path) not in told["command"]
    assert told["command"].endswith("--samples 5 --device cpu --peers FlashAttention-2 hetu cuDNN")
    run = Run.read(tmp_path / "attention_cpu.json")

    def key(row: Measured) -> tuple[Any, ...]:
        return row.lengths, row.is_causal, row.direction, row.peer

    assert len(run.rows) == 2 * 2 * 2 * 2 and {row.peer for row in run.left_out} == {"cuDNN"}
    for row in run.rows:
        assert 0 < row.first_quartile <= row.median <= row.third_quartile and row.samples == 5
        (yardstick,) = (r.median for r in run.rows if key(r) == (*key(row)[:-1], YARDSTICK))
        assert row.error < 0.01 and row.ratio == yardstick / row.median
        assert row.tflops == pytest.approx(row.flops(row.direction) / row.median / 1e9)
    printed = capsys.readouterr().out
    assert printed.count("TFLOP/s  error") == 16 and report(run) in printed
