"""The native rasterizer as torch operators: two C entries forward (project, blend), two backward; torch allocates all memory.

On a card nothing waits for the blend: the pairs of the last pictures say how many the next may need (`_room`), and the count that
projection leaves is read while the blend already runs. Where it was too small, the blend is done again.
"""
import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .. import native
from ..native import CONST
from ..scene import Scene
from ..camera import Cameras
from .types import RasterSettings, RasterStats, RenderOutput

COLOR, EXPECTED_DEPTH, MEDIAN_DEPTH, FEATURES = 1, 2, 4, 8     # bits of `outputs`
SPLAT, TILE = CONST["SK_SPLAT"], CONST["SK_TILE"]
PAIRS_MAX = 2**31 - 1


def render_native(scene: Scene, cameras: Cameras, outputs: tuple[str, ...], background: Tensor | None, sh_degree: int,
                  settings: RasterSettings, stats: RasterStats | None) -> RenderOutput:
    """render() by the library of the scene's device and dtype. Arguments are checked by the caller."""
    wanted = sum(bit for bit, name in ((COLOR, "color"), (EXPECTED_DEPTH, "expected_depth"), (MEDIAN_DEPTH, "median_depth"), (FEATURES, "features"))
                 if name in outputs)
    sums = [stats.grad_sum, stats.abs_grad_sum, stats.count, stats.max_radius_px, stats.weight_sum] if stats else []
    inputs = (
        scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh, scene.features if wanted & FEATURES else None,
        cameras.world_to_cam, cameras.K, cameras.rows, background if wanted & COLOR else None, cameras.width, cameras.height,
        sh_degree if wanted & COLOR else -1, packed_settings(settings), wanted, sums)
    if torch.compiler.is_compiling():
        out = torch.ops.splatkit.rasterize(*inputs)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:10]):
        out = _Rasterize.apply(*inputs)
    else:
        out = _rasterize(*inputs)
    color, alpha, expected_depth, median_depth, features, radii, *_ = out
    return RenderOutput(color if wanted & COLOR else None, alpha, expected_depth if wanted & EXPECTED_DEPTH else None,
                        median_depth if wanted & MEDIAN_DEPTH else None, features if wanted & FEATURES else None, radii > 0, radii)


@dataclass(frozen=True)
class Recorded:
    """One picture outside of autograd, with what its backward reads: what Adam.step_recorded goes back through."""

    color: Float[Tensor, "H W 3"]
    alpha: Float[Tensor, "H W"]
    radii_px: Float[Tensor, " N"]
    camera: Cameras
    background: Tensor | None
    sh_degree: int
    settings: Tensor
    splats: Tensor
    tiles: Tensor
    counts: Tensor
    pairs: Tensor
    tile_offsets: Tensor


@torch.no_grad()
def record(scene: Scene, camera: Cameras, background: Float[Tensor, " 3"] | None = None, sh_degree: int | None = None,
           settings: RasterSettings = RasterSettings()) -> Recorded:
    """The colour picture of one camera by the library of the scene's device, recorded for `splat_gradients`."""
    if len(camera) != 1:
        raise ValueError(f"record() draws one camera, got {len(camera)}")
    if camera.dtype != scene.dtype or camera.device != scene.device:
        raise ValueError(f"the camera is {camera.dtype} on {camera.device}, the scene {scene.dtype} on {scene.device}; convert one with .to(...)")
    if sh_degree is not None and not 0 <= sh_degree <= scene.sh_degree:
        raise ValueError(f"sh_degree={sh_degree}; the scene holds degrees 0 to {scene.sh_degree}")
    packed, degree = packed_settings(settings), scene.sh_degree if sh_degree is None else sh_degree
    background = None if background is None else background.expand(1, 3)
    color, alpha, _, _, _, radii, splats, tiles, counts, pairs, offsets = _rasterize(
        scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh, None, camera.world_to_cam, camera.K, camera.rows, background,
        camera.width, camera.height, degree, packed, COLOR, [])
    return Recorded(color[0], alpha[0], radii[0], camera, background, degree, packed, splats, tiles, counts, pairs, offsets)


