"""The command line: one JSON document or tables, exit codes, and answers that are those of the library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hetu
from hetu.cli import bench, doctor, verify
from hetu.cli.main import COMMANDS, main
from hetu.parallel import METHODS, Hardware, Heads, Layout, build_plan
from hetu.parallel.plan.instructions import Attend

CASE = ("--lengths", "40,7,0,90", "--pipelines", "3")


def answered(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    """What a command answers with ``--json``: stdout is one document, or this raises."""
    assert main([*argv, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_plan_tells_what_the_library_tells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "plan.png")
    found = answered(capsys, "plan", *CASE, "--split", "sym", "--method", "ring", "--window", "20,0", "--output", path)
    layout = Layout.build([46, 46, 45], [0] * 3, split="sym", cu_seqlens=[0, 40, 47, 47, 137])
    heads = Heads(32, 8, 128, 2)
    plan = build_plan(layout, method="ring", mask=hetu.Mask.window(20, 0), heads=heads)
    cost = plan.cost(Hardware.h100())
    (told,) = found["micro_batches"]
    assert told["layout"] == str(layout).splitlines() and found["time_s"] == told["time_s"] == cost.time
    assert [row["pairs"] for row in told["pipelines"]] == [plan.pairs(r) for r in range(3)]
    assert [row["bytes_sent"] for row in told["pipelines"]] == [plan.bytes_sent(r) for r in range(3)]
    assert Path(path).read_bytes()[:4] == b"\x89PNG"
    assert plan.summary() in printed(capsys, "plan", *CASE, "--split", "sym", "--method", "ring", "--window", "20,0")
    assert answered(capsys, "plan", *CASE, "--backward")["is_backward"]


def test_plan_without_a_split_is_the_planners_choice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lengths, path = [4000, 32000, 100, 0], tmp_path / "node.json"
    Hardware.h200().save(path)
    options = ("--lengths", "4000,32000,100,0", "--pipelines", "8", "--max-tokens", "8192", "--hardware")
    batch = hetu.plan_batch(lengths, 8, Hardware.h200(), max_tokens=8192)
    (item,) = batch.micro_batches
    for name in ("h200", str(path)):
        found = answered(capsys, "plan", *options, name)
        assert found["batch"] == {"groups": list(batch.groups), "layer_s": max(batch.seconds)}
        assert [row["tokens"] for row in found["micro_batches"][0]["pipelines"]] == list(item.lengths)
    assert str(batch) in printed(capsys, "plan", *options, "h200")
    small = ("plan", "--lengths", "50,60,70", "--pipelines", "2", "--max-tokens", "45", "--output")
    found = answered(capsys, *small, str(tmp_path / "plan.svg"))
    names = [Path(micro_batch["picture"]).name for micro_batch in found["micro_batches"]]
    assert names == ["plan.svg", *(f"plan-{i}.svg" for i in range(1, len(names)))] and len(names) > 1
    assert all((tmp_path / name).exists() for name in names)


def test_trace_writes_what_the_plan_predicts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    found = answered(capsys, "trace", *CASE, "--split", "normal", "--output", str(path))
    layout = Layout.build([46, 46, 45], [0] * 3, cu_seqlens=[0, 40, 47, 47, 137])
    plan = build_plan(layout, heads=Heads(32, 8, 128, 2))
    assert json.loads(path.read_text()) == json.loads(json.dumps(plan.trace())) and found["plan"] == plan.summary()


def test_verify_proves_and_says_what_is_not_proven(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = ("verify", "--lengths", "5,0,12", "--pipelines", "1,3", "--splits", "sym,stripe", "--mask", "chunked:4")
    found = answered(capsys, *case)
    pairs = int(hetu.testing.allowed_pairs(hetu.Mask.chunked(4), [5, 0, 12]).sum())
    assert len(found["plans"]) == 4 * len(METHODS) and all(item["pairs"] == pairs for item in found["plans"])

    def without_the_last_attend(*args: Any, **kwargs: Any) -> Any:
        plan = build_plan(*args, **kwargs)
        kept = list(plan.pipelines)
        last = max(i for i, item in enumerate(kept[0].instructions) if isinstance(item, Attend))
        steps = kept[0].instructions[:last] + kept[0].instructions[last + 1 :]
        return replace(plan, pipelines=(replace(kept[0], instructions=steps), *kept[1:]))

    monkeypatch.setattr(verify, "build_plan", without_the_last_attend)
    found = answered(capsys, *case, code=1)
    assert not found["are_proven"] and all(item["why"] for item in found["plans"])


def test_doctor_tests_both_ops_and_says_who_runs_what(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answered(capsys, "doctor")
    assert found["are_right"] and {item["op"] for item in found["tests"]} == {"attn_varlen", "parallel_attn"}
    assert found["installed"]["torch"] == torch.__version__
    assert {item["dtype"] for item in found["kernels"]} == {"bfloat16", "float16", "float32", "float64"}
    if not torch.cuda.is_available():
        assert all(item["family"] == "torch" and "gluon: " in item["why"] for item in found["kernels"])
    with hetu.config(backend="triton"):
        kinds = answered(capsys, "doctor", "--no-test")["kernels"]
    families = {item["dtype"]: item["family"] for item in kinds}
    assert families["bfloat16"] == "triton" and families["float64"] == "torch"
    right = doctor._both

    def wrong(device: torch.device, pipelines: int) -> Any:
        got, wanted, tolerance = right(device, pipelines)
        return [got[0] + 10 * tolerance * wanted[0].abs().max(), got[1]], wanted, tolerance

    monkeypatch.setattr(doctor, "_both", wrong)
    found = answered(capsys, "doctor", code=1)
    assert [item["is_right"] for item in found["tests"]] == [False, True] * 2


def test_bench_times_the_same_attention(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ("--heads", "2", "--kv-heads", "1", "--head-dim", "16")
    found = answered(capsys, "bench", "--lengths", "9,0,30", *heads, "--seconds", "0.001", "--backward")
    assert len(found["times"]) == 3 and all(item["seconds"] > 0 for item in found["times"])
    q, k, v = (torch.randn(39, n, 16) for n in (2, 1, 1))
    outs = [call() for call in bench._calls(q, k, v, [9, 0, 30]).values()]
    wanted = hetu.testing.attention(q, k, v, [0, 9, 9, 39], mask=hetu.Mask.causal())[0]
    for out in outs:  # what is compared computes the same
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argv", "code", "why"),
    [
        ((), 2, "COMMAND"),
        (("plan",), 2, "--lengths"),
        (("plan", "--lengths", "1,x", "--pipelines", "2"), 2, "--lengths"),
        (("plan", "--lengths", "-3", "--pipelines", "2"), 2, ""),
        (("plan", *CASE, "--hardware", "abacus"), 2, "abacus"),
        (("plan", *CASE, "--mask", "round"), 2, "round"),
        (("plan", *CASE, "--max-tokens", "9"), 2, "too many"),
        (("plan", *CASE, "--mask", "chunked:4", "--window", "1,1"), 2, "window"),
        (("plan", *CASE, "--heads", "3"), 2, "multiple"),
        (("plan", *CASE, "--output", "plan.doc"), 2, ".png"),
        (("plan", *CASE, "--mask", "chunked:" + "9" * 5_000), 2, "there is no mask"),
        (("plan", "--lengths", "3", "--pipelines", "9" * 30), 2, "--pipelines"),
        (("trace", *CASE, "--output", "\0"), 2, "--output"),
        (("trace", *CASE, "--output", "/nowhere/trace.json"), 3, "nowhere"),
        (("verify", "--lengths", "3", "--pipelines", "0"), 2, "from 1"),
        (("verify", "--lengths", "3", "--pipelines", "2," + "9" * 30), 2, "from 1"),
        (("verify", "--lengths", "3", "--pipelines", "2", "--splits", "sideways"), 2, "sideways"),
        (("bench", "--lengths", "0"), 2, "lengths"),
        (("autotune", "--dtypes", "int7"), 2, "int7"),
    ],
)
def test_bad_input_is_told_and_has_a_code(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, why: str
) -> None:
    assert why in answered(capsys, *argv, code=code)["error"]
    assert main(argv) == code
    said = capsys.readouterr()
    assert said.out == "" and why in said.err and "Traceback" not in said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_autotune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no GPU" in answered(capsys, "autotune", code=3)["error"]


def test_nothing_but_the_document_is_on_stdout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_gpus", lambda: print("a library says hello") or [])
    found = answered(capsys, "doctor", "--no-test")
    assert found["gpus"] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out
