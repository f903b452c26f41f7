"""The passes of a training step on a card as one CUDA graph: a step of the small network is 10,000 kernels, and starting them one by one takes thrice as long."""
from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..raster import watched_pairs
from .data import Sample

WARM_UP = 3     # passes before the capture, in which libraries choose kernels and the rasterizer learns how much room its pictures need

Passes = Callable[[Sample], dict[str, Tensor]]


class Captured:
    """Called like `passes`, which leaves gradients and gives what else is wanted; samples must be of one shape. The gradients are the graph's own memory: every call
    writes them anew, and nobody else may set them to None."""

    def __init__(self, passes: Passes, parameters: list[Tensor]):
        self.passes, self.parameters, self.graph = passes, parameters, None

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        if self.graph is not None:
            self._replay(sample)
        while self.graph is None or int(self.beyond) > 0:       # pictures with more pairs than there is room for
            self._capture(sample)
            self._replay(sample)
        return self.terms

    def _replay(self, sample: Sample) -> None:
        for own, given in zip(vars(self.sample).values(), vars(sample).values()):
            own.copy_(given)
        self.graph.replay()

    def _capture(self, sample: Sample) -> None:
        self.graph, self.sample = None, Sample(*(x.clone() for x in vars(sample).values()))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _fastest():
            for _ in range(WARM_UP):
                self.passes(self.sample)
                self._forget()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _fastest(), watched_pairs() as pairs, torch.cuda.graph(graph):
            self.terms = self.passes(self.sample)
            self.beyond = torch.stack(pairs).amax() if pairs else torch.zeros((), device=self.sample.images.device)
        self.graph = graph

    def _forget(self) -> None:
        for p in self.parameters:
            p.grad = None


def _fastest() -> contextlib.AbstractContextManager:
    """Convolutions try the ways they have once for each shape: shapes stay."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=torch.backends.cudnn.allow_tf32)
