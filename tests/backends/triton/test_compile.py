"""Every kind of kernel variant compiles ahead of time, without a GPU, and keeps nearly everything in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.longer import LONGER

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may have, by NVIDIA's tables of compute capabilities."""


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, subprocess.Popen[str]]:
    """One process a GPU, side by side."""
    started = {}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    for capability in SHARED_MEMORY:
        cache = str(tmp_path_factory.mktemp(f"triton{capability}"))
        env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": path}
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(ROOT / "tests" / "support" / "compile_variants.py"),
            str(capability),
        ]
        started[capability] = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    return started


def allowed(result: dict[str, Any]) -> int:
    """Bytes of local memory a thread. Tiles were chosen by their speed; this catches a kernel that falls off."""
    return 768 if result["is_backward"] or result["dtype"] == "torch.float32" else 256


@pytest.mark.timeout(900)  # a minute on two idle cores
@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_variants_compile(compilers: dict[int, subprocess.Popen[str]], capability: int) -> None:
    out, err = compilers[capability].communicate()
    assert compilers[capability].returncode == 0, err
    results = [json.loads(line) for line in out.splitlines()]
    assert len({result["variant"] for result in results}) == len(results) >= (38 if LONGER > 1 else 20)
    serial = [result for result in results if result["starts"] == result["products"] > 1]
    assert not serial, f"ptxas lets every product on tensor cores wait for the one before: {serial}"
    spilling = [result for result in results if result["stack"] > allowed(result)]
    assert not spilling, f"local memory is used: {spilling}"
    if capability < 90:  # a barrier before loads are read and one after
        whole = [result for result in results if "masks_all=True" in result["variant"]]
        moving = [result for result in whole if result["barriers"] > 2 and "scores=True" not in result["variant"]]
        assert len([result for result in whole if result["barriers"]]) > 10
        assert not moving, f"probabilities change threads between the two dots: {moving}"
    too_big = [result for result in results if result["shared"] > SHARED_MEMORY[capability]]
    assert not too_big, f"more shared memory than there is: {too_big}"
