"""Scene files of every format: what real ones hold, what a format keeps of a scene, and what travels with it."""
import gzip
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from fuzzing import small_scene
from splat_files import C0, compressed_ply_bytes, splat_bytes, spz_bytes

from splatkit import io
from splatkit.capture import SceneHeader
from splatkit.errors import BadFile
from splatkit.io import codebook, formats, packing
from splatkit.scene import Scene, unit_quats

NAMES = ["s.ply", "s.compressed.ply", "s.splat", "s.spz", "s.ksplat", "s.sog", "meta.json", "s.glb", "s.gltf", "s.safetensors"]
EXPECTED = ["guitar.compressed.ply", "monkey.sog", "playbot_lod4_sog", "playbot_lod4.ply", "playbot_lod4.v4.spz", "playbot_lod4.v3.spz", "playbot_lod4.c0.sh2.ksplat",
            "playbot_lod4.c1.sh1.ksplat", "playbot_lod4.splat", "room_arkit.splat", "inria_100_trailing_bytes.ply", "cube_ascii.ply", "cube_v2.spz"]


def trained(n=300, degree=3, features=None, seed=0) -> Scene:
    """Numbers in the ranges of trained scenes, the extremes of opacity among them."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    sh = 0.15 * r(n, (degree + 1) ** 2, 3)
    sh[:, 0] *= 8
    logits = 4 * r(n)
    logits[:2] = torch.tensor([30.0, -30.0])
    return Scene(2 * r(n, 3), r(n, 4), -4 + r(n, 3), logits, sh, None if features is None else r(n, features))


def differences(a: Scene, b: Scene) -> dict[str, float]:
    """The largest difference of each kind between scenes of the same Gaussians in any order; rotations in radians, opacities as they are drawn."""
    b = b.rows(torch.cdist(a.means, b.means, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1))
    k = min(a.sh.shape[1], b.sh.shape[1])
    p, q = unit_quats(a.quats.double()), unit_quats(b.quats.double())
    halves = torch.minimum((p - q).norm(dim=1), (p + q).norm(dim=1)) / 2
    largest = lambda x: float(x.abs().max())
    return {"means": largest(a.means - b.means), "angle": 4 * math.asin(float(halves.max())), "log_scales": largest(a.log_scales - b.log_scales),
            "opacity": largest(torch.sigmoid(a.logit_opacities) - torch.sigmoid(b.logit_opacities)), "colour": C0 * largest(a.sh[:, 0] - b.sh[:, 0]),
            "sh": largest(a.sh[:, 1:k] - b.sh[:, 1:k]) if k > 1 else 0.0}


# Real files


@pytest.mark.parametrize("name", EXPECTED)
def test_real_files_have_the_statistics_that_an_independent_reader_found(data_dir, name):
    expected = json.loads((data_dir / "splats" / "expected.json").read_text())[name]
    scene, _ = io.load(data_dir / "splats" / name, report=pytest.fail)
    assert (len(scene), scene.sh_degree) == (expected["count"], expected["sh_degree"])
    found = {"xyz_min": scene.means.amin(0), "xyz_max": scene.means.amax(0), "xyz_mean": scene.means.double().mean(0),
             "opacity_mean": torch.sigmoid(scene.logit_opacities.double()).mean(), "scale_median": np.median(scene.log_scales.double().exp(), axis=0),
             "color_mean_rgb": (0.5 + C0 * scene.sh[:, 0].double()).mean(0)}
    for key, value in found.items():
        digits = 4 if key == "opacity_mean" else 5      # as expected.json rounds them
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=1.01 * 10**-digits, err_msg=key)


@pytest.mark.parametrize(("name", "limits"), {      # what each format rounds to; the colours of .splat and .ksplat were rounded down by their writers and clipped to 0 .. 1
    "playbot_lod4_sog": {"means": 0, "angle": 1e-6, "log_scales": 0, "opacity": 1e-6, "colour": 0, "sh": 0},
    "playbot_lod4.v4.spz": {"means": 1.3e-4, "angle": 5e-3, "log_scales": 0.0313, "opacity": 1e-6, "colour": 0.0037, "sh": 0.07},
    "playbot_lod4.v3.spz": {"means": 1.3e-4, "angle": 5e-3, "log_scales": 0.0313, "opacity": 1e-6, "colour": 0.0037, "sh": 0.07},
    "playbot_lod4.c0.sh2.ksplat": {"means": 0, "angle": 1e-6, "log_scales": 1e-6, "opacity": 0.0040},
    "playbot_lod4.c1.sh1.ksplat": {"means": 8e-5, "angle": 2e-3, "log_scales": 1e-3, "opacity": 0.0040, "sh": 1e-3},
    "playbot_lod4.splat": {"means": 0, "angle": 0.03, "log_scales": 1e-6, "opacity": 0.0040},
}.items())
def test_one_scene_in_every_format_is_the_same_within_its_rounding(data_dir, name, limits):
    scene, _ = io.load(data_dir / "splats" / "playbot_lod4.ply")
    some = scene.rows(torch.arange(0, len(scene), 7)).clone()
    if name.endswith("spz"):        # what goes beyond is cut off
        some.sh[:, 1:].clamp_(-1, 1)
        some.sh[:, 0].clamp_(-0.5 / 0.15, 0.5 / 0.15)
    found = differences(some, io.load(data_dir / "splats" / name)[0])
    assert all(found[key] <= limit for key, limit in limits.items()), str(found)


@pytest.mark.parametrize("seed", [0, 1])
def test_packed_formats_mean_what_their_descriptions_say(tmp_path, seed):
    rng = np.random.default_rng(seed)
    made = [("c.compressed.ply", *compressed_ply_bytes(rng, n, rest)) for n, rest in ((1, 9), (256, 24), (300, 0), (70_000 if seed else 257, 45))]
    made += [("s.splat", *splat_bytes(rng, 50)), *[("s.spz", *spz_bytes(rng, 40, degree, version)) for degree in range(4) for version in (2, 3)]]
    for name, data, expected in made:
        (tmp_path / name).write_bytes(data)
        scene, _ = io.load(tmp_path / name, report=pytest.fail)
        for field, value in expected.items():
            np.testing.assert_allclose(scene.fields()[field], value, rtol=1e-5, atol=1e-5 * max(1, np.abs(value).max()), err_msg=f"{name} {field}")


# What is written


LIMITS = {     # of trained(): positions reach 8, log scales -8 to 0, SH 0.7
    "s.ply": dict.fromkeys(("means", "log_scales", "opacity", "colour", "sh"), 0.0),
    "s.safetensors": dict.fromkeys(("means", "log_scales", "opacity", "colour", "sh"), 0.0),
    "s.glb": {"means": 0.0, "angle": 1e-6, "log_scales": 2e-6, "opacity": 1e-6, "colour": 0.0, "sh": 0.0},
    "s.gltf": {"means": 0.0, "angle": 1e-6, "log_scales": 2e-6, "opacity": 1e-6, "colour": 0.0, "sh": 0.0},
    "s.compressed.ply": {"means": 0.008, "angle": 4e-3, "log_scales": 5e-3, "opacity": 0.002, "colour": 0.005, "sh": 0.0313},
    "s.splat": {"means": 0.0, "angle": 0.02, "log_scales": 1e-6, "opacity": 0.002},
    "s.spz": {"means": 1.23e-4, "angle": 5e-3, "log_scales": 0.0313, "opacity": 0.002, "sh": 0.0626},
    "s.ksplat": {"means": 4e-5, "angle": 2e-3, "log_scales": 5e-3, "opacity": 0.002, "sh": 5e-4},
    "s.sog": {"means": 3.5e-4, "angle": 0.02, "log_scales": 0.1, "opacity": 0.002, "sh": 0.05},
    "meta.json": {"means": 3.5e-4, "angle": 0.02, "log_scales": 0.1, "opacity": 0.002, "sh": 0.05},
}


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_scene_comes_back_within_the_format_s_rounding(tmp_path, name, degree):
    scene, lines = trained(300, degree), []
    io.save(tmp_path / name, scene, report=lines.append)
    read, _ = io.load(tmp_path / name, report=pytest.fail)
    held = min(degree, formats.of_name(name).sh_degree)
    assert (len(read), read.sh_degree) == (300, held) and read.logit_opacities.isfinite().all()
    assert [f"SH above degree {held}" in line for line in lines] == ([True] if held < degree else [])
    found = differences(scene, read)
    assert all(found[key] <= limit for key, limit in LIMITS[name].items()), str(found)


@pytest.mark.parametrize("name", ["s.ply", "s.safetensors"])
def test_lossless_formats_keep_every_bit_features_and_header(tmp_path, name):
    scene = trained(50, 2, features=5)
    header = SceneHeader(settings={"antialias": True, "blur_px2": 0.1, "fov_margin": math.inf}, up=(0.0, -0.6, 0.8), metric=True, source="Zoë", step=7)
    io.save(tmp_path / name, scene, header, report=pytest.fail)
    read, found = io.load(tmp_path / name)
    assert found == header
    for field, value in scene.fields().items():
        assert torch.equal(value.view(torch.int32), read.fields()[field].view(torch.int32)), field


@pytest.mark.parametrize(("name", "options"), [("s.spz", {"version": 2}), ("s.spz", {"version": 4}), ("s.ksplat", {"level": 0}), ("s.ksplat", {"level": 2})])
def test_other_versions_of_a_format_can_be_asked_for(tmp_path, name, options):
    scene = trained(300, 2)
    io.save(tmp_path / name, scene, **options)
    read, _ = io.load(tmp_path / name)
    found = differences(scene, read)      # of version 2, w is what x, y and z in 8 bits leave
    assert found["means"] < 2e-4 and found["angle"] < (0.2 if options == {"version": 2} else 0.02) and found["log_scales"] < 0.04 and found["sh"] < 0.07, found
    with pytest.raises(ValueError, match="can be written"):
        io.save(tmp_path / name, scene, **dict.fromkeys(options, 9))
    with pytest.raises(ValueError, match="PLY has no option"):
        io.save(tmp_path / "s.ply", scene, **options)


def test_what_an_spz_says_is_written_again_without_further_loss(tmp_path):
    io.save(tmp_path / "a.spz", trained())
    first, _ = io.load(tmp_path / "a.spz")
    io.save(tmp_path / "b.spz", first)
    second, _ = io.load(tmp_path / "b.spz")
    for field in ("means", "log_scales", "logit_opacities", "sh"):
        assert torch.equal(first.fields()[field], second.fields()[field]), field


@pytest.mark.parametrize("extent", [1e-3, 1.0, 3000.0, 4e6])
def test_spz_takes_positions_of_any_extent_to_a_thousandth_of_a_percent(tmp_path, extent):
    scene = trained()
    scene = scene.replace(means=scene.means * (extent / 8))
    io.save(tmp_path / "s.spz", scene)
    assert (io.load(tmp_path / "s.spz")[0].means - scene.means).abs().max() <= max(2e-5 * extent, 2 ** -25)
    with pytest.raises(ValueError, match="does not fit"):
        io.save(tmp_path / "s.spz", scene.replace(means=scene.means * 1e12))


def test_a_ksplat_of_crowded_and_lonely_cells_keeps_every_gaussian(tmp_path):
    scene = trained(2000, 0)
    spread = torch.where(torch.arange(2000)[:, None] < 1500, scene.means * 0.1, scene.means * 100)
    io.save(tmp_path / "s.ksplat", scene.replace(means=spread))
    read, _ = io.load(tmp_path / "s.ksplat")
    assert len(read) == 2000 and differences(scene.replace(means=spread), read)["means"] < 1e-4


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("s.splat", "s.sog", "meta.json")])
def test_an_empty_scene_comes_back_empty(tmp_path, name):
    io.save(tmp_path / name, small_scene(0))
    assert len(io.load(tmp_path / name)[0]) == 0


@pytest.mark.parametrize("name", ["s.splat", "s.sog"])
def test_a_format_that_cannot_say_empty_refuses_to(tmp_path, name):
    with pytest.raises(ValueError, match="no Gaussians|0 Gaussians"):
        io.save(tmp_path / name, small_scene(0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_one_gaussian_with_extreme_values_stays_finite(tmp_path, name):
    scene = Scene(torch.tensor([[1e3, -1e3, 0.0]]), torch.zeros(1, 4), torch.tensor([[-200.0, 200.0, 0.0]]), torch.tensor([1e30]), torch.full((1, 4, 3), 1e6))
    io.save(tmp_path / name, scene)
    read, _ = io.load(tmp_path / name, report=pytest.fail)
    assert len(read) == 1 and abs(float(read.means[0, 0]) - 1e3) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_how_a_scene_is_drawn_travels_or_is_said_to_be_lost(tmp_path, name):
    lines, header = [], SceneHeader(settings={"antialias": True, "near": 0.5}, up=(0.0, -0.6, 0.8))
    io.save(tmp_path / name, small_scene(5, 0, 2), header, report=lines.append)
    form, (_, found) = formats.of_name(name), io.load(tmp_path / name)
    assert found.settings.get("antialias", False) is form.antialias
    said = " ".join(lines)
    assert ("near" in said and "up" in said) is not form.header and ("features" in said) is not form.features and ("antialias" in said) is not form.antialias
    if form.header:
        assert found == header


def test_8_bit_opacities_0_and_255_are_half_a_step_inside(tmp_path):
    data, _ = splat_bytes(np.random.default_rng(0), 2)
    data = bytearray(data)
    data[27], data[59] = 0, 255
    (tmp_path / "s.splat").write_bytes(data)
    logit = math.log(254.5 / 0.5)
    assert io.load(tmp_path / "s.splat")[0].logit_opacities.tolist() == pytest.approx([-logit, logit])


def test_a_scale_of_0_is_finite(tmp_path):
    data, _ = splat_bytes(np.random.default_rng(0), 2)
    (tmp_path / "s.splat").write_bytes(data[:12] + bytes(12) + data[24:])
    assert io.load(tmp_path / "s.splat", report=pytest.fail)[0].log_scales[0].tolist() == [-30] * 3


def test_the_first_bytes_and_not_the_name_say_what_a_file_is(tmp_path):
    scene = small_scene(5, 0)
    for name, other in [("s.ply", "a.spz"), ("s.spz", "b.ply"), ("s.sog", "c"), ("s.glb", "d.splat"), ("s.compressed.ply", "e.ply")]:
        io.save(tmp_path / name, scene)
        assert len(io.load((tmp_path / name).rename(tmp_path / other))[0]) == 5


def test_a_sog_folder_is_opened_by_its_name_or_its_meta_json(tmp_path):
    io.save(tmp_path / "meta.json", small_scene(5))
    assert len(io.load(tmp_path)[0]) == len(io.load(tmp_path / "meta.json")[0]) == 5


# glTF


def gltf(path, change) -> None:
    """A .gltf with its JSON changed."""
    io.save(path, small_scene(5, 1))
    known = json.loads(path.read_text())
    change(known)
    path.write_text(json.dumps(known))


def test_gltf_nodes_move_and_turn_a_scene(tmp_path):
    s = math.sin(math.pi / 6)
    path = tmp_path / "s.gltf"
    gltf(path, lambda g: g.update(nodes=[{"children": [1], "scale": [2, 2, 2]}, {"mesh": 0, "translation": [1, 2, 3], "rotation": [0, s, 0, math.cos(math.pi / 6)]}]))
    half = torch.tensor(math.pi / 3)
    turn_y = torch.tensor([[half.cos(), 0, half.sin()], [0, 1, 0], [-half.sin(), 0, half.cos()]])
    flip = torch.diag(torch.tensor([-1.0, -1, 1]))
    expected = small_scene(5, 1).transformed(2.0, flip @ turn_y @ flip, flip @ torch.tensor([2.0, 4, 6]))
    found = differences(io.load(path)[0], expected)
    assert max(found.values()) < 2e-3 and found["means"] < 1e-5 and found["sh"] < 1e-5, found


def test_gltf_lies_half_a_turn_around_z_from_the_ply_form(tmp_path):
    io.save(tmp_path / "s.gltf", small_scene(1, 0))
    known = json.loads((tmp_path / "s.gltf").read_text())
    x, y, z = small_scene(1, 0).means[0].tolist()
    assert known["accessors"][0]["min"] == pytest.approx([-x, -y, z])


@pytest.mark.parametrize(("change", "why"), [
    (lambda g: g["nodes"][0].update(scale=[1, 2, 1]), "stretches"), (lambda g: g["nodes"][0].update(scale=[-1, 1, 1]), "mirrors"),
    (lambda g: g["nodes"][0].update(children=[0]), "hold one another"), (lambda g: g["buffers"][0].update(uri="../s.bin"), "beside this one"),
    (lambda g: g["buffers"][0].update(uri="/etc/passwd"), "beside this one"), (lambda g: g["bufferViews"][2].update(byteStride=0), "do not fit"),
    (lambda g: g["accessors"][1].update(count=10**12), "do not fit"), (lambda g: g["accessors"][1].update(count=4), "4 rows beside 5"),
    (lambda g: g["accessors"][1].update(sparse={}), "sparse"), (lambda g: g["meshes"][0]["primitives"][0].pop("extensions"), "not a Gaussian splat scene"),
    (lambda g: g["meshes"][0]["primitives"][0]["extensions"]["KHR_gaussian_splatting"].update(colorSpace="lin_rec709_display"), "colour space"),
    (lambda g: g["meshes"][0]["primitives"][0]["extensions"]["KHR_gaussian_splatting"].update(extensions={"X_packed": {}}), "extended by"),
    (lambda g: g["meshes"][0]["primitives"][0]["attributes"].pop("KHR_gaussian_splatting:SCALE"), "no entry None"),
    (lambda g: g["nodes"][0].update(translation=[0, 0, math.nan]), "NaN is not a number")])
def test_gltf_that_cannot_be_used_says_where_and_why(tmp_path, change, why):
    gltf(tmp_path / "s.gltf", change)
    with pytest.raises(BadFile, match=why):
        io.load(tmp_path / "s.gltf")


# Parts


def test_a_codebook_of_few_numbers_is_exact_and_of_many_halves_the_error_of_even_steps():
    few = np.array([3.0, -1, 3, 7], np.float32)
    codes, index = codebook.numbers(few)
    assert (codes[index] == few).all()
    many = np.random.default_rng(0).normal(size=20_000).astype(np.float32) ** 3
    codes, index = codebook.numbers(many)
    even = (many.max() - many.min()) / 255
    assert np.sqrt(np.mean((codes[index] - many) ** 2)) < even / math.sqrt(12) / 2


def test_k_means_in_two_levels_finds_clusters_and_keeps_its_size():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 9)).astype(np.float32) * 10
    rows = (centres[rng.integers(0, 40, 5000)] + 0.01 * rng.normal(size=(5000, 9))).astype(np.float32)
    found, label = codebook.vectors(rows, 512)
    assert len(found) <= 512 and label.shape == (5000,) and np.abs(found[label] - rows).max() < 0.1


def test_quaternions_without_their_largest_component_come_back():
    q = packing.unit_quats(np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32))
    back = packing.with_largest(*packing.without_largest(q))
    assert np.abs(np.abs((q * back).sum(1)) - 1).max() < 1e-6


def test_the_morton_order_puts_neighbours_beside_each_other():
    means = np.random.default_rng(0).uniform(size=(4096, 3)).astype(np.float32)
    steps = np.linalg.norm(np.diff(means[packing.morton_order(means)], axis=0), axis=1)
    assert steps.mean() < 0.15 * np.linalg.norm(np.diff(means, axis=0), axis=1).mean()


def test_a_sog_is_smaller_than_its_ply_by_far_and_holds_only_its_pictures(tmp_path):
    io.save(tmp_path / "s.sog", trained(3000))
    io.save(tmp_path / "s.ply", trained(3000))
    assert (tmp_path / "s.sog").stat().st_size < (tmp_path / "s.ply").stat().st_size / 4
    assert {i.filename for i in zipfile.ZipFile(tmp_path / "s.sog").infolist()} == {
        "meta.json", *(f"{n}.webp" for n in ("means_l", "means_u", "quats", "scales", "sh0", "shN_centroids", "shN_labels"))}


def test_spz_4_and_3_hold_the_same_numbers(tmp_path):
    for version in (3, 4):
        io.save(tmp_path / f"{version}.spz", trained(), version=version)
    a, b = (io.load(tmp_path / f"{version}.spz")[0] for version in (3, 4))
    assert all(torch.equal(x, b.fields()[field]) for field, x in a.fields().items())
    assert gzip.decompress((tmp_path / "3.spz").read_bytes())[:4] == (tmp_path / "4.spz").read_bytes()[:4] == b"NGSP"
