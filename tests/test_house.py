"""The house itself: imports point down, pages stay short, public names exist."""
import ast
import graphlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch

import splatkit

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "splatkit"
FLOORS = [      # imports point down or stay on their floor
    {"scene", "header", "camera", "capture", "errors", "config", "native", "_compat", "constants", "progress", "processes"},
    {"raster", "io"},
    {"wire", "optim", "adc", "density", "metrics", "lpips", "exposure", "poses", "rooms", "paths", "film", "views", "convert"},
    {"growth", "shard", "looking", "adapters", "sampling"},
    {"compress", "mesh"},
    {"fit", "initial"},
    {"reconstruct", "evaluation", "sfm", "sfm_worker"},
    {"lift"},
    {"distill"},
    {"gate", "page"},
    {"shown"},
    {"clients", "live"},
    {"serve", "doctor"},
    {"view", "distill_view"},
    {"verbs"},
    {"cli_files", "training"},
    {"cli_distill"},
    {"cli"},
]
PAGES = sorted(p for p in PACKAGE.rglob("*.py"))
ids = lambda p: p.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The top-level modules of splatkit that a page imports, inside functions too."""
    package = ("splatkit", *path.relative_to(PACKAGE).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            names |= {f"{source}.{a.name}" for a in node.names}
    known = set().union(*FLOORS)
    return {n.split(".")[1] for n in names if n.startswith("splatkit.") and n.split(".")[1] in known} - {room_of(path)}


@pytest.mark.parametrize("page", [p for p in PAGES if room_of(p) != "__init__"], ids=ids)
def test_imports_point_only_down(page):
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    assert room_of(page) in floor, "a new module needs a place in FLOORS"
    above = {room for room in imported_rooms(page) if floor[room] > floor[room_of(page)]}
    assert not above, f"{ids(page)} imports {above} from a floor above"


def test_rooms_do_not_import_each_other_in_a_circle():
    graph = {}
    for page in PAGES:
        if room_of(page) != "__init__":
            graph.setdefault(room_of(page), set()).update(imported_rooms(page))
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_page_stays_short_and_says_what_it_is(page):
    text = page.read_text()
    assert len(text.splitlines()) <= 400, "a longer file is asking for a second room"
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("name", splatkit.__all__)
def test_a_public_name_exists_and_is_documented(name):
    assert getattr(splatkit, name).__doc__ and name in dir(splatkit)


def test_public_names_are_the_same_for_type_checkers():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {a.name for node in block.body for a in node.names} == set(splatkit.__all__)
    assert {n for names in splatkit._HOME.values() for n in names} | {"io"} == set(splatkit.__all__)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Sceen'"):
        _ = splatkit.Sceen


def test_shape_annotations_are_enforced_in_this_run():
    with pytest.raises(Exception, match="(?i)type|shape"):
        importlib.import_module("splatkit.scene").quat_from_matrix(torch.zeros(2, 3))


def test_presets_and_header_are_reached_through_committed_links():
    for link, target in (("configs", "../configs"), ("include", "../cuda/include")):
        assert os.readlink(PACKAGE / link) == target
        assert (PACKAGE / link).is_dir()


@pytest.mark.parametrize("script", sorted(Path(__file__).parent.parent.glob("scripts/**/*.py")), ids=lambda path: path.name)
def test_what_a_script_takes_from_splatkit_is_there(script):
    taken = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "splatkit"]
    for node in taken:
        module = importlib.import_module(node.module)
        for name in node.names:
            assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), f"{node.module}.{name.name}, line {node.lineno}"
