"""The running maximum of a row's scores, which lags behind while they rise little, and rescaling when it follows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.devices import DEVICES
from support.longer import LONGER, grid
from support.packs import Pack, Tensors, assert_right, by_kernels

from hetu.backends.triton import running_max
from hetu.errors import LoweringError

# Triton's interpreter computes by numpy, which tells of every infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def rising(pack: Pack, a_block: float) -> Tensors:
    """Data whose scores rise by so much, times log(2), every 64 keys in a third of the rows, and fall in another."""
    data = pack.data()
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(pack.head_dim, generator=generator), dim=0)
    place = torch.arange(len(data["k"]), dtype=torch.float32)[:, None, None] / 64
    signs = torch.randint(-1, 2, data["q"].shape[:2], generator=generator)[:, :, None]
    data["k"] = (data["k"] + place * a_block * direction).to(pack.dtype)
    data["q"] = (data["q"] + signs * direction * pack.head_dim**0.5 * 0.6931).to(pack.dtype)
    return data


@pytest.mark.parametrize(
    ("a_block", "is_causal", "head_dim"), grid([1.0, 5.0, 9.0, 30.0], [True, False], [64, 128, 256])
)
@pytest.mark.parametrize("device", DEVICES)
def test_scores_that_rise(device: str, head_dim: int, is_causal: bool, a_block: float) -> None:
    """By less than the maximum may lag behind, by more, and by so much that a lag would overflow."""
    lens = [421 if LONGER > 1 else 293, 130] if device == "cpu" else [421, 130, 1500]
    pack = Pack(lens, lens, (2, 1), head_dim, torch.float16, is_causal)
    data = rising(pack, a_block)
    assert_right(pack, data, by_kernels(pack, data, "triton", device))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 2e3), (torch.float16, -2e3), (torch.float32, -128.0)], ids=str
)
@pytest.mark.parametrize("device", DEVICES)
def test_scores_far_from_zero(device: str, dtype: torch.dtype, size: float) -> None:
    """Far below it they are not those of a row that sees nothing. Farther off float32 itself would round them."""
    lens = [70, 1, 130]
    pack = Pack(lens, lens, (2, 1), 64, dtype, True)
    data = pack.data()
    data["q"][:, :, 0] = 128.0
    data["k"][:, :, 0] = size * pack.head_dim**0.5 / 128.0
    assert_right(pack, data, by_kernels(pack, data, "triton", device))


FRAGMENT = (
    "#ttg.linear<{register = [[0, 1], [8, 0]], lane = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], warp = [[16, 0]]}>"
)
ACCUMULATORS = "#ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 64, 16]}>"


def compiled(layout: str, text: str = "{ .reg .pred p; }") -> SimpleNamespace:
    """Stands for a kernel with one instruction of its own on a tile of a layout."""
    tile = "tensor<64x8xf32, #of>"
    call = f'%1 = tt.elementwise_inline_asm "{text}" {{pure = true}} %0 : {tile} -> {tile} loc(#l)'
    return SimpleNamespace(asm={"ttgir": f"#of = {layout}\n#l = loc(unknown)\nmodule {{\n  {call}\n}}\n"})


def test_threads_with_other_elements_are_refused() -> None:
    running_max.check(SimpleNamespace(asm={"ttgir": "module {}"}))
    blocked = "#ttg.blocked<{sizePerThread = [1, 8]}>"
    running_max.check(compiled(blocked, "cvt.rna.tf32.f32 $0, $1;"))  # Triton's own
    running_max.check(compiled(FRAGMENT))
    running_max.check(compiled(ACCUMULATORS))
    for other in (
        FRAGMENT.replace("[[0, 1], [8, 0]]", "[[8, 0], [0, 1]]"),
        FRAGMENT.replace("lane = [[0, 2], [0, 4]", "lane = [[0, 4], [0, 2]"),
        ACCUMULATORS.replace("versionMajor = 3", "versionMajor = 2"),
        ACCUMULATORS.replace("[4, 1]", "[2, 2]"),
        blocked,
    ):
        with pytest.raises(LoweringError, match="other elements"):
            running_max.check(compiled(other))
    code = compiled(FRAGMENT).asm["ttgir"].replace("->", "to")
    with pytest.raises(LoweringError, match="cannot be read"):
        running_max.check(SimpleNamespace(asm={"ttgir": code}))
