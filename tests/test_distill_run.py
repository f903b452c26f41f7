"""Runs of distillation: they learn, repeat and resume bit by bit, are the same in one process and in two, end well or say why, and leave a backbone for plain timm."""
import dataclasses
import importlib.util
import json
import multiprocessing
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distill_runs import TINY, process, settings

from splatkit import cli, config
from splatkit.distill import backbone as backbones
from splatkit.distill import loop
from splatkit.distill.config import Adapter, BackboneConfig, DataConfig, Distill, EMAConfig, GeometryConfig, LabelConfig, LossConfig
from splatkit.distill.loop import distill, learning_rate
from splatkit.distill.step import common_points, sample_at
from splatkit.distill.views import RoomScene
from splatkit.errors import BackendUnavailable, BadConfig, BadFile, Diverged
from splatkit.io import checkpoint

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_checkpoint(a: Path, b: Path) -> bool:
    a, b = (checkpoint.load(run / "checkpoint") for run in (a, b))
    return a.step == b.step and a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of eight steps without a break."""
    run = tmp_path_factory.mktemp("whole")
    distill(settings(run, steps=8))
    return run


def stopped(run: Distill, after: int) -> None:
    """The run, interrupted in step `after`."""
    class Stop(loop.Watcher):
        def stepped(self, run):
            if run.step == after:
                raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        distill(run, watcher=Stop())


@torch.no_grad()
def cross_view_error(weights: BackboneConfig) -> float:
    """Squared distance of the features of one point in two photos over that of two points, in a room that no run has seen."""
    model, scene, same, other = backbones.load(weights), RoomScene(50, 16, 64, 48), 0.0, 0.0
    for i in range(0, 14, 2):
        a, b = scene.view(i), scene.view(i + 2)
        at_a, at_b = common_points(a, b, 6, 8)
        fa, fb = (F.normalize(sample_at(model(v.photo[None])[0], at, v), dim=1) for v, at in ((a, at_a), (b, at_b)))
        same += float((fa - fb).square().sum(1).mean())
        other += float((fa - fb.roll(len(fb) // 2, 0)).square().sum(1).mean())
    return same / other


def test_20_steps_lower_the_excess_and_the_error_across_views_of_a_room_not_seen(tmp_path):
    distill(settings(tmp_path, batch=4, adapter=Adapter("full"), lr=1e-3, label=LabelConfig(blend=1.0)))
    excess = [line["excess"] for line in lines(tmp_path)]
    assert sum(excess[-5:]) < 0.8 * sum(excess[:5])
    assert cross_view_error(backbones.of_file(tmp_path / "backbone.safetensors")) < 0.85 * cross_view_error(TINY)       # 0.68 of it


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(whole, tmp_path):
    halves = settings(tmp_path, steps=8)
    stopped(halves, 6)
    assert checkpoint.load(tmp_path / "checkpoint").step == 4
    distill(dataclasses.replace(halves, resume=True))
    assert same_checkpoint(whole, tmp_path)
    a, b = (backbones.load(backbones.of_file(run / "backbone.safetensors")).state_dict() for run in (whole, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


def test_accumulated_micro_batches_are_the_batch(tmp_path):
    at_once = settings(tmp_path / "a", steps=3, batch=4, micro_batch=4, adapter=Adapter(dropout=0.0))
    for name, micro in (("a", 4), ("b", 1)):
        distill(dataclasses.replace(at_once, output=tmp_path / name, micro_batch=micro))
    a, b = (checkpoint.load(tmp_path / name / "checkpoint").tensors for name in "ab")
    assert max(float((a[k] - b[k]).abs().max()) for k in a if k.startswith("student")) < 1e-5


def test_the_exported_backbone_loads_into_plain_timm_and_gives_the_same_tokens(whole):
    from splatkit import _compat
    timm = _compat.timm()
    plain = timm.create_model(TINY.name, num_classes=0, dynamic_img_size=True, embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=48,
                              checkpoint_path=str(whole / "backbone.safetensors")).eval()
    ours = backbones.load(backbones.of_file(whole / "backbone.safetensors"))
    run = loop.Run(settings(whole, steps=8), "cpu", loop.Shard())
    run.load(checkpoint.load(whole / "checkpoint"))
    photos = torch.rand(2, 3, 48, 64)
    tokens = run.student.eval().backbone(photos)
    with torch.no_grad():
        theirs = plain.forward_features((photos - ours.mean) / ours.std)[:, 1:].unflatten(1, (6, 8))
    assert torch.allclose(theirs, tokens, atol=2e-5) and torch.equal(ours(photos), theirs)
    assert not torch.allclose(tokens, backbones.load(TINY)(photos), atol=1e-3)


def in_two_processes(tmp_path, config_file: Path, rest: tuple[str, ...] = (), kill: int | None = None, once: Path | None = None) -> tuple[list[int], list[str]]:
    """Exit codes and what was said; process `kill` is killed when the file `once` is there, of which a copy goes to tmp_path / "kept"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = [tmp_path / f"said.{rank}" for rank in range(2)]
    environment = lambda rank: {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=process, args=(environment(rank), said[rank], config_file, list(rest))) for rank in range(2)]
    for child in children:
        child.start()
    if kill is not None:
        deadline = time.monotonic() + 240
        while not once.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "kept").mkdir()
        shutil.copy(once, tmp_path / "kept")
        children[kill].kill()
    for child in children:
        child.join(300)
    return [child.exitcode for child in children], [path.read_text() for path in said]


