"""For every test: splatkit's shape annotations are enforced, and the fixtures that stand for what a machine may lack."""
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from jaxtyping import config, install_import_hook

# Before the first import of splatkit. Users pay nothing for the annotations; here every call is checked against them. As for every
# type checker an int is a float (PEP 484).
HOOK = install_import_hook("splatkit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real photos and scenes beside the project, or where SPLATKIT_DATA says."""
    folder = Path(os.environ.get("SPLATKIT_DATA") or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (SPLATKIT_DATA names another folder)")
    return folder


@pytest.fixture(scope="session")
def once_per_run(tmp_path_factory):
    """`once_per_run(name, fill)`: a folder that `fill(folder)` has filled, in one of the processes that share out the tests; none may change it after."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name, fill):
        place, filled = root / name, root / f"{name}.filled"
        with FileLock(root / f"{name}.lock"):
            if not filled.exists():
                shutil.rmtree(place, ignore_errors=True)        # of one that failed
                place.mkdir()
                fill(place)
                filled.touch()
        return place
    return folder


@pytest.fixture(scope="session")
def cpu_library():
    """The float32 CPU library in use."""
    import torch

    from splatkit import BackendUnavailable, native
    try:
        return native.cpu_library(torch.float32)
    except BackendUnavailable as why:
        pytest.skip(str(why))


@pytest.fixture(params=["float32", "float64"], ids=["float", "double"])
def native_dtype(request):
    """Each dtype that has a native library here."""
    import torch

    from splatkit import BackendUnavailable, native
    dtype = getattr(torch, request.param)
    try:
        native.cpu_library(dtype)
    except BackendUnavailable as why:
        pytest.skip(str(why))
    return dtype


@pytest.fixture(scope="module")
def one_thread():
    """One thread of torch: for small tensors, of which more threads only wait for each other, on a busy machine for long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked():
    """Without the checks of annotations, four fifths of the time of a step on a small scene: for runs of hundreds of steps, whose every call shorter runs check."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium for the pages of `splatkit view`."""
    import chromium
    if reason := chromium.missing():
        pytest.skip(reason)
    browser = chromium.Browser()
    yield browser
    browser.quit()


@pytest.fixture
def without_native(monkeypatch):
    """Everything that may use the native library takes its torch path."""
    from splatkit import native
    monkeypatch.setattr(native, "library_for", lambda x: None)


def pytest_collection_modifyitems(items):
    import torch
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
