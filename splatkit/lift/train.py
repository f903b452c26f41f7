"""Photos to weights: the loop that trains the lifting network and writes the run folder."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from .. import config as configs
from .. import lpips
from ..errors import BadConfig, BadFile, Diverged, SplatkitError
from ..io import checkpoint
from ..io.reading import Report, silent
from ..processes import exchange
from ..raster import device_for
from ..reconstruct import check_same_settings, keep_lines
from ..shard import Shard, joined, versions
from .captured import CapturedPasses
from .data import Sample, Source, collated, held_out, training
from .losses import losses, targets_drawn, total
from .model import Lifted, MVSplat
from .train_config import LiftTrain
from .weights import load_weights, save_weights

NOT_COMPARED = {"output": Path(), "resume": False, "workers": 0, "end": 0, "data": (), "cache": None, "weights": None}      # a resumed run may have others
LOG_EVERY = 20


def lift_train(config: LiftTrain, report: Callable[..., None] = lambda *a, **k: None, say: Report = silent) -> Path:
    """Trains the network and returns the file of its weights (half precision, as load_weights reads it); the run folder has config.yaml, metrics.jsonl,
    checkpoint/ and weights.safetensors. `report(step, **numbers)` is called now and then, `say(line)` for what the user should know.

    Step s works on samples that only the settings and s determine. Under torchrun every process works on its own samples and gradients are
    averaged (DistributedDataParallel): two processes of a batch of 1 do what one of a batch of 2 does, but for rounding.

    Raises BackendUnavailable as device_for, BadFile for what is wrong with the data or where another process works in the run folder, BadConfig where a checkpoint to resume
    was made with other settings, Diverged where the loss is not finite; ProcessLost and EndedElsewhere as `processes.joined` says.
    """
    with joined() as shard:
        first = shard.rank == 0
        config.output.mkdir(parents=True, exist_ok=True)
        with checkpoint.lock(config.output) if first else contextlib.nullcontext():
            return _train(config, shard, report if first else lambda *a, **k: None, say if first else silent)


@dataclass
class Training:
    """Everything that the steps of a run change."""

    model: MVSplat
    adam: torch.optim.AdamW
    step: int = 0

    @staticmethod
    def first(config: LiftTrain, device: str) -> Training:
        torch.manual_seed(config.seed)      # of the first weights; nothing else draws from the global generator
        model = (MVSplat(config.network) if config.weights is None else load_weights(config.weights, config=config.network)[0]).to(device)
        decayed, free = ([p for p in model.parameters() if (p.ndim > 1) == which] for which in (True, False))
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
        return Training(model, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=device == "cuda"), config.begin)

    def save(self, folder: Path, values: dict) -> None:
        """Weights and moments as one vector each, so that a save is few operations."""
        parameters = [p for group in self.adam.param_groups for p in group["params"]]
        parts = {"weights": parameters, **{name: [self.adam.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")}}
        folder.mkdir(exist_ok=True)
        tensors = {name: torch.cat([x.detach().flatten().cpu() for x in parts]) for name, parts in parts.items()}
        checkpoint.save(folder, self.step, tensors, {**values, "updates": int(self.adam.state[parameters[0]]["step"])})

    def load(self, saved: checkpoint.Checkpoint) -> None:
        parameters = [p for group in self.adam.param_groups for p in group["params"]]
        sizes = [p.numel() for p in parameters]
        if any(len(saved.tensors.get(name, ())) != sum(sizes) for name in ("weights", "exp_avg", "exp_avg_sq")):
            raise BadFile(saved.path, "weights", f"are not the {sum(sizes)} of this network; start anew without --resume")
        parts = {name: saved.tensors[name].split(sizes) for name in ("weights", "exp_avg", "exp_avg_sq")}
        for i, p in enumerate(parameters):
            p.data.copy_(parts["weights"][i].view_as(p))
            moments = {name: parts[name][i].view_as(p).to(p.device, copy=True) for name in ("exp_avg", "exp_avg_sq")}
            count = torch.tensor(float(saved.values["updates"]), device=p.device if self.adam.defaults["fused"] else None)
            self.adam.state[p] = {"step": count, **moments}
        self.step = saved.step


def _train(config: LiftTrain, shard: Shard, report: Callable[..., None], say: Report) -> Path:
    device = device_for(config.device)
    run, start = config.output, time.monotonic()
    state = Training.first(config, device)
    config = dataclasses.replace(config, network=state.model.config)
    compared = configs.to_yaml(dataclasses.replace(config, **NOT_COMPARED, begin=0))
    made_with = {"config": compared, "data": [path.name for path in config.data], "device": device, "begin": config.begin, "batch": effective_batch(config, shard)}
    saved = checkpoint.load(run / "checkpoint", say) if config.resume and (run / "checkpoint").is_dir() else None
    if saved:
        _check_same_run(saved, made_with)
        state.load(saved)
    perceptual = lpips.load(config.loss.lpips_weights).to(device) if config.loss.lpips else None
    source, held = training(config, say, effective_batch(config, shard)), held_out(config, say) if config.hold else None
    shard.agree({**made_with, "step": state.step, "versions": versions(), "weights": torch.cat([p.detach().flatten() for p in state.model.parameters()])})
    # A graph holds no exchange of gradients, and its gradients do not add up.
    captured = device == "cuda" and shard.world == config.accumulate == 1
    say(f"{sum(p.numel() for p in state.model.parameters()):,} weights on {device}; {effective_batch(config, shard)} samples a step: {config.batch} a pass, "
        f"{config.accumulate} passes, {shard.world} processes{', replayed as one CUDA graph' if captured else ''}")
    if shard.rank == 0:
        if not saved:
            shutil.rmtree(run / "checkpoint", ignore_errors=True)
        configs.save(config, run / "config.yaml")
        keep_lines(run / "metrics.jsonl", state.step)
    if config.amp == "bf16" or config.amp == "auto" and device == "cuda":
        halve(state.model)
    model = DistributedDataParallel(state.model) if shard.world > 1 else state.model
    batches, parameters = _batches(source, config, state.step, shard), list(state.model.parameters())

    def passes(sample: Sample) -> dict[str, Tensor]:
        terms = losses(_lifted(model, sample, config.contexts), sample, config.contexts, config.loss, perceptual)
        (total(terms, config.loss) / config.accumulate).backward()
        return {name: x.detach() for name, x in terms.items()}

    run_passes = CapturedPasses(passes, parameters) if captured else passes
    with (run / "metrics.jsonl" if shard.rank == 0 else Path(os.devnull)).open("a") as log:
        for step in range(state.step + 1, config.last + 1):
            for group in state.adam.param_groups:
                group["lr"] = learning_rate(config, step)
            sums: dict[str, Tensor] = {}
            with exchange() if shard.world > 1 else contextlib.nullcontext():
                for i in range(config.accumulate):
                    sample = next(batches).to(parameters[0])
                    last = i == config.accumulate - 1
                    with contextlib.nullcontext() if last or shard.world == 1 else model.no_sync():
                        terms = run_passes(sample)
                    for name, x in terms.items():
                        sums[name] = sums.get(name, 0) + x / config.accumulate
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            if shard.any([not bool(torch.isfinite(norm))])[0]:
                raise Diverged(f"{run}: the gradient of step {step} is not finite; the last checkpoint is as it was: lower --lr and go on with --resume, or start anew")
            state.adam.step()
            if not captured:
                state.adam.zero_grad(set_to_none=True)
            state.step = step
            if step % LOG_EVERY == 0 or step == config.last or (held and step % config.hold_every == 0):
                numbers = {name: float(x) for name, x in _averaged(sums, shard).items()}
                if held and (step % config.hold_every == 0 or step == config.last):
                    numbers |= {f"held_{name}": x for name, x in quality(state.model, held, config).items()}
                log.write(json.dumps({"step": step, **numbers, "lr": learning_rate(config, step), "seconds": round(time.monotonic() - start, 2)}) + "\n")
                log.flush()
                report(step, **numbers)
            if shard.rank == 0 and (step % config.save_every == 0 or step == config.last):
                save_weights(run / "weights.safetensors", state.model)
                state.save(run / "checkpoint", made_with)
    return run / "weights.safetensors"


def _lifted(model: nn.Module, sample: Sample, contexts: int) -> Lifted:
    near = torch.ones_like(sample.far)[:, None].expand(-1, contexts)
    return model(sample.images[:, :contexts], sample.K[:, :contexts], sample.world_to_cam[:, :contexts], near, sample.far[:, None].expand(-1, contexts))


@torch.no_grad()
def quality(model: MVSplat, source: Source, config: LiftTrain) -> dict[str, float]:
    """On the held-out samples: mean PSNR of the target views, and mean |predicted - given| / given of the input views' depths, where they are given."""
    decibels, errors = [], []
    for number in range(config.hold):
        sample = collated([source(number)]).to(next(model.parameters()))
        found = _lifted(model, sample, config.contexts)
        if config.targets:
            drawn, photos = targets_drawn(found, sample, config.contexts), sample.images[:, config.contexts:].permute(0, 1, 3, 4, 2)
            decibels += (-10 * (drawn.clamp(0, 1) - photos).square().mean((2, 3, 4)).log10()).flatten().tolist()
        given = sample.depth[:, :config.contexts]
        if bool((given > 0).any()):
            errors.append(float(((found.depth - given).abs() / given)[given > 0].mean()))
    numbers = {"psnr": decibels, "abs_rel": errors}
    return {name: sum(x) / len(x) for name, x in numbers.items() if x}


