"""What the steps of a run change, and one step of it: picture, loss, gradients, optimiser."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import native
from .camera import Cameras
from .config import Reconstruct
from .density import dropped
from .exposure import Exposures
from .growth import Fixed
from .io import checkpoint
from .io.depth import nearest_known
from .metrics import inverse_depth_l1, l1_ssim, l1_ssim_and_gradient
from .optim import Adam, AttributeDecay, StateDecay, sh_learning_rates
from .poses import Poses
from .raster import RasterSettings, record, splat_gradients
from .sampling import pixel_sizes
from .scene import Edit, Part, Scene
from .shard import ALONE, Shard


@dataclass(frozen=True)
class View:
    """What a step learns from: photo number `place` of those that train, its camera, which pixels count and what depth they have."""

    place: int
    camera: Cameras
    photo: Float[Tensor, "H W 3"]
    mask: Bool[Tensor, "H W"] | None = None
    depth: Float[Tensor, "H W"] | None = None       # 0 where it is not known

    def halved(self) -> View:
        """At half the size; pictures below 64 pixels a side stay."""
        w, h = self.camera.width // 2, self.camera.height // 2
        if min(w, h) < 32:
            return self
        half = lambda x: torch.nn.functional.interpolate(x.permute(2, 0, 1)[None], (h, w), mode="area")[0].permute(1, 2, 0).contiguous()
        mask = None if self.mask is None else half(self.mask.float()[..., None])[..., 0] > 1 - 1e-4
        return View(self.place, self.camera.resized(w, h), half(self.photo), mask, None if self.depth is None else nearest_known(self.depth, w, h))


@dataclass
class Fit:
    """Everything that the steps of a run change; in a run of several processes, this one's rows of it."""

    config: Reconstruct
    scene: Scene
    adam: Adam
    growth: Fixed
    exposures: Exposures | None
    poses: Poses | None
    order: torch.Generator      # shuffles the photos
    queue: list[int]            # those still to come in this round
    step: int = 0
    shard: Shard = ALONE
    floor: Tensor | None = None     # [N, 1], of log_scales; None: to be worked out anew

    @property
    def gaussians(self) -> int:
        """Of the whole scene."""
        return self.adam.part.total if self.adam.part else len(self.scene)

    @property
    def recorded(self) -> bool:
        """Whether steps go back through the recorded picture, which stores no gradient of the scene: by the CUDA library, of colour alone and of
        all Gaussians, in one process. Then a step is taken whatever its gradients are, and looked at every hundredth time."""
        colour_alone = self.poses is None and self.config.depth.source == "none" and not self.config.dropout
        return self.scene.means.is_cuda and self.config.backend in ("auto", "cuda") and colour_alone and self.shard.world == 1

    def whole_scene(self) -> Scene:
        """The scene of all processes, in the first one; for all of them to call."""
        return self.scene.detach().map(self._collect)

    def save(self, folder: Path, values: dict) -> None:
        """Writes a checkpoint of the whole scene, by the first process; for all of them to call. Any number of processes can go on from it."""
        parts = {"scene": self.whole_scene().fields(), "adam": {name: self._collect(x) if _by_row(name) else x for name, x in self.adam.state_dict().items()},
                 "growth": {name: self._collect(x) if _by_row(name) else x for name, x in self.growth.state_dict().items()},
                 "exposures": self.exposures.state_dict() if self.exposures else {}, "poses": self.poses.state_dict() if self.poses else {},
                 "order": {"generator": self.order.get_state(), "queue": torch.tensor(self.queue, dtype=torch.int64)}}
        if self.shard.rank != 0:
            return
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder, self.step, {f"{part}.{name}": x.cpu() for part, state in parts.items() for name, x in state.items()}, values)

    @staticmethod
    def first(scene: Scene, growth: Fixed, config: Reconstruct, cameras: Sequence[Cameras], shard: Shard = ALONE) -> Fit:
        """The state of the whole scene before the first step; `growth` is for all of its rows, `cameras` are those of the photos that train, in order."""
        part = shard.part(len(scene))
        if part:
            scene = scene.map(part.of)
            growth.map_stats(part.of)
            growth.part = part
        exposures = Exposures(len(cameras), config.exposure_lr, scene.device) if config.exposure else None
        refine = config.refine
        poses = Poses(cameras, growth.extent, refine.pose_lr * refine.poses, refine.focal_lr * refine.focal) if refine.poses or refine.focal else None
        return Fit(config, scene, _optimiser(scene, config, growth.extent, part), growth, exposures, poses,
                   torch.Generator().manual_seed(config.seed), [], shard=shard)

    @staticmethod
    def resumed(saved: checkpoint.Checkpoint, growth: Fixed, config: Reconstruct, cameras: Sequence[Cameras], shard: Shard = ALONE) -> Fit:
        part = lambda name: {k.removeprefix(name): x for k, x in saved.tensors.items() if k.startswith(name)}
        growth.load_state_dict(part("growth."))
        fit = Fit.first(Scene(**part("scene.")).to(growth.device), growth, config, cameras, shard)
        own = fit.adam.part.of if fit.adam.part else lambda x: x
        fit.adam.load_state_dict({name: own(x) if _by_row(name) else x for name, x in part("adam.").items()})
        if fit.exposures:
            fit.exposures.load_state_dict(part("exposures."))
        if fit.poses:
            fit.poses.load_state_dict(part("poses."))
        fit.order.set_state(saved.tensors["order.generator"])
        fit.queue, fit.step = saved.tensors["order.queue"].tolist(), saved.step
        return fit

    def step_on(self, view: View, background: Tensor, sh_degree: int, settings: RasterSettings, rate: float) -> tuple[Tensor, Tensor, list[str]]:
        """One step of the optimiser on a photo, `rate` being that of the means.

        Returns the photometric loss and the picture before the step, and the fields whose gradient was not finite: then no step was taken (but see `recorded`).
        """
        go = self._by_recorded_picture if self.recorded else self._by_autograd
        return go(view, background, sh_degree, settings, rate)

    def grow(self, step: int) -> Edit | None:
        """Ends a step with the changes of rows that are due, and says how rows changed (None: not at all). The processes that share a scene each work out the
        change of all of it: they hold the whole scene, and one tensor of the moments after the other, for a moment."""
        due = self.shard.world > 1 and self.growth.due(step)
        whole = self._gather if due else lambda x: x
        scene = self.scene.detach()
        if due:
            self.growth.map_stats(whole)
            scene = scene.map(whole)
        scene, edit = self.growth.after_step(scene, step)
        part = self.shard.part(len(scene)) if due else None
        if part:
            scene = scene.map(part.of)
            self.growth.map_stats(part.of)
            edit = edit and Edit(part.of(edit.source), part.of(edit.fresh), edit.reset)
        if edit is not None:
            self.adam.follow(edit, whole=whole)
        if part:
            self.adam.part = self.growth.part = part
        self.scene, self.step = scene, step
        return edit

    def bound(self, cameras: Sequence[Cameras], shrunk: int, edit: Edit | None) -> None:
        """Ends a step, which changed rows by `edit`, with what config.min_scale asks for; photos are looked at 1 / `shrunk` of the size of their `cameras`."""
        if not self.config.min_scale:
            return
        if self.floor is None or edit is not None or self.step % 100 == 0:
            self.floor = (self.config.min_scale * shrunk * pixel_sizes(self.scene.means, cameras)).log()[:, None]
        torch.maximum(self.scene.log_scales, self.floor, out=self.scene.log_scales)

    def _gather(self, x: Tensor) -> Tensor:
        return self.shard.gather(x, self.gaussians)

    def _collect(self, x: Tensor) -> Tensor:
        return self.shard.collect(x, self.gaussians)

    def _loss(self, color: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The photometric loss of a picture, its gradient by that, the picture as this photo's exposure has it, and the gradients of the exposures."""
        if self.exposures is None and native.library_for(color) is not None:
            loss, v_color = l1_ssim_and_gradient(color, view.photo, self.config.ssim_weight, view.mask)
            return loss, v_color, color.detach(), []
        with torch.enable_grad():
            color = color.detach().requires_grad_()
            seen = self.exposures.apply(color, view.place) if self.exposures else color
            loss = l1_ssim(seen, view.photo, self.config.ssim_weight, view.mask)
            v_color, *v_exposure = torch.autograd.grad(loss, [color, *(self.exposures.parameters if self.exposures else ())])
        return loss.detach(), v_color, seen.detach(), v_exposure

    def _depth_gradient(self, depth: Tensor, view: View) -> Tensor:
        with torch.enable_grad():
            depth = depth.detach().requires_grad_()
            return torch.autograd.grad(self.config.depth.weight * self.growth.extent * inverse_depth_l1(depth, view.depth, view.mask), depth)[0]

    def _falling(self) -> float:
        """From 1 at the first step to 0 at the last, by half a cosine."""
        return (1 + math.cos(math.pi * self.step / self.config.steps)) / 2

    def _by_recorded_picture(self, view, background, sh_degree, settings, rate):
        """On a card. What is not finite is judged by the loss alone, and only where it is looked at anyway, every hundred steps: a look waits for the card."""
        scene = self.scene.detach()
        picture = record(scene, view.camera, background, sh_degree, settings)
        loss, v_color, seen, v_exposure = self._loss(picture.color, view)
        if self.exposures:
            self.exposures.step(v_exposure)
        self.adam.step_recorded(scene, picture, splat_gradients(picture, v_color, self.growth.stats), self.config.adamw.sparse, {"means": rate},
                                self.growth.displacement(scene, rate), self.growth.pulls(scene))
        return loss, seen, ["the loss"] if self.step % 100 == 99 and not bool(torch.isfinite(loss)) else []

    def _by_autograd(self, view, background, sh_degree, settings, rate):
        """The same by any backend, judged by the gradients; with refined cameras and depth."""
        scene, camera = self.scene.requires_grad_(), view.camera
        if self.poses:
            camera = self.poses.camera(camera, view.place)
        moving = self.poses is not None and self.step >= self.config.refine.start * self.config.steps
        left_out = self.config.dropout * self.step / self.config.steps
        shown = dropped(scene, left_out, self.growth.generator, self.adam.part) if left_out else scene
        out = self.shard.render(shown, camera, outputs=("color",) if view.depth is None else ("color", "expected_depth"), background=background, sh_degree=sh_degree,
                                settings=settings, stats=self.growth.stats, backend=self.config.backend)
        loss, v_color, seen, v_exposure = self._loss(out.color[0], view)
        results, v_results = [out.color], [v_color[None]]
        if view.depth is not None:
            results, v_results = [*results, out.expected_depth], [*v_results, self._depth_gradient(out.expected_depth[0], view)[None]]
        wanted = [*scene.fields().values(), *((camera.world_to_cam, camera.K) if moving else ())]
        inner = sum((x * v).sum() for x, v in zip(results, v_results))      # not grad(results, wanted, v_results): that imports sympy, seconds for every start
        values = torch.autograd.grad(inner, wanted)
        grads = dict(zip(scene.fields(), values))
        scene = scene.detach()
        unfit = self.shard.any((~torch.isfinite(torch.stack([g.sum() for g in grads.values()]))).tolist())     # one look: on a card each waits
        if bad := [name for name, is_unfit in zip(grads, unfit) if is_unfit]:
            for x in vars(self.growth.stats).values() if self.growth.stats else ():
                x.nan_to_num_(0, 0, 0)
            return loss, seen, bad
        if self.exposures:
            self.exposures.step(v_exposure)
        if moving:
            self.poses.step(view.place, camera, *values[-2:], self._falling())
        self.growth.regularise(grads, scene)
        self.adam.step(scene, grads, out.visible[0] if self.config.adamw.sparse else None, camera.width * camera.height, learning_rates={"means": rate},
                       displacement=self.growth.displacement(scene, rate))
        return loss, seen, []


def _by_row(name: str) -> bool:
    """Whether an entry of a state_dict has one value for each Gaussian."""
    return name == "row_steps" or name.startswith(("m.", "v.", "stats."))


def _optimiser(scene: Scene, config: Reconstruct, extent: float, part: Part | None) -> Adam:
    lr, adamw, at = config.lr, config.adamw, lambda share: round(share * config.steps)
    rates = {"means": lr.means * extent, "quats": lr.quats, "log_scales": lr.log_scales, "logit_opacities": lr.logit_opacities,
             "sh": sh_learning_rates((config.sh_degree + 1) ** 2, lr.sh_dc, lr.sh_rest)}
    decay = AttributeDecay(adamw.opacity_strength, adamw.scale_strength, adamw.ceiling, (at(adamw.opacity_from), at(adamw.until)), (at(adamw.scale_from), at(adamw.until)))
    shrink = StateDecay(adamw.state_every, (at(adamw.scale_from), at(adamw.until)), ((0, adamw.state_share), (at(adamw.state_late_from), adamw.state_share_late)))
    return Adam(scene, rates, attribute_decay=decay if adamw.attribute_decay else None, state_decay=shrink if adamw.state_decay else None, seed=config.seed + 2, part=part)
