"""What people do with the page of `splatkit view`: move, look at photos, compare, edit, measure, film; each by mouse, touch or keys in a real browser."""
import json
import subprocess

import numpy as np
import pytest
import torch
from chromium import VIEWER
from shows import Shows, camera, drawn, photos_of, psnr, sphere

from splatkit import io
from splatkit.page import PAGE


@pytest.fixture(scope="module")
def scene():
    return sphere(2000, 1, channels=6)


@pytest.fixture(scope="module")
def tab(browser, scene, tmp_path_factory):
    with Shows(browser, scene, views=photos_of(scene, tmp_path_factory.mktemp("photos")), width=1000, height=700) as tab:
        yield tab


@pytest.fixture(autouse=True)
def fresh(request):
    """Each test starts at the whole scene in colour."""
    if "tab" in request.fixturenames:
        request.getfixturevalue("tab").run("app.fixedView = null; app.showFrusta = true; app.stage.setBackend('auto'); app.home(); await app.setLook('colour'); await app.stage.settled()")


def position(tab) -> np.ndarray:
    return np.array(tab.run("return app.pose.position.toArray()"))


def target(tab) -> np.ndarray:
    return np.array(tab.run("const p = app.pose.position.clone(); const z = app.view().worldToCam; return [0, 1, 2].map(i => p.getComponent(i) + app.pose.distance * z[8 + i])"))


def test_a_drag_turns_the_camera_around_what_it_looks_at(tab):
    before, middle = position(tab), target(tab)
    tab.mouse(steps=[["move", 300, 300], ["down"], ["move", 360, 320], ["move", 420, 330], ["up"]])
    after = position(tab)
    assert np.linalg.norm(after - before) > 0.1
    assert np.linalg.norm(after - middle) == pytest.approx(np.linalg.norm(before - middle), rel=1e-4)


def test_the_wheel_comes_nearer_and_a_right_drag_moves_sideways(tab):
    distance = tab.run("return app.pose.distance")
    tab.mouse(steps=[["move", 300, 300], ["wheel", 0, -50]])
    tab.wait(f"window.splatkit.pose.distance < {distance}")
    before = target(tab)
    tab.mouse(steps=[["down", {"button": "right"}], ["move", 340, 300], ["move", 380, 300], ["up", {"button": "right"}]])
    assert np.linalg.norm(target(tab) - before) > 0.05


def test_keys_fly(tab):
    key = "document.querySelector('canvas.stage').dispatchEvent(new KeyboardEvent('{}', {{key: 'w'}}))"
    tab.run("document.querySelector('canvas.stage').focus()")
    before = position(tab)
    tab.run(key.format("keydown"))
    tab.wait(f"window.splatkit.pose.position.distanceTo({{x: {before[0]}, y: {before[1]}, z: {before[2]}}}) > 0.05")     # however slow the machine is
    tab.run(key.format("keyup"))
    moved = position(tab) - before
    forward = np.array(tab.run("return Array.from(app.view().worldToCam.slice(8, 11))"))
    assert moved @ forward > 0.9 * np.linalg.norm(moved)


def test_two_fingers_come_nearer_on_a_narrow_screen_where_nothing_is_wider_than_it(browser, scene):
    with Shows(browser, scene, width=375, height=700, touch=True) as tab:
        distance = tab.run("return app.pose.distance")
        tab.touch(points=[[[150, 300], [220, 300]], [[130, 300], [240, 300]], [[100, 300], [270, 300]]])
        tab.wait(f"window.splatkit.pose.distance < {0.8 * distance}")
        tab.click(selector="#toggle-panel")
        assert tab.run("return document.documentElement.scrollWidth") <= 375
        assert tab.run("return [...document.querySelectorAll('aside button, aside input, header')].filter(e => e.offsetParent && (e.getBoundingClientRect().right > 375.5 || e.getBoundingClientRect().left < -0.5)).length") == 0


