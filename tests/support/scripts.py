"""Runs scripts, each in a fork: torch and hetu, which take seconds to import, are there.

A job comes by stdin as a line of JSON, see ``Job`` of ``test_examples.py``. For each the exit codes are printed, as
JSON. What rank 0 prints is in ``out`` of the job, and what others print in files beside it, with their rank at the end;
errors and warnings are in files with ``.err`` after that.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn

import torch._dynamo  # noqa: F401  # every optimizer of torch imports it

import hetu.backends.triton
import hetu.functional  # noqa: F401


def run(script: list[str], out: str, environment: dict[str, str]) -> int:
    """Runs one in this process; gives the exit code."""
    os.environ.update(environment)
    for stream, path in ((1, out), (2, f"{out}.err")):
        with open(path, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = script
    sys.path.insert(0, os.path.dirname(script[0]))
    try:
        runpy.run_path(script[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def end(code: int) -> NoReturn:
    """Ends this process when what was asked for at its end is done, but doesn't take all of torch apart first."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def exit_codes(job: dict[str, Any]) -> list[int]:
    """Runs a script in one process, or side by side in as many as it has ranks, which torchrun's variables tell."""
    for name in job["imports"]:
        importlib.import_module(name)
    gc.freeze()  # what was imported stays: whoever collects garbage need not look through it
    ranks, children = job["ranks"], []
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(max(ranks, 1)):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}
        out = job["out"] if rank == 0 else f"{job['out']}.{rank}"
        if (child := os.fork()) == 0:
            end(run(job["script"], out, environment))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(exit_codes(json.loads(line))), flush=True)
