"""What a run's DATA is: photos with poses, smaller copies of them, or bare photos."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_colmap import IMAGES, write_capture

from splatkit.errors import BadFile
from splatkit.io.photos import half_size, load_capture, load_image, load_mask
from splatkit.io.source import bare_photos, is_bare, load_source

NAMES = [image[0] for image in IMAGES.values()]


def write_copies(folder: Path, factor: int, size: tuple[int, int], value: int = 77) -> None:
    for name in NAMES:
        path = folder / f"images_{factor}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (value, 0, 0)).save(path)


@pytest.mark.parametrize(("factor", "size"), [(2, (16, 12)), (4, (8, 6)), (8, (4, 3))])
def test_smaller_copies_are_read_with_k_by_their_exact_ratios(tmp_path, factor, size):
    write_capture(tmp_path)
    write_copies(tmp_path, factor, size)
    lines = []
    capture, left = load_source(tmp_path, tmp_path / "run", factor, lines.append)
    assert left == 1 and f"{tmp_path}: the photos are read from images_{factor}" in lines
    for small, whole in zip(capture.photos, load_capture(tmp_path).photos):
        half = half_size(whole, factor)
        assert (small.width, small.height) == size and small.path == tmp_path / f"images_{factor}" / small.name
        np.testing.assert_allclose(small.K, half.K, rtol=1e-15)
        assert load_image(small)[0, 0].tolist() == [np.float32(77) / np.float32(255), 0, 0]


@pytest.mark.parametrize("size", [(17, 12), (16, 13), (17, 13)])
def test_smaller_copies_may_be_rounded_up(tmp_path, size):
    write_capture(tmp_path, {1: ("PINHOLE", 33, 25, (30.0, 31.0, 16.5, 12.5))}, size=(33, 25))
    write_copies(tmp_path, 2, size)
    photo = load_source(tmp_path, tmp_path, 2)[0].photos[0]
    np.testing.assert_allclose(photo.K[:2].diagonal(), [30 * size[0] / 33, 31 * size[1] / 25], rtol=1e-15)


@pytest.mark.parametrize("downscale", [1, 2.5, 3, 4, 16])
def test_another_downscale_reads_the_photos_themselves(tmp_path, downscale):
    write_capture(tmp_path)
    write_copies(tmp_path, 2, (16, 12))
    (tmp_path / "images_16").mkdir()
    capture, left = load_source(tmp_path, tmp_path, downscale, pytest.fail)
    assert left == downscale and capture.photos[0].path.parent == tmp_path / "images"


@pytest.mark.parametrize("size", [(8, 6), (15, 12), (16, 11), (32, 24)])
def test_copies_of_another_size_are_named_with_what_to_do(tmp_path, size):
    write_capture(tmp_path)
    write_copies(tmp_path, 2, (16, 12))
    Image.new("RGB", size).save(tmp_path / "images_2" / "b.png")
    with pytest.raises(BadFile, match=f"is {size[0]}x{size[1]}.*32x24") as error:
        load_source(tmp_path, tmp_path, 2)
    assert error.value.path == tmp_path / "images_2" / "b.png"


def test_a_missing_copy_is_named(tmp_path):
    write_capture(tmp_path)
    write_copies(tmp_path, 2, (16, 12))
    (tmp_path / "images_2" / "b.png").unlink()
    with pytest.raises(BadFile, match="images_2/b.png: no such file"):
        load_source(tmp_path, tmp_path, 2)


def test_masks_go_with_smaller_copies_only_where_they_are_small_too(tmp_path):
    write_capture(tmp_path)
    write_copies(tmp_path, 2, (16, 12))
    for folder, size in (("masks", (32, 24)), ("masks_2", (16, 12))):
        (tmp_path / folder).mkdir()
        Image.new("L", size, 255).save(tmp_path / folder / "a.png.png")
        capture, left = load_source(tmp_path, tmp_path, 2)
        photo = capture.photos[0]
        assert (left, photo.path.parent.name, photo.mask.parent.name) == ((2, "images", "masks") if folder == "masks" else (1, "images_2", "masks_2"))
        assert load_mask(photo, 16, 12).all()


def test_the_split_is_that_of_mip_nerf_360(tmp_path):
    photos = [f"{i:02d}.png" for i in range(19)]
    images = {i + 1: (name, 1, (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0), []) for i, name in enumerate(reversed(photos))}
    capture = load_capture(write_capture(tmp_path, images=images, points={}))
    names = [p.name for p in capture.photos]
    train, held = capture.split(8)
    # all_indices % llffhold == 0 over the sorted names (multinerf, internal/datasets.py).
    assert [names[i] for i in held] == [name for k, name in enumerate(sorted(names)) if k % 8 == 0] == ["00.png", "08.png", "16.png"]
    assert sorted(train + held) == list(range(19))


def test_a_folder_is_bare_when_it_holds_photos_and_no_poses(tmp_path):
    assert not is_bare(tmp_path) and not is_bare(tmp_path / "absent") and bare_photos(tmp_path) == []
    with pytest.raises(BadFile, match="no COLMAP model, no transforms.json, and no photos"):
        load_source(tmp_path, tmp_path)
    with pytest.raises(BadFile, match="absent: no such folder or film"):
        load_source(tmp_path / "absent", tmp_path)
    for name in ("b.JPG", "a.heic", "c.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    assert is_bare(tmp_path) and [p.name for p in bare_photos(tmp_path)] == ["a.heic", "b.JPG"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "d.png").write_bytes(b"")
    assert [p.name for p in bare_photos(tmp_path)] == ["d.png"]
    (tmp_path / "transforms.json").write_text("{}")
    assert not is_bare(tmp_path)
    (tmp_path / "transforms.json").unlink()
    write_capture(tmp_path)
    assert not is_bare(tmp_path)


def test_bare_photos_without_poses_say_which_command_finds_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(BadFile, match="no poses of the photos of .*splatkit reconstruct .* -o .*run"):
        load_source(tmp_path, tmp_path / "run")
