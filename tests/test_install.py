# SPDX-License-Identifier: MIT
"""The commands of the Makefile: what they check first, and the one line that reports a failure."""

import math
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT, install
from tbq import _arguments, _limits


@pytest.mark.parametrize(
    "output, line",
    [
        (
            "x\n  CMake Error at cmake/llama.cmake:14 (message):\n"
            "   tbq: error: patch 0001-a.patch does not apply to b\n\n"
            "  *** CMake configuration failed\nERROR: Failed building wheel",
            "patch 0001-a.patch does not apply to b",
        ),
        ("a.cpp:1:2: warning: w\ncc1plus: fatal error: x.o: No space left on device\n", "no disk space left"),
        (
            "  g++: fatal error: Killed signal terminated program cc1plus\n",
            "the compiler was killed, probably for memory: Killed signal terminated program cc1plus",
        ),
        (
            "WARNING: Retrying (Retry(total=0 ...\n"
            "ERROR: Could not find a version that satisfies the requirement cmake\n"
            "ERROR: No matching distribution found for cmake>=3.21\n",
            "cmake>=3.21 is not in the configured package index, or the index cannot be reached",
        ),
        (
            "[3/9] Building\n  src/a.cpp:10:3: error: expected ';'\n  more\nERROR: Failed building wheel\n",
            "src/a.cpp:10:3: error: expected ';'",
        ),
        ("  CMake Error at CMakeLists.txt:3 (find_package):\n    By not providing ...\n", "By not providing ..."),
        ("ERROR: something of pip\n", "something of pip"),
        ("nothing that helps\n", "it failed"),
    ],
)
def test_explain(output, line):
    assert install.explain(output) == line


def test_requirements_are_those_of_pyproject():
    assert {"scikit-build-core", "cffi", "pip", "cmake", "ninja"} == {r.split(">")[0] for r in install.requirements()}


# --- containers -----------------------------------------------------------------------------------------------------


