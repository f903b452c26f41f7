"""The server of a viewer: what clients get of scenes that stand, and the versions of what changes."""
import io as bytes_io
import json
import math
import re

import numpy as np
import pytest
import torch
import unwire
from PIL import Image
from served import Page, get, scene_of

import splatkit
from splatkit import Scene, page, wire
from splatkit.adc import grow_and_prune
from splatkit.capture import SceneHeader
from splatkit.density import relocate_and_grow
from splatkit.film import color_picture
from splatkit.raster import RasterSettings, RasterStats, render
from splatkit.serve import Viewer
from splatkit.shown import Shown, State

# ---- scenes that stand


@pytest.fixture(scope="module")
def two():
    """A scene of two chunks with features and one without Gaussians, of a header that is not the default."""
    header = SceneHeader({"antialias": True, "blur_px2": 0.1, "fov_margin": math.inf}, (0.0, 0.0, 1.0), step=70)
    said = []
    with Viewer([Shown.of(scene_of(wire.CHUNK + 300, 1, 5), "a <b>&\u2028", header), Shown.of(scene_of(0), "empty", SceneHeader())], say=said.append) as viewer:
        yield viewer
    assert said == []


def test_scenes_are_listed_and_described(two):
    assert json.loads(get(two, "/api/scenes")[2]) == {"scenes": [{"id": "0", "name": "a <b>&\u2028", "live": False}, {"id": "1", "name": "empty", "live": False}]}
    m = json.loads(get(two, "/api/scene/0")[2])
    assert (m["format"], m["version"], m["id"], m["count"], m["sh_degree"], m["chunk_size"], m["live"], m["step"]) == ("splatkit-scene", 1, "0", wire.CHUNK + 300, 1, 65536, False, 70)
    assert [c["count"] for c in m["chunks"]] == [65536, 300] and m["cameras"] == [] and m["features"]["channels"] == 5 and len(m["features"]["pca"]["basis"]) == 3
    default = RasterSettings()
    assert m["header"] == {"antialias": True, "blur_px2": 0.1, "alpha_min": default.alpha_min, "alpha_max": 0.99, "transmittance_min": 1e-4, "near": 0.01, "fov_margin": 1e30,
                           "up": [0, 0, 1], "step": 70, "name": "a <b>&\u2028"}


@pytest.mark.parametrize("plane", ["core", "sh", "features", "float32"])
def test_chunks_are_the_rows_of_the_scene(two, plane):
    status, headers, data = get(two, f"/api/scene/0/chunk/1/{plane}")
    rows = two.scenes["0"].state.scene.rows(slice(wire.CHUNK, None))
    assert status == 200 and data == wire.ENCODERS[plane](rows) and headers["content-type"] == "application/octet-stream"


def test_a_range_of_a_chunk_is_that_part_of_it(two):
    whole = get(two, "/api/scene/0/chunk/1/core")[2]
    n = len(whole)
    for asked, part in (("bytes=0-9", whole[:10]), ("bytes=100-", whole[100:]), ("bytes=-7", whole[-7:]), (f"bytes={n - 1}-{n + 50}", whole[-1:])):
        status, headers, data = get(two, "/api/scene/0/chunk/1/core", ("Range", asked))
        assert status == 206 and data == part
        first, last = map(int, re.fullmatch(rf"bytes (\d+)-(\d+)/{n}", headers["content-range"]).groups())
        assert whole[first:last + 1] == part
    for asked in (f"bytes={n}-", "bytes=9-3", "bytes=x"):
        status, headers, _ = get(two, "/api/scene/0/chunk/1/core", ("Range", asked))
        assert status == 416 and headers["content-range"] == f"bytes */{n}"


def test_what_is_not_there_is_said_so(two):
    version = json.loads(get(two, "/api/scene/0")[2])["chunks"][0]["version"]
    assert get(two, f"/api/scene/0/chunk/0/core?version={version}")[0] == 200
    assert get(two, f"/api/scene/0/chunk/0/core?version={version + 1}")[0] == 409
    assert get(two, "/api/scene/0/chunk/2/core")[0] == 404
    assert get(two, "/api/scene/1/chunk/0/core")[0] == 404
    assert [get(two, f"/api/scene/0/chunk/0/heat{name}")[0] for name in ("", "?name=age", "?name=loss")] == [404] * 3
    assert get(two, "/api/scene/2")[0] == 404
    assert get(two, "/api/scene/0/chunk/0/core?version=x")[0] == 400


def test_an_empty_scene_has_a_manifest_and_no_chunk(two):
    client = Page(two, scene="1")
    assert client.take() == "manifest" and client.manifests[0]["count"] == 0 and client.whole()
    client.raw.close()


