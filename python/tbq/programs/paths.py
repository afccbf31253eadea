# SPDX-License-Identifier: MIT
"""The paths of the patched llama.cpp in this installation."""

import json
import pathlib

from tbq import _ffi
from tbq._version import __version__
from tbq.errors import TBQError

#: Built files are next to the extension module.  After `pip install -e` that is not the folder of this file.
_PACKAGE = pathlib.Path(_ffi.__file__).resolve().parent


def paths() -> dict[str, str]:
    """Where the patched llama.cpp is, and what it was built from: a dict of strings.

    bin: folder of llama-server, llama-cli and the other programs.
    lib: folder of libllama and the other libraries; it is LLAMA_CPP_LIB_PATH of llama-cpp-python.
    llama_cpp_commit: the upstream commit that the patches are based on.
    llama_cpp_python: the release of llama-cpp-python whose bindings fit these libraries.
    tls: "yes" or "no", whether llama-server can serve https.
    Raises TBQError if the package was built without llama.cpp.
    """
    try:
        build = json.loads((_PACKAGE / "build.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TBQError(f"{_PACKAGE} has no programs; it was built with -DTBQ_LLAMA=OFF") from None
    return {"bin": str(_PACKAGE / "bin"), "lib": str(_PACKAGE / "lib"), **build}


def program(name: str) -> pathlib.Path:
    """The path of a program of llama.cpp, "llama-server" for example; TBQError if it is not installed."""
    folder = _PACKAGE / "bin"
    for path in (folder / name, folder / f"{name}.exe"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in folder.glob("*-*"))
    raise TBQError(f"program {name!r} is not in {folder}; there is {', '.join(names) or 'none'}")


def versions() -> dict[str, str]:
    """The versions that a measurement reports."""
    return {"tbq": __version__, "llama_cpp_commit": paths()["llama_cpp_commit"]}
