"""Captures and pixels: what load_capture and load_image give, what they refuse."""
import dataclasses
import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import mutants
from PIL import Image
from tiny_colmap import IMAGES, PINHOLE, POINTS, write_capture, write_model

from splatkit.capture import Photo
from splatkit.errors import BadFile
from splatkit.io.photos import area_average, half_size, load_capture, load_image

both = pytest.mark.parametrize("text", [False, True], ids=["bin", "txt"])
FORMATS = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "tif": {"compression": "tiff_lzw"}}


def noise(width, height, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(path: Path, width: int, height: int) -> Photo:
    return Photo(path.name, path, np.array([[50.0, 0, width / 2], [0, 60.0, height / 2], [0, 0, 1]]), width, height, np.eye(4))


def saved(path: Path, pixels: np.ndarray, orientation=1, **options) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, **({} if orientation == 1 else {"exif": exif}), **options)
    return path


# The capture

@both
def test_a_capture_has_its_photos_by_name_and_its_points_in_the_models_world(tmp_path, text):
    capture = load_capture(write_capture(tmp_path, text=text), pytest.fail)
    assert [p.name for p in capture.photos] == ["a.png", "b.png", "sub dir/c.png"]
    assert all(p.path == tmp_path / "images" / p.name and (p.width, p.height) == (32, 24) for p in capture.photos)
    np.testing.assert_array_equal(capture.photos[0].K, [[30, 0, 16.5], [0, 31, 11.5], [0, 0, 1]])
    np.testing.assert_array_equal(capture.points, [p[0] for p in POINTS.values()])
    np.testing.assert_array_equal(capture.points_rgb, [p[1] for p in POINTS.values()])
    assert [v.tolist() for v in capture.point_views] == [[0, 1], [1]] and capture.world == "colmap"


def test_poses_are_world_to_camera_with_the_quaternion_made_unit(tmp_path):
    capture = load_capture(write_capture(tmp_path))
    # a.png: wxyz (2, 0, 0, 2) is a quarter turn about z, x to y. c.png: (1, 1, -1, 1) / 2 is a third of a turn about (1, -1, 1), x to z.
    np.testing.assert_allclose(capture.photos[0].world_to_cam, [[0, -1, 0, 1], [1, 0, 0, -2], [0, 0, 1, 0.5], [0, 0, 0, 1]], atol=1e-15)
    np.testing.assert_allclose(capture.photos[2].world_to_cam, [[0, -1, 0, 0], [0, 0, -1, 0.25], [1, 0, 0, 3], [0, 0, 0, 1]], atol=1e-15)


@pytest.mark.parametrize("place", ["sparse/0", "sparse", "colmap/sparse/0", "."])
def test_the_model_is_found_in_the_usual_places(tmp_path, place):
    write_capture(tmp_path)
    moved = [(tmp_path / "sparse/0" / f"{n}.bin").read_bytes() for n in ("cameras", "images", "points3D")]
    for n in ("cameras", "images", "points3D"):
        (tmp_path / "sparse/0" / f"{n}.bin").unlink()
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for n, data in zip(("cameras", "images", "points3D"), moved):
        (tmp_path / place / f"{n}.bin").write_bytes(data)
    assert len(load_capture(tmp_path).photos) == 3


def test_what_is_left_unread_is_reported(tmp_path):
    write_capture(tmp_path)
    write_model(tmp_path / "sparse" / "1")
    (tmp_path / "transforms.json").write_text("{}")
    lines = []
    load_capture(tmp_path, lines.append)
    assert len(lines) == 2 and "transforms.json is not read" in lines[0] and "only model 0" in lines[1]


