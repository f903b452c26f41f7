"""Every backend draws the picture of the reference, and the reference that of two programs written separately."""
import inspect
import math

import numpy as np
import pytest
import torch
from backends import BACKENDS, OUTPUTS, each_backend, each_backend_in_double, random_scene, render, ring
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tolerances import F32, F64, GRADIENT, ON_PAPER, PICTURE, PICTURE_OF_MANY, assert_near, assert_same_l2

from splatkit import raster
from splatkit.camera import Cameras
from splatkit.raster.reference import ellipsoid_axes, project
from splatkit.raster.types import RasterSettings, RasterStats
from splatkit.scene import sh_basis

DEFAULT = RasterSettings()


# ---- the reference against a plain loop


def scalar_picture(scene, cameras, background, s: RasterSettings):
    """All outputs of one camera by a loop over pixels and Gaussians in Python floats (degree 0 or 1), straight from the formulas."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    matmul = lambda A, B: [[dot(row, column) for column in zip(*B)] for row in A]
    transposed = lambda A: [list(column) for column in zip(*A)]
    pose, K = cameras.world_to_cam[0].tolist(), cameras.K[0].tolist()
    R, t0 = [row[:3] for row in pose[:3]], [row[3] for row in pose[:3]]
    fx, fy, cx, cy, width, height = K[0][0], K[1][1], K[0][2], K[1][2], cameras.width, cameras.height
    centre = [-dot(column, t0) for column in zip(*R)]
    drawn = []
    for i in range(len(scene)):
        m = scene.means[i].tolist()
        r20, r21, r22, t2 = (np.float32(x) for x in pose[2])
        key = ((r20 * np.float32(m[0]) + r21 * np.float32(m[1])) + r22 * np.float32(m[2])) + t2
        if not key >= np.float32(s.near):
            continue
        x, y, z = (dot(row, m) + t for row, t in zip(R, t0))
        q = scene.quats[i].tolist()
        w, a, b, c = (v / math.sqrt(dot(q, q)) for v in q)
        turn = [[w * w + a * a - b * b - c * c, 2 * (a * b - w * c), 2 * (a * c + w * b)],
                [2 * (a * b + w * c), w * w - a * a + b * b - c * c, 2 * (b * c - w * a)],
                [2 * (a * c - w * b), 2 * (b * c + w * a), w * w - a * a - b * b + c * c]]
        variances = [[math.exp(2 * l) if j == k else 0.0 for k in range(3)] for j, l in enumerate(scene.log_scales[i].tolist())]
        world = matmul(matmul(turn, variances), transposed(turn))
        u = min(max(x / z, (-cx - s.fov_margin * width / 2) / fx), (width - cx + s.fov_margin * width / 2) / fx)
        v = min(max(y / z, (-cy - s.fov_margin * height / 2) / fy), (height - cy + s.fov_margin * height / 2) / fy)
        J = matmul([[fx / z, 0, -fx * u * z / z**2], [0, fy / z, -fy * v * z / z**2]], R)
        (xx, xy), (_, yy) = matmul(matmul(J, world), transposed(J))
        before = xx * yy - xy * xy
        xx, yy = xx + s.blur_px2, yy + s.blur_px2
        det = xx * yy - xy * xy
        opacity = 1 / (1 + math.exp(-scene.logit_opacities[i].item())) * (math.sqrt(max(0.0, before / det)) if s.antialias else 1)
        if opacity < s.alpha_min:
            continue
        reach = 2 * math.log(opacity / s.alpha_min)
        px, py, rx, ry = fx * x / z + cx, fy * y / z + cy, math.sqrt(reach * xx), math.sqrt(reach * yy)
        if not any(abs(j + 0.5 - px) <= rx for j in range(width)) or not any(abs(j + 0.5 - py) <= ry for j in range(height)):
            continue
        d = [p - q for p, q in zip(m, centre)]
        d = [p / math.sqrt(dot(d, d)) for p in d]
        basis = [0.28209479177387814, -0.4886025119029199 * d[1], 0.4886025119029199 * d[2], -0.4886025119029199 * d[0]]
        color = [max(0.0, 0.5 + dot(basis, channel)) for channel in scene.sh[i].T.tolist()]
        drawn.append((key, i, px, py, yy / det, -xy / det, xx / det, opacity, z, color, scene.features[i].tolist(), max(rx, ry)))
    drawn.sort(key=lambda g: g[:2])

    F = scene.features.shape[1]
    out = {"color": np.zeros((height, width, 3)), "features": np.zeros((height, width, F))}
    out |= {name: np.zeros((height, width)) for name in ("alpha", "expected_depth", "median_depth")}
    for row in range(height):
        for column in range(width):
            T, color, features, depth, median = 1.0, np.zeros(3), np.zeros(F), 0.0, 0.0
            for _, _, px, py, xx, xy, yy, opacity, z, c, f, _ in drawn:
                dx, dy = column + 0.5 - px, row + 0.5 - py
                alpha = opacity * math.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)
                if alpha < s.alpha_min:
                    continue
                alpha = min(s.alpha_max, alpha)
                if T * (1 - alpha) < s.transmittance_min:
                    break
                color, features, depth = color + alpha * T * np.array(c), features + alpha * T * np.array(f), depth + alpha * T * z
                median = z if T > 0.5 >= T * (1 - alpha) else median
                T *= 1 - alpha
            out["color"][row, column] = color + T * np.array(background)
            out["features"][row, column], out["median_depth"][row, column] = features, median
            out["alpha"][row, column], out["expected_depth"][row, column] = 1 - T, depth / (1 - T) if 1 - T > 1e-6 else 0
    radii = np.zeros(len(scene))
    for g in drawn:
        radii[g[1]] = g[-1]
    return out | {"radii_px": radii}


@each_backend_in_double
@pytest.mark.parametrize("seed, settings", [
    (0, DEFAULT), (1, RasterSettings(antialias=True)),
    (2, RasterSettings(alpha_min=0.1, alpha_max=0.6, transmittance_min=0.2, fov_margin=0.0, near=2.0))])
def test_the_picture_is_that_of_a_plain_loop(backend, seed, settings):
    scene = random_scene(40, seed, degree=1, channels=2)
    opaque = torch.arange(40) % 4 == 0
    scene = scene.replace(logit_opacities=scene.logit_opacities + 6.0 * opaque, log_scales=scene.log_scales + 0.5 * opaque[:, None])
    cameras = ring(1, 23, 18, distance=1.6)
    out = render(scene, cameras, outputs=OUTPUTS, background=torch.tensor([[0.1, 0.6, 0.3]], dtype=F64), settings=settings, backend=backend)
    expected = scalar_picture(scene, cameras, [0.1, 0.6, 0.3], settings)
    assert 0 < (expected["radii_px"] > 0).sum() < 40
    for name, value in expected.items():
        assert_near(getattr(out, name)[0], value, ON_PAPER, name)


# ---- every backend against the reference


def assert_same_picture(scene, cameras, dtype, backend, tolerance=PICTURE, background=None, **arguments):
    """All outputs of `backend` in `dtype` against the reference in float64; inputs are float32 numbers."""
    convert = lambda x, d: None if x is None else x.to(dtype=d)
    draw = lambda d, b: render(scene.to(dtype=d), cameras.to(dtype=d), background=convert(background, d), backend=b,
                               outputs=OUTPUTS if scene.features is not None else OUTPUTS[:3], **arguments)
    actual, expected = draw(dtype, backend), draw(F64, "reference")
    assert torch.equal(actual.visible, expected.visible)
    for name in (*OUTPUTS, "alpha", "radii_px"):
        if getattr(expected, name) is not None:
            assert getattr(actual, name).dtype == dtype
            assert_same_l2(getattr(actual, name), getattr(expected, name), tolerance, name)


@each_backend
@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize("seed, degree", [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)])
def test_random_scenes_look_the_same_everywhere(backend, dtype, seed, degree, antialias):
    background = torch.tensor([[0.5, 0.25, 0.75], [0.125, 1.0, 0.0]]) if seed % 2 else None
    assert_same_picture(random_scene(50, seed, degree, channels=3), ring(2, 31, 22), dtype, backend, background=background,
                        settings=RasterSettings(antialias=antialias))


@each_backend
def test_hundreds_of_gaussians_over_several_tiles_with_row_ranges_look_the_same(backend, dtype):
    cameras = ring(3, 50, 37).replace(rows=torch.tensor([[0, 300], [100, 250], [40, 40]]))
    assert_same_picture(random_scene(300, seed=11, channels=2), cameras, dtype, backend, PICTURE_OF_MANY)


@each_backend
@pytest.mark.parametrize("channels", [1, 3, 4, 32, 100, 384, 1024])
def test_any_number_of_channels_is_drawn_and_differentiated(backend, dtype, channels):
    scene, cameras = random_scene(20, seed=channels, degree=0, channels=channels), ring(1, 19, 18)

    def picture_and_gradients(dtype, backend):
        leaves = scene.to(dtype=dtype).clone().requires_grad_()
        features = render(leaves, cameras.to(dtype=dtype), outputs=("features",), backend=backend).features
        (features * torch.linspace(-1, 1, channels).to(dtype)).square().sum().backward()
        return features.detach(), leaves.features.grad, leaves.means.grad

    actual, expected = picture_and_gradients(dtype, backend), picture_and_gradients(F64, "reference")
    for a, e, tolerance in zip(actual, expected, (PICTURE, GRADIENT, GRADIENT)):
        assert_same_l2(a, e, tolerance)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.integers(1, 40), height=st.integers(1, 40), n=st.integers(0, 40), seed=st.integers(0, 10**6), growth=st.floats(-4, 3),
       distance=st.floats(0.1, 6), alpha_min=st.sampled_from([0.0, 1 / 255, 0.3]), antialias=st.booleans(),
       near=st.sampled_from([0.01, 0.5, 2.0]))
def test_any_size_count_and_distance_looks_the_same(backend, width, height, n, seed, growth, distance, alpha_min, antialias, near):
    scene = random_scene(n, seed, degree=seed % 4, channels=seed % 3 + 1)
    scene = scene.replace(log_scales=(scene.log_scales + growth).float().double())
    settings = RasterSettings(alpha_min=alpha_min, antialias=antialias, near=near)
    assert_same_picture(scene, ring(1, width, height, distance=distance), F64, backend, settings=settings)


# ---- gsplat's own torch code, where it is installed


@pytest.fixture
def gsplat():
    return pytest.importorskip("gsplat.cuda._torch_impl", reason="gsplat is not installed", exc_type=ImportError)


def test_projection_is_that_of_gsplat(gsplat):
    scene, cameras = random_scene(50, seed=3), ring(2, distance=0.6)
    axes = ellipsoid_axes(scene)
    _, means2d, depths, conics, compensations = gsplat._fully_fused_projection(
        scene.means, axes @ axes.mT, cameras.world_to_cam, cameras.K, cameras.width, cameras.height, calc_compensations=True)
    for c in range(2):
        plain, antialiased = (project(scene, cameras[c], RasterSettings(antialias=on)) for on in (False, True))
        seen = depths[c] > 0.1
        assert 10 < seen.sum() < 50
        for ours, theirs in ((plain.mean_px, means2d[c]), (plain.z, depths[c]), (plain.inverse, conics[c]),
                             (antialiased.opacity / plain.opacity, compensations[c])):
            assert_same_l2(ours[seen], theirs[seen], GRADIENT)


def test_covariance_is_that_of_gsplat(gsplat):
    scene = random_scene(20, seed=4)
    axes = ellipsoid_axes(scene)
    theirs, _ = gsplat._quat_scale_to_covar_preci(scene.quats, scene.log_scales.exp(), compute_preci=False)
    assert_same_l2(axes @ axes.mT, theirs, ON_PAPER)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_spherical_harmonics_are_those_of_gsplat(gsplat, degree):
    g = torch.Generator().manual_seed(degree)
    directions, sh = torch.randn(30, 3, generator=g, dtype=F64), torch.randn(30, (degree + 1) ** 2, 3, generator=g, dtype=F64)
    ours = torch.einsum("nk,nkc->nc", sh_basis(torch.nn.functional.normalize(directions, dim=1), degree), sh)
    assert_near(ours, gsplat._spherical_harmonics(degree, directions, sh), ON_PAPER)


# ---- what render() refuses


def faulty(**changes):
    """Arguments of render() for four Gaussians and two cameras, with `changes`."""
    return dict(scene=random_scene(4, dtype=F32), cameras=ring(2, dtype=F32), backend="reference") | changes


def cameras_with(**changes) -> Cameras:
    cameras = ring(2, dtype=F32)
    for name, (where, value) in changes.items():
        tensor = getattr(cameras, name).clone()
        tensor[where] = value
        cameras = cameras.replace(**{name: tensor})
    return cameras


@pytest.mark.parametrize("arguments, error, text", [
    (lambda: faulty(outputs="color"), ValueError, "outputs.*expected_depth"),
    (lambda: faulty(outputs=("color", "depth")), ValueError, "outputs.*expected_depth"),
    (lambda: faulty(outputs=("features",)), ValueError, "features"),
    (lambda: faulty(background=torch.zeros(3, 3)), ValueError, r"background.*\[2, 3\]"),
    (lambda: faulty(background=torch.zeros(4)), ValueError, r"background.*\[2, 3\]"),
    (lambda: faulty(background=torch.zeros(2, 3, dtype=F64)), TypeError, "background.*float64.*float32"),
    (lambda: faulty(cameras=ring(2, dtype=F64)), TypeError, "float64.*float32"),
    (lambda: faulty(cameras=ring(2, dtype=F32).to(device="meta")), ValueError, "meta.*cpu"),
    (lambda: faulty(sh_degree=4), ValueError, "sh_degree.*3"),
    (lambda: faulty(sh_degree=-1), ValueError, "sh_degree"),
    (lambda: faulty(stats=RasterStats.zeros(3)), ValueError, "stats.*3.*4"),
    (lambda: faulty(backend="opengl"), ValueError, "opengl.*reference"),
    (lambda: faulty(cameras=ring(2, dtype=F32).replace(rows=torch.tensor([[0, 4], [0, 5]]))), ValueError, "rows.*4"),
    (lambda: faulty(cameras=ring(2, dtype=F32).replace(rows=torch.tensor([[0, 4], [3, 2]]))), ValueError, "rows"),
    (lambda: faulty(cameras=cameras_with(world_to_cam=((1, 0, 3), math.nan))), ValueError, "camera 1.*NaN"),
    (lambda: faulty(cameras=cameras_with(K=((1, 0, 0), -20.0))), ValueError, "camera 1.*focal"),
    (lambda: faulty(cameras=cameras_with(K=((1, 0, 1), 0.5))), ValueError, "camera 1.*skew"),
], ids=lambda value: None)
def test_render_says_what_is_wrong(arguments, error, text):
    as_users_call_it = inspect.unwrap(raster.render)        # without the annotations that only the test run enforces
    with pytest.raises(error, match=text):
        as_users_call_it(**arguments())


@each_backend
@pytest.mark.parametrize("field", ["means", "quats", "log_scales", "logit_opacities", "sh", "features"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_by_field_and_row(backend, dtype, field, value):
    scene = random_scene(6, channels=2, dtype=dtype)
    scene.fields()[field].view(6, -1)[4, -1] = value
    with pytest.raises(ValueError, match=rf"scene\.{field}.* row 4"):
        render(scene, ring(1, dtype=dtype), outputs=("color", "features"), backend=backend)


@each_backend
@pytest.mark.parametrize("field", ["means", "quats", "log_scales", "logit_opacities", "sh"])
def test_largest_numbers_are_still_finite_values(backend, dtype, field):
    scene = random_scene(6, dtype=dtype)
    for value in (torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        changed = scene.clone()
        changed.fields()[field].view(6, -1)[4] = value
        leaves = changed.requires_grad_()
        out = render(leaves, ring(1, dtype=dtype), backend=backend)
        others = [0, 1, 2, 3, 5]
        assert torch.equal(out.visible[0, others], render(scene, ring(1, dtype=dtype), backend=backend).visible[0, others])
        assert out.alpha.isfinite().all()
