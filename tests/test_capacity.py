"""How a picture on a card gets room for its pairs and visible Gaussians before their numbers are known: with stand-ins for the card."""
import pytest
import torch

from splatkit.raster import operators


class OnCard(torch.Tensor):
    is_cuda = property(lambda self: True)


class Copied:
    def synchronize(self):
        pass


N = 40_000_000


@pytest.fixture
def draw(monkeypatch):
    """draw(pairs) -> the capacities that the blend was called with; draw.rooms: how many visible Gaussians the last picture's projections had room for."""
    monkeypatch.setattr(operators, "_room", {})
    monkeypatch.setattr(operators, "_most_pairs", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(operators._landing, "send", lambda counts: (counts, Copied()))
    capturing, rooms = [False], []

    def of(pairs, bad=0, limit=None, capture=False, visible=9):
        calls, capturing[0] = [], capture
        rooms.clear()

        def project(*inputs):
            rooms.append(inputs[-1] if len(inputs) == 13 else None)
            return *[torch.zeros(1)] * 4, torch.tensor([[visible, pairs, bad]])

        def blend(projected, capacity):
            calls.append(capacity)
            if limit is not None and capacity > limit:
                raise torch.OutOfMemoryError("too much")
        monkeypatch.setattr(operators, "project", project)
        fields = (torch.zeros(1, 3).expand(N, 3).as_subclass(OnCard), torch.zeros(1, 4), torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 1, 3))
        if bad:
            fields = (torch.zeros(1, 3).as_subclass(OnCard), *fields[1:])
        operators._projected(fields, torch.eye(4)[None], torch.eye(3)[None], None, 64, 48, 0, torch.zeros(1), blend)
        return calls
    of.rooms = rooms
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


def test_a_graph_is_captured_with_more_room_than_before_or_refused(draw):
    with pytest.raises(RuntimeError, match="once outside"):
        draw(100, capture=True)
    draw(100_000)
    for _ in range(100):        # of a batch: the room of pictures outside shrinks
        draw(10)
    assert draw(10, capture=True) == [operators.GRAPH_ROOM * 100_000]


def test_a_graph_knows_by_how_much_pairs_go_beyond_its_room(draw):
    draw(100_000)
    room = operators.GRAPH_ROOM * 100_000
    with operators.pair_overflows() as beyond:
        draw(room - 7, capture=True)
        draw(room + 7, capture=True)
    draw(room, capture=True)
    assert [int(x) for x in beyond] == [-7, 7]


def test_as_many_are_sorted_as_the_last_pictures_showed_and_all_where_that_was_too_few(draw):
    draw(100, visible=1_000_000)
    assert draw.rooms == [N]                                # nothing is known yet
    assert len(draw(100, visible=1_050_000)) == 1 and len(draw.rooms) == 1 and 1_050_000 <= draw.rooms[0] < 1_200_000
    again = draw(100, visible=3_000_000)
    assert len(again) == 2 and len(draw.rooms) == 2 and draw.rooms[1] is None       # projected and blended again, without a limit
    assert len(draw(100, visible=3_000_000)) == 1 and 3_000_000 <= draw.rooms[0] < 3_500_000


def test_a_captured_graph_sorts_all_that_are_there(draw):
    draw(100)
    draw(100, capture=True)
    assert draw.rooms == [None]
