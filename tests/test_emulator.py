"""The CUDA kernels without a card: compiled by g++, a block's threads as fibers in shuffled order (tests/emulator). They compute what the
double library does, stay inside their arrays and do not race; and copies of them, broken on purpose, show that it would be noticed."""
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import OUTPUTS, SMOOTH, camera, gaussians, random_scene, ring
from emulator.build import CUDA, HERE, build, run
from emulator.tour import DEFAULT, F32, F64, FIXED, ONE, SUBJECTS, TWO, distance, drawn, settled, small
from test_native import EXTREMES

from splatkit import native, raster
from splatkit.native import CONST
from splatkit.raster.operators import packed_settings, tile_count

pytestmark = pytest.mark.skipif(native.available()["cpu_f64"] is not None, reason=f"no native library: {native.available()['cpu_f64']}")
REAL = native.cpu_library
# Wider than 1e-5: sums over a Gaussian's pixels that mostly cancel. 1.6e-5 measured, and 1.13e-5 of whole-picture Gaussians on a Cascade Lake: torch's random scenes differ by processor.
WIDER = {"depth alone": 5e-5, "row ranges": 5e-5, "whole-picture Gaussians": 2e-5}


@pytest.fixture(scope="session")
def built(once_per_run):
    """Where the real kernels, compiled in a mode of the emulator, are."""
    return lambda mode: once_per_run(f"emulator-{mode}", lambda folder: build(folder, mode))


def library(folder: Path, monkeypatch) -> native.Library:
    """The library in `folder`, which from here on works on float32."""
    lib = native.Library(next(folder.glob("*.so")), F32)
    monkeypatch.setattr(native, "cpu_library", lambda dtype, isa=None: lib if dtype is F32 else REAL(dtype, isa))
    return lib


@pytest.fixture
def emulated(built, monkeypatch) -> native.Library:
    return library(built("plain"), monkeypatch)


@pytest.fixture
def racing(built, monkeypatch) -> native.Library:
    return library(built("races"), monkeypatch)


# ---- the same results as the double library


@pytest.mark.parametrize("subject", SUBJECTS)
def test_kernels_compute_what_the_double_library_does(emulated, subject):
    far = {name: e for name, e in distance(SUBJECTS[subject](F32), SUBJECTS[subject](F64)).items() if not e <= WIDER.get(subject, 1e-5)}
    assert not far


def projected(lib, scene, cameras, settings=DEFAULT, capacity=None):
    """What sk_project writes; places that it leaves untouched hold -7."""
    scene, cameras = scene.to(dtype=lib.real), cameras.to(dtype=lib.real)
    C, N, new = len(cameras), len(scene), lambda dtype, *shape: torch.full(shape, -7, dtype=dtype)
    out = {"splats": new(lib.real, C, N, CONST["SK_SPLAT"]), "order": new(torch.int32, C, N), "radii": new(lib.real, C, N),
           "tiles": new(torch.int64, C, N), "counts": new(torch.int64, C, 3)}
    lib.sk_project(N, C, cameras.width, cameras.height, scene.sh_degree, scene.sh.shape[1], packed_settings(settings),
                   *scene.fields().values(), cameras.world_to_cam, cameras.K, cameras.rows, N if capacity is None else capacity, *out.values(),
                   *lib.room("PROJECT", N, capacity=N if capacity is None else capacity))
    return out


@pytest.mark.parametrize("settings", [DEFAULT, SMOOTH], ids=["default", "smooth"])
def test_visibility_and_order_are_those_of_the_double_library(emulated, settings):
    scene, cameras = random_scene(900, degree=0, dtype=F32), ring(2, width=60, height=50, dtype=F32, distance=1.2)
    means = scene.means.clone()
    means[300:600] = means[:300]                                                               # ties
    sign = torch.randint(-1, 2, (300, 3), generator=torch.Generator().manual_seed(0))
    means[600:] = (means[:300].double() * (1 + sign * 2**-24)).float()                         # half an ulp: the key's last bit decides
    scene = scene.replace(means=means)
    actual, expected = projected(emulated, scene, cameras, settings), projected(REAL(F64), scene, cameras, settings)
    assert torch.equal(actual["radii"] > 0, expected["radii"] > 0) and torch.equal(actual["counts"][:, ::2], expected["counts"][:, ::2])
    for c, visible in enumerate(expected["counts"][:, 0].tolist()):
        assert 100 < visible < 900
        assert torch.equal(actual["order"][c, :visible], expected["order"][c, :visible])


