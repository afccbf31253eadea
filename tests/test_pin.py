# SPDX-License-Identifier: MIT
"""The pin and the patch series: every way in which preparing llama.cpp can fail ends in one line and half of nothing.

These tests work on a small tree of their own with a series of its own; the real one was applied by the build.
"""

import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

from conftest import ROOT

SCRIPT = ROOT / "tools" / "patch_series.py"
BEFORE = "one\ntwo\nthree\n"
AFTER = "one\ntwo and a half\nthree\n"


def blob_id(text):
    data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def patch_text(
    path="ggml/list.txt", before=BEFORE, after=AFTER, line="two", new="two and a half", subject="change", kind="seam"
):
    return (
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: A <a@example.org>\nDate: Mon, 1 Jan 2024 00:00:00 +0000\n"
        f"Subject: [PATCH] {subject}\n\nwhy\n\nKind: {kind}\n---\n"
        f"diff --git a/{path} b/{path}\nindex {blob_id(before)}..{blob_id(after)} 100644\n"
        f"--- a/{path}\n+++ b/{path}\n@@ -1,3 +1,3 @@\n one\n-{line}\n+{new}\n three\n-- \n2.0\n"
    )


#: Of a file with one line.
OTHER = patch_text("other.txt", "x\n", "y\n", "x", "y", "other").replace(
    "@@ -1,3 +1,3 @@\n one\n-x\n+y\n three\n", "@@ -1 +1 @@\n-x\n+y\n"
)
UPSTREAM = {
    "CMakeLists.txt": "",
    "ggml/CMakeLists.txt": "",
    "ggml/list.txt": BEFORE,
    "other.txt": "x\n",
    ".git": "gitdir: ../../nowhere\n",
}


def write_sdist(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime = len(text), 1_000_000_000
            tar.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def project(tmp_path):
    """A checkout with this script, a pin that is already downloaded, and one patch."""
    root = tmp_path / "project"
    for folder in ("tools", "patches", "build/downloads"):
        (root / folder).mkdir(parents=True)
    for path in (SCRIPT, SCRIPT.with_name("_cli.py")):
        shutil.copy(path, root / "tools")
    sdist = root / "build" / "downloads" / "pinned-1.0.tar.gz"
    write_sdist(sdist, "pinned-1.0/vendor/llama.cpp", UPSTREAM)
    write_pin(root, hashlib.sha256(sdist.read_bytes()).hexdigest())
    (root / "patches" / "0001-change.patch").write_text(patch_text())
    # The trap: inside another repository `git apply` skips what that repository ignores, and says nothing.
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / ".gitignore").write_text("/build/\n")
    return root


def write_pin(root, sha256):
    (root / "patches" / "pin.json").write_text(
        json.dumps(
            {
                "requirement": "no-such-distribution-of-ggml-tbq==1.0",
                "sha256": sha256,
                "folder": "vendor/llama.cpp",
                "commit": "abc",
            }
        )
    )


