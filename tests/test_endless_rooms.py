"""Endless rooms: they are as hard as training on them wants, the same for the same seed, exact, and readable once written."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_rooms import PLAIN, box_room, camera, outside

from splatkit import rooms
from splatkit.io.depth import load_depth
from splatkit.io.photos import load_image
from splatkit.io.transforms import load_transforms
from splatkit.metrics import psnr
from splatkit.rooms import SOLIDS, Solid, Texture, endless
from splatkit.rooms.cast import unprojected
from splatkit.rooms.written import DEPTH_STEP


@pytest.fixture(scope="module")
def seen():
    """Samples of 24 seeds."""
    return [rooms.sample(seed, 3, 64, 64) for seed in range(24)]


def quantiles(sample) -> torch.Tensor:
    return sample.views.depth.flatten(1).quantile(torch.tensor([0.05, 0.5, 0.95]), dim=1)


def test_nothing_is_nearer_than_half_a_metre(seen):
    assert min(float(sample.views.depth.min()) for sample in seen) >= 0.5


def test_the_median_photo_has_twice_the_depth_at_its_far_end(seen):
    assert torch.cat([quantiles(sample)[2] / quantiles(sample)[0] for sample in seen]).median() >= 2


def test_a_fifth_to_two_fifths_of_all_pixels_show_plain_materials(seen):
    assert 0.2 <= torch.stack([rooms.plain_pixels(sample).mean() for sample in seen]).mean() <= 0.4


def test_the_outer_cameras_are_6_to_18_percent_of_the_median_depth_apart(seen):
    for sample in seen:
        a, b = sample.cameras.centres[:2]
        assert 0.06 <= float((a - b).norm() / quantiles(sample)[1, :2].mean()) <= 0.18


def test_the_nearest_photo_is_14_to_18_decibels_from_the_one_between(seen):
    nearest = lambda sample: int((sample.cameras.centres[:2] - sample.cameras.centres[2]).norm(dim=1).argmin())
    assert 14 <= np.mean([float(psnr(s.photos[nearest(s)], s.photos[2])) for s in seen]) <= 18


def test_the_others_lie_between_the_outer_cameras(seen):
    for sample in seen:
        a, b, between = sample.cameras.centres
        t = float((between - a) @ (b - a) / (b - a).square().sum())
        assert 0.1 < t < 0.9 and (a + t * (b - a) - between).norm() < 1e-5


def test_a_seed_gives_the_same_bits_and_another_seed_another_room(seen):
    again = next(rooms.samples(3, 3, 64, 64))
    assert again.room == seen[3].room != seen[4].room
    for name, x in vars(again.views).items():
        assert torch.equal(x, getattr(seen[3].views, name))
    assert torch.equal(again.cameras.world_to_cam, seen[3].cameras.world_to_cam) and torch.equal(again.photos, seen[3].photos)


def test_a_photo_has_8_bits_and_the_noise_of_a_small_sensor(seen):
    photos, exact = torch.stack([s.photos for s in seen]), torch.stack([s.views.color for s in seen])
    assert torch.equal((photos * 255).round() / 255, photos) and photos.min() >= 0 and photos.max() <= 1
    inside = (exact > 0.1) & (exact < 0.9)
    assert (photos - exact)[inside].std().item() == pytest.approx(0.01, rel=0.05)


def test_an_ellipsoid_is_met_on_its_surface_with_the_normal_that_its_equation_has():
    body = Solid("ellipsoid", (1.5, 0.1, 1.3), (0.3, 0.7, 0.5), PLAIN, 0.6)
    view = camera((-1.0, 0, 1.5), (1.5, 0, 1.3))
    views = box_room(body).cast(view)
    hit = views.instance[0] == SOLIDS
    points = unprojected(view, views.depth[0])[hit] - torch.tensor(body.centre, dtype=torch.float64)
    local, half = body.turned(points.T, -1), torch.tensor(body.half, dtype=torch.float64)[:, None]
    torch.testing.assert_close((local / half).square().sum(0), torch.ones(int(hit.sum()), dtype=torch.float64), atol=1e-9, rtol=0)
    gradient = body.turned(local / half**2).T
    torch.testing.assert_close(views.normals[0][hit], gradient / gradient.norm(dim=1, keepdim=True), atol=1e-9, rtol=0)
    assert hit.sum() > 20


def test_clearance_is_the_distance_to_the_nearest_surface(seen):
    room = seen[0].room
    points = torch.from_numpy(np.random.default_rng(0).uniform((-3, -3, 0), (3, 3, 3), (400, 3)))
    free, half = room.clearance(points), torch.tensor(room.size, dtype=torch.float64) / 2
    walls = torch.minimum(points + half * torch.tensor([1, 1, 0]), half * torch.tensor([1, 1, 2]) - points).amin(1)
    bodies = torch.stack([outside(solid, points) if solid.kind != "ellipsoid" else torch.full((400,), torch.inf) for solid in room.solids]).amin(0)
    assert ((free > 0) <= ((walls > 0) & (bodies > 0))).all() and (free <= walls + 1e-12).all()
    way = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(1).normal(size=(400, 3))), dim=1)
    moved = points + 0.999 * free.clamp(min=0)[:, None] * way      # a ball of that radius holds no surface
    assert (room.clearance(moved)[free > 0] > 0).all()


@pytest.mark.parametrize("kind", ["mosaic", "spots", "marble", "planks", "noise", "checker", "stripes"])
def test_a_pattern_shows_both_of_its_colours(kind):
    room = dataclasses.replace(box_room(), floor=Texture(kind, (0.9, 0.9, 0.9), (0.2, 0.2, 0.2), 0.2))
    color = room.cast(camera((0.3, 0.2, 1.4), (0.3, 0.2, 0.0), up=(0.0, 1, 0), width=64, height=64)).color
    assert 0 <= color.min() and color.max() <= 1 and color.std() > 0.05


def test_four_walls_may_be_of_four_materials():
    walls = tuple(Texture("plain", (x, x, x)) for x in (0.2, 0.4, 0.6, 0.8))
    room = dataclasses.replace(box_room(), walls=walls)
    seen = [float(room.albedo(torch.zeros(3, 1), torch.tensor([wall])).mean().sqrt()) for wall in rooms.WALLS]
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_correspondences_lie_on_the_same_surface_and_hidden_points_behind_another(seen):
    behind = []
    for sample in seen[:3]:
        a, b = sample.cameras[0].to(dtype=torch.float64), sample.cameras[1].to(dtype=torch.float64)
        depth = sample.room.depths(a)
        place, visible = sample.room.correspondences(a, b, depth)
        assert 0.5 < visible.double().mean() < 1
        local = unprojected(a, depth) @ b.world_to_cam[0, :3, :3].T + b.world_to_cam[0, :3, 3]
        inside = (local[..., 2] > 0.1) & (place > 1).all(-1) & (place < 63).all(-1)
        there = (4 * place[inside]).long()                  # within an eighth of a pixel
        further = local[inside][:, 2] - sample.room.depths(b.resized(256, 256))[there[:, 1], there[:, 0]]
        assert (further[visible[inside]].abs() < 0.05).double().mean() > 0.97
        behind.append(further[~visible[inside]])
    behind = torch.cat(behind)
    assert len(behind) > 20 and (behind > 1e-3).double().mean() > 0.9


def test_a_room_without_a_place_for_cameras_is_an_error(monkeypatch):
    monkeypatch.setattr(endless, "TRIES", 50)
    filled = box_room(Solid("box", (0.0, 0.0, 1.5), (2.9, 2.4, 1.4), PLAIN))
    for cameras in (rooms.close_cameras, rooms.ring_cameras):
        with pytest.raises(ValueError, match="no place"):
            cameras(filled, 3, 32, 32)


def test_written_rooms_are_read_back_exactly_by_the_loader_users_use(tmp_path):
    rooms.write_rooms(tmp_path, 2, photos=4, width=48, height=32, seed=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["room-000007", "room-000008"]
    room = rooms.endless_room(8)
    cameras = rooms.ring_cameras(room, 4, 48, 32, 8)
    views, capture = room.cast(cameras), load_transforms(tmp_path / "room-000008")
    assert float(views.depth.min()) >= 0.5 and len(capture.photos) == 4
    for c, photo in enumerate(capture.photos):
        np.testing.assert_allclose(photo.world_to_cam, cameras.world_to_cam[c].double().numpy(), atol=1e-6)
        np.testing.assert_allclose(photo.K, cameras.K[c].double().numpy(), rtol=1e-6)
        assert np.abs(load_image(photo) - views.color[c].numpy()).max() <= 0.51 / 255
        assert np.abs(load_depth(photo) - views.depth[c].numpy()).max() <= 0.51 * DEPTH_STEP
        with Image.open(tmp_path / "room-000008" / "instances" / f"{c:03d}.png") as picture:
            assert (np.asarray(picture) == views.instance[c].numpy()).all()
        with Image.open(tmp_path / "room-000008" / "normals" / f"{c:03d}.png") as picture:
            assert np.abs(np.asarray(picture) / 127.5 - 1 - views.normals[c].numpy()).max() < 1 / 127
