"""Set up and run, with nothing but Python: `python3 scripts/run.py demo` or `python3 scripts/run.py test`, further arguments are passed on.

Uses the virtual environment it runs in, else makes .venv beside the project. Installs when something that decides the install has
changed since, so a second call starts at once. uv is used where it is present (it picks the right torch), else pip.
"""
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"demo": "", "test": "[dev]"}


def stamp():
    """Hash of everything that decides what an install does."""
    build = [*map(os.environ.get, ("CXX", "CUDACXX", "SPLATKIT_NATIVE", "SPLATKIT_CUDA_ARCHS")), *map(shutil.which, ("g++", "clang++", "nvcc", "nvidia-smi"))]
    digest = hashlib.sha256(repr((str(ROOT), build)).encode())
    native = (p for p in (ROOT / "cuda").rglob("*") if p.is_file())
    for path in [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "constraints.txt", *sorted(native)]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def install(python, extras):
    """Installs the project into the environment of `python`, in editable mode."""
    what = ["-c", "constraints.txt", "-e", "." + extras]
    by_uv = [shutil.which("uv"), "pip", "install", "--python", str(python), "--torch-backend=auto", *what]
    by_pip = [str(python), "-m", "pip", "install", "-q", "--no-compile", *what]     # to bytecode: 40 s, of which imports need 1
    if not by_uv[0] or subprocess.call(by_uv, cwd=ROOT) != 0:
        if by_uv[0]:
            print("run.py: uv could not install; trying pip", flush=True)
        if subprocess.call(by_pip, cwd=ROOT) != 0:
            sys.exit("run.py: the install failed; the lines above say why")


def main():
    if sys.version_info < (3, 11):
        sys.exit("run.py: this is Python %d.%d; splatkit needs 3.11 or newer, e.g. python3.11 scripts/run.py" % sys.version_info[:2])
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb not in EXTRAS:
        sys.exit(f"usage: python3 scripts/run.py {'|'.join(EXTRAS)} [arguments]")
    active = sys.prefix != sys.base_prefix
    prefix = Path(sys.prefix) if active else ROOT / ".venv"
    bin_ = prefix / ("Scripts" if os.name == "nt" else "bin")
    python, now = bin_ / "python", stamp()

    # One stamp per set of extras: the file's content is what was installed. [dev] is more than the demo needs, so it serves both.
    files = {extras: prefix / f".splatkit{extras.strip('[]') and '-' + extras.strip('[]')}" for extras in EXTRAS.values()}
    done = [extras for extras, file in files.items() if file.exists() and file.read_text() == now]
    built = (ROOT / "splatkit" / "_native" / "build.json").exists()
    if not built or (EXTRAS[verb] not in done and "[dev]" not in done):
        if not active:
            print(f"run.py: setting up {prefix} (minutes, once)", flush=True)
            if subprocess.call([sys.executable, "-m", "venv", str(prefix)]) != 0:
                sys.exit("run.py: no virtual environment could be made; on Debian: apt install python3-venv")
        install(python, EXTRAS[verb])
        files[EXTRAS[verb]].write_text(now)
    # A process per core, of one thread each: many tests are of one thread or of another program, and threads that wait for each other on
    # a busy core take ten times as long as one. Whoever has no test left takes half of what another has: files differ too much in length.
    workers = str(min(os.cpu_count() or 1, 8))
    if verb == "test":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = {"demo": [str(bin_ / "splatkit"), "demo"], "test": [str(python), "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal"]}[verb] + sys.argv[2:]
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
