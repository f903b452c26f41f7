"""The native CPU libraries: the same bits whatever the threads, one answer from every build, and calm where input is extreme or wrong."""
import dataclasses
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import OUTPUTS, SMOOTH, camera, gaussians, random_scene, ring
from tolerances import F32, F64

from splatkit import native, raster
from splatkit.camera import Cameras
from splatkit.density import SH_CONSTANT, neighbour_distance
from splatkit.native import CONST
from splatkit.raster.operators import packed_settings, tile_count
from splatkit.raster.types import RasterSettings, RasterStats
from splatkit.scene import Scene

pytestmark = pytest.mark.skipif(native.available()["cpu_f64"] is not None, reason=f"no native library: {native.available()['cpu_f64']}")
REPO = Path(__file__).resolve().parent.parent
RUNNING = [name.removeprefix("cpu_") for name, reason in native.available().items() if reason is None]      # v4, v3, v2, f64 on x86-64
FLOATS = [name for name in RUNNING if name != "f64"]
DEFAULT = RasterSettings()


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def knn(data_dir):
    """2,000 points of a real scene as Gaussians, and its first camera at 160 x 104: the "knn" workload of the benchmarks."""
    points, g = np.load(data_dir / "garden-points" / "test_garden.npz"), torch.Generator().manual_seed(0)
    subset = torch.randperm(len(points["means3d"]), generator=g)[:2000]
    means, n = torch.from_numpy(points["means3d"])[subset], len(subset)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    log_scales = neighbour_distance(means).clamp(min=1e-6).log()[:, None] + 0.5 * normal(n, 3)
    color = (torch.from_numpy(points["colors"])[subset] / 255 - 0.5) / SH_CONSTANT
    opacity = 0.01 + 0.98 * torch.rand(n, generator=g)
    scene = Scene(means, normal(n, 4), log_scales, torch.logit(opacity), torch.cat([color[:, None], 0.05 * normal(n, 15, 3)], dim=1))
    pose, K = torch.from_numpy(points["viewmats"][:1]), torch.from_numpy(points["Ks"][:1])
    return scene, Cameras(pose, K, int(points["width"]), int(points["height"])).resized(160, 104)


