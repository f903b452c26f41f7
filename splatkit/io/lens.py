"""Lens distortion: COLMAP's lens models, the ideal pinhole camera behind a lens, and the picture that it would have taken.

Formulas are COLMAP's (src/colmap/sensor/models.h), which are OpenCV's. Normalised coordinates are x / z and y / z.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from numpy import ndarray as Array
from numpy.polynomial import polynomial

from ..capture import Lens, Photo

_FISHEYES = {"SIMPLE_RADIAL_FISHEYE": "k", "RADIAL_FISHEYE": "k1 k2", "OPENCV_FISHEYE": "k1 k2 k3 k4"}
# OPENCV's k3 and k4 (of r^6 and r^8) are nerfstudio's; COLMAP's has none.
MODELS = {"SIMPLE_RADIAL": "k", "RADIAL": "k1 k2", "OPENCV": "k1 k2 p1 p2 k3 k4", "FULL_OPENCV": "k1 k2 p1 p2 k3 k4 k5 k6", **_FISHEYES}
LARGEST = 2.0       # the ideal picture reaches at most so much farther from the principal point than the stored one (COLMAP: max_scale)
LEAST_AREA = 0.25   # of the stored picture's, in pixels
_SLACK_PX = 1e-6    # rounding of a source that lies on the centre of a border pixel


def distort(lens: Lens, xy: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
    """Where the lens shows the ideal directions `xy`; both normalised, float64. Beyond the monotonic part of the lens it folds back."""
    x, y, q, radial, _ = _radial(lens, xy)
    p1, p2 = (lens.params.get(name, 0.0) for name in ("p1", "p2"))
    with np.errstate(all="ignore"):
        return np.stack([x * radial + 2 * p1 * x * y + p2 * (q + 2 * x * x), y * radial + p1 * (q + 2 * y * y) + 2 * p2 * x * y], axis=-1)


def undistort(lens: Lens, xy: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
    """The ideal directions that the lens shows at `xy`: distort's inverse on its monotonic part, by Newton's method to about 1e-12.

    Raises ValueError where a position has none: it lies beyond what the lens can show.
    """
    wanted = np.asarray(xy, np.float64)
    limit, radius = min(_monotonic_radius(lens), 1e6), np.linalg.norm(wanted, axis=-1)
    r = np.tan(np.linspace(0, math.atan(limit), 4096))       # a table of the radial part alone is where Newton starts
    shown = np.maximum.accumulate(np.linalg.norm(distort(lens, np.stack([r, 0 * r], axis=1)), axis=1))
    out = wanted * (np.interp(radius, shown, r) / np.maximum(radius, 1e-300))[..., None]
    for _ in range(50):
        error = wanted - distort(lens, out)
        a, b, c = _jacobian(lens, out)
        with np.errstate(all="ignore"):
            step = np.stack([c * error[..., 0] - b * error[..., 1], a * error[..., 1] - b * error[..., 0]], -1) / (a * c - b * b)[..., None]
        out = out + np.nan_to_num(step, posinf=0.0, neginf=0.0)
        norm = np.linalg.norm(out, axis=-1, keepdims=True)
        out *= np.minimum(1, limit / np.maximum(norm, 1e-300))
        if np.abs(step).max(initial=0) < 1e-13:
            break
    missed = ~(np.abs(wanted - distort(lens, out)).max(axis=-1, initial=0) <= 1e-10 * np.maximum(1, radius))
    if missed.any():
        raise ValueError(f"{missed.sum()} of {missed.size} positions lie beyond what the lens {_text(lens)} can show, "
                         f"the first at {wanted[missed][0]}")
    return out


def ideal_camera(lens: Lens) -> tuple[Float[Array, "3 3"], int, int]:
    """K, width and height of the undistorted picture: no pixel of it has its source outside of the centres of the stored pixels.

    The focal length stays. The rectangle grows from the principal point in the stored picture's proportions until it meets the border
    or the end of the lens's monotonic part, then side by side as far as it goes, at most to LARGEST. Raises ValueError where that leaves
    less than LEAST_AREA.
    """
    K, width, height = _ideal_camera(_key(lens))
    return K.copy(), width, height


def remap(pixels: Float32[Array, "h w C"], lens: Lens, K: Float[Array, "3 3"], width: int, height: int) -> Float32[Array, "H W C"]:
    """The picture that the pinhole camera (K, width, height) would have taken where `lens` took `pixels`: bilinear.

    A pixel whose source is outside of the stored picture repeats its border; the camera of ideal_camera has none.
    """
    if pixels.shape[:2] != (lens.height, lens.width):
        raise ValueError(f"the picture is {pixels.shape[1]}x{pixels.shape[0]} but its lens {lens.width}x{lens.height}")
    grid = _grid(_key(lens), tuple(K.ravel().tolist()), width, height)
    channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    out = torch.nn.functional.grid_sample(channels_first, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return np.ascontiguousarray(out[0].numpy().transpose(1, 2, 0))


def through_lens(photo: Photo, model: str, params: dict[str, float]) -> Photo:
    """`photo`, whose camera is that of the stored pixels, with the lens and the ideal camera behind it. ValueError as ideal_camera."""
    lens = Lens(model, photo.K, photo.width, photo.height, params)
    K, width, height = ideal_camera(lens)
    return dataclasses.replace(photo, K=K, width=width, height=height, lens=lens)


# The lens

def _polynomials(lens: Lens) -> tuple[list[float], list[float]]:
    """Numerator and denominator of the radial factor, ascending powers of r^2 (of the angle squared for a fisheye)."""
    if lens.model not in MODELS:
        raise ValueError(f"the lens model {lens.model} is not known; known are {', '.join(sorted(MODELS))}")
    k1, k2, k3, k4, k5, k6 = (lens.params.get(f"k{i}", 0.0) for i in range(1, 7))
    k1 = lens.params.get("k", k1)
    if lens.model == "FULL_OPENCV":
        return [1.0, k1, k2, k3], [1.0, k4, k5, k6]
    return [1.0, k1, k2, k3, k4], [1.0]


def _radial(lens: Lens, xy: Array) -> tuple[Array, Array, Array, Array, Array]:
    """x, y, q = r^2, the radial factor (a distorted point is the ideal one times it, tangential terms apart) and its derivative by q."""
    x, y = np.moveaxis(np.asarray(xy, np.float64), -1, 0)
    top, bottom = _polynomials(lens)
    with np.errstate(all="ignore"):
        q = x * x + y * y
        fisheye = lens.model in _FISHEYES
        r = np.sqrt(q)
        s = np.arctan(r) ** 2 if fisheye else q
        n, d = polynomial.polyval(s, top), polynomial.polyval(s, bottom)
        factor = n / d
        slope = (polynomial.polyval(s, polynomial.polyder(top)) - factor * polynomial.polyval(s, polynomial.polyder(bottom))) / d
        if fisheye:
            safe = np.maximum(r, 1e-4)      # below, the difference would cancel; the limit is k1 - 1/3
            bent = (factor + 2 * s * slope) / (1 + q)       # d(angle shown) / dr
            factor = np.where(r > 0, factor * np.arctan(r) / np.where(r > 0, r, 1), 1.0)
            slope = np.where(r > 1e-4, (bent - factor) / (2 * safe * safe), top[1] - 1 / 3)
    return x, y, q, factor, slope


def _jacobian(lens: Lens, xy: Array) -> tuple[Array, Array, Array]:
    """(a, b, c): the derivative of distort, [[a, b], [b, c]]; it is symmetric for every model here."""
    x, y, _, factor, slope = _radial(lens, xy)
    p1, p2 = (lens.params.get(name, 0.0) for name in ("p1", "p2"))
    with np.errstate(all="ignore"):
        return (factor + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x, 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y,
                factor + 2 * y * y * slope + 6 * p1 * y + 2 * p2 * x)


def _monotonic_radius(lens: Lens) -> float:
    """The ideal radius up to which a larger radius is shown farther out: to the first zero of the derivative, or the first pole."""
    top, bottom = (polynomial.polytrim(p, 1e-12) for p in _polynomials(lens))
    if unknown := lens.params.keys() - MODELS[lens.model].split():
        raise ValueError(f"the lens {_text(lens)} has the unknown coefficient {min(unknown)}; known are {MODELS[lens.model]}")
    if not all(abs(value) < 1e6 for value in lens.params.values()):
        raise ValueError(f"the lens {_text(lens)} has an absurd coefficient")
    cross = polynomial.polysub(polynomial.polymul(polynomial.polyder(top), bottom), polynomial.polymul(top, polynomial.polyder(bottom)))
    rising = polynomial.polyadd(polynomial.polymul(top, bottom), polynomial.polymul([0, 2], cross))
    ends = [root.real for p in (rising, bottom) for root in polynomial.polyroots(p) if root.real > 0 and abs(root.imag) <= 1e-9 * root.real]
    end = math.sqrt(min(ends, default=math.inf)) * (1 - 1e-9)
    return math.tan(min(end, math.pi / 2)) if lens.model in _FISHEYES else end


def _text(lens: Lens) -> str:
    return ", ".join([lens.model, *(f"{name}={value:g}" for name, value in lens.params.items())])


# The picture

_Key = tuple[str, tuple[float, ...], int, int, tuple[tuple[str, float], ...]]


def _key(lens: Lens) -> _Key:
    """A lens by value, hashable: the photos of one camera share one grid."""
    return lens.model, tuple(lens.K.ravel().tolist()), lens.width, lens.height, tuple(lens.params.items())


def _from_key(key: _Key) -> Lens:
    model, K, width, height, params = key
    return Lens(model, np.array(K).reshape(3, 3), width, height, dict(params))


def _source(lens: Lens, xy: Array) -> Array:
    """Pixel positions in the stored picture of ideal directions."""
    return distort(lens, xy) @ lens.K[:2, :2].T + lens.K[:2, 2]


def _rays(K: Array, x: Array, y: Array) -> Array:
    """Ideal directions of pixel positions."""
    return (np.stack([x, y], axis=-1) - K[:2, 2]) @ np.linalg.inv(K[:2, :2]).T


@lru_cache(maxsize=64)
def _ideal_camera(key: _Key) -> tuple[Array, int, int]:
    lens = _from_key(key)
    (cx, cy), limit = lens.K[:2, 2], _monotonic_radius(lens)
    if not (0 < cx < lens.width and 0 < cy < lens.height):
        raise ValueError(f"the lens {_text(lens)} has its principal point {cx:g}, {cy:g} outside of its {lens.width}x{lens.height} picture")

    def box(scale: float) -> list[int]:     # left, top, right, bottom in the stored picture's pixels
        return [math.ceil(cx - scale * cx), math.ceil(cy - scale * cy), math.floor(cx + scale * (lens.width - cx)),
                math.floor(cy + scale * (lens.height - cy))]

    steps = 4096
    sides = box(_last(int(LARGEST * steps), lambda i: _covers(lens, limit, *box(i / steps))) / steps)
    if sides[0] < sides[2] and sides[1] < sides[3]:
        for side, far in enumerate(box(LARGEST)):
            out = np.zeros(4, np.int64)
            out[side] = 1 if side > 1 else -1
            n = _last(abs(far - sides[side]), lambda i, sides=sides, out=out: _covers(lens, limit, *(sides + i * out).tolist()))
            sides = (sides + n * out).tolist()
    left, top, right, bottom = sides
    width, height = max(0, right - left), max(0, bottom - top)
    if width * height < LEAST_AREA * lens.width * lens.height:
        raise ValueError(f"the lens {_text(lens)} leaves {width}x{height} of its {lens.width}x{lens.height} pixels without distortion; "
                         f"at least {LEAST_AREA:.0%} of the area is needed")
    return lens.K - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]]), width, height


def _last(n: int, holds: Callable[[int], bool]) -> int:
    """The last of 0..n that holds, where every number before one that holds does too; 0 is not asked."""
    low = 0
    while low < n:
        middle = (low + n + 1) // 2
        low, n = (middle, n) if holds(middle) else (low, middle - 1)
    return low


def _covers(lens: Lens, limit: float, left: int, top: int, right: int, bottom: int) -> bool:
    """Whether the stored picture holds all that these ideal pixels see. A rectangle inside of one that is covered is covered."""
    if left >= right or top >= bottom:
        return True
    x, y = np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5
    # What encloses its border encloses all of it as long as the map does not fold: monotonic along the radius, no mirror image inside.
    border = np.concatenate([np.stack(np.broadcast_arrays(*side), axis=-1) for side in ((x, y[0]), (x, y[-1]), (x[0], y), (x[-1], y))])
    inside = np.stack(np.meshgrid(np.linspace(x[0], x[-1], 17), np.linspace(y[0], y[-1], 17)), axis=-1).reshape(-1, 2)
    rays = _rays(lens.K, *np.concatenate([border, inside]).T)
    with np.errstate(all="ignore"):
        a, b, c = _jacobian(lens, rays)
        source, size = _source(lens, rays), np.array([lens.width, lens.height])
        good: Bool[Array, " P"] = (np.linalg.norm(rays, axis=-1) <= limit) & (a * c - b * b > 0) & (a + c > 0)
        return bool(good.all() and (source >= 0.5 - _SLACK_PX).all() and (source <= size - 0.5 + _SLACK_PX).all())


@lru_cache(maxsize=2)       # 8 bytes a pixel: 0.1 GB for a photo of 12 megapixels
def _grid(key: _Key, ideal_K: tuple[float, ...], width: int, height: int) -> torch.Tensor:
    """[1, height, width, 2] for grid_sample: -1 and 1 are the outer edges of the stored picture, not the centres of its border pixels."""
    lens, K = _from_key(key), np.array(ideal_K).reshape(3, 3)
    grid, x = np.empty((1, height, width, 2), np.float32), np.arange(width) + 0.5
    for start in range(0, height, 64):      # in strips: float64 of a whole photo would take a gigabyte
        y = np.arange(start, min(start + 64, height)) + 0.5
        with np.errstate(all="ignore"):
            grid[0, start:start + 64] = 2 * _source(lens, _rays(K, *np.meshgrid(x, y))) / (lens.width, lens.height) - 1
    return torch.from_numpy(grid)
