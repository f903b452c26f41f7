"""One scene in several processes: it is the scene of one process, any number of them goes on with it, and whatever ends one ends all in a line."""
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sharded
import torch

from splatkit import io
from splatkit.errors import BadConfig
from splatkit.growth import KINDS
from splatkit.io import checkpoint
from splatkit.evaluation import evaluate
from splatkit.rooms import write_capture
from splatkit.shard import ALONE, Shard

HERE = Path(__file__).parent
EXACT = ("color", "alpha", "expected_depth", "radii", "count", "max_radius_px")


@contextmanager
def started(target, arguments: list[tuple]) -> Iterator[list]:
    """Processes that make one run, with what torchrun sets as their first argument, killed at the end. They are forked from one that has imported all they need."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharded"])
    running = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))      # of the server, when it starts
            for rank, some in enumerate(arguments):
                environment = {"RANK": str(rank), "WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                running.append(context.Process(target=target, args=(environment, *some)))
                running[-1].start()
        yield running
    finally:
        for process in running:
            process.kill()


def together(folder: Path, commands: list[list], jobs: tuple[str, ...] = (), seconds=300) -> list[tuple[int, str]]:
    """Exit codes and words of processes that make one run."""
    said = [folder / f"said.{rank}" for rank in range(len(commands))]
    with started(sharded.process, [(text, jobs, folder, list(map(str, command))) for text, command in zip(said, commands)]) as running:
        for process in running:
            process.join(seconds)
        return [(process.exitcode, text.read_text()) for process, text in zip(running, said)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cpu_library) -> Path:
    """What one process and two processes, and three for the steps, made of the same."""
    folder = tmp_path_factory.mktemp("sharded")
    write_capture(folder / "photos", photos=10, width=72, height=54, points=600)
    sharded.fits(ALONE, folder)
    for world, jobs in ((2, ("steps", "fits", "run", "disagree")), (3, ("steps",))):
        for code, said in together(folder, [[]] * world, jobs):
            assert code == 0, said[-3000:]
    return folder


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def assert_alike(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> None:
    """Scene, moments, statistics and exposures to relative 1e-5, counts and random states exactly. (Measured: 2e-15 without growth.)"""
    assert a.tensors.keys() == b.tensors.keys()
    for name, x in a.tensors.items():
        y = b.tensors[name]
        assert x.shape == y.shape and (difference(x, y) < 1e-5 if x.is_floating_point() else torch.equal(x, y)), name


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", sharded.cases())
def test_pictures_are_bit_equal_and_gradients_within_1e_5_of_those_of_one_process(folder, name, world):
    expected = sharded.step(*sharded.cases()[name])
    for rank in range(world):
        actual = torch.load(folder / f"{name}.{rank}.{world}.pt")
        for key, x in expected.items():     # measured: at most 9e-7 in float, 2e-15 in double
            assert torch.equal(actual[key], x) if key in EXACT else difference(actual[key], x) < 1e-5, key


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_processes_is_that_of_one(folder, kind):
    """In double: in float32 Adam, which divides by the root of v, turns rounding in the smallest gradients into whole steps."""
    one, two = (checkpoint.load(folder / f"{kind}.{world}.60") for world in (1, 2))
    assert len(one.tensors["scene.means"]) == 301 if kind == "none" else len(one.tensors["scene.means"]) > 301
    assert_alike(two, one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_another_number_of_processes(folder, kind):
    by_two = checkpoint.load(folder / f"{kind}.2.30")
    sharded.fit_to(60, sharded.new_fit(kind, folder / "photos", ALONE, by_two), folder / "photos").save(folder / f"{kind}.alone", {})
    whole = checkpoint.load(folder / f"{kind}.1.60")
    assert_alike(checkpoint.load(folder / f"{kind}.alone"), whole)
    assert_alike(checkpoint.load(folder / f"{kind}.resumed"), whole)


def test_the_first_process_alone_reports_and_writes_a_run_folder_like_any(folder):
    assert (folder / "result.1").read_text() == "[] None"
    scene, header = io.load(folder / "run.2" / "scene.ply")
    assert header.step == 60 and (folder / "result.0").read_text().startswith(f"[(60, {len(scene)})] ")
    assert evaluate(folder / "run.2").psnr == pytest.approx(float((folder / "result.0").read_text().split()[-1]), abs=1e-4)
    saved = checkpoint.load(folder / "run.2" / "checkpoint")
    assert torch.equal(saved.tensors["scene.means"], scene.means) and len(saved.tensors["adam.row_steps"]) == len(scene)


def test_processes_that_were_given_different_things_refuse_to_work_together(folder):
    assert "process 1 has another poses than process 0" in (folder / "disagree.0").read_text()
    assert "process 0 has another poses than process 1" in (folder / "disagree.1").read_text()


def test_a_bad_file_of_one_process_ends_all_with_one_line(folder, tmp_path):
    shutil.copytree(folder / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "images" / "003.png").write_bytes(b"\x89PNG\r\n")
    command = ["reconstruct", folder / "photos", "-o", tmp_path / "run", "--preset", "demo", "--steps", "2000"]
    (first, said), (second, silent) = together(tmp_path, [command, ["reconstruct", tmp_path / "photos", *command[2:]]])
    assert (first, second) == (2, 2)
    assert "splatkit: process 1: " in said and "003.png" in said and len(said.strip().splitlines()) == 1 and silent == ""


def test_a_killed_process_ends_the_other_with_a_message_and_leaves_a_whole_checkpoint(folder, tmp_path):
    command = ["-m", "splatkit.cli", "reconstruct", folder / "photos", "-o", tmp_path, "--preset", "demo", "--save-every", "20", "--steps"]
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command), "100000"], cwd=HERE.parent,
                           env={**os.environ, "PYTHONPATH": str(HERE.parent)}, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "checkpoint").glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process_of(run.pid, rank=1), signal.SIGKILL)
        _, said = run.communicate(timeout=120)       # seconds, unless the other waits for what never comes
    finally:
        run.kill()
    assert run.returncode != 0
    assert [line for line in said.splitlines() if line.startswith("splatkit: process 1 of 2 (counted from 0) was lost") and "--resume goes on" in line], said[-3000:]
    assert checkpoint.load(tmp_path / "checkpoint").step % 20 == 0


@pytest.mark.parametrize(("silent", "words"), [(1, "process 1 of 2 (counted from 0) was lost"), (0, "this process was told to end (SIGTERM), and others do not answer")])
def test_a_process_that_waits_for_one_that_is_silent_hears_sigterm_and_says_so(tmp_path, silent, words):
    said, waits = [tmp_path / f"said.{rank}" for rank in range(2)], tmp_path / "waits"
    with started(sharded.waiting, [(text, waits, silent) for text in said]) as running:
        deadline = time.monotonic() + 120
        while not waits.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)         # until it is in the exchange
        os.kill(running[silent].pid, signal.SIGSTOP)        # the first process keeps what all say, and then it answers nobody
        os.kill(running[1 - silent].pid, signal.SIGTERM)
        running[1 - silent].join(60)
        assert running[1 - silent].exitcode == 2
    assert said[1 - silent].read_text().splitlines()[-1].startswith(f"splatkit: {words}")


def process_of(parent: int, rank: int) -> int:
    """The child of torchrun that has this rank."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            is_child = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        except OSError:     # it ended meanwhile
            pass
    raise LookupError(f"no process of rank {rank}")


def test_rows_are_shared_out_like_array_split():
    import numpy
    for total, world in ((0, 2), (1, 3), (7, 3), (9, 3)):
        parts = [Shard(rank, world).part(total) for rank in range(world)]
        assert [list(range(p.first, p.last)) for p in parts] == [list(x) for x in numpy.array_split(numpy.arange(total), world)]


def test_a_backend_that_draws_in_one_process_only_is_refused_in_several():
    with pytest.raises(BadConfig, match="--backend reference draws in one process only"):
        Shard(0, 2).check("cpu", "reference")
    ALONE.check("cpu", "reference")
