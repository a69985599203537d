"""The torch backend: the default without a GPU. Importing it registers its lowerings."""

from hetu.backends.torch import basic, collective, layers, loss, norms, random, rotary, tokens

__all__ = ["basic", "collective", "layers", "loss", "norms", "random", "rotary", "tokens"]
