"""Our files in a reader of other hands and its files in ours: the npm package @playcanvas/splat-transform, 2.7 or newer. It is too large to be one of the viewer's."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_formats import differences, trained

from splatkit import io
from splatkit.capture import SceneHeader

PLACE = Path(__file__).resolve().parent.parent / "viewer" / "node_modules" / "@playcanvas" / "splat-transform"


@pytest.fixture(scope="module")
def transform():
    """transform(source, target) writes what it reads from source."""
    place = Path(os.environ.get("SPLATKIT_SPLAT_TRANSFORM") or PLACE)
    if shutil.which("node") is None:
        pytest.skip("node is not on PATH")
    if not (place / "bin" / "cli.mjs").is_file():
        pytest.skip(f"no splat-transform in {place} (SPLATKIT_SPLAT_TRANSFORM names another folder); "
                    "`npm install --no-save --prefix viewer @playcanvas/splat-transform@2.7.1` brings it")

    def run(source, target):
        done = subprocess.run(["node", str(place / "bin" / "cli.mjs"), "-w", str(source), str(target)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
        return target
    return run


def scene(n, degree):
    """Without opacities that 8 bits make 0 or 1, which it reads as infinite logits."""
    whole = trained(n, degree)
    return whole.replace(logit_opacities=whole.logit_opacities.clamp(-5, 5))


CLOSE = {"means": 1e-6, "angle": 1e-3, "log_scales": 1e-5, "opacity": 1e-5, "colour": 1e-5, "sh": 1e-5}      # of numbers of 8: both decode the same bits, in float32


@pytest.mark.parametrize(("name", "options", "degree"), [
    ("s.ply", {}, 3), ("s.compressed.ply", {}, 3), ("s.splat", {}, 0), ("s.spz", {"version": 2}, 2), ("s.spz", {"version": 3}, 3), ("s.spz", {"version": 4}, 1),
    ("s.ksplat", {"level": 0}, 2), ("s.ksplat", {"level": 1}, 1), ("s.sog", {}, 3), ("s.sog", {}, 0), ("meta.json", {}, 2)])
def test_a_file_of_ours_means_the_same_to_it(tmp_path, transform, name, options, degree):
    io.save(tmp_path / name, scene(300, degree), SceneHeader(settings={"antialias": True}), **options)
    ours, _ = io.load(tmp_path / name)
    theirs, _ = io.load(transform(tmp_path / name, tmp_path / "theirs.ply"))
    assert (len(theirs), theirs.sh_degree) == (300, degree)
    found = differences(ours, theirs)
    limits = CLOSE | ({"angle": 0.02} if name == "s.splat" else {})     # it takes the 8 bits of a quaternion for 255 steps, their inventor for 256
    assert all(found[key] <= limit for key, limit in limits.items()), found


@pytest.mark.parametrize(("target", "degree"), [("s.compressed.ply", 2), ("s.sog", 0), ("meta.json", 0), ("s.glb", 2)])     # it needs a graphics card for a SOG with more SH
def test_a_file_of_its_own_means_the_same_to_us(tmp_path, transform, target, degree):
    io.save(tmp_path / "a.ply", scene(2000, degree))
    ours, _ = io.load(transform(tmp_path / "a.ply", tmp_path / target))
    if target == "s.glb":       # it does not read them
        found = differences(scene(2000, degree).rows(slice(300)), ours)
    else:
        found = differences(ours.rows(slice(300)), io.load(transform(tmp_path / target, tmp_path / "theirs.ply"))[0])
    assert all(found[key] <= limit for key, limit in CLOSE.items()), found
