"""Cameras and scenes of other libraries: what goes over projects to the same pixels and comes back the same. The libraries are asked where they are installed."""
import importlib.metadata
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_formats import differences, trained

from splatkit import adapters, io
from splatkit.camera import Cameras
from splatkit.errors import BackendUnavailable
from splatkit.paths import orbit, pinhole
from splatkit.scene import Scene

POINTS = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def views() -> Cameras:
    K = pinhole(50.0, 64, 48).float()
    K[0, 0], K[0, 2], K[1, 2] = 70.0, 30.0, 25.0
    return orbit(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.2, -1, 0.1]), 8.0, 20.0, 3, K, 64, 48)


def pixels(cameras: Cameras) -> torch.Tensor:
    """Where POINTS fall, [C, 20, 2]."""
    seen = torch.einsum("cij,nj->cni", cameras.world_to_cam[:, :3, :3], POINTS) + cameras.world_to_cam[:, None, :3, 3]
    image = torch.einsum("cij,cnj->cni", cameras.K, seen)
    return image[..., :2] / image[..., 2:]


def test_pytorch3d_s_formula_gives_our_pixels():
    a = adapters.pytorch3d_arguments(views())
    seen = POINTS @ a["R"] + a["T"][:, None]                   # x left, y up
    screen = a["principal_point"][:, None] - a["focal_length"][:, None] * seen[..., :2] / seen[..., 2:]
    torch.testing.assert_close(screen, pixels(views()), rtol=1e-5, atol=1e-4)


def test_cameras_come_back_from_pytorch3d_s_attributes():
    a = adapters.pytorch3d_arguments(views()) | {"K": None, "is_perspective": lambda: True}
    back = adapters.from_pytorch3d(SimpleNamespace(**{**a, "in_ndc": lambda: False}))
    torch.testing.assert_close(back.world_to_cam, views().world_to_cam)
    torch.testing.assert_close(back.K, views().K)
    assert (back.width, back.height) == (64, 48)
    with pytest.raises(ValueError, match="in_ndc=False"):
        adapters.from_pytorch3d(SimpleNamespace(**{**a, "in_ndc": lambda: True}))
    sizes = torch.tensor([[48, 64], [48, 64], [24, 64]])
    with pytest.raises(ValueError, match="2 image sizes"):
        adapters.from_pytorch3d(SimpleNamespace(**{**a, "image_size": sizes, "in_ndc": lambda: False}))
    with pytest.raises(ValueError, match="SimpleNamespace is not perspective"):
        adapters.from_pytorch3d(SimpleNamespace(**{**a, "is_perspective": lambda: False, "in_ndc": lambda: False}))


def test_pytorch3d_s_calibration_matrix_goes_before_its_focal_length():
    a = adapters.pytorch3d_arguments(views())
    matrix = torch.zeros(3, 4, 4)
    matrix[:, :2, :3], matrix[:, 2, 3], matrix[:, 3, 2] = views().K[:, :2], 1, 1
    given = {**a, "K": matrix, "focal_length": torch.ones(3, 2), "principal_point": torch.zeros(3, 2)}
    back = adapters.from_pytorch3d(SimpleNamespace(**{**given, "in_ndc": lambda: False, "is_perspective": lambda: True}))
    torch.testing.assert_close(back.K, views().K)


