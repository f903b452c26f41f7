"""A training step's passes as one CUDA graph: on a card against the passes themselves, and everywhere with stand-ins for the card, which replay by running again."""
import contextlib

import pytest
import torch
from lift_training import settings

from splatkit.io.reading import silent
from splatkit.lift import captured
from splatkit.lift.captured import WARM_UP, CapturedPasses
from splatkit.lift.data import Sample, collated, training
from splatkit.lift.losses import losses, total
from splatkit.lift.train import Training, _lifted


def sample(value: float) -> Sample:
    return Sample(torch.full((1, 1, 3, 2, 2), value), torch.eye(3)[None, None], torch.eye(4)[None, None], torch.ones(1, 1, 2, 2), torch.ones(1))


class Step:
    """loss = p^2 + p times the mean of the picture; counts how often it is run, and on what."""

    def __init__(self):
        self.p, self.seen = torch.tensor(3.0, requires_grad=True), []

    def __call__(self, given: Sample) -> dict[str, torch.Tensor]:
        mean = given.images.mean()
        self.seen.append(float(mean))
        loss = self.p.square() + self.p * mean
        loss.backward()
        return {"loss": loss.detach()}


@pytest.fixture
def stood_in(monkeypatch):
    """stood_in(step, overflows) -> CapturedPasses; of its replays those that find a positive number in `overflows`, one each, did not fit."""
    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            made = self.of
            for p in made.parameters:
                p.grad = None
            for name, value in made.passes(made.sample).items():
                made.terms[name].copy_(value)
            made.overflow = torch.tensor(made.overflows.pop(0) if made.overflows else 0)

    @contextlib.contextmanager
    def graph(g):
        g.of = made[0]
        yield
    made = []
    for name, value in (("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph), ("graph", graph), ("stream", lambda s: contextlib.nullcontext())):
        monkeypatch.setattr(captured.torch.cuda, name, value)

    def make(step, overflows=()):
        made[:] = [CapturedPasses(step, [step.p])]
        made[0].overflows = list(overflows)
        return made[0]
    return make


def test_a_replay_gives_terms_and_gradients_of_its_own_sample_alone(stood_in):
    step = Step()
    passes = stood_in(step)
    for value in (1.0, 5.0, 2.0):
        terms = passes(sample(value))
        assert float(terms["loss"]) == 9 + 3 * value and float(step.p.grad) == 6 + value
    assert len(step.seen) == WARM_UP + 1 + 3       # captured once


def test_a_sample_that_did_not_fit_is_captured_anew_until_it_does(stood_in):
    step = Step()
    passes = stood_in(step, [0, 7, 3, 0])
    passes(sample(1.0))
    step.seen.clear()
    assert float(passes(sample(5.0))["loss"]) == 24 and float(step.p.grad) == 11
    assert step.seen == [5.0] * (1 + 2 * (WARM_UP + 1 + 1))


def test_what_a_caller_set_for_cudnn_is_as_it_was(stood_in):
    before = torch.backends.cudnn.benchmark
    stood_in(Step())(sample(1.0))
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.gpu
def test_on_a_card_a_replay_equals_the_passes_on_every_sample(tmp_path):
    config = settings(tmp_path / "run", batch=2, device="cuda")
    state, source = Training.first(config, "cuda"), training(config, silent)
    parameters = list(state.model.parameters())

    def passes(given):
        terms = losses(_lifted(state.model, given, 2), given, 2, config.loss)
        total(terms, config.loss).backward()
        return {name: x.detach() for name, x in terms.items()}
    replayed = CapturedPasses(passes, parameters)
    for step in range(3):
        given = collated([source(2 * step), source(2 * step + 1)]).to(parameters[0])
        terms = {name: float(x) for name, x in replayed(given).items()}
        gradients = [p.grad.clone() for p in parameters]
        wanted = torch.autograd.grad(total(own := losses(_lifted(state.model, given, 2), given, 2, config.loss), config.loss), parameters)
        assert all(abs(terms[name] - float(x)) < 1e-5 for name, x in own.items())
        distance = sum((a - b).square().sum() for a, b in zip(gradients, wanted)).sqrt() / sum(b.square().sum() for b in wanted).sqrt()
        assert float(distance) < 1e-3       # sums by atomics differ from run to run
