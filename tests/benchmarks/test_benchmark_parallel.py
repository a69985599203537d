"""The benchmark of several GPUs, on CPUs: its rows, what it refuses to time, what it counts, and its docs."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hetu.parallel import METHODS, Heads, Layout, build_plan

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import attention_cases  # noqa: E402
import parallel_cases  # noqa: E402
import parallel_peers  # noqa: E402
import parallel_report  # noqa: E402
import parallel_work  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402
from attention_cases import Inputs, document_lengths, reference  # noqa: E402
from parallel_cases import ALONE, BOTH, DIRECTIONS, PACKS, TOKENS, Spread, joint_error, squares  # noqa: E402
from parallel_report import NO_RESULTS, LeftOut, Measured, Run, report  # noqa: E402


def load_script() -> Any:
    """``benchmarks/parallel.py``, under another name: ``parallel`` is a folder of tests."""
    spec = spec_from_file_location("benchmark_of_parallel", ROOT / "benchmarks" / "parallel.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parallel = load_script()
sys.path.remove(str(ROOT / "benchmarks"))


# two processes


@dataclass(frozen=True)
class Ran:
    run: Run
    printed: str
    checks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The benchmark in two processes, with peers that must not get away with it: see ``benchmark_ranks.py``."""
    folder = tmp_path_factory.mktemp("results")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(ROOT / "tests" / "support" / "benchmark_ranks.py"), str(folder), "--tokens", "98"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    checks = [json.loads((folder / f"checks{rank}.json").read_text()) for rank in range(2)]
    return Ran(Run.read(folder / "parallel_cpu.json"), ended.stdout, checks)


def test_every_row_is_there(ran: Ran) -> None:
    measured = {(row.lengths, row.direction, row.peer) for row in ran.run.rows}
    for pack in PACKS:
        for direction in DIRECTIONS:
            expected = {ALONE, "astray", *(f"hetu {method}" for method in METHODS), *parallel_peers.FUNCTIONAL}
            assert {peer for p, d, peer in measured if (p, d) == (pack, direction)} == expected
    left = {(row.lengths, row.direction, row.peer): row.reason for row in ran.run.left_out}
    assert len(left) + len(measured) == len(PACKS) * len(DIRECTIONS) * (len(parallel_peers.PEERS) + 3)
    assert not measured & left.keys()


def test_rows_are_whole(ran: Ran) -> None:
    for row in ran.run.rows:
        assert 0 < row.first_quartile <= row.median <= row.third_quartile and row.samples == 5
        assert row.queued > 0 and row.host > 0 and row.error < 1e-6
        (alone,) = (r for r in ran.run.rows if (r.lengths, r.direction, r.peer) == (row.lengths, row.direction, ALONE))
        assert row.of_ideal == alone.median / 2 / row.median
        assert row.shares == ("1:1" if row.lengths == "one" else "3:2") and row.is_causal
    assert ran.run.about["torch"] == torch.__version__ and ran.run.about["ranks"] == "2"
    command = "torchrun --nproc-per-node 2 benchmarks/parallel.py --tiny --tokens 98"
    assert ran.run.about["command"] == command
    assert report(ran.run) in ran.printed, "printed once, by one rank"
    assert ran.printed.count("| forward, one document |") == 1


def planned(row: Measured) -> tuple[list[int], float]:
    """Bytes that each pipeline sends, and the load, by plans that are built here."""
    cu_seqlens, (num_q, num_kv, head_dim) = np.cumsum([0, *row.documents]), row.shape
    layout = Layout.build(row.seq_lens, [0, 0], split=row.split, cu_seqlens=cu_seqlens)
    heads = Heads(num_q=num_q, num_kv=num_kv, head_dim=head_dim, itemsize=4)
    plan = build_plan(layout, method=row.peer.split()[-1], heads=heads)
    plans = [plan, plan.backward()] if row.direction == BOTH else [plan]
    pairs = [plan.pairs(r) for r in range(2)]
    return [sum(one.bytes_sent(r) for one in plans) for r in range(2)], 2 * max(pairs) / sum(pairs)


def test_counted_bytes_are_the_plans(ran: Ran) -> None:
    for row in ran.run.rows:
        if row.is_hetu or row.peer in parallel_peers.FUNCTIONAL:
            sent, load = planned(row)
            assert row.counted == row.planned == sent and sum(sent) > 0
            assert row.load == pytest.approx(load) or row.peer == "hetu ulysses"
        elif row.peer == ALONE:
            assert row.counted == row.planned == [0, 0] and row.load == 1
    assert {(row.peer, row.direction) for row in ran.run.astray} == {("astray", BOTH)}
    for checks in ran.checks:
        assert checks["end"] == "2 rows sent other bytes than planned", "and so it ends with an error"


