"""Photos to scene: what a run writes, that it learns, repeats itself, and loses nothing when it is stopped or its input is bad."""
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from splatkit import cli, config, io, raster
from splatkit.errors import BackendUnavailable, BadFile
from splatkit.evaluation import evaluate
from splatkit.reconstruct import reconstruct
from splatkit.rooms import write_capture

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Ten small photos of a room, posed."""
    folder = tmp_path_factory.mktemp("room")
    write_capture(folder, photos=10, width=72, height=54, points=600)
    return folder


def settings(photos, output, **changes) -> config.Reconstruct:
    quick = config.load_yaml(config.preset("reconstruct", "demo"), config.Reconstruct(data=photos, output=output))
    return dataclasses.replace(quick, **{"steps": 40, "max_gaussians": 700, "hold_every": 5, **changes})


def command(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "splatkit.cli", *map(str, args)], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False, **kwargs)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.fields().values(), b.fields().values()))


def test_a_run_learns_the_scene_and_writes_all_of_its_folder(photos, tmp_path, cpu_library):
    seen = []
    result = reconstruct(settings(photos, tmp_path, steps=300), lambda step, n, **v: seen.append((step, n)))
    assert result.psnr > 19 and result.gaussians == 700 and list(result.photos) == ["000.png", "005.png"]
    assert seen[-1] == (300, 700)
    scene, header = io.load(tmp_path / "scene.ply")
    assert len(scene) == 700 and header.step == 300 and abs(sum(u * u for u in header.up) - 1) < 1e-5
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["psnr"] == pytest.approx(result.psnr)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [100, 200, 300]
    assert result.picture.stat().st_size > 1000
    assert evaluate(tmp_path).psnr == pytest.approx(result.psnr, abs=1e-4)


def test_the_same_seed_gives_the_same_scene_on_any_number_of_threads(photos, tmp_path, cpu_library):
    threads = torch.get_num_threads()
    try:
        for name, n in (("a", 1), ("b", 2)):
            torch.set_num_threads(n)
            reconstruct(settings(photos, tmp_path / name, steps=120))
    finally:
        torch.set_num_threads(threads)
    assert same(io.load(tmp_path / "a" / "scene.ply")[0], io.load(tmp_path / "b" / "scene.ply")[0])


def test_the_saved_config_repeats_the_run(photos, tmp_path, cpu_library):
    reconstruct(settings(photos, tmp_path / "a"))
    saved = config.load_yaml(tmp_path / "a" / "config.yaml", config.Reconstruct)
    reconstruct(dataclasses.replace(saved, output=tmp_path / "b"))
    assert same(io.load(tmp_path / "a" / "scene.ply")[0], io.load(tmp_path / "b" / "scene.ply")[0])


def test_held_out_photos_are_never_read_while_training(photos, tmp_path, monkeypatch, cpu_library):
    from splatkit import reconstruct as module
    from splatkit import views
    read = []
    load = views.load_image
    monkeypatch.setattr(views, "load_image", lambda photo, *size: read.append(photo.name) or load(photo, *size))
    monkeypatch.setattr(module, "compare", lambda *a: read.append("evaluation"))
    reconstruct(settings(photos, tmp_path))
    assert "evaluation" in read and not {"000.png", "005.png"} & set(read[: read.index("evaluation")])


def test_ctrl_c_leaves_the_scene_so_far(photos, tmp_path, cpu_library):
    def stop(step, n, **values):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        reconstruct(settings(photos, tmp_path, steps=250), stop)
    scene, header = io.load(tmp_path / "scene.ply")
    assert header.step == 100 and len(scene) > 0


def test_ctrl_c_on_the_command_line_ends_with_130_and_a_whole_scene(photos, tmp_path, cpu_library):
    run = subprocess.Popen([sys.executable, "-m", "splatkit.cli", "reconstruct", photos, "-o", tmp_path / "run", "--preset", "demo", "--steps", "100000"],
                           cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not ((log := tmp_path / "run" / "metrics.jsonl").exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=180)
    assert run.returncode == 130 and "Traceback" not in errors
    assert len(io.load(tmp_path / "run" / "scene.ply")[0]) > 0


def test_a_full_disk_ends_with_one_line_and_the_last_scene_whole(photos, tmp_path, cpu_library):
    reconstruct(settings(photos, tmp_path))
    before = (tmp_path / "scene.ply").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = command("reconstruct", photos, "-o", tmp_path, "--preset", "demo", "--steps", "5", "--hold-every", "5", preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()[-1]) < 400
    assert (tmp_path / "scene.ply").read_bytes() == before


@pytest.mark.parametrize("harm, said", [
    (lambda f: (f / "images" / "003.png").write_bytes((f / "images" / "003.png").read_bytes()[:900]), "003.png"),
    (lambda f: (f / "images" / "003.png").unlink(), "003.png"),
    (lambda f: (f / "sparse" / "0" / "images.bin").write_bytes(b"\x01"), "images.bin"),
    (lambda f: [p.unlink() for p in [*(f / "sparse" / "0").iterdir(), *(f / "images").iterdir()]], "COLMAP"),
    (shutil.rmtree, "no such folder or film"),
], ids=["truncated photo", "missing photo", "cut model", "no model and no photos", "no folder"])
def test_bad_input_is_one_line_that_names_the_file_and_exit_code_2(tmp_path, harm, said, capsys, cpu_library):
    write_capture(tmp_path / "photos", photos=4, width=40, height=30, points=100)
    harm(tmp_path / "photos")
    code = cli.main(["reconstruct", str(tmp_path / "photos"), "-o", str(tmp_path / "run"), "--preset", "demo", "--steps", "20", "--hold-every", "0"])
    said_on_stderr = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and said in said_on_stderr[-1] and len(said_on_stderr) == 1


def test_eval_of_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(BadFile, match="run folder"):
        evaluate(tmp_path)


def test_without_the_native_library_the_slow_reference_must_be_asked_for(photos, tmp_path, monkeypatch):
    from splatkit import views
    monkeypatch.setattr(views, "backends", lambda: {**raster.backends(), "cpu": "not built"})
    with pytest.raises(BackendUnavailable, match="--backend reference"):
        reconstruct(settings(photos, tmp_path))


def test_the_scene_stays_in_the_world_of_the_poses(photos, tmp_path, cpu_library):
    reconstruct(settings(photos, tmp_path))
    scene = io.load(tmp_path / "scene.ply")[0]
    points = torch.from_numpy(io.photos.load_capture(photos).points).float()
    assert (scene.means.median(0).values - points.median(0).values).norm() < 0.5


def test_the_reference_backend_runs_where_asked_for(photos, tmp_path):
    result = reconstruct(settings(photos, tmp_path, steps=3, max_gaussians=60, hold_every=9, backend="reference"))
    assert result.gaussians == 60 and os.path.exists(tmp_path / "scene.ply")
