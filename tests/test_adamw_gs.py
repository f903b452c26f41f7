"""AdamW-GS on top of Adam: each row's own steps, decay beside the moments, moments that shrink (Ding et al. 2026)."""
import math

import pytest
import torch
from backends import random_scene, ring

from splatkit import native, optim
from splatkit.camera import Cameras
from splatkit.density import relocate_and_grow
from splatkit.metrics import l1_ssim, l1_ssim_and_gradient
from splatkit.optim import Adam, AttributeDecay, StateDecay, default_learning_rates
from splatkit.raster import RasterStats, record, render, splat_gradients
from splatkit.scene import Edit, Scene
from test_optim import RATES, bits, both_paths, some_grads, some_scene      # noqa: F401 (a fixture)

ALWAYS = AttributeDecay(opacity_steps=(0, 10**6), scale_steps=(0, 10**6))
PIXELS = 100 * 80


def zero_grads(scene) -> dict:
    return {name: torch.zeros_like(x) for name, x in scene.fields().items()}


# ---- sparse: a row's own steps


def test_a_row_that_was_seen_k_times_is_where_k_steps_of_dense_adam_lead(both_paths):
    sparse, dense = some_scene(), some_scene()
    a, b = Adam(sparse, RATES), Adam(dense, RATES)
    seen = torch.zeros(13, dtype=torch.bool)
    seen[4] = True
    for i in range(9):
        grads = some_grads(sparse, i)
        a.step(sparse, grads, visible=seen if i % 3 == 0 else ~seen)
        if i % 3 == 0:
            b.step(dense, grads)
    assert a.row_steps[4] == 3 and a.row_steps[0] == 6
    for name, x in sparse.fields().items():
        torch.testing.assert_close(x[4], dense.fields()[name][4], atol=1e-12, rtol=1e-12)


def test_seeing_every_row_is_dense_adam(both_paths):
    sparse, dense = some_scene(), some_scene()
    a, b = Adam(sparse, RATES), Adam(dense, RATES)
    for i in range(5):
        a.step(sparse, some_grads(sparse, i), visible=torch.ones(13, dtype=torch.bool))
        b.step(dense, some_grads(dense, i))
    for name, x in sparse.fields().items():
        torch.testing.assert_close(x, dense.fields()[name], atol=1e-13, rtol=1e-12)


# ---- attribute decay (DAR)


def test_decay_never_enters_the_moments_and_touches_two_groups_only(both_paths):
    plain, decayed = some_scene(), some_scene()
    a, b = Adam(plain, RATES), Adam(decayed, RATES, attribute_decay=ALWAYS)
    for i in range(3):
        grads = some_grads(plain, i)
        a.step(plain, grads)
        b.step(decayed, grads, pixels=PIXELS)
    for name, x in plain.fields().items():
        assert torch.equal(a.m[name], b.m[name]) and torch.equal(a.v[name], b.v[name])
        assert torch.equal(x, decayed.fields()[name]) == (name not in ("logit_opacities", "log_scales"))
    assert (decayed.logit_opacities < plain.logit_opacities).all() and (decayed.log_scales < plain.log_scales).all()


def test_without_a_gradient_an_opacity_falls_by_rate_times_ceiling(both_paths):
    scene = some_scene()
    before = bits(scene)
    adam = Adam(scene, RATES, attribute_decay=AttributeDecay(ceiling=7.0, opacity_steps=(0, 9), scale_steps=(0, 9)))
    adam.step(scene, zero_grads(scene), pixels=PIXELS)
    torch.testing.assert_close(scene.logit_opacities, before["logit_opacities"] - 0.05 * 7, atol=1e-12, rtol=0)
    torch.testing.assert_close(scene.log_scales, before["log_scales"] - 5e-3 * 7, atol=1e-12, rtol=0)


