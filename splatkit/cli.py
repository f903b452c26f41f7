"""The command line: verbs, how errors are reported, and the progress line. With cli_files.py, the only page that parses arguments or prints.

A verb imports what it needs when it runs: torch costs seconds, and `splatkit --help` should be instant.
"""
from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import __version__, cli_distill, cli_files, config
from .errors import BadFile, EndedElsewhere, SplatkitError
from .lift.command import lift
from .progress import Progress
from .training import lift_train_verb, write_rooms
from .verbs import layered, note, speaks


def main(argv: list[str] | None = None) -> int:
    """Runs `splatkit ARGV`. Exit codes: 0 done, 1 doctor found nothing to render with, 2 wrong input (one line on stderr), 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    verb, *rest = argv or ["--help"]
    # torch's threads would wait for their next work in a loop, on the cores that the rasterizer's threads need. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if verb in ("-h", "--help", "--version"):
        print(f"splatkit {__version__}" if verb == "--version" else _help())
        return 0
    try:
        if verb not in VERBS:
            raise ValueError(f"{verb!r} is not a verb; known: {', '.join(VERBS)}")
        run = VERBS[verb](rest) if verb in LAYERED else VERBS[verb]
        return tyro.cli(run, prog=f"splatkit {verb}", args=rest)
    except KeyboardInterrupt:
        print("\nsplatkit: interrupted", file=sys.stderr)
        return 130
    except EndedElsewhere:
        return 2
    except (SplatkitError, ValueError, TypeError, OSError) as error:
        if os.environ.get("SPLATKIT_DEBUG") == "1":
            raise
        print(f"splatkit: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _help() -> str:
    """All verbs, without the time it takes to describe their flags."""
    lines = [f"  {name:<12} {verb.__doc__.partition(chr(10))[0]}" for name, verb in VERBS.items()]
    return "\n".join(["usage: splatkit VERB [-h] ...", "", *lines, "", "splatkit VERB --help lists the flags of one."])


def reconstruct_verb(argv: list[str]) -> Callable[..., int]:
    """Fit a scene to photos or a film."""
    def by_device(chosen: argparse.Namespace) -> str:
        on_cpu = chosen.device == "cpu" or chosen.backend in ("cpu", "reference")
        return "gpu" if not on_cpu and (chosen.device == "cuda" or _looks_like_a_card()) else "cpu"

    unnamed = Path()
    default = layered("reconstruct", argv, config.Reconstruct(data=unnamed), by_device, ("device", "backend"))
    if default.data == unnamed:     # no layer says where the photos are, so the command line must; typed as Path, hence not MISSING at once
        object.__setattr__(default, "data", tyro.MISSING)

    def reconstruct(
        settings: Annotated[config.Reconstruct, tyro.conf.arg(name="")] = default,
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
        config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")] = None,
        view: tyro.conf.FlagCreatePairsOff[bool] = False,
        port: int = 0,
        host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = (),
    ) -> int:
        """Fit a scene to photos or a film.

        Args:
            preset: Start from configs/reconstruct/NAME.yaml: cpu or gpu (what runs when neither this nor --config is given, by the device), quick (a first look).
            view: Show the scene in a browser while it is fitted: at the address that is printed, until the run ends.
            port: Of that address; 0 is any free one.
            host: Further names of this machine in that address, for browsers elsewhere, as `splatkit view` has them.
            config: Lay the values of this file over the preset, or over the defaults where none is named; flags come last.
        """
        from .reconstruct import reconstruct

        progress, watching, done = Progress(settings.steps), None, False
        if view:
            from .view import Watching
            watching = Watching(progress.note, port, host)
        try:
            result = reconstruct(settings, progress, progress.note, **({"watcher": watching} if watching else {}))
            done = True
        finally:
            progress.close()
            if watching:
                watching.close(done)
        if speaks():
            print(result.short() if result else "no photo was held out; the scene is written")
            print(f"scene: {settings.output / 'scene.ply'}")
        return 0

    return reconstruct


def _looks_like_a_card() -> bool:
    """Whether a CUDA library was built here and a driver is loaded: asking torch takes two seconds, which --help should not."""
    return (config.PRESETS.parent / "_native" / "libsplatkit_cuda.so").exists() and (shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists())


def evaluate(
    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]],
    split: Literal["held", "train", "all"] = "held",
    lpips: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = (),
    pictures: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Compare a run's scene with photos: PSNR, SSIM and LPIPS per photo, into RUN/eval.

    Args:
        run: Run folder of `splatkit reconstruct`.
        split: The photos that were held out, those that the scene was trained on (into RUN/eval/train), or both (into RUN/eval/all).
        lpips: Weights of LPIPS with alex or vgg, .safetensors or .pth: all in one file, or torchvision's backbone and the heads beside it.
        pictures: Write the render of every photo, and one picture of photo, render and difference, as PNG.
    """
    from .evaluation import evaluate

    progress = Progress(0)

    def report(number: int, of: int, gaussians: int, **values: float) -> None:
        progress.steps = of
        progress(number, gaussians, **values)

    try:
        result = evaluate(run, split, lpips, pictures, report)
    finally:
        progress.close()
    print(result)
    return 0


