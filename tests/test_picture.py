"""What the picture must be, worked out on paper."""
import dataclasses
import math

import pytest
import torch
from backends import OUTPUTS, SMOOTH, camera, each_backend, gaussians, logit, random_scene, render, ring
from tolerances import F64, ON_PAPER, PICTURE, assert_near, assert_same_l2

from splatkit.camera import Cameras
from splatkit.raster.types import RasterSettings
from splatkit.scene import quat_from_matrix

DEFAULT = RasterSettings()
RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def alpha_on_paper(cameras: Cameras, mean, scale, opacity, settings=DEFAULT, u=None, v=None):
    """[H, W] of one round Gaussian before an untransformed camera: its screen covariance is (f s / z)^2 (1 + slopes slopes^T) + blur."""
    x, y, z = mean
    f, cx, cy = (cameras.K[0, i, j].item() for i, j in ((0, 0), (0, 2), (1, 2)))
    u, v = x / z if u is None else u, y / z if v is None else v
    pixel_scale2 = (f * scale / z) ** 2
    xx, xy, yy = pixel_scale2 * (1 + u * u) + settings.blur_px2, pixel_scale2 * u * v, pixel_scale2 * (1 + v * v) + settings.blur_px2
    dx = torch.arange(cameras.width, dtype=F64)[None, :] + 0.5 - (f * x / z + cx)
    dy = torch.arange(cameras.height, dtype=F64)[:, None] + 0.5 - (f * y / z + cy)
    power = (yy * dx * dx - 2 * xy * dx * dy + xx * dy * dy) / (xx * yy - xy * xy)
    alpha = opacity * torch.exp(-power / 2)
    return torch.where(alpha >= settings.alpha_min, alpha.clamp(max=settings.alpha_max), 0)


# ---- one Gaussian


@each_backend
def test_a_gaussian_on_the_axis_has_the_width_and_height_of_its_projection(backend, dtype):
    cameras = camera(dtype=dtype)
    scene = gaussians([0, 0, 2], scale=0.1, opacity=0.8, color=(1.0, 0.5, 0.25), dtype=dtype)
    out = render(scene, cameras, outputs=("color", "expected_depth"), backend=backend)
    alpha = alpha_on_paper(cameras, (0, 0, 2), 0.1, 0.8)
    assert alpha[7, 8] == 0.8 and alpha[7, 9].item() == pytest.approx(0.8 * math.exp(-0.5 / 1.3))
    assert_near(out.alpha[0], alpha, ON_PAPER)
    assert_near(out.color[0], alpha[..., None] * torch.tensor([1.0, 0.5, 0.25]), ON_PAPER)
    assert_near(out.expected_depth[0], torch.where(alpha > 0, 2.0, 0.0), ON_PAPER)


@each_backend
def test_a_round_gaussian_off_the_axis_becomes_the_ellipse_of_its_slopes(backend, dtype):
    cameras, mean = camera(width=20, height=18, dtype=dtype), (0.5, -0.4, 1.5)
    out = render(gaussians(mean, scale=0.2, opacity=0.6, dtype=dtype), cameras, backend=backend)
    assert_near(out.alpha[0], alpha_on_paper(cameras, mean, 0.2, 0.6), ON_PAPER)


@each_backend
def test_axes_turn_with_the_quaternion_and_scale_one_by_one(backend, dtype):
    # A quarter turn about z takes the long x axis to y. Standard deviations on the screen: 1 px across, 3 px down.
    turn = [math.cos(math.pi / 4), 0, 0, math.sin(math.pi / 4)]
    scene = gaussians([0, 0, 2], dtype=dtype).replace(quats=torch.tensor([turn], dtype=dtype),
                                                      log_scales=torch.tensor([[0.3, 0.1, 0.2]], dtype=dtype).log())
    alpha = render(scene, camera(dtype=dtype), backend=backend).alpha[0]
    assert_near(alpha[7, 10], 0.8 * math.exp(-0.5 * 4 / 1.3), ON_PAPER)
    assert_near(alpha[9, 8], 0.8 * math.exp(-0.5 * 4 / 9.3), ON_PAPER)