def test_a_simple_pinhole_and_a_lens_whose_distortion_is_zero_are_taken(tmp_path):
    cameras = {1: ("SIMPLE_PINHOLE", 32, 24, (30.0, 16.0, 12.0))}
    assert load_capture(write_capture(tmp_path / "a", cameras)).photos[0].K.diagonal().tolist() == [30, 30, 1]
    cameras = {1: ("OPENCV", 32, 24, (30.0, 31.0, 16.0, 12.0, 0.0, 0.0, 0.0, 0.0))}
    assert load_capture(write_capture(tmp_path / "b", cameras)).photos[0].K.diagonal().tolist() == [30, 31, 1]


@pytest.mark.parametrize(("camera", "why"), [
    (("FISHEYE", 32, 24, (30.0, 31.0, 16.0, 12.0)), "camera 1 .FISHEYE.: lens distortion of the model itself: undistort first"),
    (("PINHOLE", 32, 24, (0.0, 31.0, 16.0, 12.0)), "focal lengths must be above 0"),
    (("PINHOLE", 32, 24, (30.0, -31.0, 16.0, 12.0)), "focal lengths must be above 0")])
def test_a_lens_of_unknown_formula_or_without_a_focal_length_is_refused_with_its_values(tmp_path, camera, why):
    with pytest.raises(BadFile, match=why) as error:
        load_capture(write_capture(tmp_path, {1: camera}))
    assert error.value.path == tmp_path / "sparse/0/cameras.bin"


def renamed(name):
    return {7: (name, *IMAGES[7][1:])}


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/etc/passwd", "C:\\out.png", "..\\out.png", "\\\\host\\share\\out.png"])
def test_a_name_that_leaves_the_images_folder_is_refused(tmp_path, name):
    saved(tmp_path / "out.png", noise(32, 24))
    folder = tmp_path / "capture"
    write_capture(folder)
    write_model(folder / "sparse/0", images=renamed(name))
    with pytest.raises(BadFile, match="must lie below"):
        load_capture(folder)


