"""A scene as bytes: what an independent reader gets back, how far it may be off, and what becomes of values that no renderer can use."""
import math

import numpy as np
import pytest
import torch
import unwire

from splatkit import Scene, native, render, wire
from splatkit.camera import Cameras, look_at


def scene_of(n: int, sh_degree: int = 3, channels: int | None = None, seed: int = 0) -> Scene:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    return Scene(r(n, 3) * 2, r(n, 4), r(n, 3) * 0.5 - 3, r(n) * 3, r(n, (sh_degree + 1) ** 2, 3) * 0.3, None if channels is None else r(n, channels) * 5 + 1)


def worst(read: list, expected: torch.Tensor) -> torch.Tensor:
    """Largest error by column."""
    return (torch.tensor(read, dtype=torch.float64) - expected.double()).abs().amax(0)


def spread(x: torch.Tensor) -> torch.Tensor:
    return (x.amax(0) - x.amin(0)).double()


def test_means_scales_and_colours_come_back_within_half_a_step_of_their_range():
    scene = scene_of(700)
    rows = unwire.core(wire.core(scene))
    for name, field, most in (("mean", scene.means, 65535), ("log_scale", scene.log_scales, 255), ("sh0", scene.sh[:, 0], 255)):
        # Beside the half step float32 rounds x - low and the sum in the reader.
        assert (worst([r[name] for r in rows], field) <= spread(field) * (0.5 / most + 2e-6)).all(), name


def test_opacities_come_back_within_half_a_step_and_stay_finite_logits():
    scene = scene_of(500).replace(logit_opacities=torch.cat([torch.linspace(-12, 12, 498), torch.tensor([-80.0, 80.0])]))
    read = torch.tensor([r["opacity"] for r in unwire.core(wire.core(scene))], dtype=torch.float64)
    assert (read - scene.logit_opacities.double().sigmoid()).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.logit(read).isfinite().all()


def test_rotations_of_any_length_and_sign_come_back_within_a_step_of_ten_bits():
    g = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(400, 4, generator=g, dtype=torch.float64), dim=1)
    axes = torch.eye(4, dtype=torch.float64)
    directions = torch.cat([directions, axes, -axes, torch.full((1, 4), 0.5, dtype=torch.float64), torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64)])
    lengths = torch.logspace(-30, 30, len(directions), dtype=torch.float64)[torch.randperm(len(directions), generator=g)]
    scene = scene_of(len(directions)).replace(quats=(directions * lengths[:, None]).float())
    read = torch.tensor([r["quat"] for r in unwire.core(wire.core(scene))], dtype=torch.float64)
    assert (read.norm(dim=1) - 1).abs().max() < 1e-12
    # q and -q are one rotation. Three components off by half of sqrt(2) / 1023, and the fourth by at most the sum of theirs.
    cosine = (read * directions).sum(1).abs().clamp(max=1)
    assert torch.arccos(cosine).max() < 3 * 0.5 * math.sqrt(2) / 1023


def test_a_zero_quaternion_is_the_identity():
    row, = unwire.core(wire.core(scene_of(1).replace(quats=torch.zeros(1, 4))))
    assert np.allclose(row["quat"], [1, 0, 0, 0], atol=1e-3)


def test_equal_values_come_back_exactly():
    scene = scene_of(3).map(lambda x: x[:1].repeat(3, *[1] * (x.ndim - 1)))
    rows = unwire.core(wire.core(scene))
    for name, field in (("mean", scene.means), ("log_scale", scene.log_scales), ("sh0", scene.sh[:, 0])):
        assert torch.equal(torch.tensor([r[name] for r in rows]), field)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_higher_bands_come_back_within_half_a_step_in_the_order_of_the_scene(degree):
    scene = scene_of(300, degree)
    rest = scene.sh[:, 1:].reshape(300, -1)
    read = unwire.ranged(wire.sh(scene), b"SKH1")
    assert len(read) == 300 and len(read[0]) == 3 * ((degree + 1) ** 2 - 1)
    if degree:
        assert (worst(read, rest) <= spread(rest) * (0.5 / 255 + 1e-6)).all()