def test_standing_at_a_photo_compares_it_with_the_render(tab):
    tab.click(selector="#cameras button:nth-child(2)")
    assert tab.run("return app.captureIndex") == 1
    tab.click(selector="#compare-wipe")
    tab.wait("document.querySelector('#psnr').innerText.includes('dB')")
    # The photo is a render of the same scene; JPEG and the wire are between them.
    assert float(tab.text("#psnr").split()[1]) > 35
    assert tab.run("return getComputedStyle(document.querySelector('.compare canvas')).clipPath").startswith("inset(")
    tab.click(selector="#compare-difference")
    assert tab.run("return [...document.querySelectorAll('.compare canvas')].map(c => c.hidden)") == [True, False]
    tab.click(selector="#compare-flicker")
    tab.wait("document.querySelector('.compare canvas').hidden")
    tab.wait("!document.querySelector('.compare canvas').hidden")
    tab.run("app.controls.turn(5, 0)")
    assert tab.run("return document.querySelector('.compare').hidden")


def test_a_click_on_a_frustum_goes_to_its_camera(tab):
    places = tab.run("""app.setPose({...app.pose, position: app.pose.position.clone().multiplyScalar(2.2), distance: app.pose.distance * 2.2}); await app.stage.settled();
        const v = app.view(), w = v.worldToCam, s = app.canvas.clientWidth / v.width;
        return app.cameras.map(({world_to_cam: c}) => {
            const p = [0, 1, 2].map(j => -(c[j] * c[3] + c[4 + j] * c[7] + c[8 + j] * c[11])), t = [0, 1, 2].map(i => w[4 * i] * p[0] + w[4 * i + 1] * p[1] + w[4 * i + 2] * p[2] + w[4 * i + 3]);
            return [(v.K[0] * t[0] / t[2] + v.K[2]) * s, (v.K[4] * t[1] / t[2] + v.K[5]) * s] })""")
    index, (x, y) = next((i, p) for i, p in enumerate(places) if 20 < p[0] < 680 and 90 < p[1] < 640)      # not under a panel
    tab.mouse(steps=[["move", x, y], ["down"], ["up"]])
    assert tab.run("return app.captureIndex") == index


def test_a_click_shows_what_resembles_the_place(tab, scene):
    tab.click(selector="#look-similarity")
    tab.wait("window.splatkit.scene.features")
    tab.run("app.home(); await app.setLook('similarity'); await app.similarAt(...argument)", [620, 350])
    values = np.array(tab.run("return Array.from(app.stage.attributeValues)"))[::3]
    clicked_right = tab.run("const {rows, w} = await app.stage.weightsAt(620, 350); let s = 0; rows.forEach((r, k) => s += w[k] * Math.sign(app.scene.means[3 * r])); return s") > 0
    right = scene.means[:, 0].numpy() > 0
    assert values[right == clicked_right].mean() > values[right != clicked_right].mean() + 0.3


def test_features_have_the_same_colours_from_every_view(tab):
    tab.click(selector="#look-features")
    tab.wait("window.splatkit.scene.features")
    tab.run("await app.setLook('features')")
    first = tab.run("return Array.from(app.stage.attributeValues.slice(0, 300))")
    tab.run("app.controls.turn(100, 20); await app.setLook('features')")
    assert tab.run("return Array.from(app.stage.attributeValues.slice(0, 300))") == first
    assert psnr(drawn(tab, "webgl", camera(), "features"), drawn(tab, "wasm", camera(), "features")) > 38


