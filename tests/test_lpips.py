"""LPIPS: against the published networks layer by layer in double, the layouts of weights that are read, and those that are refused."""
import importlib.util
import re

import pytest
import safetensors.torch
import torch
from perceptual import PUBLISHED, packaged, published, random_state, write
from torch import nn

from splatkit import _compat, lpips
from splatkit.errors import BadFile

NETS = pytest.mark.parametrize("net", ["alex", "vgg"])


@pytest.fixture(scope="module")
def states() -> dict[str, tuple[dict, dict]]:
    return {net: random_state(net) for net in PUBLISHED}


def pictures(height: int, width: int):
    g = torch.Generator().manual_seed(1)
    target = torch.rand(height, width, 3, generator=g, dtype=torch.float64)
    return (target + 0.2 * torch.randn(height, width, 3, generator=g, dtype=torch.float64)).clamp(0, 1), target


def by_the_paper(net: str, backbone: dict, heads: dict, image, target) -> float:
    """Equation 1 of Zhang et al. 2018 for pictures in [-1, 1], scaled as version 0.1 does, pixel sums written out."""
    network = published(net).double()
    network.load_state_dict({name.removeprefix("features."): x for name, x in backbone.items()})
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    a, b = (((x * 2 - 1 - shift) / scale).permute(2, 0, 1)[None] for x in (image, target))
    total = 0.0
    with torch.no_grad():
        for number, layer in enumerate(network):
            a, b = layer(a), layer(b)
            if number in PUBLISHED[net][2]:
                w = heads[f"lin{PUBLISHED[net][2].index(number)}.model.1.weight"].double().flatten()
                difference = nn.functional.normalize(a[0].flatten(1), dim=0) - nn.functional.normalize(b[0].flatten(1), dim=0)
                total += float(torch.einsum("c,cp->p", w, difference ** 2).mean())
                if number == PUBLISHED[net][2][-1]:
                    break       # what comes after is for the classifier
    return total


@pytest.mark.parametrize("net, height, width", [("alex", 31, 31), ("alex", 45, 70), ("vgg", 33, 40)])
def test_distance_is_that_of_the_published_network(net, height, width, states, tmp_path):
    weights = lpips.load([write(tmp_path / "all.pth", *states[net])])
    image, target = pictures(height, width)
    expected = by_the_paper(net, *states[net], image, target)
    assert weights.net == net and expected > 0.01
    assert lpips.distance(image, target, weights).item() == pytest.approx(expected, rel=1e-6)       # shift and scale are rounded to float32 there
    assert lpips.distance(image.float(), target.float(), weights).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@NETS
def test_distance_is_that_of_the_lpips_package(net, tmp_path):
    if importlib.util.find_spec("lpips"):
        _compat.torchvision()       # which it imports
    package = pytest.importorskip("lpips", reason="the package lpips is the oracle here")
    torch.manual_seed(0)
    theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    image, target = (x.float() for x in pictures(64, 97))
    with torch.no_grad():
        expected = theirs(*(x.permute(2, 0, 1)[None] for x in (image, target)), normalize=True).item()
    assert lpips.distance(image, target, lpips.load([write(tmp_path / "all.pth", theirs.state_dict())])).item() == pytest.approx(expected, rel=1e-5)


def test_distance_of_a_picture_to_itself_is_zero_and_does_not_depend_on_the_order(states, tmp_path):
    weights = lpips.load([write(tmp_path / "all.pth", *states["alex"])])
    image, target = pictures(40, 40)
    assert lpips.distance(image, image, weights).item() == pytest.approx(0, abs=1e-20)
    assert lpips.distance(image, target, weights).item() == pytest.approx(lpips.distance(target, image, weights).item(), rel=1e-12)


