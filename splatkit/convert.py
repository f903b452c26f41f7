"""Scene files looked at (`splatkit info`) and changed into one another (`splatkit convert`), block by block where both formats allow. Works on arrays, without torch."""
from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from .header import SceneHeader
from .io import formats
from .io.fields import SH_C0, Fields, Stream, count_of, degree_of, finite_rows, rows
from .io.packing import opacities
from .io.reading import Report, silent
from .io.turning import moved

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_FILTER = re.compile(r"\s*([a-z]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
COLUMNS = {     # what a filter may ask of a Gaussian
    "opacity": lambda f: opacities(f["logit_opacities"]),
    "scale": lambda f: np.exp(np.clip(f["log_scales"].max(axis=1), -30, 30)),       # the largest of its three
    "x": lambda f: f["means"][:, 0], "y": lambda f: f["means"][:, 1], "z": lambda f: f["means"][:, 2],
}


@dataclass(frozen=True)
class Changes:
    """What is done to a scene on its way. Filters and crop are about the scene as it lies in its file; then it is scaled, turned and shifted."""

    sh_degree: int | None = None
    max_gaussians: int | None = None        # those of the largest opacity times area are kept
    crop: tuple[float, float, float, float, float, float] | None = None     # lowest x y z, highest x y z
    filters: tuple[str, ...] = ()           # as "opacity>=0.1"
    scale: float = 1.0
    rotate: tuple[float, float, float] = (0.0, 0.0, 0.0)    # degrees around x, then y, then z
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self):
        if self.sh_degree is not None and not 0 <= self.sh_degree <= 3:
            raise ValueError(f"SH degree {self.sh_degree}; expected 0 to 3")
        if self.max_gaussians is not None and self.max_gaussians < 1:
            raise ValueError(f"at most {self.max_gaussians} Gaussians; expected 1 or more")
        if not 0 < self.scale < math.inf or not all(map(math.isfinite, (*self.rotate, *self.shift))):
            raise ValueError(f"scale {self.scale}, rotate {self.rotate}, shift {self.shift}; expected a scale above 0 and finite numbers")
        if self.crop and not all(a < b for a, b in zip(self.crop[:3], self.crop[3:])):
            raise ValueError(f"crop {self.crop}; expected the lowest x y z and then the highest")
        for text in self.filters:
            _condition(text)

    @property
    def matrix(self) -> Array:
        """4x4: how the scene is moved."""
        out = np.eye(4)
        for axis, degrees in enumerate(self.rotate):
            c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            i, j = [(1, 2), (2, 0), (0, 1)][axis]
            turn = np.eye(4)
            turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
            out = turn @ out
        out[:3, :3] *= self.scale
        out[:3, 3] = self.shift
        return out

    def kept(self, f: Fields) -> Array | slice:
        """Which rows crop and filters leave."""
        conditions = [_condition(text) for text in self.filters]
        if self.crop:
            conditions += [(COLUMNS[axis], compare, limit) for axis, low, high in zip("xyz", self.crop[:3], self.crop[3:])
                           for compare, limit in ((operator.ge, low), (operator.le, high))]
        if not conditions:
            return slice(None)
        return np.logical_and.reduce([compare(column(f), limit) for column, compare, limit in conditions])

    def of(self, f: Fields) -> Fields:
        """The rows with fewer SH coefficients, where it asks for that, and moved. Raises ValueError where they do not stay finite."""
        if self.sh_degree is not None:
            f = {**f, "sh": np.ascontiguousarray(f["sh"][:, :(self.sh_degree + 1) ** 2])}
        matrix = self.matrix
        if (matrix != np.eye(4)).any():
            f = moved(f, matrix)
            if finite_rows(f) is not None:
                raise ValueError("moved so, positions or sizes leave the range of float32; use smaller numbers")
        return f

    def header(self, header: SceneHeader) -> SceneHeader:
        """How the moved scene must be drawn: lengths are scaled, and up is turned."""
        settings = {name: value * self.scale if name == "near" else value for name, value in header.settings.items()}
        up = None if header.up is None else tuple((self.matrix[:3, :3] / self.scale @ np.array(header.up)).tolist())
        return dataclasses.replace(header, settings=settings, up=up, metric=header.metric and self.scale == 1)


def _condition(text: str):
    found = _FILTER.fullmatch(text)
    try:
        if found and found[1] in COLUMNS:
            return COLUMNS[found[1]], _OPERATORS[found[2]], float(found[3])
    except ValueError:
        pass
    raise ValueError(f"filter {text!r}; expected one of {', '.join(COLUMNS)}, then <, <=, > or >=, then a number, as in opacity>=0.1")


def weight(f: Fields) -> Array:
    """How much a Gaussian can show: opacity times the product of its two larger scales."""
    large = np.sort(f["log_scales"], axis=1)[:, 1:].sum(axis=1)
    return opacities(f["logit_opacities"]) * np.exp(np.clip(large, -60, 60))


def scene_file(path: Path) -> Path:
    """The scene of a run folder; any other path is one itself."""
    return path / "scene.ply" if (path / "scene.ply").is_file() else path