def test_crop_undo_and_export(tab, scene, tmp_path):
    tab.click(selector="#look-features")       # what was looked at is exported too
    tab.wait("window.splatkit.scene.features")
    tab.run("await app.setLook('colour')")
    tab.click(selector="#crop-toggle")
    tab.run("const s = document.querySelector('#crop input[type=range]'); s.value = '0.5'; s.dispatchEvent(new Event('input'))")     # the low end of x
    low = tab.run("return app.edits.crop.low[0]")
    tab.click(selector="#keep-inside")
    kept = int((scene.means[:, 0] >= low).sum())
    tab.click(selector="#undo")
    assert "Nothing" in tab.text("#edit-count")
    tab.click(selector="#redo")
    tab.click(selector="#export")
    tab.download(path=str(tmp_path / "out.ply"))
    left, _ = io.load(tmp_path / "out.ply")
    rows = (scene.means[:, None] - left.means[None, :5]).abs().sum(2).amin(0)
    assert float(rows.max()) == 0      # unrounded
    assert abs(len(left) - kept) < 0.03 * len(scene) and float(left.means[:, 0].min()) >= low - 1e-3      # outliers of the other axes lie outside too
    assert left.features.shape[1] == 6
    tab.click(selector="#undo")


def test_faces_of_the_crop_box_are_dragged_by_their_handles(tab):
    tab.run("app.home()")
    tab.click(selector="#crop-toggle")
    where = """const v = app.view(), w = v.worldToCam, s = app.canvas.clientWidth / v.width, box = app.overlay.box;
        const at = p => { const t = [0, 1, 2].map(i => w[4 * i] * p[0] + w[4 * i + 1] * p[1] + w[4 * i + 2] * p[2] + w[4 * i + 3]);
            return [(v.K[0] * t[0] / t[2] + v.K[2]) * s, (v.K[4] * t[1] / t[2] + v.K[5]) * s] };
        const middle = [0, 1, 2].map(k => (box.low[k] + box.high[k]) / 2), face = (x, e) => middle.map((m, k) => k === x ? e : m);
        return [0, 1, 2].flatMap(x => ["low", "high"].map(end => ({x, end, from: at(face(x, box[end][x])), to: at(face(x, 0.7 * box[end][x] + 0.3 * middle[x])), before: box[end][x], middle: middle[x]})))"""
    pose = tab.run("return JSON.stringify(app.pose)")
    seen = [f for f in tab.run(where) if all(20 < x < 680 and 90 < y < 640 for x, y in (f["from"], f["to"])) and np.hypot(*np.subtract(f["from"], f["to"])) > 15]
    face = max(seen, key=lambda f: np.hypot(*np.subtract(f["from"], f["to"])))
    tab.mouse(steps=[["move", *face["from"]], ["down"], ["move", *np.add(face["from"], face["to"]) / 2], ["move", *face["to"]], ["up"]])
    after = tab.run("return app.edits.crop[argument[0]][argument[1]]", [face["end"], face["x"]])
    assert after == pytest.approx(0.7 * face["before"] + 0.3 * face["middle"], abs=0.05 * abs(face["before"] - face["middle"]))
    slider = tab.run("return Number(document.querySelectorAll('#crop input[type=range]')[argument].value)", 2 * face["x"] + (face["end"] == "high"))
    assert slider == pytest.approx(0.15 if face["end"] == "low" else 0.85, abs=0.04)
    assert tab.run("return JSON.stringify(app.pose)") == pose      # the camera stood still
    tab.click(selector="#crop-toggle")


def test_what_lies_in_a_rectangle_is_deleted_and_comes_back(tab):
    tab.click(selector="#select")
    tab.mouse(steps=[["move", 200, 200], ["down"], ["move", 400, 400], ["move", 500, 500], ["up"]])
    tab.wait("window.splatkit.edits.count > 0")
    tab.run("document.querySelector('canvas.stage').focus()")
    tab.press(key="Control+z")
    assert tab.run("return app.edits.count") == 0


