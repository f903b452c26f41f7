"""The command line: order of settings, exit codes, doctor, progress."""
import io
import subprocess
import sys
from pathlib import Path

import pytest

from splatkit import config, native
from splatkit.cli import VERBS, Progress, main
from splatkit.errors import BadConfig

REPO = Path(__file__).resolve().parent.parent


def test_importing_splatkit_and_its_help_does_not_import_torch():
    check = ("import sys, splatkit.cli\ntry: splatkit.cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
             "print('torch' in sys.modules, 'numpy' in sys.modules)")
    for arguments in (["--help"], ["reconstruct", "--help"], ["lift", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", check, *arguments], capture_output=True, text=True, cwd=REPO, timeout=120)
        assert done.stdout.splitlines()[-1] == "False False", done.stderr


@pytest.fixture
def reconstructed(monkeypatch):
    """The configs that the reconstruct verb was called with."""
    configs = []
    stub = type(sys)("splatkit.reconstruct")
    stub.reconstruct = lambda settings, progress, note: configs.append(settings)
    monkeypatch.setitem(sys.modules, "splatkit.reconstruct", stub)
    return configs


def test_flags_come_after_the_config_file_and_that_after_the_preset(reconstructed, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("steps: 70\nmax_gaussians: 71\nlr:\n  means: 0.5\n")
    assert main(["reconstruct", "photos", "-o", "out", "--preset", "quick", "--config", str(file), "--steps", "72"]) == 0
    got, = reconstructed
    assert (got.data, got.output, got.steps, got.max_gaussians, got.lr.means) == (Path("photos"), Path("out"), 72, 71, 0.5)
    assert got.downscale == config.load_yaml(config.preset("reconstruct", "quick"), config.Reconstruct(Path("x"))).downscale != 1


def test_a_saved_config_is_enough_to_repeat_a_run(reconstructed, tmp_path):
    config.save(config.Reconstruct(Path("photos"), Path("out"), steps=3), tmp_path / "config.yaml")
    assert main(["reconstruct", "--config", str(tmp_path / "config.yaml")]) == 0
    assert reconstructed == [config.Reconstruct(Path("photos"), Path("out"), steps=3)]


@pytest.mark.parametrize("error", [BadConfig("what\n why"), ValueError("what why"), TypeError("what why"), FileNotFoundError("what why")])
def test_wrong_input_is_one_line_and_exit_code_2(error, reconstructed, monkeypatch, capsys):
    def fail(settings, progress, note):
        raise error
    monkeypatch.setattr(sys.modules["splatkit.reconstruct"], "reconstruct", fail)
    monkeypatch.delenv("SPLATKIT_DEBUG", raising=False)
    assert main(["reconstruct", "photos"]) == 2
    assert capsys.readouterr().err == "splatkit: what why\n"
    monkeypatch.setenv("SPLATKIT_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["reconstruct", "photos"])


def test_ctrl_c_is_exit_code_130(reconstructed, monkeypatch, capsys):
    def stop(settings, progress, note):
        raise KeyboardInterrupt
    monkeypatch.setattr(sys.modules["splatkit.reconstruct"], "reconstruct", stop)
    assert main(["reconstruct", "photos"]) == 130
    assert capsys.readouterr().err.strip() == "splatkit: interrupted"


@pytest.mark.parametrize("arguments", ["reconstruct", "reconstruct photos --stepps 3", "reconstruct photos --steps x", "eval"])
def test_wrong_flags_are_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2 and capsys.readouterr().err


def test_an_unknown_verb_lists_the_known_ones(capsys):
    assert main(["paint"]) == 2
    assert capsys.readouterr().err == f"splatkit: 'paint' is not a verb; known: {', '.join(VERBS)}\n" and {"reconstruct", "lift", "demo"} <= VERBS.keys()


def test_doctor_names_every_library_and_backend(capsys):
    assert main(["doctor"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    first_words = {line.split()[0] for line in lines}
    assert first_words >= {"splatkit", "python", "torch", "processor", "compilers", *native.NAMES, "reference", "cpu", "cuda", "gsplat", "sfm", "video", "heic"}


def test_progress_prints_a_line_about_every_five_seconds_into_a_file():
    now, out = [0.0], io.StringIO()
    progress = Progress(100, out, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.25
        progress(step, 1234, psnr=20.0)
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["20/100", "40/100", "60/100", "80/100", "100/100"]
    assert lines[1] == "step 40/100  psnr 20  1,234 Gaussians  4.0 it/s  0:15 left"


def test_progress_redraws_one_line_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    now, out = [0.0], Terminal()
    progress = Progress(2, out, clock=lambda: now[0])
    for step in (1, 2):
        now[0] += 1
        progress(step, 5)
    progress.close()
    assert out.getvalue().count("\r\x1b[K") == 2 and out.getvalue().endswith("left\n") and out.getvalue().count("\n") == 1
