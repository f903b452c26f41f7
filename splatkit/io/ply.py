"""PLY in the layout of Kerbl et al. 2023 (INRIA), which every splat viewer reads."""
from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy import ndarray as Array

from ..errors import BadFile
from ..header import SceneHeader
from . import compressed_ply
from .atomic import replacing
from .fields import Fields, Stream, count_of, degree_of, empty, finished, finite_rows, refuse_if_many, rows
from .ply_header import Element, PlyHeader, comment_lines, group_size, header_bytes, numbered, read_header, rest_size
from .reading import Report, exactly, opened, silent, size_of

ROWS_AT_ONCE = 2048         # a block of rows stays in the cache while its columns are picked
STREAM_ROWS = 16 * ROWS_AT_ONCE


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader, report: Report = silent) -> None:
    """Writes float32, little endian; features become the properties feat_0, feat_1, ...

    Raises ValueError for a header over 64 KiB, OSError when the disk refuses; then the old file stays.
    """
    features = fields["features"].shape[1] if "features" in fields else 0
    n = count_of(fields)
    blocks = (rows(fields, slice(start, start + STREAM_ROWS)) for start in range(0, n, STREAM_ROWS))
    write_stream(path, Stream(header, n, degree_of(fields), features, blocks))


def write_stream(path: str | os.PathLike, stream: Stream) -> int:
    """Writes the blocks one after the other; returns how many rows came. Raises as write()."""
    rest = 3 * ((stream.sh_degree + 1) ** 2 - 1)
    names = ["x", "y", "z", "nx", "ny", "nz", *numbered("f_dc", 3), *numbered("f_rest", rest), "opacity", *numbered("scale", 3), *numbered("rot", 4),
             *numbered("feat", stream.features)]

    def text(n: int, length: int = 0) -> bytes:
        first, *more = comment_lines(stream.header)
        lines = lambda: [first, *more, f"element vertex {n}", *(f"property float {name}" for name in names)]
        short = header_bytes(lines(), stream.features)
        first += " " * (length - len(short))
        return header_bytes(lines(), stream.features) if length else short

    head, written = text(stream.count), 0
    with replacing(path) as file:
        file.write(head)
        for block in stream.blocks:
            for start in range(0, count_of(block), ROWS_AT_ONCE):
                f = rows(block, slice(start, start + ROWS_AT_ONCE))
                n = count_of(f)
                columns = [f["means"], np.zeros((n, 3), np.float32), f["sh"][:, 0], f["sh"][:, 1:].transpose(0, 2, 1).reshape(n, rest),
                           f["logit_opacities"][:, None], f["log_scales"], f["quats"], *([f["features"]] if stream.features else [])]
                file.write(np.concatenate(columns, axis=1).astype("<f4", copy=False).data)
                written += n
        if written != stream.count:
            file.seek(0)
            file.write(text(written, len(head)))    # as long as the first: its count has no more digits, and JSON may end in spaces
    return written


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """The scene and its header. Rows that are not finite are dropped and counted to `report`.

    Takes properties in any order and of any scalar type, normals or none, SH degree 0 to 3, ASCII and both byte orders, other
    elements beside `vertex`, bytes after the data; and the compressed PLY. Raises BadFile(path, where, why) for anything else.
    """
    with opened(path) as file:
        ply = read_header(path, file)
        if compressed_ply.is_compressed(ply):
            return compressed_ply.read(path, file, ply, report), ply.scene
        layout = _layout(path, ply)
        ply.require_data(path, file)
        n = layout.vertex.count
        if ply.order == "=":
            records = _ascii_records(path, file, ply, layout.vertex)
            fields = empty(n, layout.sh_degree, layout.features)
            with np.errstate(over="ignore", invalid="ignore"):
                layout.fill(fields, 0, records)
            return finished(path, fields, report, "vertex"), ply.scene
        start = ply.offset(path, "vertex")
        fields = empty(n, layout.sh_degree, layout.features)

        def fill(first: int, last: int) -> bool:
            """Rows first to last; True where all are finite."""
            good, buffer = True, bytearray(min(ROWS_AT_ONCE, last - first) * layout.dtype.itemsize)
            with open(path, "rb", buffering=0) as own, np.errstate(over="ignore", invalid="ignore"):
                own.seek(start + first * layout.dtype.itemsize)
                for row in range(first, last, ROWS_AT_ONCE):
                    m = min(ROWS_AT_ONCE, last - row)
                    piece = memoryview(buffer)[:m * layout.dtype.itemsize]
                    if own.readinto(piece) != len(piece):
                        raise BadFile(path, f"byte {size_of(own)}", "the file changed while it was read")
                    layout.fill(fields, row, np.frombuffer(piece, layout.dtype))
                    good = good and finite_rows(rows(fields, slice(row, row + m))) is None
            return good
        if n <= 4 * ROWS_AT_ONCE:
            good = fill(0, n)
        else:
            half = n // 2
            with ThreadPoolExecutor(2) as pool:
                good = all(list(pool.map(fill, (0, half), (half, n))))
    return fields if good else finished(path, fields, report, "vertex"), ply.scene


