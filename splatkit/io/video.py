"""Sharp pictures out of a film, by PyAV (the extra `video`)."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from ..errors import BadFile
from .photos import PIXELS_MAX

SIDE = 1280     # sharpness is judged on frames made smaller to this, for that of the sensor's noise would count too


def sharpest_frames(path: Path, wanted: int) -> Iterator[tuple[int, UInt8[Array, "H W 3"]]]:
    """(index, RGB) of about `wanted` frames, upright: the film is cut into so many equal stretches, and each gives its sharpest frame.

    Raises BadFile when PyAV is missing, or the file is no film or damaged.
    """
    try:
        import av
    except ImportError as e:
        raise BadFile(path, "", "is taken for a film, and reading one needs PyAV, the extra `video`: pip install 'splatkit[video]'") from e
    try:
        with av.open(str(path)) as film:        # counting packets is quick and, unlike the header's number of frames, always right
            if not film.streams.video:
                raise BadFile(path, "", "holds no video; expected a film or a folder of photos")
            count = max(1, sum(1 for packet in film.demux(film.streams.video[0]) if packet.size))
        with av.open(str(path)) as film:
            film.streams.video[0].thread_type = "AUTO"
            stretch, best, best_sharpness = 0, None, -1.0
            for index, frame in enumerate(film.decode(video=0)):
                if frame.width * frame.height > PIXELS_MAX:
                    raise BadFile(path, f"frame {index}", f"{frame.width}x{frame.height} pixels; at most {PIXELS_MAX // 10**6} megapixels are read")
                if index * wanted // count > stretch and best is not None:
                    yield best[0], _upright(best[1])
                    stretch, best, best_sharpness = index * wanted // count, None, -1.0
                factor = min(1, SIDE / max(frame.width, frame.height))
                grey = frame.reformat(max(1, round(frame.width * factor)), max(1, round(frame.height * factor)), "gray").to_ndarray()
                if (value := sharpness(grey)) > best_sharpness:
                    best, best_sharpness = (index, frame), value
            if best is None:
                raise BadFile(path, "", "holds no frame")
            yield best[0], _upright(best[1])
    except av.FFmpegError as e:
        raise BadFile(path, "", f"is no film that can be read, or is damaged: {e.strerror}; expected a film or a folder of photos") from e


def sharpness(grey: UInt8[Array, "H W"]) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000): motion and bad focus lower it."""
    x: Float[Array, "H W"] = grey.astype(np.float32)
    return float((4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]).var()) if min(x.shape) > 2 else 0.0


def _upright(frame) -> UInt8[Array, "H W 3"]:
    """The frame's pixels, turned as the film says that it is to be shown (in whole quarters, counterclockwise)."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
