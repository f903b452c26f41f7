"""splatkit compress: what shows least goes, and the cost that is printed is the cost."""
import json
import math

import pytest
import torch
from backends import random_scene

from splatkit import io, looking
from splatkit.camera import Cameras
from splatkit.capture import SceneHeader
from splatkit.cli import main
from splatkit.compress import compress, contributions, likeness, shown
from splatkit.io.fields import SH_C0
from splatkit.paths import orbit, pinhole
from splatkit.raster import RasterSettings, render
from splatkit.rooms import write_capture
from splatkit.scene import Scene

pytestmark = pytest.mark.usefixtures("cpu_library")


def around(frames=4, size=48) -> Cameras:
    return orbit(torch.zeros(3), torch.tensor([0.0, -1, 0]), 6.0, 20.0, frames, pinhole(50.0, size, size).float(), size, size)


def cloud(n=60, degree=1) -> Scene:
    scene = random_scene(n, 0, degree, dtype=torch.float32)
    return scene.replace(means=scene.means / scene.means.abs().amax(), log_scales=scene.log_scales.clamp(-3, -1.5))


def test_contributions_are_the_sums_of_blending_weights():
    scene, cameras = cloud(), around(2)
    features = torch.ones(len(scene), 1, requires_grad=True)
    total = sum(render(scene.replace(features=features), cameras[i], outputs=("features",)).features.sum() for i in range(len(cameras)))
    total.backward()
    torch.testing.assert_close(contributions(scene, cameras), features.grad[:, 0], rtol=1e-4, atol=1e-4)


def test_what_no_camera_sees_is_left_out_and_costs_nothing():
    scene, cameras = cloud(), around()
    far = scene.replace(means=scene.means + torch.tensor([0.0, -500.0, 0]))
    both = Scene.cat([scene, far])
    kept = shown(both, cameras, RasterSettings(), 0.0)
    assert not kept[60:].any() and kept[:60].any()
    assert likeness(both, both.rows(kept), cameras, RasterSettings()) == math.inf


def test_the_share_that_goes_is_at_most_the_loss_and_the_count_is_kept():
    scene, cameras = cloud(), around()
    weights = contributions(scene, cameras)
    for loss in (0.01, 0.1, 0.5):
        kept = shown(scene, cameras, RasterSettings(), loss)
        assert 0 < weights[~kept].sum() <= loss * weights.sum() and weights[kept].min() >= weights[~kept].max()
    assert int(shown(scene, cameras, RasterSettings(), 0.0, 7).sum()) == 7
    assert int(shown(scene, cameras, RasterSettings(), 0.999999, 7).sum()) >= 1


def test_likeness_is_the_psnr_of_the_pictures():
    one = Scene(torch.zeros(1, 3), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 5.0), torch.tensor([20.0]), torch.zeros(1, 1, 3))     # fills every picture
    other = one.replace(sh=torch.full((1, 1, 3), 0.1 / SH_C0))
    camera = around(1, 16)
    a, b = (render(s, camera).color for s in (one, other))
    assert likeness(one, other, camera, RasterSettings()) == pytest.approx(-10 * math.log10(float((a - b).square().mean())), abs=1e-3)


def test_a_scene_file_is_compressed_over_an_orbit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(looking, "ORBIT", (6, 96, 72))
    io.save(tmp_path / "s.ply", cloud(200, 3), SceneHeader(settings={"antialias": True}))
    assert main(["compress", str(tmp_path / "s.ply"), "-o", str(tmp_path / "s.spz"), "--loss", "0.01", "--sh-degree", "2"]) == 0
    said = capsys.readouterr().out
    read, header = io.load(tmp_path / "s.spz")
    assert f"200 -> {len(read)} Gaussians" in said and 0 < len(read) < 200 and read.sh_degree == 2 and header.settings == {"antialias": True} and "PSNR" in said
    assert (tmp_path / "s.spz").stat().st_size < (tmp_path / "s.ply").stat().st_size / 4


@pytest.mark.parametrize(("arguments", "why"), [
    (["s.ply", "-o", "t.ply"], "expected a name that ends in"), (["s.ply", "-o", "t.spz", "--loss", "1"], "a share from 0 to 1"), (["none.ply", "-o", "t.spz"], "no such file")])
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, monkeypatch, arguments, why):
    monkeypatch.chdir(tmp_path)
    io.save("s.ply", cloud(5))
    assert main(["compress", *arguments]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "t.spz").exists()


def test_a_run_is_compressed_over_its_photos_and_judged_by_the_held_out_ones(tmp_path):
    write_capture(tmp_path / "photos", photos=8, width=40, height=30, points=100)
    assert main(["reconstruct", str(tmp_path / "photos"), "-o", str(tmp_path / "run"), "--preset", "demo", "--steps", "4", "--max-gaussians", "120"]) == 0
    done = compress(tmp_path / "run", tmp_path / "s.spz", loss=0.05)
    assert done.gaussians[1] < done.gaussians[0] and 20 < done.written <= done.pruned
    assert done.held is not None and main(["eval", str(tmp_path / "run")]) == 0
    before, after = done.held
    assert abs(after - before) < 3 and f"{before:.2f} -> {after:.2f} dB" in str(done)
    assert before == pytest.approx(json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())["psnr"], abs=1e-3)
