"""One scene in several processes under torchrun, by torch.distributed alone: each holds a range of the scene's rows and draws a band of every picture.

A picture goes like this. Each process projects its own rows, sends a record of each Gaussian to those whose bands it reaches, draws its
band from what it receives, and gets the others' bands. Backward, each process differentiates its band and sends the gradients by the
records back to where they came from. Bands are cut anew for each picture, so that all have about the same number of (Gaussian, tile)
pairs. Records keep the order of the scene's rows and carry the exact sort key, so the picture is bit-equal to that of one process;
gradients differ by the rounding of sums over bands. (Zhao et al. 2024, Grendel, exchange the same records.)
"""
from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from . import native, raster
from .camera import Cameras
from .errors import BadConfig
from .native import CONST
from .processes import exchange, stopping
from .processes import joined as joined_processes
from .raster import RasterSettings, RasterStats, RenderOutput
from .raster.bands import band_gradients, boxes, draw_band, tile_rows
from .raster.operators import SPLAT, TILE, packed_settings, project, project_vjp
from .raster.reference import depth_key
from .scene import Part, Scene


@dataclass(frozen=True)
class Shard:
    """This process among those that hold the scene; one alone by default, which exchanges nothing. All processes call the same methods in the same order."""

    rank: int = 0
    world: int = 1

    def part(self, total: int, rank: int | None = None) -> Part | None:
        """The rows of a scene of `total` that a process holds, None where it is alone: equal shares in the order of ranks, the first ones a row longer."""
        if self.world == 1:
            return None
        (share, longer), rank = divmod(total, self.world), self.rank if rank is None else rank
        start = lambda r: r * share + min(r, longer)
        return Part(start(rank), start(rank + 1), total)

    def gather(self, x: Tensor, total: int) -> Tensor:
        """A per-row quantity of the whole scene, from everybody's rows."""
        if self.world == 1:
            return x
        parts = [self.part(total, rank) for rank in range(self.world)]
        return _concatenated(x, [part.last - part.first for part in parts])

    def collect(self, x: Tensor, total: int) -> Tensor:
        """The same for the first process alone; the others get `x` back, and hold the whole for a moment only."""
        whole = self.gather(x, total)
        return whole if self.rank == 0 else x

    def any(self, flags: list[bool]) -> list[bool]:
        """Which of the flags are set in any process. Raises KeyboardInterrupt in all of them where Ctrl-C was pressed in one."""
        if self.world == 1:
            return flags
        seen = torch.tensor([*flags, stopping.is_set()], dtype=torch.int32)
        with exchange():
            dist.all_reduce(seen, dist.ReduceOp.MAX)
        *flags, stop = seen.bool().tolist()
        if stop:
            raise KeyboardInterrupt
        return flags

    def agree(self, what: Mapping[str, object]) -> None:
        """Raises BadConfig naming what differs between the processes. Values are compared by repr, tensors by their bytes."""
        if self.world == 1:
            return
        data = lambda x: x.detach().cpu().contiguous().numpy().tobytes() if isinstance(x, Tensor) else repr(x).encode()
        mine = torch.tensor([zlib.crc32(data(x)) for x in what.values()])
        for rank, theirs in enumerate(_concatenated(mine, [len(mine)] * self.world).view(self.world, -1)):
            if other := [name for name, a, b in zip(what, theirs.tolist(), mine.tolist()) if a != b]:
                raise BadConfig(f"process {rank} has another {', '.join(other)} than process {self.rank}; all must be given the same, and see the same folders")

    def check(self, device: str, backend: str) -> None:
        """Raises BadConfig where the processes of a run cannot work like this."""
        if self.world == 1:
            return
        if backend not in ("auto", "cpu", "cuda"):
            raise BadConfig(f"--backend {backend} draws in one process only; leave it out, or start without torchrun")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if device == "cuda" and not (local <= torch.cuda.device_count() and dist.is_nccl_available()):
            raise BadConfig(f"{local} processes on this machine want a card each; torch sees {torch.cuda.device_count()}, "
                            f"and has {'' if dist.is_nccl_available() else 'no '}NCCL. Start fewer, or give --device cpu")

    def render(self, scene: Scene, camera: Cameras, *, outputs: tuple[str, ...] = ("color",), background: Float[Tensor, " 3"] | None = None,
               sh_degree: int | None = None, settings: RasterSettings = RasterSettings(), stats: RasterStats | None = None, backend: str = "auto") -> RenderOutput:
        """raster.render of the scene that all processes hold together, `scene` being this one's rows: whole pictures for everybody.

        `visible`, `radii_px` and `stats` are of the own rows. One camera; color, alpha and expected_depth are differentiable in the own
        rows and in the camera, whose gradient is that of the whole scene, but not in `background`. All processes must go backward too.
        """
        if self.world == 1:
            return raster.render(scene, camera, outputs=outputs, background=background, sh_degree=sh_degree, settings=settings, stats=stats, backend=backend)
        if len(camera) != 1 or camera.rows is not None or not set(outputs) <= {"color", "expected_depth"} or (background is not None and background.requires_grad):
            raise ValueError(f"{len(camera)} cameras, outputs {outputs}; several processes draw color and expected_depth of one camera without a row range, "
                             "before a background that wants no gradient")
        if not camera.world_to_cam.is_cuda:
            camera.check()
        degree = scene.sh_degree if sh_degree is None else sh_degree
        job = _Job(self, camera.width, camera.height, degree, packed_settings(settings), background, "expected_depth" in outputs, stats)
        color, alpha, depth, radii = _Picture.apply(job, scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh, camera.world_to_cam, camera.K)
        return RenderOutput(color[None], alpha[None], depth[None] if job.with_depth else None, None, None, radii > 0, radii)


