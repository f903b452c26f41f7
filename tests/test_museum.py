"""Scene files that kill readers: every one is refused in one line that names the place and the reason, soon and in little memory."""
import gzip
import io as bytes_io
import json
import math
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from fuzzing import BYTES_MAX, SECONDS_MAX, seconds_of_own, small_scene
from PIL import Image

from splatkit import io
from splatkit.errors import BadFile

N = 20


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    made = {}
    for name, options in [("s.ply", {}), ("s.compressed.ply", {}), ("s.splat", {}), ("3.spz", {"version": 3}), ("4.spz", {"version": 4}), ("0.ksplat", {"level": 0}),
                          ("1.ksplat", {"level": 1}), ("s.sog", {}), ("s.glb", {}), ("s.safetensors", {})]:
        io.save(folder / name, small_scene(N, 1), **options)
        made[name] = (folder / name).read_bytes()
    made["raw.spz"] = gzip.decompress(made["3.spz"])
    return made


def put(name, at, value):
    """Bytes in place of others; `name` is of the good file."""
    return lambda g: g[name][:at] + value + g[name][at + len(value):]


def swap(name, old, new, count=1):
    def change(g):
        assert old in g[name], old
        return g[name].replace(old, new, count)
    return change


def raw_spz(at, value):
    return lambda g: gzip.compress(g["raw.spz"][:at] + value + g["raw.spz"][at + len(value):])


def ply(*lines, data=b""):
    return lambda g: "\n".join(["ply", *lines, "end_header\n"]).encode() + data


def sog(change, **entries):
    """A good .sog with its meta.json changed and entries replaced; None leaves one out."""
    def made(g):
        old = zipfile.ZipFile(bytes_io.BytesIO(g["s.sog"]))
        files = {i.filename: old.read(i) for i in old.infolist()}
        meta = json.loads(files["meta.json"])
        change(meta)
        files["meta.json"] = json.dumps(meta).encode()
        files |= {f"{name}.webp": data for name, data in entries.items()}
        out = bytes_io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in files.items():
                if data is not None:
                    archive.writestr(name, data)
        return out.getvalue()
    return made


def webp(width, height, **options):
    out = bytes_io.BytesIO()
    Image.new("RGBA", (width, height)).save(out, "WEBP", lossless=True, **options)
    return out.getvalue()


def bomb(size):
    """A deflated entry that unpacks to `size` zeros."""
    def made(g):
        out = bytes_io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("meta.json", bytes(size))
        return out.getvalue()
    return made


def glb(change):
    def made(g):
        data = g["s.glb"]
        size, = struct.unpack_from("<I", data, 12)
        known = json.loads(data[20:20 + size])
        change(known)
        text = json.dumps(known).encode()
        text += b" " * (-len(text) % 4)
        return struct.pack("<4sIIII", b"glTF", 2, 12 + 8 + len(text) + len(data) - 20 - size, len(text), 0x4E4F534A) + text + data[20 + size:]
    return made


def tensors(change):
    def made(g):
        data = g["s.safetensors"]
        size, = struct.unpack_from("<Q", data)
        known = json.loads(data[8:8 + size])
        change(known)
        text = json.dumps(known).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size:]
    return made


def zstd_lie(g):
    """A stream that holds more than its table says."""
    import zstandard
    data = g["4.spz"]
    table = list(struct.unpack_from("<12Q", data, 32))
    streams, at = [], 32 + 96
    for packed in table[::2]:
        streams.append(data[at:at + packed])
        at += packed
    streams[0] = zstandard.compress(bytes(50_000_000))
    table[0] = len(streams[0])
    return data[:32] + struct.pack("<12Q", *table) + b"".join(streams)


KSPLAT = lambda at, value, name="1.ksplat": put(name, at, value)
U4 = lambda x: struct.pack("<I", x)
F4 = lambda x: struct.pack("<f", x)
nothing = lambda g: None

