"""Opening input files: everything that is wrong with one ends in BadFile."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ..errors import BadFile

Report = Callable[[str], None]      # takes one line about something the user should know but that stops nothing


def silent(line: str) -> None:
    """A Report for callers that do not want to hear."""


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """The file, open for reading bytes. Raises BadFile when it is missing, not a regular file, or any read in the block fails."""
    if not os.path.isfile(path):    # also keeps a pipe from blocking us for ever
        raise BadFile(path, "", "not a regular file" if os.path.exists(path) else "no such file")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as e:
        raise BadFile(path, "", f"cannot be read: {e.strerror or e}") from e


def size_of(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def read_bytes(path: str | os.PathLike) -> bytes:
    """The whole file. Raises BadFile when it cannot be read."""
    with opened(path) as file:
        return file.read()


def exactly(path, file: BinaryIO, size: int) -> bytes:
    """The next `size` bytes. Raises BadFile where the file ends before, without asking for memory first."""
    at = file.tell()
    if size > size_of(file) - at:
        raise BadFile(path, f"byte {size_of(file)}", f"the file ends early: {size} bytes from byte {at} on are missing in part")
    return file.read(size)


def strict_json(path, where: str, text: bytes) -> dict:
    """The JSON object in `text`; NaN and infinities are no JSON. Raises BadFile."""
    def refuse(name):
        raise ValueError(f"{name} is not a number in JSON")
    try:
        found = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise BadFile(path, where, f"not JSON: {e}"[:200]) from e
    if not isinstance(found, dict):
        raise BadFile(path, where, f"expected a JSON object, not {type(found).__name__}")
    return found
