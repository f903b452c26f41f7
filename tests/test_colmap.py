"""COLMAP models: what the reader gives and what it refuses."""
import struct

import numpy as np
import pytest
from tiny_colmap import IMAGES, PINHOLE, POINTS, write_model

from splatkit.errors import BadFile
from splatkit.io import colmap

FILES = ("cameras", "images", "points3D")
both = pytest.mark.parametrize("text", [False, True], ids=["bin", "txt"])


def assert_is_the_tiny_model(model):
    assert {k: (c.model, c.width, c.height, tuple(c.params.values())) for k, c in model.cameras.items()} == PINHOLE
    assert list(model.images) == list(IMAGES)
    for key, (name, camera, quat, translation, observed) in IMAGES.items():
        image = model.images[key]
        assert (image.name, image.camera_id, tuple(image.quat), tuple(image.translation)) == (name, camera, quat, translation)
        np.testing.assert_array_equal(image.points2d, np.array([o[:2] for o in observed]).reshape(-1, 2))
    np.testing.assert_array_equal(model.points, [p[0] for p in POINTS.values()])
    np.testing.assert_array_equal(model.points_rgb, [p[1] for p in POINTS.values()])
    for i, point in enumerate(POINTS.values()):
        np.testing.assert_array_equal(model.tracks[model.track_starts[i]:model.track_starts[i + 1]], point[3])


@both
def test_a_model_reads_back_as_it_was_written(tmp_path, text):
    assert_is_the_tiny_model(colmap.read_model(write_model(tmp_path, text=text)))


def test_binary_wins_where_both_forms_lie_together(tmp_path):
    write_model(tmp_path, cameras={1: ("PINHOLE", 32, 24, (99.0, 99.0, 16.0, 12.0))}, text=True)
    assert_is_the_tiny_model(colmap.read_model(write_model(tmp_path)))


def test_rigs_and_frames_beside_the_model_are_ignored(tmp_path):
    for name in ("rigs.bin", "frames.bin"):
        (tmp_path / name).write_bytes(b"\xff" * 100)
    assert_is_the_tiny_model(colmap.read_model(write_model(tmp_path)))


def test_text_with_carriage_returns_and_without_comments_reads_the_same(tmp_path):
    write_model(tmp_path, text=True)
    for name in FILES:
        path = tmp_path / f"{name}.txt"
        lines = [line for line in path.read_bytes().split(b"\n") if not line.startswith(b"#")]
        path.write_bytes(b"\r\n".join(lines))
    assert_is_the_tiny_model(colmap.read_model(tmp_path))


@both
def test_a_model_without_points_is_read(tmp_path, text):
    model = colmap.read_model(write_model(tmp_path, points={}, text=text))
    assert model.points.shape == (0, 3) and model.tracks.shape == (0, 2) and model.track_starts.tolist() == [0]


def test_an_empty_points_text_file_means_no_points_as_colmaps_faq_tells_users_to_make_it(tmp_path):
    write_model(tmp_path, text=True)
    (tmp_path / "points3D.txt").write_text("")
    assert colmap.read_model(tmp_path).points.shape == (0, 3)


@both
def test_distortion_parameters_come_by_name_and_only_zeros_are_a_pinhole(tmp_path, text):
    k = (30.0, 31.0, 16.0, 12.0)
    cameras = {1: ("SIMPLE_RADIAL", 32, 24, (30.0, 16.0, 12.0, 0.0)), 2: ("OPENCV", 32, 24, (*k, 0.1, 0.0, -0.01, 0.0)),
               3: ("OPENCV_FISHEYE", 32, 24, (*k, 0.0, 0.0, 0.0, 0.0)), 4: ("FISHEYE", 32, 24, k)}
    read = colmap.read_model(write_model(tmp_path, cameras, text=text)).cameras
    assert [read[k].is_pinhole for k in (1, 2, 3, 4)] == [True, False, False, False]
    assert read[2].distortion == {"k1": 0.1, "k2": 0.0, "p1": -0.01, "p2": 0.0}


@both
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused(tmp_path, name, text):
    path = write_model(tmp_path, text=text) / f"{name}{'.txt' if text else '.bin'}"
    whole = path.read_bytes()
    for size in {*range(1 if name == "points3D" else 0, len(whole), 7), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(BadFile) as error:
            colmap.read_model(tmp_path)
        assert error.value.path == path


@both
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name, text):
    path = write_model(tmp_path, text=text) / f"{name}{'.txt' if text else '.bin'}"
    path.unlink()
    with pytest.raises(BadFile, match=f"{name}|no cameras"):
        colmap.read_model(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_bytes_after_the_last_record_are_refused(tmp_path, name):
    path = write_model(tmp_path) / f"{name}.bin"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BadFile, match="1 bytes follow"):
        colmap.read_model(tmp_path)


