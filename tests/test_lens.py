"""Lens distortion: every model against its formula, the ideal camera behind it, and the pictures that come out."""
import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_colmap import write_capture

from splatkit.capture import Lens
from splatkit.errors import BadFile
from splatkit.io.lens import distort, ideal_camera, remap, undistort
from splatkit.io.photos import half_size, load_capture, load_image

LENSES = {      # one of each model, bent as much as real ones, either way
    "SIMPLE_RADIAL": {"k": 0.02}, "RADIAL": {"k1": -0.3, "k2": 0.12}, "OPENCV": {"k1": -0.25, "k2": 0.08, "p1": 0.003, "p2": -0.002},
    "FULL_OPENCV": {"k1": 0.4, "k2": -0.2, "p1": 0.001, "p2": 0.002, "k3": 0.1, "k4": 0.6, "k5": -0.1, "k6": 0.02},
    "SIMPLE_RADIAL_FISHEYE": {"k": -0.05}, "RADIAL_FISHEYE": {"k1": 0.04, "k2": -0.02},
    "OPENCV_FISHEYE": {"k1": 0.05, "k2": -0.01, "k3": 0.004, "k4": -0.001}}
every_model = pytest.mark.parametrize("model", LENSES)


def lens_of(model: str, params: dict | None = None, f=150.0, width=200, height=150, cx=98.0, cy=77.5) -> Lens:
    K = np.array([[f, 0, cx], [0, 1.01 * f, cy], [0, 0, 1]])
    return Lens(model, K, width, height, LENSES[model] if params is None else params)


def by_formula(model: str, p: dict, x: float, y: float) -> tuple[float, float]:
    """COLMAP's models.h, one point at a time."""
    r2 = x * x + y * y
    if model.endswith("FISHEYE"):
        r = math.sqrt(r2)
        theta = math.atan(r)
        k1, k2, k3, k4 = p.get("k", p.get("k1", 0)), p.get("k2", 0), p.get("k3", 0), p.get("k4", 0)
        shown = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8)
        return (x * shown / r, y * shown / r) if r > 0 else (x, y)
    if model in ("SIMPLE_RADIAL", "RADIAL"):
        radial = 1 + p.get("k", p.get("k1", 0)) * r2 + p.get("k2", 0) * r2**2
        return x * radial, y * radial
    radial = 1 + p["k1"] * r2 + p["k2"] * r2**2
    if model == "FULL_OPENCV":
        radial = (radial + p["k3"] * r2**3) / (1 + p["k4"] * r2 + p["k5"] * r2**2 + p["k6"] * r2**3)
    return (x * radial + 2 * p["p1"] * x * y + p["p2"] * (r2 + 2 * x * x), y * radial + p["p1"] * (r2 + 2 * y * y) + 2 * p["p2"] * x * y)


def pixel_centres(width: int, height: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)


