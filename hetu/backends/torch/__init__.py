"""The torch backend: the default without a GPU. Importing it registers its lowerings.

Each file of :mod:`hetu.ops` has one of the same name here, which lowers the ops that are defined there. Whatever
file lies in this folder is imported, so a new one needs no entry in a list.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
