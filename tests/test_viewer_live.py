"""The page beside a run that works: rows that change and grow, heat, curves, a server that goes and comes back."""
import contextlib
import threading

import pytest
import torch
from shows import camera, complete, drawn, psnr, reference, sphere

from splatkit.capture import SceneHeader
from splatkit.live import Live
from splatkit.serve import Viewer
from splatkit.shown import Shown


def test_a_run_is_followed_while_it_grows_and_the_camera_stays(browser):
    small, large = sphere(500, 1), sphere(900, 1)
    shown = Shown("run", SceneHeader(), sh_degree=1, live=True)
    with Viewer([shown]) as server:
        live = Live(shown, server.hand_over)
        live.take(small, 10, {"age": torch.arange(500.0)}, complete=True)
        tab = browser.open(server.url, width=320, height=240)
        tab.wait(complete(small))
        tab.run("app.controls.turn(30, 10)")
        before = tab.run("return app.pose.position.toArray()")
        for record in ({"step": 10, "gaussians": 500, "loss": 0.5, "psnr_train": 20.0}, {"step": 20, "gaussians": 900, "loss": 0.25, "psnr_train": 24.0}):
            shown.record(record)
        live.take(large, 20, {"age": torch.arange(900.0)}, complete=True)
        tab.wait(complete(large))
        assert tab.run("return app.pose.position.toArray()") == before
        tab.wait("document.querySelector('#about').innerText.includes('step 20')")
        tab.wait("document.querySelector('.curve polyline').getAttribute('points')?.split(' ').length === 2")
        assert psnr(drawn(tab, "wasm", camera()), reference(large, camera())) > 50
        tab.click(selector="#toggle-panel") if tab.run("return document.body.classList.contains('closed')") else None
        tab.click(selector="#look-heat")
        tab.wait("window.splatkit.stage.look === 'heat'")
        values = torch.tensor(tab.run("return Array.from(app.stage.attributeValues)")).reshape(-1, 3)[:, 0]
        assert (values - torch.arange(900.0)).abs().max() < 899 / 255
        assert tab.errors() == []
        tab.close()


@contextlib.contextmanager
def slow(chunk: int, monkeypatch):
    """A server that has the chunks before this one ready; the rest comes when the event is set."""
    rest, encoded = threading.Event(), Shown.chunk

    def held_back(self, cache, plane, k, version=None):
        assert k < chunk or rest.wait(60)
        return encoded(self, cache, plane, k, version)

    monkeypatch.setattr(Shown, "chunk", held_back)
    try:
        yield rest
    finally:
        rest.set()


def test_a_scene_that_is_still_coming_leaves_the_camera_where_somebody_has_put_it(browser, monkeypatch):
    scene = sphere(70_000, 0)
    with Viewer([Shown.of(scene, "sphere", SceneHeader())]) as server, slow(1, monkeypatch) as rest:
        tab = browser.open(server.url)
        tab.wait("window.splatkit?.scene?.logitOpacities[0] > -100")
        assert tab.run("return app.pose.distance > app.size && app.size > 0.5")       # what has come is in the picture
        tab.run("app.controls.turn(40, 10); app.controls.pan(20, 5)")
        before = tab.run("return app.pose.position.toArray()")
        assert not tab.run("return app.complete()")
        rest.set()
        tab.wait(complete(scene))
        assert tab.run("return app.pose.position.toArray()") == before
        tab.close()


def test_an_update_of_several_chunks_is_drawn_once(browser):
    scene, shown = sphere(70_000, 0), Shown("run", SceneHeader(), live=True)
    with Viewer([shown]) as server:
        live = Live(shown, server.hand_over)
        live.take(scene, 0, complete=True)
        tab = browser.open(server.url, width=160, height=120)
        tab.wait(complete(scene))
        tab.run("const {raster} = app.stage, render = raster.render.bind(raster); await app.stage.settled(); window.drawn = window.updates = 0; raster.render = (...a) => (window.drawn++, render(...a)); const update = app.update.bind(app); app.update = (...a) => { window.updates++; update(...a); }")
        live.take(scene.replace(means=scene.means + 0.01), 1, complete=True)
        tab.wait("window.updates === 2")
        assert tab.run("await app.stage.settled(); return window.drawn") == 1
        assert abs(tab.run("return app.scene.means[0]") - float(scene.means[0, 0]) - 0.01) < 1e-3
        tab.close()


