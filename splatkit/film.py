"""Films: frames to .mp4, animated .webp or a folder of PNGs, whole or not at all; pictures of depth and normals; a scene along a path."""
from __future__ import annotations

import importlib.util
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray as Array
from torch import Tensor
from torch.nn.functional import normalize

from .camera import Cameras
from .io.atomic import replacing
from .raster import RasterSettings, render
from .scene import Scene, rotation_matrices

OUTPUTS = ("color", "depth", "alpha", "normals")
Add = Callable[[Array], None]

# Turbo (Mikhailov 2019) as a polynomial of degree 5 in x per channel, constant first (Du, "Turbo, an improved rainbow colormap").
TURBO = ((0.13572138, 4.61539260, -42.66032258, 132.13108234, -152.94239396, 59.28637943),
         (0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604),
         (0.10667330, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973))


# ---- files


def write_film(path: Path, frames: Iterable[UInt8[Array, "H W 3"]], fps: float = 30.0) -> None:
    """Writes the frames, RGB as encoded (sRGB), to `path`; see filming()."""
    with filming(path, fps) as add:
        for frame in frames:
            add(frame)


@contextmanager
def filming(path: Path, fps: float = 30.0) -> Iterator[Callable[[UInt8[Array, "H W 3"]], None]]:
    """`add(frame)` for the frames of one film: after the block it has taken the place of `path`; after any exception `path` is as it was.

    `.mp4` is H.264 with 4:2:0 colour by PyAV, which needs even sides: an odd one repeats its last row or column. `.webp` is animated,
    by Pillow, and holds all frames in memory until the end. No suffix is a folder of 00000.png, 00001.png, ... ; one that is there
    already is replaced when it holds nothing but such frames.

    Raises ValueError for another suffix, no frame or frames of different sizes, and when .mp4 is asked for without PyAV.
    """
    if not 0 < fps <= 1000:
        raise ValueError(f"{fps:g} frames per second; expected above 0, at most 1000")
    writers = {".mp4": _mp4, ".webp": _webp, "": _png_folder}
    if (suffix := path.suffix.lower()) not in writers:
        raise ValueError(f"{path}: a film ends in .mp4 or .webp, or is a folder without a suffix; not {path.suffix}")
    shape = None
    with writers[suffix](path, fps) as write:

        def add(frame: UInt8[Array, "H W 3"]) -> None:
            nonlocal shape
            shape = shape or frame.shape
            if frame.shape != shape:
                raise ValueError(f"{path}: a frame of {frame.shape[1]}x{frame.shape[0]} follows frames of {shape[1]}x{shape[0]}")
            write(np.ascontiguousarray(frame))

        yield add
        if shape is None:
            raise ValueError(f"{path}: a film without frames")


def default_suffix() -> str:
    """.mp4 where PyAV is installed, else .webp."""
    return ".mp4" if importlib.util.find_spec("av") else ".webp"


def beside(path: Path, what: str) -> Path:
    """Where another output of the film goes: out.depth.mp4 beside out.mp4, out_depth beside the folder out."""
    return path.with_name(f"{path.stem}.{what}{path.suffix}" if path.suffix else f"{path.name}_{what}")


@contextmanager
def _mp4(path: Path, fps: float) -> Iterator[Add]:
    try:
        import av
    except ImportError as why:
        raise ValueError(f"{path}: .mp4 needs PyAV, the extra `video`: pip install 'splatkit[video]'; .webp works without it") from why
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    stream = None

    def write(film, frame: Array) -> None:
        nonlocal stream
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        if stream is None:
            stream = film.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
            stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "yuv420p"
            # Players guess the colour matrix of an untagged film from its height.
            context = stream.codec_context
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        film.mux(stream.encode(picture))

    try:
        with replacing(path) as file, av.open(file, "w", format="mp4") as film:
            yield lambda frame: write(film, frame)
            if stream is not None:
                film.mux(stream.encode())
    except av.FFmpegError as why:       # PyAV wraps what the file said, a full disk for one, into an error with a number of its own
        said = why.__cause__ or why.__context__
        raise OSError(f"{path}: the film cannot be written: {getattr(said, 'strerror', None) or why}") from why


