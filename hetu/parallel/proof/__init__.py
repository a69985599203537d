"""Proves plans without running them."""

from hetu.parallel.proof.verify import verify

__all__ = ["verify"]
