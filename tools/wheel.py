#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Builds wheels for machines without a compiler, into dist/.

    wheel.py                       ggml_tbq-VERSION-cp310-abi3-manylinux_2_31_x86_64.whl: programs, libraries, package
    wheel.py --arch aarch64        the same for arm64, cross-built
    wheel.py --cuda "80;90"        ggml_tbq_cuda-VERSION-...: the CUDA backend for these architectures, an addition to
                                   the first wheel
    wheel.py --dist                the sdist, both CPU wheels, the programs as .tar.gz, and SHA256SUMS

The CPU backend is built for every x86-64 (or arm64) level, and the level is chosen at run time.  clang and lld link
against Debian 11's libraries (tools/sysroot.py), so this script must run on Debian 12 or in a container of it.
auditwheel checks that the wheel needs nothing newer.  Builds stay in build/, and only what has changed is built again.
"""

import argparse
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

from _cli import Failure, run_main

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
DIST = ROOT / "dist"
#: The oldest glibc that a wheel runs with, which is that of the sysroot.
GLIBC = "2_31"
DEBIAN_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
TOOLS = ["auditwheel>=6.1", "build>=1", "wheel>=0.40"]
#: Packages on PyPI with the CUDA libraries that the backend loads.
CUDA_PACKAGES = ["nvidia-cuda-runtime", "nvidia-cublas"]

#: Environment variables of the user that a build must not see.
_COMPILER_VARIABLES = (
    "CC CXX CUDAHOSTCXX NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS NVCC_CCBIN CFLAGS CXXFLAGS CUDAFLAGS LDFLAGS "
    "CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH LIBRARY_PATH"
)


def say(text: str) -> None:
    print(text, flush=True)


def run(command: list[str], log: str = "", **options: object) -> str:
    """Runs a command and returns its output.  log: also write the output to build/LOG.log."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **options,
    )  # type: ignore[call-overload]
    where = ""
    if log:
        path = BUILD / f"{log}.log"
        path.write_text(done.stdout, encoding="utf-8")
        where = f" (complete output: {path.relative_to(ROOT)})"
    if done.returncode:
        errors = re.findall(r"(?m)^.*?(?:error|ERROR):? .+$", done.stdout) or done.stdout.splitlines() or ["no message"]
        raise Failure(f"{pathlib.Path(command[0]).name} failed: {errors[0].strip()}{where}")
    return str(done.stdout)


def pip(*arguments: str, log: str = "", **options: object) -> str:
    return run([sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"], log, **options)


def find_clang() -> str:
    """Returns the newest clang for which lld and llvm-strip of the same version are installed."""
    found = [
        path
        for folder in os.environ["PATH"].split(os.pathsep)
        for path in pathlib.Path(folder).glob("clang*")
        if re.fullmatch(r"clang(-\d+)?", path.name)
    ]
    for path in sorted(found, key=lambda path: int(path.name.partition("-")[2] or 0), reverse=True):
        version = path.name.partition("-")[2]
        suffix = f"-{version}" if version else ""
        if all(shutil.which(f"{name}{suffix}") for name in ("clang++", "ld.lld", "llvm-strip")):
            return str(path)
    raise Failure(
        "wheels are built with clang, lld and llvm-strip; install them (Debian: apt install clang-16 lld-16 llvm-16)"
    )


def environment() -> dict[str, str]:
    """The environment of a build: this environment's CMake and ninja, none of the user's compilers and flags."""
    folder = pathlib.Path(sys.executable).parent
    kept = {name: value for name, value in os.environ.items() if name not in _COMPILER_VARIABLES.split()}
    return {
        **kept,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0)))),
    }


def toolchain(arch: str) -> dict[str, str]:
    """Returns CMake's definitions for a build against the sysroot."""
    sysroot = BUILD / "sysroot" / DEBIAN_ARCH[arch]
    run([sys.executable, str(ROOT / "tools" / "sysroot.py"), str(sysroot), "--arch", DEBIAN_ARCH[arch]])
    return {
        "CMAKE_TOOLCHAIN_FILE": str(ROOT / "cmake" / "sysroot.cmake"),
        "TBQ_SYSROOT": str(sysroot),
        "TBQ_ARCH": arch,
        "TBQ_CLANG": find_clang(),
        "TBQ_PORTABLE": "ON",
    }


def build_wheel(source: pathlib.Path, name: str, defines: dict[str, str]) -> pathlib.Path:
    """Builds the wheel of a project in build/NAME.  It has the name that scikit-build-core gives it."""
    target = BUILD / f"{name}-wheel"
    shutil.rmtree(target, ignore_errors=True)
    pip(
        "wheel",
        "-v",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(target),
        f"-Cbuild-dir={BUILD / name}",
        *(f"-Ccmake.define.{key}={value}" for key, value in defines.items()),
        log=name,
        env=environment(),
    )
    return next(target.glob("*.whl"))