def script(root, *arguments, **options):
    return subprocess.run(
        [sys.executable, str(root / "tools" / "patch_series.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


def prepare(root, *arguments, **options):
    return script(root, "prepare", root / "build" / "tree", *arguments, **options)


def assert_fails(root, result, *words):
    """One line on stderr with these words, exit status not 0, and no tree or part of one."""
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]
    assert sorted(p.name for p in (root / "build").iterdir()) == ["downloads"]
    assert not list((root / "build" / "downloads").glob(".tmp-*"))


def test_prepare_inside_another_repository(project):
    result = prepare(project)
    assert result.returncode == 0, result.stderr
    tree = project / "build" / "tree"
    assert (tree / "ggml" / "list.txt").read_text() == AFTER
    assert not (tree / ".git").exists()
    assert "1 patches, 2 changed lines (+1 -1) in 1 upstream files" in result.stdout


def test_second_prepare_does_nothing(project):
    prepare(project)
    tree = project / "build" / "tree"
    (tree / "other.txt").write_text("edited\n")
    assert prepare(project).returncode == 0
    assert (tree / "other.txt").read_text() == "edited\n"


def test_changed_series_keeps_the_times_of_unchanged_files(project):
    prepare(project)
    tree = project / "build" / "tree"
    for path in tree.rglob("*.txt"):
        os.utime(path, (1_100_000_000, 1_100_000_000))
    (project / "patches" / "0001-change.patch").write_text(
        patch_text(after=AFTER.replace("half", "bit"), new="two and a bit")
    )
    assert prepare(project).returncode == 0
    assert (tree / "ggml" / "list.txt").read_text() == "one\ntwo and a bit\nthree\n"
    changed = {p.name for p in tree.rglob("*.txt") if p.stat().st_mtime != 1_100_000_000}
    assert changed == {"list.txt"}

    (project / "patches" / "0001-change.patch").unlink()
    assert prepare(project).returncode == 0
    assert (tree / "ggml" / "list.txt").read_text() == BEFORE
    assert (tree / "ggml" / "list.txt").stat().st_mtime > 1_500_000_000  # newer than what was compiled from it


def test_leftovers_of_an_interrupted_run_are_removed(project):
    (project / "build" / ".tree-tmp-123" / "tree").mkdir(parents=True)
    assert prepare(project).returncode == 0
    assert sorted(p.name for p in (project / "build").iterdir()) == ["downloads", "tree"]


def test_half_written_synchronisation_is_repeated(project):
    prepare(project)
    tree = project / "build" / "tree"
    (tree / ".tbq-stamp").unlink()  # what is missing from when the first file is replaced until the last one is
    (tree / "ggml" / "list.txt").write_text(BEFORE)
    assert prepare(project).returncode == 0
    assert (tree / "ggml" / "list.txt").read_text() == AFTER


def test_failed_hunk(project):
    (project / "patches" / "0002-more.patch").write_text(patch_text(line="four", new="five"))
    assert_fails(project, prepare(project), "patch 0002-more.patch does not apply", "ggml/list.txt line 1")


def test_failed_hunk_leaves_an_existing_tree_alone(project):
    prepare(project)
    (project / "patches" / "0002-more.patch").write_text(patch_text(line="four", new="five"))
    assert prepare(project).returncode != 0
    assert (project / "build" / "tree" / "ggml" / "list.txt").read_text() == AFTER


def test_wrong_content_after_a_patch(project):
    (project / "patches" / "0001-change.patch").write_text(patch_text(after="something else\n"))
    assert_fails(project, prepare(project), "0001-change.patch left ggml/list.txt with other content")


def test_abbreviated_index_line(project):
    text = patch_text().replace(blob_id(BEFORE), blob_id(BEFORE)[:9])
    (project / "patches" / "0001-change.patch").write_text(text)
    assert_fails(project, prepare(project), "--full-index")


def test_truncated_patch(project):
    (project / "patches" / "0001-change.patch").write_text("From 0\nSubject: nothing\n")
    assert_fails(project, prepare(project), "0001-change.patch touches no file")


def test_changed_download_is_not_used(project):
    """A corrupt or replaced file in the cache is as good as none; then the index has to have it."""
    with open(project / "build" / "downloads" / "pinned-1.0.tar.gz", "ab") as file:
        file.write(b"x")
    empty = project.parent / "empty-index"
    empty.mkdir()
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty)}
    assert_fails(project, prepare(project, env=env), "cannot be downloaded from the configured package index")


def test_changed_pin_hash(project):
    """The index has the release, but not with the hash that is pinned."""
    links = project.parent / "links"
    links.mkdir()
    with tarfile.open(links / "no_such_distribution_of_ggml_tbq-1.0.tar.gz", "w:gz") as tar:
        text = b"Metadata-Version: 2.1\nName: no-such-distribution-of-ggml-tbq\nVersion: 1.0\n"
        member = tarfile.TarInfo("no_such_distribution_of_ggml_tbq-1.0/PKG-INFO")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    write_pin(project, "0" * 64)
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}
    assert_fails(project, prepare(project, env=env), "has sha256", "patches/pin.json says " + "0" * 64)


def test_corrupt_pin_file(project):
    (project / "patches" / "pin.json").write_text("{")
    assert_fails(project, prepare(project), "patches/pin.json cannot be read")
    (project / "patches" / "pin.json").write_text("{}")
    assert_fails(project, prepare(project), "patches/pin.json lacks requirement, sha256, folder, commit")


def test_missing_git(project):
    env = {**os.environ, "PATH": str(project)}
    assert_fails(project, prepare(project, env=env), "git is not installed")


# --- a tree that the user has -----------------------------------------------------------------------------------


@pytest.fixture
def source(project):
    tree = project.parent / "mine"
    (tree / "ggml").mkdir(parents=True)
    (tree / "ggml" / "CMakeLists.txt").write_text("")
    (tree / "ggml" / "list.txt").write_text(BEFORE)
    (tree / "build-x").mkdir()
    (tree / "build-x" / "large").write_text("")
    (tree / "ggml" / "build-info.txt").write_text("")  # a file of upstream
    return tree