def drawn(scene, cameras, settings=DEFAULT, outputs=OUTPUTS, background=0.3):
    """Outputs by name, the gradient by every field, pose, K and background of their sum with random weights, and the stats."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in scene.fields().items()}
    leaves["world_to_cam"], leaves["K"] = cameras.world_to_cam.clone().requires_grad_(), cameras.K.clone().requires_grad_()
    leaves["background"] = torch.full((len(cameras), 3), background, dtype=scene.dtype).requires_grad_()
    views = cameras.replace(world_to_cam=leaves["world_to_cam"], K=leaves["K"])
    stats = RasterStats.zeros(len(scene), dtype=scene.dtype)
    out = raster.render(Scene(**{name: leaves[name] for name in scene.fields()}), views, outputs=outputs, background=leaves["background"],
                        settings=settings, stats=stats, backend="cpu")
    g, named = torch.Generator().manual_seed(7), {k: v for k, v in vars(out).items() if v is not None}
    loss = sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in named.values() if x.requires_grad)
    loss.backward()
    return ({name: x.detach() for name, x in named.items()} | {f"gradient of {name}": x.grad for name, x in leaves.items()}
            | {f"stats.{f.name}": getattr(stats, f.name) for f in dataclasses.fields(stats)})


def assert_same_bits(actual: dict, expected: dict):
    for name in expected:
        a, b = actual[name], expected[name]
        assert a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes(), f"{name} differs"


def relative_l2(actual, expected) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def projected(name, scene, cameras, settings=DEFAULT):
    """What sk_project of library `name` ("v3", "f64") writes; places that it leaves untouched hold -7."""
    lib = native.cpu_library(F64 if name == "f64" else F32, None if name == "f64" else name)
    scene, cameras = scene.to(dtype=lib.real), cameras.to(dtype=lib.real)
    C, N = len(cameras), len(scene)
    new = lambda dtype, *shape: torch.full(shape, -7, dtype=dtype)
    out = {"splats": new(lib.real, C, N, CONST["SK_SPLAT"]), "order": new(torch.int32, C, N), "radii": new(lib.real, C, N),
           "tiles": new(torch.int64, C, N), "counts": new(torch.int64, C, 3)}
    lib.sk_project(N, C, cameras.width, cameras.height, scene.sh_degree, scene.sh.shape[1], packed_settings(settings),
                   *scene.fields().values(), cameras.world_to_cam, cameras.K, cameras.rows, N, *out.values(), None, 0, None)
    return lib, out


# ---- threads


@pytest.mark.parametrize("dtype", [F32, F64])
def test_results_do_not_depend_on_threads(set_threads, dtype):
    # Enough of everything for several tasks a stage: 12 chunks of rows, binning in slices, weight lists in more than one band.
    scene, cameras = random_scene(12_000, degree=1, channels=40, dtype=dtype), ring(2, width=118, height=90, dtype=dtype)
    scene = scene.replace(log_scales=scene.log_scales - 0.5)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(drawn(scene, cameras))
    assert results[0]["visible"].sum(1).min() > 8192 and all(x.isfinite().all() for x in results[0].values())
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_pool_survives_a_fork(set_threads):
    set_threads(2)
    # Small tensors: torch's own OpenMP threads, which it takes for large ones, do not survive.
    scene, cameras = random_scene(600, degree=1, channels=2, dtype=F32), ring(1, width=64, height=48, dtype=F32)
    before = drawn(scene, cameras)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert_same_bits(drawn(scene, cameras), before)
            status = 0
        finally:
            os._exit(status)     # neither pytest nor anything else of the parent's may run here
    end = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0), "the child hangs" if ended == (0, 0) else "the child drew something else"
    assert_same_bits(drawn(scene, cameras), before)


def test_four_python_threads_draw_at_once(set_threads):
    set_threads(2)
    cameras = ring(1, width=80, height=64, dtype=F32)
    scenes = [random_scene(700 + 100 * i, seed=i, degree=1, channels=2, dtype=F32) for i in range(4)]
    expected, wrong = [drawn(scene, cameras) for scene in scenes], []

    def draw(i):
        try:
            for _ in range(5):
                assert_same_bits(drawn(scenes[i], cameras), expected[i])
        except BaseException as why:
            wrong.append(why)

    threads = [threading.Thread(target=draw, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong and not any(thread.is_alive() for thread in threads), wrong


# ---- the ABI


@pytest.mark.parametrize("name", RUNNING)
def test_a_small_capacity_is_answered_with_the_needed_one_and_nothing_else_is_touched(name):
    scene, cameras, F = random_scene(300, channels=3), ring(2, width=40, height=33), 3
    lib, p = projected(name, scene.replace(features=None), cameras)
    features, background, POISON = scene.features.to(lib.real), torch.rand(2, 3).to(lib.real), -7

    def blend(capacity):
        size, new = (2, 33, 40), lambda dtype, *shape: torch.full(shape, POISON, dtype=dtype)
        needed = new(torch.int64, 1)
        out = [new(torch.int32, capacity + 5), new(torch.int64, tile_count(2, 40, 33) + 1), new(lib.real, *size, 3),
               *(new(lib.real, *size) for _ in range(3)), new(lib.real, *size, F)]
        status = lib.sk_blend(300, 2, 40, 33, F, packed_settings(DEFAULT), p["splats"], p["order"], p["tiles"], p["counts"], features,
                              background, capacity, needed, *out, None, 0, None)
        return status, needed.item(), out

    total = int(p["counts"][:, 1].sum())
    for capacity in (0, total - 1):
        status, needed, out = blend(capacity)
        assert (status, needed) == (CONST["SK_MORE"], total) and all((x == POISON).all() for x in out)
    status, needed, (pairs, offsets, *pictures) = blend(total)
    assert (status, needed) == (CONST["SK_OK"], total) and all((x != POISON).all() for x in pictures)
    assert (pairs[:total] >= 0).all() and (pairs[total:] == POISON).all() and offsets[-1] == total


# ---- one answer from every build


@pytest.mark.parametrize("seed", [0, 1])
def test_visibility_and_order_are_bit_equal_in_every_build(seed):
    scene, cameras = random_scene(3000, seed=seed, degree=0, dtype=F32), ring(3, width=60, height=50, dtype=F32, distance=1.2)
    means = scene.means.clone()
    means[1000:2000] = means[:1000]                                                             # ties
    sign = torch.randint(-1, 2, (1000, 3), generator=torch.Generator().manual_seed(seed))
    means[2000:] = (means[:1000].double() * (1 + sign * 2**-24)).float()
    scene = scene.replace(means=means)      # every mean thrice, the third moved by half an ulp: the last bit of the key decides
    for settings in (DEFAULT, SMOOTH):      # each build decides DEFAULT's cut-offs in its own arithmetic; no row here lies on their edge
        results = {name: projected(name, scene, cameras, settings)[1] for name in RUNNING}
        first = results[RUNNING[0]]
        for c in range(3):
            (r0, r1, r2, t), (x, y, z) = cameras.world_to_cam[c, 2].numpy(), means.numpy().T
            key = ((r0 * x + r1 * y) + r2 * z) + t                              # numpy rounds every product and sum to float32
            assert key.dtype == np.float32
            visible = first["radii"][c] > 0
            rows = np.flatnonzero(visible)
            expected = torch.from_numpy(rows[np.argsort(key[rows], kind="stable")])
            if settings is SMOOTH:
                assert visible.tolist() == (key >= np.float32(0.01)).tolist() and not visible.all()
            for name, p in results.items():
                assert torch.equal(p["radii"][c] > 0, visible) and p["counts"][c, 0] == len(rows) and p["counts"][c, 2] == 0, name
                assert torch.equal(p["order"][c, :len(rows)].long(), expected) and (p["order"][c, len(rows):] == -7).all(), name


def errors_against_double(scene, view, settings) -> dict[str, float]:
    """Relative L2 of the picture and of every gradient by its colour."""
    actual, expected = drawn(scene, view, settings, ("color",)), drawn(scene.to(dtype=F64), view.to(dtype=F64), settings, ("color",))
    return {name: relative_l2(actual[name], x) for name, x in expected.items() if name == "color" or name.startswith("gradient")}


def test_float_gradients_without_cut_offs_are_those_of_double_to_1e_5(knn):
    # The margin stays. Without one, four points beside the camera, 0.01 to 0.03 in front of it at slopes up to 60, make it 2.5e-3 (means).
    errors = errors_against_double(*knn, dataclasses.replace(SMOOTH, fov_margin=0.3))
    for name in ("gradient of K", "gradient of world_to_cam"):      # sums over all Gaussians that mostly cancel: 1.9e-5 measured
        assert errors.pop(name) <= 5e-5
    assert max(errors.values()) <= 1e-5, errors


def test_every_float_build_agrees_with_double_to_1e_4(knn, monkeypatch):
    for isa in FLOATS:
        monkeypatch.setenv("SPLATKIT_ISA", isa)
        errors = errors_against_double(*knn, DEFAULT)
        assert max(errors.values()) <= 1e-4, (isa, errors)


# ---- uplift


def test_uplift_is_the_vjp_of_feature_rendering_over_that_of_ones(set_threads):
    scene, cameras, F = random_scene(400, channels=1), ring(2, width=70, height=50), 37
    maps = torch.randn(2, 50, 70, F, dtype=F64, generator=torch.Generator().manual_seed(1))
    features = torch.zeros(400, F, dtype=F64, requires_grad=True)
    out = raster.render(scene.replace(features=features), cameras, outputs=("features",), backend="cpu")
    sums, = torch.autograd.grad(out.features, features, maps, retain_graph=True)
    weights, = torch.autograd.grad(out.features, features, torch.ones_like(maps))
    assert 0 < (weights > 0).sum() < weights.numel()
    lifted = []
    for threads in (1, 2, 3):
        set_threads(threads)
        lifted.append(raster.uplift(scene, ((cameras[c], maps[c]) for c in range(2))))
    torch.testing.assert_close(lifted[0], torch.where(weights > 0, sums / weights, 0), rtol=1e-10, atol=1e-12)
    assert_same_bits(dict(enumerate(lifted[1:])), dict(enumerate(lifted[:1] * 2)))


# ---- input


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("field", ["means", "quats", "log_scales", "logit_opacities", "sh"])
def test_a_value_that_is_not_finite_is_found_in_every_column_and_lane(name, field, monkeypatch):
    dtype = F64 if name == "f64" else F32
    if name != "f64":
        monkeypatch.setenv("SPLATKIT_ISA", name)
    scene, cameras = random_scene(300, degree=1, dtype=dtype), ring(1, dtype=dtype)
    visible = raster.render(scene, cameras, backend="cpu").visible[0].nonzero()[:, 0].tolist()
    columns = scene.fields()[field].view(300, -1).shape[1]
    for i, row in enumerate([*visible[:17], *visible[-3:]]):
        broken = scene.clone()
        broken.fields()[field].view(300, -1)[row, i % columns] = (math.nan, math.inf, -math.inf)[i % 3]
        with pytest.raises(ValueError, match=rf"scene\.{field} is not finite in row {row}:"):
            raster.render(broken, cameras, backend="cpu")


EXTREMES = {
    "log_scales -100": ("log_scales", -100.0),
    "log_scales +50": ("log_scales", 50.0),
    "one axis of log_scales +50": ("log_scales", [50.0, -3, -3]),
    "logits -100": ("logit_opacities", -100.0),
    "logits +100": ("logit_opacities", 100.0),
    "means 1e30": ("means", 1e30),
    "means 1e30 in front": ("means", [0.0, 0, 1e30]),
    "just behind the near plane": ("means", [0.0, 0, 0.0101]),
    "just behind the near plane and far to the side": ("means", [5.0, 0, 0.0101]),
    "at the camera": ("means", 0.0),
    "zero quaternions": ("quats", 0.0),
    "tiny quaternions": ("quats", [1e-30, 0, 2e-30, 0]),
    "huge quaternions": ("quats", [1e30, 0, 2e30, 0]),
    "bright": ("sh", 1e12),
    "2,000 in one place": ("means", [0.1, 0.1, 3.0]),
}


@pytest.mark.parametrize("name", RUNNING)
def test_extreme_values_give_finite_pictures_and_gradients(name, monkeypatch):
    dtype = F64 if name == "f64" else F32
    if name != "f64":
        monkeypatch.setenv("SPLATKIT_ISA", name)
    plain = random_scene(40, degree=1, channels=2, dtype=dtype)
    plain, view = plain.replace(means=plain.means + torch.tensor([0, 0, 3]).to(dtype)), camera(width=40, height=33, dtype=dtype)
    not_finite = []
    for what, (field, value) in EXTREMES.items():
        for rows in (slice(None), slice(3, 40, 9)):      # all rows, and a few among plain ones
            scene = plain.rows(torch.arange(2000) % 40) if what == "2,000 in one place" else plain.clone()
            scene.fields()[field][rows] = torch.tensor(value, dtype=dtype)
            for settings in (DEFAULT, dataclasses.replace(DEFAULT, antialias=True)):
                result = drawn(scene, view, settings)
                not_finite += [(what, key, settings.antialias) for key, x in result.items() if not x.isfinite().all()]
    assert not not_finite, sorted(set(not_finite))


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_where_nothing_is_drawn_there_is_background_and_every_gradient_is_zero(n, dtype):
    scene = gaussians(torch.tensor([[0.0, 0, -2]]).repeat(n, 1), dtype=dtype, features=torch.ones(n, 4, dtype=dtype))
    result = drawn(scene, camera(dtype=dtype), background=0.25)
    assert (result.pop("color") == 0.25).all() and not result["visible"].any() and result["features"].shape == (1, 15, 17, 4)
    gradient = result.pop("gradient of background")
    for name, x in result.items():
        assert (x == 0).all(), name
    for name, x in scene.fields().items():
        assert result[f"gradient of {name}"].shape == x.shape
    transmitted = torch.randn(1, 15, 17, 3, generator=torch.Generator().manual_seed(7)).to(dtype)       # the weights of drawn()
    torch.testing.assert_close(gradient, transmitted.sum((1, 2)))


# ---- torch


def test_render_and_the_loss_compile_into_one_graph_each_with_the_same_picture_and_gradients():
    program = """
