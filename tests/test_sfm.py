"""Bare photos and films: poses against the truth, what is left out, what is kept for the next run, and how a dying COLMAP is told."""
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from alignment import centre, errors
from PIL import Image, ImageFilter

from splatkit import config, paths, sfm
from splatkit.config import SfM
from splatkit.errors import BadFile
from splatkit.film import write_film
from splatkit.io.photos import load_image
from splatkit.io.source import load_source
from splatkit.evaluation import evaluate
from splatkit.reconstruct import reconstruct
from splatkit.rooms import Texture, make_room, orbit
from splatkit.sfm import pose

COLMAP = pytest.mark.skipif(importlib.util.find_spec("pycolmap") is None, reason="pycolmap (the extra sfm) is absent")
N, WIDTH, HEIGHT = 10, 240, 180
WORKER = Path(sfm.__file__).with_name("sfm_worker.py")


def largest_errors(found, true) -> tuple[float, float]:
    return tuple(float(x.max()) for x in errors(found, true))


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))


@pytest.fixture(scope="module")
def views() -> tuple[list[Image.Image], np.ndarray, np.ndarray]:
    """Pictures along a sixth of a ring around a room that has features everywhere, their world_to_cam and their K."""
    room, cameras = make_room(0), orbit(N, WIDTH, HEIGHT, turn_degrees=60)
    rough = lambda texture, size: dataclasses.replace(texture, kind="noise", size=size)
    solids = tuple(dataclasses.replace(s, texture=rough(s.texture, 0.05 + 0.004 * i)) for i, s in enumerate(room.solids))
    room = dataclasses.replace(room, walls=rough(room.walls, 0.11), floor=Texture("noise", (0.8, 0.6, 0.4), (0.3, 0.2, 0.1), 0.09), solids=solids)
    pixels = (room.cast(cameras.to(dtype=torch.float32)).color * 255).round().byte().numpy()
    return [Image.fromarray(p) for p in pixels], cameras.world_to_cam.numpy(), cameras.K[0].numpy()


@pytest.fixture(scope="module")
def photos(views, tmp_path_factory) -> Path:
    """A folder as people have them: JPEGs, a PNG, a WebP, one stored on its side, an exact copy, something else altogether, and no photo."""
    folder = tmp_path_factory.mktemp("holiday")
    for i, image in enumerate(views[0]):
        if i == 3:
            exif = Image.Exif()
            exif[0x0112] = 6        # shown after a quarter turn clockwise
            image.transpose(Image.Transpose.ROTATE_90).save(folder / "003.jpg", quality=95, exif=exif)
        else:
            image.save(folder / f"{i:03d}.{ {4: 'PNG', 5: 'webp'}.get(i, 'jpg')}", quality=95)
    shutil.copy(folder / "001.jpg", folder / "001 (copy).jpg")
    noise(1).save(folder / "other.jpg", quality=95)
    (folder / "notes.txt").write_text("not a photo")
    (folder / "._000.jpg").write_bytes(b"what a Mac leaves behind")
    return folder


@pytest.fixture(scope="module")
def posed(photos, tmp_path_factory) -> tuple[Path, list[str]]:
    """The run folder with the poses of `photos`, and what was reported."""
    if importlib.util.find_spec("pycolmap") is None:
        pytest.skip("pycolmap (the extra sfm) is absent")
    run, lines = tmp_path_factory.mktemp("run"), []
    sfm.SECONDS_BETWEEN, between = 0.0, sfm.SECONDS_BETWEEN
    try:
        pose(photos, run, SfM(), lines.append)
    finally:
        sfm.SECONDS_BETWEEN = between
    return run, lines


def test_poses_of_photos_of_every_format_agree_with_the_truth(photos, posed, views):
    capture, downscale = load_source(photos, posed[0])
    assert [p.name for p in capture.photos] == ["000.jpg", "001 (copy).jpg", "002.jpg", "003.jpg", "004.PNG", "005.webp", "006.jpg", "007.jpg", "008.jpg", "009.jpg"]
    assert downscale == 1 and all(p.path.parent == photos for p in capture.photos)
    far, turned = largest_errors([p.world_to_cam for p in capture.photos], list(views[1]))
    assert far < 0.02 and turned < 1.5         # metres on a ring of 2 m, degrees; measured 0.003 and 0.6
    for p in capture.photos:
        assert p.K[0, 0] == pytest.approx(views[2][0, 0], rel=0.04)
    assert len(capture.points) > 300


