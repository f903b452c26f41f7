"""Films: the right frames in every container, whole or not at all; colours of depth and normals; `splatkit render`."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import camera, gaussians, random_scene
from PIL import Image

from splatkit import config, film, io, paths
from splatkit.capture import SceneHeader
from splatkit.cli import main
from splatkit.density import from_points
from splatkit.film import write_film
from splatkit.io.photos import load_capture
from splatkit.paths import CameraPath
from splatkit.rooms import write_capture

with_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV, the extra `video`, is not installed")
ROOT = Path(__file__).resolve().parent.parent
KINDS = [pytest.param("film.mp4", marks=with_av), "film.webp", "film"]
each_kind = pytest.mark.parametrize("name", KINDS)


def frames(n, height=24, width=32):
    """Each frame has its own colour, a step in the middle, and a dark last column and row."""
    for i in range(n):
        frame = np.full((height, width, 3), (250 - 20 * i, 20 + 20 * i, 60), np.uint8)
        frame[height // 2:] //= 2
        frame[:, -2:], frame[-2:] = 10, 10
        yield frame


def read(path) -> np.ndarray:
    """All frames [T,H,W,3] of a film."""
    if path.suffix == ".mp4":
        import av
        with av.open(str(path)) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    if path.is_dir():
        return np.stack([np.asarray(Image.open(p)) for p in sorted(path.iterdir())])
    with Image.open(path) as image:
        pictures = []
        for i in range(image.n_frames):
            image.seek(i)
            pictures.append(np.asarray(image.convert("RGB")))
    return np.stack(pictures)


# ---- files


@each_kind
def test_a_film_is_read_back_with_its_frames(name, tmp_path):
    write_film(tmp_path / name, frames(9), fps=25)
    got, expected = read(tmp_path / name).astype(int), np.stack(list(frames(9))).astype(int)
    assert got.shape == expected.shape
    inside = (slice(None), slice(2, 8), slice(2, 24))
    assert np.abs(got - expected)[inside].max() <= (0 if name == "film" else 6)      # 8-bit YCbCr
    assert [p.name for p in tmp_path.iterdir()] == [name]


@with_av
def test_an_odd_size_repeats_the_last_row_and_column_in_mp4(tmp_path):
    write_film(tmp_path / "film.mp4", frames(3, 23, 31))
    got = read(tmp_path / "film.mp4")
    assert got.shape == (3, 24, 32, 3) and got[:, -1].max() < 30 and got[:, :, -1].max() < 30


@with_av
def test_mp4_says_its_speed_and_colours(tmp_path):
    import av
    write_film(tmp_path / "film.mp4", frames(12), fps=24)
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24 and stream.frames == 12
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)     # BT.709, limited


def test_webp_says_its_speed_without_drift(tmp_path):
    write_film(tmp_path / "film.webp", frames(9), fps=30)
    total = 0
    with Image.open(tmp_path / "film.webp") as image:
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            total += image.info["duration"]
        assert (image.n_frames, image.info["loop"], total) == (9, 0, 300)


@each_kind
@pytest.mark.parametrize("before", [False, True])
def test_a_film_that_fails_leaves_what_was_there(name, before, tmp_path):
    def broken():
        yield from frames(3)
        raise RuntimeError("no more")
    if before:
        write_film(tmp_path / name, frames(2))
    with pytest.raises(RuntimeError, match="no more"):
        write_film(tmp_path / name, broken())
    assert [p.name for p in tmp_path.iterdir()] == [name] * before
    assert not before or len(read(tmp_path / name)) == 2


@each_kind
def test_a_film_replaces_the_one_before(name, tmp_path):
    for n in (5, 3):
        write_film(tmp_path / name, frames(n))
    assert len(read(tmp_path / name)) == 3 and len(list(tmp_path.iterdir())) == 1


@each_kind
def test_no_frame_or_one_of_another_size_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="without frames"):
        write_film(tmp_path / name, [])
    with pytest.raises(ValueError, match="frame of 30x24 follows frames of 32x24"):
        write_film(tmp_path / name, [*frames(1), *frames(1, width=30)])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_anything_but_frames_is_left_alone(tmp_path):
    (tmp_path / "film").mkdir()
    (tmp_path / "film" / "00000.png").write_text("")
    (tmp_path / "film" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        write_film(tmp_path / "film", frames(1))
    assert (tmp_path / "film" / "thesis.txt").read_text() == "years"
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        write_film(tmp_path / "taken", frames(1))


def test_another_suffix_or_speed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4 or \.webp.*not \.gif"):
        write_film(tmp_path / "film.gif", frames(1))
    for fps in (0, -1, float("nan"), 1001):
        with pytest.raises(ValueError, match="frames per second"):
            write_film(tmp_path / "film.webp", frames(1), fps)


def test_mp4_without_pyav_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"splatkit\[video\]"):
        write_film(tmp_path / "film.mp4", frames(1))
    assert not list(tmp_path.iterdir())


@each_kind
def test_a_full_disk_is_an_os_error_and_leaves_nothing(name, tmp_path):
    code = ("import resource, signal, sys, numpy as np; from pathlib import Path; from splatkit.film import write_film\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "noise = np.random.default_rng(0).integers(0, 255, (8, 120, 160, 3), dtype=np.uint8)\n"
            "try: write_film(Path(sys.argv[1]), noise)\n"
            "except OSError as why: print(why)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert "too large" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


# ---- pictures


def test_depth_goes_from_red_at_near_to_dark_blue_at_far_evenly_in_one_over_depth():
    depth, alpha = torch.tensor([[1.0, 4 / 2.5, 4.0, 0.5, 9.0, 2.0]]), torch.tensor([[1.0, 1, 1, 1, 1, 0]])
    got = film.depth_picture(depth, alpha, near=1.0, far=4.0)[0].tolist()
    red, middle, blue = (np.rint(255 * np.clip([np.polyval(c[::-1], x) for c in film.TURBO], 0, 1)).tolist() for x in (1, 0.5, 0))
    assert got == [red, middle, blue, red, blue, [0, 0, 0]]
    assert red == [144, 13, 0] and blue == [35, 23, 27] and middle[1] > 240      # dark red, dark blue, green


def test_depth_fades_to_black_with_alpha():
    full, half = (film.depth_picture(torch.tensor([[2.0]]), torch.tensor([[a]]), 1.0, 4.0).astype(int) for a in (1.0, 0.5))
    assert np.abs(full - 2 * half).max() <= 1


def test_the_range_of_depth_is_that_of_solid_pixels():
    depth = torch.linspace(1, 3, 101)[None]
    alpha = torch.ones_like(depth)
    assert film.depth_range([(depth, alpha), (depth * 100, alpha * 0.4)]) == pytest.approx((1.04, 2.96))
    assert film.depth_range([(depth, alpha * 0)]) == (1.0, 2.0) == film.depth_range([])
    assert np.array_equal(film.depth_picture(depth, alpha), film.depth_picture(depth, alpha, 1.04, 2.96))


def test_normals_have_the_usual_colours():
    normals = torch.tensor([[[0, 0, -2.0], [1, 0, 0], [0, -1, 0], [0, 0, 0]]])      # towards the camera, right, up, none
    assert film.normal_picture(normals)[0].tolist() == [[128, 128, 255], [255, 128, 128], [128, 255, 128], [0, 0, 0]]
    assert film.normal_picture(normals, torch.full((1, 4), 0.5))[0, 0].tolist() == [64, 64, 128]


def test_a_flat_gaussian_s_normal_is_its_short_axis_and_faces_the_camera():
    scene = gaussians([[0, 0, 2], [0, 0, -2], [1, 0, 2]], dtype=torch.float64)
    scene = scene.replace(log_scales=torch.tensor([[0, 0, -3.0], [0, 0, -3], [-3, 0, 0]], dtype=torch.float64))
    assert film.gaussian_normals(scene, camera()).tolist() == [[0, 0, -1], [0, 0, 1], [-1, 0, 0]]
    moved = random_scene(20)
    turn = paths.orbit(torch.zeros(3), torch.tensor([0.0, 0, 1]), 3.0, 10, 1, camera().K[0], 17, 15)
    inside = moved.transformed(1.0, turn.world_to_cam[0, :3, :3], turn.world_to_cam[0, :3, 3])      # the same scene, in camera axes
    torch.testing.assert_close(film.gaussian_normals(moved, turn), film.gaussian_normals(inside, camera()), atol=1e-9, rtol=0)


def test_a_filmed_scene_has_the_depth_and_normals_that_it_must_have(tmp_path):
    wall = gaussians([[0, 0, 2.0]], scale=5.0, opacity=0.99, color=(0.2, 0.4, 0.6), dtype=torch.float32)
    wall = wall.replace(log_scales=torch.tensor([[5.0, 5.0, 1e-3]]).log())
    cameras = camera(width=8, height=6, dtype=torch.float32)
    seen = []
    files = film.film_scene(tmp_path / "out", wall, cameras, outputs=film.OUTPUTS, exact=True, report=lambda *a: seen.append(a))
    assert [f.name for f in files] == ["out", "out_depth", "out_alpha", "out_normals", "out_depth_npy"] and seen == [(1, 1)]
    color, _, alpha, normals = (read(f)[0].astype(int) for f in files[:4])
    depth = np.load(files[4] / "00000.npy")
    assert depth.dtype == np.float32 and depth.shape == (6, 8) and np.abs(depth - 2).max() < 1e-5
    assert np.abs(alpha - 0.99 * 255).max() < 1 and np.abs(color - 0.99 * 255 * np.array([0.2, 0.4, 0.6])).max() < 1
    assert np.abs(normals - 0.99 * np.array([127.5, 127.5, 255])).max() < 1


def test_outputs_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    for arguments in ({"outputs": ()}, {"outputs": ("colour",)}, {"exact": True}):
        with pytest.raises(ValueError, match="expected some of|depth too"):
            film.film_scene(tmp_path / "out", gaussians([0, 0, 2]), camera(), **arguments)
    assert not list(tmp_path.iterdir())


# ---- the verb


@pytest.fixture
def scene_file(tmp_path):
    io.save(tmp_path / "scene.ply", random_scene(30, dtype=torch.float32), SceneHeader({"blur_px2": 0.5}, up=(0.0, 0.0, 1.0)))
    return tmp_path / "scene.ply"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    write_capture(folder, photos=6, width=48, height=36, points=400)
    return folder


@pytest.fixture
def run(photos, tmp_path):
    """A run folder whose scene is the sparse points."""
    capture = load_capture(photos)
    config.save(config.Reconstruct(data=photos, output=tmp_path / "run", background=(0.0, 0.0, 1.0)), _made(tmp_path / "run") / "config.yaml")
    io.save(tmp_path / "run" / "scene.ply", from_points(torch.from_numpy(capture.points).float(), torch.from_numpy(capture.points_rgb), 0, 0.9, 0.5))
    return tmp_path / "run"


def _made(folder):
    folder.mkdir()
    return folder


def test_a_scene_file_is_filmed_from_an_orbit(scene_file, capsys):
    out = scene_file.parent / "films" / "out.webp"
    assert main(["render", str(scene_file), "-o", str(out), "--frames", "6", "--width", "40", "--outputs", "color", "depth", "alpha", "normals"]) == 0
    names = ["out.alpha.webp", "out.depth.webp", "out.normals.webp", "out.webp"]
    assert sorted(p.name for p in out.parent.iterdir()) == names
    for name in names:
        pictures = read(out.parent / name)
        assert pictures.shape == (6, 22, 40, 3) and pictures[:, 8:14, 15:25].max() > 60, name
    said = capsys.readouterr()
    assert f"film: {out}" in said.out and "step 6/6" in said.err


def test_the_settings_in_the_scene_s_header_are_those_it_is_drawn_with(scene_file, monkeypatch):
    seen = []
    monkeypatch.setattr(film, "film_scene", lambda *a, settings, **k: seen.append(settings) or [])
    assert main(["render", str(scene_file)]) == 0
    assert seen[0].blur_px2 == 0.5


def test_a_run_is_filmed_along_its_photos_with_its_background(run):
    assert main(["render", str(run), "-o", str(run / "out"), "--frames", "11"]) == 0
    pictures = read(run / "out")
    assert pictures.shape == (11, 36, 48, 3) and pictures[..., 2].mean() > pictures[..., 0].mean()
    # Frame 0 is the first photo's view.
    capture, scene = load_capture(config.load_yaml(run / "config.yaml", config.Reconstruct).data), io.load(run / "scene.ply")[0]
    film.film_scene(run / "first", scene, capture.photos[0].camera(), background=torch.tensor([0.0, 0, 1]))
    assert np.abs(read(run / "first")[0].astype(int) - pictures[0]).mean() < 0.05      # the pose went through a quaternion


@each_kind
def test_a_run_is_filmed_from_an_orbit_into_every_container(run, name):
    assert main(["render", str(run), "-o", str(run / name), "--path", "orbit", "--frames", "4", "--width", "24", "--fps", "12"]) == 0
    assert read(run / name).shape == (4, 18, 24, 3)


def test_a_run_whose_photos_are_gone_is_filmed_from_an_orbit_and_says_so(run, capsys):
    config.save(config.Reconstruct(data=run / "gone"), run / "config.yaml")
    assert main(["render", str(run), "-o", str(run / "out"), "--frames", "2", "--height", "18"]) == 0
    assert read(run / "out").shape == (2, 18, 32, 3) and "photos cannot be used" in capsys.readouterr().err
    assert main(["render", str(run), "--path", "capture"]) == 2


def test_a_path_file_says_frames_size_and_speed(scene_file):
    folder = scene_file.parent
    paths.write_path(folder / "path.json", CameraPath(paths.orbit_scene(random_scene(30), torch.tensor([0.0, 0, 1]), 3, 20, 16), 10.0))
    assert main(["render", str(scene_file), "-o", str(folder / "out"), "--path", str(folder / "path.json"), "--outputs", "depth", "--exact"]) == 0
    assert read(folder / "out_depth").shape == (3, 16, 20, 3) and not (folder / "out").exists()
    exact = np.stack([np.load(p) for p in sorted((folder / "out_depth_npy").iterdir())])
    assert exact.shape == (3, 16, 20) and exact.max() > 0
    assert main(["render", str(scene_file), "-o", str(folder / "out"), "--path", str(folder / "path.json"), "--frames", "5", "--width", "10"]) == 0
    assert read(folder / "out").shape == (5, 8, 10, 3)


@pytest.mark.parametrize("arguments, said", [
    ("none.ply", "no such file"), (".", "config.yaml: no such file"), ("scene.ply -o out.gif", "not .gif"), ("scene.ply --frames 0", "0 frames"),
    ("scene.ply --fps 0", "frames per second"), ("scene.ply --width 0", "width is 0"), ("scene.ply --height -2", "height is -2"), ("scene.ply --width 40000", "32768"),
    ("scene.ply --path around", "expected orbit"), ("scene.ply --path capture", "run folder"), ("scene.ply --path none.json", "no such file"),
    ("scene.ply --exact", "depth too"), ("scene.ply -o .", "holds more than frames")])
def test_wrong_input_is_one_line_and_exit_code_2(scene_file, arguments, said, monkeypatch, capsys):
    monkeypatch.chdir(scene_file.parent)
    assert main(["render", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert [p.name for p in scene_file.parent.iterdir()] == ["scene.ply"]


def test_a_setting_that_is_not_known_is_named(scene_file, capsys):
    io.save(scene_file, random_scene(3, dtype=torch.float32), SceneHeader({"fog": 0.5}))
    assert main(["render", str(scene_file)]) == 2 and "fog" in capsys.readouterr().err


def test_help_of_render_does_not_import_torch():
    check = "import sys, splatkit.cli\ntry: splatkit.cli.main(['render', '--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False" and "--outputs" in done.stdout, done.stderr
