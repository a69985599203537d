"""Writing a file beside the one that it replaces."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hetu.runtime.copies import refuse

_PREFIX, _SUFFIX = ".hetu-", ".part"


def refuse_special(path: str, op: str) -> None:
    """Refuses a folder, a device, a pipe or a socket: reading or writing one would do something else, or never end."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            refuse(f"the path {path} is no file, but a folder, a device, a pipe or a socket", "name a file", op=op)


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Gives a path to write to, whose file takes the place of the one at ``path`` if the block ends well.

    So whoever opens ``path`` at any moment finds the old file or the new one, whole. A link is followed, and stays.
    The new file has the mode and, where that is allowed, the owner of the old one. What a process that was killed in
    such a block left beside the file is removed by the next one that writes there.

    Args:
        path: The file, which need not be there.

    Raises:
        HetuError: If there is something else than a file.
        OSError: If it can't be written. It names ``path``; nothing is left beside it.
    """
    target = os.path.realpath(path)
    try:
        refuse_special(target, "save")
        _remove_leftovers(os.path.dirname(target))
        with _folder_beside(target) as folder:
            new = os.path.join(folder, "new")
            with open(new, "xb") as file:
                mode = os.fstat(file.fileno()).st_mode  # that of a new file
            yield new
            with open(new, "rb") as file:
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                old = os.stat(target)
                mode = old.st_mode
                with suppress(PermissionError):
                    os.chown(new, old.st_uid, old.st_gid)
            os.chmod(new, stat.S_IMODE(mode))
            os.replace(new, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, path) from error  # the user knows of no other path


@contextmanager
def _folder_beside(target: str) -> Iterator[str]:
    """A folder of its own beside a file, on the same disk. It is locked until it is removed at the end."""
    while True:
        folder = tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=os.path.dirname(target))
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # some file systems have no locks; what is left on them stays
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(folder):  # else another process took it for a leftover before it was locked
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_leftovers(folder: str) -> None:
    """Removes the folders that nobody holds: those of processes that ended without removing them."""
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX)]
    for path in found:
        with suppress(OSError):  # somebody holds it, or another process was faster
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)
