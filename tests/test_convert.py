"""splatkit info and convert: every pair of formats, scenes that pass block by block, and what is changed on the way."""
import dataclasses
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import small_scene
from test_formats import NAMES, differences, trained

from splatkit import io
from splatkit.capture import SceneHeader
from splatkit.cli import main
from splatkit.convert import Changes, convert, describe
from splatkit.errors import BadFile
from splatkit.io import formats, ply, splat
from splatkit.scene import Scene

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("source", NAMES)
def test_every_format_becomes_every_other(tmp_path, source):
    (tmp_path / "in").mkdir()
    io.save(tmp_path / "in" / source, trained(60, 1))
    for target in NAMES:
        out = tmp_path / target.replace("meta.json", "out") / target
        out.parent.mkdir(exist_ok=True)
        assert convert(tmp_path / "in" / source, out) == 60
        scene, _ = io.load(out)
        assert (len(scene), scene.sh_degree) == (60, min(formats.of_name(source).sh_degree, formats.of_name(target).sh_degree, 1))


@pytest.mark.parametrize("name", ["guitar.compressed.ply", "monkey.sog", "playbot_lod4_sog", "playbot_lod4.v4.spz", "playbot_lod4.c0.sh2.ksplat", "playbot_lod4.splat", "cube_ascii.ply"])
def test_real_files_convert_and_are_described(data_dir, tmp_path, name, capsys):
    assert main(["convert", str(data_dir / "splats" / name), str(tmp_path / "s.spz")]) == 0
    assert main(["info", str(data_dir / "splats" / name)]) == 0
    said = capsys.readouterr().out
    assert f"{len(io.load(tmp_path / 's.spz')[0]):,} Gaussians" in said and f"SH degree {io.load(tmp_path / 's.spz')[0].sh_degree}" in said


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(ply, "STREAM_ROWS", 70)
    monkeypatch.setattr(ply, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(splat, "ROWS_AT_ONCE", 70)


def whole(monkeypatch):
    """The same table without streams."""
    monkeypatch.setattr(formats, "FORMATS", tuple(dataclasses.replace(f, read_stream=None, write_stream=None) for f in formats.FORMATS))


CHANGES = {
    "nothing": Changes(), "filters": Changes(filters=("opacity > 0.3", "scale<=0.1")), "crop": Changes(crop=(-2, -2, -2, 2, 2, 3)), "degree": Changes(sh_degree=1),
    "most": Changes(max_gaussians=77), "all": Changes(sh_degree=2, max_gaussians=50, crop=(-3, -3, -3, 3, 3, 3), filters=("opacity>=0.1",), scale=2.0, rotate=(10, 20, 30), shift=(1, 2, 3)),
    "more than there are": Changes(max_gaussians=10**6),
}


@pytest.mark.parametrize("target", ["s.ply", "s.splat"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_scene_that_passes_in_blocks_is_the_scene_changed_whole(tmp_path, monkeypatch, small_blocks, change, target):
    header = SceneHeader(settings={"near": 0.5}, up=(0.0, -0.6, 0.8), metric=True, source="x")
    io.save(tmp_path / "in.ply", trained(300, 3, features=2), header)
    (tmp_path / "a").mkdir()
    lines = {}
    counts = [convert(tmp_path / "in.ply", tmp_path / "a" / target, CHANGES[change], lines.setdefault("blocks", []).append)]
    whole(monkeypatch)
    counts.append(convert(tmp_path / "in.ply", tmp_path / target, CHANGES[change], lines.setdefault("whole", []).append))
    assert counts[0] == counts[1] > 0 and [x.replace("/a/", "/") for x in lines["blocks"]] == lines["whole"]
    a, b = io.load(tmp_path / "a" / target), io.load(tmp_path / target)
    assert a[1] == b[1]
    for name, value in a[0].fields().items():
        np.testing.assert_allclose(value, b[0].fields()[name], atol=1e-5, err_msg=name)


def test_a_ply_that_is_only_copied_is_the_file_that_save_writes(tmp_path, small_blocks):
    io.save(tmp_path / "a.ply", trained(300, 2, features=3), SceneHeader(source="x"))
    convert(tmp_path / "a.ply", tmp_path / "b.ply")
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    convert(tmp_path / "a.ply", tmp_path / "a.ply", Changes(filters=("opacity>0.5",)))     # in its own place
    assert 0 < len(io.load(tmp_path / "a.ply")[0]) < 300


def test_rows_that_are_not_finite_are_counted_once_in_a_stream_too(tmp_path, small_blocks):
    io.save(tmp_path / "a.ply", trained(300, 0))
    data = bytearray((tmp_path / "a.ply").read_bytes())
    data[-68:-64] = np.float32(np.nan).tobytes()        # x of the last row
    (tmp_path / "a.ply").write_bytes(data)
    lines = []
    assert convert(tmp_path / "a.ply", tmp_path / "b.ply", Changes(max_gaussians=299), lines.append) == 299
    assert len(lines) == 1 and "1 of 300" in lines[0]
    data[-68 * 40:] = b"\xff" * 68 * 40
    (tmp_path / "a.ply").write_bytes(data)
    with pytest.raises(BadFile, match="vertex 260: 40 of 300"):
        convert(tmp_path / "a.ply", tmp_path / "b.ply")
    assert len(io.load(tmp_path / "b.ply")[0]) == 299       # the old file stays


def test_a_large_ply_passes_in_little_memory(tmp_path):
    n = 100_000
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g)
    io.save(tmp_path / "a.ply", Scene(r(n, 3), r(n, 4), r(n, 3), r(n), r(n, 16, 3)))
    tracemalloc.start()
    try:
        convert(tmp_path / "a.ply", tmp_path / "b.ply", Changes(filters=("opacity>0.5",), max_gaussians=40_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(io.load(tmp_path / "b.ply")[0]) == 40_000 and (tmp_path / "a.ply").stat().st_size > 24e6
    assert peak < 60e6      # blocks of 32,768 rows in several copies, and 4 bytes a row


def test_turning_is_that_of_the_scene_with_its_sh_and_up(tmp_path):
    scene = trained(200, 3)
    io.save(tmp_path / "a.ply", scene, SceneHeader(up=(0.0, -1.0, 0.0), metric=True, settings={"near": 0.1}))
    convert(tmp_path / "a.ply", tmp_path / "b.ply", Changes(rotate=(90, 0, 0), scale=3.0, shift=(1, 0, 0)))
    read, header = io.load(tmp_path / "b.ply")
    x90 = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    assert max(differences(scene.transformed(3.0, x90, torch.tensor([1.0, 0, 0])), read).values()) < 1e-4
    assert header.up == pytest.approx((0, 0, -1)) and header.settings["near"] == pytest.approx(0.3) and not header.metric


def test_turning_around_x_y_and_z_is_done_in_that_order():
    matrix = Changes(rotate=(90, 90, 0)).matrix
    np.testing.assert_allclose(matrix[:3, :3] @ [0, 1, 0], [1, 0, 0], atol=1e-12)      # around x to z, around y to x
    np.testing.assert_allclose(Changes(rotate=(0, 0, 90)).matrix[:3, :3] @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_crop_and_filters_keep_what_they_say(tmp_path):
    scene = trained(500, 0)
    io.save(tmp_path / "a.ply", scene)
    convert(tmp_path / "a.ply", tmp_path / "b.spz", Changes(crop=(-1, -2, -3, 1, 2, 3), filters=("opacity>=0.5", "scale<0.05")))
    inside = (scene.means.abs() <= torch.tensor([1.0, 2, 3])).all(1) & (torch.sigmoid(scene.logit_opacities) >= 0.5) & (scene.scales.amax(1) < 0.05)
    assert len(io.load(tmp_path / "b.spz")[0]) == int(inside.sum()) > 0


def test_the_most_visible_are_kept_in_their_order(tmp_path):
    scene = trained(500, 0)
    io.save(tmp_path / "a.ply", scene)
    convert(tmp_path / "a.ply", tmp_path / "b.ply", Changes(max_gaussians=40))
    area = scene.log_scales.sort(dim=1).values[:, 1:].sum(1).exp() * torch.sigmoid(scene.logit_opacities)
    kept = area.topk(40).indices.sort().values
    assert torch.equal(io.load(tmp_path / "b.ply")[0].means, scene.means[kept])


@pytest.mark.parametrize(("arguments", "why"), [
    (["--filter", "colour>1"], "expected one of opacity, scale, x, y, z"), (["--filter", "opacity>1e"], "expected one of opacity"),
    (["--crop", "0", "0", "0", "0", "1", "1"], "the lowest x y z"), (["--scale", "0"], "a scale above 0"), (["--sh-degree", "4"], "expected 0 to 3"),
    (["--max-gaussians", "0"], "1 or more"), (["--filter", "opacity>2"], "leave none"), (["--shift", "1e39", "0", "0"], "range of float32"),
    (["--spz-version", "3"], "PLY has no option version")])
def test_what_cannot_be_done_is_one_line_and_leaves_the_old_file(tmp_path, capsys, arguments, why):
    io.save(tmp_path / "a.ply", small_scene(5, 0))
    (tmp_path / "b.ply").write_bytes(b"old")
    assert main(["convert", str(tmp_path / "a.ply"), str(tmp_path / "b.ply"), *arguments]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1 and (tmp_path / "b.ply").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ply", "b.ply"]


def test_info_says_how_a_scene_is_drawn_and_what_it_carries(tmp_path):
    io.save(tmp_path / "scene.ply", small_scene(20, 1, 7), SceneHeader(settings={"antialias": True, "near": 0.5}, up=(0.0, 0.0, 1.0), source="photos of \x1b[31m", step=30_000))
    said = describe(tmp_path)       # a run folder
    for part in ("20, SH degree 1", "7 channels", "antialiased", "near 0.5", "0  0  1", "from photos of ?[31m, 30,000 steps", "PLY, 0.00 MB"):
        assert part in said, said
    assert said.replace("\n", "").isprintable()
    io.save(tmp_path / "scene.ply", small_scene(0))
    assert "Gaussians   0" in describe(tmp_path)


def test_info_numbers_are_those_of_the_scene(tmp_path):
    scene = Scene(torch.tensor([[0.0, 1, 2], [4, 5, 6]]), torch.tensor([[1.0, 0, 0, 0]] * 2), torch.full((2, 3), math.log(0.5)), torch.tensor([0.0, 0.0]), torch.zeros(2, 1, 3))
    io.save(tmp_path / "s.ply", scene)
    said = describe(tmp_path / "s.ply")
    for line in ("lowest      0  1  2", "highest     4  5  6", "mean        2  3  4", "median 0.5  0.5  0.5, largest 0.5", "mean 0.5000, median 0.5000; 0.0 % below", "colour      mean 0.5  0.5  0.5"):
        assert line in said, said


@pytest.mark.parametrize("verb", ["info", "convert"])
def test_neither_verb_waits_for_torch(tmp_path, verb):
    io.save(tmp_path / "s.spz", small_scene(20))
    check = "import sys\nfrom splatkit.cli import main\ncode = main(sys.argv[1:])\nprint(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check, verb, str(tmp_path / "s.spz"), *([str(tmp_path / "o.ply")] if verb == "convert" else [])], capture_output=True, text=True,
                          cwd=REPO, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