def test_source_is_copied(project, source):
    assert prepare(project, "--source", source).returncode == 0
    assert (project / "build" / "tree" / "ggml" / "list.txt").read_text() == AFTER
    assert not (project / "build" / "tree" / "build-x").exists()
    assert (project / "build" / "tree" / "ggml" / "build-info.txt").exists()
    assert (source / "ggml" / "list.txt").read_text() == BEFORE


def test_source_that_changes_is_copied_again(project, source):
    prepare(project, "--source", source)
    (source / "new.txt").write_text("new\n")
    result = prepare(project, "--source", source)
    assert result.returncode == 0 and "1 files changed" in result.stdout
    assert (project / "build" / "tree" / "new.txt").exists()
    assert "copying" not in prepare(project, "--source", source).stdout


def test_source_of_another_version(project, source):
    (source / "ggml" / "list.txt").write_text(BEFORE + "four\n")
    assert_fails(
        project,
        prepare(project, "--source", source),
        "is not the pinned version, llama.cpp abc",
        "ggml/list.txt differs",
    )


def test_source_that_is_none(project):
    empty = project.parent / "nothing"
    empty.mkdir()
    assert_fails(project, prepare(project, "--source", empty), "is not a llama.cpp source tree")


# --- editing ----------------------------------------------------------------------------------------------------


def git(tree, *arguments):
    return subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments],
        cwd=tree,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_edit_and_export(project):
    tree = project.parent / "edit"
    assert script(project, "git-tree", tree).returncode == 0
    assert git(tree, "log", "--format=%s").splitlines() == ["change", "llama.cpp abc"]
    assert git(tree, "show", "pin:ggml/list.txt") == BEFORE

    (tree / "other.txt").write_text("y\n")
    result = script(project, "export", tree)
    assert result.returncode != 0 and "not committed" in result.stderr
    git(tree, "commit", "-qam", "another: more\n\nwhy")
    assert script(project, "export", tree).returncode == 0
    names = ["0001-change.patch", "0002-another-more.patch"]
    first = {name: (project / "patches" / name).read_text() for name in names}
    assert sorted(p.name for p in (project / "patches").glob("*.patch")) == names
    assert first[names[1]].startswith(f"From {'0' * 40} ")

    assert script(project, "export", tree).returncode == 0
    assert {name: (project / "patches" / name).read_text() for name in names} == first
    assert prepare(project).returncode == 0
    assert (project / "build" / "tree" / "other.txt").read_text() == "y\n"


def test_size_tells_fixes_from_seams(project):
    (project / "patches" / "0001-change.patch").write_text(patch_text(kind="fix of upstream"))
    (project / "patches" / "0002-other.patch").write_text(OTHER)
    assert script(project, "size").stdout == (
        "patch series: 2 patches, 4 changed lines (+2 -2) in 2 upstream files; "
        "fixes of upstream: 1 patches, 2 changed lines (+1 -1) in 1 upstream files; "
        "seams: 1 patches, 2 changed lines (+1 -1) in 1 upstream files\n"
    )
    assert prepare(project).returncode == 0


def test_export_has_one_author(project):
    """Whoever committed; a long name is folded over two lines."""
    tree = project.parent / "edit"
    assert script(project, "git-tree", tree).returncode == 0
    (tree / "other.txt").write_text("y\n")
    git(
        tree,
        "commit",
        "-qam",
        "another: more\n\nwhy",
        "--author",
        "A person with a name that takes more than a line <somebody@a-machine-with-a-long-name.example.org>",
    )
    assert script(project, "export", tree).returncode == 0
    patches = sorted((project / "patches").glob("*.patch"))
    assert len(patches) == 2
    for patch in patches:
        lines = patch.read_text().splitlines()
        assert lines[1] == "From: ggml-tbq <tbq@example.invalid>" and lines[2].startswith("Date: ")


def test_git_tree_does_not_overwrite(project):
    result = script(project, "git-tree", project)
    assert result.returncode != 0 and "exists already" in result.stderr


# --- another llama.cpp ------------------------------------------------------------------------------------------

METADATA = "Metadata-Version: 2.1\nName: next\nVersion: 2.0\n"
BACKEND = f"""import pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    path = pathlib.Path(folder, "next-2.0.dist-info")
    path.mkdir()
    (path / "METADATA").write_text({METADATA!r})
    (path / "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return path.name
def build_wheel(folder, settings=None, metadata=None):
    raise SystemExit("nobody needs a wheel")
"""
BUILD = {
    "PKG-INFO": METADATA,
    "backend.py": BACKEND,
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
}


