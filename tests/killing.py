"""Runs of `reconstruct` and `lift-train` that die: at every file operation that writes, or by SIGKILL at random moments; each is resumed and compared.

A program of its own, because it forks: torch is imported once, and only one thread may work before. `python killing.py operations FOLDER
FROM_THE_FIRST`, `python killing.py kills FOLDER COUNT SEED` or `python killing.py lift FOLDER` prints one line of JSON.
"""
import builtins
import dataclasses
import io
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from splatkit import config
from splatkit.fit import Fit
from splatkit.io import checkpoint
from splatkit.reconstruct import reconstruct
from splatkit.rooms import write_capture

ROOT = Path(__file__).resolve().parent.parent
DIED = 77
WRITING = ("open", "fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "ftruncate", "pwrite")


def settings(folder: Path, run: str, steps: int, save_every: int, resume: bool) -> config.Reconstruct:
    quick = config.load_yaml(config.preset("reconstruct", "demo"), config.Reconstruct(data=folder / "photos", output=folder / run))
    mcmc = dataclasses.replace(quick.mcmc, start=1, every=2)        # so that random states, new rows and moments are at stake
    return dataclasses.replace(quick, steps=steps, save_every=save_every, max_gaussians=150, hold_every=4, resume=resume, mcmc=mcmc)


def forked(act) -> int:
    """The pid of a child that calls `act` and ends: 0 when it came to its end, 1 with a traceback after an exception."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        act()
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result_of(run: Path) -> dict:
    """What an uninterrupted run and a resumed one must share, bit for bit."""
    found = checkpoint.load(run / "checkpoint", sys.exit)
    tensors = {name: x.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, x in found.tensors.items()}
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"scene": (run / "scene.ply").read_bytes(), "step": found.step, **tensors, "values": found.values["photos"], "metrics": steps,
            "evaluation": (run / "eval" / "metrics.json").read_text()}


class Deadly:
    """Counts the operations of this process that write, and ends it in front of number `die_at`; of a write, half is done."""

    def __init__(self, die_at: int):
        self.count, self.die_at = 0, die_at
        for name in WRITING:
            setattr(os, name, self.before(getattr(os, name)))
        real = builtins.open
        builtins.open = io.open = lambda path, mode="r", *rest, **named: DeadlyFile(self, self.before(real)(path, mode, *rest, **named)) if set(mode) & set("wax+") else real(path, mode, *rest, **named)

    def step(self) -> None:
        if self.count == self.die_at:
            os._exit(DIED)
        self.count += 1

    def before(self, function):
        def call(*arguments, **named):
            self.step()
            return function(*arguments, **named)
        return call


class DeadlyFile:
    def __init__(self, deadly: Deadly, file):
        self._deadly, self._file = deadly, file

    def write(self, data):
        if self._deadly.count == self._deadly.die_at:
            self._file.write(data[:len(data) // 2])
            self._file.flush()
        self._deadly.step()
        return self._file.write(data)

    def close(self):
        self._deadly.step()
        self._file.close()

    def flush(self):
        self._deadly.step()
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def prepare(folder: Path, steps: int, save_every: int) -> dict:
    write_capture(folder / "photos", photos=4, width=40, height=30, points=100)
    assert ended(forked(lambda: reconstruct(settings(folder, "whole", steps, save_every, False)))) == 0
    return result_of(folder / "whole")


def at_every_operation(folder: Path, from_the_first: bool) -> dict:
    """Two saves in four steps, stopped at each operation in turn and resumed: from the first operation, or from the end of the first save."""
    return stopped_everywhere(folder, prepare(folder, 4, 2), lambda resume: reconstruct(settings(folder, "run", 4, 2, resume)), result_of, Fit, from_the_first)


def lift_at_every_operation(folder: Path) -> dict:
    """The same of `lift-train`, from the end of the first save."""
    import functools

    from lift_training import SMALLEST
    from lift_training import settings as small

    from splatkit import rooms
    from splatkit.lift.train import Training, lift_train

    rooms.sample = functools.cache(rooms.sample)        # once, before the forks

    def result(run: Path) -> dict:
        found = checkpoint.load(run / "checkpoint", sys.exit)
        lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {"weights file": (run / "weights.safetensors").read_bytes(), "step": found.step, "metrics": lines, **{name: x.numpy().tobytes() for name, x in found.tensors.items()}}
    run = lambda name, resume: lift_train(small(folder / name, network=SMALLEST, steps=2, save_every=1, resume=resume))
    run("whole", False)
    return stopped_everywhere(folder, result(folder / "whole"), lambda resume: run("run", resume), result, Training, False)


def stopped_everywhere(folder: Path, whole: dict, run, result, state: type, from_the_first: bool) -> dict:
    """`run(resume)`, which saves `state` twice into folder/run, stopped at each operation; what differs from `whole` once it is resumed."""
    differing, after_save = [], mmap.mmap(-1, 8)

    def count():
        deadly, real = Deadly(-1), state.save

        def save(self, *arguments):
            real(self, *arguments)
            if not any(after_save[:8]):
                after_save[:8] = deadly.count.to_bytes(8, "little")
        state.save = save
        run(False)
    assert ended(forked(count)) == 0
    first = operations = 0 if from_the_first else int.from_bytes(after_save[:8], "little")
    finished = False
    while not finished:
        shutil.rmtree(folder / "run", ignore_errors=True)

        def die():
            Deadly(operations)
            run(False)
        code = ended(forked(die))
        assert code in (0, DIED), f"operation {operations}: the run ended with {code}"
        finished = code == 0
        assert ended(forked(lambda: run(True))) == 0, f"operation {operations}: not resumed"
        after = result(folder / "run")
        differing += [f"operation {operations}: {name}" for name in whole if after.get(name) != whole[name]]
        operations += not finished
    return {"operations": operations - first, "differing": differing}


def tried(*arguments, timeout: float = 300) -> dict:
    """What this page, run as a program of its own, prints."""
    import subprocess
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def at_random_moments(folder: Path, kills: int, seed: int, steps: int = 60, save_every: int = 5) -> dict:
    """Runs killed by SIGKILL after a random time and resumed, killed again and so on until they end, until there were so many kills."""
    whole = prepare(folder, steps, save_every)
    start = time.monotonic()
    assert ended(forked(lambda: reconstruct(settings(folder, "timed", steps, save_every, False)))) == 0
    seconds, rng, reached = time.monotonic() - start, random.Random(seed), mmap.mmap(-1, 8)
    done = resumes = runs = 0
    lost_most, differing = 0, []

    def run(resume: bool):
        def act():
            real = Fit.step_on

            def step_on(self, *arguments, **named):
                out = real(self, *arguments, **named)
                reached[:8] = (self.step + 1).to_bytes(8, "little")
                return out
            Fit.step_on = step_on
            reconstruct(settings(folder, "run", steps, save_every, resume))
        return forked(act)

    while done < kills:
        shutil.rmtree(folder / "run", ignore_errors=True)
        runs, resume = runs + 1, False
        while True:
            reached[:8] = bytes(8)
            pid, resumes = run(resume), resumes + resume
            time.sleep(rng.uniform(0, seconds) if done < kills else 0)
            if done < kills and os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
                done += code == -signal.SIGKILL
                found = checkpoint.load(folder / "run" / "checkpoint", sys.exit)
                at = int.from_bytes(reached[:8], "little")
                lost_most = max(lost_most, at - (found.step if found else 0)) if at else lost_most
                resume = True
                if code != 0:
                    continue
            elif done >= kills:
                assert ended(pid) == 0
            break
        after = result_of(folder / "run")
        differing += [f"run {runs}: {name}" for name in whole if after.get(name) != whole[name]]
    return {"kills": done, "resumes": resumes, "runs": runs, "differing": differing, "steps lost at most": lost_most, "save_every": save_every}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, *rest = sys.argv[1:]
    what = {"operations": lambda: at_every_operation(Path(where), rest == ["1"]), "lift": lambda: lift_at_every_operation(Path(where))}.get(
        what, lambda: at_random_moments(Path(where), *map(int, rest)))
    print(json.dumps(what()))
