""".ksplat of GaussianSplats3D: sections of interleaved records, in float32 (level 0), half floats (1), or those and SH in 8 bits (2); SH degree 0 to 2."""
from __future__ import annotations

import os
import struct

import numpy as np
from numpy import ndarray as Array

from ..errors import BadFile
from ..header import SceneHeader
from .atomic import replacing
from .fields import SH_C0, Fields, count_of, degree_of, empty, finished, rows
from .packing import COLOUR_BYTES, LOGITS, half_step, log_of_scales, morton_order, opacity_bytes, to_bytes, unit_quats
from .reading import Report, exactly, opened, silent, size_of

HEADER, SECTION = 4096, 1024        # bytes
BUCKET, BLOCK, RANGE = 256, 5.0, 32767
SH_RANGE = 1.5                      # of 8-bit SH, where a file says 0
DEGREE_MAX = 2
_HALF_ZERO = half_step(2.0 ** -24)  # the smallest half float
_COEFFICIENTS = (0, 9, 24)
# A coefficient's place in a record: degree 1 with its three channels one after the other, then degree 2 so.
_PLACES = [np.array([c * 3 + k for k in range(3) for c in range(3)] + [9 + c * 5 + k for k in range(5) for c in range(3)])[:n] for n in _COEFFICIENTS]


def _record(level: int, degree: int) -> np.dtype:
    number, rest = ("<f4", "<f4") if level == 0 else ("<f2", "<f2" if level == 1 else "u1")
    return np.dtype([("means", "<f4" if level == 0 else "<u2", 3), ("scales", number, 3), ("quats", number, 4), ("colour", "u1", 3), ("opacity", "u1"),
                     ("rest", rest, _COEFFICIENTS[degree])])


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """The scene. Sections of different SH degrees become one of the highest. Rows that are not finite are dropped and counted to `report`. Raises BadFile."""
    with opened(path) as file:
        head = exactly(path, file, HEADER)
        major, minor, sections, _, n, _, level = struct.unpack_from("<BB2xIIIIH", head)
        low, high = struct.unpack_from("<ff", head, 36)
        if (major, minor) != (0, 1):
            raise BadFile(path, "byte 0", f"KSPLAT version {major}.{minor}; 0.1 is known, or it is no .ksplat")
        if level > 2:
            raise BadFile(path, "byte 20", f"compression level {level}; expected 0, 1 or 2")
        if not (np.isfinite(low) and np.isfinite(high)):
            raise BadFile(path, "byte 36", f"the range of SH coefficients is {low} to {high}")
        size = size_of(file)
        table = exactly(path, file, sections * SECTION)
        parts, at = [], HEADER + sections * SECTION
        for i in range(sections):
            parts.append(_Section(path, table[i * SECTION:(i + 1) * SECTION], i, level, at))
            at = parts[-1].end
        if at > size:
            raise BadFile(path, f"byte {size}", f"the file ends early: its sections take {at} bytes")
        if sum(p.n for p in parts) != n:
            raise BadFile(path, "header", f"{n} Gaussians, but the sections hold {sum(p.n for p in parts)}")
        fields, row = empty(n, max((p.degree for p in parts), default=0)), 0
        with np.errstate(over="ignore", invalid="ignore"):
            for part in parts:
                part.read(path, file, rows(fields, slice(row, row + part.n)), (low or -SH_RANGE, high or SH_RANGE))
                row += part.n
    return finished(path, fields, report), SceneHeader()