def test_rows_beyond_the_room_for_sorting_stand_unsorted_but_each_once(emulated):
    scene, cameras = random_scene(900, degree=0, dtype=F32), ring(2, width=60, height=50, dtype=F32, distance=1.2)
    whole = projected(emulated, scene, cameras)
    for capacity in (0, 1, 100, 256, int(whole["counts"][0, 0])):
        few = projected(emulated, scene, cameras, capacity=capacity)
        assert all(torch.equal(few[k], whole[k]) for k in ("counts", "radii", "tiles"))
        for c, visible in enumerate(whole["counts"][:, 0].tolist()):
            assert torch.equal(few["order"][c, :visible].sort().values, whole["order"][c, :visible].sort().values)
            if visible <= capacity:
                assert torch.equal(few["order"][c, :visible], whole["order"][c, :visible])


@pytest.mark.parametrize("how", [{}, {"outputs": ("color",), "stats": False}, {"outputs": ("features",), "stats": False}], ids=["everything", "colour", "features"])
def test_deterministic_gradients_have_the_same_bits_twice_and_are_the_other_s_sums(emulated, how):
    scene = settled(small(channels=70), TWO, DEFAULT)       # blocks and threads take turns in another order each time
    first, second, free = (drawn(scene, TWO, settings, **how) for settings in (FIXED, FIXED, DEFAULT))
    for name, x in first.items():
        assert x.numpy().tobytes() == second[name].numpy().tobytes(), name
    assert max(distance(free, first).values()) <= 1e-5


def gradients(scene, view, v_color, dtype, settings=FIXED) -> dict[str, torch.Tensor]:
    """Gradients by field and row [N,...] from that by the picture."""
    leaves, view = scene.to(dtype=dtype).requires_grad_(), view.to(dtype=dtype)
    out = raster.render(leaves, view, settings=settings, backend="cpu")
    fields = {name: x for name, x in leaves.fields().items() if name != "features"}
    return dict(zip(fields, torch.autograd.grad(out.color, list(fields.values()), v_color.to(dtype))))