def test_two_processes_with_the_same_batch_are_one_and_a_killed_one_ends_both(tmp_path):
    one = settings(tmp_path / "one", steps=10_000, lr=0.1, batch=4, adapter=Adapter(dropout=0.0),      # four steps of a warm-up of a hundred
                   loss=LossConfig(centering="mean", student_temperature=0.1, teacher_temperature=0.05))
    stopped(one, 5)
    config.save(dataclasses.replace(one, output=tmp_path / "two"), tmp_path / "two.yaml")
    codes, said = in_two_processes(tmp_path, tmp_path / "two.yaml", kill=1, once=tmp_path / "two" / "checkpoint" / "checkpoint-00000004.safetensors")
    assert codes == [2, -9] and "process 1 of 2 (counted from 0) was lost" in said[0] and "--resume" in said[0], said
    a, b = (checkpoint.load(folder).tensors for folder in (tmp_path / "one" / "checkpoint", tmp_path / "kept"))
    assert a.keys() == b.keys() and max(float((a[k] - b[k]).abs().max()) for k in a if not k.startswith("adam")) < 1e-5
    assert [line["loss"] for line in lines(tmp_path / "two")[:4]] == pytest.approx([line["loss"] for line in lines(tmp_path / "one")[:4]], abs=1e-5)


# ---- what goes wrong


def test_a_loss_that_is_not_finite_is_left_out_and_the_tenth_in_a_row_stops(tmp_path, monkeypatch):
    real, bad = loop.loss_of, {3, 5}
    monkeypatch.setattr(loop, "loss_of", lambda *args: real(*args) * (float("nan") if calls.append(1) or len(calls) in bad else 1))
    calls = []
    distill(settings(tmp_path, steps=6, batch=1))
    assert [line["step"] for line in lines(tmp_path) if line.get("skipped") is True] == [3, 5] and lines(tmp_path)[-1]["skipped"] == 2
    assert all(torch.isfinite(x).all() for x in checkpoint.load(tmp_path / "checkpoint").tensors.values())
    calls, bad = [], set(range(6, 100))
    with pytest.raises(Diverged, match="10 steps in a row, up to step 15; the last checkpoint"):
        distill(settings(tmp_path, steps=30, batch=1, save_every=2))
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert all(torch.isfinite(x).all() for x in saved.tensors.values())