import sys, torch
sys.path.insert(0, "tests")
from backends import random_scene, ring
from splatkit import raster
from splatkit.metrics import l1_ssim
from splatkit.scene import Scene
scene, cameras, weights = random_scene(50, channels=3, dtype=torch.float32), ring(1, dtype=torch.float32), torch.randn(1, 20, 24, 3)
def loss(*fields):
    out = raster.render(Scene(*fields), cameras, outputs=("color", "features"), background=torch.full((3,), 0.5), backend="cpu")
    return (torch.tanh(2 * out.color) * weights).sum() + (out.features * weights).sum() + out.alpha.mean()
def value_and_gradients(f, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = f(*inputs)
    return value, *torch.autograd.grad(value, inputs)
target = torch.rand(12, 15, 3)
for f, inputs in ((loss, scene.fields().values()), (lambda image: l1_ssim(2 * image, target), [torch.rand(12, 15, 3)])):
    compiled = value_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(compiled, value_and_gradients(f, inputs), strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
"""
    # In a process without the shape annotations of this run, which dynamo cannot trace; one, for dynamo takes ten seconds to import.
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_operator_passes_opcheck():
    # All are visible: rows that are not drawn stay unwritten, and opcheck compares them.
    scene, view = gaussians([[0, 0, 2], [0.1, 0, 3]], features=torch.rand(2, 3, dtype=F64)), camera()
    inputs = [*scene.fields().values(), view.world_to_cam, view.K, None, torch.ones(1, 3, dtype=F64)]
    inputs = [None if x is None else x.clone().requires_grad_() for x in inputs]
    arguments = (*inputs, view.width, view.height, 0, packed_settings(DEFAULT), 15, [])
    torch.library.opcheck(torch.ops.splatkit.rasterize.default, arguments)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from /proc")
def test_memory_of_features_is_a_small_multiple_of_the_features():
    program = """
import sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from backends import random_scene, ring
from splatkit import raster
N, F = 20_000, 256
kilobytes = lambda key: int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0])
def back_and_forth(n):
    scene, view = random_scene(n, degree=0, channels=F, dtype=torch.float32), ring(1, width=128, height=128, dtype=torch.float32)
    scene = scene.replace(log_scales=scene.log_scales - 0.7).requires_grad_()
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")       # the peak starts anew from here
    out = raster.render(scene, view, outputs=("features",), backend="cpu")
    out.features.backward(torch.ones(()).expand_as(out.features))
    return kilobytes("VmHWM") - before
back_and_forth(10)      # brings the code itself into memory
print(back_and_forth(N) * 1024 / (N * F * 4))
"""
    # In a process of its own: one that has held more before takes from what it did not give back, and other threads come and go in it.
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    # Measured 5.6: the gradient 1, the picture and its gradient 0.8 each, weight lists of at most 48 MiB 2.5, 118k pair records 0.4.
    assert 1 < float(done.stdout) < 7, done.stdout