def render(
    scene: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SCENE")]],
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None,
    path: Annotated[str | None, tyro.conf.arg(metavar="orbit|capture|FILE.json")] = None,
    frames: int | None = None,
    fps: float | None = None,
    width: int | None = None,
    height: int | None = None,
    outputs: tuple[Literal["color", "depth", "alpha", "normals"], ...] = ("color",),
    exact: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Film a scene along a camera path.

    Args:
        scene: A .ply, or a run folder of `splatkit reconstruct`.
        output: .mp4 (needs the extra `video`), .webp, or a folder of PNGs without suffix; default: beside the scene.
        path: An orbit, the way through the run's photos, or a path file; default: capture where the photos are found, else orbit.
        frames: Pictures in the film; default: 120, or those of the path file.
        fps: Pictures per second; default: 30, or that of the path file.
        width: Pixels; default: that of the photos (at most 1920), of the path file, or 1280.
        height: Pixels; default: follows from the width.
        outputs: What to draw; what is not color goes to files beside OUT, as in OUT.depth.mp4.
        exact: Write depth also as one float32 .npy per picture.
    """
    from . import film, paths
    from .raster import RasterSettings
    from .views import scene_of

    gaussians, header, settings = scene_of(scene)
    photos = None
    if settings:
        try:
            photos = paths.photo_cameras(settings)
        except BadFile as why:
            if path == "capture":
                raise
            print(f"the run's photos cannot be used: {why}", file=sys.stderr)
    views = paths.choose(path, gaussians, header.up, photos, frames, fps, width, height)
    output = output or (scene / "film" if settings else scene).with_suffix(film.default_suffix())
    output.parent.mkdir(parents=True, exist_ok=True)
    background = gaussians.means.new_tensor(settings.background) if settings else None
    progress = Progress(len(views.cameras))
    try:
        files = film.film_scene(output, gaussians, views.cameras, views.fps, outputs, exact, background=background,
                                settings=RasterSettings(**header.settings), report=progress)
    finally:
        progress.close()
    print("\n".join(f"film: {name}" for name in files))
    return 0


def view(
    scenes: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="SCENE_OR_RUN [...]")]],
    port: int = 0,
    host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = (),
) -> int:
    """Show scenes in a browser.

    Args:
        scenes: Scene files, or run folders of `splatkit reconstruct`, which come with their photos, cameras and metrics. What another process writes there while
            it is shown, as a run does with every checkpoint, is shown then.
        port: Of the address that is printed; 0 is any free one.
        host: Names under which browsers on other machines may reach this one. They get what is shown by plain HTTP: whoever can listen on the way sees it, and
            the token; a tunnel (ssh -L PORT:127.0.0.1:PORT) needs no --host and is safe.
    """
    if not scenes:
        raise ValueError("nothing to show: expected a scene file or a run folder")
    from .serve import Viewer
    from .view import Following

    followed = Following(scenes, note)
    viewer = Viewer(followed.shown, port, host, note).start()
    followed.start(viewer)
    try:
        print(f"view: {viewer.url}", flush=True)
        if host:
            note(f"any machine that reaches port {viewer.port} can connect, by plain HTTP; the address has the key: give it to nobody else")
        note("Ctrl-C ends it")
        while True:
            time.sleep(0.5)     # a signal that another thread took does not end a sleep
    except KeyboardInterrupt:
        return 0
    finally:
        followed.close()
        viewer.close(0)


def export(
    scene: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SCENE_OR_RUN")]],
    html: Annotated[Path, tyro.conf.arg(metavar="OUT.html")],
) -> int:
    """Write a scene as one HTML file that shows it without a server.

    Args:
        scene: A scene file, or a run folder of `splatkit reconstruct`.
        html: The file to write. It holds the scene and the names of its photos, not the photos, and connects to nothing.
    """
    from .view import export_html

    export_html(scene, html, note)
    print(f"page: {html} ({html.stat().st_size / 1e6:.1f} MB)")
    return 0


def demo(output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")] = Path("runs/demo")) -> int:
    """Photograph a procedural room, reconstruct it, say how well and where the picture is. Needs no download.

    Args:
        output: Folder for photos and scene.
    """
    from . import rooms
    from .reconstruct import reconstruct

    rooms.write_capture(output / "photos", width=320, height=240)
    settings = config.load_yaml(config.preset("reconstruct", "demo"), config.Reconstruct(data=output / "photos", output=output))
    progress = Progress(settings.steps)
    try:
        result = reconstruct(settings, progress)
    finally:
        progress.close()
    print(result)
    return 0


def doctor() -> int:
    """What runs on this machine, what does not, why, and what to do about it."""
    from . import doctor

    print("\n".join(doctor.report()))
    return 0 if doctor.can_render() else 1


VERBS = {"reconstruct": reconstruct_verb, "lift": lift, "eval": evaluate, "render": render, "view": view, "export": export, **cli_files.VERBS,
         "rooms": write_rooms, "lift-train": lift_train_verb, **cli_distill.VERBS, "doctor": doctor, "demo": demo}
LAYERED = ("reconstruct", "lift-train", *cli_distill.LAYERED)     # verbs that are made of the command line: their defaults are those of a preset and a file that it names


if __name__ == "__main__":
    sys.exit(main())
