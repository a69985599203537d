"""Writing a file beside the one that it replaces."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hetu.runtime.copies import refuse

_PREFIX, _SUFFIX = ".hetu-", ".part"


def refuse_special(path: str, op: str) -> None:
    """Refuses a folder, a device, a pipe or a socket: reading or writing one would do something else, or never end."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            refuse(f"{path} is no file, but a folder, a device, a pipe or a socket", "name a file", op=op)


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Gives the name of an empty file beside the one at ``path``, whose place it takes if the block ends well.

    So whoever opens ``path`` at any moment finds the old file or the new one, whole. A link is followed, and stays.
    The new file has the mode and, where that is allowed, the owner of the old one. What a process that was killed in
    such a block left in the folder is removed by the next one.

    Args:
        path: The file, which need not be there.

    Raises:
        HetuError: If there is something else than a file.
        OSError: If it can't be written. It names ``path``; nothing is left beside it.
    """
    refuse_special(path, "save")
    target = os.path.realpath(path)
    try:
        old = os.stat(target) if os.path.exists(target) else None
        _remove_leftovers(os.path.dirname(target))
        beside, handle = _new_beside(target, 0o666 if old is None else 0o600)
    except OSError as error:
        raise _of(error, path) from error
    try:
        yield beside
        os.fsync(handle)
        if old is not None:
            with suppress(PermissionError):
                os.fchown(handle, old.st_uid, old.st_gid)
            os.fchmod(handle, stat.S_IMODE(old.st_mode))
        os.replace(beside, target)
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        raise _of(error, path) from error
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _new_beside(target: str, mode: int) -> tuple[str, int]:
    """A new file in the folder, locked for as long as its handle is open; gives its path and the handle."""
    while True:
        beside = os.path.join(os.path.dirname(target), f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with suppress(OSError):  # some file systems have no locks; their leftovers stay
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else somebody took it for a leftover just before it was locked
            return beside, handle
        os.close(handle)


def _remove_leftovers(folder: str) -> None:
    """Removes files that nobody holds: those whose process ended without removing them."""
    with os.scandir(folder) as entries:
        found = [e.path for e in entries if e.name.startswith(_PREFIX) and e.name.endswith(_SUFFIX)]
    for path in found:
        with suppress(OSError):  # it is held, or another process was faster
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(handle)


def _of(error: OSError, path: str) -> OSError:
    """The same error, of the file that the user named."""
    return type(error)(error.errno, error.strerror, path) if error.errno is not None else error