def test_a_link_that_leaves_the_images_folder_is_refused_but_the_folder_itself_may_be_one(tmp_path):
    write_capture(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    assert len(load_capture(tmp_path).photos) == 3
    saved(tmp_path / "out.png", noise(32, 24))
    (tmp_path / "images" / "b.png").unlink()
    (tmp_path / "images" / "b.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(BadFile, match="b.png: is a link to outside"):
        load_capture(tmp_path)


@pytest.mark.parametrize("name", [".", "sub dir", "no.png", "x" * 300, "loop"])
def test_a_name_without_a_photo_is_refused(tmp_path, name):
    write_capture(tmp_path)
    (tmp_path / "images" / "loop").symlink_to("loop")
    write_model(tmp_path / "sparse/0", images=renamed(name))
    with pytest.raises(BadFile, match="no such file|not a regular file|cannot be found"):
        load_capture(tmp_path)


def test_one_photo_under_two_names_is_refused(tmp_path):
    write_capture(tmp_path)
    write_model(tmp_path / "sparse/0", images={**IMAGES, 8: ("./a.png", *IMAGES[7][1:])})
    with pytest.raises(BadFile, match="lists this photo twice"):
        load_capture(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GIF89a" + b"\0" * 50, b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xd8\xff\xe0", b"not a photo at all"])
def test_a_file_that_is_no_photo_is_named_when_the_capture_is_loaded(tmp_path, content):
    write_capture(tmp_path)
    (tmp_path / "images/b.png").write_bytes(content)
    with pytest.raises(BadFile) as error:
        load_capture(tmp_path)
    assert error.value.path == tmp_path / "images/b.png"


def test_an_empty_folder_and_a_model_without_images_or_photos_say_what_is_missing(tmp_path):
    with pytest.raises(BadFile, match="no COLMAP model"):
        load_capture(tmp_path)
    write_model(tmp_path / "sparse/0")
    with pytest.raises(BadFile, match="images: no such folder"):
        load_capture(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(BadFile, match="a.png: no such file"):
        load_capture(tmp_path)
    write_model(tmp_path / "sparse/0", images={})
    with pytest.raises(BadFile, match="no registered image"):
        load_capture(tmp_path)


def test_track_entries_of_images_that_were_removed_by_hand_are_left_out(tmp_path):
    write_capture(tmp_path)
    write_model(tmp_path / "sparse/0", images={2: IMAGES[2], 5: IMAGES[5]})
    assert [v.tolist() for v in load_capture(tmp_path).point_views] == [[0], []]


@pytest.mark.parametrize(("size", "taken"), [((16, 12), True), ((64, 48), True), ((21, 16), True), ((16, 14), False), ((24, 32), False)])
def test_photos_of_another_size_scale_k_by_exact_ratios_or_are_refused_when_their_shape_differs(tmp_path, size, taken):
    write_capture(tmp_path, size=size)
    lines = []
    if not taken:
        with pytest.raises(BadFile, match=f"is {size[0]}x{size[1]}, which is not the shape of camera 1"):
            load_capture(tmp_path)
        return
    p = load_capture(tmp_path, lines.append).photos[0]
    assert (p.width, p.height) == size and lines == [f"{tmp_path}: 3 of 3 photos are {size[0]}x{size[1]} where the cameras say 32x24: "
                                                     "intrinsics scaled to fit"]
    np.testing.assert_allclose(p.K, [[30 * size[0] / 32, 0, 16.5 * size[0] / 32], [0, 31 * size[1] / 24, 11.5 * size[1] / 24], [0, 0, 1]])


@pytest.fixture(scope="module")
def plush(data_dir):
    return load_capture(data_dir / "plush")


def test_plush_has_48_photos_and_its_points_are_seen_where_they_project(plush, data_dir):
    assert len(plush.photos) == 48 and plush.points.shape == (6444, 3)
    assert [p.name for p in plush.photos] == sorted(p.name for p in plush.photos) == sorted(os.listdir(data_dir / "plush" / "images"))
    assert 4.8 < np.mean([len(v) for v in plush.point_views]) < 4.9       # README: mean track 4.9, a few see a point twice
    seen_by = np.zeros((48, 6444), bool)
    for point, views in enumerate(plush.point_views):
        seen_by[views, point] = True
    for p, seen in zip(plush.photos, seen_by):
        in_camera = plush.points[seen] @ p.world_to_cam[:3, :3].T + p.world_to_cam[:3, 3]
        uv = (in_camera @ p.K.T)[:, :2] / in_camera[:, 2:]
        assert (in_camera[:, 2] > 0).all() and (uv > -5).all() and (uv < (p.width + 5, p.height + 5)).all()


# Pixels

def test_pixels_are_float32_rgb_between_0_and_1(tmp_path):
    pixels = noise(7, 5)
    pixels[0, 0], pixels[4, 6] = 0, 255
    image = load_image(photo(saved(tmp_path / "p.png", pixels), 7, 5))
    assert image.dtype == np.float32 and image[0, 0].tolist() == [0, 0, 0] and image[4, 6].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(image, pixels.astype(np.float32) / np.float32(255))


def test_a_white_photo_stays_white_when_it_is_made_smaller(tmp_path):
    """Its shares of an area add up to 1 + 1e-7 in float32."""
    white = np.full((42, 20, 3), 255, np.uint8)
    assert area_average(white, 10, 24).max() > 255
    assert load_image(photo(saved(tmp_path / "p.png", white), 20, 42), 10, 24).max() == 1


def exact_area_average(pixels: np.ndarray, n_out: int) -> np.ndarray:
    """Along the first axis, in rational weights, one pixel at a time."""
    n_in, out = len(pixels), np.zeros((n_out, *pixels.shape[1:]))
    for i in range(n_out):
        a, b = Fraction(i * n_in, n_out), Fraction((i + 1) * n_in, n_out)
        for j in range(n_in):
            covered = min(b, j + 1) - max(a, j)
            if covered > 0:
                out[i] += float(covered / (b - a)) * pixels[j]
    return out


@pytest.mark.parametrize(("size", "to"), [((80, 59), (40, 29)), ((80, 60), (40, 30)), ((37, 53), (5, 52)), ((64, 8), (1, 1)),
                                          ((9, 7), (9, 3)), ((5, 5), (8, 6))])
def test_shrinking_is_the_exact_area_average(size, to):
    pixels = noise(*size)
    expected = exact_area_average(exact_area_average(pixels, to[1]).transpose(1, 0, 2), to[0]).transpose(1, 0, 2)
    got = area_average(pixels, *to)
    assert got.dtype == np.float32 and got.shape == (to[1], to[0], 3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=255 * 4e-7)      # a few float32 roundings of 255; measured 1.0e-7 of it
    np.testing.assert_allclose(got.mean(), pixels.mean(), rtol=1e-5)


def test_half_size_is_floor_with_k_by_both_exact_ratios(plush):
    whole = plush.photos[0]
    half = half_size(whole)
    assert (half.width, half.height) == (400, 299) and (half_size(whole, 3).width, half_size(whole, 3).height) == (266, 199)
    np.testing.assert_allclose(half.K, whole.K * np.array([[400 / 800], [299 / 599], [1]]), rtol=1e-15)
    torch.testing.assert_close(half.camera(torch.float64).K, whole.camera(torch.float64).resized(400, 299).K)
    image, full = load_image(half), load_image(whole)
    assert image.shape == (299, 400, 3) and full.shape == (599, 800, 3)
    np.testing.assert_array_equal(load_image(whole, 400, 299), image)
    np.testing.assert_allclose(image, area_average(full, 400, 299), atol=1e-6)
    with pytest.raises(ValueError, match="cannot be made 600 times smaller"):
        half_size(whole, 600)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 7, 8])
