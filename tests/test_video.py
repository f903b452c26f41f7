"""Frames of a film: which are picked, which way up they are, and what is no film."""
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from splatkit.errors import BadFile
from splatkit.film import write_film
from splatkit.io.video import sharpest_frames, sharpness

av = pytest.importorskip("av", reason="the extra video is absent")


def texture(width: int, height: int) -> Image.Image:
    rough = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def pan(path: Path, blurs: list[float], size=(96, 64)) -> Path:
    """A camera that pans over a texture, with every frame as blurred as the list says."""
    whole = texture(size[0] + 2 * len(blurs), size[1])
    frames = (whole.crop((2 * i, 0, 2 * i + size[0], size[1])).filter(ImageFilter.GaussianBlur(blur)) for i, blur in enumerate(blurs))
    write_film(path, (np.asarray(frame) for frame in frames))
    return path


def test_blurred_frames_are_not_picked(tmp_path):
    blurs = [2, 0, 3, 1, 2, 3, 3, 0, 1, 1.5, 2, 0, 0, 2, 2, 3]
    film = pan(tmp_path / "film.mp4", blurs)
    assert [i for i, _ in sharpest_frames(film, 4)] == [1, 7, 11, 12]
    assert [blurs[i] for i, _ in sharpest_frames(film, 2)] == [0, 0]


def test_a_frame_comes_out_as_it_was_filmed_and_the_same_every_time(tmp_path):
    film = pan(tmp_path / "film.mp4", [0.0] * 9)
    first, again = (list(sharpest_frames(film, 3)) for _ in range(2))
    assert [i for i, _ in first] == [i for i, _ in again] and all((a == b).all() for (_, a), (_, b) in zip(first, again))
    whole = np.asarray(texture(96 + 18, 64), np.float32)
    for i, frame in first:
        assert frame.shape == (64, 96, 3) and frame.dtype == np.uint8
        differences = [np.abs(frame - whole[:, 2 * j:2 * j + 96]).mean() for j in range(9)]
        assert np.argmin(differences) == i and differences[i] < 16       # of 255, for colour is 4:2:0


def test_a_film_with_fewer_frames_than_wanted_gives_all_of_them(tmp_path):
    assert [i for i, _ in sharpest_frames(pan(tmp_path / "film.mp4", [0.0] * 5), 60)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wanted", [3, 7, 10, 24])
def test_about_as_many_frames_come_out_as_are_wanted_from_all_over_the_film(tmp_path, wanted):
    picked = [i for i, _ in sharpest_frames(pan(tmp_path / "film.mp4", [0.0] * 25, (32, 32)), wanted)]
    assert len(picked) == wanted and [i * wanted // 25 for i in picked] == list(range(wanted))


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_film_taken_on_its_side_is_turned_upright(tmp_path, degrees):
    upright = np.zeros((64, 32, 3), np.uint8)
    upright[:16] = (255, 255, 255)      # light above
    stored = np.ascontiguousarray(np.rot90(upright, -degrees // 90))
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=Fraction(30), options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        film.mux(stream.encode())
    _, frame = next(iter(sharpest_frames(tmp_path / "film.mp4", 1)))
    assert frame.shape == upright.shape and np.abs(frame.astype(int) - upright).mean() < 8


def test_sharpness_is_the_variance_of_the_laplacian():
    x = np.random.default_rng(0).integers(0, 256, (7, 9), dtype=np.uint8)
    by_hand = [4 * int(x[r, c]) - int(x[r - 1, c]) - int(x[r + 1, c]) - int(x[r, c - 1]) - int(x[r, c + 1]) for r in range(1, 6) for c in range(1, 8)]
    assert sharpness(x) == pytest.approx(np.var(by_hand), rel=1e-5)
    assert sharpness(np.zeros((2, 9), np.uint8)) == 0


@pytest.mark.parametrize(("content", "said"), [(b"", "no film that can be read"), (b"not a film at all", "no film that can be read"), (None, "no film that can be read")])
def test_what_is_no_film_is_one_line(tmp_path, content, said):
    path = tmp_path / "film.mp4"
    whole = pan(path, [0.0] * 5).read_bytes()
    path.write_bytes(whole[:len(whole) // 2] if content is None else content)       # half of an mp4 lacks the table at its end
    with pytest.raises(BadFile, match=said) as error:
        list(sharpest_frames(path, 3))
    assert error.value.path == path and "\n" not in str(error.value)


def test_sound_without_pictures_is_no_film(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as film:
        stream = film.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        film.mux(stream.encode(frame))
    with pytest.raises(BadFile, match="holds no video"):
        list(sharpest_frames(tmp_path / "sound.wav", 3))


def test_without_pyav_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(BadFile, match=r"pip install 'splatkit\[video\]'"):
        list(sharpest_frames(tmp_path / "film.mp4", 3))
