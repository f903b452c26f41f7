"""Derivatives: against finite differences, against the reference, and the ones that must be zero."""
import dataclasses
import functools

import pytest
import torch
from backends import SMOOTH, camera, each_backend, each_backend_in_double, gaussians, random_scene, render, ring
from tolerances import F64, GRADIENT, ON_PAPER, assert_near, assert_same_l2

from splatkit.camera import Cameras
from splatkit.raster.types import RasterSettings, RasterStats
from splatkit.scene import Scene

DEFAULT = RasterSettings()
DIFFERENTIABLE = ("color", "expected_depth", "features")
FIELDS = ("means", "quats", "log_scales", "logit_opacities", "sh", "features")


# ---- against finite differences


def smooth_inputs(degree=3) -> dict[str, torch.Tensor]:
    """Six large, pale, partly transparent Gaussians before two cameras: no colour near its clamp, every pixel covered, depths far apart."""
    g = torch.Generator().manual_seed(5)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    cameras = ring(2, width=12, height=10)
    return dict(means=0.5 * normal(6, 3), quats=normal(6, 4), log_scales=-1.0 + 0.3 * normal(6, 3), logit_opacities=normal(6),
                sh=torch.cat([0.2 * normal(6, 1, 3), 0.05 * normal(6, (degree + 1) ** 2 - 1, 3)], dim=1), features=normal(6, 2),
                pose=cameras.world_to_cam[:, :3].clone(), focal=cameras.K[:, [0, 1], [0, 1]].clone(), centre=cameras.K[:, :2, 2].clone(),
                background=torch.rand(2, 3, generator=g, dtype=F64))


def picture(inputs, backend, settings):
    pose, focal, centre = inputs["pose"], inputs["focal"], inputs["centre"]
    last_row = torch.tensor([[0.0, 0, 0, 1]], dtype=F64).expand(len(pose), 1, 4)
    K = torch.cat([torch.cat([torch.diag_embed(focal), centre[:, :, None]], dim=2), last_row[:, :, 1:]], dim=1)
    cameras = Cameras(torch.cat([pose, last_row], dim=1), K, 12, 10)
    out = render(Scene(**{name: inputs[name] for name in FIELDS}), cameras, outputs=DIFFERENTIABLE, background=inputs["background"],
                 settings=settings, backend=backend)
    return out.color, out.alpha, out.expected_depth, out.features


def check_by_differences(inputs, field, backend, settings):
    """gradcheck of one field. Each output is seen through two fixed random functionals: as telling as its pixels one by one, and fast."""
    rows = slice(0, 2) if field == "sh" else slice(None)        # 48 coefficients each are plenty
    g = torch.Generator().manual_seed(1)
    functionals = [torch.randn(2, value.numel(), generator=g, dtype=F64) / value.numel() ** 0.5
                   for value in picture(inputs, backend, settings)]

    def seen(leaf):
        outputs = picture(inputs | {field: torch.cat([leaf, inputs[field][2:]]) if field == "sh" else leaf}, backend, settings)
        return tuple(f @ value.flatten() for f, value in zip(functionals, outputs))

    leaf = inputs[field][rows].clone().requires_grad_()
    assert all(gradient.abs().max() > 1e-6 for gradient in torch.autograd.grad(sum(x.sum() for x in seen(leaf)), leaf))
    assert torch.autograd.gradcheck(seen, leaf, eps=1e-6, atol=1e-8, rtol=1e-6)


@each_backend_in_double
@pytest.mark.parametrize("field", [*FIELDS, "pose", "focal", "centre", "background"])
def test_gradient_is_the_finite_difference(backend, field):
    inputs = smooth_inputs()
    color, alpha, *_ = picture(inputs, backend, SMOOTH)
    assert alpha.min() > 1e-4 and color.min() > 0
    check_by_differences(inputs, field, backend, SMOOTH)


@each_backend_in_double
@pytest.mark.parametrize("field", ["means", "quats", "log_scales", "logit_opacities", "pose", "focal"])
def test_gradient_through_the_antialias_factor_is_the_finite_difference(backend, field):
    check_by_differences(smooth_inputs(), field, backend, dataclasses.replace(SMOOTH, antialias=True, blur_px2=2.0))


