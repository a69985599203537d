"""Measuring a machine: in hetu's own modes, in a small file, and alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hetu
from hetu import calibration
from hetu.parallel import Mask
from hetu.parallel.choice import setting


@pytest.fixture(autouse=True)
def _hardware_of_before() -> Iterator[None]:
    before = list(setting._chosen)
    yield
    setting._chosen[:] = before


def test_it_measures_whatever_modes_the_user_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_MASKS", {"causal": Mask.causal()})
    path, state = tmp_path / "hardware.json", torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        found = hetu.calibrate(path)
    assert setting.chosen().hardware == found == hetu.Hardware.load(path)
    cases = {(rate.kind, rate.is_backward, rate.keys) for rate in found.rates}
    assert len(cases) == len(found.rates) == 6
    assert found.flops == max(rate.flops for rate in found.rates if not rate.is_backward)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_path_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_rates", None)
    for wrong in (3, b"hardware", "\0", object()):
        with pytest.raises(hetu.HetuError, match="expected path to be a path"):
            hetu.calibrate(wrong)  # type: ignore[arg-type]
