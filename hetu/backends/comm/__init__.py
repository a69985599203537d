"""Moving keys and values between pipelines, and gradients home: the communicators, and the interpreter of plans."""

from hetu.backends.comm.interpreter import AttendBackwardStep, AttendStep, Communicator, follow, follow_backward
from hetu.backends.comm.local import LocalComm, run_lock_step

__all__ = [
    "AttendBackwardStep",
    "AttendStep",
    "Communicator",
    "LocalComm",
    "follow",
    "follow_backward",
    "run_lock_step",
]
