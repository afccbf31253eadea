# SPDX-License-Identifier: MIT
"""Files appear whole or not at all.

Names of any length, full disks, killed writers, several writers, links and modes.
"""

import contextlib
import errno
import os
import pathlib
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

import tbq
from llama_tools import tiny_llama
from tbq import _files
from tbq.cli import main
from tbq.errors import TBQError
from tbq.index import Index

posix = pytest.mark.skipif(os.name != "posix", reason="locks, signals and links of POSIX")


@pytest.fixture(scope="module")
def index():
    index = Index(64, keep="float32")
    index.add(np.random.default_rng(0).standard_normal((20000, 64)).astype(np.float32))
    return index


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("files") / "model.gguf", 64)


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tbq", *map(str, arguments)], capture_output=True, text=True, **options
    )


def writes(folder, index, model):
    """Everything that writes a file, by name: the file, and a function that writes it.

    The function returns the line of an error, or None.
    """

    def run(*arguments):
        def act():
            done = command(*arguments)
            return done.stderr.strip().splitlines()[-1] if done.returncode else None

        return act

    def save():
        try:
            index.save(folder / "i.tbqi")
        except OSError as error:
            return str(error)

    np.save(model.parent / "x.npy", np.ones((3000, 256), np.float32) * np.arange(1, 3001, dtype=np.float32)[:, None])
    return {
        "save": (folder / "i.tbqi", save),
        "build": (
            folder / "b.tbqi",
            run("search", "build", model.parent / "x.npy", folder / "b.tbqi", "--keep", "float32"),
        ),
        "convert": (folder / "o.gguf", run("convert", model, folder / "o.gguf", "--type", "f32")),
        "calibrate": (
            folder / "c.gguf",
            run("calibrate", model, "-o", folder / "c.gguf", "--ctx", "256", "--chunks", "1"),
        ),
    }


# --- names and folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ("n" * 250, "n" * 255, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 127, "\N{SNOWMAN}" * 85, ".tbq-", "new\nline", "-x"),
)
def test_any_legal_name(name, tmp_path, model):
    tbq.convert(model, tmp_path / name)
    tbq.convert(model, tmp_path / name, force=True)
    assert os.listdir(tmp_path) == [name]
    small = Index(8)
    small.save(tmp_path / name)
    _files.replace(tmp_path / name, b"picture")
    assert (tmp_path / name).read_bytes() == b"picture" and os.listdir(tmp_path) == [name]


def test_name_that_is_too_long(tmp_path, model):
    name = tmp_path / ("n" * 256)
    for act in (lambda: Index(8).save(name), lambda: tbq.convert(model, name), lambda: _files.replace(name, b"")):
        with pytest.raises(OSError) as error:
            act()
        assert error.value.errno == errno.ENAMETOOLONG and error.value.filename == str(name)
    with pytest.raises(OSError) as error:  # the parts of a split have longer names than the split
        tbq.convert(model, tmp_path / ("n" * 250), split_bytes=50_000)
    assert error.value.errno == errno.ENAMETOOLONG and "-00001-of-" in error.value.filename
    assert os.listdir(tmp_path) == []


def test_places_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in (tmp_path, tmp_path / "pipe", "/dev/null", "/dev"):
        with pytest.raises(TBQError, match=f"^{name} is not a file that can be replaced$"):
            _files.replace(name, b"x")
    for name, kind in (
        (tmp_path / "no" / "x", FileNotFoundError),
        (tmp_path / "file" / "x", NotADirectoryError),
        (tmp_path / "loop", OSError),
    ):
        with pytest.raises(kind) as error:
            _files.replace(name, b"x")
        assert error.value.filename == str(name)
    with pytest.raises(TBQError, match="is not a path"):
        _files.replace("a\0b", b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "pipe"] and (tmp_path / "file").read_bytes() == b""


@posix
def test_standard_output_is_not_replaced(tmp_path, model):
    """A pipe is refused. /dev/stdout, which is a link, stays."""
    done = command("convert", model, "/dev/stdout", "--type", "f16", "--force")
    assert done.returncode == 2 and "/dev/stdout is not a file that can be replaced" in done.stderr
    assert pathlib.Path("/dev/stdout").is_symlink()


