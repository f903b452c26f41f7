"""Procedural rooms: what is said to be exact is exact, and a written capture is what the loader reads back."""
import math

import numpy as np
import pytest
import torch

from splatkit import rooms
from splatkit.camera import Cameras, look_at
from splatkit.io.photos import load_capture, load_image
from splatkit.rooms import CEILING, FLOOR, SOLIDS, WALLS, Room, Solid, Texture

PLAIN = Texture("plain", (0.8, 0.7, 0.6))
EXACT = dict(atol=1e-9, rtol=0)


def box_room(*solids) -> Room:
    return Room((6.0, 5.0, 3.0), PLAIN, PLAIN, PLAIN, (0.0, 0.0, 2.9), solids)


def camera(eye, target, width=31, height=21, up=(0.0, 0, 1)) -> Cameras:
    to = lambda v: torch.tensor(v, dtype=torch.float64)
    K = torch.tensor([[[25.0, 0, width / 2], [0, 25.0, height / 2], [0, 0, 1]]], dtype=torch.float64)
    return Cameras(look_at(to(eye), to(target), to(up))[None], K, width, height)


def surface_points(cameras: Cameras, c: int, depth):
    """World points [H, W, 3] at a camera z along the rays through the pixel centres."""
    y, x = torch.meshgrid(torch.arange(cameras.height) + 0.5, torch.arange(cameras.width) + 0.5, indexing="ij")
    K, w2c = cameras.K[c], cameras.world_to_cam[c]
    local = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], dim=-1) * depth[..., None]
    return (local - w2c[:3, 3]) @ w2c[:3, :3]


def outside(solid: Solid, points):
    """Above 0 outside, 0 on the surface, below 0 inside: written down a second time, without rays."""
    p = points - torch.tensor(solid.centre, dtype=points.dtype)
    c, s = math.cos(solid.yaw), math.sin(solid.yaw)
    x, y, z = c * p[..., 0] + s * p[..., 1], c * p[..., 1] - s * p[..., 0], p[..., 2]
    if solid.kind == "sphere":
        return p.norm(dim=-1) - solid.half[0]
    if solid.kind == "box":
        return torch.stack([x.abs() - solid.half[0], y.abs() - solid.half[1], z.abs() - solid.half[2]]).amax(0)
    return torch.maximum((x * x + y * y).sqrt() - solid.half[0], z.abs() - solid.half[2])


@pytest.fixture(scope="module")
def furnished():
    """(room, cameras, views) in double."""
    room, cameras = rooms.make_room(3), rooms.orbit(4, 64, 48, seed=3)
    return room, cameras, room.cast(cameras)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capture")
    return folder, rooms.write_capture(folder, photos=8, width=100, height=75, seed=1, points=800)


@pytest.mark.parametrize("target, depth, normal, instance", [
    ((3.0, 0, 1.5), 3.0, (-1.0, 0, 0), WALLS[1]), ((-3.0, 0, 1.5), 3.0, (1.0, 0, 0), WALLS[0]),
    ((0.0, 2.5, 1.5), 2.5, (0.0, -1, 0), WALLS[3]), ((0.0, -2.5, 1.5), 2.5, (0.0, 1, 0), WALLS[2])])
def test_a_wall_seen_straight_on_has_one_depth(target, depth, normal, instance):
    views = box_room().cast(camera((0.0, 0, 1.5), target))
    torch.testing.assert_close(views.depth, torch.full((1, 21, 31), depth, dtype=torch.float64), **EXACT)
    assert (views.normals == torch.tensor(normal, dtype=torch.float64)).all() and (views.instance == instance).all()


def test_floor_and_ceiling_have_one_depth_from_above_and_below():
    down = box_room().cast(camera((0.3, 0.2, 1.4), (0.3, 0.2, 0.0), up=(0.0, 1, 0)))
    up = box_room().cast(camera((0.3, 0.2, 1.4), (0.3, 0.2, 3.0), up=(0.0, 1, 0)))
    torch.testing.assert_close(down.depth, torch.full_like(down.depth, 1.4), **EXACT)
    torch.testing.assert_close(up.depth, torch.full_like(up.depth, 1.6), **EXACT)
    assert (down.instance == FLOOR).all() and (up.instance == CEILING).all()