def test_stored_pixels_count_and_exif_turns_a_photo_only_where_the_camera_says_so(tmp_path, suffix, orientation):
    gradient = np.stack(np.broadcast_arrays(np.arange(48) * 5, np.arange(32)[:, None] * 7, 99), axis=2).astype(np.uint8)
    path = saved(tmp_path / f"p.{suffix}", gradient, orientation, **FORMATS[suffix])
    np.testing.assert_allclose(load_image(photo(path, 48, 32)) * 255, gradient, atol=6 if suffix == "jpg" else 1e-4)
    if orientation < 5:
        with pytest.raises(BadFile, match="48x32, which is not the shape of its camera, 32x48"):
            load_image(photo(path, 32, 48))
        return
    turned = {5: gradient.transpose(1, 0, 2), 6: np.rot90(gradient, -1), 7: np.rot90(gradient, 2).transpose(1, 0, 2), 8: np.rot90(gradient)}
    for width, height in ((32, 48), (16, 24)):
        expected = area_average(turned[orientation], width, height)
        np.testing.assert_allclose(load_image(photo(path, width, height)) * 255, expected, atol=6 if suffix == "jpg" else 1e-4)


@pytest.mark.parametrize(("orientation", "camera_size", "line"), [
    (6, (32, 24), "3 of 3 photos have an EXIF orientation that is ignored"), (6, (24, 32), "3 of 3 photos are turned as their EXIF")])
def test_what_becomes_of_an_exif_orientation_is_reported(tmp_path, orientation, camera_size, line):
    write_capture(tmp_path, {1: ("PINHOLE", *camera_size, PINHOLE[1][3])})
    for path in (tmp_path / "images").rglob("*.png"):
        saved(path, noise(32, 24), orientation)
    lines = []
    capture = load_capture(tmp_path, lines.append)
    assert len(lines) == 1 and line in lines[0] and (capture.photos[0].width, capture.photos[0].height) == camera_size
    assert load_image(capture.photos[0]).shape == (*camera_size[::-1], 3)


