# SPDX-License-Identifier: MIT
"""Calibration: measures the mean of a model's keys, once for each model.

llama.cpp stores keys minus this mean.  The energy of the queries in each channel is measured too; it tells the
encoder of a tbq type where error costs most.

    tbq calibrate model.gguf -o model.center.gguf
    llama-server -m model.gguf --cache-type-k tbq4_0 --cache-center model.center.gguf

`tbq serve` and tbq.llama.Llama run both steps automatically.  Why attention stays the same:
docs/design/centering.md.
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
from tbq._types import types
from tbq.errors import TBQError, one_line
from tbq.gguf_files.reader import as_path, open_gguf
from tbq.kv_cache.center_file import fingerprint, read_center
from tbq.kv_cache.model import read_model
from tbq.kv_cache.settings import calibration_context
from tbq.kv_cache.whole_keys import needs_whole_keys
from tbq.programs import output
from tbq.programs.options import (
    MODEL,
    ROPE,
    adapter_files,
    adapter_options,
    option_values,
    select_words,
    with_absolute_adapters,
)
from tbq.programs.process import Done, run

#: A change of the measurement increases it.  The names of kept centers depend on it, so that old ones are not used.
#: ggml_tbq/llama/llama-center-stats.cpp has the same number: without options for RoPE, --cache-center auto shares them.
_METHOD = "3"

#: What follows the name of a center in the name of the file that says why there is none.  ".none" was its name while
#: attention sinks, soft-caps and latent attention were reasons.
_NOTHING = ".nothing"

_ROOM = 4 << 20  # bytes that a calibration needs in its folder, for a text and the center


class NothingToCenter(TBQError):
    """The keys of a model cannot be centered, because centering would change its attention."""


def _load_text(text: "bytes | str | os.PathLike[str] | None") -> tuple[bytes, str]:
    """The text for the model, and the name of the text in messages."""
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

    model: a GGUF file, the first one of a split model.
    context: tokens; the keys are measured at positions that are spread over them.
    text: the text that the model reads: UTF-8 bytes, or the path of a file; Python's language reference if None.
    chunks: number of chunks of 128 tokens, 8 if None.  options: llama.cpp's options, for example ["-ngl", "99"].
    on_chunk: is called with the number of finished chunks and of all chunks.
    Returns a table: the share of the keys' energy that is in the means, by layer and length of context.
    The same arguments give the same bytes.
    Raises TBQError with llama.cpp's reason, for example that there are no keys to center or that the text is too short;
    OSError if the file cannot be written.
    """
    out = as_path(out)
    if out.is_dir():
        raise TBQError(f"{out} is a folder; name a file to write")
    if not _files.target(out).parent.is_dir():
        raise TBQError(f"{out.parent} is not a folder")
    opened = open_gguf(model)  # its errors say more about a bad file than those of the program
    if out.exists() and any(out.samefile(file) for file in opened.files):
        raise TBQError(f"{out} is the model itself; name another file to write")

    def progress(text: str) -> None:
        if on_chunk and (found := output.center_progress(text)):
            on_chunk(*found)

    content, text_name = _load_text(text)
    threads = [] if option_values(options, "--threads") else ["-t", str(cores())]
    files = ["-m", str(as_path(model).absolute()), "-f", "text", "-o", "center"]
    arguments = [
        *threads,
        *with_absolute_adapters(options),
        *files,
        "-c",
        str(context),
        *(["--chunks", str(chunks)] if chunks else []),
    ]
    with _files.workplace(out) as parts:
        with _files.naming(out):
            (parts / "text").write_bytes(content)
        done = _run_center(arguments, parts, progress)
        if done.status or not (parts / "center").is_file():
            raise _error_of(done, model, out, parts, text_name)
        read_center(parts / "center")
        _files.put([(parts / "center", out)])
    return output.center_shares(done.stdout)


def _run_center(arguments: Sequence[str], folder: pathlib.Path, progress: Callable[[str], None]) -> Done:
    """Runs llama-cache-center.  If the GPU is too small for the model, runs it again on the CPU."""
    environment = {"OMP_WAIT_POLICY": "passive"}
    done = run("llama-cache-center", arguments, folder, progress, environment)
    if done.status and output.is_too_large(output.center_error(done.text) or ""):
        done = run("llama-cache-center", [*arguments, "-ngl", "0"], folder, progress, environment)
    return done


