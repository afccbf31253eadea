# SPDX-License-Identifier: MIT
"""Files that are written: whole or not at all, whatever happens to the writer.

What becomes a file is written in a folder of its own beside it, `.tbq-HASH-RANDOM`, flushed to the disk and renamed.  HASH is of
the file's name, so that the folder's stays short.  A writer that is killed leaves its folder; the next one of the same
name removes it.  The lock of the file `lock` in it tells the dead from the living: the system ends it with the process.

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
except ImportError:  # Windows: what killed writers left stays
    fcntl = None  # type: ignore[assignment]

__all__ = ["naming", "put", "replace", "target", "workplace", "writing"]

_LOCK = "lock"
#: What a file system says that cannot flush a folder, or a file.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError inside names path: an open file gives them without a name, a temporary one with its own."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def target(path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute name of the file that is written when path is: a link stays one, what it points to is replaced.

    Raises TBQError for what is there and no regular file, OSError where nobody may look.
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
    """Files to write, which get their names when the block ends without an exception; otherwise nothing changes.

    path: the name of the file; or what its parts have in common, by which what a killed writer left is found again.
    parts: the names of several.  The first gets its name last.
    Raises TBQError and OSError as target() does, OSError for what cannot be written.
    """
    names = list(parts) or [path]
    targets = [target(name) for name in names]
    common = pathlib.Path(path).name if parts else targets[0].name
    with contextlib.ExitStack() as stack:
        # links may lead to other folders, and those to other disks, where nothing can be renamed to
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
    """A folder beside a file, for programs to write in what becomes the file (see put); it is gone when the block ends.

    Raises TBQError and OSError as target() does, OSError if the folder cannot be made.
    """
    real = target(path)
    with _workplace(real.parent, real.name, path) as folder:
        yield folder


def put(files: Sequence[tuple[pathlib.Path, str | os.PathLike[str]]]) -> None:
    """Gives complete files of a workplace their names, the first file last.

    Each is flushed to the disk before; the mode of a file that it replaces stays.
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
        # the new names, too, survive a loss of power; a folder may be one to write to and not to read
        with naming(name), contextlib.suppress(PermissionError):
            if hasattr(os, "O_DIRECTORY"):
                _flush(folder, os.O_RDONLY | os.O_DIRECTORY)


class _Raw(io.FileIO):
    """A new file whose errors name another."""

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
    """After an error: what is left in the buffer may give it again."""
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
        folder, lock = _folder(parent, mark)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _folder(parent: pathlib.Path, mark: str) -> tuple[pathlib.Path, int | None]:
    """A new folder, and the descriptor of its lock.

    Until the lock is held, another writer may take the folder for a dead one's and remove it: then there is another.
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
        if _take(lock) is not False and _is(lock, folder / _LOCK):
            return folder, lock
        os.close(lock)


def _take(lock: int) -> bool | None:
    """Whether the lock was free; None where there are no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(descriptor: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_dead(parent: pathlib.Path, mark: str) -> None:
    """The folders of writers that are no more.  Where that cannot be told they stay."""
    if fcntl is None:
        return
    try:
        with os.scandir(parent) as entries:
            folders = [
                parent / entry.name
                for entry in entries
                if entry.name.startswith(mark) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:  # what is wrong with the folder shows when it is written to
        return
    for folder in folders:
        with contextlib.suppress(OSError):
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                os.rmdir(folder)  # killed before there was a lock, or after: there is nothing in it
                continue
            if _take(lock):
                _remove(folder, lock)
            else:
                os.close(lock)


def _remove(folder: pathlib.Path, lock: int | None) -> None:
    """The lock goes last, so that what an interruption leaves can still be told to be dead."""
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