@torch.no_grad()
def splat_gradients(r: Recorded, v_color: Float[Tensor, "H W 3"], stats: RasterStats | None = None) -> Float[Tensor, "N 12"]:
    """Gradient by the projected Gaussians (records of splatkit.h) from that by the picture's colour; fills `stats`."""
    lib, camera, n = native.library_of(r.splats), r.camera, len(r.radii_px)
    v_splats, weights = torch.empty_like(r.splats), r.splats.new_empty(1, n) if stats is not None else None
    lib.sk_blend_vjp(n, 1, camera.width, camera.height, 0, r.settings, r.splats, r.tiles, r.counts, None, _given(r.background), r.pairs, r.tile_offsets, r.color, r.alpha,
                     None, None, v_color.contiguous(), None, None, None, v_splats, None, None, weights,
                     *lib.room("BLEND_VJP", n, 1, camera.width, camera.height, 0, is_deterministic(r.settings)))
    if stats is not None:
        stats.add_view(v_splats[0, :, CONST["SK_X"]:CONST["SK_Y"] + 1], v_splats[0, :, CONST["SK_RX"]:CONST["SK_RY"] + 1], weights[0], r.radii_px, camera.width, camera.height)
    return v_splats[0]


@functools.lru_cache(maxsize=64)
def packed_settings(s: RasterSettings) -> Tensor:
    """The settings in the order of splatkit.h."""
    return torch.tensor([s.near, s.blur_px2, s.antialias, s.alpha_min, s.alpha_max, s.transmittance_min, s.fov_margin, s.deterministic], dtype=torch.float64)


def is_deterministic(packed: Tensor) -> int:
    """1 or 0: what a blend's gradient needs room for."""
    return int(packed[CONST["SK_DETERMINISTIC"]])


