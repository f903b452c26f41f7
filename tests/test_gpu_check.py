"""scripts/gpu_check.py runs whole on a machine without a card, small, and says no without one."""
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"ceilings", "parity", "orders", "traps", "determinism", "sanitizers", "speed", "features", "kernels", "memory"}


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "scripts/gpu_check.py", *arguments], capture_output=True, text=True, timeout=240, check=False)


def test_every_part_runs_dry_and_what_it_checks_holds(tmp_path, cpu_library):
    done = run("--dry", "--out", tmp_path / "dry.json", "--data", tmp_path / "absent")
    assert done.returncode == 0, done.stderr[-3000:]
    result = {name: part["result"] for name, part in json.loads((tmp_path / "dry.json").read_text()).items()}
    assert result.keys() == PARTS
    assert all(error < 1e-3 for case in result["parity"].values() for error in case.values()) and result["orders"]["orders equal"]
    assert all(result["traps"].values()) and all(case["bit-equal"] for case in result["determinism"].values())
    assert all(row["ours"]["ms"] > 0 for size in result["speed"].values() for name, row in size.items() if name != "step MB")


def test_without_a_card_it_says_so_and_writes_nothing(tmp_path):
    if torch.cuda.is_available():
        return
    done = run("parity", "--out", tmp_path / "none.json")
    assert done.returncode != 0 and "CUDA" in done.stderr and not (tmp_path / "none.json").exists()
