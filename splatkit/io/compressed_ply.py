"""The compressed PLY of PlayCanvas and SuperSplat: 16 bytes a Gaussian, ranges by chunk of 256, optional SH in 8 bits."""
from __future__ import annotations

import os
from typing import BinaryIO

import numpy as np
from numpy import ndarray as Array

from ..errors import BadFile
from ..header import SceneHeader
from .atomic import replacing
from .fields import SH_C0, Fields, count_of, empty, finished, rows
from .packing import LOGITS, morton_order, opacity_bytes, unit_quats, with_largest, without_largest
from .ply_header import PlyHeader, comment_lines, header_bytes, numbered, rest_size
from .reading import Report, exactly, silent

CHUNK = 256
ROWS_AT_ONCE = 256 * CHUNK
_xyz = lambda name: [f"{name}_{axis}" for axis in "xyz"]
_PACKED = ["packed_position", "packed_rotation", "packed_scale", "packed_color"]
_RANGES = [*_xyz("min"), *_xyz("max"), *_xyz("min_scale"), *_xyz("max_scale")]
_COLOURS = ["min_r", "min_g", "min_b", "max_r", "max_g", "max_b"]
_COEFFICIENTS = np.where(np.arange(256) == 0, -4, np.where(np.arange(256) == 255, 4, ((np.arange(256) + 0.5) / 256 - 0.5) * 8)).astype(np.float32)


def is_compressed(ply: PlyHeader) -> bool:
    vertex = ply.element("vertex")
    return vertex is not None and "packed_position" in vertex.types