@NETS
def test_every_layout_of_the_same_weights_reads_alike(net, states, tmp_path):
    backbone, heads = states[net]
    classifier = {"classifier.6.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(2)}
    safetensors.torch.save_file(backbone | heads, tmp_path / "all.safetensors")
    torch.save(heads, tmp_path / "heads.pth", _use_new_zipfile_serialization=False)      # as the package's own are stored
    layouts = [[write(tmp_path / "package.pth", packaged(net, backbone, heads))], [tmp_path / "all.safetensors"],
               [tmp_path / "heads.pth", write(tmp_path / "backbone.pth", backbone, classifier)]]
    for files in layouts:
        read = lpips.load(files)
        assert read.net == net and set(read.tensors) == set(backbone) | {f"lin{k}" for k in range(5)}
        assert all(torch.equal(read.tensors[name], x) for name, x in backbone.items())
        assert all(torch.equal(read.tensors[f"lin{k}"], heads[f"lin{k}.model.1.weight"]) for k in range(5))


@NETS
def test_a_picture_too_small_for_the_backbone_is_refused_and_the_smallest_is_not(net, states, tmp_path):
    weights, side = lpips.load([write(tmp_path / "all.pth", *states[net])]), {"alex": 31, "vgg": 16}[net]
    assert lpips.distance(*pictures(side, side), weights).item() > 0
    with pytest.raises(ValueError, match=rf"a picture of 40x{side - 1} is too small .* needs {side} pixels"):
        lpips.distance(*pictures(side - 1, 40), weights)


@pytest.mark.parametrize("change, key, why", [
    (lambda s: s.pop("features.8.bias"), "features.8.bias", "is missing"),
    (lambda s: s.pop("features.0.weight"), "features.0.weight", "is missing"),
    (lambda s: s.pop("lin3.model.1.weight"), "lin3.model.1.weight", "is missing"),
    (lambda s: s.update({"features.3.weight": torch.zeros(192, 64, 3, 3)}), "features.3.weight", r"is \[192, 64, 3, 3\]; expected \[192, 64, 5, 5\]"),
    (lambda s: s.update({"features.0.weight": torch.zeros(96, 3, 11, 11)}), "features.0.weight", r"expected alex's .* or vgg's"),
    (lambda s: s.update({"lin5.model.1.weight": torch.zeros(1, 2, 1, 1)}), "lin5", "does not belong to alex"),
    (lambda s: s.update({"features.1.running_mean": torch.zeros(64)}), "features.1.running_mean", "is no weight of LPIPS"),
    (lambda s: s.update({"lins.0.model.1.weight": torch.zeros(1, 64, 1, 1)}), "lins.0.model.1.weight", "there twice"),
    (lambda s: s["lin0.model.1.weight"].fill_(float("nan")), "lin0.model.1.weight", "NaN"),
    (lambda s: s.update({"features.0.bias": torch.zeros(64, dtype=torch.int64)}), "features.0.bias", "int64"),
], ids=["no bias", "no backbone", "no head", "another shape", "another net", "a sixth head", "batch norm", "two values", "NaN", "integers"])
def test_weights_that_cannot_be_used_are_refused_by_key(change, key, why, states, tmp_path):
    state = {name: x.clone() for part in states["alex"] for name, x in part.items()}
    change(state)
    with pytest.raises(BadFile, match=rf"all\.pth: {re.escape(key)}: .*{why}"):
        lpips.load([write(tmp_path / "all.pth", state)])


class Harm:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("name, content", [("a.pth", b""), ("a.pth", b"nonsense"), ("a.safetensors", b"\xff" * 40), ("a.pth", {"x": Harm()}), ("a.pth", [torch.zeros(2)]),
                                           ("a.pth", {"features": {"0.weight": torch.zeros(2)}})], ids=["empty", "noise", "noise safetensors", "code", "a list", "nested"])
def test_files_that_hold_no_tensors_alone_are_refused(name, content, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(BadFile, match=name) as refused:
        lpips.load([tmp_path / name])
    assert "\n" not in str(refused.value) and not capsys.readouterr().out


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadFile, match="no such file"):
        lpips.load([tmp_path / "absent.pth"])
