""".splat of antimatter15: 32 bytes a Gaussian and nothing else. There is no header, so a size that is not a multiple of 32 is all that shows a cut."""
from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from numpy import ndarray as Array

from ..errors import BadFile
from ..header import SceneHeader
from .atomic import replacing
from .fields import SH_C0, Fields, Stream, count_of, degree_of, empty, finite_rows, refuse_if_many, rows
from .packing import COLOUR_BYTES, LOGITS, log_of_scales, opacity_bytes, to_bytes, unit_quats
from .reading import Report, opened, silent, size_of

RECORD = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("colour", "u1", 3), ("opacity", "u1"), ("quats", "u1", 4)])
ROWS_AT_ONCE = 64 * 1024


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """The scene, of SH degree 0. Rows that are not finite are dropped and counted to `report`. Raises BadFile."""
    stream = read_stream(path, report)
    fields, at = empty(stream.count, 0), 0
    for block in stream.blocks:
        for name, value in block.items():
            fields[name][at:at + len(value)] = value
        at += count_of(block)
    return rows(fields, slice(0, at)), stream.header


def read_stream(path: str | os.PathLike, report: Report = silent) -> Stream:
    """The same block by block. Raises BadFile at once, and at the end for too many rows that are not finite."""
    with opened(path) as file:
        size = size_of(file)
    if size == 0:
        raise BadFile(path, "byte 0", "the file is empty")
    if size % RECORD.itemsize:
        raise BadFile(path, f"byte {size}", f"{size} bytes are not a whole number of {RECORD.itemsize}-byte records: the file was cut, or it is no .splat")
    n = size // RECORD.itemsize

    def blocks() -> Iterator[Fields]:
        dropped, worst = 0, 0
        with opened(path) as file:
            for first in range(0, n, ROWS_AT_ONCE):
                m = min(ROWS_AT_ONCE, n - first)
                data = file.read(m * RECORD.itemsize)
                if len(data) != m * RECORD.itemsize:
                    raise BadFile(path, f"byte {size_of(file)}", "the file changed while it was read")
                fields = _unpacked(np.frombuffer(data, RECORD))
                finite = finite_rows(fields)
                if finite is not None:
                    worst, dropped = first + int(finite.argmin()) if not dropped else worst, dropped + int((~finite).sum())
                    fields = rows(fields, finite)
                yield fields
        refuse_if_many(path, dropped, n, f"Gaussian {worst}", report)
    return Stream(SceneHeader(), n, 0, 0, blocks())


def _unpacked(records: Array) -> Fields:
    return {"means": np.ascontiguousarray(records["means"]), "quats": (records["quats"].astype(np.float32) - 128) / 128, "log_scales": log_of_scales(records["scales"]),
            "logit_opacities": LOGITS[records["opacity"]], "sh": COLOUR_BYTES[records["colour"]][:, None]}


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader, report: Report = silent) -> None:
    """Writes the rows in their order; colours, opacities and quaternions in 8 bits. SH of degree 1 and more has no room. Raises OSError."""
    n = count_of(fields)
    blocks = (rows(fields, slice(first, first + ROWS_AT_ONCE)) for first in range(0, n, ROWS_AT_ONCE))
    write_stream(path, Stream(header, n, degree_of(fields), 0, blocks))


def write_stream(path: str | os.PathLike, stream: Stream) -> int:
    """The same block by block; returns how many rows came. Raises ValueError for a scene of none: the format cannot say that."""
    written = 0
    with replacing(path) as file:
        for f in stream.blocks:
            records = np.zeros(count_of(f), RECORD)
            records["means"], records["colour"] = f["means"], to_bytes(f["sh"][:, 0] * np.float32(SH_C0) + np.float32(0.5))
            with np.errstate(over="ignore"):
                records["scales"] = np.minimum(np.exp(f["log_scales"]), np.finfo(np.float32).max)
            records["opacity"] = opacity_bytes(f["logit_opacities"])
            records["quats"] = np.clip(np.rint(unit_quats(f["quats"]) * 128 + 128), 0, 255)
            file.write(records.data)
            written += len(records)
        if not written:
            raise ValueError(f"{path}: a .splat cannot hold a scene of no Gaussians")
    return written
