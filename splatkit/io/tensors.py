"""Scenes in safetensors, our own form: the fields of Scene by name, features too, and the header as text. Lossless, and read by any tool that reads tensors."""
from __future__ import annotations

import json
import math
import os
import struct

import numpy as np

from ..errors import BadFile
from ..header import SceneHeader
from .atomic import replacing
from .fields import Fields, finished
from .header import from_json, to_json
from .reading import Report, exactly, opened, silent, size_of, strict_json

HEADER_MAX = 1 << 20
_WIDTHS = {"means": (3,), "quats": (4,), "log_scales": (3,), "logit_opacities": (), "sh": (None, 3), "features": (None,)}
_KINDS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader, report: Report = silent) -> None:
    """Writes float32, every field in one piece. Raises OSError when the disk refuses."""
    table: dict[str, dict] = {"__metadata__": {"splatkit": to_json(header)}}
    end = 0
    for name, value in fields.items():
        table[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(table).encode("ascii")
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in fields.values():
            file.write(np.ascontiguousarray(value, "<f4").data)


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """The scene and its header. Rows that are not finite are dropped and counted to `report`. Raises BadFile."""
    with opened(path) as file:
        size = size_of(file)
        (length,) = struct.unpack("<Q", exactly(path, file, 8))
        if length > min(HEADER_MAX, size - 8):
            raise BadFile(path, "byte 0", f"a header of {length} bytes; at most {min(HEADER_MAX, size - 8)} can be there")
        table = strict_json(path, "header", file.read(length))
        said = table.pop("__metadata__", {})
        if missing := sorted(_WIDTHS.keys() - {"features"} - table.keys()):
            raise BadFile(path, "header", f"no tensor {missing[0]}: not a scene of splatkit (a checkpoint of a run is opened by naming its folder)")
        try:
            header = from_json(said["splatkit"]) if isinstance(said, dict) and isinstance(said.get("splatkit"), str) else SceneHeader()
        except ValueError as e:
            raise BadFile(path, "__metadata__.splatkit", str(e)) from e
        spans = {name: _span(path, name, table[name], size - 8 - length) for name in _WIDTHS if name in table}
        ends = [0, *sorted(end for _, _, _, end in spans.values())]
        if len(spans) == len(table) and [start for _, _, start, _ in sorted(spans.values(), key=lambda s: s[2:])] != ends[:-1] or max(ends) > size - 8 - length:
            raise BadFile(path, "header", "the tensors overlap or leave holes")
        if len(spans) == len(table) and max(ends) != size - 8 - length:
            raise BadFile(path, f"byte {size}", f"{size - 8 - length} bytes of data; {max(ends)} expected")
        n = spans["means"][1][0]
        fields = {}
        for name, (kind, shape, start, end) in spans.items():
            if shape[0] != n:
                raise BadFile(path, name, f"{shape[0]} rows, but means has {n}")
            file.seek(8 + length + start)
            with np.errstate(over="ignore"):
                fields[name] = np.frombuffer(exactly(path, file, end - start), kind).reshape(shape).astype(np.float32)
    degree = math.isqrt(fields["sh"].shape[1])
    if degree ** 2 != fields["sh"].shape[1] or not 1 <= degree <= 4:
        raise BadFile(path, "sh", f"{fields['sh'].shape[1]} coefficients; expected 1, 4, 9 or 16")
    return finished(path, fields, report), header


def _span(path, name: str, entry, data: int) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, start and end of a tensor, which are right for each other and lie in the file."""
    try:
        kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError) as e:
        raise BadFile(path, f"header, {name}"[:80], "expected dtype, shape and data_offsets") from e
    if not isinstance(kind, str) or kind not in _KINDS:
        raise BadFile(path, name, f"dtype {kind!r:.20}; expected {', '.join(_KINDS)}")
    if any(type(x) is not int or x < 0 for x in numbers) or not 0 <= start <= end <= data:
        raise BadFile(path, name, f"shape {shape!r:.60} at bytes {start!r:.20} to {end!r:.20} of {data}")
    expected = _WIDTHS[name]
    if len(shape) != 1 + len(expected) or any(e is not None and s != e for s, e in zip(shape[1:], expected)):
        raise BadFile(path, name, f"shape {shape!r:.60}; expected N, {', '.join('any' if e is None else str(e) for e in expected)}")
    if math.prod(shape) * np.dtype(_KINDS[kind]).itemsize != end - start:
        raise BadFile(path, name, f"shape {shape!r:.60} of {kind} does not take {end - start} bytes")
    return _KINDS[kind], tuple(shape), start, end