@each_backend
def test_the_centre_of_pixel_0_0_is_at_one_half(backend, dtype):
    at_half = render(gaussians([0, 0, 2], dtype=dtype), camera(cx=0.5, cy=0.5, dtype=dtype), backend=backend).alpha[0]
    assert_near(at_half[0, 0], 0.8, ON_PAPER)
    between = render(gaussians([0, 0, 2], dtype=dtype), camera(cx=8.0, cy=7.5, dtype=dtype), backend=backend).alpha[0]
    assert_near(between[7, 7], between[7, 8].item(), ON_PAPER)
    assert between[7, 7] < 0.8 - 1e-3


@each_backend
def test_moving_the_principal_point_by_whole_pixels_moves_the_picture(backend, dtype):
    settings = dataclasses.replace(DEFAULT, fov_margin=math.inf)    # the margin moves with the principal point
    before = camera(width=30, height=26, focal=26.0, dtype=dtype, world_to_cam=ring(1).world_to_cam[0])
    after = before.replace(K=before.K + torch.tensor([[0, 0, 3], [0, 0, -2], [0, 0, 0]], dtype=dtype))
    a, b = (render(random_scene(30, dtype=dtype), c, settings=settings, backend=backend).color[0] for c in (before, after))
    assert a[2:, :-3].abs().max() > 0.1
    assert_near(b[:-2, 3:], a[2:, :-3].double(), ON_PAPER)


@each_backend
def test_the_jacobian_of_a_gaussian_far_outside_is_taken_at_the_margin(backend, dtype):
    cameras, mean, scale = camera(dtype=dtype, cx=7.0), (6.0, -0.1, 2.0), 3.0
    half_view = 0.5 * 17 / 20
    u = (17 - 7.0) / 20 + 0.3 * half_view               # x/z = 3 lies far beyond
    out = render(gaussians(mean, scale=scale, dtype=dtype), cameras, backend=backend)
    assert out.alpha.max() > 0.05
    assert_near(out.alpha[0], alpha_on_paper(cameras, mean, scale, 0.8, u=u), ON_PAPER)
    left = render(gaussians((-6.0, -0.1, 2.0), scale=scale, dtype=dtype), cameras, backend=backend)
    assert_near(left.alpha[0], alpha_on_paper(cameras, (-6.0, -0.1, 2.0), scale, 0.8, u=-7.0 / 20 - 0.3 * half_view), ON_PAPER)


@each_backend
def test_radius_is_where_alpha_falls_to_alpha_min(backend, dtype):
    out = render(gaussians([0, 0, 2], scale=0.1, opacity=0.8, dtype=dtype), camera(dtype=dtype), backend=backend)
    assert_near(out.radii_px, math.sqrt(2 * math.log(0.8 * 255) * 1.3), ON_PAPER)
    assert out.visible.tolist() == [[True]]


@each_backend
def test_a_gaussian_between_pixel_centres_or_outside_the_picture_is_not_visible(backend, dtype):
    scene, sharp = gaussians([[0.05, 0.05, 2], [0, 0, 2], [9, 0, 2]], scale=0.001, dtype=dtype), dataclasses.replace(DEFAULT, blur_px2=0.0)
    out = render(scene, camera(dtype=dtype), settings=sharp, backend=backend)
    assert out.visible.tolist() == [[False, True, False]]
    assert (out.radii_px > 0).tolist() == out.visible.tolist()


@each_backend
def test_without_alpha_min_every_gaussian_reaches_every_pixel(backend, dtype):
    out = render(gaussians([[0, 0, 2], [-6, 0, 2]], scale=0.3, dtype=dtype), camera(dtype=dtype), settings=SMOOTH, backend=backend)
    assert out.radii_px.tolist() == [[math.inf, math.inf]]
    assert (out.alpha > 0).all()


@each_backend
def test_a_huge_gaussian_covers_the_whole_picture(backend, dtype):
    out = render(gaussians([0, 0, 2], scale=150.0, opacity=0.8, dtype=dtype), camera(width=50, height=37, dtype=dtype), backend=backend)
    assert (out.alpha - 0.8).abs().max() < 2e-4         # 30 px from the middle of a Gaussian of 1500 px: 0.8 (1 - 2e-4)


# ---- the settings


@each_backend
def test_alpha_is_capped_at_alpha_max(backend, dtype):
    settings = dataclasses.replace(DEFAULT, alpha_max=0.5)
    out = render(gaussians([0, 0, 2], scale=0.3, opacity=0.8, dtype=dtype), camera(dtype=dtype), settings=settings, backend=backend)
    assert_near(out.alpha[0], alpha_on_paper(camera(), (0, 0, 2), 0.3, 0.8, settings), ON_PAPER)
    assert_near(out.alpha.max(), 0.5, ON_PAPER)


