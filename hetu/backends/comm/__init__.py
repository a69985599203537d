"""Moving keys and values between pipelines: the communicators, and the interpreter that follows a plan."""

from hetu.backends.comm.interpreter import AttendStep, Communicator, follow
from hetu.backends.comm.local import LocalComm, run_lock_step

__all__ = ["AttendStep", "Communicator", "LocalComm", "follow", "run_lock_step"]
