"""Options of `reconstruct` on the synthetic capture, and what it does about gradients that are not finite."""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from splatkit import density, fit, io, raster
from splatkit.errors import BadFile, Diverged
from splatkit.evaluation import evaluate
from splatkit.fit import View
from splatkit.io import checkpoint
from splatkit.io.photos import load_capture, load_mask
from splatkit.reconstruct import reconstruct
from test_growth import QUICK_ADC, run
from test_reconstruct import photos, same, settings      # noqa: F401 (a fixture)


def test_a_warm_start_begins_where_the_scene_file_ends(photos, tmp_path, cpu_library, unchecked):
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
    draw = raster.render
    monkeypatch.setattr(raster, "render", lambda *a, background=None, **k: (seen.append(background.tolist()), draw(*a, background=background, **k))[1])
    _, one = run(photos, tmp_path / "a", 12, random_background=True)
    drawn = [tuple(color) for color in seen]
    assert len(set(drawn)) == 12 and all(0 <= c <= 1 for color in drawn for c in color)
    assert same(one, run(photos, tmp_path / "b", 12, random_background=True)[1])


def test_an_antialiased_run_says_so_in_its_scene_and_is_compared_so(photos, tmp_path, cpu_library, unchecked):
    smooth, scene = run(photos, tmp_path / "a", 200, antialias=True)
    assert io.load(tmp_path / "a" / "scene.ply")[1].settings == {"antialias": True}
    assert evaluate(tmp_path / "a").psnr == pytest.approx(smooth.psnr, abs=1e-4)
    (tmp_path / "a" / "config.yaml").write_text((tmp_path / "a" / "config.yaml").read_text().replace("antialias: true", "antialias: false"))
    assert abs(evaluate(tmp_path / "a").psnr - smooth.psnr) > 1e-3


def test_a_given_background_is_what_the_scene_need_not_be(photos, tmp_path, cpu_library, unchecked):
    shutil.copytree(photos, tmp_path / "cut")
    for path in (tmp_path / "cut" / "images").iterdir():
        pixels = np.array(Image.open(path))
        pixels[:27] = (255, 0, 255)
        Image.fromarray(pixels).save(path)
    on_magenta, scene = run(tmp_path / "cut", tmp_path / "a", 200, background=(1.0, 0.0, 1.0))
    on_black, _ = run(tmp_path / "cut", tmp_path / "b", 200)
    assert on_magenta.psnr > on_black.psnr + 1


def test_a_view_at_half_size_has_half_the_camera_and_the_mean_of_its_pixels(photos):
    camera, g = load_capture(photos).photos[0].camera(), torch.Generator().manual_seed(0)
    photo, mask, depth = torch.rand(54, 72, 3, generator=g), torch.rand(54, 72, generator=g) > 0.3, torch.rand(54, 72, generator=g)
    half = View(3, camera, photo, mask, depth).halved()
    assert half.place == 3 and (half.camera.width, half.camera.height) == (72, 54)      # too small to halve
    big = View(3, camera.resized(144, 108), photo.repeat_interleave(2, 0).repeat_interleave(2, 1), mask.repeat_interleave(2, 0).repeat_interleave(2, 1)).halved()
    assert torch.allclose(big.photo, photo) and torch.equal(big.mask, mask) and torch.allclose(big.camera.K, camera.K) and big.depth is None


# ---- gradients that are not finite


def poisoned(monkeypatch, steps):
    """The photometric loss is NaN in these calls."""
    from splatkit import fit
    loss, calls = fit.l1_ssim_and_gradient, []

    def sometimes(*a, **k):
        calls.append(0)
        return tuple(x * (float("nan") if len(calls) in steps else 1) for x in loss(*a, **k))
    monkeypatch.setattr(fit, "l1_ssim_and_gradient", sometimes)


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


# ---- masks


