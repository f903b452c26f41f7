"""Where Gaussians come from: the lifting network with its cache, fitted scenes; features given to a finished scene; features watched while a backbone learns."""
import dataclasses
import importlib.util
import urllib.request
from pathlib import Path

import pytest
import torch
from distill_runs import TINY, settings

from splatkit import cli, config, io
from splatkit.distill.config import DataConfig, GeometryConfig
from splatkit.distill.geometry import _kept, geometry_of
from splatkit.distill.samples import Samples
from splatkit.distill.step import project
from splatkit.distill.views import RoomScene
from splatkit.errors import BadConfig, BadFile
from splatkit.raster import render
from splatkit.reconstruct import reconstruct
from splatkit.rooms import write_capture

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    from splatkit.lift.config import CONFIGS
    from splatkit.lift.model import MVSplat
    from splatkit.lift.weights import save_weights
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lift") / "w.safetensors"
    save_weights(path, MVSplat(CONFIGS["tiny"]))
    return path


def sample(number: int, flip: bool):
    return Samples([RoomScene(0, 12, 64, 48), RoomScene(1, 12, 64, 48)], DataConfig(rooms=2, gap=(2, 4), flip=flip), 0, with_elsewhere=True)[number]


def test_what_the_network_made_of_a_pair_is_read_again_in_half_precision_under_its_weights(weights, tmp_path):
    lifting = geometry_of(GeometryConfig("lift", weights, tmp_path))
    one = sample(0, False)
    made, again = lifting(one), lifting(one)
    assert (lifting.hits, lifting.misses) == (1, 1) and len(made.scene) == 2 * 48 * 64 and torch.equal(made.pixels, again.pixels)
    assert torch.allclose(made.scene.means, again.scene.means, atol=5e-3) and not made.scene.means.requires_grad
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].stat().st_size < 2.2 * sum(x.numel() for x in made.scene.fields().values())
    at, depth = project(made.scene.means[:48 * 64], one.contexts[0])
    assert (depth > 0).all() and (at - torch.stack(torch.meshgrid(torch.arange(64) + 0.5, torch.arange(48) + 0.5, indexing="xy"), -1).view(-1, 2)).abs().median() < 1
    files[0].write_bytes(files[0].read_bytes()[:-100])
    assert _kept(files[0]) is None and lifting(one) is not None and lifting.misses == 2
    other = geometry_of(GeometryConfig("lift", weights, tmp_path))
    other.weights = "another"
    assert other.key(one) != lifting.key(one)


def test_a_mirrored_pair_has_the_mirrored_gaussians_of_the_pair_itself(weights, tmp_path):
    lifting = geometry_of(GeometryConfig("lift", weights, tmp_path))
    number = next(n for n in range(8) if sample(n, True).is_mirrored)
    mirrored = sample(number, True)
    carrier = lifting(mirrored)
    plain = dataclasses.replace(mirrored, is_mirrored=False, contexts=tuple(v.mirrored() for v in mirrored.contexts), targets=tuple(v.mirrored() for v in mirrored.targets))
    maps = [v.photo.permute(1, 2, 0) for v in mirrored.contexts]
    drawn = lambda c, s, maps: render(c.carrying(maps, [v.camera for v in s.contexts]), s.targets[0].camera, outputs=("features",)).features[0]
    there, here = drawn(carrier, mirrored, maps), drawn(lifting(plain), plain, [m.flip(1) for m in maps])
    assert lifting.hits == 1 and (there.flip(1) - here).abs().mean() < 0.02


def test_a_world_of_another_scale_and_origin_has_the_same_gaussians_there(weights):
    one = sample(0, False)
    scale, shift = 7.0, torch.tensor([3.0, -2.0, 1.0])
    moved = lambda camera: camera.replace(world_to_cam=torch.cat([torch.cat([camera.world_to_cam[:, :3, :3], scale * camera.world_to_cam[:, :3, 3:]
                                                                  - camera.world_to_cam[:, :3, :3] @ shift[:, None]], dim=2), camera.world_to_cam[:, 3:]], dim=1))
    other = dataclasses.replace(one, contexts=tuple(dataclasses.replace(v, camera=moved(v.camera)) for v in one.contexts), depth_range=tuple(scale * x for x in one.depth_range))
    here, there = (geometry_of(GeometryConfig("lift", weights))(s).scene for s in (one, other))
    assert torch.allclose(there.means, scale * here.means + shift, atol=1e-3 * scale) and torch.allclose(there.scales, scale * here.scales, rtol=1e-3)


