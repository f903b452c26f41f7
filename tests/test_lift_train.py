"""Training of the lifting network: it learns, on every kind of data; it goes on exactly where it stopped; two processes do what one does."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lift_training
import numpy as np
import pytest
import sharded
import torch
import torch.nn.functional as F
from killing import tried
from lift_training import SMALL, settings
from lifting import write_chunk
from perceptual import packaged, random_state, write
from test_shard import together

from splatkit import cli, config, lpips, rooms
from splatkit.errors import BadConfig, BadFile
from splatkit.io import checkpoint
from splatkit.lift.data import CHUNK_DEPTHS, Sample, _used_again, collated, held_out, mirrored, room_sample, training
from splatkit.lift.losses import depth_difference, depth_disagreement, losses, seen_in, total, warp_difference, warped
from splatkit.lift.model import Lifted, MVSplat
from splatkit.lift.train import Training, halve, learning_rate, lift_train, quality
from splatkit.lift.train_config import LiftLosses, LiftTrain
from splatkit.lift.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

silent = lambda line: None


@pytest.fixture(scope="module")
def sample() -> Sample:
    """One room with three views, without changes of colour."""
    return collated([room_sample(LiftTrain(width=64, height=64), 5, 0, augment=False)])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, cpu_library) -> Path:
    """A run of the small network."""
    folder = tmp_path_factory.mktemp("learnt")
    lift_train(settings(folder / "run", steps=80, rooms=24, cache=folder / "rooms", hold=4, hold_every=10**6, lr=3e-3, warmup=10, width=48, height=48))
    return folder / "run"


def test_a_minute_of_training_gives_held_out_rooms_a_decibel(learnt):
    first = LiftTrain(**{**vars(config.load_yaml(learnt / "config.yaml", LiftTrain)), "steps": 1})
    before = quality(Training.first(first, "cpu").model, held_out(first, silent), first)
    after = json.loads((learnt / "metrics.jsonl").read_text().splitlines()[-1])
    assert after["held_psnr"] > before["psnr"] + 1 and after["held_abs_rel"] < before["abs_rel"]


def test_the_weights_of_a_run_are_those_of_its_checkpoint_in_half_precision(learnt):
    model, _ = load_weights(learnt / "weights.safetensors")
    saved = checkpoint.load(learnt / "checkpoint")
    decayed = [p for p in model.parameters() if p.ndim > 1] + [p for p in model.parameters() if p.ndim == 1]
    assert torch.equal(torch.cat([p.flatten() for p in decayed]), saved.tensors["weights"].half().float()) and model.config == SMALL


# Losses


def test_the_true_depth_warps_a_view_onto_another_and_beats_other_depths(sample):
    views = Sample(sample.images[:, :2], sample.K[:, :2], sample.world_to_cam[:, :2], sample.depth[:, :2], sample.far)
    error = lambda depth: float(warp_difference(views, 0, [warped(views, depth, 0, 1)], [1]))
    picture, moved, own, inside = warped(views, views.depth, 0, 1)
    seen = seen_in(views.depth, views, 0, 1)
    assert 0.5 < seen.float().mean() < 1
    off = (picture - views.images[:, 0]).abs().mean(1)[seen]
    assert off.median() < 0.03 < (views.images[:, 1] - views.images[:, 0]).abs().mean(1)[seen].median()
    assert error(views.depth) < 0.6 * min(error(views.depth * 1.15), error(views.depth / 1.15), error(views.depth.mean() + 0 * views.depth))
    assert float(depth_disagreement((picture, moved, own, seen))) < 0.01


def test_pixels_that_no_other_view_sees_and_those_that_are_alike_unmoved_do_not_count(sample):
    views = Sample(sample.images[:, :2], sample.K[:, :2], sample.world_to_cam[:, :2], sample.depth[:, :2], sample.far)
    still = Sample(views.images[:, [0, 0]], views.K, views.world_to_cam, views.depth, views.far)
    assert float(warp_difference(still, 0, [warped(still, still.depth, 0, 1)], [1])) == 0
    picture, moved, own, inside = warped(views, views.depth, 0, 1)
    nothing = torch.zeros_like(inside)
    assert float(warp_difference(views, 0, [(picture, moved, own, nothing)], [1])) == float(depth_disagreement((picture, moved, own, nothing))) == 0


def test_each_pixel_takes_its_best_source(sample):
    three = Sample(*(x[:, :3] if x.ndim > 1 else x for x in vars(sample).values()))
    good, bad = warped(three, three.depth, 0, 2), warped(three, three.depth * 1.4, 0, 1)
    both = float(warp_difference(three, 0, [bad, good], [1, 2]))
    assert both < float(warp_difference(three, 0, [bad], [1]))


def test_depth_counts_in_logarithms_and_only_where_it_is_given():
    depth = torch.tensor([[2.0, 4.0, 9.0]], requires_grad=True)
    loss = depth_difference(depth, torch.tensor([[1.0, 4.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(np.log(2) / 2) and depth.grad[0, 2] == 0 and depth.grad[0, 0] == pytest.approx(0.25)
    assert float(depth_difference(torch.ones(1, 2), torch.zeros(1, 2))) == 0


def test_label_free_losses_have_a_gradient_towards_the_true_depth(sample):
    depth = (sample.depth[:, :2] * 1.05).requires_grad_()
    quarter = F.interpolate(depth, scale_factor=0.25, mode="nearest-exact")
    weights = LiftLosses(mse=0, warp=1.0, agreement=0.5)
    found = Lifted(depth, quarter, torch.ones_like(depth), ())
    loss = total(losses(found, sample, 2, weights), weights)
    loss.backward()
    better = Lifted(depth.detach() - 0.3 * depth.grad / depth.grad.abs().max() * depth.detach(), quarter, torch.ones_like(depth), ())
    assert depth.grad.isfinite().all() and total(losses(better, sample, 2, weights), weights) < loss


def test_lpips_joins_the_loss_and_reaches_the_weights(sample, tmp_path):
    file = write(tmp_path / "alex.pth", packaged("alex", *random_state("alex")))
    weights = LiftLosses(mse=0, lpips=1.0, lpips_weights=(file,))
    model = MVSplat(SMALL)
    found = model(sample.images[:, :2], sample.K[:, :2], sample.world_to_cam[:, :2], torch.ones(1, 2), sample.far[:, None].expand(1, 2))
    total(losses(found, sample, 2, weights, lpips.load(weights.lpips_weights)), weights).backward()
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


# Data


def test_a_mirrored_sample_is_the_same_place_mirrored(sample):
    turned = mirrored(sample)
    plain = lambda s: warped(Sample(s.images[:, :2], s.K[:, :2], s.world_to_cam[:, :2], s.depth[:, :2], s.far), s.depth[:, :2], 0, 1)
    for a, b in zip(plain(sample), plain(turned)):
        torch.testing.assert_close(a.float().flip(-1), b.float(), atol=2e-4, rtol=1e-3)
    assert torch.equal(mirrored(turned).images, sample.images)


def test_samples_are_the_same_whoever_asks_and_differ_by_number_and_seed():
    given = LiftTrain(width=32, height=32)
    a, b = training(given, silent), training(given, silent)
    b(4)
    assert all(torch.equal(x, y) for x, y in zip(vars(a(3)).values(), vars(b(3)).values()))
    assert not torch.equal(a(3).images, a(4).images) and not torch.equal(a(3).images, training(dataclasses.replace(given, seed=1), silent)(3).images)


def test_rooms_that_are_used_again_come_from_the_cache_bit_by_bit(tmp_path, monkeypatch):
    given = settings(tmp_path / "run", rooms=2, cache=tmp_path / "cache", augment=False)
    first = [training(given, silent)(number) for number in range(8)]
    files = sorted((tmp_path / "cache").iterdir())
    assert 1 <= len(files) <= 2
    monkeypatch.setattr(rooms, "sample", lambda *a, **k: pytest.fail("cast again"))
    again = [training(given, silent)(number) for number in range(8)]
    assert all(torch.equal(x, y) for a, b in zip(first, again) for x, y in zip(vars(a).values(), vars(b).values()))
    monkeypatch.undo()
    files[0].write_bytes(files[0].read_bytes()[:-500])      # of a machine that went down
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, [training(given, silent)(number) for number in range(8)]))


def test_rooms_that_are_used_again_come_into_use_one_after_the_other():
    given = LiftTrain(rooms=40)
    used = np.array([_used_again(given, number, 4000) for number in range(4000)])
    assert used[:40].max() < 11 and used[:2000].max() < 30 and used[3000:].max() == 39
    assert np.bincount(used[3000:], minlength=40).min() > 8


def test_a_written_room_gives_samples_with_its_depths_at_another_size(tmp_path):
    rooms.write_rooms(tmp_path, 2, photos=5, width=96, height=64, seed=3)
    source = training(settings(tmp_path / "run", data=(tmp_path,), gap=(2, 3), width=32, height=32, augment=False), silent)
    for number in range(3):
        found = source(number)
        views = Sample(*(x[None] for x in vars(found).values()))
        assert found.images.shape == (3, 3, 32, 32) and float(found.depth[:2].min()) > 1 and float(found.depth.max()) < float(found.far)
        picture, _, _, inside = warped(views, views.depth, 0, 1)
        seen = seen_in(views.depth, views, 0, 1)
        assert seen.float().mean() > 0.2 and (picture - views.images[:, 0]).abs().mean(1)[seen].median() < 0.08
    assert held_out(settings(tmp_path / "run", data=(tmp_path,)), silent) is None


def test_chunks_give_samples_of_their_photos_and_cameras_made_smaller_and_cut(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    write_chunk(tmp_path / "train" / "000000.torch", {"a": 4, "short": 2})
    write_chunk(tmp_path / "test" / "000000.torch", {"b": 3})
    given = settings(tmp_path / "run", data=(tmp_path,), gap=(2, 2), augment=False)
    found = training(given, silent)(0)
    K, (a, b, between) = found.K[0], torch.linalg.inv(found.world_to_cam)[:, 0, 3].abs()
    assert found.images.shape == (3, 3, 32, 32) and float(found.far) == CHUNK_DEPTHS[1] and not found.depth.any()
    assert K[0, 0] == pytest.approx(0.9 * 43, rel=1e-3) and K[1, 1] == pytest.approx(1.2 * 32) and K[:2, 2].tolist() == [16.5, 16.0]     # 64x48 -> 43x32 -> 32x32
    assert float(b - a) == pytest.approx(0.4) and float(between - a) == pytest.approx(0.2)
    assert held_out(given, silent)(0).images.shape == (3, 3, 32, 32)


def test_a_capture_without_depth_and_points_asks_for_near_and_far(tmp_path):
    rooms.write_rooms(tmp_path, 1, photos=4, width=48, height=32)
    file = tmp_path / "room-000000" / "transforms.json"
    top = json.loads(file.read_text())
    for frame in top["frames"]:
        del frame["depth_file_path"]
    file.write_text(json.dumps(top))
    given = settings(tmp_path / "run", data=(tmp_path / "room-000000",), gap=(2, 3))
    with pytest.raises(BadFile, match="--near and --far"):
        training(given, silent)(0)
    found = training(dataclasses.replace(given, near=0.5, far=8.0), silent)(0)
    assert float(found.far) == 16 and not found.depth.any()


@pytest.mark.parametrize("make, why", [
    (lambda folder: None, "no such folder"), (lambda folder: folder.mkdir(), "no capture"),
    (lambda folder: rooms.write_rooms(folder, 1, photos=2, width=32, height=32), "2 photos; --gap 2 8 needs at least 3"),
], ids=["absent", "empty", "too few photos"])
def test_a_place_that_cannot_be_trained_on_is_one_clear_line(tmp_path, capsys, make, why):
    make(tmp_path / "data")
    assert cli.main(["lift-train", str(tmp_path / "data"), "-o", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert why in said[-1] and len(said) == 1


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_chunk_that_is_cut_is_one_clear_line_wherever_it_is_read(tmp_path, capsys, cpu_library, workers):
    write_chunk(tmp_path / "000000.torch", {"a": 3})
    (tmp_path / "000000.torch").write_bytes((tmp_path / "000000.torch").read_bytes()[:-300])
    assert cli.main(["lift-train", str(tmp_path), *lift_training.flags(tmp_path / "run"), "--workers", workers]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "000000.torch" in said[-1] and said[-1].startswith("splatkit: ") and len(said) == 2      # the first says what is trained


@pytest.mark.parametrize("flags, why", [
    (["--width", "100"], "multiple of 16"), (["--contexts", "1"], "2 or more"), (["--gap", "1", "8"], "gap is"), (["--begin", "5"], "without --weights"),
    (["--loss.mse", "0"], "at least one term"), (["--loss.lpips", "0.1"], "lpips_weights"), (["--end", "20000"], "not after steps"), (["--near", "3", "--far", "2"], "above near"),
])
def test_settings_that_cannot_be_are_one_clear_line(tmp_path, capsys, flags, why):
    assert cli.main(["lift-train", "-o", str(tmp_path / "run"), *flags]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "run").exists()


# Going on


def test_a_run_stopped_at_any_file_operation_of_a_save_resumes_to_the_same_bits(tmp_path, cpu_library):
    said = tried("lift", tmp_path)
    assert said["operations"] > 15 and not said["differing"]


def test_a_stage_goes_on_in_the_schedule_from_weights_alone(tmp_path, cpu_library):
    whole = settings(tmp_path / "a", steps=4, end=2)
    weights = lift_train(whole)
    lift_train(settings(tmp_path / "b", steps=4, begin=2, weights=str(weights)))
    assert checkpoint.load(tmp_path / "b" / "checkpoint").step == 4
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4] and lines[0]["lr"] == learning_rate(settings(tmp_path, steps=4, begin=2, weights="x"), 4)


def test_a_run_resumed_with_other_settings_is_refused(tmp_path, cpu_library):
    given = settings(tmp_path / "run", steps=2)
    lift_train(given)
    with pytest.raises(BadConfig, match="other values of lr"):
        lift_train(dataclasses.replace(given, lr=1e-5, resume=True))


# Several processes, and halves


@pytest.fixture(scope="module")
def pair(tmp_path_factory, cpu_library) -> Path:
    """What two processes make: `pair` in float32, without a break, and `two` in double."""
    folder = tmp_path_factory.mktemp("pair")
    for code, said in together(folder, [[]] * 2, ("lift",)):
        assert code == 0, said[-3000:]
    return folder


def test_two_processes_do_what_one_does_with_twice_the_batch(pair):
    """In double: in float32 Adam, which divides by the root of v, turns rounding in the smallest gradients into whole steps."""
    sharded.lift_in_double(settings(pair / "one", steps=3, batch=2, accumulate=2, rooms=8))
    one, two = (checkpoint.load(pair / name / "checkpoint").tensors for name in ("one", "two"))
    for name in ("weights", "exp_avg", "exp_avg_sq"):       # measured: 1e-11
        assert one[name].dtype == torch.float64 and float((one[name] - two[name]).norm() / one[name].norm()) < 1e-5, name
    metrics = [json.loads((pair / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert metrics[0]["mse"] == pytest.approx(metrics[1]["mse"], rel=1e-6)
    assert (pair / "said of two").read_text().startswith("4 samples a step: 1 a pass, 2 passes, 2 processes")


def test_a_killed_process_under_torchrun_is_started_again_and_ends_in_the_bits_of_an_unbroken_run(pair, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "splatkit.cli", "lift-train",
               *lift_training.flags(tmp_path / "run", **lift_training.PAIR), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    run = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "run" / "checkpoint").glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(int((tmp_path / "run" / ".lock").read_text()), signal.SIGKILL)
        said, _ = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == 0, said[-2000:]
    broken, whole = (checkpoint.load(folder / "checkpoint") for folder in (tmp_path / "run", pair / "pair"))
    assert broken.step == whole.step == lift_training.PAIR["steps"]
    assert all(torch.equal(x, whole.tensors[name]) for name, x in broken.tensors.items())


def test_halves_reach_convolutions_and_nothing_else(sample):
    torch.manual_seed(0)
    model = MVSplat(SMALL)
    call = lambda: model(sample.images[:, :2], sample.K[:, :2], sample.world_to_cam[:, :2], torch.ones(1, 2), sample.far[:, None].expand(1, 2))
    whole = call()
    halve(model)
    half = call()
    assert half.depth.dtype == half.scenes[0].means.dtype == torch.float32
    difference = ((1 / half.depth - 1 / whole.depth).abs().mean() / (1 / whole.depth).std()).item()
    assert 1e-5 < difference < 0.2
    half.depth.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