@each_backend
def test_pixels_below_alpha_min_are_not_touched(backend, dtype):
    settings = dataclasses.replace(DEFAULT, alpha_min=0.21)
    out = render(gaussians([0, 0, 2], scale=0.3, opacity=0.8, dtype=dtype), camera(dtype=dtype), settings=settings, backend=backend)
    expected = alpha_on_paper(camera(), (0, 0, 2), 0.3, 0.8, settings)
    assert 20 < (expected > 0).sum() < 200
    assert torch.equal(out.alpha[0] > 0, expected > 0)
    assert_near(out.alpha[0], expected, ON_PAPER)


@each_backend
def test_a_gaussian_fainter_than_alpha_min_is_not_drawn(backend, dtype):
    out = render(gaussians([[0, 0, 2], [0, 0, 3]], opacity=[0.9 / 255, 1.1 / 255], dtype=dtype), camera(dtype=dtype), backend=backend)
    assert out.visible.tolist() == [[False, True]]


@each_backend
def test_the_gaussian_that_would_cross_transmittance_min_is_left_out_with_all_behind(backend, dtype):
    settings = dataclasses.replace(DEFAULT, transmittance_min=0.05)
    scene = gaussians([[0, 0, 2], [0, 0, 3], [0, 0, 4]], scale=20.0, opacity=[0.9, 0.8, 0.1], color=[RED, GREEN, BLUE], dtype=dtype)
    out = render(scene, camera(width=1, height=1, dtype=dtype), settings=settings, backend=backend)
    assert_near(out.color[0, 0, 0], [0.9, 0.0, 0.0], ON_PAPER)      # 0.1 x 0.2 < 0.05; 0.1 x 0.9 would not have been
    assert_near(out.alpha, 0.9, ON_PAPER)


@each_backend
def test_the_near_plane_cuts_by_centre_depth(backend, dtype):
    near = 0.5
    below = torch.nextafter(torch.tensor(near), torch.tensor(0.0)).item()
    out = render(gaussians([[0, 0, near], [0, 0, below], [0, 0, -2], [0, 0, 0]], dtype=dtype), camera(dtype=dtype),
                 settings=dataclasses.replace(DEFAULT, near=near), backend=backend)
    assert out.visible.tolist() == [[True, False, False, False]]


@each_backend
def test_antialiasing_keeps_the_energy_of_a_gaussian_smaller_than_a_pixel(backend, dtype):
    settings = dataclasses.replace(DEFAULT, antialias=True, alpha_min=0.0)
    sigma_px = 0.1
    draw = lambda mean: render(gaussians(mean, sigma_px / 10, dtype=dtype), camera(dtype=dtype), settings=settings, backend=backend).alpha
    energy = 0.8 * 2 * math.pi * sigma_px ** 2
    assert draw([0.013, 0.02, 2]).sum().item() == pytest.approx(energy, rel=0.02)    # sampled 1 px apart, its variance 0.31 px^2
    assert_near(draw([0, 0, 2])[0, 7, 8], 0.8 * 0.01 / 0.31, ON_PAPER)


@each_backend
def test_an_infinitely_thin_gaussian_is_harmless(backend, dtype):
    needle_and_point = torch.tensor([[0, -30.0, -30], [-30, -30, -30]], dtype=dtype)
    turned = torch.tensor([[0.9, 0.1, 0.3, 0.2]] * 2, dtype=dtype)
    for antialias in (False, True):
        for blur in (0.0, 0.3):
            scene = gaussians([[0, 0, 2], [0.1, 0, 2]], dtype=dtype).replace(log_scales=needle_and_point, quats=turned)
            scene = scene.clone().requires_grad_()
            settings = dataclasses.replace(DEFAULT, antialias=antialias, blur_px2=blur)
            out = render(scene, camera(dtype=dtype), settings=settings, backend=backend)
            assert out.alpha.isfinite().all()
            if blur:
                out.alpha.sum().backward()
                assert all(x.grad.isfinite().all() for x in scene.fields().values() if x.grad is not None)


# ---- several Gaussians


