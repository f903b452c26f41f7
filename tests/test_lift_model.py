"""The lifting network as a function: any number of views, lenses that differ, worlds that are turned, gradients, refusals."""
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from lifting import SMALL

from splatkit.camera import Cameras
from splatkit.errors import BadConfig
from splatkit.lift.backbone import attend_in_blocks, attend_misaligned, cuts
from splatkit.lift.config import CONFIGS, MVSplatConfig
from splatkit.lift import model as module, sweep
from splatkit.lift.data import Sample
from splatkit.lift.losses import losses
from splatkit.lift.model import MVSplat
from splatkit.lift.sweep import _grid, _homographies, correlate, depth_planes
from splatkit.lift.train_config import LiftLosses
from splatkit.raster import render

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return MVSplat(SMALL)


def views(count, height=32, width=48, batch=1, seed=0, dtype=torch.float32):
    """Pictures of noise and cameras beside each other."""
    g = torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.rand(batch * count, 3, 8, 8, generator=g), (height, width), mode="bilinear").unflatten(0, (batch, count)).to(dtype)
    K = torch.tensor([[40.0, 0, width / 2], [0, 42, height / 2], [0, 0, 1]], dtype=dtype).repeat(batch, count, 1, 1)
    world_to_cam = torch.eye(4, dtype=dtype).repeat(batch, count, 1, 1)
    world_to_cam[:, :, 0, 3] = -0.3 * torch.arange(count, dtype=dtype)
    return images, K, world_to_cam, torch.full((batch, count), 1.0, dtype=dtype), torch.full((batch, count), 20.0, dtype=dtype)


def exact(model):
    """A copy in float64."""
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_views_gives_a_gaussian_for_each_of_their_pixels(model, count):
    with torch.no_grad():
        out = model(*views(count))
    assert out.depth.shape == (1, count, 32, 48) and len(out.scenes[0]) == count * 32 * 48
    assert bool(((out.depth >= 0.999) & (out.depth <= 20.001)).all())
    out.scenes[0].check_finite()


def test_samples_of_a_batch_do_not_see_each_other(model):
    both, model = views(3, batch=2, dtype=torch.float64), exact(model)
    with torch.no_grad():
        out, alone = model(*both), model(*(x[1:] for x in both))
    assert torch.allclose(out.depth[1], alone.depth[0], atol=1e-6)
    assert torch.allclose(out.scenes[1].means, alone.scenes[0].means, atol=1e-6)


def test_the_order_of_views_does_not_matter(model):
    given, model = views(3, dtype=torch.float64), exact(model)
    order = [2, 0, 1]
    with torch.no_grad():
        out, other = model(*given), model(*(x[:, order] for x in given))
    assert torch.allclose(out.depth[:, order], other.depth, atol=1e-6)


