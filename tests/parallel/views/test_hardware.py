"""Hardware as a value: what it predicts, its files, and the virtual clock on links of two kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hetu
from hetu.parallel import Heads, Layout, Rate, Topology, build_plan

HEADS = Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2)
RATES = (Rate(100, 1e9), Rate(10_000, 3e9), Rate(100, 5e8, kind="window"), Rate(100, 2e9, is_backward=True))
MEASURED = hetu.Hardware(1e9, 1e8, 1e-5, 1e9, launch=1e-4, rates=RATES, name="here", host_link_bytes=2e7)


@pytest.mark.parametrize(
    "hardware", [MEASURED, *(getattr(hetu.Hardware, n)() for n in ("cpu", "h100", "h200", "hosts"))]
)
def test_a_file_holds_the_value(hardware: hetu.Hardware, tmp_path: Path) -> None:
    hardware.save(tmp_path / "hardware.json")
    again = hetu.Hardware.load(tmp_path / "hardware.json")
    assert again == hardware and hash(again) == hash(hardware) and hardware.name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "is of version 2 of the format, expected 1"),
        ({"format": "another"}, "is no hardware file"),
        ({"flops": 0}, "flops"),
        ({"latency": -1}, "latency"),
        ({"launch": "1"}, "launch"),
        ({"host_latency": float("nan")}, "host_latency"),
        ({"color": 1}, "lacks, or has besides: color"),
        ({"rates": [{"keys": 3}]}, "has rates without"),
        ({"rates": [{"keys": 0, "flops": 1, "head_dim": 8, "kind": "full", "is_backward": False}]}, "a rate's keys"),
    ],
)
def test_another_file_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps(json.loads(MEASURED.to_json()) | changes))
    with pytest.raises(hetu.HetuError) as caught:
        hetu.Hardware.load(path)
    assert says in caught.value.what
    for damaged in (b"{", b"\xff\xfe\x00", b"[" * 100_000, b"3" * 5_000, b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(hetu.HetuError, match="is no hardware file"):
            hetu.Hardware.load(path)


def test_rates_lie_between_those_that_were_measured() -> None:
    assert MEASURED.rate(10, 128) == 1e9 and MEASURED.rate(1e6, 64) == 3e9
    assert MEASURED.rate(1000, 128) == pytest.approx(2e9)
    assert MEASURED.rate(1000, 128, "window") == 5e8 and MEASURED.rate(1000, 128, "full") == pytest.approx(2e9)
    assert MEASURED.rate(1000, 128, is_backward=True) == 2e9
    assert MEASURED.attend_time(0, 1, 128) == 0 and MEASURED.attend_time(1e9, 100, 128) == pytest.approx(1.0001)


def test_a_transfer_passes_one_that_waits_for_its_other_link() -> None:
    """Where everybody sends to everybody, links are busy: twice as long as they carry bytes, at most."""
    layout = Layout.build([4] * 16, [0] * 16)
    plan = build_plan(layout, method="direct", mask=hetu.Mask.full(), heads=HEADS)
    slow = hetu.Hardware(flops=1e15, link_bytes=1e6, latency=0, memory_bytes=1e9)
    least = 15 * 4 * HEADS.kv_row_bytes / slow.link_bytes
    assert least <= plan.cost(slow).time < 2 * least


def test_the_clock_knows_hosts_launches_and_rates() -> None:
    layout = Layout.build([4, 2], [0, 0])
    plan = build_plan(layout, method="direct", heads=HEADS)
    slow = hetu.Hardware(flops=256e6, link_bytes=128e6, latency=1e-6, memory_bytes=1e9, host_link_bytes=64e6)
    assert plan.cost(slow).finish == pytest.approx((10e-6, 17e-6))
    assert plan.cost(slow, Topology((0, 0))) == plan.cost(slow)
    # 1,024 bytes take 8 µs inside a host and 16 between hosts; two attends are two launches, the second after the rows.
    assert plan.cost(slow, Topology((3, 5))).finish == pytest.approx((17e-6, 25e-6))
    launched = hetu.Hardware(256e6, 128e6, 1e-6, 1e9, launch=100e-6)
    assert plan.cost(launched).finish == pytest.approx((110e-6, 211e-6))
    # The second pipeline's first attend sees 1.5 keys per query, its second one 4.
    rated = hetu.Hardware(1e6, 128e6, 1e-6, 1e9, rates=(Rate(1.5, 256e6), Rate(4, 128e6)))
    assert plan.cost(rated).finish[1] == pytest.approx(9e-6 + 16e-6)
    with pytest.raises(hetu.StrategyError, match="names the hosts of 1 pipelines, but there are 2"):
        plan.cost(slow, Topology((0,)))
