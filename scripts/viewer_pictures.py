"""The pictures of the viewer in viewer/docs, of a run folder of `splatkit reconstruct`.

    splatkit reconstruct plush --output runs/plush && python3 scripts/viewer_pictures.py runs/plush

Needs node, viewer/node_modules and Chromium. The committed ones show the photos named plush in the README's table of data.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chromium                                          # noqa: E402: of the tests' folder

from splatkit.serve import Viewer                        # noqa: E402
from splatkit.view import opened                         # noqa: E402

OUT = ROOT / "viewer" / "docs"
WIDE, PHONE = (1200, 750), (375, 720)
LOOKS = ("colour", "depth", "normal", "heat")
COME_NEARER = "app.setPose({ ...app.pose }); app.controls.dolly(0.75); app.controls.turn(25, -30); await app.stage.settled();"


class Tab:
    """A page that has the whole scene, and what it looks like."""

    def __init__(self, browser: chromium.Browser, viewer: Viewer, size: tuple[int, int], **options):
        self.page = browser.open(viewer.url, width=size[0], height=size[1], **options)
        self.page.wait("window.splatkit?.scene && window.splatkit.complete()", seconds=120)
        self.page.run("await app.stage.settled()")

    def picture(self, folder: Path) -> Image.Image:
        self.page.run("await app.stage.settled(); await new Promise((done) => setTimeout(done, 300)); await app.stage.settled()")
        self.page.screenshot(path=str(folder / "shot.png"))
        with Image.open(folder / "shot.png") as image:
            return image.convert("RGB")


def scene(tab: Tab, folder: Path) -> Image.Image:
    """The scene among its photos' cameras, coloured by their loss."""
    tab.page.run(COME_NEARER)
    return tab.picture(folder)


def views(tab: Tab, folder: Path) -> Image.Image:
    """Colour, depth, normals, and the loss of the photos that show each Gaussian, in one picture."""
    tab.page.run(f"app.showFrusta = false; document.body.classList.add('closed'); {COME_NEARER}")
    shots = []
    for look in LOOKS:
        tab.page.run(f"app.heatName = 'loss'; await app.setLook('{look}')")
        shots.append(tab.picture(folder).crop((150, 90, 1050, 652)).resize((480, 300), Image.Resampling.LANCZOS))
    out = Image.new("RGB", (960, 600))
    for k, shot in enumerate(shots):
        out.paste(shot, (480 * (k % 2), 300 * (k // 2)))
    return out


def compare(tab: Tab, folder: Path) -> Image.Image:
    """A photo against the render from its place."""
    tab.page.click(selector="#cameras button:nth-child(2)")
    tab.page.click(selector="#compare-wipe")
    tab.page.wait("document.querySelector('#psnr').innerText.includes('dB')")
    return tab.picture(folder)


def phone(tab: Tab, folder: Path) -> Image.Image:
    tab.page.run(COME_NEARER)
    return tab.picture(folder)


PICTURES: dict[str, tuple[Callable[[Tab, Path], Image.Image], tuple[int, int], dict]] = {
    "scene": (scene, WIDE, {}), "compare": (compare, WIDE, {}), "views": (views, WIDE, {}), "phone": (phone, PHONE, {"touch": True, "scheme": "light"})}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of splatkit reconstruct")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if reason := chromium.missing():
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    browser = chromium.Browser()
    try:
        with tempfile.TemporaryDirectory() as folder, Viewer([opened(options.run, lambda line: print(line, file=sys.stderr))]) as viewer:
            for name, (draw, size, how) in PICTURES.items():
                tab = Tab(browser, viewer, size, **how)
                draw(tab, Path(folder)).save(options.out / f"{name}.webp", quality=82, method=6)
                tab.page.close()
                print(f"{options.out / name}.webp: {(options.out / f'{name}.webp').stat().st_size // 1000} kB")
    finally:
        browser.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