MUSEUM = {      # what it is: file name, how it is made of the good files, what the message says
    "an empty PLY": ("s.ply", lambda g: b"", "empty"),
    "an empty .splat": ("s.splat", lambda g: b"", "byte 0: the file is empty"),
    "an empty SPZ": ("s.spz", lambda g: b"", "empty"),
    "an empty KSPLAT": ("s.ksplat", lambda g: b"", "ends early"),
    "an empty SOG": ("s.sog", lambda g: b"", "ends early"),
    "an empty GLB": ("s.glb", lambda g: b"", "not JSON"),
    "an empty safetensors": ("s.safetensors", lambda g: b"", "ends early"),
    "a PLY header that never ends": ("s.ply", lambda g: b"ply\n" + b"comment x\n" * 300_000, "no end_header"),
    "a PLY header line of 2 MB": ("s.ply", lambda g: b"ply\ncomment " + b"x" * 2_000_000 + b"\nend_header\n", "no end_header"),
    "a PLY cut inside its header": ("s.ply", lambda g: g["s.ply"][:300], "no end_header"),
    "a PLY of 2^31 vertices": ("s.ply", swap("s.ply", b"vertex 20", b"vertex 2147483648"), "ends early.*bytes of data"),
    "a PLY of 10^20 vertices": ("s.ply", swap("s.ply", b"vertex 20", b"vertex 1" + b"0" * 20), "line 4"),
    "a PLY of -1 vertices": ("s.ply", swap("s.ply", b"vertex 20", b"vertex -1"), "line 4"),
    "a PLY with an f_rest outside the range": ("s.ply", swap("s.ply", b"f_rest_8", b"f_rest_99999"), "no f_rest_8"),
    "a PLY with an f_rest index of 300 digits": ("s.ply", swap("s.ply", b"f_rest_8", b"f_rest_" + b"9" * 300), "no f_rest_8"),
    "a PLY one byte short": ("s.ply", lambda g: g["s.ply"][:-1], "byte [0-9]+: the file ends early"),
    "a PLY with a list": ("s.ply", swap("s.ply", b"float opacity", b"list uchar int opacity"), "list property"),
    "a PLY of NaN": ("s.ply", lambda g: g["s.ply"][:-100 * 4] + b"\xff" * 400, "of 20 Gaussians hold a NaN"),
    "a PLY whose settings are not JSON": ("s.ply", swap("s.ply", b'comment splatkit {', b'comment splatkit {{'), "comment splatkit: "),
    "a PLY whose JSON is 30,000 deep": ("s.ply", swap("s.ply", b"comment splatkit {", b"comment splatkit {" + b'"a":[' * 6000), "comment splatkit: "),
    "an ASCII PLY with one number of 300 digits too few": ("s.ply", ply("format ascii 1.0", "element vertex 1", *(f"property float {n}" for n in (
        "x y z f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3").split()), data=b"9" * 300 + b" 1" * 12 + b"\n"), "vertex data"),
    "an ASCII PLY of vertices without properties": ("s.ply", ply("format ascii 1.0", "element vertex 900000000000000"), "no property x"),
    "control characters in a PLY": ("s.ply", swap("s.ply", b"float opacity", b"float\x1b[31m o\x07pacity"), "not a PLY header line"),
    "a compressed PLY without chunks": ("s.compressed.ply", swap("s.compressed.ply", b"element chunk", b"element lumps"), "no element chunk"),
    "a compressed PLY with too few chunks": ("s.compressed.ply", swap("s.compressed.ply", b"chunk 1", b"chunk 0"), "0 chunks for 20"),
    "a compressed PLY with other types": ("s.compressed.ply", swap("s.compressed.ply", b"uint packed_color", b"float packed_color"), "element vertex"),
    "a compressed PLY with ranges of NaN": ("s.compressed.ply", lambda g: g["s.compressed.ply"].partition(b"end_header\n")[0] + b"end_header\n" + b"\xff" * 72
                                            + g["s.compressed.ply"].partition(b"end_header\n")[2][72:], "20 of 20"),
    "a compressed PLY with too few SH rows": ("s.compressed.ply", swap("s.compressed.ply", b"element sh 20", b"element sh 19"), "19 rows for 20"),
    "a .splat with a partial record": ("s.splat", lambda g: g["s.splat"][:100], "byte 100: .*not a whole number"),
    "a .splat of NaN": ("s.splat", lambda g: b"\xff" * 320, "Gaussian 0: 10 of 10"),
    "a .splat of negative scales": ("s.splat", lambda g: (bytes(12) + struct.pack("<3f", -1, -1, -1) + bytes(8)) * 10, "10 of 10"),
    "an SPZ of something else": ("s.spz", lambda g: gzip.compress(b"hello" * 9), "something else"),
    "an SPZ cut": ("s.spz", lambda g: g["3.spz"][:-9], "byte [0-9]+: .*damaged or cut"),
    "an SPZ with a wrong checksum": ("s.spz", lambda g: g["3.spz"][:-8] + b"\0" * 8, "damaged or cut"),
    "an SPZ of degree 4": ("s.spz", raw_spz(12, b"\4"), "degree 4"),
    "an SPZ that shifts by 192 bits": ("s.spz", raw_spz(13, b"\xc0"), "192 fractional bits"),
    "an SPZ of version 1": ("s.spz", raw_spz(4, b"\1"), "version 1"),
    "an SPZ of 2^32 - 1 Gaussians": ("s.spz", raw_spz(8, b"\xff\xff\xff\xff"), "4294967295 Gaussians cannot be"),
    "an SPZ of a few more": ("s.spz", raw_spz(8, b"\x19"), "ends early"),
    "an SPZ of a few less": ("s.spz", raw_spz(8, b"\x10"), "more follow"),
    "a gzip bomb": ("s.spz", lambda g: gzip.compress(g["raw.spz"] + bytes(100_000_000), 1), "more follow"),
    "a gzip bomb of one long header name": ("s.spz", lambda g: b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * 3_000_000, "damaged or cut|ends early"),
    "an SPZ 4 of 2^32 - 1 Gaussians": ("s.spz", put("4.spz", 8, b"\xff\xff\xff\xff"), "claims [0-9]+ bytes"),
    "an SPZ 4 with its table outside": ("s.spz", put("4.spz", 16, b"\xff\xff\xff\x7f"), "table of streams"),
    "an SPZ 4 with 200 streams": ("s.spz", put("4.spz", 15, b"\xc8"), "200 streams; 6 expected"),
    "an SPZ 4 with a stream of 2^63 bytes": ("s.spz", put("4.spz", 32, struct.pack("<Q", 2**63)), "not where the file ends"),
    "an SPZ 4 with another unpacked size": ("s.spz", put("4.spz", 40, struct.pack("<Q", 2**40)), "1099511627776 bytes; 180 expected"),
    "a Zstandard bomb": ("s.spz", zstd_lie, "found more"),
    "an SPZ in other axes": ("s.spz", lambda g: gzip.compress(g["raw.spz"][:14] + b"\2" + g["raw.spz"][15:] + struct.pack("<III", 0xADBE0003, 4, 6)), "axes of its own"),
    "a KSPLAT of level 7": ("s.ksplat", KSPLAT(20, b"\7"), "compression level 7"),
    "a KSPLAT of 2^32 - 1 sections": ("s.ksplat", KSPLAT(4, b"\xff\xff\xff\xff"), "ends early"),
    "a KSPLAT of 2^32 - 1 Gaussians in a section": ("s.ksplat", KSPLAT(4096 + 4, b"\xff\xff\xff\xff"), "ends early"),
    "a KSPLAT of 2^32 - 1 full buckets": ("s.ksplat", KSPLAT(4096 + 32, b"\xff\xff\xff\xff"), "section 0: .*buckets"),
    "a KSPLAT whose buckets hold more": ("s.ksplat", lambda g: g["1.ksplat"][:5120] + U4(2**32 - 1) + g["1.ksplat"][5124:], "its buckets hold"),
    "a KSPLAT with a block of NaN": ("s.ksplat", KSPLAT(4096 + 16, F4(math.nan)), "section 0"),
    "a KSPLAT of degree 9": ("s.ksplat", KSPLAT(4096 + 40, b"\x09"), "SH degree 9"),
    "a KSPLAT of NaN": ("s.ksplat", lambda g: g["0.ksplat"][:5120] + b"\xff" * (len(g["0.ksplat"]) - 5120), "20 of 20"),
    "a KSPLAT that counts otherwise than its sections": ("s.ksplat", KSPLAT(12, U4(19)), "19 Gaussians, but the sections hold 20"),
    "a zip without its directory": ("s.sog", lambda g: g["s.sog"][:-30], "zip: the directory"),
    "a zip bomb": ("s.sog", bomb(300_000_000), "claims 300000000 bytes"),
    "a SOG whose meta.json is no JSON": ("s.sog", lambda g: bomb(1000)(g), "meta.json: not JSON"),
    "a SOG of version 1": ("s.sog", sog(lambda m: m.pop("version")), "version: None"),
    "a SOG with NaN in meta.json": ("s.sog", sog(lambda m: m["means"].update(mins=[math.nan] * 3)), "NaN is not a number"),
    "a SOG that climbs out": ("s.sog", sog(lambda m: m["quats"].update(files=["../quats.webp"])), "name of a .webp beside it"),
    "a SOG of 10^12 Gaussians": ("s.sog", sog(lambda m: m.update(count=10**12)), "count: 1000000000000"),
    "a SOG of 2^27 Gaussians": ("s.sog", sog(lambda m: m.update(count=2**27)), "claims"),
    "a SOG of true Gaussians": ("s.sog", sog(lambda m: m.update(count=True)), "count: True"),
    "a SOG with a picture of 16383 x 16383": ("s.sog", sog(lambda m: None, quats=webp(8, 8)[:21] + (16382 | 16382 << 14).to_bytes(4, "little") + webp(8, 8)[25:]), "16383x16383|268402689 pixels"),
    "a SOG with a picture too small": ("s.sog", sog(lambda m: None, quats=webp(4, 4)), "a picture of 4x4"),
    "a SOG with a PNG": ("s.sog", sog(lambda m: None, quats=b"\x89PNG\r\n\x1a\n" + bytes(50)), "entry quats.webp: not a WebP"),
    "a SOG without a picture": ("s.sog", sog(lambda m: None, quats=None), "entry quats.webp: is not in the file"),
    "a SOG with a codebook of text": ("s.sog", sog(lambda m: m["scales"].update(codebook="x" * 256)), "scales.codebook: expected"),
    "a SOG with a codebook of 10^400": ("s.sog", sog(lambda m: m["scales"].update(codebook=[10**400] * 256)), "scales.codebook: expected"),
    "a SOG with labels beyond its vectors": ("s.sog", sog(lambda m: m["shN"].update(count=1)), "label [0-9]+ of 1"),
    "a GLB of version 1": ("s.glb", put("s.glb", 4, U4(1)), "GLB version 1"),
    "a GLB with 4 GB of JSON": ("s.glb", put("s.glb", 12, U4(2**32 - 1)), "ends early"),
    "a GLB whose JSON is 100,000 deep": ("s.glb", lambda g: struct.pack("<4sIIII", b"glTF", 2, 100_020, 100_000, 0x4E4F534A) + b"[" * 100_000, "JSON: not JSON"),
    "a GLB of 10^15 Gaussians": ("s.glb", glb(lambda k: [a.update(count=10**15) for a in k["accessors"]]), "do not fit"),
    "a GLB whose Gaussians all lie in one byte": ("s.glb", glb(lambda k: [a.update(count=10**9) for a in k["accessors"]] + [v.update(byteStride=0) for v in k["bufferViews"]]), "do not fit"),
    "a GLB of nodes in nodes": ("s.glb", glb(lambda k: k.update(nodes=[{"children": [0, 0], "mesh": 0}])), "hold one another"),
    "a GLB of opacities of 7": ("s.glb", lambda g: g["s.glb"].replace(g["s.glb"][-1160:], F4(7.0) * 290), "of 20 Gaussians"),
    "a GLB that points elsewhere": ("s.glb", glb(lambda k: k.update(buffers=[{}, {"uri": "http://a/b"}], bufferViews=[{**v, "buffer": 1} for v in k["bufferViews"]])), "beside this one"),
    "a safetensors header of 2^63 bytes": ("s.safetensors", put("s.safetensors", 0, struct.pack("<Q", 2**63)), "a header of"),
    "a safetensors of 10^18 rows": ("s.safetensors", tensors(lambda k: k["means"].update(shape=[10**18, 3])), "does not take"),
    "a safetensors whose tensors overlap": ("s.safetensors", tensors(lambda k: k["quats"].update(data_offsets=[0, 320])), "overlap or leave holes"),
    "a safetensors of negative offsets": ("s.safetensors", tensors(lambda k: k["quats"].update(data_offsets=[-320, 0])), "quats: shape"),
    "a safetensors of whole numbers": ("s.safetensors", tensors(lambda k: k["quats"].update(dtype="I32")), "dtype 'I32'"),
    "a safetensors of five coefficients": ("s.safetensors", tensors(lambda k: k.update(sh={**k["sh"], "shape": [N * 4 // 5, 5, 3]})), "sh: 16 rows"),
    "a safetensors without quaternions": ("s.safetensors", tensors(lambda k: k.pop("quats")), "no tensor quats"),
}


def test_the_museum_has_sixty_rooms():
    assert len(MUSEUM) >= 60


@pytest.mark.parametrize("kind", MUSEUM)
def test_a_killer_is_refused_with_place_and_reason(tmp_path, good, kind):
    name, make, why = MUSEUM[kind]
    path, data = tmp_path / name, make(good)
    path.write_bytes(data)
    tracemalloc.start()
    start = seconds_of_own()
    try:
        with pytest.raises(BadFile, match=why) as refused:
            io.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.path == path and str(refused.value).isprintable() and len(str(refused.value)) < 600
    assert seconds_of_own() - start < SECONDS_MAX and peak < BYTES_MAX + 4 * len(data)


@pytest.mark.parametrize("name", ["s.ply", "s.compressed.ply", "s.splat", "3.spz", "4.spz", "0.ksplat", "1.ksplat", "s.sog", "s.glb", "s.safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path, good, name):
    whole = good[name]
    for size in {*range(0, len(whole), max(1, len(whole) // 120)), len(whole) - 1}:
        if name == "s.splat" and size and size % 32 == 0:
            continue
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(BadFile):
            io.load(tmp_path / name)


def test_an_unbundled_sog_with_a_cut_or_missing_picture_is_refused(tmp_path):
    io.save(tmp_path / "meta.json", small_scene(N, 1))
    for path in sorted(tmp_path.glob("*.webp")):
        whole = path.read_bytes()
        for size in (0, 11, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(BadFile, match=path.name):
                io.load(tmp_path)
        path.unlink()
        with pytest.raises(BadFile, match=f"{path.name}: no such file"):
            io.load(tmp_path)
        path.write_bytes(whole)
    assert len(io.load(tmp_path)[0]) == N


@pytest.mark.parametrize("name", ["s.compressed.ply", "s.splat", "0.ksplat", "s.glb", "s.safetensors"])
def test_a_few_rows_that_are_not_finite_are_dropped_and_counted_in_one_line(tmp_path, good, name):
    if name == "s.compressed.ply":
        io.save(tmp_path / name, small_scene(3000, 0))
        data = (tmp_path / name).read_bytes()
        at = data.index(b"end_header\n") + 11
        data, rows = data[:at] + b"\xff\xff\xff\xff" + data[at + 4:], (256, 3000)     # a chunk whose lowest x is NaN
    else:
        scene = small_scene(N, 0)
        io.save(tmp_path / name, scene, **({"level": 0} if "ksplat" in name else {}))
        data, rows = (tmp_path / name).read_bytes(), (1, N)
        x = np.float32(-scene.means[7, 0] if name == "s.glb" else scene.means[7, 0]).tobytes()
        assert data.count(x) == (1 if name != "s.safetensors" else data.count(x))
        data = data.replace(x, np.float32(np.nan).tobytes(), 1)
    (tmp_path / name).write_bytes(data)
    lines = []
    scene, _ = io.load(tmp_path / name, lines.append)
    assert len(scene) == rows[1] - rows[0] and len(lines) == 1 and f"{rows[0]} of {rows[1]}" in lines[0]
    assert all(torch.isfinite(x).all() for x in scene.fields().values())