# In another tile, or in the same, whose largest gradient is then that of the other Gaussian; and a faint one has hardly any opacity.
@pytest.mark.parametrize("apart, opacity", [(40, 0.8), (40, 0.006), (10, 0.8), (10, 0.006)])
def test_a_deterministic_gradient_is_right_to_itself_beside_one_of_1e8_times_its_size(emulated, apart, opacity):
    places = torch.tensor([[-apart / 2, 0.3, 20], [apart / 2, 0.3, 20]]) + torch.tensor([-24.0, 8, 0])      # of pixels
    scene, view = gaussians(places, scale=1.0, opacity=(0.8, opacity), color=(0.7, 0.2, 0.5)), camera(width=96, height=32)
    scene = scene.replace(quats=torch.tensor([[1, 0.2, -0.1, 0.3]] * 2, dtype=F64), log_scales=scene.log_scales + torch.tensor([0.2, -0.1, 0.05]))
    v_color = torch.randn(1, 32, 96, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    v_color[:, :, 24:] *= 1e-8      # the place between them
    actual, expected = gradients(scene, view, v_color, F32), gradients(scene, view, v_color, F64)
    for name, y in expected.items():
        assert 1e6 < y[0].norm() / y[1].norm() < 1e12
        for row in range(2):
            assert (actual[name][row] - y[row]).norm() <= 1e-4 * y[row].norm(), (name, row)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_makes_those_nan_that_it_reaches_and_no_others(emulated, value):
    scene, view = settled(small(degree=0), ONE, DEFAULT), ONE
    v_color = torch.randn(1, view.height, view.width, 3, generator=torch.Generator().manual_seed(0))
    v_color[0, 20, 20, 1] = value
    fixed, free = gradients(scene, view, v_color, F32), gradients(scene, view, v_color, F32, DEFAULT)
    for name, x in free.items():
        finite = x.isfinite()
        assert 0 < finite.sum() < finite.numel() and torch.equal(fixed[name].isnan(), ~finite), name
        assert (fixed[name] - x)[finite].norm() <= 1e-5 * x[finite].norm(), name


# ---- the contract of capacities


def test_with_too_small_a_capacity_the_picture_is_the_background_and_needed_says_how_many(emulated):
    N, C, W, H, F = 100, 2, 40, 33, 3
    scene, cameras, background = random_scene(N, channels=F, dtype=F32), ring(C, width=W, height=H, dtype=F32), torch.rand(C, 3)
    POISON = -7
    p = projected(emulated, scene.replace(features=None), cameras)
    total = int(p["counts"][:, 1].sum())

    def blend(capacity):
        new = lambda dtype, *shape: torch.full(shape, POISON, dtype=dtype)
        needed, size = new(torch.int64, 1), (C, H, W)
        out = [new(torch.int32, capacity), new(torch.int64, tile_count(C, W, H) + 1), new(F32, *size, 3),
               *(new(F32, *size) for _ in range(3)), new(F32, *size, F)]
        status = emulated.sk_blend(N, C, W, H, F, packed_settings(DEFAULT), p["splats"], p["order"], p["tiles"], p["counts"],
                                   scene.features, background, capacity, needed, *out, *emulated.room("BLEND", N, C, W, H, F, capacity))
        assert (status, needed.item()) == (CONST["SK_OK"], total)
        return out

    for capacity in (0, 1, total - 1):
        _, offsets, color, *others = blend(capacity)
        assert (offsets == 0).all() and torch.equal(color, background[:, None, None].expand_as(color)) and all((x == 0).all() for x in others)
    exact, roomy = blend(total), blend(total + 1000)
    assert all((x != POISON).all() for x in exact) and exact[1][-1] == total
    assert torch.equal(roomy[0][:total], exact[0]) and all(torch.equal(a, b) for a, b in zip(roomy[1:], exact[1:]))


def test_too_little_scratch_is_an_error_that_says_so(emulated):
    image = torch.rand(20, 20, 3)
    with pytest.raises(RuntimeError, match="scratch"):
        emulated.sk_l1_ssim(20, 20, image, image, None, 0.2, torch.empty(2, dtype=F64), None, torch.empty(8, dtype=torch.int64), 8, None)


def test_what_runs_on_cpus_alone_is_an_error_that_says_so(emulated):
    scene = random_scene(3, degree=0, dtype=F32)
    fields = (scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh)
    with pytest.raises(RuntimeError, match="sk_pack_core: runs on CPUs"):
        emulated.sk_pack_core(3, 1, *fields, 3, 40, torch.empty(40, dtype=torch.int32), torch.empty(1, dtype=torch.int32), None)


# ---- input


@pytest.mark.parametrize("n", [0, 5])
def test_where_nothing_is_drawn_there_is_background_and_every_gradient_is_zero(emulated, n):
    scene = gaussians(torch.tensor([[0.0, 0, -2]]).repeat(n, 1), dtype=F32, features=torch.ones(n, 4))
    for settings in (DEFAULT, FIXED):
        result = drawn(scene, camera(dtype=F32), settings)
        assert (result.pop("color") == torch.tensor(0.3)).all() and not result["visible"].any()
        result.pop("gradient of background")
        for name, x in result.items():
            assert (x == 0).all(), name


@pytest.mark.parametrize("what", EXTREMES)
def test_extreme_values_give_finite_pictures_and_gradients(emulated, monkeypatch, what):
    field, value = EXTREMES[what]
    plain = random_scene(40, degree=1, channels=2, dtype=F32)
    plain, view = plain.replace(means=plain.means + torch.tensor([0.0, 0, 3])), camera(width=40, height=33, dtype=F32)
    for rows in (slice(None), slice(3, 40, 9)):      # all rows, and a few among plain ones
        scene = plain.rows(torch.arange(600) % 40) if what == "2,000 in one place" else plain.clone()
        scene.fields()[field][rows] = torch.tensor(value)
        result = drawn(scene, view)
        assert all(x.isfinite().all() for x in result.values()), [name for name, x in result.items() if not x.isfinite().all()]
        with monkeypatch.context() as patch:
            patch.setattr(native, "cpu_library", REAL)
            assert torch.equal(raster.render(scene, view, backend="cpu").visible, result["visible"])


@pytest.mark.parametrize("field", ["means", "quats", "log_scales", "logit_opacities", "sh", "features"])
def test_a_value_that_is_not_finite_is_named(emulated, field):
    scene, cameras = random_scene(70, degree=1, channels=2, dtype=F32), ring(1, dtype=F32)
    visible = raster.render(scene, cameras, backend="cpu").visible[0].nonzero()[:, 0]
    for i, row in enumerate(visible[:: len(visible) // 6].tolist()):
        broken = scene.clone()
        values = broken.fields()[field].view(70, -1)
        values[row, i % values.shape[1]] = (math.nan, math.inf, -math.inf)[i % 3]
        with pytest.raises(ValueError, match=rf"scene\.{field} is not finite in row {row}:"):
            raster.render(broken, cameras, outputs=OUTPUTS, backend="cpu")


# ---- races and bounds


def located(error: str, folder: Path) -> str:
    """`error` with the lines of the sources at its code addresses."""
    def line(place):
        return run("addr2line", "-Cfip", "-e", place[1], place[2]).replace("(anonymous namespace)::", "")
    return re.sub(r"([^\s(]+\.so)\+(0x\w+)", line, error)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_two_threads_touch_the_same_place_unordered(racing, built, subject):
    try:
        SUBJECTS[subject](F32)
    except RuntimeError as race:
        pytest.fail(located(str(race), built("races")))


def watched(path: Path) -> subprocess.CompletedProcess:
    """The tour through the library under AddressSanitizer, which has to be in the process from its start."""
    sanitizer = run("g++", "-print-file-name=libasan.so").strip()
    if not Path(sanitizer).is_absolute():
        pytest.skip("g++ has no libasan here")
    environment = os.environ | {"LD_PRELOAD": sanitizer, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
                                "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE.parent.parent)))}
    return subprocess.run([sys.executable, HERE / "tour.py", path], env=environment, capture_output=True, text=True, timeout=300)


def test_kernels_stay_inside_their_arrays(built):
    done = watched(next(built("address").glob("*.so")))
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[-6000:]}"
    assert done.stdout.splitlines() == list(SUBJECTS)


def test_a_read_past_the_end_of_the_pairs_is_found(built, tmp_path):
    changed = changed_copy(tmp_path, "cuda_tile.h", r"pairs\[([^\]]+)\]", r"pairs[\1 + 1]")
    done = watched(build(tmp_path, "address", changed, built("address")))
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "cuda_tile.h" in done.stderr, done.stderr[-3000:]


# ---- broken on purpose


def changed_copy(folder: Path, name: str, pattern: str, replacement: str) -> Path:
    """A copy of the sources with every `pattern` in file `name` replaced."""
    copy = folder / "src"
    shutil.copytree(CUDA / "src", copy)
    text, changed = re.subn(pattern, replacement, (copy / name).read_text())
    assert changed, f"{name} has nothing like {pattern}: adapt this test"
    (copy / name).write_text(text)
    return copy


PLAIN_ATOMIC = r"atomicAdd\(([\w.+* \[\]]+), ([\w\[\]]+)\)"


@pytest.mark.parametrize("name, pattern, replacement, subject", [
    # the first barrier of the pair around the filling of shared memory, then the second
    ("cuda_loss.cu", r"(ssim_kernel\(LossArgs a\) \{(?:.|\n)*?)__syncthreads\(\);", r"\1", "loss"),
    ("cuda_loss.cu", r"(ssim_kernel\(LossArgs a\) \{(?:.|\n)*?__syncthreads\(\);(?:.|\n)*?)__syncthreads\(\);", r"\1", "loss"),
    ("cuda_tile.h", r"__syncwarp\(\);", "", "colour of degree 0"),
    ("cuda_blend_vjp.cu", PLAIN_ATOMIC, r"*(\1) += \2", "colour of degree 0"),
    ("cuda_features.cu", PLAIN_ATOMIC, r"*(\1) += \2", "uplift of 5 channels"),
    ("cuda_project.h", r"__syncthreads\(\);", "", "colour of degree 0"),
], ids=["no barrier before filling", "no barrier after filling", "no barrier of a warp", "no atomic sum of gradients",
        "no atomic sum of features", "no barrier after the view"])
def test_a_race_is_found(built, tmp_path, monkeypatch, name, pattern, replacement, subject):
    library(build(tmp_path, "races", changed_copy(tmp_path, name, pattern, replacement), built("races")).parent, monkeypatch)
    with pytest.raises(RuntimeError, match="race") as race:
        SUBJECTS[subject](F32)
    assert f"{name}:" in located(str(race.value), tmp_path)


@pytest.fixture
def broken(built, tmp_path, monkeypatch):
    """Puts a changed copy of the kernels to work."""
    return lambda *change: library(build(tmp_path, "plain", changed_copy(tmp_path, *change), built("plain")).parent, monkeypatch)


def test_a_barrier_that_one_thread_skips_is_found(broken):
    broken("cuda_loss.cu", r"(double sum_of_block(?:.|\n)*?)__syncthreads\(\);", r"\1if (threadIdx.x != 5) __syncthreads();")
    with pytest.raises(RuntimeError, match="deadlock"):
        SUBJECTS["loss"](F32)


def test_shared_memory_that_nobody_wrote_is_found(broken):
    lib = broken("cuda_project.cu", r"if \(threadIdx\.x < 3\) sums\[threadIdx\.x\] = 0;", "")
    scene = random_scene(30, degree=0)
    assert not torch.equal(projected(lib, scene, ONE)["counts"], projected(REAL(F64), scene, ONE)["counts"])


@pytest.mark.parametrize("wait", ["__pipeline_wait_prior", "__pipeline_commit"])
def test_a_copy_that_nobody_waited_for_is_found(broken, wait):
    broken("cuda_features.cu", rf"{wait}\([^;]*\);", "")
    far = distance(SUBJECTS["40 channels"](F32), SUBJECTS["40 channels"](F64))
    assert not far["features"] <= 1e-5