@pytest.mark.parametrize(("mode", "suffix"), [
    ("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("I;16", "png"), ("L", "jpg"), ("CMYK", "jpg"),
    ("RGBA", "webp"), ("I;16", "tif")])
def test_every_usual_kind_of_pixel_becomes_rgb(tmp_path, mode, suffix):
    grey = np.linspace(0, 255, 32 * 24).reshape(24, 32).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey)
    if mode not in ("I;16", "P"):
        image = image.convert("RGB")        # a palette of 256 greys is made of grey only
    image = image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / f"p.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    got = load_image(photo(tmp_path / f"p.{suffix}", 32, 24))
    assert got.shape == (24, 32, 3)
    if mode != "1":
        np.testing.assert_allclose(got * 255, np.repeat(grey[:, :, None], 3, axis=2), atol=12 if suffix == "jpg" else 1e-3)


def test_pixels_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((24, 32), np.float32)).save(tmp_path / "p.tif")
    with pytest.raises(BadFile, match="pixels of kind 'F'"):
        load_image(photo(tmp_path / "p.tif", 32, 24))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_photo_cut_in_its_pixels_is_refused_by_name(tmp_path, suffix):
    path = saved(tmp_path / f"p.{suffix}", noise(64, 48), **FORMATS[suffix])
    whole = path.read_bytes()
    for part in (0.0, 0.1, 0.5, 0.9, 0.98):
        path.write_bytes(whole[:int(part * len(whole))])
        with pytest.raises(BadFile) as error:
            load_image(photo(path, 64, 48))
        assert error.value.path == path


def test_a_photo_of_another_shape_than_its_record_is_refused(tmp_path):
    with pytest.raises(BadFile, match="32x24, which is not the shape of its camera, 24x24"):
        load_image(photo(saved(tmp_path / "p.png", noise(32, 24)), 24, 24))


def png_that_says(width: int, height: int) -> bytes:
    """A few hundred bytes that unpack to width x height black pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compress(b"\0" * min((width // 8 + 1) * height, 1 << 16), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(20_000, 10_001), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_a_picture_that_unpacks_to_too_many_pixels_or_none_is_refused_unopened(tmp_path, width, height):
    write_capture(tmp_path)
    (tmp_path / "images/b.png").write_bytes(png_that_says(width, height))
    with pytest.raises(BadFile, match="at most 200 megapixels" if width else "b.png") as error:
        load_capture(tmp_path)
    assert error.value.path == tmp_path / "images/b.png"


def test_a_photo_of_108_megapixels_is_not_too_large(tmp_path):
    write_capture(tmp_path, {1: ("PINHOLE", 12_000, 9_000, (9000.0, 9000.0, 6000.0, 4500.0))})
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(png_that_says(12_000, 9_000))
    assert load_capture(tmp_path, pytest.fail).photos[0].width == 12_000


@both
@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_mutants_of_captures_give_finite_photos_or_bad_file_and_nothing_else(tmp_path, name, text):
    path = write_capture(tmp_path, text=text) / "sparse/0" / f"{name}{'.txt' if text else '.bin'}"
    for damaged in mutants(path.read_bytes(), 100, seed=len(name) + text):
        path.write_bytes(damaged)
        try:
            capture = load_capture(tmp_path)
        except BadFile:
            continue
        assert capture.photos and len(capture.point_views) == len(capture.points)
        assert all(torch.isfinite(p.camera().K).all() and torch.isfinite(p.camera().world_to_cam).all() for p in capture.photos)
        assert np.isfinite(capture.points.astype(np.float32)).all()
        assert all(v.max(initial=0) < len(capture.photos) for v in capture.point_views)


def test_a_photo_record_can_be_made_smaller_without_the_file(tmp_path):
    p = photo(tmp_path / "absent.png", 32, 24)
    assert dataclasses.asdict(half_size(p))["width"] == 16
    with pytest.raises(BadFile, match="absent.png: no such file"):
        load_image(p)
