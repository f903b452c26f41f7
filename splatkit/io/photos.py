"""Posed photos from a COLMAP folder, and the pixels of any photo."""
from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Float, Num
from numpy import ndarray as Array
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..capture import Capture, Photo
from ..errors import BadFile
from . import colmap, lens
from .reading import Report, opened, silent

MODEL_FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0", ".")     # where a COLMAP model is looked for, in this order
PIXELS_MAX = 200_000_000

# Pillow's Image.open would reach 40 decoders, and its limit on pixels is a global of the process. These are called directly.
_DECODERS = ((b"\xff\xd8\xff", JpegImageFile), (b"\x89PNG\r\n\x1a\n", PngImageFile), (b"RIFF", WebPImageFile),
             (b"II*\0", TiffImageFile), (b"MM\0*", TiffImageFile))
_HEIF = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))     # bytes 4 to 11; AVIF has others
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr"}
_TURN = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
_UNTURN = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


def load_capture(folder: str | os.PathLike, report: Report = silent, images: str | os.PathLike = "images", shrunk: int | None = None) -> Capture:
    """The photos of `folder`/images that a COLMAP model in `folder` has posed, sorted by name, with its points. A folder without a model
    but with a transforms.json or transforms_train.json is read by io.transforms.load_transforms instead.

    `images` names another folder for the photos, in `folder` or anywhere; where `shrunk` is given they must be 1/shrunk of the size of
    their cameras, rounded up or down. Masks lie in the folder `masks` beside `images`, `masks_2` beside `images_2`.

    Only the headers of the photos are read. Where a photo has another size than its camera but the same shape (within a pixel), K is
    scaled by the exact ratios and `report` is told, as it is of lens distortion: such a photo has the K and the size of its undistorted
    picture. Raises BadFile naming the file: no model or photo, a photo that is no JPEG, PNG, WebP, TIFF or HEIC or lies outside of images/,
    a pose, focal length or lens that cannot be used.
    """
    folder = Path(folder)
    model_folder = find_model_folder(folder)
    if model_folder is None:
        # Imported here, for that page checks its photos with this one.
        from .transforms import FILES, find_transforms, load_transforms
        if find_transforms(folder):
            return load_transforms(folder, report)
        raise BadFile(folder, "", f"no COLMAP model: no cameras.bin or cameras.txt in {', '.join(MODEL_FOLDERS)}; no {' or '.join(FILES)}")
    root = folder / images
    if not os.path.isdir(root):
        raise BadFile(root, "", "no such folder; the photos are expected there")
    if os.path.exists(folder / "transforms.json"):
        report(f"{folder}: transforms.json is not read, the COLMAP model in {model_folder.relative_to(folder)} is")
    if others := [p.name for p in model_folder.parent.glob("[1-9]*") if model_folder.name == "0" and colmap.find_model(p)]:
        report(f"{model_folder.parent}: only model 0 is read; {len(others)} more lie beside it")
    model = colmap.read_model(model_folder)
    if not model.images:
        raise BadFile(model_folder, "images", "the model holds no registered image")
    keys = sorted(model.images, key=lambda key: model.images[key].name)
    notes: Counter[str] = Counter()
    cameras_path = model_folder / f"cameras{colmap.find_model(model_folder)}"
    photos = tuple(_photo(model.images[key], model.cameras[model.images[key].camera_id], cameras_path, root, shrunk, notes) for key in keys)
    _refuse_same_file_twice(photos)
    for note, count in notes.items():
        report(f"{folder}: {count} of {len(photos)} photos {note}")
    return Capture(photos, model.points, model.points_rgb, _point_views(model, keys), world="colmap")


def find_model_folder(folder: Path) -> Path | None:
    """Where in `folder` a COLMAP model lies."""
    return next((folder / name for name in MODEL_FOLDERS if colmap.find_model(folder / name)), None)


