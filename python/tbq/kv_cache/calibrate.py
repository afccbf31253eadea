# SPDX-License-Identifier: MIT
"""Mean-centered keys: the mean of a model's keys, measured once, which llama.cpp subtracts from keys before it stores them; and
how much its queries have in each channel, which tells the encoder of a tbq type where error costs most.

    tbq calibrate model.gguf -o model.center.gguf
    llama-server -m model.gguf --cache-type-k tbq4_0 --cache-center model.center.gguf

`tbq serve` and tbq.llama.Llama do both by themselves.  Why attention stays the same, and what it is worth: docs/center.md.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence

from tbq import _files
from tbq._arguments import cores
from tbq._text import python_text, read_text
from tbq.errors import TBQError, one_line
from tbq.gguf_files.reader import as_path, open_gguf
from tbq.kv_cache.center_file import fingerprint, read_center
from tbq.kv_cache.model import read_model
from tbq.kv_cache.settings import measured_over
from tbq.programs import output
from tbq.programs.options import MODEL, ROPE, values, words_for
from tbq.programs.process import Done, run

_METHOD = "2"  # of measuring: another number when what is measured changes, so that nothing old is used

_ROOM = 4 << 20  # bytes that measuring needs in its folder: a text and the center


class NothingToCenter(TBQError):
    """The attention of a model would notice."""


def _text(text: "bytes | str | os.PathLike[str] | None") -> tuple[bytes, str]:
    """What is read, and what a message calls it."""
    if text is None:
        return python_text(), "Python's language reference"
    if not isinstance(text, bytes):
        return read_text(pathlib.Path(text)), f"text {os.fspath(text)!r}"
    if not text.strip():
        raise TBQError("the text is empty; name one that the model can read")
    return text, "the text"


def calibrate(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    context: int,
    *,
    text: "bytes | str | os.PathLike[str] | None" = None,
    chunks: int | None = None,
    options: Sequence[str] = (),
    on_chunk: Callable[[int, int], None] | None = None,
) -> str:
    """Measures the mean keys of a model and writes them to a file, which is complete or not there.

    model: a GGUF file, the first of a split.  context: tokens; the keys are taken at positions spread over them.
    text: what to run the model on, UTF-8 or the path of a file, Python's language reference if None.  chunks: of 128 tokens (8).
    options: llama.cpp's, for example ["-ngl", "99"].  on_chunk: is called with the chunks done, and all of them.
    Returns a table of the share of the keys' energy that the means hold, by layer and length of context.
    The same arguments give the same bytes.
    Raises TBQError with llama.cpp's reason: no keys to center (MLA, attention sinks, logit soft-cap), a text too short; OSError
    for what cannot be written.
    """
    out = as_path(out)
    if out.is_dir():
        raise TBQError(f"{out} is a folder; name a file to write")
    if not _files.target(out).parent.is_dir():
        raise TBQError(f"{out.parent} is not a folder")
    opened = open_gguf(model)  # says better what is wrong with a file than the program does
    if out.exists() and any(out.samefile(file) for file in opened.files):
        raise TBQError(f"{out} is the model itself; name another file to write")

    def progress(text: str) -> None:
        if on_chunk and (found := output.center_progress(text)):
            on_chunk(*found)

    read, named = _text(text)
    threads = [] if values(options, "--threads") else ["-t", str(cores())]
    arguments = [
        *threads,
        *options,
        "-m",
        str(as_path(model).absolute()),
        "-f",
        "text",
        "-c",
        str(context),
        "-o",
        "center",
        *(["--chunks", str(chunks)] if chunks else []),
    ]
    with _files.workplace(out) as parts:
        with _files.naming(out):
            (parts / "text").write_bytes(read)
        done = _run_on_what_there_is(arguments, parts, progress)
        if done.status or not (parts / "center").is_file():
            raise _failure(done, model, out, parts, named)
        read_center(parts / "center")
        _files.put([(parts / "center", out)])
    return output.center_shares(done.stdout)


def _run_on_what_there_is(arguments: Sequence[str], folder: pathlib.Path, progress: Callable[[str], None]) -> Done:
    """Runs llama-cache-center; once more on the CPU if the GPU is too small for the whole model, which can still be measured."""
    environment = {"OMP_WAIT_POLICY": "passive"}
    done = run("llama-cache-center", arguments, folder, progress, environment)
    if done.status and output.is_too_large(output.center_error(done.text) or ""):
        done = run("llama-cache-center", [*arguments, "-ngl", "0"], folder, progress, environment)
    return done


def _failure(done: Done, model: str | os.PathLike[str], out: pathlib.Path, parts: pathlib.Path, named: str) -> TBQError:
    """The error for a run that wrote no center.  named: what a message calls the text."""
    if nothing := output.nothing_to_center(done.text):
        return NothingToCenter(f"the keys of {os.fspath(model)} stay as they are: {nothing}")
    if output.center_not_written(done.text):  # it knows the name in the workplace only
        return TBQError(f"{out} cannot be written; {parts.parent} has {shutil.disk_usage(parts).free} bytes free")
    reason = output.center_error(done.text)
    if reason and reason.startswith("the text has "):
        return TBQError(f"{named} is too short: it{reason.removeprefix('the text')}")
    return TBQError(f"the keys of {os.fspath(model)} were not measured: {reason or done.error()}")


class Scratch:
    """A folder for files that must last as long as their user: made when it is first asked for, gone when it is closed, or with this object."""

    def __init__(self) -> None:
        self._remove: Callable[[], object] | None = None

    def folder(self) -> pathlib.Path:
        """OSError where nothing can be written."""
        if self._remove is None:
            try:
                self._folder = tempfile.mkdtemp(prefix="tbq-")
            except FileNotFoundError:  # a container that can be read only has this one
                self._folder = tempfile.mkdtemp(prefix="tbq-", dir="/dev/shm")
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, True)
        return pathlib.Path(self._folder)

    def close(self) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None


def centers_folder() -> pathlib.Path | None:
    """Where centers are kept that were measured on first use: below the user's folder for caches.  None if the user has none."""
    import platformdirs

    try:
        found = pathlib.Path(platformdirs.user_cache_dir("ggml-tbq", appauthor=False)) / "centers"
    except RuntimeError:  # no variable names one, and the user has no entry in passwd
        return None
    return found if found.is_absolute() else None  # older releases return "~/.cache" then


