"""COLMAP models written out by hand: a second implementation of the format, so that the reader is not tested by itself."""
import struct
from pathlib import Path

import numpy as np
from PIL import Image

MODEL_IDS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4, "OPENCV_FISHEYE": 5, "FISHEYE": 15}

PINHOLE = {1: ("PINHOLE", 32, 24, (30.0, 31.0, 16.5, 11.5))}
IMAGES = {      # id: (name, camera, quaternion wxyz, translation, [(x, y, point id)])
    7: ("b.png", 1, (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0), [(17.5, 12.25, 3), (1.0, 2.0, -1), (5.0, 6.5, 9)]),
    2: ("a.png", 1, (2.0, 0.0, 0.0, 2.0), (1.0, -2.0, 0.5), [(3.0, 4.0, 3)]),
    5: ("sub dir/c.png", 1, (0.5, 0.5, -0.5, 0.5), (0.0, 0.25, 3.0), [])}
POINTS = {3: ((0.125, 0.25, 4.0), (255, 0, 7), 0.5, [(7, 0), (2, 0)]), 9: ((-1.0, 2.0, 8.0), (1, 2, 3), 0.25, [(7, 2)])}


def write_model(folder: Path, cameras=PINHOLE, images=IMAGES, points=POINTS, text=False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (_write_text if text else _write_binary)(folder, cameras, images, points)
    return folder


def write_capture(folder: Path, cameras=PINHOLE, images=IMAGES, points=POINTS, text=False, size=(32, 24)) -> Path:
    """A folder with sparse/0 and images/, each photo of one colour noise."""
    write_model(folder / "sparse" / "0", cameras, images, points, text)
    rng = np.random.default_rng(0)
    for name, *_ in images.values():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / "images" / name)
    return folder


def _write_binary(folder, cameras, images, points):
    out = [struct.pack("<Q", len(cameras))]
    for key, (model, width, height, params) in cameras.items():
        out.append(struct.pack(f"<IiQQ{len(params)}d", key, MODEL_IDS[model], width, height, *params))
    (folder / "cameras.bin").write_bytes(b"".join(out))
    out = [struct.pack("<Q", len(images))]
    for key, (name, camera, quat, translation, observed) in images.items():
        out.append(struct.pack("<I4d3dI", key, *quat, *translation, camera) + name.encode() + b"\0" + struct.pack("<Q", len(observed)))
        out += [struct.pack("<ddq", *o) for o in observed]
    (folder / "images.bin").write_bytes(b"".join(out))
    out = [struct.pack("<Q", len(points))]
    for key, (xyz, rgb, error, track) in points.items():
        out.append(struct.pack("<Q3d3BdQ", key, *xyz, *rgb, error, len(track)) + b"".join(struct.pack("<II", *t) for t in track))
    (folder / "points3D.bin").write_bytes(b"".join(out))


def _write_text(folder, cameras, images, points):
    def join(*values):
        return " ".join(map(str, values))
    lines = ["# Camera list with one line of data per camera:", f"# Number of cameras: {len(cameras)}"]
    lines += [join(key, *camera[:3], *camera[3]) for key, camera in cameras.items()]
    (folder / "cameras.txt").write_text("\n".join(lines) + "\n")
    lines = ["# Image list with two lines of data per image:", f"# Number of images: {len(images)}, mean observations per image: 1.3"]
    for key, (name, camera, quat, translation, observed) in images.items():
        lines += [join(key, *quat, *translation, camera, name), join(*(v for o in observed for v in o))]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# 3D point list with one line of data per point:", f"# Number of points: {len(points)}, mean track length: 1.5"]
    lines += [join(key, *xyz, *rgb, error, *(v for t in track for v in t)) for key, (xyz, rgb, error, track) in points.items()]
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n")