def bump(root, *arguments, **files):
    """`make bump`, where the index has next==2.0; files (ggml__list for ggml/list.txt) differ from the pin's."""
    links = root.parent / "links"
    links.mkdir(exist_ok=True)
    upstream = {**UPSTREAM, **{name.replace("__", "/") + ".txt": text for name, text in files.items()}}
    write_sdist(
        links / "next-2.0.tar.gz",
        "next-2.0",
        {**BUILD, **{f"vendor/llama.cpp/{name}": text for name, text in upstream.items()}},
    )
    return script(root, "bump", *arguments, env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)})


@pytest.fixture
def two_patches(project):
    (project / "patches" / "0002-other.patch").write_text(OTHER)
    return project


def state(root):
    return {p.name: p.read_bytes() for p in (root / "patches").iterdir()}


def test_bump(two_patches):
    """One patch is merged, because lines next to its own changed; the other applies.  The next build takes both."""
    result = bump(two_patches, "next==2.0", "--commit", "def", ggml__list="zero\nnought\n" + BEFORE + "four\n")
    assert result.returncode == 0, result.stderr
    assert "merged: 0001-change.patch" in result.stdout and "2 patches: 1 merged, 1 applied" in result.stdout
    assert "Left to do:" in result.stdout
    sdist = two_patches / "build" / "downloads" / "next-2.0.tar.gz"
    assert json.loads((two_patches / "patches" / "pin.json").read_text()) == {
        "requirement": "next==2.0",
        "sha256": hashlib.sha256(sdist.read_bytes()).hexdigest(),
        "folder": "vendor/llama.cpp",
        "commit": "def",
    }
    assert sorted(p.name for p in (two_patches / "build").iterdir()) == ["downloads"]
    assert prepare(two_patches).returncode == 0
    assert (two_patches / "build" / "tree" / "ggml" / "list.txt").read_text() == "zero\nnought\n" + AFTER + "four\n"
    assert (two_patches / "build" / "tree" / "other.txt").read_text() == "y\n"


def test_bump_stops_at_a_conflict_and_goes_on(two_patches):
    before = state(two_patches)
    result = bump(two_patches, "next==2.0", ggml__list=BEFORE.replace("two", "deux"))
    tree = two_patches / "build" / "bump" / "tree"
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: patch 0001-change.patch conflicts in ggml/list.txt; ")
    assert str(tree) in line and "make bump CONTINUE=1" in line
    assert state(two_patches) == before

    result = bump(two_patches, "next==2.0")
    assert result.returncode == 1 and "a bump to next==2.0 is in progress" in result.stderr
    result = bump(two_patches, "--continue")
    assert result.returncode == 1 and "still has conflicts in ggml/list.txt" in result.stderr
    assert state(two_patches) == before

    (tree / "ggml" / "list.txt").write_text(AFTER.replace("two", "deux"))
    git(tree, "add", "ggml/list.txt")
    result = bump(two_patches, "--continue")
    assert result.returncode == 0, result.stderr
    assert "by hand: 0001-change.patch" in result.stdout and "2 patches: 1 by hand, 1 applied" in result.stdout
    assert prepare(two_patches).returncode == 0
    assert (two_patches / "build" / "tree" / "ggml" / "list.txt").read_text() == AFTER.replace("two", "deux")


def test_bump_leaves_a_patch_out(two_patches):
    """One that upstream has is left out automatically; any other by `git am --skip`."""
    result = bump(two_patches, "next==2.0", ggml__list=BEFORE.replace("two", "deux"), other="y\n")
    assert result.returncode == 1
    git(two_patches / "build" / "bump" / "tree", "am", "--skip")
    result = bump(two_patches, "--continue")
    assert result.returncode == 1 and "has no commit after tag pin" in result.stderr  # nothing is left of this series
    tree = two_patches / "build" / "bump" / "tree"
    (tree / "new.txt").write_text("new\n")
    git(tree, "add", "new.txt")
    git(tree, "commit", "-qm", "new\n\nwhy")
    result = bump(two_patches, "--continue")
    assert result.returncode == 0, result.stderr
    assert "left out: 0001-change.patch" in result.stdout and "upstream has it: 0002-other.patch" in result.stdout
    assert sorted(state(two_patches)) == ["0001-new.patch", "pin.json"]