def test_a_moved_world_gives_the_moved_scene():
    torch.manual_seed(1)
    model = MVSplat(dataclasses.replace(SMALL, sh_degree=3)).double()
    images, K, world_to_cam, near, far = views(2, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    turn = turn * torch.det(turn).sign()
    moved = torch.eye(4, dtype=torch.float64)
    moved[:3, :3], moved[:3, 3] = turn, torch.tensor([0.3, -2.0, 1.0])
    with torch.no_grad():
        scene = model(images, K, world_to_cam, near, far).scenes[0].transformed(1.0, turn, moved[:3, 3])
        other = model(images, K, world_to_cam @ torch.linalg.inv(moved), near, far).scenes[0]
    for name in ("means", "log_scales", "logit_opacities", "sh"):
        assert torch.allclose(getattr(scene, name), getattr(other, name), atol=1e-6), name


def test_a_gaussian_is_seen_where_its_pixel_is_also_off_the_centre_of_the_lens(model):
    images, K, world_to_cam, near, far = views(2)
    K[:, 1, 0, 2], K[:, 1, 1, 2] = 9.0, 25.0
    with torch.no_grad():
        scene = model(images, K, world_to_cam, near, far).scenes[0]
    means = scene.means.view(2, 32, 48, 3)[1] + world_to_cam[0, 1, :3, 3]
    place = means @ K[0, 1].T
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    assert ((place[..., 0] / place[..., 2] - x - 0.5).abs() <= 0.501).all() and ((place[..., 1] / place[..., 2] - y - 0.5).abs() <= 0.501).all()


def test_depth_is_that_of_the_gaussians(model):
    images, K, world_to_cam, near, far = views(2)
    for unit_rays in (False, True):
        model.config = dataclasses.replace(SMALL, unit_rays=unit_rays)
        with torch.no_grad():
            out = model(images, K, world_to_cam, near, far)
        z = (out.scenes[0].means.view(2, 32, 48, 3) @ world_to_cam[0, 0, :3, :3].T)[..., 2]
        assert torch.allclose(z, out.depth[0], rtol=0.02)       # an offset within the pixel changes the length of a ray
    model.config = SMALL


# --- the plane sweep on features whose depth is known: a slanted plane in a field of sines ---

def sweep_error(K, official=False, height=32, width=40):
    """Mean error of the best plane, in planes, over pixels of the first view that the second sees."""
    g = torch.Generator().manual_seed(0)
    waves, phases = 4 * torch.randn(3, 96, generator=g), 6 * torch.rand(96, generator=g)
    world_to_cam = torch.eye(4).repeat(1, 2, 1, 1)
    world_to_cam[0, 1, 0, 3] = -0.4
    planes = depth_planes(torch.tensor([[1.0, 1.0]]), torch.tensor([[8.0, 8.0]]), 64)
    y, x = torch.meshgrid(torch.arange(height) + 0.0, torch.arange(width) + 0.0, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(K[0]).transpose(-1, -2)[:, None]
    normal = torch.tensor([0.25, 0.1, 1.0])
    features, depth = [], []
    for view in range(2):
        centre = -world_to_cam[0, view, :3, 3]
        z = (2.5 - centre @ normal) / (rays[view] @ normal)
        depth.append(z)
        features.append(((centre + z[..., None] * rays[view]) @ waves + phases).sin().permute(2, 0, 1))
    features = F.normalize(torch.stack(features)[None], dim=2)
    best = correlate(features, K, world_to_cam, planes, official)[0, 0].argmax(dim=0)
    step = float(planes[0, 0, 1] - planes[0, 0, 0])
    seen = (K[0, 1] @ (torch.stack([depth[0] * rays[0, ..., i] for i in range(3)]).flatten(1) + world_to_cam[0, 1, :3, 3:])).view(3, height, width)
    inside = (seen[:2] / seen[2] >= 1).all(0) & (seen[0] / seen[2] < width - 2) & (seen[1] / seen[2] < height - 2)
    assert inside.float().mean() > 0.2
    return float((planes[0, 0][best] - 1 / depth[0]).abs()[inside].mean() / step)


def lens(focal, cx=20.0, cy=16.0):
    return torch.tensor([[focal, 0, cx], [0, focal, cy], [0, 0, 1.0]])


def test_views_of_focal_lengths_1_to_1_5_give_depth_as_good_as_equal_ones():
    equal = sweep_error(torch.stack([lens(30.0), lens(30.0)])[None])
    different = torch.stack([lens(30.0), lens(45.0)])[None]
    assert sweep_error(different) <= equal < 2
    assert sweep_error(different, official=True) > 5      # what the published code makes of it


def test_views_of_different_principal_points_give_depth_as_good_as_equal_ones():
    equal = sweep_error(torch.stack([lens(30.0), lens(30.0)])[None])
    different = torch.stack([lens(30.0), lens(30.0, cx=14.0, cy=19.0)])[None]
    assert sweep_error(different) <= equal < 2
    assert sweep_error(different, official=True) > 5


@pytest.mark.parametrize("at_once", [1, 2 * 2 * 4 * 6 * 8, 1 << 20], ids=["one plane at a time", "two", "all"])
def test_the_sweep_and_its_gradients_are_those_of_the_warp_written_out(at_once, monkeypatch):
    monkeypatch.setitem(sweep.AT_ONCE, "cpu", at_once)
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 4, 6, 8, generator=g, dtype=torch.float64, requires_grad=True)
    _, K, world_to_cam, near, far = views(3, batch=2, dtype=torch.float64)
    K = K * K.new_tensor([0.15, 0.15, 1])[:, None]
    planes = depth_planes(near, far, 5)
    def written_out(features):
        total = []
        for i in range(3):
            pairs = []
            for j in (j for j in range(3) if j != i):
                ray, shift = _homographies(K[:, i], K[:, j], world_to_cam[:, j] @ torch.linalg.inv(world_to_cam[:, i]), 6, 8)
                warped = [F.grid_sample(features[:, j], _grid(ray, shift, planes[:, i, d:d + 1], 6, 8), align_corners=True) for d in range(5)]
                pairs.append(torch.stack([(w * features[:, i]).sum(1) / 2 for w in warped], dim=1))
            total.append(sum(pairs) / 2)
        return torch.stack(total, dim=1)
    weights = torch.randn(2, 3, 5, 6, 8, generator=g, dtype=torch.float64)
    found, expected = correlate(features, K, world_to_cam, planes), written_out(features)
    assert torch.allclose(found, expected)
    assert torch.allclose(torch.autograd.grad((found * weights).sum(), features)[0], torch.autograd.grad((expected * weights).sum(), features)[0])


def test_blocks_are_shifted_windows_with_a_mask_that_is_in_place():
    g = torch.Generator().manual_seed(0)
    q, (k, v) = torch.randn(1, 2, 8, 12, 4, generator=g), torch.randn(2, 1, 2, 1, 8, 12, 4, generator=g)
    assert cuts(8, True) == [(0, 2), (2, 6), (6, 8)] and cuts(12, False) == [(0, 6), (6, 12)]
    # With one other view the published order of its mask is right.
    assert torch.allclose(attend_in_blocks(q, k, v, True), attend_misaligned(q, k, v, True), atol=1e-5)


def test_what_is_lifted_is_drawn_with_gradients_to_every_weight(model):
    images, K, world_to_cam, near, far = views(2)
    model.zero_grad()
    scene = model(images, K, world_to_cam, near, far).scenes[0]
    picture = render(scene, Cameras(world_to_cam[0, :1], K[0, :1], 48, 32)).color
    (picture - images[0, :1].permute(0, 2, 3, 1)).square().mean().backward()
    assert not {name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)}


