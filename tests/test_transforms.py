"""transforms.json: what load_transforms gives for the files of nerfstudio, instant-ngp and Blender, and what it refuses."""
import copy
import json
import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import mutants
from PIL import Image
from tiny_colmap import write_capture

from splatkit.errors import BadFile
from splatkit.io.photos import load_capture, load_image
from splatkit.io.transforms import BYTES_MAX, load_transforms

# Columns: right, up, back. The first looks along -z from (1, 2, 3); the second stands at (0, 5, 0), is level and looks along +x.
ALONG_Z = [[1.0, 0, 0, 1], [0, 1.0, 0, 2], [0, 0, 1.0, 3], [0, 0, 0, 1]]
ALONG_X = [[0.0, 0, -1, 0], [0, 1, 0, 5], [1, 0, 0, 0], [0, 0, 0, 1]]
FROM_COLMAP = [[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]      # what nerfstudio writes: (x, y, z) -> (x, z, -y)
POINT_HEADER = "ply\nformat {} 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
POINT_COLOURS = "property uchar red\nproperty uchar green\nproperty uchar blue\n"


def nerfstudio() -> dict:
    return {"w": 32, "h": 24, "fl_x": 30.0, "fl_y": 31.0, "cx": 16.5, "cy": 11.5, "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0,
            "camera_model": "OPENCV", "frames": [
                {"file_path": "images/b.png", "transform_matrix": ALONG_X, "colmap_im_id": 2},
                {"file_path": "images/a.png", "transform_matrix": ALONG_Z, "colmap_im_id": 1}]}


def instant_ngp() -> dict:
    angle = 2 * math.atan(16 / 30)
    return {"camera_angle_x": angle, "camera_angle_y": 0.7, "fl_x": 30.0, "fl_y": 31.0, "k1": 0.0, "k2": 0.0, "k3": 0, "k4": 0, "p1": 0.0,
            "p2": 0.0, "is_fisheye": False, "cx": 16.5, "cy": 11.5, "w": 32.0, "h": 24.0, "aabb_scale": 32, "frames": [
                {"file_path": "./images/b.png", "sharpness": 21.5, "transform_matrix": ALONG_X},
                {"file_path": "./images/a.png", "sharpness": math.nan, "transform_matrix": ALONG_Z}]}


def blender(split: str) -> dict:
    return {"camera_angle_x": 2 * math.atan(16 / 30), "frames": [
        {"file_path": f"./{split}/r_{i}", "rotation": 0.01, "transform_matrix": m} for i, m in enumerate((ALONG_Z, ALONG_X))]}


def picture(path: Path, size=(32, 24), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)
    return path


def write(folder: Path, top, name="transforms.json", photos=True) -> Path:
    """The json, and unless `photos` is False a photo for every frame of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(top))
    for frame in top["frames"] if photos else []:
        path = folder / frame["file_path"]
        picture(path if path.suffix else path.with_suffix(".png"))
    return folder


def edited(**changes) -> dict:
    return {**nerfstudio(), **changes}


def with_frame(**changes) -> dict:
    """The frame of a.png changed."""
    top = nerfstudio()
    top["frames"][1].update(changes)
    return top


def assert_is_the_tiny_capture(capture, prefix="images/"):
    assert [p.name for p in capture.photos] == [f"{prefix}a.png", f"{prefix}b.png"] and capture.world == "transforms.json"
    for p in capture.photos:
        assert (p.width, p.height, p.mask) == (32, 24, None)
        np.testing.assert_allclose(p.K, [[30, 0, 16.5], [0, 31, 11.5], [0, 0, 1]], rtol=1e-15)
    np.testing.assert_allclose(capture.photos[0].world_to_cam, [[1, 0, 0, -1], [0, -1, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1]], atol=1e-15)
    np.testing.assert_allclose(capture.photos[1].world_to_cam, [[0, 0, 1, 0], [0, -1, 0, 5], [1, 0, 0, 0], [0, 0, 0, 1]], atol=1e-15)


# What the three writers write

def test_a_file_of_nerfstudio_gives_photos_by_name_with_world_to_camera_in_opencv_axes(tmp_path):
    capture = load_transforms(write(tmp_path, nerfstudio()), pytest.fail)
    assert_is_the_tiny_capture(capture)
    assert [p.path for p in capture.photos] == [tmp_path / "images/a.png", tmp_path / "images/b.png"]
    assert capture.points.shape == (0, 3) and capture.points_rgb.shape == (0, 3) and capture.point_views == ()
    assert_is_the_tiny_capture(load_transforms(tmp_path / "transforms.json", pytest.fail))


def test_a_file_of_instant_ngp_is_read_with_its_names_as_written(tmp_path):
    assert_is_the_tiny_capture(load_transforms(write(tmp_path, instant_ngp()), pytest.fail), "./images/")


def test_a_folder_of_blender_gives_its_training_and_test_frames_and_says_what_it_leaves(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path, blender(split), f"transforms_{split}.json")
    lines = []
    capture = load_transforms(tmp_path, lines.append)
    assert [p.name for p in capture.photos] == ["./test/r_0", "./test/r_1", "./train/r_0", "./train/r_1"]
    assert capture.photos[0].path == tmp_path / "test/r_0.png" and capture.world == "transforms.json"
    assert lines == [f"{tmp_path}: not read: transforms_val.json"]
    np.testing.assert_allclose(capture.photos[3].K, [[30, 0, 16], [0, 30, 12], [0, 0, 1]], rtol=1e-15)
    alone = load_transforms(tmp_path / "transforms_val.json", pytest.fail)
    assert [p.name for p in alone.photos] == ["./val/r_0", "./val/r_1"]


def test_what_is_right_of_above_and_before_the_camera_is_right_of_above_and_before_it_in_the_photo(tmp_path):
    p = load_transforms(write(tmp_path, nerfstudio())).photos[0]        # at (1, 2, 3), looks along -z
    x, y, z = p.world_to_cam[:3] @ (1.5, 2.25, 1.0, 1.0)
    assert (x, y, z) == (0.5, -0.25, 2.0)       # y down: above the middle
    assert load_transforms(tmp_path).photos[0].camera(torch.float64).centres.tolist() == [[1, 2, 3]]


# The world

@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("rows", [3, 4])
def test_applied_transform_and_scale_are_undone_for_poses_and_points(tmp_path, rows, scale):
    plain = load_transforms(write(tmp_path / "plain", with_points(tmp_path / "plain", [(1, 2, 3), (4, 5, 6)])))
    applied = np.array([[0, 1, 0, 0.5], [0, 0, 2, -1], [2, 0, 0, 3], [0, 0, 0, 1]])     # turn, stretch and shift
    applied[0, 1] = 2
    forward = np.diag([scale or 1, scale or 1, scale or 1, 1]) @ applied
    points = np.array([(1, 2, 3), (4, 5, 6)]) @ forward[:3, :3].T + forward[:3, 3]
    top = with_points(tmp_path / "moved", points.tolist())
    top["applied_transform"] = applied[:rows].tolist()
    if scale:
        top["applied_scale"] = scale
    for frame in top["frames"]:
        frame["transform_matrix"] = (forward @ np.array(frame["transform_matrix"])).tolist()
    moved = load_transforms(write(tmp_path / "moved", top), pytest.fail)
    assert moved.world == "colmap" and plain.world == "transforms.json"
    np.testing.assert_allclose(moved.points, plain.points, rtol=1e-6)       # float32 in the file
    for a, b in zip(moved.photos, plain.photos):
        np.testing.assert_allclose(a.world_to_cam, b.world_to_cam, atol=1e-14)


def test_the_transform_of_nerfstudio_is_undone_as_its_source_says(tmp_path):
    write(tmp_path, edited(applied_transform=FROM_COLMAP))
    p = load_transforms(tmp_path).photos[0]
    np.testing.assert_allclose(-p.world_to_cam[:3, :3].T @ p.world_to_cam[:3, 3], [1, -3, 2])        # (x, y, z) with (x, z, -y) = (1, 2, 3)


def test_a_mirror_in_applied_transform_is_undone_but_a_pose_that_stays_mirrored_is_refused(tmp_path):
    mirror = [[-1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    write(tmp_path, edited(applied_transform=mirror))
    with pytest.raises(BadFile, match="mirror image"):
        load_transforms(tmp_path)
    top = edited(applied_transform=mirror)
    for frame in top["frames"]:
        frame["transform_matrix"] = (np.diag([-1.0, 1, 1, 1]) @ frame["transform_matrix"]).tolist()
    np.testing.assert_allclose(load_transforms(write(tmp_path, top)).photos[0].world_to_cam[:3, 3], [-1, 2, 3])


def test_a_pose_may_have_three_rows_and_one_uniform_scale(tmp_path):
    scaled = (np.array(ALONG_Z) * [[3, 3, 3, 1]])[:3].tolist()
    np.testing.assert_array_equal(load_transforms(write(tmp_path, with_frame(transform_matrix=scaled))).photos[0].world_to_cam[:3],
                                  [[1, 0, 0, -1], [0, -1, 0, 2], [0, 0, -1, 3]])


def test_two_files_in_different_worlds_are_refused(tmp_path):
    write(tmp_path, blender("train"), "transforms_train.json")
    write(tmp_path, {**blender("test"), "applied_scale": 2.0}, "transforms_test.json")
    with pytest.raises(BadFile, match="not given in both transforms_train.json and transforms_test.json"):
        load_transforms(tmp_path)


# Intrinsics

@pytest.mark.parametrize(("top", "frame", "K"), [
    ({}, {"fl_x": 40, "cx": 15}, (40, 31, 15, 11.5)),
    ({"fl_y": None}, {}, (30, 30, 16.5, 11.5)),
    ({"fl_x": None}, {}, (31, 31, 16.5, 11.5)),
    ({"cx": None, "cy": None}, {}, (30, 31, 16, 12)),
    ({}, {"camera_angle_x": 2 * math.atan(16 / 50)}, (50, 31, 16.5, 11.5)),
    ({"fl_x": None, "fl_y": None, "camera_angle_x": 2 * math.atan(16 / 50)}, {}, (50, 50, 16.5, 11.5)),
    ({"fl_x": None, "fl_y": None, "camera_angle_x": 2 * math.atan(16 / 50), "camera_angle_y": 2 * math.atan(12 / 45)}, {},
     (50, 45, 16.5, 11.5)),
    ({"fl_x": None, "fl_y": None, "cx": None, "cy": None, "w": None, "h": None, "camera_angle_x": math.pi / 2}, {}, (16, 16, 16, 12))])
def test_intrinsics_come_from_the_frame_then_the_file_then_angle_centre_and_photo(tmp_path, top, frame, K):
    top = {key: value for key, value in {**with_frame(**frame), **top}.items() if value is not None}
    a = load_transforms(write(tmp_path, top), pytest.fail).photos[0]
    np.testing.assert_allclose(a.K, [[K[0], 0, K[2]], [0, K[1], K[3]], [0, 0, 1]], rtol=1e-14)
    assert (a.width, a.height) == (32, 24)


def test_frames_may_have_sizes_and_lenses_of_their_own(tmp_path):
    write(tmp_path, with_frame(w=20, h=30, fl_x=11, fl_y=12, cx=9, cy=14))
    picture(tmp_path / "images/a.png", (20, 30))
    a, b = load_transforms(tmp_path, pytest.fail).photos
    assert (a.width, a.height, a.K[0, 0], a.K[1, 2]) == (20, 30, 11, 14) and (b.width, b.height, b.K[0, 0]) == (32, 24, 30)


def test_photos_of_another_size_scale_k_and_are_refused_when_their_shape_differs_as_for_colmap(tmp_path):
    write(tmp_path, nerfstudio())
    for name in "ab":
        picture(tmp_path / f"images/{name}.png", (64, 48))
    lines = []
    np.testing.assert_array_equal(load_transforms(tmp_path, lines.append).photos[0].K, [[60, 0, 33], [0, 62, 23], [0, 0, 1]])
    assert lines == [f"{tmp_path}: 2 of 2 photos are 64x48 where the cameras say 32x24: intrinsics scaled to fit"]
    picture(tmp_path / "images/a.png", (24, 24))
    with pytest.raises(BadFile, match="is 24x24, which is not the shape of the camera of images/a.png, 32x24"):
        load_transforms(tmp_path)


def test_an_exif_orientation_turns_a_photo_only_where_its_camera_says_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, nerfstudio())
    picture(tmp_path / "images/a.png", (24, 32), exif=exif)
    lines = []
    assert load_transforms(tmp_path, lines.append).photos[0].width == 32 and "1 of 2 photos are turned" in lines[0]


@pytest.mark.parametrize(("changes", "model", "params"), [
    ({"k1": 0.02}, "OPENCV", {"k1": 0.02}), ({"camera_model": "PINHOLE", "p2": -1e-3}, "OPENCV", {"p2": -1e-3}),
    ({"k3": 0.01, "k4": 1e-3}, "OPENCV", {"k3": 0.01, "k4": 1e-3}), ({"camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE", {}),
    ({"is_fisheye": True, "k2": 0.01}, "OPENCV_FISHEYE", {"k2": 0.01}),
    ({"camera_model": "FULL_OPENCV", "k1": 0.02, "k6": 0.01}, "FULL_OPENCV", {"k1": 0.02, "k6": 0.01})])
def test_a_lens_at_either_level_gives_the_undistorted_picture_and_says_so(tmp_path, changes, model, params):
    for top, count in ((edited(**changes), 2), (with_frame(**changes), 1)):
        lines = []
        a, b = load_transforms(write(tmp_path, top), lines.append).photos
        assert (a.lens.model, a.lens.params, a.lens.width, a.lens.height) == (model, params, 32, 24)
        np.testing.assert_array_equal(a.lens.K, [[30, 0, 16.5], [0, 31, 11.5], [0, 0, 1]])
        assert (b.lens is None) == (count == 1)
        assert lines == [f"{tmp_path}: {count} of 2 photos are undistorted ({model}): 32x24 -> {a.width}x{a.height}"]
        assert load_image(a).shape == (a.height, a.width, 3)


@pytest.mark.parametrize(("changes", "why"), [
    ({"k1": -50.0}, "without distortion"), ({"k1": 0.02, "mask_path": "images/a.png"}, "a mask of a photo with lens distortion"),
    ({"k5": 0.1}, "k5: not a coefficient of OPENCV;"),
    ({"p1": 0.1, "camera_model": "OPENCV_FISHEYE"}, "p1: not a coefficient of OPENCV_FISHEYE;"),
    ({"camera_model": "EQUIRECTANGULAR"}, "camera_model 'EQUIRECTANGULAR'; known")])
def test_a_lens_that_cannot_be_used_is_refused_with_its_frame(tmp_path, changes, why):
    with pytest.raises(BadFile, match=why) as error:
        load_transforms(write(tmp_path, with_frame(**changes)))
    assert error.value.path == tmp_path / "transforms.json" and error.value.where == "frames[1] (images/a.png)"


# Files beside the json

@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_a_name_without_suffix_finds_its_photo(tmp_path, suffix):
    write(tmp_path, with_frame(file_path="images/frame.0001"), photos=False)
    picture(tmp_path / "images/b.png")
    picture(tmp_path / f"images/frame.0001{suffix}")
    (tmp_path / "images/frame.0001").mkdir()        # no photo, whatever its name
    assert load_transforms(tmp_path, pytest.fail).photos[1].path == tmp_path / f"images/frame.0001{suffix}"


def test_of_several_suffixes_png_counts_first_and_the_name_as_written_before_all(tmp_path):
    write(tmp_path, with_frame(file_path="images/c"))
    picture(tmp_path / "images/c.jpg")
    assert load_transforms(tmp_path).photos[1].path.name == "c.png"
    picture(tmp_path / "images/c.jpg").rename(tmp_path / "images/c")
    assert load_transforms(tmp_path).photos[1].path.name == "c"


def test_frames_without_a_photo_are_left_out_and_counted_in_one_line(tmp_path):
    top = nerfstudio()
    write(tmp_path, top)
    top["frames"] += [{"file_path": f"images/gone_{i}.png", "transform_matrix": ALONG_Z} for i in range(5)]
    write(tmp_path, top, photos=False)
    lines = []
    assert len(load_transforms(tmp_path, lines.append).photos) == 2
    assert lines == [f"{tmp_path}: 5 of 7 frames have no photo and are left out: "
                     "images/gone_0.png, images/gone_1.png, images/gone_2.png, ..."]


def test_no_photo_at_all_is_refused(tmp_path):
    with pytest.raises(BadFile, match="none of the 2 photos exists: images/b.png, images/a.png$"):
        load_transforms(write(tmp_path, nerfstudio(), photos=False))


@pytest.mark.parametrize("key", ["file_path", "mask_path", "ply_file_path"])
@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/etc/passwd", "C:\\out.png", "..\\out.png", "link.png"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name, key):
    picture(tmp_path / "out.png")
    write(tmp_path / "capture", nerfstudio())
    (tmp_path / "capture/link.png").symlink_to(tmp_path / "out.png")
    write(tmp_path / "capture", edited(ply_file_path=name) if key == "ply_file_path" else with_frame(**{key: name}), photos=False)
    with pytest.raises(BadFile, match="must lie below the folder of the json|is a link to outside of the folder of the json"):
        load_transforms(tmp_path / "capture")


def test_a_mask_is_8_bits_of_its_photos_size(tmp_path):
    write(tmp_path, with_frame(mask_path="masks/a.png"))
    with pytest.raises(BadFile, match="masks/a.png: no such file"):
        load_transforms(tmp_path)
    picture(tmp_path / "masks/a.png", mode="L")
    a, b = load_transforms(tmp_path, pytest.fail).photos
    assert a.mask == tmp_path / "masks/a.png" and b.mask is None and a.path.name == "a.png"
    picture(tmp_path / "masks/a.png", (16, 12), "L")
    with pytest.raises(BadFile, match="masks/a.png: 16x12 of kind 'L'; expected 8 bits and the size of its photo, 32x24"):
        load_transforms(tmp_path)
    Image.fromarray(np.zeros((24, 32), np.uint16)).save(tmp_path / "masks/a.png")
    with pytest.raises(BadFile, match="of kind 'I;16'"):
        load_transforms(tmp_path)


def with_points(folder: Path, points, ascii=False, colours=True) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    head = POINT_HEADER.format("ascii" if ascii else "binary_little_endian") + (POINT_COLOURS if colours else "") + "end_header\n"
    rgb = [(255, 0, 7), (1, 2, 3)] if colours else [(), ()]
    rows = [" ".join(map(str, (*p, *c))).encode() + b"\n" if ascii else struct.pack(f"<3f{len(c)}B", *p, *c) for p, c in zip(points, rgb)]
    (folder / "points.ply").write_bytes(head.encode() + b"".join(rows))
    return edited(ply_file_path="points.ply")


@pytest.mark.parametrize("colours", [True, False])
@pytest.mark.parametrize("ascii", [True, False])
def test_points_are_read_with_their_colours_or_grey(tmp_path, ascii, colours):
    capture = load_transforms(write(tmp_path, with_points(tmp_path, [(1, 2.5, -3), (0, 0, 8)], ascii, colours)), pytest.fail)
    np.testing.assert_array_equal(capture.points, [(1, 2.5, -3), (0, 0, 8)])
    np.testing.assert_array_equal(capture.points_rgb, [(255, 0, 7), (1, 2, 3)] if colours else [(128, 128, 128)] * 2)
    assert capture.points_rgb.dtype == np.uint8 and capture.point_views == ()


def test_points_that_are_absent_are_reported_and_points_that_are_damaged_are_refused(tmp_path):
    write(tmp_path, with_points(tmp_path, [(1, 2, 3), (4, 5, 6)]))
    path = tmp_path / "points.ply"
    whole = path.read_bytes()
    for damaged, why in ((b"", "is empty"), (whole[:-1], "ends early"), (whole[:60], "no end_header"),
                         (whole.replace(b"float y", b"float q"), "x, y, z"),
                         (whole[:-15] + struct.pack("<f", math.nan) + whole[-11:], "vertex 1: its position"),
                         (whole.replace(b"uchar red", b"char red"), "vertex 0: its colour is not whole numbers")):
        path.write_bytes(damaged)
        with pytest.raises(BadFile, match=why) as error:
            load_transforms(tmp_path)
        assert error.value.path == path
    path.unlink()
    lines = []
    assert load_transforms(tmp_path, lines.append).points.shape == (0, 3)
    assert lines == [f"{path}: no such file, so there are no sparse points"]


# Damage

@pytest.mark.parametrize(("content", "why"), [
    (b"", "is empty"), (b"\0" * 100, "not JSON"), (b'{"frames": [', "not JSON"), (b"\xff\xfe\x00", "not JSON"),
    (b'{"frames": [1' + b"0" * 5000, "not JSON"), (b"[" * 10_000, "nested too deeply"), (b'{"frames":' * 10_000, "nested too deeply"),
    (b"[]", "list of frames"), (b"{}", "list of frames"), (b"null", "list of frames"), (b'{"frames": {}}', "list of frames"),
    (b'{"frames": []}', "list of frames"), (b'{"frames": [7]}', r"frames\[0\]: 7; expected an object"),
    (b'{"frames": [[[[]]]]}', r"frames\[0\]: list; expected an object")])
def test_what_is_no_json_of_frames_is_refused(tmp_path, content, why):
    path = tmp_path / "transforms.json"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=why) as error:
        load_transforms(tmp_path)
    assert error.value.path == path


def test_a_file_over_64_megabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "transforms.json", "wb") as file:
        file.truncate(BYTES_MAX + 1)
    with pytest.raises(BadFile, match="at most 67108864 are read"):
        load_transforms(tmp_path)


@pytest.mark.parametrize("levels", [50, 900, 940, 960, 970, 980, 990])
@pytest.mark.parametrize("key", ["file_path", "transform_matrix", "fl_x", "camera_model", "mask_path"])
def test_a_nested_value_is_refused_at_every_depth(tmp_path, key, levels):
    write(tmp_path, nerfstudio())
    text = json.dumps(with_frame(**{key: "HERE"})).replace('"HERE"', "[" * levels + "]" * levels)
    (tmp_path / "transforms.json").write_text(text)
    with pytest.raises(BadFile):
        load_transforms(tmp_path)


def pose(**changes) -> list:
    """ALONG_Z with entries changed: m01=5 is row 0, column 1."""
    out = copy.deepcopy(ALONG_Z)
    for key, value in changes.items():
        out[int(key[1])][int(key[2])] = value
    return out


BAD_POSES = [
    None, 5, "eye", [], [[]], [[1, 0, 0, 0]] * 2, [[1, 0, 0]] * 3, [[1, 0, 0, 0]] * 5, pose(m00="1"), pose(m00=True), pose(m00=None),
    pose(m00=[1]), pose(m00=math.nan), pose(m03=math.inf), pose(m03=1e15), pose(m03=10**400), pose(m00=0), pose(m00=1.003), pose(m01=0.002),
    pose(m00=-1), pose(m30=1), pose(m33=2), pose(m33=0), [[0] * 4] * 4, [[1e9, 0, 0, 0], [0, 1e9, 0, 0], [0, 0, 1e9, 0]]]


@pytest.mark.parametrize("bad", BAD_POSES, ids=str)
def test_a_pose_that_is_no_rotation_and_position_is_refused_with_its_frame(tmp_path, bad):
    with pytest.raises(BadFile) as error:
        load_transforms(write(tmp_path, with_frame(transform_matrix=bad)))
    assert error.value.where == "frames[1] (images/a.png)"


@pytest.mark.parametrize("bad", BAD_POSES, ids=str)
def test_an_applied_transform_that_cannot_be_undone_is_refused(tmp_path, bad):
    with pytest.raises(BadFile):
        load_transforms(write(tmp_path, edited(applied_transform=bad)))


def test_a_pose_rounded_to_four_digits_is_made_an_exact_rotation(tmp_path):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rows = np.eye(4)
    rows[:3, :3] = turn * np.sign(np.linalg.det(turn))
    p = load_transforms(write(tmp_path, with_frame(transform_matrix=rows.round(4).tolist()))).photos[0]
    np.testing.assert_allclose(p.world_to_cam[:3, :3] @ p.world_to_cam[:3, :3].T, np.eye(3), atol=1e-14)
    np.testing.assert_allclose(p.world_to_cam[:3, :3].T @ np.diag([1, -1, -1]), rows[:3, :3], atol=1e-4)


NO_FOCAL = {"fl_x": None, "fl_y": None}


@pytest.mark.parametrize("changes", [
    {"fl_x": 0}, {"fl_y": -30}, {"fl_x": 1e9}, {"fl_x": 5e-324, "k1": 0.1}, {"fl_x": math.nan}, {"fl_x": "30"}, {"fl_x": False},
    {"fl_y": 10**400}, {"cx": 1e10}, {"cx": math.inf}, {"cy": []}, {"w": 0}, {"w": -32}, {"w": 32.5}, {"h": 1e6}, {"h": math.nan},
    {"w": "32"}, {"w": {}}, {"k1": math.nan}, {"k1": 1e14}, {"k2": "0"}, {"camera_model": 7}, NO_FOCAL,
    *({**NO_FOCAL, "camera_angle_x": angle} for angle in (0, 5e-324, 3.2, -1, "1")),
    *({"applied_scale": scale} for scale in (0, -1, 1e300, None, math.nan)), {"ply_file_path": 7}, {"ply_file_path": ""},
    {"ply_file_path": "images"}], ids=str)
def test_entries_of_the_file_that_cannot_be_used_are_refused(tmp_path, changes):
    with pytest.raises(BadFile):
        load_transforms(write(tmp_path, edited(**changes)))


@pytest.mark.parametrize("name", [None, 7, "", [], "a\0b", "a\nb", "\ud800", "images/b.png", "./images/b.png", "images//b.png",
                                  "images/b"], ids=repr)
def test_a_name_that_is_none_or_comes_twice_is_refused(tmp_path, name):
    write(tmp_path, nerfstudio())
    with pytest.raises(BadFile, match="expected a file name|appears twice|lists this photo twice") as error:
        load_transforms(write(tmp_path, with_frame(file_path=name), photos=False))
    str(error.value).encode()       # can be printed


@pytest.mark.parametrize("content", [b"", b"GIF89a" + b"\0" * 50, b"\x89PNG\r\n\x1a\n\0\0", b"not a photo at all"])
def test_a_file_that_is_no_photo_is_named(tmp_path, content):
    write(tmp_path, nerfstudio())
    (tmp_path / "images/b.png").write_bytes(content)
    with pytest.raises(BadFile) as error:
        load_transforms(tmp_path)
    assert error.value.path == tmp_path / "images/b.png"


SWAPS = (None, True, 0, -1, 1e300, 10**30, math.nan, math.inf, "", "x", "../x", "images", "images/a.png", [], {}, [[]], [0.0] * 4, ALONG_Z)


def swapped(top: dict, rng: random.Random) -> bytes:
    """One to three values anywhere in the tree replaced, removed or exchanged with another."""
    top = copy.deepcopy(top)
    for _ in range(rng.choice((1, 1, 3))):
        places, stack = [], [top]
        while stack:
            node = stack.pop()
            for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
                places.append((node, key))
                if isinstance(value, dict | list):
                    stack.append(value)
        (a, i), (b, j) = rng.choice(places), rng.choice(places)
        what = rng.randrange(4)
        if what == 0:
            del a[i]
        else:
            a[i] = copy.deepcopy(b[j]) if what == 1 else copy.deepcopy(rng.choice(SWAPS))
    return json.dumps(top).encode()


def test_mutants_of_a_json_give_finite_photos_or_bad_file_and_nothing_else(tmp_path):
    top = {**with_points(tmp_path, [(1, 2, 3), (4, 5, 6)]), "applied_transform": FROM_COLMAP, "applied_scale": 2.0}
    top["frames"][0]["mask_path"] = "images/a.png"
    path = write(tmp_path, top) / "transforms.json"
    rng, whole, refused = random.Random(0), path.read_bytes(), 0
    for damaged in [*mutants(whole, 150, seed=1), *(swapped(top, rng) for _ in range(150))]:
        path.write_bytes(damaged)
        try:
            capture = load_transforms(path)
        except BadFile as e:
            str(e).encode()
            refused += 1
            continue
        assert capture.photos and [p.name for p in capture.photos] == sorted(p.name for p in capture.photos)
        assert all(torch.isfinite(p.camera().K).all() and torch.isfinite(p.camera().world_to_cam).all() for p in capture.photos)
        assert np.isfinite(capture.points.astype(np.float32)).all() and len(capture.points) == len(capture.points_rgb)
    assert 150 < refused < 290


def test_mutants_of_a_point_file_give_finite_points_or_bad_file_and_nothing_else(tmp_path):
    for ascii in (False, True):
        write(tmp_path, with_points(tmp_path, [(1, 2, 3), (4, 5, 6)], ascii))
        for damaged in mutants((tmp_path / "points.ply").read_bytes(), 150, seed=ascii):
            (tmp_path / "points.ply").write_bytes(damaged)
            try:
                capture = load_transforms(tmp_path)
            except BadFile:
                continue
            assert np.isfinite(capture.points.astype(np.float32)).all() and capture.points.shape == capture.points_rgb.shape


# Which source a folder is read from

def test_load_capture_reads_a_transforms_json_where_there_is_no_colmap_model(tmp_path):
    assert_is_the_tiny_capture(load_capture(write(tmp_path / "one", nerfstudio()), pytest.fail))
    assert len(load_capture(write(tmp_path / "two", blender("train"), "transforms_train.json"), pytest.fail).photos) == 2


def test_load_capture_prefers_a_colmap_model_and_says_so(tmp_path):
    write_capture(write(tmp_path, nerfstudio()))
    lines = []
    capture = load_capture(tmp_path, lines.append)
    assert capture.world == "colmap" and len(capture.photos) == 3
    assert lines == [f"{tmp_path}: transforms.json is not read, the COLMAP model in sparse/0 is"]


def test_a_folder_without_either_says_what_was_looked_for(tmp_path):
    with pytest.raises(BadFile, match="no COLMAP model: .*; no transforms.json or transforms_train.json$"):
        load_capture(tmp_path)
    with pytest.raises(BadFile, match="no transforms.json or transforms_train.json$"):
        load_transforms(tmp_path)
    with pytest.raises(BadFile, match="no such file"):
        load_transforms(tmp_path / "transforms.json")


# Real files

@pytest.mark.parametrize("scene", ["plush", "banana", "street"])
def test_real_captures_agree_with_their_colmap_model(data_dir, scene):
    ours, colmap = load_transforms(data_dir / scene, pytest.fail), load_capture(data_dir / scene)
    assert ours.world == "colmap" and [p.name for p in ours.photos] == [f"images/{p.name}" for p in colmap.photos]
    centre = lambda p: -p.world_to_cam[:3, :3].T @ p.world_to_cam[:3, 3]
    for a, b in zip(ours.photos, colmap.photos):
        assert a.path == b.path and (a.width, a.height) == (b.width, b.height)
        np.testing.assert_allclose(a.K, b.K, rtol=1e-12)
        np.testing.assert_allclose(a.world_to_cam[:3, :3], b.world_to_cam[:3, :3], atol=1e-12)
        np.testing.assert_allclose(centre(a), centre(b), atol=1e-10)
    order = lambda c: np.lexsort(np.concatenate([c.points.round(3), c.points_rgb], axis=1).T)
    assert ours.points.shape == colmap.points.shape
    np.testing.assert_allclose(np.sort(ours.points, axis=0), np.sort(colmap.points, axis=0), atol=1e-5)     # float32 in the PLY
    a, b = order(ours), order(colmap)
    assert (ours.points_rgb[a] == colmap.points_rgb[b]).all(axis=1).mean() > 0.99       # a few change places where round(3) falls apart


def test_a_real_capture_with_lens_distortion_is_undistorted_as_its_colmap_model_is(data_dir):
    lines = []
    ours, colmap = load_transforms(data_dir / "plush/distorted", lines.append), load_capture(data_dir / "plush/distorted")
    assert len(lines) == 1 and "48 of 48 photos are undistorted (OPENCV)" in lines[0] and ours.photos[0].lens.params["k1"] > 0.02
    for a, b in zip(ours.photos, colmap.photos):
        assert a.path == b.path and (a.width, a.height) == (b.width, b.height)
        np.testing.assert_allclose(a.K, b.K, rtol=1e-12)
        np.testing.assert_allclose(a.world_to_cam, b.world_to_cam, atol=1e-10)


def test_a_real_metric_capture_without_applied_transform_keeps_its_world(data_dir):
    capture = load_transforms(data_dir / "shelf-rgbd" / "transforms.json", pytest.fail)
    assert len(capture.photos) == 12 and capture.world == "transforms.json" and capture.photos[0].K[0, 2] == 298.442688