def half_size(photo: Photo, factor: int = 2) -> Photo:
    """The photo at floor(width / factor) x floor(height / factor), K scaled by both exact ratios: 800x599 by 2 is 400x299."""
    if factor < 1 or min(photo.width, photo.height) < factor:
        raise ValueError(f"{photo.name} is {photo.width}x{photo.height} and cannot be made {factor} times smaller")
    return _resized(photo, photo.width // factor, photo.height // factor)


def load_image(photo: Photo, width: int | None = None, height: int | None = None) -> Float[Array, "H W 3"]:
    """The photo's pixels, float32 RGB in [0, 1] as encoded (sRGB, no colour management), alpha dropped.

    The size is the photo's own unless given; a smaller one is the exact area average of the stored pixels, of the undistorted ones
    (lens.remap to lens.ideal_camera) where the photo has a lens. A photo is turned by its EXIF orientation only where its stored size
    contradicts the camera. Raises BadFile when the file is cut, damaged or has another shape.
    """
    width, height, camera = width or photo.width, height or photo.height, photo.lens or photo
    with _photo_file(photo.path) as image:
        stored, orientation = _stored(image)
        turn = _turn(photo, stored, orientation)
        if not _same_shape(stored if turn is None else stored[::-1], (camera.width, camera.height)):
            size = f"{camera.width}x{camera.height}"
            raise BadFile(photo.path, "", f"is {stored[0]}x{stored[1]}, which is not the shape of its camera, {size}")
        image.load()
        if not (image.mode in _MODES or image.mode.startswith("I;16")):
            raise BadFile(photo.path, "", f"has pixels of kind {image.mode!r}; expected 8 bits, or 16 bits of grey")
        scale = np.float32(255 if image.mode in _MODES else 65535)
        if isinstance(image, TiffImageFile) and orientation in _UNTURN:
            image = image.transpose(_UNTURN[orientation])       # of all formats Pillow turns this one by itself
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith("P"):
            image = image.convert("RGBA")       # Pillow warns when a palette with alpha is converted in one step
        pixels = np.asarray(image if image.mode == "RGB" or scale > 255 else image.convert("RGB"))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if photo.lens is not None:
        if pixels.shape[:2] != (photo.lens.height, photo.lens.width):       # changed on disk since the capture was loaded
            pixels = area_average(pixels, photo.lens.width, photo.lens.height)
        pixels = lens.remap(np.divide(pixels, scale, dtype=np.float32), photo.lens, *lens.ideal_camera(photo.lens))
        pixels, scale = np.minimum(pixels, 1, out=pixels), np.float32(1)        # four weights may add up to 1 + 1e-7
    if pixels.shape[:2] == (height, width):
        return np.divide(pixels, scale, dtype=np.float32)
    out = area_average(pixels, width, height)
    return np.minimum(np.divide(out, scale, out=out), 1, out=out)      # as above: shares of an area may add up to more


def load_mask(photo: Photo, width: int | None = None, height: int | None = None) -> Bool[Array, "H W"] | None:
    """Which pixels of load_image() count, None for all: those whose whole area lies where the mask is not 0. BadFile as load_image."""
    if photo.mask is None:
        return None
    with _photo_file(photo.mask) as image:
        stored, _ = _stored(image)
        if stored != (photo.width, photo.height) or image.mode not in _MODES:
            raise BadFile(photo.mask, "", f"{stored[0]}x{stored[1]} of kind {image.mode!r}; expected 8 bits and the size of its photo, {photo.width}x{photo.height}")
        image.load()
        kept = (np.asarray(image.convert("L")) != 0)[:, :, None]
    return area_average(kept.astype(np.float32), width or photo.width, height or photo.height)[:, :, 0] > 1 - 1e-4


def area_average(pixels: Num[Array, "h w C"], width: int, height: int) -> Float[Array, "H W C"]:
    """float32 [height, width, C]: every output pixel is the mean of the input over the rectangle that it covers, partly covered pixels
    counting by the covered part (Pillow's BOX filter counts them whole or not at all)."""
    n_columns, channels = pixels.shape[1:]
    rows, columns = _taps(len(pixels), height), _taps(n_columns, width)
    out = np.empty((height, width, channels), np.float32)
    for start in range(0, height, 32):      # a strip stays in the cache; turning it makes both passes add long rows: 1.7x in all
        strip = _weighted(pixels, rows, slice(start, start + 32))
        n = len(strip)
        turned = np.ascontiguousarray(strip.reshape(n, -1).T).reshape(n_columns, channels * n)
        out[start:start + n] = _weighted(turned, columns, slice(None)).reshape(width * channels, n).T.reshape(n, width, channels)
    return out


def _taps(n_in: int, n_out: int) -> list[tuple[Array, Array]]:
    """For output i: input indices [n_out] and weights [n_out], tap after tap. Weights of one output add up to 1."""
    # In units of 1 / n_out input pixels all edges are whole numbers: output i covers [i n_in, (i+1) n_in), input j [j n_out, (j+1) n_out).
    start, taps = np.arange(n_out) * n_in, []
    first, last = start // n_out, (start + n_in - 1) // n_out
    for tap in range(int((last - first).max()) + 1):
        j = np.minimum(first + tap, n_in - 1)
        covered = np.where(first + tap <= last, np.minimum((j + 1) * n_out, start + n_in) - np.maximum(j * n_out, start), 0)
        taps.append((j, (covered / n_in).astype(np.float32)))
    return taps


def _weighted(pixels: Array, taps: list[tuple[Array, Array]], rows: slice) -> Array:
    out = None
    for index, weight in taps:
        part = np.multiply(pixels[index[rows]], weight[rows].reshape(-1, *[1] * (pixels.ndim - 1)), dtype=np.float32)
        out = part if out is None else np.add(out, part, out=out)
    return out


def _resized(photo: Photo, width: int, height: int) -> Photo:
    ratio = np.array([[width / photo.width], [height / photo.height], [1.0]])
    return dataclasses.replace(photo, K=photo.K * ratio, width=width, height=height)


def _photo(image: colmap.ColmapImage, camera: colmap.ColmapCamera, cameras_path: Path, root: Path, shrunk: int | None, notes: Counter[str]) -> Photo:
    where = f"camera {image.camera_id} ({camera.model})"
    if not camera.is_pinhole and camera.model not in lens.MODELS:
        bent = ", ".join(f"{name}={value:g}" for name, value in camera.distortion.items() if value)
        raise BadFile(cameras_path, where, f"lens distortion {bent or 'of the model itself'}: undistort first (colmap image_undistorter)")
    params = camera.params
    fx, fy = (params.get(name, params.get("f")) for name in ("fx", "fy"))
    if not (0 < fx < 1e9 and 0 < fy < 1e9 and abs(params["cx"]) < 1e9 and abs(params["cy"]) < 1e9):
        raise BadFile(cameras_path, where, f"{params}: the focal lengths must be above 0 and all below 1e9 pixels")
    K = np.array([[fx, 0, params["cx"]], [0, fy, params["cy"]], [0, 0, 1.0]])
    photo = fitted(Photo(image.name, _inside(root, image.name), K, camera.width, camera.height, _world_to_cam(image)), where, notes)
    if shrunk and max(abs(photo.width - camera.width / shrunk), abs(photo.height - camera.height / shrunk)) >= 1:
        raise BadFile(photo.path, "", f"is {photo.width}x{photo.height}; expected 1/{shrunk} of {where}, {camera.width}x{camera.height}. Without the folder "
                      f"{root.name} the photos are made smaller from those in images")
    mask = _inside(root.parent / root.name.replace("images", "masks", 1), image.name + ".png") if root.name.startswith("images") else None
    if camera.is_pinhole:
        return dataclasses.replace(photo, mask=mask) if mask and mask.is_file() else photo
    if mask and mask.is_file():
        raise BadFile(mask, "", "a mask of a photo with lens distortion cannot be used: undistort both first")
    return undistorted(photo, camera.model, camera.distortion, cameras_path, where, notes)


def undistorted(photo: Photo, model: str, params: dict[str, float], path: Path, where: str, notes: Counter[str]) -> Photo:
    """`photo`, whose K and size are of the stored pixels, as the ideal picture behind its lens. BadFile(path, where) when there is none."""
    try:
        ideal = lens.through_lens(photo, model, params)
    except ValueError as e:
        raise BadFile(path, where, str(e)) from e
    notes[f"are undistorted ({model}): {photo.width}x{photo.height} -> {ideal.width}x{ideal.height}"] += 1
    return ideal


def fitted(photo: Photo, where: str, notes: Counter[str]) -> Photo:
    """`photo`, whose size and K are those of its camera, at the size of the picture on disk; `notes` counts what the user should know.

    Only the picture's header is read. Raises BadFile when it cannot be used or has another shape than its camera, which `where` names.
    """
    with _photo_file(photo.path) as picture:
        stored, orientation = _stored(picture)
    turn = _turn(photo, stored, orientation)
    size = stored[::-1] if turn is not None else stored
    if turn is not None:
        notes["are turned as their EXIF orientation says"] += 1
    elif orientation in range(2, 9):
        notes["have an EXIF orientation that is ignored: their cameras have the size as stored"] += 1
    if size == (photo.width, photo.height):
        return photo
    if not _same_shape(size, (photo.width, photo.height)):
        raise BadFile(photo.path, "", f"is {stored[0]}x{stored[1]}, which is not the shape of {where}, {photo.width}x{photo.height}")
    notes[f"are {size[0]}x{size[1]} where the cameras say {photo.width}x{photo.height}: intrinsics scaled to fit"] += 1
    return _resized(photo, *size)


def _inside(root: Path, name: str, folder: str = "the images folder") -> Path:
    """The file that a name in a model means. No name leads out of the folder, not even through a link."""
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        if flavour.is_absolute() or flavour.drive or ".." in flavour.parts:
            raise BadFile(root, name, f"a name must lie below {folder}")
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as e:        # a loop of links, a name too long
        raise BadFile(root, name, f"cannot be found: {e}") from e
    if not inside:
        raise BadFile(path, "", f"is a link to outside of {folder}; copy the file there")
    return path


def _refuse_same_file_twice(photos: tuple[Photo, ...]) -> None:
    seen: dict[Path, str] = {}
    for photo in photos:
        if (other := seen.setdefault(photo.path.resolve(), photo.name)) != photo.name:
            raise BadFile(photo.path, "", f"the model lists this photo twice, as {other} and as {photo.name}")


@contextmanager
def _photo_file(path: Path) -> Iterator[Image.Image]:
    """The picture, opened but not decoded. BadFile for a missing file, a format off the list, over 200 megapixels, any decoding error."""
    with opened(path) as file:
        decoder = _decoder(path, file.read(12))
        file.seek(0)
        try:
            with decoder(file) as image:
                width, height = image.size
                if width * height > PIXELS_MAX:
                    raise BadFile(path, "", f"{width}x{height} pixels; at most {PIXELS_MAX // 10**6} megapixels are read")
                yield image
        except BadFile:
            raise
        except Exception as e:      # on damaged bytes Pillow's decoders raise about any type
            raise BadFile(path, "", f"the picture is cut or damaged: {e}"[:300]) from e


def _decoder(path: Path, magic: bytes) -> Callable[[BinaryIO], Image.Image]:
    """What decodes a file that begins with `magic`."""
    if magic[4:] in _HEIF:
        try:
            from pillow_heif import HeifImageFile
        except ImportError as e:
            raise BadFile(path, "", "is a HEIC picture, which needs the extra `heic`: pip install 'splatkit[heic]'") from e
        return HeifImageFile
    decoder = next((d for start, d in _DECODERS if magic.startswith(start) and (start != b"RIFF" or magic[8:] == b"WEBP")), None)
    if decoder is None:
        raise BadFile(path, "", "not a JPEG, PNG, WebP, TIFF or HEIC picture" if magic else "the file is empty")
    return decoder


def _stored(image: Image.Image) -> tuple[tuple[int, int], int]:
    """Size of the stored pixels and EXIF orientation (1 to 8; 1 where there is none or it is damaged) of a picture not yet decoded."""
    tiff, value = isinstance(image, TiffImageFile), 1
    try:
        if tiff:
            value = image.tag_v2.get(ExifTags.Base.Orientation, 1)
        elif "exif" in image.info:
            exif = Image.Exif()
            exif.load(image.info["exif"])
            value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:       # a hint, not pixels: a damaged one must not cost the photo
        pass
    orientation = value if value in range(1, 9) else 1
    return image.size[::-1] if tiff and orientation >= 5 else image.size, orientation


def _turn(photo: Photo, stored: tuple[int, int], orientation: int) -> Image.Transpose | None:
    """How the stored picture must be turned to have its camera's shape: only if it must, for COLMAP's sizes are those of stored pixels."""
    expected = (photo.lens or photo).width, (photo.lens or photo).height
    if orientation not in _TURN or stored == expected:
        return None
    if stored[::-1] == expected or not _same_shape(stored, expected) and _same_shape(stored[::-1], expected):
        return _TURN[orientation]
    return None


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether one size is the other times a factor, up to one pixel of rounding on either side."""
    return a == b or min(abs(a[0] - b[0] * a[1] / b[1]), abs(a[1] - b[1] * a[0] / b[0])) <= 1


def _world_to_cam(image: colmap.ColmapImage) -> Float[Array, "4 4"]:
    w, x, y, z = image.quat / np.linalg.norm(image.quat)
    out = np.eye(4)
    out[:3, :3] = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                   [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                   [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]
    out[:3, 3] = image.translation
    return out


def _point_views(model: colmap.ColmapModel, keys: list[int]) -> tuple[Array, ...]:
    """For each point the indices into the sorted photos, ascending, each once; track entries of images that are gone are left out."""
    n_points, n_photos = len(model.points), len(keys)
    by_id = np.argsort(keys)
    ids = np.array(keys)[by_id]
    at = np.minimum(np.searchsorted(ids, model.tracks[:, 0]), n_photos - 1)
    known = ids[at] == model.tracks[:, 0]
    point = np.repeat(np.arange(n_points), np.diff(model.track_starts))
    pairs = np.unique(point[known] * n_photos + by_id[at[known]])
    ends = np.searchsorted(pairs, np.arange(n_points + 1) * n_photos)
    views = pairs % n_photos
    return tuple(views[a:b] for a, b in zip(ends[:-1], ends[1:]))
