"""Scenes in PLY files: what is written, what is read, what is refused, and that a file is never left half written."""
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import mutants

from splatkit import io
from splatkit.capture import SceneHeader
from splatkit.errors import BadFile
from splatkit.io import atomic, ply
from splatkit.scene import Scene

HEADER = SceneHeader(settings={"antialias": True, "blur_px2": 0.1, "fov_margin": math.inf}, up=(0.0, -0.6, 0.8), metric=True,
                     source="photos of Zoë\nend_header {}", step=30_000)


def random_scene(n=50, degree=3, features=None, seed=0) -> Scene:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    return Scene(r(n, 3), r(n, 4), r(n, 3), r(n), r(n, (degree + 1) ** 2, 3), None if features is None else r(n, features))


def assert_same_bits(a: Scene, b: Scene):
    assert a.fields().keys() == b.fields().keys()
    for name, value in a.fields().items():
        assert torch.equal(value.view(torch.int32), b.fields()[name].view(torch.int32)), name


def refused(path, data: bytes, why: str) -> BadFile:
    path.write_bytes(data)
    with pytest.raises(BadFile, match=why) as error:
        io.load(path)
    return error.value


# What is written

@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("features", [None, 5])
def test_float32_scenes_come_back_bit_for_bit(tmp_path, degree, features):
    scene = random_scene(40_000 if degree == 1 else 50, degree, features)       # more rows than are written at once
    io.save(tmp_path / "s.ply", scene, HEADER)
    read, header = io.load(tmp_path / "s.ply", report=pytest.fail)
    assert_same_bits(scene, read)
    assert header == HEADER


def test_extreme_finite_values_come_back_bit_for_bit(tmp_path):
    values = torch.tensor([-0.0, 1e-45, -1e-38, 3.4028235e38, 0.1, -1.0])
    column = values[:, None]
    scene = Scene(column.expand(6, 3), column.expand(6, 4), column.expand(6, 3), values, column[:, None].expand(6, 4, 3))
    io.save(tmp_path / "s.ply", scene)
    assert_same_bits(scene.clone(), io.load(tmp_path / "s.ply")[0])


def test_an_empty_scene_comes_back_empty(tmp_path):
    io.save(tmp_path / "s.ply", random_scene(0, 2))
    read, header = io.load(tmp_path / "s.ply")
    assert len(read) == 0 and read.sh_degree == 2 and header == SceneHeader()


def test_the_layout_is_inrias_f_rest_all_red_then_green_then_blue(tmp_path):
    scene = random_scene(3, 1)
    io.save(tmp_path / "s.ply", scene)
    head, _, body = (tmp_path / "s.ply").read_bytes().partition(b"end_header\n")
    names = [line.split()[2].decode() for line in head.split(b"\n") if line.startswith(b"property")]
    assert names == ("x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 f_rest_0 f_rest_1 f_rest_2 f_rest_3 f_rest_4 f_rest_5 f_rest_6 f_rest_7 f_rest_8 "
                     "opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3").split()
    row = dict(zip(names, struct.unpack("<26f", body[104:208])))
    assert row["f_rest_2"] == scene.sh[1, 3, 0] and row["f_rest_3"] == scene.sh[1, 1, 1] and row["f_rest_6"] == scene.sh[1, 1, 2]
    assert (row["rot_0"], row["rot_3"], row["nx"], row["opacity"]) == (scene.quats[1, 0], scene.quats[1, 3], 0, scene.logit_opacities[1])