def test_trial_and_abort(two_patches):
    before = state(two_patches)
    result = bump(two_patches, "next==2.0", "--trial")
    assert result.returncode == 0 and "a trial" in result.stdout, result.stderr
    assert (two_patches / "build" / "bump" / "tree" / "ggml" / "list.txt").read_text() == AFTER
    assert bump(two_patches, "--abort").returncode == 0
    assert state(two_patches) == before and sorted(p.name for p in (two_patches / "build").iterdir()) == ["downloads"]
    result = bump(two_patches, "--continue")
    assert result.returncode == 1 and "no bump is in progress" in result.stderr


@pytest.mark.parametrize(
    "arguments,words",
    [
        ((), ("PIN is missing",)),
        (("next",), ("PIN 'next' is not NAME==VERSION",)),
        (("next==3.0",), ("next==3.0 cannot be downloaded",)),
        (("next==2.0", "--folder", "llama.cpp"), ("has no llama.cpp/CMakeLists.txt", "it has vendor/llama.cpp")),
    ],
)
def test_bumps_that_do_not_start(project, arguments, words):
    before = state(project)
    assert_fails(project, bump(project, *arguments), *words)
    assert state(project) == before


# --- the real series --------------------------------------------------------------------------------------------


def test_real_series_is_what_export_would_write(tmp_path):
    """git-tree, then export, gives every patch back byte for byte: nobody edited one by hand."""
    project = tmp_path / "project"
    (project / "build").mkdir(parents=True)
    shutil.copytree(ROOT / "patches", project / "patches")
    shutil.copytree(ROOT / "tools", project / "tools")
    os.symlink(ROOT / "build" / "downloads", project / "build" / "downloads")
    before = {p.name: p.read_text() for p in (project / "patches").glob("*.patch")}
    assert before
    assert script(project, "git-tree", tmp_path / "tree").returncode == 0
    result = script(project, "export", tmp_path / "tree")
    assert result.returncode == 0, result.stderr
    assert {p.name: p.read_text() for p in (project / "patches").glob("*.patch")} == before


def test_every_patch_says_why():
    patches = sorted((ROOT / "patches").glob("*.patch"))
    readme = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    for patch in patches:
        header = patch.read_text(encoding="utf-8").split("\ndiff --git ", 1)[0]
        for heading in ("Why:", "Kind:", "Upstream status:", "Touches:", "Remove when:"):
            assert heading in header, f"{patch.name} lacks {heading!r}"
        assert patch.name in readme, f"patches/README.md does not mention {patch.name}"


def test_one_author():
    for patch in (ROOT / "patches").glob("*.patch"):
        assert patch.read_text(encoding="utf-8").splitlines()[1] == "From: ggml-tbq <tbq@example.invalid>", patch.name


def test_titles():
    """llama.cpp's own form: the module, a colon between blanks, what the patch does."""
    for patch in (ROOT / "patches").glob("*.patch"):
        title = re.search(r"^Subject: \[PATCH\] (.*(?:\n .*)*)", patch.read_text(encoding="utf-8"), re.M)[1]
        assert re.fullmatch(r"[\w-]+(, [\w-]+)* : [a-z].*[^.]", title), patch.name


def test_fixes_of_upstream_stand_alone(tmp_path):
    """They come first, so they apply to upstream; they name nothing of this project."""
    patches = sorted((ROOT / "patches").glob("*.patch"))
    kinds = [re.search(r"^Kind: (.*)$", patch.read_text(encoding="utf-8"), re.M)[1] for patch in patches]
    assert set(kinds) == {"fix of upstream", "seam"} and kinds == sorted(kinds)
    for patch, kind in zip(patches, kinds):
        if kind == "fix of upstream":
            text = patch.read_text(encoding="utf-8").split("\n", 2)[2]
            added = "\n".join(line for line in text.splitlines() if not line.startswith(" "))
            assert not re.search("tbq|center", added, re.I), patch.name


def test_a_tree_alone_says_what_it_needs(tmp_path):
    """The tree of git-tree without the code that the seams call: one error, which names the option."""
    assert script(ROOT, "git-tree", tmp_path / "tree").returncode == 0
    done = subprocess.run(["cmake", "-S", tmp_path / "tree", "-B", tmp_path / "build"], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("CMake Error") == 1 and "-DGGML_TBQ_DIR=" in done.stderr, done.stderr


def test_no_index_host_is_named():
    """What is fetched comes through the index that the user has configured."""
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "hugging" + "face.co", "npmjs" + ".org")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = files.stdout.split("\n") if files.returncode == 0 else []
    for name in filter(None, names):
        path = pathlib.Path(ROOT, name)
        if path.is_file() and path.suffix not in (".gguf", ".png", ".patch"):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [host for host in hosts if host in text], name