def directions(K: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return (pixels - K[:2, 2]) / K.diagonal()[:2]


def project(K: np.ndarray, xy: np.ndarray) -> np.ndarray:
    return xy * K.diagonal()[:2] + K[:2, 2]


# The models

@every_model
def test_every_model_follows_its_formula(model):
    xy = np.random.default_rng(0).uniform(-0.6, 0.6, (200, 2))
    xy[:3] = [[0, 0], [1e-9, -2e-9], [3e-5, 4e-5]]
    expected = [by_formula(model, LENSES[model], x, y) for x, y in xy.tolist()]
    np.testing.assert_allclose(distort(lens_of(model), xy), expected, rtol=1e-13, atol=1e-18)


@every_model
def test_undistort_is_the_inverse_of_distort(model):
    lens, xy = lens_of(model), np.random.default_rng(1).uniform(-0.6, 0.6, (40, 50, 2))
    xy[0, 0], xy[0, 1] = 0, (0, 1e-7)
    shown = distort(lens, xy)
    assert shown.shape == xy.shape
    np.testing.assert_allclose(undistort(lens, shown), xy, rtol=0, atol=1e-11)
    np.testing.assert_allclose(distort(lens, undistort(lens, shown[0])), shown[0], rtol=0, atol=1e-12)


def test_a_fisheye_is_inverted_far_beyond_45_degrees():
    lens = lens_of("OPENCV_FISHEYE")
    theta = np.linspace(0, 1.45, 50)        # 83 degrees
    xy = np.stack([np.tan(theta) * 0.8, np.tan(theta) * -0.6], axis=1)
    np.testing.assert_allclose(undistort(lens, distort(lens, xy)), xy, rtol=1e-9, atol=1e-12)


def test_a_position_that_the_lens_cannot_show_is_refused():
    # x (1 - x^2 / 2) has its largest value at x = sqrt(2/3): 0.5443
    lens = lens_of("SIMPLE_RADIAL", {"k": -0.5})
    np.testing.assert_allclose(undistort(lens, np.array([[0.5, 0.0]])), [[0.618033988749895, 0]], atol=1e-12)      # x^3 - 2x + 1 = 0
    with pytest.raises(ValueError, match=r"1 of 2 positions lie beyond what the lens SIMPLE_RADIAL, k=-0.5 can show, the first at \[0.55"):
        undistort(lens, np.array([[0.5, 0.0], [0.55, 0.0]]))


def test_an_unknown_model_or_coefficient_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="SIMPLE_RADIAL, k1=0.1 has the unknown coefficient k1; known are k"):
        ideal_camera(lens_of("SIMPLE_RADIAL", {"k1": 0.1}))
    with pytest.raises(ValueError, match="the lens model FOV is not known; known are FULL_OPENCV"):
        ideal_camera(lens_of("FOV", {"omega": 0.5}))


# The ideal camera

def uncovered(lens: Lens, K: np.ndarray, width: int, height: int) -> float:
    """How far, in stored pixels, the worst source of an ideal pixel lies outside of the centres of the stored pixels."""
    pixels = pixel_centres(width, height)
    pixels = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1], pixels[::5, ::5].reshape(-1, 2)])
    rays = directions(K, pixels)
    source = project(lens.K, np.array([by_formula(lens.model, lens.params, x, y) for x, y in rays.tolist()]))
    return float(np.maximum(0.5 - source, source - np.array([lens.width, lens.height]) + 0.5).max())


@every_model
def test_every_ideal_pixel_has_its_source_in_the_stored_picture_and_no_side_could_be_farther_out(model):
    lens = lens_of(model)
    K, width, height = ideal_camera(lens)
    np.testing.assert_array_equal(K.diagonal(), lens.K.diagonal())
    assert uncovered(lens, K, width, height) <= 1e-6 and width * height > 0.9 * lens.width * lens.height
    for left, top, right, bottom in np.eye(4, dtype=int):
        wider = K + np.array([[0, 0, left], [0, 0, top], [0, 0, 0]])
        assert uncovered(lens, wider, width + int(left + right), height + int(top + bottom)) > 1e-6
    np.testing.assert_allclose(remap(np.ones((150, 200, 3), np.float32), lens, K, width, height), 1, rtol=0, atol=1e-6)


def test_zero_coefficients_give_the_stored_picture():
    for model in ("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV"):
        for cx, cy in ((100.0, 75.0), (83.37, 90.1)):
            lens = lens_of(model, {}, cx=cx, cy=cy)
            K, width, height = ideal_camera(lens)
            np.testing.assert_array_equal(K, lens.K)
            assert (width, height) == (200, 150)
    pixels = np.random.default_rng(0).random((150, 200, 3), np.float32)
    np.testing.assert_allclose(remap(pixels, lens, K, width, height), pixels, rtol=0, atol=3e-5)    # float32 grid: 200 px x 6e-8, twice


def test_a_fisheye_of_180_degrees_is_cut_to_twice_the_stored_size():
    lens = lens_of("SIMPLE_RADIAL_FISHEYE", {"k": 0.0}, f=64.0, cx=100.0, cy=75.0)       # 1.56 rad at the left and right: tan is 94
    K, width, height = ideal_camera(lens)
    assert width == 400 and height <= 300 and uncovered(lens, K, width, height) <= 1e-6


