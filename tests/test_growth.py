"""Ways to grow and to optimise, each through `reconstruct` on the synthetic capture: it learns, repeats itself and keeps its promises."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from splatkit import config, io
from splatkit.config import ADC, AdamWGS
from splatkit.errors import BackendUnavailable, BadConfig, BadFile
from splatkit.growth import KINDS, Fixed
from splatkit.io import checkpoint
from splatkit.io.photos import load_capture
from splatkit.reconstruct import reconstruct
from splatkit.scene import Scene
from splatkit.views import Views
from test_reconstruct import photos, same, settings     # noqa: F401 (a fixture)

QUICK_ADC = ADC(start=40, every=20, stop_fraction=0.8, grad_threshold=1e-4, reset_every=0)
ALL = AdamWGS(sparse=True, attribute_decay=True, state_decay=True)


def run(photos, folder, steps=200, **changes):
    return reconstruct(settings(photos, folder, steps=steps, **changes)), io.load(folder / "scene.ply")[0]


@pytest.mark.parametrize("kind", ["mcmc", "adc", "none"])
@pytest.mark.parametrize("adamw", [AdamWGS(), ALL], ids=["adam", "adamw-gs"])
def test_every_way_to_grow_learns_with_either_optimiser(photos, tmp_path, cpu_library, unchecked, kind, adamw):
    result, scene = run(photos, tmp_path, densification=kind, adc=QUICK_ADC, adamw=adamw)
    assert result.psnr > 16 and all(x.isfinite().all() for x in scene.fields().values())
    assert len(scene) == len(load_capture(photos).points) if kind == "none" else 0 < len(scene) <= 700


def test_clone_and_split_grow_to_the_cap_and_beat_a_fixed_number(photos, tmp_path, cpu_library, unchecked):
    grown, scene = run(photos, tmp_path / "a", 400, densification="adc", adc=QUICK_ADC, max_gaussians=1500)
    fixed, _ = run(photos, tmp_path / "b", 400, densification="none")
    assert 900 < len(scene) <= 1500 and grown.psnr > fixed.psnr


def test_an_adc_run_with_resets_repeats_itself(photos, tmp_path, cpu_library, unchecked):
    changes = dict(densification="adc", adc=dataclasses.replace(QUICK_ADC, reset_every=60), adamw=ALL)
    assert same(run(photos, tmp_path / "a", 140, **changes)[1], run(photos, tmp_path / "b", 140, **changes)[1])


def test_after_a_reset_no_opacity_is_above_a_hundredth():
    kind = KINDS["adc"](config.Reconstruct(data=Path("."), densification="adc", steps=1000, adc=ADC(reset_every=100)), 1.0, 4)
    scene = Scene(torch.zeros(4, 3), torch.zeros(4, 4), torch.full((4, 3), -5.0), torch.tensor([3.0, -1.0, -8.0, 0.0]), torch.zeros(4, 1, 3))
    unchanged, edit = kind.after_step(scene, 99)
    assert unchanged is scene and edit is None
    lowered, edit = kind.after_step(scene, 100)
    assert edit.reset == ("logit_opacities",) and torch.sigmoid(lowered.logit_opacities).max() <= 0.0100001
    assert torch.equal(lowered.logit_opacities[2:3], scene.logit_opacities[2:3])
    assert kind.after_step(scene, 501) == (scene, None) and kind.stats is None      # behind stop_fraction the statistics cost nothing


def test_the_longer_side_is_limited_and_smaller_photos_are_left_alone(photos):
    capture = load_capture(photos)
    photo = capture.photos[0]
    assert Views(capture, 1, 36).size(photo) == (36, 27) and Views(capture, 1, 500).size(photo) == (72, 54) and Views(capture, 3, 36).size(photo) == (24, 18)
    assert Views(capture, 1, 36).image(0).shape == (27, 36, 3)


def test_antialiasing_travels_in_the_header(photos, tmp_path, cpu_library):
    reconstruct(settings(photos, tmp_path, antialias=True))
    assert io.load(tmp_path / "scene.ply")[1].settings == {"antialias": True}


# ---- resume


@pytest.mark.parametrize("kind", ["mcmc", "adc"])
def test_a_resumed_run_is_the_run_without_a_break_bit_by_bit(photos, tmp_path, cpu_library, unchecked, kind):
    changes = dict(steps=90, densification=kind, adc=dataclasses.replace(QUICK_ADC, reset_every=60), adamw=ALL, save_every=25)
    reconstruct(settings(photos, tmp_path / "whole", **changes))
    whole = io.load(tmp_path / "whole" / "scene.ply")[0]
    for stop in (26, 60):
        run = tmp_path / str(stop)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Fixed, "displacement", _stops_at(stop))
            patch.setattr(KINDS["mcmc"], "displacement", _stops_at(stop, KINDS["mcmc"].displacement))
            with pytest.raises(RuntimeError, match="power cut"):
                reconstruct(settings(photos, run, **changes))
        assert len(list((run / "checkpoint").glob("*.safetensors"))) == stop // 25
        reconstruct(settings(photos, run, **changes, resume=True))
        assert same(whole, io.load(run / "scene.ply")[0])
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [90]


def _stops_at(step, inner=None):
    count = iter(range(1, 10**6))
    def displacement(self, scene, rate):
        if next(count) == step:
            raise RuntimeError("power cut")
        return inner(self, scene, rate) if inner else None
    return displacement


def test_resume_refuses_other_settings_and_starts_where_there_is_nothing(photos, tmp_path, cpu_library):
    reconstruct(settings(photos, tmp_path, save_every=20, resume=True))
    before = io.load(tmp_path / "scene.ply")[0]
    with pytest.raises(BadConfig, match="other values of ssim_weight"):
        reconstruct(settings(photos, tmp_path, save_every=20, resume=True, ssim_weight=0.1))
    assert same(before, io.load(tmp_path / "scene.ply")[0])
    reconstruct(settings(photos, tmp_path, save_every=20, resume=True))       # a finished run is evaluated again
    assert same(before, io.load(tmp_path / "scene.ply")[0])


def test_two_runs_in_one_folder_are_refused(photos, tmp_path, cpu_library):
    with checkpoint.lock(tmp_path), pytest.raises(BadFile, match="is working in this folder"):
        reconstruct(settings(photos, tmp_path))


@pytest.mark.parametrize("kind", ["mcmc", "adc"])
def test_steps_through_the_recorded_picture_lead_where_those_of_autograd_do(photos, tmp_path, cpu_library, monkeypatch, kind):
    """What a card does, on the CPU: the same scene but for rounding, and a run that was stopped goes on bit by bit."""
    changes = dict(densification=kind, adc=QUICK_ADC, adamw=dataclasses.replace(ALL, state_decay=False))
    few = dict(steps=30, save_every=15)         # before growth, whose draws would turn rounding into other Gaussians
    _, by_autograd = run(photos, tmp_path / "a", **few, **changes)
    monkeypatch.setattr("splatkit.fit.Fit.recorded", True)
    _, recorded = run(photos, tmp_path / "b", **few, **changes)
    for name, x in by_autograd.fields().items():
        assert (getattr(recorded, name) - x).norm() < 0.02 * x.norm(), name
    result, scene = run(photos, tmp_path / "c", **changes)
    assert result.psnr > 16 and same(scene, run(photos, tmp_path / "d", **changes)[1])


def test_a_run_on_a_card_that_is_not_there_is_refused_in_one_line(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("splatkit.raster.backends", lambda: {"cuda": "torch sees no CUDA device", "cpu": None})
    with pytest.raises(BackendUnavailable, match="no CUDA device; --device cpu works without"):
        reconstruct(settings(photos, tmp_path, device="cuda"))