def machine(root, groups, mounts, files, memory="MemAvailable:   16000000 kB"):
    """A /proc and a /sys for a test.

    groups: the text of /proc/self/cgroup. mounts: (group at the top, folder, kind, options).
    """
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal:   32000000 kB\n{memory}\n")
    (root / "proc" / "self" / "cgroup").write_text(groups)
    (root / "proc" / "self" / "mountinfo").write_text(
        "30 1 0:5 / / rw - ext4 /dev/sda rw\n"
        + "".join(
            f"{31 + i} 30 0:{9 + i} {top} {where} rw,nosuid shared:9 - {kind} {kind} {options}\n"
            for i, (top, where, kind, options) in enumerate(mounts)
        )
    )
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SECOND = [("/", "/sys/fs/cgroup", "cgroup2", "rw")]
FIRST = [
    ("/", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
    ("/", "/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
]
DOCKER = [(top.replace("/", "/docker/a"), where, kind, options) for top, where, kind, options in FIRST]
IN = "5:cpu,cpuacct:{0}\n4:memory:{0}\n1:name=systemd:{0}\n"

CONTAINERS = {
    "version 2": (
        "0::/\n",
        SECOND,
        {"sys/fs/cgroup/cpu.max": "150000 100000\n", "sys/fs/cgroup/memory.max": "3000000000\n"},
        1.5,
        3_000_000_000,
    ),
    "no limits": (
        "0::/a\n",
        SECOND,
        {"sys/fs/cgroup/a/cpu.max": "max 100000\n", "sys/fs/cgroup/a/memory.max": "max\n"},
        None,
        None,
    ),
    "of a group above": (
        "0::/a/b\n",
        SECOND,
        {
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/a/b/memory.max": "4000000000\n",
            "sys/fs/cgroup/a/memory.max": "5000000000\n",
        },
        0.5,
        4_000_000_000,
    ),
    "outside of its namespace": (
        "0::/../b\n",
        SECOND,
        {"sys/fs/cgroup/cpu.max": "200000 100000\n", "sys/fs/cgroup/memory.max": "max\n"},
        2.0,
        None,
    ),
    "version 1": (
        IN.format("/a"),
        FIRST,
        {
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "2800000000\n",
        },
        2.5,
        2_800_000_000,
    ),
    "version 1, unlimited": (
        IN.format("/"),
        FIRST,
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        None,
        9223372036854771712,
    ),
    "version 1, its group at the top": (
        IN.format("/docker/a"),
        DOCKER,
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "50000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1400000000\n",
        },
        2.0,
        1_400_000_000,
    ),
    "both": (
        "4:memory:/a\n0::/b\n",
        [*FIRST[1:], ("/", "/sys/fs/cgroup/unified", "cgroup2", "rw")],
        {
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1300000000\n",
            "sys/fs/cgroup/unified/b/cpu.max": "300000 100000\n",
        },
        3.0,
        1_300_000_000,
    ),
    "nothing mounted": ("0::/\n", [], {}, None, None),
    "nonsense": (
        "0::/\nx\n",
        SECOND,
        {"sys/fs/cgroup/cpu.max": "lots\n", "sys/fs/cgroup/memory.max": "\n"},
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_limits_of_a_container(name, tmp_path, monkeypatch):
    groups, mounts, files, cpus, memory = CONTAINERS[name]
    root = machine(tmp_path, groups, mounts, files)
    assert (_limits.cpus(root), _limits.memory(root)) == (cpus, memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert install.jobs(root) == min(
        math.ceil(cpus or 8), (memory or 1 << 60) // install.BYTES_PER_JOB, 16_384_000_000 // install.BYTES_PER_JOB
    )
    monkeypatch.setattr(_limits, "cpus", lambda: cpus)
    assert _arguments.cores() == math.ceil(cpus or 8)


def test_no_linux(tmp_path):
    assert _limits.cpus(tmp_path) is None and _limits.memory(tmp_path) is None
    assert install.jobs(tmp_path) >= 1


def test_short_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert install.jobs(machine(tmp_path, "0::/\n", [], {}, "MemAvailable:   2700000 kB")) == 2


def own_group(controller, files):
    """A control group of this machine with these limits. A skip with the reason if there can be none."""
    for folder in (pathlib.Path("/sys/fs/cgroup") / controller, pathlib.Path("/sys/fs/cgroup")):
        group = folder / f"tbq-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            reason = error.strerror
            continue
        try:
            for name, text in files.items():
                if (group / name).exists():
                    (group / name).write_text(text)
            if any((group / name).exists() for name in files):
                return group
        except OSError as error:
            reason = error.strerror
        else:
            reason = f"{folder} has no controller of {controller}"
        group.rmdir()
    return reason


def test_a_real_quota():
    """A process in a control group of this machine."""
    group = own_group("cpu", {"cpu.max": "70000 100000", "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "70000"})
    if isinstance(group, str):
        pytest.skip(f"no control group with a quota can be made on this machine: {group}")
    program = (
        "import sys; open(sys.argv[1], 'w').write('0')\n"
        "from tbq import _limits, _arguments\nprint(_limits.cpus(), _arguments.cores())"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program, group / "cgroup.procs"], capture_output=True, text=True)
    finally:
        group.rmdir()
    assert done.stdout == "0.7 1\n", done.stderr


def failure():
    with pytest.raises(install.Failure) as error:
        install.check_machine()
    return str(error.value)


def test_no_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "git" else "/usr/bin/" + name)
    assert failure() == "git is not installed; it applies the patches"


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name if name in ("git", "gcc") else None)
    assert failure().startswith("no C++ compiler found (c++, g++, clang++); install one")


def test_no_disk_space(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10, 10**8))
    monkeypatch.setattr(install, "build_dir", lambda: None)
    assert failure().startswith("no disk space: 0.1 GB free under ")


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert failure().startswith("Python 3.10 or newer is needed; ")


def test_cmake_without_a_compiler(tmp_path):
    """pip install . does not run install.py, so CMake must report it too."""
    tools = pathlib.Path(sys.executable).parent
    if not (tools / "cmake").exists():
        pytest.skip("cmake is not in this environment (make install)")
    path = tmp_path / "path"
    path.mkdir()
    for tool in ("cmake", "ninja"):
        os.symlink(tools / tool, path / tool)
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    result = subprocess.run(
        [path / "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", "-DTBQ_LLAMA=OFF", "-DTBQ_PYTHON=OFF"],
        capture_output=True,
        text=True,
        env={**environment, "PATH": str(path)},
    )
    assert result.returncode != 0
    assert (
        "tbq: error: no C compiler found; install one (Debian: apt install g++) or name it in $CC and $CXX\n"
        in result.stderr
    )


def test_interrupted_command_ends_with_its_children(tmp_path, monkeypatch):
    """A terminal's Ctrl-C reaches the processes of pip, CMake and ninja at the same time."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import install, signal\n"
        "signal.signal(signal.SIGTERM, install.interrupt)\n"
        "print('started', flush=True)\n"
        "install.run(['sh', '-c', 'sleep 77.5 & wait'], open(sys.argv[2], 'w'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT / "tools"), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process.stdout.readline()
    time.sleep(0.5)
    process.terminate()
    assert process.wait(10) != 0
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 77.5" not in left


# --- what is installed, and where -----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """What make needs of a complete checkout, with an environment that has only pip."""
    folder = tmp_path / "before" / "checkout"
    for name in ("bench", "cmake", "ggml_tbq", "patches", "python", "tools", "build"):
        (folder / name).mkdir(parents=True)
    for name in ("Makefile", "CMakeLists.txt", "pyproject.toml", "tools/install.py", "tools/_cli.py"):
        shutil.copy(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    shutil.copy(folder / ".venv" / "bin" / "pip", folder / ".venv" / "bin" / "tbq")
    for name in (".installed", ".installed-server"):
        (folder / "build" / name).touch()
    (folder / "build" / ".where").write_text(str(folder), encoding="utf-8")
    return folder


def make(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=120, env=environment
    )


def test_moved_checkout(checkout, tmp_path):
    """Scripts name their Python by its path, so they break when a checkout is moved.

    make repairs them without a build.
    """
    assert make(checkout, "install").stdout == "make: Nothing to be done for 'install'.\n"
    moved = tmp_path / "after"
    shutil.move(checkout, moved)
    script = moved / ".venv" / "bin" / "tbq"
    with pytest.raises(FileNotFoundError):
        subprocess.run([script, "--version"], check=False)
    done = make(moved, "install")
    assert done.returncode == 0 and done.stdout == f"This checkout was in {checkout}: mending the paths in .venv\n", (
        done.stderr
    )
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout.startswith("pip ")
    activated = subprocess.run(
        ["sh", "-c", '. "$0"/bin/activate && echo "$VIRTUAL_ENV"', moved / ".venv"], capture_output=True, text=True
    )
    assert activated.stdout.strip() == str(moved / ".venv")
    assert make(moved, "install").stdout == "make: Nothing to be done for 'install'.\n"


def test_a_server_alone_is_not_all(checkout):
    """`make demo` needs one stamp and `make install` the other. A full installation has both."""
    (checkout / "build" / ".installed").unlink()
    assert make(checkout, "-q", "build/.installed-server").returncode == 0
    assert "install.py .venv" in make(checkout, "-n", "install").stdout
    assert "--server" not in make(checkout, "-n", "install").stdout


def test_stamps(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "WHERE", tmp_path / "where")
    install.mark([tmp_path / "stamp"], 1000)
    assert (tmp_path / "stamp").stat().st_mtime == 1000 and (tmp_path / "where").read_text() == str(install.ROOT)


def test_a_demo_installs_what_it_runs():
    """The base requirements do not include torch, whatever the extras need. .ci/run measures the whole."""
    from importlib.metadata import requires

    base = [name for name in requires("ggml-tbq") if "extra ==" not in name]
    assert {name.split(">")[0] for name in base} == {"cffi", "gguf", "numpy", "platformdirs", "tqdm"}
    tests = [name for name in requires("ggml-tbq") if 'extra == "test"' in name or "extra == 'test'" in name]
    assert tests and not [name for name in tests if "torch" in name or "triton" in name or "hf" in name]


def test_editable_install(tmp_path, build_dir):
    """`pip install -e .` has the sources here and the built files elsewhere."""
    if not (pathlib.Path(sys.executable).parent / "cmake").exists():
        pytest.skip("cmake is not in this environment (make install)")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    ours = [path for path in sys.path if path.endswith("site-packages")]
    pathlib.Path(site, "ours.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    environment = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-build-isolation",
            "--ignore-installed",
            "-e",
            ROOT,
            "--disable-pip-version-check",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import json, pathlib, tbq; from tbq.programs.paths import program\n"
        "print(json.dumps([str(pathlib.Path(tbq.__file__).parent), tbq.paths(), str(program('llama-server'))]))"
    )
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    import json

    package, paths, server = json.loads(out.stdout)
    assert package == str(ROOT / "python" / "tbq")
    assert pathlib.Path(paths["bin"]).is_dir() and str(tmp_path) in paths["bin"]
    assert subprocess.run([server, "--version"], capture_output=True, timeout=60).returncode == 0