@pytest.mark.parametrize("channels", [1, 5, 64])
def test_features_come_back_within_half_a_step_of_each_channel(channels):
    scene = scene_of(200, channels=channels)
    scene.features[:, 0] = 7.25
    read = unwire.features(wire.features(scene))
    assert (worst(read, scene.features) <= spread(scene.features) * 0.5 / 254 + 2e-6).all()
    assert all(row[0] == 7.25 for row in read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_float32_plane_is_the_scene_itself(dtype):
    scene = scene_of(40, 2)
    read = unwire.float32(wire.float32(scene.to(dtype=dtype)))
    for name, x in read.items():
        assert torch.equal(torch.tensor(x), scene.fields()[name].flatten())


def test_heat_comes_back_within_half_a_step():
    values = np.random.default_rng(0).normal(size=(90, 2)).astype(np.float32)
    assert (worst(unwire.ranged(wire.heat(values), b"SKT1"), torch.from_numpy(values)) <= spread(torch.from_numpy(values)) * (0.5 / 255 + 1e-6)).all()


@pytest.mark.parametrize("plane", ["core", "sh", "features", "float32"])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_a_plane_is_as_long_as_was_said_before_it_was_made(plane, n):
    scene = scene_of(n, 2, 7)
    assert len(wire.ENCODERS[plane](scene)) == wire.size_of(plane, n, 9, 7)


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("field", ["means", "quats", "log_scales", "logit_opacities", "sh"])
def test_a_row_that_is_not_finite_becomes_transparent_and_harms_no_other(field, bad):
    scene = scene_of(50)
    hurt = scene.clone()
    hurt.fields()[field].view(50, -1)[[0, 20], 0] = bad
    kept = [i for i in range(50) if i not in (0, 20)]
    rows, rest = unwire.core(wire.core(hurt)), unwire.ranged(wire.sh(hurt), b"SKH1")
    expected = unwire.core(wire.core(scene.rows(torch.tensor(kept))))
    assert all(math.isfinite(v) for row in rows for value in row.values() for v in (value if isinstance(value, list) else [value]))
    assert rows[0]["opacity"] < 1 / 255 and rows[20]["opacity"] < 1 / 255
    assert [rows[i] for i in kept] == expected
    assert np.isfinite(rest).all()


def test_values_at_the_end_of_float32_stay_finite():
    scene = scene_of(6, channels=2)
    for field in scene.fields().values():
        field.view(6, -1)[0, 0], field.view(6, -1)[1, 0] = 3e38, -3e38
    rows = unwire.core(wire.core(scene))
    assert all(math.isfinite(v) for row in rows for name in ("mean", "log_scale", "sh0", "quat") for v in row[name])
    assert max(r["log_scale"][0] for r in rows) == 30       # where scales are clamped wherever they are used
    assert np.isfinite(unwire.ranged(wire.sh(scene), b"SKH1")).all() and np.isfinite(unwire.features(wire.features(scene))).all()


def test_only_rows_that_are_not_finite_still_make_a_chunk():
    rows = unwire.core(wire.core(scene_of(4).map(lambda x: torch.full_like(x, math.nan))))
    assert len(rows) == 4 and all(math.isfinite(v) for row in rows for v in row["mean"])


# ---- by the native library and by numpy


@pytest.fixture(params=[*native.ISAS, "f64"])
def encoder(request, monkeypatch):
    """Scenes for one native library, which wire is to use."""
    name = f"cpu_{request.param}"
    if reason := native.available()[name]:
        pytest.skip(reason)
    monkeypatch.setenv("SPLATKIT_ISA", native.ISAS[-1] if request.param == "f64" else request.param)
    return lambda scene: scene.to(dtype=torch.float64) if request.param == "f64" else scene


def numbers(plane: bytes) -> tuple[bytes, np.ndarray]:
    """Everything before the records, and the whole numbers in them, row by row."""
    records = np.frombuffer(plane, wire.RECORD, offset=88)
    rotation = [records["rotation"] >> 30, *(records["rotation"] >> shift & 1023 for shift in (20, 10, 0))]
    return bytes(plane[:88]), np.column_stack([records["mean"], records["log_scale"], *rotation, records["opacity"], records["sh0"]]).astype(int)


def assert_alike(scene: Scene) -> None:
    planes = wire.cores(scene)
    assert len(planes) == -(-len(scene) // wire.CHUNK)
    for k in range(len(planes)):
        (header, ours), (expected, theirs) = numbers(planes[k]), numbers(wire._core(scene.rows(slice(k * wire.CHUNK, (k + 1) * wire.CHUNK))))
        # exp and a normalisation may round their last bit otherwise.
        assert header == expected and abs(ours - theirs).max() <= 1 and (ours != theirs).mean() <= 1e-3, k


@pytest.mark.parametrize("n, degree", [(0, 0), (1, 0), (2, 3), (15, 1), (16, 2), (17, 3), (wire.CHUNK, 0), (wire.CHUNK + 1, 2)])
def test_the_native_library_writes_what_numpy_writes(encoder, n, degree):
    assert_alike(encoder(scene_of(n, degree)))


EXTREMES = {"equal rows": lambda s: s.map(lambda x: x[:1].expand_as(x).clone()), "zeros": lambda s: s.map(torch.zeros_like), "zero quaternions": lambda s: s.replace(quats=s.quats * 0),
            "axes": lambda s: s.replace(quats=torch.eye(4).repeat(len(s) // 4 + 1, 1)[:len(s)] * torch.tensor([1.0, -1, 1, -1])), "equal components": lambda s: s.replace(quats=s.quats.sign()),
            "quaternions of all lengths": lambda s: s.replace(quats=s.quats * torch.logspace(-30, 28, len(s))[:, None]),
            "scales beyond where they are clamped": lambda s: s.replace(log_scales=s.log_scales * 50), "logits of 200": lambda s: s.replace(logit_opacities=s.logit_opacities.sign() * 200),
            "values of 1e30": lambda s: s.replace(means=s.means.sign() * 1e30, sh=s.sh.sign() * 1e30), "a range that float32 hardly has": lambda s: s.replace(means=s.means.sign() * 1e-37)}


@pytest.mark.parametrize("what", EXTREMES)
def test_the_native_library_writes_what_numpy_writes_of_extremes(encoder, what):
    assert_alike(encoder(EXTREMES[what](scene_of(300, 1))))


@pytest.mark.parametrize("field", ["means", "quats", "log_scales", "logit_opacities", "sh"])
def test_a_chunk_with_what_is_not_finite_or_huge_is_numpy_s(encoder, field):
    scene = encoder(scene_of(40))
    plain = wire.core(scene)
    for row, bad in enumerate([*BAD, 1e31, -1e31] if field != "log_scales" else BAD):
        hurt = scene.clone()
        values = hurt.fields()[field].view(40, -1)
        values[7 * row, row % min(3, values.shape[1])] = bad
        assert wire.core(hurt) == wire._core(hurt) != plain


def test_a_chunk_that_is_not_finite_changes_no_other(encoder):
    scene = encoder(scene_of(wire.CHUNK + 40, 0))
    first, second = map(bytes, map(wire.cores(scene).__getitem__, (0, 1)))
    scene.means[wire.CHUNK + 9, 1] = math.nan
    planes = wire.cores(scene)
    assert planes[0] == first and planes[1] == wire._core(scene.rows(slice(wire.CHUNK, None))) != second


def test_higher_bands_do_not_matter_to_the_core_plane(encoder):
    scene = encoder(scene_of(40))
    plane = wire.core(scene)
    scene.sh[:, 1:] = math.nan
    assert wire.core(scene) == plane


def test_without_a_native_library_numpy_writes_all_chunks(without_native):
    scene = scene_of(wire.CHUNK + 3, 0)
    assert [bytes(plane) for plane in wire.cores(scene)] == [wire._core(scene.rows(rows)) for rows in (slice(0, wire.CHUNK), slice(wire.CHUNK, None))]


def test_chunks_that_do_not_fit_are_refused(native_dtype):
    scene, lib = scene_of(5, 0).to(dtype=native_dtype), native.cpu_library(native_dtype)
    fields = (scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh)
    for bands, rows, words in ((1, 5, 43), (0, 5, 44), (1, 0, 44), (1, -1, 44)):
        with pytest.raises(RuntimeError, match="sk_pack_core: chunks of .* do not fit"):
            lib.sk_pack_core(5, bands, *fields, rows, words, torch.zeros(1, words, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), None)


def test_the_picture_of_what_was_read_is_that_of_the_scene():
    """To 55 dB, with all bands: what the live view promises."""
    scene = scene_of(3000, seed=5)
    scene = scene.replace(sh=scene.sh * 0.3, log_scales=scene.log_scales + 0.5)
    rows, rest = unwire.core(wire.core(scene)), unwire.ranged(wire.sh(scene), b"SKH1")
    column = lambda name: torch.tensor([r[name] for r in rows], dtype=torch.float32)
    read = Scene(column("mean"), column("quat"), column("log_scale"), torch.logit(column("opacity")),
                 torch.cat([column("sh0")[:, None], torch.tensor(rest).view(3000, 15, 3)], dim=1))
    view = Cameras(look_at(torch.tensor([0.0, 0, -8]), torch.zeros(3), torch.tensor([0.0, -1, 0]))[None], torch.tensor([[[200.0, 0, 80], [0, 200, 60], [0, 0, 1]]]), 160, 120)
    mse = (render(scene, view).color - render(read, view).color).square().mean()
    assert -10 * torch.log10(mse) > 55


def test_the_basis_of_features_is_the_one_that_varies_most_and_orthonormal():
    g = torch.Generator().manual_seed(1)
    along = torch.randn(5000, 3, generator=g, dtype=torch.float64) * torch.tensor([9.0, 4.0, 2.0])
    directions = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q[:3]
    x = along @ directions + 3 + 0.01 * torch.randn(5000, 12, generator=g, dtype=torch.float64)
    found = wire.pca(x.float().numpy(), np.ones(5000, np.float32))
    basis = torch.tensor(found["basis"], dtype=torch.float64)
    assert ((basis @ directions.T).abs() - torch.eye(3)).abs().max() < 0.05
    assert (basis @ basis.T - torch.eye(3)).abs().max() < 1e-6
    assert np.allclose(found["mean"], x.mean(0), atol=1e-3)
    projected = (x - x.mean(0)) @ basis.T
    inside = (projected >= torch.tensor(found["low"])) & (projected <= torch.tensor(found["high"]))
    assert ((inside.double().mean(0) - 0.98).abs() < 0.002).all()


def test_what_is_transparent_does_not_turn_the_basis():
    g = np.random.default_rng(2)
    x = np.concatenate([g.normal(size=(500, 4)) * [5, 1, 0.5, 0.1], g.normal(size=(500, 4)) * [0.1, 0.5, 1, 500]]).astype(np.float32)
    basis = np.array(wire.pca(x, np.repeat([1, 1e-9], 500).astype(np.float32))["basis"])
    assert abs(basis[0, 0]) > 0.99


@pytest.mark.parametrize("n, channels", [(0, 5), (1, 5), (100, 1), (100, 2)])
def test_a_basis_exists_for_few_rows_and_channels(n, channels):
    found = wire.pca(np.ones((n, channels), np.float32), np.ones(n, np.float32))
    assert np.shape(found["basis"]) == (3, channels) and np.isfinite([*found["low"], *found["high"]]).all() and np.isfinite(found["basis"]).all()


def test_a_message_says_which_plane_of_which_chunk_it_is():
    meta, data = unwire.message(wire.message("sh", 3, 17, 2, 40, b"abc"))
    assert meta == {"frame": 2, "chunk": 3, "version": 17, "revision": 40, "plane": 1} and data == b"abc"


def test_a_container_holds_manifest_and_planes_in_order():
    manifest, planes = unwire.container(wire.container({"name": "</script>\u2028é"}, iter([b"core0", b"", b"core1"])))
    assert manifest == {"name": "</script>\u2028é"} and planes == [b"core0", b"", b"core1"]
