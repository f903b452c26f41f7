"""gsplat beside us: its plain torch code as an oracle of our projection and tiles, and the adapter that draws with its kernels.

The oracle needs `pip install gsplat==1.5.3`, a wheel without compiled parts, and no GPU; 1.6 compiles CUDA when it is imported.
"""
import ast
import functools
import gc
import importlib.metadata
import inspect
import math
import weakref
from pathlib import Path

import pytest
import torch
from backends import logit, random_scene, render, ring
from test_native import projected
from tolerances import F32, F64, GRADIENT, ON_PAPER, PICTURE, assert_near, assert_same_l2

import splatkit
from splatkit import native, raster
from splatkit.camera import Cameras
from splatkit.errors import BackendUnavailable
from splatkit.native import CONST
from splatkit.raster import gsplat as adapter
from splatkit.raster.operators import packed_settings, tile_count
from splatkit.raster.reference import render_reference, view_color
from splatkit.raster.types import RasterSettings, RasterStats
from splatkit.scene import Scene

DEFAULT = RasterSettings()
OUTPUTS = ("color", "expected_depth", "features")
# Relative L2. Its torch functions in float32 stay within 5e-7 and 3e-5; the kernels add fast-math and __expf, and have not been measured.
ON_A_CARD, ON_A_CARD_GRADIENT = {F64: 1e-3}, {F64: 5e-3}
SETTINGS = [DEFAULT, RasterSettings(antialias=True), RasterSettings(near=2.2, blur_px2=0.05)]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "antialias", "near-and-blur"])


@pytest.fixture(scope="module")
def gsplat():
    """gsplat's plain torch functions."""
    reason = "gsplat 1.5 is not installed (pip install gsplat==1.5.3)"
    try:
        version = importlib.metadata.version("gsplat")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(reason)
    if not version.startswith("1.5."):
        pytest.skip(f"{reason}: {version} compiles CUDA when it is imported")
    return pytest.importorskip("gsplat.cuda._torch_impl", reason=reason, exc_type=ImportError)


def rigid(count, width, height, distance=2.5):
    """A ring of cameras whose rotations are such to the last bit: gsplat takes the inverse of a pose where we take the transpose."""
    cameras = ring(count, width, height, distance=distance)
    u, _, v = torch.linalg.svd(cameras.world_to_cam[:, :3, :3])
    cameras.world_to_cam[:, :3, :3] = u @ v
    return cameras


def projection(gsplat, scene, cameras, settings=DEFAULT):
    """radii, means2d, depths, conics, compensations by gsplat."""
    covariances, _ = gsplat._quat_scale_to_covar_preci(scene.quats, scene.scales, compute_preci=False)
    return gsplat._fully_fused_projection(scene.means, covariances, cameras.world_to_cam, cameras.K, cameras.width, cameras.height,
                                          eps2d=settings.blur_px2, near_plane=settings.near, calc_compensations=True)


# ---- our native projection and tiles against gsplat's

needs_native = pytest.mark.skipif(native.available()["cpu_f64"] is not None, reason=f"no native library: {native.available()['cpu_f64']}")


@pytest.fixture
def both(gsplat):
    """A scene that cameras stand in the middle of, what sk_project writes of it in float64, and gsplat's projection."""
    scene, cameras = random_scene(150, seed=8), rigid(3, 70, 53, distance=0.9)
    lib, ours = projected("f64", scene, cameras, DEFAULT)
    return scene, cameras, lib, ours, projection(gsplat, scene, cameras)


@needs_native
def test_native_projection_is_that_of_gsplat(both):
    scene, cameras, _, ours, (_, means2d, depths, conics, factor) = both
    sharp = projected("f64", scene, cameras, RasterSettings(antialias=True))[1]
    seen = (ours["radii"] > 0) & (sharp["radii"] > 0)
    assert 60 < seen.sum() < 400
    x, y, a, b, c, z = (ours["splats"][..., CONST[f"SK_{name}"]] for name in ("X", "Y", "A", "B", "C", "Z"))
    mean_px = torch.stack([x + cameras.width / 2, y + cameras.height / 2], dim=-1)      # X, Y count from the middle of the picture
    inverse = torch.stack([a * a, a * b, b * b + c * c], dim=-1) * 2 * math.log(2)      # log2 alpha = LOGO - (A dx + B dy)^2 - (C dy)^2
    opacity, plain = sharp["splats"][..., CONST["SK_LOGO"]].exp2(), torch.sigmoid(scene.logit_opacities)
    for mine, theirs in ((mean_px, means2d), (inverse, conics), (z, depths), (opacity, plain * factor)):
        assert_same_l2(mine[seen], theirs[seen], GRADIENT)


