# SPDX-License-Identifier: MIT
"""What surrounds the code: licenses, notices, one version everywhere, and documents that quote what exists."""

import importlib.metadata
import pathlib
import re
import subprocess

import pytest

import tbq
from conftest import ROOT

SPDX = "SPDX-License-Identifier: MIT"
SOURCES = {".c", ".cdef", ".cmake", ".cpp", ".cu", ".cuh", ".h", ".inc", ".py", ".pyi", ".sh"}
NOTICES = (ROOT / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tracked():
    """Paths of the files in the repository, relative to its root."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is not a git checkout, so its own files are not known")
    return [pathlib.PurePath(name) for name in done.stdout.splitlines() if (ROOT / name).is_file()]


# --- the license ------------------------------------------------------------------------------------------------------


def is_source(path):
    if path.suffix in SOURCES or path.name in ("CMakeLists.txt", "Makefile"):
        return True
    with open(ROOT / path, "rb") as file:
        return file.read(2) == b"#!"


def test_every_source_file_names_its_license(tracked):
    sources = [path for path in tracked if is_source(path)]
    assert len(sources) > 150
    lacking = [str(path) for path in sources if SPDX not in "".join(read(path).splitlines(keepends=True)[:2])]
    assert not lacking, f"without // or # {SPDX} in the first two lines: {', '.join(lacking)}"


def test_installed_package_has_the_license():
    package = importlib.metadata.distribution("ggml-tbq")
    assert package.metadata["License-Expression"] == "MIT"
    assert read("LICENSE").startswith("MIT License\n\nCopyright (c) 2026 the ggml-tbq developers\n")
    for name in ("LICENSE", "THIRD_PARTY_NOTICES.md"):
        assert package.read_text(f"licenses/{name}") == read(name), f"{name} of the installed package; make install"


def test_no_extra_is_empty():
    package = importlib.metadata.distribution("ggml-tbq")
    for extra in package.metadata.get_all("Provides-Extra"):
        assert any(f'extra == "{extra}"' in line or f"extra == '{extra}'" in line for line in package.requires), extra


# --- the notices ------------------------------------------------------------------------------------------------------

# a wrapper by llama.cpp around the folders in it
OWN = {"vendor/hash"}
VERSIONS = {
    "vendor/cpp-httplib": ("httplib.h", r'#define CPPHTTPLIB_VERSION "([\d.]+)"'),
    "vendor/hash/xxhash": ("xxhash.h", r"#define XXH_VERSION_(?:MAJOR|MINOR|RELEASE) +(\d+)"),
    "vendor/miniaudio": ("miniaudio.h", r"#define MA_VERSION_(?:MAJOR|MINOR|REVISION) +(\d+)"),
    "vendor/nlohmann": ("json.hpp", r"#define NLOHMANN_JSON_VERSION_(?:MAJOR|MINOR|PATCH) +(\d+)"),
    "vendor/stb": ("stb_image.h", r"stb_image - v([\d.]+)"),
}


def words(text):
    """The words of a text, without line breaks, comment marks and indentation."""
    return " ".join(re.sub(r"(?m)^\s*(?://|\*|#)+|\s+", " ", text).split())


@pytest.fixture(scope="module")
def tree(build_dir):
    return build_dir / "llama.cpp-src"


@pytest.fixture(scope="module")
def rows():
    """The table of the notices: {source: (software, version)}."""
    found = {}
    for line in re.findall(r"(?m)^\| (.+) \|$", NOTICES)[1:]:
        software, version, _, sources, _ = [cell.strip() for cell in line.split("|")]
        found.update(dict.fromkeys(re.findall(r"`([^`]+)`", sources), (software, version)))
    return found


def test_notices_name_every_vendored_library(tree, rows):
    vendored = {
        path.parent.relative_to(tree).as_posix()
        for path in (tree / "vendor").rglob("*")
        if path.suffix in (".c", ".cpp", ".h", ".hpp")
    }
    assert len(vendored) > 5
    assert vendored - OWN == {source for source in rows if source.startswith("vendor/")}


def test_notices_have_every_license_file(tree, build_dir):
    files = [
        path
        for pattern in ("LICEN[CS]E*", "COPYING*")
        for folder in ("vendor", "licenses")
        for path in (tree / folder).rglob(pattern)
    ]
    assert len(files) >= 5
    for path in (tree / "LICENSE", build_dir / "bindings" / "LICENSE.md", *files):
        assert words(path.read_text(encoding="utf-8")) in words(NOTICES), path


def test_notices_have_the_licenses_inside_sources(tree):
    """Libraries of one file: the notices have the text of the license in that file."""
    for section, name in (
        ("stb_image", "vendor/stb/stb_image.h"),
        ("miniaudio", "vendor/miniaudio/miniaudio.h"),
        ("subprocess.h", "vendor/sheredom/subprocess.h"),
        ("base64.hpp", "common/base64.hpp"),
        ("llamafile's matrix product", "ggml/src/ggml-cpu/llamafile/sgemm.cpp"),
    ):
        text = re.search(rf"## {re.escape(section)}\n\n```text\n(.*?)```", NOTICES, re.S)[1]
        assert len(text) > 800
        assert words(text) in words((tree / name).read_text(encoding="utf-8")), name


def test_notices_have_the_versions(tree, rows):
    for source, (name, pattern) in VERSIONS.items():
        found = ".".join(re.findall(pattern, (tree / source / name).read_text(encoding="utf-8"))[:3])
        assert rows[source][1] == found, source
    pin = read("patches/pin.json")
    assert rows["LICENSE"][1] in pin
    assert f"llama-cpp-python | {re.search(r'llama-cpp-python==([0-9.]+)', pin)[1]} |" in NOTICES


def test_notices_name_every_copyright(tree):
    """Every copyright in compiled files.

    It also finds holders whose code llama.cpp copies into its own files.
    """
    folders = ("ggml/src/ggml-cpu", "ggml/src/ggml-cuda", "src", "common", "tools", "vendor")
    sources = [
        *(tree / "ggml" / "src").glob("*.*"),
        *(path for folder in folders for path in (tree / folder).rglob("*")),
    ]
    holders = set()
    for path in sources:
        if (
            path.suffix in (".c", ".cpp", ".cu", ".cuh", ".h", ".hpp") and "kleidiai" not in path.parts
        ):  # kleidiai is an option that is off
            holders.update(
                re.findall(
                    r"(?:Copyright(?: \(c\))?|SPDX-FileCopyrightText:) *\d{4}[\d ,-]* ([^<.\n]+)",
                    path.read_text(encoding="utf-8", errors="replace"),
                    re.I,
                )
            )
    assert {"Mozilla Foundation", "Yann Collet"} <= {holder.strip() for holder in holders}
    assert not [holder for holder in holders if holder.strip() not in NOTICES]


# --- the version ------------------------------------------------------------------------------------------------------


def test_one_version():
    header = read("ggml_tbq/include/tbq.h")
    version = ".".join(
        re.search(rf"#define TBQ_VERSION_{part} +(\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH")
    )
    assert tbq.__version__ == version, "the library that is installed; make install"
    assert importlib.metadata.version("ggml-tbq") == version
    assert re.search(r"(?m)^version: (.+)$", read("CITATION.cff"))[1] == version
    headings = re.findall(r"(?m)^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"))
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (version, re.search(r'(?m)^date-released: "(.+)"$', read("CITATION.cff"))[1])


def test_version_stands_in_the_header_alone():
    for name in ("CMakeLists.txt", "pyproject.toml", "python/tbq/_version.py"):
        assert not re.search(rf"\b{re.escape(tbq.__version__)}\b", read(name)), name


# --- documents --------------------------------------------------------------------------------------------------------


def test_links_lead_to_files(tracked):
    """Links to places in this repository, from every document."""
    count = 0
    for path in tracked:
        if path.suffix == ".md":
            for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", read(path)):
                assert (ROOT / path.parent / target).exists(), f"{path}: {target}"
                count += 1
    assert count > 50


def messages():
    """Every text of the build, the commands, the patches and RPC. Adjacent literals are joined."""
    names = [
        ROOT / "CMakeLists.txt",
        *ROOT.glob("cmake/*.*"),
        *ROOT.glob("tools/*.py"),
        *ROOT.rglob("python/tbq/**/*.py"),
        *ROOT.glob("patches/*.patch"),
        *ROOT.glob("ggml_tbq/rpc/*.cpp"),
    ]
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in names)
    return re.sub(r'"\s*\n[+\s]*f?"', "", text)


def test_troubleshooting_quotes_messages_that_exist():
    quotes = re.findall(r"(?m)^\| `(.+?)` \|", read("docs/guide/troubleshooting.md"))
    assert len(quotes) > 25
    text = messages()
    for quote in quotes:
        parts = [part for part in quote.split("…") if part]
        assert max(map(len, parts)) >= 12, f"too little of {quote!r} to be found"
        assert re.search("[^\n]*?".join(map(re.escape, parts)), text), f"no message says {quote!r}"


def test_readme_repeats_figures_of_their_page():
    """Every divergence in the README is on the page that owns it, digit for digit."""
    found = re.findall(r"\b\d\.\d{4}\b", read("README.md"))
    assert len(found) > 30
    owners = read("docs/measurements/quality.md") + read("docs/measurements/exact.md")
    owned = set(re.findall(r"\b\d\.\d{4}\b", owners))
    assert not [figure for figure in found if figure not in owned]