@each_backend
@pytest.mark.parametrize("near_row", [0, 1])
def test_farther_gaussian_is_hidden_by_an_opaque_nearer_one(backend, dtype, near_row):
    z, color = ([2.0, 3.0], [RED, BLUE]) if near_row == 0 else ([3.0, 2.0], [BLUE, RED])
    scene = gaussians([[0, 0, z[0]], [0, 0, z[1]]], scale=1.0, color=color, dtype=dtype)
    scene = scene.replace(logit_opacities=torch.tensor([100.0 if row == near_row else logit(0.5) for row in (0, 1)], dtype=dtype))
    middle = render(scene, camera(dtype=dtype), backend=backend).color[0, 7, 8]
    assert_near(middle, [0.99, 0.0, 0.01 * 0.5], ON_PAPER)
    middle = render(scene, camera(dtype=dtype), settings=SMOOTH, backend=backend).color[0, 7, 8]
    assert_near(middle, RED, ON_PAPER)


@each_backend
def test_exact_depth_ties_are_drawn_in_row_order(backend, dtype):
    for first, second in ((RED, BLUE), (BLUE, RED)):
        scene = gaussians([[0, 0, 2], [0, 0, 2]], color=[first, second], dtype=dtype)
        middle = render(scene, camera(dtype=dtype), backend=backend).color[0, 7, 8]
        assert_near(middle, [0.8 * a + 0.2 * 0.8 * b for a, b in zip(first, second)], ON_PAPER)


@each_backend
def test_many_ties_keep_row_order(backend, dtype):
    n = 40
    features = torch.eye(n, dtype=dtype)
    scene = gaussians([[0, 0, 2.0]] * n, scale=20.0, opacity=0.1, dtype=dtype, features=features)
    weights = render(scene, camera(dtype=dtype), outputs=("features",), backend=backend).features[0, 7, 8]
    assert_near(weights, 0.1 * 0.9 ** torch.arange(n, dtype=F64), ON_PAPER)


def test_order_is_decided_in_float32_in_the_double_build_too():
    scene = gaussians([[0, 0, 2], [0, 0, 2 - 1e-12]], color=[RED, BLUE])
    for backend in ("reference", "cpu"):
        assert_near(render(scene, camera(), backend=backend).color[0, 7, 8], [0.8, 0.0, 0.16], ON_PAPER)


@each_backend
def test_background_shows_through_what_is_not_covered(backend, dtype):
    background = torch.tensor([[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]], dtype=dtype)
    cameras = Cameras.cat([camera(dtype=dtype)] * 2)
    out = render(gaussians([0, 0, 2], color=(0.3, 0.9, 0.1), dtype=dtype), cameras, background=background, backend=backend)
    alpha = alpha_on_paper(cameras, (0, 0, 2), 0.1, 0.8)[..., None]
    for c in range(2):
        assert_near(out.color[c], alpha * torch.tensor([0.3, 0.9, 0.1], dtype=F64) + (1 - alpha) * background[c].double(), ON_PAPER)
    assert_near(out.alpha[0], alpha[..., 0], ON_PAPER)


@each_backend
def test_a_scene_of_no_gaussians_is_the_background(backend, dtype):
    scene = random_scene(0, channels=5, dtype=dtype).requires_grad_()
    out = render(scene, ring(2, dtype=dtype), outputs=OUTPUTS, background=torch.full((2, 3), 0.25, dtype=dtype), backend=backend)
    assert (out.color == 0.25).all() and (out.alpha == 0).all() and (out.expected_depth == 0).all() and (out.median_depth == 0).all()
    assert out.features.shape == (2, 20, 24, 5) and (out.features == 0).all()
    assert out.visible.shape == out.radii_px.shape == (2, 0)


@each_backend
def test_where_nothing_is_visible_the_background_and_zero_gradients_remain(backend, dtype):
    scene = gaussians([[0, 0, -2], [100, 0, 2]], dtype=dtype).requires_grad_()
    background = torch.full((1, 3), 0.25, dtype=dtype, requires_grad=True)
    out = render(scene, camera(dtype=dtype), outputs=OUTPUTS[:3], background=background, backend=backend)
    assert (out.color == 0.25).all() and not out.visible.any()
    (out.color.sum() + out.alpha.sum() + out.expected_depth.sum()).backward()
    assert_near(background.grad, 17.0 * 15, ON_PAPER)
    assert all(x.grad is None or (x.grad == 0).all() for x in scene.fields().values())


