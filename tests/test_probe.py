"""Probes: heads learn what their features hold, matches are right where features say so, numbers are what they are on paper, and the command writes its tables and pictures."""
import dataclasses
import importlib.util
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distill_runs import TINY, settings
from PIL import Image

from splatkit import cli
from splatkit.camera import unproject
from splatkit.distill.config import BackboneConfig, DataConfig
from splatkit.distill.photo_lists import ListScene, scannet_pairs
from splatkit.distill.probe_config import Head, Probe, ProbeData
from splatkit.distill.probes import (
    bootstrap,
    confusion,
    depth_errors,
    depth_from,
    depth_loss,
    match,
    mean_iou,
    normal_errors,
    normal_loss,
    segmentation_loss,
    train_head,
)
from splatkit.distill.step import project
from splatkit.distill.views import RoomScene, load_labels, scenes_of
from splatkit.errors import BadConfig, BadFile

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Head(steps=150, batch=4, lr=2e-2)


@pytest.fixture(scope="module")
def views():
    return [RoomScene(7, 12, 64, 48).view(i) for i in range(0, 12, 2)]


def tokens_of(maps):
    """Token grids of patches of 8 pixels that hold the mean of a map."""
    return F.adaptive_avg_pool2d(maps.permute(2, 0, 1)[None], (6, 8))[0].permute(1, 2, 0)


def test_a_depth_head_reads_depth_that_features_hold_and_fails_where_they_hold_none(views):
    truths = [v.depth for v in views]
    holds = [tokens_of(torch.stack([v.depth, v.depth.log(), 1 / v.depth], -1)) for v in views]
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(6, 8, 3, generator=g) for _ in views]
    errors = []
    for features in (holds, noise):
        head = train_head(features[:4], truths[:4], 32, lambda said, truth: depth_loss(depth_from(said, 8.0), truth), QUICK, 0)
        errors.append(np.mean([depth_errors(depth_from(head(f[None], 48, 64), 8.0)[0].detach(), t, 8.0)["rmse"] for f, t in zip(features[4:], truths[4:])]))
    assert errors[0] < 0.4 < 0.6 < errors[1]


def test_normal_and_segmentation_heads_read_what_features_hold(views):
    head = train_head([tokens_of(v.normals) for v in views[:4]], [v.normals for v in views[:4]], 4, normal_loss, QUICK, 0)
    said = head(tokens_of(views[5].normals)[None], 48, 64)[0].detach()
    assert normal_errors(said[:3], views[5].normals)["rmse_degrees"] < 30
    hot = lambda v: tokens_of(F.one_hot(v.classes, 8).float())
    head = train_head([hot(v) for v in views[:4]], [v.classes for v in views[:4]], 7, segmentation_loss, QUICK, 0)
    assert mean_iou(confusion(head(hot(views[5])[None], 48, 64)[0].detach(), views[5].classes)) > 0.5


def test_errors_are_those_on_paper():
    truth = torch.tensor([[1.0, 2.0, 0.0, 30.0]])
    found = depth_errors(torch.tensor([[1.2, 3.0, 5.0, 5.0]]), truth, 10.0)
    assert found["rmse"] == pytest.approx(math.sqrt((0.04 + 1) / 2), rel=1e-5) and found["abs_rel"] == pytest.approx(0.35, rel=1e-5)
    assert (found["delta1"], found["delta2"]) == (0.5, 1.0)
    assert depth_errors(truth, torch.zeros(1, 4), 10.0) == {}
    up, tilted = torch.tensor([[[0.0, 0, -1]]]), torch.tensor([0.0, math.sin(math.radians(20)), -math.cos(math.radians(20))]).view(3, 1, 1)
    angles = normal_errors(tilted, up)
    assert angles["rmse_degrees"] == pytest.approx(20, abs=1e-3) and (angles["below_11.25"], angles["below_22.5"]) == (0.0, 1.0)
    seen = confusion(torch.tensor([[[3.0, 1, 0]], [[0.0, 2, 5]]]), torch.tensor([[1, 1, 0]]))
    assert seen.tolist() == [[1, 1], [0, 0]] and mean_iou(seen) == 0.5


def test_a_loss_of_depth_is_least_at_the_truth_and_blind_to_what_is_not_known(views):
    truth = torch.stack([v.depth for v in views[:2]])
    holes = truth.clone()
    holes[:, ::2] = 0
    wrong = torch.where(holes > 0, holes, 99.0)
    assert depth_loss(wrong, holes) < 1e-4 < depth_loss(1.1 * truth, truth) < depth_loss(1.3 * truth, truth)


