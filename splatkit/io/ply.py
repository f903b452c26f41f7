"""PLY in the layout of Kerbl et al. 2023 (INRIA), which every splat viewer reads."""
from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import torch

from ..capture import SceneHeader
from ..errors import BadFile
from ..scene import Scene
from .atomic import replacing
from .header import UNSAID, from_json, to_json
from .reading import Report, opened, silent, size_of

HEADER_MAX = 64 * 1024          # bytes; room for 2,500 feature channels
NON_FINITE_MAX = 0.1            # of the rows may be dropped
ROWS_AT_ONCE = 16384            # a block of rows stays in the cache while its columns are picked

# What SplatTransform (behind SuperSplat) and Brush read and write for scenes trained with the 2D Mip filter; Postshot's flag is only read.
MIP_COMMENT = "SplatRenderMode: mip"

_TYPES = {"char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
          "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8"}
_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}


def write(path: str | os.PathLike, scene: Scene, header: SceneHeader = UNSAID) -> None:
    """Writes float32, little endian; features become the properties feat_0, feat_1, ...

    Raises ValueError for a value that is not finite or a header over 64 KiB, OSError when the disk refuses; then the old file stays.
    """
    scene = scene.detach().to("cpu", torch.float32)
    scene.check_finite()
    rest = 3 * (scene.sh.shape[1] - 1)
    n_features = 0 if scene.features is None else scene.features.shape[1]
    names = ["x", "y", "z", "nx", "ny", "nz", *_numbered("f_dc", 3), *_numbered("f_rest", rest), "opacity", *_numbered("scale", 3),
             *_numbered("rot", 4), *_numbered("feat", n_features)]
    lines = ["ply", "format binary_little_endian 1.0", f"comment splatkit {to_json(header)}",
             *([f"comment {MIP_COMMENT}"] if header.settings.get("antialias") else []),
             f"element vertex {len(scene)}", *(f"property float {name}" for name in names), "end_header\n"]
    text = "\n".join(lines).encode("ascii")
    if len(text) > HEADER_MAX:
        raise ValueError(f"the PLY header would take {len(text)} bytes, {HEADER_MAX} is the most; "
                         f"write fewer than {n_features} feature channels or a shorter header.source")
    fields = {name: value.numpy() for name, value in scene.fields().items()}
    with replacing(path) as file:
        file.write(text)
        for start in range(0, len(scene), ROWS_AT_ONCE):
            f = {name: value[start:start + ROWS_AT_ONCE] for name, value in fields.items()}
            n = len(f["means"])
            columns = [f["means"], np.zeros((n, 3), np.float32), f["sh"][:, 0], f["sh"][:, 1:].transpose(0, 2, 1).reshape(n, rest),
                       f["logit_opacities"][:, None], f["log_scales"], f["quats"], *([f["features"]] if n_features else [])]
            file.write(np.concatenate(columns, axis=1).astype("<f4", copy=False).data)


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Scene, SceneHeader]:
    """The scene (float32) and its header. Rows that are not finite are dropped and counted to `report`.

    Takes properties in any order and of any scalar type, normals or none, SH degree 0 to 3, ASCII and both byte orders, other
    elements beside `vertex`, bytes after the data. Raises BadFile(path, where, why) for anything else.
    """
    with opened(path) as file:
        head = file.read(HEADER_MAX)
        if not head.startswith((b"ply\n", b"ply\r\n")):
            raise BadFile(path, "byte 0", "not a PLY file" if head else "the file is empty")
        end = re.search(rb"\nend_header[ \t]*\r?\n", head)
        if end is None:
            raise BadFile(path, "header", f"no end_header line in the first {len(head)} bytes")
        order, elements, comments = _parse_header(path, head[:end.start()])
        header = _scene_header(path, comments)
        layout = _layout(path, elements)
        file.seek(end.end())
        records = _vertex_records(path, file, order, elements)
    return _scene(path, records, *layout, report), header


