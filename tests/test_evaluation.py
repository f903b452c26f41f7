"""`splatkit eval`: what its table, its file and its pictures say, which photos they are about, and how bad input ends."""
import dataclasses
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from perceptual import random_state, write
from PIL import Image

from splatkit import cli, config, density, io, lpips
from splatkit.errors import BadFile
from splatkit.evaluation import DIFFERENCE_GAIN, Evaluation, compare, evaluate
from splatkit.io.photos import load_capture, load_image
from splatkit.rooms import write_capture
from splatkit.views import views_of

KINDS = ("psnr", "psnr_colour_fitted", "ssim")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Seven photos of a room, their sparse points as a scene, and weights of LPIPS."""
    folder = tmp_path_factory.mktemp("made")
    write_capture(folder / "photos", photos=7, width=64, height=48, points=400)
    capture = load_capture(folder / "photos")
    io.save(folder / "scene.ply", density.from_points(torch.from_numpy(capture.points).float(), torch.from_numpy(capture.points_rgb), 0, 0.9, 1.0))
    write(folder / "alex.pth", *random_state("alex"))
    return folder


@pytest.fixture
def run(tmp_path, made, cpu_library):
    """A run folder beside its photos, of which 000 and 004 are held out."""
    shutil.copytree(made / "photos", tmp_path / "photos")
    (tmp_path / "run").mkdir()
    shutil.copy(made / "scene.ply", tmp_path / "run")
    config.save(config.Reconstruct(tmp_path / "photos", tmp_path / "run", hold_every=4), tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)) / 255


def test_every_photo_is_scored_and_the_file_holds_what_is_returned(run):
    result = evaluate(run)
    saved = json.loads((run / "eval" / "metrics.json").read_text())
    assert list(result.photos) == ["000.png", "004.png"] and saved["photos"] == result.photos
    assert (saved["gaussians"], saved["split"], saved["lpips"]) == (len(io.load(run / "scene.ply")[0]), "held", None) and result.lpips is None
    for kind in KINDS:
        values = [row[kind] for row in result.photos.values()]
        assert saved[kind] == getattr(result, kind) == pytest.approx(statistics.mean(values))
        assert saved["spread"][kind] == result.spread[kind] == {"lowest": min(values), "highest": max(values), "deviation": pytest.approx(statistics.stdev(values))}


def test_numbers_are_those_of_the_pictures_that_are_written(run):
    result = evaluate(run, pictures=True)
    for photo in load_capture(run.parent / "photos").photos[:5:4]:
        render, target = pixels(run / "eval" / f"{photo.name}.render.png"), load_image(photo).astype(np.float64)
        design = np.concatenate([render.reshape(-1, 3), np.ones((render[..., 0].size, 1))], axis=1)
        fitted = (design @ np.linalg.lstsq(design, target.reshape(-1, 3), rcond=None)[0]).clip(0, 1).reshape(render.shape)
        for kind, picture in (("psnr", render), ("psnr_colour_fitted", fitted)):
            assert result.photos[photo.name][kind] == pytest.approx(-10 * np.log10(np.square(picture - target).mean()), abs=0.01)      # 8 bits


def test_a_side_by_side_picture_is_photo_render_and_difference(run):
    result = evaluate(run, pictures=True)
    for name in result.photos:
        photo, render, difference = np.split(pixels(run / "eval" / f"{name}.side_by_side.png"), 3, axis=1)
        np.testing.assert_array_equal(render, pixels(run / "eval" / f"{name}.render.png"))
        np.testing.assert_allclose(photo, pixels(run.parent / "photos" / "images" / name)[..., :3], atol=1e-9)
        np.testing.assert_allclose(difference, (DIFFERENCE_GAIN * abs(photo - render)).clip(0, 1), atol=(DIFFERENCE_GAIN + 1) / 255)
    assert pixels(result.picture).shape == (2 * 48, 3 * 64, 3)


def test_without_pictures_only_the_numbers_and_one_sheet_are_written(run):
    evaluate(run)
    assert sorted(p.name for p in (run / "eval").iterdir()) == ["metrics.json", "side_by_side.png"]


def test_other_splits_are_labelled_and_leave_the_held_out_numbers_alone(run):
    held = evaluate(run)
    before = (run / "eval" / "metrics.json").read_bytes()
    train, both = evaluate(run, "train"), evaluate(run, "all")
    assert set(held.photos) | set(train.photos) == set(both.photos) and not set(held.photos) & set(train.photos) and len(both.photos) == 7
    assert (run / "eval" / "metrics.json").read_bytes() == before
    assert [json.loads((run / "eval" / split / "metrics.json").read_text())["split"] for split in ("train", "all")] == ["train", "all"]
    assert "2 held-out photos" in str(held) and "5 photos that the scene was trained on" in str(train) and "trained on and held out together" in str(both)


def test_the_table_is_aligned_and_its_short_form_has_no_photos():
    row = {"psnr": 9.5, "psnr_colour_fitted": 21.25, "ssim": 0.5}
    spread = {kind: {"lowest": x, "highest": x, "deviation": 0.0} for kind, x in row.items()}
    result = Evaluation(**row, lpips=None, photos={"a/long_name.png": row, "b.png": row}, spread=spread, gaussians=12345, split="held", picture=Path("sheet.png"))
    table = str(result).splitlines()
    assert len({len(line) for line in table[:7]}) == 1 and table[1].split() == ["a/long_name.png", "9.50", "21.25", "0.5000"]
    assert [line.split()[0] for line in result.short().splitlines()[:5]] == ["photo", "mean", "lowest", "highest", "deviation"]
    assert "12,345 Gaussians" in table[7] and table[8].endswith("5 x absolute difference: sheet.png")


def test_one_photo_has_no_deviation(run):
    settings = config.load_yaml(run / "config.yaml", config.Reconstruct)
    result = compare(io.load(run / "scene.ply")[0], views_of(settings), [3], settings, run / "eval")
    assert result.spread["psnr"] == {"lowest": result.psnr, "highest": result.psnr, "deviation": 0.0}


def test_pixels_outside_the_mask_change_no_number(run, made):
    mask, photo = np.full((48, 64), 255, np.uint8), run.parent / "photos" / "images" / "000.png"
    mask[:, 40:] = 0
    (run.parent / "photos" / "masks").mkdir()
    Image.fromarray(mask).save(run.parent / "photos" / "masks" / "000.png.png")
    before = evaluate(run, lpips_files=[made / "alex.pth"])
    scribbled = np.array(Image.open(photo))
    scribbled[:, 40:] = 255 - scribbled[:, 40:]
    Image.fromarray(scribbled).save(photo)
    assert evaluate(run, lpips_files=[made / "alex.pth"]).photos == before.photos


def test_lpips_stands_in_table_and_file_where_weights_are_given(run, made, capsys):
    backbone, heads = (write(run / name, state) for name, state in zip(("backbone.pth", "heads.pth"), random_state("alex")))
    assert cli.main(["eval", str(run), "--pictures", "--lpips", str(backbone), str(heads)]) == 0
    saved = json.loads((run / "eval" / "metrics.json").read_text())
    assert f"{saved['lpips']:.4f}" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean"))
    render, photo = (torch.from_numpy(pixels(path)) for path in (run / "eval" / "000.png.render.png", run.parent / "photos" / "images" / "000.png"))
    assert saved["photos"]["000.png"]["lpips"] == pytest.approx(lpips.distance(render, photo, lpips.load([backbone, heads])).item(), rel=0.01)      # 8 bits


def change_config(run, **changes):
    settings = config.load_yaml(run / "config.yaml", config.Reconstruct)
    config.save(dataclasses.replace(settings, **changes), run / "config.yaml")


@pytest.mark.parametrize("harm, flags, said", [
    (lambda run: (run / "scene.ply").unlink(), [], "scene.ply: no such file"),
    (lambda run: (run / "config.yaml").unlink(), [], "expected a run folder"),
    (lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text() + "colour_of_the_sky: 3\n"), [], "colour_of_the_sky is not a known key"),
    (lambda run: (run.parent / "photos").rename(run.parent / "moved"), [], "photos: no such folder"),
    (lambda run: (run.parent / "photos" / "images" / "004.png").unlink(), [], "004.png: no such file"),
    (lambda run: (run.parent / "photos" / "images" / "004.png").write_bytes((run.parent / "photos" / "images" / "004.png").read_bytes()[:900]), [], "004.png"),
    (lambda run: change_config(run, hold_every=0), [], "--split train"),
    (lambda run: (run / "scene.ply").write_bytes(b"ply\n"), [], "scene.ply"),
    (lambda run: None, ["--lpips", "absent.pth"], "absent.pth: no such file"),
    (lambda run: torch.save({}, run / "empty.pth"), ["--lpips", "{run}/empty.pth"], "features.0.weight: is missing"),
], ids=["no scene", "no run", "newer config", "photos gone", "photo gone", "cut photo", "none held out", "cut scene", "no weights", "empty weights"])
def test_bad_input_is_one_line_and_exit_code_2(run, harm, flags, said, capsys):
    harm(run)
    assert cli.main(["eval", str(run), *(flag.format(run=run) for flag in flags)]) == 2
    line, = [x for x in capsys.readouterr().err.splitlines() if x.startswith("splatkit: ")]
    assert said in line and not (run / "eval" / "metrics.json").exists()


def test_a_photo_too_small_for_lpips_is_one_line(run, made, capsys):
    change_config(run, downscale=2)
    assert cli.main(["eval", str(run), "--lpips", str(made / "alex.pth")]) == 2
    assert "a picture of 32x24 is too small for LPIPS with alex" in capsys.readouterr().err


def test_a_mask_that_leaves_nothing_is_named(run):
    (run.parent / "photos" / "masks").mkdir()
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(run.parent / "photos" / "masks" / "000.png.png")
    with pytest.raises(BadFile, match="leaves no pixel of 000.png"):
        evaluate(run)
