"""Numbers in few bits, as several formats have them: opacities and colours in a byte, quaternions without their largest component, rows in Morton order."""
from __future__ import annotations

import math

import numpy as np
from numpy import ndarray as Array

from .fields import LOG_SCALE_ZERO, SH_C0

# Opacity q / 255 as a logit. 0 and 255 are taken half a step inside, where logits are finite.
_OPACITIES = np.clip(np.arange(256), 0.5, 254.5) / 255
LOGITS = np.log(_OPACITIES / (1 - _OPACITIES)).astype(np.float32)
# Colours q / 255 as the first SH coefficient.
COLOUR_BYTES = ((np.arange(256) / 255 - 0.5) / SH_C0).astype(np.float32)

_OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])       # by the component that is left out


def opacities(logits: Array) -> Array:
    """sigmoid, in float32, without overflow."""
    half = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, half) / (1 + half)


def opacity_bytes(logits: Array) -> Array:
    """Opacities in steps of 1/255. What LOGITS says of a byte becomes that byte again, the first and the last too."""
    steps = to_bytes(opacities(logits))
    steps[logits <= LOGITS[0] + 1e-4] = 0
    steps[logits >= LOGITS[255] - 1e-4] = 255
    return steps


def to_bytes(x: Array) -> Array:
    """x in steps of 1/255, rounded; what is outside 0 to 1 becomes the nearest of them."""
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)


def log_of_scales(scales: Array, zero: float = LOG_SCALE_ZERO) -> Array:
    """ln; of 0 it is `zero`, and a negative scale becomes NaN, so that its row is dropped."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(scales == 0, np.float32(zero), np.log(scales)).astype(np.float32)


def unit_quats(quats: Array) -> Array:
    """Normalised; a zero quaternion is the identity (wxyz)."""
    largest = np.abs(quats).max(axis=1, keepdims=True, initial=0)      # divided out first: squares of tiny or huge entries leave the range
    q = np.where(largest > 0, quats, np.array([1, 0, 0, 0], np.float32)) / np.where(largest > 0, largest, 1)
    return q / np.sqrt((q * q).sum(axis=1, keepdims=True))


def without_largest(quats: Array) -> tuple[Array, Array]:
    """Which of the four components of unit quaternions is the largest, and the other three in order, of the sign that makes it positive."""
    largest = np.abs(quats).argmax(axis=1)
    sign = np.where(np.take_along_axis(quats, largest[:, None], axis=1) < 0, np.float32(-1), np.float32(1))
    return largest, np.take_along_axis(quats, _OTHERS[largest], axis=1) * sign


def with_largest(largest: Array, others: Array) -> Array:
    """Unit quaternions from what without_largest() gives."""
    quats = np.empty((len(others), 4), np.float32)
    missing = np.sqrt(np.maximum(0, 1 - (others * others).sum(axis=1)))
    for i in range(4):      # by columns: four times as fast as put_along_axis
        below = np.where(largest > i, others[:, min(i, 2)], others[:, max(i - 1, 0)])
        quats[:, i] = np.where(largest == i, missing, below)
    return quats


def morton_order(means: Array) -> Array:
    """The rows along a curve on which neighbours are near in space: what is stored in ranges by block, or packed as a picture, is smaller in it."""
    if not len(means):
        return np.zeros(0, np.int64)
    low, high = means.min(axis=0), means.max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        cells = (means.astype(np.float64) - low) / np.maximum(high.astype(np.float64) - low, 1e-30) * 1023
    code = np.zeros(len(means), np.uint32)
    for axis in range(3):
        x = np.clip(cells[:, axis], 0, 1023).astype(np.uint32)
        for shift, mask in ((16, 0x030000FF), (8, 0x0300F00F), (4, 0x030C30C3), (2, 0x09249249)):      # two zero bits between any two
            x = (x | x << np.uint32(shift)) & np.uint32(mask)
        code |= x << np.uint32(axis)
    return np.argsort(code, kind="stable")


def half_step(values: float) -> float:
    """ln of half of the smallest step above 0 that a format with that step can store."""
    return math.log(values / 2)