@dataclass
class _Element:
    name: str
    count: int
    types: dict[str, str] = field(default_factory=dict)     # numpy type by property; of a list, the type of its length
    has_list: bool = False

    def least_bytes(self, ascii: bool) -> int:
        """No file can hold the element in less: a list may be empty, a number in ASCII takes a digit and a separator."""
        return self.count * sum(2 if ascii else np.dtype(t).itemsize for t in self.types.values())


def _parse_header(path, text: bytes) -> tuple[str, list[_Element], list[str]]:
    order, elements, comments = None, [], []
    for number, line in enumerate(text.decode("latin-1").split("\n")[1:], start=2):
        words, where = line.split(), f"line {number}"
        match words:
            case ["comment" | "obj_info", *_]:
                comments.append(line.strip().partition(" ")[2])
            case ["format", name, "1.0"] if order is None and name in _ORDERS:
                order = _ORDERS[name]
            case ["element", name, count] if re.fullmatch(r"[0-9]{1,18}", count):
                if any(e.name == name for e in elements):
                    raise BadFile(path, where, f"element {name!r:.40} is declared twice")
                elements.append(_Element(name, int(count)))
            case ["property", *kinds, name] if elements and (
                    len(kinds) == 1 and kinds[0] in _TYPES or len(kinds) == 3 and kinds[0] == "list" and {*kinds[1:]} <= _TYPES.keys()):
                if name in elements[-1].types:
                    raise BadFile(path, where, f"property {name!r:.40} is declared twice")
                elements[-1].types[name] = _TYPES[kinds[-1] if len(kinds) == 1 else kinds[1]]
                elements[-1].has_list |= len(kinds) == 3
            case _:
                raise BadFile(path, where, f"not a PLY header line: {line!r:.80}")
    if order is None:
        raise BadFile(path, "header", "no format line")
    return order, elements, comments


def _scene_header(path, comments: list[str]) -> SceneHeader:
    antialias = False
    for comment in comments:
        if comment.startswith("splatkit {"):
            try:
                return from_json(comment.removeprefix("splatkit "))
            except ValueError as e:     # drawing with settings we could not read would be silently wrong
                raise BadFile(path, "comment splatkit", str(e)) from e
        foreign = comment.lower().split()
        if foreign[:1] in (["splatrendermode:"], ["antialiased"]):      # the last one counts, as in SplatTransform
            antialias = foreign[1:] in (["mip"], ["1"])
    return SceneHeader(settings={"antialias": True} if antialias else {})


def _layout(path, elements: list[_Element]) -> tuple[int, int]:
    """(f_rest properties, feature channels) of the vertex element; BadFile names what is missing."""
    vertex = next((e for e in elements if e.name == "vertex"), None)
    if vertex is None:
        raise BadFile(path, "header", "no element vertex")
    if "packed_position" in vertex.types:
        raise BadFile(path, "property packed_position", "a compressed PLY is not read yet; decompress it first (SplatTransform does)")
    if vertex.has_list:
        raise BadFile(path, "element vertex", "has a list property; expected one number per property")
    for name in ("x", "y", "z", *_numbered("f_dc", 3), "opacity", *_numbered("scale", 3), *_numbered("rot", 4)):
        if name not in vertex.types:
            raise BadFile(path, "header", f"no property {name}: not a Gaussian splat scene")
    counts = []
    for group in ("f_rest", "feat"):
        names = {name for name in vertex.types if re.fullmatch(group + "_[0-9]+", name)}
        if missing := [name for name in _numbered(group, len(names)) if name not in names]:
            raise BadFile(path, "header", f"{len(names)} properties {group}_* but no {missing[0]}")
        counts.append(len(names))
    if counts[0] not in (0, 9, 24, 45):
        raise BadFile(path, "header", f"{counts[0]} properties f_rest_*; expected 0, 9, 24 or 45 (SH degree 0 to 3)")
    return counts[0], counts[1]


