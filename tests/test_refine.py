"""Cameras that are fitted beside the scene: poses and focal lengths that came wrong end near the true ones, and what is held is held."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from alignment import centre, errors

from splatkit import config
from splatkit.camera import Cameras, camera_centres
from splatkit.config import Refine
from splatkit.errors import BadFile
from splatkit.evaluation import evaluate
from splatkit.io import checkpoint
from splatkit.io.photos import load_capture
from splatkit.io.transforms import load_transforms
from splatkit.poses import Poses, refined
from splatkit.reconstruct import reconstruct
from splatkit.rooms import write_capture
from test_reconstruct import photos, settings      # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Photos that are large and many enough to tell a tenth of a degree."""
    folder = tmp_path_factory.mktemp("posed")
    write_capture(folder, photos=24, width=160, height=120, points=4000)
    return folder


def turn(rng, degrees):
    axis = rng.normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    K, a = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), math.radians(degrees)
    return np.eye(3) + math.sin(a) * K + (1 - math.cos(a)) * K @ K


def centres(photos) -> np.ndarray:
    return np.array([centre(p.world_to_cam) for p in photos])


def misplaced(folder, target, degrees=0.0, shift=0.0, focal=1.0, every=8):
    """The capture as a transforms.json whose training poses, but the first's, are turned and shifted by so many degrees and extents, and whose focal lengths are too long."""
    capture, rng = load_capture(folder), np.random.default_rng(0)
    train, _ = capture.split(every)
    C = centres(capture.photos)
    extent = 1.1 * np.linalg.norm(C[train] - C[train].mean(0), axis=1).max()
    frames = []
    for i, p in enumerate(capture.photos):
        R, c = p.world_to_cam[:3, :3], C[i]
        if i in train[1:]:
            d = rng.normal(size=3)
            R, c = turn(rng, degrees) @ R, c + shift * extent * d / np.linalg.norm(d)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = R.T @ np.diag([1, -1, -1]), c
        frames.append({"file_path": f"images/{p.name}", "w": p.width, "h": p.height, "fl_x": p.K[0, 0] * focal, "fl_y": p.K[1, 1] * focal, "cx": p.K[0, 2], "cy": p.K[1, 2],
                       "transform_matrix": pose.tolist()})
    target.mkdir()
    shutil.copytree(folder / "images", target / "images")
    rows = "".join("{} {} {} {} {} {}\n".format(*xyz, *rgb) for xyz, rgb in zip(capture.points, capture.points_rgb))
    names = [f"property float {a}" for a in "xyz"] + [f"property uchar {a}" for a in ("red", "green", "blue")]
    (target / "points.ply").write_text("\n".join(["ply", "format ascii 1.0", f"element vertex {len(capture.points)}", *names, "end_header", rows]))
    (target / "transforms.json").write_text(json.dumps({"camera_model": "PINHOLE", "ply_file_path": "points.ply", "frames": frames}))
    return capture, [capture.photos[i] for i in train], extent


def mean_errors(found, true, extent) -> tuple[float, float]:
    """Turn in degrees and shift in extents."""
    shifts, turns = errors([p.world_to_cam for p in found], [p.world_to_cam for p in true])
    return float(turns.mean()), float(shifts.mean() / extent)


def fitted(run, given):
    """The photos of the capture that trained, with the cameras that the run wrote."""
    train, _ = given.split(8)
    return [refined(given, run / "cameras.json").photos[i] for i in train]


def go(data, output, **changes):
    return reconstruct(settings(data, output, **{"steps": 2400, "max_gaussians": 12000, "hold_every": 8, "sh_degree": 0, "densification": "none", **changes}))


