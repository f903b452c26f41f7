"""Writing a file so that its name always holds the old bytes or the new ones, whole, whatever happens meanwhile."""
from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to fill: after the block it has taken the place of `path`; after any exception `path` is as it was.

    The bytes go to a hidden file beside it (`.NAME.*.tmp`), are flushed to the disk and renamed over `path`, then the folder is
    flushed. An exception or Ctrl-C removes the hidden file; only a killed process leaves it behind. A symlink keeps pointing to
    its target, which is replaced.

    Raises OSError that names `path`: disk full, no permission, no such folder, not a regular file.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():    # renaming over it would destroy a device or a pipe
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        file = open(temporary, "xb")
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e    # the hidden name would mean nothing to a user
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, target)
        _fsync_folder(target.parent)
    except BaseException as e:
        with suppress(OSError):     # closing flushes, and what is left in the buffer may not fit either
            file.close()
        with suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError) and e.errno is not None and e.filename in (None, str(temporary)):
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def _fsync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut. Only POSIX can open a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):    # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)