def read(path: str | os.PathLike, file: BinaryIO, ply: PlyHeader, report: Report = silent) -> Fields:
    """The scene of a file whose header was read. Rows that are not finite are dropped and counted to `report`. Raises BadFile."""
    if ply.order != "<":
        raise BadFile(path, "format", "a compressed PLY is binary_little_endian")
    vertex, chunk, sh = ply.element("vertex"), ply.element("chunk"), ply.element("sh")
    assert vertex is not None       # is_compressed() has seen it
    if chunk is None:
        raise BadFile(path, "header", "no element chunk: the ranges of the packed numbers are missing")
    n, chunks = vertex.count, -(-vertex.count // CHUNK)
    if chunk.count != chunks:
        raise BadFile(path, "element chunk", f"{chunk.count} chunks for {n} Gaussians; expected {chunks}, one for each {CHUNK}")
    if sh is not None and sh.count != n:
        raise BadFile(path, "element sh", f"{sh.count} rows for {n} Gaussians")
    rest = 0 if sh is None else rest_size(path, sh)
    ply.require_data(path, file)

    def table(element, names: list[str], kind: str) -> Array:
        """The numbers of an element whose properties are exactly these, in order, all of one type."""
        if element.has_list or list(element.types.items()) != [(name, kind) for name in names]:
            raise BadFile(path, f"element {element.name}", f"expected the properties {names[0]} .. {names[-1]} ({len(names)}) of type {kind}, "
                          f"found {', '.join(element.types)[:60]} ({len(element.types)})")
        file.seek(ply.offset(path, element.name))
        data = exactly(path, file, element.count * len(names) * int(kind[1]))
        return np.frombuffer(data, "<" + kind).reshape(element.count, len(names))
    ranges = table(chunk, [*_RANGES, *_COLOURS] if "min_r" in chunk.types else _RANGES, "f4")
    packed = table(vertex, _PACKED, "u4")
    coefficients = table(sh, numbered("f_rest", rest), "u1") if rest else None
    if ranges.shape[1] == len(_RANGES):     # colours as they are
        ranges = np.concatenate([ranges, np.tile(np.array([0, 0, 0, 1, 1, 1], np.float32), (chunks, 1))], axis=1)
    fields = empty(n, {0: 0, 9: 1, 24: 2, 45: 3}[rest])
    with np.errstate(over="ignore", invalid="ignore"):      # hostile ranges: their rows are dropped
        for first in range(0, n, ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            mine = ranges[first // CHUNK:(first + ROWS_AT_ONCE) // CHUNK]
            _unpack(rows(fields, part), packed[part], mine, None if coefficients is None else coefficients[part])
    return finished(path, fields, report)


def _unpack(out: Fields, packed: Array, ranges: Array, coefficients: Array | None) -> None:
    n = len(packed)
    ends = np.repeat(ranges, CHUNK, axis=0)[:n].astype(np.float64)
    between = lambda t, at: ends[:, at:at + 3] * (1 - t) + ends[:, at + 3:at + 6] * t
    out["means"][:] = between(_thirds(packed[:, 0]), 0)
    out["log_scales"][:] = between(_thirds(packed[:, 2]), 6)
    colour = np.stack([packed[:, 3] >> s & 255 for s in (24, 16, 8)], axis=1) / 255
    out["sh"][:, 0] = (between(colour, 12) - 0.5) / SH_C0
    out["logit_opacities"][:] = LOGITS[packed[:, 3] & 255]
    others = (np.stack([packed[:, 1] >> s & 1023 for s in (20, 10, 0)], axis=1) / 1023 - 0.5) * np.sqrt(2)
    out["quats"][:] = with_largest(packed[:, 1] >> 30, others)
    if coefficients is not None:
        out["sh"][:, 1:] = _COEFFICIENTS[coefficients].reshape(n, 3, coefficients.shape[1] // 3).transpose(0, 2, 1)


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader, report: Report = silent) -> None:
    """Writes the rows in Morton order, so that the ranges of a chunk are narrow: a step of a position is 1/2047 of its chunk's extent (y: 1/1023).

    Log scales are clamped to [-20, 20], SH coefficients of degree 1 and more to [-4, 4] in 256 steps.
    """
    n, rest = count_of(fields), 3 * (fields["sh"].shape[1] - 1)
    order, chunks = morton_order(fields["means"]), -(-n // CHUNK)
    lines = [*comment_lines(header), f"element chunk {chunks}", *(f"property float {name}" for name in [*_RANGES, *_COLOURS]),
             f"element vertex {n}", *(f"property uint {name}" for name in _PACKED),
             *([f"element sh {n}", *(f"property uchar {name}" for name in numbered("f_rest", rest))] if rest else [])]
    tables: tuple[list[bytes], ...] = [], [], []
    for first in range(0, n, ROWS_AT_ONCE):
        for table, part in zip(tables, _pack(rows(fields, order[first:first + ROWS_AT_ONCE]))):
            table.append(part.tobytes())
    with replacing(path) as file:
        file.write(header_bytes(lines))
        for table in tables:
            file.writelines(table)


def _pack(f: Fields) -> tuple[Array, Array, Array]:
    """Ranges, packed numbers and SH bytes of some whole chunks and the last one."""
    n = count_of(f)
    values = np.concatenate([f["means"], np.clip(f["log_scales"], -20, 20), f["sh"][:, 0] * np.float32(SH_C0) + np.float32(0.5)], axis=1)
    starts = np.arange(0, n, CHUNK)
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    ranges = np.concatenate([np.concatenate([low[:, i:i + 3], high[:, i:i + 3]], axis=1) for i in (0, 3, 6)], axis=1).astype("<f4")
    extent = high.astype(np.float64) - low
    which = np.arange(n) // CHUNK
    t = (values.astype(np.float64) - low[which]) / np.where(extent > 0, extent, 1)[which]
    step = lambda column, bits: np.rint(column * ((1 << bits) - 1)).astype(np.uint32)
    packed = np.empty((n, 4), "<u4")
    for to, at in ((0, 0), (2, 3)):
        packed[:, to] = step(t[:, at], 11) << 21 | step(t[:, at + 1], 10) << 11 | step(t[:, at + 2], 11)
    largest, others = without_largest(unit_quats(f["quats"]))
    shares = np.clip(others / np.sqrt(2) + 0.5, 0, 1)
    packed[:, 1] = largest.astype(np.uint32) << 30 | step(shares[:, 0], 10) << 20 | step(shares[:, 1], 10) << 10 | step(shares[:, 2], 10)
    packed[:, 3] = (step(t[:, 6], 8) << 24 | step(t[:, 7], 8) << 16 | step(t[:, 8], 8) << 8 | opacity_bytes(f["logit_opacities"]))
    coefficients = np.clip(np.floor(f["sh"][:, 1:] * 32 + 128), 0, 255).astype(np.uint8).transpose(0, 2, 1).reshape(n, 3 * (f["sh"].shape[1] - 1))
    return ranges, packed, np.ascontiguousarray(coefficients)


def _thirds(v: Array) -> Array:
    """11, 10 and 11 bits, each as a share of its range."""
    return np.stack([(v >> 21) / 2047, (v >> 11 & 1023) / 1023, (v & 2047) / 2047], axis=1)
