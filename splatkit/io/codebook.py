"""Few values that stand for many: 256 numbers for all of a kind (Lloyd 1982), and some thousand vectors for all sets of SH coefficients (k-means in two levels)."""
from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

ROWS_AT_ONCE = 4096
SAMPLE = 32768


def numbers(values: Array, count: int = 256, rounds: int = 12) -> tuple[Array, Array]:
    """(codebook, ascending float32; the index of the nearest entry for every value). With few different values the codebook holds them exactly."""
    flat = values.ravel()
    different = np.unique(flat)
    if len(different) <= count:
        codebook = np.concatenate([different, np.full(count - len(different), different[-1] if len(different) else 0)]).astype(np.float32)
    else:
        ordered = np.sort(flat).astype(np.float64)
        sums = np.concatenate([[0.0], np.cumsum(ordered)])
        # The best density of entries is the cube root of that of the values (Panter and Dite 1951), found on a histogram that is fine where values are many.
        edges = np.unique(np.concatenate([np.linspace(ordered[0], ordered[-1], 257), ordered[np.linspace(0, len(ordered) - 1, 1025).astype(int)]]))
        widths, held = np.diff(edges), np.diff(np.searchsorted(ordered, edges[:-1]), append=0)
        held[-1] = len(ordered) - np.searchsorted(ordered, edges[-2])
        cumulative = np.concatenate([[0.0], np.cumsum(np.cbrt(held / widths) * widths)])
        codebook = np.interp((np.arange(count) + 0.5) / count * cumulative[-1], cumulative, edges)
        for _ in range(rounds):
            cuts = np.concatenate([[0], np.searchsorted(ordered, (codebook[1:] + codebook[:-1]) / 2), [len(ordered)]])
            held = np.diff(cuts)
            means = (sums[cuts[1:]] - sums[cuts[:-1]]) / np.maximum(held, 1)
            codebook = np.sort(np.where(held > 0, means, codebook))
        codebook = codebook.astype(np.float32)
    return codebook, nearest_numbers(codebook, values)


def nearest_numbers(codebook: Array, values: Array) -> Array:
    cuts = (codebook[1:].astype(np.float64) + codebook[:-1]) / 2
    return np.searchsorted(cuts, values.ravel()).astype(np.uint8).reshape(values.shape)


def vectors(rows: Array, count: int, seed: int = 0) -> tuple[Array, Array]:
    """(at most `count` centres, the centre of every row). Rows are first split into about sqrt(count) groups and every group into as many centres as its share asks for."""
    n = len(rows)
    if n <= count:
        return rows.copy(), np.arange(n)
    rng = np.random.default_rng(seed)
    coarse = max(1, round(count ** 0.5))
    sample = rows[rng.choice(n, min(n, SAMPLE), replace=False)]
    group = _nearest(_kmeans(sample, coarse, rng), rows)
    centres, labels, used = [], np.empty(n, np.int64), 0
    for g in range(coarse):
        members = np.flatnonzero(group == g)
        if not len(members):
            continue
        share = max(1, int(len(members) * (count - coarse) / n))        # at most `count` in all, with one for each group
        mine = rows[members]
        found = mine if len(members) <= share else _kmeans(mine[rng.permutation(len(mine))[:8 * share + 1024]], share, rng)
        labels[members] = used + (np.arange(len(members)) if len(members) <= share else _nearest(found, mine))
        centres.append(found)
        used += len(found)
    return np.concatenate(centres), labels


def _kmeans(rows: Array, count: int, rng, rounds: int = 4) -> Array:
    centres = rows[rng.choice(len(rows), count, replace=False)]
    for _ in range(rounds):
        label = _nearest(centres, rows)
        order = np.argsort(label, kind="stable")
        held = np.bincount(label, minlength=count)
        sums = np.add.reduceat(rows[order], np.minimum(np.concatenate([[0], np.cumsum(held)[:-1]]), len(rows) - 1), axis=0)
        centres = np.where(held[:, None] > 0, sums / np.maximum(held, 1)[:, None], centres).astype(np.float32)
    return centres


def _nearest(centres: Array, rows: Array) -> Array:
    lengths = (centres * centres).sum(axis=1) / 2
    label = np.empty(len(rows), np.int64)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        label[first:first + ROWS_AT_ONCE] = (lengths - rows[first:first + ROWS_AT_ONCE] @ centres.T).argmin(axis=1)
    return label