def test_two_clients_get_the_whole_scene_at_once_and_a_third_later(two):
    pages = [Page(two), Page(two, ("core", "features"))]
    for client in (*pages, Page(two)):
        client.take_all()
        assert {plane for plane, _ in client.chunks} == set(client.planes)
        assert client.chunks["core", 1][1] == get(two, "/api/scene/0/chunk/1/core")[2]
        client.raw.close()


def test_without_acknowledgement_nothing_further_is_sent(two):
    client = Page(two, ("core",))
    for _ in range(3):
        client.take(acknowledge=False)
    client.raw.say(type="watch", scene="0", planes=["core", "sh"])
    client.raw.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.take()
    client.raw.socket.settimeout(30)
    client.raw.say(type="ack", frame=1)
    client.planes = ("core", "sh")
    client.take_all()
    client.raw.close()


def test_five_million_gaussians_are_described_and_served_by_the_chunk():
    row = scene_of(1, 0)
    huge = row.map(lambda x: x.expand(5_000_000, *x.shape[1:]))
    with Viewer([Shown.of(huge, "huge", SceneHeader())]) as viewer:
        m = json.loads(get(viewer, "/api/scene/0")[2])
        assert m["count"] == 5_000_000 and len(m["chunks"]) == 77 and sum(c["count"] for c in m["chunks"]) == 5_000_000
        assert unwire.core(get(viewer, "/api/scene/0/chunk/76/core")[2])[-1]["mean"] == row.means[0].tolist()


def test_a_frame_is_the_picture_of_the_rasterizer(two):
    scene, up = two.scenes["0"].state.scene, [0.2, 0.1, 0.0]
    camera = splatkit.Cameras(splatkit.look_at(torch.tensor([0.0, 0, -6]), torch.zeros(3), torch.tensor([0.0, -1, 0]))[None], torch.tensor([[[90.0, 0, 40], [0, 90, 30], [0, 0, 1]]]), 80, 60)
    body = {"world_to_cam": camera.world_to_cam.flatten().tolist(), "K": camera.K.flatten().tolist(), "width": 80, "height": 60, "background": up}
    status, headers, data = get(two, "/api/scene/0/frame", body=json.dumps(body).encode())
    assert status == 200 and headers["content-type"] == "image/png"
    expected = render(scene.replace(features=None), camera, background=torch.tensor(up), settings=RasterSettings(antialias=True, blur_px2=0.1, fov_margin=math.inf)).color[0]
    assert np.array_equal(np.asarray(Image.open(bytes_io.BytesIO(data))), color_picture(expected))


def test_a_missing_page_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "PAGE", tmp_path / "index.html")
    with Viewer([]) as viewer:
        status, headers, text = get(viewer, "/")
    assert status == 200 and b"no viewer page" in text and "script" not in text.decode() and headers["content-type"].startswith("text/html")


# ---- versions


def test_versions_change_exactly_where_rows_changed():
    scene = scene_of(3 * wire.CHUNK + 5)
    first = State(scene.clone()).after(None)
    same = State(scene.clone()).after(first)
    assert same.versions == first.versions == (1,) * 4 and same.revision == 2
    moved = scene.clone()
    moved.means[2 * wire.CHUNK - 1, 2] += 1e-6
    assert State(moved).after(same).versions == (1, 3, 1, 1)
    longer = Scene.cat([scene, scene_of(1, seed=9)])
    assert State(longer).after(same).versions == (1, 1, 1, 3)
    assert State(scene.rows(slice(wire.CHUNK + 1))).after(same).versions == (1, 3)


@pytest.mark.parametrize("kind", ["adc", "mcmc"])
def test_an_edit_dirties_the_chunks_that_it_touches_and_no_other(kind):
    """A few rows of a large scene are pruned, split or moved: in place, so few chunks are sent again."""
    scene, n = scene_of(6 * wire.CHUNK - 100, 0), 6 * wire.CHUNK - 100
    scene.logit_opacities.fill_(2.0)
    hit = [5, wire.CHUNK + 7, wire.CHUNK + 8]
    g = torch.Generator().manual_seed(0)
    if kind == "adc":
        stats = RasterStats.zeros(n)
        stats.count += 1
        stats.grad_sum[hit] = 1.0
        scene.logit_opacities[4 * wire.CHUNK] = -20
        after, edit = grow_and_prune(scene, stats, split_scale=1e-9, cap=n + 10, generator=g)
    else:
        scene.logit_opacities[hit] = -20
        after, edit = relocate_and_grow(scene, cap=n, generator=g)
    touched = {int(i) // wire.CHUNK for i in torch.nonzero(edit.fresh | (edit.source != torch.arange(len(edit.source)))).flatten()}
    before = State(scene).after(None)
    changed = {k for k, v in enumerate(State(after).after(before).versions) if v == 2}
    assert changed == touched and 0 < len(changed) < 6
