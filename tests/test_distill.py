"""Distillation, piece by piece: up-sampling within objects, blending, carried features, adapters, the moving average, the loss. After the paper's acceptance list."""
import contextlib
import importlib.util
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from splatkit import rooms
from splatkit.camera import Cameras, unproject
from splatkit.distill import lora, views
from splatkit.distill.config import Adapter, BackboneConfig, DataConfig, Distill, EMAConfig, HeadConfig, LabelConfig
from splatkit.distill.geometry import Carrier, at_depth, from_depth, mirrored
from splatkit.distill.head import Head, _sinkhorn, cross_entropy, mean_over_valid
from splatkit.distill.label import labels_of, pixel_maps
from splatkit.distill.maps import blend, blended_and_shrunk, kmeans_regions, region_means, shrink, token_labels, upsample
from splatkit.distill.samples import Sample, Samples, draw
from splatkit.distill.step import Center, Tally, common_points, loss_of, make_labels, project
from splatkit.distill.student import Teacher, student_of, trained
from splatkit.distill.views import RoomScene, View
from splatkit.raster import render

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_thread")

TINY = BackboneConfig("vit_tiny_patch16_224", "random", embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=48)


@pytest.fixture(scope="module")
def backbone():
    from splatkit.distill import backbone as backbones
    return lambda seed=0: backbones.load(TINY, seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def voronoi(height, width, count, seed=0):
    """Labels 1 to `count` by the nearest of random points."""
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 2, generator=g) * torch.tensor([height, width])
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.cdist(torch.stack([y, x], -1).view(-1, 2), points).argmin(1).view(height, width) + 1


# ---- up-sampling (paper, eq. 2 and 3)