def test_features_that_name_the_place_match_everywhere_and_random_ones_nowhere():
    scene = RoomScene(7, 24, 96, 72)
    a, b = scene.view(0), scene.view(2)
    y, x = torch.meshgrid(torch.arange(72) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    at = torch.stack([x, y], -1).view(-1, 2)
    place = lambda v: torch.cat([f(k * unproject(v.camera, at, v.depth.flatten())) for k in (1, 2, 4) for f in (torch.sin, torch.cos)], 1).view(72, 96, -1)
    matches = match(place(a), place(b), a, b, scale=0.5, most=300, seen_only=True)
    assert len(matches.error) == 300 and matches.recall(2.0) > 0.95
    there = project(unproject(a.camera, matches.at_a, a.depth[matches.at_a[:, 1].long(), matches.at_a[:, 0].long()]), b)[0]
    assert torch.allclose((there - matches.at_b).norm(dim=1) * 0.5, matches.error, atol=1e-3)
    g = torch.Generator().manual_seed(0)
    random = lambda: torch.randn(9, 12, 8, generator=g)
    assert match(random(), random(), a, b, 0.5, 300).recall(2.0) < 0.1
    none = dataclasses.replace(b, depth=torch.zeros_like(b.depth))
    assert math.isnan(match(random(), random(), a, none, 0.5, 300).recall(2.0))


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    g, inside = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        mean, low, high = bootstrap(0.3 + torch.randn(50, generator=g), draws=500, seed=trial)
        inside += low <= 0.3 <= high
    assert 0.89 <= inside / 200 <= 0.99
    assert bootstrap(torch.full((20,), 0.5)) == pytest.approx((0.5, 0.5, 0.5))


def test_the_command_measures_before_and_after_and_does_nothing_twice(tmp_path, capsys):
    from splatkit.distill.loop import distill
    distill(settings(tmp_path / "run", steps=2))
    argv = ["probe", str(tmp_path / "run"), "-o", str(tmp_path / "probe"), "--data.train-rooms", "1", "--data.test-rooms", "2", "--data.photos", "8", "--data.views", "2",
            "--data.height", "48", "--data.width", "64", "--data.pair-gap", "2", "--labels", "--bins", "16", "--matches", "50", "--device", "cpu",
            *(f for task in ("depth", "normals", "segmentation") for f in (f"--{task}.steps", "3"))]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[:4]] == ["backbone", "before run", "before run, carried", "run"]
    found = json.loads((tmp_path / "probe" / "metrics.json").read_text())["backbones"]
    assert set(found[0]["scenes"]) == {"depth", "normals", "segmentation", "correspondence"} and len(found[0]["scenes"]["depth"]) == 2
    assert all(math.isfinite(x) for m in found for task in m["means"].values() for x in task.values())
    assert (tmp_path / "probe" / "features.png").is_file() and (tmp_path / "probe" / "matches.png").is_file()
    assert cli.main(argv) == 0
    again = capsys.readouterr()
    assert again.out == said.out and "measuring" in said.err and "measuring" not in again.err


# ---- folders and lists


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def scannet(tmp_path):
    """A scene in ScanNet's layout: colour and depth of other shapes by 0.4 %, one pose lost."""
    folder, scene = tmp_path / "scene0000_00", RoomScene(3, 8, 64, 48)
    (folder / "pose").mkdir(parents=True)
    (folder / "intrinsic").mkdir()
    for i in range(5):
        view = scene.view(i)
        write_png(folder / "color" / f"{i}.png", np.resize((view.photo.permute(1, 2, 0).numpy() * 255).astype(np.uint8), (242, 324, 3)))
        write_png(folder / "depth" / f"{i}.png", (view.depth.numpy() * 1000).astype(np.uint16))
        write_png(folder / "instance-filt" / f"{i}.png", view.labels.numpy().astype(np.uint8))
        pose = np.linalg.inv(view.camera.world_to_cam[0].double().numpy())
        np.savetxt(folder / "pose" / f"{i}.txt", pose if i != 2 else np.full((4, 4), -np.inf))
    K = scene.view(0).camera.resized(324, 242).K[0].numpy()
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", np.block([[K, np.zeros((3, 1))], [np.zeros((1, 3)), 1]]))
    return folder


def test_a_scene_of_scannet_is_read_without_the_photos_that_lost_their_pose(scannet):
    said = []
    scene = scenes_of(DataConfig(folder=scannet, height=48, width=64), said.append)[0]
    assert len(scene) == 4 and "1 of 5 photos have no pose" in said[0]
    view, truth = scene.view(2), RoomScene(3, 8, 64, 48).view(3)
    assert torch.allclose(view.camera.world_to_cam, truth.camera.world_to_cam, atol=1e-5) and torch.allclose(view.camera.K, truth.camera.K, rtol=1e-4)
    assert torch.allclose(view.depth, truth.depth, atol=2e-3) and torch.equal(view.labels, truth.labels)
    (scannet / "pose" / "1.txt").write_text("1 0 0 0\n0 2 0 0\n0 0 1 0\n0 0 0 1\n")
    with pytest.raises(BadFile, match="1.txt: is no rotation"):
        scenes_of(DataConfig(folder=scannet, height=48, width=64))


