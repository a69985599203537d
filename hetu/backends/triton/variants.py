"""The variants that a kernel is compiled in, and the tile of each: pure functions, no search at the first call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from hetu.backends.triton.kernels import forward_kernel

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""The element types that the kernels take, by Triton's names."""

HEAD_DIMS = range(8, 257, 8)

INTERPRETER = 0
"""Stands for Triton's interpreter where a compute capability is asked for."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        block_m: Query rows of a program.
        block_n: Keys of one iteration.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline of loads.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Variant:
    """What the forward kernel is specialised for.

    Attributes:
        head_dim: 8 to 256, a multiple of 8.
        dtype: Of q, k, v and out.
        first: Whether the step has nothing to merge with.
        last: Whether the step writes out in ``dtype``.
        dropout: Whether entries are dropped.
        scores: Whether scores are written.
    """

    head_dim: int
    dtype: torch.dtype
    first: bool = True
    last: bool = True
    dropout: bool = False
    scores: bool = False

    @property
    def block_d(self) -> int:
        """Columns of a tile."""
        return block_columns(self.head_dim)

    def constants(self, num_q: int, num_kv: int, tile: Tile) -> dict[str, Any]:
        """The kernel's compile-time arguments for these numbers of heads."""
        return {
            "HEADS": num_q,
            "GROUP": num_q // num_kv,
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": self.block_d,
            "FIRST": self.first,
            "LAST": self.last,
            "DROPOUT": self.dropout,
            "SCORES": self.scores,
            # float32 means float32: without this the tensor cores would round the inputs to TF32.
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
        }

    def options(self, tile: Tile) -> dict[str, Any]:
        """The compiler's options."""
        return compiler_options(self.dtype, tile)

    def source(self, num_q: int, num_kv: int, tile: Tile) -> dict[str, Any]:
        """Arguments of ``triton.compiler.ASTSource`` that compile what a launch would, without a GPU.

        Pointers and strides are taken to be multiples of 16, as they are for whole tensors.
        """
        element = "*" + DTYPES[self.dtype]
        types: dict[str, str] = dict.fromkeys(("q", "k", "v", "out"), element)
        types |= {"lse": "*fp32", "items": "*i32", "spans": "*i32", "segments": "*i32"}
        types |= {"scale": "fp32", "keep_scale": "fp32"}
        types |= {} if self.first and self.last else {"acc_state": "*fp32"}
        types |= {"scores": "*fp32"} if self.scores else {}
        types |= {"key_position": "*i32"} if self.scores or self.dropout else {}
        return source(forward_kernel, types, self.constants(num_q, num_kv, tile))


def block_columns(head_dim: int) -> int:
    """Columns of a tile: a power of two, and at least 16 as tensor cores need."""
    return max(16, 1 << (head_dim - 1).bit_length())


def compiler_options(dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    """The compiler's options."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    if dtype == torch.float32:
        # Dots without tensor cores are long straight code, for which ptxas would rather spill than take registers.
        options["maxnreg"] = 255
    return options


OPTIONAL = ("acc_state", "scores", "key_position")
"""Arguments of kernels that are None in some variants."""


def source(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``triton.compiler.ASTSource`` that compile what a launch would, without a GPU.

    Pointers and strides are taken to be multiples of 16, as they are for whole tensors.

    Args:
        kernel: The kernel.
        types: Triton's names of its arguments' types; what isn't there is an int32, or None if it is optional.
        constants: Its compile-time arguments.
    """
    signature, values, divisible = {}, dict[str, Any](constants), {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants or (name in OPTIONAL and name not in types):
            signature[name] = "constexpr"
            values.setdefault(name, None)
            continue
        signature[name] = types.get(name, "i32")
        if signature[name] != "fp32" and not parameter.do_not_specialize:
            divisible[(place,)] = [["tt.divisibility", 16]]
    return {"fn": kernel, "signature": signature, "constexprs": values, "attrs": divisible}


def tile(variant: Variant, capability: int) -> Tile:
    """The tile of a variant: the largest tried that spills no registers at head_dim 64 and 128.

    Args:
        variant: What the kernel is specialised for.
        capability: Compute capability, 80 for sm_80; :data:`INTERPRETER` for the interpreter.

    Example:
        >>> tile(Variant(128, torch.bfloat16), 90)
        Tile(block_m=128, block_n=64, num_warps=8, num_stages=2)
    """
    width = variant.block_d
    if capability == INTERPRETER:  # a NumPy call an operation: large blocks, of which short sequences waste little
        return Tile(64, 64, 4, 1)
    extras = variant.dropout or variant.scores
    if variant.dtype == torch.float32:  # no tensor cores: operands live in registers
        return Tile(32, 16, 8, 2 if width <= 128 else 1)
    if width == 128 and variant.dropout and variant.scores:
        return Tile(64, 32, 8, 2)
    if width <= 128 and extras:
        return Tile(128, 32, 8, 2)
    if width <= 64:
        return Tile(128, 64, 8, 3)
    if width == 128:  # masked loads, where head_dim is not 128, take registers too
        return Tile(128, 64, 8, 2) if capability >= 90 and variant.head_dim == width else Tile(128, 32, 8, 3)
    return Tile(64, 32, 8, 2)


def variants(
    head_dims: Iterable[int] = HEAD_DIMS,
    dtypes: Iterable[torch.dtype] = tuple(DTYPES),
    *,
    extras: bool = True,
) -> Iterator[Variant]:
    """Every variant of the forward kernel that a run may ask for.

    Args:
        head_dims: Of the variants.
        dtypes: Of the variants.
        extras: Whether to give those with dropout and scores too.
    """
    flags = (False, True) if extras else (False,)
    for head_dim, dtype, first, last, dropout, scores in product(
        head_dims, dtypes, (False, True), (False, True), flags, flags
    ):
        yield Variant(head_dim, dtype, first, last, dropout, scores)