@each_backend_in_double
@pytest.mark.parametrize("field", ["means", "quats", "pose", "focal", "centre"])
def test_gradient_where_the_jacobian_is_held_at_the_margin_is_the_finite_difference(backend, field):
    inputs = smooth_inputs()
    inputs["pose"][:, 0, 3] += 2.0          # out of the picture on the right and above
    inputs["pose"][:, 1, 3] -= 1.5
    inputs["log_scales"] += 1.0
    check_by_differences(inputs, field, backend, dataclasses.replace(SMOOTH, fov_margin=0.0))


# ---- the native library against the reference, with all cut-offs


def gradients(scene, cameras, background, backend, seed=0, **arguments):
    """Of a fixed random functional of all outputs: by field, pose, K and background."""
    leaves = scene.clone().requires_grad_()
    cameras = cameras.replace(world_to_cam=cameras.world_to_cam.clone().requires_grad_(), K=cameras.K.clone().requires_grad_())
    background = background.clone().requires_grad_()
    out = render(leaves, cameras, outputs=DIFFERENTIABLE, background=background, backend=backend, **arguments)
    g = torch.Generator().manual_seed(seed)
    seen = (out.color, out.alpha, out.expected_depth, out.features)
    sum((value * torch.randn(value.shape, generator=g).to(value)).sum() for value in seen).backward()
    return {name: value.grad for name, value in leaves.fields().items()} | {
        "world_to_cam": cameras.world_to_cam.grad, "K": cameras.K.grad, "background": background.grad}


@functools.cache
def mixed_case(seed, degree, antialias):
    """A scene that meets every cut-off, and its gradients by the reference in float64."""
    scene, cameras, settings = random_scene(40, seed, degree, channels=5), ring(2, 27, 21), RasterSettings(antialias=antialias)
    background = torch.tensor([[0.5, 0.25, 0.75], [0.125, 1.0, 0.0]], dtype=F64)
    return scene, cameras, background, settings, gradients(scene, cameras, background, "reference", settings=settings)


@each_backend
@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize("seed, degree", [(0, 3), (1, 0), (2, 1), (3, 2), (4, 3)])
def test_gradients_with_every_cut_off_are_those_of_the_reference(backend, dtype, seed, degree, antialias):
    scene, cameras, background, settings, expected = mixed_case(seed, degree, antialias)
    actual = gradients(scene.to(dtype=dtype), cameras.to(dtype=dtype), background.to(dtype), backend, settings=settings)
    for name, gradient in expected.items():
        assert_same_l2(actual[name], gradient, GRADIENT, name)


@each_backend
def test_gradients_respect_row_ranges(backend, dtype):
    scene, cameras = random_scene(30, channels=2, dtype=dtype), ring(2, dtype=dtype).replace(rows=torch.tensor([[3, 12], [10, 25]]))
    background = torch.zeros(2, 3, dtype=dtype)
    expected = gradients(scene.to(dtype=F64), cameras.to(dtype=F64), background.double(), "reference")
    actual = gradients(scene, cameras, background, backend)
    for name in FIELDS:
        assert (actual[name][:3] == 0).all() and (actual[name][25:] == 0).all(), name
        assert_same_l2(actual[name], expected[name], GRADIENT, name)


# ---- gradients that must be zero, or absent


@each_backend
def test_a_capped_alpha_sends_no_gradient(backend, dtype):
    scene = gaussians([0, 0, 2], scale=0.5, dtype=dtype).requires_grad_()
    alpha = render(scene, camera(dtype=dtype), settings=dataclasses.replace(DEFAULT, alpha_max=0.6), backend=backend).alpha[0, 7, 8]
    assert_near(alpha, 0.6, ON_PAPER)
    alpha.backward()
    assert all(x.grad is None or (x.grad == 0).all() for x in scene.fields().values())