def test_decay_is_the_slope_of_the_attribute_over_the_size_of_the_gradient(both_paths):
    scene = some_scene()
    before, grads = bits(scene), zero_grads(scene)
    grads["logit_opacities"] += 1e-3
    grads["log_scales"] += 1e-3
    Adam(scene, RATES, attribute_decay=ALWAYS).step(scene, grads, pixels=PIXELS)
    o = torch.sigmoid(before["logit_opacities"])
    torch.testing.assert_close(scene.logit_opacities, before["logit_opacities"] - 0.05 * (1 + 1e-2 / PIXELS * o * (1 - o) / 1e-3), atol=1e-10, rtol=0)
    torch.testing.assert_close(scene.log_scales, before["log_scales"] - 5e-3 * (1 + 1e-4 / PIXELS * before["log_scales"].exp() / 1e-3), atol=1e-10, rtol=0)


def test_windows_include_both_ends():
    decay = AttributeDecay(opacity_steps=(3, 5), scale_steps=(2, 4))
    on = lambda group: [step for step in range(8) if decay.strength(group, step, 1) > 0]
    assert on("logit_opacities") == [3, 4, 5] and on("log_scales") == [2, 3, 4] and on("means") == []
    scene = some_scene()
    adam = Adam(scene, RATES, attribute_decay=decay)
    falls = []
    for _ in range(7):
        before = scene.logit_opacities.clone()
        adam.step(scene, zero_grads(scene), pixels=PIXELS)
        falls.append(bool((scene.logit_opacities < before).all()))
    assert falls == [False, False, True, True, True, False, False]


def test_a_run_does_not_depend_on_the_resolution():
    # A loss that is a mean over k times the pixels has gradients k times smaller; the decay shrinks with them.
    coarse, fine = some_scene(), some_scene()
    a, b = Adam(coarse, RATES, attribute_decay=ALWAYS), Adam(fine, RATES, attribute_decay=ALWAYS)
    for i in range(10):
        grads = some_grads(coarse, i)
        a.step(coarse, grads, pixels=PIXELS)
        b.step(fine, {name: g / 16 for name, g in grads.items()}, pixels=16 * PIXELS)
    for name, x in coarse.fields().items():
        torch.testing.assert_close(x, fine.fields()[name], atol=1e-9, rtol=1e-9)


def test_decay_asks_for_the_number_of_pixels():
    scene = some_scene()
    adam = Adam(scene, RATES, attribute_decay=ALWAYS)
    with pytest.raises(ValueError, match="pixels is None"):
        adam.step(scene, zero_grads(scene))
    assert adam.steps_taken == 0


# ---- state decay (RSR)


def stepped(n, restate, steps=1, seed=0):
    scene = some_scene(n)
    plain, adam = Adam(scene.clone(), RATES), Adam(scene, RATES, state_decay=restate, seed=seed)
    copy = scene.clone()
    for i in range(steps):
        plain.step(copy, some_grads(copy, i))
        adam.step(scene, some_grads(scene, i))
    return plain, adam, copy, scene


def test_exactly_a_share_of_the_rows_has_its_moments_shrunk_and_nothing_else():
    plain, adam, copy, scene = stepped(1003, StateDecay(every=1, steps=(1, 9), shares=((1, 0.3),)))
    hit = (adam.m["means"] != plain.m["means"]).any(1)
    assert int(hit.sum()) == math.floor(0.3 * 1003)
    for name, x in scene.fields().items():
        assert torch.equal(x, copy.fields()[name])
        assert torch.equal(adam.m[name][~hit], plain.m[name][~hit]) and torch.equal(adam.v[name][~hit], plain.v[name][~hit])
        torch.testing.assert_close(adam.m[name][hit], plain.m[name][hit] * 0.2)
        torch.testing.assert_close(adam.m[name][hit] / adam.v[name][hit].sqrt(), plain.m[name][hit] / plain.v[name][hit].sqrt())
    assert torch.equal(adam.row_steps, plain.row_steps)


