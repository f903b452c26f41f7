"""Camera paths: through their keys exactly, at constant speed, upright; what photos say about up; path files."""
import json
import math

import pytest
import torch
from backends import gaussians
from tolerances import F64

from splatkit import paths
from splatkit.camera import Cameras, look_at
from splatkit.errors import BadFile
from splatkit.paths import CameraPath
from splatkit.scene import quat_from_matrix

EXACT = dict(atol=1e-9, rtol=0)
UP = torch.tensor([0.2, -0.5, 0.8], dtype=F64) / math.sqrt(0.93)


def vector(*values):
    return torch.tensor(values, dtype=F64)


def posed(eyes, targets, up=vector(0, 0, 1), K=None) -> Cameras:
    K = paths.pinhole(60, 40, 30) if K is None else K
    return Cameras(torch.stack([look_at(e, t, up) for e, t in zip(eyes, targets)]), K.expand(len(eyes), 3, 3).clone(), 40, 30)


def ring(n, radius=2.0) -> Cameras:
    return paths.orbit(vector(1, 2, 3), UP, radius, 25, n, paths.pinhole(60, 40, 30), 40, 30)


def keys(n=5, seed=0) -> Cameras:
    g = torch.Generator().manual_seed(seed)
    eyes = torch.randn(n, 3, generator=g, dtype=F64) * 2
    cameras = posed(eyes, torch.randn(n, 3, generator=g, dtype=F64) + vector(0, 0, 5))
    K = cameras.K.clone()
    K[:, 0, 0] += torch.arange(n)
    return cameras.replace(K=K)


def turned(cameras: Cameras):
    """Angles between the rotations of neighbouring frames, radians."""
    r = cameras.world_to_cam[:, :3, :3]
    w = torch.stack([quat_from_matrix(a @ b.T)[0] for a, b in zip(r, r[1:])])
    return 2 * torch.acos(w.clamp(-1, 1))


def rolled(cameras: Cameras, degrees, seed=0) -> Cameras:
    """The cameras, each turned about its optical axis by up to so many degrees either way."""
    angles = torch.deg2rad((torch.rand(len(cameras), generator=torch.Generator().manual_seed(seed), dtype=F64) * 2 - 1) * degrees)
    turn = torch.eye(4, dtype=F64).repeat(len(cameras), 1, 1)
    turn[:, 0, 0], turn[:, 0, 1], turn[:, 1, 0], turn[:, 1, 1] = angles.cos(), -angles.sin(), angles.sin(), angles.cos()
    return cameras.replace(world_to_cam=turn @ cameras.world_to_cam)


# ---- orbit


def test_an_orbit_looks_at_the_centre_with_up_upright():
    cameras = ring(12)
    R, t = cameras.world_to_cam[:, :3, :3], cameras.world_to_cam[:, :3, 3]
    torch.testing.assert_close(R @ vector(1, 2, 3) + t, vector(0, 0, 2).expand(12, 3), **EXACT)
    up = R @ UP
    assert up[:, 0].abs().max() < 1e-12 and (up[:, 1] < -0.8).all()      # no roll, and image y points down
    torch.testing.assert_close((cameras.centres - vector(1, 2, 3)) @ UP, torch.full((12,), 2 * math.sin(math.radians(25)), dtype=F64), **EXACT)


def test_an_orbit_goes_round_once_at_constant_speed_anticlockwise_from_above():
    eyes = ring(10).centres - vector(1, 2, 3)
    steps = torch.cat([eyes, eyes[:1]]).diff(dim=0).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(10), **EXACT)
    assert (torch.linalg.cross(eyes, eyes.roll(-1, 0)) @ UP > 0).all()


def test_an_orbit_starts_on_the_side_that_is_asked_for():
    first = paths.orbit(vector(0, 0, 0), vector(0, 0, 2), 3, 0, 4, torch.eye(3, dtype=F64), 4, 4, start=vector(0, -5, 9)).centres[0]
    torch.testing.assert_close(first, vector(0, -3, 0), **EXACT)


