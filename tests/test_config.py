"""Settings: where they come from, how far they reach; and which backend they choose."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import hetu
from hetu.backends import default_backend
from hetu.backends.families import family
from hetu.config import settings


def test_a_block_restores_what_was_set_before() -> None:
    with hetu.config(backend="triton"):
        with hetu.config(verify_plans=True):
            assert (settings().backend, settings().verify_plans) == ("triton", True)
        assert (settings().backend, settings().verify_plans) == ("triton", False)
    assert settings().backend != "triton"


def test_a_thread_has_its_own() -> None:
    seen: list[str | None] = []
    with hetu.config(backend="triton"):
        thread = threading.Thread(target=lambda: seen.append(settings().backend))
        thread.start()
        thread.join()
    assert seen == [None]


def test_the_default_follows_the_device() -> None:
    assert default_backend(torch.device("cpu")) == "torch"
    assert default_backend(torch.device("cuda")) == "gluon"


def test_the_environment_chooses_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    attend = family("triton").attend
    monkeypatch.setattr(family("triton"), "attend", lambda *call: used.append("triton") or attend(*call))
    monkeypatch.setenv("HETU_BACKEND", "triton")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [3, 24])
        out = hetu.parallel_attn(x, 8, 1, [[3]], [[0]])[0]
    g.run(out, {x: np.ones((3, 24), np.float32)})
    assert used == ["triton"]
    monkeypatch.setenv("HETU_BACKEND", "fortran")
    with pytest.raises(hetu.HetuError, match="there is no backend 'fortran'"):
        g.run(out, {x: np.ones((3, 24), np.float32)})
