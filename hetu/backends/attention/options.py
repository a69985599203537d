"""What of an attention op its computation depends on, and the views of its tensors that kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from hetu.backends.attention.contract import Dropout, compute_dtype, dropout_key
from hetu.backends.attention.family import AttendSignature
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.graph import Node
from hetu.parallel import Layout, Mask
from hetu.parallel.plan.instructions import Attend
from hetu.parallel.plan.parts import PipelinePlan

Random = tuple[int, int]


class Options(NamedTuple):
    """What of an attention op's arguments its computation depends on, whatever the lengths.

    A named tuple, because those may stand in a module's code, and because a run makes one at each call.

    Attributes:
        family: The name of the kernel family that was chosen.
    """

    family: str
    num_q: int
    num_kv: int
    head_dim: int
    p_dropout: float
    softmax_scale: float
    return_softmax: bool
    zero_tensors: bool = False
    softcap: float = 0.0

    @classmethod
    def of(cls, node: Node, family: str) -> Options:
        """The options of an attention node, or of the gradient of one, that a kernel family computes."""
        attrs, (num_q, num_kv) = node.attrs, _heads(node)
        return cls(
            family,
            num_q,
            num_kv,
            attrs["head_dim"],
            attrs["p_dropout"],
            attrs["softmax_scale"],
            attrs["return_softmax"],
            attrs.get("zero_tensors", False),
            attrs["softcap"],
        )

    def dropout(self, random: Random, group: int) -> Dropout | None:
        """The dropout of a group's documents in this run."""
        return Dropout(self.p_dropout, dropout_key(*random, group)) if self.p_dropout else None

    def cut(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of q ``(rows, H_q, head_dim)`` and of k and v ``(rows, 2, H_kv, head_dim)`` of a shard."""
        queries = self.num_q * self.head_dim
        q = qkv[:, :queries].view(len(qkv), self.num_q, self.head_dim)
        return q, qkv[:, queries:].view(len(qkv), 2, self.num_kv, self.head_dim)

    @property
    def needs_positions(self) -> bool:
        return self.return_softmax or self.p_dropout > 0


def signature(node: Node, device: torch.device) -> AttendSignature:
    """What is known of an attention node's calls, or of those of the gradient of one, before there are tensors."""
    num_q, num_kv = _heads(node)
    return AttendSignature(
        dtype=TORCH_DTYPES[node.tensors[0].dtype],
        device=device,
        head_dim=node.attrs["head_dim"],
        num_q=num_q,
        num_kv=num_kv,
        has_dropout=node.attrs["p_dropout"] > 0,
        has_scores=node.attrs["return_softmax"],
        is_backward=not node.definition.is_random,
    )


def _heads(node: Node) -> tuple[int, int]:
    """Numbers of query heads and of key heads."""
    lse = node.outputs[1] if node.definition.is_random else node.input("softmax_lse")
    num_q = lse.symbolic_shape[1].constant or 0
    if node.definition.spans_pipelines:
        (qkv,) = node.tensors[:1]
        return num_q, ((qkv.symbolic_shape[1].constant or 0) // node.attrs["head_dim"] - num_q) // 2
    _, k = node.tensors[:2]
    entries = k.symbolic_shape[1].constant or 0
    return num_q, entries if len(k.symbolic_shape) == 3 else entries // node.attrs["head_dim"]


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with neighbouring elements in its last dimension, as kernels read it; copied only if they aren't."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide_sinks(sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Sinks ``(H_q,)`` as kernels read them next to inputs of a dtype: float32 or float64, contiguous."""
    return None if sinks is None else sinks.to(compute_dtype(dtype)).contiguous()


def as_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``(T, H * head_dim)`` or ``(T, H, head_dim)`` as the latter."""
    x = with_rows(x)
    return x if x.ndim == 3 else x.unflatten(1, (-1, head_dim))


def key_positions(part: PipelinePlan, step: Attend, layout: Layout, mask: Mask) -> np.ndarray[Any, Any]:
    """The position of every key in a step's buffer: int32 ``(rows,)``.

    That is the position in its document, or in the pack where the mask makes one sequence of all documents.

    Made once for each step of a part, so that a later run finds the same array and its copy on the device. The backward
    attends by the forward's tables: there both find one array.
    """
    made: dict[Attend, np.ndarray[Any, Any]] = part.known("key_positions", dict)
    if step not in made:
        of_rows, table = layout.columns if mask.joins else layout.positions, step.table
        positions = _key_positions(step, of_rows).astype(np.int32)
        if table.key_position is None or not np.array_equal(table.key_position, positions):
            table.key_position = positions
        made[step] = table.key_position
    return made[step]


def _key_positions(step: Attend, of_rows: Callable[[int], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    parts = [of_rows(source.owner)[source.runs.indices()] for source in step.sources]
    positions = np.concatenate(parts) if parts else np.empty(0, np.int64)
    places = [source.place.indices() for source in step.sources if source.place is not None]
    if places:
        positions[np.concatenate(places)] = positions.copy()
    return positions