@each_backend
def test_a_hidden_gaussian_gets_no_gradient_and_all_is_finite(backend, dtype):
    scene = gaussians([[0, 0, 2], [0, 0, 3], [0, 0, 4]], scale=50.0, opacity=[0.98, 0.999, 0.5], dtype=dtype).requires_grad_()
    settings = dataclasses.replace(DEFAULT, transmittance_min=1e-3)
    render(scene, camera(dtype=dtype), settings=settings, backend=backend).color.sum().backward()
    assert scene.sh.grad[0, 0, 0] > 0
    assert (scene.sh.grad[1:] == 0).all() and (scene.means.grad[1:] == 0).all() and (scene.logit_opacities.grad[1:] == 0).all()


@each_backend
def test_median_depth_carries_no_gradient(backend, dtype):
    scene = random_scene(10, dtype=dtype).requires_grad_()
    assert not render(scene, ring(1, dtype=dtype), outputs=("median_depth",), backend=backend).median_depth.requires_grad


@each_backend
def test_an_opaque_gaussian_in_front_keeps_gradients_finite(backend, dtype):
    scene = gaussians([[0, 0, 2], [0, 0, 3]], scale=1.0, dtype=dtype)
    scene = scene.replace(logit_opacities=torch.tensor([60.0, 0.0], dtype=dtype)).requires_grad_()
    out = render(scene, camera(dtype=dtype), outputs=("color", "expected_depth"), backend=backend)
    (out.color.sum() + out.expected_depth.sum()).backward()
    assert all(x.grad.isfinite().all() for x in scene.fields().values())


@each_backend
def test_only_what_requires_a_gradient_gets_one(backend, dtype):
    scene = random_scene(10, channels=2, dtype=dtype)
    scene = scene.replace(sh=scene.sh.requires_grad_())
    out = render(scene, ring(1, dtype=dtype), outputs=("color", "features"), backend=backend)
    out.color.sum().backward()
    assert scene.sh.grad.abs().max() > 0
    assert scene.means.grad is None and not out.radii_px.requires_grad and not out.visible.requires_grad
    with torch.no_grad():
        assert not render(scene, ring(1, dtype=dtype), backend=backend).color.requires_grad


@each_backend
def test_the_view_direction_sends_its_gradient_when_the_colours_are_frozen_too(backend, dtype):
    scene, cameras = random_scene(10, dtype=dtype), ring(1, dtype=dtype)

    def of_means(frozen):
        leaves = scene.clone().requires_grad_()
        leaves.sh.requires_grad_(not frozen)
        render(leaves, cameras, backend=backend).color.square().sum().backward()
        return leaves.means.grad

    assert_same_l2(of_means(frozen=True), of_means(frozen=False), ON_PAPER)


