# SPDX-License-Identifier: MIT
"""Files that are written whole or not at all, whatever happens to the writer.

The content is first written in a new folder next to the file, `.tbq-HASH-RANDOM`.  It is flushed to the disk and then
renamed.  HASH is a hash of the file's name, which keeps the folder's name short.

A killed writer leaves its folder.  The next writer of the same file removes it.  Each folder has a file `lock`, which
its writer keeps locked.  The system frees the lock when the process ends, so a free lock means a dead writer.

Every OSError names the file that the caller asked for.
"""

import contextlib
import errno
import hashlib
import io
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from tbq.errors import TBQError

try:
    import fcntl
except ImportError:  # Windows: the folders of killed writers stay
    fcntl = None  # type: ignore[assignment]

__all__ = ["naming", "put", "replace", "target", "user_cache_folder", "workplace", "writing"]

_LOCK = "lock"
#: Errors of file systems that cannot flush a folder, or a file.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def user_cache_folder(name: str) -> pathlib.Path | None:
    """The folder of that name in the user's folder for caches, which may not exist yet.

    None if the user has no such folder.
    """
    import platformdirs

    try:
        found = pathlib.Path(platformdirs.user_cache_dir("ggml-tbq", appauthor=False)) / name
    except RuntimeError:  # no variable names a folder, and the user has no entry in passwd
        return None
    return found if found.is_absolute() else None  # in that case older releases of platformdirs return "~/.cache"


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes every OSError inside name path.

    An error of an open file has no name, and one of a temporary file has the temporary name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def target(path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path of the file that writing to path replaces.  A link stays, and its target is replaced.

    Raises TBQError if something other than a regular file is there, OSError if its folder may not be read.
    """
    try:
        real = pathlib.Path(os.path.realpath(pathlib.Path(path)))
        status = os.stat(pathlib.Path(path))
    except (FileNotFoundError, NotADirectoryError):
        return real
    except (ValueError, TypeError) as error:
        raise TBQError(f"{path!r} is not a path: {error}") from None
    if not stat.S_ISREG(status.st_mode) or not real.exists():
        raise TBQError(f"{path} is not a file that can be replaced")
    return real


def replace(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all."""
    with writing(path) as (file,):
        file.write(content)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]] = ()) -> Iterator[list[BinaryIO]]:
    """Opens files to write.  They get their names when the block ends; after an exception nothing has changed.

    path: the name of the file.  For several files: a name for all of them, by which a killed writer's folder is found.
    parts: the names of several files.  The first file gets its name last.
    Raises TBQError and OSError as target() does, and OSError if a file cannot be written.
    """
    names = list(parts) or [path]
    targets = [target(name) for name in names]
    common = pathlib.Path(path).name if parts else targets[0].name
    with contextlib.ExitStack() as stack:
        # links may lead to folders on other disks, and a file cannot be renamed to another disk
        folders = {
            folder: stack.enter_context(_workplace(folder, common, path))
            for folder in dict.fromkeys(t.parent for t in targets)
        }
        files: list[BinaryIO] = []
        for i, (name, real) in enumerate(zip(names, targets)):
            files.append(io.BufferedWriter(_Raw(folders[real.parent] / str(i), name)))
            stack.callback(_close, files[-1])
        yield files
        for file in files:
            file.close()
        put([(folders[real.parent] / str(i), name) for i, (name, real) in enumerate(zip(names, targets))])


@contextlib.contextmanager
def workplace(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A folder next to a file, in which programs write its new content (see put).  It is removed when the block ends.

    Raises TBQError and OSError as target() does, OSError if the folder cannot be made.
    """
    real = target(path)
    with _workplace(real.parent, real.name, path) as folder:
        yield folder


def put(files: Sequence[tuple[pathlib.Path, str | os.PathLike[str]]]) -> None:
    """Gives complete files of a workplace their names, the first file last.

    Each file is flushed to the disk first, and takes over the mode of the file that it replaces.
    """
    targets = [target(name) for _, name in files]
    for (file, name), real in zip(files, targets):
        with naming(name):
            _keep_mode(file, real)
            _flush(file, os.O_RDWR | getattr(os, "O_BINARY", 0))
    for (file, name), real in reversed(list(zip(files, targets))):
        with naming(name):
            os.replace(file, real)
    for folder, name in {real.parent: name for (_, name), real in zip(files, targets)}.items():
        # flushes the folder too, so that the new names survive a loss of power; it may be writable and not readable
        with naming(name), contextlib.suppress(PermissionError):
            if hasattr(os, "O_DIRECTORY"):
                _flush(folder, os.O_RDONLY | os.O_DIRECTORY)


class _Raw(io.FileIO):
    """A new file whose errors name another file: the one that it becomes."""

    def __init__(self, path: pathlib.Path, name: str | os.PathLike[str]) -> None:
        with naming(name):
            super().__init__(path, "x")
        self._for = name

    def write(self, data: Any, /) -> int:
        with naming(self._for):
            return super().write(data)

    def close(self) -> None:
        with naming(self._for):
            super().close()


def _close(file: BinaryIO) -> None:
    """Closes a file after an error.  Writing the rest of its buffer may fail again, which is ignored."""
    with contextlib.suppress(OSError):
        file.close()


def _keep_mode(file: pathlib.Path, old: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(old.stat().st_mode) & 0o777
        if mode != stat.S_IMODE(file.stat().st_mode):
            os.chmod(file, mode)


def _flush(path: pathlib.Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


# --- the folder ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _workplace(parent: pathlib.Path, common: str, shown: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    mark = f".tbq-{hashlib.sha256(os.fsencode(common)).hexdigest()[:12]}-"
    _remove_dead(parent, mark)
    with naming(shown):
        folder, lock = _make_folder(parent, mark)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _make_folder(parent: pathlib.Path, mark: str) -> tuple[pathlib.Path, int | None]:
    """A new folder, and the descriptor of its lock.

    Until the lock is held, another writer may take the folder for that of a dead writer and remove it.  Then a second
    folder is made.
    """
    while True:
        folder = parent / (mark + secrets.token_hex(4))
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            continue
        if fcntl is None:
            return folder, None
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            continue
        except BaseException:
            _remove(folder, None)
            raise
        if _try_lock(lock) is not False and _is_same_file(lock, folder / _LOCK):
            return folder, lock
        os.close(lock)


def _try_lock(lock: int) -> bool | None:
    """Takes a lock.  Whether it was free; None on file systems without locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_same_file(descriptor: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_dead(parent: pathlib.Path, mark: str) -> None:
    """Removes the folders of dead writers.  Without locks it is not known who is dead, and they stay."""
    if fcntl is None:
        return
    try:
        with os.scandir(parent) as entries:
            folders = [
                parent / entry.name
                for entry in entries
                if entry.name.startswith(mark) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:  # writing to the folder will report this error
        return
    for folder in folders:
        with contextlib.suppress(OSError):
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                # its writer was killed before it made the lock, or after it removed it: the folder is empty
                os.rmdir(folder)
                continue
            if _try_lock(lock):
                _remove(folder, lock)
            else:
                os.close(lock)


def _remove(folder: pathlib.Path, lock: int | None) -> None:
    """Removes a folder.  The lock goes last, so that after an interruption the folder still counts as dead."""
    with contextlib.suppress(OSError):
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name != _LOCK]
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / _LOCK)
        os.rmdir(folder)
    if lock is not None:
        os.close(lock)
