"""Splat files in the page: its decoders against values that are known, against other readers' statistics, and against damage."""
import gzip
import json
import math
import re

import numpy as np
import pytest
import torch
from backends import random_scene
from browser import bundled, in_node
from mutants import mutants
from splat_files import C0, compressed_ply_bytes, ply_bytes, splat_bytes, spz_bytes

from splatkit import io
from splatkit.capture import SceneHeader
from splatkit.scene import Scene


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """decode([(name, bytes)], keep=True) -> ([report], peak bytes, [arrays]); arrays in the order of Scene's fields."""
    folder = tmp_path_factory.mktemp("formats")
    script = bundled("formats", folder)

    def decode(files, keep=True):
        (folder / "files.json").write_text(json.dumps([{"name": name, "size": len(data), "keep": keep} for name, data in files]))
        (folder / "in.bin").write_bytes(b"".join(data for _, data in files))
        done = in_node(script, folder / "files.json", folder / "in.bin", folder / "out.bin")
        data, at, arrays = (folder / "out.bin").read_bytes(), 0, []
        for r in done["report"] if keep else []:
            fields = {}
            if "count" in r:
                n, bands, f = r["count"], (r["degree"] + 1) ** 2, r["channels"]
                shapes = {"means": (n, 3), "quats": (n, 4), "log_scales": (n, 3), "logit_opacities": (n,), "sh": (n, bands, 3)}
                for name, shape in (shapes | ({"scale": (f,), "offset": (f,)} if f else {})).items():
                    fields[name] = np.frombuffer(data, "<f4", math.prod(shape), at).reshape(shape)
                    at += 4 * math.prod(shape)
                if f:
                    fields["features"] = np.frombuffer(data, np.int8, n * f, at).reshape(n, f) * fields["scale"] + fields["offset"]
                    at += n * f
            arrays.append(fields)
        assert at == len(data) or not keep
        return done["report"], done["peak"], arrays
    return decode


def small_scene(n=30, degree=3, channels=0, seed=0) -> Scene:
    return random_scene(n, seed, degree, channels, dtype=torch.float32)


def assert_same(fields, expected, tolerance=1e-5):
    for name, value in expected.items():
        value = np.asarray(value)
        assert fields[name].shape == value.shape, name
        worst = np.abs(fields[name] - value).max(initial=0) / max(1, np.abs(value).max(initial=0))
        assert worst <= tolerance, f"{name}: {worst:.3g}"


def fields_of(scene: Scene):
    return {name: value.numpy() for name, value in scene.fields().items()}


# ---- what files mean


def test_a_file_of_splatkit_comes_in_bit_for_bit_with_its_header(decoder, tmp_path):
    scene = small_scene()
    header = SceneHeader({"antialias": True, "near": 0.2, "fov_margin": math.inf}, (0.0, 0.6, -0.8), True, "plush", 700)
    io.save(tmp_path / "s.ply", scene, header)
    [r], _, [fields] = decoder([("s.ply", (tmp_path / "s.ply").read_bytes())])
    for name, value in fields_of(scene).items():
        assert (fields[name] == value).all(), name
    h = r["header"]
    assert (h["antialias"], h["near"], h["fov_margin"], h["up"], h["step"], h["name"]) == (True, 0.2, "Infinity", [0, 0.6, -0.8], 700, "plush")
    assert (h["blur_px2"], h["alpha_min"], h["alpha_max"], h["transmittance_min"]) == (0.3, 1 / 255, 0.99, 1e-4)


def test_features_come_in_to_half_a_step_of_8_bits(decoder, tmp_path):
    scene = small_scene(channels=5)
    io.save(tmp_path / "s.ply", scene)
    _, _, [fields] = decoder([("s.ply", (tmp_path / "s.ply").read_bytes())])
    assert (np.abs(fields["features"] - scene.features.numpy()) <= 0.501 * fields["scale"]).all()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_order_type_and_byte_order_of_properties_do_not_matter(decoder, degree):
    scene = small_scene(degree=degree)
    shuffled = [*"zyx", "opacity", *(f"rot_{i}" for i in (3, 0, 2, 1)), *(f"f_rest_{i}" for i in reversed(range(3 * (degree + 1) ** 2 - 3))), "f_dc_2", "f_dc_0", "f_dc_1",
                "scale_1", "scale_0", "scale_2"]
    files = [ply_bytes(scene), ply_bytes(scene, ">"), ply_bytes(scene, kind="double"), ply_bytes(scene, ">", kind="double", names=shuffled), ply_bytes(scene, names=shuffled),
             ply_bytes(scene, ascii=True, names=shuffled), ply_bytes(scene, ascii=True).replace(b"\n", b"\r\n"), ply_bytes(scene) + b"bytes that follow"]
    reports, _, all_fields = decoder([("s.ply", data) for data in files])
    for r, fields in zip(reports, all_fields):
        assert "count" in r, r
        for name, value in fields_of(scene).items():
            assert (fields[name] == value).all(), name