def tile_count(cameras: int, width: int, height: int) -> int:
    return cameras * ((width + TILE - 1) // TILE) * ((height + TILE - 1) // TILE)


SORTED_WHOLE = 1 << 21      # rows; up to here packing the visible costs what it saves the sort (of 1M on an H200: 10 us and four launches against 13 us)
_room: dict[tuple, tuple[int, int]] = {}    # device, cameras and size of pictures -> visible Gaussians and pairs to make room for


class _Landing(threading.local):
    """Where counts arrive on the host: pinned memory and the event of the copy, kept between pictures."""

    def __init__(self):
        self.places: dict[tuple, tuple[Tensor, torch.cuda.Event]] = {}

    def send(self, counts: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        key = (counts.device, len(counts))
        if key not in self.places:
            self.places[key] = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True), torch.cuda.Event()
        on_host, copied = self.places[key]
        on_host.copy_(counts, non_blocking=True)
        copied.record()
        return on_host, copied


_landing = _Landing()
GRAPH_ROOM = 2      # a graph is replayed for other pictures than it was captured with
_most_pairs: dict[tuple, int] = {}          # likewise -> the most that a picture ever needed, at least 1024: a graph has GRAPH_ROOM times as much room


class _Watching(threading.local):
    overflows: list[Tensor] | None = None


_watching = _Watching()


@contextlib.contextmanager
def pair_overflows() -> Iterator[list[Tensor]]:
    """For every picture that a CUDA graph captures meanwhile a number on the card, by how much its pairs go beyond the room that the graph has: above 0 it was drawn
    without some of them, and must be captured anew after it was drawn outside, by which the room grows. Values that are not finite are not looked for in a graph."""
    _watching.overflows = []
    try:
        yield _watching.overflows
    finally:
        _watching.overflows = None


def _room_for(known: int, needed: int, most: int) -> int:
    """More than was needed, for the next picture may need more; shrinks slowly."""
    return min(max(math.ceil(1.1 * needed) + 1024, math.ceil(0.98 * known)), most)


def _projected(fields: tuple[Tensor, ...], world_to_cam: Tensor, K: Tensor, rows: Tensor | None, width: int, height: int, sh_degree: int, settings: Tensor,
               blend) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What project() returns, after blend(projected, pairs to make room for) was called on it, once with enough; raises ValueError where it met a NaN or an infinity."""
    means, N, C = fields[0], len(fields[0]), len(world_to_cam)
    key, on_card, done = (means.device, C, width, height), means.is_cuda, 0
    draw = functools.partial(project, *fields, world_to_cam, K, rows, width, height, sh_degree, settings)
    if on_card and torch.cuda.is_current_stream_capturing():
        if key not in _room:
            raise RuntimeError("a CUDA graph can be captured only after a picture of this size was drawn once outside of one")
        pairs = min(GRAPH_ROOM * _most_pairs[key], PAIRS_MAX)
        blend(projected := draw(), pairs)
        if _watching.overflows is not None:
            _watching.overflows.append(projected[4][:, 1].sum() - pairs)
        return projected
    visible, pairs = _room.get(key, (N, 0)) if on_card else (N, 0)
    visible = visible if N >= SORTED_WHOLE else N
    projected = draw(visible)
    counts = projected[4]
    if on_card:
        on_host, copied = _landing.send(counts)
        if pairs:
            try:
                blend(projected, done := pairs)
            except torch.OutOfMemoryError:      # the next picture may need less
                del _room[key]
                done = 0
        copied.synchronize()
        counts = on_host
    found = counts.tolist()
    most, needed, bad = max((r[0] for r in found), default=0), sum(r[1] for r in found), sum(r[2] for r in found)
    if bad:
        Cameras(world_to_cam, K, width, height).check()
        Scene(*fields).check_finite()
    if needed > PAIRS_MAX:
        raise ValueError(f"{needed} pairs of Gaussians and tiles; at most {PAIRS_MAX} fit: draw fewer cameras at once, a smaller picture or fewer Gaussians")
    if not on_card:
        blend(projected, needed)
        return projected
    if most > visible:      # they were not sorted
        projected, done = draw(), 0
    if needed > done or not done:
        blend(projected, done := _room_for(0, needed, PAIRS_MAX))
    _most_pairs[key] = max(_most_pairs.get(key, 1024), needed)
    _room[key] = _room_for(visible if key in _room else 0, most, 2**31 - 1), _room_for(done, needed, PAIRS_MAX)
    return projected


def project(means: Tensor, quats: Tensor, log_scales: Tensor, logit_opacities: Tensor, sh: Tensor, world_to_cam: Tensor, K: Tensor, rows: Tensor | None,
            width: int, height: int, sh_degree: int, settings: Tensor, room: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """splats, order, radii, tiles and counts of sk_project; what is not finite is counted, not refused. On a card order is one only for up to `room` visible
    Gaussians (all, where None)."""
    lib, new = native.library_of(means), means.new_empty
    C, N = world_to_cam.shape[0], means.shape[0]
    splats, radii, order = new(C, N, SPLAT), new(C, N), torch.empty(C, N, dtype=torch.int32, device=means.device)
    counts, tiles = (torch.empty(C, columns, dtype=torch.int64, device=means.device) for columns in (3, N))
    room = N if room is None else min(room, N)
    lib.sk_project(N, C, width, height, sh_degree, sh.shape[1], settings, means.contiguous(), quats.contiguous(), log_scales.contiguous(),
                   logit_opacities.contiguous(), sh.contiguous(), world_to_cam.contiguous(), K.contiguous(),
                   _given(rows), room, splats, order, radii, tiles, counts, *lib.room("PROJECT", N, capacity=room))
    return splats, order, radii, tiles, counts


def _rasterize(means: Tensor, quats: Tensor, log_scales: Tensor, logit_opacities: Tensor, sh: Tensor, features: Tensor | None, world_to_cam: Tensor,
               K: Tensor, rows: Tensor | None, background: Tensor | None, width: int, height: int, sh_degree: int, settings: Tensor, outputs: int,
               stats: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """color, alpha, expected depth, median depth, features, radii; then what the backward needs: splats, tiles, counts, pairs, tile offsets."""
    lib = native.library_of(means)
    C, N = world_to_cam.shape[0], means.shape[0]
    F = features.shape[1] if features is not None else 0
    new, ints = means.new_empty, functools.partial(torch.empty, dtype=torch.int64, device=means.device)
    tile_offsets, needed = ints(tile_count(C, width, height) + 1), ints(1)
    alpha = new(C, height, width)
    color = new(C, height, width, 3) if outputs & COLOR else new(0)
    expected_depth = new(C, height, width) if outputs & EXPECTED_DEPTH else new(0)
    median_depth = new(C, height, width) if outputs & MEDIAN_DEPTH else new(0)
    features_out = new(C, height, width, F) if outputs & FEATURES else new(0)
    pairs = None

    def blend(projected: tuple[Tensor, ...], capacity: int) -> None:
        nonlocal pairs
        splats, order, _, tiles, counts = projected
        pairs = torch.empty(capacity, dtype=torch.int32, device=means.device)
        lib.sk_blend(N, C, width, height, F, settings, splats, order, tiles, counts, _given(features), _given(background), capacity, needed, pairs, tile_offsets,
                     _if(outputs & COLOR, color), alpha, _if(outputs & EXPECTED_DEPTH, expected_depth), _if(outputs & MEDIAN_DEPTH, median_depth),
                     _if(outputs & FEATURES and F, features_out), *lib.room("BLEND", N, C, width, height, F, capacity))

    splats, _, radii, tiles, counts = _projected((means, quats, log_scales, logit_opacities, sh), world_to_cam, K, rows, width, height, sh_degree, settings, blend)
    return color, alpha, expected_depth, median_depth, features_out, radii, splats, tiles, counts, pairs, tile_offsets


# One operator twice: for torch.compile an opaque node, for eager calls an autograd.Function, which costs 0.2 ms less a picture.
rasterize = torch.library.custom_op("splatkit::rasterize", _rasterize, mutates_args=(), device_types=("cpu", "cuda"))


@rasterize.register_fake
def _(means, quats, log_scales, logit_opacities, sh, features, world_to_cam, K, rows, background, width, height, sh_degree, settings, outputs, stats):
    C, N, new = world_to_cam.shape[0], means.shape[0], means.new_empty
    pairs = torch.library.get_ctx().new_dynamic_size()
    size = (C, height, width)
    return (new(*size, 3) if outputs & COLOR else new(0), new(size), new(size) if outputs & EXPECTED_DEPTH else new(0),
            new(size) if outputs & MEDIAN_DEPTH else new(0), new(*size, features.shape[1]) if outputs & FEATURES else new(0), new(C, N),
            new(C, N, SPLAT), new(C, N, dtype=torch.int64), new(C, 3, dtype=torch.int64), new(pairs, dtype=torch.int32),
            new(tile_count(C, width, height) + 1, dtype=torch.int64))


def project_vjp(means: Tensor, quats: Tensor, log_scales: Tensor, logit_opacities: Tensor, sh: Tensor, world_to_cam: Tensor, K: Tensor, rows: Tensor | None,
                width: int, height: int, sh_degree: int, settings: Tensor, radii: Tensor, v_splats: Tensor, want_sh: bool, want_pose: bool,
                want_K: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of means, quats, log_scales, logit_opacities, sh, world_to_cam and K, from those of the splats; what is not wanted is empty."""
    lib, new = native.library_of(means), means.new_empty
    C, N = world_to_cam.shape[0], means.shape[0]
    v_means, v_quats, v_log_scales, v_logits = new(N, 3), new(N, 4), new(N, 3), new(N)
    v_sh = new(sh.shape) if want_sh else new(0)
    v_pose, v_K = new(C, 4, 4) if want_pose else new(0), new(C, 3, 3) if want_K else new(0)
    lib.sk_project_vjp(N, C, width, height, sh_degree, sh.shape[1], settings, means.contiguous(), quats.contiguous(), log_scales.contiguous(),
                       logit_opacities.contiguous(), sh.contiguous(), world_to_cam.contiguous(), K.contiguous(), _given(rows), radii, v_splats,
                       v_means, v_quats, v_log_scales, v_logits, _if(want_sh, v_sh), _if(want_pose, v_pose), _if(want_K, v_K),
                       *lib.room("PROJECT_VJP", N if want_pose or want_K else 0))
    return v_means, v_quats, v_log_scales, v_logits, v_sh, v_pose, v_K


def _rasterize_vjp(means: Tensor, quats: Tensor, log_scales: Tensor, logit_opacities: Tensor, sh: Tensor, features: Tensor | None, world_to_cam: Tensor,
                   K: Tensor, rows: Tensor | None, background: Tensor | None, width: int, height: int, sh_degree: int, settings: Tensor,
                   color: Tensor, alpha: Tensor, expected_depth: Tensor, features_out: Tensor, radii: Tensor, splats: Tensor, tiles: Tensor, counts: Tensor,
                   pairs: Tensor, tile_offsets: Tensor, v_color: Tensor | None, v_alpha: Tensor | None, v_expected_depth: Tensor | None,
                   v_features_out: Tensor | None, want_sh: bool, want_pose: bool, want_K: bool, want_background: bool, want_features: bool,
                   want_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of means, quats, log_scales, logit_opacities, sh, features, world_to_cam, K, background; then of the splats, and the weight sums."""
    lib = native.library_of(means)
    C, N = world_to_cam.shape[0], means.shape[0]
    F = features.shape[1] if features is not None else 0
    new = means.new_empty
    v_splats = new(C, N, SPLAT)
    v_features = new(N, F) if want_features else new(0)
    v_background = new(C, 3) if want_background else new(0)
    weights = new(C, N) if want_stats else new(0)
    some = lambda x: x if x.numel() else None
    lib.sk_blend_vjp(N, C, width, height, F, settings, splats, tiles, counts, _given(features), _given(background), pairs, tile_offsets, some(color), alpha,
                     some(expected_depth), some(features_out), _given(v_color), _given(v_alpha), _given(v_expected_depth),
                     _given(v_features_out) if F else None, v_splats, _if(want_features and F, v_features), _if(want_background, v_background),
                     _if(want_stats, weights), *lib.room("BLEND_VJP", N, C, width, height, F, is_deterministic(settings)))
    v_means, v_quats, v_log_scales, v_logits, v_sh, v_pose, v_K = project_vjp(means, quats, log_scales, logit_opacities, sh, world_to_cam, K, rows, width, height,
                                                                              sh_degree, settings, radii, v_splats, want_sh, want_pose, want_K)
    return v_means, v_quats, v_log_scales, v_logits, v_sh, v_features, v_pose, v_K, v_background, v_splats, weights


rasterize_vjp = torch.library.custom_op("splatkit::rasterize_vjp", _rasterize_vjp, mutates_args=(), device_types=("cpu", "cuda"))


@rasterize_vjp.register_fake
def _(means, quats, log_scales, logit_opacities, sh, features, world_to_cam, K, rows, background, width, height, sh_degree, settings, color, alpha,
      expected_depth, features_out, radii, splats, tiles, counts, pairs, tile_offsets, v_color, v_alpha, v_expected_depth, v_features_out, want_sh,
      want_pose, want_K, want_background, want_features, want_stats):
    C, N, new = world_to_cam.shape[0], means.shape[0], means.new_empty
    return (new(N, 3), new(N, 4), new(N, 3), new(N), new(sh.shape) if want_sh else new(0), new(features.shape) if want_features else new(0),
            new(C, 4, 4) if want_pose else new(0), new(C, 3, 3) if want_K else new(0), new(C, 3) if want_background else new(0), new(C, N, SPLAT),
            new(C, N) if want_stats else new(0))


def _setup_context(ctx, inputs, output):
    *tensors, width, height, sh_degree, settings, outputs, stats = inputs
    color, alpha, expected_depth, _, features_out, radii, *rest = output
    ctx.mark_non_differentiable(output[3], radii, *rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, color, alpha, expected_depth, features_out, radii, *rest, settings)
    ctx.stats = stats     # not saved_tensors: other views write to them before this one's backward
    ctx.sizes = (width, height, sh_degree)


def _backward(vjp, ctx, v_color, v_alpha, v_expected_depth, v_median_depth, v_features_out, *unused):
    *inputs, = ctx.saved_tensors[:10]
    *outputs, = ctx.saved_tensors[10:20]
    settings, sums = ctx.saved_tensors[20], ctx.stats
    width, height, sh_degree = ctx.sizes
    need = ctx.needs_input_grad
    none = (None, None, None, None, None, [None] * len(sums))
    if all(v is None or v.numel() == 0 for v in (v_color, v_alpha, v_expected_depth, v_features_out)):
        return (None,) * 10 + none
    v_color, v_expected_depth, v_features_out = (v if v is not None and v.numel() else None for v in (v_color, v_expected_depth, v_features_out))
    want_sh, want_features = need[4] and v_color is not None, need[5] and v_features_out is not None
    want_background = need[9] and v_color is not None
    grads = vjp(*inputs, width, height, sh_degree, settings, *outputs, v_color, v_alpha, v_expected_depth, v_features_out,
                want_sh, need[6], need[7], want_background, want_features, bool(sums))
    *v, v_splats, weights = grads
    if sums:
        stats, radii = RasterStats(*sums), outputs[4]
        for c in range(radii.shape[0]):
            stats.add_view(v_splats[c, :, CONST["SK_X"]:CONST["SK_Y"] + 1], v_splats[c, :, CONST["SK_RX"]:CONST["SK_RY"] + 1], weights[c], radii[c],
                           width, height)
    given = (True, True, True, True, want_sh, want_features, need[6], need[7])
    v = [g if ok else None for g, ok in zip(v, (*given, want_background))]
    return (*v[:8], None, v[8], *none)


rasterize.register_autograd(functools.partial(_backward, torch.ops.splatkit.rasterize_vjp.default), setup_context=_setup_context)


class _Rasterize(torch.autograd.Function):
    """rasterize without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, output := _rasterize(*inputs))      # not torch's setup_context: it binds arguments by signature, 0.1 ms
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *v):
        return (*_backward(_rasterize_vjp, ctx, *v)[:-1], None)         # one None for the list of sums


def uplift_native(scene: Scene, camera: Cameras, feature_map: Tensor, settings: RasterSettings, sums: Tensor, weights: Tensor) -> None:
    """Adds one camera's row sums: sums [N,F] += W^T map, weights [N] += W^T 1, W being the blending weights."""
    lib, N = native.library_of(scene.means), len(scene)
    with torch.no_grad():
        out = _rasterize(scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh, None, camera.world_to_cam, camera.K,
                         camera.rows, None, camera.width, camera.height, -1, packed_settings(settings), 0, [])
    splats, _, _, pairs, tile_offsets = out[6:]
    lib.sk_uplift(N, camera.width, camera.height, feature_map.shape[-1], packed_settings(settings), splats, pairs, tile_offsets,
                  feature_map.contiguous(), sums, weights, *lib.room("UPLIFT"))


def _given(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _if(wanted, x: Tensor) -> Tensor | None:
    return x if wanted else None
