"""The page that shows scenes: its bytes with the policy that fits them, a scene as one HTML file, and a scene in a notebook."""
from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from .errors import BadFile

PAGE = Path(__file__).parent / "viewer" / "index.html"
SCRIPT = re.compile(r"<script\b([^>]*)>(.*?)</script\s*>", re.DOTALL | re.IGNORECASE)
HEAD = re.compile(r"<head\b[^>]*>", re.IGNORECASE)
MISSING = ("<!doctype html><meta charset=utf-8><title>splatkit</title><p>This installation has no viewer page (splatkit/viewer/index.html); "
           "install splatkit anew, or build viewer/ as its README says.</p>")


def page() -> str:
    """The built page, or one line that says that it is missing."""
    return read() if PAGE.is_file() else MISSING


def read() -> str:
    """The built page. Raises BadFile where it is missing."""
    try:
        return PAGE.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as why:
        raise BadFile(PAGE, "", "the viewer's page is missing or damaged; install splatkit anew") from why


def policy(text: str, connect: str) -> str:
    """The Content-Security-Policy of a page: its own scripts by their hashes, WebAssembly, workers and pictures that it makes itself, nothing else.

    `connect` is where it may fetch from.
    """
    scripts = [body.replace("\r\n", "\n").replace("\r", "\n") for attributes, body in SCRIPT.findall(text) if "application/splatkit" not in attributes]
    hashes = " ".join(dict.fromkeys(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in scripts))
    return (f"default-src 'none'; script-src {hashes} 'wasm-unsafe-eval'; style-src 'unsafe-inline'; img-src 'self' blob: data:; media-src blob:; "
            f"font-src data:; worker-src blob: data:; connect-src {connect}; base-uri 'none'; form-action 'none'")


def with_scene(container: bytes) -> str:
    """The page with a scene inside, to open from a disk: it can connect to nothing. Raises BadFile where the page is missing.

    The scene is base64, so that no name in it can end the element that holds it.
    """
    text = read()
    head = HEAD.search(text)
    if head is None:
        raise BadFile(PAGE, "", "the viewer's page has no head; install splatkit anew")
    data = f'<script type="application/splatkit" id="scene">{base64.b64encode(container).decode()}</script>'
    rule = '<meta http-equiv="Content-Security-Policy" content="{}">'.format(html.escape(policy(text, "'none'")))
    return f"{text[:head.end()]}{rule}{data}{text[head.end():]}"


def in_notebook(text: str, height: int) -> str:
    """A page as a notebook's cell shows it: in a frame that can reach neither the notebook nor the network."""
    return f'<iframe sandbox="allow-scripts allow-downloads" srcdoc="{html.escape(text)}" style="width:100%;height:{height}px;border:0"></iframe>'