@pytest.mark.parametrize("lines, antialias", [([], False), (["comment SplatRenderMode: mip"], True), (["comment antialiased 1"], True),
                                              (["comment antialiased 1", "comment SplatRenderMode: default"], False)])
def test_the_antialias_words_of_other_programs_are_read(decoder, lines, antialias):
    [r], _, _ = decoder([("s.ply", ply_bytes(small_scene(2), extra=lines))])
    assert r["header"]["antialias"] is antialias


def test_an_empty_scene_is_what_a_file_says(decoder):
    scene = small_scene(0)
    reports, _, _ = decoder([("s.ply", ply_bytes(scene)), ("s.ply", ply_bytes(scene, ascii=True)), ("s.spz", spz_bytes(np.random.default_rng(0), 0)[0])])
    assert [r["count"] for r in reports] == [0, 0, 0]


def test_packed_formats_mean_what_their_descriptions_say(decoder):
    rng = np.random.default_rng(0)
    made = [("c.ply", *compressed_ply_bytes(rng, 300)), *[("c.compressed.ply", *compressed_ply_bytes(rng, n, rest)) for n, rest in ((1, 9), (256, 24), (257, 45))],
            ("s.splat", *splat_bytes(rng, 50)), *[("s.spz", *spz_bytes(rng, 40, degree, version)) for degree in range(4) for version in (2, 3)]]
    reports, _, all_fields = decoder([(name, data) for name, data, _ in made])
    for (_, _, expected), r, fields in zip(made, reports, all_fields):
        assert "count" in r and r["note"] is None, r
        assert_same(fields, expected)


def test_the_antialias_flag_of_spz_is_read(decoder):
    rng = np.random.default_rng(0)
    reports, _, _ = decoder([("s.spz", spz_bytes(rng, 3, flags=flags)[0]) for flags in (0, 1)])
    assert [r["header"]["antialias"] for r in reports] == [False, True]


REAL = ["guitar.compressed.ply", "playbot_lod4.ply", "playbot_lod4.v3.spz", "playbot_lod4.splat", "room_arkit.splat", "inria_100_trailing_bytes.ply", "cube_ascii.ply",
        "cube_v2.spz"]


def test_real_files_have_the_statistics_that_another_reader_finds(decoder, data_dir):
    expected = json.loads((data_dir / "splats" / "expected.json").read_text())
    reports, _, all_fields = decoder([(name, (data_dir / "splats" / name).read_bytes()) for name in REAL])
    for name, r, f in zip(REAL, reports, all_fields):
        e, opacity = expected[name], 1 / (1 + np.exp(-f["logit_opacities"].astype(float)))
        assert (r["count"], r["degree"]) == (e["count"], e["sh_degree"]), name
        found = {"xyz_min": f["means"].min(0), "xyz_max": f["means"].max(0), "xyz_mean": f["means"].mean(0, dtype=float), "opacity_mean": opacity.mean(),
                 "scale_median": np.exp(np.median(f["log_scales"].astype(float), axis=0)), "color_mean_rgb": 0.5 + C0 * f["sh"][:, 0].mean(0, dtype=float)}
        for key, value in found.items():
            assert np.abs(value - e[key]).max() <= (2e-3 if key == "opacity_mean" else 3e-5), f"{name} {key}: {value} {e[key]}"


def test_one_scene_in_two_real_formats_has_the_same_orientations_and_colours(decoder, data_dir):
    names = ["playbot_lod4.ply", "playbot_lod4.v3.spz"]
    _, _, (a, b) = decoder([(name, (data_dir / "splats" / name).read_bytes()) for name in names])
    unit = lambda q: q / np.linalg.norm(q, axis=1, keepdims=True)
    assert np.abs(a["means"] - b["means"]).max() < 1e-3     # in one order
    cosines = np.abs((unit(a["quats"]) * unit(b["quats"])).sum(1))
    assert np.quantile(cosines, 0.01) > 0.99999                             # 9 bits a component: 1e-3 rad
    assert np.abs(a["sh"][:, 1:] - b["sh"][:, 1:]).mean() < 0.03    # 5 and 4 bits
    assert np.corrcoef(a["sh"][:, 1:].ravel(), b["sh"][:, 1:].ravel())[0, 1] > 0.95


# ---- damage


def damaged(scene, change) -> bytes:
    f = {name: value.clone() for name, value in scene.fields().items()}
    change(f)
    return ply_bytes(Scene(**f))


