"""Compiles variants of the Gluon kernels for Hopper, without a GPU, and prints what ptxas says of each, as JSON."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from hetu.backends.gluon import variants
from hetu.backends.gluon.forward import forward_kernel
from hetu.backends.triton.variants import PackedHeads, Variant

KINDS: list[tuple[Variant, PackedHeads]] = [
    (Variant(128, torch.bfloat16), PackedHeads(8, 2)),
    (Variant(256, torch.float16, True, True, lower=True, softcap=True, sinks=True), PackedHeads(5, 5)),
    (Variant(64, torch.bfloat16, lower=True), PackedHeads(4, 1)),
]
"""Every width, and every flag."""


def compiled(variant: Variant, heads: PackedHeads) -> dict[str, Any]:
    """What is known of a variant's machine code."""
    shape = variants.tile(variant, is_long=True)
    assert shape is not None
    strides = heads.num_q * variant.head_dim, variant.head_dim
    of = variants.constants(variant, heads, shape, strides)
    source = variants.source(forward_kernel, variants.types(variant), of, variant.dtype)
    log = StringIO()
    with redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=variants.options(shape.consumers))
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log.getvalue())
    carried = re.search(r"scf.yield .*%tile.* : (.*)", kernel.asm["ttgir"])
    assert spills is not None and carried is not None, log.getvalue()
    return {
        "variant": str(variant),
        "stack": int(spills.group(1)),
        "spills": int(spills.group(2)),
        "serial": re.findall(r"C75\d\d", log.getvalue()),
        "carried": len(re.findall(r"\bi32\b", carried.group(1))),
        "shared": kernel.metadata.shared,
    }


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = True  # or ptxas doesn't say that it serialises products
    for kind in KINDS:
        print(json.dumps(compiled(*kind)), flush=True)
