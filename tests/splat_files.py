"""Splat files of packed formats with the scene that they mean: writers from the formats' descriptions, independent of the readers under test."""
import gzip
import math

import numpy as np

from splatkit.scene import Scene

C0 = 0.28209479177387814


def rows(values, *kinds) -> bytes:
    return b"".join(np.ascontiguousarray(v, kind).tobytes() for v, kind in zip(values, kinds))


def ply_bytes(scene: Scene, order="<", ascii=False, kind="float", names=None, extra=()) -> bytes:
    """A PLY with its properties in the order of `names`, of one kind; `extra` are further header lines."""
    rest = 3 * (scene.sh.shape[1] - 1)
    table = {**dict(zip("xyz", scene.means.T)), **{f"f_dc_{c}": scene.sh[:, 0, c] for c in range(3)},
             **{f"f_rest_{i}": scene.sh[:, 1 + i % max(1, rest // 3), i // max(1, rest // 3)] for i in range(rest)}, "opacity": scene.logit_opacities,
             **{f"scale_{i}": scene.log_scales[:, i] for i in range(3)}, **{f"rot_{i}": scene.quats[:, i] for i in range(4)}}
    names = list(names or table)
    form = "ascii" if ascii else {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    head = ["ply", f"format {form} 1.0", *extra, f"element vertex {len(scene)}", *(f"property {kind} {name}" for name in names), "end_header\n"]
    data = np.stack([np.asarray(table[name], np.float64) for name in names], axis=1)
    body = "".join(" ".join(map(repr, row)) + "\n" for row in data.tolist()).encode() if ascii else data.astype(order + {"float": "f4", "double": "f8"}[kind]).tobytes()
    return "\n".join(head).encode() + body


def compressed_ply_bytes(rng, n, rest=0):
    """(file, the scene that it means) of random packed numbers."""
    chunks = -(-n // 256)
    limits = np.sort(rng.normal(size=(chunks, 2, 9)).astype("<f4"), axis=1)      # low and high of 3 positions, 3 log scales, 3 colours
    packed = rng.integers(0, 2**32, (n, 4), dtype=np.uint32)
    coefficients = rng.integers(0, 256, (n, rest), dtype=np.uint8)
    names = [f"{end}_{axis}" for end in ("min", "max") for axis in "xyz"] + [f"{end}_scale_{axis}" for end in ("min", "max") for axis in "xyz"]
    names += [f"{end}_{channel}" for end in ("min", "max") for channel in "rgb"]
    head = ["ply", "format binary_little_endian 1.0", f"element chunk {chunks}", *(f"property float {name}" for name in names), f"element vertex {n}",
            *(f"property uint packed_{name}" for name in ("position", "rotation", "scale", "color"))]
    head += [f"element sh {n}", *(f"property uchar f_rest_{i}" for i in range(rest))] if rest else []
    table = np.concatenate([limits[:, :, :3].reshape(chunks, 6), limits[:, :, 3:6].reshape(chunks, 6), limits[:, :, 6:].reshape(chunks, 6)], axis=1)
    data = "\n".join([*head, "end_header\n"]).encode() + rows([table, packed, coefficients], "<f4", "<u4", "u1")
    low, high = limits[np.arange(n) // 256].transpose(1, 0, 2).astype(float)
    field = lambda v, shift, bits: (v >> shift & (1 << bits) - 1) / ((1 << bits) - 1)
    thirds = lambda v: np.stack([field(v, 21, 11), field(v, 11, 10), field(v, 0, 11)], 1)
    t = np.concatenate([thirds(packed[:, 0]), thirds(packed[:, 2]), np.stack([field(packed[:, 3], s, 8) for s in (24, 16, 8)], 1)], 1)
    values = low + (high - low) * t
    others = (np.stack([field(packed[:, 1], s, 10) for s in (20, 10, 0)], 1) - 0.5) * math.sqrt(2)
    quats = np.stack([np.insert(row, largest, math.sqrt(max(0, 1 - row @ row))) for row, largest in zip(others, packed[:, 1] >> 30)])
    sh = ((coefficients.astype(float) + 0.5) / 256)
    sh = (np.where(coefficients == 0, 0, np.where(coefficients == 255, 1, sh)) - 0.5) * 8
    sh = np.concatenate([((values[:, 6:] - 0.5) / C0)[:, None], sh.reshape(n, 3, rest // 3).transpose(0, 2, 1)], axis=1)
    return data, {"means": values[:, :3], "quats": quats, "log_scales": values[:, 3:6], "logit_opacities": logits(packed[:, 3] & 255), "sh": sh}


def splat_bytes(rng, n):
    means, scales, bytes_ = rng.normal(size=(n, 3)).astype("<f4"), rng.uniform(1e-3, 1, (n, 3)).astype("<f4"), rng.integers(0, 256, (n, 8), dtype=np.uint8)
    data = b"".join(rows([m, s, b], "<f4", "<f4", "u1") for m, s, b in zip(means, scales, bytes_))
    return data, {"means": means, "quats": (bytes_[:, 4:] - 128.0) / 128, "log_scales": np.log(scales), "logit_opacities": logits(bytes_[:, 3]),
                  "sh": ((bytes_[:, None, :3] / 255.0) - 0.5) / C0}


def spz_bytes(rng, n, degree=0, version=2, bits=12, flags=0, magic=0x5053474E):
    k = (degree + 1) ** 2 - 1
    fixed, alpha, color, scale = rng.integers(-2**23, 2**23, (n, 3)), rng.integers(0, 256, n), rng.integers(0, 256, (n, 3)), rng.integers(0, 256, (n, 3))
    rest = rng.integers(0, 256, (n, k, 3))
    turn = np.array([1, -1, -1])        # right-up-back to right-down-front
    if version == 2:
        rotation = rng.integers(40, 216, (n, 3))
        xyz = rotation / 127.5 - 1
        xyz /= np.maximum(1, np.linalg.norm(xyz, axis=1, keepdims=True) / 0.9)
        rotation = np.round((xyz + 1) * 127.5).astype(int)
        xyz = rotation / 127.5 - 1
        xyzw = np.concatenate([xyz, np.sqrt(1 - (xyz**2).sum(1, keepdims=True))], 1)
        packed = rotation.astype("u1").tobytes()
    else:
        q = rng.normal(size=(n, 4))
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        largest = np.abs(q).argmax(1)
        q *= np.sign(q[np.arange(n), largest])[:, None]
        size, words, xyzw = np.round(np.abs(q) * 511 * math.sqrt(2)).astype(int), [], np.zeros((n, 4))
        for i in range(n):
            word = int(largest[i])
            for j in range(4):
                if j != largest[i]:
                    word = word << 10 | int(q[i, j] < 0) << 9 | int(size[i, j])
                    xyzw[i, j] = math.copysign(size[i, j] / 511 / math.sqrt(2), q[i, j])
            xyzw[i, largest[i]] = math.sqrt(1 - (xyzw[i]**2).sum())
            words.append(word)
        packed = np.array(words, "<u4").tobytes()
    header = rows([[magic, version, n], [degree, bits, flags, 0]], "<u4", "u1")
    positions = (fixed & 0xFFFFFF).astype("<u4").view("u1").reshape(n, 3, 4)[:, :, :3]
    data = gzip.compress(header + positions.tobytes() + rows([alpha, color, scale], "u1", "u1", "u1") + packed + rows([rest], "u1"), mtime=0)
    signs = np.array([-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1])[:k, None]
    sh = np.concatenate([((color / 255 - 0.5) / 0.15)[:, None], signs * (rest - 128.0) / 128], axis=1)
    return data, {"means": fixed / 2.0**bits * turn, "quats": xyzw[:, [3, 0, 1, 2]] * [1, *turn], "log_scales": scale / 16 - 10.0, "logit_opacities": logits(alpha), "sh": sh}


def logits(q):
    opacity = np.clip(np.asarray(q, float), 0.5, 254.5) / 255
    return np.log(opacity / (1 - opacity))
