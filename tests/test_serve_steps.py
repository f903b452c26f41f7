"""A live scene in a server, step by step: only what changed goes out, to those who take it, for a small share of the time."""
import gc
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
import unwire
from served import Page, get, scene_of, wait_for

from splatkit import Scene, clients, wire
from splatkit.capture import SceneHeader
from splatkit.live import Live
from splatkit.scene import Edit
from splatkit.serve import Viewer
from splatkit.shown import Cache, Shown


class Steps:
    """A live scene without a run: steps on command, in a server."""

    def __init__(self, scene, rate=1000.0, complete=True):
        self.shown = Shown("live", SceneHeader(), sh_degree=scene.sh_degree, live=True)
        self.viewer = Viewer([self.shown])
        self.live, self.scene, self.step = Live(self.shown, self.viewer.hand_over, rate), scene, 0
        self.live.follow(None, len(scene), 0, "cpu")
        self.live.take(scene, 0, complete=complete)
        self.viewer.start()

    def go(self, scene: Scene, edit: Edit | None = None) -> None:
        """One step, once a copy is due."""
        self.scene, self.step = scene, self.step + 1
        self.live.follow(edit, len(scene), self.step, "cpu")
        end = time.monotonic() + 30
        while not self.live.due() and time.monotonic() < end:
            time.sleep(0.005)
        self.live.take(scene, self.step, {"age": self.step - self.live.born})


@pytest.fixture
def steps():
    made = []
    yield lambda *a, **k: made.append(Steps(*a, **k)) or made[-1]
    for s in made:
        s.viewer.close(0)


@pytest.mark.parametrize("complete", [True, False], ids=["scenes", "core planes"])
def test_only_changed_chunks_are_sent_again(steps, complete):
    run = steps(scene_of(wire.CHUNK + 10, 0), complete=complete)
    run.shown.scene_wanted = math.inf if complete else 0.0
    client = Page(run.viewer)
    client.take_all()
    assert len(client.frames) == 2
    moved = run.scene.clone()
    moved.means[-1] += 1
    run.go(moved)
    client.take()       # the manifest
    client.take_all()
    assert [(f["chunk"], f["frame"]) for f in client.frames[2:]] == [(1, 2)]
    assert np.allclose(unwire.core(client.chunks["core", 1][1])[-1]["mean"], moved.means[-1], atol=1e-3)
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
    end = time.monotonic() + 30
    while run.shown.state.step != 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert not run.shown.state.complete and run.shown.state.scene is None
    fetched = []
    thread = threading.Thread(target=lambda: fetched.append(get(run.viewer, "/api/scene/0/chunk/0/sh")))
    thread.start()
    while run.shown.sh_wanted == 0 and time.monotonic() < end:
        time.sleep(0.01)
    run.go(run.scene.replace(means=run.scene.means + 1))
    thread.join(60)
    assert fetched[0][0] == 200 and fetched[0][2] == wire.sh(run.scene)


def test_no_copy_is_made_while_nobody_looks(steps):
    run = steps(scene_of(50, 0))
    assert not run.live.due()
    client = Page(run.viewer)
    client.take_all()
    end = time.monotonic() + 30
    while not run.live.due() and time.monotonic() < end:
        time.sleep(0.01)
    assert run.live.due()
    client.raw.close()


def test_a_page_that_has_all_keeps_the_run_handing_copies_over_however_seldom_they_come(steps, monkeypatch):
    monkeypatch.setattr(clients, "WANTED_SECONDS", 0.8)
    run = steps(scene_of(50, 0))
    client = Page(run.viewer)
    client.take_all()
    time.sleep(1.7)         # nothing is said in that time
    assert time.monotonic() < run.shown.wanted
    client.raw.close()
    end = time.monotonic() + 30
    while run.viewer.clients and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(1.0)
    assert time.monotonic() > run.shown.wanted


def test_copies_take_no_more_than_their_share_of_the_time():
    scene, work = scene_of(100_000, 0), []
    live = Live(Shown("x", SceneHeader(), live=True), work.append, rate=1e6)
    live.shown.wanted = live.shown.scene_wanted = math.inf
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
    for whose in ("spent", "sent"):
        before = vars(live.shown).copy()
        vars(live.shown)[whose] += 60
        assert not live.due()
        vars(live.shown).update(before)