@pytest.fixture(scope="module")
def smeared(photos, tmp_path_factory):
    """The photos with a magenta square somewhere in each, and COLMAP's masks that leave it out."""
    folder = tmp_path_factory.mktemp("smeared")
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    (folder / "masks").mkdir()
    for i, path in enumerate(sorted((folder / "images").iterdir())):
        pixels = np.array(Image.open(path))
        x, y = 5 * i % 50, 7 * i % 34
        kept = np.full(pixels.shape[:2], 255, np.uint8)
        pixels[y:y + 18, x:x + 20], kept[y:y + 18, x:x + 20] = (255, 0, 255), 0
        Image.fromarray(pixels).save(path)
        Image.fromarray(kept).save(folder / "masks" / f"{path.name}.png")
    return folder


def test_masked_pixels_neither_teach_nor_count(smeared, photos, tmp_path, cpu_library, unchecked):
    clean, _ = run(photos, tmp_path / "clean", 250)
    masked, scene = run(smeared, tmp_path / "masked", 250)
    assert masked.psnr > clean.psnr - 1
    shutil.copytree(smeared, tmp_path / "unmasked")
    shutil.rmtree(tmp_path / "unmasked" / "masks")
    taught, other = run(tmp_path / "unmasked", tmp_path / "taught", 250)
    magenta = lambda s: ((s.sh[:, 0, [0, 2]].amin(1) - s.sh[:, 0, 1]) > 1).sum()       # red and blue far above green
    assert masked.psnr > taught.psnr + 3 and magenta(scene) < magenta(other) / 4


def test_a_pixel_counts_where_all_of_its_area_does(smeared):
    photo = load_capture(smeared).photos[1]
    whole, half, odd = load_mask(photo), load_mask(photo, 36, 27), load_mask(photo, 29, 22)
    assert whole.shape == (54, 72) and not whole[7:25, 5:25].any() and whole.sum() == 54 * 72 - 18 * 20
    assert (half == whole.reshape(27, 2, 36, 2).all((1, 3))).all()
    assert odd.shape == (22, 29) and not odd[4:9, 3:9].any() and odd[12:].all()


@pytest.mark.parametrize("harm, said", [(lambda p: Image.new("L", (30, 20)).save(p), "30x20 of kind 'L'; expected 8 bits and the size of its photo, 72x54"),
                                        (lambda p: p.write_bytes(p.read_bytes()[:40]), "002.png.png")])
def test_a_mask_of_another_size_or_cut_is_named(smeared, tmp_path, cpu_library, harm, said):
    shutil.copytree(smeared, tmp_path / "data")
    harm(tmp_path / "data" / "masks" / "002.png.png")
    with pytest.raises(BadFile, match=said):
        reconstruct(settings(tmp_path / "data", tmp_path / "run"))


@pytest.mark.parametrize("kind", ["mcmc", "adc"])
def test_a_run_with_dropout_resumes_bit_by_bit_and_is_compared_whole(photos, tmp_path, cpu_library, kind):
    settled = {"dropout": 0.3, "densification": kind, "adc": QUICK_ADC}
    evaluation, scene = run(photos, tmp_path / "a", 60, **settled)
    reconstruct(settings(photos, tmp_path / "b", steps=60, save_every=30, **settled))
    (tmp_path / "b" / "checkpoint" / "checkpoint-00000060.safetensors").unlink()
    reconstruct(settings(photos, tmp_path / "b", steps=60, save_every=30, resume=True, **settled))
    assert same(scene, io.load(tmp_path / "b" / "scene.ply")[0])
    assert not same(scene, run(photos, tmp_path / "c", 60, **{**settled, "dropout": 0.0})[1])
    assert evaluate(tmp_path / "a").psnr == pytest.approx(evaluation.psnr, abs=1e-4)