def test_an_independent_reader_finds_the_same_numbers(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    scene = random_scene(features=2)
    io.save(tmp_path / "s.ply", scene, HEADER)
    vertex = plyfile.PlyData.read(tmp_path / "s.ply")["vertex"]
    np.testing.assert_array_equal(np.stack([vertex[c] for c in "xyz"], axis=1), scene.means)
    np.testing.assert_array_equal(vertex["f_rest_20"], scene.sh[:, 6, 1])
    np.testing.assert_array_equal(vertex["scale_1"], scene.log_scales[:, 1])
    np.testing.assert_array_equal(vertex["feat_1"], scene.features[:, 1])


def test_the_header_is_one_comment_of_strict_json_and_marks_antialiased_scenes_for_other_viewers(tmp_path):
    io.save(tmp_path / "s.ply", random_scene(1), HEADER)
    lines = (tmp_path / "s.ply").read_bytes().split(b"\n")
    text, = (line for line in lines if line.startswith(b"comment splatkit "))
    assert json.loads(text[17:], parse_constant=pytest.fail)["source"] == HEADER.source
    assert b"comment SplatRenderMode: mip" in lines
    io.save(tmp_path / "s.ply", random_scene(1))
    assert b"SplatRenderMode" not in (tmp_path / "s.ply").read_bytes()


def test_values_that_are_not_finite_are_not_written_and_the_old_file_stays(tmp_path):
    io.save(tmp_path / "s.ply", random_scene(3))
    old = (tmp_path / "s.ply").read_bytes()
    bad = random_scene(3)
    bad.log_scales[2, 0] = -math.inf
    with pytest.raises(ValueError, match="log_scales is not finite in row 2"):
        io.save(tmp_path / "s.ply", bad)
    assert (tmp_path / "s.ply").read_bytes() == old


@pytest.mark.parametrize("header", [SceneHeader(step=-1), SceneHeader(up=(0.0, math.nan, 1.0)), SceneHeader(settings={"near": -math.inf})])
def test_a_header_that_could_not_be_read_back_is_not_written(tmp_path, header):
    with pytest.raises(ValueError):
        io.save(tmp_path / "s.ply", random_scene(1), header)
    assert not list(tmp_path.iterdir())


def test_more_channels_than_the_header_can_name_are_refused(tmp_path):
    io.save(tmp_path / "s.ply", random_scene(1, features=2000))
    assert io.load(tmp_path / "s.ply")[0].features.shape == (1, 2000)
    with pytest.raises(ValueError, match="header would take"):
        io.save(tmp_path / "s.ply", random_scene(1, features=4000))


def test_an_unknown_suffix_lists_the_known_ones(tmp_path):
    for act in (lambda: io.save(tmp_path / "s.obj", random_scene(1)), lambda: io.load(tmp_path / "s.obj")):
        with pytest.raises(ValueError, match=r"'\.obj'; known: \.ply"):
            act()


# What is read

TYPES = {"float": "f", "double": "d", "float32": "f", "short": "h", "int": "i", "uchar": "B"}


def written_by_hand(columns: dict[str, list], types: dict[str, str], encoding="binary_little_endian", newline="\n") -> bytes:
    """A PLY made one number at a time: the second implementation that the reader is checked against."""
    n = len(columns["x"])
    lines = ["ply", f"format {encoding} 1.0", "comment by hand", f"element vertex {n}"]
    lines += [*(f"property {types[k]} {k}" for k in columns), "end_header"]
    out = "".join(line + newline for line in lines).encode()
    for i in range(n):
        if encoding == "ascii":
            out += (" ".join(repr(v[i]) for v in columns.values()) + newline).encode()
        else:
            order = "<" if "little" in encoding else ">"
            out += b"".join(struct.pack(order + TYPES[types[k]], v[i]) for k, v in columns.items())
    return out


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_degree_type_and_encoding_reads_the_same(tmp_path_factory, data):
    degree = data.draw(st.integers(0, 3))
    scene = random_scene(4, degree, data.draw(st.sampled_from([None, 3])))
    whole = data.draw(st.sampled_from(["x", "f_dc_1", "rot_0", "opacity", None]))
    columns = {name: scene.means[:, i] for i, name in enumerate("xyz")} | {"opacity": scene.logit_opacities}
    columns |= {f"scale_{i}": scene.log_scales[:, i] for i in range(3)} | {f"rot_{i}": scene.quats[:, i] for i in range(4)}
    columns |= {f"f_dc_{c}": scene.sh[:, 0, c] for c in range(3)}
    rest = (degree + 1) ** 2 - 1
    columns |= {f"f_rest_{c * rest + k}": scene.sh[:, 1 + k, c] for c in range(3) for k in range(rest)}
    if scene.features is not None:
        columns |= {f"feat_{i}": scene.features[:, i] for i in range(3)}
    if data.draw(st.booleans()):
        columns |= {name: torch.zeros(4) for name in ("nx", "ny", "nz")}
    if whole:       # one column of small whole numbers, so that it may have any type
        columns[whole].copy_(torch.arange(4))
    names = data.draw(st.permutations(list(columns)))
    types = {k: data.draw(st.sampled_from(list(TYPES) if k == whole else ["float", "double", "float32"])) for k in names}
    values = {k: [int(v) if types[k] in ("short", "int", "uchar") else v for v in columns[k].tolist()] for k in names}
    encoding = data.draw(st.sampled_from(["ascii", "binary_little_endian", "binary_big_endian"]))
    path = tmp_path_factory.mktemp("ply") / "s.ply"
    path.write_bytes(written_by_hand(values, types, encoding, data.draw(st.sampled_from(["\n", "\r\n"]))))
    assert_same_bits(scene, io.load(path)[0])


MINIMAL = "x y z f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()


def minimal(n=2, encoding="binary_little_endian", extra=(), **changed) -> bytes:
    columns = {k: [0.5 + i for i in range(n)] for k in (*MINIMAL, *extra)} | changed
    return written_by_hand(columns, dict.fromkeys(columns, "float"), encoding)


def test_other_elements_and_bytes_after_the_data_are_skipped(tmp_path):
    plain = minimal()
    before = plain.replace(b"element vertex", b"element chunk 2\nproperty uchar a\nproperty double b\nelement vertex")
    head, end, body = before.partition(b"end_header\n")
    after = head + b"element face 1\nproperty list uchar int vertex_indices\n" + end + b"\1" * 18 + body + b"\3" + b"\0" * 12 + b"tail"
    (tmp_path / "a.ply").write_bytes(plain)
    (tmp_path / "b.ply").write_bytes(after)
    assert_same_bits(io.load(tmp_path / "a.ply")[0], io.load(tmp_path / "b.ply")[0])
    text = minimal(encoding="ascii").replace(b"element vertex", b"element chunk 2\nproperty list uchar int a\nelement vertex")
    (tmp_path / "c.ply").write_bytes(text.replace(b"end_header\n", b"end_header\n0\n3 1 2 3\n") + b"trailing words\n")
    assert_same_bits(io.load(tmp_path / "a.ply")[0], io.load(tmp_path / "c.ply")[0])


@pytest.mark.parametrize(("comments", "antialias"), [
    ("", False), ("comment SplatRenderMode: mip\n", True), ("comment splatrendermode: MIP\n", True), ("comment antialiased 1\n", True),
    ("comment SplatRenderMode: default\n", False), ("comment antialiased 1\ncomment SplatRenderMode: default\n", False),
    ('comment SplatRenderMode: mip\ncomment splatkit {"step": 3, "later": [1]}\n', False)])
def test_the_marks_of_other_programs_for_antialiased_scenes_are_understood_but_our_own_wins(tmp_path, comments, antialias):
    (tmp_path / "s.ply").write_bytes(minimal().replace(b"comment by hand\n", comments.encode()))
    assert io.load(tmp_path / "s.ply")[1].settings == ({"antialias": True} if antialias else {})


def test_rows_that_are_not_finite_are_dropped_and_counted_up_to_a_tenth(tmp_path):
    path, lines = tmp_path / "s.ply", []
    values = [float(i) for i in range(20)]
    path.write_bytes(minimal(20, x=[math.nan, *values[1:]], rot_3=[*values[:19], math.inf]))
    scene, _ = io.load(path, lines.append)
    assert scene.means[:, 0].tolist() == values[1:19] and len(lines) == 1 and "2 of 20" in lines[0]
    refused(path, minimal(20, x=[math.nan] * 3 + values[3:]), "vertex 0: 3 of 20")
    refused(path, minimal(1, opacity=[math.inf]), "1 of 1")


def test_a_double_beyond_float32_is_a_row_that_is_not_finite(tmp_path):
    columns = {k: [1.0] * 10 for k in MINIMAL} | {"y": [1e300] + [1.0] * 9}
    (tmp_path / "s.ply").write_bytes(written_by_hand(columns, dict.fromkeys(columns, "double")))
    assert len(io.load(tmp_path / "s.ply")[0]) == 9


# What is refused

@pytest.mark.parametrize(("old", "new", "why"), [
    (b"ply\n", b"pla\n", "not a PLY"), (b"1.0", b"2.0", "line 2: not a PLY header line"), (b"end_header", b"end_head", "no end_header"),
    (b"binary_little", b"binary_middle", "line 2"), (b"format binary_little_endian 1.0\n", b"", "no format line"),
    (b"vertex 2", b"points 2", "no element vertex"), (b"vertex 2", b"vertex -2", "line 4"), (b"vertex 2", b"vertex 2.0", "line 4"),
    (b"vertex 2", b"vertex 3", "ends early"), (b"vertex 2", b"vertex 461168601842738790", "ends early"),
    (b"vertex 2", b"vertex 4611686018427387904", "line 4"),
    (b"element vertex", b"element vertex 2\nproperty float x\nelement vertex", "declared twice"),
    (b"element vertex", b"element face 0\nproperty list uchar int i\nelement vertex", "stands before vertex"),
    (b"float x", b"float w", "no property x"), (b"float y", b"float x", "line 6: property 'x' is declared twice"),
    (b"float x", b"list uchar float x", "list property"), (b"float x", b"string x", "line 5"),
    (b"float opacity", b"float f_rest_0", "no property opacity"), (b"float rot_3", b"float rot_4", "no property rot_3"),
    (b"float z", b"float z\nproperty float f_rest_0", "1 properties f_rest"),
    (b"float z", b"float z\nproperty float f_rest_3", "no f_rest_0"),
    (b"float z", b"float z\nproperty float feat_1", "no feat_0"), (b"by hand", b"x" * 2**21, "no end_header"),
    (b"by hand", b"splatkit {]", "comment splatkit"), (b"by hand", b"splatkit {" + b"[" * 60000, "comment splatkit"),
    (b"by hand", b'splatkit {"settings": {"near": "x"}}', "near: 'x'"), (b"by hand", b'splatkit {"up": [1, 2]}', "up: "),
    (b"by hand", b'splatkit {"step": 1e3}', "step: ")])
def test_a_header_that_cannot_be_used_says_where_and_why(tmp_path, old, new, why):
    assert old in minimal()
    assert refused(tmp_path / "s.ply", minimal().replace(old, new, 1), why).path == tmp_path / "s.ply"


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian"])
def test_a_file_cut_anywhere_is_refused(tmp_path, encoding):
    whole = minimal(encoding=encoding, extra=[f"f_rest_{i}" for i in range(9)])
    for size in {*range(0, len(whole), 7), len(whole) - 1}:
        refused(tmp_path / "s.ply", whole[:size], "ends early|no end_header|empty|not a PLY|cut|vertex data")


@pytest.mark.parametrize(("old", "new", "why"), [
    (b"0.5 0.5", b"0.5 zero", "not a table"), (b"0.5 0.5", b"0.5", "vertex data"), (b"1.5 1.5", b"\n", "vertex data"),
    (b"0.5 0.5", b"0.5 0x1", "not a table")])
def test_ascii_data_that_is_no_table_of_numbers_is_refused(tmp_path, old, new, why):
    refused(tmp_path / "s.ply", minimal(encoding="ascii").replace(old, new, 1), why)


@pytest.mark.parametrize("where", ["absent.ply", "folder.ply"])
def test_a_missing_file_and_a_folder_are_bad_files(tmp_path, where):
    (tmp_path / "folder.ply").mkdir()
    with pytest.raises(BadFile, match="no such file|not a regular file"):
        io.load(tmp_path / where)


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "ours"])
def test_mutants_give_a_finite_scene_or_bad_file_and_nothing_else(tmp_path, encoding):
    path, taken = tmp_path / "s.ply", 0
    io.save(path, random_scene(12, 1, 1), HEADER)
    original = path.read_bytes() if encoding == "ours" else minimal(12, encoding)
    for damaged in mutants(original, 300):
        path.write_bytes(damaged)
        try:
            scene, _ = io.load(path)
        except BadFile as e:
            assert str(e).isprintable()
            continue
        scene.check_finite()
        assert len(scene) or b"vertex 0" in damaged
        taken += 1
    assert 20 < taken < 270


