"""Depth of photos: reading it, what sparse points say of it, scenes that start from it and learn from it; and scenes that start from nothing."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from splatkit import cli, io
from splatkit.capture import Capture, Photo
from splatkit.config import Depth
from splatkit.errors import BadFile
from splatkit.initial import first_scene
from splatkit.io.depth import load_depth, nearest_known
from splatkit.io.photos import load_capture
from splatkit.io.transforms import load_transforms
from splatkit.metrics import inverse_depth_l1
from splatkit.raster import render
from splatkit.reconstruct import reconstruct
from splatkit.rooms import make_room, orbit, write_capture
from test_reconstruct import settings

WIDTH, HEIGHT, PHOTOS = 72, 54, 10


@pytest.fixture(scope="module")
def exact():
    return make_room(0).cast(orbit(PHOTOS, WIDTH, HEIGHT).to(dtype=torch.float32)).depth


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    write_capture(folder, photos=PHOTOS, width=WIDTH, height=HEIGHT, points=600)
    return folder


@pytest.fixture(scope="module")
def rgbd(tmp_path_factory, room, exact):
    """The same photos as a transforms.json with depth in tenths of a millimetre, a tenth of it unknown, and no sparse points."""
    folder = tmp_path_factory.mktemp("rgbd")
    capture, g, frames = load_capture(room), torch.Generator().manual_seed(0), []
    for p, depth in zip(capture.photos, exact):
        Image.open(p.path).save(folder / p.name)
        known = torch.rand(depth.shape, generator=g) > 0.1
        Image.fromarray((depth * 1e4 * known).round().numpy().astype(np.uint16)).save(folder / f"depth_{p.name}")
        frames.append({"file_path": p.name, "depth_file_path": f"depth_{p.name}", "transform_matrix": (np.linalg.inv(p.world_to_cam) @ np.diag([1, -1, -1, 1])).tolist()})
    K = capture.photos[0].K
    (folder / "transforms.json").write_text(json.dumps({"w": WIDTH, "h": HEIGHT, "fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2],
                                                        "depth_unit_scale_factor": 1e-4, "applied_transform": np.eye(4)[:3].tolist(), "frames": frames}))
    return folder


# ---- reading


def test_a_depth_picture_is_read_in_world_units_and_what_is_unknown_is_0(rgbd, exact):
    photo = load_transforms(rgbd).photos[3]
    depth = load_depth(photo)
    known = depth > 0
    assert 0.85 < known.mean() < 0.95 and np.abs(depth - exact[3].numpy())[known].max() < 0.6e-4


def test_a_scaled_world_scales_its_depth(rgbd, tmp_path):
    top = json.loads((rgbd / "transforms.json").read_text())
    for name in [f["file_path"] for f in top["frames"]] + [f["depth_file_path"] for f in top["frames"]]:
        (tmp_path / name).write_bytes((rgbd / name).read_bytes())
    (tmp_path / "transforms.json").write_text(json.dumps({**top, "applied_scale": 4.0}))
    a, b = load_transforms(rgbd).photos[0], load_transforms(tmp_path).photos[0]
    assert np.allclose(load_depth(b), load_depth(a) / 4) and np.allclose(b.world_to_cam[:3, 3], a.world_to_cam[:3, 3] / 4)


def test_a_smaller_depth_picture_has_the_nearest_known_surface_of_each_area():
    depth = torch.tensor([[1.0, 2, 0, 0], [3, 0, 0, 0], [5, 6, 7, 0], [5, 6, 0, 9]])
    assert nearest_known(depth, 2, 2).tolist() == [[1, 0], [5, 7]]
    assert nearest_known(depth, 4, 4) is depth


def test_the_whole_valid_mask_of_a_file_counts_for_each_frame(rgbd, tmp_path):
    top = json.loads((rgbd / "transforms.json").read_text())
    for frame in top["frames"][:2]:
        del frame["depth_file_path"]
        (tmp_path / frame["file_path"]).write_bytes((rgbd / frame["file_path"]).read_bytes())
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "valid.png")
    (tmp_path / "transforms.json").write_text(json.dumps({**top, "frames": top["frames"][:2], "valid_mask": "valid.png"}))
    assert [p.mask for p in load_transforms(tmp_path).photos] == [tmp_path / "valid.png"] * 2


@pytest.mark.parametrize("harm, said", [
    (lambda f: (f / "depth_001.png").unlink(), "depth_001.png: no such depth picture"),
    (lambda f: Image.new("L", (WIDTH, HEIGHT)).save(f / "depth_001.png"), "depth_001.png.*of kind 'L'; expected 16 bits of grey"),
    (lambda f: Image.fromarray(np.zeros((20, 72), np.uint16)).save(f / "depth_001.png"), "depth_001.png.*72x20"),
    (lambda f: (f / "depth_001.png").write_bytes((f / "depth_001.png").read_bytes()[:300]), "depth_001.png"),
], ids=["gone", "8 bits", "another shape", "cut"])
def test_a_depth_picture_that_cannot_be_used_is_named(rgbd, tmp_path, harm, said, cpu_library):
    for path in rgbd.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    harm(tmp_path)
    with pytest.raises(BadFile, match=said):
        reconstruct(settings(tmp_path, tmp_path / "run", steps=20, depth=Depth("sensor")))


# ---- sparse points


def test_sparse_points_give_the_depth_of_the_surfaces_that_a_photo_sees(room, exact):
    capture = load_capture(room)
    depth = capture.sparse_depth(2, capture.photos[2].camera())
    known = depth > 0
    off = ((depth - exact[2]).abs() / exact[2])[known]
    assert known.sum() > 100 and off.median() < 0.01        # up to half a pixel beside the ray through the pixel's centre
    assert known.sum() <= sum(2 in views for views in capture.point_views)


def test_of_two_points_in_a_pixel_the_nearer_counts_and_only_those_that_the_photo_observes():
    photo = Photo("a", Path("a"), np.array([[10.0, 0, 5], [0, 10, 5], [0, 0, 1]]), 10, 10, np.eye(4))
    points = np.array([[0.01, 0.01, 2], [0.01, 0.01, 3], [0.01, 0.01, 1], [0, 0, -4], [100, 0, 1]])
    seen, unseen = np.array([0]), np.array([], np.int64)
    capture = Capture((photo,), points, np.zeros((5, 3), np.uint8), (seen, seen, unseen, seen, seen))
    depth = capture.sparse_depth(0, photo.camera())
    assert depth[5, 5] == 2 and (depth > 0).sum() == 1


def test_depth_supervision_asks_for_depth(room, rgbd, tmp_path, capsys, cpu_library):
    for data, source, said in ((room, "sensor", "no photo has one"), (rgbd, "points", "a COLMAP model has")):
        assert cli.main(["reconstruct", str(data), "-o", str(tmp_path / "run"), "--preset", "demo", "--depth.source", source]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


# ---- learning


def test_the_loss_is_the_mean_difference_of_inverse_depths_where_both_are_known():
    depth, target = torch.tensor([[1.0, 2.0, 4.0, 0.0]]), torch.tensor([[2.0, 2.0, 0.0, 5.0]])
    assert inverse_depth_l1(depth, target) == pytest.approx((0.5 + 0) / 2)
    assert inverse_depth_l1(depth, target, torch.tensor([[0.0, 1.0, 1.0, 1.0]])) == 0
    depth.requires_grad_()
    inverse_depth_l1(depth, target).backward()
    assert depth.grad.isfinite().all() and depth.grad.tolist() == [[-0.5, 0, 0, 0]]


def depth_error(run, exact, held=(0, 5)) -> float:
    """Median relative error of the expected depth in held-out views."""
    scene, _ = io.load(run / "scene.ply")
    out = render(scene, orbit(PHOTOS, WIDTH, HEIGHT).to(dtype=torch.float32), outputs=("expected_depth",)).expected_depth
    return float(torch.stack([((out[i] - exact[i]).abs() / exact[i]).median() for i in held]).median())


@pytest.mark.parametrize("source", ["points", "sensor"])
def test_depth_supervision_brings_the_surfaces_of_unseen_views_nearer_to_the_truth(room, rgbd, exact, tmp_path, cpu_library, unchecked, source):
    data = {"points": room, "sensor": rgbd}[source]
    few = {"steps": 400, "hold_every": 5}
    without = reconstruct(settings(data, tmp_path / "without", **few))
    helped = reconstruct(settings(data, tmp_path / "with", depth=Depth(source, 0.5), **few))
    assert depth_error(tmp_path / "with", exact) < {"points": 0.9, "sensor": 0.8}[source] * depth_error(tmp_path / "without", exact)
    assert helped.psnr > without.psnr - 0.5


def test_half_size_steps_take_half_size_depth(rgbd, tmp_path, cpu_library):
    assert reconstruct(settings(rgbd, tmp_path, steps=20, coarse_fraction=1.0, depth=Depth("sensor"))).psnr > 10


# ---- the first scene


def test_without_sparse_points_a_run_starts_from_the_depth_of_the_photos_that_train(rgbd, exact, tmp_path):
    capture, said = load_transforms(rgbd), []
    train, _ = capture.split(5)
    scene = first_scene(capture, train, settings(rgbd, tmp_path, max_gaussians=2000), said.append)
    assert len(scene) == 2000 and "2,000 points of 8 depth pictures" in said[0]
    camera = capture.photos[1].camera()
    place = (camera.world_to_cam[0, :3, :3] @ scene.means.T + camera.world_to_cam[0, :3, 3:])
    x, y = (camera.K[0] @ place)[:2] / place[2]
    inside = (place[2] > 0) & (x > 0) & (x < WIDTH) & (y > 0) & (y < HEIGHT)
    ahead = place[2][inside] - exact[1][y[inside].long(), x[inside].long()]
    assert inside.sum() > 500 and (ahead.abs() < 0.05).float().mean() > 0.5 and (ahead > -0.1).float().mean() > 0.9      # on the surface that photo 1 sees, or behind it


def test_without_points_and_depth_a_run_starts_from_random_points_and_learns(room, tmp_path, cpu_library, unchecked):
    capture, said = dataclasses.replace(load_capture(room), points=np.zeros((0, 3)), points_rgb=np.zeros((0, 3), np.uint8), point_views=()), []
    scene = first_scene(capture, [1, 2, 3, 4], settings(room, tmp_path, max_gaussians=500), said.append)
    assert len(scene) == 500 and "random points" in said[0]
    assert all(torch.equal(a, b) for a, b in zip(scene.fields().values(), first_scene(capture, [1, 2, 3, 4], settings(room, tmp_path, max_gaussians=500), said.append).fields().values()))
    seen = [((c.world_to_cam[0, :3, :3] @ scene.means.T + c.world_to_cam[0, :3, 3:])[2] > 0).float().mean() for c in (capture.photos[i].camera() for i in range(PHOTOS))]
    assert min(seen) > 0.4
    (room / "sparse" / "0" / "points3D.bin").rename(tmp_path / "points3D.bin")
    (room / "sparse" / "0" / "points3D.bin").write_bytes(b"\0" * 8)
    try:
        learned, first = (reconstruct(settings(room, tmp_path / f"run{steps}", steps=steps)).psnr for steps in (400, 1))
        assert learned > first + 1.5
    finally:
        (tmp_path / "points3D.bin").rename(room / "sparse" / "0" / "points3D.bin")


def test_cameras_of_any_size_make_the_random_ball(tmp_path):
    photo = lambda name, z: Photo(name, Path(name), np.array([[10.0, 0, 5], [0, 10, 5], [0, 0, 1]]), 10, 10, np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, z], [0, 0, 0, 1]]))
    scene = first_scene(Capture((photo("a", 4.0), photo("b", 4.0))), [0, 1], settings(tmp_path, tmp_path, max_gaussians=50), lambda line: None)
    assert len(scene) == 50 and all(x.isfinite().all() for x in scene.fields().values())