@pytest.mark.parametrize("kind", ["sphere", "box", "cylinder"])
def test_the_middle_ray_meets_a_solid_at_its_near_side(kind):
    solid = Solid(kind, (2.0, 0.0, 1.5), (0.4, 0.4, 0.4), PLAIN)
    views = box_room(solid).cast(camera((-1.0, 0, 1.5), (2.0, 0, 1.5)))         # exactly along x: parallel to four sides of the box
    assert views.depth[0, 10, 15].item() == pytest.approx(2.6, abs=1e-9) and views.instance[0, 10, 15].item() == SOLIDS
    assert views.normals[0, 10, 15].tolist() == pytest.approx([-1, 0, 0], abs=1e-9)


def test_depth_ends_on_the_surface_of_the_instance_and_inside_of_nothing(furnished):
    room, cameras, views = furnished
    seen = views.instance.unique().tolist()
    assert {room.solids[i - SOLIDS].kind for i in seen if i >= SOLIDS} == {"sphere", "box", "cylinder"} and FLOOR in seen
    for c in range(len(cameras)):
        points = surface_points(cameras, c, views.depth[c])
        distances = torch.stack([outside(solid, points) for solid in room.solids])
        half = torch.tensor(room.size, dtype=torch.float64) / 2
        shell = (half - (points - torch.tensor([0, 0, room.size[2] / 2], dtype=torch.float64)).abs()).amin(-1)
        assert distances.min() > -1e-9 and shell.min() > -1e-9
        hit = views.instance[c]
        on = torch.where(hit >= SOLIDS, distances.gather(0, (hit - SOLIDS).clamp(min=0)[None])[0], shell)
        torch.testing.assert_close(on, torch.zeros_like(on), **EXACT)


def test_normals_are_unit_gradients_of_the_surface_and_face_the_camera(furnished):
    room, cameras, views = furnished
    for c in range(len(cameras)):
        points = surface_points(cameras, c, views.depth[c])
        normals, away = views.normals[c], points - cameras.centres[c]
        torch.testing.assert_close(normals.norm(dim=-1), torch.ones_like(views.depth[c]), **EXACT)
        assert ((normals * away).sum(-1) < 0).all()
        for i in [i for i in views.instance[c].unique().tolist() if i >= SOLIDS]:
            rows = views.instance[c] == i
            step = outside(room.solids[i - SOLIDS], points[rows] + 1e-6 * normals[rows])
            torch.testing.assert_close(step, torch.full_like(step, 1e-6), atol=1e-9, rtol=0)


def test_pictures_stand_upright(furnished):
    _, _, views = furnished
    bottom, top = views.instance[:, -1], views.instance[:, 0]
    assert ((bottom == FLOOR) | (bottom >= SOLIDS)).all() and (top >= WALLS[0]).all() and (top < SOLIDS).any()


def test_colour_is_a_picture_and_not_flat(furnished):
    _, _, views = furnished
    assert views.color.min() >= 0 and views.color.max() <= 1 and views.color.std() > 0.1
    assert 0.3 < views.color.mean() < 0.75


def test_a_solid_under_the_lamp_throws_a_shadow_on_the_floor():
    view = camera((2.0, 0, 1.5), (0.0, 0, 0.2))
    ball = Solid("sphere", (0.0, 0.0, 1.0), (0.3, 0.3, 0.3), PLAIN)
    bare, shaded = box_room().cast(view), box_room(ball).cast(view)
    place = view.K[0] @ (view.world_to_cam[0, :3, :3] @ torch.tensor([0.0, 0, 0], dtype=torch.float64) + view.world_to_cam[0, :3, 3])
    x, y = int(place[0] / place[2]), int(place[1] / place[2])
    assert shaded.instance[0, y, x] == FLOOR and shaded.color[0, y, x].mean() < 0.8 * bare.color[0, y, x].mean()