def test_pytorch3d_projects_to_our_pixels():
    theirs = pytest.importorskip("pytorch3d.renderer", reason="pytorch3d is absent")
    cameras = adapters.to_pytorch3d(views())
    by_matrix = theirs.PerspectiveCameras(R=cameras.R, T=cameras.T, K=cameras.get_projection_transform().get_matrix().transpose(1, 2), image_size=cameras.image_size, in_ndc=False)
    for made in (cameras, by_matrix):
        screen = made.transform_points_screen(POINTS.expand(3, -1, -1))[..., :2]
        torch.testing.assert_close(screen, pixels(views()), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(pixels(adapters.from_pytorch3d(made)), pixels(views()))
    for wrong, why in ((theirs.FoVPerspectiveCameras(), "in_ndc=False"), (theirs.OrthographicCameras(in_ndc=False, image_size=((48, 64),)), "OrthographicCameras is not perspective")):
        with pytest.raises(ValueError, match=why):
            adapters.from_pytorch3d(wrong)


def test_gsplat_s_dictionary_is_the_scene_and_back():
    scene = trained(30, 2, features=4)
    back = adapters.from_gsplat(adapters.to_gsplat(scene))
    assert all(torch.equal(value, back.fields()[name]) for name, value in scene.fields().items())
    with pytest.raises(ValueError, match="no sh0 among"):
        adapters.from_gsplat({name: value for name, value in adapters.to_gsplat(scene).items() if name != "sh0"})


@pytest.mark.parametrize("kind", ["ply", "splat", "ply_compressed"])
def test_what_gsplat_exports_is_the_scene(tmp_path, kind):
    try:
        version = importlib.metadata.version("gsplat")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gsplat 1.5 is not installed (pip install gsplat==1.5.3)")
    if not version.startswith("1.5"):
        pytest.skip(f"gsplat {version} compiles CUDA when it is imported")
    from gsplat import export_splats
    scene = trained(300, 3)
    (tmp_path / ("s.splat" if kind == "splat" else "s.ply")).write_bytes(export_splats(**adapters.to_gsplat(scene), format=kind))
    read, _ = io.load(tmp_path / ("s.splat" if kind == "splat" else "s.ply"))
    found = differences(read, scene)
    limits = {"ply": {"means": 0, "angle": 1e-3, "log_scales": 0, "opacity": 1e-6, "sh": 0}, "splat": {"means": 0, "log_scales": 1e-6, "opacity": 0.005},
              "ply_compressed": {"means": 0.02, "angle": 5e-3, "log_scales": 0.01, "opacity": 0.005, "sh": 0.04}}[kind]
    assert len(read) == (281 if kind == "ply_compressed" else 300) and all(found[key] <= limit for key, limit in limits.items()), str(found)     # it leaves out what is hardly opaque


def test_gsplat_s_rasterization_is_given_what_is_drawn():
    scene = trained(5, 1)
    a = adapters.gsplat_arguments(scene, views())
    torch.testing.assert_close(a["scales"].log(), scene.log_scales)
    torch.testing.assert_close(torch.logit(a["opacities"][2:].double()).float(), scene.logit_opacities[2:], rtol=1e-3, atol=1e-3)
    assert a["colors"] is scene.sh and a["sh_degree"] == 1 and (a["width"], a["height"]) == (64, 48)


def test_nerfstudio_s_cameras_look_along_minus_z_with_y_up_and_come_back():
    a = adapters.nerfstudio_arguments(views())
    poses = a["camera_to_worlds"]
    torch.testing.assert_close(poses[:, :, 3], views().centres)
    torch.testing.assert_close(-poses[:, :, 2], views().world_to_cam[:, 2, :3])         # forward
    assert bool((poses[:, :, 1] @ torch.tensor([0.2, -1, 0.1]) > 0).all())              # the image's up is the orbit's
    theirs = {name: (x[:, None] if name in ("fx", "fy", "cx", "cy") else x) for name, x in a.items()} | {"camera_type": torch.ones(3, 1, dtype=torch.int64)}
    back = adapters.from_nerfstudio(SimpleNamespace(**theirs))
    torch.testing.assert_close(back.world_to_cam, views().world_to_cam)
    torch.testing.assert_close(back.K, views().K)
    with pytest.raises(ValueError, match="lens distortion"):
        adapters.from_nerfstudio(SimpleNamespace(**theirs, distortion_params=torch.tensor([[0.1, 0, 0, 0, 0, 0]])))
    with pytest.raises(ValueError, match="not all perspective"):
        adapters.from_nerfstudio(SimpleNamespace(**theirs | {"camera_type": torch.tensor([[1], [2], [1]])}))
    one = adapters.from_nerfstudio(SimpleNamespace(**{name: (x[1] if isinstance(x, torch.Tensor) else x) for name, x in theirs.items()}))
    torch.testing.assert_close(one.world_to_cam, views().world_to_cam[1:2])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")      # of nerfstudio 1.1.5 itself
def test_nerfstudio_s_rays_through_our_pixels_meet_the_points():
    theirs = pytest.importorskip("nerfstudio.cameras.cameras", reason="nerfstudio is absent")
    made = adapters.to_nerfstudio(views())
    for i in range(3):
        rays = made.generate_rays(i, coords=pixels(views())[i].flip(1))        # y before x
        along = torch.nn.functional.normalize(POINTS - views().centres[i], dim=1)
        torch.testing.assert_close(rays.origins, views().centres[i].expand(20, 3))
        torch.testing.assert_close(rays.directions, along, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapters.from_nerfstudio(made).world_to_cam, views().world_to_cam)
    torch.testing.assert_close(adapters.from_nerfstudio(made[1]).world_to_cam, views().world_to_cam[1:2])
    fisheye = theirs.Cameras(**adapters.nerfstudio_arguments(views()), camera_type=theirs.CameraType.FISHEYE)
    with pytest.raises(ValueError, match="not all perspective"):
        adapters.from_nerfstudio(fisheye)


def test_a_splatfacto_state_is_a_scene():
    scene = trained(30, 3)
    state = {"_model.gauss_params.means": scene.means, "_model.gauss_params.scales": scene.log_scales, "_model.gauss_params.quats": scene.quats, "datamanager.x": torch.zeros(1),
             "_model.gauss_params.opacities": scene.logit_opacities[:, None], "_model.gauss_params.features_dc": scene.sh[:, 0], "_model.gauss_params.features_rest": scene.sh[:, 1:]}
    back = adapters.from_splatfacto(state)
    assert all(torch.equal(value, back.fields()[name]) for name, value in scene.fields().items())
    with pytest.raises(ValueError, match="no gauss_params.scales"):
        adapters.from_splatfacto({name: x for name, x in state.items() if "scales" not in name})


def test_a_splatfacto_of_degree_0_holds_logits_of_colours():
    """Its model's `colors` is sigmoid(features_dc) then, SH2RGB(features_dc) otherwise."""
    scene = trained(30, 0)
    state = {"gauss_params.means": scene.means, "gauss_params.scales": scene.log_scales, "gauss_params.quats": scene.quats, "gauss_params.opacities": scene.logit_opacities[:, None],
             "gauss_params.features_dc": torch.logit(torch.linspace(0.01, 0.99, 90).reshape(30, 3)), "gauss_params.features_rest": torch.zeros(30, 0, 3)}
    colours = 0.5 + 0.28209479177387814 * adapters.from_splatfacto(state).sh[:, 0]
    torch.testing.assert_close(colours, torch.linspace(0.01, 0.99, 90).reshape(30, 3))


def test_an_open3d_cloud_carries_the_gaussians_and_brings_them_back(tmp_path):
    o3d = pytest.importorskip("open3d", reason="open3d (the extra mesh) is absent")
    scene = trained(30, 2)
    cloud = adapters.to_open3d(scene)
    back = adapters.from_open3d(cloud)
    for name, value in scene.fields().items():
        torch.testing.assert_close(back.fields()[name], value, rtol=1e-6, atol=1e-6)
    io.save(tmp_path / "s.ply", scene)
    theirs = o3d.t.io.read_point_cloud(str(tmp_path / "s.ply"))         # our own file, in its reader's names
    assert all(np.allclose(theirs.point[name].numpy(), cloud.point[name].numpy()) for name in ("positions", "f_dc", "f_rest", "opacity", "scale", "rot"))


def test_plain_open3d_clouds_become_round_gaussians():
    o3d = pytest.importorskip("open3d", reason="open3d (the extra mesh) is absent")
    legacy = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(POINTS.double().numpy()))
    legacy.colors = o3d.utility.Vector3dVector(np.tile([1.0, 0.5, 0.0], (20, 1)))
    for cloud in (legacy, o3d.t.geometry.PointCloud.from_legacy(legacy)):
        scene = adapters.from_open3d(cloud, 1)
        torch.testing.assert_close(scene.means, POINTS)
        torch.testing.assert_close(0.5 + 0.28209479177387814 * scene.sh[0, 0], torch.tensor([1.0, 0.5, 0.0]), atol=0.01, rtol=0)
        assert scene.sh_degree == 1
    with pytest.raises(ValueError, match="no points"):
        adapters.from_open3d(o3d.geometry.PointCloud())


