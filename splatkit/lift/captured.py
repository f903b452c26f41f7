"""The passes of a training step on a card as one CUDA graph: a step of the small network is 10,000 kernels, and starting them one by one takes half as long again."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..raster.operators import pair_overflows
from .data import Sample

WARM_UP = 3     # passes before the capture, in which libraries choose kernels and the rasterizer learns how much room its pictures need

Passes = Callable[[Sample], dict[str, Tensor]]


class CapturedPasses:
    """Called like `passes`, which leaves gradients in `parameters` and returns terms of the loss; all samples must have the shapes of the first. Gradients and terms are
    the graph's own memory, which every call writes anew: nobody else may set the gradients to None, and several calls do not add up."""

    def __init__(self, passes: Passes, parameters: list[Tensor]):
        self.passes, self.parameters, self.graph = passes, parameters, None

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        if self.graph is not None:
            self._replay(sample)
        while self.graph is None or int(self.overflow) > 0:     # pictures with more pairs than there is room for
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
        with _fastest_kernels():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.passes(self.sample)
                    for p in self.parameters:
                        p.grad = None
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with pair_overflows() as overflows, torch.cuda.graph(graph):
                self.terms = self.passes(self.sample)
                self.overflow = torch.stack(overflows).amax() if overflows else torch.zeros((), device=self.sample.images.device)
        self.graph = graph


@contextlib.contextmanager
def _fastest_kernels() -> Iterator[None]:
    """Convolutions try the ways they have once for each shape: shapes stay."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
