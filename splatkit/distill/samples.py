"""Samples: which photos of which scene give the label and which one is the target, drawn by number, so that any process and any resumed run draws the same."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .config import DataConfig
from .views import PosedScene, View


@dataclass(frozen=True)
class Sample:
    """Context photos, and target photos between them."""

    scene: str
    names: tuple[str, ...]              # of the context photos
    contexts: tuple[View, ...]
    targets: tuple[View, ...]
    depth_range: tuple[float, float] | None = None
    elsewhere: Sample | None = None     # another pair, for geometry that is wrong on purpose
    is_mirrored: bool = False           # the views are; what is kept on disk for them is not

    def to(self, device) -> Sample:
        other = None if self.elsewhere is None else self.elsewhere.to(device)
        return replace(self, contexts=tuple(v.to(device) for v in self.contexts), targets=tuple(v.to(device) for v in self.targets), elsewhere=other)


def draw(photos: int, config: DataConfig, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Context photos, the first and last of them a gap apart and the others evenly between, and target photos strictly between the first and
    last; with allow_context_target the ends may be drawn too. In scenes with too few photos the gap is what there is."""
    gap = min(int(rng.integers(config.gap[0], config.gap[1] + 1)), photos - 1)
    start = int(rng.integers(0, photos - gap))
    contexts = [start + round(k * gap / (config.contexts - 1)) for k in range(config.contexts)]
    others = list(range(start, start + gap + 1)) if config.allow_context_target else [i for i in range(start + 1, start + gap) if i not in contexts] or contexts
    return contexts, [int(i) for i in rng.choice(others, config.targets, replace=len(others) < config.targets)]


class Samples(Dataset):
    """Sample number n, from 0, without end: each scene once in each epoch, in an order that the seed gives."""

    def __init__(self, scenes: Sequence[PosedScene], config: DataConfig, seed: int, with_elsewhere: bool = False):
        self.scenes, self.config, self.seed, self.with_elsewhere = scenes, config, seed, with_elsewhere

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.scenes))
        which = int(np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.scenes))[place])
        rng = np.random.default_rng([self.seed, 2, number])
        sample = self._sample(which, rng)
        if self.with_elsewhere:
            other = (which + int(rng.integers(1, len(self.scenes)))) % len(self.scenes) if len(self.scenes) > 1 else which
            sample = replace(sample, elsewhere=self._sample(other, rng))
        if self.config.flip and rng.random() < 0.5:
            flipped = [None if s is None else replace(s, is_mirrored=True, contexts=tuple(v.mirrored() for v in s.contexts), targets=tuple(v.mirrored() for v in s.targets))
                       for s in (sample, sample.elsewhere)]
            sample = replace(flipped[0], elsewhere=flipped[1])
        return sample

    def _sample(self, which: int, rng: np.random.Generator) -> Sample:
        scene = self.scenes[which]
        contexts, targets = draw(len(scene), self.config, rng)
        return Sample(scene.name, tuple(scene.photo_name(i) for i in contexts), tuple(scene.view(i) for i in contexts), tuple(scene.view(i) for i in targets),
                      scene.depth_range(contexts[0]))

    def batches(self, first: int, last: int, batch: int, micro_batch: int, rank: int, world: int) -> Iterator[list[Sample]]:
        """This process's micro-batches of the optimiser steps first to last, counted from 1: step s has the samples (s - 1) batch to s batch - 1, of which
        each process takes its share in the order of ranks."""
        share = batch // world
        numbers = [[(step - 1) * batch + rank * share + k for k in range(start, start + micro_batch)] for step in range(first, last + 1) for start in range(0, share, micro_batch)]
        # Threads of two processes at work on one picture each would share the cores that the training wants: a worker uses one.
        return iter(DataLoader(self, batch_sampler=numbers, num_workers=self.config.workers, collate_fn=list, persistent_workers=False,
                               worker_init_fn=lambda _: torch.set_num_threads(1)))
