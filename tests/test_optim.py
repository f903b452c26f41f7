"""Adam: torch.optim.Adam as oracle, native code against the reference, state that follows edits and survives a round trip."""
import pytest
import torch

from splatkit import native, optim
from splatkit.scene import Edit, Scene

RATES = {"means": 1e-3, "quats": 2e-3, "log_scales": 5e-3, "logit_opacities": 0.05, "sh": optim.sh_learning_rates(4, 2.5e-3, 2.5e-3 / 20)}


def some_scene(n=13, dtype=torch.float64, features=None) -> Scene:
    g = torch.Generator().manual_seed(3)
    r = lambda *shape: torch.randn(n, *shape, generator=g, dtype=dtype)
    return Scene(r(3), r(4), r(3), r(), r(4, 3), r(features) if features else None)


def some_grads(scene, seed):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=g, dtype=x.dtype) * 10.0 ** (seed % 5 - 4) for name, x in scene.fields().items()}


def bits(scene):
    return {name: x.clone() for name, x in scene.fields().items()}


@pytest.fixture(params=["native if present", "torch"])
def both_paths(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "library_for", lambda x: None)


def test_fifty_steps_equal_torch_adam(both_paths):
    scene, theirs = some_scene(), {name: x.clone().requires_grad_() for name, x in some_scene().fields().items()}
    first, rest = theirs["sh"].detach()[:, :1].clone().requires_grad_(), theirs["sh"].detach()[:, 1:].clone().requires_grad_()
    groups = [{"params": [theirs[name]], "lr": rate} for name, rate in RATES.items() if name != "sh"]
    groups += [{"params": [first], "lr": 2.5e-3}, {"params": [rest], "lr": 2.5e-3 / 20}]
    oracle = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-15)
    ours = optim.Adam(scene, RATES)
    for i in range(50):
        grads = some_grads(scene, i)
        for name, x in theirs.items():
            x.grad = grads[name]
        first.grad, rest.grad = grads["sh"][:, :1], grads["sh"][:, 1:]
        oracle.step()
        ours.step(scene, grads)
    for name in ("means", "quats", "log_scales", "logit_opacities"):
        torch.testing.assert_close(scene.fields()[name], theirs[name].detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scene.sh, torch.cat([first, rest], dim=1).detach(), atol=1e-6, rtol=0)


def test_the_first_step_moves_every_value_by_its_learning_rate():
    scene = some_scene()
    before, grads = bits(scene), some_grads(scene, 0)
    optim.Adam(scene, RATES).step(scene, grads)
    torch.testing.assert_close(scene.means, before["means"] - 1e-3 * grads["means"].sign(), atol=1e-12, rtol=0)
    torch.testing.assert_close(scene.sh[:, 1:], before["sh"][:, 1:] - 1.25e-4 * grads["sh"][:, 1:].sign(), atol=1e-12, rtol=0)


def test_a_step_writes_the_tensors_of_the_scene_in_place(both_paths):
    scene = some_scene().requires_grad_()
    addresses = [x.data_ptr() for x in scene.fields().values()]
    optim.Adam(scene, RATES).step(scene, some_grads(scene, 0))
    assert addresses == [x.data_ptr() for x in scene.fields().values()] and scene.means.requires_grad and scene.means.is_leaf


