"""Moving keys and values between pipelines, and gradients home: the communicators, and the interpreter of plans."""

from hetu.backends.comm.exchange import Held, follow_heads
from hetu.backends.comm.interpreter import AttendBackwardStep, AttendStep, Communicator, follow, follow_backward
from hetu.backends.comm.local import LocalComm, run_lock_step
from hetu.backends.comm.world import LocalWorld, World, current_world, reduce_in_order, set_world

__all__ = [
    "AttendBackwardStep",
    "AttendStep",
    "Communicator",
    "Held",
    "LocalComm",
    "LocalWorld",
    "World",
    "current_world",
    "follow",
    "follow_backward",
    "follow_heads",
    "reduce_in_order",
    "run_lock_step",
    "set_world",
]
