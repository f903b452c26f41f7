"""A real browser for tests: headless Chromium with software WebGL2, driven through viewer/tests/browser.mjs."""
from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

VIEWER = Path(__file__).resolve().parent.parent / "viewer"


def missing() -> str | None:
    """Why there is no browser here; None where there is one."""
    if shutil.which("node") is None:
        return "node is not installed"
    if chromium() is None:
        return "Chromium is not installed (apt-get install chromium)"
    if not (VIEWER / "node_modules" / "playwright-core").is_dir():
        return "viewer/node_modules is absent (npm ci in viewer/)"
    return None


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class BrowserError(Exception):
    """What the page or the browser said, in its words."""


class Browser:
    """One browser process; every test opens pages of its own. With `idle` it takes what others leave of the machine."""

    def __init__(self, idle: bool = False):
        # Not by its nice value, which Chromium raises for some of its threads where it may.
        policy = (lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))) if idle else None
        self.node = subprocess.Popen(["node", str(VIEWER / "tests" / "browser.mjs"), chromium()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=policy)

    def __call__(self, command: str, **arguments):
        self.node.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.node.stdin.flush()
        line = self.node.stdout.readline()
        if not line:
            raise BrowserError("the browser's driver ended")
        reply = json.loads(line)
        if "error" in reply:
            raise BrowserError(reply["error"])
        return reply["value"]

    def open(self, url: str, **options) -> Page:
        return Page(self, self("open", url=url, **options))

    def quit(self) -> None:
        self.node.stdin.write('{"command": "quit"}\n')
        self.node.stdin.close()
        self.node.wait(30)
        self.node.stdout.close()


class Page:
    """A tab. Commands are those of browser.mjs."""

    def __init__(self, browser: Browser, id: int):
        self.browser, self.id = browser, id

    def __getattr__(self, command: str):
        return lambda **arguments: self.browser(command, page=self.id, **arguments)

    def run(self, code: str, argument=None):
        """The value that the body of an async function returns; `app` is the viewer, `argument` what was given."""
        return self.browser("run", page=self.id, code=f"const app = window.splatkit; {code}", argument=argument)

    def wait(self, code: str, seconds: float = 60) -> None:
        """Until the expression is true."""
        self.browser("wait", page=self.id, code=code, seconds=seconds)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(argument)?.innerText ?? ''", selector)

    def pixels(self, code: str = "return app.stage.pixels()") -> np.ndarray:
        """[H, W, 3] of an ImageData, 0 to 1."""
        packed = self.run("const image = await (async () => { " + code + """ })();
            let text = ''; for (let i = 0; i < image.data.length; i += 8192) text += String.fromCharCode(...image.data.subarray(i, i + 8192));
            return [image.width, image.height, btoa(text)];""")
        return np.frombuffer(base64.b64decode(packed[2]), np.uint8).reshape(packed[1], packed[0], 4)[..., :3] / 255.0
