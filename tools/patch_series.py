#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The pinned llama.cpp and the patch series on top of it (standard library only).

    patch_series.py prepare DIR [--source TREE]   DIR becomes the pin with patches/*.patch applied
    patch_series.py bindings DIR                  llama-cpp-python's own files, which fit the pin
    patch_series.py size                          the size of the series: all, fixes of upstream, seams
    patch_series.py git-tree DIR                  a git repository to edit: tag `pin`, then one commit per patch
    patch_series.py export DIR                    write the commits after tag `pin` of that repository to patches/
    patch_series.py bump NAME==VERSION            carry the series over to another llama.cpp (docs/guide/bump.md)

The pin (patches/pin.json) is a folder of a source distribution.  pip fetches it, so it comes through whatever
index the user has configured.  Every error ends in one line and leaves nothing half-written: trees are built
next to their place and renamed into it.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from _cli import Failure, run_main

#: What patches/pin.json says.
Pin = dict[str, str]
#: Of a bump that is not finished.
State = dict[str, Any]
Result = subprocess.CompletedProcess[str]

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
DOWNLOADS = ROOT / "build" / "downloads"
STAMP = ".tbq-stamp"
NO_FILE = "0" * 40
# Bump when a change here must rebuild trees that are already prepared.
LAYOUT = "1"


def say(text: str) -> None:
    print(f"tbq: {text}", flush=True)


def read_pin() -> Pin:
    path = PATCHES / "pin.json"
    try:
        pin: Pin = json.loads(path.read_text(encoding="utf-8"))
        missing = [k for k in ("requirement", "sha256", "folder", "commit") if not isinstance(pin.get(k), str)]
    except (OSError, ValueError, AttributeError) as error:
        raise Failure(f"patches/pin.json cannot be read: {error}") from None
    if missing:
        raise Failure(f"patches/pin.json lacks {', '.join(missing)}")
    return pin


def series() -> list[pathlib.Path]:
    """The patches in the order in which they apply."""
    return sorted(PATCHES.glob("*.patch"))


# --- running things ---------------------------------------------------------------------------------------------


def last_line(text: str, default: str = "no message") -> str:
    """The line of a tool's output that says what went wrong: the last error, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error|fatal)\b", line, re.I)]
    return (errors or lines or [default])[-1]


def run(command: list[str], **options: Any) -> Result:
    try:
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            **options,
        )
    except FileNotFoundError:
        raise Failure(f"{command[0]} is not installed; it is needed to prepare llama.cpp") from None


def git(arguments: list[str], folder: pathlib.Path, check: bool = True) -> Result:
    """Runs git in a folder as if no repository lay above it.

    The trees live inside this project's own checkout, in an ignored folder.  There, `git apply` would take the
    paths as relative to the outer repository, skip every hunk without a word and exit with 0.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)
    env["GIT_CONFIG_NOSYSTEM"] = "1"
    env["GIT_CONFIG_GLOBAL"] = os.devnull
    env["LC_ALL"] = "C"
    result = run(["git", "-c", "core.autocrlf=false", "-c", "core.safecrlf=false", *arguments], cwd=folder, env=env)
    if check and result.returncode != 0:
        raise Failure(f"git {arguments[0]} failed: {last_line(result.stdout)}")
    return result


# --- fetching the pin -------------------------------------------------------------------------------------------


def sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def cached_sdist(pin: Pin) -> pathlib.Path | None:
    return next((p for p in sorted(DOWNLOADS.glob("*.tar.gz")) if sha256(p) == pin["sha256"]), None)


def pip_error(output: str, pin: Pin) -> str:
    """One line out of pip's many."""
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        return (
            f"the index's {pin['requirement']} has sha256 {got[1] if got else '?'}, "
            f"patches/pin.json says {pin['sha256']}"
        )
    if "No space left" in output:
        return f"no disk space left for {pin['requirement']} (250 MB needed)"
    if "No module named pip" in output:
        return f"{sys.executable} has no pip, which fetches {pin['requirement']}"
    return f"{pin['requirement']} cannot be downloaded from the configured package index: {last_line(output)}"


def download(pin: Pin, *arguments: str) -> pathlib.Path:
    """A source distribution into DOWNLOADS, through pip with these arguments; verified if its hash is known."""
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    for leftover in DOWNLOADS.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=DOWNLOADS, prefix=".tmp-") as tmp:
        wanted = pathlib.Path(tmp, "requirements.txt")
        known = f" --hash=sha256:{pin['sha256']}" if "sha256" in pin else ""
        wanted.write_text(f"{pin['requirement']}{known}\n", encoding="utf-8")
        result = run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--disable-pip-version-check",
                "--no-input",
                "--no-deps",
                "--no-binary",
                pin["requirement"].split("==")[0],
                *arguments,
                "--dest",
                tmp,
                "--requirement",
                str(wanted),
            ]
        )
        files = list(pathlib.Path(tmp).glob("*.tar.gz"))
        if result.returncode != 0 or len(files) != 1:
            raise Failure(pip_error(result.stdout, pin))
        if known and sha256(files[0]) != pin["sha256"]:
            raise Failure(pip_error(f"DO NOT MATCH THE HASHES Got {sha256(files[0])}", pin))
        os.replace(files[0], DOWNLOADS / files[0].name)
        return DOWNLOADS / files[0].name


def fetch_sdist(pin: Pin) -> pathlib.Path:
    """The pin's source distribution, verified; downloaded on the first call."""
    found = cached_sdist(pin)
    if found:
        return found
    say(f"downloading {pin['requirement']} (73 MB, once)")
    # No build isolation: pip asks the sdist for its metadata, and its build back end is this project's too.
    return download(pin, "--no-build-isolation", "--require-hashes")


def extract_pin(pin: Pin, sdist: pathlib.Path, target: pathlib.Path) -> None:
    """Unpacks the pin's folder of the source distribution into target, which does not exist yet."""
    say(f"unpacking llama.cpp {pin['commit']}")
    target.mkdir()
    with tarfile.open(sdist) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            if not path.startswith(pin["folder"] + "/"):
                continue
            member.name = path[len(pin["folder"]) + 1 :]
            # .git is a file that points into a repository which is not there.
            if member.name == ".git" or not (member.isfile() or member.isdir()):
                continue
            # The filter refuses paths outside target; Pythons before 3.10.12 do not know it (the hash still holds).
            safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extract(member, target, **safe)
    if not (target / "CMakeLists.txt").is_file():
        raise Failure(f"{sdist.name} has no {pin['folder']}/CMakeLists.txt{others_than(pin['folder'], sdist)}")


def others_than(folder: str, sdist: pathlib.Path) -> str:
    """For a message: folders of a source distribution that hold a llama.cpp."""
    with tarfile.open(sdist) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
    found = sorted(name.removesuffix("/ggml/CMakeLists.txt") for name in names if name.endswith("/ggml/CMakeLists.txt"))
    return f"; it has {', '.join(found)}" if found and folder not in found else ""


def left_out(source: pathlib.Path) -> Callable[[str, list[str]], list[str]]:
    """For shutil.copytree: build folders and repository data stay behind."""

    def ignore(folder: str, names: list[str]) -> list[str]:
        top = pathlib.Path(folder) == source
        return [
            name
            for name in names
            if name in ("node_modules", "__pycache__")
            or top
            and (name == ".git" or name.startswith("build") and (source / name).is_dir())
        ]

    return ignore


def copy_source(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a tree that the user has."""
    if not (source / "ggml" / "CMakeLists.txt").is_file():
        raise Failure(f"TBQ_LLAMA_CPP_SOURCE={source} is not a llama.cpp source tree")
    say(f"copying llama.cpp from {source}")
    shutil.copytree(source, target, symlinks=True, ignore=left_out(source))


def fingerprint(source: pathlib.Path) -> str:
    """Changes when a file of the user's tree does: names, sizes and times."""
    ignore = left_out(source)
    digest = hashlib.sha256(str(source).encode())
    for folder, folders, files in os.walk(source):
        skip = set(ignore(folder, folders + files))
        folders[:] = sorted(set(folders) - skip)
        for name in sorted(set(files) - skip):
            status = os.lstat(os.path.join(folder, name))
            digest.update(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# --- patches ----------------------------------------------------------------------------------------------------


def touched_files(patch: pathlib.Path) -> list[tuple[str, str, str]]:
    """(path, blob id before, blob id after) of each file in a patch; NO_FILE where there is no file."""
    found = []
    path: str | None = None
    for line in patch.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if line.startswith("diff --git a/"):
            path = line.split(" b/", 1)[1]
        index = re.match(r"index ([0-9a-f]+)\.\.([0-9a-f]+)", line)
        if index and path:
            if len(index[1]) != 40:
                raise Failure(f"{patch.name}: index line of {path} is abbreviated; write it with --full-index")
            found.append((path, index[1], index[2]))
            path = None
    if not found:
        raise Failure(f"{patch.name} touches no file; is it complete?")
    return found


def blob_id(path: pathlib.Path) -> str:
    """The id git gives a file's content."""
    if not path.is_file():
        return NO_FILE
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_pristine(tree: pathlib.Path, patches: list[pathlib.Path], pin: Pin, what: str) -> None:
    """Every file that the series touches must be exactly the one that it was made for.

    The series itself holds the list: the `index` line of a file's first hunk names its content by hash.
    """
    seen: set[str] = set()
    for patch in patches:
        for path, before, _ in touched_files(patch):
            if path not in seen and blob_id(tree / path) != before:
                raise Failure(
                    f"{what} is not the pinned version, llama.cpp {pin['commit']} "
                    f"({pin['requirement']}): {path} differs"
                )
            seen.add(path)


def apply_patch(tree: pathlib.Path, patch: pathlib.Path, pin: Pin) -> None:
    result = git(["apply", "--whitespace=nowarn", str(patch)], tree, check=False)
    if result.returncode != 0:
        failed = re.search(r"patch failed: (.+):(\d+)", result.stdout)
        where = f"{failed[1]} line {failed[2]}" if failed else last_line(result.stdout)
        raise Failure(f"patch {patch.name} does not apply to llama.cpp {pin['commit']}: {where}")
    for path, _, after in touched_files(patch):
        if blob_id(tree / path) != after:
            raise Failure(f"patch {patch.name} left {path} with other content than it promises")


def header_of(patch: pathlib.Path) -> str:
    return patch.read_text(encoding="utf-8", errors="surrogateescape").split("\ndiff --git ", 1)[0]


def is_fix(patch: pathlib.Path) -> bool:
    """A fix of upstream stands alone and names nothing of this project; its header says `Kind: fix of upstream`."""
    return re.search(r"^Kind: fix of upstream$", header_of(patch), re.M) is not None


def changed_lines(patch: pathlib.Path) -> list[tuple[str, str]]:
    """What a patch adds and removes in files that upstream has: [(path, "+" or "-"), ...]."""
    new = {path for path, before, _ in touched_files(patch) if before == NO_FILE}
    changes = []
    path: str | None = None
    header = True
    for line in patch.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if line.startswith("diff --git a/"):
            path, header = line.split(" b/", 1)[1], True
        elif line.startswith("@@"):
            header = False
        elif line == "-- ":
            path = None
        elif path and not header and path not in new and line[:1] in "+-" and line:
            changes.append((path, line[0]))
    return changes


def size_of(patches: list[pathlib.Path]) -> str:
    changes = [change for patch in patches for change in changed_lines(patch)]
    added = sum(sign == "+" for _, sign in changes)
    return (
        f"{len(patches)} patches, {len(changes)} changed lines (+{added} -{len(changes) - added}) "
        f"in {len({path for path, _ in changes})} upstream files"
    )


def series_size(patches: list[pathlib.Path]) -> str:
    """Changed lines in files that upstream has, the figures that the project keeps low."""
    fixes = [patch for patch in patches if is_fix(patch)]
    seams = [patch for patch in patches if not is_fix(patch)]
    return f"patch series: {size_of(patches)}; fixes of upstream: {size_of(fixes)}; seams: {size_of(seams)}"


# --- prepare ----------------------------------------------------------------------------------------------------


def stamp_of(pin: Pin, patches: list[pathlib.Path], source: pathlib.Path | None) -> str:
    digest = hashlib.sha256(f"{LAYOUT}\n{json.dumps(pin, sort_keys=True)}\n".encode())
    if source:
        digest.update(fingerprint(source).encode())
    for patch in patches:
        digest.update(f"{patch.name}\n".encode() + hashlib.sha256(patch.read_bytes()).digest())
    return digest.hexdigest() + "\n"


def relative_files(tree: pathlib.Path) -> set[pathlib.Path]:
    return {p.relative_to(tree) for p in tree.rglob("*") if p.is_file() or p.is_symlink()}


def replace_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Atomic, and with the time of now, so that the build sees the change."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tbq-partial")
    shutil.copyfile(source, partial)
    shutil.copymode(source, partial)
    os.replace(partial, target)


def synchronize(fresh: pathlib.Path, tree: pathlib.Path) -> int:
    """Makes tree equal to fresh, but leaves the time of every unchanged file alone: the next build is short."""
    wanted = relative_files(fresh)
    for path in relative_files(tree) - wanted:
        (tree / path).unlink()
    changed = 0
    for path in sorted(wanted):
        new, old = fresh / path, tree / path
        if not old.is_file() or old.read_bytes() != new.read_bytes():
            replace_file(new, old)
            changed += 1
    return changed


def build_fresh(fresh: pathlib.Path, pin: Pin, patches: list[pathlib.Path], source: pathlib.Path | None) -> None:
    if source:
        copy_source(source, fresh)
        check_pristine(fresh, patches, pin, f"TBQ_LLAMA_CPP_SOURCE={source}")
    else:
        extract_pin(pin, fetch_sdist(pin), fresh)
    for patch in patches:
        apply_patch(fresh, patch, pin)


def prepare(tree: pathlib.Path, source: pathlib.Path | None = None) -> None:
    pin = read_pin()
    patches = series()
    stamp = stamp_of(pin, patches, source)
    print(f"tbq: {series_size(patches)}", flush=True)
    if (tree / STAMP).is_file() and (tree / STAMP).read_text() == stamp:
        return
    git(["--version"], ROOT)
    tree.parent.mkdir(parents=True, exist_ok=True)
    for leftover in tree.parent.glob(f".{tree.name}-tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    tmp = pathlib.Path(tempfile.mkdtemp(dir=tree.parent, prefix=f".{tree.name}-tmp-"))
    try:
        fresh = tmp / "tree"
        build_fresh(fresh, pin, patches, source)
        if tree.exists():
            (tree / STAMP).unlink(missing_ok=True)
            say(f"llama.cpp: {synchronize(fresh, tree)} files changed")
            (tree / STAMP).write_text(stamp)
        else:
            (fresh / STAMP).write_text(stamp)
            os.replace(fresh, tree)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def bindings(folder: pathlib.Path) -> None:
    """The Python bindings of the pin's source distribution, pure Python, into a folder: they fit its llama.cpp."""
    pin = read_pin()
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == pin["sha256"]:
        return
    sdist = fetch_sdist(pin)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}-tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    tmp = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-tmp-"))
    try:
        with tarfile.open(sdist) as tar:
            for member in tar:
                _, _, path = member.name.partition("/")
                file = tar.extractfile(member)  # None for what is not a file
                if file and re.fullmatch(r"llama_cpp/\w+\.py|llama_cpp/py\.typed|LICENSE\.md", path):
                    (tmp / pathlib.Path(path).name).write_bytes(file.read())
        if not (tmp / "llama_cpp.py").is_file():
            raise Failure(f"{sdist.name} has no llama_cpp/llama_cpp.py")
        (tmp / STAMP).write_text(pin["sha256"])
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# --- editing the series -----------------------------------------------------------------------------------------

#: The author of every patch, whoever committed it.
NAME, EMAIL = "ggml-tbq", "tbq@example.invalid"
AUTHOR = [
    "-c",
    f"user.name={NAME}",
    "-c",
    f"user.email={EMAIL}",
    "-c",
    "commit.gpgsign=false",
    "-c",
    "core.hooksPath=" + os.devnull,
]


def commit_pristine(tree: pathlib.Path, pin: Pin) -> None:
    """Everything in a repository's folder becomes a commit with the tag `pin`."""
    git(["add", "--all", "--force"], tree)
    git([*AUTHOR, "commit", "-q", "--no-verify", "-m", f"llama.cpp {pin['commit']}"], tree)
    git(["tag", "-f", "pin"], tree)


def apply_mail(tree: pathlib.Path, patch: pathlib.Path, *options: str) -> Result:
    """Applies a patch as a commit: git's result."""
    return git([*AUTHOR, "am", *options, "--whitespace=nowarn", "--keep-cr", str(patch)], tree, check=False)


def git_tree(tree: pathlib.Path) -> None:
    """A repository with the pristine pin (tag `pin`) and each patch as a commit."""
    if tree.exists():
        raise Failure(f"{tree} exists already; name a new folder")
    pin = read_pin()
    tree.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(dir=tree.parent, prefix=f".{tree.name}-tmp-"))
    try:
        fresh = tmp / "tree"
        extract_pin(pin, fetch_sdist(pin), fresh)
        git(["init", "-q", "-b", "tbq"], fresh)
        commit_pristine(fresh, pin)
        for patch in series():
            result = apply_mail(fresh, patch, "-q")
            if result.returncode != 0:
                failed = re.search(r"patch failed: (.+):(\d+)", result.stdout)
                where = f"{failed[1]} line {failed[2]}" if failed else last_line(result.stdout)
                raise Failure(f"patch {patch.name} does not apply to llama.cpp {pin['commit']}: {where}")
        os.replace(fresh, tree)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def with_one_author(patch: bytes) -> bytes:
    """A patch as bytes, with the project's author in place of its own; a long name is folded over several lines."""
    return re.sub(rb"^From: .*(\n[ \t].*)*$", f"From: {NAME} <{EMAIL}>".encode(), patch, count=1, flags=re.M)


def export(tree: pathlib.Path, pin: Pin | None = None) -> None:
    """Replaces patches/*.patch with the commits after tag `pin`; the same commits give the same bytes.

    pin: what pin.json shall say then.
    """
    if not (tree / ".git").exists():
        raise Failure(f"{tree} is not a git repository; make one with `patch_series.py git-tree`")
    if git(["status", "--porcelain", "--untracked-files=no"], tree).stdout.strip():
        raise Failure(f"{tree} has changes that are not committed")
    with tempfile.TemporaryDirectory(dir=PATCHES, prefix=".tmp-") as tmp:
        git(
            [
                "format-patch",
                "-q",
                "--zero-commit",
                "--no-signature",
                "--full-index",
                "-N",
                "--no-renames",
                "--diff-algorithm=histogram",
                "--src-prefix=a/",
                "--dst-prefix=b/",
                "-o",
                tmp,
                "pin..HEAD",
            ],
            tree,
        )
        new = sorted(pathlib.Path(tmp).glob("*.patch"))
        if not new:
            raise Failure(f"{tree} has no commit after tag pin")
        for patch in new:
            patch.write_bytes(with_one_author(patch.read_bytes()))
        if pin:
            pathlib.Path(tmp, "pin.json").write_text(json.dumps(pin, indent=4) + "\n", encoding="utf-8")
            new.append(pathlib.Path(tmp, "pin.json"))
        # all is written; from here on files are only renamed and removed
        for file in new:
            os.replace(file, PATCHES / file.name)
        for old in {p.name for p in series()} - {p.name for p in new}:
            (PATCHES / old).unlink()
    say(series_size(series()))


# --- another llama.cpp ------------------------------------------------------------------------------------------

# A bump that is not finished: `tree` is the repository in which it happens, state.json what has been done.
BUMP = ROOT / "build" / "bump"
TREE = BUMP / "tree"
GO_ON = "then run `make bump CONTINUE=1`"


def read_state() -> State:
    try:
        state: State = json.loads((BUMP / "state.json").read_text(encoding="utf-8"))
    except OSError:
        raise Failure("no bump is in progress; `make bump PIN=NAME==VERSION` starts one") from None
    return state


def write_state(state: State) -> None:
    partial = BUMP / "state.json.tbq-partial"
    partial.write_text(json.dumps(state, indent=4) + "\n", encoding="utf-8")
    os.replace(partial, BUMP / "state.json")


def start_bump(requirement: str, folder: str | None, commit: str | None, trial: bool) -> None:
    """A repository with the new pin, and branch `old` with today's series: a three-way merge needs its files."""
    if BUMP.exists():
        raise Failure(
            f"a bump to {read_state()['pin']['requirement']} is in progress in {BUMP}: "
            "`make bump CONTINUE=1` or `make bump ABORT=1`"
        )
    if not re.fullmatch(r"[\w.-]+==[\w.+!-]+", requirement):
        raise Failure(f"PIN {requirement!r} is not NAME==VERSION, as in llama-cpp-python==0.3.36")
    say(f"downloading {requirement}")
    sdist = download({"requirement": requirement})
    pin = {
        "requirement": requirement,
        "sha256": sha256(sdist),
        "folder": folder or read_pin()["folder"],
        "commit": commit or requirement.replace("==", "-"),
    }
    BUMP.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(dir=BUMP.parent, prefix=f".{BUMP.name}-tmp-"))
    try:
        extract_pin(pin, sdist, tmp / "new")
        git_tree(tmp / "tree")
        git(["branch", "-m", "tbq", "old"], tmp / "tree")
        git(["symbolic-ref", "HEAD", "refs/heads/tbq"], tmp / "tree")
        os.rename(tmp / "tree" / ".git", tmp / "new" / ".git")
        shutil.rmtree(tmp / "tree")
        os.rename(tmp / "new", tmp / "tree")
        commit_pristine(tmp / "tree", pin)
        shutil.copytree(PATCHES, tmp / "patches")
        state = {"pin": pin, "trial": trial, "done": {}}
        (tmp / "state.json").write_text(json.dumps(state), encoding="utf-8")
        os.rename(tmp, BUMP)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    if not has_bindings(sdist):
        say(f"{sdist.name} has no llama_cpp/llama_cpp.py: tbq.llama has no bindings of it")


def has_bindings(sdist: pathlib.Path) -> bool:
    with tarfile.open(sdist) as tar:
        return any(re.fullmatch(r"[^/]+/llama_cpp/llama_cpp\.py", name) for name in tar.getnames())


def head_of(tree: pathlib.Path) -> str:
    return git(["rev-parse", "HEAD"], tree).stdout.strip()


def is_applying() -> bool:
    return (TREE / ".git" / "rebase-apply").exists()


def conflicts() -> list[str]:
    return git(["diff", "--name-only", "--diff-filter=U"], TREE).stdout.splitlines()


def finish_by_hand(state: State) -> None:
    """The patch at which the last call stopped, after the user's edits: it becomes a commit, or is left out."""
    patch = state.pop("at")
    before = state.pop("head")
    if is_applying():
        if left := conflicts():
            raise Failure(
                f"patch {patch} still has conflicts in {', '.join(left)}; resolve and `git add` them in {TREE}, {GO_ON}"
            )
        result = git([*AUTHOR, "am", "--continue"], TREE, check=False)
        if result.returncode != 0:
            raise Failure(
                f"patch {patch}: {last_line(result.stdout)}; `git add` what you changed in {TREE}, "
                f"or leave the patch out with `git am --skip`, {GO_ON}"
            )
    state["done"][patch] = "left out" if head_of(TREE) == before else "by hand"
    write_state(state)


def apply_next(state: State, patch: pathlib.Path) -> None:
    """One patch on the new tree; Failure, with the patch half applied, where somebody must decide."""
    before = head_of(TREE)
    result = apply_mail(TREE, patch, "--3way")
    if result.returncode != 0:
        write_state({**state, "at": patch.name, "head": before})
        left = conflicts()
        what = f"conflicts in {', '.join(left)}" if left else f"does not apply ({last_line(result.stdout)})"
        raise Failure(
            f"patch {patch.name} {what}; resolve and `git add` that in {TREE} "
            f"(branch `old` has the series on the pin), {GO_ON}"
        )
    merged = "Falling back" in result.stdout
    state["done"][patch.name] = "upstream has it" if head_of(TREE) == before else "merged" if merged else "applied"
    write_state(state)


def finish_bump(state: State) -> None:
    """All patches are on the new tree: what they took, the new patches/ and pin.json, and what is left to do."""
    for patch, how in state["done"].items():
        if how != "applied":
            say(f"{how}: {patch}")
    ways = list(state["done"].values())
    counts = ", ".join(f"{ways.count(how)} {how}" for how in dict.fromkeys(ways))
    say(f"{state['pin']['requirement']}: {len(ways)} patches: {counts}")
    if state["trial"]:
        say(f"a trial: {TREE} has the series, patches/ and pin.json are as before; `make bump ABORT=1` removes it")
        return
    export(TREE, state["pin"])
    shutil.rmtree(BUMP)
    print("\n".join(["", "Left to do:", *checklist()]), flush=True)


def checklist() -> Iterator[str]:
    """What no program can decide, line by line."""
    yield "- patches/pin.json: `commit` is upstream's; put it there if COMMIT did not name it."
    yield "- patches/README.md: the table of patches, and both tables of details: does each still hold?"
    yield "- Fixes of upstream, which go when upstream has them:"
    for patch in filter(is_fix, series()):
        reason = re.search(r"^Remove when: (.*(?:\n .*)*)", header_of(patch), re.M)
        yield f"    {patch.name[:4]}  {' '.join(reason[1].split()) if reason else 'it does not say when'}"
    yield "- Types, architectures and libraries that upstream added: `make test` names what lacks them."
    yield "- `make test`, and tests/cuda/run.sh on a machine with a GPU."
    yield "- `make bench` and the tables in docs/, before and after; docs/guide/bump.md: what this bump took."
    yield "- Commit patches/ and what belongs to it together."


def bump(arguments: argparse.Namespace) -> None:
    if arguments.abort:
        read_state()
        shutil.rmtree(BUMP)
        say("the bump is given up; patches/ and pin.json are as before")
        return
    if not arguments.resume:
        if not arguments.requirement:
            raise Failure("PIN is missing: `make bump PIN=NAME==VERSION`, as in llama-cpp-python==0.3.36")
        start_bump(arguments.requirement, arguments.folder, arguments.commit, arguments.trial)
    state = read_state()
    if "at" in state:
        finish_by_hand(state)
    for patch in sorted((BUMP / "patches").glob("*.patch")):
        if patch.name not in state["done"]:
            apply_next(state, patch)
    finish_bump(state)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "bindings", "git-tree", "export"):
        command = commands.add_parser(name)
        command.add_argument("tree", type=lambda path: pathlib.Path(path).absolute())
        if name == "prepare":
            command.add_argument(
                "--source",
                type=lambda path: pathlib.Path(path).absolute(),
                help="a llama.cpp tree to copy instead of the pin",
            )
    commands.add_parser("size")
    command = commands.add_parser("bump")
    command.add_argument(
        "requirement", nargs="?", metavar="NAME==VERSION", help="the source distribution of the new pin"
    )
    command.add_argument("--folder", help="of llama.cpp in it (the present pin's)")
    command.add_argument("--commit", help="upstream's, for pin.json")
    command.add_argument("--trial", action="store_true", help="leave patches/ and pin.json alone")
    command.add_argument("--continue", action="store_true", dest="resume", help="after a conflict was resolved")
    command.add_argument("--abort", action="store_true", help="give up a bump that is in progress")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "prepare":
        prepare(arguments.tree, arguments.source)
    elif arguments.command == "bindings":
        bindings(arguments.tree)
    elif arguments.command == "git-tree":
        git_tree(arguments.tree)
        say(f"{arguments.tree}: edit, commit (or rebase -i pin), then run `patch_series.py export {arguments.tree}`")
    elif arguments.command == "export":
        export(arguments.tree)
    elif arguments.command == "bump":
        bump(arguments)
    else:
        print(series_size(series()))


if __name__ == "__main__":
    run_main(main)