def test_the_small_configuration_has_less_than_four_million_weights():
    with torch.device("meta"):
        assert sum(p.numel() for p in MVSplat(CONFIGS["tiny"]).parameters()) < 4_000_000


def changed(**values):
    given = list(views(2))
    for name, x in values.items():
        given[["images", "K", "world_to_cam", "near", "far"].index(name)] = x
    return given


@pytest.mark.parametrize("given, said", [
    (views(1), "2 or more views"), (views(2, height=40), "multiples of 16"), (views(2, height=16), "32 or more"),
    (changed(near=torch.full((1, 2), 20.0)), "0 < near < far"), (changed(far=torch.full((1, 2), torch.inf)), "0 < near < far"),
    (changed(K=torch.zeros(1, 2, 3, 3)), "focal length"), (changed(world_to_cam=torch.full((1, 2, 4, 4), torch.nan)), "NaN"),
], ids=["one view", "size", "small", "near", "far", "focal", "pose"])
def test_what_cannot_be_lifted_is_refused_in_one_line(model, given, said):
    with pytest.raises(ValueError, match=said):
        model(*given)


@pytest.mark.parametrize("values, said", [({"feature_dim": 12}, "multiple of 8"), ({"blocks": 0}, "1 to 64"), ({"cost_heads": 3}, "divisor"), ({"scale_range": (2.0, 1.0)}, "smallest"),
                                          ({"sh_degree": 5}, "0 to 4"), ({"cnn_widths": (0, 8, 8)}, "4096")])
def test_a_configuration_that_no_network_can_have_is_refused(values, said):
    with pytest.raises(BadConfig, match=said):
        MVSplatConfig(**values)


class Elsewhere(TorchDispatchMode):
    """Collects the operations that a tensor of the CPU takes part in."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        by_list = operation is torch.ops.aten.index.Tensor      # whose list was copied to the device before this could see it
        if by_list or any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves((args, out))):
            self.found.append(operation)
        return out


def test_network_and_losses_without_pictures_make_nothing_on_the_cpu_when_on_another_device(model, monkeypatch):
    monkeypatch.setitem(sweep.AT_ONCE, "meta", 1 << 25)
    monkeypatch.setattr(module, "_check", lambda *a: None)      # looks at values, as it does on a CPU alone
    images, K, world_to_cam, _, far = (x.to("meta") for x in views(3))
    sample, there = Sample(images, K, world_to_cam, images[:, :, 0], far[:, 0]), copy.deepcopy(model).to("meta")

    def step():
        found = there(images[:, :2], K[:, :2], world_to_cam[:, :2], far[:, :2], far[:, :2])
        sum(losses(found, sample, 2, LiftLosses(mse=0, depth=1, warp=1, agreement=1)).values()).backward()
    with Elsewhere() as first:
        step()      # constants are made once
    with Elsewhere() as second:
        step()
    assert first.found and not second.found
