"""The bound on how thin Gaussians become: what a pixel measures, and runs that keep to it."""
import dataclasses

import pytest
import torch

from splatkit import io
from splatkit.camera import Cameras, look_at
from splatkit.reconstruct import reconstruct
from splatkit.sampling import CAMERAS_MAX, pixel_sizes
from splatkit.views import views_of
from test_reconstruct import photos, same, settings     # noqa: F401 (a fixture)


def camera(eye, target=(0.0, 0.0, 0.0), focal=100.0) -> Cameras:
    pose = look_at(torch.tensor(eye), torch.tensor(target), torch.tensor([0.0, 1.0, 0.0]))
    return Cameras(pose[None], torch.tensor([[[focal, 0, 40], [0, 0.5 * focal, 30], [0, 0, 1]]]), 80, 60)


def test_a_pixel_measures_depth_over_the_larger_focal_length_of_the_nearest_camera_that_sees_the_point():
    far, near, aside = camera((0.0, 0.0, -4.0)), camera((0.0, 0.0, -2.0)), camera((0.0, 0.0, -1.0), (5.0, 0.0, -1.0))
    point = torch.zeros(1, 3)
    assert pixel_sizes(point, [far]).item() == pytest.approx(0.04)
    assert pixel_sizes(point, [far, near, aside]).item() == pytest.approx(0.02)
    assert pixel_sizes(point, [aside]).item() == 0      # beside its picture
    assert pixel_sizes(torch.tensor([[0.0, 0.0, -5.0]]), [far, near]).item() == 0      # behind both
    assert pixel_sizes(torch.zeros(0, 3), [far]).shape == (0,)


def test_of_many_cameras_those_that_are_left_out_do_not_matter_where_neighbours_see_the_same():
    around = [camera((0.0, 0.0, -2.0 - 0.001 * i)) for i in range(5 * CAMERAS_MAX)]
    assert pixel_sizes(torch.zeros(1, 3), around).item() == pytest.approx(0.02)


def test_no_gaussian_is_thinner_than_the_bound_and_a_resumed_run_is_the_unbroken_one(photos, tmp_path, cpu_library, unchecked):
    whole = settings(photos, tmp_path / "whole", steps=200, save_every=80, min_scale=1.5)
    reconstruct(whole)
    scene, _ = io.load(tmp_path / "whole" / "scene.ply")
    views = views_of(whole)
    trained = [views.camera(i) for i in range(10) if i % 5]
    thinnest = scene.log_scales.exp().amin(1) / pixel_sizes(scene.means, trained).clamp(min=1e-9)
    assert float(thinnest[pixel_sizes(scene.means, trained) > 0].min()) > 1.5 * (1 - 1e-4)

    class Stop(Exception):
        pass

    def report(step, gaussians, **numbers):
        if step >= 100:
            raise Stop
    broken = dataclasses.replace(whole, output=tmp_path / "broken")
    with pytest.raises(Stop):
        reconstruct(broken, report)
    reconstruct(dataclasses.replace(broken, resume=True))
    assert same(scene, io.load(tmp_path / "broken" / "scene.ply")[0])
    reconstruct(dataclasses.replace(whole, output=tmp_path / "free", min_scale=0.0))
    free, _ = io.load(tmp_path / "free" / "scene.ply")
    assert float((free.log_scales.exp().amin(1) / pixel_sizes(free.means, trained).clamp(min=1e-9))[pixel_sizes(free.means, trained) > 0].quantile(0.1)) < 1.3