def test_a_photo_on_its_side_is_read_upright_as_it_was_posed(photos, posed, views):
    photo = load_source(photos, posed[0])[0].photos[3]
    assert (photo.lens.width, photo.lens.height) == (WIDTH, HEIGHT)
    plain = dataclasses.replace(photo, lens=None, width=WIDTH, height=HEIGHT)
    assert np.abs(load_image(plain) - np.asarray(views[0][3]) / np.float32(255)).mean() < 0.02


def test_progress_copies_and_photos_without_a_pose_are_reported(posed):
    text = "\n".join(posed[1])
    assert "exact copies of other photos are left out: 001.jpg (001 (copy).jpg)" in text
    for stage in ("reading photos 11 of 11", "features: photo 11 of 11", "matching of 11 photos (exhaustive)", "matching: part 1 of 1", "mapping: registered 4 of 11", "10 of 11 photos have poses ("):
        assert stage in text, stage
    assert posed[1][-1].split(": ", 1)[1].startswith("without a pose and left out: other.jpg; photos join where they share two thirds")


def test_photos_of_one_size_share_one_lens_and_nothing_but_the_model_stays(photos, posed):
    assert len({tuple(p.lens.K.ravel()) for p in load_source(photos, posed[0])[0].photos}) == 1
    assert {p.name for p in (posed[0] / "sfm").iterdir()} == {"sparse", "poses.json", "log.txt"}


@pytest.fixture
def without_worker(monkeypatch):
    """A worker that would be started is an error."""
    def start(*args, **kwargs):
        raise AssertionError("COLMAP was started")
    monkeypatch.setattr(sfm.subprocess, "Popen", start)


def copied(photos: Path, posed: tuple[Path, list[str]], to: Path) -> tuple[Path, Path]:
    """The photos and their run once more, times of change included."""
    return Path(shutil.copytree(photos, to / "photos")), Path(shutil.copytree(posed[0], to / "run"))


def test_the_same_photos_keep_their_poses_and_changed_ones_get_new_ones(photos, posed, tmp_path, without_worker):
    folder, run = copied(photos, posed, tmp_path)
    lines = []
    pose(folder, run, SfM(), lines.append, keep=True)
    assert len(lines) == 1 and "10 of 11 photos have poses from before" in lines[0]
    os.utime(folder / "002.jpg")
    with pytest.raises(BadFile, match="start anew without --resume"):
        pose(folder, run, keep=True)
    with pytest.raises(AssertionError, match="COLMAP was started"):
        pose(folder, run)
    assert (run / "sfm" / "poses.json").exists() and not (run / "sfm.new" / "poses.json").exists()     # what was found before stays, what was begun does not pass for whole


@pytest.mark.parametrize("harm", [lambda poses: (poses / "sparse/0/images.bin").unlink(), lambda poses: (poses / "poses.json").write_text("{"), None])
def test_a_lost_model_a_damaged_record_and_other_settings_do_not_pass_for_the_poses(photos, posed, tmp_path, harm, without_worker):
    folder, run = copied(photos, posed, tmp_path)
    settings = SfM() if harm else SfM(max_side=800)
    if harm:
        harm(run / "sfm")
    with pytest.raises(BadFile, match="start anew"):
        pose(folder, run, settings, keep=True)


def test_a_scene_is_fitted_evaluated_and_filmed_from_bare_photos(photos, posed, tmp_path, without_worker, cpu_library):
    folder, run = copied(photos, posed, tmp_path)
    settings = dataclasses.replace(config.load_yaml(config.preset("reconstruct", "demo"), config.Reconstruct(folder, run)), steps=60, max_gaussians=1500, hold_every=5)
    lines = []
    result = reconstruct(settings, say=lines.append)
    assert list(result.photos) == ["000.jpg", "005.webp"] and result.psnr > 12
    assert any("have poses from before" in line for line in lines) and any("SIMPLE_RADIAL" in line for line in lines)
    again = tmp_path / "moved"
    run.rename(again)
    assert evaluate(again).psnr == pytest.approx(result.psnr, abs=1e-4)
    assert len(paths.photo_cameras(dataclasses.replace(settings, output=again))) == 10
    with pytest.raises(BadFile, match="no poses of the photos"):
        evaluate(_without_poses(again))


