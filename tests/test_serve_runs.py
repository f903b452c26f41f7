"""A run in the server of a viewer while it works and when it stands in its folder, and the page that carries a scene."""
import base64
import io as bytes_io
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import unwire
from PIL import Image
from served import Page, get, scene_of, wait_for
from test_reconstruct import photos, settings  # noqa: F401 (a fixture)

from splatkit import io, page, wire
from splatkit.capture import SceneHeader
from splatkit.cli import main
from splatkit.errors import BadFile
from splatkit.raster import render
from splatkit.reconstruct import reconstruct
from splatkit.serve import Viewer
from splatkit.shown import Shown
from splatkit.view import Following, Watching, export_html, opened


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
    thread.join(60)
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
    assert client.manifests[0]["heat"] == ["age", "gradient", "loss"]


def test_gaussians_are_coloured_by_the_loss_of_the_photos_that_show_them(tmp_path):
    from shows import camera, photos_of, sphere
    scene = sphere(300, 0)
    off = scene.means[:, 0] > 0         # the right half of the scene has other colours than its photos
    shown = Shown.of(scene.replace(sh=torch.where(off[:, None, None], scene.sh + 1.0, scene.sh)), "sphere", SceneHeader(), tuple(photos_of(scene, tmp_path, 6)))
    with Viewer([shown]) as viewer:
        assert get(viewer, "/api/scene/0")[0] == 200 and json.loads(get(viewer, "/api/scene/0")[2])["heat"] == ["loss"]
        status, _, data = get(viewer, "/api/scene/0/chunk/0/heat?name=loss")
    loss = torch.tensor([row[0] for row in unwire.ranged(data, b"SKT1")])
    seen = render(scene, camera()).visible[0] & (loss > 0)
    assert status == 200 and loss[off & seen].mean() > 5 * loss[~off & seen].mean() > 0


def test_a_run_folder_opens_with_photos_cameras_and_metrics(watched):
    run, client, *_ = watched
    said = []
    shown = opened(run, said.append)
    m, live = json.loads(shown.manifest("0") + "}"), client.manifests[-1]
    assert said == [] and m["name"] == "run" and m["count"] == live["count"] and not m["live"]
    assert [(c["name"], c["K"], c["world_to_cam"], c["photo"]) for c in m["cameras"]] == [(c["name"], c["K"], c["world_to_cam"], c["photo"]) for c in live["cameras"]]
    assert shown.metrics["steps"] == [100, 200]


def test_a_run_without_its_photos_is_shown_without_them(watched, tmp_path):
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


def test_what_another_process_writes_into_a_run_folder_is_shown(watched, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(watched[0], run)
    said, followed = [], Following([run], lambda line: said.append(line), seconds=0.05)
    scene, header = io.load(run / "scene.ply")
    with Viewer(followed.shown) as viewer:
        followed.start(viewer)
        page = Page(viewer)
        page.take_all()
        before = page.manifests[-1]
        assert not before["live"] and before["count"] == len(scene)
        (run / "scene.ply").write_bytes(b"ply\nnonsense")       # no splatkit writes so: what was shown stays
        wait_for(lambda: said)
        io.save(run / "scene.ply", scene.rows(slice(0, 50)), replace(header, step=300))
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 300, "loss": 0.5, "psnr_train": 21, "gaussians": 50}\n')
        wait_for(lambda: followed.shown[0].state.step == 300 and followed.shown[0].metrics["steps"][-1] == 300)
        while page.manifests[-1]["step"] != 300 or not page.whole():
            page.take()
        after = page.manifests[-1]
        page.raw.close()
        followed.close()
    assert (after["count"], after["step"], after["live"]) == (50, 300, True) and len(said) == 1


def test_a_run_that_has_no_scene_yet_is_waited_for(watched, tmp_path):
    run, said = tmp_path / "run", []
    shutil.copytree(watched[0], run)
    (run / "scene.ply").rename(run / "later.ply")
    first = threading.Timer(0.3, lambda: (run / "later.ply").rename(run / "scene.ply"))
    first.start()
    followed = Following([run], said.append, seconds=0.05)
    assert not first.is_alive() or first.finished.is_set()
    assert len(said) == 1 and "no scene yet" in said[0] and len(followed.shown[0].state.scene) == len(io.load(run / "scene.ply")[0])


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
