#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes a folder with the headers and libraries that wheels are linked against.

    sysroot.py DIR [--arch amd64|arm64]

The C and C++ libraries are Debian 11's.  It has glibc 2.31, so the wheels run there, on Ubuntu 22.04 and on everything
newer.  OpenSSL is Debian 12's, as static libraries, because Debian 11 has OpenSSL 1.1, which llama.cpp does not take.
apt downloads the packages from the mirror that this Debian machine uses, and checks them with its keys.  They are
unpacked into DIR.  Nothing is installed, and root is not needed.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import tempfile

from _cli import Failure, run_main

PACKAGES = {
    "bullseye": (
        "libc6 libc6-dev linux-libc-dev libcrypt-dev libcrypt1 libgcc-s1 libgcc-10-dev libstdc++6 libstdc++-10-dev"
    ),
    "bookworm": "libssl-dev",
}
STAMP = ".tbq-sysroot"


def mirror() -> str:
    """Returns the URI of Debian's main archive in this machine's apt sources."""
    folder = pathlib.Path("/etc/apt")
    for path in [folder / "sources.list", *sorted(folder.glob("sources.list.d/*"))]:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            found = re.match(r"(?:URIs:|deb\s+(?:\[[^]]*\]\s+)?)\s*(\S+/debian/?)(?:\s|$)", line)
            if found:
                return found[1]
    raise Failure("this machine's apt sources have no Debian archive; run this on Debian 12 or in a container of it")


def run(command: list[str], folder: pathlib.Path) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        output = done.stdout.splitlines()
        lines = [line for line in output if line.startswith("E:")] or output or ["no message"]
        raise Failure(f"{command[0]} failed: {lines[-1]}")


def download(folder: pathlib.Path, suite: str, arch: str, packages: list[str]) -> list[pathlib.Path]:
    """Downloads packages of a suite, and returns the .deb files."""
    state = folder / suite
    for part in ("lists/partial", "cache/archives/partial", "debs"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    sources = state / "sources.list"
    sources.write_text(f"deb {mirror()} {suite} main\n", encoding="utf-8")
    options = [
        f"Dir::Etc::SourceList={sources}",
        "Dir::Etc::SourceParts=/dev/null",
        f"Dir::State={state}",
        f"Dir::State::status={state / 'status'}",
        f"Dir::State::Lists={state / 'lists'}",
        f"Dir::Cache={state / 'cache'}",
        f"APT::Architecture={arch}",
        f"APT::Architectures={arch}",
        "APT::Sandbox::User=",
    ]
    apt = ["apt-get", *(part for option in options for part in ("-o", option))]
    run([*apt, "update"], state)
    run([*apt, "download", *packages], state / "debs")
    return sorted((state / "debs").glob("*.deb"))


def relative_links(root: pathlib.Path) -> None:
    """Makes absolute links relative, because they would point out of the folder."""
    for path in root.rglob("*"):
        if path.is_symlink() and path.readlink().is_absolute():
            target = root / path.readlink().relative_to("/")
            path.unlink()
            path.symlink_to(pathlib.Path(*[".."] * (len(path.relative_to(root).parts) - 1)) / target.relative_to(root))


def make(root: pathlib.Path, arch: str) -> None:
    if (root / STAMP).is_file() and (root / STAMP).read_text(encoding="utf-8") == arch:
        return
    if root.exists() and any(root.iterdir()):
        raise Failure(f"{root} is not empty, and is not a sysroot for {arch}")
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise Failure(f"{program} is not installed; run this on Debian 12 or in a container of it")
    with tempfile.TemporaryDirectory() as tmp:
        for suite, packages in PACKAGES.items():
            for package in download(pathlib.Path(tmp), suite, arch, packages.split()):
                root.mkdir(parents=True, exist_ok=True)
                run(["dpkg-deb", "-x", str(package), str(root)], root)
    relative_links(root)
    (root / STAMP).write_text(arch, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="sysroot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--arch", choices=["amd64", "arm64"], default="amd64")
    args = parser.parse_args()
    make(args.folder.absolute(), args.arch)


if __name__ == "__main__":
    run_main(main)