def test_weights_that_cannot_be_had_are_said_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackendUnavailable, match="cannot be fetched.*--backbone.weights FILE.safetensors"):
        backbones.load(BackboneConfig("vit_small_patch14_dinov2"))
    with pytest.raises(BadFile, match="no such file"):
        backbones.load(dataclasses.replace(TINY, weights=str(tmp_path / "a.safetensors")))
    backbones.save(backbones.load(TINY), tmp_path / "a.safetensors", half=True)
    with pytest.raises(BadFile, match="weights of another model"):
        backbones.load(dataclasses.replace(TINY, weights=str(tmp_path / "a.safetensors"), embed_dim=64))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(BadFile, match="b.safetensors"):
        backbones.load(dataclasses.replace(TINY, weights=str(tmp_path / "b.safetensors")))
    with pytest.raises(BadConfig, match="not known to timm"):
        backbones.load(dataclasses.replace(TINY, name="vit_smal"))
    with pytest.raises(BadConfig, match="leave out embed_dim"):
        backbones.load(dataclasses.replace(TINY, weights="pretrained"))


def test_settings_that_do_not_fit_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="multiples of 8"):
        distill(settings(tmp_path, data=DataConfig(rooms=1, photos=8, height=50, width=64, gap=(2, 3))))
    with pytest.raises(BadConfig, match="other values of lr"):
        distill(settings(whole, steps=8, lr=1e-3, resume=True))
    with pytest.raises(BadConfig, match="multiple of micro_batch"):
        settings(tmp_path, batch=3, micro_batch=2)
    with pytest.raises(BadConfig, match="geometry.weights"):
        distill(settings(tmp_path, geometry=GeometryConfig(source="lift")))
    with pytest.raises(BadConfig, match="data"):
        Distill()


@pytest.mark.parametrize("changes", [
    {"method": "self"}, {"method": "correspondence"}, {"geometry": GeometryConfig(source="depth", permuted=True)}, {"geometry": GeometryConfig(source="depth", optimise=3)},
    {"loss": LossConfig("cosine")}, {"loss": LossConfig("features"), "ema": EMAConfig(rate=1.0)}, {"loss": LossConfig(centering="sinkhorn", teacher_temperature=0.05)},
    {"adapter": Adapter("full"), "schedule": "one_cycle"}, {"label": LabelConfig(regions="kmeans")}, {"ema": EMAConfig(of="merged", every=1)},
    {"label": LabelConfig(positions="align_corners", fallback="zero", coverage="zero", blend_unlabelled=True)}],
    ids=["self", "correspondence", "permuted", "optimised", "cosine", "features-frozen-teacher", "sinkhorn", "full", "kmeans", "merged-ema", "as-the-code"])
def test_every_variant_takes_steps_and_moves_the_backbone(tmp_path, changes):
    last = distill(settings(tmp_path, steps=2, **changes))
    assert last["skipped"] == 0 and 1e-9 < last["drift"] < 1 and (tmp_path / "backbone.safetensors").is_file()


def test_the_learning_rate_warms_up_and_falls_as_torch_s_one_cycle_has_it():
    steps, c = 200, Distill(data=DataConfig(rooms=1), steps=200, warmup=0.05, schedule="one_cycle", lr=2e-5)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    theirs = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-5, total_steps=steps + 10, pct_start=0.05)
    for step in range(1, steps + 1):
        assert learning_rate(step, c) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        adam.step()
        theirs.step()
    cosine = dataclasses.replace(c, schedule="cosine")
    assert learning_rate(1, cosine) == pytest.approx(2e-6) and learning_rate(10, cosine) == pytest.approx(2e-5) and 0 < learning_rate(200, cosine) < 1e-8


@pytest.mark.parametrize("preset", sorted((ROOT / "configs" / "distill").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_are_settings(preset):
    base = Distill(data=DataConfig(rooms=1))
    assert config.load_yaml(preset, base) != base


def test_a_run_of_the_command_line_says_where_the_backbone_is(tmp_path, capsys):
    config.save(settings(tmp_path / "run", steps=1), tmp_path / "c.yaml")
    assert cli.main(["distill", "--config", str(tmp_path / "c.yaml"), "--steps", "2"]) == 0
    assert f"backbone: {tmp_path / 'run' / 'backbone.safetensors'}" in capsys.readouterr().out
    assert cli.main(["distill", "--config", str(tmp_path / "c.yaml"), "--data.rooms", "0"]) == 2
    assert "no data" in capsys.readouterr().err
