"""Boxes of tensors: cut out, looked up, put together, and put one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from hetu.parallel.placement import Box, Placement


def cut(whole: torch.Tensor, box: Box) -> torch.Tensor:
    """A box of a tensor: the tensor itself if that is all of it, else a copy that keeps no memory of the rest."""
    if box.stop == whole.shape and not any(box.start):
        return whole
    return whole[box.slices_in(Box.whole(whole.shape))].clone(memory_format=torch.contiguous_format)


def within(parts: Mapping[Box, torch.Tensor], box: Box) -> torch.Tensor:
    """A box that lies in one of some parts: the part itself, or a view of it."""
    found = parts.get(box)
    if found is None:
        outer = next(one for one in parts if box.is_in(one))
        found = parts[outer][box.slices_in(outer)]
    return found


def assemble(wanted: Box, parts: Mapping[Box, torch.Tensor]) -> torch.Tensor:
    """A box that is put together from parts, which have no element in common.

    Args:
        wanted: The box.
        parts: Tensors by their boxes. Together they have each element of the wanted box.

    Returns:
        The part of that box itself if there is one, else a new tensor.
    """
    if wanted in parts:
        return parts[wanted]
    common = {box: box.common(wanted) for box in parts}
    assert sum(inner.numel for inner in common.values()) == wanted.numel, f"the parts don't make up {wanted}"
    made = next(iter(parts.values())).new_empty(wanted.shape)
    for box, inner in common.items():
        made[inner.slices_in(wanted)] = parts[box][inner.slices_in(box)]
    return made


def flat(tensors: Iterable[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The elements of some tensors, one after the other; of no tensors none, of the dtype of ``like``."""
    rows = [tensor.reshape(-1) for tensor in tensors]
    return torch.cat(rows) if rows else like.new_empty(0)


def unflat(values: torch.Tensor, boxes: Sequence[Box]) -> list[torch.Tensor]:
    """The inverse of :func:`flat`: views of the values, of the shapes of some boxes."""
    parts = values.split([box.numel for box in boxes])
    return [part.view(box.shape) for part, box in zip(parts, boxes, strict=True)]


def flat_boxes(whole: torch.Tensor, home: Placement) -> torch.Tensor:
    """The boxes of all ranks of a tensor, one after the other."""
    outer = Box.whole(whole.shape)
    return flat([whole[box.slices_in(outer)] for boxes in home.boxes for box in boxes], whole)
