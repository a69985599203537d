"""hetu's attention for the models of transformers.

``register()`` makes ``attn_implementation="hetu"`` known, and ``with context_parallel(cp)`` runs a model's attention
over the ranks of a group.
"""

from hetu.integrations.transformers.attention import register
from hetu.integrations.transformers.masks import context_parallel

__all__ = ["context_parallel", "register"]
