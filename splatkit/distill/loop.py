"""The loop of distillation: from photos with poses to a backbone that has learnt from Gaussians, and the run folder that it writes."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import config as configs
from ..errors import BadConfig, BadFile, Diverged
from ..io import checkpoint
from ..io.reading import Report, silent
from ..processes import exchange
from ..raster import device_for
from ..reconstruct import SKIPS_MAX, check_same_settings, keep_lines
from ..shard import Shard, joined, versions
from . import backbone as backbones
from .config import Distill
from .geometry import geometry_of
from .samples import Sample, Samples
from .step import Center, Tally, correspondence_loss, loss_of, make_labels
from .student import Teacher, fill, fill_optimiser, fingerprint, optimiser_state, student_of, trained
from .views import PosedScene, scenes_of

WEIGHTS = "backbone.safetensors"


class Watcher:
    """What a run tells one who watches it, between its steps. This one does nothing."""

    def begun(self, run: Run, sample: Sample) -> None:
        """Before the first step, with the sample whose features tell how far the student has drifted."""

    def stepped(self, run: Run) -> None:
        """After each step."""


class Run:
    """Everything that steps change, and what they need."""

    def __init__(self, config: Distill, device: str, shard: Shard):
        self.config, self.device, self.shard, self.step, self.skipped = config, device, shard, 0, 0
        start = backbones.load(config.backbone, config.seed)
        self.fingerprint = fingerprint(start)
        self.student = student_of(start, config).to(device)
        self.teacher = Teacher(self.student, config.ema)
        self.names = trained(self.student)
        self.adam = torch.optim.AdamW(self.names.values(), lr=config.lr, weight_decay=config.weight_decay)
        centred = config.loss.centering == "mean" and self.student.head is not None
        self.center = Center(torch.zeros(config.head.prototypes, device=device) if centred else None, config.loss.center_momentum)
        half = config.amp == "bf16" or config.amp == "auto" and device == "cuda"
        self.precision = lambda: torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
        # Gradients are averaged while the backward pass still runs; the wrapper shares the student's weights.
        self.parallel = torch.nn.parallel.DistributedDataParallel(self.student, device_ids=[torch.cuda.current_device()] if device == "cuda" else None) if shard.world > 1 else self.student

    def forward(self, *inputs) -> tuple[Tensor, Tensor | None]:
        """The student's, which talks to the other processes where there are some."""
        with exchange() if self.shard.world > 1 else contextlib.nullcontext():
            return self.parallel(*inputs)

    def save(self, folder: Path) -> None:
        center = {} if self.center.value is None else {"center": self.center.value}
        tensors = {f"student.{n}": p for n, p in self.names.items()} | {f"teacher.{n}": p for n, p in self.teacher.state(self.student).items()}
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder, self.step, tensors | optimiser_state(self.adam, self.names) | center, {"config": _lasting(self.config), "weights": self.fingerprint, "skipped": self.skipped})

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Raises BadConfig where the checkpoint is of a run with other settings or weights."""
        check_same_settings(saved, _lasting(self.config))
        if saved.values["weights"] != self.fingerprint:
            raise BadConfig(f"{saved.path} was made from other weights of {self.config.backbone.name}; give the same, or start anew without --resume")
        fill(dict(self.names), saved.tensors, "student.")
        fill(self.teacher.state(self.student), saved.tensors, "teacher.")
        fill_optimiser(self.adam, self.names, saved.tensors)
        self.step, self.skipped = saved.step, saved.values["skipped"]
        if self.center.value is not None:
            self.center.value = saved.tensors["center"].to(self.device)


def distill(config: Distill, report: Callable[..., None] = lambda *a, **k: None, say: Report = silent, watcher: Watcher | None = None,
            scenes: list[PosedScene] | None = None) -> dict[str, float]:
    """Teaches the backbone and writes the run folder: config.yaml, metrics.jsonl, checkpoint/, and backbone.safetensors with the adapters merged,
    which plain timm loads. Returns the last line of metrics.

    `report(step, **numbers)` is called now and then, `say(line)` for what the user should know about the data. `scenes` stand in
    for those of config.data. Under torchrun every process takes its share of each batch (DistributedDataParallel); the first one reports and writes.

    A step whose gradient is not finite is left out and counted; the tenth in a row ends the run with Diverged and the last checkpoint.
    Raises BadFile for data or weights that cannot be used, BadConfig where settings do not fit them or a checkpoint to resume, BackendUnavailable
    without timm or the network's weights; ProcessLost and EndedElsewhere as `processes.joined` says.
    """
    with joined() as shard:
        first = shard.rank == 0
        if config.batch % (shard.world * config.micro_batch):
            raise BadConfig(f"batch is {config.batch}; {shard.world} processes with micro_batch {config.micro_batch} need a multiple of {shard.world * config.micro_batch}")
        config.output.mkdir(parents=True, exist_ok=True)
        with checkpoint.lock(config.output) if first else contextlib.nullcontext():
            return _distill(config, report if first else lambda *a, **k: None, say if first else silent, watcher or Watcher(), shard, scenes)


def _distill(config: Distill, report, say, watcher: Watcher, shard: Shard, scenes: list[PosedScene] | None) -> dict[str, float]:
    folder, start, device = config.output, time.monotonic(), device_for(config.device)
    scenes = scenes_of(config.data, say) if scenes is None else scenes
    samples = Samples(scenes, config.data, config.seed, config.geometry.permuted)
    drift_sample = samples[0]
    _check_data(config, drift_sample, say)
    geometry = geometry_of(config.geometry, device) if config.method == "geometry" else None
    run = Run(config, device, shard)
    run.student.backbone.grid(config.data.height, config.data.width)
    with torch.no_grad():       # B is zero: these are the features of the weights that the run starts from
        photo, first_tokens = drift_sample.targets[0].photo[None].to(device), None
        first_tokens = run.teacher.model.backbone(photo).float()
    saved = checkpoint.load(folder / "checkpoint", say) if config.resume else None
    if saved:
        run.load(saved)
    shard.agree({"config": _lasting(config), "weights": run.fingerprint, "photos": [s.name for s in scenes], "checkpoint": run.step, "versions": versions()})
    if shard.rank == 0:
        if not saved:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        configs.save(config, folder / "config.yaml")
        keep_lines(folder / "metrics.jsonl", run.step)
    watcher.begun(run, drift_sample)
    tally, record, skipped_in_a_row = Tally(), {}, 0
    batches = samples.batches(run.step + 1, config.steps, config.batch, config.micro_batch, shard.rank, shard.world)
    boards = _board(config, say) if shard.rank == 0 else None
    with (folder / "metrics.jsonl" if shard.rank == 0 else Path(os.devnull)).open("a") as log:
        for step in range(run.step + 1, config.steps + 1):
            torch.manual_seed((config.seed * 1_000_003 + step) * 64 + shard.rank)       # dropout, without a state to keep
            run.adam.zero_grad(set_to_none=True)
            for k in range(parts := config.batch // (shard.world * config.micro_batch)):
                batch = [sample.to(device) for sample in next(batches)]
                together = contextlib.nullcontext() if k == parts - 1 or shard.world == 1 else run.parallel.no_sync()
                with together:
                    if config.method == "correspondence":
                        loss = correspondence_loss(batch, run.forward, run.precision(), tally)
                    else:
                        labels = make_labels(batch, run.teacher, geometry, config, run.precision())
                        loss = loss_of(batch, run.forward, run.student.head, run.teacher, labels, config, run.center, run.precision(), tally)
                    with exchange() if shard.world > 1 else contextlib.nullcontext():
                        (loss / parts).backward()
                tally.add(loss=loss)
            norm = torch.nn.utils.clip_grad_norm_(run.names.values(), config.clip or math.inf)
            finite = bool(torch.isfinite(norm))         # gradients are everybody's, and so is this
            run.step = step
            if finite:
                take_step(run, step)
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            run.skipped += not finite
            if not finite:
                run.center.sums, run.center.count = None, 0
                log.write(json.dumps({"step": step, "skipped": True, "scenes": [sample.scene for sample in batch]}) + "\n")
            if skipped_in_a_row == SKIPS_MAX:
                raise Diverged(f"{folder}: the gradient was not finite in {SKIPS_MAX} steps in a row, up to step {step}; the last checkpoint is as it was before: "
                               "lower lr, and go on with --resume or start anew")
            if step % config.log_every == 0 or step == config.steps:
                record = {"step": step, **{name: _of_all(value, shard) for name, value in tally.means().items()}, "drift": _drift(run, photo, first_tokens),
                          "gradient_norm": float(norm), "lr": learning_rate(step, config), "skipped": run.skipped, "seconds": round(time.monotonic() - start, 3)}
                log.write(json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}) + "\n")
                log.flush()
                report(step, **{name: record[name] for name in ("excess", "loss", "valid", "drift") if name in record})
                for name, value in record.items() if boards else ():
                    boards.add_scalar(name, value, step)
            watcher.stepped(run)
            shard.any([])       # Ctrl-C in one process ends all behind the same step
            if (step % config.save_every == 0 or step == config.steps) and shard.rank == 0:
                run.save(folder / "checkpoint")
    if shard.rank == 0:
        run.student.eval()
        backbones.save(run.student.backbone, folder / WEIGHTS)
    return record


def take_step(run: Run, step: int) -> None:
    """Optimiser and teacher, in the order that ema.when says."""
    config = run.config
    due = step % config.ema.every == 0
    if due and config.ema.when == "before":
        run.teacher.follow(run.student)
    for group in run.adam.param_groups:
        group["lr"] = learning_rate(step, config)
    run.adam.step()
    if due and config.ema.when == "after":
        run.teacher.follow(run.student)
    run.center.step(_summed if run.shard.world > 1 else lambda x: x)


def learning_rate(step: int, config: Distill) -> float:
    """Of step 1 to config.steps. `cosine`: linear over the warm-up, then half a cosine to 0. `one_cycle`: torch's OneCycleLR over ten steps more
    (from lr / 25 by half a cosine to lr, then to lr / 250,000), which the paper's code uses."""
    if config.schedule == "cosine":
        warm = max(1, round(config.warmup * config.steps))
        return config.lr * (step / warm if step <= warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, config.steps - warm + 1)))
    total, at = config.steps + 10, step - 1
    top = config.warmup * total - 1
    between = lambda a, b, share: b + (a - b) / 2 * (1 + math.cos(math.pi * share))
    return between(config.lr / 25, config.lr, at / top) if at <= top else between(config.lr, config.lr / 25e4, (at - top) / (total - 1 - top))


