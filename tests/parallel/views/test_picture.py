"""Pictures of plans: what is drawn is what is predicted, and who computes what."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import hetu
from hetu.parallel import METHODS, AttnPlan, Hardware, Heads, Layout, build_plan
from hetu.parallel.mask import svg
from hetu.parallel.plan.instructions import Receive
from hetu.parallel.views import picture
from hetu.parallel.views.cost import simulate
from hetu.parallel.views.report import computing

HEADS = Heads(num_q=4, num_kv=2, head_dim=64, itemsize=2)
SLOW = Hardware(flops=1e8, link_bytes=1e7, latency=1e-5, memory_bytes=1e9)


def plan(
    method: str = "direct", lengths: tuple[int, ...] = (30, 17, 0, 5), groups: tuple[int, ...] = (0, 0, 1, 1)
) -> AttnPlan:
    return build_plan(
        Layout.build(lengths, groups, split="sym"), method=method, mask=hetu.Mask.window(9, 0), heads=HEADS
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_timeline_is_what_is_predicted(method: str) -> None:
    for drawn in (plan(method), plan(method).backward()):
        bars = picture.figure(drawn, SLOW).axes[0].collections  # works, waits and arrivals of each pipeline
        timeline, milliseconds = simulate(drawn, SLOW), 1e3
        for r, (part, ends) in enumerate(zip(drawn.pipelines, timeline.ends, strict=True)):
            works, waits, arrivals = ([path.get_extents() for path in bars[3 * r + i].get_paths()] for i in range(3))
            received = [item.transfer for item in part.instructions if isinstance(item, Receive)]
            assert len(arrivals) == len([number for number in received if number in timeline.transfers])
            busy = sum(box.width for box in works)
            assert busy == pytest.approx(timeline.flops[r] / SLOW.flops * milliseconds)
            last = max(timeline.finish) * milliseconds
            assert busy + sum(box.width for box in waits) == pytest.approx(last)
            assert max((box.x1 for box in works), default=0) <= (ends[-1] if ends else 0) * milliseconds * (1 + 1e-9)


def test_a_pixel_has_the_colour_of_who_computes_it() -> None:
    drawn = plan()
    owners = computing(drawn, 0)
    for number, group in enumerate(drawn.layout.groups):
        pixels = picture.owned(drawn, number, owners[number])
        seen = drawn.mask.matrix(group.tokens, group.tokens)
        colours = np.array([picture._rgb(svg.colour_of(r)) for r in owners[number]])[:, None]
        np.testing.assert_allclose(pixels, np.where(seen[..., None], colours, picture._rgb(picture.HIDDEN)))


def test_sizes_from_nothing_to_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "BESIDE", 2)
    for name, lengths, groups in (("none", (0,), (0,)), ("one", (1,), (0,)), ("many", (3,) * 20, tuple(range(20)))):
        plan(lengths=lengths, groups=groups).visualize(tmp_path / f"{name}.svg", SLOW)
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert "<svg" in plan()._repr_html_() and "direct, window" in plan()._repr_html_()


def test_what_can_not_be_drawn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(hetu.HetuError, match=r"one of \.png, \.svg, \.pdf"):
        plan().visualize(tmp_path / "plan.doc")
    with pytest.raises(hetu.HetuError, match="hardware"):
        plan().visualize(tmp_path / "plan.svg", "h100")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(hetu.HetuError, match=r"hetu-attention\[demo\]"):
        plan().visualize(tmp_path / "plan.svg")
    assert "<pre>" in plan()._repr_html_()
