"""scripts/gpu_check.py and gpu_train.py run whole on a machine without a card, small, and say no without one."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splatkit.rooms import write_capture

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"ceilings", "parity", "orders", "traps", "determinism", "sanitizers", "speed", "features", "kernels", "graphs", "memory"}


def run(*arguments, script="gpu_check.py") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "scripts" / script, *arguments], capture_output=True, text=True, timeout=240, check=False)


def test_every_part_runs_dry_and_what_it_checks_holds(tmp_path, cpu_library):
    done = run("--dry", "--out", tmp_path / "dry.json", "--data", tmp_path / "absent")
    assert done.returncode == 0, done.stderr[-3000:]
    result = {name: part["result"] for name, part in json.loads((tmp_path / "dry.json").read_text()).items()}
    assert result.keys() == PARTS
    assert all(error < 1e-3 for case in result["parity"].values() for error in case.values()) and result["orders"]["orders equal"]
    assert all(result["traps"].values()) and all(case["bit-equal"] for case in result["determinism"].values())
    assert all(row["ours"]["ms"] > 0 for size in result["speed"].values() for name, row in size.items() if name != "step MB")


def trained_dry(folder, *arguments) -> dict:
    """What gpu_train.py writes: its runs by case, with the peer's where gsplat is installed."""
    done = run("--dry", "--seeds", "3", "--out", folder / "dry.json", "--data", folder, *arguments, script="gpu_train.py")
    assert done.returncode == 0, done.stderr[-3000:]
    part = json.loads((folder / "dry.json").read_text())["training"]
    assert part["card"] and part["commit"] and part["torch"]
    return {name: seeds["3"] for name, seeds in part["result"]["cases"].items()}


def test_both_trainers_begin_with_the_same_picture_and_learn_alike(tmp_path, cpu_library):
    write_capture(tmp_path / "plush", photos=10, width=72, height=54, points=600)
    cases = trained_dry(tmp_path, "--cases", "plush", "teacher")
    assert cases.keys() == {"plush", "teacher"}
    for runs in cases.values():
        ours, theirs = runs["ours"], runs.get("gsplat")
        assert ours["psnr"] > ours["curve"][0][2] + 0.1
        if theirs:
            assert abs(theirs["curve"][0][2] - ours["curve"][0][2]) < 0.05 and abs(theirs["psnr"] - ours["psnr"]) < 0.1
            assert runs["compared"]["target PSNR"] == min(ours["psnr"], theirs["psnr"]) and runs["compared"]["ratio"] > 0


def test_both_trainers_clone_and_split(tmp_path, cpu_library):
    runs = trained_dry(tmp_path, "--cases", "teacher", "--preset", "adc")["teacher"]
    assert runs["ours"]["psnr"] > runs["ours"]["curve"][0][2] + 0.1
    assert all(run["gaussians"] > 100 for name, run in runs.items() if name != "compared")


def test_time_to_a_quality_is_read_off_the_best_so_far(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from gpu_train import seconds_to
    curve = [(0.0, 0, 10.0), (1.0, 5, 20.0), (2.0, 10, 15.0), (4.0, 15, 30.0)]
    assert seconds_to(curve, 15) == 0.5 and seconds_to(curve, 25) == 3.0 and seconds_to(curve, 5) == 0 and seconds_to(curve, 31) is None
    assert seconds_to([(0.0, 0, float("nan")), (1.0, 5, 20.0)], 18) == 1.0


@pytest.mark.parametrize("script", ["gpu_check.py", "gpu_train.py"])
def test_without_a_card_it_says_so_and_writes_nothing(tmp_path, script):
    if torch.cuda.is_available():
        return
    done = run("--out", tmp_path / "none.json", script=script)
    assert done.returncode != 0 and "CUDA" in done.stderr and not (tmp_path / "none.json").exists()