def test_only_the_monotonic_part_of_a_lens_is_used():
    # r (1 - r^2) turns back at r = 0.577, where 0.385 is shown: 77 px. The stored corners at 125 px show nothing.
    lens = lens_of("SIMPLE_RADIAL", {"k": -1.0}, f=200.0, cx=100.0, cy=75.0)
    K, width, height = ideal_camera(lens)
    assert uncovered(lens, K, width, height) <= 1e-6
    assert np.linalg.norm(directions(K, pixel_centres(width, height)), axis=-1).max() <= 3**-0.5


@pytest.mark.parametrize(("model", "params", "why"), [
    ("SIMPLE_RADIAL", {"k": -30.0}, "k=-30 leaves .* of its 200x150 pixels without distortion; at least 25% of the area is needed"),
    ("SIMPLE_RADIAL", {"k": 1e3}, "leaves .* pixels without distortion"), ("SIMPLE_RADIAL", {"k": -1e9}, "absurd coefficient"),
    ("RADIAL", {"k1": 1e300, "k2": -1e300}, "absurd coefficient"), ("OPENCV", {"k1": 0.0, "k2": 0.0, "p1": 3.0, "p2": -5.0}, "leaves"),
    ("FULL_OPENCV", {"k4": -400.0}, "leaves"), ("OPENCV_FISHEYE", {"k1": -20.0}, "leaves")])
def test_absurd_coefficients_are_refused_in_one_line(model, params, why):
    with pytest.raises(ValueError, match=why) as error:
        ideal_camera(lens_of(model, params))
    assert "\n" not in str(error.value)


def test_a_principal_point_outside_of_the_picture_is_refused():
    with pytest.raises(ValueError, match="principal point -3, 77.5 outside of its 200x150 picture"):
        ideal_camera(lens_of("SIMPLE_RADIAL", cx=-3.0))


@every_model
def test_any_coefficients_give_a_covered_picture_or_one_line(model):
    rng, taken = np.random.default_rng(7), 0
    for i in range(16):
        params = {name: float(rng.normal() * 10.0 ** rng.uniform(-3, (0.5, 5)[i % 2])) for name in LENSES[model]}
        lens = lens_of(model, params, f=float(rng.uniform(10, 100)), width=40, height=30, cx=float(rng.uniform(1, 39)), cy=12.0)
        try:
            K, width, height = ideal_camera(lens)
        except ValueError as e:
            assert "\n" not in str(e)
            continue
        assert uncovered(lens, K, width, height) <= 1e-6
        taken += 1
    assert 0 < taken < 16


# The picture

def stored_picture(lens: Lens, colour) -> np.ndarray:
    """What the lens shows of a scene at infinity: colour(ideal directions [h, w, 2]) -> [h, w]."""
    shown = colour(undistort(lens, directions(lens.K, pixel_centres(lens.width, lens.height))))
    return np.repeat(shown[..., None], 3, axis=2).astype(np.float32)


@every_model
def test_straight_lines_become_straight(model):
    lens, at = lens_of(model), np.array([-0.3, 0.0, 0.35])
    bands = lambda v: np.exp(-0.5 * ((v[..., None] - at) * 150 / 1.5) ** 2).max(axis=-1)      # soft lines 1.5 px wide
    K, width, height = ideal_camera(lens)
    for axis in (0, 1):
        picture = remap(stored_picture(lens, lambda xy, axis=axis: bands(xy[..., axis])), lens, K, width, height)[..., 0]
        picture = picture if axis == 0 else picture.T
        for line in at * K[axis, axis] + K[axis, 2]:
            columns = np.arange(int(line) - 6, int(line) + 7)
            weight = picture[:, columns]
            centre = (weight * (columns + 0.5)).sum(axis=1) / weight.sum(axis=1)
            assert np.abs(centre - line).max() < 0.05       # bilinear and the cut tails; unbent by a wrong model it is off by pixels


@every_model
def test_a_point_is_where_the_ideal_camera_projects_it(model):
    lens = lens_of(model)
    K, width, height = ideal_camera(lens)
    for point in ([0.31, -0.22], [-0.4, 0.3], [0.02, 0.35]):
        x, y = project(lens.K, np.array([by_formula(model, lens.params, *point)]))[0]
        away = pixel_centres(200, 150) - (x, y)
        pixels = np.exp(-0.5 * (away**2).sum(axis=-1) / 4)[..., None].astype(np.float32)       # drawn where the lens shows it
        weight = remap(pixels, lens, K, width, height)[..., 0]
        centre = (pixel_centres(width, height) * weight[..., None]).sum(axis=(0, 1)) / weight.sum()
        np.testing.assert_allclose(centre, project(K, np.array(point)), rtol=0, atol=0.15)      # a blob of 2 px is bent itself