def test_equal_masks_give_plain_bilinear_interpolation():
    tokens = random(5, 7, 3)
    wanted = F.interpolate(tokens.permute(2, 0, 1)[None], (40, 56), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    for label in (0, 4):
        assert torch.allclose(upsample(tokens, torch.full((40, 56), label)), wanted, atol=1e-6)


def test_with_the_code_s_positions_equal_masks_give_align_corners():
    tokens = random(5, 7, 3)
    wanted = F.interpolate(tokens.permute(2, 0, 1)[None], (40, 56), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    assert torch.allclose(upsample(tokens, torch.zeros(40, 56).long(), positions="align_corners"), wanted, atol=1e-5)


@pytest.mark.parametrize("border", [24, 28, 29, 31])
def test_nothing_leaks_across_the_border_of_two_objects(border):
    labels = torch.ones(40, 56, dtype=torch.int64)
    labels[:, border:] = 2
    tokens = token_labels(labels, 5, 7)[..., None].float() * torch.tensor([1.0, -3.0])
    assert torch.equal(upsample(tokens, labels), labels[..., None] * torch.tensor([1.0, -3.0]))


def test_a_pixel_without_a_token_of_its_object_around_it_is_never_zero():
    labels = voronoi(80, 112, 60)
    labels[3, 3] = 999          # an object of one pixel
    tokens = random(10, 14, 4).abs() + 1
    assert (upsample(tokens, labels) >= 1 - 1e-5).all()
    zeros = (upsample(tokens, labels, fallback="zero") == 0).all(2)
    assert zeros[3, 3] and 0 < zeros.float().mean() < 0.3


def test_the_ladder_takes_the_nearest_token_of_the_object_before_any_other():
    labels, grid = torch.ones(32, 32, dtype=torch.int64), torch.ones(4, 4, dtype=torch.int64)
    labels[0, 31], grid[2, 3] = 7, 7        # around pixel (0, 31) lie tokens (0, 2), (0, 3), (1, 2), (1, 3)
    tokens = torch.zeros(4, 4, 1)
    tokens[2, 3] = 5
    assert upsample(tokens, labels, grid)[0, 31, 0] == pytest.approx(5)


def test_a_token_has_the_label_that_covers_half_of_its_patch_else_that_of_its_centre():
    labels = torch.zeros(8, 16, dtype=torch.int64)
    labels[:5, :8], labels[4, 12] = 3, 9
    labels[:, 8:12] = torch.arange(32).view(8, 4) + 20
    labels[:, 12:] = torch.arange(32).view(8, 4) + 60
    labels[4, 12] = 9
    assert token_labels(labels, 1, 2).tolist() == [[3, 9]]


def test_a_grid_that_does_not_divide_the_picture_is_said():
    with pytest.raises(ValueError, match="multiples of the patch"):
        upsample(random(5, 7, 3), torch.zeros(41, 56).long())


# ---- blending (eq. 4) and shrinking


def test_blending_with_1_is_the_identity_with_0_region_means_and_keeps_means_always():
    features, labels = random(40, 56, 3), voronoi(40, 56, 6)
    means = region_means(features, labels)
    assert torch.equal(blend(features, labels, 1.0), features)
    assert torch.allclose(blend(features, labels, 0.0), means, atol=1e-6)
    assert torch.allclose(means[labels == 2], features[labels == 2].mean(0).expand(int((labels == 2).sum()), 3), atol=1e-6)
    for a in (0.0, 0.3, 0.5, 0.9):
        assert torch.allclose(region_means(blend(features, labels, a), labels), means, atol=1e-5)


def test_pixels_without_a_label_stay_as_they_are_and_invalid_ones_enter_no_mean():
    features, labels = random(8, 8, 3), torch.ones(8, 8, dtype=torch.int64)
    labels[0], valid = 0, torch.ones(8, 8, dtype=torch.bool)
    valid[1], features[1] = False, 1e6
    out = blend(features, labels, 0.5, valid)
    assert torch.equal(out[0], features[0])
    assert torch.allclose(out[2], 0.5 * features[2] + 0.5 * features[2:].flatten(0, 1).mean(0), atol=1e-5)
    assert not torch.equal(blend(features, labels, 0.5, valid, unlabelled=True)[0], features[0])


@pytest.mark.parametrize("how", ["bilinear", "area"])
def test_what_is_not_valid_does_not_reach_the_token_grid(how):
    features, valid = torch.ones(32, 48, 2), torch.ones(32, 48, dtype=torch.bool)
    valid[:, :21], features[:, :21] = False, 1e6
    small, seen = shrink(features, valid, 4, 6, how)
    assert seen.tolist() == [[False, False, how == "area" or False, True, True, True]] * 4 or seen[:, 3:].all() and not seen[:, :2].any()
    assert torch.allclose(small[seen], torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("regions, unlabelled", [(6, False), (6, True), (300, False)])
def test_blending_and_shrinking_at_once_is_one_after_the_other(regions, unlabelled):
    features, weight, labels = random(40, 56, 3), random(40, 56).abs() + 0.5, voronoi(40, 56, regions)
    labels[:20, :20], valid = 0, random(40, 56, seed=1) > -0.5
    at_once, seen = blended_and_shrunk(features, weight, labels, 0.3, valid, 5, 7, unlabelled)
    wanted, also_seen = shrink(blend(features * weight[..., None], labels, 0.3, valid, unlabelled), valid, 5, 7)
    assert torch.equal(seen, also_seen) and torch.allclose(at_once[seen], wanted[seen], atol=1e-5)


def test_regions_without_masks_are_those_of_the_features():
    tokens = torch.zeros(4, 6, 3)
    tokens[:, :3, 0], tokens[:, 3:, 1] = 1, 1
    labels = kmeans_regions(tokens + 0.01 * random(4, 6, 3), 32, 48, 2, seed=0)
    assert labels.unique().tolist() == [1, 2] and labels[:, :24].unique().numel() == 1 and labels[:, 24:].unique().numel() == 1


# ---- carried features


def plane_view(width=64, height=48, depth=2.0):
    """A smooth picture on a plane that faces the camera."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    photo = torch.stack([0.5 + 0.4 * torch.sin(6 * x + 2 * y), 0.5 + 0.4 * torch.cos(5 * y), 0.2 + 0.6 * x * y])
    K = torch.tensor([[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1]])
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([0.3, -0.2, 0.1])
    return View(photo, Cameras(pose[None], K[None], width, height), torch.ones(height, width, dtype=torch.int64), torch.full((height, width), depth))


def test_carried_colours_seen_from_their_own_camera_are_the_photo_and_equal_its_picture():
    view = plane_view()
    scene, pixels = at_depth(view)
    scene = Carrier(scene, pixels).carrying([view.photo.permute(1, 2, 0)], [view.camera])
    out = render(scene, view.camera, outputs=("color", "features"))
    assert torch.allclose(out.features, out.color, atol=2e-6)
    wanted = view.photo.permute(1, 2, 0)
    inner = (out.features[0] / out.alpha[0, ..., None] - wanted)[2:-2, 2:-2]
    assert -10 * math.log10(float(inner.square().mean())) > 30


def test_a_label_from_the_target_s_own_photo_gives_back_its_features():
    view = plane_view()
    tokens = random(1, 6, 8, 5)
    config = LabelConfig(blend=1.0, regions="none")
    label = labels_of(from_depth(Sample("plane", ("a",), (view,), (view,))), tokens, [view], [view], None, config)[0]
    smooth = shrink(pixel_maps(tokens, [view], config)[0], torch.ones(48, 64, dtype=torch.bool), 6, 8)[0]
    assert label.valid.all()
    assert (label.tokens - smooth)[1:-1, 1:-1].abs().mean() < 0.15 * smooth.abs().mean()


def test_what_gaussians_cover_too_little_is_not_valid_and_counts_as_zero_in_the_code_s_way():
    view = plane_view()
    depth = view.depth.clone()
    depth[:, 32:] = 0
    half = View(view.photo, view.camera, view.labels, depth)
    carrier = from_depth(Sample("plane", ("a",), (half,), (view,)))
    label = labels_of(carrier, random(1, 6, 8, 5), [half], [view], None, LabelConfig())[0]
    assert label.valid[:, :4].all() and not label.valid[:, 5:].any()
    bare = labels_of(carrier, random(1, 6, 8, 5), [half], [view], None, LabelConfig(coverage="zero", blend=1.0))[0]
    assert (bare.tokens[:, 5:] == 0).all() and not bare.valid[:, 5:].any()


def test_pixels_that_a_photo_s_mask_leaves_out_carry_nothing_and_ask_nothing():
    view = plane_view()
    kept = torch.ones(48, 64, dtype=torch.bool)
    kept[:24] = False
    masked = View(view.photo, view.camera, view.labels, view.depth, kept)
    scene, pixels = at_depth(masked)
    assert len(scene) == 24 * 64 and pixels.min() == 24 * 64
    label = labels_of(from_depth(Sample("plane", ("a",), (view,), (masked,))), random(1, 6, 8, 5), [view], [masked], None, LabelConfig())[0]
    assert label.valid.tolist() == [[False] * 8] * 3 + [[True] * 8] * 3


def test_depth_with_holes_is_covered_by_wider_gaussians():
    view = plane_view()
    depth = view.depth.clone()
    depth[::2], depth[:, ::2] = 0, 0        # a quarter is known
    holes = View(view.photo, view.camera, view.labels, depth)
    scene, _ = at_depth(holes)
    assert render(scene, view.camera).alpha[0, 4:-4, 4:-4].min() > 0.5


def test_another_room_stands_in_for_one_without_place_for_its_cameras(monkeypatch):
    real, asked = rooms.ring_cameras, []
    monkeypatch.setattr(rooms, "ring_cameras", lambda room, photos, width, height, seed: asked.append(seed) or (real(room, photos, width, height, seed) if len(asked) > 1 else room.no_place()))
    monkeypatch.setattr(rooms.Room, "no_place", lambda room: (_ for _ in ()).throw(ValueError("no place")), raising=False)
    assert RoomScene(40, 4, 32, 24).view(0).photo.shape == (3, 24, 32) and asked[0] == 40 != asked[1]


def test_a_room_in_the_cache_is_not_made_again(tmp_path, monkeypatch):
    seen = RoomScene(41, 4, 32, 24).view(2)
    RoomScene(41, 4, 32, 24, tmp_path).view(2)
    views._packed_room_view.cache_clear()
    monkeypatch.setattr(views, "_room", None)
    again = RoomScene(41, 4, 32, 24, tmp_path).view(2)
    assert all(torch.equal(getattr(seen, name), getattr(again, name)) for name in ("photo", "labels", "depth", "normals", "classes"))
    assert torch.equal(seen.camera.K, again.camera.K) and torch.equal(seen.camera.world_to_cam, again.camera.world_to_cam)


def test_a_mirrored_sample_has_the_mirrored_label():
    scene = RoomScene(3, 12, 48, 32)
    sample = Sample("room", ("a", "b"), (scene.view(2), scene.view(4)), (scene.view(3),))
    flipped = Sample("room", ("a", "b"), tuple(v.mirrored() for v in sample.contexts), tuple(v.mirrored() for v in sample.targets), is_mirrored=True)
    tokens = random(2, 4, 6, 5)
    one, other = (labels_of(from_depth(s), t, s.contexts, s.targets, None, LabelConfig())[0] for s, t in ((sample, tokens), (flipped, tokens.flip(2))))
    apart = lambda x, y: float((x - y).abs().mean() / x.abs().mean())       # not equal: of Gaussians at one depth, and of labels at one half, the first one wins
    assert apart(one.tokens.flip(1), other.tokens) < 0.15 < 0.5 < apart(one.tokens, other.tokens)
    whole, _ = at_depth(sample.contexts[0])
    picture = lambda s, v: render(s, v.camera).color[0]
    assert apart(picture(mirrored(whole), flipped.targets[0]).flip(1), picture(whole, sample.targets[0])) < 0.02


def test_features_of_many_views_reach_a_scene_by_the_weights_of_its_pixels():
    view = plane_view()
    scene, pixels = at_depth(view)
    maps = [random(48, 64, 3), random(48, 64, 3, seed=1)]
    cameras = [view.camera, view.camera.replace(world_to_cam=view.camera.world_to_cam.clone())]
    lifted = Carrier(scene, None).carrying(maps, cameras)
    own = Carrier(scene, None).carrying(maps[:1], cameras[:1])
    both = 0.5 * own.features + 0.5 * Carrier(scene, None).carrying(maps[1:], cameras[1:]).features
    assert torch.allclose(lifted.features, both, atol=1e-4)
    fitted = Carrier(scene, pixels).carrying(maps[:1], cameras[:1], steps=10)
    error = lambda s: (render(s, view.camera, outputs=("features",)).features[0] - maps[0]).abs().mean()
    assert error(fitted) < error(Carrier(scene, pixels).carrying(maps[:1], cameras[:1]))


# ---- adapters, teacher, gradients


def student(backbone, **adapter):
    config = Distill(adapter=Adapter(**{"rank": 4, "dropout": 0.0, **adapter}), head=HeadConfig(prototypes=64, hidden=32, bottleneck=16), backbone=TINY, data=DataConfig(rooms=1))
    return student_of(backbone(), config)


def shaken(model, seed=0):
    """All that trains moved, B of the adapters away from zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize("patch_embed", [False, True])
def test_adapters_start_as_the_model_was_and_merge_into_what_they_became(backbone, patch_embed):
    photos, plain = torch.rand(2, 3, 48, 64), backbone()
    keys = list(plain.model.state_dict())
    adapted = student(backbone, patch_embed=patch_embed).backbone
    assert torch.equal(adapted(photos), plain(photos))
    assert sum(isinstance(m, lora.Adapted) for m in adapted.modules()) == 2 * 2 + patch_embed
    with torch.no_grad():
        after = shaken(adapted)(photos)
    assert (after - plain(photos)).abs().max() > 1e-2
    lora.merge(adapted.model)
    assert list(adapted.model.state_dict()) == keys
    assert torch.allclose(adapted(photos), after, atol=1e-4)


def test_no_gradient_reaches_teacher_or_geometry_and_some_reaches_every_adapter_and_the_head(backbone):
    model = shaken(student(backbone))
    config = Distill(backbone=TINY, data=DataConfig(rooms=1, height=48, width=64), head=HeadConfig(prototypes=64, hidden=32, bottleneck=16))
    teacher = Teacher(model, config.ema)
    sample = Samples([RoomScene(0, 12, 64, 48)], config.data, 0)[0]
    carriers = []

    def geometry(sample):
        carriers.append(from_depth(sample))
        carriers[-1].scene.requires_grad_()
        return carriers[-1]
    labels = make_labels([sample], teacher, geometry, config, contextlib.nullcontext())
    loss_of([sample], model, model.head, teacher, labels, config, Center(None, 0.9), contextlib.nullcontext(), Tally()).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(x.grad is None for x in carriers[0].scene.fields().values()) and not labels[0].tokens.requires_grad
    names = trained(model)
    assert {n.split(".")[-1] for n in names if n.startswith("backbone")} == {"A", "B"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in names)


@pytest.mark.parametrize("of", ["factors", "merged"])
def test_the_teacher_after_n_updates_is_the_closed_form(backbone, of):
    model = student(backbone)
    teacher, n, rate = Teacher(model, EMAConfig(rate=0.9, of=of)), 7, 0.9
    before = {name: p.clone() for name, p in teacher.state(model).items()}
    shaken(model)
    after = {name: p.clone() for name, p in teacher._followed(model).items()}
    for _ in range(n):
        teacher.follow(model)
    for name, p in teacher.state(model).items():
        assert torch.allclose(p, rate ** n * before[name] + (1 - rate ** n) * after[name], atol=1e-6), name
    if of == "merged":
        assert not any(isinstance(m, lora.Adapted) for m in teacher.model.modules()) and any("qkv.weight" in name for name in before)


def test_a_teacher_shares_what_is_frozen_and_has_no_dropout(backbone):
    model = student(backbone, dropout=0.5)
    teacher = Teacher(model, EMAConfig())
    frozen = lambda m: {n: p for n, p in m.named_parameters() if n.endswith("base.weight")}
    assert all(p is frozen(model)[n] for n, p in frozen(teacher.model).items())
    photos = torch.rand(1, 3, 48, 64)
    shaken(teacher.model.requires_grad_(True)).requires_grad_(False)
    assert torch.equal(teacher.model.backbone(photos), teacher.model.backbone(photos))


# ---- the loss (eq. 5)


def test_the_excess_is_never_negative_and_zero_for_equal_heads_and_inputs():
    head, features = Head(32, 64, 16, 128), random(50, 32)
    loss, excess = cross_entropy(head(features), head(features))
    assert excess.abs().max() < 1e-6
    loss, excess = cross_entropy(head(features), head(random(50, 32, seed=1)), 0.1, 0.05)
    entropy = torch.distributions.Categorical(logits=head(random(50, 32, seed=1)) / 0.05).entropy()
    assert (excess >= 0).all() and torch.allclose(loss - entropy, excess, atol=1e-4)


@pytest.mark.parametrize("degrees, expected", [(5, 1.5e-5), (20, 2.4e-4), (60, 1.9e-3), (90, 3.9e-3)])
def test_at_temperature_1_the_excess_is_the_cosine_loss_of_the_bottleneck_over_its_width(degrees, expected):
    with torch.no_grad():
        directions = F.normalize(torch.randn(65536, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    a, b = torch.eye(256)[0], torch.eye(256)[1]
    turned = math.cos(math.radians(degrees)) * a + math.sin(math.radians(degrees)) * b
    loss, excess = cross_entropy((directions @ a)[None], (directions @ turned)[None])
    assert float(excess) == pytest.approx((1 - math.cos(math.radians(degrees))) / 256, rel=0.02)
    assert float(excess) == pytest.approx(expected, rel=0.05) and 11.08 < float(loss) < 11.10
    sharp = cross_entropy((directions @ a)[None], (directions @ turned)[None], 0.1, 0.1)[1]
    assert 60 < float(sharp / excess) < 140


def test_sinkhorn_uses_all_prototypes_alike():
    scores = random(512, 8) + 5 * torch.eye(8)[0]
    p = _sinkhorn(scores / 0.5).exp()
    assert torch.allclose(p.sum(1), torch.ones(512), atol=1e-5) and (p.mean(0) * 8 - 1).abs().max() < 0.1 < (F.softmax(scores / 0.5, 1).mean(0) * 8 - 1).abs().max()


def test_invalid_tokens_do_not_change_the_loss_and_a_photo_without_valid_ones_gives_zero():
    losses, valid = random(10).requires_grad_(), torch.arange(10) < 6
    loss = mean_over_valid(losses, valid)
    assert float(loss.detach()) == pytest.approx(float(losses.detach()[:6].mean()))
    spoilt = torch.where(valid, losses, math.nan)
    assert torch.equal(mean_over_valid(spoilt, valid), loss)
    none = mean_over_valid(losses, torch.zeros(10, dtype=torch.bool))
    none.backward()
    assert none.detach() == 0 and (losses.grad == 0).all()


# ---- samples


def test_targets_lie_strictly_between_the_context_photos_unless_allowed():
    rng, config = np.random.default_rng(0), DataConfig(rooms=1, gap=(3, 5))
    drawn = [draw(20, config, rng) for _ in range(300)]
    assert all(c[0] < t[0] < c[1] for c, t in drawn) and {c[1] - c[0] for c, _ in drawn} == {3, 4, 5}
    loose = [draw(20, DataConfig(rooms=1, gap=(8, 8), allow_context_target=True), rng) for _ in range(900)]
    assert sum(t[0] in c for c, t in loose) / 900 == pytest.approx(2 / 9, abs=0.04)
    many = draw(20, DataConfig(rooms=1, gap=(8, 8), contexts=3, targets=4), rng)
    assert many[0] == [many[0][0], many[0][0] + 4, many[0][0] + 8] and len(set(many[1])) == 4 and not set(many[1]) & set(many[0])


def test_a_sample_is_drawn_by_its_number_alone_and_each_epoch_has_every_scene_once():
    scenes = [RoomScene(i, 8, 16, 16) for i in range(3)]
    config = DataConfig(rooms=3, gap=(2, 3))
    one, other = Samples(scenes, config, 5), Samples(scenes, config, 5)
    order = [one[n].scene for n in range(6)]
    assert sorted(order[:3]) == sorted(order[3:]) == ["room-0", "room-1", "room-2"]
    assert torch.equal(one[4].targets[0].photo, other[4].targets[0].photo) and one[4].names == other[4].names
    steps = list(one.batches(2, 3, 4, 1, 1, 2))
    assert [batch[0].names for batch in steps] == [one[n].names for n in (6, 7, 10, 11)]


def test_wrong_geometry_is_the_depth_of_another_scene():
    scenes = [RoomScene(i, 8, 16, 16) for i in range(3)]
    sample = Samples(scenes, DataConfig(rooms=3, gap=(2, 3), flip=False), 5, with_elsewhere=True)[0]
    assert sample.elsewhere.scene != sample.scene
    wrong, right = from_depth(sample, permuted=True).scene, from_depth(sample).scene
    z = lambda s: project(s.means[:256], sample.contexts[0])[1]
    assert torch.allclose(z(wrong).view(16, 16), sample.elsewhere.contexts[0].depth, atol=1e-4) and not torch.allclose(z(wrong), z(right), atol=0.05)


def test_common_points_of_two_views_are_the_same_points():
    scene = RoomScene(1, 24, 96, 72)
    a, b = scene.view(0), scene.view(2)
    at_a, at_b = common_points(a, b, 9, 12)
    assert 20 < len(at_a) < 108
    z = a.depth[at_a[:, 1].long(), at_a[:, 0].long()]
    seen = unproject(a.camera, at_a, z)
    assert torch.allclose(project(seen, b)[0], at_b, atol=1e-3)
    same = a.labels[at_a[:, 1].long(), at_a[:, 0].long()] == b.labels[at_b[:, 1].long(), at_b[:, 0].long()]
    assert same.float().mean() > 0.9
