"""The torch backend: the default without a GPU. Importing it registers its lowerings."""

from hetu.backends.torch import (
    basic,
    collective,
    indexing,
    layers,
    layout_tokens,
    loss,
    norms,
    pointwise,
    random,
    rotary,
)

__all__ = [
    "basic",
    "collective",
    "indexing",
    "layers",
    "layout_tokens",
    "loss",
    "norms",
    "pointwise",
    "random",
    "rotary",
]