@contextmanager
def _webp(path: Path, fps: float) -> Iterator[Add]:
    from PIL import Image

    frames: list[Image.Image] = []
    with replacing(path) as file:
        yield lambda frame: frames.append(Image.fromarray(frame))
        if frames:
            ends = [round(1000 * i / fps) for i in range(len(frames) + 1)]      # whole milliseconds, without drift
            durations = [max(1, b - a) for a, b in zip(ends, ends[1:])]
            frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=90)


@contextmanager
def _png_folder(path: Path, fps: float) -> Iterator[Add]:
    from PIL import Image

    with _numbered(path, ".png", lambda file, frame: Image.fromarray(frame).save(file)) as add:
        yield add


@contextmanager
def _numbered(path: Path, suffix: str, save: Callable[[Path, Array], None]) -> Iterator[Add]:
    with _replacing_folder(path) as folder:
        count = itertools.count()
        yield lambda frame: save(folder / f"{next(count):05d}{suffix}", frame)


@contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `path`: of nothing, of an empty folder, or of one that holds only frames."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"{path} is a file; a film without a suffix is a folder")
    if target.is_dir() and (other := [n for n in os.listdir(target) if not re.fullmatch(r"\d{5,}\.(png|npy)", n)]):
        raise ValueError(f"{path} holds more than frames ({min(other)}); choose a folder that may be replaced")
    hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    hidden.mkdir()
    try:
        yield hidden
        if target.is_dir():
            old = target.with_name(f"{hidden.name}.old")
            os.replace(target, old)
            os.replace(hidden, target)
            shutil.rmtree(old)
        else:
            os.replace(hidden, target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


# ---- pictures


def color_picture(color: Float[Tensor, "H W 3"]) -> UInt8[Array, "H W 3"]:
    """0 to 1 as 8 bits; what lies outside is cut off."""
    return (color.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def alpha_picture(alpha: Float[Tensor, "H W"]) -> UInt8[Array, "H W 3"]:
    """Opaque is white."""
    return color_picture(alpha[..., None].expand(-1, -1, 3))


def depth_picture(depth: Float[Tensor, "H W"], alpha: Float[Tensor, "H W"], near: float | None = None,
                  far: float | None = None) -> UInt8[Array, "H W 3"]:
    """Depth in colours: red at `near`, through green, to dark blue at `far`, even steps in 1 / depth; fades to black with alpha.

    Without `near` and `far` they are depth_range() of this picture; the frames of a film need the same for all.
    """
    if near is None or far is None:
        found = depth_range([(depth, alpha)])
        near, far = found[0] if near is None else near, found[1] if far is None else far
    closeness = (1 / depth.clamp(min=1e-9) - 1 / far) / max(1 / near - 1 / far, 1e-12)
    return color_picture(turbo(closeness) * alpha[..., None])


def depth_range(views: Iterable[tuple[Float[Tensor, "H W"], Float[Tensor, "H W"]]]) -> tuple[float, float]:
    """Depth below which 2% and 98% of the pixels lie, over all (depth, alpha) whose alpha is above 1/2; (1, 2) where there are none."""
    depths = [depth[(alpha > 0.5) & (depth > 0)].detach().cpu().numpy() for depth, alpha in views]
    solid = np.concatenate(depths) if depths else np.zeros(0)
    if len(solid) == 0:
        return 1.0, 2.0
    near, far = np.quantile(solid, [0.02, 0.98])
    return float(near), float(far)


def turbo(x: Float[Tensor, "H W"]) -> Float[Tensor, "H W 3"]:
    """The colour map Turbo of values from 0 (dark blue) to 1 (dark red), clamped there."""
    x = x.clamp(0, 1)
    channels = []
    for coefficients in TURBO:
        value = torch.zeros_like(x)
        for c in reversed(coefficients):
            value = value * x + c
        channels.append(value)
    return torch.stack(channels, dim=-1).clamp(0, 1)


def normal_picture(normals: Float[Tensor, "H W 3"], alpha: Float[Tensor, "H W"] | None = None) -> UInt8[Array, "H W 3"]:
    """Normals in camera axes (OpenCV) in the usual colours: right is red, up is green, towards the camera is blue, each from -1 to 1.

    Normals of any length count by their direction; a zero one is black, and all fade to black with alpha.
    """
    colors = normalize(normals, dim=-1) * normals.new_tensor([0.5, -0.5, -0.5]) + 0.5
    shown = (normals != 0).any(-1).to(normals) if alpha is None else alpha * (normals != 0).any(-1)
    return color_picture(colors * shown[..., None])


def gaussian_normals(scene: Scene, camera: Cameras) -> Float[Tensor, "N 3"]:
    """Per Gaussian its shortest axis as a unit vector in the axes of one camera, on the side that faces the camera."""
    axes = rotation_matrices(scene.quats)
    shortest = axes[torch.arange(len(scene)), :, scene.log_scales.argmin(dim=1)]
    rotation, t = camera.world_to_cam[0, :3, :3], camera.world_to_cam[0, :3, 3]
    normals, place = shortest @ rotation.T, scene.means @ rotation.T + t
    return torch.where((normals * place).sum(1, keepdim=True) > 0, -normals, normals)


# ---- scenes


@torch.no_grad()
def film_scene(path: Path, scene: Scene, cameras: Cameras, fps: float = 30.0, outputs: tuple[str, ...] = ("color",), exact: bool = False,
               background: Float[Tensor, " 3"] | None = None, settings: RasterSettings = RasterSettings(), backend: str = "auto",
               report: Callable[[int, int], None] = lambda frame, gaussians: None) -> list[Path]:
    """Films the scene, one camera per frame, and returns the files: `path` for color, beside() it for depth, alpha and normals.

    `exact` adds a folder of one float32 .npy [H, W] per frame: the expected depth (camera z), 0 where nothing is drawn. The files come
    to their places at the end, none of them when drawing fails. `report(frame, gaussians)` is called after every frame, from 1.

    Raises ValueError for an unknown output and what filming() raises.
    """
    outputs = tuple(dict.fromkeys(outputs))
    if not outputs or not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"outputs {' '.join(outputs) or 'none'}; expected some of {', '.join(OUTPUTS)}")
    if exact and "depth" not in outputs:
        raise ValueError("exact is about depth; ask for the output depth too")
    scene = scene.detach()
    cameras = cameras.to(scene.device, scene.dtype)
    draw = {"background": background, "settings": settings, "backend": backend}
    wanted = [name for name, output in (("color", "color"), ("expected_depth", "depth"), ("features", "normals")) if output in outputs]
    with ExitStack() as stack:
        files = {name: path if name == "color" else beside(path, name) for name in outputs}
        films = {name: stack.enter_context(filming(file, fps)) for name, file in files.items()}
        if exact:
            files["exact"] = beside(path.with_suffix(""), "depth_npy")
            save_depth = stack.enter_context(_numbered(files["exact"], ".npy", np.save))
        near, far = _depth_range_along(scene, cameras, draw) if "depth" in outputs else (1.0, 2.0)
        for i in range(len(cameras)):
            camera = cameras[i]
            drawn = scene.replace(features=gaussian_normals(scene, camera)) if "normals" in outputs else scene
            out = render(drawn, camera, outputs=tuple(wanted), **draw)
            alpha = out.alpha[0]
            if "color" in films:
                films["color"](color_picture(out.color[0]))
            if "alpha" in films:
                films["alpha"](alpha_picture(alpha))
            if "depth" in films:
                films["depth"](depth_picture(out.expected_depth[0], alpha, near, far))
            if exact:
                save_depth(out.expected_depth[0].float().cpu().numpy())
            if "normals" in films:
                films["normals"](normal_picture(out.features[0] / alpha[..., None].clamp(min=1e-6), alpha))
            report(i + 1, len(scene))
    return list(files.values())


def _depth_range_along(scene: Scene, cameras: Cameras, draw: dict) -> tuple[float, float]:
    """depth_range() of a film, from 8 of its frames at a quarter of the size."""
    small = cameras.resized(max(1, cameras.width // 4), max(1, cameras.height // 4))
    views = []
    for i in sorted({round(k * (len(small) - 1) / 7) for k in range(8)}):
        out = render(scene, small[i], outputs=("expected_depth",), **draw)
        views.append((out.expected_depth[0], out.alpha[0]))
    return depth_range(views)
