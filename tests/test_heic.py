"""HEIC photos: read like any other, through the same guards."""
import sys

import numpy as np
import pytest
from mutants import mutants
from PIL import Image
from tiny_colmap import IMAGES, write_model

from splatkit.capture import Photo
from splatkit.errors import BadFile
from splatkit.io import photos
from splatkit.io.photos import area_average, load_capture, load_image

heif = pytest.importorskip("pillow_heif", reason="the extra heic is absent")
if not heif.libheif_info()["encoders"].get("x265"):
    pytest.skip("this pillow-heif cannot write HEIC", allow_module_level=True)


def gradient(width: int, height: int) -> np.ndarray:
    return np.stack(np.broadcast_arrays(np.arange(width) * 3, np.arange(height)[:, None] * 4, 99), axis=2).astype(np.uint8)


def saved(path, pixels, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    heif.from_pillow(Image.fromarray(pixels)).save(path, quality=95, chroma=444, exif=exif.tobytes())
    return path


def photo(path, width, height) -> Photo:
    return Photo(path.name, path, np.array([[50.0, 0, width / 2], [0, 60.0, height / 2], [0, 0, 1]]), width, height, np.eye(4))


@pytest.mark.parametrize("suffix", ["heic", "HEIF"])
def test_a_heic_photo_is_read_as_rgb_and_made_smaller_like_any_other(tmp_path, suffix):
    pixels = gradient(64, 48)
    path = saved(tmp_path / f"p.{suffix}", pixels)
    np.testing.assert_allclose(load_image(photo(path, 64, 48)) * 255, pixels, atol=6)
    np.testing.assert_allclose(load_image(photo(path, 64, 48), 32, 24) * 255, area_average(pixels, 32, 24), atol=6)


def test_a_heic_photo_is_upright_as_its_file_says(tmp_path):
    pixels = gradient(64, 48)
    path = saved(tmp_path / "p.heic", pixels, 6)
    np.testing.assert_allclose(load_image(photo(path, 48, 64)) * 255, np.rot90(pixels, -1), atol=6)
    with pytest.raises(BadFile, match="is 48x64, which is not the shape"):
        load_image(photo(path, 64, 48))


def test_a_capture_may_hold_heic_photos(tmp_path):
    write_model(tmp_path / "sparse/0", images={7: ("b.heic", *IMAGES[7][1:])})
    (tmp_path / "images").mkdir()
    saved(tmp_path / "images" / "b.heic", gradient(64, 48))
    lines = []
    capture = load_capture(tmp_path, lines.append)
    assert (capture.photos[0].width, capture.photos[0].height) == (64, 48) and "64x48 where the cameras say 32x24" in lines[0]


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = saved(tmp_path / "p.heic", gradient(64, 48))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadFile, match=r"p.heic: is a HEIC picture, which needs the extra `heic`: pip install 'splatkit\[heic\]'"):
        load_image(photo(path, 64, 48))


def test_the_limit_on_pixels_holds_before_anything_is_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "p.heic", gradient(64, 48))
    monkeypatch.setattr(photos, "PIXELS_MAX", 64 * 48 - 1)
    monkeypatch.setattr(heif.HeifImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadFile, match="64x48 pixels; at most"):
        load_image(photo(path, 64, 48))


def test_avif_is_refused_as_no_known_format(tmp_path):
    (tmp_path / "p.heic").write_bytes(b"\0\0\0\x1cftypavif" + b"\0" * 64)
    with pytest.raises(BadFile, match="not a JPEG, PNG, WebP, TIFF or HEIC picture"):
        load_image(photo(tmp_path / "p.heic", 64, 48))


def test_mutants_of_heic_photos_give_finite_pixels_or_bad_file_and_nothing_else(tmp_path):
    path = saved(tmp_path / "p.heic", gradient(32, 24))
    refused = 0
    for damaged in mutants(path.read_bytes(), 300):
        path.write_bytes(damaged)
        try:
            image = load_image(photo(path, 32, 24))
        except BadFile as e:
            assert e.path == path
            refused += 1
            continue
        assert image.shape == (24, 32, 3) and 0 <= image.min() <= image.max() <= 1
    assert refused > 60
