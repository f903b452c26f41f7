"""The benchmark of the viewer runs where there is a browser."""
import json
import subprocess
import sys
from pathlib import Path

import chromium
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_viewer.py"


def run(out: Path, *measures: str) -> tuple[str, dict]:
    """What the benchmark prints, and the measures that it keeps."""
    if reason := chromium.missing():
        pytest.skip(reason)
    command = [sys.executable, SCRIPT, "--quick", "--peers", "none", *(word for name in measures for word in ("--only", name)), "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(out.read_text())["measures"]


def test_the_canvases_that_it_measures_show_the_scene(tmp_path):
    _, kept = run(tmp_path / "viewer.json", "parity", "frames")
    assert [row["met"] for row in kept["parity"]["rows"]] == [True, True]
    assert all(kept["frames"]["numbers"][name]["psnr"] > 45 and kept["frames"]["numbers"][name]["orbit"][0] > 0 for name in ("webgl", "wasm"))


def test_the_benchmark_prints_and_keeps_its_rows_without_peers(tmp_path):
    printed, kept = run(tmp_path / "viewer.json", "million")
    rows = kept["million"]["rows"]
    assert [row["met"] for row in rows] == [None]     # without a peer there is no ratio to judge
    assert [line for line in printed.splitlines() if any(line.startswith(f"| {row['what']} |") for row in rows)] == printed.splitlines()[2:]
    assert kept["million"]["numbers"]["page"][0]["cpu_s"] > 0
