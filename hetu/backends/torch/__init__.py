"""The torch backend: the default without a GPU. Importing it registers its lowerings."""

from hetu.backends.torch import basic, layers, tokens

__all__ = ["basic", "layers", "tokens"]
