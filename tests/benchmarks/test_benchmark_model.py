"""The benchmark of whole models: its parameters, how it deals documents, and a run."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import model  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(("size", "billions"), [("0.7B", 0.7), ("1.5B", 1.5)])
def test_sizes_are_what_they_are_called(size: str, billions: float) -> None:
    config = LlamaConfig(**model.SIZES[size], vocab_size=model.WORDS, num_key_value_heads=model.KV_HEADS)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    assert abs(sum(x.numel() for x in made.parameters()) / 1e9 - billions) < 0.05 * billions


def test_doctests() -> None:
    assert doctest.testmod(model) == (0, 1)


def test_a_tiny_run(tmp_path: Path) -> None:
    """Hetu and data parallelism have the same loss; the peer that can't run says why."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["benchmarks/model.py", "--tiny", "--packs", "mix", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("model_tiny.json")
    by_hetu, by_torch, by_documents = json.loads(path.read_text(encoding="utf-8"))["lines"]
    assert abs(by_hetu["loss"] - by_documents["loss"]) < 1e-4 * by_hetu["loss"]
    assert by_hetu["tokens_per_second"] > 0 and by_documents["tokens_per_second"] > 0
    assert by_torch["tokens_per_second"] is None and by_torch["note"] == "it knows no packed documents"
