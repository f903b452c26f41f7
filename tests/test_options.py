"""Options of `reconstruct` on the synthetic capture, and what it does about gradients that are not finite."""
import dataclasses
import json

import pytest
import torch

from splatkit import io
from splatkit.errors import BadFile, Diverged
from splatkit.io import checkpoint
from splatkit.reconstruct import reconstruct
from test_growth import QUICK_ADC, run
from test_reconstruct import photos, same, settings      # noqa: F401 (a fixture)


def test_a_warm_start_begins_where_the_scene_file_ends(photos, tmp_path, cpu_library):
    before, scene = run(photos, tmp_path / "a", 150)
    after, _ = run(photos, tmp_path / "b", 1, init=tmp_path / "a" / "scene.ply", densification="none")
    assert abs(after.psnr - before.psnr) < 0.5 and after.gaussians == len(scene)


@pytest.mark.parametrize("degree", [0, 3])
def test_a_warm_start_takes_the_degree_and_the_size_of_the_run(photos, tmp_path, cpu_library, degree):
    _, scene = run(photos, tmp_path / "a", 20, sh_degree=2)
    _, started = run(photos, tmp_path / "b", 1, init=tmp_path / "a" / "scene.ply", densification="none", sh_degree=degree, max_gaussians=50)
    assert len(started) == 50 and started.sh_degree == degree
    faintest = started.logit_opacities.min()
    assert (scene.logit_opacities > faintest + 0.2).sum() <= 50      # one step moves a logit by 0.05


def test_a_warm_start_from_nothing_is_refused(photos, tmp_path, cpu_library):
    _, scene = run(photos, tmp_path / "a", 1)
    io.save(tmp_path / "empty.ply", scene.rows(slice(0, 0)), io.load(tmp_path / "a" / "scene.ply")[1])
    with pytest.raises(BadFile, match="empty.ply: holds no Gaussian"):
        reconstruct(settings(photos, tmp_path / "b", init=tmp_path / "empty.ply"))
    with pytest.raises((BadFile, OSError), match="absent.ply"):
        reconstruct(settings(photos, tmp_path / "b", init=tmp_path / "absent.ply"))


def test_a_random_background_changes_every_step_and_repeats_itself(photos, tmp_path, cpu_library, monkeypatch):
    seen = []
    from splatkit import reconstruct as module
    draw = module.render
    monkeypatch.setattr(module, "render", lambda *a, background=None, **k: (seen.append(background.tolist()), draw(*a, background=background, **k))[1])
    _, one = run(photos, tmp_path / "a", 12, random_background=True)
    drawn = [tuple(color) for color in seen[:12]]
    assert len(set(drawn)) == 12 and all(0 <= c <= 1 for color in drawn for c in color)
    assert all(color == [0, 0, 0] for color in seen[12:])       # evaluation keeps `background`
    assert same(one, run(photos, tmp_path / "b", 12, random_background=True)[1])


# ---- gradients that are not finite


def poisoned(monkeypatch, steps):
    """The photometric loss is NaN in these calls."""
    from splatkit import reconstruct as module
    loss, calls = module.l1_ssim, []
    monkeypatch.setattr(module, "l1_ssim", lambda *a, **k: (calls.append(0), loss(*a, **k) * (float("nan") if len(calls) in steps else 1))[1])


@pytest.mark.parametrize("kind", ["mcmc", "adc"])
def test_a_step_without_a_finite_gradient_is_skipped_counted_and_named(photos, tmp_path, cpu_library, monkeypatch, kind):
    poisoned(monkeypatch, {5, 6, 30})
    result, scene = run(photos, tmp_path, 60, densification=kind, adc=QUICK_ADC)
    assert result.psnr > 12 and all(x.isfinite().all() for x in scene.fields().values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line.get("skipped")]
    assert [line["step"] for line in skipped] == [5, 6, 30] and all("means" in line["not_finite"] and line["photo"] for line in skipped)


def test_the_tenth_in_a_row_stops_the_run_with_its_last_checkpoint(photos, tmp_path, cpu_library, monkeypatch):
    config = settings(photos, tmp_path, steps=60, save_every=20)
    poisoned(monkeypatch, set(range(25, 100)))
    with pytest.raises(Diverged, match="not finite in 10 steps in a row, up to step 34.*--resume"):
        reconstruct(config)
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert saved.step == 20 and io.load(tmp_path / "scene.ply")[1].step == 20
    monkeypatch.undo()
    reconstruct(dataclasses.replace(config, resume=True))
    assert io.load(tmp_path / "scene.ply")[1].step == 60 and torch.isfinite(io.load(tmp_path / "scene.ply")[0].means).all()
