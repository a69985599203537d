"""For people who test their own graphs: how symbols bind, what attention gives, and that strategies agree.

- :func:`bind` binds a run from shapes alone; :func:`assert_bound` and :func:`assert_shapes` compare what it found.
- :func:`attention` is both ops' oracle in float64, under every mask; :func:`allowed_pairs` is a mask pair by pair.
- :func:`assert_strategies_agree` runs a graph under all its strategies and compares them with one device.
- :func:`counting` counts what was lowered, bound and planned anew.

What doesn't hold raises an AssertionError; no test framework is needed. ``docs/testing.md`` shows it with pytest.
"""

from hetu.testing.bound import Bound, assert_bound, assert_shapes, bind
from hetu.testing.counts import Counted, counting
from hetu.testing.oracle import allowed_pairs, attention
from hetu.testing.strategies import assert_strategies_agree

__all__ = [
    "Bound",
    "Counted",
    "allowed_pairs",
    "assert_bound",
    "assert_shapes",
    "assert_strategies_agree",
    "attention",
    "bind",
    "counting",
]