@pytest.mark.parametrize("changes", [{"radius": 0.0}, {"radius": math.inf}, {"elevation_deg": 90.0}, {"frames": 0}, {"up": vector(0, 0, 0)}])
def test_an_orbit_that_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        paths.orbit(**{**dict(centre=vector(0, 0, 0), up=UP, radius=1.0, elevation_deg=0.0, frames=3, K=torch.eye(3, dtype=F64), width=4, height=4), **changes})


def test_a_far_floater_does_not_move_the_orbit_of_a_scene():
    ball = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=F64) + vector(5, 0, 0)
    alone = paths.orbit_scene(gaussians(ball), vector(0, 0, 1), 6, 64, 48)
    beside = paths.orbit_scene(gaussians(torch.cat([ball, vector(1e6, 0, 0)[None]])), vector(0, 0, 1), 6, 64, 48)
    assert (alone.centres - beside.centres).abs().max() < 0.1
    assert (alone.centres.mean(0)[:2] - vector(5, 0)).norm() < 0.3


def test_the_orbit_of_photos_is_their_ring():
    photos = ring(16)
    film = paths.orbit_photos(photos, 32)
    torch.testing.assert_close(film.centres[::2], photos.centres, **EXACT)
    torch.testing.assert_close(film.K, photos.K[:1].expand(32, 3, 3), **EXACT)


# ---- interpolate


def test_a_closed_path_through_a_ring_has_the_keys_as_frames_and_stays_on_it():
    photos = ring(12)
    film = paths.interpolate(photos, 48, closed=True)
    torch.testing.assert_close(film.world_to_cam[::4], photos.world_to_cam, **EXACT)
    radius = (film.centres - vector(1, 2, 3)).norm(dim=1)
    assert (radius - 2).abs().max() < 4e-3      # 12 cubic pieces of a circle; 2.8e-3 measured


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_path_passes_through_every_key(seed, closed):
    cameras = keys(seed=seed)
    film = paths.interpolate(cameras, 20_001, closed)
    for key in range(len(cameras)):
        near = (film.centres - cameras.centres[key]).norm(dim=1).argmin()
        assert (film.world_to_cam[near] - cameras.world_to_cam[key]).abs().max() < 5e-3     # half a frame away
        assert (film.K[near] - cameras.K[key]).abs().max() < 5e-3
    torch.testing.assert_close(film.world_to_cam[0], cameras.world_to_cam[0], **EXACT)
    if not closed:
        torch.testing.assert_close(film.world_to_cam[-1], cameras.world_to_cam[-1], **EXACT)
        torch.testing.assert_close(film.K[-1], cameras.K[-1], **EXACT)


def test_keys_at_equal_distances_on_a_line_are_frames():
    eyes = [vector(2 * i, 0, 1) for i in range(5)]
    cameras = posed(eyes, [e + vector(0, 3, 0) for e in eyes])
    film = paths.interpolate(cameras, 13)
    torch.testing.assert_close(film.world_to_cam[::3], cameras.world_to_cam, **EXACT)


def test_speed_is_constant_however_the_keys_are_spaced():
    eyes = [vector(x, 0, 1) for x in (0, 0.1, 0.2, 3, 3.5, 9)]
    film = paths.interpolate(posed(eyes, [e + vector(0, 3, 0) for e in eyes]), 50)
    steps = film.centres.diff(dim=0).norm(dim=1)
    torch.testing.assert_close(steps, torch.full((49,), 9 / 49, dtype=F64), rtol=0.01, atol=0)
    assert film.centres[:, 1:].std(0).max() < 1e-9


def test_a_camera_that_turns_in_place_turns_at_constant_speed():
    eye = vector(1, 1, 1)
    targets = [eye + vector(math.cos(a), math.sin(a), 0) for a in (0, 0.2, 1.2, 1.4, 2.4)]
    film = paths.interpolate(posed([eye] * 5, targets), 25)
    torch.testing.assert_close(turned(film), torch.full((24,), 0.1, dtype=F64), rtol=0.01, atol=0)
    torch.testing.assert_close(film.centres, eye.expand(25, 3), **EXACT)