@pytest.mark.parametrize("published", [False, True], ids=["as FiT3D has it", "as published"])
def test_a_scene_of_scannetpp_is_read_in_both_layouts(tmp_path, published):
    folder, scene = tmp_path / "39f36da05b", RoomScene(3, 8, 64, 48)
    poses, photos = ("dslr/nerfstudio/transforms_undistorted.json", "dslr/resized_undistorted_images") if published else ("transforms_train.json", "images")
    K, frames = scene.view(0).camera.K[0], []
    for i in range(5):
        view = scene.view(i)
        write_png(folder / photos / f"DSC{i:05}.png", (view.photo.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
        write_png(folder / "instance_segmentation" / f"DSC{i:05}.png.png", view.labels.numpy().astype(np.uint8))
        pose = np.linalg.inv(view.camera.world_to_cam[0].double().numpy()) @ np.diag([1, -1, -1, 1])
        frames.append({"file_path": f"DSC{i:05}.png", "transform_matrix": pose.tolist(), "is_bad": i == 1})
    (folder / poses).parent.mkdir(parents=True, exist_ok=True)
    (folder / poses).write_text(json.dumps({"fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2]), "w": 64, "h": 48, "frames": frames}))
    found = scenes_of(DataConfig(folder=tmp_path, height=48, width=64))[0]
    assert len(found) == 4 and found.name == "39f36da05b"
    view, truth = found.view(1), scene.view(2)
    assert torch.allclose(view.camera.world_to_cam, truth.camera.world_to_cam, atol=1e-5) and torch.equal(view.labels, truth.labels)


def test_masks_of_another_shape_or_in_colour_are_refused_and_smaller_ones_are_taken(tmp_path):
    photo = dataclasses.replace(scenes_photo(tmp_path), width=64, height=48)
    write_png(tmp_path / "half.png", np.arange(24 * 32, dtype=np.uint16).reshape(24, 32))
    labels = load_labels(tmp_path / "half.png", photo, 64, 48)
    assert labels[::2, ::2].flatten().tolist() == list(range(24 * 32)) and torch.equal(labels[1::2], labels[::2])
    write_png(tmp_path / "tall.png", np.zeros((48, 48), np.uint8))
    with pytest.raises(BadFile, match="tall.png: is 48x48, which is not the shape of"):
        load_labels(tmp_path / "tall.png", photo, 64, 48)
    write_png(tmp_path / "rgb.png", np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(BadFile, match="one channel"):
        load_labels(tmp_path / "rgb.png", photo, 64, 48)


def scenes_photo(folder):
    from splatkit.capture import Photo
    write_png(folder / "a.png", np.zeros((48, 64, 3), np.uint8))
    return Photo("a.png", folder / "a.png", np.eye(3), 64, 48, np.eye(4))


def test_a_list_names_what_is_known_of_photos_and_a_line_that_lies_is_said(tmp_path):
    write_png(tmp_path / "a.png", np.full((48, 64, 3), 128, np.uint8))
    write_png(tmp_path / "d.png", np.full((48, 64), 1500, np.uint16))
    write_png(tmp_path / "c.png", np.full((48, 64), 3, np.uint8))
    write_png(tmp_path / "n.png", np.full((48, 64, 3), (128, 128, 0), np.uint8))
    (tmp_path / "list.txt").write_text("a.png d.png\n\na.png None c.png n.png\n")
    scene = ListScene.of(tmp_path / "list.txt", 32, 24, 1e-3)
    one, other = scene.view(0), scene.view(1)
    assert float(one.depth.mean()) == pytest.approx(1.5) and one.classes is None and other.depth is None and int(other.classes.unique()) == 3
    assert torch.allclose(other.normals[5, 5], torch.tensor([0.0, 0, -1]), atol=0.01)
    (tmp_path / "bad.txt").write_text("a.png d.png\na.png gone.png\n")
    with pytest.raises(BadFile, match="line 2: .*gone.png: no such file"):
        ListScene.of(tmp_path / "bad.txt", 32, 24, 1e-3)
    with pytest.raises(BadConfig, match="data.test is not"):
        from splatkit.distill.probe import probe
        probe(Probe(data=ProbeData(train=tmp_path / "list.txt"), backbone=TINY, output=tmp_path / "o"))


def test_scannet_s_pairs_are_read_as_views(tmp_path, scannet):
    for path in (scannet / "color").iterdir():
        Image.open(path).resize((64, 48)).save(path.with_suffix(".jpg"))
    np.savez(tmp_path / "test.npz", name=np.array([[0, 0, 0, 3]]))
    np.savez(tmp_path / "intrinsics.npz", scene0000_00=RoomScene(3, 8, 64, 48).view(0).camera.K[0].numpy())
    (name, a, b), = scannet_pairs(tmp_path, 64, 48)
    truth = RoomScene(3, 8, 64, 48)
    assert name == "scene0000_00" and torch.allclose(b.camera.world_to_cam, truth.view(3).camera.world_to_cam, atol=1e-5)
    assert torch.allclose(a.depth, truth.view(0).depth, atol=2e-3)
    with pytest.raises(BadFile, match="test.npz"):
        next(scannet_pairs(scannet, 64, 48))


def test_a_backbone_that_says_what_it_is_needs_no_name(tmp_path):
    from splatkit.distill import backbone as backbones
    backbones.save(backbones.load(TINY), tmp_path / "b.safetensors", half=True)
    model = backbones.load(BackboneConfig(name="", weights=str(tmp_path / "b.safetensors")))
    assert model.channels == 32 and model.config.depth == 2