@each_backend
def test_a_camera_inside_a_cloud_draws_what_is_in_front_and_stays_finite(backend, dtype):
    scene = random_scene(200, seed=3, dtype=dtype).requires_grad_()
    cameras = camera(width=33, height=20, dtype=dtype)
    out = render(scene, cameras, outputs=OUTPUTS[:3], backend=backend)
    z = scene.means[:, 2]
    assert 20 < out.visible.sum() < 200 and not out.visible[0, z < 0.0099].any()
    (out.color.sum() + out.expected_depth.sum()).backward()
    assert all(x.isfinite().all() for x in (out.color, out.alpha, out.expected_depth, out.median_depth))
    assert all(x.grad.isfinite().all() for x in scene.fields().values())


# ---- the scene's fields


@each_backend
def test_a_zero_quaternion_is_the_identity_and_length_does_not_matter(backend, dtype):
    scene = gaussians([0.1, 0.05, 2], dtype=dtype).replace(log_scales=torch.tensor([[-1.0, -2.0, -3.0]], dtype=dtype))
    picture = lambda q: render(scene.replace(quats=torch.tensor([q], dtype=dtype)), camera(dtype=dtype), backend=backend).alpha
    assert torch.equal(picture([0.0, 0, 0, 0]), picture([1.0, 0, 0, 0]))
    turned = picture([0.8, 0.2, 0.4, 0.4])
    assert (turned - picture([1.0, 0, 0, 0])).abs().max() > 0.01
    for length in (-1.0, 5.0, 1e-3, 1e3):
        assert_near(picture([0.8 * length, 0.2 * length, 0.4 * length, 0.4 * length]), turned.double(), ON_PAPER)


@each_backend
def test_a_zero_quaternion_gets_no_gradient(backend, dtype):
    scene = random_scene(4, dtype=dtype)
    scene = scene.replace(quats=torch.cat([torch.zeros(1, 4, dtype=dtype), scene.quats[1:]])).requires_grad_()
    render(scene, ring(1, dtype=dtype), backend=backend).color.square().sum().backward()
    assert (scene.quats.grad[0] == 0).all() and (scene.quats.grad[1:] != 0).any(dim=1).all()
    assert all(x.grad.isfinite().all() for x in scene.fields().values())


@each_backend
@pytest.mark.parametrize("limit, beyond", [(-30.0, -40.0), (30.0, 45.0)])
def test_log_scales_stop_at_their_limits(backend, dtype, limit, beyond):
    scene = gaussians([0.1, 0.05, 2], dtype=dtype).replace(log_scales=torch.tensor([[-1.0, -2.0, limit]], dtype=dtype))
    stretched = scene.replace(log_scales=torch.tensor([[-1.0, -2.0, beyond]], dtype=dtype))
    assert torch.equal(*(render(s, camera(dtype=dtype), backend=backend).alpha for s in (scene, stretched)))


@each_backend
def test_log_scales_beyond_their_limit_get_no_gradient(backend, dtype):
    scene = gaussians([0.1, 0.05, 2], dtype=dtype).replace(log_scales=torch.tensor([[-1.0, -2.0, -40.0]], dtype=dtype, requires_grad=True))
    render(scene, camera(dtype=dtype), backend=backend).alpha.sum().backward()
    assert scene.log_scales.grad[0, 2] == 0 and (scene.log_scales.grad[0, :2] != 0).all()


@each_backend
def test_extreme_opacity_logits_saturate(backend, dtype):
    scene = gaussians([[0.2, 0, 2], [-0.2, 0, 2]], scale=0.05, dtype=dtype)
    scene = scene.replace(logit_opacities=torch.tensor([100.0, -100.0], dtype=dtype)).requires_grad_()
    out = render(scene, camera(dtype=dtype), backend=backend)
    assert out.visible.tolist() == [[True, False]]
    assert_near(out.alpha[0], alpha_on_paper(camera(), (0.2, 0, 2), 0.05, 1.0), ON_PAPER)
    out.alpha.sum().backward()
    assert all(x.grad.isfinite().all() for x in scene.fields().values() if x.grad is not None)


@each_backend
def test_colour_is_clamped_at_zero_and_unbounded_above(backend, dtype):
    scene = gaussians([0, 0, 2], color=(-1.0, 0.5, 3.0), dtype=dtype).requires_grad_()
    out = render(scene, camera(dtype=dtype), backend=backend)
    assert_near(out.color[0, 7, 8], [0.0, 0.4, 2.4], ON_PAPER)
    out.color.sum().backward()
    assert (scene.sh.grad[0, :, 0] == 0).all() and (scene.sh.grad[0, 0, 1:] > 0).all()


