"""The methods of moving tokens to where they are attended to: one table, with a builder of each direction.

A method's parts depend on the layout alone, never on which other parts are built with them, so a process may build
only its own.
"""

from hetu.parallel.methods import backward, direct, hierarchical, ulysses
from hetu.parallel.methods.all_gather import all_gather
from hetu.parallel.methods.method import AttnSpec, Method
from hetu.parallel.methods.ring import ring

METHODS = {
    "ring": Method(ring, backward.build_backward),
    "direct": Method(direct.direct, direct.build_backward),
    "all_gather": Method(all_gather, backward.build_backward),
    "ulysses": Method(ulysses.ulysses, ulysses.build_backward),
    "hierarchical": Method(hierarchical.hierarchical, hierarchical.build_backward, joins_hosts=True),
}
"""The methods by name."""

AUTO = "direct"
"""What ``"auto"`` means: of the methods that move keys and values none moves fewer bytes, and each of its transfers can
be hidden behind all of the computation before it."""

__all__ = ["AUTO", "METHODS", "AttnSpec", "Method"]
