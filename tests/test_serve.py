"""The server of a viewer: what clients get of scenes that stand and of runs while they work, and that a run does not notice."""
import base64
import io as bytes_io
import json
import math
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import unwire
from PIL import Image
from raw import Raw, joined
from test_reconstruct import photos, settings  # noqa: F401 (a fixture)

import splatkit
from splatkit import Scene, clients, io, page, wire
from splatkit.adc import grow_and_prune
from splatkit.capture import SceneHeader
from splatkit.cli import main
from splatkit.density import relocate_and_grow
from splatkit.errors import BadFile
from splatkit.film import color_picture
from splatkit.raster import RasterSettings, RasterStats, render
from splatkit.reconstruct import reconstruct
from splatkit.scene import Edit
from splatkit.serve import Viewer
from splatkit.shown import Cache, Live, Shown, State
from splatkit.view import Watching, export_html, opened


def scene_of(n: int, sh_degree: int = 1, channels: int | None = None, seed: int = 0) -> Scene:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    return Scene(r(n, 3), r(n, 4), r(n, 3) * 0.5 - 3, r(n), r(n, (sh_degree + 1) ** 2, 3) * 0.3, None if channels is None else r(n, channels))


def get(viewer, path: str, *headers: tuple[str, str], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    with Raw(viewer.port) as raw:
        return raw.request("POST" if body else "GET", path, [("Host", f"127.0.0.1:{viewer.port}"), ("Authorization", f"Bearer {viewer.gate.token}"), *headers], body)


class Page:
    """What a browser does: takes manifests and chunks, and acknowledges."""

    def __init__(self, viewer, planes=("core", "sh"), scene="0"):
        self.raw, self.manifests, self.chunks, self.metrics, self.done, self.frames = joined(viewer.port, viewer.gate.token, planes, scene), [], {}, [], False, []
        self.planes = planes

    def take(self, acknowledge: bool = True) -> str:
        opcode, payload = self.raw.message()
        if opcode == 2:
            meta, data = unwire.message(payload)
            self.chunks[wire.PLANES[meta["plane"]], meta["chunk"]] = (meta, data)
            self.frames.append(meta)
            count = self.manifests[-1]["chunks"][meta["chunk"]]["count"]
            assert meta["revision"] == self.manifests[-1]["revision"] and unwire.header(data, data[:4], 1) == [count]
            if acknowledge:
                self.raw.say(type="ack", frame=meta["frame"])
            return "chunk"
        if opcode == 8:
            raise ConnectionResetError
        message = json.loads(payload)
        kind = message.pop("type")
        if kind == "manifest":
            self.manifests.append(message)
        elif kind == "metrics":
            self.metrics.append(message)
        else:
            assert kind == "done", message
            self.done = True
        return kind

    def whole(self) -> bool:
        """Whether it has every chunk of the last manifest in the version that it says."""
        m = self.manifests[-1] if self.manifests else None
        return m is not None and all((plane, k) in self.chunks and self.chunks[plane, k][0]["version"] == chunk["version"]
                                     for k, chunk in enumerate(m["chunks"]) for plane in self.planes if plane != "sh" or m["sh_degree"])

    def take_all(self) -> None:
        while not self.whole():
            self.take()


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
    assert get(two, "/api/scene/0/chunk/0/heat")[0] == 404
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
    client.raw.socket.settimeout(10)
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


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A page with two scripts, in the place of the built one."""
    file = tmp_path / "index.html"
    file.write_text('<!doctype html>\n<html><head lang="en"><title>x</title><script type="module">let a = 1;\r\n</script></head><body><SCRIPT>b()</SCRIPT></body></html>', newline="")
    monkeypatch.setattr(page, "PAGE", file)
    return file


def hash_of(script: str) -> str:
    import hashlib
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def test_only_the_scripts_of_the_page_may_run(built):
    with Viewer([]) as viewer:
        policy = get(viewer, "/")[1]["content-security-policy"]
        script = next(part for part in policy.split(";") if "script-src" in part).split()[1:]
        assert script == [hash_of("let a = 1;\n"), hash_of("b()"), "'wasm-unsafe-eval'"]
        assert f"ws://127.0.0.1:{viewer.port}" in policy and "unsafe-eval'" not in policy.replace("'wasm-unsafe-eval'", "")


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


# ---- runs


class Steps:
    """A live scene without a run: steps on command, in a server."""

    def __init__(self, scene, rate=1000.0):
        self.shown = Shown("live", SceneHeader(), sh_degree=scene.sh_degree, live=True)
        self.viewer = Viewer([self.shown])
        self.live, self.scene, self.step = Live(self.shown, self.viewer.hand_over, rate), scene, 0
        self.live.follow(None, len(scene), 0, "cpu")
        self.live.take(scene, 0, complete=True)
        self.viewer.start()

    def go(self, scene: Scene, edit: Edit | None = None) -> None:
        """One step, once a copy is due."""
        self.scene, self.step = scene, self.step + 1
        self.live.follow(edit, len(scene), self.step, "cpu")
        end = time.monotonic() + 10
        while not self.live.due() and time.monotonic() < end:
            time.sleep(0.005)
        self.live.take(scene, self.step, {"age": self.step - self.live.born})


@pytest.fixture
def steps():
    made = []
    yield lambda *a, **k: made.append(Steps(*a, **k)) or made[-1]
    for s in made:
        s.viewer.close(0)


def test_only_changed_chunks_are_sent_again(steps):
    run = steps(scene_of(2 * wire.CHUNK + 10, 0))
    client = Page(run.viewer)
    client.take_all()
    assert len(client.frames) == 3
    moved = run.scene.clone()
    moved.means[-1] += 1
    run.go(moved)
    client.take()       # the manifest
    client.take_all()
    assert [(f["chunk"], f["frame"]) for f in client.frames[3:]] == [(2, 2)]
    assert np.allclose(unwire.core(client.chunks["core", 2][1])[-1]["mean"], moved.means[-1], atol=1e-3)
    client.raw.close()


def test_a_slow_client_gets_the_latest_state_and_not_each(steps):
    run = steps(scene_of(100, 0))
    client = Page(run.viewer)
    client.take(), client.take(acknowledge=False)
    for _ in range(5):
        run.shown.wanted = math.inf
        run.go(run.scene.replace(means=run.scene.means + 1))
    client.raw.say(type="ack", frame=1)
    while client.manifests[-1]["step"] != 5 or not client.whole():
        client.take()
    assert len(client.frames) <= 3      # the first, perhaps one on the way, the last
    assert client.chunks["core", 0][1] == wire.core(run.scene)
    client.raw.close()


def test_a_client_that_comes_back_gets_the_whole(steps):
    run = steps(scene_of(wire.CHUNK + 1, 0))
    client = Page(run.viewer)
    client.take()
    client.raw.close()
    again = Page(run.viewer)
    again.take_all()
    assert len(again.frames) == 2
    again.raw.close()


def test_a_scene_that_grows_and_shrinks_is_followed(steps):
    run = steps(scene_of(wire.CHUNK + 9, 1))
    client = Page(run.viewer)
    client.take_all()
    for n in (2 * wire.CHUNK + 1, 40, 300, 0):
        scene = scene_of(n, 1, seed=n)
        run.go(scene, Edit(torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)))
        while client.manifests[-1]["count"] != n or not client.whole():
            client.take()
        for k in range(len(client.manifests[-1]["chunks"])):
            rows = scene.rows(slice(k * wire.CHUNK, (k + 1) * wire.CHUNK))
            assert client.chunks["core", k][1] == wire.core(rows) and client.chunks["sh", k][1] == wire.sh(rows)
    client.raw.close()


def test_higher_bands_are_copied_only_while_somebody_looks_at_them(steps):
    run = steps(scene_of(50, 2))
    run.shown.wanted = math.inf
    run.go(run.scene.replace(means=run.scene.means + 1))
    end = time.monotonic() + 5
    while run.shown.state.step != 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert not run.shown.state.complete
    fetched = []
    thread = threading.Thread(target=lambda: fetched.append(get(run.viewer, "/api/scene/0/chunk/0/sh")))
    thread.start()
    while run.shown.sh_wanted == 0 and time.monotonic() < end:
        time.sleep(0.01)
    run.go(run.scene.replace(means=run.scene.means + 1))
    thread.join(10)
    assert fetched[0][0] == 200 and fetched[0][2] == wire.sh(run.scene)


def test_no_copy_is_made_while_nobody_looks(steps):
    run = steps(scene_of(50, 0))
    assert not run.live.due()
    client = Page(run.viewer)
    client.take_all()
    end = time.monotonic() + 5
    while not run.live.due() and time.monotonic() < end:
        time.sleep(0.01)
    assert run.live.due()
    client.raw.close()


def test_a_page_that_has_all_keeps_the_run_handing_copies_over_however_seldom_they_come(steps, monkeypatch):
    monkeypatch.setattr(clients, "WANTED_SECONDS", 0.4)
    run = steps(scene_of(50, 0))
    client = Page(run.viewer)
    client.take_all()
    time.sleep(1.0)         # nothing is said in that time
    assert time.monotonic() < run.shown.wanted
    client.raw.close()
    end = time.monotonic() + 5
    while run.viewer.clients and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.6)
    assert time.monotonic() > run.shown.wanted


def test_copies_take_no_more_than_their_share_of_the_time():
    scene, work = scene_of(100_000, 0), []
    live = Live(Shown("x", SceneHeader(), live=True), work.append, rate=1e6)
    live.shown.wanted = math.inf
    live.take(scene, 1)
    assert not live.due()       # the copy before is still on its way
    work.pop()()
    assert not live.due()
    live.taken_at -= 0.9 * live.seconds / 0.015
    assert not live.due()
    live.taken_at -= 0.2 * live.seconds / 0.015
    assert live.due()
    live.shown.chunk(Cache(), "core", 0)
    assert live.shown.spent > 0
    live.shown.spent += 60
    assert not live.due()


def test_a_copy_does_not_change_when_the_run_goes_on(steps):
    """Buffers are used again, but never while somebody may read them."""
    run = steps(scene_of(500, 0))
    run.shown.wanted = math.inf
    for i in range(6):
        expected = run.scene.means + i
        run.go(run.scene.replace(means=expected.clone()))
        run.scene.means.fill_(math.nan)
        run.scene = run.scene.replace(means=expected)
        end = time.monotonic() + 5
        while run.shown.state.step != run.step and time.monotonic() < end:
            time.sleep(0.002)
        assert torch.equal(run.shown.state.scene.means, expected)


def test_age_follows_the_edits_of_rows(steps):
    run = steps(scene_of(3, 0))
    run.shown.wanted = math.inf
    run.go(run.scene)
    run.go(run.scene, Edit(torch.tensor([0, 1, 1, 0]), torch.tensor([False, False, True, False])))
    run.scene = scene_of(4, 0)
    run.go(run.scene)
    end = time.monotonic() + 5
    while run.shown.state.step != 3 and time.monotonic() < end:
        time.sleep(0.01)
    status, _, data = get(run.viewer, "/api/scene/0/chunk/0/heat")
    assert status == 200 and [row[0] for row in unwire.ranged(data, b"SKT1")] == [3, 3, 1, 3]


@pytest.fixture(scope="module")
def watched(photos, tmp_path_factory, cpu_library):     # noqa: F811
    """A short run with ADC that a page watches to its end: its folder, the page, what was announced, and the manifest while it went on."""
    folder, lines, found = tmp_path_factory.mktemp("watched"), [], {}
    config = settings(photos, folder / "run", steps=200, densification="adc", save_every=100)
    watching = Watching(lines.append, rate=20.0)

    def look():
        while not any(line.startswith("view: ") for line in lines):
            time.sleep(0.01)
        viewer = watching.viewer
        client = found["page"] = Page(viewer)
        found["photo"] = get(viewer, "/api/scene/0/photo/1")
        try:
            while True:
                client.take()
        except ConnectionError:
            client.raw.close()
    thread = threading.Thread(target=look)
    thread.start()
    done = False
    try:
        reconstruct(config, watcher=watching)
        done = True
    finally:
        watching.close(done)
    thread.join(20)
    assert not thread.is_alive()
    return folder / "run", found["page"], lines, found["photo"], config


def test_a_page_has_the_scene_of_the_run_when_it_ends_and_is_told_so(watched):
    run, client, lines, _, config = watched
    scene, _ = io.load(run / "scene.ply")
    assert client.done and client.whole() and client.manifests[-1]["step"] == config.steps and not client.manifests[-1]["live"]
    assert client.manifests[0]["live"] and len(client.manifests) > 3
    assert client.chunks["core", 0][1] == wire.core(scene) and client.chunks["sh", 0][1] == wire.sh(scene)
    assert [line for line in lines if not line.startswith("view: http://127.0.0.1:")] == []


def test_a_run_that_is_watched_is_bit_for_bit_the_run_that_is_not(watched, tmp_path):
    run, *_, config = watched
    reconstruct(replace(config, output=tmp_path / "run"))
    assert (tmp_path / "run" / "scene.ply").read_bytes() == (run / "scene.ply").read_bytes()


def test_metrics_come_as_the_run_writes_them(watched):
    run, client, *_ = watched
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {name: [x for m in client.metrics for x in m[name]] for name in ("steps", "loss", "psnr", "count")}
    assert told == {"steps": [r["step"] for r in records], "loss": [r["loss"] for r in records], "psnr": [[r["step"], r["psnr_train"]] for r in records],
                    "count": [r["gaussians"] for r in records]}


def test_cameras_come_with_the_loss_of_their_photo(watched):
    run, client, _, photo, config = watched
    cameras = client.manifests[-1]["cameras"]
    capture = io.photos.load_capture(config.data)
    assert [c["name"] for c in cameras] == [p.name for p in capture.photos]
    train, held = capture.split(config.hold_every)
    for i, (camera, p) in enumerate(zip(cameras, capture.photos)):
        assert np.allclose(np.reshape(camera["world_to_cam"], (4, 4)), p.world_to_cam) and camera["photo"] == i
        assert (camera["width"], camera["height"]) == p.size_at(config.downscale, config.max_side)
        assert (camera["loss"] is None) == (i in held)
    status, headers, data = photo
    assert status == 200 and headers["content-type"] == "image/jpeg"
    shown = np.asarray(Image.open(bytes_io.BytesIO(data))).astype(np.float32) / 255
    stored = io.photos.load_image(capture.photos[1], *capture.photos[1].size_at(config.downscale, config.max_side))
    assert shown.shape == stored.shape and np.sqrt(np.mean((shown - stored) ** 2)) < 0.05


def test_age_and_gradient_of_a_run_are_there_to_colour_by(watched):
    _, client, *_ = watched
    assert client.manifests[0]["heat"] == ["age", "gradient"]


def test_a_run_folder_opens_with_photos_cameras_and_metrics(watched):
    run, client, *_ = watched
    said = []
    shown = opened(run, said.append)
    m, live = json.loads(shown.manifest("0") + "}"), client.manifests[-1]
    assert said == [] and m["name"] == "run" and m["count"] == live["count"] and not m["live"]
    assert [(c["name"], c["K"], c["world_to_cam"], c["photo"]) for c in m["cameras"]] == [(c["name"], c["K"], c["world_to_cam"], c["photo"]) for c in live["cameras"]]
    assert shown.metrics["steps"] == [100, 200]


def test_a_run_without_its_photos_is_shown_without_them(watched, tmp_path):
    import shutil
    shutil.copytree(watched[0], tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(re.sub(r"^data: .*$", f"data: {tmp_path}/gone", text, flags=re.M))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "loss": NaN, "psnr_train": 1, "gaussians": 5}\nnot json\n[]\n{"step": "x"}\n')
    said = []
    shown = opened(tmp_path / "run", said.append)
    assert len(said) == 1 and "no such folder" in said[0] and shown.views == ()
    assert shown.metrics["loss"][-1] is None and shown.metrics["steps"] == [100, 200, 300]
    json.loads(shown.manifest("0") + "}")


def test_what_cannot_be_shown_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.ply").write_bytes(b"ply\nnonsense")
    for path in (tmp_path / "bad.ply", tmp_path / "gone.ply", tmp_path):
        assert main(["view", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(tmp_path, capsys):
    io.save(tmp_path / "scene.ply", scene_of(3))
    with Viewer([]) as viewer:
        assert main(["view", str(tmp_path / "scene.ply"), "--port", str(viewer.port)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---- one file


HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '" onload="alert(1)', "<!--<script>", "]]>", "\u2028\u2029", "\x00\x1b[31m", "javascript:alert(1)", "{{7*7}}", "<svg/onload=alert(1)>"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_gets_out_of_the_scene_of_an_exported_page(built, name):
    from splatkit.view import container
    scene = scene_of(20)
    plain = page.with_scene(container(Shown.of(scene, "x", SceneHeader())))
    text = page.with_scene(container(Shown.of(scene, name, SceneHeader())))
    data = re.search(r'<script type="application/splatkit" id="scene">([A-Za-z0-9+/=]*)</script>', text)
    outside = lambda t: re.sub(r'id="scene">[A-Za-z0-9+/=]*<', "", t)
    assert outside(text) == outside(plain)
    manifest, planes = unwire.container(base64.b64decode(data[1]))
    assert manifest["name"] == name and planes == [wire.core(scene), wire.sh(scene)]


def test_an_exported_page_connects_to_nothing(watched, built, tmp_path, capsys):
    assert main(["export", str(watched[0]), "--html", str(tmp_path / "out.html")]) == 0
    text = (tmp_path / "out.html").read_text()
    policy = re.search(r'<head lang="en"><meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)[1]
    assert "connect-src &#x27;none&#x27;" in policy and "default-src &#x27;none&#x27;" in policy and "http" not in policy.replace("http-equiv", "")
    manifest, planes = unwire.container(base64.b64decode(re.search(r'id="scene">([^<]*)<', text)[1]))
    scene, _ = io.load(watched[0] / "scene.ply")
    assert manifest["count"] == len(scene) and planes[0] == wire.core(scene) and not manifest["live"]
    assert manifest["cameras"] and all(c["photo"] is None for c in manifest["cameras"])
    assert built.read_text().split("<head lang=\"en\">")[1] in text


def test_an_export_without_the_page_says_so_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "PAGE", tmp_path / "index.html")
    io.save(tmp_path / "scene.ply", scene_of(3))
    with pytest.raises(BadFile, match="install splatkit anew"):
        export_html(tmp_path / "scene.ply", tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_a_scene_in_a_notebook_is_a_frame_that_reaches_nothing(built):
    html = scene_of(10).show(height=321)._repr_html_()
    assert html.startswith("<iframe ") and 'sandbox="allow-scripts allow-downloads"' in html and "height:321px" in html
    import html as escapes
    inner = escapes.unescape(re.search(r'srcdoc="([^"]*)"', html)[1])
    manifest, _ = unwire.container(base64.b64decode(re.search(r'id="scene">([^<]*)<', inner)[1]))
    assert manifest["count"] == 10


def test_the_package_has_its_page():
    assert Path(page.__file__).parent.joinpath("viewer", "index.html") == page.PAGE
    if not page.PAGE.is_file():
        pytest.skip("the viewer's page is not built")
    assert "<head" in page.read() and page.SCRIPT.findall(page.read())
