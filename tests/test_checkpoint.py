"""Checkpoints: what comes back, what is refused, that a save may be stopped anywhere, and that one process holds a run folder."""
import builtins
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from mutants import mutants

from splatkit.errors import BadFile
from splatkit.io import atomic, checkpoint
from splatkit.io.checkpoint import load, lock, save

REPO = Path(__file__).resolve().parent.parent
V1 = REPO / "tests" / "data" / "checkpoint-v1"


def state(step: int) -> dict[str, torch.Tensor]:
    """Every tensor tells the step, so a mix of two checkpoints shows; the same bits on every machine, for the file of schema 1."""
    return {"scene.means": torch.full((5, 3), float(step)), "m.sh": (torch.arange(60.0) / (1 + step)).reshape(5, 4, 3),
            "generator": torch.arange(2000).add(step).remainder(251).to(torch.uint8), "steps_taken": torch.tensor(step),
            "visible": torch.arange(9) < step % 9, "empty": torch.zeros(0, 3)}


def values(step: int) -> dict:
    return {"config": {"steps": 30_000, "rate": 1.6e-4, "data": "photos of Zoë"}, "step": step, "order": [2, 0, 1], "best": None}


def assert_same_bits(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(*(x[name].contiguous().flatten().view(torch.uint8) for x in (a, b))), name


def assert_whole(found: checkpoint.Checkpoint | None, *steps: int):
    assert found is not None and found.step in steps
    assert_same_bits(found.tensors, state(found.step))
    assert found.values == values(found.step)


def folder_with(folder: Path, *steps: int) -> Path:
    for step in steps:
        save(folder, step, state(step), values(step))
    return folder


def name_of(step: int) -> str:
    return f"checkpoint-{step:08}.safetensors"


def edited(data: bytes, edit) -> bytes:
    """The file with its header changed by `edit(header)` and the checksum of the header made to fit: what only intent can do."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    edit(header)
    header["__metadata__"]["header_crc32"] = checkpoint._header_crc32(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n:]


def child(program: str, *arguments, **settings) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)], cwd=REPO, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)


def said_by(process: subprocess.Popen) -> list[str]:
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return said.splitlines()


# What comes back

@pytest.mark.parametrize("dtype", checkpoint._DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (0, 3), (3, 0, 2), (5, 4, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, dtype, shape):
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    x = torch.randint(top, (n_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).view(dtype).reshape(shape)
    odd = torch.ones(3, dtype=torch.uint8)      # would push what follows out of alignment
    save(tmp_path, 1, {"x": x, "a": odd, "z": odd}, {})
    assert_same_bits(load(tmp_path, pytest.fail).tensors, {"x": x, "a": odd, "z": odd})


@pytest.mark.parametrize("view", [
    lambda x: x.T, lambda x: x[::2, 1:], lambda x: x[0].expand(9, 4), lambda x: x.conj(), lambda x: x.conj().imag, torch.nn.Parameter,
], ids=["transposed", "strided", "expanded", "conjugate", "negated", "parameter"])
def test_views_come_back_as_the_values_they_show(tmp_path, view):
    x = view(torch.randn(6, 4, dtype=torch.complex64))
    save(tmp_path, 1, {"x": x, "same memory": x}, {})
    assert torch.equal(load(tmp_path).tensors["x"], x.detach())


def test_nan_payloads_and_negative_zero_survive(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 1], dtype=torch.int32)
    save(tmp_path, 1, {"x": bits.view(torch.float32)}, {})
    assert torch.equal(load(tmp_path).tensors["x"].view(torch.int32), bits)


def test_a_generator_goes_on_where_it_was_saved(tmp_path):
    generator = torch.Generator().manual_seed(7)
    torch.rand(11, generator=generator)
    save(tmp_path, 11, {"generator": generator.get_state()}, {})
    other = torch.Generator()
    other.set_state(load(tmp_path).tensors["generator"])
    assert torch.equal(torch.randn(50, generator=other), torch.randn(50, generator=generator))


def test_values_and_step_come_back_and_the_path_is_named(tmp_path):
    path = save(tmp_path, 30_000, {}, values(3) | {"big": 2**80, "tiny": 5e-324, "text": "\ud800\n\0 \u2028"})
    found = load(tmp_path, pytest.fail)
    assert (found.step, found.tensors, found.path, path.name) == (30_000, {}, path, "checkpoint-00030000.safetensors")
    assert found.values == values(3) | {"big": 2**80, "tiny": 5e-324, "text": "\ud800\n\0 \u2028"}


def test_a_loaded_checkpoint_does_not_change_with_the_file(tmp_path):
    path = save(tmp_path, 1, state(1), values(1))
    found = load(tmp_path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_whole(found, 1)


def test_the_safetensors_library_reads_the_same(tmp_path):
    from safetensors import safe_open
    tensors = {code: torch.zeros(3, 16, dtype=torch.uint8).view(dtype) for code, dtype in checkpoint._DTYPES.items()} | state(4)
    with safe_open(save(tmp_path, 4, tensors, values(4)), "pt") as file:
        assert_same_bits({name: file.get_tensor(name) for name in file.keys()}, tensors)
        assert file.metadata()["schema"] == "1" and json.loads(file.metadata()["values"]) == values(4)
        assert all(file.get_slice(code).get_dtype() == code for code in checkpoint._DTYPES)


def test_a_checkpoint_of_schema_1_is_read():
    assert_whole(load(V1, pytest.fail), 7)


@pytest.mark.parametrize("change, error, why", [
    (dict(step=-1), ValueError, "step is -1"),
    (dict(step=10**8), ValueError, "0 to 99999999"),
    (dict(values={"loss": float("nan")}), ValueError, "JSON"),
    (dict(values={"path": Path("x")}), TypeError, "JSON"),
    (dict(values={"order": list(range(4_000_000))}), ValueError, "put long lists into tensors"),
    (dict(tensors={"x": torch.zeros(2, dtype=torch.complex128)}), ValueError, "'x'.*complex128"),
    (dict(tensors={"x": torch.eye(2).to_sparse()}), ValueError, "sparse"),
    (dict(tensors={"__metadata__": torch.zeros(2)}), ValueError, "another name"),
], ids=["negative step", "large step", "NaN", "no JSON", "long", "dtype", "sparse", "name"])
def test_what_could_not_be_read_back_is_not_written(tmp_path, change, error, why):
    with pytest.raises(error, match=why):
        save(tmp_path, **(dict(step=1, tensors=state(1), values=values(1)) | change))
    assert not os.listdir(tmp_path)


# Which ones stay, which one is taken

def test_the_two_newest_are_kept(tmp_path):
    folder_with(tmp_path, 1, 2, 10, 300)
    assert sorted(os.listdir(tmp_path)) == [name_of(10), name_of(300)]
    assert_whole(load(tmp_path, pytest.fail), 300)


def test_other_files_are_left_alone_and_what_killed_saves_left_is_removed_by_the_next(tmp_path):
    others = {"config.yaml", "checkpoint-1.safetensors", "checkpoint-00000001.safetensors.bak", ".lock", ".scene.ply.0123abcd.tmp"}
    for name in {*others, f".{name_of(3)}.0123abcd.tmp"}:
        (tmp_path / name).write_bytes(b"x")
    assert load(tmp_path, pytest.fail) is None
    folder_with(tmp_path, 1)
    assert set(os.listdir(tmp_path)) == others | {name_of(1)}


def test_a_run_that_went_back_replaces_the_checkpoints_ahead_of_it(tmp_path):
    folder_with(tmp_path, 10, 20)
    (tmp_path / name_of(20)).write_bytes(b"damaged")
    folder_with(tmp_path, 15)
    assert sorted(os.listdir(tmp_path)) == [name_of(10), name_of(15)]
    assert_whole(load(tmp_path, pytest.fail), 15)


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path):
    assert load(tmp_path) is None and load(tmp_path / "absent") is None


def test_a_file_in_place_of_the_folder_is_a_bad_file(tmp_path):
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(BadFile, match="Not a directory"):
        load(tmp_path / "f")


def set_metadata(key: str, text):
    return lambda data: edited(data, lambda header: header["__metadata__"].update({key: text}))


DAMAGES = {
    "empty": (lambda data: b"", "header claims"),
    "cut in the length": (lambda data: data[:7], "header claims"),
    "cut in the header": (lambda data: data[:100], "header claims"),
    "cut in the data": (lambda data: data[:-1], "cut"),
    "grown": (lambda data: data + b"\0", "added"),
    "zeros": (lambda data: bytes(len(data)), "not a splatkit checkpoint"),
    "flipped in the data": (lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], "tensor 'generator': its checksum"),
    "flipped in the values": (lambda data: data.replace(b"30000", b"30001"), "header: its checksum"),
    "flipped in the schema": (lambda data: data.replace(b'"schema": "1"', b'"schema": "9"'), "header: its checksum"),
    "schema 0": (set_metadata("schema", "0"), "expected 1"),
    "schema no number": (set_metadata("schema", "one"), "not a splatkit checkpoint"),
    "another step": (set_metadata("step", "31"), "renamed"),
    "a checksum is wrong": (set_metadata("checksums", json.dumps(dict.fromkeys(state(1), 0))), "its checksum does not match"),
    "a checksum is missing": (set_metadata("checksums", "{}"), "not one for each"),
    "foreign safetensors": (lambda data: (2).to_bytes(8, "little") + b"{}", "not a splatkit checkpoint"),
}


@pytest.mark.parametrize("damage, why", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before_with_one_line(tmp_path, damage, why):
    path = folder_with(tmp_path, 20, 30) / name_of(30)
    path.write_bytes(damage(path.read_bytes()))
    lines = []
    assert_whole(load(tmp_path, lines.append), 20)
    line, = lines
    assert line.startswith(str(path)) and why in line and "step 20" in line and "\n" not in line


def test_when_none_is_whole_every_file_and_the_way_out_are_named(tmp_path):
    for step in (20, 30):
        (tmp_path / name_of(step)).write_bytes(b"x")
    with pytest.raises(BadFile, match=f"no checkpoint is whole.*{name_of(30)}.*{name_of(20)}.*remove them"):
        load(tmp_path, pytest.fail)


def test_a_checkpoint_of_a_newer_schema_is_never_passed_over(tmp_path):
    path = folder_with(tmp_path, 20, 30) / name_of(30)
    path.write_bytes(set_metadata("schema", "2")(path.read_bytes()))
    with pytest.raises(BadFile, match="newer splatkit .schema 2, this one reads 1.; update splatkit"):
        load(tmp_path, pytest.fail)


# Files from a bad disk or a bad sender

def test_a_damaged_file_is_refused_or_read_as_if_it_were_whole(tmp_path):
    path = folder_with(tmp_path, 30) / name_of(30)
    whole, accepted = path.read_bytes(), 0
    for mutant in mutants(whole, 500):
        path.write_bytes(mutant)
        try:
            found = load(tmp_path, pytest.fail)
        except BadFile as e:
            assert len(str(e)) < 600
        else:
            assert_whole(found, 30)
            accepted += 1
    assert accepted < 50


HOSTILE = (None, True, -1, 0, 1, 1.5, 2**40, 2**63, 2**70, "", "F64", "I32", "F4", "9" * 5000, [], [0], [0, 2**40], [-4, 0], [1] * 100,
           [2**31] * 3, [0, 2**62, 2**62], [0, 2**62], {}, {"x": []}, "[" * 100_000, "[]", "{}", '{"a": NaN}')


def test_a_forged_header_ends_in_a_checkpoint_or_a_bad_file(tmp_path):
    path = folder_with(tmp_path, 30) / name_of(30)
    whole, rng = path.read_bytes(), random.Random(0)

    def forge(header):
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(list(header))
            match rng.randrange(4):
                case 0:
                    header[name] = rng.choice(HOSTILE) if name != "__metadata__" else header[name]
                case 1:
                    header["new"] = header.pop(name) if name != "__metadata__" else {}
                case _ if isinstance(header[name], dict):
                    header[name][rng.choice([*header[name], "new"])] = rng.choice(HOSTILE)
    for _ in range(500):
        path.write_bytes(edited(whole, forge))
        try:
            load(tmp_path, pytest.fail)
        except BadFile as e:
            assert len(str(e)) < 600


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]},
    {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]},
    {"dtype": "F32", "shape": [5, 3], "data_offsets": [4, 64]},
    {"dtype": "F32", "shape": [-5, -3], "data_offsets": [0, 60]},
    {"dtype": "F32", "shape": [True, 15], "data_offsets": [0, 60]},
    {"dtype": "F32", "shape": [5.0, 3], "data_offsets": [0, 60]},
    {"dtype": "F128", "shape": [5, 3], "data_offsets": [0, 60]},
    {"dtype": ["F32"], "shape": [5, 3], "data_offsets": [0, 60]},
], ids=["beyond the file", "beyond 64 bits", "gap", "negative", "bool", "float", "dtype", "list"])
def test_a_forged_entry_is_refused_before_memory_is_asked_for(tmp_path, entry, monkeypatch):
    path = save(tmp_path, 1, {"x": torch.zeros(5, 3)}, {})
    path.write_bytes(edited(path.read_bytes(), lambda header: header.update(x=entry)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pytest.fail("memory asked for"))
    with pytest.raises(BadFile, match="no checkpoint is whole"):
        load(tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**63, 0], [0] * 65, [1, 2**49, 0]],
                         ids=["strides", "too long", "dimensions", "beyond the limit"])
def test_a_forged_shape_of_no_bytes_that_torch_cannot_hold_is_refused(tmp_path, shape):
    path = save(tmp_path, 1, {"x": torch.zeros(0, 3)}, {})
    path.write_bytes(edited(path.read_bytes(), lambda header: header["x"].update(shape=shape)))
    with pytest.raises(BadFile, match="no checkpoint is whole"):
        load(tmp_path)


@pytest.mark.parametrize("length", [2**24 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(tmp_path, length):
    with open(tmp_path / name_of(1), "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2**25)
    with pytest.raises(BadFile, match="header claims"):
        load(tmp_path)


# A save that is stopped

class Killed(BaseException):
    pass


class Operations:
    """Counts what a save asks of the system, and stops it at call number `stop_at`: by one error, or dead from there on."""

    def __init__(self, monkeypatch, stop_at, error):
        self.seen, self.stop_at, self.error = [], stop_at, error
        for name in ("open", "close", "fsync", "replace", "unlink", "listdir"):
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name), closes=name == "close"))
        monkeypatch.setattr(atomic, "open", self.counted("new file", lambda *a: CountedFile(self, builtins.open(*a))), raising=False)

    def counted(self, name, function, closes=False):
        def call(*arguments, **named):
            at = len(self.seen)
            self.seen.append(name)
            stopped = at == self.stop_at or self.error is Killed and at > self.stop_at >= 0
            if closes or not stopped:       # a dead process closes its files too
                result = function(*arguments, **named)
            elif name == "write":
                function(arguments[0][:len(arguments[0]) // 2])
            if stopped:
                raise self.error(errno.ENOSPC, "No space left on device")
            return result
        return call


class CountedFile:
    def __init__(self, operations, file):
        self.fileno = file.fileno
        self.write, self.flush = operations.counted("write", file.write), operations.counted("flush", file.flush)
        # Dead or failed: what is still in the buffer is lost.
        self.close = operations.counted("close", lambda: file.raw.close() if operations.stop_at >= 0 else file.close(), closes=True)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, Killed])
def test_a_save_stopped_at_any_operation_leaves_the_old_checkpoint_or_the_new_one(tmp_path, error):
    stop_at, found_after, seen = -1, [], []
    while stop_at < len(seen):
        folder = tmp_path / str(stop_at)
        folder.mkdir()
        folder_with(folder, 10, 20)
        (folder / f".{name_of(15)}.0123abcd.tmp").write_bytes(b"left by a kill")
        with pytest.MonkeyPatch.context() as patch:
            operations = Operations(patch, stop_at, error)
            try:
                folder_with(folder, 30)
                completed = True
            except error:
                completed = False
        assert completed == (stop_at < 0)
        seen = seen or operations.seen
        found = load(folder, pytest.fail)
        assert_whole(found, 20, 30)
        found_after.append(found.step)
        folder_with(folder, 40)
        assert sorted(os.listdir(folder)) == [name_of(found.step), name_of(40)]
        assert_whole(load(folder, pytest.fail), 40)
        stop_at += 1
    assert seen == ["listdir", "unlink", "new file", *["write"] * 7, "flush", "fsync", "close", "replace", "open", "fsync", "close",
                    "listdir", "listdir", "unlink"]
    placed = seen.index("replace") + 1
    assert found_after == [30] + [20] * placed + [30] * (len(seen) - placed)


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    """Ten savers in turn, each killed at a random moment; each goes on from what the last one left."""
    said = said_by(child("""
        import os, random, signal, sys, time, torch
        from splatkit.io.checkpoint import load, save
        torch.set_num_threads(1)
        rng, folder = random.Random(0), sys.argv[1]

        def whole_step():
            found = load(folder, sys.exit)      # a report would end this process with an error
            if found is not None:
                assert found.values == {"step": found.step}
                assert all((x == found.step).all() for x in found.tensors.values())
            return 0 if found is None else found.step
        last = 0
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                step = last
                while True:
                    step += 1
                    tensors = {name: torch.full((n,), step) for name, n in (("a", 1), ("b", 100_000), ("c", 50_000))}
                    save(folder, step, tensors, {"step": step})
            time.sleep(rng.uniform(0.01, 0.3))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            step = whole_step()
            assert step >= last
            last = step
        print(last)
    """, tmp_path))
    assert int(said[0]) > 5
    save(tmp_path, 10**7, {}, {})
    assert len(os.listdir(tmp_path)) == 2


def test_a_full_disk_is_an_os_error_that_names_the_file_and_the_old_checkpoint_stays(tmp_path):
    folder_with(tmp_path, 10, 20)
    (tmp_path / f".{name_of(15)}.0123abcd.tmp").write_bytes(b"left by a kill")
    said = said_by(child("""
        import os, resource, sys, torch
        from splatkit.io.checkpoint import save
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            save(sys.argv[1], 30, {"x": torch.zeros(100_000)}, {})
        except OSError as e:
            print(e.filename)
        print(*sorted(os.listdir(sys.argv[1])))
    """, tmp_path))
    assert said == [str(tmp_path / name_of(30)), f"{name_of(10)} {name_of(20)}"]
    assert_whole(load(tmp_path, pytest.fail), 20)
    folder_with(tmp_path, 40)
    assert sorted(os.listdir(tmp_path)) == [name_of(20), name_of(40)]


def test_a_read_only_folder_is_an_os_error_and_can_still_be_loaded_from():
    with tempfile.TemporaryDirectory() as folder:       # pytest's own folders are closed to the user that root becomes below
        folder_with(Path(folder), 10, 20)
        os.chmod(folder, 0o555)
        said = said_by(child("""
            import os, sys, torch
            from splatkit.io.checkpoint import load, lock, save
            if os.getuid() == 0:
                os.setuid(65534)        # root may write anywhere
            for act in (lambda: save(sys.argv[1], 30, {"x": torch.zeros(3)}, {}), lambda: lock(sys.argv[1]).__enter__()):
                try:
                    act()
                except PermissionError as e:
                    print(e.filename)
            print(load(sys.argv[1], sys.exit).step)
        """, folder))
        assert said == [f"{folder}/{name_of(30)}", f"{folder}/.lock", "20"]
        os.chmod(folder, 0o755)
        assert_whole(load(folder, pytest.fail), 20)
        assert sorted(os.listdir(folder)) == [name_of(10), name_of(20)]


def test_a_folder_that_is_absent_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "absent", 1, {}, {})
    with pytest.raises(FileNotFoundError), lock(tmp_path / "absent"):
        pass


# One process per folder

def test_a_second_process_gets_one_error_that_names_the_first_until_that_one_is_killed(tmp_path):
    holder = child("""
        import os, sys, time
        from splatkit.io.checkpoint import lock
        with lock(sys.argv[1]):
            if os.fork() == 0:      # a data loader's worker, say: it may outlive its parent and must not hold the folder
                print(os.getpid(), flush=True)
            time.sleep(60)
    """, tmp_path)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(BadFile, match=f"{tmp_path}: process {holder.pid} is working in this folder; let it end or"), lock(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(60)
        with lock(tmp_path):
            os.kill(worker, 0)      # still there
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.communicate()


def test_a_lock_is_free_again_after_its_block_and_after_an_error_in_it(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock(tmp_path):
            with pytest.raises(BadFile, match=f"process {os.getpid()} is working"), lock(tmp_path):
                pass
            raise ZeroDivisionError
    assert not checkpoint._held


def test_a_lock_file_that_says_nothing_sensible_still_gives_the_error(tmp_path):
    with lock(tmp_path):
        (tmp_path / ".lock").write_bytes(b"\x1b[2J\xff" * 99)
        with pytest.raises(BadFile, match="another process is working"), lock(tmp_path):
            pass