def test_a_copy_does_not_change_when_the_run_goes_on(steps):
    """Buffers are used again, but never while somebody may read them."""
    run = steps(scene_of(500, 0))
    run.shown.wanted = run.shown.scene_wanted = math.inf
    for i in range(6):
        expected = run.scene.means + i
        run.go(run.scene.replace(means=expected.clone()))
        run.scene.means.fill_(math.nan)
        run.scene = run.scene.replace(means=expected)
        end = time.monotonic() + 30
        while run.shown.state.step != run.step and time.monotonic() < end:
            time.sleep(0.002)
        assert torch.equal(run.shown.state.scene.means, expected)


def test_a_core_plane_that_somebody_holds_does_not_change_and_its_memory_comes_back(steps):
    run, held = steps(scene_of(500, 0), complete=False), []
    run.shown.wanted = math.inf
    for i in range(6):
        run.go(run.scene.replace(means=run.scene.means + i))
        wait_for(lambda: run.shown.state.step == run.step)
        held.append((run.shown.chunk(Cache(), "core", 0)[1], wire.core(run.scene)))
    assert all(plane == expected for plane, expected in held) and len({bytes(plane) for plane, _ in held}) == 6
    assert len(run.live._rooms) == 0
    held.clear()
    gc.collect()
    wait_for(lambda: len(run.live._rooms) >= 5)
    rooms = len(run.live._rooms)
    for _ in range(9):
        run.go(run.scene.replace(means=run.scene.means + 1))
        wait_for(lambda: run.shown.state.step == run.step)
    assert len(run.live._rooms) <= rooms


def test_whoever_needs_more_than_core_planes_gets_it_from_the_next_copy(steps):
    run = steps(scene_of(50, 2), complete=False)
    shown, asked = run.shown, {}
    camera = {"world_to_cam": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 6, 0, 0, 0, 1], "K": [40, 0, 20, 0, 40, 15, 0, 0, 1], "width": 40, "height": 30, "background": [0, 0, 0]}
    for name, path, body in (("float32", "/api/scene/0/chunk/0/float32", b""), ("heat", "/api/scene/0/chunk/0/heat?name=age", b""), ("picture", "/api/scene/0/frame", json.dumps(camera).encode())):
        shown.wanted, shown.scene_wanted, shown.sh_wanted = math.inf, 0.0, 0.0
        run.go(run.scene)
        wait_for(lambda: shown.state.step == run.step)
        before = shown.state
        thread = threading.Thread(target=lambda name=name, path=path, body=body: asked.update({name: get(run.viewer, path, body=body)}))
        thread.start()
        wait_for(lambda: shown.scene_wanted > 0)
        run.go(run.scene)
        thread.join(60)
        # The rows are the same, but nothing of a scene may be taken for what belongs to core planes.
        assert before.scene is None and shown.state.scene is not None and shown.state.versions[0] > before.versions[0]
    assert [status for status, *_ in asked.values()] == [200, 200, 200]
    assert asked["float32"][2] == wire.float32(run.scene) and [row[0] for row in unwire.ranged(asked["heat"][2], b"SKT1")] == [4] * 50


def test_core_planes_after_a_scene_of_the_same_rows_have_another_version(steps):
    """A client that has SH or the exact floats of a version must not be told that they are those of this copy."""
    run, versions = steps(scene_of(50, 1)), []
    run.shown.wanted = math.inf
    for scene_wanted in (0.0, 0.0, math.inf, math.inf, 0.0):
        run.shown.sh_wanted = scene_wanted
        run.go(run.scene)
        wait_for(lambda: run.shown.state.step == run.step)
        versions.append((run.shown.state.scene is None, run.shown.state.versions[0]))
    assert versions == [(True, 2), (True, 2), (False, 4), (False, 4), (True, 6)]


def test_age_follows_the_edits_of_rows(steps):
    run = steps(scene_of(3, 0))
    run.shown.wanted = run.shown.scene_wanted = math.inf
    run.go(run.scene)
    run.go(run.scene, Edit(torch.tensor([0, 1, 1, 0]), torch.tensor([False, False, True, False])))
    run.scene = scene_of(4, 0)
    run.go(run.scene)
    end = time.monotonic() + 30
    while run.shown.state.step != 3 and time.monotonic() < end:
        time.sleep(0.01)
    status, _, data = get(run.viewer, "/api/scene/0/chunk/0/heat?name=age")
    assert status == 200 and [row[0] for row in unwire.ranged(data, b"SKT1")] == [3, 3, 1, 3]