def center_file_for(
    model: str | os.PathLike[str],
    k: str,
    context: int,
    center: "bool | str | os.PathLike[str]",
    options: Sequence[str],
    say: Callable[[str], None],
    scratch: Scratch,
) -> pathlib.Path | None:
    """The center that a cache with keys of type k should have, or None: tbq.Server and tbq.llama ask here.

    center: True for that of the model, measured now if need be; False for none; or a file.  Keys of 16 bits and more need none.
    context: tokens, the positions that keys can have.  scratch: for a center that cannot be kept.
    A model whose keys cannot be centered does without; say gets the reason, and one line before something is measured.
    Raises TBQError for a file that is none.
    """
    if not isinstance(center, bool):
        read_center(center)
        return pathlib.Path(center)
    if not center or k in ("f32", "f16", "bf16"):
        return None
    try:
        return center_of_model(model, context, options, say, scratch)
    except (TBQError, OSError) as error:
        say(f"keys are not centered: {one_line(error)}")
        return None


def center_of_model(
    model: str | os.PathLike[str],
    context: int,
    options: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    scratch: Scratch | None = None,
) -> pathlib.Path:
    """The center of a model for a context, measured now if it is not in centers_folder() yet.

    context: tokens; contexts of like lengths share a center.  options: llama-server's; those of the model and of RoPE count.
    say: gets a line before something is measured.  scratch: where the center goes if it cannot be kept.
    Raises TBQError if the keys cannot be measured, or not be kept and there is no scratch.
    """
    context = measured_over(context, read_model(model, options).context)
    rope = words_for(options, ROPE)
    name = hashlib.sha256(" ".join([_METHOD, fingerprint(model), str(context), *rope]).encode()).hexdigest()[:32]
    what = f"measuring the mean of the keys of {pathlib.Path(model).name}"
    where, why = centers_folder(), "the user has no folder for caches: neither XDG_CACHE_HOME nor HOME is set"
    if where is not None:
        try:
            if found := _kept(where, name):
                return found
            _check_writable(where)
            if say:
                say(f"{what}, once; it is kept in {where}")
            return _measure(model, where, name, context, options)
        except OSError as error:
            why = f"{where}: {error.strerror or error}"
    if scratch is None:
        raise TBQError(f"the means of the keys cannot be kept: {why}")
    if say:
        say(f"{what}, at each start, because it cannot be kept ({why})")
    return _measure(model, scratch.folder(), name, context, options)


def _kept(where: pathlib.Path, name: str) -> pathlib.Path | None:
    """The center of that name; None if it is not there, or corrupt.  TBQError if the model is known to have none."""
    path, never = where / f"{name}.gguf", where / f"{name}.none"
    if path.is_file():
        with contextlib.suppress(TBQError):  # measure it again
            read_center(path)
            return path
    if never.is_file():
        raise TBQError(never.read_text(encoding="utf-8"))
    return None


def _check_writable(where: pathlib.Path) -> None:
    """OSError before anything is measured that could not be written there."""
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=where):
        if shutil.disk_usage(where).free < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _measure(
    model: str | os.PathLike[str], where: pathlib.Path, name: str, context: int, options: Sequence[str]
) -> pathlib.Path:
    path = where / f"{name}.gguf"
    try:
        calibrate(model, path, context, options=words_for(options, MODEL, ROPE))
    except NothingToCenter as error:  # of a model, whatever the machine: it need not be loaded for that again
        with contextlib.suppress(OSError):
            path.with_suffix(".none").write_text(str(error), encoding="utf-8")
        raise
    return path