@each_backend
def test_colour_is_seen_from_the_camera_centre(backend, dtype):
    # Straight ahead is +z: of band 1 only the second coefficient, 0.4886 z, answers; from the other side it answers with -.
    sh = torch.zeros(1, 4, 3, dtype=dtype)
    sh[0, 1:, 0] = torch.tensor([0.3, 0.5, 0.7])
    scene = gaussians([0, 0, 2], dtype=dtype).replace(sh=sh)
    red = lambda cameras: render(scene, cameras, backend=backend).color[0, 7, 8, 0]
    assert_near(red(camera(dtype=dtype)), 0.8 * (0.5 + 0.4886025119029199 * 0.5), ON_PAPER)
    behind = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=F64))
    behind[2, 3] = 4.0
    assert_near(red(camera(dtype=dtype, world_to_cam=behind)), 0.8 * (0.5 - 0.4886025119029199 * 0.5), ON_PAPER)


@each_backend
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_sh_degree_leaves_out_the_bands_above(backend, dtype, degree):
    scene, cameras = random_scene(20, dtype=dtype), ring(1, dtype=dtype)
    limited = render(scene, cameras, sh_degree=degree, backend=backend).color
    truncated = render(scene.replace(sh=scene.sh[:, :(degree + 1) ** 2].contiguous()), cameras, backend=backend).color
    assert_near(limited, truncated.double(), ON_PAPER)
    if degree < 3:
        assert (limited - render(scene, cameras, backend=backend).color).abs().max() > 1e-3


@each_backend
def test_features_fed_the_colours_are_the_colour_picture(backend, dtype):
    colors = torch.rand(25, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    shapes = random_scene(25, dtype=dtype)
    scene = shapes.replace(sh=gaussians(shapes.means, color=colors, dtype=dtype).sh, features=colors)
    out = render(scene, ring(2, dtype=dtype), outputs=("color", "features"), backend=backend)
    assert_near(out.features, out.color.double(), ON_PAPER)


@each_backend
def test_a_moved_scene_before_a_moved_camera_gives_the_same_picture(backend, dtype):
    scene, cameras, scale = random_scene(30, degree=3, dtype=dtype), ring(2, dtype=dtype), 2.5
    x = torch.tensor([0.3, -0.7, 0.5], dtype=F64)
    turn = torch.matrix_exp(torch.tensor([[0, -x[2], x[1]], [x[2], 0, -x[0]], [-x[1], x[0], 0]], dtype=F64))
    shift = torch.tensor([0.4, -1.0, 2.0], dtype=F64)
    pose = cameras.world_to_cam.double()
    u, _, vh = torch.linalg.svd(pose[:, :3, :3])
    pose[:, :3, :3] = u @ vh                            # a rotation to all digits: float32's would show in float64
    moved = pose.clone()
    moved[:, :3, :3] = pose[:, :3, :3] @ turn.T
    moved[:, :3, 3] = scale * pose[:, :3, 3] - moved[:, :3, :3] @ shift
    before, after = (render(s, cameras.replace(world_to_cam=p.to(dtype)), outputs=("color", "expected_depth"), settings=SMOOTH,
                            backend=backend) for s, p in ((scene, pose), (scene.transformed(scale, turn, shift), moved)))
    assert_same_l2(after.color, before.color, PICTURE)
    assert_same_l2(after.expected_depth / scale, before.expected_depth, PICTURE)


def test_quaternions_turn_as_rotation_matrices_say():
    from splatkit.scene import rotation_matrices
    for seed in range(5):
        q, r = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)))
        rotation = q * torch.det(q)
        assert_near(rotation_matrices(3.0 * quat_from_matrix(rotation)[None])[0], rotation, ON_PAPER)


# ---- depth


@each_backend
def test_a_wall_of_gaussians_has_the_depth_of_the_wall(backend, dtype):
    grid = torch.linspace(-1, 1, 11)
    means = torch.cartesian_prod(grid, grid, torch.tensor([3.0]))
    scene = gaussians(means, scale=0.15, opacity=0.7, dtype=dtype)
    out = render(scene, camera(dtype=dtype), outputs=("expected_depth", "median_depth"), backend=backend)
    assert out.color is None and out.features is None
    assert (out.alpha > 0.5).all()
    assert_near(out.expected_depth, 3.0, ON_PAPER)
    assert_near(out.median_depth, 3.0, ON_PAPER)