ALONE = Shard()


@contextmanager
def joined() -> Iterator[Shard]:
    """This process's share of a run, ALONE where torchrun did not start it; begins and ends as `processes.joined`."""
    with joined_processes() as me:
        yield Shard(me.rank, me.world)


def versions() -> str:
    """What arithmetic depends on beside the data: processes that round otherwise would drift apart."""
    return f"splatkit {native.ABI}, torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else native.cpu_isa()}"


@dataclass(frozen=True)
class _Job:
    """What a picture needs beside tensors that want gradients."""

    shard: Shard
    width: int
    height: int
    sh_degree: int
    settings: Tensor
    background: Tensor | None
    with_depth: bool
    stats: RasterStats | None


@dataclass(frozen=True)
class _Routes:
    """Which of the own rows went to each process, and how many came from each."""

    sent: list[Tensor]
    received: list[int]
    bands: list[tuple[int, int]]        # tile rows [first, last) of each process


class _Picture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, *tensors):
        means, world_to_cam, K = tensors[0], *tensors[5:]
        splats, _, radii, tiles, counts = project(*tensors, None, job.width, job.height, job.sh_degree, job.settings)
        camera = Cameras(world_to_cam, K, job.width, job.height)
        if int(counts[0, 2]):
            camera.check()
            Scene(*tensors[:5]).check_finite()
        routes = _routes(tiles[0], tile_rows(job.height), (job.width + TILE - 1) // TILE, job.shard)
        own = torch.cat(routes.sent)
        words = SPLAT * splats.element_size() // 4
        record = lambda x, width: x.contiguous().view(torch.int32).view(len(own), width)
        sent = torch.cat([record(splats[0, own], words), record(depth_key(means, world_to_cam[0])[own], 1), record(tiles[0, own], 2)], dim=1)
        got = _delivered(sent, [len(rows) for rows in routes.sent], routes.received)
        field = lambda a, b, dtype: got[:, a:b].clone(memory_format=torch.contiguous_format).view(dtype)      # a slice need not start where a dtype may
        band = draw_band(field(0, words, splats.dtype), field(words, words + 1, torch.float32).squeeze(1), field(words + 1, words + 3, torch.int64).squeeze(1),
                         *routes.bands[job.shard.rank], camera, job.background, job.settings, job.with_depth)
        rows = [(min(first * TILE, job.height), min(last * TILE, job.height)) for first, last in routes.bands]
        first, last = rows[job.shard.rank]
        layers = [band.color, band.alpha[..., None], *([band.expected_depth[..., None]] if job.with_depth else [])]
        whole = _concatenated(torch.cat([x[first:last] for x in layers], dim=2), [b - a for a, b in rows])
        ctx.save_for_backward(*tensors, radii)
        ctx.job, ctx.routes, ctx.band = job, routes, band
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        color, alpha, *depth = (x.contiguous() for x in whole.split([3, *[1] * (len(layers) - 1)], dim=2))
        return color, alpha[..., 0], depth[0][..., 0] if depth else means.new_empty(0), radii

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v_color, v_alpha, v_depth, _):
        (*tensors, radii), job, routes, n = ctx.saved_tensors, ctx.job, ctx.routes, ctx.saved_tensors[0].shape[0]
        v_received, weights = band_gradients(ctx.band, v_color, v_alpha, v_depth)
        back = _delivered(torch.cat([v_received, weights[:, None]], dim=1), routes.received, [len(rows) for rows in routes.sent])
        v = back.new_zeros(n, SPLAT + 1)
        for rows, some in zip(routes.sent, back.split([len(rows) for rows in routes.sent])):
            v[rows] += some         # no row twice: each process's sums in the order of ranks, whatever the threads
        v_splats, weights = v[:, :SPLAT].contiguous(), v[:, SPLAT]
        if job.stats is not None:
            job.stats.add_view(v_splats[:, CONST["SK_X"]:CONST["SK_Y"] + 1], v_splats[:, CONST["SK_RX"]:CONST["SK_RY"] + 1], weights, radii[0], job.width, job.height)
        want_sh, want_pose, want_K = ctx.needs_input_grad[5:8]
        *grads, v_pose, v_K = project_vjp(*tensors, None, job.width, job.height, job.sh_degree, job.settings, radii, v_splats[None], want_sh, want_pose, want_K)
        with exchange():
            for x in (v_pose, v_K):
                if x.numel():
                    dist.all_reduce(x)
        return None, *grads[:4], grads[4] if want_sh else None, v_pose if want_pose else None, v_K if want_K else None