@needs_native
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_colours_seen_by_a_camera_are_those_of_gsplat(gsplat, degree):
    scene, cameras = random_scene(60, seed=degree, degree=degree), rigid(2, 24, 20)
    _, ours = projected("f64", scene, cameras)
    for c in range(len(cameras)):
        eye = torch.inverse(cameras.world_to_cam[c])[:3, 3]
        theirs = (gsplat._spherical_harmonics(degree, scene.means - eye, scene.sh) + 0.5).clamp(min=0)
        seen, rgb = ours["radii"][c] > 0, ours["splats"][c, :, CONST["SK_R"]:CONST["SK_BLUE"] + 1]
        assert seen.sum() > 20
        assert_near(rgb[seen], theirs[seen], ON_PAPER)
        assert_near(view_color(scene, cameras[c], degree), theirs, ON_PAPER)


@needs_native
def test_what_gsplat_leaves_out_is_not_drawn_by_us(both):
    _, _, _, ours, (radii, *_) = both
    boxed = (radii > 0).all(dim=-1)
    assert not (ours["radii"] > 0)[~boxed].any() and 50 < (~boxed).sum()
    # gsplat's box ends at 3.33 deviations, where the most opaque Gaussian falls to 1/255, rounded up to pixels.
    assert (ours["radii"] <= radii.amax(dim=-1)).all()


@needs_native
def test_our_tile_lists_are_gsplat_s_less_pairs_that_no_pixel_shows(both, gsplat):
    scene, cameras, lib, ours, (radii, means2d, depths, conics, _) = both
    C, N, size, (width, height) = len(cameras), len(scene), CONST["SK_TILE"], (cameras.width, cameras.height)
    across, down = -(-width // size), -(-height // size)
    _, keys, flat = gsplat._isect_tiles(means2d, radii, depths, size, across, down)
    starts = gsplat._isect_offset_encode(keys, C, across, down).flatten().tolist() + [len(flat)]
    theirs = [[i % N for i in flat[a:b].tolist()] for a, b in zip(starts, starts[1:])]

    needed, offsets = torch.zeros(1, dtype=torch.int64), torch.zeros(tile_count(C, width, height) + 1, dtype=torch.int64)
    room, pairs, alpha = len(flat), torch.full((len(flat),), -1, dtype=torch.int32), torch.empty(C, height, width, dtype=F64)
    lib.sk_blend(N, C, width, height, 0, packed_settings(DEFAULT), ours["splats"], ours["order"], ours["tiles"], ours["counts"], None, None,
                 room, needed, pairs, offsets, None, alpha, None, None, None, *lib.room("BLEND", N, C, width, height, 0, room))
    starts = offsets.tolist()
    mine = [pairs[a:b].tolist() for a, b in zip(starts, starts[1:])]

    assert len(theirs) == len(mine) and 0 < needed.item() < len(flat)
    opacity = torch.sigmoid(scene.logit_opacities)
    for tile, (rows, kept) in enumerate(zip(theirs, mine)):
        c, (y, x) = tile // (across * down), divmod(tile % (across * down), across)
        assert kept == [i for i in rows if i in set(kept)]      # the same order, front to back, and nothing that gsplat lacks
        left_out = torch.tensor([i for i in rows if i not in set(kept)], dtype=torch.long)
        pixels = (torch.arange(i * size, min((i + 1) * size, end)) + 0.5 for i, end in ((x, width), (y, height)))
        px = torch.cartesian_prod(*pixels)
        dx, dy = (px - means2d[c, left_out, None]).unbind(-1)
        xx, xy, yy = conics[c, left_out, None].unbind(-1)
        shown = opacity[left_out, None] * torch.exp(-0.5 * (xx * dx * dx + 2 * xy * dx * dy + yy * dy * dy)) >= DEFAULT.alpha_min
        assert not shown.any()


# ---- the adapter


class Raster(torch.autograd.Function):
    """gsplat's last step in its own manner: pictures of splats, and `absgrad` left on the positions by the backward."""

    @staticmethod
    def forward(ctx, means2d, conics, colors, opacities, order, size):
        ctx.save_for_backward(means2d, conics, colors, opacities, order)
        ctx.size = size
        return Raster.picture(means2d[:, None, None], conics, colors, opacities, order, size)

    @staticmethod
    def picture(means2d, conics, colors, opacities, order, size):
        """Of positions [C, H or 1, W or 1, N, 2]."""
        y, x = torch.meshgrid(*(torch.arange(s) + 0.5 for s in size), indexing="ij")
        dx, dy = (torch.stack([x, y], dim=-1)[:, :, None] - means2d).unbind(-1)
        xx, xy, yy = conics[:, None, None].unbind(-1)
        alpha = (opacities[:, None, None] * torch.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)).clamp(max=0.999)
        alpha = torch.where(alpha >= 1 / 255, alpha, 0).take_along_dim(order[:, None, None], dim=-1)
        alpha = torch.where(torch.cumprod(1 - alpha, dim=-1) > 1e-4, alpha, 0)
        left = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], dim=-1), dim=-1)
        return torch.einsum("chwn,cnd->chwd", alpha * left[..., :-1], colors.take_along_dim(order[..., None], dim=1)), 1 - left[..., -1:]

    @staticmethod
    def backward(ctx, *v):
        means2d, *others, order = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (means2d[:, None, None].expand(-1, *ctx.size, -1, -1), *others)]
            v_means2d, *v_others = torch.autograd.grad(Raster.picture(*leaves, order, ctx.size), leaves, v)
        means2d.absgrad = v_means2d.abs().sum(dim=(1, 2))
        return v_means2d.sum(dim=(1, 2)), *v_others, None, None