def _error_of(
    done: Done, model: str | os.PathLike[str], out: pathlib.Path, parts: pathlib.Path, text_name: str
) -> TBQError:
    """The error for a run that wrote no center.  text_name: the name of the text in messages."""
    if nothing := output.nothing_to_center(done.text):
        return NothingToCenter(f"the keys of {os.fspath(model)} cannot be centered: {nothing}")
    if output.center_not_written(done.text):  # the program knows only the name in the workplace
        return TBQError(f"{out} cannot be written; {parts.parent} has {shutil.disk_usage(parts).free} bytes free")
    reason = output.center_error(done.text)
    if reason and reason.startswith("the text has "):
        return TBQError(f"{text_name} is too short: it{reason.removeprefix('the text')}")
    return TBQError(f"the keys of {os.fspath(model)} were not measured: {reason or done.error()}")


class Scratch:
    """A temporary folder, which is made at the first call of folder().

    close() removes it, or the end of this object.
    """

    def __init__(self) -> None:
        self._remove: Callable[[], object] | None = None

    def folder(self) -> pathlib.Path:
        """The folder; OSError if no folder can be made."""
        if self._remove is None:
            try:
                self._folder = tempfile.mkdtemp(prefix="tbq-")
            except FileNotFoundError:  # a read-only container still has this folder
                self._folder = tempfile.mkdtemp(prefix="tbq-", dir="/dev/shm")
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, True)
        return pathlib.Path(self._folder)

    def close(self) -> None:
        """Removes the folder."""
        if self._remove is not None:
            self._remove()
            self._remove = None


def centers_folder() -> pathlib.Path | None:
    """The folder that keeps the centers of models, in the user's folder for caches.

    None if the user has no such folder.
    """
    return _files.user_cache_folder("centers")


def center_file_for(
    model: str | os.PathLike[str],
    k: str,
    context: int,
    center: "bool | str | os.PathLike[str]",
    options: Sequence[str],
    say: Callable[[str], None],
    scratch: Scratch,
) -> pathlib.Path | None:
    """The center file for a cache with keys of type k, or None.  tbq.Server and tbq.llama use it.

    center: True for the center of the model, which is measured now if it is not kept yet; False for None; or a file.
    Keys of 16 bits and more get None, and keys that the model's attention could not read centered
    (whole_keys.needs_whole_keys).  context: tokens, the positions that keys can have.
    scratch: where to write a center that cannot be kept.
    say: is called with a line before something is measured, and with the reason if the keys cannot be centered.
    Raises TBQError if the file is not a center file.
    """
    if not isinstance(center, bool):
        read_center(center)
        return pathlib.Path(center)
    if not center or k in ("f32", "f16", "bf16"):
        return None
    try:
        if k not in types and (why := needs_whole_keys(open_gguf(model))):
            raise NothingToCenter(f"with {why}, keys of a tbq type can be centered, {k} keys cannot")
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
    """The center file of a model for a context.  It is measured now if centers_folder() does not have it.

    context: tokens; contexts of similar lengths share a center.
    options: llama-server's options, of which those for the model, RoPE, adapters and control vectors count.
    say: is called with a line before something is measured.  scratch: where to write a center that cannot be kept.
    Raises TBQError if the keys cannot be measured, or if the center cannot be kept and there is no scratch.
    """
    context = calibration_context(context, read_model(model, options).context)
    what_changes_keys = [
        *select_words(options, ROPE),
        *adapter_options(options),
        *map(fingerprint, adapter_files(options)),
    ]
    words = [_METHOD, fingerprint(model), str(context), *what_changes_keys]
    name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:32]
    what = f"measuring the mean of the keys of {pathlib.Path(model).name}"
    where, why = centers_folder(), "the user has no folder for caches: neither XDG_CACHE_HOME nor HOME is set"
    if where is not None:
        try:
            if found := _find_kept(where, name):
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


def _find_kept(where: pathlib.Path, name: str) -> pathlib.Path | None:
    """The kept center of that name; None if it is missing or corrupt.

    TBQError if an earlier measurement found that the keys cannot be centered.
    """
    path, never = where / f"{name}.gguf", where / f"{name}{_NOTHING}"
    if path.is_file():
        with contextlib.suppress(TBQError):  # a corrupt center is measured again
            read_center(path)
            return path
    if never.is_file():
        raise TBQError(never.read_text(encoding="utf-8"))
    return None


def _check_writable(where: pathlib.Path) -> None:
    """Raises OSError if a center could not be written to a folder; called before the measurement."""
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=where):
        if shutil.disk_usage(where).free < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _measure(
    model: str | os.PathLike[str], where: pathlib.Path, name: str, context: int, options: Sequence[str]
) -> pathlib.Path:
    path = where / f"{name}.gguf"
    try:
        calibrate(model, path, context, options=[*select_words(options, MODEL, ROPE), *adapter_options(options)])
    except NothingToCenter as error:  # true on every machine, so the model is not loaded for it again
        with contextlib.suppress(OSError):
            path.with_suffix(_NOTHING).write_text(str(error), encoding="utf-8")
        raise
    return path