@each_backend
def test_a_second_backward_through_the_same_picture_gives_the_same(backend, dtype):
    scene = random_scene(10, dtype=dtype).requires_grad_()
    loss = render(scene, ring(2, dtype=dtype), backend=backend).color.square().sum()
    first, second = (torch.autograd.grad(loss, scene.means, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# ---- the statistics that densification reads


def stats_of(scene, cameras, backend, loss=lambda out: out.color.square().sum() + out.alpha.sum(), settings=DEFAULT) -> RasterStats:
    stats = RasterStats.zeros(len(scene), dtype=scene.dtype)
    loss(render(scene.clone().requires_grad_(), cameras, settings=settings, stats=stats, backend=backend)).backward()
    return stats


@each_backend
def test_stats_of_one_gaussian_are_those_worked_out_on_paper(backend, dtype):
    cameras, slope = camera(dtype=dtype), 0.3
    ramp = slope * (torch.arange(17, dtype=dtype) + 0.5)
    stats = stats_of(gaussians([0, 0, 2], scale=0.1, dtype=dtype), cameras, backend, lambda out: (out.alpha * ramp).sum(), SMOOTH)
    d = torch.arange(17, dtype=F64)[None, :] - 8, torch.arange(15, dtype=F64)[:, None] - 7
    alpha = 0.8 * torch.exp(-0.5 * (d[0] ** 2 + d[1] ** 2) / 1.3)
    by_x, by_y = alpha * d[0] / 1.3 * ramp.double(), alpha * d[1] / 1.3 * ramp.double()
    unit = torch.tensor([17 / 2, 15 / 2], dtype=F64)
    assert_near(stats.grad_sum[0], (torch.stack([by_x.sum(), by_y.sum()]) * unit).norm(), ON_PAPER)
    assert_near(stats.abs_grad_sum[0], (torch.stack([by_x.abs().sum(), by_y.abs().sum()]) * unit).norm(), ON_PAPER)
    assert_near(stats.weight_sum[0], alpha.sum(), ON_PAPER)
    assert stats.count.tolist() == [1]


@each_backend
def test_screen_gradient_of_one_gaussian_is_the_gradient_of_the_principal_point(backend, dtype):
    scene, cameras = random_scene(1, seed=2, dtype=dtype), ring(1, dtype=dtype)
    cameras = cameras.replace(K=cameras.K.clone().requires_grad_())
    stats = RasterStats.zeros(1, dtype=dtype)
    out = render(scene, cameras, stats=stats, backend=backend)
    out.color.square().sum().backward()
    moved = cameras.K.grad[0, :2, 2].double() * torch.tensor([cameras.width / 2, cameras.height / 2], dtype=F64)
    assert stats.grad_sum[0] > 0.05
    assert_near(stats.grad_sum[0], moved.norm(), ON_PAPER)


@each_backend
def test_stats_add_up_over_views_and_are_filled_by_the_backward_alone(backend, dtype):
    scene, cameras = random_scene(25, dtype=dtype), ring(3, dtype=dtype)
    together, one_by_one = stats_of(scene, cameras, backend), RasterStats.zeros(25, dtype=dtype)
    for c in range(3):
        out = render(scene.clone().requires_grad_(), cameras[c], stats=one_by_one, backend=backend)
        before = one_by_one.count.clone()
        (out.color.square().sum() + out.alpha.sum()).backward()
        assert torch.equal(one_by_one.count - before, out.visible[0].long())
    for name in ("grad_sum", "abs_grad_sum", "weight_sum", "max_radius_px", "count"):
        assert_near(getattr(together, name).to(dtype), getattr(one_by_one, name).double(), ON_PAPER, name)
    unused = RasterStats.zeros(25, dtype=dtype)
    render(scene.clone().requires_grad_(), cameras, stats=unused, backend=backend)
    with torch.no_grad():
        render(scene, cameras, stats=unused, backend=backend)
    assert unused.count.sum() == 0


@each_backend
def test_stats_are_those_of_the_reference(backend, dtype):
    scene, cameras = random_scene(40, seed=7), ring(2, 27, 21).replace(rows=torch.tensor([[0, 40], [10, 35]]))
    expected = stats_of(scene, cameras, "reference")
    actual = stats_of(scene.to(dtype=dtype), cameras.to(dtype=dtype), backend)
    assert torch.equal(actual.count, expected.count)
    for name in ("grad_sum", "abs_grad_sum", "weight_sum", "max_radius_px"):
        assert_same_l2(getattr(actual, name), getattr(expected, name), GRADIENT, name)
    assert (expected.abs_grad_sum * (1 + 1e-12) >= expected.grad_sum).all()


def test_the_reference_gives_the_same_gradients_and_stats_in_small_chunks_of_pixels(monkeypatch):
    scene, cameras, background = random_scene(20, channels=2), ring(2), torch.zeros(2, 3, dtype=F64)
    whole, whole_stats = gradients(scene, cameras, background, "reference"), stats_of(scene, cameras, "reference")
    monkeypatch.setattr("splatkit.raster.reference.PIXELS_X_GAUSSIANS", 700)
    for name, gradient in gradients(scene, cameras, background, "reference").items():
        assert_same_l2(gradient, whole[name], ON_PAPER, name)
    assert_same_l2(stats_of(scene, cameras, "reference").abs_grad_sum, whole_stats.abs_grad_sum, ON_PAPER)