def test_of_all_steps_the_last_leaves_out_the_most(photos, tmp_path, cpu_library, monkeypatch):
    rates = []
    monkeypatch.setattr(fit, "dropped", lambda scene, rate, *rest: (rates.append(rate), density.dropped(scene, rate, *rest))[1])
    run(photos, tmp_path / "a", 10, dropout=0.2)
    assert rates == pytest.approx([0.02 * k for k in range(1, 10)])      # of ten steps the first leaves out none


# ---- exposure


@pytest.fixture(scope="module")
def exposed(photos, tmp_path_factory):
    """The photos, each brighter or darker by up to 20 %; and by how much, of those that train."""
    folder = tmp_path_factory.mktemp("exposed")
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    gains = torch.linspace(-0.2, 0.2, 10)[torch.randperm(10, generator=torch.Generator().manual_seed(3))] + 1
    for path, gain in zip(sorted((folder / "images").iterdir()), gains.tolist()):
        pixels = np.asarray(Image.open(path)) * (0.8 * gain)        # 0.8: nothing is clipped
        Image.fromarray(pixels.round().astype(np.uint8)).save(path)
    return folder, gains[[i for i in range(10) if i % 5]]


def test_gains_are_recovered_and_the_scene_has_the_mean_exposure(exposed, photos, tmp_path, cpu_library, unchecked):
    folder, gains = exposed
    run(folder, tmp_path / "a", 1500, exposure=True, exposure_lr=3e-3)
    run(folder, tmp_path / "b", 1500)
    state = checkpoint.load(tmp_path / "a" / "checkpoint").tensors
    log_gain, offset = state["exposures.log_gain"], state["exposures.offset"]
    assert log_gain.mean(0).abs().max() < 1e-6 and offset.mean(0).abs().max() < 1e-6
    # A gain and an offset can stand in for each other on pictures of little contrast: compare what they make of the photos' mean colour.
    mean = torch.stack([torch.from_numpy(np.array(Image.open(p))).float().mean((0, 1)) for p in (folder / "images").iterdir()]).mean(0) / 255
    seen, true = log_gain.exp() * mean + offset, mean * gains[:, None] / gains.log().mean().exp()
    assert (seen / true - 1).abs().mean() < 0.02
    # Held-out views at the mean exposure: what the run that knows of exposures should have, and the other explains by colours that change with the view.
    shutil.copytree(photos, tmp_path / "even")
    for path in (tmp_path / "even" / "images").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) * (0.8 * gains.log().mean().exp().item())).round().astype(np.uint8)).save(path)
    fair = {x: run(tmp_path / "even", tmp_path / f"{x}2", 1, init=tmp_path / x / "scene.ply", densification="none")[0].psnr for x in "ab"}
    assert fair["a"] > fair["b"] + 0.5, fair


def test_a_run_with_exposures_resumes_bit_by_bit(exposed, tmp_path, cpu_library):
    folder, _ = exposed
    run(folder, tmp_path / "a", 60, exposure=True)
    reconstruct(settings(folder, tmp_path / "b", steps=60, exposure=True, save_every=30), lambda *a, **k: None)
    (tmp_path / "b" / "checkpoint" / "checkpoint-00000060.safetensors").unlink()
    reconstruct(settings(folder, tmp_path / "b", steps=60, exposure=True, save_every=30, resume=True))
    a, b = (checkpoint.load(tmp_path / x / "checkpoint").tensors for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


def test_a_warm_started_run_resumes_without_the_file_it_started_from(photos, tmp_path, cpu_library):
    run(photos, tmp_path / "a", 20)
    first = dict(init=tmp_path / "a" / "scene.ply", densification="adc", adc=QUICK_ADC, save_every=30)
    run(photos, tmp_path / "b", 60, **first)
    run(photos, tmp_path / "c", 60, **first)
    (tmp_path / "c" / "checkpoint" / "checkpoint-00000060.safetensors").unlink()
    (tmp_path / "a" / "scene.ply").unlink()
    _, resumed = run(photos, tmp_path / "c", 60, resume=True, **first)
    assert same(resumed, io.load(tmp_path / "b" / "scene.ply")[0])