def test_the_same_seed_draws_the_same_rows():
    restate = StateDecay(every=1, steps=(1, 9), shares=((1, 0.3),))
    a, b, c = (stepped(200, restate, seed=seed)[1] for seed in (5, 5, 6))
    assert torch.equal(a.m["means"], b.m["means"]) and not torch.equal(a.m["means"], c.m["means"])


def test_shares_follow_the_schedule():
    restate = StateDecay(every=100, steps=(1000, 1500), shares=((1000, 0.1), (1200, 0.3)))
    assert [restate.share(step) for step in (900, 1000, 1001, 1100, 1200, 1500, 1600)] == [0, 0.1, 0, 0.1, 0.3, 0.3, 0]


@pytest.mark.slow
def test_more_rows_than_multinomial_can_draw_from():
    n = 2**24 + 5
    scene = Scene(torch.zeros(n, 3), torch.zeros(n, 4), torch.zeros(n, 3), torch.zeros(n), torch.zeros(n, 1, 3))
    adam = Adam(scene, {"logit_opacities": 0.1}, state_decay=StateDecay(every=1, steps=(1, 9), shares=((1, 0.5),)))
    adam.step(scene, {"logit_opacities": torch.ones(n)})
    assert int((adam.m["logit_opacities"] < 0.05).sum()) == n // 2


# ---- edits, checkpoints


def test_new_and_moved_rows_inherit_the_steps_of_their_source():
    scene = some_scene(40, torch.float32)
    scene.logit_opacities[::5] = -9
    adam = Adam(scene, RATES)
    for i in range(6):
        adam.step(scene, some_grads(scene, i), visible=torch.arange(40) % 4 <= i % 4)
    before = adam.row_steps.clone()
    scene, edit = relocate_and_grow(scene, 60, 1.2, 0.005, torch.Generator().manual_seed(0))
    adam.follow(edit)
    assert len(adam.row_steps) == len(scene) == 48 and torch.equal(adam.row_steps, before[edit.source])
    assert all((adam.m[name][edit.fresh] == 0).all() and len(adam.v[name]) == 48 for name in RATES)
    adam.follow(Edit(torch.arange(48), torch.arange(48) < 3), fresh_steps="zero")
    assert (adam.row_steps[:3] == 0).all() and torch.equal(adam.row_steps[3:], before[edit.source][3:])
    adam.step(scene, some_grads(scene, 7))
    assert all(x.isfinite().all() for x in scene.fields().values())


def test_a_restored_optimiser_draws_and_corrects_as_the_first(both_paths):
    settings = dict(attribute_decay=ALWAYS, state_decay=StateDecay(every=2, steps=(1, 99), shares=((1, 0.4),)))
    def run(adam, scene, steps):
        for i in steps:
            adam.step(scene, some_grads(scene, i), visible=torch.arange(13) % 3 != i % 3, pixels=PIXELS)
    straight = some_scene()
    adam = Adam(straight, RATES, **settings)
    run(adam, straight, range(4))
    state, scene = adam.state_dict(), straight.clone()
    run(adam, straight, range(4, 9))
    resumed = Adam(scene, RATES, **settings, seed=99)
    resumed.load_state_dict(state)
    run(resumed, scene, range(4, 9))
    assert all(torch.equal(x, straight.fields()[name]) for name, x in scene.fields().items())
    assert all(torch.equal(x, adam.state_dict()[name]) for name, x in resumed.state_dict().items())


# ---- what it is for