@posix
def test_links_and_modes(tmp_path, model):
    (tmp_path / "else").mkdir()
    (tmp_path / "link").symlink_to("else/target")
    for _ in range(2):  # the target of the link is missing at first, and then exists
        _files.replace(tmp_path / "link", b"x")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "else" / "target").read_bytes() == b"x"
    for mode in (0o600, 0o444, 0o755):
        os.chmod(tmp_path / "else" / "target", mode)
        tbq.convert(model, tmp_path / "link", force=True)
        Index(8).save(tmp_path / "link")
        assert stat.S_IMODE((tmp_path / "else" / "target").stat().st_mode) == mode
    old = os.umask(0o027)
    try:
        _files.replace(tmp_path / "new", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["else", "link", "new"] and os.listdir(tmp_path / "else") == ["target"]


@posix
def test_split_through_links_to_another_disk(tmp_path, model):
    other = pathlib.Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system to write to")
    part = other / f"tbq-test-{os.getpid()}"
    first = tmp_path / "o-00001-of-00002.gguf"
    first.symlink_to(part)
    try:
        report = tbq.convert(
            model,
            tmp_path / "o.gguf",
            "f32",
            split_bytes=sum(t.n_bytes for t in tbq.open_gguf(model).tensors) * 2 // 3,
            force=True,
        )
        assert report.files[0] == first and first.is_symlink() and part.read_bytes()[:4] == b"GGUF"
        assert len(tbq.open_gguf(first).files) == 2
    finally:
        part.unlink(missing_ok=True)
    assert not list(other.glob(".tbq-*"))


# --- file systems -------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("number", (errno.EINVAL, errno.ENOTSUP, errno.EIO))
def test_folders_that_cannot_be_flushed(number, tmp_path, monkeypatch):
    """Only errors that say that a file system cannot flush are ignored, and a disk error is not one.

    No file system here has such an error, so os.fsync is made to raise it.
    """
    fsync, folders = os.fsync, []

    def some(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folders.append(descriptor)
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", some)
    with (
        contextlib.nullcontext()
        if number != errno.EIO
        else pytest.raises(OSError, match=f"{os.strerror(errno.EIO)}: '{tmp_path / 'x'}'")
    ):
        Index(8).save(tmp_path / "x")
    assert folders and len(Index.load(tmp_path / "x")) == 0 and os.listdir(tmp_path) == ["x"]


@posix
def test_without_locks(tmp_path, monkeypatch):
    """A folder stays if it is not known whether its writer is dead."""
    folder = left_behind(tmp_path, "x")

    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(_files.fcntl, "flock", none)
        _files.replace(tmp_path / "x", b"x")
    assert (tmp_path / "x").read_bytes() == b"x" and folder.is_dir()
    _files.replace(tmp_path / "x", b"y")
    assert os.listdir(tmp_path) == ["x"]


@posix
def test_folder_that_cannot_be_read():
    """The folder can be written and not read. Root may read everything, so the test runs as another user."""
    nobody, root = 65534, os.getuid() == 0
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        if root:
            os.chown(folder, nobody, nobody)
            os.seteuid(nobody)
        os.chmod(folder, 0o333)
        with pytest.raises(PermissionError):
            os.listdir(folder)
        _files.replace(folder / "x", b"x")
        os.chmod(folder, 0o700)
        assert os.listdir(folder) == ["x"]
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


@pytest.fixture
def full(tmp_path):
    """A folder on a separate disk with room for only a page or two, and a function that fills the disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tbq-test", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("what", ("save", "build", "convert", "calibrate"))
def test_full_disk(what, full, index, model):
    """One line names the file. The old file stays, and there is no other file in the folder."""
    path, act = writes(full, index, model)[what]
    replaces = what in ("save", "calibrate")  # the other commands need --force
    if replaces:
        path.write_bytes(b"old")
    (full / "filler").write_bytes(bytes(2**20 if what == "save" else 2 * 2**20 - 8 * 4096))
    error = act()
    assert error and str(path) in error and ("No space left on device" in error or "cannot be written" in error)
    assert sorted(os.listdir(full)) == sorted(["filler", path.name] if replaces else ["filler"])
    assert not replaces or path.read_bytes() == b"old"


def test_full_disk_and_pictures(full, model):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib (pip install 'ggml-tbq[plot]')")
    (full / "filler").write_bytes(bytes(2 * 2**20 - 2 * 4096))
    for arguments in (("plan", model, "--memory", "64M"), ("inspect", model, "--against", model)):
        done = command(*arguments, "--plot", full / "p.png")
        assert (
            done.returncode == 2
            and done.stderr.strip().splitlines()[-1] == f"tbq: error: No space left on device: {full / 'p.png'}"
        )
    assert os.listdir(full) == ["filler"]


def test_standard_output_on_a_full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as out:
        done = subprocess.run([sys.executable, "-m", "tbq", "paths"], stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "tbq: error: No space left on device: standard output\n"


@pytest.mark.parametrize("at", ("mkdir", "write", "close", "replace"))
def test_errors_name_the_file(at, tmp_path, monkeypatch):
    """Whatever fails, on whatever file: the error names the file that the caller asked for, and nothing is left."""

    def fails(*_, **__):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "another")

    path = tmp_path / "x"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        if at in ("mkdir", "replace"):
            patch.setattr(os, at, fails)
        else:
            patch.setattr(_files, "_Raw", type("Raw", (_files._Raw,), {at: lambda self, *data: fails_as(self, fails)}))
        with pytest.raises(OSError) as error:
            _files.replace(path, b"new")
    assert (error.value.errno, error.value.filename) == (errno.EDQUOT, str(path))
    assert os.listdir(tmp_path) == ["x"] and path.read_bytes() == b"old"


def fails_as(file, fails):
    if not file.closed:
        super(type(file).__mro__[1], file).close()
    with _files.naming(file._for):
        fails()


def test_inputs_are_named(tmp_path, capsys):
    (tmp_path / "x.npy").write_bytes(b"")
    np.save(tmp_path / "q.npy", np.ones((2, 8)))
    for arguments in (
        ("search", "build", tmp_path / "no.npy", tmp_path / "o"),
        ("search", "build", tmp_path / "x.npy", tmp_path / "o"),
        ("search", "query", tmp_path / "no", tmp_path / "q.npy"),
        ("search", "query", tmp_path, tmp_path / "q.npy"),
        ("convert", tmp_path / "no.gguf", tmp_path / "o", "--type", "f16"),
        ("inspect", tmp_path / "no.gguf"),
        ("inspect", tmp_path),
        ("plan", tmp_path / "no.gguf"),
        ("calibrate", tmp_path / "no.gguf", "-o", str(tmp_path / "o")),
    ):
        assert main.main([*map(str, arguments)]) == 2
        assert next(str(a) for a in arguments[1:] if isinstance(a, pathlib.Path)) in capsys.readouterr().err


# --- killed writers -----------------------------------------------------------------------------------------------

WRITER = """
import os, sys, time
from tbq import _files
fsync = os.fsync
def wait(descriptor):
    print("written", flush=True)
    sys.stdin.readline()
    fsync(descriptor)
    os.fsync = fsync
os.fsync = wait
_files.replace(sys.argv[1], sys.argv[2].encode())
print("done", flush=True)
"""


def writer(path, text):
    """A process that has written all of a file, and waits for a line before it flushes and renames the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "written\n"
    return process


def killed(process):
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def left_behind(folder, name):
    """What a killed writer leaves."""
    before = set(folder.iterdir())
    killed(writer(folder / name, "dead"))
    (new,) = set(folder.iterdir()) - before
    assert new.is_dir() and new.name.startswith(".tbq-") and len(new.name) < 30
    return new


@posix
def test_the_dead_are_removed_and_nobody_else(tmp_path):
    mine, other = left_behind(tmp_path, "mine"), left_behind(tmp_path, "other")
    alive = writer(tmp_path / "mine", "alive")
    (living,) = set(tmp_path.iterdir()) - {mine, other}
    foreign = tmp_path / f"{mine.name[:-8]}theirs"  # a file, not the folder of a writer
    foreign.write_text("")
    empty = tmp_path / f"{mine.name[:-8]}00000000"  # this writer was killed before it had a lock
    empty.mkdir()
    _files.replace(tmp_path / "mine", b"new")
    assert set(tmp_path.iterdir()) == {tmp_path / "mine", other, living, foreign}
    assert sorted(p.name for p in living.iterdir()) == ["0", "lock"]
    alive.communicate("go\n")
    assert alive.returncode == 0 and (tmp_path / "mine").read_text() == "alive"
    assert set(tmp_path.iterdir()) == {tmp_path / "mine", other, foreign}
    _files.replace(tmp_path / "other", b"new")
    assert set(tmp_path.iterdir()) == {tmp_path / "mine", tmp_path / "other", foreign}


@posix
def test_a_stopped_writer_is_not_dead(tmp_path):
    process = writer(tmp_path / "x", "stopped")
    process.send_signal(signal.SIGSTOP)
    _files.replace(tmp_path / "x", b"new")
    process.send_signal(signal.SIGCONT)
    process.communicate("go\n")
    assert process.returncode == 0 and (tmp_path / "x").read_text() == "stopped" and os.listdir(tmp_path) == ["x"]


STRESS = """
import sys
import numpy as np
from tbq.index import Index
index = Index(64, keep="float32", center=np.zeros(64))
index.add(np.full((5000, 64), float(sys.argv[2]), np.float32))
print("ready", flush=True)
while True:
    index.save(sys.argv[1])
"""


@posix
def test_many_writers_of_one_name_killed_at_any_moment(tmp_path):
    """The file is whole at every moment. After one more save no other file is there."""
    path, rng = tmp_path / "index", random.Random(0)
    Index(64).save(path)
    for _ in range(4):
        writers = [
            subprocess.Popen([sys.executable, "-c", STRESS, path, str(number)], stdout=subprocess.PIPE)
            for number in (1, 2, 3)
        ]
        try:
            for process in writers:
                assert process.stdout.readline() == b"ready\n"
            for process in writers:
                time.sleep(rng.uniform(0.01, 0.2))
                found = Index.load(path)  # also verifies its checksums
                assert len(found) in (0, 5000)
                process.kill()
        finally:
            for process in writers:
                process.kill()
                process.wait()
                process.stdout.close()
        assert len(Index.load(path)) == 5000
    Index(64).save(path)
    assert os.listdir(tmp_path) == ["index"]


def kill_when(process, condition):
    """Kills a process and its children with SIGKILL when a condition is true."""
    end = time.monotonic() + 60
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
    assert process.poll() is None, "it was done before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def sizes(folder):
    with contextlib.suppress(FileNotFoundError):
        return {path.name: path.stat().st_size for path in folder.glob(".tbq-*/*")}
    return {}


@posix
@pytest.mark.parametrize("options", ((), ("--split", "20M")), ids=("one", "split"))
def test_killed_convert(options, demo_model, tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "tbq",
        "convert",
        demo_model,
        tmp_path / "o.gguf",
        "--type",
        "tbq4_0",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(
        [*arguments, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    kill_when(process, lambda: sum(sizes(tmp_path).values()) > 30 << 20)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tbq-")
    # the file is whole, whatever the dead writer was writing
    subprocess.run(arguments, check=True, capture_output=True)
    assert os.listdir(tmp_path) == ["o.gguf"]


@posix
def test_killed_calibrate(demo_model, tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "tbq",
        "calibrate",
        demo_model,
        "-o",
        tmp_path / "c.gguf",
        "--ctx",
        "512",
        "--chunks",
        "2",
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    kill_when(process, lambda: sizes(tmp_path).get("text"))
    assert len(list(tmp_path.iterdir())) == 1
    subprocess.run(arguments, check=True, capture_output=True)
    assert os.listdir(tmp_path) == ["c.gguf"]