@pytest.fixture
def in_torch(gsplat):
    """gsplat.rasterization for the arguments that the adapter gives, of gsplat's torch functions; unset where nothing is drawn."""
    from gsplat import rasterization as of_package

    def rasterization(**given):
        a = inspect.signature(of_package).bind(**given)     # a name or a value that is missing is an error here
        a.apply_defaults()
        a = a.arguments
        scene = Scene(a["means"], a["quats"], a["scales"].log(), a["opacities"], a["means"][:, None])
        cameras = Cameras(a["viewmats"], a["Ks"], a["width"], a["height"])
        _, means2d, depths, conics, factor = projection(gsplat, scene, cameras, RasterSettings(near=a["near_plane"], blur_px2=a["eps2d"]))
        opacities = a["opacities"] * (factor if a["rasterize_mode"] == "antialiased" else torch.ones_like(factor))

        # As its kernel has it, not its torch function: the box ends where alpha does.
        xx, xy, yy = conics.unbind(-1)
        sides = (2 * torch.log(255 * opacities)[..., None] * torch.stack([yy, xx], dim=-1) / (xx * yy - xy * xy)[..., None]).sqrt().ceil()
        size = torch.tensor([cameras.width, cameras.height])
        shown = (depths >= a["near_plane"]) & ((means2d + sides > 0) & (means2d - sides < size)).all(dim=-1)
        means2d, conics = (torch.where(shown[..., None], x, 7.0) for x in (means2d, conics))

        colors = a["colors"]
        if a["sh_degree"] is not None:
            away = a["means"] - torch.inverse(a["viewmats"])[:, None, :3, 3]
            colors = (gsplat._spherical_harmonics(a["sh_degree"], away, colors.expand(len(away), -1, -1, -1)) + 0.5).clamp(min=0)
        colors = {"RGB": [colors], "RGB+ED": [colors, depths[..., None]], "ED": [depths[..., None]]}[a["render_mode"]]
        colors = torch.cat([x.expand(len(depths), -1, -1) for x in colors], dim=-1)
        order = torch.where(shown, depths, torch.inf).sort(dim=1, stable=True).indices
        picture, alpha = Raster.apply(means2d, conics, colors, torch.where(shown, opacities, 0), order, (cameras.height, cameras.width))
        if a["backgrounds"] is not None:
            behind = torch.nn.functional.pad(a["backgrounds"], (0, picture.shape[-1] - 3))
            picture = picture + (1 - alpha) * behind[:, None, None]
        if "ED" in a["render_mode"]:
            picture = torch.cat([picture[..., :-1], picture[..., -1:] / alpha.clamp(min=1e-10)], dim=-1)
        radii = torch.where(shown[..., None], sides, 0).int()
        return picture, alpha, {"means2d": means2d, "radii": radii, "conics": conics, "opacities": opacities}

    return rasterization


