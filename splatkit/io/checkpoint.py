"""Checkpoints of a training run: tensors and plain values in one safetensors file, whole or not there, checked when read.

The header of `checkpoint-<step>.safetensors` carries, beside what the format asks for, these texts in `__metadata__`:
schema, step, values (JSON), checksums (JSON: CRC-32 of every tensor's bytes) and header_crc32, which covers the rest of the header.
"""
from __future__ import annotations

import errno
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadFile
from .atomic import replacing
from .reading import Report, opened, silent, size_of

SCHEMA = 1                      # a later one keeps `schema` and `header_crc32` as they are: they say who can read the rest
KEPT = 2
HEADER_MAX = 16 * 1024 ** 2     # bytes; what grows with the scene belongs into tensors
STEP_MAX = 99_999_999           # eight digits, so that names sort like steps

# CRC-32 and not SHA-256: damage is what it must find, not forgery, and it runs at 3 GB/s here against 0.3.
_checksum = zlib.crc32

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
           "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
           "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_NAME = re.compile(r"checkpoint-([0-9]{8})\.safetensors")
_LEFT_OVER = re.compile(r"\.checkpoint-[0-9]{8}\.safetensors\.[0-9a-f]+\.tmp")      # as atomic.replacing names them


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, bit for bit, with the tensors on the CPU."""

    step: int
    tensors: dict[str, Tensor]
    values: dict        # as JSON has it: a tuple came back as a list
    path: Path


class _Newer(BadFile):
    """An undamaged checkpoint of a schema that this version does not know."""


def save(folder: str | os.PathLike, step: int, tensors: dict[str, Tensor], values: dict) -> Path:
    """Writes the checkpoint of `step` into a folder that exists, and keeps it and the one before. Call it under `lock(folder)`.

    A process stopped at any moment leaves the older checkpoints or this one as well, each whole. Checkpoints of later steps are
    removed too: the run has gone back behind them, and `load` would take them for the newest.

    Raises ValueError or TypeError, with nothing touched, for what could not be read back: a value outside strict JSON (NaN and
    infinities too), a dtype or layout that safetensors lacks, a header over 16 MiB. Raises OSError when the disk refuses; the older
    checkpoints stay.
    """
    if not 0 <= step <= STEP_MAX:
        raise ValueError(f"step is {step}; expected 0 to {STEP_MAX}")
    arrays = {name: _bytes_on_cpu(name, x) for name, x in tensors.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))     # every tensor is aligned for those who map the file
    header, end = {}, 0
    for name in names:
        start, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": _CODES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    checksums = {name: _checksum(arrays[name]) for name in names}
    header["__metadata__"] = {"schema": str(SCHEMA), "step": str(step), "values": json.dumps(values, allow_nan=False),
                              "checksums": json.dumps(checksums)}
    header["__metadata__"]["header_crc32"] = _header_crc32(header)
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_MAX:
        raise ValueError(f"values and tensor names take {len(text)} bytes, {HEADER_MAX} is the most; put long lists into tensors")

    folder = Path(folder)
    for left_over in filter(_LEFT_OVER.fullmatch, os.listdir(folder)):      # first: a full disk may need the room
        os.unlink(folder / left_over)
    path = folder / f"checkpoint-{step:08}.safetensors"
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(arrays[name].data)
    before = [other for other in _found(folder) if other < path]
    for other in _found(folder):
        if other != path and other not in before[:KEPT - 1]:
            os.unlink(other)
    return path


def load(folder: str | os.PathLike, report: Report = silent) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None when the folder has none or is absent. `report` hears of each newer one that is damaged.

    Raises BadFile when there are checkpoints but none is whole, or when a newer splatkit wrote the newest.
    """
    try:
        paths = _found(Path(folder))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise BadFile(folder, "", f"cannot be read: {e.strerror}") from e
    damaged = []
    for path in paths:
        try:
            checkpoint = _read(path)
        except _Newer:      # falling back would throw away what the newer version did
            raise
        except BadFile as e:
            damaged.append(e)
            continue
        for e in damaged:
            report(f"{e}; going back to the checkpoint of step {checkpoint.step}")
        return checkpoint
    if damaged:
        raise BadFile(folder, "", f"no checkpoint is whole ({'; '.join(map(str, damaged))}); remove them to start anew")
    return None


@contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Holds `folder` for this process alone; the system lets go when the process ends, however it ends. The file `.lock` stays.

    Raises BadFile when another process, or another block of this one, holds it; OSError when the folder cannot be locked.
    """
    import fcntl  # POSIX only: reading checkpoints works without
    descriptor = os.open(Path(folder) / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise OSError(e.errno, e.strerror, str(folder)) from e
            holder = re.fullmatch(rb"[0-9]{1,10}\n", os.pread(descriptor, 16, 0))
            who = f"process {int(holder[0])}" if holder else "another process"
            raise BadFile(folder, "", f"{who} is working in this folder; let it end or choose another folder") from e
        with suppress(OSError):     # on a full disk the lock holds all the same, it only cannot name its holder
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        if descriptor in _held:     # not in a forked child: there it is closed, and its number may be another file's
            _held.remove(descriptor)
            os.close(descriptor)


# A forked child shares the lock until it closes its copy: a data loader's worker must not hold the folder after its parent was killed.
_held: set[int] = set()


def _close_held() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


def _found(folder: Path) -> list[Path]:
    """The checkpoint files of the folder, newest first."""
    return [folder / name for name in sorted(filter(_NAME.fullmatch, os.listdir(folder)), reverse=True)]


def _bytes_on_cpu(name: str, x: Tensor):
    """The tensor's elements in order as a numpy array of bytes, without a copy where it already lies so."""
    if name == "__metadata__" or x.dtype not in _CODES or x.layout != torch.strided:
        raise ValueError(f"tensor {name!r} ({x.dtype}, {x.layout}) has no place in a safetensors file; expected a dense one, "
                         f"one of {', '.join(_DTYPES)}, under another name than __metadata__")
    return x.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _header_crc32(header: dict) -> str:
    """Over the header as parsed, without the checksum itself: spaces and order do not count."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "header_crc32"}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return f"{zlib.crc32(text.encode('ascii')):08x}"


def _read(path: Path) -> Checkpoint:
    with opened(path) as file:
        size = size_of(file)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_MAX):
            raise BadFile(path, "byte 0", f"the header claims {length} bytes; the file has {size}, and {HEADER_MAX} is the most")
        header = _checked_header(path, file.read(length))
        metadata = header.pop("__metadata__")
        values, checksums = _json_object(path, "values", metadata.get("values")), _json_object(path, "checksums", metadata.get("checksums"))
        if metadata.get("step") != str(int(_NAME.fullmatch(path.name)[1])):
            raise BadFile(path, "step", f"the file holds step {metadata.get('step')!r:.40}: it was renamed")
        order = _in_order(path, header, size - 8 - length)
        if checksums.keys() != header.keys():
            raise BadFile(path, "checksums", "not one for each tensor")
        tensors = {}
        for name, (dtype, shape, n_bytes) in order.items():
            data = torch.empty(n_bytes, dtype=torch.uint8)
            if file.readinto(data.numpy().data) != n_bytes or _checksum(data.numpy()) != checksums[name]:
                raise BadFile(path, f"tensor {name!r:.80}", "its checksum does not match: the file is damaged")
            tensors[name] = data.view(dtype).reshape(shape)
    return Checkpoint(int(metadata["step"]), tensors, values, path)


def _checked_header(path: Path, text: bytes) -> dict:
    """The header with its checksum and schema verified; nothing in it is believed before that."""
    try:
        header = json.loads(text.decode("utf-8"))
        crc32 = header["__metadata__"]["header_crc32"]
        intact = crc32 == _header_crc32(header)
        schema = int(header["__metadata__"]["schema"]) if intact else 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadFile(path, "header", "not a splatkit checkpoint, or damaged") from e
    if not intact:
        raise BadFile(path, "header", "its checksum does not match: the file is damaged")
    if schema > SCHEMA:
        raise _Newer(path, "schema", f"written by a newer splatkit (schema {schema}, this one reads {SCHEMA}); "
                                     f"update splatkit, or choose another folder to start anew")
    if schema < 1:
        raise BadFile(path, "schema", f"{schema}; expected 1 to {SCHEMA}")
    return header


def _json_object(path: Path, where: str, text) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as e:
        raise BadFile(path, where, "not JSON") from e
    if not isinstance(found, dict):
        raise BadFile(path, where, f"expected a JSON object, not {type(found).__name__}")
    return found


def _in_order(path: Path, header: dict, n_data: int) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """(dtype, shape, bytes) by name in the order of the file. The tensors must fill its `n_data` bytes without a gap."""
    try:
        entries = sorted((*_whole(entry["data_offsets"], 2), name, _DTYPES[entry["dtype"]], _whole(entry["shape"]))
                         for name, entry in header.items())
    except (ValueError, KeyError, TypeError) as e:
        raise BadFile(path, "header", "a tensor's dtype, shape or place is not what safetensors allows") from e
    order, at = {}, 0
    for start, end, name, dtype, shape in entries:
        # The limit keeps strides within 64 bits for empty tensors too, where no byte bounds the other dimensions.
        if start != at or end - start != math.prod(shape) * dtype.itemsize or math.prod(max(n, 1) for n in shape) > 2 ** 48:
            raise BadFile(path, f"tensor {name!r:.80}", f"shape {shape!s:.80} does not fit bytes {start} to {end}")
        order[name], at = (dtype, shape, end - start), end
    if at != n_data:
        raise BadFile(path, "", f"{n_data} bytes of tensors; expected {at}: the file was cut or something was added")
    return order


def _whole(numbers, count: int | None = None) -> list[int]:
    if type(numbers) is not list or len(numbers) > 64 or count not in (None, len(numbers)):
        raise ValueError
    if not all(type(n) is int and 0 <= n < 2 ** 63 for n in numbers):
        raise ValueError
    return numbers
