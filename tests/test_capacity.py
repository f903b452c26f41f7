"""How a picture on a card gets room for its pairs before their number is known: with stand-ins for the card's counts."""
import pytest
import torch

from splatkit.raster import operators


class Counts:
    """Counts [C,3] on a card, that arrive on the host when asked."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, pairs, bad=0):
        self.pairs, self.bad = pairs, bad

    def __len__(self):
        return 1

    def tolist(self):
        return [[9, self.pairs, self.bad]]


class Copied:
    def synchronize(self):
        pass


@pytest.fixture
def draw(monkeypatch):
    """draw(pairs) -> the capacities that the blend was called with."""
    monkeypatch.setattr(operators, "_capacity", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(operators._landing, "send", lambda counts: (counts, Copied()))
    capturing = [False]

    def of(pairs, bad=0, limit=None, capture=False):
        calls, capturing[0] = [], capture

        def blend(capacity):
            calls.append(capacity)
            if limit is not None and capacity > limit:
                raise torch.OutOfMemoryError("too much")
        K = torch.eye(3)[None]
        operators._after_projection(Counts(pairs, bad), (torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 1, 3)), torch.eye(4)[None], K,
                                    (64, 48), blend)
        return calls
    return of


def test_the_first_picture_is_blended_once_with_room_even_where_it_shows_nothing(draw):
    assert draw(0) == [1024]
    assert draw(0) == [1024]


def test_a_picture_that_needs_more_is_blended_again_with_enough(draw):
    assert draw(10_000)[-1] >= 10_000
    first = draw(10_000)
    assert len(first) == 1 and first[0] >= 10_000
    again = draw(50_000)
    assert len(again) == 2 and again[0] == first[0] and again[1] >= 50_000
    assert draw(50_000) == [again[1]]


def test_room_shrinks_slowly_where_less_is_needed(draw):
    draw(1_000_000)
    rooms = [draw(1000)[0] for _ in range(300)]
    assert rooms == sorted(rooms, reverse=True) and rooms[1] > 0.95 * rooms[0] and rooms[-1] < 5000


def test_room_that_does_not_fit_is_given_up_for_what_is_needed(draw):
    draw(1_000_000)
    calls = draw(1000, limit=100_000)
    assert calls[0] > 1_000_000 and calls[1:] == [2124] and draw(1000) == [2124]


def test_what_is_not_finite_and_what_is_too_many_is_said(draw):
    with pytest.raises(ValueError, match="2147483648 pairs.*at most 2147483647"):
        draw(2**31)
    draw(5, bad=1)      # the field is looked for; these are finite, so nothing is raised
    assert draw(2**31 - 5)[-1] == 2**31 - 1


def test_a_graph_is_captured_with_the_room_of_before_or_refused(draw):
    with pytest.raises(RuntimeError, match="once outside"):
        draw(100, capture=True)
    room = draw(100)
    assert draw(100, capture=True) == room