def _routes(tiles: Int[Tensor, " N"], n_rows: int, n_columns: int, shard: Shard) -> _Routes:
    """Bands of about equal work, and who gets which of the own rows. One exchange: how many Gaussians start and end at each row of tiles, and their pairs."""
    drawn = tiles.nonzero().squeeze(1)
    x0, x1, top, bottom = boxes(tiles[drawn])
    tables = tiles.new_zeros(3, n_rows + 1)
    for table, at, count in ((0, top, 1), (1, bottom, 1), (2, top, x1 - x0), (2, bottom, x0 - x1)):
        tables[table].index_add_(0, at, torch.as_tensor(count, device=at.device).expand_as(at))
    tables = _concatenated(tables.cpu(), [3] * shard.world).view(shard.world, 3, n_rows + 1)
    cost = (tables[:, 2].sum(0).cumsum(0)[:n_rows] + n_columns).double()        # a tile without a Gaussian costs about as much as a pair
    before = cost.cumsum(0) - cost / 2
    cuts = [0, *(int((before < cost.sum() * r / shard.world).sum()) for r in range(1, shard.world)), n_rows]
    bands = list(zip(cuts, cuts[1:]))
    first, last = bands[shard.rank]
    received = (tables[:, 0, :last].sum(1) - tables[:, 1, :first + 1].sum(1)).tolist() if last > first else [0] * shard.world
    return _Routes([drawn[(top < b) & (bottom > a) & (b > a)] for a, b in bands], received, bands)


def _concatenated(x: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes in the order of ranks; everybody knows how many each has."""
    most = max(counts)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) if len(x) < most else x.contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    with exchange():
        dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


def _delivered(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """What the others sent here, in the order of ranks, for the rows of x, of which the first sent[0] go to rank 0, and so on."""
    out = x.new_empty(sum(received), *x.shape[1:])
    with exchange():
        dist.all_to_all_single(out, x.contiguous(), received, sent)
    return out
