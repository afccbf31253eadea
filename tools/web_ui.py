#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""web_ui.py DIR: builds llama-server's web UI in DIR/dist if npm can; otherwise prints one line that says why not.

The default build has no UI, because it would need npm and many packages.  llama-server can serve this folder with
--path, so it need not be built again.  The exit status is 0 either way.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from install import build_dir

MINUTES = 15


def run(command: list[str], folder: pathlib.Path, log: pathlib.Path, **environment: str) -> None:
    with open(log, "a", encoding="utf-8") as file:
        subprocess.run(
            command,
            cwd=folder,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=60 * MINUTES,
            env={**os.environ, **environment},
        )


def build(source: pathlib.Path, target: pathlib.Path) -> None:
    """Builds in a temporary folder and renames it at the end, so that an interrupted build never looks complete."""
    log = target.parent / "npm.log"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as tmp:
        work, dist = pathlib.Path(tmp, "src"), pathlib.Path(tmp, "dist")
        shutil.copytree(source, work)
        # the packages' install scripts are not needed, so they are not run
        run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"], work, log)
        run(["npm", "run", "build"], work, log, LLAMA_UI_OUT_DIR=str(dist))
        if not (dist / "index.html").is_file():
            raise FileNotFoundError("index.html")
        os.replace(dist, target)


def main(folder: pathlib.Path) -> None:
    target = folder / "dist"
    if (target / "index.html").is_file():
        return
    if not shutil.which("npm"):
        print("No web UI: npm is not installed.  The API is not affected.", flush=True)
        return
    built = build_dir()
    if built is None:
        print("No web UI: llama.cpp is not built yet; make demo builds it.  The API is not affected.", flush=True)
        return
    source = built / "llama.cpp-src" / "tools" / "ui"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    print("Building the web UI with npm (once, about 3 minutes; needs the npm registry)", flush=True)
    try:
        build(source, target)
    except (subprocess.SubprocessError, OSError):
        print(
            f"No web UI: npm could not build it ({folder / 'npm.log'} says why).  The API is not affected.", flush=True
        )


if __name__ == "__main__":
    try:
        main(pathlib.Path(sys.argv[1]).absolute())
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