def test_wrong_geometry_of_the_network_stands_before_the_camera_as_it_stood_before_the_other_one(weights):
    one = sample(0, False)
    right, wrong = (geometry_of(GeometryConfig("lift", weights, permuted=p))(s) for p, s in ((False, one.elsewhere), (True, one)))
    there, here = (project(c.scene.means, s.contexts[0]) for c, s in ((right, one.elsewhere), (wrong, one)))
    assert torch.allclose(there[1], here[1], atol=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cpu_library) -> Path:
    """A finished reconstruction of a room."""
    folder = tmp_path_factory.mktemp("room")
    write_capture(folder / "photos", photos=6, width=72, height=54, points=600)
    quick = config.load_yaml(config.preset("reconstruct", "demo"), config.Reconstruct(data=folder / "photos", output=folder / "run"))
    reconstruct(dataclasses.replace(quick, steps=100, max_gaussians=700, hold_every=0))
    return folder / "run"


def test_features_of_photos_are_given_to_a_finished_scene_which_viewers_can_show(run, capsys):
    flags = [f for name, value in (("name", TINY.name), ("weights", "random"), ("embed-dim", 32), ("depth", 2), ("num-heads", 2), ("patch-size", 8), ("img-size", 48))
             for f in (f"--backbone.{name}", str(value))]
    assert cli.main(["features", str(run), "--channels", "5", *flags]) == 0
    assert "features.ply" in capsys.readouterr().out
    scene, header = io.load(run / "features.ply")
    before, _ = io.load(run / "scene.ply")
    assert scene.features.shape == (len(before), 5) and torch.equal(scene.means, before.means) and scene.features.std(0).min() > 1e-4
    assert cli.main(["features", str(run.parent), *flags]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_a_scene_fitted_before_carries_features_by_what_its_pixels_show(run):
    one = sample(0, False)
    geometry = geometry_of(GeometryConfig("scene", runs=run))
    named = dataclasses.replace(one, scene="anything")
    carrier = geometry(named)
    carried = carrier.carrying([torch.ones(48, 64, 4)] * 2, [v.camera for v in one.contexts]).features
    assert carrier.pixels is None and (((carried - 1).abs() < 1e-4).all(1) | (carried == 0).all(1)).all()
    with pytest.raises(BadFile, match="no run and no scene file"):
        geometry_of(GeometryConfig("scene", runs=run.parent))(named)
    with pytest.raises(BadConfig, match="geometry.runs"):
        geometry_of(GeometryConfig("scene"))
    with pytest.raises(BadFile, match="no such file"):
        geometry_of(GeometryConfig("lift", run / "gone.safetensors"))


def test_features_are_shown_while_a_backbone_learns(tmp_path, monkeypatch):
    from splatkit import distill_view
    from splatkit.distill.loop import distill
    said, states = [], []
    monkeypatch.setattr(distill_view, "SECONDS", 0.0)
    watching = distill_view.Watching(said.append)

    class Looking(distill_view.Watching):
        def stepped(self, run):
            super().stepped(run)
            self.viewer.worker.submit(lambda: states.append(self.shown.present.scene.features.clone())).result(120)
    watching = Looking(said.append)
    try:
        distill(settings(tmp_path, steps=2), watcher=watching)
        url = next(line for line in said if line.startswith("view: ")).removeprefix("view: ")
        assert urllib.request.urlopen(url.partition("#")[0].partition("?")[0], timeout=10).status == 200
    finally:
        watching.close()
    assert states[0].shape[1] == 16 and not torch.equal(states[0], states[1])