def test_who_is_wrong_on_one_rank_is_refused(ran: Ran) -> None:
    reasons = {(row.direction, row.peer): row.reason for row in ran.run.left_out}
    for direction in DIRECTIONS:
        assert reasons[direction, "wrong"].startswith("its error is ")
        assert reasons[direction, "missing"] == "rank 0: division by zero"


def test_torch_is_told_why_not(ran: Ran) -> None:
    reasons = {(row.lengths, row.peer): row.reason for row in ran.run.left_out}
    for name in parallel_peers.TORCH:
        assert reasons["mix", name] == "knows no packed documents"
        assert "scaled_dot_product" in reasons["one", name]


@pytest.mark.parametrize("rotation", parallel_peers.ROTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_torch_is_asked_rightly(ran: Ran, direction: str, rotation: str) -> None:
    for checks in ran.checks:
        errors, reasons, note = checks[f"{rotation} {direction}"]
        assert errors["torch"] < 1e-6 and not reasons and not note


def test_key_heads_are_repeated_where_they_must(ran: Ran) -> None:
    for checks in ran.checks:
        for direction in DIRECTIONS:
            errors, reasons, note = checks[f"ungrouped {direction}"]
            assert errors["torch"] < 1e-6 and not reasons and note.endswith("(knows no groups)")


def test_rows_lie_on_as_many_ranks(ran: Ran) -> None:
    for checks in ran.checks:
        assert checks["copies"] == [1, 2]
        assert checks["twice"] == checks["missing"] == "not all of 5 tokens lie on as many ranks"


# cases


def test_examples() -> None:
    assert doctest.testmod(parallel_cases) == (0, 3)
    assert doctest.testmod(timing) == (0, 1)


def test_reasons_tell_their_cause() -> None:
    failure = RuntimeError("no rows came\nwhere: there")
    failure.__cause__ = ValueError("not contiguous")
    assert timing.first_line(failure) == "no rows came: not contiguous"
    assert timing.first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize("total", [*TOKENS, 98, 7, 1])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_make_the_total(total: int, size: int) -> None:
    for case in parallel_cases.spread_cases("4:2:16", [total], PACKS, "3:2", "sym", size):
        lens, shares = case.seq_lens, np.array(case.shares.split(":"), float)
        assert sum(lens) == sum(case.documents) == total and len(lens) == size
        assert np.abs(lens - shares / shares.sum() * total).max() <= 1


def test_errors_of_ranks_are_those_of_the_whole() -> None:
    case = Spread("4:2:16", 90, "mix", True, "3:2", "sym")
    inputs = Inputs.draw(case, "cpu", torch.float32)
    right = reference(inputs)
    full = {"out": 4, "dq": 4, "dk": 2, "dv": 2}
    found = {name: torch.randn(90, heads, 16) for name, heads in full.items()}
    whole = attention_cases.error(case, found, right)
    order = torch.randperm(90)
    parts = order.split([50, 40])
    said = [squares(case, {name: x[rows] for name, x in found.items()}, right, rows) for rows in parts]
    assert joint_error(said, copies=1) == pytest.approx(whole)
    twice = [squares(case, found, right, torch.arange(90))] * 2
    assert joint_error(twice, copies=2) == pytest.approx(whole)
    found["dv"][3, 1, 0] = torch.nan
    said[1] = squares(case, {name: x[parts[1]] for name, x in found.items()}, right, parts[1])
    said[0] = squares(case, {name: x[parts[0]] for name, x in found.items()}, right, parts[0])
    assert joint_error(said, copies=1) == float("inf")


# timing


def test_of_who_waits_for_the_device_the_host_is_timed_too() -> None:
    timer, slept = object.__new__(parallel.RanksTimer), []

    def take() -> tuple[float, bool]:
        slept.append(timer.sleep)
        return 7.0, False

    timer.sleep, timer.note, timer._take = 1.0, "", take
    assert timer.sample() == 7.0 and slept == [1.0, 2.0, 4.0, 8.0, 0.0]
    assert timer.sample() == 7.0 and slept[5:] == [0.0] and "waits for the device" in timer.note


def test_the_slowest_rank_counts() -> None:
    ranks = SimpleNamespace(meet=lambda: None, exchange=lambda time: [time, 2 * time])
    timer = SimpleNamespace(cost=20.0, peer=parallel_peers.Peer, ranks=ranks, queue=lambda count: 3.0 * count)
    timer.peer = SimpleNamespace(around=lambda: parallel_peers.Peer.around(timer))
    assert parallel.queued(timer) == 6.0


@pytest.mark.parametrize(("cost", "asked"), [(0.1, [20] * 3), (10.0, [10] * 3), (49.0, [2] * 3), (1000.0, [2])])
def test_how_many_are_queued(cost: float, asked: list[int]) -> None:
    counts: list[int] = []
    queue: Callable[[int], float] = lambda n: counts.append(n) or 1.0  # noqa: E731
    ranks = SimpleNamespace(meet=lambda: None, exchange=lambda time: [time])
    peer = SimpleNamespace(around=lambda: parallel_peers.Peer.around(None))  # type: ignore[arg-type]
    parallel.queued(SimpleNamespace(cost=cost, peer=peer, ranks=ranks, queue=queue))
    assert counts == asked


# results


ROW = Measured(
    "32:8:128", 8192, "one", True, "1:1", "sym", BOTH, "hetu ring",
    first_quartile=2.0, median=2.1, third_quartile=2.2, samples=20, queued=2.5, host=1.2, of_ideal=0.9, error=3e-3,
    note="", load=1.0, planned=[10**7, 2 * 10**7], counted=[10**7, 2 * 10**7],
)  # fmt: skip


def test_targets() -> None:
    assert [replace(ROW, tokens=tokens).target for tokens in TOKENS] == [0.88, 0.95, 0.98]
    assert [replace(ROW, tokens=tokens, lengths="mix").target for tokens in TOKENS] == [0.85] * 3
    assert not ROW.is_missed and replace(ROW, of_ideal=0.87).is_missed and not replace(ROW, of_ideal=0.88).is_missed
    for other in ({"direction": "forward"}, {"peer": ALONE}, {"peer": "torch flash alltoall"}, {"of_ideal": None}):
        assert replace(ROW, **other).target is None


ABOUT = {"device": "NVIDIA H200", "ranks": "2", "date": "2026-11-23", "command": "torchrun benchmarks/parallel.py"}
ABOUT |= dict.fromkeys(("python", "torch", "triton", "cuda", "cudnn", "nccl"), "1")


def a_run() -> Run:
    rows = [
        replace(ROW, peer=ALONE, median=3.78, of_ideal=0.5, planned=[0, 0], counted=[0, 0]),
        ROW,
        replace(ROW, peer="hetu direct", median=1.95, of_ideal=0.97),
        replace(ROW, peer="torch flash alltoall", median=3.9, of_ideal=0.48, planned=None, counted=None, load=None),
        replace(ROW, tokens=32768, of_ideal=0.94, median=20.0, note="a note"),
        replace(ROW, lengths="mix", shares="3:2", of_ideal=0.8, load=1.2),
        replace(ROW, direction="forward", of_ideal=0.3),
    ]
    case = {"heads": "32:8:128", "is_causal": True, "shares": "1:1", "split": "sym", "direction": BOTH}
    left = [
        LeftOut(tokens=tokens, lengths="one", peer=peer, reason="knows nothing", **case)
        for tokens, peer in [(8192, "torch cuDNN alltoall"), (32768, "torch cuDNN alltoall"), (8192, "hetu all_gather")]
    ]
    return Run(ABOUT, rows, left)


def test_tables() -> None:
    text = report(a_run())
    assert "| forward+backward, one document | 8,192 | 32,768 |\n| --- | ---: | ---: |\n" in text
    assert "| one GPU | 3.78 ms |  |\n| the ideal: 1/2 of it | 1.89 ms |  |\n" in text
    assert "| hetu ring | 2.1 ms **0.90** | 20 ms **0.94** ✗ |\n" in text
    assert "| hetu direct | 1.95 ms **0.97** |  |\n" in text
    assert "| torch flash alltoall | 3.9 ms **0.48** |  |\n" in text
    assert "| hetu's best against torch's best | 2.00 times as fast |  |\n" in text
    assert "| forward, one document |" in text and "| hetu ring | 2.1 ms **0.30** |  |" in text
    assert "| forward+backward, mix, tokens 3:2 |" in text and "| hetu ring | 2.1 ms **0.80** ✗ |  |" in text
    assert "*one*, 8,192 tokens: 0.97 by `direct`, 0.88 kept; *one*, 32,768 tokens: 0.94 by `ring`, 0.95 below" in text
    assert "Of all methods' rows 2 of 5 keep it" in text, "and one that was refused doesn't"
    assert "| one, 8,192: ring | 10 + 20 | yes | 1.00 of the mean | 0.90 | 2.5 ms | 1.2 ms |" in text
    assert "| mix, 8,192: ring | 10 + 20 | yes | 1.20 of the mean | 0.96 | 2.5 ms | 1.2 ms |" in text
    assert "- torch cuDNN alltoall (2), hetu all_gather (1): knows nothing\n" in text
    assert "- hetu ring (1): a note\n" in text
    assert f"{len(document_lengths('mix', 8192))} documents of" in text
    versions = "python 1, torch 1, triton 1, cuda 1, cudnn 1, nccl 1"
    assert text.splitlines()[-1].startswith(f"2 x NVIDIA H200; {versions}; 2026")
    assert "No targets" in report(Run(ABOUT, [replace(ROW, direction="forward")]))


def test_bytes_that_go_astray_are_told() -> None:
    row = replace(ROW, counted=[10**7, 0])
    assert Run(ABOUT, [ROW, row]).astray == [row] and "SENT [10000000, 0], PLANNED" in str(row)
    assert "| one, 8,192: ring | 10 + 0 | NO |" in report(Run(ABOUT, [row]))
    assert Run(ABOUT, [ROW, row]).faults == ["1 rows sent other bytes than planned"]
    assert a_run().faults == ["1 of hetu's rows are missing"] and not Run(ABOUT, [ROW], a_run().left_out[:2]).faults


def test_docs_are_made_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = a_run().write(tmp_path)
    assert results == tmp_path / "parallel_h200.json" and [*tmp_path.iterdir()] == [results]
    assert Run.read(results) == a_run()
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- parallel.json: begin -->\nold\n<!-- parallel.json: end -->\nafter\n")
    monkeypatch.setattr(tables, "DOCS", docs)
    for path, told in ((results, report(a_run())), (tmp_path / "none.json", NO_RESULTS)):
        monkeypatch.setattr(sys, "argv", ["parallel_report.py", str(path)])
        parallel_report.main()
        text = docs.read_text(encoding="utf-8")
        assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text
        assert f"begin -->\n\n{told}\n\n<!--" in text


def test_the_docs_show_the_kept_results() -> None:
    docs = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    kept = ROOT / "benchmarks" / "results" / "parallel_h200.json"
    assert docs.count("<!-- parallel.json: begin -->") == docs.count("<!-- parallel.json: end -->") == 1
    assert (report(Run.read(kept)) if kept.exists() else NO_RESULTS) in docs


# the script


def test_what_is_measured_by_default() -> None:
    arguments = parallel.parse([])
    assert arguments.heads == "32:8:128" and arguments.tokens == [8192, 32768, 131072]
    assert arguments.peers == list(parallel_peers.PEERS) and set(parallel_peers.HETU) == {f"hetu {m}" for m in METHODS}
    assert arguments.packs == ["one", "mix"] and arguments.shares == "3:2" and arguments.split == "balanced"
    assert parallel.parse(["--tiny"]).heads == "4:2:16" and parallel.parse(["--tiny", "--tokens", "9"]).tokens == [9]


def test_it_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        parallel.main(["--tiny"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs CUDA devices; --tiny"):
        parallel.main([])


# all pipelines on one device


def test_work_of_all_pipelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case and method is measured, right, and put into the table."""
    parallel_work.main(["--tiny", "--methods", "direct", "ulysses", "--out", str(tmp_path)])
    run = parallel_work.Run.read(tmp_path / "parallel_work_cpu.json")
    cases = [("one", "sym"), ("mix", "sym"), ("mix", "balanced")]
    expected = {(*case, d, m) for case in cases for d in DIRECTIONS for m in ("whole", "direct", "ulysses")}
    assert {(row.lengths, row.split, row.direction, row.method) for row in run.rows} == expected
    for row in run.rows:
        assert row.load >= 1 and row.bound == row.work / row.load
        assert (row.method == "whole") == (not any(row.sent)) and len(row.sent) == 1 + (row.method != "whole")
    assert capsys.readouterr().out.count("| forward+backward, mix, `balanced`, `direct` | **") == 1


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Spread("4:2:16", 60, "one", True, "1:1", "sym")
    plain = parallel_work.Pipelines.error

    def error(self: Any, direction: str, right: Any) -> float:
        return plain(self, direction, right) + (len(self.attention.rows) > 1)

    monkeypatch.setattr(parallel_work.Pipelines, "error", error)
    with pytest.raises(AssertionError, match="direct"):
        list(parallel_work.measure(case, ["direct"], 3, "cpu", torch.float32))
