"""Runs scripts whose paths come by stdin, each in a fork: torch and hetu, which take seconds to import, are there.

For each it prints the exit code; what the script prints is in a file beside it, of the same name with ``.out``.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback

import torch  # noqa: F401

import hetu.backends.triton
import hetu.functional  # noqa: F401


def run(path: str) -> int:
    """Runs one in this process; gives the exit code."""
    with open(f"{path}.out", "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [path]
    try:
        runpy.run_path(path, run_name="__main__")
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            sys.exit(run(line.rstrip("\n")))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
