"""Moving keys and values between pipelines, and gradients home: the communicators, and the interpreter of plans."""

from hetu.backends.comm.buffers import AttendStep, Buffers, Owned, Values
from hetu.backends.comm.interpreter import Communicator, follow
from hetu.backends.comm.local import LocalComm, run_lock_step
from hetu.backends.comm.world import LocalWorld, World, current_world, reduce_in_order, set_world

__all__ = [
    "AttendStep",
    "Buffers",
    "Communicator",
    "LocalComm",
    "LocalWorld",
    "Owned",
    "Values",
    "World",
    "current_world",
    "follow",
    "reduce_in_order",
    "run_lock_step",
    "set_world",
]