def _vertex_records(path, file: BinaryIO, order: str, elements: list[_Element]) -> np.ndarray:
    """The rows of element `vertex` as a structured array with one field per property."""
    ascii, size = order == "=", size_of(file)
    needed, left = sum(e.least_bytes(ascii) for e in elements), size - file.tell()
    if needed > left:
        raise BadFile(path, f"byte {size}", f"the file ends early: the header asks for at least {needed} bytes of data, {left} follow")
    before = list(itertools.takewhile(lambda e: e.name != "vertex", elements))
    vertex = elements[len(before)]
    if ascii:
        return _ascii_records(path, file, vertex, skip=sum(e.count for e in before if e.types))
    for e in before:
        if e.has_list:
            raise BadFile(path, f"element {e.name}", "has a list property and stands before vertex, so where vertex begins is unknown")
    file.seek(sum(e.least_bytes(False) for e in before), os.SEEK_CUR)
    dtype = np.dtype([(name, order + t) for name, t in vertex.types.items()])
    return np.frombuffer(file.read(vertex.count * dtype.itemsize), dtype)


def _ascii_records(path, file: BinaryIO, vertex: _Element, skip: int) -> np.ndarray:
    """One line per row, as every writer does it."""
    dtype, last = np.dtype([(name, "f8") for name in vertex.types]), b""

    def rows():
        nonlocal last
        for last in itertools.islice((line for line in file if not line.isspace()), skip, skip + vertex.count):
            yield last.decode("latin-1")
    lines = rows()
    first = list(itertools.islice(lines, 1))
    if not first and vertex.count:
        raise BadFile(path, f"byte {size_of(file)}", f"the file ends early: {vertex.count} vertices expected, none found")
    if not first:
        return np.empty(0, dtype)       # numpy would warn
    try:
        table = np.loadtxt(itertools.chain(first, lines), dtype=np.float64, comments=None, ndmin=2)
    except ValueError as e:
        raise BadFile(path, "vertex data", f"not a table of numbers: {e}"[:300]) from e
    if table.shape != (vertex.count, len(vertex.types)):
        found = " of ".join(map(str, table.shape))
        raise BadFile(path, "vertex data", f"{vertex.count} rows of {len(vertex.types)} numbers expected, found {found}")
    if not last.endswith(b"\n"):        # a number cut in two would still read as a number
        raise BadFile(path, f"byte {size_of(file)}", "the last vertex has no line end: the file was cut")
    return table.view(dtype)[:, 0]


def _scene(path, records: np.ndarray, n_rest: int, n_features: int, report: Report) -> Scene:
    n, rest = len(records), n_rest // 3
    fields = {"means": np.empty((n, 3), np.float32), "quats": np.empty((n, 4), np.float32), "log_scales": np.empty((n, 3), np.float32),
              "logit_opacities": np.empty(n, np.float32), "sh": np.empty((n, 1 + rest, 3), np.float32)}
    if n_features:
        fields["features"] = np.empty((n, n_features), np.float32)
    sources = {"means": list("xyz"), "quats": _numbered("rot", 4), "log_scales": _numbered("scale", 3)}
    columns = [(fields[key][:, i], name) for key, names in sources.items() for i, name in enumerate(names)]
    columns += [(fields["features"][:, i], name) for i, name in enumerate(_numbered("feat", n_features))]
    columns += [(fields["logit_opacities"], "opacity"), *((fields["sh"][:, 0, c], f"f_dc_{c}") for c in range(3))]
    columns += [(fields["sh"][:, 1 + k, c], f"f_rest_{c * rest + k}") for c in range(3) for k in range(rest)]
    with np.errstate(over="ignore", invalid="ignore"):      # a double beyond float32 becomes an infinity, and its row is dropped
        for start in range(0, n, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            for column, name in columns:
                column[rows] = records[name][rows]
    finite = np.ones(n, bool)
    for value in fields.values():
        finite &= np.isfinite(value).all(axis=tuple(range(1, value.ndim)))
    if dropped := n - int(finite.sum()):
        if dropped > NON_FINITE_MAX * n:
            raise BadFile(path, f"vertex {int(finite.argmin())}", f"{dropped} of {n} Gaussians hold a NaN or an infinity")
        report(f"{path}: {dropped} of {n} Gaussians held a NaN or an infinity and were dropped")
        fields = {name: value[finite] for name, value in fields.items()}
    return Scene(**{name: torch.from_numpy(value) for name, value in fields.items()})


def _numbered(group: str, count: int) -> list[str]:
    return [f"{group}_{i}" for i in range(count)]
