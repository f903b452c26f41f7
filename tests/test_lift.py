"""`splatkit lift`: every source of cameras, near and far, pairs, sizes, what is kept, what is refused."""
import io as bytes_io
import json
import math

import numpy as np
import pytest
import tiny_colmap
import torch
from lifting import SMALL
from PIL import Image

from splatkit import io
from splatkit.cli import main
from splatkit.errors import BadFile
from splatkit.lift.cost import cost, operations
from splatkit.lift.lifting import lift, merged, padded_size, thinned
from splatkit.lift.model import MVSplat
from splatkit.lift.pairs import Group, check_pair, depth_range, grouped, nearest_pairs, overlap
from splatkit.lift.posed import View, posed
from splatkit.lift.weights import load_weights, save_weights
from splatkit.scene import Scene, rotation_matrices

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEIGHT, FOCAL, TARGET = 80, 48, 60.0, np.array([0.5, 0.0, 4.0])
BOTH = [Group((0, 1), (0, 1))]
NAMES = [f"{i}.png" for i in range(4)]


def pose(i, shift=0.3):
    """world_to_cam of camera i, at x = 0.3 i, turned to TARGET, and the angle about y."""
    place = np.array([shift * i, 0.0, 0.0])
    angle = -math.atan2((TARGET - place)[0], (TARGET - place)[2])
    out = np.eye(4)
    out[:3, :3] = [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    out[:3, 3] = -out[:3, :3] @ place
    return out, angle


K = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1.0]])
K_NORMALISED = K / np.array([[WIDTH], [HEIGHT], [1.0]])
POSES = np.stack([pose(i)[0] for i in range(4)])
ROWS = [" ".join(map(str, [K_NORMALISED[0, 0], K_NORMALISED[1, 1], 0.5, 0.5, 0, 0, *p[:3].ravel()])) for p in POSES]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, MVSplat(SMALL))
    return path