class _Section:
    def __init__(self, path, head: bytes, number: int, level: int, start: int):
        (self.n, self.bucket, buckets, block, storage, steps, self.full, self.partial, self.degree) = struct.unpack_from("<4xIIIfHxxI4xIIH", head)
        self.level, self.where, self.start = level, f"section {number}", start
        if self.degree > DEGREE_MAX:
            raise BadFile(path, self.where, f"SH degree {self.degree}; expected 0 to {DEGREE_MAX}")
        self.buckets = buckets if level else 0
        self.partial = self.partial if level else 0
        if level and (buckets != self.full + self.partial or buckets and storage != 12 or self.n and not 0 < block < np.inf or self.n and not self.bucket):
            raise BadFile(path, self.where, f"{buckets} buckets of {storage} bytes and side {block:.3g}, {self.full} full and {self.partial} others: expected 12 bytes, and all of them")
        self.data = start + 4 * self.partial + 12 * self.buckets
        self.end = self.data + self.n * _record(level, self.degree).itemsize
        self.step = np.float32(block / 2 / (steps or RANGE)) if level else None
        self.middle = steps or RANGE

    def read(self, path, file, out: Fields, limits: tuple[float, float]) -> None:
        file.seek(self.start)
        lengths = np.frombuffer(exactly(path, file, 4 * self.partial), "<u4")
        centres = np.frombuffer(exactly(path, file, 12 * self.buckets), "<f4").reshape(-1, 3)
        records = np.frombuffer(exactly(path, file, self.end - self.data), _record(self.level, self.degree))
        if self.level == 0:
            out["means"][:] = records["means"]
        elif self.n:
            total = self.full * self.bucket + int(lengths.sum(dtype=np.uint64))
            if total != self.n:
                raise BadFile(path, self.where, f"its buckets hold {total} Gaussians, itself {self.n}")
            bucket = np.repeat(np.arange(self.buckets), np.concatenate([np.full(self.full, self.bucket), lengths]).astype(np.int64))
            out["means"][:] = (records["means"].astype(np.float32) - self.middle) * self.step + centres[bucket]
        out["quats"][:] = records["quats"]
        out["log_scales"][:] = log_of_scales(records["scales"].astype(np.float32), *([_HALF_ZERO] if self.level else []))
        out["logit_opacities"][:] = LOGITS[records["opacity"]]
        out["sh"][:, 0] = COLOUR_BYTES[records["colour"]]
        out["sh"][:, 1:] = 0
        if self.degree:
            rest = records["rest"].astype(np.float32)
            if self.level == 2:
                rest = rest / 255 * (limits[1] - limits[0]) + limits[0]
            out["sh"][:, 1:(self.degree + 1) ** 2] = rest[:, _PLACES[self.degree]].reshape(self.n, (self.degree + 1) ** 2 - 1, 3)


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader, report: Report = silent, level: int = 1) -> None:
    """Writes one section. Level 0 keeps the rows' order and float32; 1 and 2 sort rows into buckets: positions in steps of 1/13107, numbers in half floats.

    Colours and opacities have 8 bits at every level, SH at level 2; SH of degree 3 has no room. Raises ValueError for another level, OSError.
    """
    if level not in (0, 1, 2):
        raise ValueError(f"KSPLAT compression level {level}; 0, 1 and 2 can be written")
    n, degree = count_of(fields), min(degree_of(fields), DEGREE_MAX)
    lengths, centres, block = np.zeros(0, "<u4"), np.zeros((0, 3), "<f4"), BLOCK
    if level and n:
        fields, lengths, centres, block = _bucketed(fields)
    rest = fields["sh"][:, 1:(degree + 1) ** 2].reshape(n, _COEFFICIENTS[degree])
    low, high = (float(rest.min()), float(rest.max())) if rest.size else (-SH_RANGE, SH_RANGE)
    low, high = low if low else -1e-6, high if high > low and high else max(low, 0) + 1e-6     # 0 would mean the default
    records = np.zeros(n, _record(level, degree))
    if level == 0 or not n:
        records["means"] = fields["means"]
    else:
        bucket = np.repeat(np.arange(len(lengths)), lengths)
        steps = (fields["means"].astype(np.float64) - centres[bucket]) * (RANGE / (block / 2)) + RANGE
        records["means"] = np.clip(np.rint(steps), 0, 2 * RANGE + 1)
    with np.errstate(over="ignore"):
        largest = np.finfo(np.float32 if level == 0 else np.float16).max
        records["scales"] = np.minimum(np.exp(fields["log_scales"]), largest)
        records["quats"] = unit_quats(fields["quats"])
        if degree:
            placed = np.empty_like(rest)
            placed[:, _PLACES[degree]] = rest
            records["rest"] = np.rint((placed - low) / (high - low) * 255) if level == 2 else np.clip(placed, -largest, largest)
    records["colour"] = to_bytes(fields["sh"][:, 0] * np.float32(SH_C0) + np.float32(0.5))
    records["opacity"] = opacity_bytes(fields["logit_opacities"])
    head = struct.pack("<BBxxIIIIHxx3fff", 0, 1, 1, 1, n, n, level, *np.zeros(3), low, high)
    size = records.nbytes + lengths.nbytes + centres.nbytes
    section = struct.pack("<IIIIfHxxIIIIH", n, n, *((BUCKET, len(lengths), block, 12, RANGE, size & 0xFFFFFFFF, 0, len(lengths)) if level else (0, 0, 0, 0, 0, size & 0xFFFFFFFF, 0, 0)),
                          degree)
    with replacing(path) as file:
        file.write(head.ljust(HEADER, b"\0") + section.ljust(SECTION, b"\0"))
        for piece in (lengths, centres, records):
            file.write(piece.tobytes())


def _bucketed(fields: Fields) -> tuple[Fields, Array, Array, float]:
    """The rows by cell of a grid, at most 256 in a bucket; lengths and centres of the buckets; the side of a cell. All are written as buckets that are not full."""
    means = fields["means"].astype(np.float64)
    low, extent = means.min(axis=0), float(np.ptp(means, axis=0).max())
    block = max(BLOCK, extent / 1e6)        # the grid's indices must be exact
    cells = np.floor((means - low) / block).astype(np.int64)
    inner = morton_order(fields["means"])
    order = inner[np.lexsort(cells[inner].T[::-1])]
    fields, cells = rows(fields, order), cells[order]
    fresh = np.concatenate([[True], (np.diff(cells, axis=0) != 0).any(axis=1)])
    first_of_cell = np.maximum.accumulate(np.where(fresh, np.arange(len(cells)), 0))
    starts = np.flatnonzero((np.arange(len(cells)) - first_of_cell) % BUCKET == 0)
    lengths = np.diff(np.append(starts, len(cells))).astype("<u4")
    return fields, lengths, ((cells[starts] + 0.5) * block + low).astype("<f4"), block