def head(*lines, data=b"") -> bytes:
    return "\n".join(["ply", *lines, "end_header\n"]).encode() + data


GOOD = ply_bytes(small_scene(20))
PLAIN_SPZ = gzip.decompress(spz_bytes(np.random.default_rng(0), 20)[0])


def with_spz(at: int, value: bytes) -> bytes:
    return gzip.compress(PLAIN_SPZ[:at] + value + PLAIN_SPZ[at + len(value):])


KILLERS = {     # name -> file name, bytes, what the message says
    "empty ply": ("s.ply", b"", "empty"),
    "empty splat": ("s.splat", b"", "empty"),
    "empty spz": ("s.spz", b"", "empty"),
    "no suffix": ("scene", b"hello", "unknown format"),
    "sog": ("s.sog", b"PK\3\4rest", "unknown format .sog.*splatkit view"),
    "no end_header": ("s.ply", b"ply\n" + b"comment x\n" * 300_000, "no end_header"),
    "a header line of 2 MB": ("s.ply", b"ply\ncomment " + b"x" * 2_000_000 + b"\nend_header\n", "no end_header"),
    "2 GB claimed": ("s.ply", GOOD.replace(b"vertex 20", b"vertex 8650000"), "ends early.*2[0-9]{9} bytes"),
    "count of 20 digits": ("s.ply", GOOD.replace(b"vertex 20", b"vertex 1" + b"0" * 20), "line 3"),
    "count below 0": ("s.ply", GOOD.replace(b"vertex 20", b"vertex -1"), "line 3"),
    "count with no properties": ("s.ply", head("format ascii 1.0", "element vertex 900000000000000"), "no property x"),
    "a byte short": ("s.ply", GOOD[:-1], "ends early"),
    "f_rest with a gap": ("s.ply", GOOD.replace(b"f_rest_44", b"f_rest_99"), "no f_rest_44"),
    "44 f_rest": ("s.ply", GOOD.replace(b"property float f_rest_44\n", b"property float other\n"), "44 properties"),
    "twice": ("s.ply", GOOD.replace(b"float f_dc_1", b"float f_dc_0"), "declared twice"),
    "no opacity": ("s.ply", GOOD.replace(b"float opacity", b"float opaque"), "no property opacity"),
    "a list": ("s.ply", GOOD.replace(b"float opacity", b"list uchar int opacity"), "list"),
    "a list before": ("s.ply", GOOD.replace(b"element vertex", b"element face 1\nproperty list uchar int i\nelement vertex") + b"\0", "list property and stands before"),
    "unknown type": ("s.ply", GOOD.replace(b"float opacity", b"quad opacity"), "not a PLY header line"),
    "no format": ("s.ply", GOOD.replace(b"format binary_little_endian 1.0\n", b""), "no format"),
    "ascii cut in a number": ("s.ply", ply_bytes(small_scene(3), ascii=True)[:-3], "line end|ends early|row of"),
    "ascii with a word": ("s.ply", ply_bytes(small_scene(3), ascii=True).replace(b"\n", b"\nx ", 64).replace(b"\nx ", b"\n", 63), "numbers expected|not a number"),
    "half are NaN": ("s.ply", damaged(small_scene(), lambda f: f["means"][::2].fill_(math.nan)), "15 of 30.*NaN"),
    "settings": ("s.ply", ply_bytes(small_scene(3), extra=['comment splatkit {"settings": {"near": -1}}']), "near > 0"),
    "header not JSON": ("s.ply", ply_bytes(small_scene(3), extra=["comment splatkit {near}"]), "not JSON"),
    "control characters": ("s.ply", GOOD.replace(b"float opacity", b"float\x1b[31m o\x07pacity"), "not a PLY header line: property float"),
    "compressed without chunks": ("c.ply", compressed_ply_bytes(np.random.default_rng(0), 3)[0].replace(b"element chunk", b"element lumps"), "no element chunk"),
    "compressed with too few chunks": ("c.ply", compressed_ply_bytes(np.random.default_rng(0), 3)[0].replace(b"chunk 1", b"chunk 0"), "0 chunks for 3"),
    "compressed with other types": ("c.ply", compressed_ply_bytes(np.random.default_rng(0), 3)[0].replace(b"uint packed_color", b"float packed_color"), "element vertex"),
    "splat cut": ("s.splat", bytes(100), "not a whole number"),
    "splat of NaN": ("s.splat", b"\xff" * 320, "10 of 10.*NaN"),
    "spz 4": ("s.spz", b"NGSP\4\0\0\0" + bytes(24), "version 4.*convert"),
    "spz of something else": ("s.spz", gzip.compress(b"hello" * 9), "something else"),
    "spz cut": ("s.spz", spz_bytes(np.random.default_rng(0), 20)[0][:-9], "damaged or cut"),
    "spz degree": ("s.spz", with_spz(12, b"\4"), "degree 4"),
    "spz bits": ("s.spz", with_spz(13, b"\xc0"), "192 fractional bits"),
    "spz version": ("s.spz", with_spz(4, b"\1"), "version 1"),
    "spz count": ("s.spz", with_spz(8, b"\xff\xff\xff\xff"), "4294967295 Gaussians cannot be"),
    "spz a few more": ("s.spz", with_spz(8, b"\x19"), "ends early"),
    "spz a few less": ("s.spz", with_spz(8, b"\x10"), "more follow"),
    "spz bomb": ("s.spz", gzip.compress(PLAIN_SPZ + bytes(40_000_000), 1), "more follow"),
}