def learning_rate(config: LiftTrain, step: int) -> float:
    """Rises over the first steps of the run, and falls by half a cosine over those of the schedule."""
    rise = min(1.0, (step - config.begin) / max(config.warmup, 1))
    return config.lr * rise * (1 + math.cos(math.pi * (step - 1) / config.steps)) / 2


def effective_batch(config: LiftTrain, shard: Shard) -> int:
    return config.batch * config.accumulate * shard.world


def halve(model: nn.Module) -> None:
    """Makes convolutions and linear layers compute in bfloat16; what lies between them, cameras and depths above all, stays float32."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            def forward(x: Tensor, whole=module.forward) -> Tensor:
                with torch.autocast(x.device.type, torch.bfloat16):
                    return whole(x).float()
            module.forward = forward


class _Numbered(torch.utils.data.Dataset):
    """Samples by number for processes that prepare them; what goes wrong there comes back as a value, for what they raise arrives as another type."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, number: int) -> Sample | Exception:
        try:
            return self.source(number)
        except (SplatkitError, ValueError, OSError) as why:
            return why


def _batches(source: Source, config: LiftTrain, done: int, shard: Shard) -> Iterator[Sample]:
    """This process's batches of the steps after `done`: sample n of the training is number n of all processes together."""
    firsts = [((step * config.accumulate + i) * shard.world + shard.rank) * config.batch for step in range(done, config.last) for i in range(config.accumulate)]
    numbers = [list(range(first, first + config.batch)) for first in firsts]
    if config.workers == 0:
        yield from (collated([source(number) for number in some]) for some in numbers)
        return
    for batch in DataLoader(_Numbered(source), batch_sampler=numbers, num_workers=config.workers, collate_fn=_collated, generator=torch.Generator().manual_seed(0)):
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _collated(some: list[Sample | Exception]) -> Sample | Exception:
    return next((x for x in some if isinstance(x, Exception)), None) or collated(some)


def _averaged(sums: dict[str, Tensor], shard: Shard) -> dict[str, Tensor]:
    if shard.world > 1:
        with exchange():
            for x in sums.values():
                dist.all_reduce(x)
                x /= shard.world
    return sums


def _check_same_run(saved: checkpoint.Checkpoint, made_with: dict) -> None:
    check_same_settings(saved, made_with["config"])
    for name in ("data", "device", "begin", "batch"):
        if saved.values[name] != made_with[name]:
            raise BadConfig(f"{saved.path} was made with {name} {saved.values[name]}, this run has {made_with[name]}; give the same, or start anew without --resume")
