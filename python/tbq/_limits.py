# SPDX-License-Identifier: MIT
"""How much CPU time and memory a container allows its processes: Linux's control groups, versions 1 and 2.

This file imports the standard library only, because tools/install.py reads it before the package is built.
"""

import pathlib
from collections.abc import Iterator


def _mounts(root: pathlib.Path, controller: str) -> Iterator[tuple[str, pathlib.Path, bool]]:
    """The mounted file systems that may have a controller's files.

    Each is given as the group at its top, its folder, and whether it is version 2.
    """
    for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        mount, kind = before.split(), after.split()
        if len(mount) <= 4 or not kind:
            continue
        version_2 = kind[0] == "cgroup2"
        if version_2 or kind[0] == "cgroup" and controller in kind[-1].split(","):
            yield mount[3], root / mount[4].lstrip("/"), version_2


def _groups(root: pathlib.Path, controller: str) -> dict[bool, str]:
    """This process's groups: in version 2 under True, in version 1's hierarchy of a controller under False."""
    found = {}
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            found[not controllers] = path
    return found


def _folders(root: pathlib.Path, controller: str) -> Iterator[pathlib.Path]:
    """The folders of this process's groups.  The folders above follow each one, because their limits hold too."""
    try:
        groups = _groups(root, controller)
        for top, place, version_2 in _mounts(root, controller):
            path = groups.get(version_2, "/")
            # a container sees its own group at the top, whatever the path says
            inside = path[len(top.rstrip("/")) :] if path == top or path.startswith(top.rstrip("/") + "/") else ""
            folder = place / inside.strip("/") if ".." not in inside else place
            yield from (part for part in (folder, *folder.parents) if part == place or place in part.parents)
    except (OSError, ValueError):  # not Linux, or a Linux that hides these files
        return


def _read(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return []


def _numbers(texts: list[str]) -> list[int]:
    """The limits among these texts.  "max" and -1 mean that there is no limit, and are left out."""
    return [int(text) for text in texts if text.isdigit() and int(text)]


def cpus(root: pathlib.Path = pathlib.Path("/")) -> float | None:
    """CPUs that the process may use at once, 1.5 for example; None without a quota.

    root: the folder that has proc and sys.
    """
    found = []
    for folder in _folders(root, "cpu"):
        quota = _numbers(_read(folder / "cpu.max")) or _numbers(
            _read(folder / "cpu.cfs_quota_us") + _read(folder / "cpu.cfs_period_us")
        )
        if len(quota) == 2:
            found.append(quota[0] / quota[1])
    return min(found, default=None)


def memory(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes of memory that the process may have; None without a limit.  A limit can exceed the machine's memory.

    root: the folder that has proc and sys.
    """
    limits = [
        _numbers(_read(folder / name))
        for folder in _folders(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min((limit[0] for limit in limits if limit), default=None)