def test_hostile_files_are_refused_in_one_line_and_little_memory(decoder):
    reports, peak, _ = decoder([(name, data) for name, data, _ in KILLERS.values()], keep=False)
    for (kind, (name, _, text)), r in zip(KILLERS.items(), reports):
        assert "bad" in r, f"{kind}: {r}"
        assert r["bad"].startswith(f"{name}: ") and len(r["bad"]) <= 400 and r["bad"].isprintable(), r
        assert re.search(text, r["bad"]), f"{kind}: {r['bad']}"
        assert r["seconds"] < 2, f"{kind}: {r}"
    assert peak < (64 << 20) + 4 * 3_000_000


def test_a_few_rows_that_are_not_finite_are_left_out_and_counted(decoder):
    scene = small_scene()
    data = damaged(scene, lambda f: (f["means"][3].fill_(math.nan), f["sh"][7, 2].fill_(math.inf)))
    [r], _, [fields] = decoder([("s.ply", data)])
    kept = [i for i in range(30) if i not in (3, 7)]
    assert "2 of 30" in r["note"] and (fields["means"] == scene.means[kept].numpy()).all() and (fields["sh"] == scene.sh[kept].numpy()).all()


def test_a_row_whose_features_are_not_finite_is_left_out(decoder, tmp_path):
    scene = small_scene(channels=3)
    io.save(tmp_path / "s.ply", scene)
    data = (tmp_path / "s.ply").read_bytes()[:-4] + np.float32(np.nan).tobytes()      # the last number is the last row's last feature
    [r], _, [fields] = decoder([("s.ply", data)])
    assert "1 of 30" in r["note"] and (np.abs(fields["features"] - scene.features[:29].numpy()) <= 0.501 * fields["scale"]).all()


@pytest.mark.parametrize("kind", ["ply", "ascii", "compressed", "splat", "spz2", "spz3"])
def test_a_file_cut_anywhere_is_refused(decoder, kind):
    name, data = original(kind)
    cuts = range(0, len(data), max(1, len(data) // 150))
    reports, _, _ = decoder([(name, data[:cut]) for cut in cuts], keep=False)
    for cut, r in zip(cuts, reports):
        assert "bad" in r or kind == "splat" and cut % 32 == 0 and cut, f"{cut}: {r}"       # .splat has no header that could tell


def original(kind):
    rng = np.random.default_rng(1)
    return {"ply": ("s.ply", ply_bytes(small_scene(12))), "ascii": ("s.ply", ply_bytes(small_scene(12, 1), ascii=True)), "compressed": ("c.ply", compressed_ply_bytes(rng, 20, 24)[0]),
            "splat": ("s.splat", splat_bytes(rng, 20)[0]), "spz2": ("s.spz", spz_bytes(rng, 20, 1)[0]), "spz3": ("s.spz", spz_bytes(rng, 20, 2, 3)[0])}[kind]


@pytest.mark.parametrize("kind", ["ply", "ascii", "compressed", "splat", "spz2", "spz3"])
def test_2000_mutants_end_in_a_finite_scene_or_in_one_line(decoder, kind):
    name, data = original(kind)
    files = [(name, mutant) for mutant in mutants(data, 2000, seed=5)]
    if kind.startswith("spz"):      # damage behind the packing, which its checksum would find at once
        files[1000:] = [(name, gzip.compress(mutant, 1)) for mutant in mutants(gzip.decompress(data), 1000, seed=6)]
    reports, peak, _ = decoder(files, keep=False)
    for number, r in enumerate(reports):
        assert "other" not in r, f"{kind} mutant {number}: {r}"
        assert r.get("whole", True) and r["seconds"] < 2, f"{kind} mutant {number}: {r}"
        assert "bad" not in r or r["bad"].isprintable() and len(r["bad"]) <= 400
    refused = sum("bad" in r for r in reports)
    assert 0 < refused < 2000 and peak < 64 << 20