def test_a_room_is_the_same_for_the_same_seed_only():
    assert rooms.make_room(5) == rooms.make_room(5) != rooms.make_room(6)
    cameras = rooms.orbit(2, 40, 30, seed=5)
    assert torch.equal(rooms.make_room(5).cast(cameras).color, rooms.make_room(5).cast(cameras).color)
    assert torch.equal(cameras.world_to_cam, rooms.orbit(2, 40, 30, seed=5).world_to_cam)


def test_casting_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    box_room().cast(camera((0.0, 0, 1.5), (3.0, 0, 1.5), 5, 4))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("seed", range(12))
def test_cameras_stand_in_the_room_and_clear_of_its_solids(seed):
    room, eyes = rooms.make_room(seed), rooms.orbit(24, 20, 15, seed=seed).centres
    half = torch.tensor(room.size, dtype=torch.float64) / 2
    assert (eyes[:, :2].abs() < half[:2] - 0.2).all() and (eyes[:, 2] > 0.9).all() and (eyes[:, 2] < room.size[2] - 0.5).all()
    assert min(float(outside(solid, eyes).min()) for solid in room.solids) > 0.1


def test_a_capture_is_read_back_by_the_loader_users_use(written):
    folder, capture = written
    again = load_capture(folder)
    assert [p.name for p in again.photos] == [f"{i:03d}.png" for i in range(8)] == [p.name for p in capture.photos]
    cameras = rooms.orbit(8, 100, 75, seed=1)
    for photo, w2c, K in zip(again.photos, cameras.world_to_cam.numpy(), cameras.K.numpy()):
        np.testing.assert_allclose(photo.world_to_cam, w2c, atol=1e-9)
        np.testing.assert_allclose(photo.K, K, atol=1e-12)
    assert len(again.points) > 600 and all(len(views) >= 2 for views in again.point_views)


def test_points_of_a_capture_have_the_colour_that_photos_show_there(written):
    _, capture = written
    errors = []
    for i, photo in enumerate(capture.photos):
        pixels, seen = load_image(photo), np.array([i in views for views in capture.point_views])
        local = capture.points[seen] @ photo.world_to_cam[:3, :3].T + photo.world_to_cam[:3, 3]
        place = local @ photo.K.T
        x, y = (place[:, :2] / place[:, 2:]).T.astype(int)
        errors.append(np.abs(pixels[y, x] - capture.points_rgb[seen] / 255).max(1))
    errors = np.concatenate(errors)
    assert np.median(errors) < 2 / 255 and np.percentile(errors, 85) < 0.15      # the rest lies on edges of the pattern


def test_a_track_holds_the_photos_that_see_the_point_and_no_other(written):
    _, capture = written
    room, points = rooms.make_room(1), torch.from_numpy(capture.points).double()
    for i in (0, 5):
        view = capture.photos[i].camera(torch.float64)
        listed = torch.tensor([i in views for views in capture.point_views])
        local = points @ view.world_to_cam[0, :3, :3].T + view.world_to_cam[0, :3, 3]
        place = local @ view.K[0].T / local[:, 2:]
        inside = (local[:, 2] > 0.05) & (place > 0.5).all(1) & (place[:, 0] < 99.5) & (place[:, 1] < 74.5)
        way = view.centres + torch.linspace(0, 0.998, 200, dtype=torch.float64)[:, None, None] * (points - view.centres)
        deepest = torch.stack([outside(solid, way).amin(0) for solid in room.solids]).amin(0)      # below 0: the way to the point is barred
        assert (inside | ~listed).all() and (deepest[listed] > -1e-4).all()
        hidden = inside & ~listed
        assert hidden.sum() > 10 and (deepest[hidden] < 0).double().mean() > 0.97       # a corner between two steps may be cut unseen


def test_writing_a_capture_twice_gives_the_same_bytes(written, tmp_path):
    folder, _ = written
    rooms.write_capture(tmp_path, photos=8, width=100, height=75, seed=1, points=800)
    files = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    assert len(files) == 11 and all((folder / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