@pytest.mark.parametrize("model", ["OPENCV", "FULL_OPENCV"])
def test_remap_agrees_with_kornia(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of its own imports
        geometry = pytest.importorskip("kornia.geometry", reason="kornia is not installed (pip install splatkit[geometry])")
    lens = lens_of(model)
    pixels = np.random.default_rng(3).random((15, 20, 3)).repeat(10, axis=0).repeat(10, axis=1).astype(np.float32)
    K = torch.tensor(lens.K - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]))      # its pixel centres are whole numbers
    coefficients = torch.tensor([lens.params.get(name, 0.0) for name in "k1 k2 p1 p2 k3 k4 k5 k6".split()], dtype=torch.float64)
    stored = torch.tensor(pixels, dtype=torch.float64).permute(2, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = geometry.undistort_image(stored, K, coefficients).permute(1, 2, 0).numpy()
    ideal_K, width, height = ideal_camera(lens)
    left, top = (round(float(v)) for v in (lens.K - ideal_K)[:2, 2])
    ours = remap(pixels, lens, ideal_K, width, height)
    rows, columns = slice(max(0, top), min(150, top + height)), slice(max(0, left), min(200, left + width))
    part = ours[rows.start - top:rows.stop - top, columns.start - left:columns.stop - left]
    np.testing.assert_allclose(part, theirs[rows, columns], rtol=0, atol=5e-5)      # our grid is float32: 1.2e-5 px, contrast 1


def test_the_fisheye_agrees_with_kornia():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = "kornia.geometry.camera.distortion_kannala_brandt"
        kannala_brandt = pytest.importorskip(name, reason="kornia is not installed (pip install splatkit[geometry])")
    xy = np.random.default_rng(4).uniform(-2, 2, (100, 2))
    params = torch.tensor([1.0, 1.0, 0.0, 0.0, *LENSES["OPENCV_FISHEYE"].values()], dtype=torch.float64)
    theirs = kannala_brandt.distort_points_kannala_brandt(torch.tensor(xy), params).numpy()
    np.testing.assert_allclose(distort(lens_of("OPENCV_FISHEYE"), xy), theirs, rtol=0, atol=1e-12)


def test_a_picture_of_another_size_than_its_lens_is_refused():
    with pytest.raises(ValueError, match="the picture is 7x5 but its lens 200x150"):
        remap(np.zeros((5, 7, 3), np.float32), lens_of("OPENCV"), np.eye(3), 7, 5)


# The capture

BENT = {1: ("OPENCV", 32, 24, (30.0, 31.0, 16.5, 11.5, -0.2, 0.05, 0.001, 0.002))}


def test_a_distorted_capture_is_undistorted_and_says_so(tmp_path):
    lines = []
    capture = load_capture(write_capture(tmp_path, BENT), lines.append)
    p = capture.photos[0]
    assert lines == [f"{tmp_path}: 3 of 3 photos are undistorted (OPENCV): 32x24 -> {p.width}x{p.height}"]
    assert p.lens.model == "OPENCV" and p.lens.params == {"k1": -0.2, "k2": 0.05, "p1": 0.001, "p2": 0.002}
    K, width, height = ideal_camera(p.lens)
    np.testing.assert_array_equal(p.K, K)
    assert (p.width, p.height) == (width, height) and (p.lens.width, p.lens.height) == (32, 24)
    with Image.open(p.path) as stored:
        expected = remap(np.asarray(stored, np.float32) / 255, p.lens, K, width, height)
    image = load_image(p)
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-6)
    half = half_size(p)
    assert load_image(half).shape == (height // 2, width // 2, 3)
    np.testing.assert_allclose(load_image(half).mean(), image.mean(), rtol=0.03)        # an odd row is spread, not dropped
    np.testing.assert_array_equal(load_image(p, half.width, half.height), load_image(half))


def test_a_lens_scales_with_photos_that_are_stored_in_another_size(tmp_path):
    lines = []
    p = load_capture(write_capture(tmp_path, BENT, size=(96, 72)), lines.append).photos[0]
    assert (p.lens.width, p.lens.height) == (96, 72) and "intrinsics scaled to fit" in lines[0] and "96x72 -> " in lines[1]
    np.testing.assert_allclose(p.lens.K, [[90, 0, 49.5], [0, 93, 34.5], [0, 0, 1]])
    assert load_image(p).shape == (p.height, p.width, 3)
    for path in (tmp_path / "images").rglob("*.png"):       # and once more, after the capture was loaded
        Image.open(path).resize((48, 36)).save(path)
    assert load_image(p).shape == (p.height, p.width, 3)
    Image.open(p.path).resize((48, 40)).save(p.path)
    with pytest.raises(BadFile, match="is 48x40, which is not the shape of its camera, 96x72"):
        load_image(p)


@pytest.mark.parametrize(("camera", "why"), [
    (("THIN_PRISM_FISHEYE", 32, 24, (30.0, 30.0, 16.0, 12.0, 0.1, *[0.0] * 7)), "lens distortion k1=0.1: undistort first"),
    (("SIMPLE_RADIAL", 32, 24, (30.0, 16.0, 12.0, -30.0)), "camera 1 .SIMPLE_RADIAL.: the lens SIMPLE_RADIAL, k=-30 leaves"),
    (("SIMPLE_RADIAL", 32, 24, (30.0, -5.0, 12.0, 0.1)), "principal point -5, 12 outside")])
def test_a_lens_that_cannot_be_used_is_refused_by_the_capture(tmp_path, camera, why):
    with pytest.raises(BadFile, match=why) as error:
        load_capture(write_capture(tmp_path, {1: camera}, text=True))
    assert error.value.path == tmp_path / "sparse/0/cameras.txt"


@pytest.fixture(scope="module")
def plush(data_dir):
    return load_capture(data_dir / "plush" / "distorted"), load_capture(data_dir / "plush")


@pytest.mark.parametrize(("index", "least_db"), [(0, 39), (10, 44), (30, 42)])
def test_plush_is_undistorted_as_colmap_does_it(plush, index, least_db):
    ours, theirs = (capture.photos[index] for capture in plush)
    assert ours.name == theirs.name and (ours.width, ours.height) == (790, 592) and ours.lens.model == "SIMPLE_RADIAL"
    np.testing.assert_allclose(ours.world_to_cam, theirs.world_to_cam, atol=1e-9)
    source = project(theirs.K, directions(ours.K, pixel_centres(ours.width, ours.height)))      # COLMAP's camera has another focal length
    grid = torch.tensor(2 * source / (theirs.width, theirs.height) - 1, dtype=torch.float32)
    common = torch.nn.functional.grid_sample(torch.tensor(load_image(theirs)).permute(2, 0, 1)[None], grid[None], align_corners=False)
    inside = ((source > 0.5) & (source < np.array([theirs.width, theirs.height]) - 0.5)).all(axis=-1)
    error = (common[0].permute(1, 2, 0).numpy() - load_image(ours))[inside]
    assert inside.mean() > 0.98
    assert -10 * math.log10((error**2).mean()) >= least_db      # measured 39.6, 44.6, 42.7: JPEG twice, bilinear twice


def test_plush_without_undistortion_is_far_off(plush):
    """The check above sees the lens."""
    ours, theirs = (capture.photos[0] for capture in plush)
    wrong = dataclasses.replace(ours.lens, params={"k": 0.0})
    with Image.open(ours.path) as stored:
        pixels = np.asarray(stored, np.float32) / 255
    right = remap(pixels, ours.lens, theirs.K, theirs.width, theirs.height)
    plain = remap(pixels, wrong, theirs.K, theirs.width, theirs.height)
    psnr = [-10 * math.log10(((picture - load_image(theirs)) ** 2).mean()) for picture in (right, plain)]
    assert psnr[0] >= 37 and psnr[1] < psnr[0] - 5      # measured 37.9 and 31.9 dB