def modest(scene):
    """The scene with opacities up to 0.95: caps on alpha, which differ, are not met."""
    return scene.replace(logit_opacities=scene.logit_opacities.clamp(max=logit(0.95)))


def everything(draw, scene, cameras, outputs, settings, stats=None):
    """Outputs, gradients of their sum with random weights (of poses along six rigid motions) and stats by name, in float64 on the CPU."""
    leaves, pose = scene.clone().requires_grad_(), cameras.world_to_cam.clone().requires_grad_()
    background = torch.linspace(0.2, 0.9, 3 * len(cameras)).to(scene.means).reshape(-1, 3).requires_grad_()
    out = draw(leaves, cameras.replace(world_to_cam=pose), outputs, background, min(2, scene.sh_degree), settings, stats)
    g, named = torch.Generator().manual_seed(7), {name: x for name, x in vars(out).items() if x is not None}
    sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in named.values() if x.requires_grad).backward()
    for name, leaf in (leaves.fields() | {"background": background}).items():
        if leaf.grad is not None:
            named[f"gradient of {name}"] = leaf.grad
    motions = torch.zeros(6, 4, 4).to(pose)
    for k, (i, j) in enumerate([(0, 1), (1, 2), (2, 0)]):
        motions[k, i, j], motions[k, j, i], motions[k + 3, k, 3] = 1, -1, 1
    named["gradient of world_to_cam"] = torch.einsum("cij,kil,clj->ck", pose.grad, motions, pose.detach())
    named |= {f"stats.{name}": x for name, x in vars(stats).items()} if stats else {}
    return {name: x.detach().double().cpu() for name, x in named.items()}


def assert_same(actual, expected, picture, gradient):
    assert actual.keys() == expected.keys() and torch.equal(actual["visible"], expected["visible"])
    for name, value in expected.items():
        assert_same_l2(actual[name], value, gradient if name[:5] in ("gradi", "stats") else picture, name)


@each_setting
@pytest.mark.parametrize("outputs", [OUTPUTS, ("color",), ("features", "expected_depth"), ("expected_depth",), ()], ids="+".join)
def test_adapter_on_gsplat_s_torch_functions_draws_our_picture(in_torch, outputs, settings):
    scene, cameras = modest(random_scene(40, seed=5, channels=5)), rigid(2, 33, 26)
    scene.quats[0] = 0
    theirs = everything(functools.partial(adapter.draw, in_torch), scene, cameras, outputs, settings)
    assert 40 < theirs["visible"].sum() < 80
    assert_same(theirs, everything(render_reference, scene, cameras, outputs, settings), PICTURE, GRADIENT)


@each_setting
def test_adapter_fills_the_stats_that_the_reference_fills(in_torch, settings):
    scene, cameras = modest(random_scene(40, seed=6)), rigid(3, 33, 26)
    stats = RasterStats.zeros(40, dtype=F64), RasterStats.zeros(40, dtype=F64)
    theirs = everything(functools.partial(adapter.draw, in_torch), scene, cameras, OUTPUTS[:2], settings, stats[0])
    assert_same(theirs, everything(render_reference, scene, cameras, OUTPUTS[:2], settings, stats[1]), PICTURE, GRADIENT)


def test_adapter_draws_row_ranges_and_indexes_results_by_global_row(in_torch):
    scene, cameras = modest(random_scene(60, seed=7)), rigid(3, 33, 26).replace(rows=torch.tensor([[0, 60], [20, 45], [7, 8]]))
    stats = RasterStats.zeros(60, dtype=F64), RasterStats.zeros(60, dtype=F64)
    theirs = everything(functools.partial(adapter.draw, in_torch), scene, cameras, OUTPUTS[:2], DEFAULT, stats[0])
    assert theirs["radii_px"].shape == (3, 60)
    assert_same(theirs, everything(render_reference, scene, cameras, OUTPUTS[:2], DEFAULT, stats[1]), PICTURE, GRADIENT)


