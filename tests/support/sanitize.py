"""A small set of attention, forward and backward, to run under NVIDIA's compute-sanitizer.

Compile first, then let each tool watch the kernels:

    export PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1
    python tests/support/sanitize.py
    compute-sanitizer --tool memcheck --padding 4096 --error-exitcode 1 python tests/support/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/support/sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/support/sanitize.py

Without torch's cache every tensor is an allocation of its own and exact size, so that memcheck sees the first byte
beyond it; the padding keeps neighbours apart. racecheck and memcheck may be told to watch some kernels alone
(``--kernel-name kernel_substring=gradient``); initcheck must see what torch's kernels write, and takes no filter. A
kernel that reads what nobody wrote, even if it masks it later, counts. What is fed comes from the host, and all results
are compared with a float64 reference there, so that a clean run was a right one too. ``--list`` names the cases, a
number runs one of them; ``--device cpu`` runs them in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from support.attention_cases import Case
from support.packs import Pack, assert_right, by_kernels, by_op
from support.parallel_checks import check_case, check_parallel

import hetu

RAGGED = ([0, 1, 17, 130, 63, 3], [2, 1, 17, 129, 70, 0])
"""No queries, one, odd ones, blocks' edges, no keys; also rows that see nothing."""


def op(pack: Pack, device: str, p_dropout: float = 0.0, return_softmax: bool = False) -> None:
    """``attn_varlen`` with gradients of its output and its lse."""
    data = {name: x.to(device) for name, x in pack.data().items()}
    drawn, got = by_op(pack, data, "triton", p_dropout=p_dropout, return_softmax=return_softmax)
    host = {name: x.cpu() for name, x in data.items()}
    assert_right(drawn, host, {name: x.cpu() for name, x in got.items()})


def kernels(pack: Pack, device: str) -> None:
    """The kernels over whole tensors, with nothing around them."""
    data = pack.data()
    assert_right(pack, data, by_kernels(pack, data, "triton", device))


def parallel(case: Case, device: str) -> None:
    """``parallel_attn`` over all its pipelines in this process: partial results are merged, gradients added up."""
    check_case(case, "triton", device)
    case.return_softmax = False
    check_parallel(case, "triton", device)


def cases() -> dict[str, Callable[[str], None]]:
    """The cases by name; each takes the device."""
    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    lens = [65, 0, 1, 130]
    few = ([17, 1], [17, 1])
    uneven = {"split": "sym", "method": "ring", "packing": "1d", "cut": [0.4, 0.41]}
    return {
        "head_dim 128, bfloat16, groups of 4": partial(op, Pack(*RAGGED, (8, 2), 128, brain, tail=3)),
        "head_dim 128, bfloat16, full": partial(op, Pack(*RAGGED, (3, 3), 128, brain, is_causal=False)),
        "head_dim 64, float16, groups of 7": partial(op, Pack(*RAGGED, (7, 1), 64, half)),
        "head_dim 40, bfloat16": partial(op, Pack(*RAGGED, (3, 1), 40, brain, tail=1)),
        "head_dim 8, float32": partial(op, Pack(*RAGGED, (2, 1), 8, single)),
        "head_dim 64, float32": partial(op, Pack(*few, (2, 1), 64, single)),
        "head_dim 256, bfloat16": partial(op, Pack(*RAGGED, (2, 1), 256, brain)),
        "dropout": partial(op, Pack(lens, lens, (6, 2), 64, brain), p_dropout=0.3),
        "dropout and softmax": partial(op, Pack(lens, lens, (2, 1), 64, brain), p_dropout=0.3, return_softmax=True),
        "softmax, head_dim 40": partial(op, Pack(lens, lens, (2, 1), 40, half), return_softmax=True),
        "no keys at all": partial(kernels, Pack([5, 3], [0, 0], (2, 1), 64, brain)),
        "no queries at all": partial(kernels, Pack([0, 0], [4, 3], (2, 1), 64, brain)),
        "one token": partial(kernels, Pack([1], [1], (3, 1), 128, brain)),
        "three pipelines": partial(parallel, Case([64, 1, 130], [0] * 3, dtype=brain, head_dim=128, **uneven)),
        "two pipelines, dropout, softmax": partial(
            parallel, Case([33, 70], [0] * 2, heads=(3, 1), p=0.3, return_softmax=True, head_dim=64)
        ),
        "three pipelines, head_dim 24": partial(
            parallel, Case([30, 0, 41], [0] * 3, "stripe", "direct", "2d", dtype=half, head_dim=24, cut=[0.5])
        ),
    }


def main() -> None:
    """Runs the cases that are asked for, all by default."""
    parser = argparse.ArgumentParser(description="attention under compute-sanitizer: see the head of this file")
    parser.add_argument("cases", nargs="*", type=int, help="numbers of cases; default: all")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for Triton's interpreter")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    given = parser.parse_args()
    chosen = list(enumerate(cases().items()))
    if given.cases:
        chosen = [chosen[number] for number in given.cases]
    begin = time.perf_counter()
    for number, (name, run) in chosen:
        if not given.list:
            hetu.manual_seed(number)
            run(given.device)
        print(f"{number:2}  {name}  ({time.perf_counter() - begin:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