def test_poses_half_a_degree_and_a_hundredth_off_end_with_a_quarter_of_the_error(room, tmp_path, cpu_library, unchecked):
    _, true, extent = misplaced(room, tmp_path / "off", degrees=0.5, shift=0.01)
    given = load_transforms(tmp_path / "off")
    go(tmp_path / "off", tmp_path / "run", refine=Refine(poses=True))
    found = fitted(tmp_path / "run", given)
    assert evaluate(tmp_path / "run", "train").psnr > evaluate(tmp_path / "run", "held").psnr      # seen from the refined cameras
    before = mean_errors([p for p in given.photos if p.name in {q.name for q in found}], true, extent)
    after = mean_errors(found, true, extent)
    assert after[0] < before[0] / 4 and after[1] < before[1] / 4, (before, after)
    assert np.allclose(found[0].world_to_cam, [p for p in given.photos if p.name == found[0].name][0].world_to_cam, atol=1e-6)
    size = lambda photos: np.linalg.norm(centres(photos) - centres(photos)[0])
    assert size(found) == pytest.approx(size([p for p in given.photos if p.name in {q.name for q in found}]), rel=1e-6)


def test_a_focal_length_two_percent_off_ends_with_less_than_half_of_the_error(room, tmp_path, cpu_library, unchecked):
    capture, true, _ = misplaced(room, tmp_path / "off", focal=1.02)
    given = load_transforms(tmp_path / "off")
    go(tmp_path / "off", tmp_path / "run", refine=Refine(focal=True))
    found = fitted(tmp_path / "run", given)
    factors = {round(p.K[0, 0] / true[0].K[0, 0], 9) for p in found} | {round(p.K[1, 1] / true[0].K[1, 1], 9) for p in found}
    assert len(factors) == 1 and abs(factors.pop() - 1) < 0.01        # most of it at once; then the scene itself must shrink to go on
    assert all(np.allclose(p.world_to_cam, q.world_to_cam, atol=1e-6) for p, q in zip(found, true))


def some_cameras(n=3):
    g = torch.Generator().manual_seed(1)
    poses = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    poses[:, :3, :3] = torch.linalg.qr(torch.randn(n, 3, 3, generator=g, dtype=torch.float64))[0]
    poses[:, :3, :3] *= torch.linalg.det(poses[:, :3, :3])[:, None, None]
    poses[:, :3, 3] = torch.randn(n, 3, generator=g, dtype=torch.float64)
    K = torch.tensor([[50.0, 0, 20], [0, 60, 15], [0, 0, 1]], dtype=torch.float64)
    return [Cameras(pose[None], K[None], 40, 30) for pose in poses]


def test_a_step_goes_down_the_gradient_of_any_function_of_the_camera():
    """Against autograd through the matrix exponential."""
    weights = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights[3] = 0
    twist = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    x, y, z, *shift = twist
    zero = torch.zeros((), dtype=torch.float64)
    generator = torch.stack([torch.stack(row) for row in ((zero, -z, y, shift[0]), (z, zero, -x, shift[1]), (-y, x, zero, shift[2]), (zero,) * 4)])
    cameras = some_cameras()
    pose = cameras[1].world_to_cam[0]
    ((torch.linalg.matrix_exp(generator) @ pose) * weights).sum().backward()
    poses = Poses(cameras, extent=2.0, pose_lr=1e-6, focal_lr=0.0)
    poses._hold_size = lambda: None      # it would move the centre again
    poses.step(1, poses.camera(cameras[1], 1), weights[None], torch.zeros(1, 3, 3, dtype=torch.float64))
    moved = poses.world_to_cam[1] @ torch.linalg.inv(pose)
    taken = torch.stack([moved[2, 1], moved[0, 2], moved[1, 0], *moved[:3, 3]])
    expected = -1e-6 * twist.grad.sign() * torch.tensor([1, 1, 1, 2.0, 2, 2])      # Adam's first step is one rate long
    assert torch.allclose(taken, expected, atol=1e-9)


def test_the_first_pose_and_the_size_of_the_whole_are_held_and_rotations_stay_rotations():
    cameras = some_cameras(5)
    poses, g = Poses(cameras, 1.0, 1e-2, 1e-2), torch.Generator().manual_seed(0)
    spread = lambda: (camera_centres(poses.world_to_cam) - camera_centres(poses.world_to_cam)[0]).square().sum().sqrt()
    before, first = spread(), poses.world_to_cam[0].clone()
    for i in range(200):
        camera = poses.camera(cameras[i % 5], i % 5)
        poses.step(i % 5, camera, torch.randn(1, 4, 4, generator=g, dtype=torch.float64), torch.randn(1, 3, 3, generator=g, dtype=torch.float64))
    assert torch.equal(poses.world_to_cam[0], first) and torch.allclose(spread(), before, rtol=1e-9)
    R = poses.world_to_cam[:, :3, :3]
    assert torch.allclose(R @ R.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(5, 3, 3), atol=1e-9) and not torch.allclose(R[1:], torch.cat([c.world_to_cam for c in cameras])[1:, :3, :3], atol=0.05)
    assert poses.log_focal.shape == (1,) and poses.log_focal.abs() > 1e-3


