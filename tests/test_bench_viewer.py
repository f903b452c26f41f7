"""The benchmark of the viewer runs where there is a browser."""
import json
import subprocess
import sys
from pathlib import Path

import chromium
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_viewer.py"


def test_the_benchmark_prints_and_keeps_its_rows_without_peers(tmp_path):
    if reason := chromium.missing():
        pytest.skip(reason)
    out = tmp_path / "viewer.json"
    command = [sys.executable, SCRIPT, "--quick", "--peers", "none", "--only", "million", "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads(out.read_text())["measures"]
    rows = kept["million"]["rows"]
    assert [row["met"] for row in rows] == [None]     # without a peer there is no ratio to judge
    assert [line for line in done.stdout.splitlines() if any(line.startswith(f"| {row['what']} |") for row in rows)] == done.stdout.splitlines()[2:]
    assert kept["million"]["numbers"]["page"]["cpu_s"] > 0