def test_position_and_rotation_have_no_kink():
    film = paths.interpolate(keys(6, seed=3), 4001)
    velocity = film.world_to_cam.diff(dim=0) * 4000
    assert velocity.diff(dim=0).abs().max() < 0.02 * velocity.abs().max()      # a kink would be of order 1; 9e-3 measured


def test_every_pose_of_a_path_is_rigid():
    R = paths.interpolate(keys(6, seed=5), 100).world_to_cam[:, :3, :3]
    torch.testing.assert_close(R @ R.transpose(1, 2), torch.eye(3, dtype=F64).expand(100, 3, 3), **EXACT)
    assert (torch.linalg.det(R) > 0).all()


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_keys_and_equal_ones_are_a_path(n, closed):
    same = Cameras.cat([keys(1)] * n)
    film = paths.interpolate(same, 7, closed)
    torch.testing.assert_close(film.world_to_cam, same.world_to_cam[:1].expand(7, 4, 4), **EXACT)
    assert torch.isfinite(paths.interpolate(Cameras.cat([keys(3), same, same]), 50, closed).world_to_cam).all()
    assert len(paths.interpolate(keys(2), 1, closed)) == 1


def test_a_path_of_float32_cameras_is_float32():
    assert paths.interpolate(keys().to(dtype=torch.float32), 5).dtype == torch.float32


def test_many_photos_are_thinned_but_first_and_last_stay():
    photos = ring(100)
    film = paths.through_photos(photos, 40)
    torch.testing.assert_close(film.world_to_cam[[0, -1]], photos.world_to_cam[[0, -1]], **EXACT)


# ---- size


@pytest.mark.parametrize("width, height", [(80, 60), (80, None), (None, 60)])
def test_a_view_at_double_size_sees_the_same(width, height):
    film = paths.framed(keys(), width, height)
    assert (film.width, film.height) == (80, 60)
    torch.testing.assert_close(film.K[:, :2], 2 * keys().K[:, :2], **EXACT)


def test_another_shape_cuts_the_sides_evenly_and_keeps_pixels_square():
    K = paths.framed(ring(1), 30, 30).K[0]
    torch.testing.assert_close(K, ring(1).K[0] - vector(0, 0, 5, 0, 0, 0, 0, 0, 0).reshape(3, 3), **EXACT)


# ---- up and focus


@pytest.mark.parametrize("seed", range(5))
def test_up_is_found_from_a_ring_of_cameras_that_tilt_at_random(seed):
    g = torch.Generator().manual_seed(seed)
    eyes = ring(20).centres
    targets = vector(1, 2, 3) + 2.5 * (torch.rand(20, 1, generator=g, dtype=F64) - 0.7) * UP      # some look far down, few up
    cameras = posed(eyes, targets.expand(20, 3), UP)
    torch.testing.assert_close(paths.estimate_up(cameras), UP, **EXACT)
    assert paths.estimate_up(rolled(cameras, 4, seed)) @ UP > math.cos(math.radians(2.5))


def test_up_of_cameras_that_look_straight_down_is_where_they_are():
    poses = [look_at(vector(i, 0, 5), vector(i, 0, 0), vector(math.cos(i), math.sin(i), 0)) for i in range(9)]
    cameras = Cameras(torch.stack(poses), torch.eye(3, dtype=F64).expand(9, 3, 3), 4, 4)
    torch.testing.assert_close(paths.estimate_up(cameras), vector(0, 0, 1), **EXACT)


def test_up_is_the_mean_up_where_all_cameras_stand_alike():
    cameras = posed([vector(i, 0, 0) for i in range(3)], [vector(i, 1, -0.5) for i in range(3)])
    torch.testing.assert_close(paths.estimate_up(cameras), -cameras.world_to_cam[0, 1, :3], **EXACT)
    torch.testing.assert_close(paths.estimate_up(cameras[0]), -cameras.world_to_cam[0, 1, :3], **EXACT)


def test_focus_is_where_the_optical_axes_meet():
    torch.testing.assert_close(paths.focus(ring(7)), vector(1, 2, 3), **EXACT)