def read_stream(path: str | os.PathLike, report: Report = silent) -> Stream | None:
    """The rows of a binary PLY block by block; None for a PLY that cannot be read so: ASCII or compressed. Raises BadFile, at the end also as read()."""
    with opened(path) as file:
        ply = read_header(path, file)
        if ply.order == "=" or compressed_ply.is_compressed(ply):
            return None
        layout = _layout(path, ply)
        ply.require_data(path, file)
        start = ply.offset(path, "vertex")

    def blocks() -> Iterator[Fields]:
        n, dropped, worst = layout.vertex.count, 0, 0
        with opened(path) as file:
            file.seek(start)
            for first in range(0, n, STREAM_ROWS):
                m = min(STREAM_ROWS, n - first)
                data = file.read(m * layout.dtype.itemsize)
                if len(data) != m * layout.dtype.itemsize:
                    raise BadFile(path, f"byte {size_of(file)}", "the file changed while it was read")
                records, fields = np.frombuffer(data, layout.dtype), empty(m, layout.sh_degree, layout.features)
                with np.errstate(over="ignore", invalid="ignore"):
                    for row in range(0, m, ROWS_AT_ONCE):
                        layout.fill(fields, row, records[row:row + ROWS_AT_ONCE])
                finite = finite_rows(fields)
                if finite is not None:
                    worst, dropped = first + int(finite.argmin()) if not dropped else worst, dropped + int((~finite).sum())
                    fields = rows(fields, finite)
                yield fields
        refuse_if_many(path, dropped, n, f"vertex {worst}", report)
    return Stream(ply.scene, layout.vertex.count, layout.sh_degree, layout.features, blocks())


@dataclass(frozen=True)
class _Layout:
    """Where in a record of the vertex element the numbers of a scene lie."""

    vertex: Element
    dtype: np.dtype
    sh_degree: int
    features: int
    columns: dict[str, Array]       # property numbers by field, in the order of the field's memory

    def fill(self, fields: Fields, first: int, records: Array) -> None:
        """Rows from `first` on. A double beyond float32 becomes an infinity, so that its row is dropped."""
        n, width = len(records), len(self.vertex.types)
        if records.dtype == np.dtype([(name, "f4") for name in self.vertex.types]):
            table = records.view(np.float32).reshape(n, width)
        else:
            table = np.empty((n, width), np.float32)
            for i, name in enumerate(self.vertex.types):
                table[:, i] = records[name]
        for name, columns in self.columns.items():
            np.take(table, columns, axis=1, out=fields[name][first:first + n].reshape(n, len(columns)), mode="clip")    # "raise" would buffer


def _layout(path, ply: PlyHeader) -> _Layout:
    """Raises BadFile that names what is missing."""
    vertex = ply.element("vertex")
    if vertex is None:
        raise BadFile(path, "header", "no element vertex")
    if vertex.has_list:
        raise BadFile(path, "element vertex", "has a list property; expected one number per property")
    sources = {"means": list("xyz"), "quats": numbered("rot", 4), "log_scales": numbered("scale", 3), "logit_opacities": ["opacity"]}
    for name in (*sources["means"], *numbered("f_dc", 3), "opacity", *sources["log_scales"], *sources["quats"]):
        if name not in vertex.types:
            raise BadFile(path, "header", f"no property {name}: not a Gaussian splat scene")
    rest, features = rest_size(path, vertex), group_size(path, vertex, "feat")
    sources["sh"] = [*numbered("f_dc", 3), *(f"f_rest_{c * (rest // 3) + k}" for k in range(rest // 3) for c in range(3))]
    if features:
        sources["features"] = numbered("feat", features)
    number = {name: i for i, name in enumerate(vertex.types)}
    columns = {field: np.array([number[name] for name in names]) for field, names in sources.items()}
    order = "<" if ply.order == "=" else ply.order
    return _Layout(vertex, vertex.dtype(order), {0: 0, 9: 1, 24: 2, 45: 3}[rest], features, columns)


def vertex_records(path, file: BinaryIO, ply: PlyHeader) -> Array:
    """The rows of element `vertex`, which has no list, as a structured array with one field per property. Raises BadFile."""
    ply.require_data(path, file)
    vertex = ply.element("vertex")
    assert vertex is not None
    if ply.order == "=":
        return _ascii_records(path, file, ply, vertex)
    file.seek(ply.offset(path, "vertex"))
    dtype = vertex.dtype(ply.order)
    return np.frombuffer(exactly(path, file, vertex.count * dtype.itemsize), dtype)


def _ascii_records(path, file: BinaryIO, ply: PlyHeader, vertex: Element) -> Array:
    """The rows as float64 records; one line per row, as every writer does it."""
    skip = sum(e.count for e in itertools.takewhile(lambda e: e is not vertex, ply.elements) if e.types)
    dtype, last = np.dtype([(name, "f8") for name in vertex.types]), b""
    file.seek(ply.start)

    def lines():
        nonlocal last
        for last in itertools.islice((line for line in file if not line.isspace()), skip, skip + vertex.count):
            yield last.decode("latin-1")
    every = lines()
    first = list(itertools.islice(every, 1))
    if not first and vertex.count:
        raise BadFile(path, f"byte {size_of(file)}", f"the file ends early: {vertex.count} vertices expected, none found")
    if not first:
        return np.empty(0, dtype)       # numpy would warn
    try:
        table = np.loadtxt(itertools.chain(first, every), dtype=np.float64, comments=None, ndmin=2)
    except ValueError as e:
        raise BadFile(path, "vertex data", f"not a table of numbers: {e}"[:300]) from e
    if table.shape != (vertex.count, len(vertex.types)):
        found = " of ".join(map(str, table.shape))
        raise BadFile(path, "vertex data", f"{vertex.count} rows of {len(vertex.types)} numbers expected, found {found}")
    if not last.endswith(b"\n"):        # a number cut in two would still read as a number
        raise BadFile(path, f"byte {size_of(file)}", "the last vertex has no line end: the file was cut")
    return table.view(dtype)[:, 0]