@each_backend
def test_expected_depth_is_the_mean_by_weight(backend, dtype):
    scene = gaussians([[0, 0, 2], [0, 0, 4]], scale=20.0, opacity=[0.5, 0.6], dtype=dtype)
    depth = render(scene, camera(dtype=dtype), outputs=("expected_depth",), backend=backend).expected_depth[0, 7, 8]
    assert_near(depth, (0.5 * 2 + 0.5 * 0.6 * 4) / 0.8, ON_PAPER)


@each_backend
def test_median_depth_is_where_transmittance_first_falls_to_one_half(backend, dtype):
    opacity = [0.4, 0.3, 0.3]                           # T: 0.7, 0.49, 0.294 in the order of depth
    scene = gaussians([[0, 0, 5], [0, 0, 2], [0, 0, 3]], scale=20.0, opacity=opacity, dtype=dtype)
    draw = lambda rows: render(scene.rows(rows), camera(dtype=dtype), outputs=("median_depth",), backend=backend)
    depths = [draw(slice(0, last)).median_depth[0, 7, 8].item() for last in (3, 2, 1)]
    assert depths == [3, 5, 0]                          # the first two alone: 0.7, 0.42; the first alone: 0.6


# ---- cameras


@each_backend
@pytest.mark.parametrize("width, height", [(1, 1), (17, 3), (33, 31), (16, 16), (15, 49)])
def test_a_smaller_picture_is_the_corner_of_a_larger_one(backend, dtype, width, height):
    settings = dataclasses.replace(DEFAULT, fov_margin=math.inf)    # the margin depends on the size
    large = ring(1, width=64, height=56, dtype=dtype)
    large = large.replace(K=torch.tensor([[[30.0, 0, 6.3], [0, 30, 5.1], [0, 0, 1]]], dtype=dtype))
    small = large.replace(width=width, height=height)
    scene = random_scene(40, channels=4, dtype=dtype)
    whole, corner = (render(scene, c, outputs=OUTPUTS, settings=settings, backend=backend) for c in (large, small))
    assert corner.alpha.max() > 0
    for name in (*OUTPUTS, "alpha"):
        assert_near(getattr(corner, name), getattr(whole, name)[:, :height, :width].double(), ON_PAPER, name)


@each_backend
def test_a_batch_of_cameras_is_each_camera_alone(backend, dtype):
    scene, cameras = random_scene(30, channels=2, dtype=dtype), ring(3, dtype=dtype)
    background = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = render(scene, cameras, outputs=OUTPUTS, background=background, backend=backend)
    for c in range(3):
        alone = render(scene, cameras[c], outputs=OUTPUTS, background=background[c:c + 1], backend=backend)
        for name in (*OUTPUTS, "alpha", "visible", "radii_px"):
            assert torch.equal(getattr(batch, name)[c], getattr(alone, name)[0]), name


@each_backend
def test_a_row_range_is_the_scene_of_those_rows(backend, dtype):
    scene, ranges = random_scene(30, channels=2, dtype=dtype), [(0, 12), (12, 30), (7, 7)]
    cameras = ring(3, dtype=dtype).replace(rows=torch.tensor(ranges))
    out = render(scene, cameras, outputs=OUTPUTS, backend=backend)
    for c, (first, last) in enumerate(ranges):
        part = render(scene.rows(slice(first, last)), cameras[c].replace(rows=None), outputs=OUTPUTS, backend=backend)
        for name in (*OUTPUTS, "alpha"):
            assert_near(getattr(out, name)[c], getattr(part, name)[0].double(), ON_PAPER, name)
        assert torch.equal(out.visible[c, first:last], part.visible[0])
        assert out.visible[c].sum() == part.visible.sum()


@each_backend
def test_what_was_not_asked_for_is_none(backend, dtype):
    out = render(random_scene(5, channels=2, dtype=dtype), ring(1, dtype=dtype), outputs=(), backend=backend)
    assert out.color is out.expected_depth is out.median_depth is out.features is None
    assert out.alpha.dtype == out.radii_px.dtype == dtype and out.visible.dtype == torch.bool