def test_two_clicks_measure_a_distance(tab):
    tab.run("app.showFrusta = false")
    tab.click(selector="#measure")
    places = []
    for x, y in ((430, 330), (560, 360)):
        places.append(tab.run("return (await app.placeAt(...argument)).place.toArray()", [x, y]))
        tab.mouse(steps=[["move", x, y], ["down"], ["up"]])
        tab.wait("document.querySelector('#measured').innerText.includes('" + ("second" if len(places) == 1 else "Distance") + "')")
    assert float(tab.text("#measured").split()[-1]) == pytest.approx(float(np.linalg.norm(np.subtract(*places))), rel=2e-3)
    tab.click(selector="#measure")


def test_a_camera_path_goes_through_its_keys_and_the_file_is_one_that_splatkit_films(tab, tmp_path):
    from splatkit import paths
    tab.click(selector="#add-key")
    first = tab.run("return Array.from(app.view().worldToCam)")
    tab.run("app.controls.turn(150, 30)")
    tab.run("document.querySelector('canvas.stage').focus()")
    tab.press(key="k")
    tab.click(selector="#save-path")
    tab.download(path=str(tmp_path / "path.json"))
    path = paths.read_path(tmp_path / "path.json")
    assert len(path.cameras) == 120 and path.fps == 30
    assert torch.allclose(path.cameras.world_to_cam[0].flatten(), torch.tensor(first, dtype=torch.float64), atol=1e-5)
    tab.run("app.home()")
    tab.click(selector="#play")
    tab.wait("document.querySelector('#play').innerText === 'Stop'")
    tab.click(selector="#play")
    tab.wait("document.querySelector('#play').innerText === 'Preview'")


def test_a_picture_is_saved_as_it_is_seen(tab, tmp_path):
    tab.click(selector="#screenshot")
    tab.download(path=str(tmp_path / "a.png"))
    from PIL import Image
    with Image.open(tmp_path / "a.png") as image:
        saved = np.asarray(image.convert("RGB")) / 255
    tab.run("app.showFrusta = false")
    assert psnr(saved, tab.pixels()) > 45


def test_help_theme_and_the_panel_answer_to_keys(tab):
    tab.run("document.querySelector('canvas.stage').focus()")
    before = tab.run("return document.documentElement.dataset.theme")
    tab.press(key="t")
    assert tab.run("return document.documentElement.dataset.theme") != before
    tab.press(key="p")
    assert tab.run("return document.body.classList.contains('closed')")
    tab.press(key="p")
    tab.press(key="?")
    assert tab.run("return document.querySelector('#keys-help').open")
    tab.press(key="Escape")


def test_every_control_has_a_name(tab):
    assert tab.run("""return [...document.querySelectorAll('button, input, select, canvas, [role=slider], [role=img]')].filter(e =>
        !(e.getAttribute('aria-label') || e.innerText?.trim() || e.textContent?.trim() || e.labels?.length || e.hidden || e.type === 'file')).map(e => e.outerHTML)""") == []


# ---- the build


def test_the_committed_page_is_what_the_sources_build(tmp_path):
    import shutil
    if shutil.which("node") is None or not (VIEWER / "node_modules" / "vite").is_dir():
        pytest.skip("node or viewer/node_modules is absent (npm ci in viewer/)")
    done = subprocess.run(["npx", "vite", "build", "--outDir", str(tmp_path), "--logLevel", "error"], cwd=VIEWER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").read_text() == PAGE.read_text(), "run `npm run build` in viewer/ and commit splatkit/viewer/index.html"


def test_the_sources_pass_the_type_checker():
    import shutil
    if shutil.which("node") is None or not (VIEWER / "node_modules" / "typescript").is_dir():
        pytest.skip("node or viewer/node_modules is absent (npm ci in viewer/)")
    done = subprocess.run(["npx", "tsc", "--noEmit"], cwd=VIEWER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_the_page_is_small_and_one_file():
    import gzip
    text = PAGE.read_bytes()
    assert len(gzip.compress(text, 9)) < 350_000
    assert b'src="/' not in text and b"http://localhost" not in text and json.dumps("eval(") not in text.decode()
