"""3DGS-MCMC: relocated copies look like what they replace, rows and edits stay aligned; the first scene from points."""
import math

import numpy as np
import pytest
import torch

from backends import random_scene, ring
from splatkit import density, optim
from splatkit.density import dropped
from splatkit.raster import render
from splatkit.scene import ABSENT, Part, Scene


def some_scene(n=400, dtype=torch.float32, features=5, seed=0) -> Scene:
    """About a quarter of the rows are dead (opacity <= 0.005)."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(n, *shape, generator=g, dtype=dtype)
    logits = torch.where(torch.rand(n, generator=g) < 0.25, -6.0, 2 * r().clamp(-2, 3))
    return Scene(r(3), r(4), r(3) - 3, logits, r(4, 3), r(features))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def column(value, dtype=torch.float64):
    return torch.tensor([value], dtype=dtype)


# ---- the formulas

@pytest.mark.parametrize("copies", [2, 3, 10, 51])
@pytest.mark.parametrize("opacity", [0.006, 0.3, 0.9, 0.999])
def test_scale_factor_equals_the_double_sum_of_the_paper(opacity, copies, without_native):
    o = 1 - (1 - opacity) ** (1 / copies)
    total = math.fsum(math.comb(i - 1, k) * (-1) ** k * o ** (k + 1) / math.sqrt(k + 1) for i in range(1, copies + 1) for k in range(i))
    one = column(math.log(opacity / (1 - opacity))), torch.zeros(1, 3, dtype=torch.float64)
    logit, log_scales = density.relocated_reference(*one, torch.tensor([copies]))
    assert torch.sigmoid(logit).item() == pytest.approx(o, rel=1e-9)
    assert log_scales.exp()[0].tolist() == pytest.approx([opacity / total] * 3, rel=1e-6)


@pytest.mark.parametrize("copies", [2, 5, 40])
@pytest.mark.parametrize("opacity", [0.02, 0.5, 0.99])
def test_copies_have_the_centre_and_the_integral_of_what_they_replace(opacity, copies):
    sigma = 0.7
    one = column(math.log(opacity / (1 - opacity))), torch.full((1, 3), math.log(sigma), dtype=torch.float64)
    logit, log_scales = density.relocated(*one, torch.tensor([copies]))
    x = torch.linspace(-15, 15, 200_001, dtype=torch.float64)
    bump = lambda o, s: o * torch.exp(-x * x / (2 * s * s))
    together = 1 - (1 - bump(torch.sigmoid(logit), log_scales.exp()[0, 0])) ** copies
    clamped = 1 - (1 - opacity) ** (1 / copies) < density.OPACITY_MIN
    if not clamped:
        assert together.max().item() == pytest.approx(opacity, rel=1e-9)
        assert torch.trapezoid(together, x).item() == pytest.approx(torch.trapezoid(bump(opacity, sigma), x).item(), rel=1e-9)
    else:
        assert torch.sigmoid(logit).item() == pytest.approx(density.OPACITY_MIN, rel=1e-9)


def test_one_copy_changes_nothing_and_opacities_stay_in_their_range():
    logits = torch.tensor([-5.0, 0.0, 3.0, 12.0], dtype=torch.float64)
    scales = torch.randn(4, 3, dtype=torch.float64)
    out = density.relocated(logits, scales, torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(out[0], logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1], scales, atol=1e-6, rtol=0)
    extreme = torch.tensor([-60.0, -5.4, 16.0, 90.0])
    for copies in (1, 2, 300, 100_000):
        logit, log_scales = density.relocated(extreme, torch.zeros(4, 3), torch.full((4,), copies))
        assert torch.isfinite(logit).all() and torch.isfinite(log_scales).all()
        opacity = torch.sigmoid(logit)
        assert (opacity >= 0.005 * (1 - 1e-5)).all() and (opacity < 1).all()


def test_native_relocation_equals_the_reference(native_dtype):
    g = seeded()
    logits, scales = 3 * torch.randn(500, generator=g, dtype=native_dtype), torch.randn(500, 3, generator=g, dtype=native_dtype)
    copies = torch.randint(1, 52, (500,), generator=g)
    ours = density.relocated(logits, scales, copies)
    logit, log_scales = density.relocated_reference(logits, scales, copies)
    tolerance = 2e-6 if native_dtype == torch.float32 else 1e-9
    torch.testing.assert_close(ours[0], logit.clamp(density.LOGIT_MIN, density.LOGIT_MAX), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours[1], log_scales, atol=tolerance, rtol=tolerance)


# ---- rows and edits

def test_dead_rows_move_onto_living_ones_and_stand_exactly_there():
    scene = some_scene()
    after, edit = density.relocate_and_grow(scene, cap=400, generator=seeded())
    dead = torch.sigmoid(scene.logit_opacities) <= 0.005
    assert len(after) == 400 and (torch.sigmoid(after.logit_opacities) >= 0.005 * (1 - 1e-5)).all()
    assert not dead[edit.source].any() and (edit.source[~dead] == torch.arange(400)[~dead]).all()
    for name in ("means", "quats", "sh", "features"):
        assert torch.equal(after.fields()[name], scene.fields()[name][edit.source]), name


def test_only_moved_rows_and_their_sources_change_and_only_they_are_fresh():
    scene = some_scene()
    after, edit = density.relocate_and_grow(scene, cap=450, generator=seeded())
    chosen = edit.source[(edit.source != torch.arange(len(after)))]
    expected = edit.source != torch.arange(len(after))
    expected[chosen] = True
    assert torch.equal(edit.fresh, expected) and len(after) == 420
    same = ~edit.fresh[:400]
    assert same.any() and all(torch.equal(x[:400][same], scene.fields()[name][same]) for name, x in after.fields().items())
    sources = chosen.unique()
    assert (after.logit_opacities[sources] < scene.logit_opacities[sources]).all()


def test_all_gaussians_at_one_place_share_the_opacity_of_the_one_before():
    scene = some_scene(dtype=torch.float64)
    after, edit = density.relocate_and_grow(scene, cap=600, growth=1.5, generator=seeded())
    log_transmittance = torch.zeros(400, dtype=torch.float64).index_add(0, edit.source, torch.log1p(-torch.sigmoid(after.logit_opacities)))
    before = torch.log1p(-torch.sigmoid(scene.logit_opacities))
    free = torch.ones(400, dtype=torch.bool)                                                  # places where the floor of 0.005 did not bite
    free[edit.source[torch.sigmoid(after.logit_opacities) <= 0.005 + 1e-9]] = False
    alive = (torch.sigmoid(scene.logit_opacities) > 0.005) & free
    assert alive.sum() > 200
    torch.testing.assert_close(log_transmittance[alive], before[alive], atol=1e-6, rtol=1e-6)


def test_sources_are_drawn_in_proportion_to_opacity():
    opacity = torch.tensor([0.8, 0.4, 0.1, 0.004])
    scene = some_scene(4, features=1).replace(logit_opacities=torch.logit(opacity))
    after, edit = density.relocate_and_grow(scene, cap=40_004, growth=1e9, generator=seeded())
    drawn = edit.source.bincount(minlength=4).double() / 40_001
    torch.testing.assert_close(drawn, torch.tensor([0.8, 0.4, 0.1, 0.0], dtype=torch.float64) / 1.3, atol=0.01, rtol=0)


@pytest.mark.parametrize("cap, growth, expected",
                         [(10_000, 1.05, 420), (405, 1.05, 405), (400, 1.05, 400), (100, 1.05, 400), (10_000, 1.0, 400)])
def test_growth_and_cap_are_honoured(cap, growth, expected):
    assert len(density.relocate_and_grow(some_scene(), cap, growth, generator=seeded())[0]) == expected


def test_a_small_scene_grows_too():
    assert len(density.relocate_and_grow(some_scene(3).replace(logit_opacities=torch.zeros(3)), 100, generator=seeded())[0]) == 4


@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_scene_without_living_gaussians_comes_back_as_it_is(n):
    scene = some_scene(n).replace(logit_opacities=torch.full((n,), -9.0))
    after, edit = density.relocate_and_grow(scene, 100, generator=seeded())
    assert all(torch.equal(x, scene.fields()[name]) for name, x in after.fields().items())
    assert torch.equal(edit.source, torch.arange(n)) and not edit.fresh.any()


def test_relocation_is_reproducible_from_its_seed_and_leaves_its_input_alone():
    scene, twin = some_scene().requires_grad_(), some_scene()
    a, edit_a = density.relocate_and_grow(scene, 500, generator=seeded(7))
    b, edit_b = density.relocate_and_grow(twin, 500, generator=seeded(7))
    c, edit_c = density.relocate_and_grow(twin, 500, generator=seeded(8))
    assert all(torch.equal(x, b.fields()[name]) for name, x in a.fields().items()) and torch.equal(edit_a.source, edit_b.source)
    assert not torch.equal(edit_a.source, edit_c.source)
    assert all(torch.equal(x, twin.fields()[name]) for name, x in scene.fields().items()) and not a.means.requires_grad


def test_an_optimiser_that_follows_has_no_moments_where_values_are_new():
    scene = some_scene()
    adam = optim.Adam(scene, {"means": 1e-3, "logit_opacities": 0.01})
    adam.step(scene, {name: torch.ones_like(x) for name, x in scene.fields().items()})
    after, edit = density.relocate_and_grow(scene, 500, generator=seeded())
    adam.follow(edit)
    assert (adam.m["means"][edit.fresh] == 0).all() and (adam.m["means"][~edit.fresh] != 0).all() and len(adam.m["means"]) == len(after)


# ---- noise

def test_noise_moves_a_transparent_gaussian_along_its_covariance_and_an_opaque_one_not():
    pair = Scene(torch.zeros(2, 3), torch.tensor([[math.sqrt(0.5), 0, 0, math.sqrt(0.5)]] * 2), torch.tensor([[0.5, 0.1, 0.2]] * 2).log(),
                 torch.tensor([-9.0, 2.0]), torch.zeros(2, 1, 3))
    moves = density.mcmc_noise(Scene.cat([pair] * 4000), 1e-6, generator=seeded()).view(4000, 2, 3)
    gate = 1 / (1 + math.exp(-100 * (1 - 1 / (1 + math.exp(9)) - 0.995)))
    expected = 0.5 * gate * torch.tensor([0.1 ** 2, 0.5 ** 2, 0.2 ** 2])        # 5e5 * 1e-6 = 0.5; a quarter turn about z swaps x and y
    torch.testing.assert_close(moves[:, 0].std(0), expected, rtol=0.05, atol=0)
    assert moves[:, 1].abs().max() < 1e-6


def test_noise_leaves_the_scene_alone_and_is_reproducible():
    scene = some_scene().requires_grad_()
    before = scene.clone()
    a, b = (density.mcmc_noise(scene, 1e-4, generator=seeded(3)) for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad and all(torch.equal(x, before.fields()[name]) for name, x in scene.fields().items())


def test_native_noise_equals_the_reference(native_dtype):
    scene = some_scene(dtype=native_dtype)
    scene = scene.replace(logit_opacities=scene.logit_opacities - 4, quats=torch.where(torch.arange(400)[:, None] == 5, 0, scene.quats))
    ours = density.mcmc_noise(scene, 1e-4, generator=seeded(3))
    noise = torch.randn(400, 3, generator=seeded(3), dtype=native_dtype)
    reference = density.mcmc_noise_reference(scene, noise, 50.0)
    # exp(-100 x) magnifies the rounding of x.
    tolerance = dict(atol=1e-7, rtol=2e-4) if native_dtype == torch.float32 else dict(atol=1e-14, rtol=1e-9)
    torch.testing.assert_close(ours, reference, **tolerance)


# ---- the first scene

def brute_force(points, k=3):
    squared = (points[:, None] - points[None]).square().sum(-1)
    squared.fill_diagonal_(math.inf)
    return squared.topk(min(k, len(points) - 1), largest=False).values.sqrt().mean(1)


@pytest.mark.parametrize("n", [2, 3, 4, 128, 129, 700])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "half coincident", "lattice"])
def test_neighbour_distance_equals_brute_force(kind, n):
    g = seeded(n)
    points = torch.randn(n, 3, generator=g, dtype=torch.float64)
    if kind == "heavy tails":
        points = points * torch.exp(3 * torch.randn(n, 1, generator=g, dtype=torch.float64))
    elif kind == "half coincident":
        points[: n // 2] = points[0].clone()
    elif kind == "lattice":
        points = (2 * points).round()
    torch.testing.assert_close(density.neighbour_distance(points), brute_force(points), atol=1e-12, rtol=1e-12)


def test_points_become_round_gaussians_of_their_colour():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    rgb = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [51, 102, 153]], np.uint8)
    scene = density.from_points(points, torch.from_numpy(rgb), sh_degree=2, opacity=0.3, scale_factor=0.5)
    torch.testing.assert_close(0.5 + 0.28209479177387814 * scene.sh[:, 0], torch.from_numpy(rgb).float() / 255)
    torch.testing.assert_close(scene.log_scales[0].exp(), torch.full((3,), 0.5))
    torch.testing.assert_close(scene.log_scales[1].exp(), torch.full((3,), 0.5 * (1 + 2 * math.sqrt(2)) / 3))
    torch.testing.assert_close(torch.sigmoid(scene.logit_opacities), torch.full((4,), 0.3))
    assert scene.sh.shape == (4, 9, 3) and (scene.sh[:, 1:] == 0).all() and (scene.quats == torch.tensor([1.0, 0, 0, 0])).all()


@pytest.mark.parametrize("points", [torch.zeros(0, 3), torch.ones(1, 3), torch.ones(9, 3), torch.tensor([[0.0, 0, 0], [1e6, 0, 0]])])
def test_few_or_coincident_points_make_a_finite_scene(points):
    scene = density.from_points(points, torch.rand(len(points), 3))
    scene.check_finite()
    assert len(scene) == len(points)


def test_coincident_points_and_outliers_get_a_size_within_a_hundred_medians():
    points = torch.cat([torch.rand(500, 3, generator=seeded()), torch.full((20, 3), 0.5), torch.tensor([[1e5, 0, 0]])])
    sizes = density.from_points(points, torch.rand(521, 3), scale_factor=1.0).log_scales.exp()[:, 0]
    median = brute_force(points)[:500].median()
    assert sizes.min() > median / 110 and sizes.max() < median * 110


def test_points_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        density.from_points(torch.tensor([[0.0, float("nan"), 0]]), torch.rand(1, 3))


# ---- what a step leaves out


def test_a_share_is_left_out_and_each_opacity_is_what_it_was_on_the_mean():
    scene = random_scene(4000, dtype=torch.float32)
    scene = scene.replace(logit_opacities=scene.logit_opacities.clamp(max=1.0))      # below 1 - rate: none reaches the bound
    generator, total = torch.Generator().manual_seed(0), torch.zeros(4000, dtype=torch.float64)
    for _ in range(400):
        shown = dropped(scene, 0.2, generator)
        left_out = shown.logit_opacities == ABSENT
        assert abs(float(left_out.float().mean()) - 0.2) < 0.03
        total += torch.sigmoid(shown.logit_opacities.double())
    error = (total / 400 - torch.sigmoid(scene.logit_opacities.double())) / torch.sigmoid(scene.logit_opacities.double())
    assert error.abs().max() < 0.13 and error.mean().abs() < 2e-3       # the spread of a mean of 400 draws is 0.025 of it
    assert all(shown.fields()[name] is x for name, x in scene.fields().items() if name != "logit_opacities")


def test_an_opaque_gaussian_stays_finite_and_what_is_left_out_has_no_gradient():
    scene = random_scene(500, dtype=torch.float64)
    logits = torch.linspace(-200, 40, 500, dtype=torch.float64).requires_grad_()
    shown = dropped(scene.replace(logit_opacities=logits), 0.3, torch.Generator().manual_seed(0))
    left_out, opacity = shown.logit_opacities == ABSENT, torch.sigmoid(logits.detach())
    assert bool(torch.isfinite(shown.logit_opacities).all()) and torch.sigmoid(shown.logit_opacities).max() <= 1 - 0.99e-6
    grad, = torch.autograd.grad(shown.logit_opacities.sum(), logits)
    held = left_out | (opacity > 0.7 * (1 - 1e-6)) | (opacity < 0.7e-30)
    assert bool((grad[held] == 0).all()) and bool((grad[~held] > 0).all())
    torch.testing.assert_close(torch.sigmoid(shown.logit_opacities[~held]), opacity[~held] / 0.7)
    # d logit(o / 0.7) / d logit(o), worked out by hand.
    torch.testing.assert_close(grad[~held], (1 - opacity[~held]) / (1 - opacity[~held] / 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_finite_opacity_stays_finite_with_its_gradient(dtype):
    logits = torch.tensor([-1e30, -1000, -120, -100, -88, -1, 0, 1, 88, 1000, 1e30], dtype=dtype).requires_grad_()
    shown = dropped(random_scene(11, dtype=dtype).replace(logit_opacities=logits), 0.3, torch.Generator().manual_seed(1))
    grad, = torch.autograd.grad(shown.logit_opacities.sum(), logits)
    assert bool(torch.isfinite(shown.logit_opacities).all()) and bool(torch.isfinite(grad).all())


def test_the_parts_of_a_scene_leave_out_what_the_whole_does():
    scene = random_scene(101, dtype=torch.float32)
    whole = dropped(scene, 0.5, torch.Generator().manual_seed(7))
    parts = [Part(0, 40, 101), Part(40, 101, 101)]
    shown = [dropped(scene.map(part.of), 0.5, torch.Generator().manual_seed(7), part).logit_opacities for part in parts]
    assert torch.equal(torch.cat(shown), whole.logit_opacities)


def test_no_picture_shows_what_is_left_out():
    scene, camera = random_scene(60, dtype=torch.float64), ring(1, 60, 50)
    shown = dropped(scene, 0.4, torch.Generator().manual_seed(3))
    kept = shown.logit_opacities != ABSENT
    torch.testing.assert_close(render(shown, camera).color, render(shown.rows(kept.nonzero().squeeze(1)), camera).color, rtol=0, atol=0)
