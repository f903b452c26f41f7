"""The text in front of a PLY: its elements, its byte order, and what comments say about how the scene is drawn."""
from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from ..errors import BadFile
from ..header import SceneHeader
from .header import from_json, to_json
from .reading import size_of

HEADER_MAX = 64 * 1024          # bytes; room for 2,500 feature channels

# What SplatTransform (behind SuperSplat) and Brush read and write for scenes trained with the 2D Mip filter; Postshot's flag is only read.
MIP_COMMENT = "SplatRenderMode: mip"

_TYPES = {"char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
          "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8"}
_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}


@dataclass
class Element:
    name: str
    count: int
    types: dict[str, str] = field(default_factory=dict)     # numpy type by property; of a list, the type of its length
    has_list: bool = False

    def least_bytes(self, ascii: bool) -> int:
        """No file can hold the element in less: a list may be empty, a number in ASCII takes a digit and a separator."""
        return self.count * sum(2 if ascii else np.dtype(t).itemsize for t in self.types.values())

    def dtype(self, order: str) -> np.dtype:
        return np.dtype([(name, order + t) for name, t in self.types.items()])


@dataclass(frozen=True)
class PlyHeader:
    """A header that was read; require_data() says whether the file is long enough for what it claims."""

    order: str              # numpy's, "=" for ASCII
    elements: list[Element]
    scene: SceneHeader
    start: int              # byte of the data

    def element(self, name: str) -> Element | None:
        return next((e for e in self.elements if e.name == name), None)

    def require_data(self, path, file: BinaryIO) -> None:
        """Raises BadFile where the file cannot hold all elements. Call it before anything is allocated."""
        size = size_of(file)
        needed, left = sum(e.least_bytes(self.order == "=") for e in self.elements), size - self.start
        if needed > left:
            raise BadFile(path, f"byte {size}", f"the file ends early: the header asks for at least {needed} bytes of data, {left} follow")

    def offset(self, path, name: str) -> int:
        """The byte where a binary element begins. Raises BadFile where that cannot be known."""
        at = self.start
        for e in self.elements:
            if e.name == name:
                return at
            if e.has_list:
                raise BadFile(path, f"element {e.name}", f"has a list property and stands before {name}, so where {name} begins is unknown")
            at += e.least_bytes(False)
        raise BadFile(path, "header", f"no element {name}")


def read_header(path: str | os.PathLike, file: BinaryIO) -> PlyHeader:
    """Raises BadFile for what is no PLY header."""
    head = file.read(HEADER_MAX)
    if not head.startswith((b"ply\n", b"ply\r\n")):
        raise BadFile(path, "byte 0", "not a PLY file" if head else "the file is empty")
    end = re.search(rb"\nend_header[ \t]*\r?\n", head)
    if end is None:
        raise BadFile(path, "header", f"no end_header line in the first {len(head)} bytes")
    order, elements, comments = _parse(path, head[:end.start()])
    header = _scene_header(path, comments)
    return PlyHeader(order, elements, header, end.end())


def comment_lines(header: SceneHeader) -> list[str]:
    """What says how the scene is drawn, for us and for other programs."""
    return [f"comment splatkit {to_json(header)}", *([f"comment {MIP_COMMENT}"] if header.settings.get("antialias") else [])]


def header_bytes(lines: list[str], features: int = 0) -> bytes:
    """The text of a little-endian PLY with these lines after its format. Raises ValueError where no reader would take it."""
    text = "\n".join(["ply", "format binary_little_endian 1.0", *lines, "end_header\n"]).encode("ascii")
    if len(text) > HEADER_MAX:
        raise ValueError(f"the PLY header would take {len(text)} bytes, {HEADER_MAX} is the most; "
                         f"write fewer than {features} feature channels or a shorter header.source")
    return text


def numbered(group: str, count: int) -> list[str]:
    return [f"{group}_{i}" for i in range(count)]


def group_size(path, element: Element, group: str) -> int:
    """How many properties group_0, group_1, ... the element has. Raises BadFile where one is missing in between."""
    names = {name for name in element.types if re.fullmatch(group + "_[0-9]+", name)}
    if missing := [name for name in numbered(group, len(names)) if name not in names]:
        raise BadFile(path, "header", f"{len(names)} properties {group}_* but no {missing[0]}")
    return len(names)


def rest_size(path, element: Element) -> int:
    count = group_size(path, element, "f_rest")
    if count not in (0, 9, 24, 45):
        raise BadFile(path, "header", f"{count} properties f_rest_*; expected 0, 9, 24 or 45 (SH degree 0 to 3)")
    return count


def _parse(path, text: bytes) -> tuple[str, list[Element], list[str]]:
    order, comments = None, []
    elements: list[Element] = []
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
                elements.append(Element(name, int(count)))
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