def convert(source: Path, target: Path, changes: Changes = Changes(), report: Report = silent, **options) -> int:
    """Writes the scene of `source` as `target` and returns its number of Gaussians. `report` hears what is dropped and what has no room.

    Options are those of the target's format. Raises ValueError where nothing is left, and as io.load() and io.save().
    """
    source = scene_file(source)
    reader, writer = formats.of_file(source), formats.of_name(target)
    if reader.read_stream and writer.write_stream and not options:
        stream = reader.read_stream(source, report)
        if stream is not None:
            return _convert_stream(source, target, stream, lambda: reader.read_stream(source), writer, changes, report)
    fields, header = reader.read(source, report)
    found = count_of(fields)
    fields = rows(fields, changes.kept(fields))
    if changes.max_gaussians and count_of(fields) > changes.max_gaussians:
        fields = rows(fields, _most(weight(fields), changes.max_gaussians))
    _refuse_nothing(found, count_of(fields))
    formats.write(target, changes.of(fields), changes.header(header), report, **options)
    return count_of(fields)


def _convert_stream(source: Path, target: Path, stream: Stream, again, writer: formats.Format, changes: Changes, report: Report) -> int:
    chosen = None
    if changes.max_gaussians:
        weights = np.concatenate([np.zeros(0), *(weight(rows(f, changes.kept(f))) for f in stream.blocks)])
        if len(weights) > changes.max_gaussians:
            chosen = _most(weights, changes.max_gaussians)
        stream = again()        # what it says was said
    degree = stream.sh_degree if changes.sh_degree is None else min(stream.sh_degree, changes.sh_degree)
    header = changes.header(stream.header)
    lost = formats.lost_by(writer, degree, stream.features > 0, header)
    if lost:
        report(f"{target}: {writer.name} has no room for {', '.join(lost)}")

    def blocks() -> Iterator[Fields]:
        seen = found = written = 0
        for f in stream.blocks:
            found += count_of(f)
            f = rows(f, changes.kept(f))
            n = count_of(f)
            if chosen is not None:
                f = rows(f, chosen[np.searchsorted(chosen, seen):np.searchsorted(chosen, seen + n)] - seen)
            seen, written = seen + n, written + count_of(f)
            if not writer.features:
                f.pop("features", None)
            yield changes.of(f)
        _refuse_nothing(found, written)
    features = stream.features if writer.features else 0
    assert writer.write_stream is not None
    return writer.write_stream(target, Stream(header, stream.count, degree, features, blocks()))


def _most(weights: Array, count: int) -> Array:
    """The rows of the largest weights, in their order."""
    return np.sort(np.argpartition(weights, len(weights) - count)[len(weights) - count:])


def _refuse_nothing(found: int, left: int) -> None:
    if found and not left:
        raise ValueError(f"of {found} Gaussians crop and filters leave none; nothing is written")


def describe(path: Path, report: Report = silent) -> str:
    """The text of `splatkit info`. Raises BadFile, and ValueError for an unknown format."""
    path = scene_file(path)
    fields, header = formats.read(path, report)
    n, form = count_of(fields), formats.of_file(path).name
    bytes_ = sum(p.stat().st_size for p in path.glob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    lines = [f"file        {path}: {form}, {bytes_ / 1e6:.2f} MB" + (f", {bytes_ / n:.1f} bytes a Gaussian" if n else ""),
             f"Gaussians   {n:,}, SH degree {degree_of(fields)}"]
    if "features" in fields:
        lines.append(f"features    {fields['features'].shape[1]} channels")
    if n:
        means, scales, opacity = fields["means"].astype(np.float64), np.exp(np.clip(fields["log_scales"].astype(np.float64), -30, 30)), opacities(fields["logit_opacities"])
        colour = 0.5 + SH_C0 * fields["sh"][:, 0].mean(axis=0, dtype=np.float64)
        inner = np.quantile(means[:: max(1, n // 200_000)], (0.05, 0.95), axis=0)
        three = lambda x: "  ".join(f"{v:.5g}" for v in x)
        lines += [f"lowest      {three(means.min(axis=0))}", f"highest     {three(means.max(axis=0))}", f"mean        {three(means.mean(axis=0))}",
                  f"inner 90 %  {three(inner[0])}  to  {three(inner[1])}",
                  f"scales      median {three(np.median(scales, axis=0))}, largest {scales.max():.5g}",
                  f"opacity     mean {opacity.mean():.4f}, median {np.median(opacity):.4f}; {100 * (opacity < 0.05).mean():.1f} % below 0.05",
                  f"colour      mean {three(colour)}"]
    drawn = ["antialiased (2D Mip filter)" if header.settings.get("antialias") else "as Kerbl et al. 2023"]
    drawn += [f"{name} {value:g}" for name, value in sorted(header.settings.items()) if name != "antialias"]
    lines.append(f"drawn       {', '.join(drawn)}")
    if header.up is not None:
        lines.append(f"up          {'  '.join(f'{v:.4g}' for v in header.up)}")
    if header.source or header.step:
        lines.append(f"made        {'from ' + header.source if header.source else ''}{', ' if header.source and header.step else ''}{f'{header.step:,} steps' if header.step else ''}")
    return "\n".join(line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line) for line in lines)