@pytest.mark.parametrize("mask", ["drawn", "contributed"])
def test_what_lies_behind_a_wall_dies_within_20_steps_unless_only_contributors_are_stepped(mask):
    g = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12))
    wall = torch.cat([torch.cat([grid, torch.full((144, 1), 2.0 + 0.01 * k)], 1) for k in range(4)])
    hidden = torch.cat([0.3 * torch.randn(30, 2, generator=g), torch.full((30, 1), 4.0)], 1)
    n, m = len(wall), len(hidden)
    scene = Scene(torch.cat([wall, hidden]), torch.tensor([1.0, 0, 0, 0]).repeat(n + m, 1), torch.cat([torch.full((n, 3), -1.6), torch.full((m, 3), -3.0)]),
                  torch.cat([torch.full((n,), 6.0), torch.full((m,), math.log(0.1 / 0.9))]), 0.3 * torch.randn(n + m, 1, 3, generator=g))
    camera = Cameras(torch.eye(4)[None], torch.tensor([[[40.0, 0, 24], [0, 40.0, 24], [0, 0, 1]]]), 48, 48)
    target = torch.rand(48, 48, 3, generator=g)
    adam = Adam(scene, {"logit_opacities": 0.05, "sh": 2.5e-3}, attribute_decay=ALWAYS)
    for _ in range(20):
        scene.requires_grad_()
        stats = RasterStats.zeros(n + m)
        out = render(scene, camera, stats=stats)
        grads = torch.autograd.grad((out.color[0] - target).abs().mean(), [scene.logit_opacities, scene.sh])
        scene = scene.detach()
        visible = out.visible[0] if mask == "drawn" else stats.weight_sum > 0
        adam.step(scene, dict(zip(("logit_opacities", "sh"), grads)), visible=visible, pixels=48 * 48)
    alive = torch.sigmoid(scene.logit_opacities) >= 0.005
    assert alive[:n].all() and bool(alive[n:].any()) == (mask == "contributed")


@pytest.mark.parametrize("sparse, decays, degree", [(False, False, 3), (True, True, 2), (False, True, 0)])
def test_a_recorded_step_is_the_step_on_the_gradients_of_autograd(native_dtype, sparse, decays, degree):
    scene, camera = random_scene(80, seed=4, degree=3, dtype=native_dtype), ring(1, width=37, height=30, dtype=native_dtype)
    background, target = torch.tensor([0.2, 0.5, 0.1], dtype=native_dtype), torch.rand(30, 37, 3, generator=torch.Generator().manual_seed(5)).to(native_dtype)
    decay = AttributeDecay(opacity=50.0, scale=20.0, opacity_steps=(1, 9), scale_steps=(2, 9)) if decays else None
    one, other = scene.clone(), scene.clone()
    by_autograd, recorded = (Adam(s, default_learning_rates(1.0), attribute_decay=decay) for s in (one, other))
    for step in range(4):
        leaves, stats, stats2 = one.clone().requires_grad_(), *(RasterStats.zeros(len(one), dtype=native_dtype) for _ in range(2))
        out = render(leaves, camera, background=background, sh_degree=degree, stats=stats)
        grads = dict(zip(leaves.fields(), torch.autograd.grad(l1_ssim(out.color[0], target), list(leaves.fields().values()))))
        o, pull = torch.sigmoid(one.logit_opacities), 0.01
        grads["logit_opacities"] += pull * o * (1 - o)
        by_autograd.step(one, grads, out.visible[0] if sparse else None, 37 * 30, learning_rates={"means": 1e-3})
        picture = record(other, camera, background, degree)
        loss, v_color = l1_ssim_and_gradient(picture.color, target)
        recorded.step_recorded(other, picture, splat_gradients(picture, v_color, stats2), sparse, {"means": 1e-3}, pulls={"logit_opacities": pull})
        assert torch.allclose(stats.grad_sum, stats2.grad_sum, rtol=1e-4) and torch.equal(stats.count, stats2.count)
    assert torch.equal(by_autograd.row_steps, recorded.row_steps)
    for name, x in one.fields().items():
        assert not torch.equal(x, getattr(scene, name))
        torch.testing.assert_close(getattr(other, name), x, rtol=1e-4, atol=2e-5 if native_dtype is torch.float32 else 1e-12)