def tag_wheel(wheel: pathlib.Path, arch: str) -> pathlib.Path:
    """Moves a wheel to dist/, with the tag of its glibc, after auditwheel has checked that it needs nothing newer."""
    tag = f"manylinux_{GLIBC}_{arch}"
    name = run(
        [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", f"linux_{arch}", str(wheel)]
    ).split()[-1]
    found = run([sys.executable, "-m", "auditwheel", "show", str(wheel.with_name(name))])
    policy = re.search(r'(?:consistent with|constrains the platform tag to).*?"(manylinux_\d+_\d+)', found, re.S)
    needed = tuple(map(int, policy[1].split("_")[1:])) if policy else None
    if needed is None or needed > tuple(map(int, GLIBC.split("_"))):
        raise Failure(f"{name} needs more than glibc {GLIBC.replace('_', '.')}: {' '.join(found.split())}")
    name = run(
        [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, str(wheel.with_name(name))]
    ).split()[-1]
    DIST.mkdir(exist_ok=True)
    os.replace(wheel.with_name(name), DIST / name)
    say(f"dist/{name} ({(DIST / name).stat().st_size / 1e6:.0f} MB)")
    return DIST / name


def cpu_wheel(arch: str) -> pathlib.Path:
    say(f"Building llama.cpp for every level of {arch} (the first time about 25 minutes on 2 cores)")
    return tag_wheel(build_wheel(ROOT, f"portable-{arch}", toolchain(arch)), arch)


def cuda_toolkit() -> dict[str, str]:
    """Returns CMake's definitions for this machine's nvcc and PyPI's cuBLAS, which the wheel loads at run time."""
    compiler = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if not compiler:
        raise Failure(
            "no CUDA compiler (nvcc); install the CUDA toolkit and put nvcc into $PATH, or name it in $CUDACXX"
        )
    target = BUILD / "cuda-libraries"
    if not target.is_dir():
        pip("install", "--quiet", "--no-deps", "--target", str(target), *CUDA_PACKAGES)
    libraries = next(target.glob("nvidia/cu*/lib"))
    for path in libraries.glob("*.so.*"):
        link = libraries / (path.name.partition(".so.")[0] + ".so")
        if not link.exists():
            link.symlink_to(path.name)
    stub = libraries / "libcuda.so"
    if not stub.exists():  # no package has the driver's library; linking needs only its name
        flags = ["-shared", "-nostdlib", "-fuse-ld=lld", "-Wl,-soname,libcuda.so.1"]
        run([find_clang(), *flags, "-x", "c", "-o", str(stub), os.devnull])
    output = run([compiler, "-E", "-v", "-x", "cu", os.devnull])
    toolkit = pathlib.Path(output.partition("TOP=")[2].split("\n")[0].strip()).resolve()
    return {
        "CMAKE_CUDA_COMPILER": compiler,
        "CUDAToolkit_ROOT": str(toolkit),
        "TBQ_CUDA_ROOTS": f"{toolkit};{libraries.parent}",
    }


def cuda_wheel(architectures: str) -> pathlib.Path:
    if not re.fullmatch(r"\d+[a-z]?(-real|-virtual)?([; ,]\d+[a-z]?(-real|-virtual)?)*", architectures):
        raise Failure(f"CUDA architectures {architectures!r} are not a list such as 80;90: name them in CUDAARCHS")
    say(f"Building the CUDA backend for {architectures} (about 20 minutes on 2 cores for each architecture)")
    defines = {
        **toolchain("x86_64"),
        **cuda_toolkit(),
        "TBQ_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": re.sub("[ ,]", ";", architectures),
    }
    return tag_wheel(build_wheel(ROOT / "packaging" / "cuda", "portable-cuda", defines), "x86_64")


def pack_programs(wheel: pathlib.Path) -> None:
    """Packs the programs and libraries of a wheel into a .tar.gz, for machines without Python."""
    version, arch = re.match(r"ggml_tbq-([^-]+)-.*manylinux_\d+_\d+_(\w+)\.whl", wheel.name).groups()  # type: ignore[union-attr]
    top = f"ggml-tbq-{version}-linux-{arch}"
    with zipfile.ZipFile(wheel) as archive, tarfile.open(DIST / f"{top}.tar.gz", "w:gz") as tar:
        for member in archive.infolist():
            found = re.fullmatch(r"tbq/((?:bin|lib)/.+)|.*\.dist-info/licenses/(.+)", member.filename)
            if not found or member.is_dir():
                continue
            info = tarfile.TarInfo(f"{top}/{found[1] or found[2]}")
            info.size, info.mode = member.file_size, 0o755 if found[1] else 0o644
            with archive.open(member) as file:
                tar.addfile(info, file)
    say(f"dist/{top}.tar.gz")


def write_checksums() -> None:
    """Writes SHA256SUMS of everything in dist/, for `sha256sum --check`."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(DIST.iterdir())
        if path.name != "SHA256SUMS"
    ]
    (DIST / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    say(f"dist/SHA256SUMS of {len(lines)} files")


def build_dist() -> None:
    say("Packing the source")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(DIST)], "sdist", env=environment())
    for arch in DEBIAN_ARCH:
        pack_programs(cpu_wheel(arch))
    write_checksums()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="wheel.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=sorted(DEBIAN_ARCH), default="x86_64")
    parser.add_argument("--cuda", metavar="ARCHITECTURES", help="80;90, for example")
    parser.add_argument("--dist", action="store_true")
    args = parser.parse_args()
    pip("install", "--quiet", *TOOLS)
    if args.dist:
        build_dist()
    elif args.cuda is not None:
        cuda_wheel(args.cuda)
    else:
        cpu_wheel(args.arch)


if __name__ == "__main__":
    run_main(main)
