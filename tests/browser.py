"""The viewer's TypeScript in node: what its tests share."""
import json
import shutil
import subprocess
from pathlib import Path

import pytest

VIEWER = Path(__file__).resolve().parent.parent / "viewer"


def bundled(script: str, folder: Path) -> Path:
    """viewer/tests/`script`.ts and what it imports as one module for node; the test is skipped with the reason where that cannot be made."""
    node, esbuild = shutil.which("node"), VIEWER / "node_modules" / ".bin" / "esbuild"
    if node is None:
        pytest.skip("node is not on PATH")
    if not esbuild.exists():
        pytest.skip("viewer/node_modules is absent; `npm ci` in viewer/ makes it")
    out = folder / f"{script}.mjs"
    command = [esbuild, VIEWER / "tests" / f"{script}.ts", "--bundle", "--platform=node", "--format=esm", "--log-level=error", f"--outfile={out}"]
    subprocess.run(list(map(str, command)), check=True, timeout=60)
    return out


def in_node(script: Path, *arguments):
    """The JSON that the module prints."""
    done = subprocess.run(["node", str(script), *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