@pytest.fixture(scope="module")
def network(weights):
    return load_weights(weights)[0].requires_grad_(False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same four photos and cameras in every kind of file: what --cameras takes, and the photos to name."""
    root = tmp_path_factory.mktemp("capture")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in NAMES]
    (root / "images").mkdir()
    for name, pixels in zip(NAMES, pictures):
        Image.fromarray(pixels).save(root / "images" / name)
    photos = [str(root / "images" / name) for name in NAMES]
    images = {i + 1: (name, 1, (math.cos(pose(i)[1] / 2), 0.0, math.sin(pose(i)[1] / 2), 0.0), tuple(pose(i)[0][:3, 3]), []) for i, name in enumerate(NAMES)}
    tiny_colmap.write_model(root / "sparse" / "0", {1: ("PINHOLE", WIDTH, HEIGHT, (FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2))}, images, {})
    json_folder = root / "json"
    json_folder.mkdir()
    (json_folder / "images").symlink_to(root / "images")
    frames = [{"file_path": name, "transform_matrix": (np.linalg.inv(p) @ np.diag([1.0, -1, -1, 1])).tolist()} for name, p in zip(NAMES, POSES)]
    (root / "images" / "transforms.json").write_text(json.dumps({"fl_x": FOCAL, "frames": frames}))
    (root / "a.txt").write_text("https://video\n" + "".join(f"{i} {row}\n" for i, row in enumerate(ROWS)))
    (root / "b.txt").write_text("".join(f"{row}\n" for row in ROWS[:2]))
    np.savez(root / "pixels.npz", K=np.stack([K] * 4), world_to_cam=POSES, names=NAMES)
    np.savez(root / "share.npz", K=np.stack([K_NORMALISED] * 2), c2w=np.linalg.inv(POSES)[:2, :3])
    np.savez(root / "opengl.npz", K=np.stack([K] * 4), cam_to_world=np.linalg.inv(POSES) @ np.diag([1.0, -1, -1, 1]), names=NAMES)
    entry = {"url": "", "key": "abc", "timestamps": torch.arange(4), "images": [torch.frombuffer(bytearray(png(x)), dtype=torch.uint8) for x in pictures],
             "cameras": torch.tensor([[float(word) for word in row.split()] for row in ROWS])}
    torch.save([entry], root / "c.torch")
    return {"COLMAP": (root, photos), "COLMAP model": (root / "sparse" / "0", photos), "json folder": (root / "images", photos), "json": (root / "images" / "transforms.json", photos),
            "txt with times": (root / "a.txt", photos), "txt in order": (root / "b.txt", photos), "npz": (root / "pixels.npz", photos), "npz in order": (root / "share.npz", photos),
            "npz with OpenGL axes": (root / "opengl.npz", photos), "chunk": (root / "c.torch", [f"abc:{i}" for i in range(4)])}


def png(pixels):
    file = bytes_io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


KINDS = ["COLMAP", "COLMAP model", "json folder", "json", "txt with times", "txt in order", "npz", "npz in order", "npz with OpenGL axes", "chunk"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_of_cameras_gives_the_same_views(sources, kind):
    cameras, photos = sources[kind]
    given = posed(photos[:2], cameras)
    assert len(given.views) == 2 and given.said
    for i, view in enumerate(given.views):
        assert (view.width, view.height) == (WIDTH, HEIGHT)
        assert np.allclose(view.K, K, atol=1e-4) and np.allclose(view.world_to_cam, POSES[i], atol=1e-6)
        assert view.read(40, 24).shape == (24, 40, 3)
        assert np.allclose(view.read(WIDTH, HEIGHT)[0, 0], np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)[0, 0] / 255, atol=1e-6) or i


def test_conventions_are_said(sources):
    said = {kind: posed(sources[kind][1][:2], sources[kind][0]).said for kind in KINDS}
    assert "in pixels" in said["npz"] and "over the size of the picture" in said["npz in order"] and "OpenGL axes (by where the cameras meet)" in said["npz with OpenGL axes"]
    assert "matched by timestamp" in said["txt with times"] and "in order" in said["txt in order"] and "COLMAP's world" in said["COLMAP"]


def run(sources, weights, tmp_path, kind="npz", count=2, *more):
    cameras, photos = sources[kind]
    return main(["lift", *photos[:count], "--cameras", str(cameras), "-o", str(tmp_path / "out" / "s.ply"), "--weights", str(weights), "--device", "cpu", *more])


def test_the_command_writes_a_scene_and_says_what_it_takes(sources, weights, tmp_path, capsys):
    assert run(sources, weights, tmp_path) == 0
    out, err = capsys.readouterr()
    scene, header = io.load(tmp_path / "out" / "s.ply")
    assert f"{len(scene):,} Gaussians of {2 * WIDTH * HEIGHT:,}" in out
    assert "for want of sparse points" in err and "1 pass on the CPU" in err and "GiB of memory" in err and "sha256" in err
    assert header.up is not None and np.allclose(header.up, (0, -1, 0), atol=0.1)


def test_photos_that_were_not_lifted_are_drawn_where_there_are_any(sources, weights, tmp_path, capsys):
    assert run(sources, weights, tmp_path, "COLMAP", 2, "--check") == 0
    out = capsys.readouterr().out
    assert "2.png (not lifted): PSNR" in out and "3.png (not lifted): PSNR" in out and "0.png" not in out
    assert run(sources, weights, tmp_path, "npz", 2, "--check") == 0
    out = capsys.readouterr().out
    assert "inputs only, not a test of depth" in out and "0.png (lifted): PSNR" in out


def test_more_photos_are_lifted_with_their_nearest_or_all_together(sources, weights, tmp_path, capsys):
    for flags, said in ((), "passes"), (["--joint"], "1 pass"):
        assert run(sources, weights, tmp_path, "npz", 4, *flags) == 0
        out, err = capsys.readouterr()
        assert said in err and f"of {4 * WIDTH * HEIGHT:,}" in out


def test_a_capture_s_photos_need_not_be_named(sources, weights, tmp_path, capsys):
    assert run(sources, weights, tmp_path, "COLMAP", 0) == 0
    assert f"of {3 * WIDTH * HEIGHT:,}" in capsys.readouterr().out       # the first of four is held out


def test_the_scene_is_handed_to_reconstruct(sources, weights, tmp_path, capsys):
    assert run(sources, weights, tmp_path, "COLMAP", 3, "--refine", "3", "--max-gaussians", "500") == 0
    out, err = capsys.readouterr()
    scene, header = io.load(tmp_path / "out" / "s-refined" / "scene.ply")
    assert len(scene) == 500 and header.step == 3 and "PSNR" in out and "0.png: held out for the evaluation" in err


def test_refining_what_reconstruct_cannot_read_is_refused(sources, weights, tmp_path, capsys):
    assert run(sources, weights, tmp_path, "npz", 2, "--refine", "3") == 2
    assert "--refine needs photos and cameras in a folder" in capsys.readouterr().err


# --- the scene does not depend on how it is asked for ---

def views_of(sources, count=2, **changes):
    cameras, photos = sources["npz"]
    return [View(**{**vars(view), **changes}) for view in posed(photos[:count], cameras).views]


def test_a_world_of_another_unit_and_origin_gives_the_scene_moved(sources, network):
    views = views_of(sources)
    scene = lift(network, views, BOTH, 1.0, 20.0, 48)
    moved = []
    for view in views:
        world_to_cam = view.world_to_cam.copy()
        world_to_cam[:3, 3] = 50 * view.world_to_cam[:3, 3] - view.world_to_cam[:3, :3] @ np.array([3000.0, 0, -7000])
        moved.append(View(**{**vars(view), "world_to_cam": world_to_cam}))
    other = lift(network, moved, BOTH, 50.0, 1000.0, 48)
    expected = scene.transformed(50.0, torch.eye(3), torch.tensor([3000.0, 0, -7000]))
    assert torch.allclose(other.means, expected.means, rtol=1e-3, atol=0.05) and torch.allclose(other.log_scales, expected.log_scales, atol=1e-2)


def test_padding_leaves_no_gaussian_and_any_size_is_taken(sources, network):
    views = views_of(sources)
    odd = [View(**{**vars(view), "width": 75, "height": 41, "K": view.K, "read": lambda w, h, view=view: view.read(WIDTH, HEIGHT)[:h, :w]}) for view in views]
    scene = lift(network, odd, BOTH, 1.0, 20.0, 48)
    assert len(scene) == 2 * 75 * 41 and padded_size(odd, 48) == (80, 48)
    for i, view in enumerate(odd):
        at = (scene.means[i * 75 * 41:(i + 1) * 75 * 41].numpy() @ view.world_to_cam[:3, :3].T + view.world_to_cam[:3, 3]) @ view.K.T
        assert (at[:, 0] / at[:, 2]).max() <= 75.01 and (at[:, 1] / at[:, 2]).max() <= 41.01


def test_photos_of_different_size_and_lens_are_lifted_together(sources, network):
    a, b = views_of(sources)
    b = View(**{**vars(b), "width": 2 * WIDTH, "height": 2 * HEIGHT, "K": np.array([[180.0, 0, 70], [0, 180, 50], [0, 0, 1]]), "read": lambda w, h: a.read(w, h)})
    assert len(lift(network, [a, b], BOTH, 1.0, 20.0, 48)) == 2 * WIDTH * HEIGHT


def test_pixels_that_a_mask_leaves_out_give_no_gaussian(sources, network):
    a, b = views_of(sources)
    left = np.zeros((HEIGHT, WIDTH), bool)
    left[:, :30] = True
    a = View(**{**vars(a), "mask": lambda w, h: left})
    assert len(lift(network, [a, b], BOTH, 1.0, 20.0, 48)) == 30 * HEIGHT + WIDTH * HEIGHT


# --- near and far, pairs ---

def test_near_and_far_enclose_the_sparse_points_that_are_seen(sources):
    views, lines = views_of(sources), []
    points = np.concatenate([np.random.default_rng(0).uniform((-0.5, -0.5, 3), (1, 0.5, 6), (500, 3)), [[0, 0, -50.0]] * 40, [[500, 0, 4.0]] * 40])
    near, far = depth_range(views, points, report=lines.append)
    assert 2 < near < 3 and 6 < far < 8 and "sightings of sparse points" in lines[0]


def test_near_and_far_follow_the_baseline_without_points_and_the_flags_before_all(sources):
    views = views_of(sources, 3)
    assert np.allclose(depth_range(views, np.zeros((0, 3))), (0.6, 60))
    assert np.allclose(depth_range(views, np.zeros((0, 3)), near=1.5), (1.5, 60)) and depth_range(views, np.zeros((0, 3)), 1, 2) == (1, 2)
    with pytest.raises(ValueError, match="expected 0 < near < far"):
        depth_range(views, np.zeros((0, 3)), near=100)


def turned(view, degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return View(**{**vars(view), "world_to_cam": np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1.0]]) @ view.world_to_cam})


def test_overlap_is_the_share_of_a_picture_that_the_other_sees(sources):
    a, b = views_of(sources)
    assert overlap(a, a, 3.0) == 1 and 0.5 < overlap(a, turned(b, 10), 4.0) < 1 and overlap(a, turned(a, 180), 3.0) == 0
    assert overlap(a, turned(a, math.degrees(math.atan(WIDTH / 2 / FOCAL))), 3.0) == pytest.approx(0.5, abs=0.15)


def test_views_of_which_nothing_can_be_lifted_are_refused_and_poor_ones_named(sources):
    a, b = views_of(sources)
    with pytest.raises(ValueError, match="from one place"):
        check_pair(a, a, 4.0, 1.0, 20.0)
    with pytest.raises(ValueError, match="nothing in common"):
        check_pair(a, turned(b, 180), 4.0, 1.0, 20.0)
    lines = []
    check_pair(a, b, 4.0, 1.0, 20.0, lines.append)
    assert not lines
    check_pair(a, turned(b, 35), 4.0, 1.0, 20.0, lines.append)
    check_pair(a, b, 100.0, 1.0, 200.0, lines.append)
    assert "share" in lines[0] and "times the depth apart" in lines[1]


def test_each_view_is_paired_with_its_nearest_that_sees_the_same(sources):
    views = views_of(sources, 4)
    pairs = nearest_pairs(views, 4.0)
    assert pairs[0] == (0, 1) and pairs[3] == (3, 2) and pairs[1][1] in (0, 2) and pairs[2][1] in (1, 3)
    away = [views[0], turned(views[1], 150), views[2]]
    assert nearest_pairs(away, 4.0)[0] == (0, 2)


def test_two_that_are_each_other_s_nearest_share_a_pass_and_helpers_are_not_kept(sources):
    views = views_of(sources, 4)
    groups = grouped([*views[:2], views[3]], 4.0, 1.0, 20.0, joint=False)
    assert groups == [Group((0, 1), (0, 1)), Group((2, 1), (2,))]
    assert grouped(views, 4.0, 1.0, 20.0, joint=True) == [Group((0, 1, 2, 3), (0, 1, 2, 3))]


# --- what is kept ---

def blobs(means, opacities=None, color=0.0):
    n = len(means)
    return Scene(torch.tensor(means), torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1), torch.full((n, 3), -4.0), torch.tensor(opacities or [2.0] * n),
                 torch.full((n, 1, 3), color) + torch.arange(n)[:, None, None])


def test_gaussians_of_one_cube_become_one_at_their_weighted_mean():
    scene = merged(blobs([[0.0, 0, 0], [0.1, 0, 0], [5.0, 5, 5]], [0.0, 0.0, 1.0]), 1.0)
    assert len(scene) == 2 and torch.allclose(scene.means[0], torch.tensor([0.05, 0, 0])) and torch.allclose(scene.sh[:, 0, 0], torch.tensor([0.5, 2.0]))
    opaque = merged(blobs([[0.0, 0, 0], [0.1, 0, 0]], [4.0, -4.0]), 1.0)
    assert opaque.logit_opacities.item() == 4 and opaque.means[0, 0] < 0.01


def test_a_merged_gaussian_has_the_covariance_of_all_and_one_alone_stays_as_it_was():
    g = torch.Generator().manual_seed(0)
    some = Scene(0.3 * torch.rand(50, 3, generator=g), torch.randn(50, 4, generator=g), torch.randn(50, 3, generator=g) - 3, torch.randn(50, generator=g), torch.rand(50, 1, 3, generator=g))
    lonely = some.rows(slice(0, 1)).replace(means=torch.full((1, 3), 5.0))
    one, alone = merged(Scene.cat([some, lonely]), 1.0).rows(slice(0, 1)), merged(Scene.cat([some, lonely]), 1.0).rows(slice(1, 2))
    weights = some.logit_opacities.sigmoid()
    drawn = torch.multinomial(weights, 400_000, replacement=True, generator=g)      # points of the mixture
    axes = rotation_matrices(some.quats) * some.scales[:, None]
    points = some.means[drawn] + (axes[drawn] @ torch.randn(len(drawn), 3, 1, generator=g))[..., 0]
    found = rotation_matrices(one.quats)[0] * one.scales
    wanted = torch.cov(points.T)
    assert (found @ found.T - wanted).norm() < 0.02 * wanted.norm() and torch.allclose(one.means[0], points.mean(0), atol=0.005)
    assert all(torch.equal(a, b) for a, b in zip(alone.fields().values(), lonely.fields().values()))


def test_thinning_drops_the_faint_and_keeps_to_the_most(sources):
    scene = blobs([[i / 100, 0.0, 0.0] for i in range(100)], [float(i % 10 - 5) for i in range(100)])
    assert len(thinned(scene, min_opacity=0.5)) == 50
    for most in (1, 7, 99, 100):
        assert 0.5 * most <= len(thinned(scene, max_gaussians=most)) <= most
    assert thinned(scene, max_gaussians=200) is scene
    assert len(thinned(blobs([[1.0, 2, 3]] * 5), max_gaussians=2)) <= 2


def test_the_predicted_cost_follows_pixels_and_passes(sources):
    views = views_of(sources, 4)
    small, two, one_more = cost(SMALL, views, BOTH, 48), cost(SMALL, views, [*BOTH, Group((2, 3), (2, 3))], 48), operations(SMALL, 3, 64, 64)
    assert 0 < small.seconds and small.bytes <= two.bytes and "GiB" in str(small)
    assert operations(SMALL, 2, 64, 64) < one_more < 2 * operations(SMALL, 2, 64, 64)
    assert operations(SMALL, 2, 128, 64) > 2 * operations(SMALL, 2, 64, 64)


# --- what is refused: one line, exit code 2 ---

@pytest.mark.parametrize("arguments, said", [
    (["a.jpg", "b.jpg"], "--cameras is missing: photos without cameras"), (["a.jpg", "--cameras", "{npz}"], "one photo: expected two"), (["--cameras", "{npz}"], "name the photos"),
    (["{0}", "{1}", "--cameras", "nowhere"], "no such file or folder"), (["{0}", "x.png", "--cameras", "{npz}"], "has no x.png"), (["{0}", "x.png", "--cameras", "{COLMAP}"], "no such photo"),
    (["{0}", "{0}", "--cameras", "{npz}"], "given twice"), (["{0}", "{1}", "--cameras", "{npz}", "--near", "5", "--far", "2"], "near < far"),
    (["{0}", "{1}", "{2}", "--cameras", "{npz in order}"], "2 cameras for 3 photos"), (["{0}", "{1}", "--cameras", "{npz}", "--weights", "{0}"], "no torch file"),
    (["abc:0", "abc:9", "--cameras", "{chunk}"], "is no photo of this chunk"), (["--cameras", "{chunk}"], "of one sequence"), (["{0}", "{1}", "--cameras", "{npz}", "-o", "s.xyz"], "s.xyz"),
    (["{0}", "{1}", "--cameras", "{npz}", "--device", "cuda"], "--device cpu works without"), (["{0}", "{1}", "--cameras", "{npz}", "--min-opacity", "0.999"], "lower --min-opacity"),
    (["{0}", "{1}", "--cameras", "{npz}", "--side", "8"], "32 to 8192"), (["{0}", "{1}", "--cameras", "{0}"], "expected a COLMAP folder"), (["{0}", "{1}", "--cameras", "{npz}", "--sha256", "00"], "expected 00"),
])
def test_a_request_that_cannot_be_met_ends_in_one_line(sources, weights, tmp_path, capsys, arguments, said):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a card")
    names = {"npz": sources["npz"][0], "COLMAP": sources["COLMAP"][0], "npz in order": sources["npz in order"][0], "chunk": sources["chunk"][0], **{str(i): p for i, p in enumerate(sources["npz"][1])}}
    words = [next((str(value) for key, value in names.items() if word == f"{{{key}}}"), word) for word in arguments]
    words += [] if "-o" in words else ["-o", str(tmp_path / "s.ply")]
    words += [] if "--weights" in words else ["--weights", str(weights)]
    assert main(["lift", *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("splatkit: ") and said in err and not (tmp_path / "s.ply").exists()


@pytest.mark.parametrize("changes, said", [
    ({"K": np.stack([np.diag([300.0, 300, 1]) + [[0, 0, 900.0], [0, 0, 700], [0, 0, 0]]] * 4)}, "cannot be of 0.png"), ({"K": np.stack([K * [[1], [-1], [1]]] * 4)}, "not above 0"),
    ({"K": np.zeros((4, 3, 4))}, "expected numbers"), ({"world_to_cam": 2 * POSES}, "no rotation"), ({"world_to_cam": POSES * np.nan}, "NaN"), ({"axes": "left"}, "opencv or opengl"),
    ({"c2w": POSES}, "has K, axes, c2w"), ({"K": np.array([None] * 4)}, "no npz of plain arrays"),
])
def test_an_npz_that_makes_no_sense_is_refused(sources, tmp_path, changes, said):
    np.savez(tmp_path / "a.npz", **{"K": np.stack([K] * 4), "world_to_cam": POSES, "names": NAMES, "axes": "opencv", **changes}, allow_pickle=True)
    with pytest.raises(BadFile, match=said):
        posed(sources["npz"][1][:2], tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(BadFile):
        posed(sources["npz"][1][:2], tmp_path / "b.npz")