@pytest.mark.parametrize(("name", "at"), [("cameras", 0), ("images", 0), ("points3D", 0), ("images", 8 + 64 + 6), ("points3D", 8 + 43)])
@pytest.mark.parametrize("count", [2**31, 2**40, 2**61, 2**64 - 1])
def test_a_count_beyond_the_file_is_refused_before_memory_is_asked_for(tmp_path, name, at, count):
    path = write_model(tmp_path) / f"{name}.bin"
    data = bytearray(path.read_bytes())
    data[at:at + 8] = struct.pack("<Q", count)
    path.write_bytes(data)
    with pytest.raises(BadFile, match="ends early"):
        colmap.read_model(tmp_path)


def image(name="a.png", camera=1, quat=(1, 0, 0, 0), translation=(0, 0, 0), observed=()):
    return (name, camera, quat, translation, list(observed))


@both
@pytest.mark.parametrize(("images", "why"), [
    ({1: image(quat=(0, 0, 0, 0))}, "no valid pose"), ({1: image(quat=(1, 0, float("nan"), 0))}, "no valid pose"),
    ({1: image(translation=(float("inf"), 0, 0))}, "no valid pose"), ({1: image(camera=3)}, "camera 3 is not in"),
    ({1: image(), 2: image()}, "appears twice"), ({1: image(observed=[(float("nan"), 0.0, -1)])}, "not finite"),
    ({1: image(name="a\tb\x01.png")}, "has the name")])
def test_an_image_that_cannot_be_used_is_refused_by_name(tmp_path, images, why, text):
    with pytest.raises(BadFile, match=why):
        colmap.read_model(write_model(tmp_path, images=images, text=text))


@both
@pytest.mark.parametrize(("camera", "why"), [
    (("PINHOLE", 0, 24, (1.0, 1.0, 1.0, 1.0)), "0 x 24"), (("PINHOLE", 10**9, 24, (1.0, 1.0, 1.0, 1.0)), "expected 1 to 32768"),
    (("PINHOLE", 32, 24, (float("nan"), 1.0, 1.0, 1.0)), "not finite"), (("PINHOLE", 32, 24, (1.0, 1.0, 1.0)), "ends early|parameters")])
def test_a_camera_that_cannot_be_used_is_refused(tmp_path, camera, why, text):
    with pytest.raises(BadFile, match=why):
        colmap.read_model(write_model(tmp_path, {1: camera}, text=text))


@both
def test_a_point_that_is_not_finite_is_refused(tmp_path, text):
    with pytest.raises(BadFile, match="point 0: its position"):
        colmap.read_model(write_model(tmp_path, points={1: ((0.0, float("nan"), 1.0), (0, 0, 0), 0.0, [])}, text=text))


def reprojection_errors(model) -> np.ndarray:
    """Pixels between each track element and its point's projection, in track order, by a projection written out here."""
    point = np.repeat(np.arange(len(model.points)), np.diff(model.track_starts))
    errors = np.full(len(point), np.nan)
    for key, image in model.images.items():
        seen = model.tracks[:, 0] == key
        w, x, y, z = image.quat / np.linalg.norm(image.quat)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        in_camera = model.points[point[seen]] @ (np.eye(3) + 2 * w * cross + 2 * cross @ cross).T + image.translation
        p = model.cameras[image.camera_id].params
        f = (p["fx"], p["fy"]) if "fx" in p else (p["f"], p["f"])
        uv = in_camera[:, :2] / in_camera[:, 2:]
        uv = uv * (1 + p.get("k", 0.0) * (uv**2).sum(axis=1, keepdims=True)) * f + (p["cx"], p["cy"])
        errors[seen] = np.linalg.norm(uv - image.points2d[model.tracks[seen, 1]], axis=1)
    return errors


@pytest.mark.parametrize(("scene", "images", "points", "tracks", "per_observation", "per_point"), [
    ("plush/sparse/0", 48, 6444, 31325, 0.64, 0.60), ("plush/distorted/sparse/0", 48, 6444, 31325, 0.64, 0.60),
    ("banana/sparse/0", 14, 6851, 24523, 0.17, 0.17)])
def test_real_tracks_reproject_as_their_readme_says(data_dir, scene, images, points, tracks, per_observation, per_point):
    model = colmap.read_model(data_dir / scene)
    assert (len(model.images), len(model.points), len(model.tracks)) == (images, points, tracks)
    errors = reprojection_errors(model)
    assert abs(errors.mean() - per_observation) < 0.0055
    assert abs(np.mean([e.mean() for e in np.split(errors, model.track_starts[1:-1])]) - per_point) < 0.0055    # as COLMAP averages


def test_text_and_binary_form_of_a_real_scene_agree(data_dir):
    undistorted, distorted = (colmap.read_model(data_dir / "plush" / f) for f in ("sparse/0", "distorted/sparse/0"))
    assert {i.name for i in undistorted.images.values()} == {i.name for i in distorted.images.values()}
    np.testing.assert_allclose(np.sort(undistorted.points, axis=0), np.sort(distorted.points, axis=0), rtol=0, atol=1e-12)