@pytest.mark.gpu
def test_cameras_take_the_steps_of_the_cpu_on_a_card():
    """Of every photo: its moments are a row of a tensor, which starts at no multiple of 16 bytes."""
    moved = []
    for device in ("cpu", "cuda"):
        cameras, g = [c.to(device) for c in some_cameras(5)], torch.Generator().manual_seed(0)
        poses = Poses(cameras, 1.0, 1e-2, 1e-2)
        for i in range(10):
            v_pose, v_K = (torch.randn(1, k, k, generator=g, dtype=torch.float64).to(device) for k in (4, 3))
            poses.step(i % 5, poses.camera(cameras[i % 5], i % 5), v_pose, v_K)
        moved.append(torch.cat([poses.world_to_cam.flatten(), poses.log_focal.double()]).cpu())
    assert torch.allclose(*moved, atol=1e-5)


def test_a_gradient_that_is_not_finite_moves_no_camera():
    cameras = some_cameras()
    poses = Poses(cameras, 1.0, 1e-2, 1e-2)
    before = poses.state_dict()
    poses.step(1, cameras[1], torch.full((1, 4, 4), math.nan, dtype=torch.float64), torch.zeros(1, 3, 3, dtype=torch.float64))
    assert all(torch.equal(x, before[name]) for name, x in poses.state_dict().items())


def test_a_run_with_refined_cameras_resumes_bit_by_bit(photos, tmp_path, cpu_library):
    change = {"refine": Refine(poses=True, focal=True), "save_every": 30, "steps": 60}
    reconstruct(settings(photos, tmp_path / "a", **change))
    reconstruct(settings(photos, tmp_path / "b", **change))
    (tmp_path / "b" / "checkpoint" / "checkpoint-00000060.safetensors").unlink()
    reconstruct(settings(photos, tmp_path / "b", resume=True, **change))
    a, b = (checkpoint.load(tmp_path / x / "checkpoint").tensors for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "a" / "cameras.json").read_bytes() == (tmp_path / "b" / "cameras.json").read_bytes()


def test_cameras_that_a_run_wrote_are_read_like_any_transforms_json(photos, tmp_path, cpu_library):
    reconstruct(settings(photos, tmp_path / "run", steps=30, refine=Refine(poses=True)))
    frames = json.loads((tmp_path / "run" / "cameras.json").read_text())
    target = tmp_path / "copy"
    target.mkdir()
    for frame in frames["frames"]:
        (target / frame["file_path"]).write_bytes((photos / "images" / frame["file_path"]).read_bytes())
    (target / "transforms.json").write_text(json.dumps(frames))
    read, given = load_transforms(target), load_capture(photos)
    assert read.world == "colmap" and len(read.photos) == 8
    by_name = {p.name: p for p in given.photos}
    assert all(np.allclose(p.K, by_name[p.name].K) and np.allclose(p.world_to_cam, by_name[p.name].world_to_cam, atol=0.05) for p in read.photos)


def test_settings_of_refinement_are_read_from_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("refine:\n  poses: true\n  pose_lr: 0.002\n")
    assert config.load_yaml(tmp_path / "c.yaml", config.Reconstruct(data=tmp_path)).refine == Refine(poses=True, pose_lr=0.002)


def test_cameras_of_another_make_are_named(photos, tmp_path):
    capture, path = load_capture(photos), tmp_path / "cameras.json"
    assert refined(capture, path) is capture
    for text in ("", "[]", '{"frames": [{"file_path": "000.png"}]}', '{"frames": [{"file_path": "000.png", "fl_x": 1, "fl_y": 1, "cx": 0, "cy": 0, "transform_matrix": [[0, 0, 0, 0]]}]}'):
        path.write_text(text)
        with pytest.raises(BadFile, match="not the cameras that a run wrote"):
            refined(capture, path)
