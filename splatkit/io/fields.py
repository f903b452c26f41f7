"""A scene as NumPy arrays: what every format reads and writes. Nothing here or in the formats imports torch, which takes longer to start than most files to read."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray as Array

from ..errors import BadFile
from ..header import SceneHeader
from .reading import Report

Fields = dict[str, Array]       # Scene's fields by name, float32 in C order; features may be absent

SH_C0 = 0.28209479177387814     # colour = 1/2 + SH_C0 * sh[0]
NON_FINITE_MAX = 0.1            # of the rows may be dropped
LOG_SCALE_ZERO = -30.0          # of a scale that is stored as 0; smaller ones are not told apart where scales are used


@dataclass
class Stream:
    """A scene that comes in blocks of rows, so that one that is larger than memory can pass through."""

    header: SceneHeader
    count: int              # rows; blocks may hold fewer, where rows were not finite
    sh_degree: int
    features: int
    blocks: Iterator[Fields] = field(repr=False)


def empty(n: int, sh_degree: int, features: int = 0) -> Fields:
    """Arrays to be filled. Call this only once the file is known to hold as many rows."""
    shapes = {"means": (n, 3), "quats": (n, 4), "log_scales": (n, 3), "logit_opacities": (n,), "sh": (n, (sh_degree + 1) ** 2, 3)}
    if features:
        shapes["features"] = (n, features)
    return {name: np.empty(shape, np.float32) for name, shape in shapes.items()}


def count_of(fields: Fields) -> int:
    return len(fields["means"])


def degree_of(fields: Fields) -> int:
    return math.isqrt(fields["sh"].shape[1]) - 1


def rows(fields: Fields, index) -> Fields:
    return {name: value[index] for name, value in fields.items()}


def finite_rows(fields: Fields) -> Array | None:
    """Which rows hold no NaN and no infinity; None: all, which is found without looking at rows."""
    if all(value.size == 0 or math.isfinite(value.min()) and math.isfinite(value.max()) for value in fields.values()):
        return None
    finite = np.ones(count_of(fields), bool)
    for value in fields.values():
        finite &= np.isfinite(value).all(axis=tuple(range(1, value.ndim)))
    return finite


def finished(path, fields: Fields, report: Report, row: str = "Gaussian") -> Fields:
    """The rows without those that hold a NaN or an infinity, which `report` counts. Raises BadFile where they are more than a tenth."""
    finite = finite_rows(fields)
    if finite is None:
        return fields
    n, dropped = len(finite), len(finite) - int(finite.sum())
    refuse_if_many(path, dropped, n, f"{row} {int(finite.argmin())}", report)
    return rows(fields, finite)


def refuse_if_many(path, dropped: int, n: int, where: str, report: Report) -> None:
    """Says how many of n rows were dropped. Raises BadFile where they are more than a tenth: then the file is damaged, or it is something else."""
    if dropped > NON_FINITE_MAX * n:
        raise BadFile(path, where, f"{dropped} of {n} Gaussians hold a NaN or an infinity")
    if dropped:
        report(f"{path}: {dropped} of {n} Gaussians held a NaN or an infinity and were dropped")