def _without_poses(run: Path) -> Path:
    shutil.rmtree(run / "sfm")
    return run


@pytest.mark.parametrize("n", [3, 11, 60, 400])
def test_sequential_pairs_are_few_and_join_near_far_and_first_with_last(n):
    chosen = set(sfm.pairs(n, sequential=True))
    assert all(0 <= i < j < n for i, j in chosen) and {(i, j) for i in range(n) for j in range(i + 1, min(n, i + 11))} <= chosen
    assert len(chosen) <= min(n * (n - 1) // 2, 16 * n + 31 * 31 // 2 + 400)
    assert any(i < 15 and j >= n - 15 for i, j in chosen)
    assert len(sfm.pairs(n, sequential=False)) == n * (n - 1) // 2


@COLMAP
def test_a_folder_named_sfm_that_is_not_of_a_run_is_left_alone(photos, tmp_path, without_worker):
    (tmp_path / "sfm").mkdir()
    (tmp_path / "sfm" / "mine.txt").write_text("mine")
    with pytest.raises(BadFile, match="holds files that are not of an earlier run"):
        pose(photos, tmp_path)
    assert (tmp_path / "sfm" / "mine.txt").read_text() == "mine"


@COLMAP
def test_photos_in_the_folder_that_a_run_would_replace_are_left_alone(tmp_path, without_worker):
    (tmp_path / "sfm" / "images").mkdir(parents=True)
    (tmp_path / "sfm" / "log.txt").touch()
    for i in range(3):
        noise(i).save(tmp_path / "sfm" / "images" / f"{i}.png")
    with pytest.raises(BadFile, match="which this run would replace"):
        pose(tmp_path / "sfm" / "images", tmp_path)
    assert len(list((tmp_path / "sfm" / "images").iterdir())) == 3


@COLMAP
def test_a_link_to_a_photo_elsewhere_is_named_before_the_work(tmp_path, without_worker):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        noise(i).save(tmp_path / ("photos" if i else ".") / f"{i}.png")
    (tmp_path / "photos" / "0.png").symlink_to(tmp_path / "0.png")
    with pytest.raises(BadFile, match="0.png: is a link to outside"):
        pose(tmp_path / "photos", tmp_path / "run")


# What cannot be posed

def test_without_pycolmap_one_line_says_what_to_install(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sfm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadFile, match=r"pip install 'splatkit\[sfm\]'"):
        pose(photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@COLMAP
def test_two_photos_are_too_few_and_photos_without_anything_in_common_get_advice(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        noise(i).save(tmp_path / "photos" / f"{i}.png")
        if i == 1:
            with pytest.raises(BadFile, match="photos: 2 photos; at least 3 are needed"):
                pose(tmp_path / "photos", tmp_path / "run")
    with pytest.raises(BadFile, match="poses were found for 0 of 4 photos: photos join where .* log: .*log.txt"):
        pose(tmp_path / "photos", tmp_path / "run")
    assert {p.name for p in (tmp_path / "run/sfm.new").iterdir()} == {"log.txt"}


@COLMAP
@pytest.mark.parametrize(("name", "keep"), [("002.jpg", 0.6), ("004.PNG", 0.6), ("005.webp", 0.6), ("002.jpg", 0.0)])
def test_a_damaged_photo_is_named_before_colmap_starts(photos, tmp_path, name, keep, without_worker):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:int(keep * len(whole))])
    with pytest.raises(BadFile) as error:
        pose(folder, tmp_path / "run")
    assert error.value.path == folder / name


@COLMAP
def test_masks_of_bare_photos_are_refused_before_colmap_starts(photos, tmp_path, without_worker):
    shutil.copytree(photos, tmp_path / "images")
    (tmp_path / "masks").mkdir()
    with pytest.raises(BadFile, match="masks of photos without poses cannot be used"):
        pose(tmp_path, tmp_path / "run")


# The worker's process

@pytest.fixture
def workers(monkeypatch) -> list[subprocess.Popen]:
    """The processes that are started."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
    monkeypatch.setattr(sfm.subprocess, "Popen", Recorded)
    return started


@COLMAP
@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "was ended by SIGKILL, perhaps for want of memory"), (signal.SIGSEGV, "was ended by SIGSEGV")])
def test_a_worker_that_dies_is_one_line_and_the_next_try_starts_anew(photos, tmp_path, workers, number, said):
    def report(line):
        if line.startswith("features of"):
            os.kill(workers[-1].pid, number)
    with pytest.raises(BadFile, match=f"holiday.*: COLMAP's process {said}.* log: .*log.txt") as error:
        pose(photos, tmp_path, report=report)
    assert "\n" not in str(error.value) and [p.name for p in (tmp_path / "sfm.new").iterdir()] == ["log.txt"]
    with pytest.raises(BadFile, match=said):
        pose(photos, tmp_path, report=report)
    assert len(workers) == 2


@COLMAP
def test_what_colmap_says_when_it_fails_is_in_the_line(photos, tmp_path, monkeypatch):
    job = sfm._job
    monkeypatch.setattr(sfm, "_job", lambda *args: {**job(*args), "database": str(tmp_path / "no such folder" / "x.db")})
    with pytest.raises(BadFile, match="COLMAP's process failed: RuntimeError: .*database.*; its log: .*log.txt") as error:
        pose(photos, tmp_path / "run")
    assert "\n" not in str(error.value)


@COLMAP
def test_ctrl_c_ends_the_worker_too(photos, tmp_path, workers):
    def stop(line):
        if line.startswith("features of"):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        pose(photos, tmp_path, report=stop)
    assert workers[0].returncode == -signal.SIGKILL and not (tmp_path / "sfm.new" / "work").exists()


def test_a_worker_does_not_outlive_who_started_it(tmp_path):
    os.mkfifo(tmp_path / "job.json")        # it waits here for a job that does not come
    worker = subprocess.Popen([sys.executable, "-P", str(WORKER), str(tmp_path / "job.json")], stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(1)
    worker.stdin.close()
    assert worker.wait(60) == 1


# Films

@COLMAP
def test_poses_of_a_film_agree_with_the_truth_and_are_kept(views, tmp_path, monkeypatch):
    pytest.importorskip("av", reason="the extra video is absent")
    frames = [image.filter(ImageFilter.GaussianBlur(r)) if r else image for image in views[0] for r in (2, 0, 3)]
    write_film(tmp_path / "film.mp4", (np.asarray(f) for f in frames))
    lines = []
    pose(tmp_path / "film.mp4", tmp_path / "run", SfM(frames=N), lines.append)
    capture, _ = load_source(tmp_path / "film.mp4", tmp_path / "run")
    assert [p.name for p in capture.photos] == [f"{3 * i + 1:06d}.jpg" for i in range(N)]
    assert any("(sequential)" in line for line in lines)
    far, turned = largest_errors([p.world_to_cam for p in capture.photos], list(views[1]))
    assert far < 0.05 and turned < 2
    record = json.loads((tmp_path / "run/sfm/poses.json").read_text())
    assert record["of"] == N and record["mapper"] == record["tried"][-1]["mapper"]
    monkeypatch.setattr(sfm.subprocess, "Popen", lambda *a, **k: pytest.fail("COLMAP was started"))
    pose(tmp_path / "film.mp4", tmp_path / "run", SfM(frames=N))


# Real photos

@COLMAP
@pytest.mark.slow
def test_the_mapper_that_finds_most_of_the_photos_wins(data_dir, tmp_path):
    photos = data_dir / "banana" / "images"
    pose(photos, tmp_path, SfM(max_side=400))       # at full size 14 of 14 are found, in three times the time
    found, _ = load_source(photos, tmp_path)
    record = json.loads((tmp_path / "sfm/poses.json").read_text())
    counts = {t["mapper"]: t["registered"] for t in record["tried"]}
    tried, last = list(counts.values()), len(counts) - 1
    assert list(counts) == ["incremental", "relaxed", "global"][:len(counts)]       # which of them finds enough differs between runs: COLMAP's threads race
    assert [n < sfm.ENOUGH * 14 for n in tried[:last]] == [True] * last and (last == 2 or tried[last] >= sfm.ENOUGH * 14)
    assert len(found.photos) == max(tried) >= 10
    assert counts[record["mapper"]] == len(record["registered"]) == len(found.photos)
    true = {p.name: p.world_to_cam for p in load_source(data_dir / "banana", tmp_path)[0].photos}
    ring = np.ptp([centre(w) for w in true.values()], axis=0).max()
    far, turned = largest_errors([p.world_to_cam for p in found.photos], [true[p.name] for p in found.photos])
    assert far < 0.02 * ring and turned < 2
