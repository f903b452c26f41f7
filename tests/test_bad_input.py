"""What is wrong with the input of `splatkit reconstruct` ends in one line that names the file and the cure, exit code 2, and loses nothing."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from splatkit import cli, io
from splatkit.io import checkpoint
from splatkit.rooms import write_capture

ROOT = Path(__file__).resolve().parent.parent


def frames(folder: Path, **changes) -> dict:
    """A transforms.json in place of the COLMAP model, its second frame changed."""
    for path in sorted((folder / "sparse" / "0").iterdir()):
        path.unlink()
    pose = [[1.0, 0, 0, 1], [0, 1.0, 0, 2], [0, 0, 1.0, 3], [0, 0, 0, 1]]
    top = {"fl_x": 30.0, "frames": [{"file_path": f"images/00{i}.png", "transform_matrix": pose} for i in range(4)]}
    top["frames"][1].update(changes)
    (folder / "transforms.json").write_text(json.dumps(top))
    return top


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def mask_of_another_size(folder: Path) -> None:
    (folder / "masks").mkdir()
    Image.new("L", (9, 9), 255).save(folder / "masks" / "001.png.png")


NAN = [[float("nan"), 0, 0, 1], [0, 1.0, 0, 2], [0, 0, 1.0, 3], [0, 0, 0, 1]]
SINGULAR = [[1.0, 0, 0, 1], [1.0, 0, 0, 2], [0, 0, 1.0, 3], [0, 0, 0, 1]]
HARMS = {       # what is done to a good folder, and what the line must say
    "truncated photo": (lambda f: cut(f / "images" / "001.png", 700), "001.png"),
    "zero-byte photo": (lambda f: cut(f / "images" / "001.png", 0), "001.png"),
    "zero-byte JSON": (lambda f: (frames(f), cut(f / "transforms.json", 0)), "transforms.json: the file is empty"),
    "NaN pose": (lambda f: frames(f, transform_matrix=NAN), r"frames\[1\].*001.png.*transform_matrix"),
    "singular pose": (lambda f: frames(f, transform_matrix=SINGULAR), r"frames\[1\].*right angles"),
    "zero focal length": (lambda f: frames(f, fl_x=0), r"frames\[1\].*focal lengths must be above"),
    "duplicate names": (lambda f: frames(f, file_path="images/000.png"), "appears twice"),
    "mask of another size": (mask_of_another_size, "001.png.png.*9x9.*expected"),
    "cut model": (lambda f: cut(f / "sparse" / "0" / "points3D.bin", 50), "points3D.bin.*ends early"),
    "empty folder": (lambda f: [p.unlink() for p in sorted(f.rglob("*")) if p.is_file()], "no COLMAP model"),
}


@pytest.fixture
def photos(tmp_path) -> Path:
    write_capture(tmp_path / "photos", photos=4, width=40, height=30, points=100)
    return tmp_path / "photos"


def arguments(photos: Path, run: Path, *more) -> list[str]:
    return [str(x) for x in ("reconstruct", photos, "-o", run, "--preset", "demo", "--steps", "4", "--hold-every", "0", "--max-gaussians", "120", *more)]


def line_of(capsys) -> str:
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and len(said[0]) < 600, said
    return said[0]


@pytest.mark.parametrize("harm, says", HARMS.values(), ids=HARMS)
def test_bad_photos_or_poses_are_one_line_and_exit_code_2(photos, tmp_path, capsys, harm, says, cpu_library):
    harm(photos)
    assert cli.main(arguments(photos, tmp_path / "run")) == 2
    line = line_of(capsys)
    assert re.search(says, line), line


def test_two_photos_are_enough(tmp_path, cpu_library):
    write_capture(tmp_path / "photos", photos=2, width=40, height=30, points=100)
    assert cli.main(arguments(tmp_path / "photos", tmp_path / "run")) == 0
    assert len(io.load(tmp_path / "run" / "scene.ply")[0]) > 0


def test_bad_input_of_a_later_run_loses_nothing_of_the_folder(photos, tmp_path, capsys, cpu_library):
    assert cli.main(arguments(photos, tmp_path / "run")) == 0
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    cut(photos / "sparse" / "0" / "images.bin", 40)
    assert cli.main(arguments(photos, tmp_path / "run", "--resume")) == 2
    assert "images.bin" in line_of(capsys)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("target", ["a file", "below a file", "/proc"])
def test_a_run_folder_that_cannot_be_written_is_one_line(photos, tmp_path, capsys, target, cpu_library):
    (tmp_path / "file").write_text("mine")
    run = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "/proc": Path("/proc/run")}[target]
    assert cli.main(arguments(photos, run)) == 2
    line = line_of(capsys)
    assert str(run) in line and (tmp_path / "file").read_text() == "mine"


def test_a_second_process_on_the_run_folder_is_one_line_and_leaves_it(photos, tmp_path, capsys, cpu_library):
    (tmp_path / "run").mkdir()
    with checkpoint.lock(tmp_path / "run"):
        assert cli.main(arguments(photos, tmp_path / "run")) == 2
    line = line_of(capsys)
    assert f"process {os.getpid()}" in line and "choose another folder" in line and os.listdir(tmp_path / "run") == [".lock"]


def test_photos_in_a_folder_that_cannot_be_written_are_enough(photos, tmp_path, cpu_library):
    before = sorted(p for p in photos.rglob("*"))
    for path in [photos, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert cli.main(arguments(photos, tmp_path / "run")) == 0
    assert sorted(photos.rglob("*")) == before      # root may write there, and does not


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(photos, tmp_path, cpu_library):
    program = ("import resource, signal, sys; from splatkit import cli; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
               "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(cli.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", program, *arguments(photos, tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(tmp_path / "run") in done.stderr.strip().splitlines()[-1], done.stderr
    assert not list((tmp_path / "run").rglob("*.tmp"))