@pytest.mark.parametrize(("name", "act"), [
    ("pytorch3d", lambda: adapters.to_pytorch3d(views())), ("open3d", lambda: adapters.to_open3d(Scene(*trained(2, 0).fields().values()))), ("nerfstudio", lambda: adapters.to_nerfstudio(views()))])
def test_an_absent_library_is_said_with_its_cure(monkeypatch, name, act):
    for part in (name, f"{name}.renderer", f"{name}.cameras", f"{name}.cameras.cameras"):
        monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(BackendUnavailable, match=f"{name} cannot be imported.*pip install"):
        act()


def test_a_missing_library_of_the_system_is_said_with_its_cure(monkeypatch):
    def fails(name):
        raise ImportError("libusb-1.0.so.0: cannot open shared object file: No such file or directory")
    monkeypatch.setattr(adapters.importlib, "import_module", fails)
    with pytest.raises(BackendUnavailable, match="open3d is there, but cannot be imported .libusb.*apt install libusb-1.0-0"):
        adapters.to_open3d(Scene(*trained(2, 0).fields().values()))


def test_a_focal_length_for_both_axes_is_understood():
    a = adapters.pytorch3d_arguments(views()) | {"K": None, "is_perspective": lambda: True}
    one = adapters.from_pytorch3d(SimpleNamespace(**{**a, "focal_length": torch.tensor([50.0, 60, 70]), "in_ndc": lambda: False}))
    assert one.K[:, 0, 0].tolist() == one.K[:, 1, 1].tolist() == [50, 60, 70] and math.isclose(float(one.K[0, 0, 2]), 30)
