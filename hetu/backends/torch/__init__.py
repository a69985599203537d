"""The torch backend: the default without a GPU. Importing it registers its lowerings."""

from hetu.backends.torch import basic, collective, indexing, layers, loss, norms, pointwise, random, rotary, tokens

__all__ = ["basic", "collective", "indexing", "layers", "loss", "norms", "pointwise", "random", "rotary", "tokens"]
