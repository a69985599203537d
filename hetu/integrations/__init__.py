"""Adapters to other libraries, one module per library; nothing else of hetu imports them."""