def _summed(x: Tensor) -> Tensor:
    with exchange():
        dist.all_reduce(x)
    return x


def _of_all(value: float, shard: Shard) -> float:
    if shard.world == 1:
        return value
    return float(_summed(torch.tensor([value], dtype=torch.float64))) / shard.world


@torch.no_grad()
def _drift(run: Run, photo: Tensor, before: Tensor) -> float:
    """1 - the mean cosine of the student's features of one photo and those at the start."""
    run.student.eval()
    now = run.student.backbone(photo).float()
    run.student.train()
    return float(1 - F.cosine_similarity(now, before, dim=-1).mean())


def _check_data(config: Distill, sample: Sample, say: Report) -> None:
    """What would only be seen in the middle of a run."""
    views = (*sample.contexts, *sample.targets)
    if config.method == "geometry" and config.label.regions == "masks" and any(v.labels is None for v in views):
        say("no instance masks: regions are k-means of the teacher's tokens instead; --label.regions none goes without, and without blending")
    if config.method == "correspondence" and any(v.depth is None for v in views):
        raise BadFile(config.data.folder or sample.scene, "depth", "method correspondence needs photos with depth")


def _board(config: Distill, say: Report):
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("tensorboard is not installed; metrics go to metrics.jsonl alone")
        return None
    return SummaryWriter(str(config.output / "tensorboard"))


def _lasting(config: Distill) -> str:
    """What a resumed run must share with the one before: not where it lies, how it reports, or where the same bits come from."""
    data = dataclasses.replace(config.data, workers=0, cache=None)
    return configs.to_yaml(dataclasses.replace(config, output=Path(), resume=False, device="auto", log_every=1, save_every=1, tensorboard=False, data=data,
                                               geometry=dataclasses.replace(config.geometry, cache=None)))
