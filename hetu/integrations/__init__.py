"""Adapters to other libraries, a module or a package per library; nothing else of hetu imports them."""
