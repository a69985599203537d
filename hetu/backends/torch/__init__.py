"""The torch backend: the default without a GPU. Importing it registers its lowerings."""

import hetu.backends.torch.basic  # noqa: F401