# A file is whole

def test_a_full_disk_leaves_the_old_file_whole_and_no_other(tmp_path):
    io.save(tmp_path / "s.ply", random_scene(10))
    old = (tmp_path / "s.ply").read_bytes()
    program = textwrap.dedent("""
        import resource, sys, torch
        from splatkit import io
        from splatkit.scene import Scene
        n = 5000
        scene = Scene(torch.zeros(n, 3), torch.zeros(n, 4), torch.zeros(n, 3), torch.zeros(n), torch.zeros(n, 16, 3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            io.save(sys.argv[1], scene)
        except OSError as e:
            print(e.filename)
    """)
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "s.ply"], capture_output=True, text=True, timeout=100)
    assert (done.stdout.strip(), done.returncode) == (str(tmp_path / "s.ply"), 0), done.stderr
    assert (tmp_path / "s.ply").read_bytes() == old and os.listdir(tmp_path) == ["s.ply"]


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_stops_at_any_step_leaves_the_old_file_whole_and_no_other(tmp_path, monkeypatch, step, error):
    (tmp_path / "f").write_bytes(b"old")

    def fail(*args):
        raise error
    if step != "write":
        monkeypatch.setattr(atomic.os, step, fail)
    with pytest.raises(type(error)), atomic.replacing(tmp_path / "f") as file:
        file.write(b"new" * 9999)
        if step == "write":
            fail()
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_a_process_killed_while_it_saves_leaves_the_old_file_whole(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    program = textwrap.dedent("""
        import os, runpy, signal, sys
        with runpy.run_path(sys.argv[1])["replacing"](sys.argv[2]) as file:
            file.write(b"new" * 9999)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", program, atomic.__file__, tmp_path / "f"], capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "f").read_bytes() == b"old"


def test_a_link_keeps_its_place_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic.replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("where", ["no/such/folder/f", "folder", "pipe"])
def test_a_place_that_cannot_take_a_file_is_named_in_an_os_error(tmp_path, where):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError) as error, atomic.replacing(tmp_path / where):
        pytest.fail("opened")
    assert error.value.filename == str(tmp_path / where)


def test_a_rewrite_in_one_block_of_rows_or_many_gives_the_same_bytes(tmp_path, monkeypatch):
    scene = random_scene(100, 2, 3)
    io.save(tmp_path / "a.ply", scene)
    monkeypatch.setattr(ply, "ROWS_AT_ONCE", 7)
    io.save(tmp_path / "b.ply", scene)
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    assert_same_bits(scene, io.load(tmp_path / "b.ply")[0])