def test_stats_are_filled_when_only_colours_are_trained(in_torch):
    scene, stats = modest(random_scene(20, seed=9)), RasterStats.zeros(20, dtype=F64)
    scene.sh.requires_grad_()
    adapter.draw(in_torch, scene, ring(1), ("color",), None, 3, DEFAULT, stats).color.sum().backward()
    assert stats.grad_sum.max() > 0 and scene.sh.grad is not None


def test_a_picture_with_stats_is_freed_without_the_garbage_collector(in_torch):
    held = []

    def rasterization(**given):
        values, alpha, meta = in_torch(**given)
        held.append(weakref.ref(meta["means2d"]))
        return values, alpha, meta

    scene, stats = random_scene(20).requires_grad_(), RasterStats.zeros(20, dtype=F64)
    gc.disable()
    try:
        out = adapter.draw(rasterization, scene, ring(1), ("color",), None, 3, DEFAULT, stats)
        assert held[0]() is not None
        del out
        assert held[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("changes, text", [
    (dict(outputs=("color", "median_depth")), "median_depth"),
    (dict(settings=RasterSettings(alpha_min=0.01)), "alpha_min=0.00392157.* 0.01"),
    (dict(settings=RasterSettings(alpha_max=0.9)), "alpha_max=0.99"),
    (dict(settings=RasterSettings(transmittance_min=0)), "transmittance_min=0.0001"),
    (dict(settings=RasterSettings(fov_margin=math.inf)), "fov_margin=0.3.* inf"),
    (dict(settings=RasterSettings(deterministic=True)), "deterministic"),
    (dict(scene=random_scene(4, channels=2)), "float32.*float64"),
    (dict(cameras=ring(1, dtype=F32).replace(K=ring(1, dtype=F32).K.requires_grad_())), "gradient for K"),
    (dict(outputs=("features",), stats=RasterStats.zeros(4)), "stats.*features"),
    (dict(), r"cpu.*\.to\('cuda'\)"),
], ids=lambda value: None)
def test_adapter_refuses_in_one_line_what_gsplat_cannot_do(changes, text):
    arguments = dict(scene=random_scene(4, channels=2, dtype=F32), cameras=ring(1, dtype=F32), outputs=("color",), background=None,
                     sh_degree=3, settings=DEFAULT, stats=None)
    with pytest.raises(ValueError, match=f"^backend 'gsplat' .*{text}.*$"):
        adapter.render_gsplat(**arguments | changes)


def test_gsplat_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"gsplat: .*pip install splatkit\[gsplat\].*available here: .*reference"):
        raster.render(random_scene(3, dtype=F32), ring(1, dtype=F32), backend="gsplat")
    monkeypatch.setattr(adapter, "find_spec", lambda name: "installed")
    assert raster.backends()["gsplat"] == "torch sees no CUDA device"


def test_gsplat_is_imported_when_the_adapter_draws_and_nowhere_else():
    at = lambda nodes: [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "gsplat" and not n.level
                        or isinstance(n, ast.Import) and any(a.name.split(".")[0] == "gsplat" for a in n.names)]
    pages = {p.name: ast.parse(p.read_text()) for p in Path(splatkit.__file__).parent.rglob("*.py")}
    assert [name for name, page in pages.items() if at(ast.walk(page))] == ["gsplat.py"] and not at(pages["gsplat.py"].body)


@pytest.mark.gpu
@each_setting
def test_gsplat_draws_our_picture_on_a_card(settings):
    scene, cameras = modest(random_scene(300, seed=11)), rigid(3, 50, 37).replace(rows=torch.tensor([[0, 300], [100, 250], [0, 200]]))
    stats = RasterStats.zeros(300, device="cuda"), RasterStats.zeros(300, dtype=F64)

    def by_gsplat(scene, cameras, outputs, background, sh_degree, settings, stats):
        return render(scene, cameras, outputs=outputs, background=background, sh_degree=sh_degree, settings=settings, stats=stats,
                      backend="gsplat")

    theirs = everything(by_gsplat, scene.to("cuda", F32), cameras.to("cuda", F32), OUTPUTS[:2], settings, stats[0])
    ours = everything(render_reference, scene, cameras, OUTPUTS[:2], settings, stats[1])
    assert_same(theirs, ours, ON_A_CARD, ON_A_CARD_GRADIENT)