def test_a_graph_from_before_a_step_cannot_be_back_propagated_after_it(both_paths):
    scene = some_scene().requires_grad_()
    loss = (scene.means ** 2).sum()
    optim.Adam(scene, RATES).step(scene, some_grads(scene, 0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_that_are_not_visible_stay_bit_identical(both_paths):
    scene = some_scene()
    adam, visible = optim.Adam(scene, RATES), torch.arange(13) % 3 == 0
    adam.step(scene, some_grads(scene, 0))
    before, m, v = bits(scene), {k: x.clone() for k, x in adam.m.items()}, {k: x.clone() for k, x in adam.v.items()}
    adam.step(scene, some_grads(scene, 1), visible)
    assert torch.equal(adam.row_steps, 1 + visible.int())
    for name, x in scene.fields().items():
        for now, then in ((x, before[name]), (adam.m[name], m[name]), (adam.v[name], v[name])):
            assert torch.equal(now[~visible], then[~visible]) and not torch.equal(now[visible], then[visible])


def test_a_group_without_a_rate_is_frozen_and_one_without_a_gradient_waits():
    scene = some_scene(features=5)
    before, grads = bits(scene), some_grads(scene, 0)
    adam = optim.Adam(scene, {"means": 0.1, "features": 0.1})
    del grads["features"]
    adam.step(scene, grads)
    assert not torch.equal(scene.means, before["means"])
    assert all(torch.equal(x, before[name]) for name, x in scene.fields().items() if name != "means")


def test_rates_given_to_a_step_hold_for_that_step_only():
    scene = some_scene()
    adam = optim.Adam(scene, {"means": 0.1})
    before = scene.means.clone()
    adam.step(scene, some_grads(scene, 0), learning_rates={"means": 0.0})
    assert torch.equal(scene.means, before)
    adam.step(scene, some_grads(scene, 0))
    assert not torch.equal(scene.means, before)


def test_a_displacement_is_added_to_the_means():
    scene, moved = some_scene(), some_scene()
    noise = torch.randn(13, 3, dtype=torch.float64)
    optim.Adam(scene, RATES).step(scene, some_grads(scene, 0))
    optim.Adam(moved, RATES).step(moved, some_grads(scene, 0), displacement=noise)
    torch.testing.assert_close(moved.means, scene.means + noise, atol=1e-14, rtol=0)
    assert torch.equal(moved.quats, scene.quats)


def test_follow_gathers_moments_clears_fresh_rows_and_reset_groups():
    scene = some_scene()
    adam = optim.Adam(scene, RATES)
    adam.step(scene, some_grads(scene, 0))
    before = {k: x.clone() for k, x in adam.m.items()}
    source = torch.tensor([0, 12, 2, 3, 3, 5, 0])
    fresh = torch.tensor([False, False, False, True, True, False, False])
    adam.follow(Edit(source, fresh, ("logit_opacities",)))
    assert (adam.m["logit_opacities"] == 0).all() and adam.m["logit_opacities"].shape == (7,)
    for group in ("means", "sh"):
        assert torch.equal(adam.m[group][~fresh], before[group][source][~fresh]) and (adam.m[group][fresh] == 0).all()
        assert (adam.v[group][fresh] == 0).all() and (adam.v[group][~fresh] != 0).all()
    edited = scene.rows(source)
    adam.step(edited, some_grads(edited, 1))


def test_following_a_permutation_is_permuting_the_run():
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    straight, shuffled = some_scene(), some_scene()
    a, b = optim.Adam(straight, RATES), optim.Adam(shuffled, RATES)
    for i in range(3):
        a.step(straight, some_grads(straight, i))
        b.step(shuffled, some_grads(shuffled, i))
    shuffled = shuffled.rows(order)
    b.follow(Edit(order, torch.zeros(13, dtype=torch.bool)))
    for i in range(3, 6):
        grads = some_grads(straight, i)
        a.step(straight, grads)
        b.step(shuffled, {k: x[order] for k, x in grads.items()})
    assert all(torch.equal(x, straight.fields()[name][order]) for name, x in shuffled.fields().items())


def test_a_step_on_rows_whose_edit_was_not_followed_is_refused_and_changes_nothing():
    scene = some_scene()
    adam, fewer = optim.Adam(scene, RATES), scene.rows(slice(0, 5))
    before = bits(fewer)
    with pytest.raises(ValueError, match="follow"):
        adam.step(fewer, some_grads(fewer, 0))
    assert adam.steps_taken == 0 and all(torch.equal(x, before[k]) for k, x in fewer.fields().items())


def test_a_restored_optimiser_continues_bit_identically(both_paths):
    straight = some_scene()
    adam = optim.Adam(straight, RATES)
    for i in range(4):
        adam.step(straight, some_grads(straight, i))
    state, scene = adam.state_dict(), straight.clone()
    adam.step(straight, some_grads(straight, 4))          # state_dict is a copy: this must not reach into it
    resumed = optim.Adam(scene, RATES)
    resumed.load_state_dict(state)
    resumed.step(scene, some_grads(straight, 4))
    assert all(torch.equal(x, straight.fields()[name]) for name, x in scene.fields().items())
    assert all(torch.equal(x, adam.state_dict()[name]) for name, x in resumed.state_dict().items())


def test_a_state_of_another_scene_is_refused():
    adam = optim.Adam(some_scene(), RATES)
    with pytest.raises(ValueError, match="row_steps"):
        adam.load_state_dict(optim.Adam(some_scene(7), RATES).state_dict())
    with pytest.raises(ValueError, match="expected"):
        adam.load_state_dict({"steps_taken": torch.tensor(3)})


def test_a_scene_without_rows_takes_a_step(both_paths):
    empty = some_scene().rows(slice(0, 0))
    optim.Adam(empty, RATES).step(empty, empty.fields())


@pytest.mark.parametrize("rate", [float("nan"), -1.0, torch.ones(5), torch.tensor([1.0, -1.0, 1.0])])
def test_a_useless_learning_rate_is_refused(rate):
    with pytest.raises(ValueError, match="learning rate of means"):
        optim.Adam(some_scene(), {"means": rate})


def test_position_rate_decays_by_equal_factors():
    rate = lambda step: optim.exponential_decay(step, 100, 1e-2, 1e-4)
    assert rate(0) == 1e-2 and rate(50) == pytest.approx(1e-3) and rate(100) == pytest.approx(1e-4) and rate(500) == pytest.approx(1e-4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("decayed", [False, True])
def test_native_equals_the_reference(native_dtype, sparse, decayed):
    ours, reference = some_scene(201, native_dtype, features=7), some_scene(201, native_dtype, features=7)
    rates = {**RATES, "features": 1e-2}
    decay = optim.AttributeDecay(1e-1, 1e-1, 0.5, (0, 20), (0, 20)) if decayed else None
    a, b = optim.Adam(ours, rates, attribute_decay=decay), optim.Adam(reference, rates)
    for i in range(20):
        grads = some_grads(ours, i)
        visible = torch.rand(201, generator=torch.Generator().manual_seed(i)) > 0.5 if sparse else None
        a.step(ours, grads, visible, pixels=100)
        b.row_steps += 1 if visible is None else visible
        for name, x in reference.fields().items():
            decay = {"logit_opacities": ("opacity", 1e-3, 0.5), "log_scales": ("scale", 1e-3, 0.5)}.get(name) if decayed else None
            optim.adam_reference_(x, grads[name], b.m[name], b.v[name], b.learning_rates[name], b.betas, b.eps, b.row_steps, visible, decay)
    # 1 - 0.999 taken in float32 is 1.3e-5 off: 6e-6 of a step, 20 steps of at most 0.05.
    tolerance = dict(atol=1e-5, rtol=1e-5) if native_dtype == torch.float32 else dict(atol=1e-13, rtol=1e-12)
    for name, x in ours.fields().items():
        torch.testing.assert_close(x, reference.fields()[name], **tolerance)
        torch.testing.assert_close(a.v[name], b.v[name], atol=0, rtol=2e-5)