def test_focus_lies_ahead_where_the_axes_do_not_meet_in_front():
    parallel = posed([vector(-2, 0, 0), vector(2, 0, 0)], [vector(-2, 1, 0), vector(2, 1, 0)])
    torch.testing.assert_close(paths.focus(parallel), vector(0, 2, 0), **EXACT)
    torch.testing.assert_close(paths.focus(parallel[0]), vector(-2, 1, 0), **EXACT)
    apart = posed([vector(-2, 0, 0), vector(2, 0, 0)], [vector(-3, 1, 0), vector(3, 1, 0)])
    torch.testing.assert_close(paths.focus(apart), vector(0, 2, 0), **EXACT)


# ---- path files


def test_a_path_file_is_read_back_to_the_bit(tmp_path):
    path = CameraPath(keys(), 24.0)
    paths.write_path(tmp_path / "path.json", path)
    again = paths.read_path(tmp_path / "path.json")
    assert torch.equal(again.cameras.world_to_cam, path.cameras.world_to_cam) and torch.equal(again.cameras.K, path.cameras.K)
    assert (again.cameras.width, again.cameras.height, again.fps) == (40, 30, 24.0)


def change(text_or_function):
    def harm(data):
        exec(text_or_function, {"d": data, "f": data["frames"][1]})
        return json.dumps(data)
    return harm


@pytest.mark.parametrize("harm, where", [
    (lambda d: "", ""), (lambda d: "[1]", ""), (lambda d: "[" * 100_000, ""), (lambda d: json.dumps(d)[:-5], ""),
    (change("del d['width']"), "width"), (change("d['width'] = 0"), "width"), (change("d['height'] = 30.0"), "height"), (change("d['height'] = True"), "height"),
    (change("d['fps'] = 'x'"), "fps"), (change("d['fps'] = 0"), "fps"), (change("d['fps'] = float('nan')"), "fps"),
    (change("d['frames'] = []"), "frames"), (change("d['frames'] = {}"), "frames"), (change("d['frames'][1] = 3"), r"frames\[1\]"),
    (change("del f['K']"), r"frames\[1\].K"), (change("f['K'][0][0] = -1"), r"frames\[1\].K"), (change("f['K'][0][1] = 1"), r"frames\[1\].K"),
    (change("f['K'] = [[1, 0], [0, 1]]"), r"frames\[1\].K"), (change("f['world_to_cam'][0][0] = 'x'"), r"frames\[1\].world_to_cam"),
    (change("f['world_to_cam'][0][0] += 0.1"), r"frames\[1\].world_to_cam"), (change("f['world_to_cam'][3][3] = 2"), r"frames\[1\].world_to_cam"),
    (change("f['world_to_cam'][0][3] = float('inf')"), r"frames\[1\].world_to_cam"), (change("f['world_to_cam'][0][3] = 10**400"), r"frames\[1\].world_to_cam"),
    (change("f['world_to_cam'][0] = [-x for x in f['world_to_cam'][0]]"), r"frames\[1\].world_to_cam")])
def test_a_bad_path_file_is_named_with_the_entry_that_is_wrong(harm, where, tmp_path):
    file = tmp_path / "path.json"
    paths.write_path(file, CameraPath(keys(), 24.0))
    file.write_text(harm(json.loads(file.read_text())))
    with pytest.raises(BadFile, match=f"path.json: {where}"):
        paths.read_path(file)


def test_a_path_file_that_is_missing_or_not_text_is_a_bad_file(tmp_path):
    (tmp_path / "path.json").write_bytes(b"\xff\xfe\x00")
    for name in ("path.json", "none.json"):
        with pytest.raises(BadFile, match=name):
            paths.read_path(tmp_path / name)


def test_choosing_a_path_that_is_not_known_says_what_is():
    with pytest.raises(ValueError, match="expected orbit, capture or a file"):
        paths.choose("around", gaussians([0, 0, 2]), None, None)
    with pytest.raises(ValueError, match="run folder"):
        paths.choose("capture", gaussians([0, 0, 2]), None, None)
