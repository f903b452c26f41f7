"""splatkit mesh: a surface where the Gaussians are, in their colours, in files that open as meshes."""
import json
import math
import struct
import sys

import numpy as np
import pytest
import torch

from splatkit import io, looking
from splatkit.cli import main
from splatkit.errors import BackendUnavailable
from splatkit.io.fields import SH_C0
from splatkit.io.surface import Surface, write_surface
from splatkit.mesh import Fusing, fuse
from splatkit.paths import orbit, pinhole
from splatkit.scene import Scene

TETRAHEDRON = Surface(np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]), np.array([[0.0, 0, 0], [1, 0, 0], [0, 0.5, 0], [0, 0, 1]]))


def ball(n=12000) -> Scene:
    """Opaque small Gaussians on the unit sphere, red where z > 0 and blue where not; and a few far away, which make an island."""
    i = torch.arange(n) + 0.5
    polar, around = torch.acos(1 - 2 * i / n), math.pi * (1 + 5 ** 0.5) * i
    means = torch.stack([polar.sin() * around.cos(), polar.sin() * around.sin(), polar.cos()], dim=1)
    colour = torch.where(means[:, 2:] > 0, torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1]))
    means = torch.cat([means, torch.tensor([[0.0, -1.4, 0.0]])])
    colour = torch.cat([colour, torch.tensor([[0.0, 1, 0]])])
    return Scene(means, torch.tensor([[1.0, 0, 0, 0]]).repeat(n + 1, 1), torch.full((n + 1, 3), math.log(0.016)), torch.full((n + 1,), 6.0), ((colour - 0.5) / SH_C0)[:, None])


@pytest.fixture(scope="module")
def mesh():
    """Of the ball, from 24 cameras at two heights."""
    pytest.importorskip("open3d", reason="open3d (the extra mesh) is absent")
    from splatkit.camera import Cameras
    up, K = torch.tensor([0.0, -1, 0]), pinhole(40.0, 160, 160).float()
    cameras = Cameras.cat([orbit(torch.zeros(3), up, 4.0, height, 12, K, 160, 160) for height in (-35.0, 35.0)])
    return fuse(ball(), cameras, Fusing(voxel=0.03))


def test_the_mesh_of_a_ball_is_a_ball(mesh, cpu_library):
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert len(mesh.triangles) > 5000 and np.abs(np.median(radius) - 1) < 0.03 and np.quantile(np.abs(radius - 1), 0.99) < 0.05
    a, b, c = (mesh.vertices[mesh.triangles[:, i]] for i in range(3))
    outward = (np.cross(b - a, c - a) * (a + b + c)).sum(axis=1)
    assert (outward > 0).mean() > 0.99
    volume = (np.cross(a, b) * c).sum() / 6
    assert volume == pytest.approx(4 / 3 * math.pi, rel=0.1)


def test_the_mesh_has_the_colours_of_the_scene(mesh, cpu_library):
    front, back = mesh.colours[mesh.vertices[:, 2] > 0.2], mesh.colours[mesh.vertices[:, 2] < -0.2]
    assert np.abs(np.median(front, axis=0) - [1, 0, 0]).max() < 0.05 and np.abs(np.median(back, axis=0) - [0, 0, 1]).max() < 0.05


def test_islands_are_removed(mesh, cpu_library):
    assert mesh.vertices[:, 1].min() > -1.2


def test_a_scene_that_shows_no_surface_is_refused(cpu_library):
    pytest.importorskip("open3d", reason="open3d (the extra mesh) is absent")
    thin = ball(50)
    cameras = orbit(torch.zeros(3), torch.tensor([0.0, -1, 0]), 4.0, 20.0, 2, pinhole(40.0, 32, 32).float(), 32, 32)
    with pytest.raises(ValueError, match="no camera sees a surface"):
        fuse(thin.replace(logit_opacities=thin.logit_opacities - 9), cameras)


def test_the_verb_writes_a_mesh_of_a_scene_file(tmp_path, capsys, monkeypatch, cpu_library):
    monkeypatch.setattr(looking, "ORBIT", (8, 120, 90))
    pytest.importorskip("open3d", reason="open3d (the extra mesh) is absent")
    io.save(tmp_path / "s.ply", ball())
    assert main(["mesh", str(tmp_path / "s.ply"), "-o", str(tmp_path / "m.glb"), "--voxel", "0.06"]) == 0
    assert "triangles" in capsys.readouterr().out and (tmp_path / "m.glb").read_bytes()[:4] == b"glTF"


def test_without_open3d_one_line_says_what_to_install(tmp_path, monkeypatch, capsys, cpu_library):
    monkeypatch.setitem(sys.modules, "open3d", None)
    io.save(tmp_path / "s.ply", ball(50))
    assert main(["mesh", str(tmp_path / "s.ply")]) == 2
    assert "pip install splatkit[mesh]" in capsys.readouterr().err
    with pytest.raises(BackendUnavailable):
        fuse(ball(50), orbit(torch.zeros(3), torch.tensor([0.0, -1, 0]), 4.0, 20.0, 1, pinhole(40.0, 32, 32).float(), 32, 32))


def test_a_mesh_ply_opens_in_another_reader(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    write_surface(tmp_path / "m.ply", TETRAHEDRON)
    read = plyfile.PlyData.read(tmp_path / "m.ply")
    assert np.stack([read["vertex"][axis] for axis in "xyz"], axis=1).tolist() == TETRAHEDRON.vertices.tolist()
    assert np.stack(list(read["face"]["vertex_indices"])).tolist() == TETRAHEDRON.triangles.tolist() and read["vertex"]["green"].tolist() == [0, 0, 128, 0]


def test_a_mesh_glb_is_gltf_with_its_y_up_and_linear_colours(tmp_path):
    write_surface(tmp_path / "m.glb", TETRAHEDRON)
    data = (tmp_path / "m.glb").read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIIII", data)
    known = json.loads(data[20:20 + size])
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), 0x4E4F534A) and size % 4 == 0
    column = lambda i, dtype, width, count=16: np.frombuffer(data, dtype, count, 28 + size + known["bufferViews"][i]["byteOffset"]).reshape(-1, width)
    assert column(0, "<f4", 3, 12).tolist() == (TETRAHEDRON.vertices * [-1, -1, 1]).tolist()
    assert column(1, "<u2", 4)[:, 1].tolist() == [0, 0, round(((0.5 + 0.055) / 1.055) ** 2.4 * 65535), 0]
    assert column(2, "<u4", 3, 12).tolist() == TETRAHEDRON.triangles.tolist()


@pytest.mark.parametrize(("name", "surface", "why"), [("m.obj", TETRAHEDRON, "known: .ply, .glb"), ("m.ply", Surface(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3))), "no triangle")])
def test_what_is_no_mesh_is_not_written(tmp_path, name, surface, why):
    with pytest.raises(ValueError, match=why):
        write_surface(tmp_path / name, surface)
    assert not list(tmp_path.iterdir())