def test_a_turn_before_anything_has_come_chooses_the_side_that_the_scene_is_shown_from(browser, monkeypatch):
    scene = sphere(300, 0).replace(means=sphere(300, 0).means + torch.tensor([5.0, 0, 0]))
    with Viewer([Shown.of(scene, "sphere", SceneHeader())]) as server, slow(0, monkeypatch) as rest:
        tab = browser.open(server.url)
        tab.wait("window.splatkit?.scene?.count === 300")
        tab.run("app.controls.turn(60, 10)")
        before = tab.run("return Array.from(app.view().worldToCam.slice(8, 11))")
        rest.set()
        tab.wait(complete(scene))
        assert tab.run("return Array.from(app.view().worldToCam.slice(8, 11))") == pytest.approx(before, abs=1e-6)
        at = tab.run("const v = app.view().worldToCam; return [0, 1, 2].map(i => v[4 * i] * 5 + v[4 * i + 3])")      # of the middle of the scene
        assert abs(at[0]) < 0.2 and abs(at[1]) < 0.2 and 2 < at[2] < 5
        tab.close()


def test_a_page_finds_a_server_that_comes_back_and_keeps_its_camera(browser):
    scene = sphere(300, 0)
    server = Viewer([Shown.of(scene, "sphere", SceneHeader())]).start()
    tab = browser.open(server.url)
    tab.wait(complete(scene))
    tab.run("app.controls.turn(40, 10)")
    before = tab.run("return app.pose.position.toArray()")
    server.close(0)
    tab.wait("document.querySelector('.messages')?.innerText.includes('is lost')")
    again = Viewer([Shown.of(scene.replace(logit_opacities=scene.logit_opacities + 1), "sphere", SceneHeader())], port=server.port)
    again.gate.token = server.gate.token
    with again:
        tab.wait("!document.querySelector('.messages')?.innerText.includes('is lost')")
        tab.wait(f"Math.abs(window.splatkit.scene.logitOpacities[0] - {float(scene.logit_opacities[0]) + 1}) < 0.1")
        assert tab.run("return app.pose.position.toArray()") == before
        tab.close()


def test_a_page_of_a_run_that_has_ended_says_so_and_looks_for_no_server(browser):
    scene, shown = sphere(100, 0), Shown("run", SceneHeader(), live=True)
    with Viewer([shown]) as server:
        Live(shown, server.hand_over).take(scene, 10, complete=True)
        tab = browser.open(server.url)
        tab.wait(complete(scene))
        shown.done = True
    tab.wait("document.querySelector('#about').innerText.includes('finished')")
    tab.run("await new Promise(done => setTimeout(done, 700))")      # the first try after a lost line comes after 500 ms
    assert "finished" in tab.text("#about") and "is lost" not in tab.text(".messages")
    tab.close()


def test_a_wrong_token_is_said_in_the_page(browser):
    with Viewer([Shown.of(sphere(10, 0), "sphere", SceneHeader())]) as server:
        tab = browser.open(server.url.replace(server.gate.token, "x" * 22))
        tab.wait("document.querySelector('.messages')?.innerText.includes('splatkit view')")
        tab.close()


@pytest.mark.parametrize("n", [0, 1])
def test_a_scene_of_few_rows_is_shown(browser, n):
    with Viewer([Shown.of(sphere(20, 0).rows(slice(0, n)), "few", SceneHeader())]) as server:
        tab = browser.open(server.url)
        tab.wait(f"window.splatkit?.scene?.count === {n}")
        for backend in ("webgl", "wasm"):
            tab.run(f"app.stage.setBackend('{backend}'); await app.stage.settled()")
        assert tab.errors() == [] and tab.text(".messages .error") == ""
        tab.close()


def test_another_scene_of_the_server_can_be_chosen(browser):
    with Viewer([Shown.of(sphere(30, 0), "first", SceneHeader()), Shown.of(sphere(70, 2), "second", SceneHeader())]) as server:
        tab = browser.open(server.url)
        tab.wait(complete(sphere(30, 0)))
        tab.run("const s = document.querySelector('#scene-choice'); s.value = '1'; s.dispatchEvent(new Event('change'))")
        tab.wait(complete(sphere(70, 2)))
        assert tab.text("h1") == "second" and tab.run("return app.scene.shDegree") == 2
        assert tab.errors() == []
        tab.close()
