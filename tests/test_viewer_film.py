"""Films that the page makes of a camera path: every frame is the rasterizer's, by the server or by the page itself."""
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from shows import Shows, psnr, sphere

from splatkit import page, render, wire
from splatkit.capture import SceneHeader
from splatkit.film import color_picture
from splatkit.paths import read_path
from splatkit.shown import Shown

SCENE = sphere(800, 1)


def filmed(tab, folder, form: str):
    """The path that a page saves and the file that it exports: three frames of 64 x 48 through two keys."""
    tab.click(selector="#add-key")
    tab.run("app.controls.turn(90, 20)")
    tab.click(selector="#add-key")
    tab.run("""for (const [label, value] of [['Seconds', 0.3], ['Frames a second', 10], ['Width in pixels', 64], ['Height in pixels', 48]]) {
        const field = document.querySelector(`input[aria-label="${label}"]`); field.value = value; field.dispatchEvent(new Event('change')); }
        const form = document.querySelector('#film-format'); form.value = argument; form.dispatchEvent(new Event('change'));""", form)
    tab.click(selector="#save-path")
    tab.download(path=str(folder / "path.json"))
    tab.click(selector="#film")
    tab.wait("document.querySelector('#filmed').innerText.startsWith('3 frames')")
    name = tab.download(path=str(folder / "film"))
    return name, read_path(folder / "path.json")


def test_frames_of_a_served_scene_are_bit_for_bit_those_of_a_render(browser, tmp_path):
    with Shows(browser, SCENE, width=1000, height=700) as tab:
        name, path = filmed(tab, tmp_path, "zip")
    assert name == "sphere.zip" and (path.cameras.width, path.cameras.height) == (64, 48)
    with zipfile.ZipFile(tmp_path / "film") as film:
        assert film.testzip() is None and film.namelist() == ["00000.png", "00001.png", "00002.png"]
        for i, frame in enumerate(film.namelist()):
            with Image.open(io.BytesIO(film.read(frame))) as image:
                found = np.asarray(image)
            camera = path.cameras[i:i + 1].to(dtype=SCENE.means.dtype)
            assert np.array_equal(found, color_picture(render(SCENE, camera).color[0]))


@pytest.mark.parametrize(("form", "least"), [("webp", 27), ("zip", 48)])
def test_a_page_that_carries_its_scene_films_without_a_server(browser, tmp_path, form, least):
    shown = Shown.of(SCENE, "carried", SceneHeader())
    (tmp_path / "a.html").write_text(page.with_scene(wire.container(json.loads(shown.manifest("0") + "}"), [wire.core(SCENE), wire.sh(SCENE)])), encoding="utf-8")
    tab = browser.open((tmp_path / "a.html").as_uri(), width=1000, height=700)
    tab.wait("window.splatkit?.scene")
    name, path = filmed(tab, tmp_path, form)
    assert name == f"carried.{form}" and tab.errors() == []
    tab.close()
    frames = []
    if form == "webp":
        with Image.open(tmp_path / "film") as film:
            assert film.n_frames == 3 and film.size == (64, 48)
            for i in range(3):
                film.seek(i)
                frames.append(np.asarray(film.convert("RGB")))
                assert film.info["duration"] == 100
    else:
        with zipfile.ZipFile(tmp_path / "film") as film:
            frames = [np.asarray(Image.open(io.BytesIO(film.read(n))).convert("RGB")) for n in film.namelist()]
    expected = [color_picture(render(SCENE, path.cameras[i:i + 1].to(dtype=SCENE.means.dtype)).color[0]) for i in range(3)]
    assert min(psnr(a / 255, b / 255) for a, b in zip(frames, expected)) > least       # WebP halves the resolution of colour: 30 measured; the wire: 53
    assert psnr(frames[0] / 255, expected[2] / 255) < 25       # the frames differ
