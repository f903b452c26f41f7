"""The wire format read by plain Python, from its description alone: what the tests hold the encoder against."""
import json
import math
import struct


def header(data: bytes, magic: bytes, counts: int) -> list[int]:
    assert data[:4] == magic
    return list(struct.unpack_from(f"<{counts}I", data, 4))


def core(data: bytes) -> list[dict]:
    """One record per Gaussian: mean, log_scale, quat (unit, w x y z), opacity, sh0."""
    n, = header(data, b"SKC1", 1)
    ranges = struct.unpack_from("<20f", data, 8)
    low_high = {"mean": (ranges[0:3], ranges[3:6]), "log_scale": (ranges[6:9], ranges[9:12]), "sh0": (ranges[12:15], ranges[15:18])}
    assert len(data) == 88 + 17 * n
    rows = []
    for i in range(n):
        *mean, s0, s1, s2, rotation, opacity, c0, c1, c2 = struct.unpack_from("<3H3BIB3B", data, 88 + 17 * i)
        row = {}
        for name, values, most in (("mean", mean, 65535), ("log_scale", (s0, s1, s2), 255), ("sh0", (c0, c1, c2), 255)):
            low, high = low_high[name]
            row[name] = [lo + q / most * (hi - lo) for lo, hi, q in zip(low, high, values)]
        index = rotation >> 30
        others = [((rotation >> shift & 1023) / 1023 * 2 - 1) / math.sqrt(2) for shift in (20, 10, 0)]
        row["quat"] = [*others[:index], math.sqrt(max(0, 1 - sum(v * v for v in others))), *others[index:]]
        row["opacity"] = min(max(opacity, 0.5), 254.5) / 255
        rows.append(row)
    return rows


def ranged(data: bytes, magic: bytes) -> list[list[float]]:
    """Rows of a plane with a low and a high for each channel: sh (three channels a coefficient) and heat."""
    n, channels = header(data, magic, 2)
    channels *= 3 if magic == b"SKH1" else 1
    low, high = struct.unpack_from(f"<{channels}f", data, 12), struct.unpack_from(f"<{channels}f", data, 12 + 4 * channels)
    assert len(data) == 12 + 8 * channels + n * channels
    at = 12 + 8 * channels
    return [[lo + q / 255 * (hi - lo) for lo, hi, q in zip(low, high, data[at + i * channels:at + (i + 1) * channels])] for i in range(n)]


def features(data: bytes) -> list[list[float]]:
    n, channels = header(data, b"SKF1", 2)
    scale, offset = struct.unpack_from(f"<{channels}f", data, 12), struct.unpack_from(f"<{channels}f", data, 12 + 4 * channels)
    q = struct.unpack_from(f"<{n * channels}b", data, 12 + 8 * channels)
    assert len(data) == 12 + 8 * channels + n * channels
    return [[s * v + o for s, o, v in zip(scale, offset, q[i * channels:(i + 1) * channels])] for i in range(n)]


def float32(data: bytes) -> dict[str, tuple[float, ...]]:
    """The arrays by name, flat."""
    n, k = header(data, b"SKX1", 2)
    out, at = {}, 12
    for name, width in (("means", 3), ("quats", 4), ("log_scales", 3), ("logit_opacities", 1), ("sh", 3 * k)):
        out[name] = struct.unpack_from(f"<{n * width}f", data, at)
        at += 4 * n * width
    assert at == len(data)
    return out


def message(data: bytes) -> tuple[dict[str, int], bytes]:
    magic, frame, chunk, version, revision, plane = struct.unpack_from("<4sIIIIB", data)
    assert magic == b"SKM1" and data[21:24] == b"\0\0\0"
    return {"frame": frame, "chunk": chunk, "version": version, "revision": revision, "plane": plane}, data[24:]


def container(data: bytes) -> tuple[dict, list[bytes]]:
    """The manifest and the planes after it."""
    parts, at = [], 0
    while at < len(data):
        length, = struct.unpack_from("<I", data, at)
        parts.append(data[at + 4:at + 4 + length])
        at += 4 + length
    assert at == len(data)
    return json.loads(parts[0]), parts[1:]
